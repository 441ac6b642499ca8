"""The neural ODE layer."""

from __future__ import annotations

import pytest
import torch

from adjoint import Backprop, InvalidInput, odeint, solve_ivp
from adjoint.nn import NeuralODE


def _net():
    return torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))


def test_end_state_and_gradients_are_those_of_the_solve():
    net, y0 = _net(), torch.randn(5, 2)
    layer = NeuralODE(net, method="dopri5", rtol=1e-8, atol=1e-8)
    out = layer(y0)
    want = solve_ivp(lambda t, y: net(y), (0.0, 1.0), y0, method="dopri5", rtol=1e-8, atol=1e-8).y[-1]
    assert torch.equal(out, want)
    got = torch.autograd.grad(out.square().sum(), list(layer.parameters()))
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), list(net.parameters())), strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_times_and_overrides():
    layer = NeuralODE(lambda y: -y, t_span=(0.0, 2.0), t_eval=[1.0, 2.0], rtol=1e-9)
    assert torch.allclose(layer(torch.ones(3))[:, 0], torch.exp(-torch.tensor([1.0, 2.0])), rtol=1e-7)
    assert layer(torch.ones(3), t_eval=[0.5]).shape == (1, 3)
    assert torch.allclose(layer(torch.ones(1), t_span=(0.0, 1.0), t_eval=[1.0])[0], torch.exp(-torch.ones(1)), rtol=1e-7)


def test_time_dependent_module():
    layer = NeuralODE(lambda t, y: torch.cos(t) + 0 * y, time_dependent=True, rtol=1e-9)
    assert torch.allclose(layer(torch.zeros(1)), torch.sin(torch.ones(1)), rtol=1e-7)


def test_it_is_a_module():
    layer = NeuralODE(_net(), gradient=Backprop())
    assert layer.solution is None and layer.stats is None
    layer(torch.ones(2)).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert layer.solution is not None and layer.stats.n_fun > 0
    assert "gradient=Backprop()" in repr(layer)
    copy = NeuralODE(_net())
    copy.load_state_dict(layer.state_dict())
    assert torch.allclose(copy(torch.ones(2)), layer(torch.ones(2)))
    y0 = torch.randn(4, 2)
    assert torch.allclose(torch.vmap(layer)(y0), torch.stack([layer(y) for y in y0]), rtol=1e-7)


class _Closure(torch.nn.Module):
    def __init__(self, net, odeint=False):
        super().__init__()
        self.net, self.odeint = net, odeint

    def forward(self, y0):
        if self.odeint:
            return odeint(lambda t, y: self.net(y).tanh(), y0, torch.tensor([0.0, 1.0]), rtol=1e-8, atol=1e-8)[-1]
        return solve_ivp(lambda t, y: self.net(y).tanh(), (0.0, 1.0), y0, rtol=1e-8, atol=1e-8).y[-1]


@pytest.mark.parametrize("make", [lambda net: NeuralODE(net, rtol=1e-8, atol=1e-8), _Closure, lambda net: _Closure(net, True)])
def test_parameters_swapped_in_from_outside(make):
    """`functional_call` takes its parameters out before the way back runs."""
    net = _net() if make is not _Closure else torch.nn.Linear(2, 2)
    layer, y0 = make(net), torch.randn(3, 2)
    name, parameter = next((n, p) for n, p in layer.named_parameters())
    other = (parameter.detach() + 0.3).requires_grad_()

    def loss(w):
        return torch.func.functional_call(layer, {name: w}, (y0,)).square().sum()

    gradient, curvature = torch.func.grad(loss)(other.detach()), torch.func.hessian(loss)(other.detach())
    (recorded,) = torch.autograd.grad(loss(other), other)
    with torch.no_grad():
        parameter.copy_(other)
    want = torch.autograd.grad(layer(y0).square().sum(), parameter, create_graph=True)[0]
    assert gradient.abs().min() > 0
    assert torch.allclose(gradient, want, rtol=1e-10) and torch.allclose(recorded, want, rtol=1e-10)
    row = torch.autograd.grad(want.reshape(-1)[0], parameter)[0]
    assert torch.allclose(curvature.reshape(want.numel(), -1)[0], row.reshape(-1), rtol=1e-7, atol=1e-10)


def test_bad_arguments():
    with pytest.raises(InvalidInput, match="callable"):
        NeuralODE(3)
    with pytest.raises(InvalidInput, match="quadrature"):
        NeuralODE(_net(), quadrature=lambda t, y: y)
    with pytest.raises(InvalidInput, match="shape"):
        NeuralODE(torch.nn.Linear(2, 3))(torch.ones(2))


@pytest.mark.parametrize("options", [{}, {"gradient": Backprop()}, {"method": "kvaerno5"}])
def test_in_a_compiled_model(options):
    """What compiles the model breaks off before the layer, and not inside of it."""
    torch.manual_seed(0)
    layer = NeuralODE(_net(), rtol=1e-6, **options)
    model, y0 = torch.nn.Sequential(torch.nn.Linear(2, 2), layer, torch.nn.Linear(2, 1)), torch.randn(3, 2)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(y0).square().sum(), parameters)
    for f in (torch.compile(model, backend="aot_eager"), torch.compile(lambda y: model(y) * 1.0, backend="eager")):
        got = torch.autograd.grad(f(y0).square().sum(), parameters)
        torch.testing.assert_close(got, expected)
        assert layer.stats.n_accepted > 0
