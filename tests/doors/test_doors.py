"""What holds in every door alike: autocast, compiled callers, and what the drop-in takes from torchdiffeq."""

from __future__ import annotations

import math
import subprocess
import sys
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


def test_compiled_caller():
    """A solve inside of a compiled function breaks the graph cleanly, and its gradient survives."""
    w = torch.tensor(0.7, requires_grad=True)

    @torch.compile(backend="eager")
    def loss(w):
        return (2 * solve_ivp(lambda t, y, w: -w * y, (0.0, 1.0), torch.ones(2), (w * 1.0,), rtol=1e-9, atol=1e-9).y[-1]).sum()

    got = torch.autograd.grad(loss(w), w)[0]
    assert float(got) == pytest.approx(-4 * math.exp(-0.7), rel=1e-7)


def test_doors_are_not_traced_for_each_kind_of_arguments():
    from torch._dynamo.utils import counters

    @torch.compile(backend="eager", dynamic=False)
    def loss(y0):
        return solve_ivp(lambda t, y: -y, (0.0, 1.0), 2 * y0, rtol=1e-3, max_steps=20).y[-1].sum()

    loss(torch.ones(5))  # the first call of all has the door closed
    counters.clear()
    for n in range(1, 5):
        assert float(loss(torch.ones(n))) == pytest.approx(2 * n * math.exp(-1.0), rel=1e-2)
    assert counters["frames"]["total"] == 4  # the caller, and nothing else


def test_the_compiler_is_imported_by_those_who_compile():
    """It takes as long to import as PyTorch does. A door that has been used before is closed to it afterwards all the same."""
    code = """
import sys
import torch
import adjoint

y0 = torch.ones(2, requires_grad=True)
for method in ("tsit5", "kvaerno5"):
    adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, method=method).y[-1].sum().backward()
adjoint.solve_root(lambda x, p: x**2 - p, torch.ones(2), (2 * y0,)).x.sum().backward()
assert "torch._dynamo" not in sys.modules and "torch._inductor" not in sys.modules
compiled = torch.compile(lambda y: adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), 2 * y).y[-1].sum(), backend="eager")
print(float(compiled(y0)))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(ended.stdout) == pytest.approx(4 * math.exp(-1.0), rel=1e-3)
