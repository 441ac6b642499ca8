"""What the replays and the adjoints of multistep methods have in common: times of a step, its cotangents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, shifted_times
from ..methods import Method
from .problem import Problem

__all__ = ["Schedule", "StepBack", "StepBars", "StepTime"]


class StepTime(NamedTuple):
    """The times (B,) of a step as ``fun`` sees them: its end, and the start of the next one; its size ``h``; ``restart``: the next step
    knows nothing of what was before."""

    end: Tensor
    after: Tensor
    h: Tensor
    restart: Tensor


class Schedule:
    """The times of all steps, which move with the anchor before them. A step that lands on an anchor changes its size with it."""

    def __init__(self, problem: Problem, grid: Grid, anchors: Tensor) -> None:
        self.grid, self.real = grid, grid.states.dtype.to_real()
        segment, lands, last = grid.segment, grid.lands, anchors.shape[0] - 1
        moved = anchors - anchors.detach()
        at = moved.gather(0, segment)
        self.sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).detach()
        self.begin = grid.t + at
        self.first = anchors[0].to(self.real)
        self.h = grid.h + torch.where(lands, moved.gather(0, (segment + 1).clamp(max=last)) - at, 0.0)
        self.inner = lands & (segment < last - 1)
        self.shifts = problem.plan.shift != "none" and last > 1

    def step(self, k: int) -> StepTime:
        """Those of step ``k``."""
        h = self.h[k]
        end = after = (self.begin[k] + h).to(self.real)
        if self.shifts:
            end = shifted_times([end], [1.0], False, self.inner[k], self.sign)[0]
            after = shifted_times([after], [0.0], self.inner[k], False, self.sign)[0]
        return StepTime(end, after, h, self.inner[k])


@dataclass(frozen=True)
class StepBars:
    """Cotangents at the end of a step: of the table (M, B, n) and, if any, of the stages (S, B, n)."""

    method: Method
    table: Tensor
    stages: Tensor | None
    moving: bool


class StepBack(NamedTuple):
    """Cotangents of the table before a step; of its times, and, if it lands, of its size: (B,) where they are wanted."""

    table: Tensor
    t: Tensor | None
    size: Tensor | None
