"""The rules of every loop, by numbers for one trajectory and by masks for many: between which anchors a solve goes, how long the first
step is, when steps end, and what follows from their error."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .numbers import Decision, Measure, at_least, at_most, choose, finite, larger, negated
from .plan import Plan, Status, tamed

__all__ = ["Aim", "Timeline", "TimelineOfMany", "TimelineOfOne", "Verdict", "aim_step", "initial_step", "judge_step", "why_stuck"]

class Timeline(Protocol):
    """Anchors ``0 ... last + 1`` and the segments ``0 ... last`` between them.

    Segments of no length are passed over, but for the last one where there is no other: a span of no length is one step of no length.
    """

    #: (A, B)
    anchors: Tensor
    start: Measure
    end: Measure
    #: the direction of time
    sign: Measure
    #: the segment in which the solve begins, and the last one
    first: Any
    last: int
    #: whether there are ends of steps at which ``fun`` is seen from one side only, and whether all of them are
    jumps: bool
    every: bool

    @property
    def rows(self) -> int | None:
        """How many trajectories; None where decisions are numbers."""
        ...

    def target(self, segment: Any) -> Measure:
        """The anchor at which a segment ends."""
        ...

    def behind(self, segment: Any, landed: Decision) -> tuple[Any, Decision]:
        """The segments that follow where a step ``landed`` on an anchor, and where that was the last one."""
        ...

    def inner(self, segment: Any) -> Decision:
        """Whether the end of the segment is an anchor within the span."""
        ...

    def fraction(self, t: Measure) -> float:
        """The part of the span that is done, by the slowest."""
        ...

    def count(self) -> Any:
        """Zero, a number for each trajectory."""
        ...


def _has_jumps(plan: Plan, last: int) -> bool:
    return plan.shift == "all" or (plan.shift == "inner" and last > 0)


class TimelineOfOne:
    """`Timeline` by numbers."""

    rows: int | None = None

    def __init__(self, plan: Plan, anchors: Tensor) -> None:
        self.anchors = anchors
        stops = anchors[:, 0].tolist()
        self.start, self.end, self.last = stops[0], stops[-1], len(stops) - 2
        self.sign = 1.0 if self.end >= self.start else -1.0
        self.jumps, self.every = _has_jumps(plan, self.last), plan.shift == "all"
        # nobody asks where a segment behind the last one ends, but a loop that is done may look
        self._stops = [*stops, self.end]
        self._length = max(abs(self.end - self.start), 1e-300)
        self.first = 0
        while self.first < self.last and self._empty(self.first):
            self.first += 1

    def _empty(self, segment: int) -> bool:
        return self.sign * (self._stops[segment + 1] - self._stops[segment]) <= 0

    def target(self, segment: int) -> float:
        """See `Timeline.target`."""
        return self._stops[segment + 1]

    def behind(self, segment: int, landed: bool) -> tuple[int, bool]:
        """See `Timeline.behind`."""
        if not landed:
            return segment, False
        segment += 1
        while segment <= self.last and self._empty(segment):
            segment += 1
        return segment, segment > self.last

    def inner(self, segment: int) -> bool:
        """See `Timeline.inner`."""
        return segment < self.last

    def fraction(self, t: float) -> float:
        """See `Timeline.fraction`."""
        return abs(t - self.start) / self._length

    def count(self) -> int:
        """See `Timeline.count`."""
        return 0


class TimelineOfMany:
    """`Timeline` by rows ``(B,)``."""

    def __init__(self, plan: Plan, anchors: Tensor) -> None:
        self.anchors, self.start, self.end = anchors, anchors[0], anchors[-1]
        self.last = anchors.shape[0] - 2
        self.rows: int | None = anchors.shape[1]
        self.sign = torch.where(self.end >= self.start, 1.0, -1.0).to(torch.float64)
        self.jumps, self.every = _has_jumps(plan, self.last), plan.shift == "all"
        self._span = (self.end - self.start).abs()
        self.first = self.count()
        #: of every segment the next one that has a length, or that behind the last one; None where all of them have
        self._following: Tensor | None = None
        empty = anchors[1:] == anchors[:-1]
        if self.last and bool(empty.any()):
            places = torch.arange(self.last + 1, device=anchors.device).unsqueeze(-1)
            here = torch.where(empty, self.last + 1, places)
            following = torch.cat([here, torch.full_like(here[:1], self.last + 1)]).flip(0).cummin(0).values.flip(0)
            self.first, self._following = following[0].clamp(max=self.last), following[1:]

    def target(self, segment: Tensor) -> Tensor:
        """See `Timeline.target`."""
        return self.end if not self.last else self.anchors.gather(0, segment.clamp(max=self.last).unsqueeze(0) + 1).squeeze(0)

    def behind(self, segment: Tensor, landed: Tensor) -> tuple[Tensor, Tensor]:
        """See `Timeline.behind`."""
        if not self.last:
            return segment, landed
        if self._following is None:
            segment = segment + landed
        else:
            following = self._following.gather(0, segment.clamp(max=self.last).unsqueeze(0)).squeeze(0)
            segment = torch.where(landed, following, segment)
        return segment, landed & (segment > self.last)

    def inner(self, segment: Tensor) -> Tensor:
        """See `Timeline.inner`."""
        return segment < self.last

    def fraction(self, t: Tensor) -> float:
        """See `Timeline.fraction`."""
        return float(((t - self.start).abs() / self._span).min())

    def count(self) -> Tensor:
        """See `Timeline.count`."""
        return torch.zeros(self.anchors.shape[1], dtype=torch.int64, device=self.anchors.device)


#: the smallest step, beside the time
RESOLVED = 16 * float(torch.finfo(torch.float64).eps)
#: part by which a step may be longer than asked for to end on its target
_STRETCH, _ROUNDING = 1.01, 1 - 1e-10


class Aim(NamedTuple):
    """Where the coming step ends: its ``size`` (positive) if nothing were in the way, whether it ``lands`` on the target, whether there
    is none (``stuck``), because its size vanished or there were too many (``spent``)."""

    size: Measure
    lands: Decision
    stuck: Decision
    spent: Decision


class Verdict(NamedTuple):
    """What became of a step: ``passed`` the error test, has no error that is a number (``bad``), is of the smallest size and bad
    (``hopeless``); the size of the next one, and what the controller remembers if it is accepted."""

    passed: Decision
    bad: Decision
    hopeless: Decision
    step: Measure
    memory: tuple[Measure, Measure]


def resolved(step: Tensor, t: Tensor) -> Tensor:
    """A guessed first step, no shorter than what times around ``t`` (B,) resolve: where that is too long, the error test says so."""
    return torch.maximum(step, 2 * RESOLVED * t.abs())


def initial_step(f: Callable[[Tensor, Tensor], Tensor], plan: Plan, stops: Tensor, y0: Tensor, f0: Tensor, sign: Tensor) -> Tensor:
    """Size (positive) of the first step of every trajectory, ``(B,)`` float64, by one more evaluation of ``fun``.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4: the step for which an explicit Euler step
    changes the solution by 1 % of its size, then one for which the estimated second derivative gives an error of 1 %.
    ``stops`` (A, B): the anchors of the solve, beyond the first of which (and ``max_step``) ``fun`` is not evaluated; ``sign`` (B,): the
    direction of time.
    """
    t0, ahead = stops[0], stops[1:]
    ways = ahead - t0
    room, nearest = torch.where(sign * ways > 0, ways.abs(), float("inf")).min(0)
    room = torch.where(torch.isfinite(room), room, 0.0)
    size = y0.abs()
    d0 = plan.norm(plan.scaled(y0, size)).double()
    d1 = plan.norm(plan.scaled(f0, size)).double()
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.where(torch.isfinite(h0), h0, 1e-6)
    h0 = h0.clamp(max=plan.max_step) if plan.max_step < math.inf else h0
    # the very anchor, to which a rounded distance need not lead
    there = torch.where(h0 < room, t0 + sign * h0, ahead.gather(0, nearest.unsqueeze(0))[0])
    h0 = torch.minimum(h0, room)
    real = size.dtype
    step = (sign * h0).to(real).unsqueeze(-1)
    f1 = f(there.to(real), y0 + step * f0)
    d2 = plan.norm(plan.scaled(f1 - f0, size)).double() / h0
    worst = torch.maximum(d1, d2)
    h1 = torch.where(worst <= 1e-15, torch.clamp(h0 * 1e-3, min=1e-6), (0.01 / worst) ** (1.0 / (plan.method.error_order + 1)))
    h = torch.minimum(100 * h0, h1)
    # a non-finite fun gives the smallest of all guesses, and the loop reports it
    return resolved(torch.where(torch.isfinite(h) & (h > 0), h, h0), t0)


def aim_step(plan: Plan, step: Measure, t: Measure, remaining: Measure, attempts: Measure) -> Aim:
    """A step of size ``step`` from ``t``, ``remaining`` (positive) before its target, after so many attempts.

    It is stretched by up to 1 % to end there. Methods without error control end there only within rounding, and their steps are given.
    """
    size = at_most(step, plan.max_step) if plan.max_step < math.inf else step
    if plan.accept_smallest:
        size = at_least(size, plan.min_step)
    if plan.method.adaptive:
        lands = size * _STRETCH >= remaining
        if plan.max_step < math.inf:
            lands = lands & (remaining <= plan.max_step)
    else:
        lands = size >= remaining * _ROUNDING
    tiny = size <= RESOLVED * abs(t)
    if plan.min_step:
        tiny = tiny | (size < plan.min_step)
    spent = attempts >= plan.max_steps
    return Aim(size, lands, (tiny & negated(lands)) | spent, spent)


def why_stuck(stuck: Aim, bad: Decision) -> Measure:
    """The status of a trajectory that has no next step; ``bad``: its last one had no error that is a number."""
    return choose(stuck.spent, int(Status.MAX_STEPS), choose(bad, int(Status.NON_FINITE), int(Status.STEP_TOO_SMALL)))


def judge_step(
    plan: Plan,
    error: Measure,
    t: Measure,
    length: Measure,
    size: Measure,
    lands: Decision,
    rejected_last: Decision,
    memory: tuple[Measure, Measure],
    stalled: Decision,
) -> Verdict:
    """The error test of a step of ``length`` (positive) from ``t``, and the size of the next one.

    ``size``: of its `Aim`; ``lands``: it ended on an anchor; ``rejected_last``: the attempt before was rejected; ``memory``: of the
    controller; ``stalled``: there is no error because the iteration for the stages did not converge, which says less than an infinite one.
    """
    controller, order = plan.control, plan.method.error_order + 1
    bad = negated(finite(error))
    passed = error <= 1.0
    smallest = plan.accept_smallest and length <= plan.min_step
    if plan.accept_smallest:
        passed = passed | (negated(bad) & smallest)
    level = tamed(choose(bad, math.inf, error))
    up, down = controller.both(order, level, memory, length)
    up = choose(rejected_last, at_most(up, 1.0), up)
    proposal = length * up
    # a step that was cut short to land says little about the next one
    proposal = choose(lands & negated(rejected_last), larger(proposal, size), proposal)
    given_up = controller.min_factor if stalled is None else choose(stalled, controller.stuck_factor, controller.min_factor)
    step = choose(passed, proposal, length * choose(bad, given_up, down))
    least = step <= RESOLVED * abs(t)
    if plan.accept_smallest:
        least = least | smallest
    remembered = controller.remember(level, length, memory) if controller.remembers else memory
    return Verdict(passed, bad, bad & least, step, remembered)
