"""Sparse LU by SuiteSparse's UMFPACK, where the package ``scikit-umfpack`` is installed."""

from __future__ import annotations

import importlib
import time
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .protocol import Factorization, Log, Matrix, SparseMatrix, check_sides
from .sparse_lu import Pattern, to_sparse

__all__ = ["UMFPACK"]

#: what UMFPACK works in; single precision is converted
_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _library() -> Any:
    try:
        return importlib.import_module("scikits.umfpack")
    except ImportError as error:
        raise InvalidInput(
            "linear_solver=UMFPACK() needs the package scikit-umfpack: pip install scikit-umfpack (it is compiled against SuiteSparse, "
            "Debian's libsuitesparse-dev, and needs swig), or conda install -c conda-forge scikit-umfpack"
        ) from error


class _Backend:
    """UMFPACK for real or for complex matrices, with long indices: its memory is then not limited to 2 GB."""

    def __init__(self, complex_: bool) -> None:
        self.library, self.complex = _library(), complex_
        context = self.library.UmfpackContext("zl" if complex_ else "dl")
        self.calls, self.control = context.funs, context.control

    def parts(self, values: np.ndarray) -> tuple[np.ndarray, ...]:
        """The values as UMFPACK takes them: real and imaginary parts apart."""
        if self.complex:
            return np.ascontiguousarray(values.real), np.ascontiguousarray(values.imag)
        return (np.ascontiguousarray(values),)

    def info(self) -> np.ndarray:
        return np.zeros(self.library.UMFPACK_INFO)

    def check(self, status: int) -> None:
        """Raise for what is not a matter of the matrix."""
        if status == self.library.UMFPACK_ERROR_out_of_memory:
            raise MemoryError("UMFPACK ran out of memory")
        if status < 0:
            raise RuntimeError(f"UMFPACK failed: {self.library.umfStatus.get(status, status)}")


class _Symbolic:
    """The analysis of a pattern. UMFPACK looks at the values too, so one made for others may not do."""

    def __init__(self, backend: _Backend, pattern: _Columns, values: tuple[np.ndarray, ...]) -> None:
        n, info = pattern.n, backend.info()
        status, self.handle = backend.calls.symbolic(n, n, pattern.starts, pattern.rows, *values, backend.control, info)
        backend.check(status)
        weakref.finalize(self, backend.calls.free_symbolic, self.handle)


class _Columns(Pattern):
    """A pattern with long indices."""

    def __init__(self, indices: Tensor, n: int) -> None:
        super().__init__(indices, n)
        self.rows, self.starts = self.rows.astype(np.int64), self.starts.astype(np.int64)


class _Row:
    """The factors of one matrix."""

    def __init__(self, backend: _Backend, pattern: _Columns, values: np.ndarray, symbolic: _Symbolic | None) -> None:
        self.backend, self.pattern, self.symbolic, self.fill = backend, pattern, symbolic, 0
        self.values = backend.parts(values[pattern.order])
        self.singular = not np.isfinite(values).all()
        if self.singular or pattern.n == 0:
            return
        analysed = symbolic is None
        if symbolic is None:
            self.symbolic = _Symbolic(backend, pattern, self.values)
        status = self._factor()
        if status != backend.library.UMFPACK_OK and not analysed:
            # the analysis was made for other values: a pivot that it has chosen for good may be zero here
            self.symbolic = _Symbolic(backend, pattern, self.values)
            status = self._factor()
        backend.check(status)
        self.singular = status == backend.library.UMFPACK_WARNING_singular_matrix

    def _factor(self) -> int:
        backend, info = self.backend, self.backend.info()
        assert self.symbolic is not None
        status, numeric = backend.calls.numeric(
            self.pattern.starts, self.pattern.rows, *self.values, self.symbolic.handle, backend.control, info
        )
        if status >= 0:
            self.numeric = numeric
            self.fill = int(info[backend.library.UMFPACK_LNZ] + info[backend.library.UMFPACK_UNZ])
            weakref.finalize(self, backend.calls.free_numeric, numeric)
        return status

    def solve(self, side: np.ndarray, transposed: bool, conjugated: bool) -> np.ndarray:
        """For ``side`` of shape ``(n,)`` or ``(n, k)``; UMFPACK takes one at a time."""
        if self.singular or side.size == 0:
            return np.full_like(side, np.nan)
        out = np.empty_like(side)
        # UMFPACK knows A, its transpose and its adjoint; the conjugate is that of the solution for the conjugated side
        turn = conjugated and not transposed and self.backend.complex
        library = self.backend.library
        system = library.UMFPACK_A if not transposed else library.UMFPACK_At if conjugated else library.UMFPACK_Aat
        columns = side.reshape(side.shape[0], -1)
        found = out.reshape(columns.shape)  # a view
        for k in range(columns.shape[1]):
            x = self._solve(system, columns[:, k].conj() if turn else columns[:, k])
            found[:, k] = x.conj() if turn else x
        return out

    def _solve(self, system: int, side: np.ndarray) -> np.ndarray:
        backend, pattern = self.backend, self.pattern
        if not np.isfinite(side).all():
            return np.full_like(side, np.nan)
        x = tuple(np.zeros(pattern.n) for _ in self.values)
        arguments = (pattern.starts, pattern.rows, *self.values, *x, *backend.parts(side), self.numeric, backend.control, backend.info())
        backend.check(backend.calls.solve(system, *arguments))
        return x[0] + 1j * x[1] if backend.complex else x[0]


