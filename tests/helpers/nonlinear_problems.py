"""Root problems for the root finders themselves: flat batches, Jacobians by torch.func or by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjoint.linalg import SparseMatrix
from adjoint.nonlinear import RootProblem

EPS = torch.finfo(torch.float64).eps


def problem(single: Callable[[Tensor], Tensor], **settings: Any) -> RootProblem:
    """From a function of one system, (n,) to (m,)."""
    residual = torch.func.vmap(single)
    return RootProblem(residual=residual, jacobian=torch.func.vmap(torch.func.jacfwd(single)), **settings)


def row_problem(single: Callable[[Tensor, Tensor], Tensor], p: Tensor, **settings: Any) -> RootProblem:
    """From a function of one system and its own parameters, a row of ``p`` (B, ...)."""
    return RootProblem(
        residual=lambda x: torch.func.vmap(single)(x, p),
        jacobian=lambda x: torch.func.vmap(torch.func.jacfwd(single))(x, p),
        **settings,
    )


def sparse(p: RootProblem) -> Callable[[Tensor], SparseMatrix]:
    """The Jacobian of a problem on the pattern of its entries at a random point (of one sample)."""
    assert p.jacobian is not None
    dense = p.jacobian
    found: list[Tensor] = []

    def jacobian(x: Tensor) -> SparseMatrix:
        A = dense(x)
        assert isinstance(A, Tensor)
        if not found:
            probe = dense(torch.rand_like(x) + 0.1)
            assert isinstance(probe, Tensor)
            found.append((probe != 0).any(0).nonzero().T.contiguous())
        return SparseMatrix(found[0], A[:, found[0][0], found[0][1]], (A.shape[1], A.shape[2]))

    return jacobian


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def powell_singular(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def coupled(x: Tensor, p: Tensor) -> Tensor:
    return torch.stack([x[0] ** 3 + x[1] - p[0], x[1].exp() - x[0] - p[1]])
