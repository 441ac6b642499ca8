"""A solve that was made before, with other numbers: compiled code is called at once, and one small node holds its way back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrate import Plan, stands
from ..integrate.plan import Grid
from ..native.back import sweep_native
from ..native.device import trimmed
from ..native.memory import FEW_BYTES, in_parts, plain, put_together
from ..native.program import Program
from ..native.reading import Unreadable
from ..native.solve import Frame, Solved, solved
from ..system.transforms import functorch_active, naming_writes
from ..torch_internals import copy_by_copy, unviewed
from .undeclared import REJECTED

__all__ = ["Prepared", "PreparedNode", "Run", "run_of"]

#: what the way back does not read
_NOTHING = torch.empty(0, device="cpu")


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
    _ends: tuple[tuple[float, float], Tensor, Tensor] | None = None

    def ends(self, span: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Those of a span, (2,), and of each trajectory, (2, B), which nobody writes to: the same tensors while the span is the same."""
        if self._ends is None or self._ends[0] != span:
            ends = torch.tensor(span, dtype=torch.float64)
            self._ends = span, ends, ends.unsqueeze(-1).expand(2, self.rows).contiguous()
        return self._ends[1:]

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
) -> tuple[Solved, Tensor, list[Tensor]] | None:
    """The solve, the states asked for (T, *state), and the tensors as the program takes them; None where the general way has to look:
    something failed, or rests.

    ``t_eval``: in the order of time; None: the two ends. ``tensors``: those of the fingerprint.
    """
    program, plan = prepared.program, prepared.plan
    values = program.values([tensors[k] for k in prepared.places], prepared.derivatives)
    start = plain(in_parts(y0), program.real)
    pair = start.new_empty((2, *start.shape)) if t_eval is None else None
    flat = start.view(prepared.rows, prepared.width)
    found = solved(program, prepared.frame, plan, anchors, t_eval, flat, values, True, pair)
    summary = found.summary
    if summary.otherwise or summary.unstable or prepared.to_be_looked_at(summary.rejected):
        return None
    if prepared.derivatives:
        states = found.steps["states"][: summary.most + 1] if plan.method.multistep else None
        if summary.resting if states is None else bool(stands(states).any()):
            return None
    y = found.samples.view(-1, *start.shape) if pair is None else pair
    return found, unviewed(torch.view_as_complex(y)) if y0.is_complex() else y, values


class PreparedNode(torch.autograd.Function):
    """``apply(run, y0, *inputs)`` is the result as a function of the initial state and of those tensors that require grad."""

    @staticmethod
    def forward(ctx: Any, run: Run, *inputs: Tensor) -> Tensor:
        y, found = run.y, run.found
        run.y = run.found = None
        assert y is not None and found is not None
        ctx.run, ctx.n_steps = run, found.summary.most
        # what there is room for beyond the steps is worth no tensors of its own, as long as it is little
        steps = found.steps if run.prepared.frame.size * ctx.n_steps < FEW_BYTES else trimmed(found.steps, ctx.n_steps)
        ctx.set_materialize_grads(False)
        kept = [steps["states"], steps["t"], steps["h"], found.sample_step]
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
        program, plan = prepared.program, prepared.plan
        states, t, h, sample_step, stages, extra = [*saved[: ctx.n_kept], _NOTHING, _NOTHING][:6]
        grid = Grid(states, t, h, _NOTHING, _NOTHING, sample_step, _NOTHING, _NOTHING, stages, extra)
        parts = in_parts(bar)
        bars, pair = ((None,) * 4, parts) if run.t_eval is None else ((None, parts, None, None), None)
        try:
            back = sweep_native(program, plan, grid, run.anchors, run.t_eval, run.values, bars, False, True, pair, ctx.n_steps)
        except Unreadable:
            # the general way says why
            return (None, *_again(run, inputs, bar, needed))
        run.report(ctx.n_steps * len(plan.method.nodes), ctx.n_steps)
        if not back.finite:
            # which of the user's functions it was, the general way finds out
            return (None, *_again(run, inputs, bar, needed))
        results = [put_together(back.y0, inputs[0])]
        for k, x in zip(run.wanted, inputs[1:], strict=True):
            found = back.inputs[k]
            results.append(found if found.shape == x.shape else put_together(found, x))
        return (None, *(x if need else None for x, need in zip(results, needed, strict=True)))


def _again(run: Run, inputs: Sequence[Tensor], bar: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    with torch.enable_grad():
        y = run.again()
    wanted = [x for x, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, bar, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in needed]
