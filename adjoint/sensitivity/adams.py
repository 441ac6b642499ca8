"""Steps of Adams-Bashforth-Moulton methods in derivatives: two evaluations each, and linear maps of the table of differences.

The record of a step is its order and where the times of its history lie. Where the prediction was evaluated follows from the last of the
stages that is not zero, which is the correction in other units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..integrate.adams import corrected, predicted, updated
from ..methods.abm import Weights, step_weights
from ..system import Flat
from .linearize import Linearizer
from .multistep_step import StepBack, StepBars, StepTime
from .problem import Problem

__all__ = ["AdamsAdjoint", "AdamsReplay"]


def _weights(grid: dict[str, Tensor], k: int) -> tuple[Tensor, Weights]:
    extra = grid["extra"][k]
    order = extra[0].long()
    return order, step_weights(extra[1:].t(), order)


def _passed_on(order: Tensor, restart: Tensor, size: int, real: torch.dtype) -> Tensor:
    """The differences (size, B, 1) that steps behind this one can make use of, as numbers: at most one order more."""
    place = torch.arange(size, device=order.device)
    return (place <= torch.where(restart, 0, order).unsqueeze(-1)).to(real).t().unsqueeze(-1)


class AdamsReplay:
    """The steps as differentiable functions of the table; see `multistep.Replay`."""

    def __init__(self, problem: Problem, grid: dict[str, Tensor], inputs: Sequence[Tensor]) -> None:
        self.f, self.grid = problem.system.bind(inputs), grid
        self.size = problem.plan.method.n_stages + 1

    def begin(self, y0: Tensor, time: Tensor) -> Tensor:
        """The table at the start."""
        start = torch.stack([y0, self.f(time, y0)])
        return torch.cat([start, y0.new_zeros(self.size - 2, *y0.shape)])

    def step(self, k: int, D: Tensor, time: StepTime, beyond: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Stages and the table after step ``k``."""
        real = D.dtype.to_real()
        h = self.grid["h"][k].to(real).unsqueeze(-1)
        order, weights = _weights(self.grid, k)
        prediction = predicted(D, h, weights)
        y, stages = corrected(prediction, self.f(time.end, prediction.y) - prediction.slope, h, weights)
        stages = torch.where((h != 0).unsqueeze(0), stages, 0.0)
        y = y + beyond(stages)
        kept = _passed_on(order, time.restart, self.size - 1, real)
        return stages, updated(y, self.f(time.after, y), prediction.low, kept)


class AdamsAdjoint:
    """The steps back; see `multistep_adjoint`.

    With ``Phi*_j = beta_j Phi_j``, the step is ``y_p = y + h sum_j g_j Phi*_j``, ``d = f(y_p) - sum_j Phi*_j``, ``y' = y_p + h g_q d``,
    ``Phi'_j = f(y') - sum_{i < j} Phi*_i``: two products with transposed Jacobians, and sums.
    """

    def __init__(self, problem: Problem, grid: dict[str, Tensor], inputs: Sequence[Tensor], linearize: Linearizer, f: Flat) -> None:
        self.grid, self.linearize = grid, linearize
        self.size = problem.plan.method.n_stages + 1

    def begin(self, bar: Tensor, y0: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cotangents of the state and the time at the start."""
        _, pull = self.linearize(time, y0)
        by_state, by_time = pull(bar[1])
        return bar[0] + by_state, by_time

    def step(self, k: int, bars: StepBars, time: StepTime) -> StepBack:
        """Cotangents before step ``k`` from those behind it."""
        grid, real = self.grid, bars.table.dtype.to_real()
        h, y = grid["h"][k].to(real).unsqueeze(-1), grid["states"][k + 1]
        order, weights = _weights(grid, k)
        growth, below, at, g = (x.to(real) for x in (weights.growth, weights.below, weights.at, weights.integrals))
        basis = weights.basis.to(bars.table.dtype)
        slopes_bar = bars.table[1:] * _passed_on(order, time.restart, self.size - 1, real)
        y_bar, t_bar = bars.table[0], None
        late = None
        if bars.moving or bool((slopes_bar != 0).any()):
            by_state, by_time = self.linearize(time.after, y)[1](slopes_bar.sum(0))
            y_bar = y_bar + by_state
            t_bar, late = by_time, bars.late(y_bar)
            if late is not None and by_time is not None:
                late = late + torch.where(time.restart, by_time, 0.0)
        # Phi*_i is subtracted from all Phi'_j behind it
        star_bar = slopes_bar - slopes_bar.flip(0).cumsum(0).flip(0)
        mine_bar = None if bars.stages is None else torch.einsum("blj,lbn->jbn", basis, bars.stages)
        at_g = h * (g * at).sum(0)
        delta_bar = at_g * y_bar
        if mine_bar is not None:
            star_bar, delta_bar = star_bar + mine_bar, delta_bar + (at * mine_bar).sum(0)
        highest = (weights.at * torch.diagonal(weights.basis, dim1=1, dim2=2).t().unsqueeze(-1)).sum(0).to(real)
        delta = (at * bars.values).sum(0) / highest
        by_state, by_time = self.linearize(time.end, y - at_g * delta)[1](delta_bar)
        if by_time is not None:
            t_bar = by_time if t_bar is None else t_bar + by_time
        p_bar = y_bar + by_state
        star_bar = (star_bar - delta_bar + h * g * p_bar) * below * growth
        return StepBack(torch.cat([p_bar.unsqueeze(0), star_bar]), t_bar, late)
