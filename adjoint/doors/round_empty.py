"""Rounds of no length of implicit equations: no step is taken there that tells the slope. They are solved as if they could have no length,
and what is at their end follows from the start along the solution, to second order, by the slopes of consistent values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..system.capture import is_differentiable
from ..system.transforms import anywhere
from .dose_ties import slopes
from .round_results import Taken
from .round_rules import Boundary
from .round_task import Progress, Task
from .rows import chosen, forward_fill, usable, wide
from .solution import Solution

__all__ = ["along"]


def along(
    task: Task, run: Progress, sol: Solution, taken: Taken | None, on: Boundary, begun: Tensor, hit: Tensor, lost: Tensor
) -> tuple[Solution, Boundary]:
    """The solution of a round, and what is at its end, ``on``, after the resets, with derivatives in the times of trajectories that have
    ``begun`` it with no length, and at whose end, which is that of the solve, they are now. ``hit`` (R): where there was a reset; ``lost``
    ones have failed."""
    times, start = task.times, on.t
    arriving = begun & ~lost & (start == task.end).detach()
    moving = (task.end, start, *(() if times.samples is None else (times.samples,)))
    if not anywhere(arriving) or not any(is_differentiable(x) for x in moving):
        return sol, on
    infused = task.infused(run.given)
    rate, bend = slopes(task, on, infused, lost | ~arriving)
    way = torch.where(arriving, task.end - start, 0.0)

    def at(way: Tensor, y: Any, first: Any, second: Any) -> Any:
        return tree_map(lambda a, b, c: a + wide(way, a).to(a.dtype) * (b + wide(way, a).to(a.dtype) / 2 * c), y, first, second)

    def slope(way: Tensor, yp: Any, second: Any) -> Any:
        return tree_map(lambda a, c: a + wide(way, a).to(a.dtype) * c, yp, second)

    arrived = replace(
        on, t=torch.where(arriving, task.end, start), y=at(way, on.y, rate, bend), yp=None if on.yp is None else slope(way, on.yp, bend)
    )
    quiet = arriving & ~hit
    # one line of what has a line for each time
    line = lambda tree: tree_map(lambda x: None if x is None else x.unsqueeze(0), tree)  # noqa: E731
    if task.options["quadrature"] is not None:
        sol = replace(sol, quadrature=_integrals(task, on, arriving, way, rate, infused, sol.quadrature))
    if times.steps:
        present = ~sol.t.detach().isnan()
        last = present & (present.cumsum(0) == present.sum(0)) & quiet
        y, yp = line((arrived.y, arrived.yp))
        sol = replace(sol, t=torch.where(last, arrived.t.to(sol.t.dtype), sol.t), y=chosen(last, y, sol.y))
        sol = sol if sol.yp is None or yp is None else replace(sol, yp=chosen(last, yp, sol.yp))
    elif taken is not None and times.samples is not None:
        every = times.samples if task.batched else times.samples[:, 0]
        here = every[taken.low : taken.high]
        # between the ends of the round, which are no samples
        ends = quiet.new_zeros((1, *quiet.shape))
        inner = torch.cat([ends, taken.inside & quiet, ends])
        ways = torch.where(inner, torch.cat([ends, here - start, ends]), 0.0)
        y, yp, rate, bend = line((on.y, on.yp, rate, bend))
        sol = replace(sol, y=chosen(inner, at(ways, y, rate, bend), sol.y))
        if sol.yp is not None and yp is not None:
            sol = replace(sol, yp=chosen(inner, slope(ways, yp, bend), sol.yp))
    return sol, arrived


def _integrals(task: Task, on: Boundary, arriving: Tensor, way: Tensor, rate: Any, infused: tuple[Any, ...], found: Any) -> Any:
    """Of second order, as the state."""
    args = usable((*on.mode, *task.args, *infused))
    # rows that are not asked for meet no state that the integrand is not made for
    half = torch.where(arriving, way, 0.0) / 2
    y = tree_map(lambda a, b: a + wide(half, a).to(a.dtype) * b, on.y, rate)
    t, y = forward_fill(arriving, (on.t + half, y))
    value = task.options["quadrature"](t.to(task.spec.real_dtype), y, *args)
    return tree_map(lambda q, g: q + torch.where(wide(arriving, g), wide(way, g).to(g.dtype) * g, 0.0), found, value)
