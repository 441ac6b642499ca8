"""Events of the ``odeint`` family: times, states and their derivatives against closed forms."""

from __future__ import annotations

import functools

import pytest
import torch

import adjoint
from adjoint import odeint, odeint_adjoint, odeint_event


def fall(gravity):
    """A tuple state: height and velocity."""

    def f(t, state):
        _, speed = state
        return speed, -gravity * torch.ones_like(speed)

    return f


def impact(height, speed, gravity, floor):
    """Time after which a ball thrown up with ``speed`` from ``height`` reaches ``floor``, and its velocity there."""
    root = torch.sqrt(speed**2 + 2 * gravity * (height - floor))
    return (speed + root) / gravity, -root


def ball():
    values = (10.0, 0.5, 9.8, 1.0, 0.3)
    return tuple(torch.tensor(x, requires_grad=True) for x in values)


GRID = {"step_size": 0.02, "interp": "cubic"}
WAYS = {
    "dopri5": (odeint, {}),
    "dopri8": (odeint, {"method": "dopri8"}),
    "rk4": (odeint, {"method": "rk4", "options": GRID}),
    "explicit_adams": (odeint, {"method": "explicit_adams", "options": GRID}),
    "implicit_adams": (odeint, {"method": "implicit_adams", "options": GRID}),
    "adjoint": (odeint_adjoint, {}),
    "continuous": (odeint_adjoint, {"adjoint_method": "dopri5"}),
    "partial": (functools.partial(odeint, rtol=1e-9), {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_event_time_and_state_with_all_derivatives(way):
    interface, options = WAYS[way]
    height, speed, gravity, floor, start = parts = ball()
    when, states = odeint_event(
        fall(gravity), (height, speed), start, event_fn=lambda t, s: s[0] - floor, odeint_interface=interface, **options
    )
    assert when.shape == () and states[0].shape == (2,) and states[1].shape == (2,)
    after, velocity = impact(height, speed, gravity, floor)
    torch.testing.assert_close(when, start + after, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[1][-1], velocity, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(states[0][-1], floor, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad(when + 2 * states[1][-1], parts)
    expected = torch.autograd.grad(start + after + 2 * velocity, parts)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_interface_that_holds_the_event_time_fixed_is_completed():
    height, speed, gravity, floor, start = parts = ball()

    def foreign(func, y0, t, *, event_fn):
        """Right values; derivatives at a fixed time only."""
        with torch.no_grad():
            when, _ = odeint(func, y0, t, event_fn=event_fn)
        states = odeint(func, y0, torch.stack([t[0], when]))
        return when, states

    when, states = odeint_event(fall(gravity), (height, speed), start, event_fn=lambda t, s: s[0] - floor, odeint_interface=foreign)
    after, velocity = impact(height, speed, gravity, floor)
    got = torch.autograd.grad(when + states[1][-1], parts[:4])
    expected = torch.autograd.grad(start + after + velocity, parts[:4])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "explicit_adams"])
@pytest.mark.parametrize("interface", [odeint, odeint_adjoint])
def test_second_derivatives_of_an_event_time(interface, method):
    def time(height, gravity):
        extra = {"adjoint_params": (gravity,)} if interface is odeint_adjoint else {}
        if method != "dopri5":
            extra |= {"method": method, "options": GRID}
        f = fall(gravity)
        y0 = (height, torch.zeros(()))
        return odeint_event(f, y0, torch.tensor(0.0), event_fn=lambda t, s: s[0], odeint_interface=interface, **extra)[0]

    height, gravity = torch.tensor(3.0, requires_grad=True), torch.tensor(9.8, requires_grad=True)
    (first,) = torch.autograd.grad(time(height, gravity), height, create_graph=True)
    second = torch.autograd.grad(first, (height, gravity))
    exact = torch.sqrt(2 * height / gravity)
    (want,) = torch.autograd.grad(exact, height, create_graph=True)
    for a, b in zip(second, torch.autograd.grad(want, (height, gravity)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_second_derivatives_are_refused_where_they_would_be_wrong():
    floor = torch.tensor(1.0, requires_grad=True)
    gravity = torch.tensor(9.8)
    for way in (functools.partial(odeint_adjoint, adjoint_method="dopri5"), lambda *args, **options: odeint(*args, **options)):
        y0 = (torch.tensor(3.0), torch.tensor(0.0))
        when, _ = odeint_event(fall(gravity), y0, torch.tensor(0.0), event_fn=lambda t, s: s[0] - floor, odeint_interface=way)
        (first,) = torch.autograd.grad(when, floor, create_graph=True)
        torch.testing.assert_close(first.detach(), -1 / torch.sqrt(2 * gravity * 2.0), rtol=1e-6, atol=0)
        if way.__class__ is functools.partial:
            with pytest.raises(adjoint.UnsupportedCombination, match="first derivatives"):
                torch.autograd.grad(first, floor)


def test_reverse_time():
    height, speed, gravity, floor, start = parts = ball()
    when, states = odeint_event(fall(gravity), (height, speed), start, event_fn=lambda t, s: s[0] - floor, reverse_time=True)
    root = torch.sqrt(speed**2 + 2 * gravity * (height - floor))
    before = (speed - root) / gravity
    torch.testing.assert_close(when, start + before, rtol=1e-8, atol=1e-8)
    got = torch.autograd.grad(when, parts)
    for a, b in zip(got, torch.autograd.grad(start + before, parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert when < start and states[1][-1] > 0


def test_the_first_of_several_events_ends_the_solve():
    y0 = torch.tensor([0.0, 0.0])

    def f(t, y):
        return torch.tensor([1.0, 2.0])

    when, y = odeint(f, y0, torch.tensor([0.0, 1.0]), event_fn=lambda t, y: torch.stack([y[0] - 3.0, 5.0 - y[1], t - 10.0]))
    torch.testing.assert_close(when, torch.tensor(2.5))
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0], [2.5, 5.0]]))


def test_an_event_that_begins_at_zero_ends_at_once():
    y0 = torch.tensor([1.0])
    for method, options in (("dopri5", {}), ("rk4", {"step_size": 0.1}), ("explicit_adams", {"step_size": 0.1})):
        when, y = odeint(lambda t, y: y, y0, torch.tensor([2.0, 3.0]), event_fn=lambda t, y: y - 1.0, method=method, options=options)
        assert float(when) == 2.0 and torch.equal(y, torch.ones(2, 1))


def test_bounces_one_after_the_other():
    gravity, keep = torch.tensor(9.8, requires_grad=True), torch.tensor(0.9, requires_grad=True)
    t, height, speed = torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.0)
    for _ in range(3):
        t, (heights, speeds) = odeint_event(fall(gravity), (height, speed), t, event_fn=lambda t, s: s[0], odeint_interface=odeint)
        height, speed = heights[-1] + 1e-7, -keep * speeds[-1]
    first = torch.sqrt(2.0 / gravity)
    exact = first * (1 + 2 * keep + 2 * keep**2)
    torch.testing.assert_close(t, exact, rtol=1e-5, atol=0)
    for a, b in zip(torch.autograd.grad(t, (gravity, keep)), torch.autograd.grad(exact, (gravity, keep)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=0)


def test_errors():
    y0, t = torch.ones(1), torch.tensor([0.0, 1.0])

    def event(t, y):
        return y - 2

    with pytest.raises(ValueError, match="len"):
        odeint(lambda t, y: y, y0, torch.tensor([0.0, 1.0, 2.0]), event_fn=event)
    for method in ("rk4", "implicit_adams"):
        with pytest.raises(AssertionError, match="step_size"):
            odeint(lambda t, y: y, y0, t, event_fn=event, method=method)
    with pytest.raises(adjoint.UnsupportedCombination, match="event"):
        odeint(lambda t, y: y, y0, t, event_fn=event, method="scipy_solver")
    # an event that never comes
    with pytest.raises(AssertionError):
        odeint(lambda t, y: -y, y0, t, event_fn=event, options={"max_num_steps": 50})
    with pytest.raises(RuntimeError):
        odeint(lambda t, y: -y, y0, t, event_fn=event, method="euler", options={"step_size": 1.0})


FIRST_ORDER = {"euler": {}, "implicit_euler": {}, "explicit_adams": {"max_order": 1}}


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", FIRST_ORDER)
def test_second_derivatives_of_event_times_by_methods_of_first_order(method, interp):
    """The cubic through the ends of their steps would have twice the second derivative, or none at all, however small the steps are."""
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    t, y0 = torch.tensor([0.0, 9.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    options = {"step_size": 0.03, "interp": interp, **FIRST_ORDER[method]}
    when = odeint(lambda t, y: -p * y, y0, t, method=method, options=options, event_fn=lambda t, y: y[0] - 0.5)[0]
    (first,) = torch.autograd.grad(when, p, create_graph=True)
    (second,) = torch.autograd.grad(first, p)
    torch.testing.assert_close(first, -torch.log(torch.tensor(2.0, dtype=torch.float64)) / p**2, rtol=0.05, atol=0)
    torch.testing.assert_close(second, 2 * torch.log(torch.tensor(2.0, dtype=torch.float64)) / p**3, rtol=0.05, atol=0)


@pytest.mark.parametrize("level", [0.12, 0.6, 0.7])
@pytest.mark.parametrize(
    ("method", "order"), [*((m, k) for m in ("explicit_adams", "implicit_adams") for k in (1, 2, 4, 8)), ("rk4", 0), ("dopri5", 0)]
)
def test_a_right_hand_side_that_changes_where_the_event_is(method, order, level):
    """The state at the event is the level itself, whatever follows; in the first steps and in those of the formula."""
    level = torch.tensor(level, requires_grad=True)

    def func(t, y):
        return torch.stack([torch.ones_like(y[0]), torch.where(y[0] < level, 1.0, 5.0)])

    options = {"step_size": 0.07} | ({"max_order": order} if order else {})
    when, states = odeint_event(
        func,
        torch.zeros(2),
        torch.tensor(0.0),
        event_fn=lambda t, y: y[0] - level,
        odeint_interface=odeint,
        method=method,
        options=options if method != "dopri5" else {},
    )
    for value in (when, states[-1, 0], states[-1, 1]):
        torch.testing.assert_close(value, level, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(torch.autograd.grad(value, level, retain_graph=True)[0], torch.tensor(1.0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "rk4"])
def test_an_adams_event_without_slope_has_a_time_and_no_derivative(method):
    rate = torch.tensor(1.0, requires_grad=True)
    when, _ = odeint_event(
        lambda t, y: -rate * y,
        torch.ones(1),
        torch.tensor(0.0),
        event_fn=lambda t, y: y[0] > 0.5,
        odeint_interface=odeint,
        method=method,
        options={"step_size": 0.02},
    )
    assert abs(float(when) - 0.6931471805599453) < 1e-7
    with pytest.raises(adjoint.InvalidInput, match="no slope"):
        when.backward()
