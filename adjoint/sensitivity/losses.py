"""What of a recorded solve a loss depends on, as the ways back meet it: step by step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..methods.family import row_dot
from .asked import Asked

__all__ = ["Losses", "both"]


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
