"""Rosenbrock methods: one step, its error and its dense output, as functions of flat tensors and of a solver of linear systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .family import StepCotangents, TableauMethod, TakenStep, added, combine, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize
from .tableaux_rosenbrock import RosenbrockTableau

__all__ = ["Rosenbrock"]


@dataclass(frozen=True, eq=False)
class Rosenbrock(TableauMethod):
    """A Rosenbrock method, defined by its tableau; see `ExplicitRungeKutta` for the meaning of every function.

    A step takes one Jacobian, one matrix and a fixed number of linear solves: there is no iteration, so nothing that fails to converge
    and no tolerance but that of the step. The Jacobian is part of the formula (with another one the order is lost), and so it is
    differentiated with everything else.

    Of ``M y' = f(t, y)`` with constant ``M``, singular or not, the stages are those of ``(M - h gamma J) K_i = gamma (f(Y_i) + M sum_j
    gamma_ij K_j + h d_i f_t)``: methods of this order for DAEs of index 1 too, whose constraints hold to the tolerance of the step
    (Hairer & Wanner, Solving ordinary differential equations II, section VI.4, for ``M = diag(I, 0)``; Steinebach 2023).
    """

    tableau: RosenbrockTableau
    implicit: ClassVar[bool] = True
    needs_time_slope: ClassVar[bool] = True
    takes_mass: ClassVar[bool] = True

    @property
    def same_as(self) -> tuple[int, ...]:
        """See `Method.same_as`."""
        return self.tableau.same_as

    @property
    def evaluations(self) -> int:
        """Evaluations of ``fun`` in an attempted step whose first one is known; ``f_t`` is a part of the Jacobian."""
        return len(set(self.tableau.same_as)) - 1

    def step(self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``, where ``f(t, y)`` is ``k1``: the new state and all stages, see `RosenbrockTableau`."""
        tab = self.tableau
        start = times[0]
        f.begin(start, y)
        slope = f.time_slope(start, y)
        found = f.linear_stages(tab, times, h, y, k1, slope)
        if found is not None:
            return found
        values: list[Tensor] = []
        ks: list[Tensor] = []
        for i, (row, coupling) in enumerate(zip(tab.a, tab.coupling, strict=True)):
            same = tab.same_as[i]
            if i == 0:
                values.append(k1)
            else:
                values.append(values[same] if same < i else f(times[i], combine(y, h, row, ks)))
            coupled = weighted_sum(coupling, ks)
            side = values[i] if coupled is None else values[i] + f.mass(coupled)
            if tab.d[i]:
                side = side + slope * (h * tab.d[i])
            ks.append(f.solve(start, y, h * tab.gamma, side * tab.gamma))
        return update(y, h, tab.b, ks), ks

    def adjoint_step(self, linearize: StageLinearize, step: TakenStep) -> StepCotangents:
        """The discrete adjoint of a step.

        With ``W = I - h gamma f_y(t, y)`` and ``u_j = f_y(Y_j)* v_j``, the stages take one solve each, from the last to the first:
        ``v_i = gamma W*^-1 (h b_i l1 + sum_{j > i} (gamma_ji v_j + h a_ji u_j))`` is the cotangent of the right-hand side of stage ``i``.
        The Jacobian is an input of the step like any other: ``l0 = l1 + sum_i u_i + d/dy sum_i <v_i, h (f_y K_i + d_i f_t)>``, the last
        term at ``(t, y)``. With a matrix, ``W = M - h gamma f_y``, ``M* v_j`` is in the place of ``v_j`` in the sum over ``gamma_ji``, and
        the cotangent of ``M`` is the gradient of ``sum_i <v_i, M (sum_j gamma_ij K_j - K_i / gamma)>``.
        """
        times, h, y, end_bar, k_bar, timed = step
        tab, ks = self.tableau, linearize.stages()
        s = len(ks)
        start = times[0]
        # for each stage: the cotangent v_i, and that of Y_i for those which evaluate f there
        vs: list[Tensor] = [end_bar] * s
        us: list[Tensor | None] = [None] * s
        y_bar, t_bar, h_bar = end_bar, None, None
        one = (1, -1) if isinstance(h, float) else ks[0].shape
        for i in reversed(range(s)):
            later = [(tab.a[j][i], u) for j in range(i + 1, s) if (u := us[j]) is not None]
            w = weighted_sum([tab.b[i], *(a for a, _ in later)], [end_bar, *(u for _, u in later)])
            coupled = weighted_sum([tab.coupling[j][i] for j in range(i + 1, s)], vs[i + 1 :])
            coupled = None if coupled is None else linearize.mass_adjoint(coupled)
            parts = [x for x in (k_bar[i] if i < len(k_bar) else None, coupled, None if w is None else w * h) if x is not None]
            total = sum(parts[1:], parts[0]) if parts else torch.zeros_like(y)
            vs[i] = linearize.solve_start(start, y, h * tab.gamma, total) * tab.gamma
            if timed and w is not None:
                h_bar = added(h_bar, row_dot(ks[i].reshape(one), w.reshape(one)))
            if tab.same_as[i] < i:
                continue
            # all stages that use this value of f come behind it
            same = [vs[j] for j in range(i, s) if tab.same_as[j] == i]
            v = weighted_sum([1.0] * len(same), same)
            assert v is not None
            _, pullback = linearize(times[i], combine(y, h, tab.a[i], ks))
            u, time_bar = pullback(v)
            us[i] = u
            y_bar = y_bar + u
            if timed and time_bar is not None:
                t_bar = added(t_bar, time_bar)
                h_bar = added(h_bar, time_bar * tab.c[i])
        linearize.bend_mass(lambda: [_moved(tab, i, ks) for i in range(s)], vs)
        bent, time_bar, phi = linearize.bend(start, y, ks, tab.d, vs, h)
        if timed and time_bar is not None and phi is not None:
            t_bar, h_bar = added(t_bar, time_bar), added(h_bar, phi)
        return StepCotangents(y_bar + bent, t_bar, h_bar, ks)


def _moved(tableau: RosenbrockTableau, i: int, ks: Sequence[Tensor]) -> Tensor:
    """``sum_j gamma_ij K_j - K_i / gamma``: what the mass matrix multiplies in stage ``i``."""
    total = weighted_sum([*tableau.coupling[i], -1 / tableau.gamma], ks[: i + 1])
    assert total is not None
    return total
