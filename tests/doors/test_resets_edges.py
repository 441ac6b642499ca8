"""Resets at their edges: events that accumulate, touch, or come together; wrong resets; what fails beside others."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint
from adjoint import Event, solve_ivp

from ..helpers.bouncing import BOUNCE, between, contact, fall, flight, rebound
from .test_resets import FINE, compared, values


def test_zeno():
    """Bounces that accumulate at 2 sqrt(2 h / g): a named error, of one trajectory and in a batch, where it can be switched off."""
    e, g = torch.tensor(0.5), torch.tensor(9.0)
    y0 = torch.tensor([1.0, 0.0])
    limit = float((2 / g).sqrt() * 3)
    with pytest.raises(adjoint.EventsAccumulate, match="Zeno") as caught:
        solve_ivp(fall, (0.0, 2.0), y0, (e, g), events=BOUNCE, **FINE)
    assert abs(caught.value.t - limit) < 1e-9
    both = torch.stack([y0, torch.tensor([10.0, 0.0])])
    with pytest.raises(adjoint.EventsAccumulate, match="Zeno") as caught:
        solve_ivp(fall, (0.0, 2.0), both, (e, g), events=BOUNCE, batched=True, **FINE)
    assert caught.value.trajectory == 0
    height = {"quadrature": lambda t, y, e, g: y[..., 0]}
    sol = solve_ivp(fall, (0.0, 2.0), both, (e, g), events=BOUNCE, batched=True, throw=False, **height, **FINE)
    assert sol.quadrature.isnan().tolist() == [True, False]
    assert sol.status.tolist() == [-5, 0] and bool(sol.y[-1, 0].isnan().all()) and torch.isfinite(sol.y[-1, 1]).all()
    assert "events" in sol.message[0]
    with pytest.raises(adjoint.EventsAccumulate, match="max_events = 3"):
        solve_ivp(fall, (0.0, 2.0), y0, (e, g), events=BOUNCE, max_events=3, **FINE)


def test_a_ball_that_is_caught_rests_on_its_event():
    """Restitution zero: the ball would fall through the ground, or bounce for ever in no time."""
    caught = Event(lambda t, y: y[0], direction=-1, reset=lambda t, y: 0 * y, name="floor")
    down = lambda t, y: torch.stack([y[1], -torch.ones_like(y[1])])  # noqa: E731
    for direction in (-1, 0):
        event = Event(caught.function, direction=direction, reset=caught.reset, name="floor")
        with pytest.raises(adjoint.EventsAccumulate, match="floor"):
            solve_ivp(down, (0.0, 3.0), torch.tensor([1.0, 0.0]), events=event)


def test_what_goes_on_through_a_switching_surface_is_no_second_event():
    """A kick where x passes zero, in either direction: one event a passage, whatever the rounding."""
    rotate = lambda t, y: torch.stack([-y[1], y[0]])  # noqa: E731
    for level in (0.0, 0.3, 0.9):
        kick = Event(lambda t, y, level=level: y[0] - level, reset=lambda t, y: torch.stack([y[0], y[1] * 1.1]), name="kick")
        sol = solve_ivp(rotate, (0.0, 10.0), torch.tensor([1.0, 0.0]), events=kick, **FINE)
        assert sol.events["kick"].t.shape[0] in (3, 4) and bool((sol.events["kick"].t.diff() > 0.1).all())


@pytest.mark.parametrize("method", ["rk4", "tsit5"])
def test_a_flight_much_shorter_than_a_step(method):
    """Both contacts lie in the first third of a step."""
    e, g = torch.tensor(0.1), torch.tensor(9.81)
    h = torch.tensor(2.0)
    t = between(4, h, e, g)
    sol = solve_ivp(fall, (0.0, t), torch.stack([h, 0 * h]), (e, g), events=BOUNCE, method=method, first_step=1.0, **FINE)
    n = sum(bool(contact(k, h, e, g) < t) for k in range(1, 12))
    assert n == 4 and sol.events[0].t.shape == (n,)
    assert torch.allclose(sol.y[-1], flight(t, n, h, e, g), atol=1e-9)


def test_two_events_at_one_time():
    """In the order of ``events=``, each on what the one before left; to rounding too."""
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    for shift in (0.0, 1e-16):
        add = Event(lambda t, y: t - 0.5, reset=lambda t, y: y + 1.0, name="add")
        double = Event(lambda t, y, s=shift: t - 0.5 - s, reset=lambda t, y: y * 2.0, name="double")
        for events, wanted in (([add, double], 3.5), ([double, add], 2.5)):
            sol = solve_ivp(clock, (0.0, 1.0), torch.zeros(1), events=events)
            assert abs(float(sol.y[-1, 0]) - wanted) < 1e-9
            assert sol.events["add"].t.shape == sol.events["double"].t.shape == (1,)


def test_an_event_that_is_only_recorded_is_recorded_once():
    """Beside one with a reset at the same time."""
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    seen = Event(lambda t, y: t - 0.5, name="seen")
    reset = Event(lambda t, y: t - 0.5, reset=lambda t, y: y + 1.0, name="reset")
    other = Event(lambda t, y: y[0] - 1.75, name="other")
    sol = solve_ivp(clock, (0.0, 1.0), torch.zeros(1), events=[seen, reset, other])
    assert sol.events["seen"].t.tolist() == sol.events["reset"].t.tolist() == [0.5]
    assert torch.allclose(sol.events["other"].t, torch.tensor([0.75])) and sol.events["other"].after is None


def test_a_reset_that_sets_off_another_event():
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    one = Event(lambda t, y: t - 0.5, reset=lambda t, y: torch.full_like(y, 2.0), name="one")
    two = Event(lambda t, y: y[0] - 2.0, reset=lambda t, y: y + 5.0, name="two")
    sol = solve_ivp(clock, (0.0, 1.0), torch.zeros(1), events=[one, two])
    assert sol.events["two"].t.tolist() == [0.5] and abs(float(sol.y[-1, 0]) - 7.5) < 1e-9


def test_grazing_contact_is_none():
    """A parabola that touches zero and turns back has no event; one that dips below has two crossings."""
    fun = lambda t, y: (2 * (t - 1.0)).expand_as(y)  # noqa: E731
    for depth, count in ((0.0, 0), (1e-6, 1), (-1e-6, 0)):
        event = Event(lambda t, y: y[0], direction=-1, reset=lambda t, y: y + 5.0)
        sol = solve_ivp(fun, (0.0, 2.0), torch.tensor([1.0 - depth]), events=event, max_step=0.3)
        assert sol.events[0].t.shape[0] == count


def test_terminal_after_some_resets():
    h, e, g = inputs = values(2.0, 0.8, 9.81)
    last = Event(BOUNCE.function, direction=-1, reset=rebound, terminal=3, name="bounce")
    sol = solve_ivp(fall, (0.0, 9.0), torch.stack([h, 0 * h]), (e, g), events=last, t_eval=[0.1, 8.0], **FINE)
    assert sol.status == 1 and sol.events["bounce"].t.shape == (3,) and bool(sol.y[1].isnan().all())
    end = solve_ivp(fall, (0.0, 9.0), torch.stack([h, 0 * h]), (e, g), events=last, **FINE)
    compared(end.t[-1], contact(3, *inputs), inputs)
    compared(end.y[-1, 1], (e**3 * (2 * g * h).sqrt()), inputs)
    # a plain function that ends the solve at its third time, beside a reset of another one
    stop = lambda t, y, e, g: y[1]  # noqa: E731
    stop.terminal, stop.direction = 3, -1
    top = solve_ivp(fall, (0.1, 9.0), torch.stack([h, 0 * h + 1.0]), (e, g), events=[stop, BOUNCE], **FINE)
    assert top.status == 1 and top.events[0].t.shape == (3,) and top.events["bounce"].t.shape == (2,)


@pytest.mark.parametrize(
    ("reset", "match"),
    [
        (lambda t, y: y[:1], "shape"),
        (lambda t, y: y.float(), "dtype"),
        (lambda t, y: (y, y), "structure"),
        (lambda t, y: 3.0, "is a float"),
    ],
)
def test_wrong_resets(reset, match):
    event = Event(lambda t, y: t - 0.5, reset=reset, name="wrong")
    with pytest.raises(adjoint.InvalidInput, match=match) as caught:
        solve_ivp(lambda t, y: y, (0.0, 1.0), torch.ones(2), events=event)
    assert "event 'wrong'" in str(caught.value)


def test_wrong_arguments():
    with pytest.raises(adjoint.InvalidInput, match="callable"):
        Event(3.0)
    with pytest.raises(adjoint.InvalidInput, match="reset"):
        Event(lambda t, y: t, reset=3.0)
    with pytest.raises(adjoint.InvalidInput, match="max_events"):
        solve_ivp(fall, (0.0, 1.0), torch.ones(2), (torch.ones(()),) * 2, events=BOUNCE, max_events=0)
    sol = solve_ivp(fall, (0.0, 1.0), torch.ones(2), (torch.ones(()),) * 2, events=Event(BOUNCE.function, name="plain"))
    assert sol.events["plain"].t.shape == (0,)
    with pytest.raises(KeyError, match="plain"):
        sol.events["other"]


def test_events_at_the_start():
    """An event function that is zero at the start and goes on in its direction is an event there, as without resets."""
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    event = Event(lambda t, y: t, reset=lambda t, y: y + 1.0)
    sol = solve_ivp(clock, (0.0, 1.0), torch.zeros(1), events=event, t_eval=[0.0, 1.0])
    assert sol.events[0].t.tolist() == [0.0] and torch.allclose(sol.y[:, 0], torch.tensor([1.0, 2.0]))


def test_backwards_in_time():
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    event = Event(lambda t, y: t - 0.5, reset=lambda t, y: y * 2.0)
    sol = solve_ivp(clock, (1.0, 0.0), torch.zeros(1), events=event, t_eval=[1.0, 0.75, 0.5, 0.0])
    assert torch.allclose(sol.y[:, 0], torch.tensor([0.0, -0.25, -1.0, -1.5]))


def test_single_precision_and_pytrees():
    state = {"h": torch.tensor(2.0, dtype=torch.float32), "v": torch.zeros(1, dtype=torch.float32)}
    fun = lambda t, y: {"h": y["v"][0], "v": torch.full_like(y["v"], -9.81)}  # noqa: E731
    event = Event(lambda t, y: y["h"], direction=-1, reset=lambda t, y: {"h": y["h"], "v": -0.8 * y["v"]})
    sol = solve_ivp(fun, (0.0, 2.0), state, events=event, rtol=1e-6)
    true = flight(torch.tensor(2.0), 2, torch.tensor(2.0), torch.tensor(0.8), torch.tensor(9.81))
    assert sol.y["h"].dtype == torch.float32 and abs(float(sol.y["h"][-1]) - float(true[0])) < 1e-4


def test_entries_of_the_state_that_are_one_number_of_each_trajectory():
    """What a reset or a dose gives is looked at leaf by leaf, of whatever shape."""
    h, e, g = torch.tensor([3.0, 1.0], requires_grad=True), torch.tensor(0.8), torch.tensor(9.81)
    fun = lambda t, y: {"h": y["v"], "v": -g.expand(2), "none": y["none"]}  # noqa: E731
    event = Event(lambda t, y: y["h"], direction=-1, reset=lambda t, y: y | {"v": -e * y["v"]})
    state = {"h": h + 1, "v": torch.zeros(2), "none": torch.zeros(2, 0)}
    sol = solve_ivp(fun, (0.0, 0.7), state, events=[event, adjoint.Doses([0.0], -1.0, 0)], batched=True, **FINE)
    compared(sol.y["h"][-1], torch.stack([flight(torch.tensor(0.7), n, h[n], e, g)[0] for n in (0, 1)]), [h])


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(checkpoints=3), adjoint.InterpolatingAdjoint()])
@pytest.mark.slow_cases("gradient0")
def test_an_event_that_was_found_by_another_solve_is_not_found_again(gradient):
    """A kick that leaves its function at zero: rounds that come to its time by steps of their own are off zero by their tolerance."""
    rotate = lambda t, y, c: torch.stack([-c * y[1], y[0]])  # noqa: E731
    kick = Event(lambda t, y, c: y[0] - 0.3, reset=lambda t, y, c: torch.stack([y[0], y[1] * 1.1]), name="kick")
    found = []
    for way in (adjoint.DiscreteAdjoint(), gradient):
        c = torch.tensor(1.0, requires_grad=True)
        keys = {"method": "kvaerno3", "rtol": 1e-6, "atol": 1e-8, "gradient": way}
        sol = solve_ivp(rotate, (0.0, 6.0), torch.tensor([1.0, 0.0]), (c,), events=kick, **keys)
        found.append((sol.events["kick"].t, torch.autograd.grad(sol.y[-1].sum(), c)[0]))
    assert found[1][0].shape == (2,) and torch.allclose(found[1][0], found[0][0], atol=1e-3)
    assert torch.allclose(found[1][1], found[0][1], atol=5e-3)


def test_the_ball_that_loses_nothing():
    """The sign of d(height)/d(start height) of an elastic ball at every bounce, which alternates as its phase does."""
    h, g = torch.tensor(1.0, requires_grad=True), torch.tensor(9.81)
    one = torch.tensor(1.0)
    for n in range(1, 6):
        t = between(n, h, one, g, 0.3)
        sol = solve_ivp(fall, (0.0, t), torch.stack([h, 0 * h]), (one, g), events=BOUNCE, **FINE)
        compared(sol.y[-1, 0], flight(t, n, h, one, g)[0], [h])


def test_curves_have_gaps_at_jumps():
    """For pictures: both sides of a reset, and NaN between them."""
    event = Event(lambda t, y: y[..., 0] - 0.5, reset=lambda t, y: y - 0.5, name="tick")
    clock = lambda t, y: torch.ones_like(y)  # noqa: E731
    one = solve_ivp(clock, (0.0, 1.2), torch.zeros(1), events=event, dense_output=True)
    batch = solve_ivp(clock, (0.0, 1.2), torch.zeros(2, 1), events=event, dense_output=True, batched=True)
    nan = float("nan")
    wanted = torch.tensor([0.0, 0.25, 0.5, nan, 0.0, 0.25, 0.5, nan, 0.0, 0.1, 0.2])
    for t, y in (one.curve(3), batch.curve(3, 1)):
        assert torch.allclose(t, torch.tensor([0.0, 0.25, 0.5, 0.5, 0.5, 0.75, 1.0, 1.0, 1.0, 1.1, 1.2]))
        assert torch.allclose(y[:, 0], wanted, atol=1e-12, equal_nan=True)
    with pytest.raises(adjoint.InvalidInput, match="trajectory"):
        batch.curve()
    with pytest.raises(adjoint.InvalidInput, match="points"):
        one.curve(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_derivatives(mode):
    args = torch.tensor(0.8), torch.tensor(9.81)
    with mode():
        y = solve_ivp(fall, (0.0, 2.0), torch.tensor([2.0, 0.0]), args, events=BOUNCE, **FINE).y[-1]
        assert torch.allclose(y, flight(torch.tensor(2.0), 2, torch.tensor(2.0), *args), atol=1e-9)


def test_single_precision_of_a_batch():
    """Samples, dense output on both sides and gradients, native and not."""
    h = torch.tensor([2.0, 1.0], dtype=torch.float32, requires_grad=True)
    e, g = torch.tensor([0.8, 0.7], dtype=torch.float32), torch.tensor([9.81, 9.0], dtype=torch.float32)
    for native in (False, True):
        keys = {"events": BOUNCE, "batched": True, "compile": native, "dense_output": True, "t_eval": [0.5, 1.9]}
        sol = solve_ivp(fall, (0.0, 2.0), torch.stack([h, 0 * h], -1), (e, g), **keys)
        n = [sum(bool(contact(k, h[i], e[i], g[i]) < 1.9) for k in range(1, 9)) for i in (0, 1)]
        wanted = torch.stack([flight(torch.tensor(1.9), n[i], h[i], e[i], g[i]) for i in (0, 1)]).float()
        assert sol.y.dtype == torch.float32 and torch.allclose(sol.y[-1], wanted, atol=1e-3)
        assert torch.allclose(sol(1.9), wanted, atol=1e-3)
        at = sol.events[0].t[0].detach()
        assert torch.allclose(sol(at.reshape(1, 2))[0, :, 1], -e * sol(at.reshape(1, 2), side="left")[0, :, 1], atol=1e-3)
        one, other = (torch.autograd.grad(x.sum(), h, retain_graph=True)[0] for x in (sol.y[-1], wanted))
        assert torch.allclose(one, other, rtol=1e-2)


def test_one_trajectory_that_fails_fails_alone():
    """Later than in its first round; the others go on, with their derivatives."""
    k = torch.tensor([1.0, -1.0], requires_grad=True)
    event = Event(lambda t, y, k: y[..., 0] - 2.0, reset=lambda t, y, k: y + 1.0)
    fun = lambda t, y, k: k.unsqueeze(-1) * y**2  # noqa: E731
    sol = solve_ivp(fun, (0.0, 3.0), torch.ones(2, 1), (k,), events=event, batched=True, throw=False, t_eval=[0.1, 0.6, 2.9])
    assert sol.status.tolist() == [-2, 0] and bool(sol.y[2, 0].isnan().all()) and torch.isfinite(sol.y[:2]).all()
    (slope,) = torch.autograd.grad(sol.y[2, 1].sum(), k)
    assert slope[0] == 0 and abs(float(slope[1]) - 2.9 / 3.9**2) < 1e-5


@pytest.mark.parametrize("native", [False, True])
def test_a_trajectory_that_ended_on_its_event(native):
    """It lies exactly on the zero of its event function while others go on, and has no more events there: derivatives are its own."""
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    stop = Event(lambda t, y, w: y[..., 0] - 0.25, reset=lambda t, y, w: torch.full_like(y, 0.25), terminal=1, name="stop")
    fun = lambda t, y, w: w.unsqueeze(-1) * torch.ones_like(y)  # noqa: E731
    tick = Event(lambda t, y, w: torch.sin(3 * t + 0.1 * w), reset=lambda t, y, w: 0.05 * y, direction=1, name="tick")
    y0 = torch.tensor([[-3.0], [0.0]])
    sol = solve_ivp(fun, (0.0, 9.0), y0, (w,), events=[stop, tick], batched=True, compile=native, **FINE)
    assert sol.status.tolist() == [1, 1] and sol.events["stop"].t.shape == (1, 2)
    assert int((~sol.events["tick"].t[:, 0].isnan()).sum()) >= 1 and bool(sol.events["tick"].t[:, 1].isnan().all())
    (slope,) = torch.autograd.grad(sol.events["stop"].t[0, 1], w)
    assert torch.allclose(slope, torch.tensor([0.0, -0.25 / 4]))


@pytest.mark.parametrize("door", ["ode", "dae"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("True-dae")
def test_what_is_given_up_has_no_numbers(door, batched):
    """Of resets that return NaN, that are too many, and of a row that fails beside one with a reset: states, and slopes too. The second row
    has no event."""
    y0 = torch.tensor([[1.0], [0.1]]) if batched else torch.ones(1)
    grown = lambda t, y: y + torch.where((t > 0.6).unsqueeze(-1) & (y < 0.5) & failing, float("nan"), 0.0)  # noqa: E731

    def solved(factor, throw=False, **options):
        options |= {"events": [Event(lambda t, y: y[..., 0] - 1.5, reset=lambda t, y: factor * y, name="kick")]}
        options |= {"batched": batched, "throw": throw}
        if door == "ode":
            return solve_ivp(grown, (0.0, 1.0), y0, **options)
        return adjoint.solve_dae(lambda t, y, yp: yp - grown(t, y), (0.0, 1.0), y0, **options)

    failing = False
    nan = float("nan")
    for status, factor, options in ((-3, nan, {}), (-5, 0.9, {"max_events": 1})):
        sol = solved(factor, **options)
        assert torch.as_tensor(sol.status).reshape(-1).tolist() == [status, 0][: 1 + batched]
        for x in (sol.y, sol.yp) if door == "dae" else (sol.y,):
            assert x[-1].reshape(-1).isnan().tolist() == [True, False][: 1 + batched]
    with pytest.raises(adjoint.NonFiniteState, match=r"non-finite by event 'kick' at t = 0\.405") as caught:
        solved(nan, throw=True)
    assert abs(caught.value.t - 0.405465) < 1e-4 and caught.value.trajectory == (0 if batched else None)
    if batched:
        failing = True
        sol = solved(0.9)
        assert sol.status[0] == 0 and sol.status[1] < 0
        for x in (sol.y, sol.yp) if door == "dae" else (sol.y,):
            assert x[-1].reshape(-1).isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [0, 2])
def test_dense_output_at_the_time_of_an_event_moves_with_it(rows, dtype):
    """Before the reset the state is the level; after it what the reset makes of that. In single precision the time of an event lies a
    little beside the end of its round."""
    level, k = (torch.tensor(x, dtype=dtype, requires_grad=True) for x in (0.5, 1.3))
    event = adjoint.Event(lambda t, y, k, level: y[..., 0] - level, reset=lambda t, y, k, level: 1 + 0 * y + level**2, direction=-1)
    y0 = torch.ones((rows, 1) if rows else 1, dtype=dtype)
    sol = adjoint.solve_ivp(
        lambda t, y, k, level: -k * y, (0.0, 1.0), y0, (k, level), events=event, batched=rows > 0, dense_output=True, rtol=1e-5, atol=1e-7
    )
    t = sol.events[0].t
    for side, value, slope in (("left", 0.5, 1.0), ("right", 1.25, 1.0)):
        there = sol(t, side=side).reshape(-1)[0]
        of_k, of_level = torch.autograd.grad(there, [k, level], retain_graph=True)
        assert float(there.detach()) == pytest.approx(value, rel=1e-4)
        assert float(of_level) == pytest.approx(slope, rel=1e-3) and float(of_k) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("door", ["solve_ivp", "solve_dae"])
def test_dense_output_at_the_end_by_an_event_in_single_precision(door):
    for k in (1.3, 1.55, 1.7, 1.85, 2.1, 2.35, 2.6, 2.9):
        p = torch.tensor([k, 0.5], dtype=torch.float32, requires_grad=True)
        end = lambda t, y, *rest: y[0] - rest[-1][1]  # noqa: E731
        end.terminal = True
        y0, options = torch.ones(1, dtype=torch.float32), {"args": (p,), "events": end, "dense_output": True, "rtol": 1e-5, "atol": 1e-7}
        if door == "solve_ivp":
            sol = adjoint.solve_ivp(lambda t, y, p: -p[0] * y, (0.0, 1.0), y0, **options)
        else:
            sol = adjoint.solve_dae(lambda t, y, yp, p: yp + p[0] * y, (0.0, 1.0), y0, **options)
        there = sol(sol.events[0].t).sum()
        assert float(there.detach()) == pytest.approx(0.5, rel=1e-4)
        assert torch.autograd.grad(there, p)[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-3)


@pytest.mark.parametrize("door", ["ode", "mass", "dae"])
@pytest.mark.parametrize("more", [False, True])
def test_a_row_that_a_reset_loses_changes_nothing_in_others(door, more):
    """``x' = 1 + c`` up to ``x = 1``, which becomes ``sqrt(c w)``, and with a second reset there ``exp`` of it: the row with ``w = -1`` is
    lost, and the parameter that all share has the derivative of the others."""
    c, w = torch.tensor(0.5, requires_grad=True), torch.tensor([1.0, -1.0, 4.0])
    reset = lambda t, y, c: torch.stack([(c * y[:, 1]).sqrt(), y[:, 1]], 1)  # noqa: E731
    again = lambda t, y, c: torch.stack([(c * y[:, 0] / y[:, 0]).exp(), y[:, 1]], 1)  # noqa: E731
    at = lambda t, y, c: y[:, 0] - 1.0  # noqa: E731
    events = [adjoint.Event(at, 1, reset=r, name=n) for r, n in ((reset, "e"), (again, "f"))][: 1 + more]
    fun = lambda t, y, c: torch.stack([1 + c + 0 * y[:, 0], 0 * y[:, 1]], 1)  # noqa: E731
    given = (0.0, 0.8), torch.stack([0 * w, w], 1)
    keys = {"args": (c,), "events": events, "batched": True, "throw": False}
    if door == "dae":
        sol = adjoint.solve_dae(lambda t, y, yp, c: yp - fun(t, y, c), *given, None, **keys)
    else:
        mass = {"mass_matrix": torch.eye(2), "method": "radau5"} if door == "mass" else {}
        sol = adjoint.solve_ivp(fun, *given, **keys, **mass)
    assert sol.status.tolist() == [0, -3, 0] and bool(sol.y[-1, 1].isnan().all())
    hit = 1 / (1 + c)
    wanted = sum((c.exp() if more else (c * x).sqrt()) + (1 + c) * (0.8 - hit) + hit for x in (1.0, 4.0))
    found = sol.y[-1, ::2, 0].sum() + sol.events["e"].t[0, ::2].sum()
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, c)[0] for x in (found, wanted)), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gradient", [adjoint.DiscreteAdjoint(), adjoint.DiscreteAdjoint(checkpoints=4), adjoint.InterpolatingAdjoint()])
def test_a_row_that_fails_by_itself_changes_nothing_in_what_all_share(gradient):
    """Its function is no number at the times of the events of the other one."""
    reset = torch.tensor([0.4, 0.0], dtype=torch.float64)

    def gradients(bad):
        p = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        y0 = torch.tensor([[1.0, 0.2], [0.8, 0.1]], dtype=torch.float64)[-len(bad) :]
        amount = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)

        def fun(t, y, p):
            rate = torch.stack([-p * y[..., 0] + 0.2, -0.3 * p * y[..., 1]], -1)
            return torch.where((bad * t > 0.9).unsqueeze(-1), torch.nan, rate)

        jump = adjoint.Event(lambda t, y, p: y[..., 0] - 0.5, direction=-1, reset=lambda t, y, p: y + reset)
        events = [jump, adjoint.Doses([0.4], amount, 1, duration=0.3)]
        options = {"quadrature": lambda t, y, p: p * y[..., 0], "batched": True, "throw": False, "gradient": gradient}
        sol = adjoint.solve_ivp(fun, (0.0, 2.0), y0, (p,), events=events, **options)
        assert (sol.status < 0).tolist() == bad.bool().tolist()
        return torch.autograd.grad((sol.y[-1].sum(-1) + sol.quadrature)[-1], (p, amount))

    alone, beside = gradients(torch.zeros(1, dtype=torch.float64)), gradients(torch.tensor([1.0, 0.0], dtype=torch.float64))
    for a, b in zip(beside, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["abm", "bdf", pytest.param("rodas5p", marks=pytest.mark.slow)])
def test_a_row_that_has_failed_is_not_looked_at_where_others_go_on(method):
    """The first row is set back to a third at a time at which the second one has no function."""
    bad, k = torch.tensor([0.0, 1.0]), torch.tensor(0.7).requires_grad_()

    def fun(t, y, k):
        rate = torch.stack([torch.ones_like(y[..., 0]), -k * y[..., 1]], -1)
        return rate + torch.where((bad > 0) & (t > 0.9), float("nan"), 0.0).unsqueeze(-1)

    back = Event(lambda t, y, k: y[..., 0] - 1.2, 1, reset=lambda t, y, k: y / 3)
    y0 = torch.tensor([[0.0, 1.0], [0.1, 1.0]])
    sol = adjoint.solve_ivp(fun, (0.0, 1.8), y0, (k,), method=method, batched=True, events=back, rtol=1e-7, atol=1e-9, throw=False)
    assert [int(s) < 0 for s in sol.status] == [False, True]
    (first,) = torch.autograd.grad(sol.y[-1, 0].sum(), k, create_graph=True)
    (second,) = torch.autograd.grad(first, k)
    decay = math.exp(-1.26) / 3
    assert float(first.detach()) == pytest.approx(-1.8 * decay, rel=1e-4)
    assert float(second) == pytest.approx(1.8**2 * decay, rel=1e-4)


@pytest.mark.parametrize("method", ["rodas5p", pytest.param("abm", marks=pytest.mark.slow), pytest.param("bdf", marks=pytest.mark.slow)])
def test_a_row_that_is_done_is_not_looked_at_where_it_ended(method):
    """``w' = k sqrt(z)`` with ``z`` zero at the end of the second row, where the derivative is infinite."""
    k = torch.tensor(0.7).requires_grad_()

    def fun(t, y, k):
        x, z, _ = y.unbind(-1)
        return torch.stack([torch.ones_like(x), -torch.ones_like(z), k * torch.sqrt(z.clamp(min=0.0))], -1)

    back = Event(lambda t, y, k: y[..., 0] - 1.25, 1, reset=lambda t, y, k: y * torch.tensor([0.3, 1.0, 1.0]))
    y0, end = torch.tensor([[0.0, 4.0, 0.0], [0.0, 0.5, 0.0]]), torch.tensor([2.0, 0.5])
    sol = adjoint.solve_ivp(fun, (0.0, end), y0, (k,), method=method, batched=True, events=back, rtol=1e-6, atol=1e-8)
    (got,) = torch.autograd.grad(sol.y[-1, 0, 2], k)
    assert float(got) == pytest.approx(2 / 3 * (8 - 2**1.5), rel=1e-5)
