"""First derivatives by compiled code, of a solve that was by it."""

from __future__ import annotations

import torch
from torch import Tensor

from .asked import Asked, anchors_bar
from .discrete import eager_sweep
from .problem import kept_steps

__all__ = ["by_native", "native_sweep"]


def native_sweep(asked: Asked) -> tuple[Tensor | None, ...]:
    """As `eager_sweep`."""
    found = by_native(asked)
    return eager_sweep(asked) if found is None else found


def by_native(asked: Asked, slots: int | None = None) -> tuple[Tensor | None, ...] | None:
    """As `eager_sweep`; None where that is to do it. ``slots``: the grid has the first state alone, and as many of the others as that exist
    at a time."""
    problem, grid, anchors, t_eval, inputs, bars, wants = asked
    plan, timed = problem.plan, asked.moving
    empty = anchors[0] == anchors[-1]
    if problem.idle is not None and problem.idle.shape == empty.shape:
        empty = empty & ~problem.idle
    if (timed or bars[3] is not None) and bool(empty.any()):
        # a span of no length has a step of no length, whose derivatives in the times, and of its slopes, are those of any step
        return None
    n_steps = grid.t.shape[0]
    stages_bar = bars[3]
    if stages_bar is not None and 0 < len(stages_bar) < n_steps:
        # of the steps with events alone
        kept = torch.tensor(kept_steps(plan, grid.event_step, n_steps), device=stages_bar.device)
        bars = (*bars[:3], stages_bar.new_zeros(n_steps, *stages_bar.shape[1:]).index_copy(0, kept, stages_bar.detach()))
    found = problem.native.backward(plan, grid, anchors, t_eval, len(inputs), bars, timed, slots)
    if found is None:
        return None
    bar, of_inputs = found
    problem.backward_report(n_steps * len(plan.method.nodes), n_steps)
    return (
        anchors_bar(anchors, grid, bar.t, bar.h) if wants[0] else None,
        bar.t_eval if wants[1] and len(bar.t_eval) else None,
        bar.y0 if wants[2] else None,
        *(x if want else None for x, want in zip(of_inputs, wants[3:], strict=True)),
    )
