"""compile=True gives the same numbers as the eager loop, derivatives included, and says so when it cannot."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, solve_ivp

from .problems import lotka_volterra

pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(autouse=True)
def _no_fallback():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True", category=RuntimeWarning)
        yield


def _data():
    p = torch.tensor([1.5, 1.0, 3.0, 1.0]) * (1 + 0.1 * torch.rand(4, 4))
    return p.requires_grad_(), torch.ones(4, 2, requires_grad=True)


def test_adaptive_ensemble():
    """Steps whose sizes change; every method with constant ones is in test_matrix."""
    p, u = _data()
    results = []
    for compiled in (False, True):
        kwargs = {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7}
        y = solve_ivp(lotka_volterra, (0.0, 1.0), u, (p,), t_eval=[0.4, 1.0], batched=True, compile=compiled, **kwargs).y
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (p, u))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
def test_single_trajectory_of_a_module(gradient):
    """One trajectory, parameters of a module, gradients in everything."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))

    class Rate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, t, y):
            return self.net(y)

    rate, y0 = Rate(), torch.randn(6, 2)
    results = []
    for compiled in (False, True):
        t1 = torch.tensor(1.0, requires_grad=True)
        y = solve_ivp(rate, (0.0, t1), y0, compile=compiled, gradient=gradient, rtol=1e-8).y
        results.append((y.detach(), *torch.autograd.grad(y[-1].square().sum(), [t1, *net.parameters()])))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-9)


def test_compiled_steps_are_reused():
    """A second solve of the same shapes compiles nothing, though its closure and its values are new."""
    from torch._dynamo.utils import counters

    def solve(scale):
        w = torch.full((3, 1), scale, requires_grad=True)
        y = solve_ivp(lambda t, y: -w * y, (0.0, 1.0), torch.ones(3, 2), batched=True, compile=True).y[-1]
        return y, torch.autograd.grad(y.sum(), w)[0]

    solve(0.5)
    before = counters["stats"]["unique_graphs"]
    y, g = solve(0.9)
    assert counters["stats"]["unique_graphs"] == before
    assert torch.allclose(y, torch.exp(torch.tensor(-0.9)).expand(3, 2), rtol=1e-4)
    assert torch.allclose(g, -2 * torch.exp(torch.tensor(-0.9)).expand(3, 1), rtol=1e-4)


def test_double_backward_of_a_compiled_solve():
    p, u = _data()
    y = solve_ivp(lotka_volterra, (0.0, 1.0), u, (p,), batched=True, compile=True).y[-1]
    first = torch.autograd.grad(y.square().sum(), p, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), p)[0]
    y = solve_ivp(lotka_volterra, (0.0, 1.0), u, (p,), batched=True).y[-1]
    first = torch.autograd.grad(y.square().sum(), p, create_graph=True)[0]
    assert torch.allclose(second, torch.autograd.grad(first.square().sum(), p)[0], rtol=1e-7)


def test_what_cannot_be_compiled_runs_eagerly():
    def rate(t, y):
        if float(y.sum()) > 1e9:
            return y
        return -y

    with pytest.warns(RuntimeWarning, match="compile=True"):
        y = solve_ivp(rate, (0.0, 1.0), torch.ones(2), compile=True, rtol=1e-8).y[-1]
    assert torch.allclose(y, torch.exp(torch.tensor(-1.0)).expand(2), rtol=1e-6)


def test_compiled_caller():
    """A solve inside of a compiled function breaks the graph cleanly, and its gradient survives."""
    w = torch.tensor(0.7, requires_grad=True)

    @torch.compile(backend="eager")
    def loss(w):
        return (2 * solve_ivp(lambda t, y, w: -w * y, (0.0, 1.0), torch.ones(2), (w * 1.0,), rtol=1e-9, atol=1e-9).y[-1]).sum()

    got = torch.autograd.grad(loss(w), w)[0]
    assert float(got) == pytest.approx(-4 * float(torch.exp(torch.tensor(-0.7))), rel=1e-7)


def test_doors_are_not_traced_for_each_kind_of_arguments():
    from torch._dynamo.utils import counters

    @torch.compile(backend="eager", dynamic=False)
    def loss(y0):
        return solve_ivp(lambda t, y: -y, (0.0, 1.0), 2 * y0, rtol=1e-3, max_steps=20).y[-1].sum()

    loss(torch.ones(5))  # the first call of all has the door closed
    counters.clear()
    for n in range(1, 5):
        assert float(loss(torch.ones(n))) == pytest.approx(2 * n * 0.36787944, rel=1e-2)
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
    assert float(ended.stdout) == pytest.approx(4 * 0.36787944, rel=1e-3)
