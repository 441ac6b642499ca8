"""Events: where they are, what they stop, and derivatives of their times and states to second order."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.integrate
import torch
from torch.autograd import gradcheck, gradgradcheck

from adjoint import Backprop, DiscreteAdjoint, solve_ivp

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

FINE = {"rtol": 1e-11, "atol": 1e-13, "max_step": 0.1}
#: what one constant step size makes of a problem: a smooth function, so finite differences see the same steps
STEADY = {"rtol": 1e30, "atol": 1e30, "first_step": 0.25, "max_step": 0.25}
BOTH = pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
G = 9.81


def event(terminal=False, direction=0.0):
    def mark(f):
        f.terminal, f.direction = terminal, direction
        return f

    return mark


def fall(t, y, *args):
    return torch.stack([y[1], torch.full_like(y[1], -G)])


def rotate(t, y, *args):
    """``(cos t, sin t)`` from ``(1, 0)``."""
    return torch.stack([-y[1], y[0]])


X0 = [1.0, 0.0]
PI = math.pi


# --- where ---


def test_fall_to_the_ground():
    """A polynomial: time and state to rounding; the solution ends there."""
    ground = event(terminal=True, direction=-1)(lambda t, y: y[0])
    sol = solve_ivp(fall, (0.0, 10.0), torch.tensor([5.0, 3.0]), events=ground)
    when = (3 + math.sqrt(9 + 2 * G * 5)) / G
    assert abs(float(sol.events[0].t[0]) - when) < 1e-12
    assert torch.allclose(sol.events[0].y, torch.tensor([[0.0, 3 - G * when]]), atol=1e-11)
    assert sol.status == 1 and sol.success and "terminal event" in sol.message
    assert torch.equal(sol.t[-1], sol.events[0].t[0]) and torch.equal(sol.y[-1], sol.events[0].y[0]) and float(sol.t[0]) == 0.0


def test_bouncing_ball():
    """Four bounces, each solve begun where the last one ended; the closed form of their times."""
    ground = event(terminal=True, direction=-1)(lambda t, y: y[0])
    height, e, t, y = 2.0, 0.8, torch.tensor(0.0), torch.tensor([2.0, 0.0])
    first = math.sqrt(2 * height / G)
    for bounce in range(4):
        sol = solve_ivp(fall, (t, 20.0), y, events=ground, rtol=1e-10, atol=1e-12)
        t, y = sol.t[-1], torch.stack([sol.y[-1, 0] * 0, -e * sol.y[-1, 1]])
        assert abs(float(t) - first * (1 + 2 * sum(e**k for k in range(1, bounce + 1)))) < 1e-9


def test_gradient_through_bounces():
    """The time of the third bounce scales with the root of the height, and is a polynomial in the restitution."""
    ground = event(terminal=True, direction=-1)(lambda t, y: y[0])

    def third(height, e):
        t, y = torch.tensor(0.0), torch.stack([height, height * 0])
        for _ in range(3):
            sol = solve_ivp(fall, (t, 20.0), y, events=ground, rtol=1e-10, atol=1e-12)
            t, y = sol.t[-1], torch.stack([sol.y[-1, 0] * 0, -e * sol.y[-1, 1]])
        return t

    height, e = torch.tensor(2.0, requires_grad=True), torch.tensor(0.8, requires_grad=True)
    first = math.sqrt(4 / G)
    gh, ge = torch.autograd.grad(third(height, e), (height, e), create_graph=True)
    assert abs(gh.item() - first * (1 + 1.6 + 2 * 0.64) / 4) < 1e-8 and abs(ge.item() - first * (2 + 4 * 0.8)) < 1e-8
    (gee,) = torch.autograd.grad(ge, e)
    assert abs(float(gee) - 4 * first) < 1e-7


DIRECTIONS = {0: [0.5, 1.5, 2.5], 1: [1.5], -1: [0.5, 2.5]}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_directions(direction):
    """``cos t`` falls through zero at pi/2, rises at 3 pi/2, falls at 5 pi/2."""
    sol = solve_ivp(rotate, (0.0, 9.0), torch.tensor(X0), events=event(direction=direction)(lambda t, y: y[0]), **FINE)
    when = torch.tensor(DIRECTIONS[direction]) * PI
    assert torch.allclose(sol.events[0].t, when, rtol=0, atol=1e-9)
    assert torch.allclose(sol.events[0].y, torch.stack([when.cos(), when.sin()], -1), rtol=0, atol=1e-9)
    assert sol.status == 0 and sol.t[-1].item() == 9.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_backwards_in_time(direction):
    """Directions are those along the integration, as SciPy has them."""
    g = event(direction=direction)(lambda t, y: y[0])
    sol = solve_ivp(rotate, (0.0, -9.0), torch.tensor(X0), events=g, **FINE)
    assert torch.allclose(sol.events[0].t, -torch.tensor(DIRECTIONS[direction]) * PI, rtol=0, atol=1e-9)


@pytest.mark.parametrize("count", [True, 1, 2, 3])
@pytest.mark.parametrize("end", [9.0, -9.0])
def test_terminal_count(count, end):
    g = event(terminal=count)(lambda t, y: y[0])
    times = torch.linspace(0.0, end, 19)
    sol = solve_ivp(rotate, (0.0, end), torch.tensor(X0), events=g, t_eval=times, **FINE)
    when = math.copysign((int(count) - 0.5) * PI, end)
    assert sol.status == 1 and sol.events[0].t.shape == (int(count),) and abs(float(sol.events[0].t[-1]) - when) < 1e-9
    before = times.abs() <= abs(when)
    assert torch.allclose(sol.y[before], torch.stack([times.cos(), times.sin()], -1)[before], atol=1e-8)
    assert bool(sol.y[~before].isnan().all()) and int((~before).sum()) > 0 and torch.equal(sol.t, times)


def test_several_events_and_none():
    """Each with its own record; the terminal one hides what comes after it, even in the same step."""
    gs = [
        lambda t, y: y[0],
        event(terminal=True)(lambda t, y: t - 5.0),
        lambda t, y: y[1] - 2.0,
        lambda t, y: t - 5.0001,
        lambda t, y: t - 4.9999,
    ]
    sol = solve_ivp(rotate, (0.0, 9.0), torch.tensor(X0), events=gs, **FINE)
    assert [e.t.numel() for e in sol.events] == [2, 1, 0, 0, 1] and sol.events[2].y.shape == (0, 2)
    assert sol.t[-1].item() == pytest.approx(5.0, abs=1e-12) and float(sol.events[4].t) == pytest.approx(4.9999, abs=1e-12)
    assert torch.allclose(sol.y[-1], torch.tensor([math.cos(5), math.sin(5)]), atol=1e-9)


@pytest.mark.parametrize("end", [2.0, -2.0])
@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_event_at_the_very_end(batched, terminal, end):
    g = event(terminal=terminal)(lambda t, y: t - end)
    y0 = torch.tensor(X0).expand((3, 2) if batched else (2,))
    turning = lambda t, y: torch.stack([-y[..., 1], y[..., 0]], -1)  # noqa: E731
    sol = solve_ivp(turning, (0.0, end), y0, events=g, t_eval=[end], batched=batched, **FINE)
    assert bool((sol.events[0].t == end).all()) and bool((torch.as_tensor(sol.status) == int(terminal)).all())
    assert torch.allclose(sol.events[0].y, sol.y) and torch.allclose(sol.y[0], torch.tensor([math.cos(end), math.sin(end)]), atol=1e-9)


def test_events_on_steps_count_once():
    """Steps that end right where the event function is zero."""
    sol = solve_ivp(rotate, (0.0, 3.0), torch.tensor(X0), events=lambda t, y: (t - 1.0) * (t - 2.0), step_ts=[1.0, 2.0])
    assert torch.allclose(sol.events[0].t, torch.tensor([1.0, 2.0]), atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "bosh3", "dopri8", "rk4"])
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.slow_cases("True-rk4")
def test_scipy_agrees(method, backwards):
    """A pendulum, Lotka-Volterra style nonlinearity: all times, states and the end against DOP853."""

    def pendulum(t, y):
        lib = torch if isinstance(y, torch.Tensor) else np
        return lib.stack([y[1], -4 * lib.sin(y[0])])

    gs = [lambda t, y: y[0] - 0.3, event(direction=1)(lambda t, y: y[1]), event(terminal=3)(lambda t, y: y[0] + 0.5), lambda t, y: y[0] - 7]
    span = (0.0, -12.0) if backwards else (0.0, 12.0)
    truth = scipy.integrate.solve_ivp(pendulum, span, [1.5, 0.2], method="DOP853", rtol=1e-12, atol=1e-13, events=gs)
    opts = {"first_step": 0.002} if method == "rk4" else {"rtol": 1e-6, "atol": 1e-9, "max_step": 0.02}
    sol = solve_ivp(pendulum, span, torch.tensor([1.5, 0.2]), events=gs, method=method, **opts)
    tol = 2e-5 if method == "bosh3" else 1e-7
    assert sol.status == truth.status == 1
    for mine, t, y in zip(sol.events, truth.t_events, truth.y_events, strict=True):
        assert mine.t.shape == t.shape and np.allclose(mine.t, t, rtol=0, atol=tol)
        assert np.allclose(mine.y.reshape(-1, 2), np.reshape(y, (-1, 2)), rtol=0, atol=5 * tol)
    assert abs(sol.t[-1].item() - truth.t[-1]) < tol


def test_events_with_everything():
    """Own steps end at the event; dense output ends there; pytrees and complex states."""
    g = event(terminal=True)(lambda t, y: y["x"])
    y0 = {"x": torch.tensor(1.0), "v": torch.tensor(0.0)}
    fun = lambda t, y: {"x": -y["v"], "v": y["x"]}  # noqa: E731
    sol = solve_ivp(fun, (0.0, 9.0), y0, events=g, t_eval="steps", dense_output=True, **FINE)
    assert abs(sol.t[-1].item() - PI / 2) < 1e-9 and bool((sol.t.diff() > 0).all()) and sol.y["x"].shape == sol.t.shape
    assert sol.events[0].y["v"].shape == (1,) and abs(float(sol.events[0].y["v"]) - 1) < 1e-9
    assert torch.allclose(sol(sol.t * 0.9)["x"], torch.cos(sol.t * 0.9), atol=1e-8)
    with pytest.raises(ValueError, match="outside"):
        sol(2.0)
    z = solve_ivp(lambda t, y: 1j * y, (0.0, 9.0), torch.tensor(1.0 + 0j), events=lambda t, y: y.real, **FINE)
    assert torch.allclose(z.events[0].t, torch.tensor([0.5, 1.5, 2.5]) * PI, atol=1e-9) and z.events[0].y.is_complex()


def test_single_precision():
    sol = solve_ivp(rotate, (0.0, 5.0), torch.tensor(X0, dtype=torch.float32), events=lambda t, y: y[0])
    assert sol.events[0].t.dtype == sol.events[0].y.dtype == torch.float32
    assert torch.allclose(sol.events[0].t.double(), torch.tensor([0.5, 1.5]) * PI, atol=1e-3)


# --- derivatives ---


def driven(t, y, p):
    return torch.stack([y[1], -p[0] * torch.sin(y[0]) - p[1] * y[1] + 0.1 * torch.cos(t)])


def _outcome(gradient, y0, p, level, t0, **extra):
    g = event(terminal=2)(lambda t, y, p: y[0] - level * (1 + 0.1 * p[1] * t))
    other = event(direction=1)(lambda t, y, p: y[1] * y[0] - 0.1 * level)
    sol = solve_ivp(driven, (t0, 8.0), y0, (p,), events=[g, other], gradient=gradient, **STEADY, **extra)
    assert sol.status == 1 and sol.events[0].t.shape == (2,) and sol.events[1].t.shape[0] > 0
    return sol


def _inputs():
    return [torch.tensor(x, requires_grad=True) for x in ([1.2, 0.3], [2.0, 0.15], 0.4, 0.1)]


@BOTH
@pytest.mark.parametrize("what", ["t", "y"])
@pytest.mark.slow_cases("y-backprop", "t-discrete", "t-backprop")
def test_gradcheck(what, gradient):
    """Event times, or states, with respect to the state, arguments, a captured parameter of the event, and the start."""

    def outcome(*inputs):
        sol = _outcome(gradient, *inputs)
        return (*(getattr(e, what) for e in sol.events), getattr(sol, what)[-1])

    assert gradcheck(outcome, _inputs(), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("what", ["t", "y"])
@pytest.mark.slow_cases("y")
def test_gradgradcheck(what):
    def outcome(*inputs):
        sol = _outcome(DiscreteAdjoint(), *inputs)
        return sol.events[0].t[-1] if what == "t" else sol.events[0].y[-1].sum()

    assert gradgradcheck(outcome, _inputs(), eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize(
    "options",
    [{"dense_output": True}, {"t_eval": [0.5, 1.0]}, {"t_eval": "steps"}, {"quadrature": lambda t, y, p: y[0]}],
    ids=["dense", "samples", "steps", "quadrature"],
)
def test_gradients_do_not_depend_on_what_else_is_asked(options):
    inputs = _inputs()

    def value(**extra):
        sol = _outcome(DiscreteAdjoint(), *inputs, **extra)
        return sum(e.t.sum() + e.y.sin().sum() for e in sol.events)

    plain, more = (torch.autograd.grad(value(**extra), inputs) for extra in ({}, options))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(plain, more, strict=True))


def test_time_of_fall_has_its_closed_form_derivatives():
    """``T = (v + sqrt(v^2 + 2 g h)) / g``: gradient, Hessian and forward mode, by ``torch.func`` and by double backward."""
    ground = event(terminal=True, direction=-1)(lambda t, y, g: y[0])

    def fly(t, y, g):
        return torch.stack([y[1], -g])

    def computed(x):
        sol = solve_ivp(fly, (0.0, 10.0), x[:2], (x[2],), events=ground)
        return sol.events[0].t[0]

    def closed(x):
        h, v, g = x
        return (v + torch.sqrt(v**2 + 2 * g * h)) / g

    x = torch.tensor([5.0, 3.0, 9.81])
    assert torch.allclose(torch.func.grad(computed)(x), torch.func.grad(closed)(x), rtol=1e-9)
    truth = torch.func.hessian(closed)(x)
    assert torch.allclose(torch.func.hessian(computed)(x), truth, rtol=1e-8, atol=1e-9)
    assert torch.allclose(torch.func.jacrev(torch.func.jacrev(computed))(x), truth, rtol=1e-8, atol=1e-9)
    assert torch.allclose(torch.autograd.functional.hessian(computed, x), truth, rtol=1e-8, atol=1e-9)
    v = torch.tensor([1.0, -2.0, 0.5])
    _, forward = torch.func.jvp(computed, (x,), (v,))
    assert torch.allclose(forward, torch.func.grad(closed)(x) @ v, rtol=1e-9)


def test_third_derivative():
    """``y' = -p y``, ``y = 1/2``: ``t = log 2 / p``; three derivatives."""
    half = event(terminal=True)(lambda t, y, p: y - 0.5)
    t = lambda p: solve_ivp(lambda t, y, p: -p * y, (0.0, 2.0), torch.tensor(1.0), (p,), events=half, **FINE).t[-1]  # noqa: E731
    p = torch.tensor(1.5, requires_grad=True)
    g = torch.autograd.grad(t(p), p, create_graph=True)[0]
    gg = torch.autograd.grad(g, p, create_graph=True)[0]
    (ggg,) = torch.autograd.grad(gg, p)
    log2 = math.log(2)
    for got, want in [(g, -log2 / 1.5**2), (gg, 2 * log2 / 1.5**3), (ggg, -6 * log2 / 1.5**4)]:
        assert float(got.detach()) == pytest.approx(want, rel=1e-6)


