"""Resets in implicit equations: consistent values after them, with derivatives; mass matrices; mechanics."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import pytest
import torch

import adjoint
from adjoint import Event, solve_dae, solve_ivp

from ..helpers.bouncing import between, contact, flight

FINE = {"rtol": 1e-9, "atol": 1e-11}


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def implicit(t, y, yp, e, g):
    """A falling ball, whose kinetic energy is an algebraic variable."""
    return torch.stack([yp[..., 0] - y[..., 1], yp[..., 1] + g, y[..., 2] - y[..., 1] ** 2 / 2], -1)


def explicit(t, y, e, g):
    return torch.stack([y[..., 1], -g.expand_as(y[..., 1]), y[..., 2] - y[..., 1] ** 2 / 2], -1)


MASS = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
#: the algebraic variable is left as it was: consistent values are found
GROUND = Event(
    lambda t, y, e, g: y[..., 0],
    direction=-1,
    reset=lambda t, y, e, g: torch.stack([y[..., 0], -e * y[..., 1], y[..., 2]], -1),
    name="ground",
)


def grads(x, inputs):
    first = torch.autograd.grad(x.sum(), inputs, create_graph=True, materialize_grads=True)
    total = sum(g.sum() for g in first) + 0 * sum(x.sum() ** 2 for x in inputs)
    return [*first, *torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)]


def agree(found, wanted, inputs, tol=1e-8, second=True):
    assert torch.allclose(found, wanted, rtol=tol, atol=tol)
    a, b = (grads(x, inputs) if second else torch.autograd.grad(x.sum(), inputs, retain_graph=True) for x in (found, wanted))
    for one, other in zip(a, b, strict=True):
        assert torch.allclose(one, other, rtol=tol, atol=tol * (1 + float(other.detach().abs().max()))), (a, b)


def full(y):
    return torch.cat([y, y[..., 1:] ** 2 / 2], -1)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ["radau", "bdf", "mass radau5", "mass rodas5p", "native radau", "native bdf", "native mass rodas5p"])
@pytest.mark.slow_cases("native radau-True", "native mass rodas5p-False")
def test_consistent_values_after_a_reset(method, batched):
    native, method = method.startswith("native"), method.removeprefix("native ")
    mass, method = method.startswith("mass"), method.removeprefix("mass ")
    h, e, g = p = values(2.0, 0.8, 9.81)
    y0, args = torch.stack([h, 0 * h, 0 * h]), (e, g)
    if batched:
        y0, args = torch.stack([y0, y0 * 0.5]), (torch.stack([e, e]), torch.stack([g, g]))
    keys = {"events": GROUND, "batched": batched, "t_eval": [0.2, 0.9, 1.2], "method": method, "compile": native, **FINE}
    if method != "bdf":
        keys["first_step"] = 0.05  # parabolas are exact in any step: most others would be first ones behind contacts, which grow
    sol = (
        solve_ivp(explicit, (0.0, 1.25), y0, args, mass_matrix=MASS, **keys)
        if mass
        else solve_dae(implicit, (0.0, 1.25), y0, args=args, **keys)
    )
    for row, high in enumerate((h, h / 2) if batched else (h,)):
        own = (lambda x, row=row: x[:, row]) if batched else lambda x: x
        counts = [sum(bool(contact(k, high, e, g) < t) for k in range(1, 12)) for t in (0.2, 0.9, 1.2)]
        wanted = torch.stack([full(flight(torch.tensor(t), n, high, e, g)) for t, n in zip((0.2, 0.9, 1.2), counts, strict=True)])
        loose = method == "bdf"
        agree(own(sol.y), wanted, p, 1e-5 if loose else 1e-8, second=not loose and not batched)
        speed = e * (2 * g * high).sqrt()
        record = sol.events["ground"]
        agree(own(record.after)[0, 2], speed**2 / 2, p, 1e-5 if loose else 1e-8, second=False)
        assert torch.allclose(own(record.y)[0, 2], g * high, rtol=1e-5)


@pytest.mark.parametrize("gradient", ["discrete", "backprop", "forward", "interpolating", "gauss", "quadrature"])
@pytest.mark.slow_cases("quadrature", "gauss", "interpolating")
def test_strategies(gradient):
    strategy = {
        "discrete": adjoint.DiscreteAdjoint(),
        "backprop": adjoint.Backprop(),
        "forward": adjoint.ForwardSensitivity(),
        "interpolating": adjoint.InterpolatingAdjoint(rtol=1e-10, atol=1e-12),
        "gauss": adjoint.GaussAdjoint(rtol=1e-10, atol=1e-12),
        "quadrature": adjoint.QuadratureAdjoint(rtol=1e-10, atol=1e-12),
    }[gradient]
    h, e, g = p = values(2.0, 0.8, 9.81)
    t = between(3, *p)
    keys = {"args": (e, g), "events": GROUND, "gradient": strategy, "first_step": 0.05, **FINE}
    sol = solve_dae(implicit, (0.0, t), torch.stack([h, 0 * h, 0 * h]), quadrature=lambda t, y, *a: y[1], **keys)
    agree(sol.quadrature.reshape(1), flight(t, 3, *p)[:1] - h, p, 1e-7, second=False)
    agree(sol.y[-1], full(flight(t, 3, *p)), p, 1e-7, second=False)
    assert torch.allclose(sol.yp[-1][:2], torch.stack([sol.y[-1, 1], -g]), atol=1e-6)
    if gradient in ("interpolating", "gauss", "quadrature"):
        (first,) = torch.autograd.grad(sol.events["ground"].t[0], g, create_graph=True)
        with pytest.raises(adjoint.InvalidInput, match="twice"):
            torch.autograd.grad(first, g)


def test_steps_dense_output_integral_and_slopes():
    h, e, g = p = values(2.0, 0.8, 9.81)
    y0 = torch.stack([h, 0 * h, 0 * h])
    keys = {"args": (e, g), "events": GROUND, **FINE}
    sol = solve_dae(implicit, (0.0, 1.5), y0, t_eval="steps", dense_output=True, quadrature=lambda t, y, *a: y[1], **keys)
    n = sum(bool(contact(k, *p) < 1.5) for k in range(1, 5))
    assert int((sol.t.diff() == 0).sum()) == n and sol.yp.shape == sol.y.shape
    assert torch.allclose(sol.yp[:, 1], -g.expand(len(sol.t)), atol=1e-6) and torch.allclose(sol.y[:, 2], sol.y[:, 1] ** 2 / 2, atol=1e-8)
    assert torch.allclose(sol.quadrature, sol.y[-1, 0] - h, atol=1e-8)
    at = sol.events[0].t[0]
    left, right = sol(at, side="left"), sol(at)
    assert torch.allclose(right[1], -e * left[1], atol=1e-8) and torch.allclose(right[2], e**2 * left[2], atol=1e-8)


def test_a_reset_at_the_end_is_consistent_too():
    h, e, g = p = values(2.0, 0.8, 9.81)
    last = Event(GROUND.function, direction=-1, reset=GROUND.reset, terminal=2, name="ground")
    sol = solve_dae(implicit, (0.0, 9.0), torch.stack([h, 0 * h, 0 * h]), args=(e, g), events=last, **FINE)
    assert sol.status == 1
    agree(sol.y[-1, 2], e**4 * g * h, p, second=False)
    assert torch.allclose(sol.yp[-1, 1], -g, atol=1e-8)


def test_what_goes_on_through_a_switching_surface():
    """No second event where the slope is known from the implicit equations alone."""
    for direction in (0, -1):
        kick = Event(lambda t, y: y[0], direction=direction, reset=lambda t, y: torch.stack([y[0], y[1] * 1.1, y[2]]), name="kick")
        fun = lambda t, y, yp: torch.stack([yp[0] + y[1], yp[1] - y[0], y[2] - y[0]])  # noqa: E731
        rotate = lambda t, y: torch.stack([-y[1], y[0], y[2] - y[0]])  # noqa: E731
        for sol in (
            solve_dae(fun, (0.0, 10.0), torch.tensor([1.0, 0.0, 1.0]), events=kick, rtol=1e-7, atol=1e-9),
            solve_ivp(
                rotate, (0.0, 10.0), torch.tensor([1.0, 0.0, 1.0]), events=kick, mass_matrix=MASS, method="rodas5p", rtol=1e-7, atol=1e-9
            ),
        ):
            n = {0: 3, -1: 2}[direction]
            assert sol.events["kick"].t.shape == (n,) and bool((sol.events["kick"].t.diff() > 1).all())


def test_pendulum_against_a_wall():
    """A pendulum of index 2 whose velocity is turned round at the lowest point, twice in a swing: as one of minimal coordinates."""
    e = torch.tensor(0.9, requires_grad=True)
    model = adjoint.mechanics(
        torch.ones(2), lambda t, q, v, e: torch.stack([0 * q[0], -9.81 + 0 * q[1]]), lambda t, q, e: (q @ q - 1.0).reshape(1)
    )
    wall = Event(lambda t, y, e: y.q[0], direction=-1, reset=lambda t, y, e: y._replace(v=-e * y.v), name="wall")
    q0, v0 = torch.tensor([1.0, 0.0]), torch.zeros(2)
    sol = model.solve((0.0, 2.0), q0, v0, args=(e,), events=wall, rtol=1e-4, atol=1e-6)

    def swing(t, y, e):
        return torch.stack([y[1], -9.81 * torch.sin(y[0])])

    angle = Event(lambda t, y, e: y[0], direction=-1, reset=lambda t, y, e: torch.stack([y[0], -e * y[1]]), name="wall")
    same = solve_ivp(swing, (0.0, 2.0), torch.tensor([torch.pi / 2, 0.0]), (e,), events=angle, method="dopri8", rtol=1e-10, atol=1e-12)
    assert sol.events["wall"].t.shape == same.events["wall"].t.shape == (2,)
    assert torch.allclose(sol.events["wall"].t, same.events["wall"].t, atol=1e-4)
    x, other = sol.y.q[-1, 0], torch.sin(same.y[-1, 0])
    agree(x, other, [e], 1e-3, second=False)


def test_modes_of_implicit_equations():
    """A relay in the algebraic part."""
    q = torch.tensor(2.0, requires_grad=True)
    fun = lambda t, y, yp, on, q: torch.stack([yp[0] - y[1], y[1] - on * q + y[0]])  # noqa: E731
    off = Event(lambda t, y, on, q: y[0] - 1.0, direction=1, reset=lambda t, y, on, q: (y, 0 * on), name="off")
    sol = solve_dae(fun, (0.0, 1.0), torch.zeros(2), args=(q,), events=off, mode=torch.ones(()), rtol=1e-10, atol=1e-12)
    t = (q / (q - 1)).log()
    agree(sol.events["off"].t[0], t, [q])
    agree(sol.y[-1, 0], (-(1.0 - t)).exp(), [q])
    assert torch.allclose(sol.events["off"].after[0], torch.tensor([1.0, -1.0]), atol=1e-8)


@cache
def network():
    """The peak as a function of parameters, these, a step in them, and the difference of peaks along it."""
    spec = importlib.util.spec_from_file_location("power_swing", Path(__file__).parents[2] / "examples" / "power_swing.py")
    swing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(swing)
    start = swing.power_flow()
    peak = lambda p, **options: swing.angle(swing.course(p, start, 1e-8, **options).events["peak"].y[0])  # noqa: E731
    step = 1e-3 * swing.P0 * torch.tensor([0.0, 1.0, 0.0, 1.0])
    with torch.no_grad():
        near = [float(peak(swing.P0 + k * step)) for k in (1, -1, 2, -2)]
    return peak, swing.P0, step, (8 * (near[0] - near[1]) - (near[2] - near[3])) / 12


@pytest.mark.parametrize(
    "gradient",
    [
        adjoint.DiscreteAdjoint(),
        adjoint.ForwardSensitivity(),
        adjoint.GaussAdjoint(rtol=1e-9, atol=1e-11),
        *(
            pytest.param(strategy, marks=pytest.mark.slow)
            for strategy in (
                adjoint.Backprop(),
                adjoint.InterpolatingAdjoint(rtol=1e-9, atol=1e-11),
                adjoint.QuadratureAdjoint(rtol=1e-9, atol=1e-11),
            )
        ),
    ],
)
@pytest.mark.slow_cases("gradient2", "gradient0")
def test_a_power_network_whose_relay_trips(gradient):
    """Twenty-five equations, new consistent voltages at the trip, the peak behind it: six digits of differences, by every strategy."""
    peak, p0, step, difference = network()
    p = p0.clone().requires_grad_()
    (slope,) = torch.autograd.grad(peak(p, gradient=gradient), p)
    assert abs(float(slope @ step) / difference - 1) < 1e-6


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.slow_cases("0")
def test_a_rosenbrock_method_with_checkpoints(rows):
    """Its rounds end where another solve found the event, and it has no slopes there: x' = a, 0 = a - c x, from x = 1 to 1/2."""
    c, x0 = torch.tensor(0.8, requires_grad=True), torch.tensor([0.6, 0.5], requires_grad=True)
    jump = Event(lambda t, y, c: y[..., 0] - 1, reset=lambda t, y, c: torch.stack([0.5 + 0 * y[..., 0], y[..., 1]], -1), name="jump")
    fun = lambda t, y, c: torch.stack([y[..., 1], y[..., 1] - c * y[..., 0]], -1)  # noqa: E731
    start = torch.stack([x0, 0 * x0], -1) if rows else torch.stack([x0[0], 0 * x0[0]])
    keys = {"mass_matrix": torch.diag(torch.tensor([1.0, 0.0])), "method": "rodas5p", "rtol": 1e-9, "atol": 1e-11}
    sol = solve_ivp(fun, (0.0, 1.4), start, (c,), events=jump, gradient=adjoint.DiscreteAdjoint(checkpoints=3), batched=rows > 0, **keys)
    first = x0 if rows else x0[0]
    when = -first.log() / c
    end = 0.5 * (c * (1.4 - when)).exp()
    found = torch.stack([sol.events["jump"].t[0], *sol.events["jump"].y[0].unbind(-1), *sol.y[-1].unbind(-1)])
    wanted = torch.stack([when, 1 + 0 * when, c + 0 * when, end, c * end])
    assert torch.allclose(found, wanted, atol=1e-7)
    for a, b in zip(found, wanted, strict=True):
        both = [torch.autograd.grad(x.sum(), (c, x0), retain_graph=True, materialize_grads=True) for x in (a, b)]
        assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*both, strict=True))


