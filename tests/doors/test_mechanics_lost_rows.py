"""Mechanisms of which one cannot start, beside others that can: those are what they are without it."""

from __future__ import annotations

import pytest
import torch

from adjoint import Contact, Event, InconsistentInitialCondition, SingularJacobian, mechanics, solve_dae, solve_ivp

nan = float("nan")
F64 = torch.float64
G, V = torch.tensor(1.3, dtype=F64), torch.zeros(3, 2, dtype=F64)
Q = torch.tensor([[1.0, 0.0], [0.6, -0.8], [0.8, 0.6]], dtype=F64)
OTHERS, SPAN = [0, 2], 0.2
#: mass, length, coordinates of the second one
BAD = {
    "nan": (nan, 1.0, (0.6, -0.8)),
    "no mass": (0.0, 1.0, (0.6, -0.8)),
    "no place": (1.0, nan, (0.6, -0.8)),
    "redundant": (1.0, 1.0, (0.0, 0.0)),
    "state": (1.0, 1.0, (0.6, nan)),
    "below": (1.0, 1.0, (0.6, -2.5)),
}


def weight(t, q, v, g, m, r):
    return torch.stack([torch.zeros_like(q[..., 0]), -(g * (1 + m)).expand_as(q[..., 1])], -1)


def mass(q, g, m, r):
    return m[..., None, None] * torch.eye(2, dtype=m.dtype)


def rod(t, q, g, m, r):
    return ((q**2).sum(-1, keepdim=True) - r.unsqueeze(-1) ** 2) / 2


floor = Contact(lambda t, q, g, m, r: q[..., 1] + 2.0, restitution=0.5, name="floor")
MODELS = {
    "rod": mechanics(mass, weight, rod),
    "floor": mechanics(mass, weight, contacts=floor),
    "both": mechanics(mass, weight, rod, contacts=floor),
}
CASES = [("rod", kind) for kind in BAD if kind != "below"] + [("floor", kind) for kind in ("no mass", "below")] + [("both", "state")]


def given(kind):
    m, r, q = BAD[kind]
    start = Q.clone()
    start[1] = torch.tensor(q, dtype=F64)
    return torch.tensor([1.0, m, 0.7], dtype=F64), torch.tensor([1.0, r, 1.0], dtype=F64), start


def loss(model, m, r, q, rows, **options):
    options = {"batched": True, "throw": False, "rtol": 1e-4, "atol": 1e-4} | options
    return lambda g: (MODELS[model].solve((0.0, SPAN), q, torch.zeros_like(q), (g, m, r), **options).y.q[1:, rows] ** 2)[..., 1].sum()


@pytest.mark.parametrize(("model", "kind"), CASES)
@pytest.mark.slow_cases("rod-nan", "floor-below", "floor-no mass", "rod-state", "both-state")
def test_values_and_derivatives_of_the_others(model, kind):
    m, r, q = given(kind)

    def both(*x):
        g = G.clone().requires_grad_()
        value = loss(model, *x)(g)
        (first,) = torch.autograd.grad(value, g, create_graph=True)
        return value.detach(), first.detach(), *torch.autograd.grad(first, g)

    found, true = both(m, r, q, OTHERS), both(m[OTHERS], r[OTHERS], q[OTHERS], slice(None))
    torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-9)
    sol = MODELS[model].solve((0.0, SPAN), q, V, (G, m, r), batched=True, throw=False, rtol=1e-3)
    assert [int(s) < 0 for s in sol.status] == [False, True, False] and not bool(torch.isfinite(sol.y.q[-1, 1]).any())


def test_forward_mode_and_maps():
    m, r, q = given("redundant")
    fewer, alone = loss("rod", m[OTHERS], r[OTHERS], q[OTHERS], slice(None)), loss("rod", m, r, q, OTHERS)
    for way in (lambda f: torch.func.jvp(f, (G,), (1 + G,))[1], lambda f: torch.vmap(torch.func.grad(f))(G * torch.ones(2, dtype=F64))):
        torch.testing.assert_close(way(alone), way(fewer), rtol=1e-8, atol=1e-9)

    def heights(g):
        return torch.vmap(lambda *x: loss("rod", *x, slice(None), batched=False)(g))(m, r, q)[OTHERS].sum()

    torch.testing.assert_close(torch.func.grad(heights)(G), torch.func.grad(fewer)(G), rtol=1e-8, atol=1e-9)


ERRORS = [
    ("nan", InconsistentInitialCondition, "of trajectory 1 are not finite"),
    ("state", InconsistentInitialCondition, "constraint of trajectory 1"),
    ("no mass", SingularJacobian, "mass matrix of trajectory 1"),
    ("redundant", SingularJacobian, "of trajectory 1 are redundant"),
]


@pytest.mark.parametrize(("kind", "error", "text"), ERRORS)
def test_errors_name_the_trajectory(kind, error, text):
    m, r, q = given(kind)
    with pytest.raises(error, match=text):
        loss("rod", m, r, q, OTHERS, throw=True)(G)


