"""Additive (implicit-explicit) methods: coefficients, order, what is solved for, every gradient in every nesting, batches, refusals."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import adjoint
from adjoint import Backprop, InvalidInput, SplitFunction, UnsupportedCombination, solve_ivp
from adjoint.methods import IMEX_METHODS, METHODS, AdditiveTableau
from adjoint.methods.tableaux_additive import ADDITIVE_TABLEAUX

from ..helpers.rooted_trees import density, trees
from ..helpers.rooted_trees import order as size_of

NAMES = list(ADDITIVE_TABLEAUX)
ADAPTIVE = [name for name in NAMES if IMEX_METHODS[name].adaptive]
MU = torch.tensor(5.0, dtype=torch.float64)
Y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)


def _square(rows):
    matrix = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows):
        matrix[i, : len(row)] = row
    return matrix


def _vectors(tree, pair):
    """Stage vectors of all colourings of the vertices below the root."""
    out = [np.ones(len(pair[0]))]
    for child in tree:
        below = [m @ v for v in _vectors(child, pair) for m in pair]
        out = [v * w for v in out for w in below]
    return out


def _defect(weights, tab, n, theta=1.0):
    """How far the conditions of all coloured trees of n vertices are from being met by weights of either colour of the root."""
    pair = _square(tab.explicit_a), _square(tab.implicit_a)
    return max(
        abs(w @ v - theta**n / density(tree)) for tree in trees(n) for v in _vectors(tree, pair) for w in np.split(np.array(weights), 2)
    )


@pytest.mark.parametrize("tableau", ADDITIVE_TABLEAUX.values(), ids=NAMES)
def test_order_conditions_of_coloured_trees(tableau):
    assert [size_of(t) for t in trees(3)] == [3, 3]

    def order_of(weights, theta=1.0):
        """The highest order whose conditions hold."""
        return next(n for n in range(1, 7) if _defect(weights, tableau, n, theta) > 1e-12) - 1

    b = np.array([*tableau.explicit_b, *tableau.implicit_b])
    assert order_of(b) == tableau.order
    if tableau.error is not None:
        assert order_of(b - np.array(tableau.error)) == tableau.error_order == tableau.order - 1
    method = IMEX_METHODS[tableau.name]
    for theta in (0.2, 0.5, 0.9):
        weights = method.dense_weights(torch.tensor(theta)).numpy()
        assert order_of(weights, theta) == tableau.dense_order
        assert np.allclose(weights, method.dense_numbers(theta), rtol=1e-14)
    assert np.allclose(method.dense_weights(torch.tensor(1.0)).numpy(), b, atol=1e-12)
    step = 1e-6
    slope = (method.dense_weights(torch.tensor(0.3 + step)) - method.dense_weights(torch.tensor(0.3 - step))) / (2 * step)
    assert torch.allclose(method.dense_slopes(torch.tensor(0.3)), slope, atol=1e-8)


@pytest.mark.parametrize("tableau", ADDITIVE_TABLEAUX.values(), ids=NAMES)
def test_implicit_part_is_l_stable(tableau):
    a, b, s = _square(tableau.implicit_a), np.array(tableau.implicit_b), len(tableau.c)
    R = lambda z: 1 + z * b @ np.linalg.solve(np.eye(s) - z * a, np.ones(s))  # noqa: E731
    assert max(abs(R(1j * y)) for y in np.logspace(-3, 4, 200)) <= 1 + 1e-9
    assert abs(R(-1e7)) < 1e-5


def test_faulty_tableaux_are_refused():
    good = ADDITIVE_TABLEAUX["ars232"]
    fields = {name: getattr(good, name) for name in AdditiveTableau.__dataclass_fields__}
    AdditiveTableau(**fields)
    for wrong, message in (
        ({"explicit_b": (0.0, 0.5, 0.4)}, "weights sum"),
        ({"implicit_a": ((0.0,), (0.0, 0.3), (0.0, 0.7, 0.3))}, "its node"),
        ({"explicit_a": ((), (0.3,))}, "one entry a stage"),
        ({"explicit_a": ((), (0.1, 0.2), (0.5, 0.5))}, "row 1 must have"),
        ({"implicit_a": ((0.1,), *good.implicit_a[1:])}, "first stage"),
        ({"dense": good.dense[:-1]}, "dense output"),
        ({"error": (0.0,) * 6}, "error_order"),
    ):
        with pytest.raises(ValueError, match=message):
            AdditiveTableau(**(fields | wrong))


def _exact(t):
    return torch.stack([torch.cos(t), 1 / (1 + t)])


def _problem():
    """Nonlinear, driven, moderately stiff about a known solution; both parts matter, also at the solution."""
    explicit = lambda t, y: torch.stack([-torch.sin(t), -y[1] * y[1]]) + 0.5 * torch.flip(y - _exact(t), [0]) + 2 * y  # noqa: E731
    implicit = lambda t, y: -3 * (y - _exact(t)) - (y**3 - _exact(t) ** 3) - 2 * _exact(t) * (y / _exact(t)) ** 2  # noqa: E731
    return SplitFunction(explicit, implicit)


@pytest.mark.parametrize("tableau", ADDITIVE_TABLEAUX.values(), ids=NAMES)
def test_measured_order(tableau):
    """Of the step and of the dense output, with constant steps: sizes are forced by max_step and loose tolerances."""
    errors, dense = [], []
    for h in [2.0**-k for k in ((4, 5, 6) if tableau.order > 3 else (5, 6, 7))]:
        sol = solve_ivp(
            _problem(), (0.0, 1.0), _exact(torch.tensor(0.0)), method=tableau.name, rtol=1e-3, atol=1e-3, first_step=h, max_step=h,
            dense_output=True, t_eval="steps",
        )  # fmt: skip
        assert len(sol.t) == round(1 / h) + 1
        errors.append(float((sol.y[-1] - _exact(torch.tensor(1.0))).abs().max()))
        inside = torch.linspace(0.01, 0.99, 37)
        dense.append(float((sol(inside) - _exact(inside).T).abs().max()))
    assert math.log2(errors[-2] / errors[-1]) > tableau.order - 0.25, errors
    assert math.log2(dense[-2] / dense[-1]) > min(tableau.dense_order + 1, tableau.order) - 0.3, dense


def test_a_stiff_part_does_not_limit_the_steps():
    """Prothero & Robinson's problem at stiffness 1e6: the implicit part takes it, an explicit method cannot; the solution is known."""
    stiff = SplitFunction(lambda t, y: -torch.sin(t).expand_as(y), lambda t, y: -1e6 * (y - torch.cos(t)))
    for name in ADAPTIVE:
        sol = solve_ivp(stiff, (0.0, 1.0), torch.ones(1), method=name, rtol=1e-5, atol=1e-7)
        assert sol.stats.n_steps < 200 and torch.allclose(sol.y[-1], torch.cos(torch.ones(1)), atol=1e-4)
    with pytest.raises(adjoint.MaxStepsReached):
        solve_ivp(stiff, (0.0, 1.0), torch.ones(1), method="tsit5", rtol=1e-5, atol=1e-7, max_steps=500)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.slow_cases("kencarp3")
