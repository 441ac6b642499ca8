"""Samples at given times, made as the steps go by."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .numbers import Decision, any_of, at_least, negated
from .plan import Plan
from .stepper import Attempt, Trial
from .timeline import Timeline
from .within import within

__all__ = ["Sampler"]


class Sampler:
    """Collects samples at given times, in any order and with repetitions: ``(T, B, n)``, of one trajectory ``(T, *state)``.

    Those at the two ends of the span are states as they are; those between are made in the order of the steps, by dense output. They are
    put into the order of the times at the end, without writing into a tensor, so that a solve that autograd records can use it too.
    """

    def __init__(self, plan: Plan, line: Timeline, t_eval: Tensor | None, y0: Tensor) -> None:
        times = line.anchors[:0] if t_eval is None else t_eval
        self.plan, self._like, self._shape, self._alone = plan, y0, times.shape, line.rows is None
        self._queue: Any = None if t_eval is None else (_QueueOfOne if line.rows is None else _QueueOfMany)(line, times, bool(plan.events))
        #: whether there are some between the ends, or may be at the last one before a step ends there
        self.wanted = self._queue is not None and self._queue.wanted
        #: the end of the span, and whose event it is, so that no step ends there
        self._end = line.end
        self._beyond: Decision = False
        #: of the samples that are there: their places among all ``T * B``, the steps they lie in, -1 for none, and values
        self._places: list[Any] = []
        self._steps: list[Any] = []
        self._pieces: list[Tensor] = []
        if self._queue is not None:
            places, rows = self._queue.starts
            self._add(places, [0] * len(rows) if line.rows is None else torch.zeros_like(rows), _each(y0, rows))

    def _add(self, places: Any, steps: Any, values: Tensor) -> None:
        if len(places):
            self._places.append(places)
            self._steps.append(steps)
            self._pieces.append(values)

    def take(self, step: Attempt, trial: Trial, accepted: Decision, upto: Any, index: Any, y: Tensor) -> None:
        """Samples inside of the steps ``accepted`` as number ``index``, which began at ``y``, up to the times ``upto``."""
        places, rows, times = self._queue.upto(accepted, upto)
        if len(places):
            self._add(places, _each(index, rows), within(self.plan.method, step, trial, y).samples(times, rows))
        if upto is step.end:
            return
        here = accepted & (upto == self._end) & (step.end != self._end)
        if any_of(here):
            places, rows = self._queue.ends(here)
            self._beyond = self._beyond | here
            if len(places):
                self._add(places, _each(index, rows), within(self.plan.method, step, trial, y).samples(_each(self._end, rows), rows))

    def detach(self) -> None:
        """Let go of what autograd has recorded."""
        self._pieces = [x.detach() for x in self._pieces]

    def lose(self, step: int) -> None:
        """Forget the samples of one trajectory in this step and all later ones, but those at the start of the span."""
        good = len(self._queue.starts[0]) if step == 0 and self._queue else sum(s < step for s in _joined(self._steps))
        self._places, self._steps = ([_joined(parts)[:good]] for parts in (self._places, self._steps))
        self._pieces = [torch.cat(self._pieces)[:good]] if self._pieces else []

    def finish(self, reached: Decision, n_accepted: Any, final: Tensor) -> tuple[Tensor, Tensor]:
        """The values, NaN where the solve did not get to, and the step (T, B) that each lies in, -1 for none; with those at the end of the
        span, of the trajectories that ``reached`` it."""
        if self._queue is not None:
            places, rows = self._queue.ends(reached & negated(self._beyond))
            # a trajectory over a span of no length may have no step
            self._add(places, _each(at_least(n_accepted - 1, 0), rows), _each(final.reshape(self._like.shape), rows))
        total, device = self._shape.numel(), final.device
        tail = self._like.shape if self._alone else self._like.shape[1:]
        places, steps, pieces = _joined(self._places), _joined(self._steps), self._pieces
        if self._alone and places == list(range(total)):
            values = torch.cat(pieces) if pieces else final.new_empty((0, *tail))
            return values, torch.tensor(steps, dtype=torch.int64, device=device).reshape(self._shape)
        # where each one is among those that are there, or behind them
        places, steps = (torch.as_tensor(x, dtype=torch.int64, device=device) for x in (places, steps))
        order = places.new_full((total,), len(places)).index_copy(0, places, torch.arange(len(places), device=device))
        values = torch.cat([*pieces, final.new_full((1, *tail), float("nan"))]).index_select(0, order)
        step = torch.cat([steps, steps.new_full((1,), -1)]).index_select(0, order).reshape(self._shape)
        return values if self._alone else values.unflatten(0, self._shape), step


def _each(x: Any, rows: Any) -> Any:
    """What belongs to the ``rows``, of numbers or states of all trajectories; of one, as often."""
    if isinstance(rows, Tensor):
        return x.index_select(0, rows)
    return x.expand(len(rows), *x.shape) if isinstance(x, Tensor) else [x] * len(rows)


def _joined(parts: list[Any]) -> Any:
    """Lists, or tensors, one behind the other."""
    return torch.cat(parts) if parts and isinstance(parts[0], Tensor) else [x for part in parts for x in part]


class _QueueOfOne:
    """Which sample times come next, of one trajectory: their places, trajectories (all 0), and the times."""

    def __init__(self, line: Timeline, t_eval: Tensor, events: bool) -> None:
        times, self._sign = t_eval[:, 0].tolist(), line.sign
        first = [i for i, t in enumerate(times) if t == line.start]
        last = [i for i, t in enumerate(times) if t == line.end != line.start]
        self.starts, self._ends = (first, [0] * len(first)), (last, [0] * len(last))
        self._order = sorted((i for i, t in enumerate(times) if t not in (line.start, line.end)), key=lambda i: line.sign * times[i])
        self._times = [times[i] for i in self._order]
        self.wanted = bool(self._order) or (events and bool(last))
        self._next = 0

    def upto(self, accepted: bool, t: float) -> tuple[list[int], list[int], list[float]]:
        """Those up to ``t``, of trajectories whose steps were ``accepted``."""
        first, times = self._next, self._times
        while self._next < len(times) and self._sign * (times[self._next] - t) <= 0:
            self._next += 1
        return self._order[first : self._next], [0] * (self._next - first), times[first : self._next]

    def ends(self, reached: bool) -> tuple[list[int], list[int]]:
        """Those at the end of the span, of trajectories that ``reached`` it."""
        return self._ends if reached else ([], [])


class _QueueOfMany:
    """Of many. Each goes through its times in their order: those inside of a step are a stretch of them, from the first that is left to
    where a search for the end of the step leads."""

    def __init__(self, line: Timeline, t_eval: Tensor, events: bool) -> None:
        anchors, self._sign, self._rows = line.anchors, line.sign, t_eval.shape[1]
        at_start = t_eval == anchors[0]
        self._at_end = (t_eval == anchors[-1]) & ~at_start
        self.starts = self._flat(at_start)
        inside = ~(self._at_end | at_start)
        self.wanted = bool((~at_start if events else inside).any())
        if not self.wanted:
            return
        # (B, T) in the direction of integration, and infinity behind the last one; the ends are not among them
        ordered, place = torch.where(inside, t_eval * line.sign, float("inf")).sort(dim=0, stable=True)
        self._ordered, self._place = ordered.t().contiguous(), place.t().contiguous()
        #: (B,): how many have been passed
        self._passed = line.count()

    def _flat(self, on: Tensor) -> tuple[Tensor, Tensor]:
        places = on.reshape(-1).nonzero()[:, 0]
        return places, places % self._rows

    def upto(self, accepted: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `_QueueOfOne.upto`."""
        # by the end as it was computed: t + h rounds, and no sample may fall between two steps
        place = torch.searchsorted(self._ordered, (t * self._sign).unsqueeze(-1), right=True).squeeze(-1)
        count = torch.where(accepted, place - self._passed, 0)
        rows = torch.repeat_interleave(count)
        if not rows.numel():
            return rows, rows, rows
        # of each sample: its number in the order of its trajectory
        passed = self._passed + count
        which = torch.arange(rows.numel(), device=rows.device) + (passed - count.cumsum(0))[rows]
        self._passed = passed
        return self._place[rows, which] * self._rows + rows, rows, self._ordered[rows, which] * self._sign[rows]

    def ends(self, reached: Tensor) -> tuple[Tensor, Tensor]:
        """See `_QueueOfOne.ends`."""
        return self._flat(self._at_end & reached)
