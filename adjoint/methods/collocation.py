"""Fully implicit Runge-Kutta methods: one step, its error and its dense output, as functions of a solver of coupled stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .family import StepCotangents, TableauMethod, added, combine, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize
from .tableaux_implicit import CollocationTableau

__all__ = ["FullyImplicitRungeKutta"]


@dataclass(frozen=True, eq=False)
class FullyImplicitRungeKutta(TableauMethod):
    """A fully implicit Runge-Kutta method of collocation type; see `ExplicitRungeKutta` for the meaning of every function.

    `nodes` begins with the start of the step, where the Jacobian of the iteration is taken; behind it come the times of the stages.
    The recorded stages are the slopes of the coupled equations.
    """

    tableau: CollocationTableau
    #: for equations ``F(t, y, y') = 0``: the last slope is the one at the end, which no evaluation would give
    residual: bool = False
    implicit: ClassVar[bool] = True
    collocates: ClassVar[bool] = True

    @property
    def nodes(self) -> tuple[float, ...]:
        return (0.0, *self.tableau.c)

    @property
    def end_index(self) -> int | None:
        """No stage is handed on where the slope at the end can be evaluated: it is known to the tolerance of the iteration only."""
        return self.n_stages - 1 if self.residual else None

    def step(self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``, where ``f(t, y)`` is ``k1``: the new state, and the stages with the error estimate behind them if the
        solver of the equations made one."""
        f.begin(times[0], y)
        ks, estimate = f.coupled(self.tableau, times[1:], h, y, k1)
        return update(y, h, self.tableau.b, ks), ks if estimate is None else [*ks, estimate]

    def error(self, h: float | Tensor, ks: Sequence[Tensor]) -> Tensor:
        """The filtered error estimate (Hairer & Wanner, Solving ordinary differential equations II, equations IV.8.19 and 20)."""
        assert self.adaptive and len(ks) == self.n_stages + 1
        return ks[-1]

    def dense_stages(
        self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor | None = None
    ) -> list[Tensor]:
        """All stages that the dense output weighs: those of the step, without the error estimate."""
        return list(ks[: self.n_stages])

    def adjoint_step(
        self,
        linearize: StageLinearize,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        end_bar: Tensor,
        k_bar: Sequence[Tensor | None],
        time_bars: bool,
    ) -> StepCotangents:
        """The discrete adjoint of a step (docs/theory.md, section 1): with ``E_i = F_y'`` and ``G_i = F_y`` at stage ``i``,

            ``E_i* v_i + h sum_j a_ji G_j* v_j = k_bar_i + h b_i l1``,  ``l0 = l1 - sum_i G_i* v_i``.

        For an ODE ``E = I`` and ``G = -f_y``. Stage slopes are the recorded ones: Newton's iteration is neither run again nor
        differentiated. Arguments as for `ExplicitRungeKutta.adjoint_step`.
        """
        tab, ks = self.tableau, linearize.stages()
        points, w = [], []
        for i, row in enumerate(tab.a):
            points.append(combine(y, h, row, ks))
            own = end_bar * (h * tab.b[i])
            bar = k_bar[i] if i < len(k_bar) else None
            w.append(own if bar is None else own + bar)
        vs, pulls = linearize.coupled_adjoint(tab.a, times[1:], points, w)
        y_bar, t_bar, h_bar = end_bar, None, None
        for i, (v, pull) in enumerate(zip(vs, pulls, strict=True)):
            u, time_bar = pull(v)
            y_bar = y_bar + u
            if time_bars:
                h_bar = added(h_bar, tab.b[i] * row_dot(ks[i], end_bar))
                slope = weighted_sum(tab.a[i], ks)
                assert slope is not None
                h_bar = added(h_bar, row_dot(slope, u))
                if time_bar is not None:
                    t_bar = added(t_bar, time_bar)
                    h_bar = added(h_bar, time_bar * tab.c[i])
        return StepCotangents(y_bar, t_bar, h_bar, ks)
