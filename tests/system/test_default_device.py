"""A default device of PyTorch's that is another one than that of the state: nothing is made there by accident."""

from __future__ import annotations

import pytest
import torch

import adjoint
import adjoint.torchdiffeq
from adjoint.methods import METHODS

HERE = {"dtype": torch.float64, "device": "cpu"}
TIMES = torch.linspace(0, 1, 4, **HERE)


@pytest.fixture(autouse=True)
def _elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def given():
    return torch.tensor([1.0, 0.5], **HERE).requires_grad_(), torch.tensor(0.7, **HERE).requires_grad_()


def decay(t, y, p):
    return -p * y * torch.sin(t + 1).unsqueeze(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batched", [False, True])
def test_methods(method, batched):
    y0, p = given()
    state = torch.stack([y0, 2 * y0]) if batched else y0
    more = {"rtol": 1e-2} if METHODS[method].adaptive else {"first_step": 0.05}
    sol = adjoint.solve_ivp(decay, (0.0, 1.0), state, (p,), method=method, batched=batched, t_eval=TIMES, **more)
    slopes = torch.autograd.grad(sol.y[-1].sum(), [y0, p])
    assert all(x.device.type == "cpu" and bool(x.isfinite().all()) for x in (sol.y, sol.t, *slopes))


@pytest.mark.parametrize(
    "gradient",
    [
        adjoint.Backprop(),
        adjoint.DiscreteAdjoint(checkpoints=3),
        adjoint.ForwardSensitivity(),
        adjoint.InterpolatingAdjoint(),
        adjoint.QuadratureAdjoint(),
        adjoint.GaussAdjoint(),
        adjoint.BacksolveAdjoint(),
    ],
    ids=lambda g: type(g).__name__,
)
def test_strategies(gradient):
    y0, p = given()
    sol = adjoint.solve_ivp(decay, (0.0, 1.0), y0, (p,), gradient=gradient)
    assert bool(torch.autograd.grad(sol.y[-1].sum(), p)[0].isfinite())


def test_around():
    y0, p = given()
    options = {"events": lambda t, y, p: y[0] - 0.8, "dense_output": True, "quadrature": lambda t, y, p: y}
    sol = adjoint.solve_ivp(decay, (0.0, 1.0), y0, (p,), **options)
    total = sol.events[0].t.sum() + sol.quadrature.sum() + sol(torch.tensor(0.3, **HERE)).sum()
    assert bool(torch.autograd.grad(total, p)[0].isfinite())
    end = lambda p: adjoint.solve_ivp(decay, (0.0, 1.0), y0.detach(), (p,)).y[-1].sum()  # noqa: E731
    try:
        torch.func.hessian(torch.square)(p.detach())
    except RuntimeError:
        pytest.skip("torch.func.hessian of this PyTorch (2.6) has no default device")
    assert bool(torch.func.hessian(end)(p.detach()).isfinite())


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_implicit_equations(method):
    y0, p = given()

    def residual(t, y, yp, p):
        return torch.stack([yp[0] + p * y[0], y[1] - y[0] ** 2])

    sol = adjoint.solve_dae(residual, (0.0, 1.0), y0, args=(p,), method=method, consistent="solve")
    assert bool(torch.autograd.grad(sol.y[-1].sum(), p)[0].isfinite())


def test_roots_and_torchdiffeq():
    y0, p = given()
    root = adjoint.solve_root(lambda x, p: x**3 + p * x - 2, y0.detach(), (p,)).x
    assert bool(torch.autograd.grad(root.sum(), p)[0].isfinite())
    for solve, more in ((adjoint.torchdiffeq.odeint, {}), (adjoint.torchdiffeq.odeint_adjoint, {"adjoint_params": (p,)})):
        y = solve(lambda t, y: -p * y, y0, TIMES, **more)
        assert bool(torch.autograd.grad(y.sum(), p)[0].isfinite())
