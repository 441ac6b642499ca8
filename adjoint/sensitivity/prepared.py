"""A solve that was made before, with other numbers: compiled code is called at once, and one small node holds its way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..integrate import Plan, stands
from ..integrate.plan import Grid
from ..native.back import sweep_native
from ..native.program import Program
from ..native.reading import Unreadable
from ..native.solve import Frame, Solved, solved
from ..system.transforms import functorch_active, naming_writes
from ..torch_internals import copy_by_copy
from .undeclared import REJECTED

__all__ = ["Prepared", "PreparedNode", "Run", "run_of"]


#: numbers
_FEW = 32


@dataclass(eq=False)
class Prepared:
    """What solves of one right-hand side by one plan have in common, for states of one shape ``(B, n)``.

    ``places``: of every tensor that the program reads, its place among those of the `Fingerprint`. ``derivatives``: of the first order, by
    one plain way back, may be asked for.
    """

    program: Program
    plan: Plan
    frame: Frame
    places: tuple[int, ...]
    rows: int
    width: int
    derivatives: bool
    _ends: tuple[tuple[float, float], Tensor] | None = None

    def ends(self, span: tuple[float, float]) -> Tensor:
        """Those of a span, (2,), which nobody writes to: the same tensor while the span is the same."""
        if self._ends is None or self._ends[0] != span:
            self._ends = span, torch.tensor(span, dtype=torch.float64)
        return self._ends[1]

    def to_be_looked_at(self, rejected: int) -> bool:
        """Whether the general way is to look for jumps of ``fun`` in a solve with so many rejected steps."""
        return self.derivatives and rejected >= REJECTED and self.program.looks.coming()


@dataclass(eq=False)
class Run:
    """One solve: what its way back needs. ``again`` solves once more by the general way, for all but plain first derivatives."""

    prepared: Prepared
    #: until the node has it
    found: Solved | None
    anchors: Tensor
    t_eval: Tensor | None
    values: Sequence[Tensor]
    wanted: tuple[int, ...]
    again: Callable[[], Tensor]
    report: Callable[[int, int], None]
    #: the result, until the node has it
    y: Tensor | None = None


def run_of(
    prepared: Prepared, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, tensors: Sequence[Tensor]
) -> tuple[Solved, list[Tensor]] | None:
    """The solve and the tensors as the program takes them; None where the general way has to look: something failed, or rests.

    ``t_eval``: in the order of time; ``tensors``: those of the fingerprint.
    """
    program, plan = prepared.program, prepared.plan
    values = program.values([tensors[k] for k in prepared.places], prepared.derivatives)
    flat = y0.detach().resolve_neg().to(program.real).reshape(prepared.rows, prepared.width).contiguous()
    found = solved(program, prepared.frame, plan, anchors, t_eval, flat, values, ordered=True)
    if prepared.rows == 1:
        counts = found.counts[:, 0].tolist()
        if counts[3] != 0 or counts[4] or prepared.to_be_looked_at(counts[0] - counts[1]):
            return None
    elif bool(found.counts[3:5].any()) or prepared.to_be_looked_at(int((found.counts[0] - found.counts[1]).max())):
        return None
    if prepared.derivatives:
        states = found.steps["states"]
        if bool((stands(states) if plan.method.multistep else states[-1] == states[0]).any()):
            return None
    return found, values


class PreparedNode(torch.autograd.Function):
    """``apply(run, y0, *inputs)`` is the result as a function of the initial state and of those tensors that require grad."""

    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: Tensor) -> Tensor:
        y, found = run.y, run.found
        run.y = run.found = None
        assert y is not None and found is not None
        steps = found.steps
        ctx.run = run
        ctx.set_materialize_grads(False)
        # what is written to one of the counts is not written to this one
        kept = [steps["states"], steps["t"], steps["h"], found.counts[3].clone(), found.sample_step]
        method = run.prepared.plan.method
        kept += [steps["stages"]] if method.implicit else []
        kept += [steps["extra"]] if method.multistep else []
        ctx.n_kept = len(kept)
        ctx.save_for_backward(*kept, *inputs)
        return y

    @staticmethod
    @copy_by_copy
    @naming_writes
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, ...]:
        run: Run = ctx.run
        # also says so where the graph is gone, or one of the inputs was written to
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if bar is None:
            return (None, *([None] * len(needed)))
        inputs = saved[ctx.n_kept :]
        if torch.is_grad_enabled() or functorch_active():
            return (None, *_again(run, inputs, bar, needed))
        prepared = run.prepared
        bars = bar.reshape(-1, prepared.rows, prepared.width)
        nothing = saved[0].new_empty(0)
        states, t, h, status, sample_step, stages, extra = [*saved[: ctx.n_kept], nothing, nothing][:7]
        grid = Grid(states, t, h, nothing, nothing, sample_step, status, nothing, stages, extra)
        ends = (bars[1], None, None, None) if run.t_eval is None else (None, bars, None, None)
        try:
            back = sweep_native(prepared.program, prepared.plan, grid, run.anchors, run.t_eval, run.values, ends, False, ordered=True)
        except Unreadable:
            # the general way says why
            return (None, *_again(run, inputs, bar, needed))
        steps = saved[1].shape[0]
        run.report(steps * len(prepared.plan.method.nodes), steps)
        y0_bar = back.y0 if run.t_eval is not None else back.y0 + bars[0]
        results = [y0_bar.view(inputs[0].shape)]
        for k, x in zip(run.wanted, inputs[1:], strict=True):
            found = back.inputs[k]
            results.append(found if found.shape == x.shape else found.reshape(x.shape))
        if prepared.rows == 1 and not all(map(_finite, results)):
            # which of the user's functions it was, the general way finds out
            return (None, *_again(run, inputs, bar, needed))
        return (None, *(x if need else None for x, need in zip(results, needed, strict=True)))


def _finite(x: Tensor) -> bool:
    # few numbers are looked at faster by Python
    return all(map(isfinite, x.reshape(-1).tolist())) if x.numel() <= _FEW else isfinite(float(x.sum()))


def _again(run: Run, inputs: Sequence[Tensor], bar: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    with torch.enable_grad():
        y = run.again()
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, bar, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in needed]
