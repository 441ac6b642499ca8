"""Linear systems as differentiable functions, to any order, from one factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InvalidInput, UnsupportedCombination
from ..torch_internals import Node, below_jvp, copy_by_copy, is_functorch_wrapped_tensor, unwrap_if_dead
from .choice import default_solver
from .protocol import Factorization, LinearOperator, LinearSolver, Log, SparseMatrix

__all__ = ["linear_solve", "shared_solve"]


@dataclass(frozen=True)
class _Places:
    """What turns values into a matrix: nothing for a dense one, the places of the entries for a sparse one."""

    indices: Tensor | None
    shape: tuple[int, int]

    def matrix(self, values: Tensor) -> Tensor | SparseMatrix:
        """``(B, n, n)`` or ``(B, nnz)`` values as a matrix."""
        return values if self.indices is None else SparseMatrix(self.indices, values, self.shape)

    def product(self, values: Tensor, x: Tensor, transposed: bool, conjugated: bool) -> Tensor:
        """``op(A) x`` for ``x`` (B, n, k)."""
        if self.indices is not None:
            return SparseMatrix(self.indices, values, self.shape).matvec(x, transposed, conjugated)
        turned = values.mT if transposed else values
        return (turned.conj() if conjugated else turned) @ x

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """``sum_k left_k right_k^T``, ``(B, n, k)`` each, at the places of the values."""
        if self.indices is None:
            return left @ right.mT
        rows, columns = self.indices
        return (left.index_select(1, rows) * right.index_select(1, columns)).sum(-1)


@dataclass
class _Kept:
    """The factors of the values of one moment, made when first needed."""

    solver: LinearSolver | None
    places: _Places
    factors: Factorization | None = None
    key: Any = None
    log: Log = field(default_factory=Log)
    #: for copies under vmap
    mapped: dict[int, _Kept] = field(default_factory=dict)

    def at(self, values: Tensor) -> Factorization:
        """The factors of the matrix of these values."""
        key = (values.data_ptr(), tuple(values.shape), values._version)
        if self.factors is None or (self.key is not None and self.key != key):
            matrix = self.places.matrix(values.detach())
            self.factors = (default_solver(matrix) if self.solver is None else self.solver).factor(matrix, self.log)
            self.values = values  # alive as long as its address is the key
        self.key = key
        return self.factors


class _Solve(Node):
    """``apply(kept, transposed, conjugated, b, values)`` with ``b`` (B, n, k)."""

    @staticmethod
    def forward(kept: _Kept, transposed: bool, conjugated: bool, b: Tensor, values: Tensor) -> Tensor:
        return kept.at(values).solve(b, transposed=transposed, conjugated=conjugated)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.kept, ctx.transposed, ctx.conjugated, _, values = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output, values)
        ctx.save_for_forward(output, values)

    @staticmethod
    @copy_by_copy
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Any, ...]:
        if bar is None:
            return None, None, None, None, None
        x, values = (unwrap_if_dead(t) for t in ctx.saved_tensors)
        t, c = ctx.transposed, ctx.conjugated
        # b_bar = M^-H x_bar and M_bar = -b_bar x^H for M = op(A) (Giles 2008, section 2.3.1)
        b_bar = _Solve.apply(ctx.kept, not t, not c, bar, values)
        values_bar = None
        if ctx.needs_input_grad[4]:
            left, right = b_bar, x.conj()
            if t:
                left, right = right, left
            values_bar = -ctx.kept.places.outer(left, right)
            values_bar = values_bar.conj() if c else values_bar
        return None, None, None, b_bar, values_bar

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, ___: Any, b_dot: Tensor | None, values_dot: Tensor | None) -> Tensor:
        x, values = ctx.saved_tensors
        with below_jvp() as (lower, raise_):
            x, values = lower(x), lower(values)
            side = torch.zeros_like(x) if b_dot is None else lower(b_dot)
            if values_dot is not None:
                side = side - ctx.kept.places.product(lower(values_dot), x, ctx.transposed, ctx.conjugated)
            out = _Solve.apply(ctx.kept, ctx.transposed, ctx.conjugated, side, values)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], kept: _Kept, transposed: bool, conjugated: bool, b: Tensor, values: Tensor) -> Any:
        size = info.batch_size
        b_dim, values_dim = in_dims[3:]
        b = b.expand(size, *b.shape) if b_dim is None else b.movedim(b_dim, 0)
        rows, n, k = b.shape[1:]
        if values_dim is None:
            # one matrix, more right-hand sides
            sides = b.permute(1, 2, 0, 3).reshape(rows, n, size * k)
            out = _Solve.apply(kept, transposed, conjugated, sides, values)
            return out.reshape(rows, n, size, k), 2
        values = values.movedim(values_dim, 0)
        if size not in kept.mapped:
            kept.mapped[size] = _Kept(kept.solver, kept.places, log=kept.log)
        out = _Solve.apply(
            kept.mapped[size], transposed, conjugated, b.reshape(size * rows, n, k), values.reshape(size * rows, *values.shape[2:])
        )
        return out.reshape(size, rows, n, k), 0


def _depends(product: Tensor) -> bool:
    """Whether a product of an operator with a constant carries derivatives, of any kind and level."""
    wrapped = is_functorch_wrapped_tensor(product)
    return wrapped or product.requires_grad or forward_ad.unpack_dual(product).tangent is not None


def linear_solve(
    A: Tensor | SparseMatrix | LinearOperator,
    b: Tensor,
    *,
    solver: LinearSolver | None = None,
    factorization: Factorization | None = None,
    transposed: bool = False,
    conjugated: bool = False,
) -> Tensor:
    """``A^-1 b``, or with the transpose, the conjugate or the adjoint of ``A``; differentiable in ``A`` and ``b`` to any order.

    Every derivative uses the factors of the solution (``b_bar = A^-* x_bar``, ``A_bar = -b_bar x*`` on the pattern of ``A``; Giles 2008).

    Parameters
    ----------
    A : Tensor, SparseMatrix or LinearOperator
        ``(n, n)`` or ``(B, n, n)``; a sparse matrix by its values, differentiable in them. An operator is a constant: nothing tells how
        it depends on other tensors (`adjoint.solve_root` differentiates such systems).
    b : Tensor
        For one matrix ``(n,)`` or ``(n, k)``; for ``B`` of them, and for sparse matrices and operators, ``(B, n)`` or ``(B, n, k)``.
    solver : LinearSolver
        By default `default_solver`.
    factorization : Factorization
        Factors of this very ``A``, if there are any.

    Raises
    ------
    InvalidInput, UnsupportedCombination
        The latter for an operator whose products depend on tensors that are being differentiated.
    """
    if not isinstance(b, Tensor) or not (b.is_floating_point() or b.is_complex()):
        raise InvalidInput(f"b must be a floating or complex tensor, got {b!r}" if not isinstance(b, Tensor) else f"b has dtype {b.dtype}")
    one = isinstance(A, Tensor) and A.dim() == 2
    if isinstance(A, LinearOperator):
        if factorization is None:
            factorization = (default_solver(A) if solver is None else solver).factor(A)
        shape, n, values = (A.rows, A.n), A.n, b.new_zeros(A.rows, 0, 0)
        places = _Places(None, (n, n))
    elif isinstance(A, SparseMatrix):
        values = A.values if A.values.dim() == 2 else A.values.unsqueeze(0)
        shape, n, places = (values.shape[0], A.shape[0]), A.shape[0], _Places(A.indices, A.shape)
    elif isinstance(A, Tensor) and A.dim() in (2, 3) and A.shape[-1] == A.shape[-2]:
        values = A.unsqueeze(0) if one else A
        shape, n, places = (values.shape[0], A.shape[-1]), A.shape[-1], _Places(None, (A.shape[-1], A.shape[-1]))
    else:
        got = tuple(A.shape) if isinstance(A, Tensor) else type(A).__name__
        raise InvalidInput(f"A must be (n, n), (B, n, n), a SparseMatrix or a LinearOperator, got {got}")
    dtype = A.dtype
    if b.dtype != dtype:
        raise InvalidInput(f"b has dtype {b.dtype}, but A has {dtype}")
    if one:
        if b.dim() not in (1, 2) or b.shape[0] != n:
            raise InvalidInput(f"b must have shape ({n},) or ({n}, k) for one matrix, got {tuple(b.shape)}")
        sides = b.reshape(1, n, -1)
    else:
        if b.dim() not in (2, 3) or tuple(b.shape[:2]) != shape:
            raise InvalidInput(f"b must have shape {shape} or {(*shape, 'k')}, got {tuple(b.shape)}")
        sides = b if b.dim() == 3 else b.unsqueeze(-1)
    if factorization is not None and (factorization.rows, factorization.n) != shape:
        raise InvalidInput(f"the factorization is of {factorization.rows} matrices of size {factorization.n}, A of {shape[0]} of size {n}")
    if isinstance(A, LinearOperator) and _depends(A.matvec(torch.zeros(shape, dtype=dtype, device=A.device))):
        raise UnsupportedCombination(
            "the LinearOperator depends on differentiable tensors, whose derivatives would be lost: use solve_root, or detach these tensors"
        )
    kept = _Kept(solver, places, factorization)
    return _Solve.apply(kept, transposed, conjugated, sides, values).reshape(b.shape)


def shared_solve(matrix: Tensor, solver: LinearSolver) -> Callable[[Tensor], Tensor]:
    """``b -> A^-1 b`` for ``A`` (B, n, n) and ``b`` (B, n), differentiable as `linear_solve`: all solves share one factorisation."""
    kept = _Kept(solver, _Places(None, (matrix.shape[1], matrix.shape[2])))
    return lambda b: _Solve.apply(kept, False, False, b.unsqueeze(-1), matrix).squeeze(-1)
