"""``adjoint.torchdiffeq``: the same functions with torchdiffeq's default gradient, held against torchdiffeq where it is installed."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn

import adjoint
import adjoint.torchdiffeq as strict
from adjoint import UnsupportedCombination


class Field(nn.Module):
    """A smooth field on states whose last dimension is two, which counts its evaluations; one parameter takes no part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(2, 6), nn.Linear(6, 2)
        self.idle = nn.Parameter(torch.ones(3))
        self.double()
        self.count = 0

    def forward(self, t, y):
        self.count += 1
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class PairField(Field):
    def forward(self, t, state):
        x, s = state
        return super().forward(t, x) * s, 0.1 * x.sum() - s


def start():
    return torch.tensor([[0.5, -1.0], [1.0, 0.2]], dtype=torch.float64, requires_grad=True)


def times():
    return torch.tensor([0.0, 0.4, 1.1], dtype=torch.float64, requires_grad=True)


def loss(y):
    return torch.stack([(leaf**2).sum() for leaf in (y if isinstance(y, tuple) else (y,))]).sum()


def gradients(function, f, y0, t, **kwargs):
    leaves = y0 if isinstance(y0, tuple) else (y0,)
    return torch.autograd.grad(loss(function(f, y0, t, **kwargs)), (*leaves, t, *f.parameters()), allow_unused=True)


def test_everything_else_is_the_same():
    assert (strict.odeint, strict.odeint_dense, strict.odeint_event) == (adjoint.odeint, adjoint.odeint_dense, adjoint.odeint_event)
    assert strict.odeint_adjoint is not adjoint.odeint_adjoint


def test_the_default_solves_backwards_where_that_of_adjoint_is_exact():
    """On ``y' = -y^3`` with few steps, the exact derivative of the computed solution is not that of the continuous problem."""
    y0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    step: dict[str, Any] = {"method": "rk4", "options": {"step_size": 0.5}, "adjoint_params": ()}

    def solve(function, y0, **kwargs):
        return function(lambda t, y: -(y**3), y0, t, **kwargs)[-1]

    (through,) = torch.autograd.grad(solve(adjoint.odeint, y0, method="rk4", options={"step_size": 0.5}), y0)
    (exact,) = torch.autograd.grad(solve(adjoint.odeint_adjoint, y0, **step), y0)
    (continuous,) = torch.autograd.grad(solve(strict.odeint_adjoint, y0, **step), y0)
    asked = solve(adjoint.odeint_adjoint, y0, **step, adjoint_method="rk4", adjoint_options=step["options"])
    (same,) = torch.autograd.grad(asked, y0)
    torch.testing.assert_close(exact, through, rtol=1e-13, atol=0)
    torch.testing.assert_close(continuous, same, rtol=0, atol=0)
    assert abs(float(continuous - exact)) > 1e-3 * abs(float(exact))


def test_keeps_no_states_but_the_outputs_and_evaluates_again_on_the_way_back():
    f = Field()
    y = strict.odeint_adjoint(f, start(), times(), rtol=1e-6, atol=1e-8)
    f.count = 0
    loss(y).backward()
    assert f.count > 20
    assert all(p.grad is not None for p in f.parameters())
    assert float(f.idle.grad.abs().max()) == 0.0


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("asked", [{}, {"adjoint_options": {}}, {"adjoint_options": {"norm": "seminorm"}}])
def test_options_of_the_way_back_are_visible_and_may_be_replaced(is_tuple, asked):
    f = PairField() if is_tuple else Field()
    y0 = (start(), torch.ones((), dtype=torch.float64)) if is_tuple else start()
    y = strict.odeint_adjoint(f, y0, times(), **asked)
    node = y[0].grad_fn.next_functions[0][0].next_functions[0][0] if is_tuple else y.grad_fn
    norm, seen = node.adjoint_options["norm"], []

    def spy(augmented):
        seen.append((tuple(x.shape for x in augmented), norm(augmented), augmented))
        return seen[-1][1]

    node.adjoint_options["norm"] = spy
    loss(y).backward()
    state = (5,) if is_tuple else (2, 2)
    params = tuple(p.shape for p in f.parameters())
    assert seen and seen[0][0] == ((), state, state, *params)
    for _, value, (when, x, bar, *rest) in seen:
        pieces = (x[:4], x[4:], bar[:4], bar[4:]) if is_tuple else (x, bar)
        whole = pieces if asked.get("adjoint_options") else (*pieces, *rest)
        expected = max(float(when.abs()), *(float(p.pow(2).mean().sqrt()) for p in whole))
        assert float(value) == pytest.approx(expected, rel=1e-12)


