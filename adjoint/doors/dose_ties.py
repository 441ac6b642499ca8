"""Events and doses beside something else at one time: each of them moves alone when its own time does.

A round ends at one time, that of the dose or event that comes first. What else happens then is at the same time but for rounding, and yet
by a time of its own: a ball in a corner, two parts that reach their stops, a bolus with the start of an infusion, infusions one behind the
other, a dose at the start or at the end of the solve. The solution is followed along the way to its own time, with the equations that hold
before, and back, with those that hold behind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..system.capture import is_differentiable
from ..system.transforms import anywhere
from .round_course import Course
from .round_rules import Boundary, Rule
from .round_task import Progress, Task
from .rows import chosen
from .solution import EventRecord

__all__ = ["given_apart", "reset_apart", "ties"]


def ties(task: Task, dues: list[Tensor], hits: list[Tensor], records: Sequence[EventRecord], begun: Tensor, t: Tensor) -> Tensor:
    """Where ``(R)`` more than one thing happens at the end ``t`` of a round, or there is a dose at the end of the solve, or one of implicit
    equations where the round ``begun``: if anything depends on that."""
    ending = [(hit.unsqueeze(0), record.t) for rule, hit, record in zip(task.watched, hits, records, strict=True) if rule.ends]
    happening = [*dues, *(hit for hit, _ in ending)]
    if not happening or not any(is_differentiable(x) for x in (t, *(rule.stops for rule in task.doses), *(t for _, t in ending))):
        return torch.zeros_like(begun)
    several = torch.cat(happening).sum(0) > 1
    return several | (torch.cat(dues).any(0) & (begun | (t == task.end).detach())) if dues else several


def reset_apart(
    task: Task, run: Progress, rule: Rule, hit: Tensor, t: Tensor, on: Boundary, tied: Tensor, lost: Tensor
) -> tuple[Boundary, Any]:
    """The boundary after the reset of an event at its own time ``t`` (R), and the states after it. ``lost`` trajectories have none."""
    return _apart(task, run, on, t - on.t, hit, tied, lost, lambda at: rule.applied(hit, at, task.args, task.spec)[0])[:2]


def _apart(
    task: Task,
    run: Progress,
    on: Boundary,
    way: Tensor,
    hit: Tensor,
    tied: Tensor,
    lost: Tensor,
    applied: Callable[[Boundary], Boundary],
) -> tuple[Boundary, Any, Tensor]:
    """The boundary after what is ``applied`` where ``hit`` (R), a ``way`` (R) behind it where ``tied``, the states there, and the way."""
    way = torch.where(hit & tied, way, 0.0)
    way = way - way.detach()
    then = applied(Course(task, on, task.infused(run.given), lost).by(way))
    infused = task.infused(run.given)
    lost = lost | task.no_number(then.y)
    if task.implicit is not None:
        then = task.settled(then, infused, hit, lost, on.y)
    return Course(task, then, infused, lost).by(-way), then.y, way


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
        now = due[line] & ~(run.given[k] & due).any(0)

        def applied(at: Boundary, one: Tensor = one) -> Boundary:
            run.given[k] = run.given[k] | one
            return rule.applied(one, at)[0]

        on, then, way = _apart(task, run, on, rule.stops[line] - on.t, due[line], tied, lost, applied)
        first, after = torch.where(now, way, first), chosen(due[line], then, after)
    return on, after, first
