"""Matrices, factorisations, and the one protocol by which every linear solver is used: factorise once, solve and solve transposed often.

Everything here has rows: ``B`` independent systems of ``n`` unknowns. A single system is ``B = 1``. Nothing here is differentiable;
`solve.linear_solve` makes it so by the implicit rule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InvalidInput

__all__ = [
    "Factorization",
    "LinearOperator",
    "LinearSolver",
    "Log",
    "Matrix",
    "SolverTraits",
    "SparseMatrix",
    "check_sides",
    "check_solver",
    "traits_of",
]


@dataclass(frozen=True, eq=False)
class SparseMatrix:
    """``B`` sparse matrices with one pattern.

    ``indices`` is ``(2, nnz)`` int64 (row, column), each place at most once, sorted by row and then by column;
    ``values`` is ``(B, nnz)``, or ``(nnz,)`` for one matrix that all rows share. ``shape`` is ``(n_rows, n_columns)``.
    """

    indices: Tensor
    values: Tensor
    shape: tuple[int, int]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def matvec(self, x: Tensor, transposed: bool = False, conjugated: bool = False) -> Tensor:
        """``A x`` for ``x`` of shape ``(B, n)`` or ``(B, n, k)``; differentiable in values and ``x``."""
        rows, columns = self.indices.flip(0) if transposed else self.indices
        values = self.values.conj() if conjugated else self.values
        if x.dim() == 3:
            values = values.unsqueeze(-1)
        product = values * x.index_select(1, columns)
        out = product.new_zeros(x.shape[0], self.shape[1 if transposed else 0], *x.shape[2:])
        return out.index_add(1, rows, product)

    def dense(self) -> Tensor:
        """``(B, n, m)``, or ``(1, n, m)`` where the values are shared."""
        values = self.values if self.values.dim() == 2 else self.values.unsqueeze(0)
        out = values.new_zeros(values.shape[0], self.shape[0] * self.shape[1])
        return out.index_add(1, self.indices[0] * self.shape[1] + self.indices[1], values).unflatten(1, self.shape)


@dataclass(frozen=True, eq=False)
class LinearOperator:
    """``B`` matrices known by their products. ``matvec`` and ``rmatvec`` (the transposed, not conjugated, product) map
    ``(B, n)`` to ``(B, n)``; ``rmatvec`` may be missing where nothing transposed is asked for."""

    n: int
    rows: int
    dtype: torch.dtype
    device: torch.device
    matvec: Callable[[Tensor], Tensor]
    rmatvec: Callable[[Tensor], Tensor] | None = None


#: a dense ``(B, n, n)`` tensor, or one of the two above
Matrix = Tensor | SparseMatrix | LinearOperator


@dataclass
class Log:
    """What factorisations and solves have cost so far. ``n_solves`` counts right-hand sides (of one system each)."""

    n_factorizations: int = 0
    n_refactorizations: int = 0
    n_solves: int = 0
    n_iterations: int = 0
    factor_seconds: float = 0.0
    solve_seconds: float = 0.0
    #: entries of the factors, where the backend tells
    fill: int = 0


class Factorization(ABC):
    """Factors of ``B`` matrices of size ``n`` (or what an iterative solver keeps in their place)."""

    rows: int
    n: int
    dtype: torch.dtype
    device: torch.device
    log: Log

    @abstractmethod
    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        """``A^-1 b`` (or with the transpose, the conjugate, or both) for ``b`` of shape ``(B, n)`` or, with several right-hand sides,
        ``(B, n, k)``; the result has the same shape. Rows whose matrix is singular give NaN: ask `singular`.
        Factors of one matrix take sides with any number of rows. Raises `InvalidInput` for other shapes and for another dtype."""

    def singular(self) -> Tensor:
        """``(B,)`` bool: which of the matrices could not be factorised. Their solutions are NaN."""
        return torch.zeros(self.rows, dtype=torch.bool, device=self.device)


def check_sides(factors: Factorization, b: Tensor) -> None:
    """Raise `InvalidInput` unless ``b`` fits the factors. Backends that convert to NumPy would drop imaginary parts or rows in silence."""
    if b.dim() not in (2, 3) or b.shape[1] != factors.n or factors.rows not in (1, b.shape[0]):
        raise InvalidInput(f"b must be ({factors.rows}, {factors.n}) or ({factors.rows}, {factors.n}, k), got {tuple(b.shape)}")
    if b.dtype != factors.dtype:
        raise InvalidInput(f"b has dtype {b.dtype}, but the matrix has {factors.dtype}: convert one of them")


@runtime_checkable
class LinearSolver(Protocol):
    """A strategy object with the settings of one backend. What more it says of itself stands in `SolverTraits`."""

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """Factorise, counting in ``log`` (a new one by default)."""
        ...

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """Factors of a matrix with the same pattern: what can be kept of the old ones (ordering, symbolic analysis) is.
        The old factors stay valid. Counts in the same log."""
        ...


class SolverTraits:
    """What a linear solver may say of itself beside its functions, by deriving from this: whatever it does not say is not so."""

    #: takes operators, so that no matrix has to be made
    matrix_free: bool = False
    #: takes dense matrices only
    dense: bool = False
    #: solves dense systems as `DenseLU` does
    dense_lu: bool = False


_PLAIN = SolverTraits()


def traits_of(solver: LinearSolver | None) -> SolverTraits:
    """What a solver says of itself."""
    return solver if isinstance(solver, SolverTraits) else _PLAIN


def check_solver(solver: object, example: str = "DenseLU") -> None:
    """Raise `InvalidInput` unless ``solver`` is a linear solver, or None; ``example``: the name of one that would do."""
    if solver is not None and not isinstance(solver, LinearSolver):
        raise InvalidInput(f"linear_solver must be an object such as adjoint.linalg.{example}(), got {solver!r}")
