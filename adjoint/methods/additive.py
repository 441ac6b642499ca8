"""Additive (implicit-explicit) Runge-Kutta methods: their tableaux, one step, its error, its dense output and its adjoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .family import StepCotangents, TableauMethod, TakenStep, added, combine, over, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize
from .runge_kutta import stability_interval

__all__ = ["AdditiveRungeKutta", "AdditiveTableau", "continuous_weights", "stage_vectors"]

_TOLERANCE = 1e-12
Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class AdditiveTableau:
    """An explicit and a diagonally implicit Runge-Kutta method with the same nodes, for ``y' = f(t, y) + g(t, y)``.

    With ``Y_i = y + h sum_{j < i} a_ij f(Y_j) + h sum_{j <= i} d_ij g(Y_j)`` it is ``y1 = y + h sum_i b_i f(Y_i) + h sum_i w_i g(Y_i)``,
    where ``a, b`` are ``explicit_a, explicit_b`` and ``d, w`` are ``implicit_a, implicit_b``.

    Parameters
    ----------
    name : str
    order : int
    explicit_a : tuple of tuples
        Row ``i`` has ``i`` entries.
    implicit_a : tuple of tuples
        Row ``i`` has ``i + 1`` entries, the last on the diagonal.
    explicit_b, implicit_b, c : tuples of ``s`` floats
    error : tuple of floats or None
        Differences of the weights to those of the embedded solution: those of ``f``, then those of ``g``, ``2 s`` in all.
    error_order : int or None
        Order of the embedded solution.
    dense : tuple of tuples
        As in `DirkTableau`, for the ``s`` slopes of ``f`` and then those of ``g``.
    dense_order : int
    stability : str
        Of the implicit method.
    source : str
    """

    name: str
    order: int
    explicit_a: Rows
    implicit_a: Rows
    explicit_b: tuple[float, ...]
    implicit_b: tuple[float, ...]
    c: tuple[float, ...]
    dense: Rows
    dense_order: int
    stability: str
    source: str
    error: tuple[float, ...] | None = None
    error_order: int | None = None

    def __post_init__(self) -> None:
        s = len(self.c)
        if not len(self.explicit_a) == len(self.implicit_a) == len(self.explicit_b) == len(self.implicit_b) == s:
            raise ValueError(f"{self.name}: all parts of the tableau must have one entry a stage")
        if self.implicit_a[0] != (0.0,):
            raise ValueError(f"{self.name}: the first stage must be explicit")
        for i, (row, other, node) in enumerate(zip(self.explicit_a, self.implicit_a, self.c, strict=True)):
            if len(row) != i or len(other) != i + 1:
                raise ValueError(f"{self.name}: row {i} must have {i} explicit and {i + 1} implicit entries, got {len(row)}, {len(other)}")
            for part in (row, other):
                if abs(sum(part) - node) > _TOLERANCE * max(1.0, sum(map(abs, part))):
                    raise ValueError(f"{self.name}: row {i} sums to {sum(part)!r}, its node is {node!r}")
        weights = (*self.explicit_b, *self.implicit_b)
        for part in (self.explicit_b, self.implicit_b):
            if abs(sum(part) - 1) > _TOLERANCE * sum(map(abs, part)):
                raise ValueError(f"{self.name}: weights sum to {sum(part)!r}, not to 1")
        if (self.error is None) != (self.error_order is None) or (self.error is not None and len(self.error) != 2 * s):
            raise ValueError(f"{self.name}: error has two entries a stage and comes with error_order")
        if len(self.dense) != 2 * s or max(abs(sum(row) - w) for row, w in zip(self.dense, weights, strict=True)) > 1e-10:
            raise ValueError(f"{self.name}: the dense output does not end at y1")


def _matrix(rows: Rows) -> NDArray[np.float64]:
    out = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def stage_vectors(matrices: tuple[NDArray[np.float64], ...], order: int) -> list[tuple[int, NDArray[np.float64], float]]:
    """For every rooted tree of at most ``order`` vertices, whose vertices below the root each belong to one of the matrices: its order,
    its stage vector and the inverse of its density (Kennedy & Carpenter 2003, section 2.1)."""
    one = np.ones(matrices[0].shape[0])
    # of each size: what a subtree of any colour puts into its parent's product, and its density
    below: list[list[tuple[int, NDArray[np.float64], int]]] = [[]]
    out: list[tuple[int, NDArray[np.float64], float]] = []
    for size in range(1, order + 1):
        level = []
        for parts in _partitions(size - 1, size - 1):
            for children in _choices(parts, below):
                phi, density = one, size
                for _, vector, inner in children:
                    phi, density = phi * vector, density * inner
                level.append((phi, density))
        out += [(size, phi, 1 / density) for phi, density in level]
        below.append([(size, m @ phi, density) for phi, density in level for m in matrices])
    return out


def _partitions(n: int, largest: int) -> list[tuple[int, ...]]:
    if n == 0:
        return [()]
    return [(k, *rest) for k in range(min(n, largest), 0, -1) for rest in _partitions(n - k, k)]


def _choices(parts: tuple[int, ...], below: list[list[tuple[int, NDArray[np.float64], int]]]) -> list[tuple]:
    """All multisets of subtrees with these sizes."""
    out: list[tuple] = [()]
    for size in sorted(set(parts)):
        out = [(*some, *more) for some in out for more in combinations_with_replacement(below[size], parts.count(size))]
    return out


def continuous_weights(explicit_a: Rows, implicit_a: Rows, b: tuple[float, ...], order: int, degree: int) -> Rows:
    """Weights ``b_i(theta)``, the same for both parts, of a dense output of the given order: the solution of least norm of its
    conditions ``sum_i b_i(theta) Phi_i = theta^q / density`` for all coloured trees, with ``b_i(1) = b_i``.

    Raises ValueError where there is no such extension.
    """
    s = len(b)
    rows, values = [], []
    for size, phi, weight in stage_vectors((_matrix(explicit_a), _matrix(implicit_a)), order):
        for power in range(1, degree + 1):
            row = np.zeros((s, degree))
            row[:, power - 1] = phi
            rows.append(row.ravel())
            values.append(weight if power == size else 0.0)
    for i in range(s):
        row = np.zeros((s, degree))
        row[i] = 1.0
        rows.append(row.ravel())
        values.append(b[i])
    system, right = np.array(rows), np.array(values)
    solution = np.linalg.lstsq(system, right, rcond=1e-11)[0]
    if np.abs(system @ solution - right).max() > 1e-10:
        raise ValueError(f"there is no dense output of order {order} and degree {degree} on these stages")
    return tuple(tuple(map(float, row)) for row in solution.reshape(s, degree))


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

    def adjoint_step(self, linearize: StageLinearize, step: TakenStep) -> StepCotangents:
        """The discrete adjoint of a step.

        With ``u_j`` the cotangent of the explicitly known part of ``Y_j``, from the last stage to the first:
        ``p_i = f_y(Y_i)* h (b_i l1 + sum_{j > i} a_ji u_j)``, then one solve with the adjoint of the stage's own matrix,
        ``(I - h d_ii g_y(Y_i))* v_i = h (w_i l1 + sum_{j > i} d_ji u_j + d_ii p_i)``, then ``u_i = p_i + g_y(Y_i)* v_i``; at the end
        ``l0 = l1 + sum_i u_i``. The explicit part is never asked for more than products.
        """
        times, h, y, end_bar, k_bar, timed = step
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
                    product, time_bar = pullback(v)
                    q = over(v - arrived, h * diagonal, product)
                else:
                    q, time_bar = pullback(v)
                parts.append(q)
                time_sums.append(time_bar)
            u = sum(parts[1:], parts[0])
            us.append(u)
            y_bar = y_bar + u
            if timed:
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
