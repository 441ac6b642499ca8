"""The discrete adjoint sweep and the tangent sweep as differentiable code: for ``create_graph``, ``torch.func`` and forward mode.

Every step is differentiated by `torch.func.vjp` of the step itself, so that whatever transform is active sees plain operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrate.plan import Grid
from ..system.system import System, VmappedSystem
from ..system.transforms import differentiated_again
from .asked import Asked, in_shelter
from .equations import equations
from .multistep import multistep_functional, multistep_tangents
from .padding import shelter
from .problem import Problem, StepTimes, interpolate, kept_steps, stage_times, step_times
from .products import exchanged, look_again, tangent, vjp
from .replay import hands_on, replay_step

__all__ = ["functional_sweep", "look_at_fun", "look_at_step", "tangents"]


def _step(problem: Problem, grid: Grid, times: StepTimes, k: int, dense: bool, moving: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Step ``k`` as a function of ``(y, *inputs)``, if times are ``moving`` of ``(t, h, y, *inputs)``; its output is ``(y1, stages)``.
    Where it begins with the last slope of the step before, that comes behind ``y``; see `_leading`."""
    real = grid.states.dtype.to_real()
    chained = hands_on(problem.plan) and k > 0

    def step(*args: Tensor) -> tuple[Tensor, Tensor]:
        t, h, y, *rest = args if moving else (times.t[k], times.h[k], *args)
        handed, inputs = ((rest[0], times.anew(k)), rest[1:]) if chained else (None, rest)
        row = times._replace(
            t=t.unsqueeze(0),
            h=h.unsqueeze(0),
            jump_start=None if times.jump_start is None else times.jump_start[k : k + 1],
            jump_end=None if times.jump_end is None else times.jump_end[k : k + 1],
        )
        f = equations(problem, inputs, None if problem.algebra is None else grid.stages[k])
        return replay_step(f, problem.plan, stage_times(problem.plan, row, real)[0], h, y, dense, handed=handed)

    return step


def _leading(problem: Problem, grid: Grid, times: StepTimes, k: int, moving: bool) -> tuple[Tensor, ...]:
    """What the function of step ``k`` takes before the inputs."""
    own = (times.t[k], times.h[k], grid.states[k]) if moving else (grid.states[k],)
    return (*own, grid.stages[k][0]) if hands_on(problem.plan) and k else own


def _smooth(step: Callable[..., Any], inputs: Sequence[Tensor], smooth: Sequence[int]) -> Callable[..., Any]:
    """The step as a function of some of its inputs only (integer ones have no derivative)."""

    def partial(*args: Tensor) -> Any:
        leading = len(args) - len(smooth)
        return step(*args[:leading], *exchanged(inputs, smooth, args[leading:]))

    return partial


def look_at_fun(system: System | VmappedSystem, t: Tensor, at: Tensor, inputs: Sequence[Tensor], smooth: Sequence[int]) -> None:
    """Raise where derivatives of the derivatives of ``fun`` at a point, (B,) and (B, n), would miss a part; in the inputs ``smooth``."""
    if isinstance(system, System) and system.unseen:
        # which takes its tensors as they are
        smooth = []
    look_again(lambda y, *some: system.bind(exchanged(inputs, smooth, some))(t, y), at, *(inputs[i] for i in smooth))


def look_at_step(problem: Problem, grid: Grid, inputs: Sequence[Tensor], smooth: Sequence[int]) -> None:
    """`look_at_fun` in the last step of the solve, or in the first where nothing is kept of others."""
    if len(grid.t):
        first = len(grid.states) < 2
        system, t, y = problem.system, grid.t[0 if first else -1].to(grid.states.dtype.to_real()), grid.states[0 if first else -2]
        at = y if system.residual is None else torch.cat([y, grid.stages[-1, -1]], -1)
        look_at_fun(system, t, at, inputs, smooth)


