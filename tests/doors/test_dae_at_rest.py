"""Implicit equations in which components of the state rest: their derivatives are those of steps that are short enough for them."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from adjoint import Backprop, ForwardSensitivity, InterpolatingAdjoint, mechanics, solve_dae, solve_ivp

A = torch.tensor([[0.0, 1.0], [-1.0, -0.1]], dtype=torch.float64)
END = torch.linalg.matrix_exp(10.0 * A)
MASS = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64))


def with_constraint(t, y, yp):
    """A damped oscillator and a combination of it."""
    return torch.cat([yp[..., :2] - y[..., :2] @ A.T, y[..., 2:] - y[..., :1] - y[..., 1:2]], -1)


def beside(t, y, p):
    """The same, and a component that decays by itself."""
    return torch.cat([-p * y[..., :1], y[..., 1:3] @ A.T, y[..., 3:] - y[..., 1:2] - y[..., 2:3]], -1)


def implicit(t, y, yp, p):
    return yp @ MASS - beside(t, y, p)


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def jacobian(fun, y0, span=(0.0, 10.0), **options):
    y0 = numbers(*y0)
    sol = solve_dae(fun, span, y0, **options)
    return torch.stack([torch.autograd.grad(sol.y[-1, i], y0, retain_graph=True)[0][:2] for i in range(2)])


@pytest.fixture(autouse=True)
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.mark.parametrize(
    "method, gradient",
    [(method, gradient) for method in ("radau", "radau3") for gradient in (None, Backprop())]
    + [("radau", gradient) for gradient in (ForwardSensitivity(), InterpolatingAdjoint())]
    + [pytest.param("radau3", gradient, marks=pytest.mark.slow) for gradient in (ForwardSensitivity(), InterpolatingAdjoint())],
)
@pytest.mark.slow_cases("radau3-gradient3", "radau3-None", "radau-gradient5")
def test_a_state_that_rests(method, gradient):
    found = jacobian(with_constraint, [0.0, 0.0, 0.0], method=method, gradient=gradient)
    torch.testing.assert_close(found, END, rtol=0, atol=1e-4)


@pytest.mark.compile
def test_a_state_that_rests_natively():
    found = jacobian(with_constraint, [0.0, 0.0, 0.0], compile=True)
    torch.testing.assert_close(found, END, rtol=0, atol=2e-5)


def test_backwards_in_time_and_growth():
    found = jacobian(with_constraint, [0.0, 0.0, 0.0], (10.0, 0.0))
    torch.testing.assert_close(found, torch.linalg.matrix_exp(-10.0 * A), rtol=0, atol=5e-5)
    y0 = numbers(0.0, 0.0)
    sol = solve_dae(lambda t, y, yp: torch.stack([yp[0] - 2 * y[0], y[1] - y[0]]), (0.0, 5.0), y0)
    found = torch.autograd.grad(sol.y[-1, 1], y0)[0][0]
    torch.testing.assert_close(found, torch.exp(torch.tensor(10.0, dtype=torch.float64)), rtol=5e-5, atol=0)


@pytest.mark.parametrize("method", ["radau", "radau5", "rodas5p", "rodas4"])
@pytest.mark.parametrize("rtol", [1e-4, 1e-7])
@pytest.mark.slow_cases("1e-07-radau5", "0.0001-rodas4")
def test_components_that_rest_beside_one_that_moves(method, rtol):
    y0, p = numbers(1.0, 0.0, 0.0, 0.0), numbers(0.3)
    options = {"method": method, "rtol": rtol, "atol": rtol * 1e-3}
    if method == "radau":
        sol = solve_dae(implicit, (0.0, 10.0), y0, args=(p,), **options)
    else:
        sol = solve_ivp(beside, (0.0, 10.0), y0, args=(p,), mass_matrix=MASS, **options)
    true = torch.cat([END, END.sum(0, keepdim=True)])
    found = torch.stack([torch.autograd.grad(x, y0, retain_graph=True)[0][1:3] for x in sol.y[-1, 1:]])
    torch.testing.assert_close(found, true, rtol=0, atol=3e2 * rtol)


def test_trajectories_and_copies():
    start = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    sol = solve_dae(with_constraint, (0.0, 10.0), start, batched=True)
    found = torch.stack([torch.autograd.grad(sol.y[-1, :, i].sum(), start, retain_graph=True)[0][:, :2] for i in range(2)], 1)
    torch.testing.assert_close(found, END.expand(2, 2, 2), rtol=0, atol=2e-5)
    end = lambda y: solve_dae(with_constraint, (0.0, 10.0), y).y[-1, :2]  # noqa: E731
    found = torch.vmap(torch.func.jacrev(end))(start.detach())[..., :2]
    torch.testing.assert_close(found, END.expand(2, 2, 2), rtol=0, atol=2e-5)
    found = torch.func.jacfwd(end)(start[1].detach())[:, :2]
    torch.testing.assert_close(found, END, rtol=0, atol=2e-5)


def test_a_pendulum_that_hangs():
    model = mechanics(
        torch.eye(2, dtype=torch.float64),
        lambda t, q, v: torch.stack([0 * q[..., 0], -9.81 + 0 * q[..., 1]], -1),
        lambda t, q: (q * q).sum(-1, keepdim=True) - 1,
    )
    v0 = numbers(0.0, 0.0)
    sol = model.solve((0.0, 3.0), torch.tensor([0.0, -1.0], dtype=torch.float64), v0)
    w = math.sqrt(9.81)
    found = torch.autograd.grad(sol.y.q[-1, 0], v0)[0][0]
    torch.testing.assert_close(found, torch.tensor(math.sin(3 * w) / w, dtype=torch.float64), rtol=0, atol=1e-5)


def test_parameters_and_second_derivatives():
    p = numbers(0.0, 0.7)
    sol = solve_dae(lambda t, y, yp, p: torch.stack([yp[0] + p[1] * y[0] - p[0], y[1] - y[0] - p[0]]), (0.0, 10.0), p * 0.0, args=(p,))
    found = torch.autograd.grad(sol.y[-1, 1], p)[0][0]
    torch.testing.assert_close(found, torch.tensor(1 - math.expm1(-7) / 0.7, dtype=torch.float64), rtol=0, atol=1e-5)
    # logistic growth, from nothing
    y0 = numbers(0.0, 0.0)
    sol = solve_dae(lambda t, y, yp: torch.stack([yp[0] + y[0] - y[0] ** 2, y[1] - y[0]]), (0.0, 3.0), y0)
    first = torch.autograd.grad(sol.y[-1, 1], y0, create_graph=True)[0][0]
    second = torch.autograd.grad(first, y0)[0][0]
    true = torch.tensor([math.exp(-3), -2 * math.exp(-3) * math.expm1(-3)], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([first.detach(), second]), true, rtol=0, atol=3e-5)


def test_what_needs_no_shorter_steps():
    """What nothing moves, and what dies away at once."""
    k, y0 = numbers(0.5), torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=torch.float64)

    def fun(t, y, yp, k):
        return torch.stack([yp[0] + k[0] * y[0] * y[1], yp[1], y[2] - y[1], yp[3] + 1e6 * y[3]])

    sol = solve_dae(fun, (0.0, 10.0), y0, args=(k,))
    assert int(sol.stats.n_steps) == int(solve_dae(fun, (0.0, 10.0), y0, args=(k.detach(),)).stats.n_steps)
    found = torch.autograd.grad(sol.y[-1, 0], k)[0][0]
    torch.testing.assert_close(found, torch.tensor(-10 * math.exp(-5), dtype=torch.float64), rtol=0, atol=1e-7)
    settling = lambda t, y, yp, p: yp + p * (y - t**2 / (1 + t**4))  # noqa: E731
    solve_dae(settling, (0.0, 50.0), torch.zeros(1, dtype=torch.float64), args=(numbers(2.0),))


def test_steps_that_would_be_too_many_are_told_of():
    """Multistep methods stay at rest with their first order."""
    with pytest.warns(RuntimeWarning, match="components of the state rest.*method='radau'"):
        jacobian(with_constraint, [0.0, 0.0, 0.0], method="bdf")
    found = jacobian(with_constraint, [0.0, 0.0, 0.0], method="bdf", max_step=0.1)
    torch.testing.assert_close(found, END, rtol=0, atol=0.25)
    rates = torch.tensor([[0.0], [1e5]], dtype=torch.float64)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    start = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)

    def fast(t, y, yp):
        return torch.cat([yp[:, :2] - rates * (y[:, :2] @ turn.T), y[:, 2:] - y[:, :1]], -1)

    with pytest.warns(RuntimeWarning, match="components of the state of trajectory 1 rest"):
        solve_dae(fast, (0.0, 10.0), start, batched=True)
