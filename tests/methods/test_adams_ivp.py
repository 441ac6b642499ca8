"""Adams-Bashforth-Moulton methods of variable order and step in ``solve_ivp``: formulas, values, derivatives, batches, refusals."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve

import adjoint
from adjoint import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    InvalidInput,
    PIDController,
    UnsupportedCombination,
    solve_ivp,
)
from adjoint.integrate.adams import corrected, predicted, updated
from adjoint.methods import Adams
from adjoint.methods.abm import step_weights, stretching, uniform_errors
from adjoint.methods.adams import adams_weights

#: times of a history in steps, no two of them equally far apart
UNEVEN = (0.0, -0.8, -2.1, -2.9, -3.6, -4.9, -5.5, -6.8, -7.7, -9.0, -9.6, -10.5, -11.9)
P = torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=torch.float64)
Y0 = torch.tensor([1.0, 1.2], dtype=torch.float64)


def lotka(t, y, p):
    a, b, c, d = p.unbind(-1)
    u, v = y.unbind(-1)
    return torch.stack([a * u - b * u * v + 0.1 * torch.sin(t), -c * v + d * u * v], -1)


def orbit(t, y):
    """Two bodies."""
    x, v = y.split(2, -1)
    return torch.cat([v, -x / (x * x).sum(-1, keepdim=True) ** 1.5], -1)


#: of eccentricity 0.5, at the near point: its period is 2 pi
ORBIT = torch.tensor([0.5, 0.0, 0.0, math.sqrt(3.0)], dtype=torch.float64)


def differences(nodes, slopes):
    """``Phi_j = prod_{i < j} (t_0 - t_{1 + i}) f[t_0, ..., t_j]`` from slopes at ``nodes``, newest first."""
    table, out, product = list(slopes), [slopes[0]], 1.0
    for j in range(1, len(nodes)):
        table = [(table[i] - table[i + 1]) / (nodes[i] - nodes[i + j]) for i in range(len(table) - 1)]
        product *= nodes[0] - nodes[j]
        out.append(product * table[0])
    return torch.stack(out)


def one_step(q, h, nodes=UNEVEN, rate=lambda t, y: y, exact=torch.exp):
    """A step of order ``q`` from an exact history that ends at 0: state, stages, error of the prediction."""
    times = h * torch.tensor(nodes[: q + 1])
    past = exact(times).unsqueeze(-1)
    # beyond the differences that the order uses there is nothing
    table = torch.cat([past[:1], differences(times[:q], past[:q]), torch.zeros(1, 1)]).unsqueeze(1)
    size, order = torch.tensor([[h]]), torch.tensor([q])
    weights = step_weights(torch.tensor([nodes[: q + 1]]), order)
    prediction = predicted(table, size, weights)
    y, stages = corrected(prediction, rate(size, prediction.y) - prediction.slope, size, weights)
    return prediction.y, y, stages


# ---- the formulas


@pytest.mark.parametrize("nodes", [UNEVEN, tuple(-float(j) for j in range(13))], ids=["uneven", "even"])
@pytest.mark.parametrize("order", range(1, 13))
def test_a_step_is_the_formula_by_weights_of_slopes(order, nodes):
    """Against weights found in another way: Adams-Bashforth of order q, then Adams-Moulton of order q + 1, from the same slopes."""
    h, rate = 0.1, lambda t, y: torch.cos(3 * y) + t
    mine = one_step(order, h, nodes, rate, lambda t: torch.sin(2 * t) + 0.5)
    slopes = torch.sin(2 * h * torch.tensor(nodes[:order])) + 0.5
    bashforth = torch.tensor(adams_weights(nodes[:order])) @ slopes
    predicted_y = slopes[0] + h * bashforth
    end = rate(torch.tensor(h), predicted_y)
    moulton = torch.tensor(adams_weights((1.0, *nodes[:order])))
    y = slopes[0] + h * (moulton[0] * end + moulton[1:] @ slopes)
    assert float(mine[0]) == pytest.approx(float(predicted_y), abs=1e-11) and float(mine[1]) == pytest.approx(float(y), abs=1e-11)


@pytest.mark.parametrize("order", range(1, 13))
def test_order_of_a_step_and_of_its_dense_output(order):
    """Local errors of y' = y: one power of h more than the order, which is q for the prediction and q + 1 for the rest."""
    method, theta = Adams(order), torch.linspace(0.05, 0.95, 19)
    sizes = (0.4, 0.2) if order > 6 else (0.1, 0.05)
    errors = []
    for h in sizes:
        first, y, stages = one_step(order, h)
        inside = 1.0 + h * method.dense_weights(theta) @ stages[:, 0, 0]
        # errors are high derivatives at the middle of the times in use, to the next power of h
        size = math.exp(h * sum((1.0, *UNEVEN[: order + 1])) / (order + 2))
        found = [float(abs(x - math.exp(h))) for x in (first, y)] + [float((inside - torch.exp(theta * h)).abs().max())]
        errors.append([x / size for x in found])
        end = 1.0 + h * method.dense_weights(torch.tensor(1.0)) @ stages[:, 0, 0]
        slope = method.dense_slopes(theta) @ stages[:, 0, 0]
        assert float(end) == pytest.approx(float(y), rel=1e-14)
        assert torch.allclose(slope, inside, rtol=0, atol=10 * (found[0] + 1e-12))
    observed = [math.log2(a / b) for a, b in zip(*errors, strict=True)]
    for found, want in zip(observed, (order + 1, order + 2, order + 2), strict=True):
        assert want - 0.4 < found < want + 0.4, observed


