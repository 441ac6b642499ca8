"""Doses beside something else at one time: each of them moves alone when its own time does.

A round ends at one time, that of the dose or event that comes first. What else happens then is at the same time but for rounding, and yet
by a time of its own: a bolus with the start of an infusion, infusions one behind the other, a dose at the start of the solve. The way to
the dose's own time has the value zero, and derivatives: the solution is followed along it, with the rates that hold before, and back, with
those that hold behind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import UnsupportedCombination
from ..sensitivity.consistent import Initial
from ..system.capture import is_differentiable
from ..system.transforms import anywhere
from .dae_start import second_order
from .round_rules import Boundary
from .round_task import Progress, Task
from .rows import chosen, still, wide

__all__ = ["given_apart", "slopes", "ties"]


def ties(task: Task, dues: list[Tensor], hits: list[Tensor], begun: Tensor, t: Tensor) -> Tensor:
    """Where ``(R)`` more than one thing happens at the end ``t`` of a round, or implicit equations have a dose where the round ``begun``:
    if anything depends on that."""
    happening = [*dues, *(hit.unsqueeze(0) for rule, hit in zip(task.watched, hits, strict=True) if rule.ends)]
    if not any(is_differentiable(x) for x in (t, *(rule.stops for rule in task.doses))):
        return torch.zeros_like(begun)
    dosed = torch.stack([due.any(0) for due in dues]).any(0)
    return dosed & ((torch.cat(happening).sum(0) > 1) | begun)


def given_apart(
    task: Task, run: Progress, k: int, due: Tensor, on: Boundary, tied: Tensor, lost: Tensor
) -> tuple[Boundary, Any, Tensor, Any]:
    """The boundary after the doses of the ``k``-th rule that are ``due`` (S, R); and of these the state after the last one, the way to the
    first one, and the state before it. ``lost`` trajectories have none. Notes which are given."""
    rule = task.doses[k]
    lines = torch.arange(len(due), device=due.device).reshape(-1, *[1] * (due.dim() - 1))
    after, first, before = on.y, torch.zeros_like(on.t), on.y
    for line in range(len(due)):
        one = due & (lines == line)
        if not anywhere(one):
            continue
        way = torch.where(due[line] & tied, rule.stops[line] - on.t, 0.0)
        way = way - way.detach()
        if task.options["quadrature"] is not None and is_differentiable(way):
            # the integral would have to be followed along the way as well
            raise UnsupportedCombination(
                "quadrature= has no derivatives in the time of a dose that is beside another dose or an event, or in implicit equations at "
                "the start, at one time: give them times that differ, detach these times, or carry the integral as a part of the state"
            )
        then = _moved(task, run, on, 0 * way, way, lost)
        earlier = run.given[k] & due
        now = due[line] & ~earlier.any(0)
        first, before = torch.where(now, way, first), chosen(now, then.y, before)
        then, _ = rule.applied(one, then)
        run.given[k] = run.given[k] | one
        if task.implicit is not None:
            then = task.settled(replace(then, t=on.t + way), task.infused(run.given), due[line], lost, on.y)
            then = replace(then, t=on.t)
        after = chosen(due[line], then.y, after)
        on = _moved(task, run, then, way, -way, lost)
    return on, after, first, before


def _moved(task: Task, run: Progress, at: Boundary, aside: Tensor, way: Tensor, lost: Tensor) -> Boundary:
    """Along the solution by a ``way`` of value zero, from ``aside`` of the time of the boundary, to second order."""
    infused = task.infused(run.given)
    slope = task.slope(infused)

    def by(share: float, rate: Any, power: int = 1) -> Any:
        return tree_map(lambda a, b: a + share * wide(way**power, a).to(a.dtype) * b, at.y, rate)

    if slope is None:
        rate, bend = slopes(task, replace(at, t=at.t + aside), infused, lost)
        y = tree_map(lambda a, b, c: a + (b - c), by(1.0, rate), by(0.5, bend, 2), at.y)
        return replace(at, y=y)
    t = at.t + aside
    return replace(at, y=by(1.0, slope(t + way / 2, by(0.5, slope(t, at.y, at.mode)), at.mode)))


def slopes(task: Task, at: Boundary, infused: tuple[Any, ...], lost: Tensor) -> tuple[Any, Any]:
    """``y'``, which is differentiable, and ``y''`` of the solution of implicit equations through a boundary; none of ``lost`` trajectories,
    which are NaN."""
    spec, every = task.spec, torch.ones_like(lost)
    y = chosen(lost, tree_map(torch.zeros_like, still(at.y)), at.y)

    def consistent(t: Tensor, at_t: Initial) -> Initial:
        found = task.settled(Boundary(t if task.batched else t[0], spec.unflatten(at_t.y), at.mode), infused, every, lost, y)
        return Initial(spec.flatten(found.y), spec.flatten(found.yp))

    flat = spec.flatten(y)
    found = second_order(consistent, at.t.reshape(-1), Initial(flat, torch.zeros_like(flat)))
    rate, bend = (spec.unflatten(x) for x in found)
    return rate, bend
