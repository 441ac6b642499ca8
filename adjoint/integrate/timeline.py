"""The anchors of a solve: where it starts and ends, and the times between at which a step must end."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from .numbers import Decision, Measure
from .plan import Plan

__all__ = ["Timeline", "TimelineOfMany", "TimelineOfOne"]


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
