"""Simplified Newton iterations for the stages of a step: one rule, for one trajectory and for many, whatever the equations are; where those
for coupled stages start, from the slopes of the step before, extrapolated; and their matrices, from Jacobians in any of their forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from ..linalg import LinearOperator, Matrix, SparseMatrix
from ..system.jacobians import JacobianStrategy, must_differentiate, plain_push
from ..system.stage_jacobian import StageJacobian
from .numbers import Decision, Measure, any_of, at_least, at_most, choose, finite, negated

__all__ = ["LoneGuess", "StageGuess", "complex_shifted", "iterate", "jacobian_at", "mass_product", "shifted", "tangent"]

X = TypeVar("X")
D = TypeVar("D")


def iterate(
    x: X,
    change: Callable[[X, Decision], tuple[D, Measure]],
    moved: Callable[[X, D, Decision], X],
    running: Decision,
    bound: float,
    most: int,
    worst: float = 2.0,
    early: bool = False,
) -> tuple[X, Decision, Decision]:
    """Repeat ``x = moved(x, change(x))`` until its error, by the geometric series of its changes, is at most ``bound``.

    Hairer & Wanner, Solving ordinary differential equations II, section IV.8: with the rate ``r`` at which changes become smaller, the
    error after the present one of size ``d`` is ``r / (1 - r) d``; in the first round nothing is known of the rate, and ``d`` counts.
    An iteration fails where a change is not finite or grows by ``worst``, after ``most`` rounds, and if ``early`` as soon as it will not
    be done by then.

    Parameters
    ----------
    change : from ``x`` and who still ``running`` is, the change and its size
    moved : from ``x``, a change and whose, the next ``x``

    Returns
    -------
    The last ``x``, what has failed, and what of that was finite all the way.
    """
    before: Measure = math.nan
    rate: Measure = 1.0
    failed = stalled = torch.zeros_like(running) if isinstance(running, Tensor) else False
    for k in range(most):
        delta, length = change(x, running)
        fine = finite(length)
        bad = negated(fine)
        if k:
            rate = choose(running, length / before, rate)
            bad = bad | (rate >= worst)
            if early:
                bad = bad | _hopeless(rate, length / bound, most - 1 - k)
        bad = running & bad
        failed, stalled = failed | bad, stalled | (bad & fine)
        x = moved(x, delta, running & negated(bad))
        small = (rate / at_least(1 - rate, 1e-3) * length <= bound) & (rate < 1) if k else length <= bound
        running = running & negated(bad) & negated(small) & (length > 0)
        before = length
        if not any_of(running):
            break
    return x, failed | running, stalled | running


def _hopeless(rate: Measure, length: Measure, left: int) -> Decision:
    """Whether the iteration, at this rate, will not be on a bound of one after ``left`` more of its rounds (Hairer & Wanner II, equation
    IV.8.11): a step that may be repeated is then given up at once."""
    # a power of what is larger may be beyond all numbers
    slow = at_most(rate, 1.0)
    return (rate >= 1.0) | (slow ** (left + 1) / at_least(1 - slow, 1e-3) * length > 1.0)


#: a step that is so many times longer than the one before is too far away for its polynomial
_FAR = 8.0


class StageGuess:
    """The polynomial through the slopes of the last accepted step of each trajectory (Hairer & Wanner, Solving ordinary differential
    equations II, section IV.8: starting values)."""

    def __init__(self, nodes: Sequence[float]) -> None:
        self.nodes = nodes
        # coefficients (s, s) of the Lagrange polynomials of the nodes: column j belongs to the slope of stage j
        self.lagrange = np.linalg.inv(np.vander(nodes, increasing=True))
        #: of the last attempt, and of the last one that was accepted: start, size (B, 1) and slopes (s, B, n)
        self._tried: tuple[Tensor, Tensor, Tensor] | None = None
        self._size: Tensor | None = None
        self._slopes: Tensor | None = None

    def __call__(self, step: Tensor, y: Tensor, k1: Tensor) -> list[Tensor]:
        """Slopes of the stages of a step from ``y`` (B, n); ``k1``, the slope there, where nothing is known of the step before."""
        if self._tried is None:
            return [k1] * len(self.nodes)
        start, size, slopes = self._tried
        # an attempt from another state: the last one was accepted
        moved = (start != y).any(-1, keepdim=True)
        if self._size is None or self._slopes is None:
            self._size, self._slopes = torch.where(moved, size, 0.0), slopes
        elif bool(moved.all()):
            self._size, self._slopes = size, slopes
        else:
            self._size, self._slopes = torch.where(moved, size, self._size), torch.where(moved, slopes, self._slopes)
        ratio = step / torch.where(self._size == 0, 1.0, self._size)
        near = (self._size != 0) & (ratio > 0) & (ratio < _FAR)
        real = {"dtype": step.dtype, "device": step.device}
        theta = 1 + ratio * torch.tensor(self.nodes, **real)
        powers = theta.unsqueeze(-1) ** torch.arange(len(self.nodes), **real)
        weights = (powers @ torch.as_tensor(self.lagrange, **real)).to(k1.dtype)
        found = torch.einsum("bij,jbn->ibn", weights, self._slopes)
        fine = near & torch.isfinite(found).all(0).all(-1, keepdim=True)
        return list(torch.where(fine, found, k1).unbind())

    def keep(self, step: Tensor, y: Tensor, slopes: Sequence[Tensor]) -> None:
        """Remember an attempt."""
        self._tried = (y, step, torch.stack(list(slopes)))


class LoneGuess:
    """`StageGuess` for one trajectory, whose sizes of steps are numbers; slopes are (s, n)."""

    def __init__(self, nodes: Sequence[float]) -> None:
        self.nodes = np.array(nodes)
        self.lagrange = np.linalg.inv(np.vander(nodes, increasing=True))
        self._tried: tuple[Tensor, float, Tensor] | None = None
        self._last: tuple[float, Tensor] | None = None

    def __call__(self, h: float, y: Tensor, k1: Tensor) -> Tensor:
        """See `StageGuess`."""
        if self._tried is not None and self._tried[0] is not y:
            # an attempt from another state: the last one was accepted
            self._last = self._tried[1:]
        if self._last is None or not 0 < h / self._last[0] < _FAR:
            return k1.reshape(1, -1).expand(len(self.nodes), -1)
        size, slopes = self._last
        weights = np.vander(1 + h / size * self.nodes, len(self.nodes), increasing=True) @ self.lagrange
        return torch.mm(torch.from_numpy(weights).to(slopes), slopes)

    def keep(self, h: float, y: Tensor, slopes: Tensor) -> None:
        """Remember an attempt."""
        self._tried = (y, h, slopes)


Flat = Callable[[Tensor, Tensor], Tensor]


def shifted(matrix: Matrix, hd: Tensor, mass: Tensor | None = None) -> Matrix:
    """``I - hd J``, or ``M - hd J`` with ``mass`` (1 or B, n, n), for ``hd`` of shape ``(B, 1)``; ``I`` in rows where ``hd`` is zero."""
    if isinstance(matrix, SparseMatrix):
        # the diagonal is made part of the pattern by whoever made the matrix
        on = (matrix.indices[0] == matrix.indices[1]).to(matrix.dtype)
        if mass is not None:
            # as is whatever else is not zero in the mass matrix
            on = torch.where(hd == 0, on, mass[:, matrix.indices[0], matrix.indices[1]])
        return SparseMatrix(matrix.indices, on - hd * matrix.values, matrix.shape)
    if isinstance(matrix, LinearOperator):
        inner, outer = matrix.matvec, matrix.rmatvec
        return LinearOperator(
            matrix.n,
            matrix.rows,
            matrix.dtype,
            matrix.device,
            lambda v: mass_product(mass, v, hd) - hd * inner(v),
            None if outer is None else lambda v: mass_product(None if mass is None else mass.mT, v, hd) - hd * outer(v),
        )
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    if mass is not None:
        eye = torch.where((hd == 0).unsqueeze(-1), eye, mass)
    return eye - hd.unsqueeze(-1) * matrix


def mass_product(mass: Tensor | None, v: Tensor, hd: Tensor | None = None) -> Tensor:
    """``M v`` for ``v`` (..., B, n); ``v`` without a matrix, and in rows where ``hd`` is zero (a singular one would not do there)."""
    if mass is None:
        return v
    product = (mass @ v.unsqueeze(-1)).squeeze(-1)
    return product if hd is None else torch.where(hd == 0, v, product)


def jacobian_at(jacobian: JacobianStrategy, f: Flat, t: Tensor, y: Tensor) -> Matrix:
    """``f_y(t, y)`` by a strategy; one that knows what to do with the time is told it."""
    return jacobian.at(f, t, y) if isinstance(jacobian, StageJacobian) else jacobian(lambda x: f(t, x), y)


def tangent(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of a function of ``(B,)`` times, by two reverse sweeps: forward mode does not nest with a user's dual level.

    Where nobody differentiates it they are those of plain autograd, beside which ``function`` may take derivatives itself.
    """
    if not must_differentiate(None):
        found = plain_push(function, t, torch.ones_like(t).unsqueeze(0))
        if found is not None:
            return found[0]
    out, pull, *_ = torch.func.vjp(function, t)
    _, push, *_ = torch.func.vjp(pull, torch.zeros_like(out))
    return push((torch.ones_like(t),))[0]


def complex_shifted(matrix: Matrix, hd: Tensor) -> Matrix:
    """``I - hd J`` for complex ``hd`` (B, 1)."""
    if not isinstance(matrix, LinearOperator):
        return shifted(matrix, hd)
    product, is_complex = matrix.matvec, matrix.dtype.is_complex

    def matvec(v: Tensor) -> Tensor:
        return v - hd * (product(v) if is_complex else torch.complex(product(v.real), product(v.imag)))

    return LinearOperator(matrix.n, matrix.rows, hd.dtype, matrix.device, matvec)
