"""Tableaux of diagonally implicit Runge-Kutta methods, and the derivation of their dense output."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["DirkTableau", "continuous_extension"]

_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class DirkTableau:
    """A diagonally implicit Runge-Kutta method: ``k_i = f(t + c_i h, y + h sum_{j <= i} a_ij k_j)``.

    Parameters
    ----------
    name : str
        The name by which users choose the method.
    order : int
        Order of ``y1 = y + h sum_i b_i k_i``.
    a : tuple of tuples
        Row ``i`` has ``i + 1`` entries, the last on the diagonal. A zero there makes the stage explicit.
    b, c : tuples of ``s`` floats
    error : tuple of floats or None
        ``b - b_hat``.
    error_order : int or None
        Order of the embedded solution.
    dense : tuple of tuples
        ``dense[i][m]``: the dense output is ``y + h sum_i b_i(theta) k_i`` with ``b_i(theta) = sum_m dense_im theta^(m+1)``.
    dense_order : int
    stability : str
        What is known of it: "A-stable", "L-stable", ...
    source : str
    stiffly_accurate, explicit_first
        Derived: whether the last stage is ``y1``, whether the first is ``f(t, y)``.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    stability: str
    source: str
    error: tuple[float, ...] | None = None
    error_order: int | None = None
    stiffly_accurate: bool = field(init=False)
    explicit_first: bool = field(init=False)

    def __post_init__(self) -> None:
        s = len(self.b)
        object.__setattr__(self, "stiffly_accurate", self.c[-1] == 1.0 and self.a[-1] == self.b)
        object.__setattr__(self, "explicit_first", self.a[0] == (0.0,))
        if len(self.a) != s or len(self.c) != s or len(self.dense) != s:
            raise ValueError(f"{self.name}: a, b, c and dense must have one entry a stage")
        for i, (row, node) in enumerate(zip(self.a, self.c, strict=True)):
            if len(row) != i + 1:
                raise ValueError(f"{self.name}: row {i} of a has {len(row)} entries, a diagonally implicit method has {i + 1}")
            if abs(sum(row) - node) > _TOLERANCE * max(1.0, sum(map(abs, row))):
                raise ValueError(f"{self.name}: row {i} of a sums to {sum(row)!r}, its node is {node!r}")
        if abs(sum(self.b) - 1) > _TOLERANCE * sum(map(abs, self.b)):
            raise ValueError(f"{self.name}: the weights sum to {sum(self.b)!r}, not to 1")
        if (self.error is None) != (self.error_order is None) or (self.error is not None and len(self.error) != s):
            raise ValueError(f"{self.name}: error has one entry a stage and comes with error_order")
        if max(abs(sum(row) - w) for row, w in zip(self.dense, self.b, strict=True)) > 1e-10:
            raise ValueError(f"{self.name}: the dense output does not end at y1")


def square(a: tuple[tuple[float, ...], ...]) -> NDArray[np.float64]:
    """The matrix of the stages."""
    matrix = np.zeros((len(a), len(a)))
    for i, row in enumerate(a):
        matrix[i, : len(row)] = row
    return matrix


def _elementary_weights(a: NDArray[np.float64], order: int) -> list[tuple[int, NDArray[np.float64], float]]:
    """For every rooted tree of at most ``order`` (<= 5) vertices: its order, its stage vector and the inverse of its density.

    ``Phi`` of a tree is the product over its subtrees of ``A Phi(subtree)``, its density the order times those of the subtrees
    (Hairer, Norsett & Wanner, Solving ordinary differential equations I, section II.2).
    """
    one = np.ones(a.shape[0])
    found: dict[int, list[tuple[NDArray[np.float64], float]]] = {1: [(one, 1.0)]}

    def products(size: int, largest: int, first: int) -> list[tuple[NDArray[np.float64], float]]:
        """Products of subtrees with ``size`` vertices in all, in a fixed order so that each multiset comes once."""
        if size == 0:
            return [(one, 1.0)]
        out = []
        for part in range(min(size, largest), 0, -1):
            begin = first if part == largest else 0
            for index in range(begin, len(found[part])):
                phi, density = found[part][index]
                out += [(a @ phi * rest, density * d) for rest, d in products(size - part, part, index)]
        return out

    for size in range(2, order + 1):
        found[size] = [(phi, size * density) for phi, density in products(size - 1, size - 1, 0)]
    return [(size, phi, 1 / density) for size, each in found.items() for phi, density in each]


def continuous_extension(
    a: tuple[tuple[float, ...], ...], b: tuple[float, ...], order: int, degree: int, smooth: bool
) -> tuple[tuple[float, ...], ...]:
    """Weights ``b_i(theta)`` of a dense output of the given order: the solution of least norm of its order conditions.

    Of every tree of order ``q`` with stage vector ``Phi`` and density ``g``, ``sum_i b_i(theta) Phi_i = theta^q / g`` for all theta; at one
    the weights are ``b``. ``smooth``: the derivative is ``k_1`` at the start and the last stage at the end, so that steps join smoothly
    (for methods whose first and last stages are slopes there). Raises ValueError where there is no such extension.
    """
    matrix = square(a)
    s = len(b)
    rows: list[NDArray[np.float64]] = []
    values: list[float] = []
    for size, phi, weight in _elementary_weights(matrix, order):
        for power in range(1, degree + 1):
            row = np.zeros((s, degree))
            row[:, power - 1] = phi
            rows.append(row.ravel())
            values.append(weight if power == size else 0.0)
    powers = np.arange(1, degree + 1)
    for i in range(s):
        row = np.zeros((s, degree))
        row[i] = 1.0
        rows.append(row.ravel())
        values.append(b[i])
        if smooth:
            row = np.zeros((s, degree))
            row[i, 0] = 1.0
            rows.append(row.ravel())
            values.append(float(i == 0))
            row = np.zeros((s, degree))
            row[i] = powers
            rows.append(row.ravel())
            values.append(float(i == s - 1))
    system, right = np.array(rows), np.array(values)
    solution = np.linalg.lstsq(system, right, rcond=1e-11)[0]
    if np.abs(system @ solution - right).max() > 1e-10:
        raise ValueError(f"there is no dense output of order {order} and degree {degree} on these stages")
    return tuple(tuple(map(float, row)) for row in solution.reshape(s, degree))
