"""Discrete states that events set: a thermostat and neurons against closed forms, held values, refusals."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import Event, solve_ivp

FINE = {"rtol": 1e-12, "atol": 1e-13, "method": "dopri8", "first_step": 0.1}


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def heated(t, y, on, k, q, lo, hi):
    """``y' = -k y + q`` while the heater is on."""
    power = torch.where(on == 1, q, torch.zeros_like(q))
    return (power - k * y[..., 0]).unsqueeze(-1)


TOO_WARM = Event(lambda t, y, on, k, q, lo, hi: y[..., 0] - hi, direction=1, reset=lambda t, y, on, *a: (y, 0 * on), name="off")
TOO_COLD = Event(lambda t, y, on, k, q, lo, hi: y[..., 0] - lo, direction=-1, reset=lambda t, y, on, *a: (y, 0 * on + 1), name="on")


def phases(k, q, lo, hi):
    """Time for warming up and for cooling down."""
    return ((q / k - lo) / (q / k - hi)).log() / k, (hi / lo).log() / k


def grads(x, inputs):
    first = torch.autograd.grad(x.sum(), inputs, create_graph=True, materialize_grads=True)
    total = sum(g.sum() for g in first) + 0 * sum(x.sum() ** 2 for x in inputs)
    return [*first, *torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)]


def agree(found, wanted, inputs, tol=1e-9):
    assert torch.allclose(found, wanted, rtol=tol, atol=tol)
    for a, b in zip(grads(found, inputs), grads(wanted, inputs), strict=True):
        assert torch.allclose(a, b, rtol=tol, atol=tol * (1 + float(b.detach().abs().max())))


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("False-True", "True-False", "True-True")
def test_thermostat(batched, native, recwarn):
    """The period of a relay, and its first and second derivatives."""
    p = values(0.5, 4.0, 2.0, 3.0)
    y0 = p[2].reshape(1)
    args = tuple(p)
    if batched:
        y0, args = torch.stack([y0, y0]), tuple(torch.stack([x, x]) for x in p)
    sol = solve_ivp(heated, (0.0, 6.0), y0, args, events=[TOO_WARM, TOO_COLD], mode=1, batched=batched, compile=native, **FINE)
    up, down = phases(*p)
    off, on = (sol.events[name].t[:, 0] if batched else sol.events[name].t for name in ("off", "on"))
    assert len(off) == len(on) == 5
    agree(off, torch.stack([up + i * (up + down) for i in range(5)]), p)
    agree(on[1:] - on[:-1], (up + down).expand(4), p)
    assert not [w for w in recwarn if "uncompiled" in str(w.message)]


def test_integrate_and_fire():
    """Spike times of a leaky neuron that is reset at its threshold: the n-th is n times the first."""
    tau, drive, threshold = p = values(2.0, 1.5, 1.0)
    spike = Event(lambda t, v, tau, i, th: v[0] - th, direction=1, reset=lambda t, v, *a: torch.zeros_like(v), name="spike")
    fun = lambda t, v, tau, i, th: (i - v) / tau  # noqa: E731
    sol = solve_ivp(fun, (0.0, 10.0), torch.zeros(1), tuple(p), events=spike, **FINE)
    first = tau * (drive / (drive - threshold)).log()
    n = int(10.0 / first)
    assert sol.events["spike"].t.shape == (n,)
    agree(sol.events["spike"].t, first * torch.arange(1.0, n + 1), p)
    last = 10.0 - n * first
    agree(sol.y[-1, 0], drive * (1 - (-last / tau).exp()), p)


