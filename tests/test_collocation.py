"""Fully implicit methods: order conditions, stability, convergence, stiff references, and every kind of derivative."""

from __future__ import annotations

from dataclasses import fields
from math import log2, sqrt

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adjoint
from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.linalg import LinearOperator, SparseMatrix
from adjoint.methods import METHODS, CollocationTableau, FullyImplicitRungeKutta
from adjoint.methods.tableaux_implicit import IMPLICIT_TABLEAUX
from adjoint.sensitivity.coupled import coupled_matrix

from .rooted_trees import elementary_weights, inverse_densities
from .test_rosenbrock import ROBER_P, STIFF, driven, exact, rober, small

NAMES = sorted(IMPLICIT_TABLEAUX)
ADAPTIVE = ["radau5", "radauIIA3"]
SYMMETRIC = ["gl4", "gl6", "implicit_midpoint"]
#: so tight that what is left of the iterations is rounding
TIGHT = {"rtol": 1e-12, "atol": 1e-14}


def constant(name):
    """The method with constant steps, also where it has an error estimate: a function of its arguments that is smooth to rounding."""
    tab = IMPLICIT_TABLEAUX[name]
    given = {f.name: getattr(tab, f.name) for f in fields(tab) if f.init}
    return FullyImplicitRungeKutta(CollocationTableau(**(given | {"gamma": None})))


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


# ---------------------------------------------------------------------------------------------- stiff references


@pytest.mark.parametrize("problem", ["hires", *(pytest.param(name, marks=pytest.mark.slow) for name in ("orego", "vdpol"))])
def test_stiff_references(problem):
    fun, end, y0, truth = STIFF[problem]
    sol = solve_ivp(fun, (0.0, end), torch.tensor(y0), method="radau5", rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sol.y[-1], torch.tensor(truth), rtol=1e-7, atol=0)


def test_rober_over_eleven_decades():
    sol = solve_ivp(rober, (0.0, 1e11), torch.tensor([1.0, 0, 0]), (torch.tensor(ROBER_P),), method="radau5", rtol=1e-8, atol=1e-18)
    truth = torch.tensor([0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050])
    torch.testing.assert_close(sol.y[-1], truth, rtol=1e-7, atol=0)


def test_rober_gradients():
    p = torch.tensor(ROBER_P, requires_grad=True)
    sol = solve_ivp(rober, (0.0, 40.0), torch.tensor([1.0, 0, 0]), (p,), method="radau5", rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(sol.y[-1, :2], torch.tensor([0.7158270687194055, 9.185534764557783e-06]), rtol=1e-8, atol=0)
    truth = torch.tensor(
        [
            [-4.2475587717057239, 1.3730807973446243e-05, -2.2883550889056715e-09],
            [4.591196249253923e-05, -2.3571921138463359e-10, -1.1380595093501321e-13],
        ]
    )
    for i, expected in enumerate(truth):
        (found,) = torch.autograd.grad(sol.y[-1, i], p, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


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
    rate = torch.tensor(100.0, dtype=torch.float32, requires_grad=True)

    def fun(t, y, rate):
        return {"a": -rate * (y["a"] - torch.cos(t)), "b": (y["a"].sum() - y["b"][0],)}

    y0 = {"a": torch.zeros(2, 2, dtype=torch.float32), "b": (torch.ones((), dtype=torch.float32),)}
    sol = solve_ivp(fun, (0.0, 1.0), y0, (rate,), method=name, first_step=None if name in ADAPTIVE else 0.01)
    assert sol.y["a"].dtype == torch.float32 and sol.y["a"].shape == (2, 2, 2)
    k, t = 100.0, 1.0
    truth = k * (k * np.cos(t) + np.sin(t)) / (k * k + 1) - k * k / (k * k + 1) * np.exp(-k * t)
    torch.testing.assert_close(sol.y["a"][-1], torch.full((2, 2), truth, dtype=torch.float32), rtol=2e-4, atol=1e-5)
    (found,) = torch.autograd.grad(sol.y["a"][-1, 0, 0], rate)
    # d/dk of k (k cos + sin) / (k^2 + 1); the transient is gone
    slope = ((2 * k * np.cos(t) + np.sin(t)) * (k * k + 1) - k * (k * np.cos(t) + np.sin(t)) * 2 * k) / (k * k + 1) ** 2
    torch.testing.assert_close(found, torch.tensor(slope, dtype=torch.float32), rtol=5e-2, atol=1e-6)


def test_sparse_systems():
    """The heat equation with a source, on enough points for the sparse path; truth from SciPy."""
    pytest.importorskip("scipy")
    from scipy.integrate import solve_ivp as scipy_ivp

    n = 100

    def fun(t, u, c):
        left = torch.cat([torch.zeros_like(u[..., :1]), u[..., :-1]], -1)
        right = torch.cat([u[..., 1:], torch.zeros_like(u[..., :1])], -1)
        return c * n * n * (left - 2 * u + right) + torch.exp(-u)

    c = torch.tensor(0.5, requires_grad=True)
    pattern = abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
    for sparsity in (None, torch.tensor(pattern)):
        sol = solve_ivp(fun, (0.0, 0.3), torch.zeros(n), (c,), method="radau5", rtol=1e-6, atol=1e-9, jac_sparsity=sparsity)
        ends = [
            scipy_ivp(
                lambda t, u, c=side: fun(t, torch.as_tensor(u), c).numpy(), (0.0, 0.3), np.zeros(n), method="LSODA", lband=1, uband=1,
                rtol=1e-10, atol=1e-12,
            ).y[:, -1]
            for side in (0.499, 0.5, 0.501)
        ]  # fmt: skip
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