@pytest.mark.parametrize("kind", ["parameter", "state"])
@pytest.mark.slow_cases("parameter")
def test_resets_of_implicit_equations(kind):
    def fun(t, y, yp, p, q):
        x, z = y.unbind(-1)
        return torch.stack([yp[..., 0] + p * z * q, z - x * q], -1)

    def end(p, y, rows, q):
        events = [Event(lambda t, y, p, q: t - 0.5, reset=lambda t, y, p, q: 1.5 * y)]
        sol = solve_dae(fun, (0.0, 1.0), y, args=(p, q), events=events, batched=True, throw=False, rtol=1e-9, atol=1e-11)
        return sol.y[-1, rows, 0]

    p, y = torch.tensor([1.0, nan if kind == "parameter" else 1.0, 0.5], dtype=F64), torch.ones(3, 2, dtype=F64)
    y[1, 0] = nan if kind == "state" else 1.0
    q = torch.tensor(1.2, requires_grad=True)
    value = end(p, y, OTHERS, q)
    rate = p[OTHERS] * q**2
    true = 1.5 * torch.exp(-rate)
    torch.testing.assert_close(value, true, rtol=1e-7, atol=0.0)
    first, wanted = (torch.autograd.grad(x.sum(), q, create_graph=True)[0] for x in (value, true))
    torch.testing.assert_close(first, wanted, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (first, wanted)), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("implicit", [False, True])
def test_a_reset_that_makes_a_part_of_a_state_no_number(implicit):
    """What it leaves as it was comes from rounds in which the trajectory was sound."""
    bad = torch.tensor([False, True, False])
    jump = Event(lambda t, y, g: t - 0.5, reset=lambda t, y, g: torch.stack([y[:, 0], torch.where(bad, nan, 2 * y[:, 1])], -1))
    g = G.clone().requires_grad_()
    options = {"args": (g,), "events": jump, "batched": True, "throw": False, "rtol": 1e-8, "atol": 1e-10}
    y0 = torch.ones(3, 2, dtype=F64)
    if implicit:
        sol = solve_dae(lambda t, y, yp, g: torch.stack([yp[:, 0] + g * y[:, 0], yp[:, 1] + y[:, 0]], -1), (0.0, 1.0), y0, **options)
    else:
        sol = solve_ivp(lambda t, y, g: torch.stack([-g * y[:, 0], -y[:, 0]], -1), (0.0, 1.0), y0, **options)
    assert [int(x) < 0 for x in sol.status] == [False, True, False]
    first = torch.autograd.grad(sol.y[-1, OTHERS, 0].sum(), g)[0]
    torch.testing.assert_close(first, -2 * torch.exp(-G), rtol=1e-6, atol=0)


def test_velocities_and_forces_that_are_no_numbers_are_named():
    m, r, _ = given("redundant")
    for force, v in ((weight, V + nan), (lambda *x: nan * weight(*x), V)):
        with pytest.raises(InconsistentInitialCondition, match="not finite at the start"):
            mechanics(mass, force, rod).solve((0.0, SPAN), Q, v, (G, torch.ones_like(m), torch.ones_like(r)), batched=True)


@pytest.mark.slow
def test_constraints_that_cannot_be_satisfied():
    model = mechanics(torch.ones(2, dtype=F64), lambda t, q, v, s: -torch.ones_like(q), lambda t, q, s: (q**2).sum(-1, keepdim=True) - s)
    s = torch.tensor([[1.0], [-1.0], [2.0]], dtype=F64)
    with pytest.raises(InconsistentInitialCondition, match=r"no coordinates that satisfy the constraint.* in system 1"):
        model.solve((0.0, SPAN), 10 * Q, V, (s,), batched=True)


@pytest.mark.parametrize("height", [0.0, 0.2], ids=["at the start", "at an impact"])
@pytest.mark.slow_cases("at an impact")
def test_contacts_that_depend_on_each_other_in_one_row(height):
    """One weight on two legs that are one and the same in the second row."""
    legs = [Contact(lambda t, q, g, s: q[..., 0], 0.5), Contact(lambda t, q, g, s: (1 - s) * q[..., 1] + 2 * s * q[..., 0], 0.5)]
    model = mechanics(torch.ones(2, dtype=F64), lambda t, q, v, g, s: -g * torch.ones_like(q), contacts=legs)

    def run(rows, g, throw=False):
        s, q = torch.tensor([0.0, 1.0, 0.0], dtype=F64)[rows], height * torch.tensor([[1.0, 1.0], [1.1, 1.1], [1.2, 1.2]], dtype=F64)[rows]
        return model.solve((0.0, 0.8), q, torch.zeros_like(q), (g, s), batched=True, throw=throw, rtol=1e-4, atol=1e-5)

    g = G.clone().requires_grad_(not height)  # two impacts at one time have values only
    sol, alone = run([0, 1, 2], g), run(OTHERS, g)
    assert [int(x) < 0 for x in sol.status] == [False, True, False] and bool(sol.y.q[-1, 1].isnan().all())
    torch.testing.assert_close(sol.y.q[-1, OTHERS], alone.y.q[-1], rtol=1e-9, atol=1e-12)
    if not height:
        first, wanted = (torch.autograd.grad(x.sum(), g)[0] for x in (sol.y.q[-1, OTHERS], alone.y.q[-1]))
        torch.testing.assert_close(first, wanted, rtol=1e-8, atol=1e-12)
    with pytest.raises(SingularJacobian, match=r"in trajectory 1.*depend on each other"):
        run([0, 1, 2], g, throw=True)
