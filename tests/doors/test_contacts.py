"""Contacts of mechanisms: impacts, rest, release, several at once, against closed forms and reduced coordinates."""

from __future__ import annotations

import pytest
import torch

import adjoint
from adjoint import Contact, Event, mechanics, solve_ivp

from ..helpers.bouncing import between, contact, flight

#: a parabola is exact in any step: most others would be first ones behind contacts, which grow
LONG = {"first_step": 0.1}


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def grads(x, inputs, second):
    """Of a weighed sum, which all entries are in: first derivatives, and second ones of their sum."""
    whole = (x.reshape(-1) * torch.cos(torch.arange(float(x.numel())))).sum()
    first = torch.autograd.grad(whole, inputs, create_graph=second, retain_graph=True, materialize_grads=True)
    if not second:
        return list(first)
    total = sum(g.sum() for g in first) + 0 * sum(x.sum() ** 2 for x in inputs)
    return [*first, *torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True)]


def agree(found, wanted, inputs, tol=1e-9, second=True):
    """``found`` and ``wanted``: tensors, or lists of them."""
    found, wanted = (torch.cat([y.reshape(-1) for y in ([x] if isinstance(x, torch.Tensor) else x)]) for x in (found, wanted))
    assert torch.allclose(found, wanted, rtol=tol, atol=tol), (found, wanted)
    a, b = (grads(x, inputs, second) for x in (found, wanted))
    for one, other in zip(a, b, strict=True):
        assert torch.allclose(one, other, rtol=tol, atol=tol * (1 + float(other.detach().abs().max()))), (a, b)


def weight(t, q, v, e, g):
    return -g.reshape(g.shape + (1,) * (q.dim() - g.dim())).expand_as(q)


def ball(rest_speed=0.0):
    floor = Contact(lambda t, q, e, g: q[..., 0], restitution=lambda e, g: e, rest_speed=rest_speed, name="floor")
    return mechanics(torch.ones(1), weight, contacts=floor)


def both(y):
    return torch.cat([y.q, y.v], -1)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["single", "batched", "native", slow("backprop"), slow("forward")])
@pytest.mark.slow_cases("batched", "native")
def test_a_ball_that_bounces(kind):
    """Values, first and second derivatives behind several impacts, and of their times."""
    h, e, g = p = values(2.0, 0.8, 9.81)
    gradient = {"backprop": adjoint.Backprop(), "forward": adjoint.ForwardSensitivity()}.get(kind)
    keys = {"t_eval": [0.2, 1.2, 1.9], "compile": kind == "native", "gradient": gradient, **LONG}
    if kind == "batched":
        q0, args = torch.stack([h.reshape(1), h.reshape(1) / 2]), (e, g)
        sol = ball().solve((0.0, 2.0), q0, torch.zeros(2, 1), args, batched=True, **keys)
    else:
        sol = ball().solve((0.0, 2.0), h.reshape(1), torch.zeros(1), (e, g), **keys)
    for row, high in enumerate((h, h / 2) if kind == "batched" else (h,)):
        own = (lambda x, row=row: x[:, row]) if kind == "batched" else lambda x: x
        counts = [sum(bool(contact(k, high, e, g) < t) for k in range(1, 12)) for t in (0.2, 1.2, 1.9)]
        states = [flight(torch.tensor(t), n, high, e, g) for t, n in zip((0.2, 1.2, 1.9), counts, strict=True)]
        times = [contact(k + 1, high, e, g) for k in range(counts[-1])]
        record = sol.events["floor"]
        found = [own(both(sol.y)), own(record.t)[: counts[-1]], own(record.after.v)[0]]
        agree(found, [*states, *times, e * (2 * g * high).sqrt()], p)
    assert sol.events["floor released"].t.shape[0] == 0 and not sol.y.push.detach().any()


