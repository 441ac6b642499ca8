"""Preconditioners of Krylov methods: approximate inverses, also of the transposed matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from .protocol import Factorization, LinearOperator, Log, Matrix, SparseMatrix
from .sparse_lu import Pattern, to_sparse

__all__ = ["ILU", "Preconditioner", "make_preconditioner", "needs_entries"]

#: ``M(v, transposed)``: the approximate inverse, or that of the transposed matrix, on ``(B, n)``
Preconditioner = Callable[[Tensor, bool], Tensor]


@dataclass(frozen=True)
class ILU:
    """Settings of SciPy's incomplete LU (`scipy.sparse.linalg.spilu`)."""

    drop_tol: float = 1e-4
    fill_factor: float = 10.0


def _cast(v: Tensor, dtype: torch.dtype) -> Tensor:
    return v.to(dtype) if v.is_complex() == dtype.is_complex else v


def _same(v: Tensor, transposed: bool) -> Tensor:
    return v


def make_preconditioner(what: Any, matrix: Matrix, log: Log) -> Preconditioner:
    """From the setting of a Krylov method to a function."""
    if what is None:
        return _same
    if isinstance(what, Factorization):
        # factors in lower precision will do
        return lambda v, transposed: what.solve(_cast(v, what.dtype), transposed=transposed).to(v.dtype)
    if isinstance(what, (str, ILU)):
        if isinstance(matrix, LinearOperator):
            raise UnsupportedCombination(
                f"preconditioner={what!r} needs a matrix with entries, not an operator: give jac_sparsity, or a callable M(v, transposed)"
            )
        if what == "jacobi":
            return _jacobi(matrix)
        if what == "ilu" or isinstance(what, ILU):
            return _incomplete(matrix, ILU() if isinstance(what, str) else what)
    if callable(what):
        return what  # pyright: ignore[reportReturnType]
    raise InvalidInput(f"preconditioner must be None, 'jacobi', 'ilu', an ILU, a Factorization or a callable, got {what!r}")


def needs_entries(what: Any) -> bool:
    """Whether a preconditioner is made from the entries of the matrix."""
    return isinstance(what, (str, ILU))


def _jacobi(matrix: Any) -> Preconditioner:
    if isinstance(matrix, SparseMatrix):
        on = matrix.indices[0] == matrix.indices[1]
        values = matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)
        diagonal = values.new_zeros(values.shape[0], matrix.shape[0]).index_add(1, matrix.indices[0][on], values[:, on])
    else:
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    bad = (diagonal == 0).any(-1)
    if bad.numel() and bool(bad.all()):
        raise InvalidInput("preconditioner='jacobi' needs a diagonal without zeros: use 'ilu'")
    diagonal = torch.where(bad.unsqueeze(-1), float("nan"), diagonal)
    return lambda v, transposed: v / diagonal


def _incomplete(matrix: Any, settings: ILU) -> Preconditioner:
    import scipy.sparse.linalg as spla

    sparse = to_sparse(matrix)
    pattern = Pattern(sparse.indices, sparse.shape[0])
    values = sparse.values if sparse.values.dim() == 2 else sparse.values.unsqueeze(0)
    factors: list[spla.SuperLU | None] = []
    failure: RuntimeError | None = None
    for row in values.detach().resolve_conj().resolve_neg().cpu().numpy():
        factors.append(None)
        if np.isfinite(row).all():
            try:
                factors[-1] = spla.spilu(pattern.csc(row), drop_tol=settings.drop_tol, fill_factor=settings.fill_factor)
            except RuntimeError as error:
                failure = error
    if failure is not None and all(f is None for f in factors):
        message = f"the incomplete LU factorisation failed: {failure}; try a smaller drop_tol or a larger fill_factor"
        raise InvalidInput(message) from failure

    def apply(v: Tensor, transposed: bool) -> Tensor:
        sides = v.detach().resolve_conj().resolve_neg().cpu().numpy()
        out = np.full_like(sides, np.nan)  # what rows without factors give, so that they fail alone
        for k, side in enumerate(sides):
            mine = factors[0 if len(factors) == 1 else k]
            if mine is not None and np.isfinite(side).all():
                out[k] = mine.solve(side, "T" if transposed else "N")
        return torch.from_numpy(out).to(v.device)

    return apply
