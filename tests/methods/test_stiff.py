"""Diagonally implicit methods: order, trusted values, every gradient in every nesting, batches, sparse Jacobians, failures."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

import adjoint
from adjoint import Backprop, InvalidInput, UnsupportedCombination, solve_ivp
from adjoint.methods import METHODS
from adjoint.methods.dirk import square
from adjoint.methods.tableaux_dirk import DIRK_TABLEAUX

from ..helpers.rooted_trees import elementary_weights, inverse_densities
from ..helpers.stiff_problems import (
    HIRES,
    HIRES_END,
    HIRES_Y0,
    OREGO,
    OREGO_Y0,
    ROBER_1E11,
    ROBER_40,
    ROBER_40_JACOBIAN,
    ROBER_P,
    VDPOL,
    VDPOL_Y0,
    hires,
    orego,
    rober,
    van_der_pol,
    vdpol,
)

NAMES = list(DIRK_TABLEAUX)
MU = torch.tensor(5.0, dtype=torch.float64)
Y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize("tableau", DIRK_TABLEAUX.values(), ids=NAMES)
def test_order_conditions(tableau):
    a = square(tableau.a)

    def order_of(weights, theta=1.0):
        """The highest order whose conditions hold."""
        for n, phi in enumerate(elementary_weights(a, 6), 1):
            if np.abs(phi @ weights - theta**n * inverse_densities(n)).max() > 1e-10:
                return n - 1
        return 6

    b = np.array(tableau.b)
    assert order_of(b) == tableau.order
    assert min(order_of(b - np.array(tableau.error)), tableau.order) >= tableau.error_order
    for theta in (0.2, 0.5, 0.9):
        weights = np.array([sum(c * theta ** (m + 1) for m, c in enumerate(row)) for row in tableau.dense])
        assert order_of(weights, theta) >= tableau.dense_order


@pytest.mark.parametrize("tableau", DIRK_TABLEAUX.values(), ids=NAMES)
def test_stability(tableau):
    """``|R(iy)| <= 1`` on the imaginary axis; ``R = 0`` at infinity for L-stable methods."""
    a, b = square(tableau.a), np.array(tableau.b)
    s = len(b)

    def R(z):
        return 1 + z * b @ np.linalg.solve(np.eye(s) - z * a, np.ones(s))

    assert max(abs(R(1j * y)) for y in np.logspace(-3, 4, 200)) <= 1 + 1e-9
    at_infinity = abs(R(-1e6))
    assert at_infinity < 1e-5 if "L-stable" in tableau.stability else at_infinity <= 1 + 1e-9


def _exact(t):
    return torch.stack([torch.cos(t), 1 / (1 + t)])


def _problem(t, y):
    """Nonlinear, depends on time, moderately stiff about a known solution."""
    u = _exact(t)
    du = torch.stack([-torch.sin(t), -1 / (1 + t) ** 2])
    return du - 3 * (y - u) - (y**3 - u**3) + 0.5 * torch.flip(y - u, [0])


@pytest.mark.parametrize("tableau", DIRK_TABLEAUX.values(), ids=NAMES)
def test_measured_order(tableau):
    """Of the step and of the dense output, with constant steps: sizes are forced by max_step and loose tolerances."""
    errors, dense = [], []
    sizes = [2.0**-k for k in ((3, 4, 5) if tableau.order > 3 else (5, 6, 7))]
    for h in sizes:
        sol = solve_ivp(
            _problem, (0.0, 1.0), _exact(torch.tensor(0.0)), method=tableau.name, rtol=1e-3, atol=1e-3, first_step=h, max_step=h,
            dense_output=True, t_eval="steps",
        )  # fmt: skip
        assert len(sol.t) == round(1 / h) + 1
        errors.append(float((sol.y[-1] - _exact(torch.tensor(1.0))).abs().max()))
        inside = torch.linspace(0.01, 0.99, 37)
        dense.append(float((sol(inside) - _exact(inside).T).abs().max()))
    order = math.log2(errors[0] / errors[-1]) / 2
    assert order > tableau.order - 0.2, (errors, order)
    assert math.log2(dense[-2] / dense[-1]) > min(tableau.dense_order, tableau.order) - 0.2


@pytest.mark.parametrize("method", ["kvaerno5", "kvaerno3"])
def test_robertson_and_its_sensitivities(method):
    p = ROBER_P.clone().requires_grad_()
    rtol = 1e-8 if method == "kvaerno5" else 1e-7
    y = solve_ivp(rober, (0.0, 40.0), torch.tensor([1.0, 0, 0]), args=(p,), method=method, rtol=rtol, atol=1e-13).y[-1]
    assert torch.allclose(y[:2], ROBER_40, rtol=100 * rtol)
    for i in range(2):
        (g,) = torch.autograd.grad(y[i], p, retain_graph=True)
        assert torch.allclose(g, ROBER_40_JACOBIAN[i], rtol=1000 * rtol)


def test_trusted_values():
    options = dict(method="kvaerno5", rtol=1e-6)
    y = solve_ivp(rober, (0.0, 1e11), torch.tensor([1.0, 0, 0]), args=(ROBER_P,), atol=1e-14, **options).y[-1]
    assert torch.allclose(y, ROBER_1E11, rtol=1e-4)
    assert torch.allclose(solve_ivp(hires, (0.0, HIRES_END), HIRES_Y0, atol=1e-12, **options).y[-1], HIRES, rtol=1e-4)
    assert torch.allclose(solve_ivp(orego, (0.0, 360.0), OREGO_Y0, atol=1e-10, **options).y[-1], OREGO, rtol=1e-4)
    assert torch.allclose(solve_ivp(vdpol, (0.0, 2.0), VDPOL_Y0, atol=1e-10, **options).y[-1], VDPOL, rtol=1e-4)


def _solve(mu, y0=Y0, end=1.0, method="kvaerno3", t_eval=None, gradient=None, **options):
    settings = dict(rtol=1e-4, atol=1e-6) | options
    return solve_ivp(van_der_pol, (0.0, end), y0, args=(mu,), method=method, t_eval=t_eval, gradient=gradient, **settings).y


@pytest.mark.parametrize("method", NAMES)
@pytest.mark.slow_cases("trapezoid", "sdirk2")
def test_discrete_adjoint_is_backprop_through_the_steps(method):
    times = torch.tensor([0.13, 0.5, 0.5, 1.0])
    found = []
    for gradient in (None, Backprop()):
        mu, y0, end, ts = MU.clone().requires_grad_(), Y0.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True), times.clone()
        ts.requires_grad_()
        a = (_solve(mu, y0, end, method, gradient=gradient)[-1] ** 2).sum()
        b = (_solve(mu, y0, 1.0, method, ts, gradient) ** 2).sum()
        found.append([*torch.autograd.grad(a, (mu, y0, end)), *torch.autograd.grad(b, (mu, y0, ts))])
    for x, y in zip(*found, strict=True):
        assert torch.allclose(x, y, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("gradient", [None, Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("method", ["kvaerno3", "trbdf2", pytest.param("sdirk2", marks=pytest.mark.slow)])
@pytest.mark.slow_cases("kvaerno3-backprop", "trbdf2-discrete", "kvaerno3-discrete")
def test_second_order_in_every_nesting(method, gradient):
    def cost(mu):
        options = {"gradient": gradient, "rtol": 1e-3, "atol": 1e-4, "first_step": 0.02}
        return (_solve(mu, method=method, end=0.06, t_eval=torch.tensor([0.03, 0.06]), **options) ** 2).sum()

    want, *others = (outer(inner(cost))(MU) for outer, inner in itertools.product([jacfwd, jacrev], repeat=2))
    for other in others:
        assert torch.allclose(other, want, rtol=1e-9)
    step = 1e-3
    slope = (grad(cost)(MU + step) - grad(cost)(MU - step)) / (2 * step)
    assert torch.allclose(slope, want, rtol=5e-2)


def test_gradients_agree_with_differences_of_the_solution():
    """Exact derivatives of the computed solution: the truth is the same problem at tight tolerances, by SciPy."""
    from scipy.integrate import solve_ivp as scipy_solve

    def end(mu):
        f = lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0] + 0.1 * np.sin(t)]  # noqa: E731
        return scipy_solve(f, (0, 1), [2.0, 0.0], method="Radau", rtol=1e-12, atol=1e-13).y[0, -1]

    want = (end(5 + 1e-4) - end(5 - 1e-4)) / 2e-4
    got = grad(lambda mu: _solve(mu, method="kvaerno5", rtol=1e-9, atol=1e-11)[-1, 0])(MU)
    assert abs(float(got) - want) < 1e-6 * abs(want)


def test_batched_equals_one_by_one_and_vmap():
    many = torch.linspace(1.0, 20.0, 3)
    y0 = Y0 + 0.1 * torch.randn(3, 2)

    def batch(t, y, mu):
        return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0] + 0.1 * torch.sin(t)], 1)

    mu = many.clone().requires_grad_()
    sol = solve_ivp(batch, (0.0, 1.0), y0, args=(mu,), method="kvaerno3", rtol=1e-4, atol=1e-6, batched=True)
    assert sol.stats.n_accepted.unique().numel() > 1 and bool((sol.stats.n_newton > 0).all())
    (g,) = torch.autograd.grad((sol.y[-1] ** 2).sum(), mu)
    cost = lambda m, y: (_solve(m, y)[-1] ** 2).sum()  # noqa: E731
    for b in range(3):
        row = solve_ivp(batch, (0.0, 1.0), y0[b : b + 1], args=(many[b : b + 1],), method="kvaerno3", rtol=1e-4, atol=1e-6, batched=True)
        assert torch.allclose(row.y[:, 0], sol.y[:, b], rtol=1e-12, atol=1e-14)
        # the loop for one trajectory rounds its step sizes elsewhere
        assert torch.allclose(_solve(many[b], y0[b]), sol.y[:, b], rtol=1e-9, atol=1e-11)
        assert torch.allclose(grad(cost)(many[b], y0[b]), g[b], rtol=1e-7)
    assert torch.allclose(vmap(grad(cost))(many, y0), g, rtol=1e-10)


def test_one_failing_trajectory_fails_alone():
    def blow_up(t, y, a):
        return a.unsqueeze(-1) * y**2

    a = torch.tensor([-1.0, 2.0])
    sol = solve_ivp(blow_up, (0.0, 1.0), torch.ones(2, 1), args=(a,), method="kvaerno3", rtol=1e-5, batched=True, throw=False)
    assert sol.success.tolist() == [True, False]
    assert torch.allclose(sol.y[-1, 0], torch.tensor([0.5]), rtol=1e-4) and bool(sol.y[-1, 1].isnan())


def test_large_sparse_system_finds_its_pattern():
    """A heat equation with 150 unknowns: one sparse factorisation a step, the pattern found or given."""
    n = 150
    h = 1 / (n + 1)

    def heat(t, u, k):
        w = torch.nn.functional.pad(u, (1, 1))
        return k * (w[:-2] - 2 * w[1:-1] + w[2:]) / h**2

    x = torch.arange(1, n + 1) * h
    u0 = torch.sin(torch.pi * x)
    k = torch.tensor(0.1, requires_grad=True)
    options = dict(method="kvaerno3", rtol=1e-5, atol=1e-8)
    sol = solve_ivp(heat, (0.0, 1.0), u0, args=(k,), **options)
    rate = 4 / h**2 * math.sin(math.pi * h / 2) ** 2  # of this mode of the discrete operator
    assert torch.allclose(sol.y[-1], torch.exp(-k * rate) * u0, rtol=1e-4)
    (g,) = torch.autograd.grad(sol.y[-1].sum(), k)
    assert torch.allclose(g, -rate * torch.exp(-k * rate) * u0.sum(), rtol=1e-3)
    band = torch.diag(torch.ones(n)) + torch.diag(torch.ones(n - 1), 1) + torch.diag(torch.ones(n - 1), -1)
    for extra in ({"jac_sparsity": band}, {"jac_sparsity": band, "linear_solver": adjoint.linalg.SparseLU()}):
        other = solve_ivp(heat, (0.0, 1.0), u0, args=(k,), **options, **extra)
        assert torch.allclose(other.y[-1], sol.y[-1], rtol=1e-9)


def test_states_of_every_kind():
    options = dict(method="kvaerno3", rtol=1e-6, atol=1e-8)
    start = {"a": torch.ones(2), "b": (torch.ones(()),)}
    tree = solve_ivp(lambda t, y: {"a": -y["a"], "b": (-2 * y["b"][0],)}, (0.0, 1.0), start, **options)
    assert torch.allclose(tree.y["a"][-1], torch.full((2,), math.exp(-1)), rtol=1e-5)
    z = solve_ivp(lambda t, y: 1j * y, (0.0, 1.0), torch.ones(1, dtype=torch.complex128), **options).y[-1]
    assert torch.allclose(z, torch.exp(torch.tensor([1j])), rtol=1e-5)
    single = solve_ivp(lambda t, y: -50 * y, (0.0, 1.0), torch.ones(3, dtype=torch.float32), method="trbdf2")
    assert single.y.dtype == torch.float32 and float(single.y[-1].abs().max()) < 1e-4
    back = solve_ivp(lambda t, y: -y, (1.0, 0.0), torch.ones(1), **options).y[-1]
    assert torch.allclose(back, torch.tensor([math.e]), rtol=1e-5)


def test_explicit_methods_fail_where_these_do_not():
    with pytest.raises(adjoint.MaxStepsReached, match="stiff"):
        solve_ivp(vdpol, (0.0, 2.0), VDPOL_Y0, method="tsit5", max_steps=2000)
    assert solve_ivp(vdpol, (0.0, 2.0), VDPOL_Y0, method="kvaerno5", max_steps=2000).success


def test_unsupported_combinations():
    run = lambda **o: solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), **({"method": "kvaerno3"} | o))  # noqa: E731
    with pytest.raises(UnsupportedCombination, match="jac_sparsity="):
        run(method="tsit5", jac_sparsity=torch.eye(2))
    with pytest.raises(InvalidInput, match="linear_solver"):
        run(linear_solver="lu")
    with pytest.raises(InvalidInput, match=r"pattern|shape"):
        run(jac_sparsity=torch.eye(3))
    assert METHODS["kvaerno5"].implicit


def kink(t, y):
    """Attracts from both sides: no implicit step over it has a solution."""
    return -torch.where(y > 0.5, 1.0, -1.0) * 1e3


@pytest.mark.parametrize("method", ["kvaerno3", "trbdf2"])
def test_newton_that_fails_is_told_from_a_faulty_fun(method):
    y0 = torch.ones(1, dtype=torch.float64)
    options = dict(method=method, min_step=0.05, first_step=0.1, max_steps=200, rtol=1e6, atol=1e6)
    with pytest.raises(adjoint.NewtonDidNotConverge, match="Newton's iteration") as caught:
        solve_ivp(kink, (0.0, 1.0), y0, **options)
    assert isinstance(caught.value, adjoint.SolveError) and caught.value.t < 1.0
    sol = solve_ivp(kink, (0.0, 1.0), y0, throw=False, **options)
    assert sol.status == -4 and "Newton" in sol.message
    with pytest.raises(adjoint.NonFiniteState):
        solve_ivp(lambda t, y: torch.log(0.5 - t) * y, (0.0, 1.0), y0, **options)


def test_newton_that_fails_with_constant_steps():
    y0 = torch.ones(1, dtype=torch.float64)
    with pytest.raises(adjoint.StagesDidNotConverge, match="with the given step size"):
        solve_ivp(kink, (0.0, 1.0), y0, method="implicit_midpoint", first_step=0.1)


@pytest.mark.parametrize("method", ["kvaerno5", "bdf"])
@pytest.mark.parametrize("given", [False, True])
def test_entries_that_a_pattern_lacks_are_not_missing_in_derivatives(method, given):
    n = 120

    def fun(t, y, p):
        away = -p * y * y
        return away + 3 * torch.roll(y, 37) if given or float(t) > 0.3 else away

    def slope(method, **options):
        p = torch.tensor(1.0, requires_grad=True)
        sol = solve_ivp(
            fun, (0.0, 0.6), torch.linspace(0.5, 1.0, n), args=(p,), method=method, rtol=1e-6, atol=1e-8, step_ts=[0.3], **options
        )
        return torch.autograd.grad(sol.y[-1].square().sum(), p)[0]

    want = slope("tsit5")
    if given:
        with pytest.warns(UserWarning, match="jac_sparsity lacks"):
            got = slope(method, jac_sparsity=torch.eye(n))
    else:
        got = slope(method)
    assert abs(float(got / want) - 1) < 2e-5