def test_against_scipy(name):
    """A driven oscillator with a stiff nonlinear sink."""
    from scipy.integrate import solve_ivp as scipy_solve

    want = scipy_solve(
        lambda t, y: [y[1] - 50 * y[0] ** 3, np.sin(3 * t) - y[0] - 200 * y[1] ** 3],
        (0, 2), [1.0, 0.5], method="Radau", rtol=1e-11, atol=1e-13, t_eval=[0.3, 1.1, 2.0],
    )  # fmt: skip
    split = SplitFunction(lambda t, y: torch.stack([y[1], torch.sin(3 * t) - y[0]]), lambda t, y: -torch.tensor([50.0, 200.0]) * y**3)
    sol = solve_ivp(split, (0.0, 2.0), torch.tensor([1.0, 0.5]), method=name, rtol=1e-7, atol=1e-9, t_eval=torch.tensor([0.3, 1.1, 2.0]))
    assert np.abs(sol.y.numpy() - want.y.T).max() < 2e-6


def test_newton_sees_the_implicit_part_only():
    """The Jacobian is that of the implicit part: a dense coupling in the explicit part leaves it diagonal, and costs it no call."""
    calls = {"explicit": 0, "implicit": 0}

    def explicit(t, y):
        calls["explicit"] += 1
        return torch.sin(y).sum().expand_as(y) / len(y)

    def implicit(t, y):
        calls["implicit"] += 1
        return -100 * y

    n = 80
    pattern = torch.eye(n)
    y0 = torch.linspace(0.5, 1.0, n)
    sol = solve_ivp(SplitFunction(explicit, implicit), (0.0, 0.3), y0, method="kencarp4", jac_sparsity=pattern)
    want = solve_ivp(lambda t, y: explicit(t, y) + implicit(t, y), (0.0, 0.3), y0, method="tsit5", rtol=1e-9, atol=1e-11)
    assert torch.allclose(sol.y[-1], want.y[-1], atol=1e-6)
    calls["explicit"] = 0
    stats = solve_ivp(SplitFunction(explicit, implicit), (0.0, 0.3), y0, method="kencarp4", jac_sparsity=pattern).stats
    # six stages a step, of which the first is the end of the one before; two for the start and the first size
    assert calls["explicit"] <= 6 * stats.n_steps + 3 + 2 * stats.n_rejected


