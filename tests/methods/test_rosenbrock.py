"""Rosenbrock methods: order conditions, stability, convergence, stiff references, and every kind of derivative."""

from __future__ import annotations

import warnings
from functools import cache
from math import log2, sin

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import adjoint
from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.methods import METHODS
from adjoint.methods.tableaux_rosenbrock import ROSENBROCK_TABLEAUX

from ..helpers.problems import HEAT_POINTS, check_drawn_to_a_cosine, heat_by_scipy, heat_with_source
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


# ---------------------------------------------------------------------------------------------- stiff references


def rober(t, y, p):
    a, b, c = y.unbind(-1)
    r1, r2, r3 = p[..., 0] * a, p[..., 1] * b * c, p[..., 2] * b * b
    return torch.stack([-r1 + r2, r1 - r2 - r3, r3], -1)


ROBER_P = (0.04, 1e4, 3e7)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    r = 280 * f * h - 1.81 * g
    return torch.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            r,
            -r,
        ],
        -1,
    )


def orego(t, y):
    a, b, c = y.unbind(-1)
    return torch.stack([77.27 * (b + a * (1 - 8.375e-6 * a - b)), (c - (1 + a) * b) / 77.27, 0.161 * (a - c)], -1)


def vdpol(t, y):
    a, b = y.unbind(-1)
    return torch.stack([b, ((1 - a * a) * b - a) / 1e-6], -1)


STIFF = {
    "hires": (
        hires,
        321.8122,
        (1.0, 0, 0, 0, 0, 0, 0, 0.0057),
        (
            0.7371312573325668e-3,
            0.1442485726316185e-3,
            0.5888729740967575e-4,
            0.1175651343283149e-2,
            0.2386356198831331e-2,
            0.6238968252742796e-2,
            0.2849998395185769e-2,
            0.2850001604814231e-2,
        ),
    ),
    "orego": (orego, 360.0, (1.0, 2.0, 3.0), (0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3)),
    "vdpol": (vdpol, 2.0, (2.0, 0.0), (0.1706167732170483e1, -0.8928097010247975)),
}


@pytest.mark.parametrize("name", [pytest.param("rodas4", marks=pytest.mark.slow), "rodas5p"])
@pytest.mark.parametrize("problem", sorted(STIFF))
def test_stiff_references(problem, name):
    fun, end, y0, truth = STIFF[problem]
    sol = solve_ivp(fun, (0.0, end), torch.tensor(y0), method=name, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sol.y[-1], torch.tensor(truth), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [pytest.param("rodas4", marks=pytest.mark.slow), "rodas5p"])
def test_rober_over_eleven_decades(name):
    sol = solve_ivp(rober, (0.0, 1e11), torch.tensor([1.0, 0, 0]), (torch.tensor(ROBER_P),), method=name, rtol=1e-8, atol=1e-18)
    truth = torch.tensor([0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050])
    torch.testing.assert_close(sol.y[-1], truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [pytest.param("rodas4", marks=pytest.mark.slow), "rodas5p"])
def test_rober_gradients(name):
    p = torch.tensor(ROBER_P, requires_grad=True)
    sol = solve_ivp(rober, (0.0, 40.0), torch.tensor([1.0, 0, 0]), (p,), method=name, rtol=1e-8, atol=1e-13)
    torch.testing.assert_close(sol.y[-1, :2], torch.tensor([0.7158270687194055, 9.185534764557783e-06]), rtol=1e-7, atol=0)
    truth = torch.tensor(
        [
            [-4.2475587717057239, 1.3730807973446243e-05, -2.2883550889056715e-09],
            [4.591196249253923e-05, -2.3571921138463359e-10, -1.1380595093501321e-13],
        ]
    )
    for i, expected in enumerate(truth):
        (found,) = torch.autograd.grad(sol.y[-1, i], p, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


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


# ---------------------------------------------------------------------------------------------- derivatives


def small(t, y, p):
    t = t.unsqueeze(-1) if t.dim() else t
    return torch.sin(p[..., :1] * y.flip(-1)) - p[..., 1:] * y * torch.cos(t * y)


P = (1.3, 4.0)
Y0 = (0.8, -0.4)


def loss(name, **options):
    def run(y0, p, start, end, inner):
        sol = solve_ivp(
            small,
            torch.stack([start, end]),
            y0,
            (p,),
            method=name,
            t_eval=torch.stack([start + inner, end - inner, end]),
            **({"first_step": 0.25, "max_step": 0.25} | EXACT | options),
        )
        return (sol.y * torch.tensor([[1.0, 0.5], [-0.7, 2.0], [0.3, 1.1]])).sum(-1)

    return run


def arguments():
    numbers = (torch.tensor(Y0), torch.tensor(P), torch.tensor(0.1), torch.tensor(1.05), torch.tensor(0.31))
    return tuple(x.requires_grad_(True) for x in numbers)


@pytest.mark.parametrize("name", NAMES)
def test_discrete_adjoint_is_backprop(name):
    """To rounding, with everything that can be asked for, adaptive steps included."""
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        args = arguments()
        run = loss(name, gradient=gradient, rtol=1e-4, atol=1e-5, first_step=None, max_step=float("inf"))
        found.append(torch.autograd.grad(run(*args).square().sum(), args))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()])
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name, gradient):
    assert gradcheck(loss(name, gradient=gradient), arguments())


