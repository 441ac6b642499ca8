"""Diagonally implicit Runge-Kutta methods: one step and its error, as functions of flat tensors and of a solver of stage equations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from .dirk_tableau import DirkTableau
from .family import StepCotangents, TableauMethod, added, combine, over, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize

__all__ = ["DiagonallyImplicitRungeKutta"]


@dataclass(frozen=True, eq=False)
class DiagonallyImplicitRungeKutta(TableauMethod):
    """A diagonally implicit Runge-Kutta method, defined by its tableau; see `ExplicitRungeKutta` for the meaning of every function.

    Stage slopes are those of the stage equations, ``k_i = (Y_i - base_i) / (h a_ii)``: for stiff problems ``f(Y_i)`` would multiply
    the error of the iteration by the stiffness (Hairer & Wanner, Solving ordinary differential equations II, section IV.8). For the same
    reason an explicit first stage is the last one of the step before, where that is the slope at its end (`hands_on`).
    """

    tableau: DirkTableau
    implicit: ClassVar[bool] = True
    #: for every stage, the weights of the slopes before it whose polynomial is the guess of its own
    guesses: tuple[tuple[float, ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "guesses", tuple(_extrapolation(self.tableau.c, i) for i in range(self.n_stages)))

    @property
    def diagonal(self) -> tuple[float, ...]:
        """``a_ii``."""
        return tuple(row[-1] for row in self.tableau.a)

    @property
    def hands_on(self) -> bool:
        """Whether the last stage is the first of the next step: as the slope of its equation, not as ``f`` at its value."""
        return self.tableau.stiffly_accurate and self.tableau.explicit_first

    @property
    def end_index(self) -> int | None:
        """The stage that is handed on."""
        return self.n_stages - 1 if self.hands_on else None

    def step(self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``, where ``f(t, y)`` is ``k1``: the new state and all stages."""
        tab = self.tableau
        f.begin(times[0], y)
        ks: list[Tensor] = []
        base = y
        for i, row in enumerate(tab.a):
            *before, diagonal = row
            base = combine(y, h, before, ks)
            if diagonal:
                guess = weighted_sum(self.guesses[i], ks)
                ks.append(f.implicit(i, times[i], base, h * diagonal, k1 if guess is None else guess))
            else:
                ks.append(k1 if i == 0 else f(times[i], base))
        if tab.stiffly_accurate:
            return base + ks[-1] * (h * tab.a[-1][-1]), ks
        return update(y, h, tab.b, ks), ks

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
        """The discrete adjoint of a step (docs/theory.md, section 1; Sandu 2006).

        With ``w_i = h (b_i l1 + sum_{j > i} a_ji u_j)`` each stage takes one solve with the adjoint of its own matrix,
        ``(I - h a_ii f_y(Y_i))* v_i = w_i``, then ``u_i = f_y(Y_i)* v_i = (v_i - w_i) / (h a_ii)`` and ``l0 = l1 + sum_i u_i``: a product
        with ``f_y*`` would magnify the rounding of ``v_i`` by the stiffness. Stage slopes are the recorded ones: Newton's iteration is
        neither run again nor differentiated. The cotangent of a first stage that was handed on goes to the step before. Arguments as for
        `ExplicitRungeKutta.adjoint_step`.
        """
        tab, ks = self.tableau, linearize.stages()
        s = len(ks)
        one = (1, -1) if isinstance(h, float) else ks[0].shape
        # us[j] is u_{s - 1 - j}: the sums run over the stages already done
        us: list[Tensor] = []
        y_bar, t_bar, h_bar = end_bar, None, None
        first = torch.zeros_like(end_bar) if self.hands_on else None
        for i in reversed(range(s)):
            # the cotangent of k_i by way of the new state and of later stages, over h
            w = weighted_sum([tab.b[i], *(tab.a[j][i] for j in range(s - 1, i, -1))], [end_bar, *us])
            bar = k_bar[i] if i < len(k_bar) else None
            v = bar if w is None else w * h if bar is None else bar + w * h
            if v is None:
                us.append(torch.zeros_like(y))
                continue
            if i == 0 and self.hands_on:
                first = v
                if time_bars and w is not None:
                    h_bar = added(h_bar, row_dot(ks[0].reshape(one), w.reshape(one)))
                break
            diagonal = tab.a[i][i]
            point = combine(y, h, tab.a[i], ks)
            _, pullback = linearize(times[i], point)
            if diagonal:
                arrived, v = v, linearize.solve_adjoint(i, point, v)
                _, time_bar = pullback(v)
                u = over(v - arrived, h * diagonal)
            else:
                u, time_bar = pullback(v)
            us.append(u)
            y_bar = y_bar + u
            if time_bars:
                if w is not None:
                    h_bar = added(h_bar, row_dot(ks[i].reshape(one), w.reshape(one)))
                if diagonal:
                    h_bar = added(h_bar, diagonal * row_dot(ks[i].reshape(one), u.reshape(one)))
                if time_bar is not None:
                    t_bar = added(t_bar, time_bar)
                    h_bar = added(h_bar, time_bar * tab.c[i])
        return StepCotangents(y_bar, t_bar, h_bar, ks, first)


def _extrapolation(c: Sequence[float], i: int) -> tuple[float, ...]:
    """Of the polynomial through the slopes at the latest three distinct nodes before stage ``i``."""
    chosen: list[int] = []
    for j in reversed(range(i)):
        if all(abs(c[j] - c[m]) > 1e-3 for m in chosen):
            chosen.append(j)
    chosen = chosen[:3]
    weights = [0.0] * i
    for j in chosen:
        weights[j] = prod((c[i] - c[m]) / (c[j] - c[m]) for m in chosen if m != j)
    return tuple(weights)
