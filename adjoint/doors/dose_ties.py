"""Doses beside something else at one time: each of them moves alone when its own time does.

A round ends at one time, that of the dose or event that comes first. What else happens then is at the same time but for rounding, and yet
by a time of its own: a bolus with the start of an infusion, infusions one behind the other, a dose at the start or at the end of the solve.
The solution is followed along the way to the dose's own time, with the rates that hold before, and back, with those that hold behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..system.capture import is_differentiable
from ..system.transforms import anywhere
from .round_course import Course
from .round_rules import Boundary
from .round_task import Progress, Task
from .rows import chosen

__all__ = ["given_apart", "ties"]


def ties(task: Task, dues: list[Tensor], hits: list[Tensor], begun: Tensor, t: Tensor) -> Tensor:
    """Where ``(R)`` more than one thing happens at the end ``t`` of a round, the end of the solve among them, or implicit equations have a
    dose where the round ``begun``: if anything depends on that."""
    happening = [*dues, *(hit.unsqueeze(0) for rule, hit in zip(task.watched, hits, strict=True) if rule.ends)]
    if not any(is_differentiable(x) for x in (t, *(rule.stops for rule in task.doses))):
        return torch.zeros_like(begun)
    dosed = torch.stack([due.any(0) for due in dues]).any(0)
    return dosed & ((torch.cat(happening).sum(0) > 1) | begun | (t == task.end).detach())


def given_apart(
    task: Task, run: Progress, k: int, due: Tensor, on: Boundary, tied: Tensor, lost: Tensor
) -> tuple[Boundary, Any, Tensor]:
    """The boundary after the doses of the ``k``-th rule that are ``due`` (S, R); and of these the state after the last one, and the way to
    the first one. ``lost`` trajectories have none. Notes which are given."""
    rule = task.doses[k]
    lines = torch.arange(len(due), device=due.device).reshape(-1, *[1] * (due.dim() - 1))
    after, first = on.y, torch.zeros_like(on.t)
    for line in range(len(due)):
        one = due & (lines == line)
        if not anywhere(one):
            continue
        way = torch.where(due[line] & tied, rule.stops[line] - on.t, 0.0)
        way = way - way.detach()
        then = Course(task, on, task.infused(run.given), lost).by(way)
        earlier = run.given[k] & due
        now = due[line] & ~earlier.any(0)
        first = torch.where(now, way, first)
        then, _ = rule.applied(one, then)
        run.given[k] = run.given[k] | one
        infused = task.infused(run.given)
        if task.implicit is not None:
            then = task.settled(then, infused, due[line], lost, on.y)
        after = chosen(due[line], then.y, after)
        on = Course(task, then, infused, lost).by(-way)
    return on, after, first
