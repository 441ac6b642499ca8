"""Sparse LU by MKL's Pardiso, where the package ``pypardiso`` is installed (x86)."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from .protocol import Factorization, Log, Matrix, SparseMatrix, check_sides
from .sparse_lu import to_sparse

if TYPE_CHECKING:
    import scipy.sparse as sp

__all__ = ["Pardiso"]

_ANALYSE_AND_FACTOR, _FACTOR, _SOLVE = 12, 22, 33
#: place of the parameter that says "solve with the transpose" (counted from one)
_TRANSPOSE = 12
#: where Pardiso says how many pivots it has perturbed
_PERTURBED = 14


class _Handle:
    """Pardiso's memory for one pattern. It holds the factors of one matrix at a time, those of ``owner``."""

    solver: Any = None

    def __init__(self) -> None:
        try:
            from pypardiso import PyPardisoSolver  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InvalidInput("linear_solver=Pardiso() needs the package pypardiso: pip install pypardiso") from error
        self.solver = PyPardisoSolver()
        self.owner: Any = None
        self.analysed = False

    def call(self, phase: int, matrix: sp.csr_matrix, side: np.ndarray, transposed: bool = False) -> np.ndarray:
        """Run one phase."""
        self.solver.set_iparm(_TRANSPOSE, 2 if transposed else 0)
        self.solver.set_phase(phase)
        return self.solver._call_pardiso(matrix, np.asfortranarray(side))

    def __del__(self) -> None:
        solver = self.solver
        # at the end of the process the memory goes anyway, and modules that the call needs may be gone
        if solver is not None and self.analysed and not sys.is_finalizing():
            solver.free_memory(everything=True)


class _Row:
    """One matrix. Where another one of its pattern has taken the handle since, its factors are made again."""

    def __init__(self, matrix: sp.csr_matrix, handle: _Handle) -> None:
        self.matrix, self.handle, self.perturbed = matrix, handle, False
        self.singular = not np.isfinite(matrix.data).all() or not np.diff(matrix.indptr).all()
        if not self.singular:
            self._take()

    def _take(self) -> None:
        from pypardiso.pardiso_wrapper import PyPardisoError  # pyright: ignore[reportMissingImports]

        handle, empty = self.handle, np.zeros((self.matrix.shape[0], 1))  # pyright: ignore[reportOptionalSubscript]
        handle.owner = None  # whatever happens now, the factors of the one before are gone
        try:
            handle.call(_FACTOR if handle.analysed else _ANALYSE_AND_FACTOR, self.matrix, empty)
            handle.owner, handle.analysed = self, True
            self.perturbed = handle.solver.get_iparm(_PERTURBED) > 0
        except PyPardisoError:
            self.singular = True
            return
        if self.perturbed:
            # a singular matrix has no solution for a random side
            side = np.random.default_rng(0).standard_normal(empty.shape)
            self.singular = not self._solves(side, handle.call(_SOLVE, self.matrix, side), False)

    def _solves(self, side: np.ndarray, out: np.ndarray, transposed: bool) -> bool:
        with np.errstate(all="ignore"):
            residual = (self.matrix.T if transposed else self.matrix) @ out - side
            return bool(np.isfinite(out).all() and np.abs(residual).max(initial=0.0) <= 1e-8 * np.abs(side).max(initial=0.0))

    def solve(self, side: np.ndarray, transposed: bool) -> np.ndarray:
        if not self.singular and self.handle.owner is not self:
            self._take()
        if self.singular:
            return np.full_like(side, np.nan)
        if side.size == 0:
            return side
        out = self.handle.call(_SOLVE, self.matrix, side, transposed)
        if not self.perturbed:
            return out
        # Pardiso perturbs pivots that are too small instead of stopping: what comes out may be the solution of another system
        return out if self._solves(side, out, transposed) else np.full_like(side, np.nan)


class _PardisoFactors(Factorization):
    def __init__(self, matrix: SparseMatrix, log: Log, before: _PardisoFactors | None) -> None:
        import scipy.sparse as sp

        start = time.perf_counter()
        values = matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)
        if values.dtype != torch.float64:
            raise UnsupportedCombination(f"Pardiso() takes float64 matrices, got {values.dtype}: use SparseLU()")
        if matrix.shape[0] != matrix.shape[1]:
            raise InvalidInput(f"only square matrices are factorised, got {matrix.shape}")
        self.rows, self.n, self.dtype, self.device, self.log = values.shape[0], matrix.shape[0], matrix.dtype, matrix.device, log
        self.indices = matrix.indices
        rows, columns = matrix.indices.cpu().numpy()
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.n))])
        each = [sp.csr_matrix((v, columns, starts), shape=matrix.shape) for v in values.detach().cpu().numpy()]
        handles = [_Handle() for _ in each] if before is None else [row.handle for row in before.factors]
        self.factors = [_Row(m, h) for m, h in zip(each, handles, strict=True)]
        log.n_factorizations += self.rows
        log.n_refactorizations += 0 if before is None else self.rows
        log.factor_seconds += time.perf_counter() - start

    def singular(self) -> Tensor:
        return torch.tensor([row.singular for row in self.factors], dtype=torch.bool, device=self.device)

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        self.log.n_solves += b.shape[0] * (b.shape[2] if b.dim() == 3 else 1)
        check_sides(self, b)
        sides = b.detach().resolve_neg().cpu().numpy()
        out = np.empty_like(sides)
        for k, side in enumerate(sides):
            out[k] = self.factors[0 if self.rows == 1 else k].solve(side, transposed)
        self.log.solve_seconds += time.perf_counter() - start
        return torch.from_numpy(out).to(b.device)


@dataclass(frozen=True)
class Pardiso:
    """LU by MKL's Pardiso: quicker than SuperLU for large 3-D problems, threaded, and its symbolic analysis is kept in `refactor`.

    Needs ``pypardiso``; float64 only. Pardiso perturbs pivots below about ``1e-13 |A|``: matrices that it then
    cannot solve with count as singular, which includes some that are only badly scaled.
    """

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`."""
        return _PardisoFactors(to_sparse(matrix), Log() if log is None else log, None)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`. Old factors stay valid: they are made again should they be asked for."""
        sparse = to_sparse(matrix)
        same = (
            isinstance(factorization, _PardisoFactors)
            and factorization.indices.shape == sparse.indices.shape
            and torch.equal(factorization.indices, sparse.indices)
            and factorization.rows == (sparse.values.shape[0] if sparse.values.dim() == 2 else 1)
        )
        return _PardisoFactors(sparse, factorization.log, factorization if same else None)  # type: ignore[arg-type]