VDP = SplitFunction(
    lambda t, y, mu: torch.stack([y[..., 1], 0.1 * torch.sin(t) * mu.sqrt()], -1),
    lambda t, y, mu: torch.stack([torch.zeros_like(y[..., 0]), mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1),
)


def _solve(mu, y0=Y0, end=1.0, method="kencarp3", t_eval=None, gradient=None, **options):
    steps = {} if IMEX_METHODS[method].adaptive else {"first_step": 0.05}
    settings = dict(rtol=1e-4, atol=1e-6) | steps | options
    return solve_ivp(VDP, (0.0, end), y0, args=(mu,), method=method, t_eval=t_eval, gradient=gradient, **settings).y


@pytest.mark.parametrize("method", NAMES)
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


@pytest.mark.parametrize("method", ADAPTIVE)
@pytest.mark.slow_cases("kencarp4", "kencarp3")
def test_gradient_against_scipy(method):
    from scipy.integrate import solve_ivp as scipy_solve

    def end(mu):
        f = lambda t, y: [y[1], mu * (1 - y[0] ** 2) * y[1] - y[0] + 0.1 * np.sin(t) * np.sqrt(mu)]  # noqa: E731
        return scipy_solve(f, (0, 1), [2.0, 0.0], method="Radau", rtol=1e-12, atol=1e-13).y[0, -1]

    want = (end(5 + 1e-4) - end(5 - 1e-4)) / 2e-4
    rtol = 1e-6 if method == "kencarp3" else 1e-8
    got = grad(lambda mu: _solve(mu, method=method, rtol=rtol, atol=rtol / 100)[-1, 0])(MU)
    assert abs(float(got) - want) < 1e3 * rtol * abs(want)


@pytest.mark.parametrize("gradient", [None, Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("method", ["kencarp3", "ars443"])
@pytest.mark.slow_cases("ars443-backprop", "kencarp3-discrete", "kencarp3-backprop")
def test_second_order_in_every_nesting(method, gradient):
    steps = {"first_step": 0.02 if method == "kencarp3" else 0.05}

    def cost(mu):
        times = torch.tensor([0.05, 0.1])
        return (_solve(mu, method=method, end=0.1, t_eval=times, gradient=gradient, rtol=1e-3, atol=1e-4, **steps) ** 2).sum()

    want = hessian(cost)(MU)
    for outer, inner in itertools.product([jacrev, jacfwd], repeat=2):
        assert torch.allclose(outer(inner(cost))(MU), want, rtol=1e-9)
    mu = MU.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cost(mu), mu, create_graph=True)
    assert torch.allclose(torch.autograd.grad(slope, mu)[0], want, rtol=1e-9)
    step = 1e-3
    assert torch.allclose((grad(cost)(MU + step) - grad(cost)(MU - step)) / (2 * step), want, rtol=5e-2)


def test_batched_equals_one_by_one_and_vmap():
    many = torch.linspace(1.0, 20.0, 3)
    y0 = Y0 + 0.1 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    mu = many.clone().requires_grad_()
    sol = solve_ivp(VDP, (0.0, 1.0), y0, args=(mu,), method="kencarp4", rtol=1e-4, atol=1e-6, batched=True)
    assert sol.stats.n_accepted.unique().numel() > 1 and bool((sol.stats.n_newton > 0).all())
    (g,) = torch.autograd.grad((sol.y[-1] ** 2).sum(), mu)
    cost = lambda m, y: (_solve(m, y, method="kencarp4")[-1] ** 2).sum()  # noqa: E731
    for b in range(3):
        assert torch.allclose(_solve(many[b], y0[b], method="kencarp4"), sol.y[:, b], rtol=1e-12, atol=1e-14)
        assert torch.allclose(grad(cost)(many[b], y0[b]), g[b], rtol=1e-10)
    assert torch.allclose(vmap(grad(cost))(many, y0), g, rtol=1e-10)


def test_one_failing_trajectory_fails_alone():
    split = SplitFunction(lambda t, y, a: a.unsqueeze(-1) * y**2, lambda t, y, a: -y)
    sol = solve_ivp(split, (0.0, 2.0), torch.ones(2, 1), args=(torch.tensor([-1.0, 3.0]),), method="kencarp3", batched=True, throw=False)
    assert sol.success.tolist() == [True, False] and bool(sol.y[-1, 1].isnan())
    e = math.exp(-2.0)  # y' = -y - y^2
    assert torch.allclose(sol.y[-1, 0], torch.tensor([e / (2 - e)]), rtol=1e-4)


def test_parameters_of_modules_and_closures():
    """Modules and captured tensors of either part are found, and those of one part only as well."""
    torch.manual_seed(0)
    explicit = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    rate = torch.tensor([30.0, 2.0], requires_grad=True)

    def end(method):
        split = SplitFunction(lambda t, y: explicit(y), lambda t, y: -rate * y)
        return solve_ivp(split, (0.0, 1.0), torch.tensor([1.0, -0.5]), method=method, rtol=1e-9, atol=1e-11).y[-1].pow(2).sum()

    wanted = [rate, *explicit.parameters()]
    for mine, other in zip(*(torch.autograd.grad(end(m), wanted) for m in ("kencarp5", "dopri5")), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-9) and bool((mine != 0).any())


def test_a_tensor_that_appears_later_is_missed_by_no_one():
    late = torch.tensor(2.0, requires_grad=True)
    split = SplitFunction(lambda t, y: (late if t > 0.5 else 1.0) * y, lambda t, y: -3 * y)
    with pytest.raises(adjoint.CapturedTensorLost):
        solve_ivp(split, (0.0, 1.0), torch.ones(2, requires_grad=True), method="kencarp3").y.sum().backward()


def test_quadrature_times_and_states_of_every_kind():
    options = dict(method="kencarp4", rtol=1e-8, atol=1e-10)
    split = SplitFunction(lambda t, y: {"a": y["a"], "b": (0 * y["b"][0],)}, lambda t, y: {"a": -2 * y["a"], "b": (-2 * y["b"][0],)})
    start = {"a": torch.ones(2), "b": (torch.ones(()),)}
    sol = solve_ivp(split, (0.0, 1.0), start, quadrature=lambda t, y: y["b"][0] ** 2, step_ts=[0.3], **options)
    assert torch.allclose(sol.y["a"][-1], torch.full((2,), math.exp(-1)), rtol=1e-6)
    assert abs(float(sol.quadrature) - (1 - math.exp(-4)) / 4) < 1e-7
    z = solve_ivp(SplitFunction(lambda t, y: 1j * y, lambda t, y: -5 * y), (0.0, 1.0), torch.ones(1, dtype=torch.complex128), **options)
    assert torch.allclose(z.y[-1], torch.exp(torch.tensor([1j - 5])), rtol=1e-5)
    single = solve_ivp(
        SplitFunction(lambda t, y: torch.cos(t) * y, lambda t, y: -50 * y), (0.0, 1.0), torch.ones(3).float(), method="kencarp3"
    )
    assert single.y.dtype == torch.float32 and float(single.y[-1].abs().max()) < 1e-4
    back = solve_ivp(SplitFunction(lambda t, y: y, lambda t, y: -2 * y), (1.0, 0.0), torch.ones(1), **options).y[-1]
    assert torch.allclose(back, torch.tensor([math.e]), rtol=1e-6)


def test_other_methods_and_continuous_adjoints_take_the_sum():
    ends = []
    for method, gradient in (("kvaerno5", None), ("kencarp5", adjoint.GaussAdjoint()), ("kencarp5", adjoint.ForwardSensitivity())):
        mu = MU.clone().requires_grad_()
        y = _any(mu, method, gradient)
        ends.append((y.detach(), *torch.autograd.grad(y.pow(2).sum(), mu)))
    for y, g in ends[1:]:
        assert torch.allclose(y, ends[0][0], rtol=1e-5) and torch.allclose(g, ends[0][1], rtol=1e-4)
    assert torch.allclose(_any(MU, "tsit5", None), ends[0][0], rtol=1e-5)


def _any(mu, method, gradient):
    return solve_ivp(VDP, (0.0, 1.0), Y0, args=(mu,), method=method, rtol=1e-6, atol=1e-8, gradient=gradient).y[-1]


def test_refusals():
    run = lambda f, **o: solve_ivp(f, (0.0, 1.0), torch.ones(2), **({"method": "kencarp4"} | o))  # noqa: E731
    split = SplitFunction(lambda t, y: y, lambda t, y: -y)
    with pytest.raises(InvalidInput, match="SplitFunction"):
        run(lambda t, y: -y)
    with pytest.raises(InvalidInput, match="SplitFunction"):
        run((lambda t, y: y, lambda t, y: -y))
    with pytest.raises(InvalidInput, match="implicit must be callable"):
        SplitFunction(lambda t, y: y, 3.0)
    with pytest.raises(InvalidInput, match="first_step"):
        run(split, method="ars443")
    with pytest.raises(InvalidInput, match="kencarp4"):
        run(split, method="no such method")
    with pytest.raises(InvalidInput, match="shape"):
        run(SplitFunction(lambda t, y: y[:1], lambda t, y: -y))
    with pytest.raises(UnsupportedCombination, match="two parts"):
        run(split, gradient=adjoint.InterpolatingAdjoint(method=IMEX_METHODS["kencarp4"]), method="kvaerno5", t_eval="steps")
    assert not set(METHODS) & set(IMEX_METHODS)
