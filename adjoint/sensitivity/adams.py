"""Steps of Adams-Bashforth-Moulton methods in derivatives: two evaluations each, and linear maps of the table of differences.

The record of a step is its order and where the times of its history lie. Where the prediction was evaluated follows from the last of the
stages, the correction of the slope.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..integrate.adams import corrected, predicted, updated
from ..integrate.plan import Grid
from ..methods.abm import Weights, step_weights, stretching
from ..methods.family import row_dot
from ..system.system import Flat
from .asked import Linearizer
from .multistep_step import Schedule, StepBack, StepBars, StepTime
from .problem import Problem

__all__ = ["AdamsAdjoint", "AdamsReplay"]


def _weights(grid: Grid, k: int, h: Tensor) -> tuple[Tensor, Tensor, Weights]:
    """Order, nodes and weights of step ``k`` if its size is ``h`` (B,): the times before it stay."""
    extra, size = grid.extra[k], grid.h[k]
    order = extra[0].long()
    nodes = extra[1:].t() * torch.where(size == 0, 1.0, size / torch.where(size == 0, 1.0, h)).unsqueeze(-1)
    return order, nodes, step_weights(nodes, order)


def _passed_on(order: Tensor, restart: Tensor, size: int, real: torch.dtype) -> Tensor:
    """The differences (size, B, 1) that steps behind this one can make use of, as numbers: at most one order more."""
    place = torch.arange(size, device=order.device)
    return (place <= torch.where(restart, 0, order).unsqueeze(-1)).to(real).t().unsqueeze(-1)


class AdamsReplay:
    """The steps as differentiable functions of the table."""

    def __init__(self, problem: Problem, grid: Grid, inputs: Sequence[Tensor], schedule: Schedule) -> None:
        self.f, self.grid = problem.system.bind(inputs), grid
        self.size = problem.plan.method.n_stages

    def begin(self, y0: Tensor, time: Tensor) -> Tensor:
        """The table at the start."""
        start = torch.stack([y0, self.f(time, y0)])
        return torch.cat([start, y0.new_zeros(self.size - 2, *y0.shape)])

    def step(self, k: int, D: Tensor, time: StepTime) -> tuple[Tensor, Tensor]:
        """Stages and the table after step ``k``."""
        real = D.dtype.to_real()
        h = time.h.to(real).unsqueeze(-1)
        order, _, weights = _weights(self.grid, k, time.h)
        prediction = predicted(D, h, weights)
        y, stages = corrected(prediction, self.f(time.end, prediction.y) - prediction.slope, h, weights)
        stages = torch.where((h != 0).unsqueeze(0), stages, 0.0)
        kept = _passed_on(order, time.restart, self.size - 1, real)
        return stages, updated(y, self.f(time.after, y), prediction.low, kept)


class AdamsAdjoint:
    """The steps back; see `multistep_adjoint`.

    With ``Phi*_j = beta_j Phi_j``, the step is ``y_p = y + h sum_j g_j Phi*_j``, ``d = f(y_p) - sum_j Phi*_j``, ``y' = y_p + h g_q d``,
    ``Phi'_j = f(y') - sum_{i < j} Phi*_i``: two products with transposed Jacobians, and sums.

    A step that lands on an anchor hands no differences on, and the prediction's polynomial does not know its size ``h``. So with
    ``k = sum_i 1 / (1 - c_i)``, the derivatives by ``h`` are: of ``y_p``, the slope predicted for the end; of ``h g_q``, ``1 - k g_q``; of
    ``d`` (for the same ``f``), minus the derivative of the predicted slope; of a polynomial in ``theta = (t - t_n) / h``, ``theta`` times
    its derivative over ``h``, but for the factor of ``d``, which also falls by ``k / h``.
    """

    def __init__(self, problem: Problem, grid: Grid, inputs: Sequence[Tensor], linearize: Linearizer, f: Flat) -> None:
        self.grid, self.linearize = grid, linearize
        self.size = problem.plan.method.n_stages

    def begin(self, bar: Tensor, y0: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cotangents of the state and the time at the start."""
        _, pull = self.linearize(time, y0)
        by_state, by_time = pull(bar[1])
        return bar[0] + by_state, by_time

    def step(self, k: int, bars: StepBars, time: StepTime) -> StepBack:
        """Cotangents before step ``k`` from those behind it."""
        grid, real = self.grid, bars.table.dtype.to_real()
        h, y = grid.h[k].to(real).unsqueeze(-1), grid.states[k + 1]
        order, nodes, weights = _weights(grid, k, grid.h[k])
        growth, below, at, g = (x.to(real) for x in (weights.growth, weights.below, weights.at, weights.integrals))
        basis = weights.basis.to(bars.table.dtype)
        slopes_bar = bars.table[1:] * _passed_on(order, time.restart, self.size - 1, real)
        y_bar, after_bar = bars.table[0], None
        if bool((slopes_bar != 0).any()):
            by_state, after_bar = self.linearize(time.after, y)[1](slopes_bar.sum(0))
            y_bar = y_bar + by_state
        # Phi*_i is subtracted from all Phi'_j behind it
        star_bar = slopes_bar - slopes_bar.flip(0).cumsum(0).flip(0)
        at_g = h * (g * at).sum(0)
        delta_bar = at_g * y_bar
        if bars.stages is not None:
            mine_bar = torch.einsum("blj,lbn->jbn", basis, bars.stages[:-1])
            star_bar, delta_bar = star_bar + mine_bar, delta_bar + (at * mine_bar).sum(0) + bars.stages[-1]
        delta = grid.stages[k, -1]
        slope, pull = self.linearize(time.end, y - at_g * delta)
        by_state, t_bar = pull(delta_bar)
        p_bar = y_bar + by_state
        size_bar = None
        if t_bar is not None:
            t_bar = t_bar if after_bar is None else t_bar + after_bar
            size_bar = t_bar if after_bar is None else torch.where(time.restart, t_bar, t_bar - after_bar)
            size_bar = size_bar + self._size_bar(k, bars, slope, p_bar, y_bar, delta_bar, nodes, weights)
        star_bar = (star_bar - delta_bar + h * g * p_bar) * below * growth
        return StepBack(torch.cat([p_bar.unsqueeze(0), star_bar]), t_bar, size_bar)

    def _size_bar(
        self, k: int, bars: StepBars, slope: Tensor, p_bar: Tensor, y_bar: Tensor, delta_bar: Tensor, nodes: Tensor, weights: Weights
    ) -> Tensor:
        """The cotangent (B,) of the size of step ``k``, but for what it has by the time of its end."""
        real, h, values = slope.dtype.to_real(), self.grid.h[k], self.grid.stages[k]
        h = torch.where(h == 0, 1.0, h).to(real).unsqueeze(-1)
        delta, values = values[-1], values[:-1]
        k_q = ((1 / (1 - nodes)).t().unsqueeze(-1) * weights.below).sum(0).to(real)
        g_q = (weights.integrals * weights.at).sum(0).to(real)
        stretched = torch.as_tensor(stretching(len(values)), dtype=values.dtype, device=values.device)
        bent = torch.einsum("lm,mbn->lbn", stretched, values)
        # theta d/dtheta of the whole polynomial at the end of the step; all Legendre polynomials are one there
        out = row_dot(slope - delta, p_bar) + row_dot((1 - k_q * g_q) * delta, y_bar) - row_dot((bent.sum(0) - k_q * delta) / h, delta_bar)
        if bars.stages is not None:
            last = torch.einsum("blj,jbi->lbi", weights.basis.to(real), weights.at.to(real))
            change = (bent - last * (k_q * delta)) / h
            out = out + sum(row_dot(x, y) for x, y in zip(change, bars.stages[:-1], strict=True))
        return out.double()
