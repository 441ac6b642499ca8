"""What holds in every door alike: autocast, and what the drop-in takes from torchdiffeq."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from adjoint import odeint, odeint_adjoint, solve_ivp
from adjoint import torchdiffeq as dropin
from adjoint.nn import NeuralODE

SPAN = torch.tensor([0.0, 1.0])


@pytest.mark.parametrize("half", [False, True])
def test_autocast_means_the_same_everywhere(half):
    net, before = torch.nn.Linear(3, 3).float(), torch.nn.Linear(3, 3).float()
    x, t = torch.randn(2, 3).float(), SPAN.float()

    def fun(t, y):
        assert not torch.is_autocast_enabled("cpu")
        return net(y)

    doors = [
        lambda y: solve_ivp(fun, (0.0, 1.0), y).y[-1],
        lambda y: odeint(fun, y, t)[-1],
        lambda y: odeint(fun, y, t, method="rk4")[-1],
        lambda y: odeint_adjoint(fun, y, t, adjoint_params=tuple(net.parameters()), adjoint_rtol=1e-5)[-1],
        lambda y: dropin.odeint_adjoint(fun, y, t, adjoint_params=tuple(net.parameters()))[-1],
        lambda y: NeuralODE(net)(y)[-1],
    ]
    for door in doors:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y0 = before(x) if half else x
            out = door(y0)
        want = door(y0.float())
        assert out.dtype == torch.float32 and torch.equal(out, want)
        got = torch.autograd.grad(out.sum(), net.weight)[0]
        assert torch.allclose(got, torch.autograd.grad(want.sum(), net.weight)[0], rtol=1e-5)


class _Watched(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.times = []

    def forward(self, t, y):
        return -y

    def callback_step(self, t, y, dt):
        self.times.append((float(t), float(dt)))


@pytest.mark.parametrize("method", ["implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA5", "gl4", "sdirk2", "trbdf2"])
def test_callback_step_of_implicit_methods(method):
    f = _Watched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        odeint(f, torch.ones(2), torch.linspace(0.0, 1.0, 5), method=method)
    assert f.times == [(0.25 * k, 0.25) for k in range(4)]


def test_tsit5_in_the_drop_in():
    y = dropin.odeint(lambda t, y: -y, torch.ones(2), SPAN, method="tsit5", rtol=1e-8)
    assert torch.allclose(y[-1], torch.full((2,), math.exp(-1.0)), rtol=1e-7)


def test_a_rate_that_is_broadcast_is_spoken_of():
    with pytest.warns(UserWarning, match="broadcast"):
        odeint(lambda t, y: -y[:1], torch.ones(2), SPAN)
