"""Diagonally implicit Runge-Kutta methods: tableaux, one step and its error, as functions of flat tensors and a solver of stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .family import StepCotangents, TableauMethod, TakenStep, added, combine, over, row_dot, update, weighted_sum
from .protocol import StageEquations, StageLinearize

__all__ = ["DiagonallyImplicitRungeKutta", "DirkTableau", "continuous_extension"]

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

    def adjoint_step(self, linearize: StageLinearize, step: TakenStep) -> StepCotangents:
        """The discrete adjoint of a step (docs/theory.md, section 1; Sandu 2006).

        With ``w_i = h (b_i l1 + sum_{j > i} a_ji u_j)`` each stage takes one solve with the adjoint of its own matrix,
        ``(I - h a_ii f_y(Y_i))* v_i = w_i``, then ``u_i = f_y(Y_i)* v_i = (v_i - w_i) / (h a_ii)`` and ``l0 = l1 + sum_i u_i``: a product
        with ``f_y*`` would magnify the rounding of ``v_i`` by the stiffness, and is taken of steps of no length alone. Stage slopes are the
        recorded ones: Newton's iteration is neither run again nor differentiated. The cotangent of a first stage that was handed on goes to
        the step before.
        """
        times, h, y, end_bar, k_bar, timed = step
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
                if timed and w is not None:
                    h_bar = added(h_bar, row_dot(ks[0].reshape(one), w.reshape(one)))
                break
            diagonal = tab.a[i][i]
            point = combine(y, h, tab.a[i], ks)
            _, pullback = linearize(times[i], point)
            if diagonal:
                arrived, v = v, linearize.solve_adjoint(i, point, v)
                product, time_bar = pullback(v)
                u = over(v - arrived, h * diagonal, product)
            else:
                u, time_bar = pullback(v)
            us.append(u)
            y_bar = y_bar + u
            if timed:
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
