"""Continuation round folds, conserved totals, and what is said of singular Jacobians."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.linalg import DenseLU, LinearOperator, SparseMatrix
from adjoint.nonlinear import (
    BranchProblem,
    Continuation,
    Newton,
    RootProblem,
    RootStatus,
    border_problem,
    explain,
    left_null_vectors,
    replace_rows,
    right_null_vectors,
)
from adjoint.nonlinear.protocol import ill_determined

from ..helpers.nonlinear_problems import problem, sparse
from ..helpers.steady_problems import bratu

FOLD = 3.51383071912516121  # of the continuous problem


def bratu_branch(n, **settings):
    F = bratu(n)
    residual = torch.func.vmap(F)
    jacobian = torch.func.vmap(torch.func.jacfwd(F))
    return BranchProblem(residual=residual, jacobian=jacobian, **settings)


def middle(lam, upper):
    """u(1/2) of the continuous problem, from theta = sqrt(2 lam) cosh(theta / 4)."""
    g = lambda theta: theta - np.sqrt(2 * lam) * np.cosh(theta / 4)  # noqa: E731
    top = 4.79871456103093737  # theta at the fold
    theta = scipy.optimize.brentq(g, top, 40.0, xtol=1e-14) if upper else scipy.optimize.brentq(g, 0.0, top, xtol=1e-14)
    return 2 * np.log(np.cosh(theta / 4))


@pytest.mark.parametrize("given", [False, True])
def test_bratu_fold_and_upper_branch(given):
    n = 31
    F = bratu(n)
    derivative = torch.func.vmap(torch.func.jacfwd(F, argnums=1)) if given else None
    branch = Continuation(max_points=100, max_step=0.4).trace(bratu_branch(n, lam_derivative=derivative), torch.zeros(n), 1.0, 5.0, 1)
    assert len(branch.folds) == 1
    fold = branch.folds[0]
    assert abs(float(fold.lam) - FOLD) < 2e-6
    k = fold.after
    assert float(branch.tangents[k, -1]) > 0 > float(branch.tangents[k + 1, -1])
    assert float(fold.lam) >= float(branch.lam.max())
    for i in (2, branch.lam.numel() - 1):
        want = middle(float(branch.lam[i]), upper=i > k)
        assert abs(float(branch.x[i, n // 2]) - want) < 1e-3 * want
    # back to the interval's other end on the upper branch
    assert branch.status == "end" and float(branch.lam[-1]) == pytest.approx(1.0) and float(branch.x[-1].max()) > 3
    worst = torch.func.vmap(F)(branch.x, branch.lam).abs().max()
    assert float(worst) < 1e-7


def test_the_fold_converges_with_the_fourth_power_of_the_grid():
    errors = []
    for n in (15, 31):
        branch = Continuation(max_points=60, max_step=0.4).trace(bratu_branch(n), torch.zeros(n), 2.0, 5.0)
        errors.append(abs(float(branch.folds[0].lam) - FOLD))
    assert 12 < errors[0] / errors[1] < 20


def test_natural_continuation_stops_at_the_fold_and_reaches_an_end():
    n = 15
    stopped = Continuation(kind="natural").trace(bratu_branch(n), torch.zeros(n), 1.0, 5.0)
    assert stopped.status == "step_too_small" and not stopped.success
    assert FOLD - 1e-2 < float(stopped.lam[-1]) < FOLD + 1e-3 and not stopped.folds
    ended = Continuation(kind="natural").trace(bratu_branch(n), torch.zeros(n), 1.0, 3.0)
    assert ended.status == "end" and float(ended.lam[-1]) == pytest.approx(3.0, abs=1e-12)


def test_a_sparse_branch_is_the_dense_one():
    n = 15
    dense = bratu_branch(n)
    pattern = dense.jacobian(torch.rand(1, n), torch.ones(1))[0].nonzero().T
    assert pattern.shape[1] == 3 * n - 2

    def jacobian(x, lam):
        return SparseMatrix(pattern, dense.jacobian(x, lam)[:, pattern[0], pattern[1]], (n, n))

    settings = Continuation(max_points=40, max_step=0.4)
    want = settings.trace(dense, torch.zeros(n), 2.0, 5.0)
    got = settings.trace(BranchProblem(dense.residual, jacobian), torch.zeros(n), 2.0, 5.0)
    assert got.x.shape == want.x.shape and torch.allclose(got.lam, want.lam, atol=1e-8)
    assert abs(float(got.folds[0].lam - want.folds[0].lam)) < 1e-9


def test_circle_and_sparse_and_no_start():
    def residual(x, lam):
        return x**2 + lam.unsqueeze(-1) ** 2 - 1

    def jacobian(x, lam):
        return SparseMatrix(torch.tensor([[0], [0]]), 2 * x, (1, 1))

    circle = BranchProblem(residual, jacobian)
    branch = Continuation(max_points=70, step=0.1, max_step=0.1).trace(circle, torch.tensor([1.0]), 0.0, 5.0, 1)
    assert branch.status == "end" and [round(float(f.lam), 9) for f in branch.folds] == [1.0]
    assert torch.allclose(branch.x[:, 0] ** 2 + branch.lam**2, torch.ones_like(branch.lam), atol=1e-9)
    assert float(branch.lam[-1]) == pytest.approx(0.0, abs=1e-9) and float(branch.x[-1]) == pytest.approx(-1.0)
    assert Continuation().trace(circle, torch.tensor([1.0]), 3.0, 5.0).status == "no_start"
    with pytest.raises(InvalidInput, match="shape"):
        Continuation().trace(circle, torch.ones(1, 1), 0.0, 1.0)
    with pytest.raises(InvalidInput, match="kind"):
        Continuation(kind="other")
    with pytest.raises(InvalidInput, match="min_step"):
        Continuation(step=2.0)


W = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)


def binding(x):
    """A + B <-> C with constant 2."""
    rate = 2 * x[0] * x[1] - x[2]
    return torch.stack([-rate, -rate, rate])


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_conserved_totals(kind):
    totals = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    system = problem(binding)
    if kind == "sparse":
        system = RootProblem(residual=system.residual, jacobian=sparse(system))
    start = torch.tensor([[0.7, 1.7, 0.3], [2.8, 0.3, 0.2]])
    assert Newton().solve(system, start).status.tolist() == [RootStatus.SINGULAR] * 2
    # 2 (a - c)(b - c) = c
    a, b = totals.T
    s = 2 * (a + b) + 1
    c = (s - (s**2 - 16 * a * b).sqrt()) / 4
    want = torch.stack([a - c, b - c, c], 1)
    replaced = Newton().solve(replace_rows(system, W, totals), start)
    assert replaced.status.tolist() == [0, 0] and torch.allclose(replaced.x, want, rtol=1e-12)
    bordered, lift, drop = border_problem(system, W, totals)
    record = Newton().solve(bordered, lift(start))
    assert record.status.tolist() == [0, 0] and torch.allclose(drop(record.x), want, rtol=1e-12)
    assert float(record.x[:, 3:].abs().max()) < 1e-12
    with pytest.raises(InvalidInput, match="dependent"):
        replace_rows(system, torch.stack([W[0], 2 * W[0]]), totals)


def test_products_of_reduced_problems():
    base = problem(binding)
    jac = base.jacobian
    products = RootProblem(
        residual=base.residual,
        jacobian=jac,
        jvp=lambda x, v: (jac(x) @ v.unsqueeze(-1)).squeeze(-1),
        vjp=lambda x, w: (w.unsqueeze(1) @ jac(x)).squeeze(1),
    )
    reduced = replace_rows(products, W, torch.tensor([1.0, 2.0]))
    x, v = torch.rand(2, 3), torch.rand(2, 3)
    A = reduced.jacobian(x)
    assert torch.allclose(reduced.jvp(x, v), (A @ v.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(reduced.vjp(x, v), (v.unsqueeze(1) @ A).squeeze(1))

    def operator(x):
        return LinearOperator(3, 2, x.dtype, x.device, lambda u: products.jvp(x, u), lambda u: products.vjp(x, u))

    free = RootProblem(residual=base.residual, jacobian=operator)
    bordered, lift, _ = border_problem(free, W, torch.tensor([1.0, 2.0]))
    dense = border_problem(base, W, torch.tensor([1.0, 2.0]))[0].jacobian(lift(x))
    u = torch.rand(2, 5)
    assert torch.allclose(bordered.jacobian(lift(x)).matvec(u), (dense @ u.unsqueeze(-1)).squeeze(-1))
    assert torch.allclose(bordered.jacobian(lift(x)).rmatvec(u), (dense.mT @ u.unsqueeze(-1)).squeeze(-1))
    with pytest.raises(UnsupportedCombination, match="border_problem"):
        replace_rows(free, W, torch.tensor([1.0, 2.0])).jacobian(x)


def test_diagnosis_names_the_conserved_sum():
    def chain(x):  # 0 -> 1 -> 2 -> 0, and a free component
        rate = torch.stack([x[0], 2 * x[1] ** 2, 3 * x[2]])
        return torch.cat([rate.roll(1) - rate, 1 - x[3:]])

    system = problem(chain)
    start = torch.tensor([[1.0, 0.5, 0.3, 0.0]])
    record = Newton().solve(system, start)
    assert int(record.status) == RootStatus.SINGULAR
    for jacobian in (system.jacobian, sparse(system)):
        text = explain(record, jacobian(record.x))
        assert "the sum of components 0, 1 and 2 is conserved" in text and "conserved=" in text
    assert "b, c and d" not in explain(record, system.jacobian(record.x), names=list("abcd"))
    assert "a, b and c" in explain(record, system.jacobian(record.x), names=list("abcd"))
    regular = torch.eye(3).unsqueeze(0)
    assert explain(record, regular) == "" and left_null_vectors(regular).shape == (0, 3)
    # badly scaled is not singular
    assert left_null_vectors(torch.diag(torch.tensor([1e-30, 1.0, 1e30])).unsqueeze(0)).shape == (0, 3)
    unused = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    assert "component 1" in explain(record, unused) and right_null_vectors(unused).tolist() == [[0.0, 1.0]]


def test_null_vectors_of_a_large_sparse_matrix():
    n = 900  # diffusion on two separate rings: two conserved sums
    i = torch.arange(n)
    half = n // 2
    right = torch.where(i % half == half - 1, i - half + 1, i + 1)
    rows = torch.cat([i, i, right])
    columns = torch.cat([i, right, i])
    k = 1 + torch.rand(n)
    values = torch.cat([torch.zeros(n), k, k])
    dense = torch.zeros(n, n).index_put((rows, columns), values, accumulate=True)
    dense = dense - torch.diag(dense.sum(0))
    place = dense.nonzero().T
    order = torch.argsort(place[0] * n + place[1])
    matrix = SparseMatrix(place[:, order], dense[place[0], place[1]][order].unsqueeze(0), (n, n))
    found = left_null_vectors(matrix)
    assert found.shape == (2, n)
    assert float((found @ dense).abs().max()) < 1e-10
    assert torch.linalg.matrix_rank(torch.cat([found, (i < half).to(found)[None], (i >= half).to(found)[None]]), tol=1e-6) == 2
    shifted = SparseMatrix(matrix.indices, torch.where(matrix.indices[0] == matrix.indices[1], 2.0, 1.0) * matrix.values, (n, n))
    assert left_null_vectors(shifted).shape == (0, n)


@pytest.mark.parametrize("n", [3, 10, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_singular_to_rounding_is_seen_and_bad_scaling_is_not(n, dtype):
    A = torch.randn(100, n, n)
    A[:, -1] = -A[:, :-1].sum(1)  # the columns sum to zero up to rounding only
    A = A.to(dtype)
    assert float(ill_determined(A, DenseLU().factor(A)).double().mean()) >= 0.98
    regular = torch.randn(100, n, n).to(dtype) + 3 * torch.eye(n, dtype=dtype)
    scaled = torch.logspace(-15, 15, n).to(dtype).unsqueeze(-1) * regular * torch.logspace(9, -9, n).to(dtype)
    for matrix in (regular, scaled):
        assert not bool(ill_determined(matrix, DenseLU().factor(matrix)).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fine_grids_are_not_singular(dtype):
    n = 500
    ones = torch.ones(1, n - 1, dtype=dtype)
    laplacian = torch.diag_embed(2 * torch.ones(1, n, dtype=dtype)) - torch.diag_embed(ones, 1) - torch.diag_embed(ones, -1)
    assert not bool(ill_determined(laplacian, DenseLU().factor(laplacian)))