def test_seminorm_never_costs_more():
    counts = []
    asked: dict[str, Any]
    for asked in ({}, {"adjoint_options": {"norm": "seminorm"}}):
        f = Field()
        y = strict.odeint_adjoint(f, start(), times(), rtol=1e-8, atol=1e-8, **asked)
        f.count = 0
        loss(y).backward()
        counts.append(f.count)
    assert counts[1] <= counts[0]


def test_options_pass_to_the_way_back():
    """A grid made by the user is made again for the way back, with the times turned round."""
    spans = []

    def grid(f, y0, t):
        spans.append((float(t[0]), float(t[-1])))
        return torch.linspace(float(t[0]), float(t[-1]), 6, dtype=t.dtype)

    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options: dict[str, Any] = {"grid_constructor": grid}
    y = strict.odeint_adjoint(lambda t, y: y, y0, t, method="euler", options=options, adjoint_params=())
    y[-1].sum().backward()
    assert spans[0] == (0.0, 1.0) and spans[-1] == (1.0, 0.0)
    # the slope of the adjoint is its own: Euler's method forwards gives the same factor
    torch.testing.assert_close(y0.grad, torch.full_like(y0, 1.2**5))


def test_captured_tensors_and_events():
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for interface in (strict.odeint_adjoint, functools.partial(strict.odeint_adjoint, adjoint_rtol=1e-9), adjoint.odeint):
        when, states = strict.odeint_event(
            lambda t, y: -rate * y, y0, torch.tensor(0.0, dtype=torch.float64), event_fn=lambda t, y: y - 1.0, odeint_interface=interface
        )
        d_y0, d_rate = torch.autograd.grad(when, (y0, rate))
        # t = log(y0) / rate
        assert float(when) == pytest.approx(math.log(2) / 0.7, rel=1e-6)
        assert float(d_y0) == pytest.approx(1 / (2 * 0.7), rel=1e-5)
        assert float(d_rate) == pytest.approx(-math.log(2) / 0.49, rel=1e-5)
        assert states.shape == (2,)


def test_second_derivatives_are_refused_with_the_way_out():
    y0 = start()
    y = strict.odeint_adjoint(Field(), y0, times())
    (g,) = torch.autograd.grad(loss(y), y0, create_graph=True)
    with pytest.raises(UnsupportedCombination, match=r"adjoint\.odeint_adjoint"):
        g.sum().backward()
    f = Field()
    with pytest.raises(UnsupportedCombination, match=r"adjoint\.odeint_adjoint"):
        torch.func.grad(lambda y: loss(strict.odeint_adjoint(f, y, times().detach())))(y0.detach())


CASES = [
    {},
    {"method": "dopri5", "rtol": 1e-9, "atol": 1e-11},
    {"method": "rk4", "options": {"step_size": 0.1}},
    {"method": "midpoint", "options": {"step_size": 0.05}, "adjoint_method": "rk4", "adjoint_options": {"step_size": 0.1}},
    {"adjoint_options": {"norm": "seminorm"}, "adjoint_rtol": 1e-8},
]


@pytest.mark.parametrize("kwargs", CASES)
@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("backwards", [False, True])
def test_gradients_agree_with_torchdiffeq_where_it_is_installed(kwargs, is_tuple, backwards):
    peer = pytest.importorskip("torchdiffeq")
    f = PairField() if is_tuple else Field()
    y0 = (start(), torch.ones((), dtype=torch.float64, requires_grad=True)) if is_tuple else start()
    t = times().detach()
    t = (t.flip(0) if backwards else t).requires_grad_(True)
    found = [gradients(module.odeint_adjoint, f, y0, t, **kwargs) for module in (strict, peer)]
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-6)
