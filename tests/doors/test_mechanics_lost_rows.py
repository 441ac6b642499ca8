"""Mechanisms of which one cannot start, beside others that can: those are what they are without it."""

from __future__ import annotations

import pytest
import torch

from adjoint import Contact, Event, InconsistentInitialCondition, SingularJacobian, mechanics, solve_dae

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
