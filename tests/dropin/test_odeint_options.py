"""Options, callbacks, dense output and the SciPy solver of the ``odeint`` family."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

import adjoint
import adjoint.torchdiffeq
from adjoint import odeint, odeint_adjoint, odeint_dense, odeint_event

from .test_odeint import Rotation, growth, rotated


def test_step_options_are_obeyed():
    starts, sizes = [], []

    class Watched(Rotation):
        def callback_accept_step(self, t0, y0, dt):
            starts.append(float(t0))
            sizes.append(float(dt))

    def run(**options):
        starts.clear()
        sizes.clear()
        return odeint(Watched(), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]), rtol=1e-6, atol=1e-8, options=options)

    run(first_step=1e-3)
    assert sizes[0] == pytest.approx(1e-3)
    run(max_step=0.05)
    assert max(sizes) <= 0.05 * (1 + 1e-9)
    run(min_step=0.5)
    assert min(sizes[:-1]) >= 0.5 * (1 - 1e-9)
    run(ifactor=1.5, first_step=1e-3)
    assert all(b <= 1.5 * a * (1 + 1e-9) for a, b in pairwise(sizes))
    run(step_t=torch.tensor([0.7, 1.1, 5.0]))
    assert 0.7 in starts and 1.1 in starts
    with pytest.raises(AssertionError):
        run(max_num_steps=2)
    with pytest.raises(ValueError, match="repeated"):
        run(step_t=torch.tensor([0.5]), jump_t=torch.tensor([0.5]))
    with pytest.warns(UserWarning, match="Unexpected arguments"):
        run(stepsize=0.1)


@pytest.mark.parametrize("direction", [1, -1])
def test_jumps_are_seen_from_their_own_side(direction):
    def f(t, y):
        return torch.where(t < 0.5, -0.5, 2.0) * torch.ones_like(y)

    t = torch.tensor([0.0, 1.0]) if direction == 1 else torch.tensor([1.0, 0.0])
    count = [0]

    def counted(t, y):
        count[0] += 1
        return f(t, y)

    y = odeint(counted, torch.zeros(1), t, options={"jump_t": torch.tensor([0.5])})
    torch.testing.assert_close(y[-1], torch.tensor([direction * 0.75]), rtol=1e-12, atol=1e-12)
    with_jump, count[0] = count[0], 0
    odeint(counted, torch.zeros(1), t)
    assert with_jump < count[0]
    old = odeint(f, torch.zeros(1), t, options={"grid_points": torch.tensor([0.5]), "eps": 1e-6})
    assert torch.equal(old, y)


def test_times_of_jumps_are_differentiable():
    """With rates -1/2 before and 2 after the jump, the end falls by 5/2 for each unit that the jump comes later."""
    jump = torch.tensor([0.4], requires_grad=True)
    y = odeint(
        lambda t, y: torch.where(t < 0.4, -0.5, 2.0) * torch.ones_like(y),
        torch.zeros(1),
        torch.tensor([0.0, 1.0]),
        options={"jump_t": jump},
    )
    (g,) = torch.autograd.grad(y[-1].sum(), jump)
    torch.testing.assert_close(g, torch.tensor([-2.5]))


@pytest.mark.parametrize("form", [lambda jump: [0.3, jump], lambda jump: (jump,), lambda jump: jump], ids=["list", "tuple", "0-d"])
def test_times_of_jumps_are_differentiable_in_sequences(form):
    """``y' = -y`` before and ``-3 y`` after; the continuous adjoint, which has no derivative in them, says so."""
    jump, rate = torch.tensor(0.8, requires_grad=True), torch.nn.Parameter(torch.tensor(1.0))
    problem = (lambda t, y: -rate * torch.where(t <= jump, y, 3 * y), torch.ones(1), torch.tensor([0.0, 2.0]))
    options = {"jump_t": form(jump)}
    for solve in (odeint, odeint_adjoint):
        (found,) = torch.autograd.grad(solve(*problem, options=options)[-1].sum(), jump)
        assert float(found) == pytest.approx(2 * math.exp(-4.4), rel=1e-6)
    for solve, asked in ((adjoint.torchdiffeq.odeint_adjoint, {}), (odeint_adjoint, {"adjoint_rtol": 1e-6})):
        with pytest.raises(adjoint.UnsupportedCombination, match="jump_t"):
            solve(*problem, options=options, **asked)
        y = solve(*problem, options={"jump_t": [0.8]}, **asked)[-1]
        assert float(torch.autograd.grad(y.sum(), rate)[0]) == pytest.approx(-4.4 * math.exp(-4.4), rel=1e-5)


@pytest.mark.parametrize("method", ["tsit5", "dopri8"])
def test_a_jump_at_an_end_is_seen_from_within(method):
    """A rate of 1 up to the end, and 7 from there on: the end moves by 1 for each unit of its time, and so does a start from 7 to 1."""
    for jump, rates in ((1.5, (1.0, 7.0)), (0.5, (7.0, 1.0))):
        t = torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
        f = lambda t, y: torch.where(t < jump if jump > 1 else t <= jump, *rates) + 0 * y  # noqa: E731, B023
        y = odeint(f, torch.zeros(1, dtype=torch.float64), t, method=method, options={"jump_t": torch.tensor([jump])})
        torch.testing.assert_close(y[:, 0], torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
        found = torch.autograd.grad(y[-1].sum(), t)[0]
        torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64))


