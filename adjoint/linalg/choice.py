"""The linear solver for a matrix of any kind and size, chosen for one or for each that comes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import UnsupportedCombination
from .dense import DenseLU
from .krylov import GMRES
from .protocol import Factorization, LinearOperator, LinearSolver, Log, Matrix, SolverTraits, SparseMatrix
from .sparse_lu import SparseLU

__all__ = ["SolverByKind", "default_solver"]

#: unknowns up to which a sparse matrix is factorised as a dense one
_SMALL = 100
#: the same on CUDA, where SuperLU is not to be had
_SMALL_CUDA = 4000


def default_solver(matrix: Matrix) -> LinearSolver:
    """Dense LU for dense and small matrices, sparse LU for large sparse ones on the CPU, GMRES for operators.

    Raises `UnsupportedCombination` for large sparse matrices on other devices.
    """
    if isinstance(matrix, LinearOperator):
        return GMRES()
    if isinstance(matrix, SparseMatrix) and matrix.shape[0] > _SMALL:
        if matrix.device.type == "cpu":
            return SparseLU()
        if matrix.shape[0] > _SMALL_CUDA:
            raise UnsupportedCombination(
                f"no direct solver for sparse matrices of size {matrix.shape[0]} on {matrix.device}: give "
                "linear_solver=adjoint.linalg.CuDSS() or GMRES(preconditioner=...), or solve on the CPU"
            )
    return DenseLU()


@dataclass(frozen=True)
class SolverByKind(SolverTraits):
    """The solver that kind and size of each matrix call for."""

    dense_lu: ClassVar[bool] = True

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`."""
        return default_solver(matrix).factor(matrix, log)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`."""
        return default_solver(matrix).refactor(factorization, matrix)
