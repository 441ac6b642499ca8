"""Dense LU of a batch of matrices, on CPU and CUDA."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput
from .protocol import Factorization, LinearOperator, Log, Matrix, SparseMatrix, check_sides

__all__ = ["DenseLU"]


class _DenseFactors(Factorization):
    def __init__(self, matrix: Tensor, log: Log) -> None:
        start = time.perf_counter()
        if matrix.dim() != 3 or matrix.shape[1] != matrix.shape[2]:
            raise InvalidInput(f"only square matrices are factorised, (B, n, n), got {tuple(matrix.shape)}")
        self.rows, self.n = matrix.shape[0], matrix.shape[-1]
        self.dtype, self.device, self.log = matrix.dtype, matrix.device, log
        # no error check of LAPACK's: it would wait for the device
        self.lu, self.pivots, self.info = torch.linalg.lu_factor_ex(matrix)
        self._singular = (self.info != 0) | ~torch.isfinite(self.lu.diagonal(dim1=-2, dim2=-1)).all(-1)
        log.n_factorizations += self.rows
        log.fill = self.lu.numel()
        log.factor_seconds += time.perf_counter() - start

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        check_sides(self, b)
        matrix = b if b.dim() == 3 else b.unsqueeze(-1)
        self.log.n_solves += matrix.shape[0] * matrix.shape[2]
        if transposed:
            # lu_solve knows the adjoint: the transpose is its conjugate on conjugated sides
            matrix = matrix if conjugated or not matrix.is_complex() else matrix.conj()
            out = torch.linalg.lu_solve(self.lu, self.pivots, matrix, adjoint=True)
            out = out if conjugated or not out.is_complex() else out.conj()
        else:
            swap = conjugated and matrix.is_complex()
            out = torch.linalg.lu_solve(self.lu, self.pivots, matrix.conj() if swap else matrix)
            out = out.conj() if swap else out
        out = torch.where(self._singular[:, None, None], float("nan"), out)
        self.log.solve_seconds += time.perf_counter() - start
        return out.reshape(b.shape)

    def singular(self) -> Tensor:
        return self._singular


@dataclass(frozen=True)
class DenseLU:
    """LU with partial pivoting of every matrix of the batch (LAPACK, cuSOLVER or MAGMA through ``torch.linalg``)."""

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`. Sparse matrices are made dense."""
        if isinstance(matrix, LinearOperator):
            matrix = _columns(matrix)
        elif isinstance(matrix, SparseMatrix):
            matrix = matrix.dense()
        return _DenseFactors(matrix, Log() if log is None else log)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`."""
        return self.factor(matrix, factorization.log)


def _columns(operator: LinearOperator) -> Tensor:
    eye = torch.eye(operator.n, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.matvec(row.expand(operator.rows, -1)) for row in eye], -1)
