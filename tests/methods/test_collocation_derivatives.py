"""Derivatives of fully implicit methods: of every kind, in every form, and of large systems."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.linalg import LinearOperator, SparseMatrix
from adjoint.methods.tableaux_implicit import IMPLICIT_TABLEAUX
from adjoint.sensitivity.coupled import coupled_matrix

from ..helpers.problems import HEAT_POINTS, check_drawn_to_a_cosine, heat_by_scipy, heat_with_source
from .test_collocation import ADAPTIVE, NAMES, TIGHT, constant
from .test_rosenbrock import small

P = (1.3, 4.0)
Y0 = (0.8, -0.4)


def loss(name, **options):
    def run(y0, p, start, end, inner):
        sol = solve_ivp(
            small,
            torch.stack([start, end]),
            y0,
            (p,),
            t_eval=torch.stack([start + inner, end - inner, end]),
            **({"method": constant(name), "first_step": 0.25} | TIGHT | options),
        )
        return (sol.y * torch.tensor([[1.0, 0.5], [-0.7, 2.0], [0.3, 1.1]])).sum(-1)

    return run


def arguments():
    numbers = (torch.tensor(Y0), torch.tensor(P), torch.tensor(0.1), torch.tensor(1.05), torch.tensor(0.31))
    return tuple(x.requires_grad_(True) for x in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_discrete_adjoint_is_backprop(name):
    """To rounding, with everything that can be asked for, adaptive steps included."""
    adaptive = {"method": name, "rtol": 1e-4, "atol": 1e-5, "first_step": None} if name in ADAPTIVE else {}
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        args = arguments()
        run = loss(name, gradient=gradient, **adaptive)
        found.append(torch.autograd.grad(run(*args).square().sum(), args))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, gradient):
    """All arguments: state, parameters, both ends of the span, and sample times; of the computed solution, not of the exact one."""
    assert gradcheck(loss(name, gradient=gradient, first_step=0.5), arguments())


@pytest.mark.parametrize("name", ["gl4", pytest.param("radau5", marks=pytest.mark.slow)])
def test_gradgradcheck(name):
    assert gradgradcheck(loss(name, first_step=0.6), arguments())


@pytest.mark.parametrize("name", ["radauIIA3", pytest.param("radau5", marks=pytest.mark.slow), pytest.param("gl6", marks=pytest.mark.slow)])
def test_hessian_in_every_nesting(name):
    y0 = torch.tensor(Y0)

    def value(p):
        sol = solve_ivp(small, (0.0, 1.0), y0, (p,), method=constant(name), first_step=0.5, **TIGHT)
        return sol.y[-1].square().sum()

    p = torch.tensor(P)
    step = 1e-4
    eye = torch.eye(2) * step
    differences = torch.stack([(torch.func.grad(value)(p + e) - torch.func.grad(value)(p - e)) / (2 * step) for e in eye])
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    for outer, inner in ((forward, forward), (forward, reverse), (reverse, forward), (reverse, reverse)):
        torch.testing.assert_close(outer(inner(value))(p), differences, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode(name):
    args = arguments()
    run = loss(name)
    dots = tuple(torch.randn_like(x) for x in args)
    _, dot = torch.func.jvp(run, tuple(x.detach() for x in args), dots)
    weights = torch.tensor([0.3, -1.0, 2.0])
    grads = torch.autograd.grad((run(*args) * weights).sum(), args)
    expected = sum((g * d).sum() for g, d in zip(grads, dots, strict=True))
    torch.testing.assert_close((dot * weights).sum(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["radau5", "radauIIA3", "gl4"])
def test_batched_is_one_by_one(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])
    p = torch.tensor([P, (0.5, 30.0), (2.0, 100.0)])
    times = torch.tensor([0.4, 1.0])
    first_step = None if name in ADAPTIVE else 0.1

    def solve(y0, p, batched):
        options = {"method": name, "batched": batched, "t_eval": times, "first_step": first_step}
        return solve_ivp(small, (0.0, 1.0), y0, (p,), rtol=1e-5, atol=1e-7, **options)

    y0.requires_grad_(True), p.requires_grad_(True)
    together = solve(y0, p, True)
    grads = torch.autograd.grad(together.y.square().sum(), (y0, p))
    for b in range(3):
        a, q = y0[b].detach().requires_grad_(True), p[b].detach().requires_grad_(True)
        alone = solve(a, q, False)
        # the loop for one trajectory rounds its step sizes elsewhere, and evaluates no slope behind a rejected step
        torch.testing.assert_close(together.y[:, b], alone.y, rtol=1e-9, atol=1e-11)
        for count in ("n_steps", "n_newton", "n_solves"):
            assert int(getattr(together.stats, count)[b]) == getattr(alone.stats, count), count
        assert 0 <= int(together.stats.n_fun[b]) - alone.stats.n_fun <= alone.stats.n_rejected + 1
        one = torch.autograd.grad(alone.y.square().sum(), (a, q))
        for x, y in zip(grads, one, strict=True):
            torch.testing.assert_close(x[b], y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["radau5", "gl4"])
def test_vmap_of_grad(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])
    first_step = None if name in ADAPTIVE else 0.1

    def value(y0, p):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), method=name, rtol=1e-4, atol=1e-6, first_step=first_step).y[-1].square().sum()

    p = torch.tensor(P)
    mapped = torch.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(0, None))(y0, p)
    for b in range(3):
        for x, y in zip(mapped, torch.func.grad(value, argnums=(0, 1))(y0[b], p), strict=True):
            torch.testing.assert_close(x[b], y, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()])
def test_vmap_of_vmap_of_hessian(gradient):
    """Rows multiply at every level, with inputs mapped at some of them only."""
    y0 = torch.tensor([Y0, (2.0, 1.0)])
    p = torch.tensor([P, (0.5, 6.0), (2.0, 1.0)])

    def value(y0, p):
        sol = solve_ivp(small, (0.0, 1.0), y0, (p,), method="gl4", first_step=0.5, gradient=gradient, **TIGHT)
        return sol.y[-1].square().sum()

    hessian = torch.func.hessian(value, argnums=1)
    mapped = torch.vmap(torch.vmap(hessian, in_dims=(None, 0)), in_dims=(0, None))(y0, p)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(mapped[i, j], hessian(y0[i], p[j]), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_complex_states(name):
    """A holomorphic right-hand side: y' = lam (y - y^2), the logistic equation."""
    lam = torch.tensor(-2.0 + 6.0j, requires_grad=True)
    y0 = torch.tensor([0.6 + 0.2j, 0.3 - 0.1j], dtype=torch.complex128)
    first_step = None if name in ADAPTIVE else 0.002 if name == "implicit_midpoint" else 0.02
    sol = solve_ivp(lambda t, y, lam: lam * (y - y * y), (0.0, 1.0), y0, (lam,), method=name, rtol=1e-6, atol=1e-8, first_step=first_step)

    def truth(lam):
        growth = y0 * torch.exp(lam)
        return growth / (1 - y0 + growth)

    torch.testing.assert_close(sol.y[-1], truth(lam), rtol=1e-4, atol=1e-5)
    weights = torch.tensor([1.0 - 0.5j, 0.2j])
    (found,) = torch.autograd.grad((sol.y[-1] * weights).sum().real, lam)
    (expected,) = torch.autograd.grad((truth(lam) * weights).sum().real, lam)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_and_pytrees(name):
    first_step = None if name in ADAPTIVE else 0.01
    check_drawn_to_a_cosine(lambda *problem: solve_ivp(*problem, method=name, first_step=first_step))


