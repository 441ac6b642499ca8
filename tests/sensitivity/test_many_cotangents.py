"""Many cotangents at once (``is_grads_batched=True``, ``torch.autograd.functional.jacobian(vectorize=True)``), at every door."""

from __future__ import annotations

import pytest
import torch

import adjoint

from ..helpers.problems import driven

F64 = torch.float64


def agrees(y, inputs):
    bars = torch.eye(y.numel(), dtype=y.dtype)
    y = y.reshape(-1)
    found = torch.autograd.grad(y, inputs, bars, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, inputs, bar, retain_graph=True) for bar in bars]
    for x, rows in zip(found, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(x, torch.stack(rows), rtol=1e-9, atol=1e-11)


def given():
    return torch.tensor([0.5, -1.0], dtype=F64).requires_grad_(), torch.tensor([0.9, 1.3], dtype=F64).requires_grad_()


@pytest.mark.parametrize(
    "gradient",
    [
        adjoint.DiscreteAdjoint(checkpoints=3),
        adjoint.InterpolatingAdjoint(),
        adjoint.QuadratureAdjoint(),
        adjoint.BacksolveAdjoint(),
        adjoint.ForwardSensitivity(),
    ],
    ids=lambda g: type(g).__name__,
)
def test_strategies(gradient):
    y0, p = given()
    agrees(adjoint.solve_ivp(driven, (0.0, 1.0), y0, (p,), gradient=gradient).y[-1], [y0, p])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "kvaerno5", "radau5"])
def test_events_and_quadrature(method, compile):
    y0, p = given()

    def event(t, y, p):
        return y[0] - 0.2

    options = {"events": event, "quadrature": lambda t, y, p: y * y, "method": method, "compile": compile}
    sol = adjoint.solve_ivp(driven, (0.0, 3.0), y0, (p,), **options)
    agrees(torch.cat([sol.events[0].t, sol.events[0].y.reshape(-1), sol.quadrature]), [y0, p])


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_differential_algebraic(method):
    y0, p = given()

    def residual(t, y, yp, p):
        return torch.stack([yp[0] + p[0] * y[0] - y[1], y[1] - p[1] * torch.sin(y[0])])

    sol = adjoint.solve_dae(residual, (0.0, 1.0), y0, torch.zeros_like(y0), (p,), method=method, consistent="solve")
    agrees(sol.y[-1], [y0, p])


def test_roots():
    _, p = given()
    root = adjoint.solve_root(lambda x, p: x**3 + p * x - 2.0, torch.ones(2, dtype=F64), (p,))
    agrees(root.x, [p])


def test_jacobian_of_pytorch():
    y0, p = given()
    end = lambda p: adjoint.solve_ivp(driven, (0.0, 1.0), y0.detach(), (p,), method="tsit5").y[-1]  # noqa: E731
    plain, vectorized = (torch.autograd.functional.jacobian(end, p.detach(), vectorize=x) for x in (False, True))
    torch.testing.assert_close(vectorized, plain, rtol=1e-9, atol=1e-11)