@pytest.mark.parametrize(
    "gradient", [adjoint.InterpolatingAdjoint(rtol=1e-9, atol=1e-11), slow(adjoint.GaussAdjoint(rtol=1e-9, atol=1e-11))]
)
def test_continuous_adjoints(gradient):
    h, e, g = p = values(2.0, 0.8, 9.81)
    t = between(2, *p)
    sol = ball().solve((0.0, t), h.reshape(1), torch.zeros(1), (e, g), gradient=gradient, rtol=1e-9, atol=1e-11, **LONG)
    agree(both(sol.y)[-1], flight(t, 2, *p), p, 1e-7, second=False)


def test_an_elastic_ball():
    """Without loss the height returns; a higher start makes the ball later, so that it is lower in its first rise and higher in its first
    fall: the sign of the derivative changes with the phase."""
    for t, sign in ((0.3, 1), (0.8, -1)):
        h, e, g = p = values(2.0, 1.0, 9.81)
        sol = ball().solve((0.0, t), h.reshape(1), torch.zeros(1), (e, g), **LONG)
        wanted = flight(torch.tensor(t), int(t > 0.64), *p)
        agree(both(sol.y)[-1], wanted, p)
        assert sign * float(torch.autograd.grad(sol.y.q[-1, 0], h)[0]) > 0
        energy = sol.y.v.detach()[-1, 0] ** 2 / 2 + 9.81 * sol.y.q.detach()[-1, 0]
        assert float(energy) == pytest.approx(2.0 * 9.81, rel=1e-12)


@pytest.mark.parametrize("native", [slow(False), True])
def test_a_ball_that_comes_to_rest(native):
    """Bounces accumulate; below the rest speed the ball stays, pressed with its weight, and nothing of its past is left."""
    h, e, g = p = values(1.0, 0.5, 9.0)
    slow = 0.1
    sol = ball(slow).solve((0.0, 3.0), h.reshape(1), torch.zeros(1), (e, g), compile=native, t_eval=[1.0, 2.0, 3.0], dense_output=True)
    times = sol.events["floor"].t
    n = len(times)
    speeds = (2 * g * h).sqrt() * e ** torch.arange(1.0, n + 1)
    assert float(speeds[-1]) <= slow < float(speeds[-2])
    forever = (2 * h / g).sqrt() * (1 + e) / (1 - e)
    assert 0 < float(forever - times[-1]) < 2 * slow / 9.0 / (1 - 0.5) and float(times[-1]) < 1.5
    closed = [contact(k + 1, h, e, g) for k in range(n)]
    agree([times, both(sol.y)[1:], sol.y.push, sol(2.5).push], [*closed, torch.zeros(4), 0 * g, g, g, g], p)
    assert sol.events["floor released"].t.shape == (0,)
    assert float(sol.events["floor"].after.push[-1, 0]) == 9.0 and not sol.events["floor"].after.v[-1].detach().any()


def test_bounces_that_do_not_end():
    e, g = torch.tensor(0.05), torch.tensor(9.0)
    with pytest.raises(adjoint.EventsAccumulate, match="rest_speed="):
        ball().solve((0.0, 3.0), torch.ones(1), torch.zeros(1), (e, g))


@pytest.mark.parametrize("native", [slow(False), True])
def test_release(native):
    """A ball lies on a floor that sinks ever faster, until it does so faster than the ball falls."""
    g, k = p = values(9.0, 4.0)
    sink = lambda t, k: -k * (t - 1.0) ** 4  # noqa: E731
    floor = Contact(lambda t, q, g, k: q[..., 0] - sink(t, k), restitution=0.0, name="floor")
    model = mechanics(torch.tensor([2.0]), lambda t, q, v, g, k: -2 * g * torch.ones_like(q), contacts=floor)
    start = torch.stack([sink(torch.tensor(0.7), k)])
    sol = model.solve((0.7, 2.0), start, torch.stack([4 * k * 0.3**3]), (g, k), t_eval=[1.0, 1.2, 2.0], compile=native)
    assert sol.events["floor"].t.shape == (0,) and sol.events["floor released"].t.shape == (1,)
    t = 1 + (g / (12 * k)).sqrt()
    fall = 2.0 - t
    last = [sink(t, k) - 4 * k * (t - 1) ** 3 * fall - g * fall**2 / 2, -4 * k * (t - 1) ** 3 - g * fall]
    there = [sink(torch.tensor(1.2), k), -4 * k * torch.tensor(0.2) ** 3]
    pushes = [2 * g, 2 * (g - 12 * k * 0.04), 0 * g]
    agree([sol.events["floor released"].t, both(sol.y)[1:], sol.y.push], [t, *there, *last, *pushes], p, 1e-8)


