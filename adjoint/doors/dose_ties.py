"""Doses beside something else at one time: each of them moves alone when its own time does.

A round ends at one time, that of the dose or event that comes first. What else happens then is at the same time but for rounding, and yet
by a time of its own: a bolus with the start of an infusion, infusions one behind the other, a dose at the start of the solve. The way to
the dose's own time has the value zero, and derivatives: the solution is followed along it, with the rates that hold before, and back, with
those that hold behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..system.capture import is_differentiable
from ..system.transforms import anywhere
from .event_slope import once
from .round_rules import Boundary
from .round_task import Progress, Task
from .rows import chosen, wide

__all__ = ["given_apart", "ties"]

_TWICE = (
    "a derivative of a derivative was to be taken in the time of a dose of implicit equations (solve_dae, mass_matrix=) that is given at "
    "the start of the solve or together with something else: there are first derivatives only. Give it apart, or detach its time"
)


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
        if task.implicit is not None:
            way = once(way, tied, _TWICE, *(x for x in (rule.stops, on.t, *tree_leaves(on.y)) if is_differentiable(x)))
        then = _moved(task, run, on, 0 * way, way)
        earlier = run.given[k] & due
        now = due[line] & ~earlier.any(0)
        first, before = torch.where(now, way, first), chosen(now, then.y, before)
        then, _ = rule.applied(one, then)
        run.given[k] = run.given[k] | one
        if task.implicit is not None:
            then = task.settled(then, task.infused(run.given), due[line], lost, on.y)
        after = chosen(due[line], then.y, after)
        on = _moved(task, run, then, way, -way)
    return on, after, first, before


def _moved(task: Task, run: Progress, at: Boundary, aside: Tensor, way: Tensor) -> Boundary:
    """Along the solution by a ``way`` of value zero, from ``aside`` of the time of the boundary; to second order where the equations tell
    the slope."""
    infused = task.infused(run.given)
    slope = task.slope(infused)

    def by(share: float, rate: Any) -> Any:
        return tree_map(lambda a, b: a + share * wide(way, a).to(a.dtype) * b, at.y, rate)

    if slope is None:
        return at if at.yp is None else Boundary(at.t, by(1.0, at.yp), at.mode, at.yp)
    t = at.t + aside
    return Boundary(at.t, by(1.0, slope(t + way / 2, by(0.5, slope(t, at.y, at.mode)), at.mode)), at.mode, at.yp)