def test_a_refractory_neuron():
    """Two modes: integrating, and waiting for a time that the mode remembers, which is differentiated."""
    tau, drive, wait = p = values(1.0, 2.0, 0.3)

    def fun(t, v, mode, tau, i, wait):
        return torch.where(mode["until"] > t, torch.zeros_like(v), (i - v) / tau)

    fires = lambda t, v, mode, tau, i, wait: (torch.zeros_like(v), {"until": t + wait})  # noqa: E731
    spike = Event(lambda t, v, mode, *a: v[0] - 1.0, direction=1, reset=fires, name="spike")
    wake = Event(
        lambda t, v, mode, *a: t - mode["until"], direction=1, reset=lambda t, v, mode, *a: (v, {"until": mode["until"] - 1.0}), name="wake"
    )
    sol = solve_ivp(fun, (0.0, 4.0), torch.zeros(1), tuple(p), events=[spike, wake], mode={"until": torch.tensor(-1.0)}, **FINE)
    first = tau * (drive / (drive - 1.0)).log()
    n = sol.events["spike"].t.shape[0]
    assert n == 4
    agree(sol.events["spike"].t, torch.stack([first + j * (first + wait) for j in range(n)]), p)


def test_a_value_that_is_held():
    """A controller that sees the state at given times only: a floating mode, through which derivatives go."""
    gain, y0 = p = values(0.7, 1.0)
    sample = Event(
        lambda t, y, u, gain: torch.sin(torch.pi * (t + 1e-3) / 0.5), reset=lambda t, y, u, gain: (y, -gain * y[0]), name="sample"
    )
    sol = solve_ivp(lambda t, y, u, gain: u.reshape(1), (0.0, 2.2), y0.reshape(1), (gain,), events=sample, mode=torch.zeros(()), **FINE)
    y, last, u = y0, 0.0, torch.zeros(())
    for t in (0.499, 0.999, 1.499, 1.999):
        y, last = y + (t - last) * u, t
        u = -gain * y
    assert sol.events["sample"].t.shape == (4,)
    agree(sol.y[-1, 0], y + (2.2 - last) * u, p)


def test_a_ball_that_comes_to_rest():
    """Bounces too low to matter end in the mode of rest: a lasting contact instead of accumulating ones."""
    h, e, g = p = values(1.0, 0.5, 9.0)

    def fun(t, y, rest, e, g):
        return torch.stack([y[1], torch.where(rest, torch.zeros_like(g), -g)]) * torch.where(rest, 0.0, 1.0)

    def bounce(t, y, rest, e, g):
        slow = -e * y[1] < 0.05
        return torch.where(slow, torch.zeros_like(y), torch.stack([0 * y[0], -e * y[1]])), slow

    ground = Event(lambda t, y, rest, e, g: y[0], direction=-1, reset=bounce, name="ground")
    sol = solve_ivp(fun, (0.0, 3.0), torch.stack([h, 0 * h]), (e, g), events=ground, mode=False, **FINE)
    n = sol.events["ground"].t.shape[0]
    speed = (2 * g * h).sqrt().detach() * 0.5 ** torch.arange(1.0, n + 1)
    assert bool((speed[:-1] >= 0.05).all()) and float(speed[-1]) < 0.05 and sol.y[-1].tolist() == [0.0, 0.0]
    agree(sol.events["ground"].t[-1], (2 * h / g).sqrt() * (1 + 2 * sum(e**k for k in range(1, n))), p)


@pytest.mark.parametrize(
    ("reset", "mode", "match"),
    [
        (lambda t, y, m: y, 1, r"\(y, mode\)"),
        (lambda t, y, m: (y, m.double() + 0.5), 1, "mode"),
        (lambda t, y, m: (y, {"a": m}), 1, "structure"),
        (lambda t, y, m: (y, torch.ones(2)), torch.tensor(1.0), "mode"),
    ],
)
def test_wrong_modes(reset, mode, match):
    event = Event(lambda t, y, m: t - 0.5, reset=reset)
    with pytest.raises(adjoint.InvalidInput, match=match):
        solve_ivp(lambda t, y, m: y, (0.0, 1.0), torch.ones(2), events=event, mode=mode)
    with pytest.raises(adjoint.InvalidInput, match="mode must be"):
        solve_ivp(lambda t, y, m: y, (0.0, 1.0), torch.ones(2), mode="on")


def test_mode_without_events():
    sol = solve_ivp(lambda t, y, m: m * y, (0.0, 1.0), torch.ones(1), mode=torch.tensor(2.0))
    assert torch.allclose(sol.y[-1], torch.tensor([2.0]).exp(), rtol=1e-5)