def test_coefficients_from_the_literature():
    """Hairer, Norsett & Wanner I, section III.1: gamma_j and gamma*_j; on an even grid nothing is to be rescaled."""
    weights = step_weights(-torch.arange(13.0).unsqueeze(0), torch.tensor([12]))
    gamma = [1, 1 / 2, 5 / 12, 3 / 8, 251 / 720, 95 / 288, 19087 / 60480, 5257 / 17280, 1070017 / 3628800]
    assert weights.integrals.flatten()[:9].tolist() == pytest.approx(gamma, rel=1e-13)
    assert uniform_errors(12)[:6] == pytest.approx([1, 1 / 2, 1 / 12, 1 / 24, 19 / 720, 3 / 160], rel=1e-14)
    assert torch.allclose(weights.growth, torch.ones(13, 1, 1)) and torch.allclose(weights.uniform, torch.ones(13, 1, 1))


def test_the_table_after_a_step_is_that_of_the_new_times():
    order, h, nodes = 5, 0.3, UNEVEN[:6]
    f = lambda t: torch.sin(2 * t).unsqueeze(-1)  # noqa: E731
    old = h * torch.tensor(nodes)
    table = torch.cat([torch.zeros(1, 1), differences(old, f(old))]).unsqueeze(1)
    weights = step_weights(torch.tensor([nodes]), torch.tensor([order]))
    star = predicted(table, torch.tensor([[h]]), weights).star
    new = updated(torch.zeros(1, 1), f(torch.tensor([h])), star, torch.ones(order + 1, 1, 1))
    times = torch.cat([torch.tensor([h]), old])[: order + 1]
    assert torch.allclose(new[1:, 0], differences(times, f(times)), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [2, 5, 13])
def test_stretching_is_theta_times_the_derivative(size):
    legendre = np.polynomial.legendre.Legendre
    coefficients = torch.randn(size).numpy()
    p = legendre(coefficients, domain=[0, 1])
    theta = np.linspace(0, 1, 7)
    assert legendre(stretching(size) @ coefficients, domain=[0, 1])(theta) == pytest.approx(theta * p.deriv()(theta), abs=1e-10)


