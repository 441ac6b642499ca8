"""Contacts at their edges: starts on a gap, resets and modes of the user, many impacts and releases against SciPy, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp as scipy_solve
from scipy.optimize import brentq

import adjoint
from adjoint import Contact, Event, InvalidInput, mechanics

ZERO = torch.zeros(1, dtype=torch.float64)


def down(t, q, v, *args):
    return torch.full_like(q, -9.0)


def ball(**keys):
    return mechanics(torch.ones(1), down, contacts=Contact(lambda t, q, *args: q[..., 0], name="floor", **{"restitution": 0.5, **keys}))


@pytest.mark.parametrize(
    ("speed", "value", "slopes"), [(0.0, 0.0, (0.0, 0.0)), (1.0, 0.03875, (1.0, 0.05)), (-1.0, 0.01375, (0.175, -0.025))]
)
@pytest.mark.slow_cases("-1.0-0.01375-slopes2")
def test_a_start_on_the_floor(speed, value, slopes):
    """At rest, thrown up, thrown down: then the impact is an event of the start, which a higher start puts off."""
    q0, v0 = torch.zeros(1, requires_grad=True), torch.tensor([speed], requires_grad=True)
    for t in (0.0, 100.0):
        sol = ball(rest_speed=0.01).solve((t, t + 0.05), q0, v0)
        assert float(sol.y.q[-1, 0]) == pytest.approx(value, abs=1e-11)
        assert [float(x) for x in torch.autograd.grad(sol.y.q[-1, 0], (q0, v0))] == pytest.approx(slopes, abs=1e-11)
        assert sol.events["floor"].t.tolist() == ([t] if speed < 0 else [])
        assert float(sol.y.push[-1, 0]) == (9.0 if speed == 0 else 0.0)


@pytest.mark.parametrize(("kick", "value"), [(1.0, 0.055), (-1.0, 0.005), (0.0, 0.0)])
def test_a_reset_opens_and_closes_contacts(kick, value):
    at = Event(lambda t, y: t - 0.5, reset=lambda t, y: y._replace(v=y.v + kick), name="kick")
    sol = ball(rest_speed=0.01).solve((0.0, 0.6), ZERO, ZERO, events=at)
    assert float(sol.y.q[-1, 0]) == pytest.approx(value, abs=1e-12) and sol.events.names == ("kick", "floor", "floor released")
    assert float(sol.y.push[-1, 0]) == (0.0 if kick else 9.0)


def test_modes_of_the_user():
    """A motor that a timer turns on lifts the ball off; forces, gaps and resets get the mode."""
    lift = torch.tensor(20.0, requires_grad=True)
    floor = Contact(lambda t, q, on, lift: q[..., 0] + 0 * on, restitution=0.0, name="floor")
    model = mechanics(torch.ones(1), lambda t, q, v, on, lift: on * lift - 9.0 + 0 * q, contacts=floor)
    timer = Event(lambda t, y, on, lift: t - 0.3, reset=lambda t, y, on, lift: (y, on + 1.0))
    sol = model.solve((0.0, 0.6), ZERO, ZERO, (lift,), mode=torch.tensor(0.0), events=timer, quadrature=lambda t, y, on, lift: on)
    assert float(sol.y.q[-1, 0]) == pytest.approx(0.5 * 11 * 0.09, rel=1e-9) and float(sol.quadrature) == pytest.approx(0.3)
    assert float(torch.autograd.grad(sol.y.q[-1, 0], lift)[0]) == pytest.approx(0.045, rel=1e-9)


def test_a_mode_of_a_mechanism_without_contacts():
    rod = lambda t, q, on: (q @ q - 1.0).reshape(1)  # noqa: E731
    model = mechanics(torch.ones(2), lambda t, q, v, on: torch.stack([0 * q[0], on - 1.0 + 0 * q[0]]), rod)
    sol = model.solve((0.0, 0.2), torch.tensor([1.0, 0.0]), torch.zeros(2), mode=torch.tensor(1.0))
    assert torch.allclose(sol.y.q[-1], torch.tensor([1.0, 0.0]))


def test_the_start_of_a_moving_constraint_has_a_derivative():
    """A bead that a rail carries along, ``q = t^2``: where it is depends on when the solve begins and ends."""
    model = mechanics(torch.ones(1), down, lambda t, q: q - t**2)
    start = torch.tensor(0.5, requires_grad=True)
    y0, _ = model.initial(torch.zeros(1), ZERO, t0=start)
    assert float(torch.autograd.grad(y0.q[0], start, retain_graph=True)[0]) == pytest.approx(1.0)
    assert float(torch.autograd.grad(y0.v[0], start)[0]) == pytest.approx(2.0)


def test_two_contacts_at_one_time_and_a_heavy_corner():
    """A disc runs into a corner: both rates are turned round; a rod that falls flat on two feet is thrown back flat."""
    sides = [Contact(lambda t, q, i=i: q[i], restitution=e, name=f"{i}") for i, e in enumerate((0.5, 0.25))]
    mass = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    model = mechanics(mass, lambda t, q, v: torch.zeros_like(q), contacts=sides)
    sol = model.solve((0.0, 2.0), torch.ones(2), -torch.ones(2), first_step=0.1)
    assert torch.allclose(sol.y.v[-1], torch.tensor([0.5, 0.25]), atol=1e-12)
    assert torch.allclose(sol.y.q[-1], torch.tensor([0.5, 0.25]), atol=1e-12)
    feet = [Contact(lambda t, q, s=s: q[0] + s * torch.sin(q[1]), restitution=0.5, rest_speed=0.1, name=f"{s}") for s in (-1, 1)]
    weight = lambda t, q, v: torch.tensor([-9.0, 0.0])  # noqa: E731
    model = mechanics(torch.tensor([1.0, 0.3]), weight, contacts=feet)
    sol = model.solve((0.0, 3.0), torch.tensor([1.0, 0.0]), torch.zeros(2), first_step=0.1)
    assert torch.allclose(sol.events["-1"].t, sol.events["1"].t) and not sol.y.q[-1].abs().max() > 1e-12
    assert torch.allclose(sol.y.push[-1], torch.tensor([4.5, 4.5])) and len(sol.events["1"].t) == 6


def plate(A, w, e, drag, **options):
    """A ball on a plate that shakes it off again and again."""
    gap = Contact(lambda t, q, A, w, e, c: q[..., 0] - A * torch.sin(w * t), lambda A, w, e, c: e, rest_speed=0.2, name="plate")
    model = mechanics(torch.ones(1), lambda t, q, v, A, w, e, c: -9.81 - c * v * v.abs() + 0 * q, contacts=gap)
    return model.solve((0.0, 1.8), torch.tensor([0.3]), ZERO, (A, w, e, drag), compile=True, rtol=1e-9, atol=1e-11, **options)


def pieces(A, w, e, drag, end):
    """The same by SciPy, from event to event."""
    f, rate = (lambda t: A * np.sin(w * t)), lambda t: A * w * np.cos(w * t)
    push = lambda t: -A * w**2 * np.sin(w * t) + 9.81 + drag * rate(t) * abs(rate(t))  # noqa: E731
    fall = lambda s, x: [x[1], -9.81 - drag * x[1] * abs(x[1])]  # noqa: E731
    t, y, hits, free = 0.0, np.array([0.3, 0.0]), [], []
    while True:

        def gap(s, x, t=t):
            return x[0] - f(s) if s > t + 1e-7 else 1.0

        gap.terminal, gap.direction = True, -1
        part = scipy_solve(fall, (t, end), y, events=gap, rtol=1e-12, atol=1e-13, max_step=0.03)
        t, y = part.t[-1], part.y[:, -1]
        if part.status != 1:
            return hits, free, y
        hits.append(t)
        back = -e * (y[1] - rate(t))
        y = np.array([f(t), rate(t) + back])
        if back <= 0.2:
            grid = np.linspace(t, end, 4001)
            later = grid[push(grid) < 0]
            t = brentq(push, later[0] - grid[1] + grid[0], later[0], xtol=1e-15)
            free.append(t)
            y = np.array([f(t), rate(t)])


def test_a_shaken_ball_against_scipy():
    p = [torch.tensor(x, requires_grad=True) for x in (0.2, 9.0, 0.3, 0.2)]
    sol = plate(*p)
    hits, free, last = pieces(0.2, 9.0, 0.3, 0.2, 1.8)
    assert len(hits) == 7 and len(free) == 2
    assert sol.events["plate"].t.tolist() == pytest.approx(hits, abs=1e-8)
    assert sol.events["plate released"].t.tolist() == pytest.approx(free, abs=1e-8)
    assert float(sol.y.q[-1, 0]) == pytest.approx(last[0], abs=1e-7)
    slopes = torch.autograd.grad(sol.y.q[-1, 0], p)
    for i, slope in enumerate(slopes):
        values = [0.2, 9.0, 0.3, 0.2]
        step = 1e-4 * values[i]
        shifted = [pieces(*(x + s * step * (j == i) for j, x in enumerate(values)), 1.8)[2][0] for s in (1, -1)]
        assert float(slope) == pytest.approx((shifted[0] - shifted[1]) / (2 * step), rel=1e-4, abs=1e-5)


def test_transforms():
    model = mechanics(torch.ones(1), down, contacts=Contact(lambda t, q, e: q[..., 0], lambda e: e, rest_speed=0.05))
    end = lambda h, e: model.solve((0.0, 0.5), h.reshape(1), ZERO, (e,), first_step=0.1).y.q[-1, 0]  # noqa: E731
    heights, e = torch.tensor([1.0, 0.01, 2.0]), torch.tensor(0.5)
    mapped = torch.vmap(torch.func.grad(end, (0, 1)), (0, None))(heights, e)
    for k, h in enumerate(heights):
        h, c = h.clone().requires_grad_(), e.clone().requires_grad_()
        one = torch.autograd.grad(end(h, c), (h, c), materialize_grads=True)
        assert torch.allclose(torch.stack(one), torch.stack([x[k] for x in mapped]), atol=1e-10)
    floor = Contact(lambda t, q, e: q[..., 0], lambda e: e, rest_speed=0.05)
    single = mechanics(torch.ones(1).float(), down, contacts=floor).solve((0.0, 2.0), torch.ones(1).float(), ZERO.float(), (e.float(),))
    assert single.y.q.dtype == torch.float32 and single.y.push[-1].tolist() == [9.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Contact(lambda t, q: q[0], 1.2), "between 0 and 1, got 1.2"),
        (lambda: Contact(lambda t, q: q[0], torch.tensor([0.5, -0.5])), "between 0 and 1, got -0.5"),
        (lambda: Contact(lambda t, q: q[0], "hard"), "restitution"),
        (lambda: Contact(lambda t, q: q[0], rest_speed=-1.0), "rest_speed"),
        (lambda: Contact(3.0), "gap of a contact must be callable"),
        (lambda: Contact(lambda t, q: q[0], name=3), "name"),
        (lambda: mechanics(torch.ones(1), down, contacts=[Contact(lambda t, q: q[0], name="a")] * 2), "same name"),
        (lambda: mechanics(torch.ones(1), down, contacts=[down]), r"contacts\[0\]"),
        (lambda: mechanics(torch.ones(1), down, contacts=[]), "empty"),
        (lambda: mechanics(torch.ones(1), down), "solve_ivp"),
        (lambda: mechanics(torch.ones(1), down, contacts=Contact(lambda t, q: q)).solve((0.0, 1.0), ZERO, ZERO), r"shape \(\)"),
        (lambda: ball().solve((0.0, 1.0), ZERO - 0.1, ZERO), "'floor' is -0.1 at the start"),
        (lambda: ball().solve((0.0, 1.0), torch.tensor([[0.1], [-0.1]]), torch.zeros(2, 1), batched=True), "in trajectory 1"),
        (lambda: ball(restitution=lambda: 2.0).solve((0.0, 1.0), ZERO + 0.1, ZERO), "'floor' must be between"),
        (lambda: ball(restitution=torch.ones(3)).solve((0.0, 1.0), ZERO + 0.1, ZERO), r"shape \(3,\)"),
        (lambda: ball().solve((1.0, 0.0), ZERO + 0.1, ZERO), "backwards|forward in time"),
        (lambda: ball().solve((0.0, 1.0), ZERO, ZERO, consistent="solve"), "consistent"),
    ],
)
def test_what_is_refused(make, match):
    with pytest.raises(InvalidInput, match=match):
        make()


@pytest.mark.parametrize("by", ["time", "state"])
def test_a_reset_of_the_user_at_an_impact(by):
    """A ball that is kicked as it strikes, by 1/10 of its speed: rounding leaves it a little below the floor, or above."""
    for h in (1.0, 1.962, 2.036, 2.221):
        struck = (2 * h / 9) ** 0.5
        kick = Event(lambda t, y, at=struck: y.q[0] if by == "state" else t - at, reset=lambda t, y: y._replace(v=1.1 * y.v), name="kick")
        with torch.no_grad():
            sol = ball().solve((0.0, struck + 0.1), ZERO + h, ZERO, events=kick)
        assert float(sol.y.q[-1, 0]) == pytest.approx(0.5 * 1.1 * 9 * struck * 0.1 - 4.5 * 0.01, rel=1e-7)
        # that state is one to start from
        before = sol.events["floor"].y
        again = ball().solve((struck, struck + 0.1), before.q[0], before.v[0])
        assert float(again.y.q[-1, 0]) == pytest.approx(0.5 * 9 * struck * 0.1 - 4.5 * 0.01, rel=1e-7)


def test_a_row_whose_impact_is_not_determined():
    """Two contacts that are one where the second coordinate is 1: that row is lost, alone; a row that has no such event is not named."""
    e = torch.tensor(0.5, requires_grad=True)
    gaps = [lambda t, q, e: q[..., 0], lambda t, q, e: 2 * q[..., 0] + (q[..., 1] - 1) ** 2]
    legs = [Contact(gap, restitution=lambda e: e, name=f"leg {i}") for i, gap in enumerate(gaps)]
    model = mechanics(torch.ones(2), lambda t, q, v, e: torch.stack([-9 + 0 * q[..., 0], 0 * q[..., 1]], -1), contacts=legs)
    q0 = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.2, 2.0]])
    solved = lambda q0, **keys: model.solve((0.0, 0.6), q0, torch.zeros_like(q0), (e,), batched=True, **keys)  # noqa: E731
    with pytest.raises(adjoint.SingularJacobian, match="in trajectory 1"):
        solved(q0)
    every, others = solved(q0, throw=False).y.q[-1], solved(q0[::2]).y.q[-1]
    assert bool(every[1].isnan().all()) and torch.equal(every[::2], others)
    assert torch.autograd.grad(every[::2].sum(), e) == torch.autograd.grad(others.sum(), e)
    low = Event(lambda t, y: y.q[..., 0] - 1.5, -1, reset=lambda t, y: y._replace(q=y.q - 3), name="low")
    with pytest.raises(InvalidInput, match=r"-1\.5 in trajectory 2 behind the reset"):
        ball().solve((0.0, 0.9), torch.tensor([[1.0], [1.0], [2.0]]), torch.zeros(3, 1), batched=True, events=low)


def test_refused_resets_and_contacts_that_depend_on_each_other():
    moved = lambda shift: Event(lambda t, y: t - 0.5, reset=shift)  # noqa: E731
    with pytest.raises(InvalidInput, match="behind the reset"):
        ball().solve((0.0, 0.6), ZERO, ZERO, events=moved(lambda t, y: y._replace(q=y.q - 1)))
    with pytest.raises(InvalidInput, match="ContactState"):
        ball().solve((0.0, 0.6), ZERO, ZERO, events=moved(lambda t, y: (y.q, y.v)))
    with pytest.raises(adjoint.UnsupportedCombination, match="Doses"):
        ball().solve((0.0, 0.6), ZERO, ZERO, events=adjoint.Doses([0.1], 1.0, 0))
    legs = [Contact(lambda t, q: q[..., 0]), Contact(lambda t, q: 2 * q[..., 0])]
    with pytest.raises(adjoint.SingularJacobian, match="depend on each other"):
        mechanics(torch.ones(1), down, contacts=legs).solve((0.0, 1.0), torch.ones(1), ZERO)


def test_one_of_many_that_fails_alone():
    """Bounces that accumulate are those of their own trajectory."""
    e = torch.tensor([0.05, 0.9])
    model = mechanics(torch.ones(1), down, contacts=Contact(lambda t, q, e: q[..., 0], lambda e: e))
    sol = model.solve((0.0, 1.0), torch.ones(2, 1), torch.zeros(2, 1), (e,), batched=True, throw=False)
    assert sol.status.tolist() == [-5, 0] and bool(sol.y.q[-1, 0].isnan().all())
    one = model.solve((0.0, 1.0), torch.ones(1), ZERO, (e[1],))
    assert torch.allclose(sol.y.q[-1, 1], one.y.q[-1], atol=1e-10)


def corner(x, events=None, **options):
    """A disc that runs into a corner of two walls, from ``x``: both at once if its coordinates are the same."""
    sides = [Contact(lambda t, q, i=i: q[..., i] + 1, restitution=e, name=n) for i, (n, e) in enumerate((("left", 0.5), ("right", 0.25)))]
    model = mechanics(torch.tensor([[2.0, 0.5], [0.5, 1.0]]), lambda t, q, v: torch.zeros_like(q), contacts=sides)
    keys = {"events": events, "first_step": 0.1, "batched": x.dim() == 2}
    return model.solve((0.0, 2.0), x - 1, -torch.ones_like(x), **(keys | options)).y.q[-1] + 1


def by_differences(points):
    step = 1e-5 * torch.eye(2, dtype=torch.float64)
    moved = torch.cat([x + s * step for x in points for s in (1, -1)])
    ahead, behind = corner(moved).reshape(len(points), 2, 2, 2).unbind(1)
    return ((ahead - behind) / 2e-5).mT


EVEN, ODD = torch.ones(2, dtype=torch.float64), torch.tensor([1.0, 0.8], dtype=torch.float64)


@pytest.mark.parametrize("kind", ["reverse", "forward", "mapped", "batched", "a kick"])
@pytest.mark.slow_cases("mapped", "forward")
def test_no_derivatives_of_two_impacts_at_one_time(kind):
    """Whether the left wall is hit before the right one changes what follows: values are told, derivatives are not."""
    x = torch.stack([ODD, EVEN]) if kind == "batched" else EVEN

    def forward():
        with torch.autograd.forward_ad.dual_level():
            corner(torch.autograd.forward_ad.make_dual(EVEN, EVEN))

    ask = {
        "forward": forward,
        "mapped": lambda: torch.vmap(torch.func.jacrev(corner))(torch.stack([ODD, EVEN])),
        "a kick": lambda: corner(
            ODD.clone().requires_grad_(),
            [Event(lambda t, y: t - 0.8, reset=lambda t, y: y._replace(v=2 * y.v), name="kick")],
        ),
    }.get(kind, lambda: corner(x.clone().requires_grad_()))
    when = 0.8 if kind == "a kick" else 1
    names = "event 'kick' and the impact of 'right'" if kind == "a kick" else "the contact 'left' and the impact of 'right'"
    with pytest.raises(adjoint.UnsupportedCombination, match=f"{names} are at one time, t = {when}:"):
        ask()


def test_values_of_two_impacts_at_one_time_and_derivatives_beside_them():
    both = torch.stack([ODD, EVEN])
    with torch.no_grad():
        values = corner(both.clone().requires_grad_())
    assert torch.allclose(values[1], torch.tensor([0.5, 0.25]), atol=1e-12)
    assert torch.allclose(torch.vmap(corner)(both), values, atol=1e-12)
    beside = torch.stack([ODD, ODD.flip(0)])
    found = torch.vmap(torch.func.jacrev(corner))(beside)
    assert torch.allclose(found, by_differences(beside), atol=1e-7)