def test_parameter_that_only_the_event_has():
    """In ``args``, or captured, or in a module: the level of the threshold."""
    level = torch.tensor(0.5, requires_grad=True)
    module = torch.nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(-0.5)
    half = event(terminal=True)(lambda t, y: y - level)
    given = event(terminal=True)(lambda t, y, p: y - p)
    layer = event(terminal=True)(lambda t, y: module(y.reshape(1)))
    decay = lambda t, y, *a: -y  # noqa: E731
    for g, args, wrt, want in [(half, (), level, -2.0), (given, (level,), level, -2.0), (layer, (), module.bias, 2.0)]:
        sol = solve_ivp(decay, (0.0, 3.0), torch.tensor(1.0), args, events=g, **FINE)
        (got,) = torch.autograd.grad(sol.t[-1], wrt)
        assert got.sum().item() == pytest.approx(want, rel=1e-8) and sol.t[-1].item() == pytest.approx(math.log(2), abs=1e-9)


def test_start_moves_the_event():
    """Autonomous: the event time moves with the start, one for one; not with the end of the span."""
    t0, t1 = torch.tensor(0.3, requires_grad=True), torch.tensor(4.0, requires_grad=True)
    sol = solve_ivp(rotate, (t0, t1), torch.tensor(X0), events=event(terminal=True)(lambda t, y: y[0]), **FINE)
    a, b = torch.autograd.grad(sol.t[-1], (t0, t1), allow_unused=True, materialize_grads=True)
    assert float(a) == pytest.approx(1.0, abs=1e-8) and float(b) == 0.0
    (at,) = torch.autograd.grad(solve_ivp(rotate, (t0, t1), torch.tensor(X0), events=lambda t, y: y[0], **FINE).events[0].y.sum(), t0)
    assert abs(float(at)) < 1e-8
