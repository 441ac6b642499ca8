"""Rosenbrock methods: order conditions, stability, convergence, and what they count."""

from __future__ import annotations

import warnings
from functools import cache
from math import log2, sin

import numpy as np
import pytest
import torch

import adjoint
from adjoint import solve_ivp
from adjoint.methods import METHODS
from adjoint.methods.tableaux_rosenbrock import ROSENBROCK_TABLEAUX

from ..helpers.problems import HEAT_POINTS, heat_by_scipy, heat_with_source
from ..helpers.rooted_trees import density, trees

NAMES = sorted(ROSENBROCK_TABLEAUX)
EXACT = {"rtol": 1e30, "atol": 1e30}


# ---------------------------------------------------------------------------------------------- tableaux


def standard(tab):
    """alpha, beta, and the matrix that turns weights of K into weights of k."""
    alpha, gamma = tab.standard_form()
    return alpha, alpha + gamma, gamma


def stage_vectors(tab, n):
    """Hairer & Wanner II, theorem IV.7.4: beta where a vertex has one branch, alpha where it has several."""
    alpha, beta, _ = standard(tab)

    @cache
    def phi(tree):
        out = np.ones(len(alpha))
        for child in tree:
            out = out * ((beta if len(tree) == 1 else alpha) @ phi(child))
        return out

    return [(size, 1 / density(tree), phi(tree)) for size in range(1, n + 1) for tree in trees(size)]


def defects(tab, weights, n, theta=1.0):
    """Largest violation among the trees of each order."""
    found = np.zeros(n + 1)
    for size, inverse, phi in stage_vectors(tab, n):
        found[size] = max(found[size], abs(weights @ phi - theta**size * inverse))
    return found[1:]


@pytest.mark.parametrize("name", NAMES)
def test_order_conditions(name):
    tab = ROSENBROCK_TABLEAUX[name]
    gamma = standard(tab)[2]
    b, error = np.array(tab.b) @ gamma, np.array(tab.error) @ gamma
    main, embedded = defects(tab, b, tab.order + 1), defects(tab, b - error, tab.error_order + 1)
    assert main[:-1].max() < 1e-13 and main[-1] > 1e-3
    assert embedded[:-1].max() < 1e-13 and embedded[-1] > 1e-3
    for theta in (0.2, 0.5, 0.9):
        weights = METHODS[name].dense_weights(torch.tensor(theta)).numpy() @ gamma
        dense = defects(tab, weights, tab.dense_order + 1, theta)
        assert dense[:-1].max() < 1e-12 and dense[-1] > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_stability(name):
    tab = ROSENBROCK_TABLEAUX[name]
    _, beta, gamma = standard(tab)
    one = np.ones(len(beta))

    def r(z, weights):
        return 1 + z * (weights @ gamma) @ np.linalg.solve(np.eye(len(beta)) - z * beta, one)

    at_infinity = 1 - np.array(tab.b) @ gamma @ np.linalg.solve(beta, one)
    assert abs(at_infinity) < 1e-12
    assert abs(1 - (np.array(tab.b) - tab.error) @ gamma @ np.linalg.solve(beta, one)) < 1e-12
    # A-stable: bounded by one on the imaginary axis, with all poles (1 / gamma) to the right
    assert tab.gamma > 0
    axis = np.concatenate([np.linspace(0, 50, 2001), np.logspace(1.7, 8, 200)])
    assert max(abs(r(1j * y, np.array(tab.b))) for y in axis) < 1 + 1e-10


def test_faulty_tableaux_are_refused():
    from dataclasses import fields

    from adjoint.methods import RosenbrockTableau

    good = {f.name: getattr(ROSENBROCK_TABLEAUX["rodas4"], f.name) for f in fields(RosenbrockTableau) if f.init}
    RosenbrockTableau(**good)
    for name, value in (
        ("c", (0.0, 0.387, 0.21, 0.63, 1.0, 1.0)),
        ("d", (0.25, -0.1, 0.1035, -0.0362, 0.0, 0.0)),
        ("b", (*good["b"][:-1], 2.0)),
        ("error", (0.0, 1.0)),
        ("a", ((0.0,), *good["a"][1:])),
    ):
        with pytest.raises(ValueError):
            RosenbrockTableau(**{**good, name: value})


# ---------------------------------------------------------------------------------------------- convergence


def driven(t, y, p):
    """Nonlinear, non-autonomous, coupled; solution (cos t, exp(sin 2t)) for p = 1."""
    t = t.unsqueeze(-1) if t.dim() else t.reshape(1)
    u, v = torch.cos(t), torch.exp(torch.sin(2 * t))
    x, z = y[..., :1], y[..., 1:]
    first = -torch.sin(t) + p * (u * v - x * z) + (u**2 - x**2)
    second = 2 * torch.cos(2 * t) * z + torch.sin(x) - torch.sin(u)
    return torch.cat([first, second], -1)


def exact(t):
    return torch.stack([torch.cos(t), torch.exp(torch.sin(2 * t))], -1)


