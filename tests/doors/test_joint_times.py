"""Doses and resets at the start, at the end, at a sample, and beside each other: every time moves alone, integrals with it.

The truth is the flow of ``y' = -k y + t`` and its integral in closed form, from each thing that happens to the next one.
"""

import pytest
import torch

import adjoint
from adjoint import Doses, Event

START = {"x": 0.7, "k": 0.8, "t0": 0.25, "end": 1.25, "sample": 1.25, "when": 1.25, "a": 0.5, "other": 1.25, "c": 0.4}
CASES = {
    "a bolus at the end": ("bolus", {}),
    "an infusion from the end": ("infusion", {}),
    "a reset at the end": ("reset", {}),
    "a bolus and a reset at the end": ("bolus reset", {}),
    "a bolus at the start": ("bolus", {"when": 0.25, "sample": 0.25}),
    "a reset and a bolus at a sample": ("reset bolus", {"when": 0.75, "other": 0.75, "sample": 0.75}),
    "two within": ("bolus second", {"when": 0.5, "other": 0.5}),
    "two resets": ("reset again", {"when": 0.5, "other": 0.5}),
}
D = {"dtype": torch.float64}


def flow(z, t, s, k, r):
    y, q = z
    at = lambda u: (u + r) / k - 1 / k**2  # noqa: E731
    gap, fading = y - at(t), torch.exp(-k * (s - t))
    return at(s) + gap * fading, q + (s**2 - t**2) / (2 * k) + (r / k - 1 / k**2) * (s - t) + gap * (1 - fading) / k


def truth(kinds, v, s):
    """State and integral at ``s``."""
    z, t, r = (v["x"], torch.zeros((), **D)), v["t0"], 0.0
    for kind in kinds.split():
        then = v["other"] if kind in ("reset", "second") else v["when"]
        if float(then) > float(s):
            continue
        z, t = flow(z, t, then, v["k"], r), then
        if kind == "infusion":
            r = v["a"] / 2
        else:
            z = ((v["c"] if kind in ("reset", "again") else 1.0) * z[0] + (0.0 if kind == "reset" else v["a"]), z[1])
    return flow(z, t, s, v["k"], r)


def solved(kinds, v, door, batched, sampled, **options):
    events = []
    for kind in kinds.split():
        if kind == "reset":
            events.append(Event(lambda t, y: t - v["other"] + 0 * y[..., 0], reset=lambda t, y: v["c"] * y))
        elif kind == "again":
            events.append(Event(lambda t, y: t - v["when"] + 0 * y[..., 0], reset=lambda t, y: v["c"] * y + v["a"]))
        else:
            then = v["other" if kind == "second" else "when"].reshape(1)
            events.append(Doses(then, v["a"], 0, duration=2.0 if kind == "infusion" else None, name=kind))
    y0 = v["x"].expand(2, 1) if batched else v["x"].reshape(1)
    t_eval = v["sample"].reshape(1) if sampled else None
    tol = 1e-7 if door == "dae" else 1e-10
    given = {"events": events, "t_eval": t_eval, "batched": batched, "quadrature": lambda t, y: y[..., 0], "rtol": tol, "atol": tol / 100}
    fun = lambda t, y: -v["k"] * y + t.unsqueeze(-1)  # noqa: E731
    span = v["t0"], v["end"]
    if door == "dae":
        return adjoint.solve_dae(lambda t, y, yp: 2 * (yp - fun(t, y)), span, y0, **given, **options)
    return adjoint.solve_ivp(fun, span, y0, method="verner7", **given, **options)


def seen(kinds, v, door, batched, **options):
    sol, sampled = (solved(kinds, v, door, batched, sampled, **options) for sampled in (False, True))
    pick = (lambda x: x[1]) if batched else (lambda x: x)
    return torch.stack([*(pick(y)[0] for y in (*sol.y, sampled.y[0])), pick(sol.quadrature)])


def right(kinds, v):
    return torch.stack([*(truth(kinds, v, v[name])[0] for name in ("t0", "end", "sample")), truth(kinds, v, v["end"])[1]])


def jacobians(function, x, second):
    found = [function(x), torch.func.jacrev(function)(x)]
    return [*found, torch.func.jacfwd(torch.func.jacrev(function))(x)] if second else found


#: with implicit equations
FEW = ("a bolus at the end", "a reset at the end", "a bolus at the start", "two within")
ALL = [*((case, "ode", batched) for case in CASES for batched in (False, True)), *((case, "dae", False) for case in FEW)]


