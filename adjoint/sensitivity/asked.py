"""What every way back through a recorded solve is made of: what it is given and gives, what of the solve a loss depends on, step by step,
and ``fun`` at a point with its pullback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from ..errors import CapturedTensorLost
from ..integrate.plan import Grid
from ..methods.family import Pullback, row_dot
from ..system.capture import depends_on_others, unknown_leaves
from ..system.system import Flat, System, VmappedSystem
from ..system.transforms import functorch_active
from ..torch_internals import foreach_add_, is_legacy_batchedtensor
from .padding import Found, shelter
from .problem import Problem, StepTimes, kept_steps, step_times

__all__ = ["LOST", "Asked", "Linearizer", "Losses", "all_finite", "anchors_bar", "both", "check_known", "in_shelter", "visible", "vjp"]

class Asked(NamedTuple):
    """Cotangents of a solve, and which ones are asked for.

    Attributes
    ----------
    grid : the recorded steps
    anchors : (A, B); t_eval : (T, B) or None; inputs : of the system
    bars : cotangents of ``final, samples, states, stages``, None for those of zero
    wants : whether those of ``anchors, t_eval, y0, *inputs`` are asked for
    """

    problem: Problem
    grid: Grid
    anchors: Tensor
    t_eval: Tensor | None
    inputs: Sequence[Tensor]
    bars: Sequence[Tensor | None]
    wants: Sequence[bool]

    @property
    def moving(self) -> bool:
        """Whether those of times are."""
        return bool(self.wants[0] or self.wants[1])

    @property
    def n_steps(self) -> int:
        """Of the trajectory with most."""
        return self.grid.t.shape[0]

    @property
    def final_bar(self) -> Tensor | None:
        """Cotangent of the last state, where there is one."""
        bar = self.bars[0]
        return None if bar is None else torch.where((self.grid.status >= 0).unsqueeze(-1), bar, 0.0)

    @property
    def point(self) -> list[Tensor | None]:
        """Where derivatives are taken: ``anchors, t_eval, y0, *inputs``."""
        return [self.anchors, self.t_eval, self.grid.states[0], *self.inputs]

    def times(self, anchors: Tensor) -> StepTimes:
        """Of the steps, by these anchors."""
        grid = self.grid
        return step_times(grid.t, grid.h, grid.segment, grid.lands, anchors, self.problem.plan.shift)

    def stages_bars(self) -> dict[int, Tensor]:
        """Cotangents ``(S, B, n)`` of the stages that are part of the record, by their steps."""
        bars = self.bars[3]
        if bars is None or not len(bars):
            return {}
        return dict(zip(kept_steps(self.problem.plan, self.grid.event_step, self.n_steps), bars, strict=True))

    def answer(
        self, anchors: Tensor | None, t_eval: Tensor | None, y0: Tensor | None, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Cotangents of ``(anchors, t_eval, y0, *inputs)``, of the first three those that are asked for."""
        first = (x if want else None for x, want in zip((anchors, t_eval, y0), self.wants[:3], strict=True))
        return (*first, *inputs)

    def sound(self, found: Sequence[Tensor | None]) -> bool:
        """Whether the cotangents that a way back ``found`` from these are finite, if these are.

        So are those of solves that all failed, and what a transform is around, whose numbers cannot be looked at.
        """
        if not visible(self.problem, self.bars) or all_finite(found):
            return True
        return not all_finite(self.bars) or bool((self.grid.status < 0).all())


def visible(problem: Problem, bars: Sequence[Tensor | None]) -> bool:
    """Whether cotangents can be looked at."""
    if not isinstance(problem.system, System) or functorch_active():
        return False
    return not any(x is not None and is_legacy_batchedtensor(x) for x in bars)


def all_finite(values: Sequence[Tensor | None]) -> bool:
    """Whether they are numbers."""
    # a gradient may be sparse (embeddings)
    numbers = [x if x is None or x.layout is torch.strided else x.coalesce().values() for x in values]
    flags = [torch.isfinite(x).all() for x in numbers if x is not None and x.numel()]
    # read at once
    return not flags or bool(torch.stack([x.to(flags[0].device) for x in flags]).all())


def in_shelter(sweep: Callable[..., Found]) -> Callable[..., Found]:
    """A sweep that is given what `shelter` makes of record and inputs; of one trajectory there is nothing to make."""

    @wraps(sweep)
    def sheltered(asked: Asked, *more: Any) -> Found:
        if asked.grid.h.shape[1] == 1 and not functorch_active():
            return sweep(asked, *more)
        safe = shelter(asked.problem, asked.grid, asked.t_eval, asked.inputs)
        return safe.marked(sweep(asked._replace(problem=safe.problem, grid=safe.grid, inputs=safe.inputs), *more), asked.bars)

    return sheltered


