"""What a way back through a recorded solve is given, what of it a loss depends on, step by step, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid
from ..methods.family import row_dot
from ..system.system import System
from ..system.transforms import functorch_active
from ..torch_internals import is_legacy_batchedtensor
from .padding import Found, shelter
from .problem import Problem, StepTimes, kept_steps, step_times

__all__ = ["Asked", "Losses", "all_finite", "anchors_bar", "both", "in_shelter", "visible"]

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


def both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Their sum, where None is zero."""
    return b if a is None else a if b is None else a + b


class Losses:
    """Cotangents of what a solve gave, sorted by the step that it lies in: of samples, states and stages."""

    def __init__(self, asked: Asked) -> None:
        grid, t_eval, bar, time_bars = asked.grid, asked.t_eval, asked.bars[1], asked.moving
        self.method, self._states, self._kept = asked.problem.plan.method, asked.bars[2], asked.stages_bars()
        # contiguous, whatever the layout of the times is: it is filled in flat
        self.t_eval_bar = torch.zeros_like(t_eval, memory_format=torch.contiguous_format) if t_eval is not None and time_bars else None
        n_steps, rows = grid.t.shape
        self.rows, self.time_bars = rows, time_bars
        self.inner = self.ends = [(0, 0)] * n_steps
        if bar is None or t_eval is None or n_steps == 0:
            return
        step = grid.sample_step
        index = step.clamp(min=0)
        h = grid.h.gather(0, index)
        theta = (t_eval - grid.t.gather(0, index)) / torch.where(h == 0, 1.0, h)
        # a sample at the end of a step is the state there, whose own cotangent does the rest
        group = torch.where((theta == 1.0) & (not time_bars) & (step >= 0), step + n_steps, step).reshape(-1)
        order = group.argsort(stable=True)
        counts = torch.bincount(group + 1, minlength=2 * n_steps + 1).tolist()
        self.order = order
        self.row = order % rows
        self.h, self.theta = h.reshape(-1)[order], theta.reshape(-1)[order]
        self.bar = bar.flatten(0, 1)[order]
        self.weights = self.method.dense_weights(self.theta)
        self.scaled = (self.weights * self.h.unsqueeze(-1)).to(bar.dtype)
        edges = [0]
        for count in counts:
            edges.append(edges[-1] + count)
        pairs = list(pairwise(edges[1:]))
        self.inner, self.ends = pairs[:n_steps], pairs[n_steps:]

    def _rows_sum(self, start: int, stop: int) -> Tensor:
        values = self.bar[start:stop]
        if self.rows == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.rows, values.shape[-1]).index_add_(0, self.row[start:stop], values)

    def at_end(self, k: int) -> list[Tensor]:
        """Cotangents of the state at the end of step ``k``."""
        start, stop = self.ends[k]
        found = [] if self._states is None else [self._states[k + 1]]
        return [*found, self._rows_sum(start, stop)] if stop > start else found

    def at_start(self, k: int) -> Tensor | None:
        """Cotangent of the state at the start of step ``k``, by way of the dense output."""
        start, stop = self.inner[k]
        return self._rows_sum(start, stop) if stop > start else None

    def at_stages(self, k: int) -> Tensor | None:
        """Cotangents ``(S, B, n)`` of the stages of step ``k``."""
        return both(self._of_samples(k), self._kept.get(k))

    def _of_samples(self, k: int) -> Tensor | None:
        start, stop = self.inner[k]
        if stop == start:
            return None
        bar, scaled = self.bar[start:stop], self.scaled[start:stop]
        if self.rows == 1:
            return (scaled.T @ bar).unsqueeze(1)
        out = bar.new_zeros(scaled.shape[1], self.rows, bar.shape[-1])
        return out.index_add_(1, self.row[start:stop], scaled.T.unsqueeze(-1) * bar)

    def add_time_bars(self, k: int, ks: Sequence[Tensor], t_bar: Tensor, h_bar: Tensor) -> None:
        """Cotangents of the sample times in step ``k``; adds those of its start and size to ``t_bar``, ``h_bar`` (B,)."""
        start, stop = self.inner[k]
        if stop == start:
            return
        row, bar, theta = (x[start:stop] for x in (self.row, self.bar, self.theta))
        products = torch.stack([row_dot(k_i[row], bar) for k_i in ks], dim=-1).double()
        # d/dtheta of h sum b_i(theta) k_i . bar, over h
        slope = (self.method.dense_slopes(theta) * products).sum(-1)
        size = (self.weights[start:stop] * products).sum(-1) - theta * slope
        assert self.t_eval_bar is not None
        self.t_eval_bar.view(-1)[self.order[start:stop]] = slope
        t_bar.index_add_(0, row, -slope)
        h_bar.index_add_(0, row, size)
