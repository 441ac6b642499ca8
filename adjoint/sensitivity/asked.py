"""What a way back through a recorded solve is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.grid import Grid
from ..system.system import System
from ..system.transforms import functorch_active
from ..torch_internals import is_legacy_batchedtensor
from .padding import Found, shelter
from .problem import Problem, StepTimes, kept_steps, step_times

__all__ = ["Asked", "all_finite", "anchors_bar", "in_shelter", "visible"]


class Asked(NamedTuple):
    """Cotangents of a solve, and which ones are asked for.

    Attributes
    ----------
    grid : the recorded steps
    anchors : (A, B); t_eval : (T, B) or None; inputs : of the system
    bars : cotangents of ``final, samples, states, stages``, None for those of zero
    wants : whether those of ``anchors, t_eval, y0, *inputs`` are asked for
    """

    problem: Problem
    grid: Grid
    anchors: Tensor
    t_eval: Tensor | None
    inputs: Sequence[Tensor]
    bars: Sequence[Tensor | None]
    wants: Sequence[bool]

    @property
    def moving(self) -> bool:
        """Whether those of times are."""
        return bool(self.wants[0] or self.wants[1])

    @property
    def n_steps(self) -> int:
        """Of the trajectory with most."""
        return self.grid.t.shape[0]

    @property
    def final_bar(self) -> Tensor | None:
        """Cotangent of the last state, where there is one."""
        bar = self.bars[0]
        return None if bar is None else torch.where((self.grid.status >= 0).unsqueeze(-1), bar, 0.0)

    @property
    def point(self) -> list[Tensor | None]:
        """Where derivatives are taken: ``anchors, t_eval, y0, *inputs``."""
        return [self.anchors, self.t_eval, self.grid.states[0], *self.inputs]

    def times(self, anchors: Tensor) -> StepTimes:
        """Of the steps, by these anchors."""
        grid = self.grid
        return step_times(grid.t, grid.h, grid.segment, grid.lands, anchors, self.problem.plan.shift)

    def stages_bars(self) -> dict[int, Tensor]:
        """Cotangents ``(S, B, n)`` of the stages that are part of the record, by their steps."""
        bars = self.bars[3]
        if bars is None or not len(bars):
            return {}
        return dict(zip(kept_steps(self.problem.plan, self.grid.event_step, self.n_steps), bars, strict=True))

    def answer(
        self, anchors: Tensor | None, t_eval: Tensor | None, y0: Tensor | None, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        """Cotangents of ``(anchors, t_eval, y0, *inputs)``, of the first three those that are asked for."""
        first = (x if want else None for x, want in zip((anchors, t_eval, y0), self.wants[:3], strict=True))
        return (*first, *inputs)

    def sound(self, found: Sequence[Tensor | None]) -> bool:
        """Whether the cotangents that a way back ``found`` from these are finite, if these are.

        Those of a batch always are: each of its trajectories has a gradient of its own. So are those of one that failed, and what a
        transform is around, whose numbers cannot be looked at.
        """
        if not visible(self.problem, self.bars) or all_finite(found):
            return True
        return not all_finite(self.bars) or int(self.grid.status[0]) < 0


def visible(problem: Problem, bars: Sequence[Tensor | None]) -> bool:
    """Whether cotangents are those of one trajectory that can be looked at."""
    if problem.batched or not isinstance(problem.system, System) or functorch_active():
        return False
    return not any(x is not None and is_legacy_batchedtensor(x) for x in bars)


def all_finite(values: Sequence[Tensor | None]) -> bool:
    """Whether they are numbers."""
    return all(x is None or not x.numel() or bool(torch.isfinite(x).all()) for x in values)


def in_shelter(sweep: Callable[..., Found]) -> Callable[..., Found]:
    """A sweep that is given what `shelter` makes of record and inputs; of one trajectory there is nothing to make."""

    @wraps(sweep)
    def sheltered(asked: Asked, *more: Any) -> Found:
        if asked.grid.h.shape[1] == 1 and not functorch_active():
            return sweep(asked, *more)
        safe = shelter(asked.problem, asked.grid, asked.t_eval, asked.inputs)
        return safe.marked(sweep(asked._replace(grid=safe.grid, inputs=safe.inputs), *more), asked.bars)

    return sheltered


def anchors_bar(anchors: Tensor, grid: Grid, t_bars: Tensor, h_bars: Tensor) -> Tensor:
    """Cotangents of steps to those of the anchors: see `step_times`."""
    landed = torch.where(grid.lands, h_bars, 0.0)
    out = torch.zeros_like(anchors)
    out.scatter_add_(0, grid.segment, t_bars - landed)
    out.scatter_add_(0, (grid.segment + 1).clamp(max=anchors.shape[0] - 1), landed)
    return out