@pytest.mark.parametrize("most", [1, 2])
def test_order_of_the_solution_with_equal_steps(most):
    """The first step is Heun's, so equal steps show the orders 2 and 3."""
    errors = []
    for n in (50, 100, 200):
        options = {"first_step": 2.0 / n, "max_step": 2.0 / n, "rtol": 1e30, "atol": 1e30}
        y = solve_ivp(lotka, (0.0, 2.0), Y0, args=(P,), method=Adams(most), **options).y[-1]
        exact = solve_ivp(lotka, (0.0, 2.0), Y0, args=(P,), method="dopri8", rtol=1e-13, atol=1e-13).y[-1]
        errors.append(float((y - exact).norm()))
    assert all(most + 0.7 < math.log2(a / b) < most + 1.6 for a, b in pairwise(errors)), errors


# ---- values


def test_errors_follow_the_tolerance_with_few_evaluations():
    """One orbit; the errors of tight tolerances at a fraction of the evaluations of a Runge-Kutta method of order 8."""
    with torch.no_grad():
        for tol in (1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
            sol = solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT, method="abm", rtol=tol, atol=tol)
            assert float((sol.y[-1] - ORBIT).abs().max()) < 300 * tol
            assert sol.stats.n_rejected <= 0.1 * sol.stats.n_accepted + 2
        assert sol.stats.n_fun < 0.6 * solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT, method="dopri8", rtol=tol, atol=tol).stats.n_fun


def test_against_scipy():
    times = np.linspace(0, 10, 41)
    f = lambda t, y: lotka(torch.tensor(t), torch.from_numpy(y), P).numpy()  # noqa: E731
    want = scipy_solve(f, (0.0, 10.0), Y0.numpy(), method="DOP853", rtol=1e-13, atol=1e-13, t_eval=times).y.T
    lsoda = scipy_solve(f, (0.0, 10.0), Y0.numpy(), method="LSODA", rtol=1e-9, atol=1e-9, t_eval=times)
    sol = solve_ivp(lotka, (0.0, 10.0), Y0, args=(P,), method="abm", rtol=1e-9, atol=1e-9, t_eval=times)
    error, theirs = (float(np.abs(y - want).max()) for y in (sol.y.numpy(), lsoda.y.T))
    assert error < 1e-6 and error < 3 * theirs and sol.stats.n_fun < 1.5 * lsoda.nfev


def test_evaluations_are_counted():
    calls = []

    def f(t, y):
        calls.append(1)
        return lotka(t, y, P)

    with torch.no_grad():
        sol = solve_ivp(f, (0.0, 5.0), Y0, method="abm", rtol=1e-6, atol=1e-8)
    assert sol.stats.n_fun == len(calls) and sol.stats.n_rejected > 0
    assert sol.stats.n_fun == 2 + 2 * sol.stats.n_accepted + sol.stats.n_rejected


def test_lower_orders_take_more_steps():
    steps = []
    for method in (Adams(2), Adams(4), Adams()):
        sol = solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT, method=method, rtol=1e-7, atol=1e-7)
        assert float((sol.y[-1] - ORBIT).abs().max()) < 1e-4
        steps.append(sol.stats.n_accepted)
    assert steps[0] > 3 * steps[1] > 3 * steps[2]


def test_dense_output_is_continuous_and_accurate():
    times = torch.linspace(0, 2 * math.pi, 200)
    sol = solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT, method="abm", rtol=1e-8, atol=1e-8, t_eval="steps", dense_output=True)
    exact = solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT, method="verner9", rtol=1e-12, atol=1e-12, t_eval=times).y
    assert torch.allclose(sol(times), exact, rtol=0, atol=3e-6)
    assert torch.allclose(sol(sol.t), sol.y, rtol=0, atol=1e-14)
    assert torch.allclose(sol(sol.t[1:-1] + 1e-9), sol.y[1:-1], rtol=0, atol=1e-8)
    back = solve_ivp(orbit, (2 * math.pi, 0.0), ORBIT, method="abm", rtol=1e-8, atol=1e-8, t_eval=times.flip(0))
    assert torch.allclose(back.y, exact.flip(0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.complex128])
