"""Fully implicit Runge-Kutta methods: tableaux, one step, its error and its dense output, as functions of a solver of coupled stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

import numpy as np
from torch import Tensor

from .family import StepCotangents, TableauMethod, TakenStep, added, combine, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize

__all__ = [
    "GL4",
    "GL6",
    "IMPLICIT_MIDPOINT",
    "IMPLICIT_TABLEAUX",
    "RADAU5",
    "RADAU_IIA3",
    "CollocationTableau",
    "FullyImplicitRungeKutta",
    "Mode",
]

_TOLERANCE = 1e-13


@dataclass(frozen=True)
class Mode:
    """An eigenvalue of ``A`` with its right eigenvector ``into`` and left eigenvector ``out_of``: a column of ``T`` and a row of its
    inverse, where ``A = T diag(values) T^-1``."""

    value: complex
    into: tuple[complex, ...]
    out_of: tuple[complex, ...]


@dataclass(frozen=True, eq=False)
class CollocationTableau:
    """The collocation method on given nodes: ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)``, ``y1 = y + h sum_i b_i k_i``.

    The polynomial through ``y`` with slopes ``k_i`` at the nodes is its dense output, of the order of the number of stages (Hairer,
    Norsett & Wanner, Solving ordinary differential equations I, section II.7).

    Parameters
    ----------
    name : str
        The name by which users choose the method.
    order : int
        Order of ``y1``: that of the quadrature formula on the nodes. ValueError if the nodes do not have it.
    c : tuple of floats
        Distinct nodes in (0, 1].
    stability : str
    source : str
    gamma : float or None
        Weight of ``f(t, y)`` in the embedded formula and coefficient of the filter of the error estimate (Hairer & Wanner, Solving ordinary
        differential equations II, equations IV.8.17 to IV.8.20). None: no estimate, so constant steps.
    a, b, dense, error, modes, stiffly_accurate
        Derived. ``dense[i][m]``: ``b_i(theta) = sum_m dense_im theta^(m+1)``. ``error``: the raw estimate is
        ``h (gamma f(t, y) + sum_i error_i k_i)``. ``modes``: the eigenvalues of ``a``, those of conjugate pairs side by side.
    """

    name: str
    order: int
    c: tuple[float, ...]
    stability: str
    source: str
    gamma: float | None = None
    a: tuple[tuple[float, ...], ...] = field(init=False)
    b: tuple[float, ...] = field(init=False)
    dense: tuple[tuple[float, ...], ...] = field(init=False)
    error: tuple[float, ...] | None = field(init=False)
    modes: tuple[Mode, ...] = field(init=False)
    stiffly_accurate: bool = field(init=False)

    def __post_init__(self) -> None:
        c = np.array(self.c)
        s = len(c)
        if s == 0 or len(set(self.c)) != s or c.min() <= 0 or c.max() > 1:
            raise ValueError(f"{self.name}: nodes must be distinct and in (0, 1], got {self.c}")
        powers = np.arange(1, s + 1)
        # the slope of the collocation polynomial is that through the k_i: its monomials from the inverse of the Vandermonde matrix
        dense = np.linalg.inv(c[:, None] ** (powers - 1)).T / powers
        a = (c[:, None] ** powers) @ dense.T
        b = dense.sum(1)
        for k in range(1, self.order + 1):
            if abs(b @ c ** (k - 1) - 1 / k) > _TOLERANCE:
                raise ValueError(f"{self.name}: the nodes {self.c} do not integrate t^{k - 1}, so the order is not {self.order}")
        error = None
        if self.gamma is not None:
            # b_hat integrates with gamma f(t, y) what the stages alone can: all of degree below s
            rest = np.linalg.solve((c[:, None] ** (powers - 1)).T, 1 / powers - self.gamma * (powers == 1))
            error = tuple(map(float, rest - b))
        values, vectors = np.linalg.eig(a)
        inverse = np.linalg.inv(vectors)
        found = [Mode(complex(values[i]), tuple(map(complex, vectors[:, i])), tuple(map(complex, inverse[i]))) for i in range(s)]
        _set(self, "a", tuple(tuple(map(float, row)) for row in a))
        # the last row of a and b are the same numbers where the last node is one
        _set(self, "b", self.a[-1] if self.c[-1] == 1.0 else tuple(map(float, b)))
        _set(self, "dense", tuple(tuple(map(float, row)) for row in dense))
        _set(self, "error", error)
        _set(self, "modes", tuple(found))
        _set(self, "stiffly_accurate", self.c[-1] == 1.0)

    def distinct(self, is_complex: bool) -> tuple[Mode, ...]:
        """The modes that need a linear system each: for real states one of every conjugate pair does."""
        return self.modes if is_complex else tuple(m for m in self.modes if m.value.imag >= 0)

    @property
    def error_order(self) -> int:
        """Order of the embedded formula."""
        return len(self.c)

    @property
    def dense_order(self) -> int:
        """Order of the dense output."""
        return len(self.c)


def _set(tableau: CollocationTableau, name: str, value: object) -> None:
    object.__setattr__(tableau, name, value)


def _real_eigenvalue(c: Sequence[float]) -> float:
    """That of ``A`` for an odd number of nodes: with it the filter of the error needs no matrix of its own."""
    plain = CollocationTableau("", 1, tuple(c), "", "")
    return next(m.value.real for m in plain.modes if m.value.imag == 0)


RADAU5_NODES = ((4 - sqrt(6)) / 10, (4 + sqrt(6)) / 10, 1.0)

RADAU5 = CollocationTableau(
    name="radau5",
    order=5,
    c=RADAU5_NODES,
    gamma=_real_eigenvalue(RADAU5_NODES),
    stability="L-stable, B-stable",
    source="Radau IIA with three stages: Hairer & Wanner, Solving ordinary differential equations II, sections IV.5 and IV.8",
)

RADAU_IIA3 = CollocationTableau(
    name="radauIIA3",
    order=3,
    c=(1 / 3, 1.0),
    # both eigenvalues of A are complex, of this size
    gamma=1 / sqrt(6),
    stability="L-stable, B-stable",
    source="Radau IIA with two stages: Hairer & Wanner II, section IV.5; error estimate on the lines of their section IV.8",
)

IMPLICIT_MIDPOINT = CollocationTableau(
    name="implicit_midpoint",
    order=2,
    c=(0.5,),
    stability="A-stable, B-stable, symmetric, symplectic",
    source="Gauss-Legendre with one stage: Hairer & Wanner II, section IV.5",
)

GL4 = CollocationTableau(
    name="gl4",
    order=4,
    c=(0.5 - sqrt(3) / 6, 0.5 + sqrt(3) / 6),
    stability="A-stable, B-stable, symmetric, symplectic",
    source="Gauss-Legendre with two stages (Hammer & Hollingsworth 1955): Hairer & Wanner II, section IV.5",
)

GL6 = CollocationTableau(
    name="gl6",
    order=6,
    c=(0.5 - sqrt(15) / 10, 0.5, 0.5 + sqrt(15) / 10),
    stability="A-stable, B-stable, symmetric, symplectic",
    source="Gauss-Legendre with three stages (Kuntzmann 1961, Butcher 1964): Hairer & Wanner II, section IV.5",
)

IMPLICIT_TABLEAUX: dict[str, CollocationTableau] = {tab.name: tab for tab in (RADAU5, RADAU_IIA3, IMPLICIT_MIDPOINT, GL4, GL6)}


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

    def adjoint_step(self, linearize: StageLinearize, step: TakenStep) -> StepCotangents:
        """The discrete adjoint of a step (docs/theory.md, section 1): with ``E_i = F_y'`` and ``G_i = F_y`` at stage ``i``,

            ``E_i* v_i + h sum_j a_ji G_j* v_j = k_bar_i + h b_i l1``,  ``l0 = l1 - sum_i G_i* v_i``.

        For an ODE ``E = I`` and ``G = -f_y``. Stage slopes are the recorded ones: Newton's iteration is neither run again nor
        differentiated.
        """
        times, h, y, end_bar, k_bar, timed = step
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
            if timed:
                h_bar = added(h_bar, tab.b[i] * row_dot(ks[i], end_bar))
                slope = weighted_sum(tab.a[i], ks)
                assert slope is not None
                h_bar = added(h_bar, row_dot(slope, u))
                if time_bar is not None:
                    t_bar = added(t_bar, time_bar)
                    h_bar = added(h_bar, time_bar * tab.c[i])
        return StepCotangents(y_bar, t_bar, h_bar, ks)
