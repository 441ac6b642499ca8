"""The matrices of implicit stages, from Jacobians in any of their forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg import LinearOperator, Matrix, SparseMatrix
from ..system.jacobians import must_differentiate, plain_push
from ..system.stage_jacobian import StageJacobian

__all__ = ["complex_shifted", "jacobian_at", "mass_product", "shifted", "tangent"]

Flat = Callable[[Tensor, Tensor], Tensor]


def shifted(matrix: Matrix, hd: Tensor, mass: Tensor | None = None) -> Matrix:
    """``I - hd J``, or ``M - hd J`` with ``mass`` (1 or B, n, n), for ``hd`` of shape ``(B, 1)``; ``I`` in rows where ``hd`` is zero."""
    if isinstance(matrix, SparseMatrix):
        # the diagonal is made part of the pattern by whoever made the matrix
        on = (matrix.indices[0] == matrix.indices[1]).to(matrix.dtype)
        if mass is not None:
            # as is whatever else is not zero in the mass matrix
            on = torch.where(hd == 0, on, mass[:, matrix.indices[0], matrix.indices[1]])
        return SparseMatrix(matrix.indices, on - hd * matrix.values, matrix.shape)
    if isinstance(matrix, LinearOperator):
        inner, outer = matrix.matvec, matrix.rmatvec
        return LinearOperator(
            matrix.n,
            matrix.rows,
            matrix.dtype,
            matrix.device,
            lambda v: mass_product(mass, v, hd) - hd * inner(v),
            None if outer is None else lambda v: mass_product(None if mass is None else mass.mT, v, hd) - hd * outer(v),
        )
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    if mass is not None:
        eye = torch.where((hd == 0).unsqueeze(-1), eye, mass)
    return eye - hd.unsqueeze(-1) * matrix


def mass_product(mass: Tensor | None, v: Tensor, hd: Tensor | None = None) -> Tensor:
    """``M v`` for ``v`` (..., B, n); ``v`` without a matrix, and in rows where ``hd`` is zero (a singular one would not do there)."""
    if mass is None:
        return v
    product = (mass @ v.unsqueeze(-1)).squeeze(-1)
    return product if hd is None else torch.where(hd == 0, v, product)


def jacobian_at(jacobian: Callable[..., Matrix], f: Flat, t: Tensor, y: Tensor) -> Matrix:
    """``f_y(t, y)`` by a strategy; one that knows what to do with the time is told it."""
    return jacobian.at(f, t, y) if isinstance(jacobian, StageJacobian) else jacobian(lambda x: f(t, x), y)


def tangent(function: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """The derivative of a function of ``(B,)`` times, by two reverse sweeps: forward mode does not nest with a user's dual level.

    Where nobody differentiates it they are those of plain autograd, beside which ``function`` may take derivatives itself.
    """
    if not must_differentiate(None):
        found = plain_push(function, t, torch.ones_like(t).unsqueeze(0))
        if found is not None:
            return found[0]
    out, pull, *_ = torch.func.vjp(function, t)
    _, push, *_ = torch.func.vjp(pull, torch.zeros_like(out))
    return push((torch.ones_like(t),))[0]


def complex_shifted(matrix: Matrix, hd: Tensor) -> Matrix:
    """``I - hd J`` for complex ``hd`` (B, 1)."""
    if not isinstance(matrix, LinearOperator):
        return shifted(matrix, hd)
    product, is_complex = matrix.matvec, matrix.dtype.is_complex

    def matvec(v: Tensor) -> Tensor:
        return v - hd * (product(v) if is_complex else torch.complex(product(v.real), product(v.imag)))

    return LinearOperator(matrix.n, matrix.rows, hd.dtype, matrix.device, matvec)
