"""Where the Jacobian of a function can have entries that are not zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .dependencies import trace_dependencies
from .tracing import PatternTooDense, Untraceable, check_size

__all__ = ["PatternTooDense", "SparsityPattern", "detect_pattern"]


@dataclass(frozen=True, eq=False)
class SparsityPattern:
    """Places of a matrix that may differ from zero: ``indices`` (2, nnz) int64 (row, column), each once, sorted by row and then by
    column."""

    indices: Tensor
    shape: tuple[int, int]

    @property
    def nnz(self) -> int:
        return self.indices.shape[1]

    @property
    def density(self) -> float:
        return self.nnz / max(self.shape[0] * self.shape[1], 1)

    @classmethod
    def from_scipy(cls, matrix: Any) -> SparsityPattern:
        """All stored entries of a SciPy sparse matrix, stored zeros too."""
        import scipy.sparse as sp

        csr: Any = sp.csr_array(matrix, copy=True)
        csr.sum_duplicates()  # sorts the columns as well
        coo = csr.tocoo()
        indices = np.stack([coo.row, coo.col]).astype(np.int64)
        return cls(torch.from_numpy(indices), (int(csr.shape[0]), int(csr.shape[1])))

    @classmethod
    def from_dense(cls, mask: Any) -> SparsityPattern:
        """The places of a dense ``(m, n)`` matrix that are not zero."""
        mask = torch.as_tensor(mask)
        if mask.dim() != 2:
            raise InvalidInput(f"a sparsity pattern is a matrix, but this one has shape {tuple(mask.shape)}")
        return cls((mask != 0).nonzero().T.contiguous(), (mask.shape[0], mask.shape[1]))

    @classmethod
    def from_any(cls, value: Any, shape: tuple[int, int] | None = None) -> SparsityPattern:
        """From what users give as ``jac_sparsity``: a `SparsityPattern`, a dense array or tensor, a torch sparse tensor (COO, CSR, CSC) or
        a SciPy sparse matrix. Stored entries of sparse formats count even when they are zero. Raises `InvalidInput` if ``shape`` is not
        met."""
        import scipy.sparse as sp

        if isinstance(value, cls):
            pattern = value
        elif isinstance(value, Tensor) and value.layout != torch.strided:
            coo = value.detach().to_sparse_coo()
            if coo.dim() != 2 or coo.dense_dim() != 0:
                raise InvalidInput(
                    f"jac_sparsity must be a matrix, but has shape {tuple(coo.shape)} ({coo.dense_dim()} of the dimensions dense)"
                )
            row, column = coo._indices().cpu().numpy()
            pattern = cls.from_scipy(sp.coo_array((np.ones(len(row), bool), (row, column)), shape=tuple(coo.shape)))
        elif sp.issparse(value):
            pattern = cls.from_scipy(value)
        elif isinstance(value, (Tensor, np.ndarray, list, tuple)):
            pattern = cls.from_dense(value)
        else:
            raise InvalidInput(f"jac_sparsity must be a tensor, an array or a SciPy sparse matrix, not {type(value).__name__}")
        if shape is not None and pattern.shape != tuple(shape):
            raise InvalidInput(f"jac_sparsity has shape {pattern.shape}, but the Jacobian has shape {tuple(shape)}")
        return pattern

    def transpose(self) -> SparsityPattern:
        rows, columns = self.indices
        order = torch.argsort(columns * self.shape[0] + rows)
        return SparsityPattern(self.indices.flip(0)[:, order], (self.shape[1], self.shape[0]))

    def to_scipy(self) -> Any:
        """Boolean ``scipy.sparse.csr_array``."""
        import scipy.sparse as sp

        rows, columns = self.indices.cpu().numpy()
        return sp.csr_array((np.ones(self.nnz, bool), (rows, columns)), shape=self.shape)

    def to(self, device: torch.device | str) -> SparsityPattern:
        return SparsityPattern(self.indices.to(device), self.shape)

    def contains(self, other: SparsityPattern) -> bool:
        """Whether every place of ``other`` is one of this pattern."""
        if self.shape != other.shape:
            return False
        key = self.indices[0] * self.shape[1] + self.indices[1]
        return bool(torch.isin(other.indices[0] * self.shape[1] + other.indices[1], key).all())


def detect_pattern(
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    n_rows: int | None = None,
    method: str = "auto",
    probes: int = 3,
    parameters: Sequence[Tensor] = (),
) -> SparsityPattern:
    """The pattern of ``df/dx``, never too small for the operators that ran.

    ``f`` maps ``(n,)`` to ``(m,)``, or ``(B, n)`` to ``(B, m)`` with independent rows: then one row is looked at, or all if ``f``
    holds tensors of all rows. ``n_rows`` is the ``m`` that is expected (checked).

    Methods:

    - ``"trace"``: ``f`` runs once while index sets follow its operators. Accidental zeros at ``x`` do not matter: only zeros of constants
      in matrix products and convolutions do, unless these come from ``parameters`` or require grad. A function whose branches, masks or
      indices depend on ``x`` raises `InvalidInput`.
    - ``"numeric"``: where the Jacobian is not zero at any of ``probes`` random points near ``x``. ``n`` products with the Jacobian a point,
      and an entry that is zero at all these points is missed.
    - ``"auto"``: the first, and where it cannot be used the second, with a warning.

    What leaves PyTorch (``.numpy()``, ``.tolist()``) is not seen, as it is not by automatic differentiation.
    Values that ``f`` gets from elsewhere than ``x`` may change after detection if they are in ``parameters``.
    Raises `PatternTooDense` when the pattern has more entries than are worth keeping.
    """
    if method not in ("auto", "trace", "numeric"):
        raise InvalidInput(f"method={method!r}: use 'auto', 'trace' or 'numeric'")
    if x.dim() not in (1, 2) or (x.dim() == 2 and x.shape[0] == 0):
        raise InvalidInput(f"x has shape {tuple(x.shape)}: (n,) or (B, n) with B > 0 is expected")
    x = x.detach()
    if method == "numeric":
        return _checked(_probe(f, x, probes), n_rows)
    try:
        return _checked(_trace(f, x, parameters), n_rows)
    except Untraceable as error:
        if method == "trace":
            raise InvalidInput(f"the sparsity of f cannot be traced: {error}; use method='numeric' or give the pattern") from error
        if x.shape[-1] > _TOO_MANY_TO_PROBE:
            why = f"the sparsity of f cannot be traced: {error}; with {x.shape[-1]} unknowns it is not probed: give the pattern"
            raise InvalidInput(why) from error
        warnings.warn(
            f"the sparsity of f cannot be traced ({error}), so it is found from Jacobians at {probes} random points: "
            "give jac_sparsity if entries can be zero there",
            stacklevel=2,
        )
        return _checked(_probe(f, x, probes), n_rows)


#: beyond this many unknowns ``method="auto"`` does not try one product with the Jacobian for each
_TOO_MANY_TO_PROBE = 20_000


def _trace(f: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> SparsityPattern:
    import scipy.sparse as sp

    if x.dim() == 2 and x.shape[0] > 1 and _takes_one_row(f, x):
        x = x[:1]
    if x.dim() == 1 or x.shape[0] == 1:
        return SparsityPattern.from_scipy(trace_dependencies(f, x, parameters)[0])
    coo = trace_dependencies(f, x, parameters)[0].tocoo()
    b, n = x.shape
    m = coo.shape[0] // b
    own = coo.row // m == coo.col // n  # others come from operators that count as dense: the rows of f are independent
    pairs = (coo.row[own] % m, coo.col[own] % n)
    return SparsityPattern.from_scipy(sp.coo_array((np.ones(int(own.sum()), bool), pairs), shape=(m, n)))


def _checked(pattern: SparsityPattern, n_rows: int | None) -> SparsityPattern:
    if n_rows is not None and pattern.shape[0] != n_rows:
        raise InvalidInput(f"f returns {pattern.shape[0]} elements, but n_rows={n_rows}")
    return pattern


def _takes_one_row(f: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether ``f`` may be run on the first row alone, or holds tensors of all rows."""
    try:
        with torch.no_grad():
            return f(x[:1]).shape[0] == 1
    except Exception:  # a fault that is not due to the missing rows shows again with all of them
        return False