def test_sparse_systems():
    """The heat equation with a source, on enough points for the sparse path; truth from SciPy."""
    pytest.importorskip("scipy")
    c = torch.tensor(0.5, requires_grad=True)
    pattern = abs(np.subtract.outer(np.arange(HEAT_POINTS), np.arange(HEAT_POINTS))) <= 1
    ends = [heat_by_scipy(side) for side in (0.499, 0.5, 0.501)]
    for sparsity in (None, torch.tensor(pattern)):
        options = {"method": "radau5", "rtol": 1e-6, "atol": 1e-9, "jac_sparsity": sparsity}
        sol = solve_ivp(heat_with_source, (0.0, 0.3), torch.zeros(HEAT_POINTS), (c,), **options)
        torch.testing.assert_close(sol.y[-1], torch.tensor(ends[1]), rtol=1e-5, atol=1e-7)
        (found,) = torch.autograd.grad(sol.y[-1].sum(), c)
        torch.testing.assert_close(found, torch.tensor((ends[2].sum() - ends[0].sum()) / 0.002), rtol=1e-4, atol=0)


def test_matrix_of_coupled_stages():
    """Dense, sparse and as an operator: the same blocks."""
    a = IMPLICIT_TABLEAUX["radau5"].a
    s, n, rows = 3, 4, 2
    pattern = torch.rand(n, n) < 0.4
    pattern.fill_diagonal_(True)
    blocks = [torch.randn(rows, n, n) * pattern for _ in range(s)]
    h = torch.tensor([[0.3], [-0.7]])
    expected = torch.stack(
        [
            torch.eye(s * n) - h[b] * torch.cat([torch.cat([w * j[b] for w in row], 1) for row, j in zip(a, blocks, strict=True)])
            for b in range(rows)
        ]
    )
    torch.testing.assert_close(coupled_matrix(a, h, blocks), expected)
    indices = pattern.nonzero().T
    sparse = coupled_matrix(a, h, [SparseMatrix(indices, j[:, indices[0], indices[1]], (n, n)) for j in blocks])
    assert isinstance(sparse, SparseMatrix)
    torch.testing.assert_close(sparse.dense(), expected)
    keys = sparse.indices[0] * s * n + sparse.indices[1]
    assert bool((keys.diff() > 0).all())
    operator = coupled_matrix(
        a,
        h,
        [
            LinearOperator(
                n,
                rows,
                h.dtype,
                h.device,
                lambda v, j=j: (j @ v.unsqueeze(-1)).squeeze(-1),
                lambda v, j=j: (j.mT @ v.unsqueeze(-1)).squeeze(-1),
            )
            for j in blocks
        ],
    )
    assert isinstance(operator, LinearOperator) and operator.rmatvec is not None
    v = torch.randn(rows, s * n)
    torch.testing.assert_close(operator.matvec(v), (expected @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(operator.rmatvec(v), (expected.mT @ v.unsqueeze(-1)).squeeze(-1))