def test_other_dtypes(dtype):
    y0 = torch.tensor([1.0, 0.5], dtype=dtype)
    k = -1 + 2j if dtype.is_complex else -1.0
    sol = solve_ivp(lambda t, y: k * y, (0.0, 2.0), y0, method="abm")
    single = dtype != torch.complex128
    assert sol.y.dtype == dtype and torch.allclose(sol.y[-1], y0 * torch.exp(torch.tensor(2 * k)).to(dtype), rtol=1e-3 if single else 1e-5)


def test_float32_reaches_high_orders():
    sol = solve_ivp(orbit, (0.0, 2 * math.pi), ORBIT.float(), method="abm", rtol=1e-6, atol=1e-6)
    assert float((sol.y[-1] - ORBIT).abs().max()) < 1e-3 and sol.stats.n_accepted < 150


# ---- derivatives


def loss_of(strategy, batched, f=lotka, **more):
    """Its gradient in parameters, initial state, sample times and the ends of the span, of a solve whose order changes often."""
    p, y0 = P.clone().requires_grad_(), Y0.clone().requires_grad_()
    start, end = torch.tensor(0.1).requires_grad_(), torch.tensor(4.0).requires_grad_()
    times = torch.tensor([0.4, 1.1, 3.7]).requires_grad_()
    y, q = (torch.stack([y0, 1.2 * y0, 0.7 * y0]), torch.stack([p, 0.9 * p, 1.1 * p])) if batched else (y0, p)
    options = {"t_eval": times, "method": "abm", "rtol": 1e-5, "atol": 1e-6, "dense_output": True} | more
    sol = solve_ivp(f, (start, end), y, (q,), batched=batched, gradient=strategy, quadrature=lambda t, y, p: y[..., 0] ** 2, **options)
    loss = sol.y.square().sum() + sol.quadrature.sum() + (sol(torch.tensor(2.77)).sum() if options["dense_output"] else 0.0)
    return torch.autograd.grad(loss, (p, y0, times, start, end))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("jumps", [{}, {"step_ts": [1.3, 2.2]}], ids=["smooth", "jumps"])
