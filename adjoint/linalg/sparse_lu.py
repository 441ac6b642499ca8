"""Sparse LU on the CPU by SciPy's SuperLU."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from .protocol import Factorization, LinearOperator, Log, Matrix, SparseMatrix, check_sides

if TYPE_CHECKING:
    import scipy.sparse as sp
    import scipy.sparse.linalg as spla

__all__ = ["ORDERINGS", "SparseLU", "to_sparse"]

ORDERINGS = ("auto", "MMD_AT_PLUS_A", "COLAMD", "MMD_ATA", "NATURAL")

#: backward error of a probe solve, in units of rounding, above which factors without pivoting are thrown away
_GOOD = 1e3


def to_sparse(matrix: Matrix) -> SparseMatrix:
    """A dense matrix by its entries that are not zero in every row of the batch; a sparse one as it is."""
    if isinstance(matrix, SparseMatrix):
        return matrix
    if isinstance(matrix, LinearOperator):
        raise UnsupportedCombination("an operator has no entries to factorise: give a Krylov solver such as adjoint.linalg.GMRES()")
    if matrix.dim() != 3:
        raise InvalidInput(f"matrices are factorised in batches, (B, n, n), got {tuple(matrix.shape)}")
    indices = (matrix != 0).any(0).nonzero().T.contiguous()
    return SparseMatrix(indices, matrix[:, indices[0], indices[1]], (matrix.shape[1], matrix.shape[2]))


class Pattern:
    """What depends on the places of the entries only: their order by columns, and whether the ordering for symmetric patterns fits."""

    def __init__(self, indices: Tensor, n: int) -> None:
        rows, columns = indices.cpu().numpy()
        self.n, self.indices = n, indices
        #: from the order of the entries to that by columns
        self.order = np.lexsort((rows, columns))
        self.rows = rows[self.order].astype(np.int32)
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(columns, minlength=n))]).astype(np.int32)
        both = np.intersect1d(rows * n + columns, columns * n + rows, assume_unique=True).size
        self.symmetric = rows.size > 0 and both >= 0.8 * rows.size and bool(np.isin(np.arange(n), rows[rows == columns]).all())

    def csc(self, values: np.ndarray) -> sp.csc_matrix:
        """The matrix of these values, which come in the order of the entries."""
        import scipy.sparse as sp

        return sp.csc_matrix((values[self.order], self.rows, self.starts), shape=(self.n, self.n))


class _SparseFactors(Factorization):
    def __init__(self, matrix: SparseMatrix, log: Log, solver: SparseLU, pattern: Pattern | None = None) -> None:
        start = time.perf_counter()
        n, m = matrix.shape
        if n != m:
            raise InvalidInput(f"only square matrices are factorised, got {matrix.shape}")
        values = matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)
        self.rows, self.n, self.dtype, self.device, self.log = values.shape[0], n, matrix.dtype, matrix.device, log
        self.pattern = Pattern(matrix.indices, n) if pattern is None else pattern
        each = values.detach().resolve_conj().cpu().numpy()
        self.factors = [_factor(self.pattern.csc(row), solver, self.pattern.symmetric) for row in each]
        log.n_factorizations += self.rows
        log.fill = sum(f.nnz for f in self.factors if f is not None)
        log.factor_seconds += time.perf_counter() - start

    def singular(self) -> Tensor:
        return torch.tensor([f is None for f in self.factors], dtype=torch.bool, device=self.device)

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        check_sides(self, b)
        self.log.n_solves += b.shape[0] * (b.shape[2] if b.dim() == 3 else 1)
        sides = b.detach().resolve_conj().resolve_neg().cpu().numpy()
        out = np.empty_like(sides)
        for k, side in enumerate(sides):
            factors = self.factors[0 if self.rows == 1 else k]
            out[k] = np.nan if factors is None else _solve(factors, side, transposed, conjugated)
        self.log.solve_seconds += time.perf_counter() - start
        return torch.from_numpy(out).to(b.device)


def _solve(factors: spla.SuperLU, side: np.ndarray, transposed: bool, conjugated: bool) -> np.ndarray:
    if side.size == 0:
        return side
    # SuperLU knows A, its transpose and its adjoint; the conjugate is that of the solution for the conjugated side
    if conjugated and not transposed and np.iscomplexobj(side):
        return factors.solve(side.conj()).conj()
    return factors.solve(side, "N" if not transposed else "H" if conjugated else "T")


def _factor(matrix: sp.csc_matrix, solver: SparseLU, symmetric: bool) -> spla.SuperLU | None:
    """None for a singular matrix."""
    if not np.isfinite(matrix.data).all():
        return None
    ordering, mode = solver.ordering, solver.symmetric_mode
    if ordering == "auto":
        ordering, mode = ("MMD_AT_PLUS_A", True if mode is None else mode) if symmetric else ("COLAMD", bool(mode))
    if mode and matrix.shape[0]:  # pyright: ignore[reportOptionalSubscript]
        # half the fill, but next to no pivoting: kept only where a probe says that it did no harm
        factors = _splu(matrix, ordering, True)
        if factors is not None and _backward_error(matrix, factors) < _GOOD * np.finfo(matrix.dtype).eps:
            return factors
    return _splu(matrix, "COLAMD" if mode and solver.ordering == "auto" else ordering, False)


def _splu(matrix: sp.csc_matrix, ordering: str, symmetric: bool) -> spla.SuperLU | None:
    import scipy.sparse.linalg as spla

    options = {"SymmetricMode": True} if symmetric else {}
    try:
        return spla.splu(matrix, permc_spec=ordering, diag_pivot_thresh=0.0 if symmetric else None, options=options)
    except RuntimeError as error:
        if "singular" in str(error).lower():
            return None
        raise


def _backward_error(matrix: sp.csc_matrix, factors: spla.SuperLU) -> float:
    """Of a probe solve: ``|A x - b| / (|A| |x| + |b|)``, largest component."""
    side = 1.0 + np.arange(matrix.shape[0]) % 7  # pyright: ignore[reportOptionalSubscript]
    side = side.astype(matrix.dtype)
    with np.errstate(all="ignore"):
        x = factors.solve(side)
        size = abs(matrix) @ abs(x) + abs(side)
        error = abs(matrix @ x - side) / size
    return float(error.max()) if np.isfinite(error).all() else np.inf


@dataclass(frozen=True)
class SparseLU:
    """LU of sparse matrices by SuperLU (Demmel et al. 1999), one after the other where there are several.

    Parameters
    ----------
    ordering : str
        "auto": minimum degree on ``A^T + A`` where the pattern is nearly symmetric, else "COLAMD"; or one of SuperLU's.
    symmetric_mode : bool or None
        Prefer diagonal pivots, which keeps the fill of a symmetric ordering down. None: with "auto" where the pattern allows it. Factors
        made so are checked by a probe solve, and made again with full pivoting if it is bad.
    """

    ordering: str = "auto"
    symmetric_mode: bool | None = None

    def __post_init__(self) -> None:
        if self.ordering not in ORDERINGS:
            raise InvalidInput(f"ordering must be one of {', '.join(ORDERINGS)}, got {self.ordering!r}")

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`. Dense matrices are taken by their entries; operators raise `UnsupportedCombination`."""
        return _SparseFactors(to_sparse(matrix), Log() if log is None else log, self)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`: the order of the entries is kept (SuperLU analyses anew)."""
        sparse = to_sparse(matrix)
        pattern = factorization.pattern if isinstance(factorization, _SparseFactors) else None
        same = pattern is not None and pattern.indices.shape == sparse.indices.shape and torch.equal(pattern.indices, sparse.indices)
        return _SparseFactors(sparse, factorization.log, self, pattern if same else None)