def test_two_balls():
    """Different masses on a line: momentum and restitution."""
    m, big, e, v = p = values(1.0, 3.0, 0.7, 2.0)
    meet = Contact(lambda t, q, m, big, e: q[..., 1] - q[..., 0], restitution=lambda m, big, e: e, name="meet")
    none = lambda t, q, v, *args: torch.zeros_like(q)  # noqa: E731
    mass = lambda q, m, big, e: torch.diag_embed(torch.stack([m, big]))  # noqa: E731
    start = torch.tensor([0.0, 1.0])
    sol = mechanics(mass, none, contacts=meet).solve((0.0, 1.0), start, torch.stack([v, -v / 2]), (m, big, e))
    closing = 1.5 * v
    first, second = v - big / (m + big) * (1 + e) * closing, -v / 2 + m / (m + big) * (1 + e) * closing
    t = 1 / closing
    wanted = torch.stack([v * t + first * (1 - t), 1 - v / 2 * t + second * (1 - t), first, second])
    agree([both(sol.y)[-1], sol.events["meet"].t], [wanted, t], p)


def test_a_chain_is_struck_one_by_one():
    none = lambda t, q, v, *args: torch.zeros_like(q)  # noqa: E731
    cradle = [Contact(lambda t, q, i=i: q[i + 1] - q[i], name=f"{i}") for i in range(2)]
    sol = mechanics(torch.ones(3), none, contacts=cradle).solve((0.0, 3.0), torch.tensor([0.0, 1.0, 1.5]), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(sol.y.v[-1], torch.tensor([0.0, 0.0, 1.0]), atol=1e-12)
    assert torch.allclose(sol.y.q[-1], torch.tensor([1.0, 1.5, 3.0]), atol=1e-12)
    assert [x.t.tolist() for x in sol.events] == [pytest.approx([1.0]), [], pytest.approx([1.5]), []]


def test_touching_balls_are_struck_together():
    """What docs/hybrid.md says of a chain without gaps: all rates are turned round at once."""
    cradle = [Contact(lambda t, q, i=i: q[i + 1] - q[i], name=f"{i}") for i in range(2)]
    model = mechanics(torch.ones(3), lambda t, q, v: torch.zeros_like(q), contacts=cradle)
    sol = model.solve((0.0, 3.0), torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    assert torch.allclose(sol.y.v[-1], torch.tensor([-1.0, 2.0, 2.0]) / 3, atol=1e-12)
    assert float((sol.y.v[-1] ** 2).sum()) == pytest.approx(1.0)


def box(bounce=0.8):
    sides = [
        Contact(lambda t, q, g: q[..., 0], restitution=bounce, name="left"),
        Contact(lambda t, q, g: 1.0 - q[..., 0], restitution=bounce, name="right"),
        Contact(lambda t, q, g: q[..., 1], restitution=0.6, rest_speed=0.3, name="floor"),
        Contact(lambda t, q, g: 1.0 - q[..., 1], restitution=bounce, name="top"),
    ]
    return mechanics(
        torch.ones(2), lambda t, q, v, g: torch.stack([torch.zeros_like(q[..., 0]), -g.expand_as(q[..., 1])], -1), contacts=sides
    )


def test_a_box_of_many_is_that_of_each():
    """Some rest on the floor and go on between the walls while others still fly."""
    g = torch.tensor(4.0, requires_grad=True)
    q0 = torch.tensor([[0.3, 0.5], [0.6, 0.9], [0.2, 0.0]], requires_grad=True)
    v0 = torch.tensor([[1.1, 0.2], [-0.7, 2.0], [0.9, 0.0]])
    many = box().solve((0.0, 0.9), q0, v0, (g,), batched=True, **LONG)
    weights = torch.cos(torch.arange(12.0)).reshape(3, 4)
    bars = torch.autograd.grad((both(many.y)[-1] * weights).sum(), (g, q0))
    total = torch.zeros(())
    for b in range(3):
        one = box().solve((0.0, 0.9), q0[b], v0[b], (g,), **LONG)
        assert torch.allclose(both(many.y)[-1, b], both(one.y)[-1], atol=1e-9)
        assert torch.allclose(many.y.push[-1, b], one.y.push[-1], atol=1e-9)
        for record, other in zip(many.events, one.events, strict=True):
            times = record.t[:, b]
            assert torch.allclose(times[~times.isnan()], other.t, atol=1e-9)
        mine = torch.autograd.grad((both(one.y)[-1] * weights[b]).sum(), (g, q0))
        total = total + mine[0]
        assert torch.allclose(bars[1][b], mine[1][b], atol=1e-8)
    assert torch.allclose(bars[0], total, atol=1e-8)
    assert float(many.y.push[-1, 2, 2]) == 4.0 and many.events["left"].t.shape[0] >= 1


@pytest.mark.parametrize("rest_speed", [pytest.param(0.0, marks=pytest.mark.slow), 3.5])
def test_a_pendulum_against_a_wall(rest_speed):
    """A rod (a constraint) and a wall (a gap), against the angle with an event: bounces, or an end at the wall, with its two forces."""
    e = torch.tensor(0.4, requires_grad=True)
    wall = Contact(lambda t, q, e: q[..., 0] - 0.1, restitution=lambda e: e, rest_speed=rest_speed, name="wall")
    pull = lambda t, q, v, e: torch.stack([-2.0 + 0 * q[0], -9.81 + 0 * q[1]])  # noqa: E731
    model = mechanics(torch.ones(2), pull, lambda t, q, e: (q @ q - 1.0).reshape(1), contacts=wall)
    fine = {"rtol": 1e-3, "atol": 1e-5} if rest_speed else {"rtol": 1e-7, "atol": 1e-9}
    sol = model.solve((0.0, 1.3), torch.tensor([1.0, 0.0]), torch.zeros(2), args=(e,), **fine)
    if rest_speed:
        c = 0.99**0.5
        assert sol.events["wall"].t.shape == (1,) and not sol.y.v.detach()[-1].abs().max() > 1e-9
        # force 9.81 c in the rod, and what the wall has to hold of it
        assert torch.allclose(sol.y.q[-1], torch.tensor([0.1, -c]), atol=1e-9)
        assert float(sol.y.push[-1, 0]) == pytest.approx(2.0 + 9.81 * 0.1 / c, rel=1e-6)
        return
    swing = lambda t, y, e: torch.stack([y[1], -9.81 * torch.sin(y[0]) - 2.0 * torch.cos(y[0])])  # noqa: E731
    angle = Event(lambda t, y, e: torch.sin(y[0]) - 0.1, direction=-1, reset=lambda t, y, e: torch.stack([y[0], -e * y[1]]), name="wall")
    same = solve_ivp(swing, (0.0, 1.3), torch.tensor([torch.pi / 2, 0.0]), (e,), events=angle, rtol=1e-11, atol=1e-12)
    assert sol.events["wall"].t.shape == same.events["wall"].t.shape and len(sol.events["wall"].t) > 1
    assert torch.allclose(sol.events["wall"].t, same.events["wall"].t, atol=1e-7)
    for x, other in zip(
        (sol.y.q[-1, 0], sol.y.v[-1, 0]), (torch.sin(same.y[-1, 0]), same.y[-1, 1] * torch.cos(same.y[-1, 0])), strict=True
    ):
        agree(x, other, [e], 1e-5, second=False)
