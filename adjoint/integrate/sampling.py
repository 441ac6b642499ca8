"""Samples at given times, made as the steps go by: of one trajectory by numbers, of many by masks.

A sampler is told of every step (`take`) and of the end (`finish`). It gives the ``values`` (T, B, n) and the ``step`` (T, B) that each
lies in. There are two, since they are made in two ways: those of one trajectory by a product with a small matrix for each step, without
writing into a tensor, so that autograd may record them; those of many all at once, wherever in their steps they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan
from .stepper import Attempt, Trial
from .timeline import Timeline

__all__ = ["BatchSampler", "Sampler"]

#: up to how many samples are weighed by numbers
_FEW = 8


class Sampler:
    """Collects samples at given times, in any order and with repetitions.

    They are made in the order of the steps and put into that of the times at the end, without writing into a tensor, so that a solve that
    autograd records can use it too.
    """

    def __init__(self, plan: Plan, line: Timeline, t_eval: Tensor | None, y0: Tensor) -> None:
        self.plan, self.sign, self.like = plan, line.sign, y0
        times = [] if t_eval is None else t_eval[:, 0].tolist()
        self.order = sorted(range(len(times)), key=lambda i: line.sign * times[i])
        self.times = [times[i] for i in self.order]
        self.wanted = bool(times)
        #: by place in ``t_eval``: the step that a sample lies in, -1 for none
        self._step = [-1] * len(times)
        self._pieces: list[Tensor] = []
        self._next = 0

    def take(self, step: Attempt, trial: Trial, accepted: bool, upto: float, index: int, y: Tensor) -> None:
        """Samples of the step that was accepted as number ``index``, which began at ``y``, up to the time ``upto``."""
        thetas, n_ends = [], 0
        while self._next < len(self.times) and self.sign * (self.times[self._next] - upto) <= 0:
            self._step[self.order[self._next]] = index
            if self.times[self._next] == step.end:
                n_ends += 1
            else:
                thetas.append((self.times[self._next] - step.t) / step.h)
            self._next += 1
        if thetas:
            weights = self._weights(thetas, step.h, y)
            known = torch.stack([y, *trial.stages()]).reshape(weights.shape[1], -1)
            self._pieces.append(torch.mm(weights, known).reshape(len(thetas), *y.shape))
        if n_ends:
            self._pieces.append(trial.y.expand(n_ends, *trial.y.shape))

    def _weights(self, thetas: list[float], h: float, like: Tensor) -> Tensor:
        """``(len(thetas), 1 + S)``: of the state at the start and of every stage."""
        method = self.plan.method
        if len(thetas) <= _FEW:
            # for the few samples of a step tensor operators on so few elements would cost more than all the rest
            rows = [[1.0, *(h * w for w in method.dense_numbers(theta))] for theta in thetas]
            return torch.tensor(rows, dtype=like.dtype, device=like.device)
        weights = method.dense_weights(torch.tensor(thetas, dtype=torch.float64, device=like.device)) * h
        return torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1).to(like.dtype)

    def detach(self) -> None:
        """Let go of what autograd has recorded."""
        self._pieces = [x.detach() for x in self._pieces]

    def lose(self, step: int) -> None:
        """Forget the samples in this step and all later ones."""
        good = sum(0 <= s < step for s in self._step)
        self._step = [s if s < step else -1 for s in self._step]
        self._pieces = [torch.cat(self._pieces)[:good]] if self._pieces else []

    def finish(self, reached: bool, n_accepted: int, final: Tensor) -> None:
        """The end of the last step is the end of the span: nothing is missing."""

    @property
    def step(self) -> Tensor:
        """(T, 1)"""
        return torch.tensor(self._step, dtype=torch.int64, device=self.like.device).reshape(-1, 1)

    @property
    def values(self) -> Tensor:
        """``(T, *state)``, NaN where the solve did not get to."""
        total = len(self.times)
        done = sum(len(piece) for piece in self._pieces)
        if done < total:
            self._pieces.append(self.like.new_full((total - done, *self.like.shape), float("nan")))
        if not self._pieces:
            return self.like.new_empty((0, *self.like.shape))
        out = torch.cat(self._pieces)
        if self.order == list(range(total)):
            return out
        inverse = [0] * total
        for place, i in enumerate(self.order):
            inverse[i] = place
        return out[torch.tensor(inverse, device=out.device)]


class BatchSampler:
    """Fills samples as the steps go by; those at the two ends need no dense output.

    Every trajectory goes through its times in their order: those inside of a step are a stretch of them, from the first that is left to
    where a search for the end of the step leads. The stretches of all trajectories are evaluated at once.
    """

    def __init__(self, plan: Plan, line: Timeline, t_eval: Tensor | None, y0: Tensor) -> None:
        self.plan = plan
        anchors, sign = line.anchors, line.sign
        rows, n = y0.shape
        times = t_eval if t_eval is not None else anchors.new_empty((0, rows))
        self.values = y0.new_full((times.shape[0], rows, n), float("nan"))
        self.step = torch.full_like(times, -1, dtype=torch.int64)
        self.at_end = times == anchors[-1]
        at_start = times == anchors[0]
        self.step[at_start] = 0
        self.values = torch.where(at_start.unsqueeze(-1), y0, self.values)
        inside = ~(self.at_end | at_start)
        self.wanted = bool(inside.any())
        if not self.wanted:
            return
        # (B, T) in the direction of integration, and infinity behind the last one; the ends are not among them
        ordered, place = torch.where(inside, times * sign, float("inf")).sort(dim=0, stable=True)
        self.ordered, self.place = ordered.t().contiguous(), place.t().contiguous()
        self.sign = sign
        #: (B,): how many have been filled
        self.filled = torch.zeros_like(self.step[0])

    def take(self, step: Attempt, trial: Trial, accepted: Tensor, upto: Tensor, index: Tensor, y: Tensor) -> None:
        """Samples inside of the steps ``accepted`` as number ``index``, which began at ``y``, up to the times ``upto``."""
        # by the end as it was computed: t + h rounds, and no sample may fall between two steps
        place = torch.searchsorted(self.ordered, (upto * self.sign).unsqueeze(-1), right=True).squeeze(-1)
        count = torch.where(accepted, place - self.filled, 0)
        rows = torch.repeat_interleave(count)
        if not rows.numel():
            return
        # of each sample: its number in the order of its trajectory
        behind = self.filled + count
        which = torch.arange(rows.numel(), device=rows.device) + (behind - count.cumsum(0))[rows]
        h = step.h[rows]
        theta = (self.ordered[rows, which] * self.sign[rows] - step.t[rows]) / h
        weights = (self.plan.method.dense_weights(theta) * h.unsqueeze(-1)).to(y.dtype)
        value = y.index_select(0, rows)
        for i, k in enumerate(trial.stages()):
            value = torch.addcmul(value, weights[:, i : i + 1], k.index_select(0, rows))
        place = self.place[rows, which]
        self.values[place, rows] = value
        self.step[place, rows] = index[rows]
        self.filled = behind

    def finish(self, reached: Tensor, n_accepted: Tensor, final: Tensor) -> None:
        """Samples at the end of the span, of the rows that ``reached`` it."""
        reached = self.at_end & reached
        self.values = torch.where(reached.unsqueeze(-1), final, self.values)
        # a trajectory over a span of no length may have no step
        self.step = torch.where(reached, (n_accepted - 1).clamp(min=0).expand_as(self.step), self.step)