def _anchored(anchors: Tensor, grid: Grid) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Shifts of step starts and sizes with the anchors: a linear function of anchor shifts."""
    following = (grid.segment + 1).clamp(max=anchors.shape[0] - 1)

    def shifts(moved: Tensor) -> tuple[Tensor, Tensor]:
        at = moved.gather(0, grid.segment)
        return at, torch.where(grid.lands, moved.gather(0, following) - at, 0.0)

    return shifts


def _zero(bar: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if bar is None else bar


@in_shelter
def functional_sweep(asked: Asked) -> tuple[Tensor | None, ...]:
    """As `discrete.eager_sweep`, but differentiable to any order."""
    problem, grid, anchors, t_eval, inputs, bars, wants = asked
    problem.witness.check()
    if differentiated_again([grid.states, *inputs]):
        look_at_step(problem, grid, inputs, [i for i, want in enumerate(wants[3:]) if want])
    if problem.plan.method.multistep:
        return multistep_functional(asked)
    _, samples_bar, states_bar, kept_bar = bars
    plan, states, n_steps, times, final_bar = problem.plan, grid.states, asked.n_steps, asked.times(anchors), asked.final_bar
    sampled = samples_bar is not None and t_eval is not None and t_eval.shape[0] > 0 and n_steps > 0
    kept = {k: i for i, k in enumerate(kept_steps(plan, grid.event_step, n_steps))} if kept_bar is not None else {}

    bar = torch.zeros_like(states[0])
    if final_bar is not None:
        bar = bar + final_bar
    state_bars: Tensor | None = states_bar
    stage_bars: Tensor | None = None
    t_extra = h_extra = t_eval_bar = None
    if sampled:
        assert t_eval is not None and samples_bar is not None
        every = range(n_steps)
        stages = torch.stack(
            [_step(problem, grid, times, k, True, False)(*_leading(problem, grid, times, k, False), *inputs)[1] for k in every]
        )
        _, pull = vjp(
            lambda s, ks, t, h, te: interpolate(plan, s, ks, t, h, te, grid.sample_step), states, stages, times.t, times.h, t_eval
        )
        from_samples, stage_bars, t_extra, h_extra, t_eval_bar = pull(samples_bar)
        state_bars = from_samples if state_bars is None else state_bars + from_samples

    input_bars: list[Tensor | None] = [None] * len(inputs)
    smooth = [i for i, want in enumerate(wants[3:]) if want]
    # times that nobody moves are constants of the steps, which makes these, and what is recorded of them, much smaller
    moving, t_bars, h_bars = bool(wants[0]), [], []
    chained, handed_bar = hands_on(plan), None
    for k in reversed(range(n_steps)):
        if state_bars is not None:
            bar = bar + state_bars[k + 1]
        k_bar = None if stage_bars is None else stage_bars[k]
        if k in kept and kept_bar is not None:
            k_bar = kept_bar[kept[k]] if k_bar is None else k_bar + kept_bar[kept[k]]
        dense = k_bar is not None or handed_bar is not None
        step = _smooth(_step(problem, grid, times, k, dense, moving), inputs, smooth)
        (_, ks), pull = vjp(step, *_leading(problem, grid, times, k, moving), *(inputs[i] for i in smooth))
        k_bar = torch.zeros_like(ks) if k_bar is None else k_bar
        if handed_bar is not None:
            k_bar = torch.cat([k_bar[:-1], k_bar[-1:] + handed_bar])
        found = list(pull((bar, k_bar)))
        if moving:
            t_bars.append(found.pop(0))
            h_bars.append(found.pop(0))
        bar, *rest = found
        if chained and k:
            handed_bar, *rest = rest
        for i, g in zip(smooth, rest, strict=True):
            total = input_bars[i]
            input_bars[i] = g if total is None else total + g
    if state_bars is not None:
        bar = bar + state_bars[0]
    if n_steps == 0 and samples_bar is not None:
        bar = bar + samples_bar.sum(0)
    anchors_bar = None
    if moving and n_steps:
        t_total, h_total = torch.stack(t_bars[::-1]), torch.stack(h_bars[::-1])
        if t_extra is not None and h_extra is not None:
            t_total, h_total = t_total + t_extra, h_total + h_extra
        _, pull_shift = vjp(_anchored(anchors, grid), torch.zeros_like(anchors))
        (anchors_bar,) = pull_shift((t_total, h_total))
    problem.backward_report(n_steps * plan.method.n_stages * (2 if sampled else 1), n_steps)
    return asked.answer(anchors_bar, t_eval_bar, bar, input_bars)


def tangents(
    problem: Problem,
    grid: Grid,
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    dots: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tangents of ``(final, samples, states, stages)`` along tangents of ``(anchors, t_eval, y0, *inputs)``."""
    safe = shelter(problem, grid, t_eval, inputs)
    problem, grid, inputs = safe.problem, safe.grid, safe.inputs
    anchors_dot, t_eval_dot, y0_dot, *inputs_dot = (*dots[:3], *safe.still_dots(dots[3:]))
    look_at_step(problem, grid, inputs, [i for i, dot in enumerate(inputs_dot) if dot is not None])
    if problem.plan.method.multistep:
        moved = (anchors_dot, t_eval_dot, y0_dot, *inputs_dot)
        return multistep_tangents(problem, grid, anchors, t_eval, inputs, moved)  # type: ignore[return-value]
    plan, states = problem.plan, grid.states
    n_steps = grid.t.shape[0]
    times = step_times(grid.t, grid.h, grid.segment, grid.lands, anchors, plan.shift)
    t_dot, h_dot = _anchored(anchors, grid)(_zero(anchors_dot, anchors))
    moving, smooth = anchors_dot is not None, [i for i, dot in enumerate(inputs_dot) if dot is not None]
    input_dots = [x for x in inputs_dot if x is not None]
    sampled = t_eval is not None and t_eval.shape[0] > 0 and n_steps > 0
    kept = kept_steps(plan, grid.event_step, n_steps)

    dot = _zero(y0_dot, states[0])
    state_dots, stage_dots, stages = [dot], [], []
    chained = hands_on(plan)
    for k in range(n_steps):
        dense = sampled or k in kept
        full = _step(problem, grid, times, k, dense or chained, moving)
        leading = _leading(problem, grid, times, k, moving)
        own_dots = (t_dot[k], h_dot[k], dot) if moving else (dot,)
        dots_in = (*own_dots, *([stage_dots[-1][-1]] if chained and k else []), *input_dots)
        dot, ks_dot = tangent(_smooth(full, inputs, smooth), (*leading, *(inputs[i] for i in smooth)), dots_in)
        state_dots.append(dot)
        if dense:
            stages.append(full(*leading, *inputs)[1])
        stage_dots.append(ks_dot)
    final_dot = torch.where((grid.status >= 0).unsqueeze(-1), dot, 0.0)
    all_dots = torch.stack(state_dots)
    n_all = len(plan.method.nodes)
    if sampled:
        assert t_eval is not None
        samples_dot = tangent(
            lambda s, ks, t, h, te: interpolate(plan, s, ks, t, h, te, grid.sample_step),
            (states, torch.stack(stages), times.t, times.h, t_eval),
            (all_dots, torch.stack(stage_dots), t_dot, h_dot, _zero(t_eval_dot, t_eval)),
        )
    else:
        n_samples = 0 if t_eval is None else t_eval.shape[0]
        samples_dot = dot.new_zeros(n_samples, *dot.shape) + dot
    kept_dot = torch.stack([stage_dots[k] for k in kept]) if kept else dot.new_zeros(0, n_all, *dot.shape)
    return final_dot, samples_dot, all_dots, kept_dot
