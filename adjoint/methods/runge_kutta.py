"""Explicit Runge-Kutta methods: one step, its error, its dense output and its adjoint, as functions of flat tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .family import Flat, Linearize, StepCotangents, TableauMethod, TakenStep, added, combine, row_dot, update, weighted_sum
from .tableau import Tableau

__all__ = ["ExplicitRungeKutta", "stability_interval"]


def stability_interval(rows: Sequence[Sequence[float]], b: Sequence[float]) -> float:
    """Length of the interval of stability on the negative axis of the explicit method ``a, b``; the rows of ``a`` may be short."""
    s = len(b)
    a = np.zeros((s, s))
    for i, row in enumerate(rows):
        a[i, : len(row)] = row
    moments, vector = [1.0], np.ones(s)
    for _ in range(s):
        moments.append(float(np.dot(b, vector)))
        vector = a @ vector
    z = np.linspace(0.0, 20.0, 20_001)
    size = np.abs(np.polynomial.polynomial.polyval(-z, moments))
    return float(z[int(np.argmax(size > 1 + 1e-9))])


@dataclass(frozen=True, eq=False)
class ExplicitRungeKutta(TableauMethod):
    """An explicit Runge-Kutta method, defined by its tableau.

    Every function takes the stage times as a sequence ``times`` (one tensor a stage, ``()`` or ``(B,)``) and the step ``h`` as a
    Python float or a tensor that broadcasts against the ``(B, n)`` state, so that eager, vmapped and differentiated
    code share one formula. Nothing here waits for the device.
    """

    tableau: Tableau

    @cached_property
    def nodes(self) -> tuple[float, ...]:
        """Of all stages, extra ones included."""
        return (*self.tableau.c, *self.tableau.extra_c)

    @property
    def end_index(self) -> int | None:
        """Which of the stages (extra ones included) is ``f(t + h, y1)``, the first stage of the next step; None if no one is."""
        tab = self.tableau
        return tab.n_stages - 1 if tab.fsal else tab.n_stages if tab.extra_is_next_first else None

    @property
    def error_uses_end(self) -> bool:
        """Whether the error estimate weighs ``f(t + h, y1)`` though the step itself does not compute it."""
        error = self.tableau.error
        return error is not None and len(error) > self.tableau.n_stages

    @property
    def evaluations(self) -> int:
        """Evaluations of ``fun`` in an attempted step whose first stage is known."""
        return self.tableau.n_stages - 1 + self.error_uses_end

    @property
    def extra_evaluations(self) -> int:
        """Further evaluations for the dense output, when ``f(t + h, y1)`` is known."""
        return len(self.tableau.extra_c) - self.tableau.extra_is_next_first

    @cached_property
    def interval(self) -> float:
        """Length of the interval of stability on the negative axis."""
        return stability_interval(self.tableau.a, self.tableau.b)

    def step(self, f: Flat, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``, whose first stage is ``k1``: the new state and all ``s`` stages."""
        tab = self.tableau
        ks, stage = [k1], y
        for i in range(1, tab.n_stages):
            stage = (update if tab.fsal and i == tab.n_stages - 1 else combine)(y, h, tab.a[i], ks)
            ks.append(f(times[i], stage))
        return (stage if tab.fsal else update(y, h, tab.b, ks)), ks

    def dense_stages(
        self, f: Flat, times: Sequence[Tensor], h: float | Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor | None = None
    ) -> list[Tensor]:
        """All stages that the dense output weighs; ``end`` is ``f(t + h, y1)`` where it is known already."""
        if len(ks) == len(self.nodes):
            return list(ks)
        tab, ks = self.tableau, list(ks)
        for j, row in enumerate(tab.extra_a):
            if j == 0 and end is not None and tab.extra_is_next_first:
                ks.append(end)
            else:
                ks.append(f(times[tab.n_stages + j], combine(y, h, row, ks)))
        return ks

    def dense_numbers(self, theta: float) -> list[float]:
        """``b_i(theta)`` of every stage, for one theta, by Horner's rule."""
        out = []
        for row in self.tableau.dense:
            total = 0.0
            for coefficient in reversed(row):
                total = (total + coefficient) * theta
            out.append(total)
        return out

    def adjoint_step(self, linearize: Linearize, step: TakenStep) -> StepCotangents:
        """The discrete adjoint of a step (Hager 2000; Sandu 2006; docs/theory.md, section 1).

        With ``v_i = h (b_i l1 + sum_j a_ji u_j)`` and ``u_i = f_y(Y_i)* v_i`` it is ``l0 = l1 + sum_i u_i``.

        ``linearize``: ``f`` at a point with its pullback, which also adds ``f_p* v`` to the caller's parameter cotangents.
        """
        times, h, y, end_bar, k_bar, timed = step
        tab = self.tableau
        used = max([tab.n_stages - tab.fsal, *(i + 1 for i, bar in enumerate(k_bar) if bar is not None)])
        rows = (*tab.a, *tab.extra_a)[:used]
        weights = (*tab.b, *([0.0] * len(tab.extra_a)))
        ks: list[Tensor] = []
        pullbacks = []
        for i, row in enumerate(rows):
            k, pullback = linearize(times[i], combine(y, h, row, ks))
            ks.append(k)
            pullbacks.append(pullback)

        # us[j] is u_{used - 1 - j}: the sums run over the stages already done
        us: list[Tensor] = []
        y_bar, t_bar, h_bar = end_bar, None, None
        for i in reversed(range(used)):
            w = weighted_sum([weights[i], *(rows[j][i] for j in range(used - 1, i, -1))], [end_bar, *us])
            bar = k_bar[i] if i < len(k_bar) else None
            v = bar if w is None else w * h if bar is None else bar + w * h
            if v is None:
                us.append(torch.zeros_like(y))
                continue
            u, time_bar = pullbacks[i](v)
            us.append(u)
            y_bar = y_bar + u
            if timed:
                if w is not None:
                    # a float h belongs to one trajectory, whatever its shape
                    one = (1, -1) if isinstance(h, float) else ks[i].shape
                    h_bar = added(h_bar, row_dot(ks[i].reshape(one), w.reshape(one)))
                if time_bar is not None:
                    t_bar = added(t_bar, time_bar)
                    h_bar = added(h_bar, time_bar * self.nodes[i])
        return StepCotangents(y_bar, t_bar, h_bar, ks)
