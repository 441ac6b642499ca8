"""What linear solvers do with sides and matrices that they cannot solve for: an error or NaN, never plausible numbers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from adjoint import InvalidInput, UnsupportedCombination
from adjoint.linalg import (
    GMRES,
    IDR,
    UMFPACK,
    BiCGStab,
    DenseLU,
    LinearOperator,
    Log,
    Pardiso,
    SparseLU,
    SparseMatrix,
    condition_estimate,
    default_solver,
    linear_solve,
)

from .test_linalg_solvers import advection, sparse

SOLVERS = [DenseLU(), SparseLU(), GMRES(), BiCGStab(), IDR(), Pardiso(), UMFPACK()]
PACKAGES = {Pardiso: "pypardiso", UMFPACK: "scikits.umfpack"}
KRYLOV = [GMRES(), BiCGStab(), IDR()]


def name(solver):
    return type(solver).__name__


@pytest.fixture
def needs(request):
    package = PACKAGES.get(type(request.getfixturevalue("solver")))
    if package is not None:
        pytest.importorskip(package)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_sides_that_do_not_fit_are_refused(solver, needs):
    factors = solver.factor(2 * torch.eye(3).expand(4, 3, 3).contiguous())
    for bad in (torch.ones(4, 3) * 1j, torch.ones(4, 3, dtype=torch.float32)):
        with pytest.raises(InvalidInput, match="dtype"):
            factors.solve(bad)
    for bad in (torch.ones(2, 3), torch.ones(1, 3), torch.ones(5, 3), torch.ones(4, 2), torch.ones(3)):
        with pytest.raises(InvalidInput, match="b must be"):
            factors.solve(bad)
    assert factors.solve(torch.ones(4, 3, 0)).shape == (4, 3, 0)
    with pytest.raises(InvalidInput, match="square"):
        solver.factor(torch.ones(1, 3, 4))
    if not isinstance(solver, tuple(type(k) for k in KRYLOV)):
        with pytest.raises(InvalidInput, match="B, n, n"):
            solver.factor(torch.eye(3))


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_sides_whose_squares_overflow(solver, size, needs):
    A = advection(5).unsqueeze(0)
    b = torch.randn(1, 25)
    want = torch.linalg.solve(A, b.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(solver.factor(A).solve(b * size) / size, want, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_sides_have_no_finite_solution(solver, bad, needs):
    A = advection(5).expand(2, 25, 25).contiguous()
    b = torch.ones(2, 25)
    b[1, 7] = bad
    x = solver.factor(A).solve(b)
    assert torch.allclose(x[0], torch.linalg.solve(A[0], b[0])) and not bool(torch.isfinite(x[1]).all())


@pytest.mark.parametrize("solver", KRYLOV, ids=name)
def test_the_default_tolerance_can_be_met_in_single_precision(solver):
    A = (torch.randn(100, 100) + 20 * torch.eye(100)).float()
    b = torch.randn(1, 100).float()
    x = solver.factor(A.unsqueeze(0)).solve(b)
    assert float((A.double() @ x[0].double() - b[0]).norm() / b.norm()) <= 2.1e-5
    op = LinearOperator(100, 1, torch.float32, A.device, lambda v: v @ A.T)
    assert bool(torch.isfinite(default_solver(op).factor(op).solve(b)).all())


@pytest.mark.parametrize("solver", [BiCGStab(rtol=1e-12), IDR(rtol=1e-12), IDR(rtol=1e-12, s=1)], ids=["bicgstab", "idr", "idr1"])
def test_what_is_accepted_meets_the_tolerance(solver):
    """Eigenvalues on both sides of the imaginary axis: steps of least residual alone would take many times as many products."""
    for seed in [*range(12), 22, 31, 47, 79, 85, 88, 118, 143, 158, 197]:
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(60, 60, generator=generator) + 6 * torch.eye(60)
        b = torch.randn(1, 60, generator=generator)
        log = Log()
        x = solver.factor(A.unsqueeze(0), log).solve(b)
        # the residual of the recursion drifts from the true one
        assert float((A @ x[0] - b[0]).norm() / b.norm()) <= 2.01e-12
        assert log.n_iterations < 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("solver", [BiCGStab(), IDR(), IDR(s=1)], ids=["bicgstab", "idr", "idr1"])
def test_breakdowns_are_overcome(solver, dtype):
    """Matrices for which ``A r`` is orthogonal to ``r``, beside one that needs no help."""
    skew = torch.triu(torch.randn(12, 12), 1)
    easy = 2 * torch.eye(12)
    A = torch.stack([skew - skew.T, torch.roll(torch.eye(12), 1, 0), easy]).to(dtype)
    for b in (torch.randn(3, 12, dtype=dtype), torch.eye(12, dtype=dtype)[:1].repeat(3, 1)):
        factors = solver.factor(A)
        assert torch.allclose(factors.solve(b), torch.linalg.solve(A, b), rtol=1e-6, atol=1e-7) and bool(factors.converged.all())
    A[1] = 0
    A[1, 0, 0] = 1  # singular: no number of new beginnings helps, and none of them spoils the other rows
    x = solver.factor(A).solve(torch.ones(3, 12, dtype=dtype))
    assert bool(x[1].isnan().all()) and bool(torch.isfinite(x[[0, 2]]).all())


@pytest.mark.parametrize("solver", KRYLOV, ids=name)
def test_absolute_tolerance_of_scaled_sides(solver):
    A = advection(5).unsqueeze(0)
    b = 1e-200 * torch.ones(1, 25)
    assert torch.equal(type(solver)(atol=1e-100).factor(A).solve(b), torch.zeros(1, 25))


@pytest.mark.parametrize("kind", ["ilu", "jacobi"])
def test_a_row_without_preconditioner_fails_alone(kind):
    good = advection(5)
    bad = torch.zeros(25, 25).fill_diagonal_(1.0)
    bad[0, 0] = 0.0
    A = torch.stack([good, bad, good.clone()])
    A[2, 3, 3] = float("nan")
    factors = GMRES(preconditioner=kind).factor(A)
    x = factors.solve(torch.ones(3, 25))
    assert torch.allclose(x[0], torch.linalg.solve(good, torch.ones(25)))
    assert bool(x[1:].isnan().all()) and factors.converged.tolist() == [True, False, False]
    with pytest.raises(InvalidInput, match=r"preconditioner|incomplete LU"):
        GMRES(preconditioner=kind).factor(A[1:2])


def test_a_preconditioner_may_be_of_lower_precision():
    A = advection(8).unsqueeze(0)
    b = torch.randn(1, 64)
    for low in (DenseLU(), SparseLU()):
        log = Log()
        x = GMRES(rtol=1e-12, preconditioner=low.factor(A.float())).factor(A, log).solve(b)
        assert x.dtype == torch.float64 and log.n_iterations <= 4
        assert torch.allclose((A @ x.unsqueeze(-1)).squeeze(-1), b, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_without_pivoting_are_as_good_as_others(dtype):
    worst = 0.0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        S = torch.randn(120, 120, generator=generator) * (torch.rand(120, 120, generator=generator) < 0.05)
        A = (S + S.T).fill_diagonal_(0) + torch.diag(10 ** (-6 * torch.rand(120, generator=generator)))
        A, b = A.to(dtype), torch.randn(1, 120, generator=generator).to(dtype)
        x = SparseLU().factor(A.unsqueeze(0)).solve(b)[0].double()
        error = (A.double() @ x - b[0].double()).abs().max() / (A.double().abs() @ x.abs() + b[0].abs()).max()
        worst = max(worst, float(error))
    assert worst < 2e3 * torch.finfo(dtype).eps


def test_operators_that_are_trained_are_refused():
    def solve(W, b):
        return linear_solve(LinearOperator(3, 1, W.dtype, W.device, lambda v: v @ W.T, lambda v: v @ W), b)

    W, b = 2 * torch.eye(3), torch.ones(1, 3, requires_grad=True)
    (g,) = torch.autograd.grad(solve(W, b).sum(), b)
    assert torch.allclose(g, torch.full((1, 3), 0.5))
    trained = W.clone().requires_grad_()
    with pytest.raises(UnsupportedCombination, match="LinearOperator"):
        solve(trained, b)
    with torch.no_grad():
        assert torch.allclose(solve(trained, b), torch.full((1, 3), 0.5))
    with forward_ad.dual_level(), pytest.raises(UnsupportedCombination, match="LinearOperator"):
        solve(forward_ad.make_dual(W, torch.eye(3)), b)
    with pytest.raises(UnsupportedCombination, match="LinearOperator"):
        torch.func.jvp(lambda w: solve(w, b.detach()), (W,), (torch.eye(3),))


def test_pardiso_says_which_matrices_are_singular():
    pytest.importorskip("pypardiso")
    dependent = torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]])
    factors = Pardiso().factor(torch.stack([dependent, torch.eye(3)]))
    x = factors.solve(torch.tensor([[1.0, 2, 3], [1, 2, 3]]))  # a side for which solutions exist: not one of them is returned
    assert factors.singular().tolist() == [True, False]
    assert bool(x[0].isnan().all()) and torch.equal(x[1], torch.tensor([1.0, 2, 3]))
    scaled = torch.diag(torch.logspace(0, -10, 12)).unsqueeze(0)  # ill-scaled, but not singular
    assert not bool(Pardiso().factor(scaled).singular().any())
    A = sparse(advection(5).unsqueeze(0))
    old = Pardiso().factor(A)
    new = Pardiso().refactor(old, replace(A, values=0 * A.values))
    assert bool(new.singular().all()) and bool(new.solve(torch.ones(1, 25)).isnan().all())
    assert torch.allclose(old.solve(torch.ones(1, 25)), torch.linalg.solve(advection(5), torch.ones(25)))


def test_umfpack_says_which_matrices_are_singular():
    pytest.importorskip("scikits.umfpack")
    dependent = torch.tensor([[1.0, 2, 3], [2, 4, 6], [1, 0, 1]])
    missing = torch.diag(torch.tensor([1.0, 1, 0]))  # of rank two by its pattern
    for wrong in (dependent, missing, torch.eye(3) * float("nan"), torch.zeros(3, 3)):
        factors = UMFPACK().factor(torch.stack([wrong, torch.eye(3)]))
        x = factors.solve(torch.tensor([[1.0, 2, 3], [1, 2, 3]]))
        assert factors.singular().tolist() == [True, False]
        assert bool(x[0].isnan().all()) and torch.equal(x[1], torch.tensor([1.0, 2, 3]))
    scaled = torch.diag(torch.logspace(0, -300, 12)).unsqueeze(0)  # ill-scaled, but not singular
    assert not bool(UMFPACK().factor(scaled).singular().any())
    A = sparse(advection(5).unsqueeze(0))
    old = UMFPACK().factor(A)
    new = UMFPACK().refactor(old, replace(A, values=0 * A.values))
    assert bool(new.singular().all()) and bool(new.solve(torch.ones(1, 25)).isnan().all())
    later = UMFPACK().refactor(new, A)
    for factors in (old, later):
        assert torch.allclose(factors.solve(torch.ones(1, 25)), torch.linalg.solve(advection(5), torch.ones(25)))


def test_umfpack_analyses_anew_where_a_pivot_has_become_zero():
    pytest.importorskip("scikits.umfpack")
    indices = torch.ones(4, 4).nonzero().T.contiguous()
    first = torch.triu(torch.ones(4, 4))  # its pivots are found in the analysis, by the values
    second = first.flip(0) + 0.1
    old = UMFPACK().factor(SparseMatrix(indices, first.reshape(1, -1), (4, 4)))
    new = UMFPACK().refactor(old, SparseMatrix(indices, second.reshape(1, -1), (4, 4)))
    for factors, A in ((new, second), (old, first)):
        assert torch.allclose(factors.solve(torch.ones(1, 4)), torch.linalg.solve(A, torch.ones(4)))


def test_pardiso_ends_quietly():
    pytest.importorskip("pypardiso")
    code = "import torch; from adjoint.linalg import Pardiso; f = Pardiso().factor(torch.eye(3, dtype=torch.float64)[None])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Exception" not in ended.stderr


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_condition_estimate(dtype):
    A = torch.stack([torch.randn(30, 30, dtype=dtype) @ torch.diag(torch.logspace(0, -k, 30).to(dtype)) for k in range(0, 12, 2)])
    want = torch.from_numpy(np.linalg.cond(A.numpy(), 1))
    for solver in (DenseLU(), SparseLU()):
        for matrix in (A, sparse(A)):
            found = condition_estimate(matrix, solver.factor(matrix))
            assert found.shape == (6,) and bool((found <= want * (1 + 1e-6)).all()) and bool((found >= want / 3).all())


def test_condition_estimate_of_nearly_singular_matrices():
    ring = 2 * torch.eye(30) - torch.roll(torch.eye(30), 1, 0) - torch.roll(torch.eye(30), -1, 0)
    A = torch.stack([ring, torch.zeros(30, 30), torch.eye(30)])
    for solver in (DenseLU(), SparseLU()):
        found = condition_estimate(A, solver.factor(A))
        assert float(found[0]) > 1e14 and found[1] == torch.inf and found[2] == 1.0
    assert condition_estimate(torch.zeros(2, 0, 0), DenseLU().factor(torch.zeros(2, 0, 0))).shape == (2,)
    op = LinearOperator(3, 1, torch.float64, torch.device("cpu"), lambda v: v)
    with pytest.raises(UnsupportedCombination, match="LinearOperator"):
        condition_estimate(op, DenseLU().factor(op))
