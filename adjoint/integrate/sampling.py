"""States within a step, by its dense output, and samples at given times, made as the steps go by.

States are made in two ways: those of one trajectory by products with small matrices, without writing into a tensor, so that autograd may
record them; those of many row by row, wherever in their steps they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods import Method
from .clock import Timeline
from .numbers import Decision, any_of, at_least, negated
from .plan import Plan
from .stepper import Attempt, Trial

__all__ = ["Sampler", "WithinMany", "WithinOne", "within"]

#: up to how many states of one trajectory are weighed by numbers
_FEW = 8


def within(method: Method, step: Attempt, trial: Trial, y: Tensor, who: Decision = False) -> WithinOne | WithinMany:
    """The states in a step that began at ``y``, at places for those ``who`` look at them, beside samples."""
    return WithinMany(method, step, trial, y, who) if isinstance(step.h, Tensor) else WithinOne(method, step, trial, y)


class WithinOne:
    """Of one trajectory, whose states have any shape."""

    def __init__(self, method: Method, step: Attempt, trial: Trial, y: Tensor) -> None:
        self._method, self._step, self._y, self._trial, self.end = method, step, y, trial, trial.y
        self._flat: tuple[Tensor, Tensor] | None = None

    def on_grid(self, weights: Tensor) -> Sequence[Tensor]:
        """States ``(n,)`` at places of which these are the weights ``(P, S)``."""
        if self._flat is None:
            ks = torch.stack([k.detach() for k in self._trial.stages(True)])
            self._flat = self._y.detach().reshape(1, -1), ks.reshape(len(ks), -1)
        return torch.addmm(self._flat[0], weights, self._flat[1], alpha=self._step.h).unbind()

    def at(self, theta: Tensor) -> Tensor:
        """The state ``(1, n)`` at a part ``(1,)`` of the step, which may be beyond its end."""
        x = float(theta)
        if x in (0.0, 1.0):
            return (self._y if x == 0.0 else self.end).detach().reshape(1, -1)
        return self.on_grid(self._method.dense_weights(theta).to(self._y.dtype))[0].unsqueeze(0)

    def samples(self, times: Sequence[float], rows: Sequence[int]) -> Tensor:
        """States ``(N, *state)`` at increasing times in it."""
        y, h = self._y, self._step.h
        thetas = [(t - self._step.t) / h for t in times if t != self._step.end]
        pieces, n_ends = [], len(times) - len(thetas)
        if thetas:
            weights = self._weights(thetas, h)
            known = torch.stack([y, *self._trial.stages(True)]).reshape(weights.shape[1], -1)
            pieces.append(torch.mm(weights, known).reshape(len(thetas), *y.shape))
        if n_ends:
            pieces.append(self.end.expand(n_ends, *self.end.shape))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _weights(self, thetas: list[float], h: float) -> Tensor:
        """``(len(thetas), 1 + S)``: of the state at the start and of every stage."""
        method, like = self._method, self._y
        if len(thetas) <= _FEW:
            # for the few samples of a step tensor operators on so few elements would cost more than all the rest
            rows = [[1.0, *(h * w for w in method.dense_numbers(theta))] for theta in thetas]
            return torch.tensor(rows, dtype=like.dtype, device=like.device)
        weights = method.dense_weights(torch.tensor(thetas, dtype=torch.float64, device=like.device)) * h
        return torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1).to(like.dtype)


class WithinMany:
    """Of many, with states ``(B, n)``."""

    def __init__(self, method: Method, step: Attempt, trial: Trial, y: Tensor, who: Decision) -> None:
        self._method, self._step, self._y, self._trial, self._who, self.end = method, step, y, trial, who, trial.y

    @property
    def _size(self) -> Tensor:
        return self._step.h.to(self._y.dtype.to_real()).unsqueeze(-1)

    def on_grid(self, weights: Tensor) -> Sequence[Tensor]:
        """States ``(B, n)`` at places, the same for all, of which these are the weights ``(P, S)``."""
        y, ks = self._y, torch.stack(list(self._trial.stages(self._who)))
        inside = y + self._size * (weights @ ks.reshape(len(ks), -1)).reshape(len(weights), *y.shape)
        return inside.unbind()

    def at(self, theta: Tensor) -> Tensor:
        """States ``(B, n)``, each at its own part ``(B,)`` of the step, which may be beyond its end."""
        y = self._y
        weights = self._method.dense_weights(theta).to(y.dtype)
        inside = y + self._size * sum(weights[:, i : i + 1] * k for i, k in enumerate(self._trial.stages(self._who)))
        return torch.where((theta == 0).unsqueeze(-1), y, torch.where((theta == 1).unsqueeze(-1), self.end, inside))

    def samples(self, times: Tensor, rows: Tensor) -> Tensor:
        """States ``(N, n)`` of trajectories at times in their steps ``(N,)``, in any order and with repetitions."""
        step = self._step
        h = step.h[rows]
        theta = (times - step.t[rows]) / h
        # whose evaluations count, where there are any
        inside: Decision = False
        if self._method.extra_evaluations or self._method.end_index == self._method.n_stages:
            inside = torch.zeros_like(step.segment).index_add_(0, rows, (times != step.end[rows]).to(step.segment.dtype)) > 0
        weights = (self._method.dense_weights(theta) * h.unsqueeze(-1)).to(self._y.dtype)
        value = self._y.index_select(0, rows)
        for i, k in enumerate(self._trial.stages(inside)):
            value = torch.addcmul(value, weights[:, i : i + 1], k.index_select(0, rows))
        return value


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