@pytest.mark.parametrize(("case", "door", "batched"), ALL)
@pytest.mark.slow_cases(
    "a reset at the end-ode-True", "a bolus and a reset at the end-ode-True", "a reset and a bolus at a sample-ode-False",
    "a reset and a bolus at a sample-ode-True", "two resets-ode-True", "a bolus at the end-dae-False", "a bolus at the start-dae-False",
    "two resets-ode-False", "two within-dae-False", "a reset at the end-dae-False",
)  # fmt: skip
def test_every_time_moves_alone(case, door, batched):
    kinds, change = CASES[case]
    x = torch.tensor(list((START | change).values()), **D)
    named = lambda x: dict(zip(START, x.unbind(), strict=True))  # noqa: E731
    # second derivatives of one
    twice = door == "ode" or case == "a reset at the end"
    found = jacobians(lambda x: seen(kinds, named(x), door, batched), x, twice)
    wanted = jacobians(lambda x: right(kinds, named(x)), x, twice)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [adjoint.InterpolatingAdjoint(rtol=1e-9), adjoint.ForwardSensitivity(), adjoint.Backprop()])
@pytest.mark.parametrize("case", ["a bolus at the end", "a reset at the end", "two within", "two resets"])
def test_by_other_strategies(case, gradient):
    kinds, change = CASES[case]
    leaves = {name: torch.tensor(x, **D, requires_grad=True) for name, x in (START | change).items()}
    found, wanted = seen(kinds, leaves, "ode", False, gradient=gradient), right(kinds, leaves)
    for a, b in zip(found, wanted, strict=True):
        one, other = (torch.autograd.grad(y, list(leaves.values()), materialize_grads=True, retain_graph=True) for y in (a, b))
        torch.testing.assert_close(torch.stack(one), torch.stack(other), rtol=1e-6, atol=1e-6)


@pytest.mark.compile
@pytest.mark.parametrize("batched", [False, True])
def test_compiled(batched):
    """Doses and resets at an end, at a sample, and an infusion from the end on."""
    for case in ("a bolus and a reset at the end", "an infusion from the end", "a bolus at the start", "a reset and a bolus at a sample"):
        kinds, change = CASES[case]
        leaves = {name: torch.tensor(x, **D, requires_grad=True) for name, x in (START | change).items()}
        found, wanted = seen(kinds, leaves, "ode", batched, compile=True), right(kinds, leaves)
        for a, b in zip(found, wanted, strict=True):
            one, other = (torch.autograd.grad(y, list(leaves.values()), materialize_grads=True, retain_graph=True) for y in (a, b))
            torch.testing.assert_close(torch.stack([a, *one]), torch.stack([b, *other]), rtol=1e-6, atol=1e-6)


def dual(function, x, along):
    with torch.autograd.forward_ad.dual_level():
        return torch.autograd.forward_ad.unpack_dual(function(torch.autograd.forward_ad.make_dual(x, along))).tangent


FORWARD = {
    "jvp": lambda function, x, along: torch.func.jvp(function, (x,), (along,))[1],
    "jacfwd": lambda function, x, along: torch.func.jacfwd(function)(x) @ along,
    "dual": dual,
}