def anchors_bar(anchors: Tensor, grid: Grid, t_bars: Tensor, h_bars: Tensor) -> Tensor:
    """Cotangents of steps to those of the anchors: see `step_times`."""
    landed = torch.where(grid.lands, h_bars, 0.0)
    out = torch.zeros_like(anchors)
    out.scatter_add_(0, grid.segment, t_bars - landed)
    out.scatter_add_(0, (grid.segment + 1).clamp(max=anchors.shape[0] - 1), landed)
    return out


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Their sum, where None is zero."""
    return b if a is None else a if b is None else a + b


class Losses:
    """Cotangents of what a solve gave, sorted by the step that it lies in: of samples, states and stages."""

    def __init__(self, asked: Asked) -> None:
        grid, t_eval, bar, time_bars = asked.grid, asked.t_eval, asked.bars[1], asked.moving
        self.method, self._states, self._kept = asked.problem.plan.method, asked.bars[2], asked.stages_bars()
        # contiguous, whatever the layout of the times is: it is filled in flat
        self.t_eval_bar = torch.zeros_like(t_eval, memory_format=torch.contiguous_format) if t_eval is not None and time_bars else None
        n_steps, rows = grid.t.shape
        self.rows, self.time_bars = rows, time_bars
        self.inner = self.ends = [(0, 0)] * n_steps
        if bar is None or t_eval is None or n_steps == 0:
            return
        step = grid.sample_step
        index = step.clamp(min=0)
        h = grid.h.gather(0, index)
        theta = (t_eval - grid.t.gather(0, index)) / torch.where(h == 0, 1.0, h)
        # a sample at the end of a step is the state there, whose own cotangent does the rest
        group = torch.where((theta == 1.0) & (not time_bars) & (step >= 0), step + n_steps, step).reshape(-1)
        order = group.argsort(stable=True)
        counts = torch.bincount(group + 1, minlength=2 * n_steps + 1).tolist()
        self.order = order
        self.row = order % rows
        self.h, self.theta = h.reshape(-1)[order], theta.reshape(-1)[order]
        self.bar = bar.flatten(0, 1)[order]
        self.weights = self.method.dense_weights(self.theta)
        self.scaled = (self.weights * self.h.unsqueeze(-1)).to(bar.dtype)
        edges = [0]
        for count in counts:
            edges.append(edges[-1] + count)
        pairs = list(pairwise(edges[1:]))
        self.inner, self.ends = pairs[:n_steps], pairs[n_steps:]

    def _rows_sum(self, start: int, stop: int) -> Tensor:
        values = self.bar[start:stop]
        if self.rows == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.rows, values.shape[-1]).index_add_(0, self.row[start:stop], values)

    def at_end(self, k: int) -> list[Tensor]:
        """Cotangents of the state at the end of step ``k``."""
        start, stop = self.ends[k]
        found = [] if self._states is None else [self._states[k + 1]]
        return [*found, self._rows_sum(start, stop)] if stop > start else found

    def at_start(self, k: int) -> Tensor | None:
        """Cotangent of the state at the start of step ``k``, by way of the dense output."""
        start, stop = self.inner[k]
        return self._rows_sum(start, stop) if stop > start else None

    def at_stages(self, k: int) -> Tensor | None:
        """Cotangents ``(S, B, n)`` of the stages of step ``k``."""
        return both(self._of_samples(k), self._kept.get(k))

    def _of_samples(self, k: int) -> Tensor | None:
        start, stop = self.inner[k]
        if stop == start:
            return None
        bar, scaled = self.bar[start:stop], self.scaled[start:stop]
        if self.rows == 1:
            return (scaled.T @ bar).unsqueeze(1)
        out = bar.new_zeros(scaled.shape[1], self.rows, bar.shape[-1])
        return out.index_add_(1, self.row[start:stop], scaled.T.unsqueeze(-1) * bar)

    def add_time_bars(self, k: int, ks: Sequence[Tensor], t_bar: Tensor, h_bar: Tensor) -> None:
        """Cotangents of the sample times in step ``k``; adds those of its start and size to ``t_bar``, ``h_bar`` (B,)."""
        start, stop = self.inner[k]
        if stop == start:
            return
        row, bar, theta = (x[start:stop] for x in (self.row, self.bar, self.theta))
        products = torch.stack([row_dot(k_i[row], bar) for k_i in ks], dim=-1).double()
        # d/dtheta of h sum b_i(theta) k_i . bar, over h
        slope = (self.method.dense_slopes(theta) * products).sum(-1)
        size = (self.weights[start:stop] * products).sum(-1) - theta * slope
        assert self.t_eval_bar is not None
        self.t_eval_bar.view(-1)[self.order[start:stop]] = slope
        t_bar.index_add_(0, row, -slope)
        h_bar.index_add_(0, row, size)


#: of so many evaluations one is checked by `Linearizer.check_often`
_CHECKED = 4
#: what is wrong where a derivative would be missing
LOST = (
    "fun uses captured tensor(s) that it does not use at the start of the span, or where no derivative can be seen (inside of TorchScript "
    "or of compiled code), so their gradient would be missing. Pass them through args=, or make fun an nn.Module "
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
