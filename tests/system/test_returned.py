"""Functions that return a captured tensor as it is: a constant rate, a control."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import Backprop, BacksolveAdjoint, DiscreteAdjoint, ForwardSensitivity, InterpolatingAdjoint, solve_ivp

STRATEGIES = [
    DiscreteAdjoint(),
    DiscreteAdjoint(keep_bytes=0),
    DiscreteAdjoint(checkpoints=2),
    Backprop(),
    ForwardSensitivity(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
]
SPAN, Y0 = (0.0, 2.0), torch.tensor([1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=repr)
def test_a_constant_rate(gradient):
    k = torch.tensor([0.7, 0.3], requires_grad=True)
    end = solve_ivp(lambda t, y: k, SPAN, Y0, gradient=gradient).y[-1]
    torch.testing.assert_close(torch.autograd.grad(end.prod(), k)[0], 2.0 * torch.tensor([2.6, 2.4]))


@pytest.mark.parametrize("method", ["kvaerno3", "rodas4", "bdf", "abm"])
@pytest.mark.parametrize("batched", [False, True])
def test_one_leaf_of_a_state(method, batched):
    k = torch.tensor([[0.7]] if batched else [0.7], requires_grad=True)
    shape = (1, 1) if batched else (1,)
    state = {"x": torch.ones(shape), "v": torch.ones(shape)}
    end = solve_ivp(lambda t, y: {"x": y["v"], "v": k}, SPAN, state, method=method, batched=batched, rtol=1e-6).y
    first = torch.autograd.grad((end["x"][-1] ** 2).sum(), k, create_graph=True)[0]
    # x = 1 + t + k t^2 / 2
    assert float(first) == pytest.approx(4 * (3 + 2 * 0.7), rel=1e-4)
    assert float(torch.autograd.grad(first.sum(), k)[0]) == pytest.approx(8.0, rel=1e-4)


def test_other_doors_and_transforms():
    k = torch.tensor([0.7, 0.3], requires_grad=True)
    t, two = torch.tensor([0.0, 2.0]), torch.full((2,), 2.0)
    for solve in (
        lambda: adjoint.odeint(lambda t, y: k, Y0, t)[-1],
        lambda: adjoint.odeint_adjoint(lambda t, y: k, Y0, t)[-1],
        lambda: adjoint.odeint_adjoint(lambda t, y: k, Y0, t, adjoint_rtol=1e-6)[-1],
        lambda: adjoint.solve_dae(lambda t, y, yp: (yp[:1] - k[:1], yp[1:] - k[1:]), SPAN, Y0).y[-1],
    ):
        torch.testing.assert_close(torch.autograd.grad(solve().sum(), k)[0], two, rtol=1e-6, atol=0)

    def end(k):
        return solve_ivp(lambda t, y: k, SPAN, Y0).y[-1]

    p = torch.tensor([0.7, 0.3])
    for jacobian in (torch.func.jacrev(end)(p), torch.func.jacfwd(end)(p), torch.vmap(torch.func.jacrev(end))(p.expand(2, 2))[1]):
        torch.testing.assert_close(jacobian, 2.0 * torch.eye(2))


def test_an_integrand():
    k = torch.tensor(0.7, requires_grad=True)
    sol = solve_ivp(lambda t, y: -y, SPAN, Y0, quadrature=lambda t, y: k)
    assert float(torch.autograd.grad(sol.quadrature, k)[0]) == pytest.approx(2.0)