def errors(name, steps, inner=False):
    """Of fixed steps: at the end, or the worst inside of steps."""
    h = 1.5 / steps
    start = torch.tensor(0.3)
    times = start + h * (torch.arange(steps).unsqueeze(-1) + torch.tensor([0.23, 0.5, 0.81])).reshape(-1)
    sol = solve_ivp(
        driven,
        (0.3, 1.8),
        exact(start),
        (torch.tensor(1.0),),
        method=name,
        first_step=h,
        max_step=h,
        t_eval=torch.cat([times, torch.tensor([1.8])]),
        **EXACT,
    )
    assert sol.stats.n_accepted == steps
    found = (sol.y - exact(sol.t)).abs().amax(-1)
    return float(found[:-1].max() if inner else found[-1])


@pytest.mark.parametrize("name", NAMES)
def test_measured_order(name):
    tab = ROSENBROCK_TABLEAUX[name]
    few = 16 if tab.order == 5 else 32
    assert log2(errors(name, few) / errors(name, 2 * few)) > tab.order - 0.2
    # the error between the steps is one order higher in one step, and that of the steps adds up
    expected = min(tab.dense_order + 1, tab.order)
    assert log2(errors(name, few, True) / errors(name, 2 * few, True)) > expected - 0.2


@pytest.mark.parametrize(("name", "order"), [("rodas3p", 2), ("rodas4", 1), ("rodas5p", 3)])
def test_stiff_order_is_reduced(name, order):
    """Prothero & Robinson: y' = -(y - cos t)/eps - sin t with h >> eps. The error is eps times a low power of h."""
    eps = 1e-6

    def fun(t, y):
        return -(y - torch.cos(t)) / eps - torch.sin(t)

    found = []
    for steps in (40, 80):
        h = 1.0 / steps
        sol = solve_ivp(fun, (0.0, 1.0), torch.ones(1), method=name, first_step=h, max_step=h, **EXACT)
        found.append(float((sol.y[-1] - torch.cos(torch.tensor(1.0))).abs()))
    assert found[0] < 1e-9
    assert abs(log2(found[0] / found[1]) - order) < 0.25


# ---------------------------------------------------------------------------------------------- work


def test_work_is_counted():
    """One Jacobian a step, one factorisation an attempt, fixed solves; counts are those of calls."""
    calls = []

    class Counted(torch.nn.Module):
        def forward(self, t, y):
            calls.append(1)
            return -50 * (y - torch.cos(t)) ** 3

    for name in NAMES:
        calls.clear()
        with torch.no_grad():
            stats = solve_ivp(Counted(), (0.0, 2.0), torch.ones(2), method=name).stats
        s = METHODS[name].n_stages
        assert stats.n_rejected > 0 and stats.n_newton == 0
        assert stats.n_jac == stats.n_accepted
        assert stats.n_factorizations == stats.n_steps
        assert stats.n_solves == s * stats.n_steps
        # a Jacobian is one call that serves all columns; one call more looks for captured tensors
        assert len(calls) - stats.n_jac - stats.n_fun in (0, 1)


# ---------------------------------------------------------------------------------------------- large systems, failures


def test_sparse_systems():
    """The heat equation with a source, on enough points for the sparse path; truth from SciPy."""
    pytest.importorskip("scipy")
    c = torch.tensor(0.5, requires_grad=True)
    sol = solve_ivp(heat_with_source, (0.0, 0.3), torch.zeros(HEAT_POINTS), (c,), method="rodas4", rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(sol.y[-1], torch.tensor(heat_by_scipy(0.5)), rtol=1e-5, atol=1e-7)
    (found,) = torch.autograd.grad(sol.y[-1].sum(), c)
    expected = (heat_by_scipy(0.501).sum() - heat_by_scipy(0.499).sum()) / 0.002
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


def test_failure_is_not_a_number():
    """A right-hand side that stops being finite ends with a status, not with a plausible number."""
    sol = solve_ivp(lambda t, y: y * y, (0.0, 2.0), torch.ones(1), method="rodas4", throw=False)
    assert sol.status < 0
    assert torch.isnan(sol.y[-1]).all()
    with pytest.raises(adjoint.errors.SolveError):
        solve_ivp(lambda t, y: y * y, (0.0, 2.0), torch.ones(1), method="rodas4")


@pytest.mark.filterwarnings("default::UserWarning")
def test_a_lost_time_derivative_is_named():
    """A time that is read as a number has none: right, but with many steps; the same function in tensors says nothing."""
    table = lambda t, y: -50 * (y - torch.as_tensor(sin(3 * t.item())))  # noqa: E731
    tensors = lambda t, y: -50 * (y - torch.sin(3 * t))  # noqa: E731
    options = {"method": "rodas5p", "rtol": 1e-5, "atol": 1e-6}
    with pytest.warns(UserWarning, match="read t as a number"):
        numbers = solve_ivp(table, (0.0, 0.5), torch.zeros(1), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = solve_ivp(tensors, (0.0, 0.5), torch.zeros(1), **options)
        solve_ivp(table, (0.0, 0.5), torch.zeros(1), **(options | {"method": "kvaerno5"}))
    assert torch.allclose(numbers.y[-1], right.y[-1], rtol=1e-4)
