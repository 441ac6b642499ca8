"""Functions that keep what they have computed, from one call to the next."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch.nn.utils import parametrize

import adjoint
from adjoint import Backprop, BacksolveAdjoint, CapturedTensorLost, DiscreteAdjoint, ForwardSensitivity, InterpolatingAdjoint, solve_ivp

W = 0.7
SLOPE = -3 * math.exp(-W)
Y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)
STRATEGIES = [
    DiscreteAdjoint(keep_bytes=0),
    DiscreteAdjoint(),
    DiscreteAdjoint(checkpoints=2),
    Backprop(),
    ForwardSensitivity(),
    InterpolatingAdjoint(),
    BacksolveAdjoint(),
]


def _end(fun, **options):
    return solve_ivp(fun, (0.0, 1.0), Y0, rtol=1e-7, atol=1e-9, **options).y[-1].sum()


def _lazy(w):
    """The rate is computed when it is first asked for."""
    store = {}

    def fun(t, y):
        if "rate" not in store:
            store["rate"] = -w * 1.0
        return store["rate"] * y

    return fun


def _by_time(w):
    @functools.cache
    def rate(t):
        return -w * (1 + 0 * t)

    return lambda t, y: rate(float(t)) * y


def _by_state(w):
    last = []

    def fun(t, y):
        if not (last and torch.equal(last[0], y)):
            last[:] = [y.clone(), -w * y]
        return last[1] * 1.0

    return fun


class _Negative(torch.nn.Module):
    def forward(self, x):
        return -x


@pytest.mark.parametrize("gradient", STRATEGIES, ids=repr)
def test_what_a_first_call_keeps_is_differentiated(gradient):
    w = torch.tensor(W, requires_grad=True)
    _end(_lazy(w), gradient=gradient).backward()
    assert float(w.grad) == pytest.approx(SLOPE, rel=1e-5)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf"])
def test_second_derivatives(method):
    w = torch.tensor(W, requires_grad=True)
    first = torch.autograd.grad(_end(_lazy(w), method=method), w, create_graph=True)[0]
    assert float(first) == pytest.approx(SLOPE, rel=1e-5)
    assert float(torch.autograd.grad(first, w)[0]) == pytest.approx(-SLOPE, rel=1e-4)


def test_other_doors():
    w = torch.tensor(W, requires_grad=True)
    tolerances = {"rtol": 1e-8, "atol": 1e-10}
    rows = {"batched": True, "gradient": DiscreteAdjoint(keep_bytes=0), **tolerances}
    doors = {
        "batched": lambda f: solve_ivp(f, (0.0, 1.0), Y0.reshape(2, 1), **rows).y[-1],
        "dae": lambda f: adjoint.solve_dae(lambda t, y, yp: yp - f(t, y), (0.0, 1.0), Y0, **tolerances).y[-1],
        "odeint_adjoint": lambda f: adjoint.odeint_adjoint(f, Y0, torch.tensor([0.0, 1.0]), **tolerances)[-1],
        "continuous": lambda f: adjoint.odeint_adjoint(f, Y0, torch.tensor([0.0, 1.0]), adjoint_rtol=1e-8, **tolerances)[-1],
        "root": lambda f: adjoint.solve_root(lambda x: f(0.0, x) + math.exp(-W) * (1 - W) * Y0 + W * math.exp(-W) * Y0, Y0).x * W,
    }
    for name, solve in doors.items():
        slope = torch.autograd.grad(solve(_lazy(w)).sum(), w)[0]
        # the root is exp(-w0) y0 / w; it is weighed by w0
        assert float(slope) == pytest.approx(SLOPE / W if name == "root" else SLOPE, rel=1e-5), name


@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "vmap"])
def test_transforms(transform):
    w = torch.tensor(W)
    end = lambda w: _end(_lazy(w))  # noqa: E731
    if transform == "jvp":
        slope = torch.func.jvp(end, (w,), (torch.ones(()),))[1]
    elif transform == "jacfwd":
        slope = torch.func.jacfwd(end)(w)
    else:
        slope = torch.vmap(torch.func.grad(end))(w.expand(2))[1]
    assert float(slope) == pytest.approx(SLOPE, rel=1e-5)


@pytest.mark.parametrize("inside", [True, False])
def test_cached_parametrizations(inside):
    layer = torch.nn.Linear(2, 2, bias=False)
    parametrize.register_parametrization(layer, "weight", _Negative())
    weight = layer.parametrizations.weight.original
    with torch.no_grad():
        weight.copy_(W * torch.eye(2))
    with parametrize.cached():
        loss = _end(lambda t, y: layer(y), gradient=DiscreteAdjoint(keep_bytes=0))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    # d(sum of exp(-A) y0) along the identity
    assert float(weight.grad.trace()) == pytest.approx(SLOPE, rel=1e-5)


@pytest.mark.parametrize("make", [_by_time, _by_state])
def test_what_is_kept_for_each_point_is_refused(make):
    w = torch.tensor(W, requires_grad=True)
    with pytest.raises(CapturedTensorLost, match="a cache by time or state"):
        _end(make(w))
    with torch.no_grad():
        assert float(_end(make(w))) == pytest.approx(3 * math.exp(-W), rel=1e-6)


def test_what_is_kept_and_not_used_is_no_matter():
    w, log = torch.tensor(W, requires_grad=True), []

    def fun(t, y):
        if log and log[-1][0] is y:
            return log[-1][1]
        log.append((y, -w * y))
        return log[-1][1]

    _end(fun, gradient=DiscreteAdjoint(keep_bytes=0)).backward()
    assert float(w.grad) == pytest.approx(SLOPE, rel=1e-5)
