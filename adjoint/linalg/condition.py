"""How near to singular a matrix is, from its factors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedCombination
from .protocol import Factorization, LinearOperator, Matrix, SparseMatrix

__all__ = ["condition_estimate"]


def condition_estimate(matrix: Matrix, factors: Factorization, iterations: int = 4) -> Tensor:
    """``(B,)``: an estimate from below of the condition number ``|A|_1 |A^-1|_1``, seldom too small by more than a factor of 3.

    ``2 iterations + 1`` solves with the factors of ``matrix``; infinite where they are singular. Hager (1984), with the further test vector
    of Higham (1988, algorithm 4.1). Raises `UnsupportedCombination` for operators, whose norm is not known.
    """
    size = _norm(matrix)
    n = factors.n
    if n == 0 or factors.rows == 0:
        return size.new_zeros(factors.rows)
    x = torch.full((factors.rows, n), 1.0 / n, dtype=factors.dtype, device=factors.device)
    found = size.new_zeros(factors.rows)
    for _ in range(iterations):
        y = factors.solve(x)
        found = torch.maximum(found, y.abs().sum(-1))
        # where the norm of the solution grows fastest
        z = factors.solve(torch.where(y == 0, 1.0, y.sgn()), transposed=True, conjugated=True)
        x = torch.zeros_like(x).scatter(1, z.abs().argmax(-1, keepdim=True), 1.0)
    place = torch.arange(n, device=factors.device)
    waves = ((1 - 2 * (place % 2)) * (1 + place / max(n - 1, 1))).to(factors.dtype)
    found = torch.maximum(found, factors.solve(waves.expand(factors.rows, n).contiguous()).abs().sum(-1) * 2 / (3 * n))
    return torch.nan_to_num(size * found, nan=torch.inf, posinf=torch.inf)


def _norm(matrix: Matrix) -> Tensor:
    """``(B,)``: the largest column sum."""
    if isinstance(matrix, LinearOperator):
        raise UnsupportedCombination("condition_estimate needs a matrix with entries, not a LinearOperator")
    if not isinstance(matrix, SparseMatrix):
        sums = matrix.detach().abs().sum(1)
    else:
        values = matrix.values.detach().abs()
        values = values if values.dim() == 2 else values.unsqueeze(0)
        sums = values.new_zeros(values.shape[0], matrix.shape[1]).index_add(1, matrix.indices[1], values)
    return sums.amax(-1) if sums.shape[-1] else sums.new_zeros(sums.shape[0])