def test_norm_option():
    seen = []

    def norm(state):
        seen.append(state)
        return state[0].abs().max() if isinstance(state, tuple) else state.abs().max()

    odeint(growth, torch.ones(3), torch.tensor([0.0, 1.0]), options={"norm": norm})
    assert all(x.shape == (3,) for x in seen)
    seen.clear()
    odeint(lambda t, s: (s[0], -s[1]), (torch.ones(()), torch.ones(2, 2)), torch.tensor([0.0, 1.0]), options={"norm": norm})
    assert all(isinstance(x, tuple) and x[0].shape == () and x[1].shape == (2, 2) for x in seen)


def test_callbacks():
    events = []

    class Watched(Rotation):
        def callback_step(self, t0, y0, dt):
            events.append(("step", float(t0), float(dt)))

        def callback_accept_step(self, t0, y0, dt):
            events.append(("accept", float(t0), float(dt)))

        def callback_reject_step(self, t0, y0, dt):
            events.append(("reject", float(t0), float(dt)))

        def callback_step_adjoint(self, t0, state, dt):
            events.append(("back", float(t0), float(dt)))

    y0 = torch.tensor([1.0, 0.0])
    y = odeint_adjoint(Watched(), y0, torch.tensor([1.0, 0.0]), options={"first_step": 0.9}, rtol=1e-10, atol=1e-10)
    names = [name for name, *_ in events]
    assert names.count("step") == names.count("accept") + names.count("reject") and "reject" in names
    assert events[0][1] == 1.0 and all(dt > 0 for *_, dt in events)
    accepted = names.count("accept")
    events.clear()
    y.sum().backward()
    assert [name for name, *_ in events] == ["back"] * accepted
    with pytest.warns(UserWarning, match="does not support callbacks"):
        odeint(Watched(), y0, torch.tensor([0.0, 1.0]), method="rk4")