class _UMFPACKFactors(Factorization):
    def __init__(self, matrix: SparseMatrix, log: Log, before: _UMFPACKFactors | None) -> None:
        start = time.perf_counter()
        n, m = matrix.shape
        if n != m:
            raise InvalidInput(f"only square matrices are factorised, got {matrix.shape}")
        values = matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)
        self.rows, self.n, self.dtype, self.device, self.log = values.shape[0], n, matrix.dtype, matrix.device, log
        self.double = _DOUBLE.get(self.dtype, self.dtype)
        self.backend = _Backend(self.dtype.is_complex) if before is None else before.backend
        self.pattern = _Columns(matrix.indices, n) if before is None else before.pattern
        self.factors: list[_Row] = []
        symbolic = next((row.symbolic for row in before.factors if row.symbolic is not None), None) if before is not None else None
        for row in values.detach().resolve_conj().resolve_neg().to(self.double).cpu().numpy():
            self.factors.append(_Row(self.backend, self.pattern, row, symbolic))
            symbolic = self.factors[-1].symbolic
        log.n_factorizations += self.rows
        log.n_refactorizations += 0 if before is None else self.rows
        log.fill = sum(row.fill for row in self.factors)
        log.factor_seconds += time.perf_counter() - start

    def singular(self) -> Tensor:
        return torch.tensor([row.singular for row in self.factors], dtype=torch.bool, device=self.device)

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        check_sides(self, b)
        self.log.n_solves += b.shape[0] * (b.shape[2] if b.dim() == 3 else 1)
        sides = b.detach().resolve_conj().resolve_neg().to(self.double).cpu().contiguous().numpy()
        out = np.empty_like(sides)
        for k, side in enumerate(sides):
            out[k] = self.factors[0 if self.rows == 1 else k].solve(side, transposed, conjugated)
        self.log.solve_seconds += time.perf_counter() - start
        return torch.from_numpy(out).to(b.device, b.dtype)


@dataclass(frozen=True)
class UMFPACK:
    """LU by UMFPACK's multifrontal method (Davis 2004), with one step or two of iterative refinement in every solve. Its symbolic
    analysis is kept in `refactor`, and shared by the rows of a batch. Quicker than SuperLU where factors fill in much.

    Needs ``scikit-umfpack``. Real and complex matrices on the CPU; those in single precision are factorised and solved with in double.
    """

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`. Dense matrices are taken by their entries. Raises `UnsupportedCombination` for operators,
        `InvalidInput` without the package, `MemoryError` where the factors do not fit."""
        return _UMFPACKFactors(to_sparse(matrix), Log() if log is None else log, None)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`. A matrix of another pattern or of another dtype is analysed anew."""
        sparse = to_sparse(matrix)
        same = (
            isinstance(factorization, _UMFPACKFactors)
            and factorization.pattern.n == sparse.shape[0] == sparse.shape[1]
            and factorization.pattern.indices.shape == sparse.indices.shape
            and torch.equal(factorization.pattern.indices, sparse.indices)
            and factorization.dtype.is_complex == sparse.dtype.is_complex
        )
        return _UMFPACKFactors(sparse, factorization.log, factorization if same else None)  # type: ignore[arg-type]
