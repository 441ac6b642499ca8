"""The discrete adjoint of multistep methods: step by step back, with the cotangents of all differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..system.capture import cut_apart
from .adams import AdamsAdjoint
from .asked import Asked, Linearizer, Losses
from .bdf import BdfAdjoint
from .multistep_step import Schedule, StepBars

__all__ = ["MultistepOneByOne"]


class MultistepOneByOne:
    """A `Way` for multistep methods, a step after the other; what is carried: the cotangents ``(M, B, n)`` of the table of differences."""

    size = 1

    def __init__(self, asked: Asked, losses: Losses) -> None:
        problem, grid = asked.problem, asked.grid
        self._losses, self._moving, self._method = losses, asked.moving, problem.plan.method
        self._grid = replace(grid, states=grid.states.detach(), stages=grid.stages.detach())
        inputs = cut_apart(asked.inputs)
        f = problem.system.bind(inputs)
        self.linearize = Linearizer(f, inputs, asked.wants[3:], asked.moving)
        kind = AdamsAdjoint if problem.algebra is None else BdfAdjoint
        self._steps: Any = kind(problem, self._grid, inputs, self.linearize, f)
        self._schedule = Schedule(problem, self._grid, asked.anchors.detach())
        self.linearize.check_next = asked.n_steps > 0

    def start(self, final_bar: Tensor | None) -> Tensor:
        """See `Way.start`."""
        states = self._grid.states
        bar = states.new_zeros(self._steps.size, *states.shape[1:])
        if final_bar is not None:
            bar[0] = final_bar
        return bar

    def back(self, part: range, bar: Tensor, t_bars: Tensor, h_bars: Tensor) -> Tensor:
        """See `Way.back`."""
        k, losses = part.start, self._losses
        for end in losses.at_end(k):
            bar = torch.cat([(bar[0] + end).unsqueeze(0), bar[1:]])
        back = self._steps.step(k, StepBars(self._method, bar, losses.at_stages(k), self._moving), self._schedule.step(k))
        valid = self._grid.h[k] != 0
        bar = torch.where(valid.reshape(1, -1, 1), back.table, bar)
        for total, found in ((t_bars, back.t), (h_bars, back.size)):
            if found is not None:
                total[k] += torch.where(valid, found, 0.0)
        start = losses.at_start(k)
        if start is not None:
            bar = torch.cat([(bar[0] + start).unsqueeze(0), bar[1:]])
        if self._moving:
            losses.add_time_bars(k, list(self._grid.stages[k].unbind()), t_bars[k], h_bars[k])
        return bar

    def begin(self, bar: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Way.begin`."""
        states = self._grid.states
        return self._steps.begin(bar, states[0], self._schedule.first) if len(states) > 1 else (bar[0], None)
