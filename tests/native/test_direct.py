"""Right-hand sides that are known by what they read, against those that a tracer of PyTorch's has read, and against uncompiled solves."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import adjoint
from adjoint.doors import prepared
from adjoint.native import direct, recognise

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64
W = torch.tensor([[-1.0, 0.4], [0.2, -0.7]], dtype=F64, requires_grad=True)
TABLE = torch.linspace(0.0, 1.0, 5, dtype=F64)
SCALES = [0.5, 2.0]


def helper(y, k=0.3):
    return k * torch.tanh(y)


def with_globals(t, y):
    return y @ W.T + SCALES[0] * helper(y) - SCALES[-1] * y * torch.sin(t).unsqueeze(-1)


def in_a_loop(t, y):
    total = torch.zeros_like(y)
    for row in W:
        total = total + row * y
    for k in range(3):
        total[..., 0] += 0.1 * k * y[..., 1]
    return total - y.sum(-1, keepdim=True)


def partly_stopped(t, y):
    with torch.no_grad():
        size = (y * y).sum(-1, keepdim=True)
    return -y * size + (W.detach() @ W[0]) * 0.1


def of_shape(t, y):
    if y.shape[-1] != 2 or W.dim() != 2:
        raise ValueError("two numbers")
    return -y / math.sqrt(y.shape[-1]) if len(SCALES) == 2 else y


def looked_up(t, y):
    at = (4 * torch.sigmoid(y)).floor().long().clamp(0, 3)
    return -TABLE[at] * y - torch.where(y > 1, y, 0.5 * y)


def nested(t, y):
    def inner(z):
        return W[0] * z

    return sum((inner(y * s) for s in SCALES), torch.zeros_like(y)) * -0.1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first, self.rest = nn.Linear(2, 5).double(), nn.ModuleList([nn.Linear(5, 5).double(), nn.Linear(5, 2).double()])
        self.register_buffer("shift", torch.ones(2, dtype=F64))
        self.options = {"gain": 0.5}

    @property
    def gain(self):
        return self.options["gain"]

    @staticmethod
    def act(x):
        return nn.functional.softplus(x)

    def forward(self, t, y):
        z = self.first(y + self.shift * t.unsqueeze(-1))
        for layer in self.rest:
            z = layer(self.act(z))
        return self.gain * z - y


class Tied(Net):
    def forward(self, t, y):
        return super().forward(t, y) + y @ self.first.weight.T @ self.first.weight


def with_arguments(t, y, p, k, other):
    return -p["a"] * y * k + other[0][1]


CASES = {
    "globals": with_globals,
    "loop": in_a_loop,
    "stopped": partly_stopped,
    "shape": of_shape,
    "table": looked_up,
    "nested": nested,
    "closure": (lambda w, k: lambda t, y: -k * w * y)(W[0], 1.5),
    "default": lambda t, y, w=W: y @ w,
    "partial": partial(lambda t, y, w, k: y @ w * k, w=W, k=0.5),
    "module": Net(),
    "method": Net().forward,
    "tied": Tied(),
}


def found(fun, compile, *args, rows=0, method="dopri5"):
    y0 = torch.tensor([0.8, -0.3], dtype=F64)
    y0 = (y0 * torch.linspace(1, 2, rows, dtype=F64).unsqueeze(-1) if rows else y0).requires_grad_()
    sol = adjoint.solve_ivp(fun, (0.0, 1.5), y0, args, method=method, rtol=1e-8, compile=compile, batched=rows > 0)
    owner = fun.func if isinstance(fun, partial) else getattr(fun, "__self__", fun)
    wanted = [y0, W, *(owner.parameters() if isinstance(owner, nn.Module) else [])]
    wanted += [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
    return [sol.y.detach(), *torch.autograd.grad(sol.y[-1].square().sum(), wanted, allow_unused=True)]


def agree(mine, theirs, tolerance=1e-9):
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None or not a.any()) if b is None or not b.any() else a is not None
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("method", ["dopri5", "kvaerno5"])
@pytest.mark.slow_cases(
    "dopri5-0-globals", "dopri5-0-shape", "dopri5-0-module", "kvaerno5-0-loop", "kvaerno5-0-closure", "kvaerno5-3-table",
)
def test_three_ways(name, rows, method, monkeypatch):
    asked = []
    tracer = recognise._asked
    monkeypatch.setattr(recognise, "_asked", lambda *a: asked.append(1) or tracer(*a))
    fun = CASES[name]
    mine, again = (found(fun, True, rows=rows, method=method) for _ in range(2))
    assert not asked
    for a, b in zip(mine, again, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    prepared.forget()
    monkeypatch.setattr(recognise, "hear_directly", lambda *_: None)
    traced = found(fun, True, rows=rows, method=method)
    assert asked
    agree(mine, traced)
    agree(mine, found(fun, False, rows=rows, method=method), 1e-7)


def test_arguments_of_many_kinds():
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    z = torch.tensor([0.5, 0.2], dtype=F64, requires_grad=True)
    for args in (({"a": x}, 2.0, [(1, x)]), ({"a": x}, 3, [(1, z)]), ({"a": z}, 2.0, [(1, x)])):
        agree(found(with_arguments, True, *args), found(with_arguments, False, *args), 1e-7)


def test_an_argument_that_is_captured_too():
    x = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)

    def fun(t, y, p):
        return -x * y * p

    agree(found(fun, True, x), found(fun, False, x), 1e-7)


def test_events_and_implicit_equations(monkeypatch):
    monkeypatch.setattr(recognise, "_asked", None)
    x = torch.tensor(0.7, dtype=F64, requires_grad=True)

    def fun(t, y):
        return -x * y

    def event(t, y):
        return y[0] - 0.5

    y0 = torch.ones(1, dtype=F64)
    sol = adjoint.solve_ivp(fun, (0.0, 3.0), y0, events=event, compile=True, rtol=1e-9)
    (slope,) = torch.autograd.grad(sol.events[0].t[0], x)
    assert float(sol.events[0].t[0].detach()) == pytest.approx(math.log(2) / 0.7, rel=1e-7)
    assert float(slope) == pytest.approx(-math.log(2) / 0.49, rel=1e-6)

    def residual(t, y, yp):
        return torch.stack([yp[0] + x * y[0], y[1] - y[0] ** 2])

    sol = adjoint.solve_dae(residual, (0.0, 1.0), torch.ones(2, dtype=F64), method="radau", consistent="solve", compile=True, rtol=1e-8)
    (slope,) = torch.autograd.grad(sol.y[-1, 1], x)
    assert float(slope) == pytest.approx(-2 * math.exp(-1.4), rel=1e-5)


class _Unmoved:
    """A system that puts nothing in the place of what is captured."""

    def substituted(self, function, _):
        return function


def test_a_captured_tensor_that_is_met_itself(monkeypatch):
    """Where the place of a captured tensor could not be taken it would be a constant: a tracer is asked then."""
    asked = []
    tracer = recognise._asked
    monkeypatch.setattr(recognise, "_asked", lambda *a: asked.append(1) or tracer(*a))
    monkeypatch.setattr(direct, "replace", lambda *_, **__: _Unmoved())
    w = torch.tensor([0.5, 1.0], dtype=F64, requires_grad=True)
    fun = lambda t, y: -w * y  # noqa: E731
    for _ in range(2):
        y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(2, dtype=F64), method="bosh3", compile=True, rtol=1e-8).y[-1]
        (slope,) = torch.autograd.grad(y.sum(), w)
        torch.testing.assert_close(slope, -torch.exp(-w.detach()), rtol=1e-5, atol=0)
        with torch.no_grad():
            w.mul_(2)
    assert asked


@pytest.mark.parametrize("fun", [lambda t, y: -y if float(y.sum()) > 0 else y, lambda t, y: y * (1 if y[0] > 0 else 2)])
def test_values_that_decide(fun):
    with pytest.raises(RuntimeWarning, match="compile=True"):
        adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(2, dtype=F64), compile=True)


def test_no_compiler_of_pytorch_is_imported():
    code = (
        "import sys, torch, adjoint\n"
        "p = torch.ones(2, dtype=torch.float64, requires_grad=True)\n"
        "def fun(t, y): return -p * y\n"
        "y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(2, dtype=torch.float64), compile=True).y\n"
        "y.sum().backward()\n"
        "assert 'torch._dynamo' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True)


def test_graphs_are_let_go():
    assert len(direct._graphs) <= direct._MOST + 1
