"""Finding events of one trajectory: changes of sign over a step, located on its dense output."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .batch_events import Locator
from .event_roots import GRID, may_cross
from .plan import Plan

__all__ = ["EventWatch"]


class EventWatch:
    """As `BatchEventWatch`, but times and values are numbers until there may be an event."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: float, y0: Tensor) -> None:
        self.plan = plan
        self.functions = [event.bind(inputs) for event in plan.events]
        self.found: list[tuple[int, int, float]] = []
        #: where the step that is being taken is to end, just before a terminal event
        self.aim: float | None = None
        if not plan.events:
            return
        device = y0.device
        before = plan.event_counts
        counts = torch.zeros(len(plan.events), 1, dtype=torch.int64, device=device) if before is None else before.clone()
        self.locator = Locator(plan.events, counts, plan)
        weights = plan.method.dense_weights(torch.tensor(GRID, dtype=torch.float64, device=device))
        self.weights = weights.to(y0.dtype)
        self.values = [self._value(i, t0, y0) for i in range(len(plan.events))]

    def _value(self, i: int, t: float, y: Tensor) -> float:
        return float(self.functions[i](torch.tensor(t, dtype=y.dtype.to_real(), device=y.device), y.reshape(1, -1)).detach())

    def found_in(self, step: int) -> bool:
        return bool(self.found) and self.found[-1][1] == step

    def after_step(
        self, index: int, t: float, h: float, end: float, y: Tensor, y1: Tensor, stages: Callable[[], list[Tensor]]
    ) -> tuple[float | None, bool]:
        """Register the events of a step: the time of the terminal one, if any, and whether the step is to be taken again, up to ``aim``."""
        if not self.plan.events:
            return None, False
        aimed, self.aim = end == self.aim, None if end == self.aim else self.aim
        every = stages()
        ks = torch.stack([k.detach() for k in every]).reshape(len(every), -1)
        flat, flat1 = y.detach().reshape(1, -1), y1.detach().reshape(1, -1)
        inside = torch.addmm(flat, self.weights, ks, alpha=h).unbind()
        points = [(t + c * h, x) for c, x in zip(GRID, inside, strict=True)]
        points.append((end, flat1))
        values = [[v, *(self._value(i, *point) for point in points)] for i, v in enumerate(self.values)]
        before, self.values = self.values, [v[-1] for v in values]
        if not aimed and not any(may_cross(v) for v in values):
            return None, False

        def value(i: int, theta: Tensor) -> Tensor:
            x = float(theta)
            if x in (0.0, 1.0):
                return theta.new_tensor([self._value(i, *((t, flat) if x == 0.0 else (end, flat1)))])
            weights = self.plan.method.dense_weights(theta).to(y.dtype)
            return theta.new_tensor([self._value(i, t + x * h, torch.addmm(flat, weights, ks, alpha=h))])

        places = [0.0, *GRID, 1.0]
        one = self.locator.margin
        flags = torch.ones_like(one, dtype=torch.bool)
        if aimed:
            far = self.locator.reach(flags)
            places.append(float(far))
            values = [[*v, float(value(i, far))] for i, v in enumerate(values)]
        first = flags & (index == 0 and self.plan.event_counts is None)
        when = (torch.full_like(one, t), torch.full_like(one, h), torch.full_like(one, end))
        table, at = one.new_tensor(values).unsqueeze(-1), one.new_tensor(places).unsqueeze(-1)
        located = self.locator.locate(value, flags, flags & aimed, first, when, at, table)
        aim, stop = float(located.aim), float(located.stop)
        self.aim = aim if aim == aim else self.aim
        if bool(located.again):
            self.values = before
            return None, True
        for line in located.hit[:, 0].nonzero()[:, 0].tolist():
            self.found.append((int(located.kind[line, 0]), index, float(located.when[line, 0])))
        return (stop if stop == stop else None), False
