"""The differentiable linear solve: every order and transform, dense and sparse, one factorisation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

from adjoint import InvalidInput
from adjoint.linalg import GMRES, DenseLU, LinearOperator, SparseLU, SparseMatrix, linear_solve

FLAGS = list(itertools.product([False, True], repeat=2))


def matrix(dtype=torch.float64, rows=None):
    shape = (4, 4) if rows is None else (rows, 4, 4)
    return torch.randn(shape, dtype=dtype) + 4 * torch.eye(4, dtype=dtype)


def turned(A, transposed, conjugated):
    A = A.mT if transposed else A
    return A.conj() if conjugated else A


@pytest.mark.parametrize("transposed, conjugated", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_dense_derivatives(dtype, transposed, conjugated):
    def f(A, b):
        return linear_solve(A, b, transposed=transposed, conjugated=conjugated)

    for A, b in ((matrix(dtype), torch.randn(4, dtype=dtype)), (matrix(dtype, 2), torch.randn(2, 4, 3, dtype=dtype))):
        side = b if b.dim() != 1 else b.unsqueeze(-1)
        assert torch.allclose(f(A, b), torch.linalg.solve(turned(A, transposed, conjugated), side).reshape(b.shape))
        A.requires_grad_(), b.requires_grad_()
        assert torch.autograd.gradcheck(f, (A, b), check_forward_ad=True)
        if b.numel() < 8:
            assert torch.autograd.gradgradcheck(f, (A, b))


@pytest.mark.parametrize("transposed, conjugated", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_sparse_derivatives_live_on_the_pattern(dtype, transposed, conjugated):
    mask = (torch.rand(5, 5) < 0.4) | torch.eye(5, dtype=torch.bool)
    indices = mask.nonzero().T.contiguous()
    values = torch.randn(2, indices.shape[1], dtype=dtype) + 3 * (indices[0] == indices[1])
    b = torch.randn(2, 5, dtype=dtype)

    def f(values, b):
        return linear_solve(SparseMatrix(indices, values, (5, 5)), b, solver=SparseLU(), transposed=transposed, conjugated=conjugated)

    dense = SparseMatrix(indices, values, (5, 5)).dense()
    want = torch.linalg.solve(turned(dense, transposed, conjugated), b.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(f(values, b), want)
    values.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(f, (values, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (values, b))


@pytest.mark.parametrize("solver", [DenseLU(), SparseLU(), GMRES(rtol=1e-14)], ids=["lu", "sparse", "gmres"])
def test_second_and_third_order_in_every_nesting(solver):
    b = torch.randn(4)
    base, direction = matrix(), torch.randn(4, 4)

    def f(s):
        return linear_solve(base + s[0] * direction + s[1] * torch.eye(4), b * s.sum(), solver=solver).sin().sum()

    def truth(s):
        return (torch.linalg.inv(base + s[0] * direction + s[1] * torch.eye(4)) @ (b * s.sum())).sin().sum()

    s = torch.tensor([0.3, 0.7])
    want = hessian(truth)(s)
    for outer, inner in itertools.product([jacrev, jacfwd], repeat=2):
        assert torch.allclose(outer(inner(f))(s), want, rtol=1e-8)
    assert torch.allclose(jacfwd(jacfwd(jacfwd(f)))(s), jacrev(hessian(truth))(s), rtol=1e-7)


def test_one_factorisation_serves_all():
    A, b = matrix().requires_grad_(), torch.randn(4).requires_grad_()
    factors = DenseLU().factor(A.detach().unsqueeze(0))
    x = linear_solve(A, b, factorization=factors)
    g = torch.autograd.grad(x.square().sum(), (A, b), create_graph=True)
    torch.autograd.grad(g[0].square().sum() + g[1].sum(), (A, b))
    vmap(lambda side: linear_solve(A.detach(), side, factorization=factors))(torch.randn(5, 4))
    assert factors.log.n_factorizations == 1 and factors.log.n_solves >= 9


def test_vmap_over_each_and_both():
    A, b = matrix(rows=3), torch.randn(3, 4)
    want = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(vmap(linear_solve)(A, b), want)
    assert torch.allclose(vmap(lambda M: linear_solve(M, b[0]))(A), torch.linalg.solve(A, b[0]))
    assert torch.allclose(vmap(lambda side: linear_solve(A[0], side))(b), torch.linalg.solve(A[0], b.T).T)
    H = lambda M, side: hessian(lambda q: linear_solve(M, q * side).square().sum())(torch.ones(4))  # noqa: E731
    assert torch.allclose(vmap(H)(A, b), torch.stack([H(M, side) for M, side in zip(A, b, strict=True)]))
    J = vmap(jacrev(lambda M: linear_solve(M, b[0])))(A)
    assert torch.allclose(J, torch.stack([jacrev(lambda M: torch.linalg.inv(M) @ b[0])(M) for M in A]))


def test_jvp_and_vjp():
    A, b = matrix(), torch.randn(4)
    dA, db, w = torch.randn(4, 4), torch.randn(4), torch.randn(4)
    x, x_dot = jvp(linear_solve, (A, b), (dA, db))
    assert torch.allclose(x_dot, torch.linalg.solve(A, db - dA @ x))
    A_bar, b_bar = vjp(linear_solve, A, b)[1](w)
    assert torch.allclose((A_bar * dA).sum() + (b_bar * db).sum(), (w * x_dot).sum())


def test_operators_are_constants():
    A = matrix(rows=1)
    op = LinearOperator(4, 1, A.dtype, A.device, lambda v: v @ A[0].T, lambda v: v @ A[0])
    b = torch.randn(1, 4, requires_grad=True)
    assert torch.autograd.gradcheck(lambda b: linear_solve(op, b, solver=GMRES(rtol=1e-14)), b)


def test_bad_input():
    A = matrix()
    for wrong, match in (
        (lambda: linear_solve(torch.ones(3, 4), torch.ones(3)), "must be"),
        (lambda: linear_solve(A, torch.ones(3)), "shape"),
        (lambda: linear_solve(A, torch.ones(4, dtype=torch.float32)), "dtype"),
        (lambda: linear_solve(A, torch.ones(4, dtype=torch.int64)), "int64"),
        (lambda: linear_solve(A.expand(2, 4, 4), torch.ones(3, 4)), "shape"),
        (lambda: linear_solve(A, torch.ones(4), factorization=DenseLU().factor(torch.eye(3).unsqueeze(0))), "factorization"),
    ):
        with pytest.raises(InvalidInput, match=match):
            wrong()
