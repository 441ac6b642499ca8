"""Root problems with conserved quantities, made regular: the totals ``W x = c`` are imposed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import LinearOperator, Matrix, SparseMatrix
from .protocol import RootProblem

__all__ = ["border_problem", "dependent_rows", "replace_rows"]


def dependent_rows(weights: Tensor) -> Tensor:
    """``(k,)``: equations that may be left out where ``weights`` (k, n) times the residual vanishes, by pivoted QR.

    Raises `InvalidInput` for linearly dependent weights.
    """
    import numpy as np
    import scipy.linalg

    k, n = weights.shape
    if not 1 <= k <= n:
        raise InvalidInput(f"weights must have shape (k, n) with 1 <= k <= n, got {tuple(weights.shape)}")
    factors: Any = scipy.linalg.qr(weights.cpu().numpy(), mode="r", pivoting=True)
    r, order = factors
    diagonal = np.abs(np.diag(r))
    if not diagonal.min() > 1e-10 * diagonal.max():
        raise InvalidInput("the rows of weights are linearly dependent: leave the superfluous ones out")
    return torch.as_tensor(order[:k].copy(), dtype=torch.int64, device=weights.device)


def replace_rows(problem: RootProblem, weights: Tensor, totals: Tensor) -> RootProblem:
    """The problem with as many equations replaced by ``weights x - totals`` as there are weights (k, n); ``totals`` is (k,) or (B, k).

    Right where ``weights residual(x) = 0`` for all x. Dense and sparse Jacobians stay what they are; a full row of weights makes a full
    row of the sparse matrix (see `border_problem`). Raises `InvalidInput`, or `UnsupportedCombination` for operators.
    """
    pivots = dependent_rows(weights)

    def residual(x: Tensor) -> Tensor:
        return problem.residual(x).index_copy(1, pivots, x @ weights.T - totals)

    def jacobian(x: Tensor) -> Matrix:
        assert problem.jacobian is not None
        matrix = problem.jacobian(x)
        if isinstance(matrix, LinearOperator):
            raise UnsupportedCombination("replace_rows needs the entries of the Jacobian: use border_problem with operators")
        if isinstance(matrix, Tensor):
            return matrix.expand(x.shape[0], -1, -1).index_copy(1, pivots, weights.expand(x.shape[0], -1, -1))
        keep = ~torch.isin(matrix.indices[0], pivots)
        values = matrix.values.expand(x.shape[0], -1)[:, keep]
        place = weights.nonzero().T
        rows = torch.cat([matrix.indices[0][keep], pivots[place[0]]])
        columns = torch.cat([matrix.indices[1][keep], place[1]])
        order = torch.argsort(rows * matrix.shape[1] + columns)
        values = torch.cat([values, weights[place[0], place[1]].expand(x.shape[0], -1)], 1)
        return SparseMatrix(torch.stack([rows, columns])[:, order], values[:, order], matrix.shape)

    def jvp(x: Tensor, v: Tensor) -> Tensor:
        assert problem.jvp is not None
        return problem.jvp(x, v).index_copy(1, pivots, v @ weights.T)

    def vjp(x: Tensor, w: Tensor) -> Tensor:
        assert problem.vjp is not None
        return problem.vjp(x, w.index_fill(1, pivots, 0)) + w[:, pivots] @ weights

    return replace(
        problem,
        residual=residual,
        jacobian=None if problem.jacobian is None else jacobian,
        jvp=None if problem.jvp is None else jvp,
        vjp=None if problem.vjp is None else vjp,
    )


def border_problem(
    problem: RootProblem, weights: Tensor, totals: Tensor
) -> tuple[RootProblem, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The problem in ``(x, z)`` of n + k unknowns: ``residual(x) + weights* z = 0, weights x = totals``, with the matrix
    ``[[A, W*], [W, 0]]``, which is regular where A has no further null vectors. ``z`` vanishes at a root if the totals are conserved.

    Returns the problem and the functions that lift ``x`` to ``(x, 0)`` and bring ``(x, z)`` back to ``x``. No equation is singled out,
    and a sparse pattern gains a border only. Bounds hold for ``x``; tensor tolerances and scales are continued by one.
    """
    k, n = weights.shape
    dependent_rows(weights)

    def residual(u: Tensor) -> Tensor:
        x, z = u[:, :n], u[:, n:]
        return torch.cat([problem.residual(x) + z @ weights, x @ weights.T - totals], 1)

    def jacobian(u: Tensor) -> Matrix:
        assert problem.jacobian is not None
        matrix, B = problem.jacobian(u[:, :n]), u.shape[0]
        if isinstance(matrix, Tensor):
            W = weights.expand(B, -1, -1)
            top = torch.cat([matrix.expand(B, -1, -1), W.mT], 2)
            return torch.cat([top, torch.cat([W, W.new_zeros(B, k, k)], 2)], 1)
        if isinstance(matrix, SparseMatrix):
            place = weights.nonzero().T
            w = weights[place[0], place[1]].expand(B, -1)
            rows = torch.cat([matrix.indices[0], place[1], n + place[0]])
            columns = torch.cat([matrix.indices[1], n + place[0], place[1]])
            order = torch.argsort(rows * (n + k) + columns)
            values = torch.cat([matrix.values.expand(B, -1), w, w], 1)
            return SparseMatrix(torch.stack([rows, columns])[:, order], values[:, order], (n + k, n + k))

        def times(apply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda v: torch.cat([apply(v[:, :n]) + v[:, n:] @ weights, v[:, :n] @ weights.T], 1)

        back = None if matrix.rmatvec is None else times(matrix.rmatvec)
        return LinearOperator(n + k, matrix.rows, matrix.dtype, matrix.device, times(matrix.matvec), back)

    def continued(value: Tensor | float | None, fill: float) -> Tensor | float | None:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return torch.cat([value, value.new_full((*value.shape[:-1], k), fill)], -1)

    bordered = replace(
        problem,
        residual=residual,
        jacobian=None if problem.jacobian is None else jacobian,
        jvp=None,
        vjp=None,
        lower=continued(_full(problem.lower, n), -float("inf")),  # type: ignore[arg-type]
        upper=continued(_full(problem.upper, n), float("inf")),  # type: ignore[arg-type]
        f_scale=continued(problem.f_scale, 1.0),  # type: ignore[arg-type]
        x_scale=continued(problem.x_scale, 1.0),  # type: ignore[arg-type]
        x_rtol=continued(problem.x_rtol, 1e-10),  # type: ignore[arg-type]
        x_atol=continued(problem.x_atol, 1e-10),  # type: ignore[arg-type]
    )
    return bordered, lambda x: torch.cat([x, x.new_zeros(x.shape[0], k)], 1), lambda u: u[:, :n]


def _full(bound: Tensor | None, n: int) -> Tensor | None:
    return None if bound is None else bound.expand(*bound.shape[:-1], n) if bound.dim() else bound.expand(n)
