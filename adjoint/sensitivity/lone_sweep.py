"""The sweep that goes back through the steps of one trajectory with the matrices of `steps_as_rows`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.sums import StepCotangents
from ..system.system import Flat
from .linearize import Linearizer
from .problem import Problem
from .replay import hands_on
from .steps_as_rows import StepRows, most_rows, rows_of

__all__ = ["LoneSweep", "goes_by_rows"]


def goes_by_rows(problem: Problem, n_steps: int, jumps: bool) -> bool:
    """Whether the steps of an implicit method are of a kind that `LoneSweep` takes, and many enough for it to pay."""
    special = jumps or problem.plan.method.adjoint_step is None
    return problem.alone and not special and n_steps > 4


def _both(found: StepCotangents) -> Tensor:
    """Cotangents ``(..., n)`` of the state, or ``(..., 2 n)`` with those of the slope that was handed on."""
    return found.y if found.first is None else torch.cat([found.y, found.first], -1)


def _padded(x: Tensor, n: int) -> Tensor:
    return x if len(x) == n else torch.cat([x, x.new_zeros(n - len(x))])


class LoneSweep:
    """Steps of a `Record` from the last to the first, many at a time.

    Parameters
    ----------
    states : (K + 1, 1, n); stages : (K, S, 1, n); t, h : (K, 1)
    size : how many steps at a time
    stage_bar : cotangents ``(S, 1, n)`` of the stages of a step, or None
    """

    def __init__(
        self,
        problem: Problem,
        f: Flat,
        linearize: Linearizer,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        size: int,
        stage_bar: Callable[[int], Tensor | None],
    ) -> None:
        states, stages, self.t, self.h = tensors
        self.states, self.stages = states.squeeze(1), stages.squeeze(2)
        self.plan, self.linearize, self.mapped, self.size, self.stage_bar = problem.plan, linearize, rows_of(f), size, stage_bar

    @classmethod
    def make(
        cls,
        problem: Problem,
        f: Flat,
        linearize: Linearizer,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        inputs: Sequence[Tensor],
        stage_bar: Callable[[int], Tensor | None],
    ) -> LoneSweep | None:
        """None where it cannot be done: see `most_rows`."""
        states, _, t, _ = tensors
        method: Any = problem.plan.method
        if linearize.time and states.is_complex():
            return None
        bent = method.n_stages if method.needs_time_slope else 0
        if bent and states.is_complex():
            return None
        size = most_rows(f, t[0].to(problem.plan.real), states[0], inputs, method.n_stages, bent)
        return None if size is None else cls(problem, f, linearize, tensors, size, stage_bar)

    def run(
        self, bar: Tensor, at_end: Callable[[int], Tensor | None], at_start: Callable[[int], Tensor | None]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """From the cotangent ``(1, n)`` of the last state to that of the first; with those of starts and sizes of the steps, ``(K, 1)``,
        where they are wanted. ``at_end``, ``at_start``: what comes in at the two ends of a step."""
        n_steps = len(self.t)
        starts, sizes = [], []
        bar, handed = bar.squeeze(0), None
        for stop in range(n_steps, 0, -self.size):
            part = range(max(0, stop - self.size), stop)
            bar, handed, t_bar, h_bar = self._part(part, bar, handed, at_end, at_start)
            starts.append(t_bar)
            sizes.append(h_bar)
        if handed is not None:
            # the slope that the first step began with was asked for
            u, time_bar = self.linearize(self.t[0].to(self.plan.real), self.states[:1])[1](handed.unsqueeze(0))
            bar = bar + u.squeeze(0)
            if time_bar is not None:
                starts[-1] = torch.cat([starts[-1][:1] + time_bar, starts[-1][1:]])
        if not self.linearize.time:
            return bar.unsqueeze(0), None, None
        return bar.unsqueeze(0), *(torch.cat(x[::-1]).double().unsqueeze(-1) for x in (starts, sizes))  # type: ignore[return-value]

    def _part(
        self,
        part: range,
        bar: Tensor,
        handed: Tensor | None,
        at_end: Callable[[int], Tensor | None],
        at_start: Callable[[int], Tensor | None],
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """``handed`` (n,): the cotangent of the last slope of the part, by way of the step behind it; so for the step before, returned."""
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
        matrices = _both(method.adjoint_step(lin, times, h, y, units[..., :n], last, False)).permute(1, 2, 0).contiguous().unbind()
        k_bar, moved = self._stage_bars(part, y, len(ks)), None
        if k_bar:
            moved = _both(method.adjoint_step(lin, times, h, y, torch.zeros_like(y), k_bar, False))
        ends: list[Tensor] = [bar] * len(part)
        if chained:
            bar = torch.cat([bar, torch.zeros_like(bar) if handed is None else handed])
        for k in reversed(part):
            place = k - part.start
            end = at_end(k)
            if end is not None:
                bar = bar + _padded(end.squeeze(0), both)
            ends[place] = bar
            bar = torch.mv(matrices[place], bar)
            if moved is not None:
                bar = bar + moved[place]
            start = at_start(k)
            if start is not None:
                bar = bar + _padded(start.squeeze(0), both)
        lin.take()
        every = torch.stack(ends)
        if chained:
            k_bar = k_bar or [torch.zeros_like(y)] * len(ks)
            k_bar = [*k_bar[:-1], k_bar[-1] + every[:, n:]]
        result = method.adjoint_step(lin, times, h, y, every[:, :n], k_bar, self.linearize.time)
        lin.finish()
        zero = torch.zeros_like(self.t[rows, 0])
        t_bar, h_bar = zero if result.t is None else result.t, zero if result.h is None else result.h
        return bar[:n], bar[n:] if chained else None, t_bar, h_bar

    def _stage_bars(self, part: range, y: Tensor, count: int) -> list[Tensor]:
        found = [self.stage_bar(k) for k in part]
        if all(x is None for x in found):
            return []
        none = y.new_zeros(count, y.shape[-1])
        return list(torch.stack([none if x is None else x.squeeze(1) for x in found], 1).unbind())