@pytest.mark.parametrize(
    ("mode", "door", "when", "other"),
    [("jvp", "dae", 1.0, None), ("jacfwd", "mass", 0.25, None), ("dual", "dae", 0.5, 0.5), ("jvp", "mass", 0.5, 0.5)],
)
@pytest.mark.slow_cases("dual-dae-0.5-0.5", "jvp-mass-0.5-0.5")
def test_forward_mode_of_implicit_equations(mode, door, when, other):
    """Of ``x' = -k x`` with ``z = x^2``, with a dose at the end, at the start, and beside another one."""

    def solve(v):
        k, x, t0, end, a, *when = v.unbind()
        doses = [Doses(t.reshape(1), a, 0) for t in when]
        y0, span, given = torch.stack([x, x**2]), (t0, end), {"events": doses, "rtol": 1e-6, "atol": 1e-8}
        fun = lambda t, y: torch.stack([-k * y[0], y[1] - y[0] ** 2])  # noqa: E731
        mass = torch.diag(torch.tensor([1.0, 0.0], **D))
        if door == "mass":
            return adjoint.solve_ivp(fun, span, y0, method="radau5", mass_matrix=mass, **given).y[-1]
        return adjoint.solve_dae(lambda t, y, yp: mass @ yp - fun(t, y), span, y0, **given).y[-1]

    def wanted(v):
        k, x, t0, end, a, *when = v.unbind()
        y = x * torch.exp(-k * (end - t0)) + sum(a * torch.exp(-k * (end - t)) for t in when)
        return torch.stack([y, y**2])

    v = torch.tensor([0.8, 0.7, 0.25, 1.0, 0.5, when, *([] if other is None else [other])], **D)
    along = torch.linspace(-0.5, 1.0, len(v), **D)
    torch.testing.assert_close(FORWARD[mode](solve, v, along), torch.func.jacrev(wanted)(v) @ along, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("door", ["ode", "dae"])
def test_of_rows_that_end_before_others(door):
    """Of a ragged batch the first row has a dose at its end, and the last one has no length: dense output, records."""
    t0, when, ends = torch.tensor(0.25, **D), torch.tensor(0.75, **D, requires_grad=True), torch.tensor([0.75, 1.25, 0.25], **D)
    ends = ends.requires_grad_()
    k, size = torch.tensor(0.8, **D), torch.tensor(0.5, **D)
    fun = lambda t, y: -k * y  # noqa: E731
    options = {"events": [Doses(when.reshape(1), size, 0)], "batched": True, "rtol": 1e-8, "atol": 1e-10, "dense_output": True}
    span, y0 = (t0.expand(3), ends), torch.ones(3, 1, **D)
    if door == "dae":
        sol = adjoint.solve_dae(lambda t, y, yp: yp - fun(t, y), span, y0, **options)
    else:
        sol = adjoint.solve_ivp(fun, span, y0, **options)
    times = ends.detach().clone().requires_grad_()
    for y, at in ((sol.y[-1, :, 0], ends), (sol(times.unsqueeze(0))[0, :, 0], times)):
        faded = torch.exp(-k * (at - t0))
        wanted = faded + torch.where(at >= when, size * torch.exp(-k * (at - when)), 0.0)
        torch.testing.assert_close(y, wanted, rtol=1e-6, atol=1e-6)
        for a, b in zip(*(torch.autograd.grad(z.sum(), [at, when], retain_graph=True) for z in (y, wanted)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    before, after = (torch.autograd.grad(x[0, 0, 0], when, retain_graph=True)[0] for x in (sol.events[0].y, sol.events[0].after))
    assert float(before) == pytest.approx(-0.8 * float(torch.exp(-k * 0.5)), rel=1e-5) and float(after) == pytest.approx(float(before))


@pytest.mark.parametrize(("door", "order"), [("ode", 1), ("ode", -1), ("dae", 1), ("batched", 1)])
@pytest.mark.slow_cases("dae-1")
def test_a_terminal_event_beside_a_reset(door, order):
    """The solve ends at the time of the terminal event, in whichever order the two are listed."""
    x = torch.tensor([START[name] for name in ("x", "k", "t0", "when", "c")] + [1.25], **D)

    def seen(x):
        start, k, t0, when, c, stop = x.unbind()
        fun = lambda t, y: -k * y + t.unsqueeze(-1)  # noqa: E731
        events = [
            Event(lambda t, y: t - when + 0 * y[..., 0], reset=lambda t, y: c * y),
            Event(lambda t, y: t - stop + 0 * y[..., 0], terminal=True),
        ]
        batched = door == "batched"
        given = {"events": events[::order], "quadrature": lambda t, y: y[..., 0], "batched": batched, "rtol": 1e-8, "atol": 1e-10}
        y0, span = start.expand(2, 1) if batched else start.reshape(1), (t0, 2.0)
        if door == "dae":
            sol = adjoint.solve_dae(lambda t, y, yp: yp - fun(t, y), span, y0, **given)
        else:
            sol = adjoint.solve_ivp(fun, span, y0, method="verner7", **given)
        return torch.stack([x.reshape(-1)[-1] for x in (sol.t[-1], sol.y[-1], sol.quadrature)])

    def right(x):
        start, k, t0, when, c, stop = x.unbind()
        y, q = flow((start, torch.zeros((), **D)), t0, when, k, 0.0)
        return torch.stack([stop, *flow((c * y, q), when, stop, k, 0.0)])

    for a, b in zip(jacobians(seen, x, door != "dae"), jacobians(right, x, door != "dae"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
