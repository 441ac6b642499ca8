"""Samples of many trajectories at their own times, made as the steps go by."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["BatchSampler"]


class _Step(Protocol):
    """What a sample needs of a step: `Attempt`."""

    @property
    def t(self) -> Tensor: ...
    @property
    def end(self) -> Tensor: ...
    @property
    def h(self) -> Tensor: ...
    @property
    def accepted(self) -> Tensor: ...
    @property
    def stages(self) -> list[Tensor]: ...


class BatchSampler:
    """Fills samples as the steps go by; those at the two ends need no dense output.

    Every trajectory goes through its times in their order: those inside of a step are a stretch of them, from the first that is left to
    where a search for the end of the step leads. The stretches of all trajectories are evaluated at once.
    """

    def __init__(self, plan: Plan, t_eval: Tensor | None, anchors: Tensor, sign: Tensor, y0: Tensor) -> None:
        self.plan = plan
        rows, n = y0.shape
        times = t_eval if t_eval is not None else anchors.new_empty((0, rows))
        self.out = y0.new_full((times.shape[0], rows, n), float("nan"))
        self.step = torch.full_like(times, -1, dtype=torch.int64)
        self.at_end = times == anchors[-1]
        at_start = times == anchors[0]
        self.step[at_start] = 0
        self.out = torch.where(at_start.unsqueeze(-1), y0, self.out)
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

    def take(self, step: _Step, y: Tensor, n_accepted: Tensor) -> None:
        """Samples inside of the steps just accepted, which began at ``y``."""
        # by the end as it was computed: t + h rounds, and no sample may fall between two steps
        upto = torch.searchsorted(self.ordered, (step.end * self.sign).unsqueeze(-1), right=True).squeeze(-1)
        count = torch.where(step.accepted, upto - self.filled, 0)
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
        for i, k in enumerate(step.stages):
            value = torch.addcmul(value, weights[:, i : i + 1], k.index_select(0, rows))
        place = self.place[rows, which]
        self.out[place, rows] = value
        self.step[place, rows] = n_accepted[rows]
        self.filled = behind

    def finish(self, reached: Tensor, n_accepted: Tensor, final: Tensor) -> None:
        """Samples at the end of the span, of the rows that ``reached`` it."""
        reached = self.at_end & reached
        self.out = torch.where(reached.unsqueeze(-1), final, self.out)
        # a trajectory over a span of no length may have no step
        self.step = torch.where(reached, (n_accepted - 1).clamp(min=0).expand_as(self.step), self.step)
