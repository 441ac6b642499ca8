"""Finding events of one trajectory: sign changes over a step, located on its dense output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from .plan import Plan

__all__ = ["EventWatch"]

_EPS = float(np.finfo(np.float64).eps)


class EventWatch:
    """Looks for sign changes of the event functions over each step, and locates them on the dense output."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: float, y0: Tensor) -> None:
        self.plan = plan
        self.functions = [event.bind(inputs) for event in plan.events]
        self.found: list[tuple[int, int, float]] = []
        self.counts = [0] * len(plan.events) if plan.event_counts is None else plan.event_counts[:, 0].tolist()
        self.values = [self._value(i, t0, y0) for i in range(len(plan.events))]

    def _value(self, i: int, t: float, y: Tensor) -> float:
        return float(self.functions[i](torch.tensor(t, dtype=y.dtype.to_real(), device=y.device), y.reshape(1, -1)).detach())

    def found_in(self, step: int) -> bool:
        return bool(self.found) and self.found[-1][1] == step

    def after_step(
        self, index: int, t: float, h: float, end: float, y: Tensor, y1: Tensor, stages: Callable[[], list[Tensor]]
    ) -> float | None:
        """Register the events of a step, earliest first; the time of the terminal one, if any."""
        if not self.plan.events:
            return None
        new = [self._value(i, end, y1) for i in range(len(self.values))]
        crossed = []
        for i, (a, b) in enumerate(zip(self.values, new, strict=True)):
            # direction is that along the integration, as SciPy has it
            direction = self.plan.events[i].direction
            up, down = a < 0 <= b, a > 0 >= b
            if (up and direction >= 0) or (down and direction <= 0):
                crossed.append(i)
        self.values = new
        if not crossed:
            return None
        every = stages()
        ks = torch.stack(every).reshape(len(every), -1)

        def state(theta: float) -> Tensor:
            weights = self.plan.method.dense_weights(torch.tensor([theta], dtype=torch.float64, device=y.device))
            return torch.addmm(y.reshape(1, -1), weights.to(y.dtype), ks, alpha=h).reshape(y.shape)

        located = []
        for i in crossed:

            def value(theta: float, i: int = i) -> float:
                return self._value(i, t + theta * h, y if theta == 0.0 else y1 if theta == 1.0 else state(theta))

            theta = 1.0 if value(1.0) == 0.0 else float(brentq(value, 0.0, 1.0, xtol=4 * _EPS, rtol=4 * _EPS))  # type: ignore[arg-type]
            located.append((theta, i))
        for theta, i in sorted(located):
            self.counts[i] += 1
            when = end if theta == 1.0 else t + theta * h
            self.found.append((i, index, when))
            if self.plan.events[i].terminal and self.counts[i] >= self.plan.events[i].terminal:
                return when
        return None
