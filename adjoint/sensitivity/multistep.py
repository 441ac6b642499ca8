"""Derivatives of multistep methods: the recorded steps as differentiable code, with the table of differences that they hand on.

Orders and step sizes are held fixed, but for those of the steps that land on an anchor, which move with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..integrate.plan import Grid
from .adams import AdamsReplay
from .asked import Asked
from .bdf import BdfReplay
from .multistep_step import Schedule
from .padding import padding, shelter
from .problem import Outputs, Problem, interpolate
from .products import exchanged, tangent, vjp

__all__ = ["multistep_functional", "multistep_outputs", "multistep_tangents"]


def _replay(
    problem: Problem, grid: Grid, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(final, samples, states, stages)`` as differentiable functions of anchors, sample times, ``y0`` and inputs."""
    plan, h = problem.plan, grid.h
    schedule = Schedule(problem, grid, anchors)
    steps = (AdamsReplay if problem.algebra is None else BdfReplay)(problem, grid, inputs, schedule)
    n_steps = h.shape[0]
    D = begin = y0.unsqueeze(0)
    if n_steps:
        # what steps that do nothing are evaluated at: see `padding`
        pad = padding(grid)
        begin = steps.begin(y0 if pad is None else pad.start(y0), schedule.first)
        D = begin if pad is None else torch.cat([D, begin[1:]])
    all_states, all_stages = [y0], []
    for k in range(n_steps):
        time = schedule.step(k)
        moves = (h[k] != 0).reshape(1, -1, 1)
        table = D if D is begin else torch.where(moves, D, begin)
        stages, new = steps.step(k, table, time)
        D = torch.where(moves, new, D)
        all_states.append(D[0])
        all_stages.append(stages)
    final = torch.where((grid.status >= 0).unsqueeze(-1), all_states[-1], float("nan"))
    whole = torch.stack(all_states)
    kept = torch.stack(all_stages) if all_stages else grid.stages
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    if n_samples and n_steps:
        assert t_eval is not None
        samples = interpolate(plan, whole, kept, schedule.begin, schedule.h, t_eval, grid.sample_step)
    else:
        samples = y0.new_zeros(n_samples, *y0.shape) + y0
    return final, samples, whole, kept if plan.keep_stages else grid.stages


def multistep_outputs(
    problem: Problem, grid: Outputs, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]
) -> Outputs:
    """The computed solution, recorded by autograd."""
    safe = shelter(problem, Grid.of(grid).mapped(Tensor.detach), t_eval, inputs)
    found = _replay(safe.problem, safe.grid, anchors, t_eval, y0, safe.inputs)
    return grid._replace(**dict(zip(("final", "samples", "states", "stages"), found, strict=True)))


def _filled(bars: Sequence[Tensor | None], outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(out) if bar is None else bar for bar, out in zip(bars, outs, strict=True))


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def multistep_functional(asked: Asked) -> tuple[Tensor | None, ...]:
    """As `sweep.functional_sweep`: differentiable to any order."""
    problem, grid, _, _, _, bars, wants = asked
    given = asked.point
    where = [i for i, (x, want) in enumerate(zip(given, wants, strict=True)) if want and x is not None]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        full = exchanged(given, where, some)
        return _replay(problem, grid, full[0], full[1], full[2], full[3:])

    outs, pull = vjp(function, *(x for i in where if (x := given[i]) is not None))
    found = pull(_filled(bars, outs))
    problem.backward_report(grid.t.shape[0], grid.t.shape[0])
    return tuple(exchanged([None] * len(given), where, found))


def multistep_tangents(
    problem: Problem,
    grid: Grid,
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    dots: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """As `sweep.tangents`."""
    given = [anchors, t_eval, grid.states[0], *inputs]
    where = [i for i, x in enumerate(given) if x is not None and _smooth(x) and dots[i] is not None]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        full = exchanged(given, where, some)
        return _replay(problem, grid, full[0], full[1], full[2], full[3:])

    primals, moved = [given[i] for i in where], [dots[i] for i in where]
    if not where:
        return tuple(torch.zeros_like(x) for x in function())
    return tangent(function, primals, moved)  # type: ignore[arg-type]
