"""Additive (implicit-explicit) Runge-Kutta methods: one step, its error, its dense output and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .additive_tableau import AdditiveTableau
from .family import StepCotangents, TableauMethod, added, combine, over, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize
from .runge_kutta import stability_interval

__all__ = ["AdditiveRungeKutta"]


@dataclass(frozen=True, eq=False)
class AdditiveRungeKutta(TableauMethod):
    """An additive Runge-Kutta method, defined by its tableau; see `ExplicitRungeKutta` for the meaning of every function.

    A stage has two slopes: the list of stages holds those of the explicit part, then those of the implicit part, ``2 s`` in all. Slopes
    of implicit stages are those of the stage equations, as in `DiagonallyImplicitRungeKutta`.
    """

    tableau: AdditiveTableau
    implicit: ClassVar[bool] = True
    additive: ClassVar[bool] = True

    @property
    def diagonal(self) -> tuple[float, ...]:
        """Factors of ``h`` in the matrices of the stages."""
        return tuple(row[-1] for row in self.tableau.implicit_a)

    @property
    def nodes(self) -> tuple[float, ...]:
        return (*self.tableau.c, *self.tableau.c)

    @property
    def n_stages(self) -> int:
        return 2 * len(self.tableau.c)

    @property
    def evaluations(self) -> int:
        """Explicit evaluations in an attempted step whose first stage is known; those of the iterations are counted where they are made."""
        return len(self.tableau.c) - 1

    @cached_property
    def interval(self) -> float:
        """Length of the interval of stability on the negative axis of the explicit method."""
        return stability_interval(self.tableau.explicit_a, self.tableau.explicit_b)

    def step(self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``: the new state and all slopes. ``k1``, the sum at the start, is not used: both parts are asked for."""
        tab = self.tableau
        s = len(tab.c)
        f.begin(times[0], y)
        first, slope = f.both(times[0], y)
        explicit, implicit = [first], [slope]
        for i in range(1, s):
            *before, diagonal = tab.implicit_a[i]
            # without a part that cancels: the sums over both parts are made one after the other
            base = combine(combine(y, h, tab.explicit_a[i], explicit), h, before, implicit)
            slope = f.implicit(s + i, times[i], base, h * diagonal, implicit[-1])
            implicit.append(slope)
            explicit.append(f.explicit(times[i], base + slope * (h * diagonal)))
        ks = [*explicit, *implicit]
        return update(y, h, (*tab.explicit_b, *tab.implicit_b), ks), ks

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
        """The discrete adjoint of a step; arguments as for `ExplicitRungeKutta.adjoint_step`.

        With ``u_j`` the cotangent of the explicitly known part of ``Y_j``, from the last stage to the first:
        ``p_i = f_y(Y_i)* h (b_i l1 + sum_{j > i} a_ji u_j)``, then one solve with the adjoint of the stage's own matrix,
        ``(I - h d_ii g_y(Y_i))* v_i = h (w_i l1 + sum_{j > i} d_ji u_j + d_ii p_i)``, then ``u_i = p_i + g_y(Y_i)* v_i``; at the end
        ``l0 = l1 + sum_i u_i``. The explicit part is never asked for more than products.
        """
        tab, ks = self.tableau, linearize.stages()
        s = len(tab.c)
        bars = [*k_bar, *([None] * (2 * s - len(k_bar)))]
        one = (1, -1) if isinstance(h, float) else ks[0].shape
        us: list[Tensor] = []
        y_bar, t_bar, h_bar = end_bar, None, None
        for i in reversed(range(s)):
            diagonal = tab.implicit_a[i][-1]
            later = range(s - 1, i, -1)
            direct = weighted_sum([tab.explicit_b[i], *(tab.explicit_a[j][i] for j in later)], [end_bar, *us])
            w = weighted_sum([tab.implicit_b[i], *(tab.implicit_a[j][i] for j in later)], [end_bar, *us])
            v_explicit, v = _joined(direct, h, bars[i]), _joined(w, h, bars[s + i])
            if v_explicit is None and v is None:
                us.append(torch.zeros_like(y))
                continue
            point = combine(combine(y, h, tab.explicit_a[i], ks[:s]), h, tab.implicit_a[i], ks[s:])
            parts: list[Tensor] = []
            time_sums: list[Tensor | None] = []
            if v_explicit is not None:
                p, time_bar = linearize.explicit(times[i], point)[1](v_explicit)
                parts.append(p)
                time_sums.append(time_bar)
                if diagonal:
                    v = p * (h * diagonal) if v is None else v + p * (h * diagonal)
            if v is not None:
                _, pullback = linearize(times[i], point)
                if diagonal:
                    # not by a product with the Jacobian, which would magnify the rounding of the solve by the stiffness
                    arrived, v = v, linearize.solve_adjoint(i, point, v)
                    _, time_bar = pullback(v)
                    q = over(v - arrived, h * diagonal)
                else:
                    q, time_bar = pullback(v)
                parts.append(q)
                time_sums.append(time_bar)
            u = sum(parts[1:], parts[0])
            us.append(u)
            y_bar = y_bar + u
            if time_bars:
                weighed = [(ks[i], direct), (ks[s + i], w), (ks[s + i], u * diagonal if diagonal else None)]
                for k, cotangent in weighed:
                    if cotangent is not None:
                        h_bar = added(h_bar, row_dot(k.reshape(one), cotangent.reshape(one)))
                for time_bar in time_sums:
                    if time_bar is not None:
                        t_bar = added(t_bar, time_bar)
                        h_bar = added(h_bar, time_bar * tab.c[i])
        return StepCotangents(y_bar, t_bar, h_bar, ks)


def _joined(w: Tensor | None, h: float | Tensor, bar: Tensor | None) -> Tensor | None:
    """The cotangent ``h w + bar`` of a slope; None where there is neither."""
    return bar if w is None else w * h if bar is None else bar + w * h