@pytest.mark.parametrize("name", ["rodas3p", pytest.param("rodas5p", marks=pytest.mark.slow)])
def test_gradgradcheck(name):
    assert gradgradcheck(loss(name, first_step=0.5, max_step=0.5), arguments())


@pytest.mark.parametrize("name", ["rodas3p", pytest.param("rodas5p", marks=pytest.mark.slow)])
def test_hessian_in_every_nesting(name):
    y0 = torch.tensor(Y0)

    def value(p):
        sol = solve_ivp(small, (0.0, 1.0), y0, (p,), method=name, first_step=0.5, max_step=0.5, **EXACT)
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


@pytest.mark.parametrize("name", NAMES)
def test_batched_is_one_by_one(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])
    p = torch.tensor([P, (0.5, 30.0), (2.0, 100.0)])
    times = torch.tensor([0.4, 1.0])

    def solve(y0, p, batched):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), method=name, batched=batched, t_eval=times, rtol=1e-5, atol=1e-7)

    y0.requires_grad_(True), p.requires_grad_(True)
    together = solve(y0, p, True)
    grads = torch.autograd.grad(together.y.square().sum(), (y0, p))
    for b in range(3):
        a, q = y0[b].detach().requires_grad_(True), p[b].detach().requires_grad_(True)
        alone = solve(a, q, False)
        # the loop for one trajectory rounds its step sizes elsewhere, has the slope in time with the Jacobian, and evaluates none behind a
        # rejected step
        torch.testing.assert_close(together.y[:, b], alone.y, rtol=1e-8, atol=1e-11)
        beyond = int(together.stats.n_fun[b]) - alone.stats.n_fun
        assert alone.stats.n_steps <= beyond <= alone.stats.n_steps + alone.stats.n_rejected + 1
        assert int(together.stats.n_solves[b]) == alone.stats.n_solves
        one = torch.autograd.grad(alone.y.square().sum(), (a, q))
        for x, y in zip(grads, one, strict=True):
            torch.testing.assert_close(x[b], y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["rodas4"])
def test_vmap_of_grad(name):
    y0 = torch.tensor([Y0, (2.0, 1.0), (-1.0, 0.1)])

    def value(y0, p):
        return solve_ivp(small, (0.0, 1.0), y0, (p,), method=name, rtol=1e-4, atol=1e-6).y[-1].square().sum()

    p = torch.tensor(P)
    mapped = torch.vmap(torch.func.grad(value, argnums=(0, 1)), in_dims=(0, None))(y0, p)
    for b in range(3):
        for x, y in zip(mapped, torch.func.grad(value, argnums=(0, 1))(y0[b], p), strict=True):
            torch.testing.assert_close(x[b], y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_complex_states(name):
    """A holomorphic right-hand side: y' = lam (y - y^2), the logistic equation."""
    lam = torch.tensor(-2.0 + 6.0j, requires_grad=True)
    y0 = torch.tensor([0.6 + 0.2j, 0.3 - 0.1j], dtype=torch.complex128)
    sol = solve_ivp(lambda t, y, lam: lam * (y - y * y), (0.0, 1.0), y0, (lam,), method=name, rtol=1e-6, atol=1e-8)

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
    check_drawn_to_a_cosine(lambda *problem: solve_ivp(*problem, method=name))


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
