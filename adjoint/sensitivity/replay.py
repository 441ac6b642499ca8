"""The recorded steps again, as plain differentiable tensor code: for unrolled gradients, tangents and derivatives of derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..integrate import Plan
from ..integrate.plan import Grid
from ..system.system import Flat
from .padding import padding
from .problem import Outputs, interpolate, kept_steps, stage_times, step_times

__all__ = ["first_slope", "hands_on", "replay", "replay_step"]


def replay_step(
    f: Flat,
    plan: Plan,
    times: Sequence[Tensor],
    h: Tensor,
    y: Tensor,
    dense: bool,
    handed: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """One step as a pure function: the new state ``(B, n)`` and, with ``dense``, all stages ``(S, B, n)``.

    ``h`` is float64, ``(B,)``, or 0-d for a single trajectory in any shape. ``handed``: the last slope
    ``(B, n)`` of the step before, for methods whose first it is, and the rows ``(B,)`` that begin anew (None: none does).
    """
    column = h.to(plan.real)
    column = column.unsqueeze(-1) if h.dim() else column
    y1, ks = plan.method.step(f, times, column, y, first_slope(f, times[0], y, handed))
    if not dense:
        return y1, y.new_empty(0)
    return y1, torch.stack(plan.method.dense_stages(f, times, column, y, ks))


def first_slope(f: Flat, t: Tensor, y: Tensor, handed: tuple[Tensor, Tensor | None] | None) -> Tensor:
    """The slope that a step begins with; ``handed`` as for `replay_step`."""
    if handed is None:
        return f(t, y)
    slope, anew = handed
    return slope if anew is None else torch.where(anew.unsqueeze(-1), f(t, y), slope)


def hands_on(plan: Plan) -> bool:
    """Whether the last slope of a step is the first of the next as it is, and not as what ``f`` would give there."""
    return plan.method.hands_on


def replay(equations: Callable[[int], Flat], plan: Plan, grid: Outputs, anchors: Tensor, t_eval: Tensor | None, y0: Tensor) -> Outputs:
    """The computed solution as a differentiable function of ``anchors``, ``t_eval``, ``y0`` and whatever ``equations(k)``, the
    right-hand side in step ``k``, depends on."""
    n_steps = grid.t.shape[0]
    pad = padding(Grid.of(grid))
    t, first = grid.t, y0
    if pad is not None:
        # what steps that do nothing are evaluated at: see `padding`
        t, first = torch.where(pad.still, pad.first(t[0]), t), pad.start(y0)
    times = step_times(t, grid.h, grid.segment, grid.lands, anchors, plan.shift)
    keep = set(kept_steps(plan, grid.event_step, n_steps))
    sampled = t_eval is not None and t_eval.shape[0] > 0
    states, stages = [y0], []
    all_times = stage_times(plan, times, plan.real)
    chained = hands_on(plan)
    for k in range(n_steps):
        y = states[-1]
        still = None if pad is None else pad.still[k].unsqueeze(-1)
        start = y if still is None else torch.where(still, first, y)
        handed = (stages[-1][-1], times.anew(k)) if chained and k else None
        wanted = chained or sampled or k in keep
        y1, ks = replay_step(equations(k), plan, all_times[k], times.h[k], start, wanted, handed=handed)
        states.append(y1 if still is None else torch.where(still, y, y1))
        stages.append(ks)
    final = torch.where((grid.status >= 0).unsqueeze(-1), states[-1], float("nan"))
    all_states = torch.stack(states)
    samples = grid.samples
    if sampled and n_steps:
        assert t_eval is not None
        samples = interpolate(plan, all_states, torch.stack(stages), times.t, times.h, t_eval, grid.sample_step)
    kept = torch.stack([stages[k] for k in sorted(keep)]) if keep else grid.stages
    return grid._replace(final=final, samples=samples, states=all_states if plan.keep_states else grid.states, stages=kept)
