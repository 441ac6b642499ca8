"""Fully implicit methods: order conditions, stability, convergence, what they count, and derivatives of large systems."""

from __future__ import annotations

from math import log2, sqrt

import numpy as np
import pytest
import torch

import adjoint
from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.linalg import LinearOperator, SparseMatrix
from adjoint.methods import METHODS, CollocationTableau
from adjoint.methods.collocation import IMPLICIT_TABLEAUX
from adjoint.sensitivity.stages import coupled_matrix

from ..helpers.problems import HEAT_POINTS, heat_by_scipy, heat_with_source
from ..helpers.rooted_trees import elementary_weights, inverse_densities
from .test_linearised_families import TIGHT, Y0, P, constant, small
from .test_rosenbrock import driven, exact

NAMES = sorted(IMPLICIT_TABLEAUX)
ADAPTIVE = ["radau5", "radauIIA3"]
SYMMETRIC = ["gl4", "gl6", "implicit_midpoint"]


# ---------------------------------------------------------------------------------------------- tableaux


def defects(a, weights, n, theta=1.0):
    """Largest violation among the order conditions of each order."""
    found = elementary_weights(a, n)
    return np.array([abs(phi @ weights - theta**k * inverse_densities(k)).max() for k, phi in enumerate(found, 1)])


@pytest.mark.parametrize("name", NAMES)
def test_order_conditions(name):
    tab = IMPLICIT_TABLEAUX[name]
    a = np.array(tab.a)
    np.testing.assert_allclose(a.sum(1), tab.c, rtol=0, atol=1e-15)
    main = defects(a, np.array(tab.b), tab.order + 1)
    assert main[:-1].max() < 1e-14 and main[-1] > 1e-4
    s = len(tab.c)
    for theta in (0.2, 0.55, 0.9):
        weights = METHODS[name].dense_weights(torch.tensor(theta)).numpy()
        dense = defects(a, weights, s + 1, theta)
        assert dense[:-1].max() < 1e-14 and dense[-1] > 1e-5
    if tab.error is not None:
        # the embedded formula has f(t, y) as one more stage
        wide = np.block([[np.zeros((1, s + 1))], [np.zeros((s, 1)), a]])
        embedded = defects(wide, np.array([tab.gamma, *(np.array(tab.b) + tab.error)]), s + 1)
        assert embedded[:-1].max() < 1e-14 and embedded[-1] > 1e-3


def test_published_coefficients():
    """Hairer & Wanner II, tables IV.5.2, IV.5.3, IV.5.5 and IV.5.6; the error estimate and the eigenvalues of section IV.8."""
    r3, r6, r15 = sqrt(3), sqrt(6), sqrt(15)
    truth = {
        "implicit_midpoint": [[1 / 2]],
        "gl4": [[1 / 4, 1 / 4 - r3 / 6], [1 / 4 + r3 / 6, 1 / 4]],
        "gl6": [
            [5 / 36, 2 / 9 - r15 / 15, 5 / 36 - r15 / 30],
            [5 / 36 + r15 / 24, 2 / 9, 5 / 36 - r15 / 24],
            [5 / 36 + r15 / 30, 2 / 9 + r15 / 15, 5 / 36],
        ],
        "radauIIA3": [[5 / 12, -1 / 12], [3 / 4, 1 / 4]],
        "radau5": [
            [(88 - 7 * r6) / 360, (296 - 169 * r6) / 1800, (-2 + 3 * r6) / 225],
            [(296 + 169 * r6) / 1800, (88 + 7 * r6) / 360, (-2 - 3 * r6) / 225],
            [(16 - r6) / 36, (16 + r6) / 36, 1 / 9],
        ],
    }
    for name, a in truth.items():
        np.testing.assert_allclose(IMPLICIT_TABLEAUX[name].a, a, rtol=0, atol=2e-15)
    radau = IMPLICIT_TABLEAUX["radau5"]
    assert abs(1 / radau.gamma - (3 + 3 ** (2 / 3) - 3 ** (1 / 3))) < 1e-13
    # their weights are those of z_i = h sum_j a_ij k_j
    in_z = np.linalg.solve(np.array(radau.a).T, radau.error)
    np.testing.assert_allclose(in_z, radau.gamma / 3 * np.array([-13 - 7 * r6, -13 + 7 * r6, -1]), rtol=1e-12)


PADE = {
    "implicit_midpoint": ([1, 1 / 2], [1, -1 / 2]),
    "gl4": ([1, 1 / 2, 1 / 12], [1, -1 / 2, 1 / 12]),
    "gl6": ([1, 1 / 2, 1 / 10, 1 / 120], [1, -1 / 2, 1 / 10, -1 / 120]),
    "radauIIA3": ([1, 1 / 3], [1, -2 / 3, 1 / 6]),
    "radau5": ([1, 2 / 5, 1 / 20], [1, -3 / 5, 3 / 20, -1 / 60]),
}


