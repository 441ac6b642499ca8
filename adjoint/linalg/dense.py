"""Dense LU of a batch of matrices, on CPU and CUDA; and of one small matrix on the CPU by LAPACK itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, ClassVar, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from ..torch_internals import is_functorch_wrapped_tensor
from .protocol import Factorization, LinearOperator, LinearSolver, Log, Matrix, SolverTraits, SparseMatrix, check_sides, traits_of

__all__ = ["DenseLU", "SmallFactors", "as_numpy", "factor_again", "factor_one", "solved", "unwarned"]

P = ParamSpec("P")
T = TypeVar("T")

#: unknowns up to which one matrix on the CPU goes to LAPACK directly: the operators of ``torch.linalg`` take longer than its arithmetic
_SMALL = 64
_CPU = torch.device("cpu")


def unwarned(function: Callable[P, T]) -> Callable[P, T]:
    """``function`` without NumPy's warnings: PyTorch says nothing either, and numbers that are not finite are named where they count."""

    @wraps(function)
    def quiet(*args: P.args, **kwargs: P.kwargs) -> T:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return quiet


@lru_cache
def _lapack(kind: str) -> tuple[Any, Any]:
    """``getrf`` and ``getrs`` for a NumPy dtype."""
    from scipy.linalg import get_lapack_funcs

    return tuple(get_lapack_funcs(("getrf", "getrs"), dtype=np.dtype(kind)))  # type: ignore[return-value]


class SmallFactors(Factorization):
    """Of one small matrix."""

    @unwarned
    def __init__(self, entries: np.ndarray, dtype: torch.dtype, log: Log) -> None:
        start = time.perf_counter()
        self.rows, self.n = 1, entries.shape[-1]
        self.dtype, self.device, self.log = dtype, _CPU, log
        factor, self._solve = _lapack(entries.dtype.char)
        self._lu, self._pivots, info = factor(entries)
        self._fails = bool(info != 0 or not np.isfinite(self._lu.trace()))
        self._entries = entries
        log.n_factorizations += 1
        log.fill = self.n * self.n
        log.factor_seconds += time.perf_counter() - start

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        if (b.requires_grad and torch.is_grad_enabled()) or is_functorch_wrapped_tensor(b):
            # NumPy can neither be recorded nor mapped
            return _DenseFactors(torch.from_numpy(self._entries).unsqueeze(0), self.log).solve(
                b, transposed=transposed, conjugated=conjugated
            )
        start = time.perf_counter()
        if b.dim() != 2 or b.shape[0] != 1 or b.shape[1] != self.n or b.dtype != self.dtype:
            check_sides(self, b)
        # (B, n, k): all columns of all rows are sides of the one matrix
        sides = as_numpy(b.movedim(1, 0).reshape(self.n, -1) if b.dim() == 3 or b.shape[0] != 1 else b[0])
        self.log.n_solves += sides.size // self.n if self.n else 0
        if self._fails:
            return torch.full_like(b, float("nan"))
        complex_ = self.dtype.is_complex
        # LAPACK knows the adjoint; the plain conjugate is that of the solution for conjugated sides
        swap = complex_ and conjugated and not transposed
        trans = 0 if not transposed else 2 if conjugated and complex_ else 1
        found, _ = self._solve(self._lu, self._pivots, sides.conj() if swap else sides, trans)
        out = torch.from_numpy(found.conj() if swap else found)
        self.log.solve_seconds += time.perf_counter() - start
        if b.dim() == 3 or b.shape[0] != 1:
            return out.reshape(self.n, b.shape[0], -1).movedim(0, 1).reshape(b.shape)
        return out.unsqueeze(0)

    def solve_one(self, b: np.ndarray) -> np.ndarray:
        """``A^-1 b`` for one side (n,), without any check."""
        self.log.n_solves += 1
        return np.full_like(b, np.nan) if self._fails else self._solve(self._lu, self._pivots, b)[0]

    def singular(self) -> Tensor:
        return torch.tensor([self._fails])


def solved(factors: Factorization, b: Tensor) -> Tensor:
    """``A^-1 b`` for sides ``(B, n)``, of one matrix ``(n,)`` too."""
    if isinstance(factors, SmallFactors):
        if b.dim() == 1:
            return torch.from_numpy(factors.solve_one(as_numpy(b)))
        return torch.from_numpy(factors.solve_one(as_numpy(b.reshape(-1)))).reshape(b.shape)
    return factors.solve(b) if b.dim() == 2 else factors.solve(b.unsqueeze(0)).squeeze(0)


def as_numpy(x: Tensor) -> np.ndarray:
    """The array of a tensor on the CPU, whatever autograd and lazy conjugation have made of it."""
    x = x.detach() if x.requires_grad else x
    return x.resolve_conj().resolve_neg().numpy() if x.is_complex() else x.numpy()


def _is_small(matrix: Tensor) -> bool:
    return (
        matrix.dim() == 3
        and matrix.shape[0] == 1
        and 0 < matrix.shape[1] <= _SMALL
        and matrix.shape[1] == matrix.shape[2]
        and matrix.device.type == "cpu"
        and matrix.dtype in (torch.float64, torch.float32, torch.complex128, torch.complex64)
        and not is_functorch_wrapped_tensor(matrix)
        and not torch.compiler.is_compiling()
    )


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
class DenseLU(SolverTraits):
    """LU with partial pivoting of every matrix of the batch (LAPACK, cuSOLVER or MAGMA through ``torch.linalg``)."""

    #: see `factor_one`
    dense_lu: ClassVar[bool] = True

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


def factor_one(solver: LinearSolver, matrix: Matrix, log: Log, old: Factorization | None = None) -> Factorization:
    """Factors of one matrix for the loops over the steps of one trajectory: of a small one on the CPU by LAPACK, if the solver would take
    the LU of `DenseLU` (its last bits are others). ``old``: of the same pattern."""
    if isinstance(matrix, Tensor) and traits_of(solver).dense_lu and _is_small(matrix):
        return SmallFactors(as_numpy(matrix[0]), matrix.dtype, log)
    return factor_again(solver, matrix, log, old)


def factor_again(solver: LinearSolver, matrix: Matrix, log: Log, old: Factorization | None) -> Factorization:
    """Factors, with what is of use in ``old`` ones of the same pattern; an operator has no pattern."""
    return solver.factor(matrix, log) if old is None or isinstance(matrix, LinearOperator) else solver.refactor(old, matrix)


def _columns(operator: LinearOperator) -> Tensor:
    eye = torch.eye(operator.n, dtype=operator.dtype, device=operator.device)
    return torch.stack([operator.matvec(row.expand(operator.rows, -1)) for row in eye], -1)
