"""Sparse Jacobians by compressed products, Jacobians that the user gives, and the choice of a strategy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg.coloring import Coloring, color_pattern
from ..linalg.protocol import Matrix, SparseMatrix
from ..linalg.sparsity import PatternTooDense, SparsityPattern, detect_pattern
from ..torch_internals import temporarily_clear_interpreter_stack
from .jacobians import (
    DenseJacobian,
    Function,
    JacobianStrategy,
    check_rows,
    forward_products,
    in_transform,
    jvp,
    must_differentiate,
    reverse_products,
)

__all__ = ["GivenJacobian", "SparseJacobian", "agrees", "choose_jacobian"]

#: elements of all tangents of one call of f, unless ``chunk_size`` says otherwise
_CHUNK_ELEMENTS = 2**25
#: below this many unknowns dense algebra wins, and from the second on sparsity is not searched by probing
_SMALL, _TOO_MANY_TO_PROBE = 100, 20_000
#: entries of a dense matrix that are not attempted (8 GiB in double precision)
_TOO_LARGE = 2**30


class SparseJacobian:
    """Entries of a known pattern from one product for each colour: ``(f, x) -> SparseMatrix`` with values ``(B, nnz)``.

    Columns of one colour share a jvp (rows a vjp, if the colouring is by rows); all products are one vmapped call, in chunks of
    ``chunk_size``. Entries are gathered, never scattered, so results are deterministic. ``differentiable`` as for `DenseJacobian`.
    Entries of the Jacobian outside of the pattern would be added to others: `check` looks for them.
    """

    def __init__(
        self,
        pattern: SparsityPattern,
        coloring: Coloring | None = None,
        *,
        chunk_size: int | None = None,
        differentiable: bool | None = None,
    ) -> None:
        self.pattern = pattern
        with temporarily_clear_interpreter_stack():  # a pattern is no subject of transforms around us
            self._set_up(pattern, coloring)
        self.chunk_size, self.differentiable = chunk_size, differentiable
        self._kept: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def _set_up(self, pattern: SparsityPattern, coloring: Coloring | None) -> None:
        self.coloring = color_pattern(pattern) if coloring is None else coloring
        lines = pattern.shape[0] if self.coloring.by_rows else pattern.shape[1]
        if self.coloring.colors.shape != (lines,):
            raise InvalidInput(
                f"the colouring has {self.coloring.colors.numel()} colours for {lines} {'rows' if self.coloring.by_rows else 'columns'}"
            )
        if coloring is not None and not coloring.valid(pattern):
            raise InvalidInput("the colouring is not one of this pattern: two lines of one colour meet")
        self._places = self._gather_places()

    def __call__(self, f: Function, x: Tensor) -> SparseMatrix:
        m, n = self.pattern.shape
        if x.dim() != 2 or x.shape[1] != n:
            raise InvalidInput(f"x has shape {tuple(x.shape)}, but the pattern of the Jacobian has {n} columns: (B, {n}) is expected")
        indices, seeds, places = self._on(x)
        chunk = self.chunk_size or max(1, _CHUNK_ELEMENTS // max(x.shape[0] * max(m, n), 1))
        differentiable = must_differentiate(self.differentiable)
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
            if self.coloring.by_rows:
                products = reverse_products(f, x, seeds, chunk, differentiable)
            else:
                products = forward_products(f, x, seeds, chunk, differentiable)
        lines = n if self.coloring.by_rows else m
        if products.shape[1:] != (x.shape[0], lines):
            raise InvalidInput(f"f maps {tuple(x.shape)} to {tuple(products.shape[1:])}, but the pattern has shape {self.pattern.shape}")
        values = products.movedim(0, 1).reshape(x.shape[0], -1).index_select(1, places)
        return SparseMatrix(indices, values, self.pattern.shape)

    def check(self, f: Function, x: Tensor) -> bool:
        """Whether the pattern has all entries of the Jacobian, by a product in a random direction at a random point near ``x``."""
        return agrees(self, f, x)

    def _gather_places(self) -> Tensor:
        """Where among the products (colour first) each entry is found."""
        rows, columns = self.pattern.indices.cpu()
        m, n = self.pattern.shape
        return self.coloring.colors[rows] * n + columns if self.coloring.by_rows else self.coloring.colors[columns] * m + rows

    def _on(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = (x.device, x.dtype)
        if key not in self._kept:
            with temporarily_clear_interpreter_stack():
                colors = self.coloring.colors
                seeds = colors == torch.arange(self.coloring.n_colors).unsqueeze(1)
                self._kept[key] = (self.pattern.indices.to(x.device), seeds.to(x.device, x.dtype), self._places.to(x.device))
        return self._kept[key]


class GivenJacobian:
    """The user's own Jacobian. ``jac(x)`` for ``x`` (B, n) returns one of

    - a dense tensor ``(B, m, n)``, or ``(m, n)`` for ``B = 1``;
    - a torch sparse matrix ``(m, n)`` (COO, CSR, CSC) for ``B = 1``;
    - a `SparseMatrix`;
    - with ``pattern``: the values ``(B, nnz)`` (``(nnz,)`` for ``B = 1``) of its entries in order, or a dense tensor that is zero
      elsewhere.

    ``jac`` may also be a tensor: one constant matrix, dense or sparse, that all rows share. Bind further arguments beforehand.
    ``n_rows`` is ``m`` (default: square). Wrong shapes and types raise `InvalidInput`.
    """

    def __init__(self, jac: Callable[[Tensor], Any] | Tensor, pattern: SparsityPattern | None = None, *, n_rows: int | None = None) -> None:
        if not callable(jac) and not isinstance(jac, Tensor):
            raise InvalidInput(f"jac must be a function or a tensor, not {type(jac).__name__}")
        self.jac, self.pattern, self.n_rows = jac, pattern, n_rows
        self._checked = False

    def __call__(self, f: Function, x: Tensor) -> Matrix:
        b, n = x.shape
        shape = (n if self.n_rows is None else self.n_rows, n)
        constant = isinstance(self.jac, Tensor)
        found = self.jac if isinstance(self.jac, Tensor) else self.jac(x)
        if isinstance(found, SparseMatrix):
            self._agree(found.shape == shape and found.values.shape[:-1] in ((), (b,)), "a SparseMatrix of shape", found.shape, b, shape)
            return found
        if not isinstance(found, Tensor):
            raise InvalidInput(f"jac returned {type(found).__name__}, but a tensor or a SparseMatrix is expected")
        if found.dtype != x.dtype or found.device != x.device:
            raise InvalidInput(f"jac returned {found.dtype} on {found.device}, but x is {x.dtype} on {x.device}")
        if found.layout != torch.strided:
            self._agree(tuple(found.shape) == shape and (b == 1 or constant), "a sparse tensor of shape", found.shape, b, shape)
            return _from_torch_sparse(found, b)
        if self.pattern is not None and tuple(found.shape) in ((b, self.pattern.nnz), (self.pattern.nnz,)) and (found.dim() == 2 or b == 1):
            self._agree(self.pattern.shape == shape, "values for a pattern of shape", self.pattern.shape, b, shape)
            return SparseMatrix(self.pattern.indices.to(x.device), found.reshape(b, -1), shape)
        if found.dim() == 2 and (b == 1 or constant):
            found = found.unsqueeze(0).expand(b, -1, -1)
        self._agree(tuple(found.shape) == (b, *shape), "a tensor of shape", found.shape, b, shape)
        return found if self.pattern is None else self._from_dense(found, self.pattern, shape)

    def _from_dense(self, found: Tensor, pattern: SparsityPattern, shape: tuple[int, int]) -> SparseMatrix:
        if pattern.shape != shape:
            raise InvalidInput(f"the pattern has shape {pattern.shape}, but the Jacobian has shape {shape}")
        rows, columns = pattern.indices.to(found.device)
        if not self._checked and not in_transform():
            outside = found.detach().clone()
            outside[:, rows, columns] = 0
            if bool((outside != 0).any()):
                raise InvalidInput("jac returned entries outside of jac_sparsity: give a pattern that has them, or none")
            self._checked = True
        return SparseMatrix(pattern.indices.to(found.device), found[:, rows, columns], shape)

    def _agree(self, right: bool, what: str, got: Any, b: int, shape: tuple[int, int]) -> None:
        if right:
            return
        message = f"jac returned {what} {tuple(got)}, but the Jacobian of {b} rows has shape {(b, *shape)}"
        if self.pattern is not None:
            message += f" and the values of its pattern have shape {(b, self.pattern.nnz)}"
        elif b > 1 and "sparse" in what:
            message += "; for several rows return the values of a fixed pattern (jac_sparsity)"
        raise InvalidInput(message)


def _from_torch_sparse(matrix: Tensor, b: int) -> SparseMatrix:
    coo = matrix.to_sparse_coo().coalesce()
    values = coo.values()
    return SparseMatrix(coo.indices(), values.unsqueeze(0) if b == 1 else values, (matrix.shape[0], matrix.shape[1]))


def agrees(strategy: JacobianStrategy, f: Function, x: Tensor, seed: int = 0, spread: float = 1e-3) -> bool:
    """Whether ``J v`` from the entries is the jvp of ``f``, for a random ``v`` and a random point near ``x`` (at it for ``spread`` 0)."""
    generator = torch.Generator().manual_seed(seed)
    noise, real, imaginary = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for _ in range(3))
    point = x.detach() + spread * noise * (1 + x.detach().abs()) if spread else x.detach()
    v = real + 1j * imaginary if x.is_complex() else real
    with torch.no_grad():
        matrix = strategy(f, point)
        try:
            # of real numbers by plain autograd, many times as quick; of complex ones forward, where conventions do not matter
            true = jvp(f, point, v, x.is_complex())
        except RuntimeError:  # functions of CSR matrices, which no transform takes
            true = jvp(f, point, v, False)
        if isinstance(matrix, SparseMatrix):
            mine, scale = matrix.matvec(v), SparseMatrix(matrix.indices, matrix.values.abs(), matrix.shape).matvec(v.abs())
        elif isinstance(matrix, Tensor):
            mine, scale = (matrix @ v.unsqueeze(-1)).squeeze(-1), (matrix.abs() @ v.abs().unsqueeze(-1)).squeeze(-1)
        else:
            mine, scale = matrix.matvec(v), true.abs()
    close = (mine - true).abs() <= torch.finfo(x.dtype).eps ** 0.5 * scale
    return bool((close | ~torch.isfinite(true)).all())


def choose_jacobian(
    f: Function, x: Tensor, jac: Any = None, jac_sparsity: Any = None, parameters: Sequence[Tensor] = ()
) -> tuple[JacobianStrategy, str]:
    """A strategy for ``f`` near ``x`` (B, n), and in one line why.

    The user's ``jac`` and ``jac_sparsity`` come first. Otherwise: dense up to 100 unknowns, or where tracing finds that sparsity does not
    pay. Patterns and given Jacobians are checked by a random product: a given pattern that fails raises `InvalidInput`, a traced one is
    replaced by a numerical one, for a given Jacobian there is a warning. ``parameters``: values of ``f`` that may change later (see
    `detect_pattern`). A matrix that would be dense and too large raises `UnsupportedCombination`.
    """
    n = x.shape[1]
    with torch.no_grad():
        m = check_rows(f(x), x).shape[1]
    pattern = None if jac_sparsity is None else SparsityPattern.from_any(jac_sparsity, (m, n))
    if jac is not None:
        given = GivenJacobian(jac, pattern, n_rows=m)
        if not agrees(given, f, x):
            warnings.warn("jac is not the Jacobian of f: Newton steps will be poor, and implicit derivatives wrong", stacklevel=2)
        return given, "the given Jacobian" + (f" with {pattern.nnz} entries" if pattern else "")
    if pattern is not None:
        sparse = SparseJacobian(pattern)
        if not sparse.check(f, x):
            raise InvalidInput("jac_sparsity lacks entries that the Jacobian has: a product with the Jacobian shows it")
        return sparse, f"the given pattern: {_describe(sparse)}"
    if n <= _SMALL:
        return DenseJacobian(), f"dense: only {n} unknowns"
    try:
        pattern = detect_pattern(f, x, parameters=parameters)
    except PatternTooDense as error:
        return _dense(m, n, str(error))
    if pattern.density > 0.2:
        return _dense(m, n, f"{100 * pattern.density:.0f} % of the entries can be nonzero")
    sparse = SparseJacobian(pattern)
    if not sparse.check(f, x):
        warnings.warn("the traced sparsity pattern fails its check, so it is found numerically", stacklevel=2)
        if n > _TOO_MANY_TO_PROBE:
            raise UnsupportedCombination(f"n={n} is too large to find the sparsity numerically: give jac_sparsity or jac")
        sparse = SparseJacobian(detect_pattern(f, x, method="numeric"))
        if not sparse.check(f, x):
            return _dense(m, n, "no sparsity pattern passes the check")
    if sparse.coloring.n_colors > n // 2:
        return _dense(m, n, f"{sparse.coloring.n_colors} colours for {n} columns")
    return sparse, _describe(sparse)


def _dense(m: int, n: int, why: str) -> tuple[JacobianStrategy, str]:
    if m * n > _TOO_LARGE:
        raise UnsupportedCombination(
            f"a dense Jacobian of {m} x {n} entries is too large ({why}): "
            "give jac or jac_sparsity, or use jacobian_operator with a Krylov solver"
        )
    return DenseJacobian(), f"dense: {why}"


def _describe(sparse: SparseJacobian) -> str:
    kind = "vjp" if sparse.coloring.by_rows else "jvp"
    return f"sparse: {sparse.pattern.nnz} entries ({100 * sparse.pattern.density:.2g} %) from {sparse.coloring.n_colors} {kind}s"