@pytest.mark.parametrize("name", NAMES)
def test_stability_function(name):
    """What a step does to y' = lam y is the Pade approximation of the exponential, all the way to stiff and imaginary ones."""
    lam = torch.tensor([-0.5, -3.0, -100.0, -1e5, 2.0j, 30.0j, -1.0 + 5.0j, -1e3 - 1e3j], dtype=torch.complex128)
    sol = solve_ivp(lambda t, y: lam * y, (0.0, 1.0), torch.ones_like(lam), method=constant(name), first_step=1.0, **TIGHT)
    assert sol.stats.n_steps == 1
    top, bottom = (np.polynomial.Polynomial(p) for p in PADE[name])
    z = lam.numpy()
    np.testing.assert_allclose(sol.y[-1].numpy(), top(z) / bottom(z), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_linear_problems_take_one_iteration(name, dtype):
    """And a second one that finds nothing to do: the matrix of the iteration is the right one, for real and complex states."""
    matrix = torch.tensor([[-1.0, 30.0, 0.0], [-20.0, -2.0, 1.0], [0.5, 0.0, -400.0]], dtype=dtype)
    sol = solve_ivp(lambda t, y: matrix @ y, (0.0, 1.0), torch.ones(3, dtype=dtype), method=constant(name), first_step=0.1)
    assert sol.stats.n_steps == 10 and sol.stats.n_newton <= 20


def test_faulty_tableaux_are_refused():
    # the second node of a widespread gl4
    with pytest.raises(ValueError, match="order is not 4"):
        CollocationTableau("gl4", 4, (0.5 - sqrt(3) / 6, 0.5 - sqrt(3) / 6 + 1e-3), "", "")
    with pytest.raises(ValueError, match="order is not 6"):
        CollocationTableau("radau", 6, IMPLICIT_TABLEAUX["radau5"].c, "", "")
    for c in ((), (0.5, 0.5), (0.0, 1.0), (0.5, 1.5)):
        with pytest.raises(ValueError, match="nodes must be"):
            CollocationTableau("bad", 1, c, "", "")


# ---------------------------------------------------------------------------------------------- convergence


def errors(name, steps, inner=False):
    """Of fixed steps: at the end, or the worst inside of steps."""
    h = 1.5 / steps
    times = 0.3 + h * (torch.arange(steps).unsqueeze(-1) + torch.tensor([0.23, 0.5, 0.81])).reshape(-1)
    times = torch.cat([times, torch.tensor([1.8])])
    start = exact(torch.tensor(0.3))
    sol = solve_ivp(driven, (0.3, 1.8), start, (torch.tensor(1.0),), method=constant(name), first_step=h, t_eval=times, **TIGHT)
    assert sol.stats.n_accepted == steps
    found = (sol.y - exact(sol.t)).abs().amax(-1)
    return float(found[:-1].max() if inner else found[-1])


@pytest.mark.parametrize("name", NAMES)
def test_measured_order(name):
    tab = IMPLICIT_TABLEAUX[name]
    few = {6: 8, 5: 12}.get(tab.order, 24)
    assert log2(errors(name, few) / errors(name, 2 * few)) > tab.order - 0.2
    # the error between the steps is one order higher in one step
    expected = min(len(tab.c) + 1, tab.order)
    assert log2(errors(name, few, True) / errors(name, 2 * few, True)) > expected - 0.2


@pytest.mark.parametrize("name", SYMMETRIC)
def test_time_reversal(name):
    """Symmetric methods go back the way they came, whatever the step size."""

    def kepler(t, y):
        place, speed = y.chunk(2, -1)
        return torch.cat([speed, -place / place.norm(dim=-1, keepdim=True) ** 3], -1)

    y0 = torch.tensor([0.6, 0.0, 0.0, sqrt(1.4 / 0.6)])
    options = {"method": name, "first_step": 0.2, **TIGHT}
    there = solve_ivp(kepler, (0.0, 3.0), y0, **options).y[-1]
    back = solve_ivp(kepler, (3.0, 0.0), there, **options).y[-1]
    torch.testing.assert_close(back, y0, rtol=1e-11, atol=1e-11)
    # not because it is exact
    fine = solve_ivp(kepler, (0.0, 3.0), y0, method="dopri8", rtol=1e-12, atol=1e-13).y[-1]
    assert float((there - fine).norm()) > 1e-5
    # and Gauss methods keep quadratic invariants: the angular momentum
    momentum = there[0] * there[3] - there[1] * there[2]
    torch.testing.assert_close(momentum, y0[0] * y0[3], rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_error_follows_the_tolerance(name):
    found = []
    for rtol in (1e-4, 1e-6, 1e-8) if name == "radau5" else (1e-3, 1e-4, 1e-5):
        sol = solve_ivp(driven, (0.3, 1.8), exact(torch.tensor(0.3)), (torch.tensor(1.0),), method=name, rtol=rtol, atol=rtol)
        found.append(float((sol.y[-1] - exact(torch.tensor(1.8))).abs().max()) / rtol)
    assert max(found) < 5


@pytest.mark.parametrize("name", ADAPTIVE)
def test_large_steps_on_stiff_solutions(name):
    """Prothero & Robinson: the filtered estimate must let steps grow to what the smooth solution asks for, h lam = -1e7 and more."""

    def fun(t, y):
        return -1e8 * (y - torch.cos(t)) - torch.sin(t)

    sol = solve_ivp(fun, (0.0, 10.0), torch.ones(1), method=name, rtol=1e-4, atol=1e-6)
    assert sol.stats.n_steps < 60
    torch.testing.assert_close(sol.y[-1], torch.tensor([np.cos(10.0)]), rtol=0, atol=1e-6)
    # with a transient of 1e-8 in front, which is followed too
    sol = solve_ivp(fun, (0.0, 10.0), torch.zeros(1), method=name, rtol=1e-4, atol=1e-6)
    assert sol.stats.n_steps < 250
    torch.testing.assert_close(sol.y[-1], torch.tensor([np.cos(10.0)]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_fast_transients_may_be_stepped_over(name):
    """Behind a step with h lam = -1e7 nothing is left of the transient, and the second error estimate knows: the first is about -y."""
    sol = solve_ivp(lambda t, y: -1e8 * y, (0.0, 1.0), torch.ones(1), method=name, first_step=0.1)
    assert sol.stats.n_rejected == 0 and sol.stats.n_steps < 6
    assert float(sol.y[-1].abs()) < 1e-6


# ---------------------------------------------------------------------------------------------- work


def test_work_is_counted():
    """Counts are those of calls: iterations, the slope at the end, and the second error estimate."""
    calls = []

    class Counted(torch.nn.Module):
        def forward(self, t, y):
            calls.append(1)
            return -50 * (y - torch.cos(t)) ** 3

    for name in NAMES:
        calls.clear()
        first_step = None if name in ADAPTIVE else 0.05
        with torch.no_grad():
            stats = solve_ivp(Counted(), (0.0, 2.0), torch.ones(2), method=name, first_step=first_step).stats
        modes = (len(METHODS[name].nodes)) // 2
        assert stats.n_newton >= stats.n_steps
        assert stats.n_jac == stats.n_accepted
        own = {"radauIIA3": 1}.get(name, 0)  # its estimate has a matrix of its own
        assert stats.n_factorizations == (modes + own) * stats.n_steps
        estimates = stats.n_solves - modes * stats.n_newton
        assert stats.n_steps <= estimates <= 2 * stats.n_steps if name in ADAPTIVE else estimates == 0
        # a Jacobian is one call that serves all columns; one call more looks for captured tensors
        assert len(calls) - stats.n_jac - stats.n_fun in (0, 1)


# ---------------------------------------------------------------------------------------------- derivatives


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


# ---------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize("name", ["radau5", "gl4"])
def test_failure_is_not_a_number(name):
    """A solution that ceases to exist ends with a status, not with a plausible number."""
    options = {"method": name, "first_step": None if name in ADAPTIVE else 0.05}
    sol = solve_ivp(lambda t, y: y * y, (0.0, 2.0), torch.ones(1), throw=False, **options)
    assert sol.status < 0
    assert torch.isnan(sol.y[-1]).all()
    with pytest.raises(adjoint.errors.SolveError):
        solve_ivp(lambda t, y: y * y, (0.0, 2.0), torch.ones(1), **options)


def test_one_failing_row_leaves_the_others_alone():
    y0 = torch.tensor([[1.0], [0.25]], requires_grad=True)
    sol = solve_ivp(lambda t, y: y * y, (0.0, 2.0), y0, method="radau5", batched=True, throw=False, rtol=1e-5)
    assert sol.status[0] < 0 and sol.status[1] == 0
    assert torch.isnan(sol.y[-1, 0]).all()
    torch.testing.assert_close(sol.y[-1, 1], torch.tensor([0.5]), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(sol.y[-1, 1].sum(), y0)
    torch.testing.assert_close(grad[1], torch.tensor([4.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SYMMETRIC)
def test_constant_steps_need_a_size(name):
    with pytest.raises(adjoint.errors.InvalidInput, match="first_step"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(1), method=name)
