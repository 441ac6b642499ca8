"""The sweep that goes back through the steps of one trajectory with the matrices of `steps_as_rows`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..integrate import Monitor
from ..methods.family import StepCotangents
from ..system.capture import cut_apart
from ..system.system import Flat
from .asked import Asked
from .linearize import Linearizer
from .losses import Losses
from .replay import hands_on
from .steps_as_rows import StepRows, most_rows, rows_of

__all__ = ["LoneSweep"]


def _joined(found: StepCotangents) -> Tensor:
    """Cotangents ``(..., n)`` of the state, or ``(..., 2 n)`` with those of the slope that was handed on."""
    return found.y if found.first is None else torch.cat([found.y, found.first], -1)


def _padded(x: Tensor, n: int) -> Tensor:
    return x if len(x) == n else torch.cat([x, x.new_zeros(n - len(x))])


class LoneSweep:
    """A `Way` for steps of one trajectory by an implicit method, which linearises ``size`` of them at once."""

    def __init__(self, asked: Asked, losses: Losses, f: Flat, linearize: Linearizer, size: int) -> None:
        grid = asked.grid
        self.states, self.stages, self.t, self.h = grid.states.detach().squeeze(1), grid.stages.detach().squeeze(2), grid.t, grid.h
        self.plan, self.linearize, self.mapped, self.size, self._losses = asked.problem.plan, linearize, rows_of(f), size, losses

    @classmethod
    def make(cls, asked: Asked, losses: Losses) -> LoneSweep | None:
        """None where it cannot be done (see `most_rows`), or does not pay."""
        problem, grid, time = asked.problem, asked.grid, asked.moving
        plan, method = problem.plan, problem.plan.method
        watched = type(plan.monitor).adjoint is not Monitor.adjoint
        if watched or method.adjoint_step is None or asked.n_steps <= 4 or asked.times(asked.anchors.detach()).jump_end is not None:
            return None
        bent = method.n_stages if method.needs_time_slope else 0
        if (time or bent) and grid.states.is_complex():
            return None
        inputs = cut_apart(asked.inputs)
        f = problem.system.bind(inputs)
        size = most_rows(f, grid.t[0].to(plan.real), grid.states[0].detach(), inputs, method.n_stages, bent)
        return None if size is None else cls(asked, losses, f, Linearizer(f, inputs, asked.wants[3:], time), size)

    def start(self, final_bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Way.start`; what is carried: cotangents ``(n,)`` of the state, and of the last slope by way of the step behind it."""
        bar = torch.zeros_like(self.states[0])
        return bar if final_bar is None else bar + final_bar.squeeze(0), None

    def begin(self, carried: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        """See `Way.begin`."""
        return carried[0].unsqueeze(0), None

    def back(self, part: range, carried: tuple[Tensor, Tensor | None], t_bars: Tensor, h_bars: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Way.back`."""
        bar, handed = carried
        method: Any = self.plan.method
        rows = slice(part.start, part.stop)
        y, ks = self.states[rows], list(self.stages[rows].unbind(1))
        real = y.dtype.to_real()
        h = self.h[rows].to(real)
        times = (self.t[rows] + self.h[rows] * self.h.new_tensor(method.nodes)).to(real).unbind(1)
        lin = StepRows(self.plan, self.mapped, self.linearize, times, h, y, ks)
        n, chained = y.shape[-1], hands_on(self.plan)
        # of methods that hand their last slope on its cotangent goes along with that of the state
        both = 2 * n if chained else n
        units = torch.eye(both, dtype=y.dtype, device=y.device).unsqueeze(1).expand(-1, len(part), -1)
        last = [*([None] * (len(ks) - 1)), units[..., n:]] if chained else []
        matrices = _joined(method.adjoint_step(lin, times, h, y, units[..., :n], last, False)).permute(1, 2, 0).contiguous().unbind()
        k_bar, moved = self._stage_bars(part, y, len(ks)), None
        if k_bar:
            moved = _joined(method.adjoint_step(lin, times, h, y, torch.zeros_like(y), k_bar, False))
        ends: list[Tensor] = [bar] * len(part)
        if chained:
            bar = torch.cat([bar, torch.zeros_like(bar) if handed is None else handed])
        for k in reversed(part):
            place = k - part.start
            for end in self._losses.at_end(k):
                bar = bar + _padded(end.squeeze(0), both)
            ends[place] = bar
            bar = torch.mv(matrices[place], bar)
            if moved is not None:
                bar = bar + moved[place]
            start = self._losses.at_start(k)
            if start is not None:
                bar = bar + _padded(start.squeeze(0), both)
        lin.take()
        every = torch.stack(ends)
        if chained:
            k_bar = k_bar or [torch.zeros_like(y)] * len(ks)
            k_bar = [*k_bar[:-1], k_bar[-1] + every[:, n:]]
        result = method.adjoint_step(lin, times, h, y, every[:, :n], k_bar, self.linearize.time)
        lin.finish()
        bar, handed = bar[:n], bar[n:] if chained else None
        first = None
        if handed is not None and part.start == 0:
            # the slope that the first step began with was asked for
            u, first = self.linearize(self.t[0].to(self.plan.real), self.states[:1])[1](handed.unsqueeze(0))
            bar = bar + u.squeeze(0)
        if self.linearize.time:
            for total, found in ((t_bars, result.t), (h_bars, result.h)):
                if found is not None:
                    total[rows, 0] += found
            if first is not None:
                t_bars[0] += first
            for k in part:
                self._losses.add_time_bars(k, list(self.stages[k].unsqueeze(1).unbind()), t_bars[k], h_bars[k])
        return bar, handed

    def _stage_bars(self, part: range, y: Tensor, count: int) -> list[Tensor]:
        found = [self._losses.at_stages(k) for k in part]
        if all(x is None for x in found):
            return []
        none = y.new_zeros(count, y.shape[-1])
        return list(torch.stack([none if x is None else x.squeeze(1) for x in found], 1).unbind())
