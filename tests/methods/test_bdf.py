"""Backward differentiation formulas for ODEs and implicit equations: values, orders, derivatives, batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import adjoint
from adjoint import Backprop, DiscreteAdjoint, ForwardSensitivity, InterpolatingAdjoint, solve_dae, solve_ivp
from adjoint.methods.bdf import Formulas

from ..helpers.dae_problems import (
    AKZO_END,
    AKZO_Y0,
    PENDULUM_END,
    PENDULUM_Y0,
    ROBERTSON_P,
    ROBERTSON_Y0,
    ROBERTSON_YP0,
    akzo,
    linear,
    linear_exact,
    pendulum,
    robertson,
)

F64 = torch.float64
ROBERTSON_G = torch.tensor([1.73414089144977e02, -5.05919140558619e-04, 8.43234646542261e-08], dtype=F64)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def kinetics(t, y, p):
    p1, p2, p3 = p.unbind(-1)
    y1, y2, y3 = y.unbind(-1)
    a, b, c = p1 * y1, p2 * y2 * y3, p3 * y2**2
    return torch.stack([-a + b, a - b - c, c], -1)


def lotka(t, y, p):
    a, b, c, d = p.unbind(-1)
    u, v = y.unbind(-1)
    return torch.stack([a * u - b * u * v + 0.1 * torch.sin(t), -c * v + d * u * v], -1)


P = tensor(1.5, 1, 3, 1)
Y0 = tensor(1.0, 1.2)


# ---- values and steps


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_rescaling_keeps_the_polynomial(order):
    generator = torch.Generator().manual_seed(order)
    coefficients = torch.randn(order + 1, generator=generator, dtype=F64)
    polynomial = lambda t: sum(c * t**k for k, c in enumerate(coefficients))  # noqa: E731

    def differences(h):
        values = torch.stack([polynomial(-h * tensor(float(j))[0]) for j in range(order + 1)])
        table = [values[0]]
        for _ in range(order):
            values = values[:-1] - values[1:]
            table.append(values[0])
        return torch.stack(table)

    cpu = torch.device("cpu")
    of_many = Formulas(F64, cpu).rescaling
    found = of_many(torch.tensor([order]), tensor(0.37))[0], of_many(torch.tensor([order]), tensor(0.37), True)[0]
    full = torch.cat([differences(1.0), torch.zeros(7 - order, dtype=F64)])
    for matrix in (*found, Formulas(F64, cpu, alone=True).rescaling(order, 0.37)):
        torch.testing.assert_close((matrix @ full)[: order + 1], differences(0.37), rtol=1e-11, atol=1e-12)
        assert torch.equal(matrix[order + 1 :], torch.eye(8, dtype=F64)[order + 1 :])


@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
@pytest.mark.slow_cases("1e-07")
def test_robertson_takes_the_steps_of_scipy(rtol):
    options = dict(rtol=rtol, atol=rtol * 1e-6)
    mine = solve_ivp(kinetics, (0.0, 1e5), ROBERTSON_Y0, args=(ROBERTSON_P,), method="bdf", **options)
    f = lambda t, y: kinetics(t, torch.from_numpy(y), ROBERTSON_P).numpy()  # noqa: E731
    theirs = scipy_solve(f, (0.0, 1e5), ROBERTSON_Y0.numpy(), method="BDF", **options)
    exact = scipy_solve(f, (0.0, 1e5), ROBERTSON_Y0.numpy(), method="Radau", rtol=1e-11, atol=1e-16)
    errors = [np.abs(x / exact.y[:, -1] - 1).max() for x in (mine.y[-1].numpy(), theirs.y[:, -1])]
    assert mine.stats.n_accepted < 1.15 * len(theirs.t) and errors[0] < 3 * errors[1] + rtol
    assert mine.stats.n_jac <= 2 * theirs.njev and mine.stats.n_factorizations <= 2 * theirs.nlu


def test_errors_fall_with_the_tolerance():
    exact = solve_ivp(lotka, (0.0, 5.0), Y0, args=(P,), method="dopri8", rtol=1e-12, atol=1e-12).y[-1]
    errors = [
        float((solve_ivp(lotka, (0.0, 5.0), Y0, args=(P,), method="bdf", rtol=tol, atol=tol).y[-1] - exact).abs().max())
        for tol in (1e-4, 1e-6, 1e-8)
    ]
    assert errors[0] < 2e-2 and errors[1] < 0.05 * errors[0] and errors[2] < 0.05 * errors[1]


def test_dense_output_sampling_and_the_way_back():
    times = torch.linspace(0, 5, 23, dtype=F64)
    exact = solve_ivp(lotka, (0.0, 5.0), Y0, args=(P,), method="dopri8", rtol=1e-12, atol=1e-12, t_eval=times).y
    sol = solve_ivp(lotka, (0.0, 5.0), Y0, args=(P,), method="bdf", rtol=1e-8, atol=1e-8, t_eval=times, dense_output=True)
    torch.testing.assert_close(sol.y, exact, rtol=0, atol=3e-6)
    torch.testing.assert_close(sol(times), sol.y, rtol=0, atol=1e-12)
    back = solve_ivp(lotka, (5.0, 0.0), exact[-1], args=(P,), method="bdf", rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.y[-1], Y0, rtol=0, atol=1e-5)
    steps = solve_ivp(lotka, (0.0, 5.0), Y0, args=(P,), method="bdf", t_eval="steps")
    assert steps.t.shape[0] == steps.stats.n_accepted + 1 and bool((steps.t.diff() > 0).all())


def test_discontinuities_are_landed_on():
    f = lambda t, y: -y + torch.where(t < 1.0, 1.0, 3.0)  # noqa: E731
    sol = solve_ivp(f, (0.0, 2.0), tensor(0.0), method="bdf", step_ts=[1.0], t_eval=[1.0, 2.0], rtol=1e-8, atol=1e-10)
    e = torch.exp(tensor(-1.0))[0]
    torch.testing.assert_close(sol.y[:, 0], torch.stack([1 - e, 3 + (1 - e - 3) * e]), rtol=0, atol=1e-7)


def test_implicit_equations():
    sol = solve_dae(akzo, (0.0, 180.0), AKZO_Y0, method="bdf", rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(sol.y[-1], AKZO_END, rtol=1e-6, atol=1e-10)
    one = torch.ones((), dtype=F64)
    sol = solve_dae(pendulum(1), (0.0, 10.0), PENDULUM_Y0, args=(one, one), method="bdf", rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(sol.y[-1], PENDULUM_END, rtol=0, atol=2e-5)
    p = tensor(1.5, 0.5)
    sol = solve_dae(linear, (0.0, 2.0), tensor(2.0, 0.0), args=(p,), method="bdf", rtol=1e-8, atol=1e-10, t_eval=[0.5, 2.0])
    exact = linear_exact(tensor(0.5, 2.0), tensor(2.0), p)
    torch.testing.assert_close(sol.y, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(sol.yp[:, 0], -1.5 * exact[:, 0] + exact[:, 1], rtol=0, atol=1e-4)


# ---- derivatives


@pytest.mark.parametrize("form", ["ode", "dae"])
def test_robertson_gradient(form):
    p = ROBERTSON_P.clone().requires_grad_()
    options = dict(args=(p,), method="bdf", rtol=1e-8, atol=1e-12, quadrature=lambda t, y, p: y[2])
    if form == "ode":
        sol = solve_ivp(kinetics, (0.0, 50.0), ROBERTSON_Y0, **options)
    else:
        sol = solve_dae(robertson, (0.0, 50.0), ROBERTSON_Y0, ROBERTSON_YP0, **options)
    (found,) = torch.autograd.grad(sol.quadrature, p)
    torch.testing.assert_close(found, ROBERTSON_G, rtol=5e-7, atol=0)


def gradients(strategy, form="ode", batched=False):
    p, y0, times = P.clone().requires_grad_(), Y0.clone().requires_grad_(), tensor(0.3, 1.1, 2.0).requires_grad_()
    start, end = tensor(0.0)[0].requires_grad_(), tensor(2.0)[0].requires_grad_()
    y, q = (torch.stack([y0, 1.2 * y0]), torch.stack([p, 0.9 * p])) if batched else (y0, p)
    options = dict(args=(q,), t_eval=times, method="bdf", rtol=1e-5, atol=1e-7, batched=batched, gradient=strategy, dense_output=True)
    if form == "ode":
        sol = solve_ivp(lotka, (start, end), y, quadrature=lambda t, y, p: y[..., 0] ** 2, **options)
    else:
        sol = solve_dae(lambda t, y, yp, p: yp - lotka(t, y, p), (start, end), y, quadrature=lambda t, y, p: y[..., 0] ** 2, **options)
    loss = sol.y.square().sum() + sol.quadrature.sum() + sol(0.77).sum()
    return torch.autograd.grad(loss, (p, y0, times, start, end))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", ["ode", "dae"])
@pytest.mark.slow_cases("ode-True", "dae-False", "dae-True")
def test_discrete_adjoint_is_backprop_and_forward_sensitivity(form, batched):
    want = gradients(Backprop(), form, batched)
    for a, b in zip(gradients(DiscreteAdjoint(), form, batched), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(ForwardSensitivity(), form, batched), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_gradients_are_the_truth_to_tolerance():
    p, y0 = P.clone().requires_grad_(), Y0.clone().requires_grad_()

    def run(method, tol, **extra):
        sol = solve_ivp(lotka, (0.0, 2.0), y0, args=(p,), t_eval=[0.9, 2.0], method=method, rtol=tol, atol=tol, **extra)
        return torch.autograd.grad(sol.y.square().sum(), (p, y0))

    want = run("dopri8", 1e-12)
    for options in ({}, {"gradient": InterpolatingAdjoint()}):
        for a, b in zip(run("bdf", 1e-6, **options), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_ends_of_the_span():
    start, end = tensor(0.5)[0].requires_grad_(), tensor(2.0)[0].requires_grad_()
    sol = solve_ivp(lotka, (start, end), Y0, args=(P,), method="bdf", rtol=1e-9, atol=1e-9)
    by_start, by_end = torch.autograd.grad(sol.y[-1, 0], (start, end))
    exact = solve_ivp(lotka, (start, end), Y0, args=(P,), method="dopri8", rtol=1e-12, atol=1e-12)
    want = torch.autograd.grad(exact.y[-1, 0], (start, end))
    torch.testing.assert_close(torch.stack([by_start, by_end]), torch.stack(want), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["ode", "dae"])
@pytest.mark.slow_cases("dae")
def test_gradcheck(form):
    def run(y0, p, times):
        options = dict(args=(p,), t_eval=times, method="bdf", first_step=0.2, max_step=0.2, rtol=1e3, atol=1e3)
        if form == "ode":
            return solve_ivp(lotka, (0.0, 1.0), y0, **options).y
        return solve_dae(lambda t, y, yp, p: yp - lotka(t, y, p), (0.0, 1.0), y0, **options).y

    args = [x.clone().requires_grad_() for x in (Y0, P, tensor(0.33, 0.77))]
    assert torch.autograd.gradcheck(run, args, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, args, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("form", ["ode", "dae"])
@pytest.mark.slow_cases("dae")
def test_transforms(form):
    options = dict(method="bdf", rtol=1e-5, atol=1e-7)

    def objective(p):
        if form == "ode":
            return solve_ivp(lotka, (0.0, 0.3), Y0, args=(p,), **options).y[-1, 0]
        return solve_dae(lambda t, y, yp, p: yp - lotka(t, y, p), (0.0, 0.3), Y0, args=(p,), **options).y[-1, 0]

    want = hessian(lambda p: solve_ivp(lotka, (0.0, 0.3), Y0, args=(p,), method="dopri8", rtol=1e-8, atol=1e-8).y[-1, 0])(P)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            torch.testing.assert_close(outer(inner(objective))(P), want, rtol=0, atol=1e-3)
    many = torch.stack([P, 1.1 * P])
    torch.testing.assert_close(vmap(grad(objective))(many), torch.stack([grad(objective)(p) for p in many]), rtol=1e-9, atol=1e-11)


# ---- batches


def test_batched_is_one_by_one():
    p = ROBERTSON_P * torch.tensor([[1.0], [1.3], [0.5]], dtype=F64)
    options = dict(method="bdf", rtol=1e-6, atol=1e-10)
    together = solve_ivp(kinetics, (0.0, 1e3), ROBERTSON_Y0.repeat(3, 1), args=(p,), batched=True, **options)
    for i in range(3):
        one = solve_ivp(kinetics, (0.0, 1e3), ROBERTSON_Y0, args=(p[i],), **options)
        assert together.stats.n_accepted[i] == one.stats.n_accepted
        torch.testing.assert_close(together.y[-1, i], one.y[-1], rtol=1e-11, atol=1e-16)


def test_one_trajectory_fails_alone():
    f = lambda t, y: y**2  # noqa: E731
    sol = solve_ivp(f, (0.0, 2.0), tensor(1.0, 0.2).unsqueeze(-1), method="bdf", batched=True, throw=False, rtol=1e-5, atol=1e-7)
    assert int(sol.status[0]) < 0 and int(sol.status[1]) == 0 and bool(sol.y[-1, 0].isnan().all())
    torch.testing.assert_close(sol.y[-1, 1], tensor(1 / 3), rtol=1e-3, atol=0)
    with pytest.raises(adjoint.SolveError, match="trajectory 0"):
        solve_ivp(f, (0.0, 2.0), tensor(1.0, 0.2).unsqueeze(-1), method="bdf", batched=True)
    with pytest.raises(adjoint.MaxStepsReached):
        solve_ivp(f, (0.0, 0.9), tensor(1.0), method="bdf", max_steps=5)
    with pytest.raises(adjoint.NonFiniteState):
        solve_ivp(lambda t, y: torch.log(0.5 - t) * y, (0.0, 1.0), tensor(1.0), method="bdf")


def test_large_sparse_systems():
    n = 120

    def diffusion(t, u, k):
        padded = torch.cat([u.new_zeros(1), u, u.new_zeros(1)])
        return k * n * n * (padded[2:] - 2 * u + padded[:-2]) - u**3

    k, u0 = tensor(0.1)[0].requires_grad_(), torch.sin(torch.linspace(0, 3.14, n, dtype=F64))
    found = []
    for solver in (adjoint.linalg.SparseLU(), adjoint.linalg.DenseLU()):
        sol = solve_ivp(diffusion, (0.0, 0.2), u0, args=(k,), method="bdf", rtol=1e-6, atol=1e-9, linear_solver=solver)
        found.append((sol.y[-1].detach(), torch.autograd.grad(sol.y[-1].square().sum(), k)[0]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-10)