def test_dense_output():
    rate = torch.tensor(0.8, requires_grad=True)
    y0 = torch.tensor([1.0, 2.0], requires_grad=True)
    for method, options in ((None, None), ("dopri8", None), ("rk4", {"step_size": 0.05, "interp": "cubic"})):
        solution = odeint_dense(lambda t, y: -rate * y, y0, torch.tensor(0.0), torch.tensor(2.0), method=method, options=options)
        t = torch.tensor([0.0, 0.33, 1.7, 2.0], requires_grad=True)
        y = solution(t)
        torch.testing.assert_close(y, torch.exp(-rate * t)[:, None] * y0, rtol=1e-5, atol=1e-6)
        by_time, by_rate = torch.autograd.grad(y[:, 0].sum(), (t, rate))
        torch.testing.assert_close(by_time, -rate.detach() * torch.exp(-rate * t).detach(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(by_rate, -(t * torch.exp(-rate * t)).sum().detach(), rtol=1e-4, atol=1e-5)
    assert solution(torch.tensor(0.5)).shape == (2,)
    with pytest.raises(adjoint.UnsupportedCombination):
        odeint_dense(growth, y0, 0.0, 1.0, method="explicit_adams")


@pytest.mark.parametrize("method", ["implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA5", "gl4", "trbdf2"])
def test_cubic_between_grid_points_of_implicit_methods(method):
    """Between grid points lies the cubic with the slopes of ``func`` at both: of the same states, and with their derivatives."""
    rate = torch.tensor(0.7, requires_grad=True)
    f = lambda t, y: -rate * y * torch.cos(t)  # noqa: E731
    grid = torch.tensor([0.0, 0.2, 0.4, 0.6])
    t = torch.tensor([0.0, 0.05, 0.4, 0.53, 0.6], requires_grad=True)
    for way in (odeint, odeint_adjoint):
        extra = {"adjoint_params": (rate,)} if way is odeint_adjoint else {}
        nodes = way(f, torch.ones(1), grid, method=method, **extra)
        y = way(f, torch.ones(1), t, method=method, options={"step_size": 0.2, "interp": "cubic"}, **extra)
        want = []
        for k, i in ((1, 0), (3, 2)):
            s, ends = (t[k] - grid[i]) / 0.2, (nodes[i], nodes[i + 1])
            a, b = (0.2 * f(grid[i + j], ends[j]) for j in (0, 1))
            want.append(ends[0] + s * (a + s * (3 * (ends[1] - ends[0]) - 2 * a - b + s * (2 * (ends[0] - ends[1]) + a + b))))
        want = torch.stack([nodes[0], want[0], nodes[2], want[1], nodes[3]])
        torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)
        for k in (1, 3):
            got, right = (torch.autograd.grad(x[k].sum(), (rate, t), retain_graph=True) for x in (y, want))
            assert abs(got[0] - right[0]) < 1e-5 and abs(got[1][k] - right[1][k]) < 1e-5
    # reversed, in a tuple, complex
    z = odeint(lambda t, s: (1j * s[0],), (torch.ones(1) + 0j,), -t.detach(), method=method, options={"step_size": 0.01, "interp": "cubic"})
    torch.testing.assert_close(z[0][:, 0], torch.exp(-1j * t.detach()), rtol=0, atol=1e-2 if method == "implicit_euler" else 1e-4)


@pytest.mark.parametrize("interp", ["linear", "cubic"])
@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "implicit_midpoint", "trapezoid", "radauIIA3", "gl6", "sdirk2"])
def test_events_on_a_grid(method, interp):
    """``y' = -rate y cos t`` reaches 0.7 where ``rate sin t = -log 0.7``: time and its derivatives are of the order of the method,
    not of the interpolation."""
    rate = torch.tensor(0.7, requires_grad=True)
    when, y = odeint_event(
        lambda t, y: -rate * y * torch.cos(t),
        torch.ones(1),
        torch.tensor(0.0),
        event_fn=lambda t, y: y[0] - 0.7,
        method=method,
        options={"step_size": 0.05, "interp": interp},
    )
    want = torch.asin(-torch.log(torch.tensor(0.7)) / rate)
    torch.testing.assert_close(when, want, rtol=0, atol=2e-4)
    torch.testing.assert_close(y[-1], torch.tensor([0.7]), rtol=0, atol=1e-9)
    (got,), (right,) = (torch.autograd.grad(x, rate, create_graph=True) for x in (when, want))
    torch.testing.assert_close(got, right, rtol=1e-3, atol=0)
    (got,), (right,) = (torch.autograd.grad(x, rate) for x in (got, right))
    torch.testing.assert_close(got, right, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", ["gl4", "sdirk2"])
def test_an_event_without_slope_of_implicit_methods_on_a_grid(method):
    when, _ = odeint_event(
        lambda t, y: -y, torch.ones(1), torch.tensor(0.0), event_fn=lambda t, y: y[0] > 0.7, method=method, options={"step_size": 0.02}
    )
    torch.testing.assert_close(when, -torch.log(torch.tensor(0.7)), rtol=0, atol=1e-4)


def test_scipy_solver():
    y0, t = torch.tensor([1.0, -0.4]), torch.linspace(0.0, 2.0, 5)
    for times in (t, t.flip(0)):
        for name in ("RK45", "LSODA", "BDF"):
            y = odeint(Rotation(), y0, times, method="scipy_solver", options={"solver": name})
            torch.testing.assert_close(y.detach(), rotated(y0, 1.3, times - times[0]), rtol=1e-4, atol=1e-5)
    # a gradient that is not there raises, and the continuous adjoint has one
    f = Rotation()
    with pytest.raises(adjoint.UnsupportedCombination, match="odeint_adjoint"):
        odeint(f, y0, t, method="scipy_solver").sum().backward()
    odeint_adjoint(f, y0, t, method="scipy_solver").sum().backward()
    expected = torch.autograd.grad(rotated(y0, f.speed, t[:, None].squeeze(-1)).sum(), f.speed)[0]
    torch.testing.assert_close(f.speed.grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["sdirk2", "implicit_euler", "gl4", "trapezoid", "rk4"])
def test_perturb_keeps_clear_of_the_grid(method):
    """``func`` is seen inside of the steps only, also where a method has no stage at their start."""
    seen = []

    def f(t, y):
        seen.append(float(t))
        return -y

    for way in (odeint, odeint_adjoint):
        y0 = torch.tensor([1.0, 2.0], requires_grad=True)
        extra = {} if way is odeint else {"adjoint_params": ()}
        way(f, y0, torch.tensor([0.0, 1.0]), method=method, options={"step_size": 0.5, "perturb": True}, **extra).sum().backward()
        assert seen and not {0.0, 0.5, 1.0} & set(seen)
        seen.clear()


@pytest.mark.parametrize("method", ["rk4", "heun3", "implicit_midpoint", "trapezoid", "explicit_adams"])
def test_samples_on_lines_have_no_second_derivatives_in_their_times(method):
    """But for the last one, which ends the grid."""
    t = torch.tensor([0.0, 0.513, 1.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)

    def derivative(**options):
        y = adjoint.odeint(lambda t, y: -y, y0, t, method=method, options=options)[:, 0]
        return torch.autograd.grad(y[1:].sum(), t, create_graph=True)[0][1:]

    first = derivative(step_size=0.1)
    assert torch.allclose(first, -torch.exp(-t[1:]), rtol=0.06)
    with pytest.raises(adjoint.InvalidInput, match="interp"):
        torch.autograd.grad(first.sum(), t)
    (curved,) = torch.autograd.grad(derivative(step_size=0.1, interp="cubic")[0], t)
    assert float(curved[1]) == pytest.approx(math.exp(-0.513), rel=0.05)