def switched(t, y, yp, mode, c):
    """``x' = 1``, in the other mode 2, and ``z = x^2``; in other variables, whose matrix of slopes is singular and not diagonal."""
    x, z, slope = y[..., 0] + y[..., 1], y[..., 0] - y[..., 1], yp[..., 0] + yp[..., 1]
    return torch.stack([slope - torch.where(mode == 0, 1.0, 2.0), z - x**2], -1)


@pytest.mark.parametrize("method", ["radau", "bdf", "mass"])
@pytest.mark.parametrize("direction", [0, 1])
def test_events_of_algebraic_variables_are_not_found_again(method, direction):
    """Slopes of algebraic variables say to which side the function of an event moves on: no equation names them, and they were zero."""
    crossing = Event(lambda t, y, mode, c: y[..., 0] - y[..., 1] - c, direction=direction, reset=lambda t, y, mode, c: (y, 1 - mode))
    start, matrix = torch.tensor([0.055, 0.045], dtype=torch.float64), torch.tensor([[1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)

    def end(c, **more):
        y0 = start.expand(*c.shape, 2)
        mode = torch.zeros(c.shape, dtype=torch.int64)
        options = {"args": (c,), "events": crossing, "mode": mode, "batched": c.dim() > 0, **FINE}
        if method == "mass":
            right = lambda t, y, mode, c: -switched(t, y, torch.zeros_like(y), mode, c)  # noqa: E731
            y = solve_ivp(right, (0.0, 1.0), y0, mass_matrix=matrix, method="rodas5p", **options).y[-1]
        else:
            y = solve_dae(switched, (0.0, 1.0), y0, method=method, **options).y[-1]
        return y.sum(-1)

    (c,) = values(0.5)
    agree(end(c), 2.2 - torch.sqrt(c), [c], 1e-7)
    # in the last trajectory it does not happen
    torch.testing.assert_close(end(torch.tensor([0.5, 0.8, 2.0])), torch.tensor([2.2 - 0.5**0.5, 2.2 - 0.8**0.5, 1.1]))


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_what_a_mode_keeps_at_zero_is_no_event_over_and_over(method):
    """A charger: a constant current up to a voltage, which is kept, to the tolerance of the solve, until the current is small."""
    (r,) = values(0.05)
    voltage = lambda y, r: 3.2 + 0.9 * y[0] + r * y[1]  # noqa: E731

    def battery(t, y, yp, mode, r):
        return torch.stack([yp[0] - y[1] / 2, torch.where(mode == 0, y[1] - 1, voltage(y, r) - 4.0)])

    full = Event(lambda t, y, mode, r: voltage(y, r) - 4.0, direction=1, reset=lambda t, y, mode, r: (y, 0 * mode + 1), name="full")
    done = Event(lambda t, y, mode, r: y[1] - 0.1, direction=-1, terminal=True)
    start = torch.tensor([0.1, 1.0], dtype=torch.float64)
    sol = solve_dae(battery, (0.0, 10.0), start, args=(r,), events=[full, done], mode=0, method=method, rtol=1e-7, atol=1e-9)
    reached = 2 * ((0.8 - r) / 0.9 - 0.1)
    assert len(sol.events["full"].t) == 1
    torch.testing.assert_close(sol.events["full"].t[0], reached, rtol=1e-6, atol=0.0)
    # the current falls as exp(-0.45 t / r)
    found, want = sol.t[-1], reached + r / 0.45 * torch.log(torch.tensor(10.0))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(*(torch.autograd.grad(x, r)[0] for x in (found, want)), rtol=1e-4, atol=0.0)