def _probe(f: Callable[[Tensor], Tensor], x: Tensor, probes: int, seed: int = 0) -> SparsityPattern:
    """Nonzeros of the Jacobians at ``x`` and at random points near it, in any row of ``x``. Not finite counts as nonzero."""
    import scipy.sparse as sp

    generator = torch.Generator().manual_seed(seed)
    n, total = x.shape[-1], None
    chunk = max(1, min(n, 2**22 // max(x.numel(), 1)))
    for k in range(probes + 1):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        point = x if k == 0 else x + noise * (1e-3 * 10.0 ** (k - 1)) * (1 + x.abs())
        blocks = []
        for start in range(0, n, chunk):
            stop = min(start + chunk, n)
            basis = torch.zeros(stop - start, n, dtype=x.dtype, device=x.device)
            basis[torch.arange(stop - start), torch.arange(start, stop)] = 1.0
            found = _columns(f, point, basis) != 0
            found = found.any(1) if x.dim() == 2 else found
            blocks.append(sp.csr_array(found.cpu().numpy()))
        columns_first: Any = sp.csr_array(sp.vstack(blocks, format="csr"))
        check_size(columns_first.nnz)
        total = columns_first if total is None else total + columns_first
    assert total is not None
    return SparsityPattern.from_scipy(sp.csr_array(total.T))


def _columns(f: Callable[[Tensor], Tensor], point: Tensor, basis: Tensor) -> Tensor:
    def column(v: Tensor) -> Tensor:
        return torch.func.jvp(f, (point,), (v.expand_as(point),))[1]

    try:
        return torch.vmap(column)(basis)
    except RuntimeError:  # functions that cannot be mapped; if f is at fault, it will say so again
        return torch.stack([column(v) for v in basis])
