"""Fully implicit Runge-Kutta methods of collocation type: everything follows from their nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt

import numpy as np

__all__ = ["GL4", "GL6", "IMPLICIT_MIDPOINT", "IMPLICIT_TABLEAUX", "RADAU5", "RADAU_IIA3", "CollocationTableau", "Mode"]

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
