"""``fun`` at a point with its pullback."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from ..errors import CapturedTensorLost
from ..integrate.plan import Grid
from ..methods.family import Pullback
from ..system.capture import depends_on_others, unknown_leaves
from ..system.system import Flat, System, VmappedSystem
from ..system.transforms import functorch_active
from ..torch_internals import foreach_add_

__all__ = ["LOST", "Linearizer", "check_known", "vjp"]

#: of so many evaluations one is checked by `Linearizer.check_often`
_CHECKED = 4
#: what is wrong where a derivative would be missing
LOST = (
    "fun uses captured tensor(s) that it does not use at the start of the span, or where no derivative can be seen (inside of a "
    "torch.autograd.Function or of compiled code), so their gradient would be missing. Pass them through args=, or make fun an nn.Module "
    "that owns them. Or it keeps a tensor from call to call that it writes into: return a new one instead."
)


def vjp(
    outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], keep: bool = False
) -> Sequence[Tensor | None]:
    """``torch.autograd.grad`` without its argument checks, which cost as much as a small layer; None for unused targets. ``keep``: the
    graph, for another time."""
    engine = Variable._execution_engine
    return engine.run_backward(outputs, cotangents, keep, False, targets, allow_unreachable=True, accumulate_grad=False)


def check_known(system: System | VmappedSystem, grid: Grid, inputs: Sequence[Tensor]) -> None:
    """Raise if ``fun`` depends on a tensor that the solve does not know of, where its derivatives are differentiated themselves.

    `Linearizer.check` looks at the graph of ``fun``, which there holds what surrounds the solve too. So ``fun`` is called at each step with
    constants for all that is known: its value must be one too.
    """
    f = system.bind([x.detach() for x in inputs])
    t, states, stages = grid.t, grid.states, grid.stages
    real = states.dtype.to_real()
    for k in range(t.shape[0]):
        y = states[k].detach()
        at = torch.cat([y, stages[k, -1].detach()], -1) if system.residual is not None else y
        with torch.enable_grad():
            out = f(t[k].detach().to(real), at)
        # where fun takes derivatives itself, its variables require grad
        only = system.captured if isinstance(system, System) and system.inner_grad else None
        if depends_on_others(out, only):
            raise CapturedTensorLost(f"in step {k} of the solve " + LOST)


class Linearizer:
    """``f`` with its pullback; adds ``f_p* v`` to the cotangents of the inputs (docs/theory.md, section 1)."""

    def __init__(self, f: Flat, inputs: Sequence[Tensor], wants: Sequence[bool], time: bool) -> None:
        self.f, self.time = f, time
        # a tensor that is an input twice gets its whole cotangent the first time
        first = {id(x): i for i, x in reversed(list(enumerate(inputs)))}
        self.wanted = [i for i, want in enumerate(wants) if want and first[id(inputs[i])] == i]
        self.inputs = inputs
        self.targets = tuple(inputs[i] for i in self.wanted)
        self.bars: list[Tensor | None] = [None] * len(inputs)
        self.n_fun = 0
        self.check_next = False
        self._evaluations = 0
        self._totals: list[Tensor] | None = None
        self._known: dict[int, object] | None = None

    def anew(self, f: Flat) -> Linearizer:
        """One of another ``f`` of the same inputs, with nothing counted or added yet."""
        return Linearizer(f, self.inputs, [i in self.wanted for i in range(len(self.inputs))], self.time)

    def take(self, other: Linearizer) -> None:
        """Add what another one has counted and added."""
        self.n_fun += other.n_fun
        self.accumulate([other.bars[i] for i in self.wanted])

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        self.n_fun += 1
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            if self.time:
                t = t.detach().requires_grad_(True)
            k = self.f(t, y)
        if self.check_next:
            self.check(k, t, y)

        def pullback(v: Tensor) -> tuple[Tensor, Tensor | None]:
            if not k.requires_grad:
                return torch.zeros_like(y), torch.zeros_like(t) if self.time else None
            if self.time:
                u, time_bar, *rest = vjp((k,), (y, t, *self.targets), (v,))
                time_bar = torch.zeros_like(t) if time_bar is None else time_bar
            else:
                u, *rest = vjp((k,), (y, *self.targets), (v,))
                time_bar = None
            self.accumulate(rest)
            return torch.zeros_like(y) if u is None else u, time_bar

        return k.detach(), pullback

    def accumulate(self, bars: Sequence[Tensor | None]) -> None:
        """Add cotangents of the targets."""
        if self._totals is not None and all(g is not None for g in bars):
            foreach_add_(self._totals, bars)  # pyright: ignore[reportCallIssue, reportArgumentType]
            return
        for i, g in zip(self.wanted, bars, strict=True):
            total = self.bars[i]
            if g is None:
                continue
            if total is None:
                # copied: the cotangent may be somebody else's memory, and this sum is made in place
                self.bars[i] = g.clone()
            elif functorch_active():
                # what all copies share cannot be added to in place by one of them
                self.bars[i] = total + g
            else:
                total.add_(g)
        if functorch_active():
            return
        totals = [x for x in (self.bars[i] for i in self.wanted) if x is not None]
        self._totals = totals if totals and len(totals) == len(self.wanted) else None

    def check(self, k: Tensor, t: Tensor, *known: Tensor) -> None:
        """Raise if ``fun`` here depends on a leaf that the solve does not know of (once each time that ``check_next`` is set)."""
        if not self.check_next:
            return
        self.check_next = False
        if not self._leads_elsewhere(k, t, *known):
            return
        lost = unknown_leaves(k, [*self.inputs, t, *known])
        if lost:
            shapes = ", ".join(str(tuple(x.shape)) for x in lost[:3])
            raise CapturedTensorLost(f"near t = {float(t.reshape(-1)[0]):.6g}, in shapes {shapes}, " + LOST)

    def check_often(self, k: Tensor, t: Tensor, *known: Tensor) -> None:
        """As `check`, in one of some evaluations: at least once in each step of a way back that evaluates ``fun`` by itself."""
        self.check_next = self._evaluations % _CHECKED == 0
        self._evaluations += 1
        self.check(k, t, *known)

    def _leads_elsewhere(self, k: Tensor, *own: Tensor) -> bool:
        """Whether the graph of ``k`` ends anywhere but at the inputs and the ``own`` leaves: a quick form of `unknown_leaves`."""
        if self._known is None:
            nodes = [torch.autograd.graph.get_gradient_edge(x).node for x in self.inputs if x.requires_grad]
            self._known = {id(node): node for node in nodes}
        ends = [id(x) for x in own]
        seen = dict(self._known)
        todo = [k.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or id(node) in seen:
                continue
            seen[id(node)] = node  # kept: nodes are made on access, and their identities must not be given twice
            following = node.next_functions
            if following:
                todo.extend([n for n, _ in following])
            elif id(getattr(node, "variable", None)) not in ends and hasattr(node, "variable"):
                return True
        return False