@pytest.mark.slow_cases("smooth-True", "jumps-False", "jumps-True")
def test_discrete_adjoint_is_backprop_and_forward_sensitivity(jumps, batched):
    def f(t, y, p):
        return lotka(t, y, p) + (torch.where(t < 1.3, 0.0, 0.3).unsqueeze(-1) if jumps else 0.0)

    want = loss_of(Backprop(), batched, f, **jumps)
    for strategy in (DiscreteAdjoint(), ForwardSensitivity()):
        for a, b in zip(loss_of(strategy, batched, f, **jumps), want, strict=True):
            assert float((a - b).abs().max()) < 1e-10 * float(b.abs().max())


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint(), GaussAdjoint(), BacksolveAdjoint()], ids=lambda s: type(s).__name__)
@pytest.mark.slow_cases("InterpolatingAdjoint", "GaussAdjoint")
def test_continuous_adjoints_are_the_truth_to_tolerance(strategy):
    fine = {"dense_output": False, "rtol": 1e-7, "atol": 1e-7}
    want = loss_of(DiscreteAdjoint(), False, dense_output=False, method="dopri8", rtol=1e-12, atol=1e-12)
    for a, b in zip(loss_of(strategy, False, **fine), want, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_the_time_of_a_jump_is_a_parameter():
    for gradient in (DiscreteAdjoint(), Backprop()):
        jump, slopes = torch.tensor(0.4, requires_grad=True), torch.tensor([1.0, -3.0], requires_grad=True)
        rate = lambda t, y, jump, slopes: torch.where(t < jump, slopes[0], slopes[1]).expand_as(y)  # noqa: E731
        args = (jump.detach(), slopes)
        sol = solve_ivp(rate, (0.0, 1.0), torch.zeros(1), args, method="abm", step_ts=jump.reshape(1), gradient=gradient)
        assert float(sol.y[-1]) == pytest.approx(0.4 - 1.8, abs=1e-12)
        in_jump, in_slopes = torch.autograd.grad(sol.y[-1].sum(), (jump, slopes))
        assert float(in_jump) == pytest.approx(4.0, abs=1e-10) and torch.allclose(in_slopes, torch.tensor([0.4, 0.6]), atol=1e-10)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
@pytest.mark.slow_cases("backprop")
def test_gradcheck_with_a_jump_and_uneven_steps(gradient):
    """Ends, a time to land on, sample times on both sides of it and in the step before the end; orders rise in between."""

    def run(start, end, jump, times, y0, p):
        f = lambda t, y, p: lotka(t, y, p) + torch.where(t < 0.7, 0.0, 0.5)  # noqa: E731
        options = {"first_step": 0.11, "max_step": 0.11, "rtol": 1e30, "atol": 1e30, "gradient": gradient}
        return solve_ivp(f, (start, end), y0, (p,), t_eval=times, step_ts=jump.reshape(1), method="abm", **options).y

    # fun jumps a little before the time that is landed on: finite differences must not carry an evaluation across
    inputs = [torch.tensor(x).requires_grad_() for x in (0.0, 1.52, 0.72, [0.37, 0.71, 0.74, 1.51])]
    assert torch.autograd.gradcheck(run, (*inputs, Y0.clone().requires_grad_(), P.clone().requires_grad_()), atol=1e-6, fast_mode=True)


def test_second_derivatives_of_a_solve_with_error_control():
    from torch.func import hessian, jacfwd, jacrev, jvp, vjp, vmap

    def objective(p, method="abm", tol=1e-9):
        return solve_ivp(lotka, (0.0, 1.0), Y0, args=(p,), method=method, rtol=tol, atol=tol).y[-1, 0]

    want = hessian(lambda p: objective(p, "dopri8", 1e-12))(P)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            assert torch.allclose(outer(inner(objective))(P), want, rtol=0, atol=2e-5)
    many, v = torch.stack([P, 1.1 * P]), torch.ones(4)
    gradients = torch.stack([vjp(objective, p)[1](torch.tensor(1.0))[0] for p in many])
    assert torch.allclose(vmap(jacrev(objective))(many), gradients, rtol=1e-9, atol=1e-11)
    along = vmap(lambda p: jvp(objective, (p,), (v,))[1])(many)
    assert torch.allclose(along, gradients.sum(-1), rtol=1e-9, atol=1e-11)


def test_gradients_of_complex_states_and_captured_tensors():
    w = torch.tensor(1.3, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -0.3j], requires_grad=True)
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        sol = solve_ivp(lambda t, y: 1j * w * y + 0.1 * y.conj(), (0.0, 1.0), y0, method="abm", rtol=1e-8, atol=1e-8, gradient=gradient)
        found.append(torch.autograd.grad(sol.y[-1].real.sum() + sol.y[-1].imag.square().sum(), (w, y0)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)


# ---- batches


def test_batched_is_one_by_one():
    """Steps, orders, samples and gradients; trajectories with ends of their own, one of them backwards."""
    scale = torch.tensor([[1.0], [1.4], [0.5]])
    ends = torch.tensor([5.0, 3.0, -1.0])
    p = (P * scale).requires_grad_()
    options = {"method": "abm", "rtol": 1e-8, "atol": 1e-8}
    together = solve_ivp(lotka, (0.0, ends), Y0.repeat(3, 1), args=(p,), batched=True, **options)
    (bars,) = torch.autograd.grad(together.y[-1].sum(), p)
    for i in range(3):
        q = p[i].detach().requires_grad_()
        one = solve_ivp(lotka, (0.0, float(ends[i])), Y0, args=(q,), **options)
        assert together.stats.n_accepted[i] == one.stats.n_accepted and together.stats.n_fun[i] == one.stats.n_fun
        assert torch.allclose(together.y[-1, i], one.y[-1], rtol=1e-11, atol=1e-13)
        assert torch.allclose(bars[i], torch.autograd.grad(one.y[-1].sum(), q)[0], rtol=1e-9, atol=1e-11)


def test_one_trajectory_fails_alone():
    f = lambda t, y: y**2  # noqa: E731
    y0 = torch.tensor([[1.0], [0.2]], requires_grad=True)
    sol = solve_ivp(f, (0.0, 2.0), y0, method="abm", batched=True, throw=False, rtol=1e-7, atol=1e-9)
    assert int(sol.status[0]) < 0 and int(sol.status[1]) == 0 and bool(sol.y[-1, 0].isnan().all())
    assert float(sol.y[-1, 1]) == pytest.approx(1 / 3, rel=1e-6)
    (bar,) = torch.autograd.grad(sol.y[-1, 1].sum(), y0)
    assert float(bar[0]) == 0.0 and float(bar[1]) == pytest.approx(1 / 0.36, rel=1e-5)
    with pytest.raises(adjoint.SolveError, match="trajectory 0"):
        solve_ivp(f, (0.0, 2.0), y0, method="abm", batched=True)
    with pytest.raises(adjoint.MaxStepsReached):
        solve_ivp(f, (0.0, 0.9), torch.ones(1), method="abm", max_steps=5)
    with pytest.raises(adjoint.NonFiniteState):
        solve_ivp(lambda t, y: torch.log(0.5 - t) * y, (0.0, 1.0), torch.ones(1), method="abm")


# ---- what is refused


@pytest.mark.parametrize(
    "options, match",
    [
        ({"controller": PIDController()}, "controller"),
        ({"jac": lambda t, y: -torch.ones(1, 1)}, "jac"),
        ({"mass_matrix": torch.eye(1)}, "radau5"),
        ({"gradient": DiscreteAdjoint(checkpoints=3)}, "dopri8"),
        ({"gradient": InterpolatingAdjoint(method="abm")}, "dopri8"),
        ({"gradient": BacksolveAdjoint(method="abm")}, "one-step"),
        ({"gradient": BacksolveAdjoint(), "dense_output": True}, "DiscreteAdjoint"),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_what_is_not_there_says_what_to_do(options, match):
    with pytest.raises(UnsupportedCombination, match=match):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(1, requires_grad=True), method="abm", **options)


def test_controllers_are_refused_by_other_multistep_methods_too():
    with pytest.raises(UnsupportedCombination, match="controller"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(1), method="bdf", controller=PIDController())
    with pytest.raises(UnsupportedCombination, match="controller"):
        adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), torch.ones(1), method="bdf", controller=PIDController())


@pytest.mark.parametrize("order", [0, 13, 2.0, True])
def test_bad_orders(order):
    with pytest.raises(InvalidInput, match="max_order"):
        Adams(order)


@pytest.mark.parametrize("rows", [None, [[1.0, 0.0], [1.0, 1.0]]])
def test_an_error_that_is_no_number_ends_the_solve(rows):
    """Zero beside a tolerance that is zero: the size of the next step was none either, and attempts went on to ``max_steps``."""
    y0 = torch.tensor([1.0, 0.0] if rows is None else rows)
    fun = lambda t, y: torch.stack([-y[..., 0], 0 * y[..., 1]], -1)  # noqa: E731
    with pytest.raises(adjoint.NonFiniteState, match="the error norm is 0/0"):
        adjoint.solve_ivp(fun, (0.0, 5.0), y0, method="abm", atol=0.0, batched=rows is not None)
    if rows is not None:
        sol = adjoint.solve_ivp(fun, (0.0, 5.0), y0, method="abm", atol=0.0, batched=True, throw=False)
        assert sol.status.tolist() == [-3, 0]
