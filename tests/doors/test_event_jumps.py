"""Recorded events at which ``fun`` jumps: derivatives behind them are refused, those that are right are given."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint
from adjoint import solve_dae, solve_ivp
from adjoint.errors import InvalidInput

P = (0.7, 1.3, 0.6)
LOOSE = {"rtol": 1e-4, "atol": 1e-4}


def switched(t, y, p):
    """``y0' = a``, ``y1' = b``, but ``5 b`` from where ``y0`` reaches ``c``."""
    a, b, c = p[..., 0], p[..., 1], p[..., 2]
    return torch.stack([a + 0 * y[..., 0], torch.where(y[..., 0] < c, b, 5 * b)], -1)


def reached(t, y, p):
    return y[..., 0] - p[..., 2]


def above(t, y, p):
    return y[..., 0] > p[..., 2]


def stop(t, y, p):
    return y[..., 0] - p[..., 2]


stop.terminal = True  # type: ignore[attr-defined]


def refuses(x, p):
    with pytest.raises(InvalidInput, match=r"fun jumps.*terminal"):
        torch.autograd.grad(x.sum(), p, retain_graph=True)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "radau5", "bdf", "auto"])
def test_states_behind_the_event_are_refused_and_those_before_are_right(method):
    p = torch.tensor(P, requires_grad=True)
    options = {"events": reached, "t_eval": [0.2, 2.0], "dense_output": True, "method": method}
    sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), **options, **LOOSE)
    for x in (sol.y[1, 1], sol(torch.tensor(2.5)), sol.events[0].y, sol.events[0].t):
        refuses(x, p)
    early = torch.autograd.grad(sol.y[0, 1] + sol(torch.tensor(0.1))[0], p)[0]
    torch.testing.assert_close(early, torch.tensor([0.1, 0.2, 0.0]), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("event", [reached, above])
@pytest.mark.parametrize("name", ["Backprop", "ForwardSensitivity", "DiscreteAdjoint"])
def test_by_every_strategy_also_where_only_the_level_moves(name, event):
    """The state behind does not depend on the level at all, as far as the steps know."""
    level = torch.tensor(P[2], requires_grad=True)

    def fun(t, y, c):
        return torch.stack([torch.ones_like(y[0]), torch.where(y[0] < c, 1.0, 5.0)])

    watch = lambda t, y, c: event(t, y, torch.stack([c, c, c]))  # noqa: E731
    sol = solve_ivp(fun, (0.0, 3.0), torch.zeros(2), (level,), events=watch, gradient=getattr(adjoint, name)())
    refuses(sol.y[-1, 1], level)


def test_under_transforms_and_of_many():
    def end(p):
        return solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), events=reached, **LOOSE).y[-1, 1]

    p = torch.tensor(P)
    many = p.expand(2, 3)
    for run in (
        lambda: torch.func.grad(end)(p),
        lambda: torch.func.jvp(end, (p,), (torch.tensor([0.0, 0.0, 1.0]),)),
        lambda: torch.vmap(torch.func.grad(end))(many),
        lambda: torch.func.grad(lambda p: torch.vmap(end)(p).sum())(many),
    ):
        with pytest.raises(InvalidInput, match="fun jumps"):
            run()
    torch.testing.assert_close(torch.vmap(end)(many), torch.full((2,), 1.3 * 0.6 / 0.7 + 6.5 * (3 - 0.6 / 0.7)), rtol=1e-3, atol=0)
    # only the trajectory that has the event
    p = torch.tensor([P, (0.1, 1.0, 0.9)], requires_grad=True)
    sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2, 2), (p,), events=reached, batched=True, **LOOSE)
    refuses(sol.y[-1, 0], p)
    torch.testing.assert_close(torch.autograd.grad(sol.y[-1, 1, 1], p)[0][1], torch.tensor([0.0, 3.0, 0.0]))


def test_implicit_equations():
    p = torch.tensor(P, requires_grad=True)
    sol = solve_dae(lambda t, y, yp, p: yp - switched(t, y, p), (0.0, 3.0), torch.zeros(2), args=(p,), events=reached, **LOOSE)
    refuses(sol.y[-1], p)
    refuses(sol.yp[-1], p)


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf"])
def test_what_the_error_says_is_right(method):
    """``y1(3) = b c / a + 5 b (3 - c / a)``, by a terminal event and a second solve."""
    p = torch.tensor(P, requires_grad=True)
    sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), events=[reached, stop], method=method)
    # the one that is recorded at the time of the terminal one is on the near side too
    torch.testing.assert_close(
        torch.autograd.grad(sol.events[0].y[0, 1], p, retain_graph=True)[0], torch.tensor([-1.3 * 0.6 / 0.49, 0.6 / 0.7, 1.3 / 0.7])
    )
    end = solve_ivp(switched, (sol.t[-1], 3.0), sol.y[-1], (p,), method=method).y[-1, 1]
    a, b, c = p
    want = b * c / a + 5 * b * (3 - c / a)
    for x, y in zip(torch.autograd.grad(end, p), torch.autograd.grad(want, p), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=0)


def test_jumps_at_fixed_times_are_none_of_this():
    """Recorded by an event function of the time alone, or at a time in ``step_ts``: ``y(2) = exp(4 rate)``."""
    rate = torch.tensor(0.5, requires_grad=True)

    def fun(t, y, rate):
        return torch.where(t < 1.0, 1.0, 3.0) * rate * y

    for options in (
        {"events": lambda t, y, rate: t - 1.0},
        {"events": lambda t, y, rate: y[0] - y[0].detach() + t - 1.0, "step_ts": [1.0]},
    ):
        sol = solve_ivp(fun, (0.0, 2.0), torch.ones(1), (rate,), rtol=1e-8, atol=1e-8, **options)
        assert sol.events[0].t.shape == (1,)
        assert torch.autograd.grad(sol.y[-1, 0], rate)[0].item() == pytest.approx(4 * math.exp(2.0), rel=1e-5)
    moving = torch.tensor(1.0, requires_grad=True)
    jump = lambda t, y, at: torch.where(t < at, 1.0, 3.0) * y  # noqa: E731
    sol = solve_ivp(jump, (0.0, 2.0), torch.ones(1), (moving,), events=lambda t, y, at: t - at)
    refuses(sol.y[-1], moving)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["tsit5", "radau5"])
def test_smooth_and_kinked_functions_are_none_of_this(method, dtype):
    """Many crossings of an oscillator with a stiff companion; and ``y' = rate min(y, 1)``, which is ``rate`` from ``y = 1`` on."""
    w = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    stiffness = 1e6 if method == "radau5" and dtype == torch.float64 else 1.0

    def fun(t, y, w):
        return torch.stack([w * y[1], -w * y[0], -stiffness * (y[2] - y[0] ** 3)])

    start = torch.tensor([1.0, 0.0, 1.0], dtype=dtype)
    sol = solve_ivp(fun, (0.0, 6.0), start, (w,), events=lambda t, y, w: y[0], method=method)
    assert sol.events[0].t.shape == (4,)
    torch.testing.assert_close(torch.autograd.grad(sol.y[-1, 0], w)[0], -6 * torch.sin(6 * w.detach()), rtol=1e-2, atol=1e-3)
    rate = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    kinked = lambda t, y, rate: rate * y.clamp(max=1.0)  # noqa: E731
    sol = solve_ivp(kinked, (0.0, 4.0), torch.full((1,), 0.5, dtype=dtype), (rate,), events=lambda t, y, rate: y[0] - 1.0, method=method)
    # y(4) = 1 + rate (4 - log 2 / rate)
    torch.testing.assert_close(
        torch.autograd.grad(sol.y[-1, 0], rate)[0], torch.tensor(4.0, dtype=dtype), rtol=0.1 if dtype == torch.float32 else 1e-2, atol=0
    )


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_rounding_errors_of_a_residual_are_no_jump(method):
    """A total that is kept: its residual is zero up to its last digits on both sides of the events."""

    def chain(t, y, yp, p):
        return torch.stack([yp[0] + p * y[0], yp[1] - p * y[0] + y[1], y.sum() - 1])

    p, levels = torch.tensor(0.7, dtype=torch.float64, requires_grad=True), torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    events = [lambda t, y, *_, c=c: y[0] - c for c in levels]
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    sol = solve_dae(chain, (0.0, 5.0), y0, args=(p,), events=events, method=method, rtol=1e-7, atol=1e-9)
    times = torch.stack([record.t[0] for record in sol.events])
    slopes = torch.stack([torch.autograd.grad(t, p, retain_graph=True)[0] for t in times])
    torch.testing.assert_close(slopes, levels.log() / 0.49, rtol=1e-4, atol=0.0)
    end = torch.autograd.grad(sol.y[-1, 0], p)[0]
    torch.testing.assert_close(end, -5 * torch.exp(-5 * p.detach()), rtol=1e-4, atol=0.0)
