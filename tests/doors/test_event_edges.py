"""Events at their edges: functions that switch right there, event functions without slope, several roots in one step, ties."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint
from adjoint import odeint, odeint_adjoint, odeint_event, solve_dae, solve_ivp
from adjoint.errors import InvalidInput
from adjoint.integrate.events import crossings


def event(f, terminal=False, direction=0.0):
    g = lambda t, y, *args: f(t, y, *args)  # noqa: E731
    g.terminal, g.direction = terminal, direction
    return g


# --- steps whose dense output is a straight line ---


def decayed(p, method, at=lambda t, y, p: y[..., 0] - 0.5, **options):
    """When ``y = exp(-p t)`` is a half: ``log 2 / p``."""
    y0 = torch.ones(1, dtype=torch.float64)
    return solve_ivp(lambda t, y, p: -p * y, (0.0, 2.0), y0, (p,), method=method, events=event(at), **options)


TWICE = {
    "double backward": lambda f, p: torch.func.grad(torch.func.grad(f))(p),
    "forward over reverse": lambda f, p: torch.func.jvp(torch.func.grad(f), (p,), (torch.ones_like(p),)),
    "forward twice": lambda f, p: torch.func.jacfwd(torch.func.jacfwd(f))(p),
    "mapped": lambda f, p: torch.func.vmap(torch.func.grad(torch.func.grad(f)))(p.expand(2)),
}


@pytest.mark.parametrize("twice", TWICE)
@pytest.mark.parametrize("method", ["euler", "implicit_euler", "implicit_midpoint"])
@pytest.mark.slow_cases("implicit_midpoint-forward twice", "implicit_euler-mapped", "implicit_midpoint-double backward")
def test_straight_lines_have_no_second_derivatives_of_event_times(method, twice):
    """First derivatives are as good as the steps are; second ones, which would be off by a third whatever the steps are, are refused."""
    p = torch.tensor(1.3, dtype=torch.float64)
    when = lambda p: decayed(p, method, first_step=0.1, rtol=1e-2).events[0].t[0]  # noqa: E731
    (value,), dot = torch.func.jvp(lambda p: when(p).reshape(1), (p,), (torch.ones_like(p),))
    assert float(value) == pytest.approx(math.log(2) / 1.3, rel=0.1) and float(dot) == pytest.approx(-math.log(2) / 1.3**2, rel=0.1)
    assert torch.allclose(torch.func.grad(when)(p), dot, rtol=1e-9)
    with pytest.raises(InvalidInput, match=f"the dense output of '{method}' is a straight line"):
        TWICE[twice](when, p)


def test_first_steps_of_bdf_have_no_second_derivatives_of_event_times():
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    times = [decayed(p, "bdf", at=lambda t, y, p, c=c: y[..., 0] - c, first_step=0.02, rtol=1e-4).events[0].t[0] for c in (0.99, 0.5)]
    (early,), (late,) = (torch.autograd.grad(t, p, create_graph=True) for t in times)
    assert float(torch.autograd.grad(late, p)[0]) == pytest.approx(2 * math.log(2) / 1.3**3, rel=0.02)
    with pytest.raises(InvalidInput, match="straight line"):
        torch.autograd.grad(early, p)


@pytest.mark.parametrize("method", ["euler", "implicit_midpoint"])
def test_states_at_a_given_time_have_second_derivatives_along_straight_lines_too(method):
    p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    state = decayed(p, method, at=lambda t, y, p: t - 0.7, first_step=0.05).events[0].y[0, 0]
    (first,) = torch.autograd.grad(state, p, create_graph=True)
    assert float(torch.autograd.grad(first, p)[0]) == pytest.approx(0.49 * math.exp(-0.91), rel=0.05)


# --- fun switches where the event is ---


def switched(t, y, p):
    """``y0' = a``, ``y1' = b``, but ``5 b`` from where ``y0`` reaches the level ``c``: there ``y1 = b c / a``."""
    a, b, c = p[..., 0], p[..., 1], p[..., 2]
    return torch.stack([a + 0 * y[..., 0], torch.where(y[..., 0] < c, b, 5 * b)], -1)


REACHED = event(lambda t, y, p: y[..., 0] - p[..., 2], terminal=True)
P = (0.7, 1.3, 0.6)


def truth(p):
    return torch.stack([p[2] / p[0], p[1] * p[2] / p[0]])


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "dopri8", "rk4", "kvaerno5", "rodas5p", "radau5", "bdf", "abm"])
def test_switch_at_the_event(method):
    """Time and state and their first and second derivatives are those of the near side."""
    p = torch.tensor(P, requires_grad=True)
    extra = {"first_step": 0.3} if method == "rk4" else {"rtol": 1e-4, "atol": 1e-4}
    sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), events=REACHED, method=method, **extra)
    got = torch.stack([sol.t[-1], sol.y[-1, 1]])
    want = truth(p)
    assert torch.allclose(got, want, rtol=1e-4)
    for k in range(2):
        first = torch.autograd.grad(got[k], p, create_graph=True)[0]
        exact = torch.autograd.grad(want[k], p, create_graph=True)[0]
        assert torch.allclose(first, exact, rtol=1e-3, atol=1e-5)
        weights = torch.tensor([1.0, -2.0, 0.5])
        second, right = (torch.autograd.grad(x @ weights, p, retain_graph=True)[0] for x in (first, exact))
        assert torch.allclose(second, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("end", [3.0, -3.0])
@pytest.mark.parametrize("form", ["batched", "vmapped"])
@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf"])
@pytest.mark.slow_cases("kvaerno5-vmapped--3.0", "kvaerno5-batched-3.0", "bdf-vmapped-3.0", "tsit5-vmapped--3.0")
def test_switch_at_the_event_of_many(method, form, end):
    p = (torch.tensor([P, (2.0, 0.5, 1.1), (0.1, 1.0, 0.9)]) * math.copysign(1.0, end) ** torch.tensor([1, 1, 0])).requires_grad_(True)
    options = {"events": REACHED, "method": method, "rtol": 1e-4, "atol": 1e-4}
    if form == "batched":
        sol = solve_ivp(switched, (0.0, end), torch.zeros(3, 2), (p,), batched=True, **options)
        t, y = sol.t[-1], sol.y[-1, :, 1]
    else:

        def one(p):
            sol = solve_ivp(switched, (0.0, end), torch.zeros(2), (p,), **options)
            return sol.t[-1], sol.y[-1, 1]

        t, y = torch.vmap(one)(p)
    (bars,) = torch.autograd.grad(t.sum() + y.sum(), p)
    for k in range(2):
        q = p[k].detach().requires_grad_(True)
        want = truth(q)
        assert abs((t[k] - want[0]).item()) < 1e-5 and abs((y[k] - want[1]).item()) < 1e-4
        assert torch.allclose(bars[k], torch.autograd.grad(want.sum(), q)[0], rtol=1e-3, atol=1e-5)
    assert t[2].item() == end


STRATEGIES = ["DiscreteAdjoint", "Backprop", "ForwardSensitivity"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_switch_at_the_event_by_every_strategy(name):
    p = torch.tensor(P, requires_grad=True)
    sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), events=REACHED, gradient=getattr(adjoint, name)())
    got, want = (torch.autograd.grad(x, p)[0] for x in (sol.y[-1, 1], truth(p)[1]))
    assert torch.allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("way", [odeint, odeint_adjoint])
def test_switch_at_the_event_of_odeint(way):
    p = torch.tensor(P, requires_grad=True)
    when, y = odeint_event(
        lambda t, y: switched(t, y, p), torch.zeros(2), torch.tensor(0.0), event_fn=lambda t, y: y[0] - p[2], odeint_interface=way
    )
    got = torch.stack([when, y[-1, 1]])
    for k in range(2):
        a, b = (torch.autograd.grad(x[k], p, retain_graph=True)[0] for x in (got, truth(p)))
        assert torch.allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_switch_at_the_event_of_implicit_equations(method):
    p = torch.tensor(P, requires_grad=True)
    residual = lambda t, y, yp, p: yp - switched(t, y, p)  # noqa: E731
    sol = solve_dae(residual, (0.0, 3.0), torch.zeros(2), args=(p,), events=REACHED, method=method, rtol=1e-5, atol=1e-5)
    got, want = (torch.autograd.grad(x, p)[0] for x in (sol.y[-1, 1], truth(p)[1]))
    assert abs((sol.y[-1, 1] - truth(p)[1]).item()) < 1e-4 and torch.allclose(got, want, rtol=1e-3)
    assert torch.allclose(sol.yp[-1], p[:2], rtol=1e-3)


def test_beyond_the_event_nothing_need_be_defined():
    """A tank that is empty at the event, at the near side of which alone its outflow has a slope: ``T = 2 sqrt(h) / k``."""
    k = torch.tensor(0.8, requires_grad=True)
    empty = event(lambda t, y, k: y[0] - 1e-4, terminal=True)
    sol = solve_ivp(lambda t, y, k: -k * torch.sqrt(y.clamp(min=1e-4)), (0.0, 9.0), torch.ones(1), (k,), events=empty, rtol=1e-8)
    want = 2 * (1 - 1e-2) / k
    assert abs((sol.t[-1] - want).item()) < 1e-7
    assert torch.allclose(torch.autograd.grad(sol.t[-1], k)[0], torch.autograd.grad(want, k)[0], rtol=1e-5)


def test_values_do_not_depend_on_derivatives():
    for wanted in (REACHED, event(lambda t, y, p: y[..., 0] - p[..., 2])):
        found = []
        for p in (torch.tensor(P), torch.tensor(P, requires_grad=True)):
            sol = solve_ivp(switched, (0.0, 3.0), torch.zeros(2), (p,), events=wanted)
            found.append((sol.t.detach(), sol.y.detach(), sol.events[0].t.detach(), sol.events[0].y.detach()))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- event functions without slope ---

STEPS = {
    "comparison": lambda x: x > 0.01,
    "its negation": lambda x: x <= 0.01,
    "sign": lambda x: torch.sign(x - 0.01),
    "halves": lambda x: (x > 0.01).double() - 0.5,
    "integer": lambda x: (x > 0.01).long(),
}
HIT = math.log(100) / 0.9


def hits(form, f, rate):
    """Times, states at the event of ``y' = -rate y`` in every form of solve."""
    fun, tight = (lambda t, y: -rate * y), {"rtol": 1e-9, "atol": 1e-11}
    if form == "odeint":
        when, y = odeint_event(fun, torch.ones(4), torch.tensor(0.0), event_fn=lambda t, y: f(y.mean()), odeint_interface=odeint)
        return when, y[-1]
    g = event(lambda t, y: f(y.mean(-1)), terminal=True)
    if form == "batched":
        sol = solve_ivp(fun, (0.0, 9.0), torch.ones(2, 4), events=g, batched=True, **tight)
        return sol.t[-1], sol.y[-1]

    def one(y0):
        sol = solve_ivp(fun, (0.0, 9.0), y0, events=g, **tight)
        return sol.t[-1], sol.y[-1]

    return torch.vmap(one)(torch.ones(2, 4)) if form == "vmapped" else one(torch.ones(4))


@pytest.mark.parametrize("form", ["one", "batched", "vmapped", "odeint"])
@pytest.mark.parametrize("kind", STEPS)
def test_event_functions_without_slope(kind, form):
    """Found where they jump, whether or not anything requires grad; derivatives are refused, not made up."""
    rate = torch.tensor(0.9, requires_grad=True)
    for k in (rate, rate.detach()):
        when, y = hits(form, STEPS[kind], k)
        assert bool(((when - HIT).abs() < 1e-6).all()) and bool(((y - 0.01).abs() < 1e-8).all())
        if k is rate:
            for x in (when, y):
                with pytest.raises(InvalidInput, match="no slope"):
                    torch.autograd.grad(x.sum(), rate, retain_graph=True)


def test_event_without_slope_under_transforms():
    stop = event(lambda t, y, k: y[0] > 0.5, terminal=True)

    def end(k):
        return solve_ivp(lambda t, y, k: -k * y, (0.0, 9.0), torch.ones(1), (k,), events=stop).t[-1]

    k = torch.tensor([0.9, 1.0])
    for run in (lambda: torch.vmap(torch.func.grad(end))(k), lambda: torch.func.jvp(end, (k[0],), (k[1],))):
        with pytest.raises(InvalidInput, match="no slope"):
            run()


def test_samples_before_an_event_without_slope_are_differentiated():
    k = torch.tensor(0.9, requires_grad=True)
    stop = event(lambda t, y: y[0] > 0.5, terminal=True)
    sol = solve_ivp(lambda t, y: -k * y, (0.0, 9.0), torch.ones(1), events=stop, t_eval=[0.5, 2.0], rtol=1e-9, atol=1e-11)
    assert torch.autograd.grad(sol.y[0].sum(), k)[0].item() == pytest.approx(-0.5 * math.exp(-0.45), rel=1e-7)


@pytest.mark.parametrize("terminal", [-1, 3.5, "yes", float("nan")])
def test_terminal_is_a_boolean_or_a_count(terminal):
    with pytest.raises(ValueError, match="boolean or positive integer"):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(1), events=event(lambda t, y: y[0] - 0.5, terminal=terminal))


# --- several roots in a step ---


@pytest.mark.parametrize("form", ["one", "batched", "vmapped"])
@pytest.mark.parametrize("method", ["tsit5", "dopri8", "rodas5p"])
def test_two_crossings_in_one_step(method, form):
    """A parabola of the time, dipping below zero for a short while within a long step; and the first one is where it stops."""
    y0 = torch.ones(2, 1) if form != "one" else torch.ones(1)

    def g(t, y):
        return (t - 1.52) ** 2 - 0.03**2 + 0 * y[..., 0]

    def run(y0, terminal, batched=False):
        sol = solve_ivp(lambda t, y: 0.01 * y, (0.0, 4.0), y0, events=event(g, terminal), method=method, first_step=3.7, batched=batched)
        return sol.events[0].t, sol.t[-1]

    def every(terminal):
        if form == "vmapped":
            found, end = torch.vmap(lambda y: run(y, terminal))(y0)
            return found.t(), end
        return run(y0, terminal, form == "batched")

    found, _ = every(False)
    assert torch.allclose(found, torch.tensor([1.49, 1.55]).reshape(-1, *[1] * (found.dim() - 1)), rtol=0, atol=1e-10)
    assert found.shape[0] == 2
    found, end = every(True)
    assert torch.allclose(found, torch.full_like(found, 1.49), rtol=0, atol=1e-10) and torch.allclose(end, torch.full_like(end, 1.49))


def test_three_crossings_and_directions():
    """Up, down and up again in one step."""
    cubic = lambda t, y: (t - 1.0) * (t - 1.2) * (t - 2.5) + 0 * y[0]  # noqa: E731
    for direction, want in ((0, [1.0, 1.2, 2.5]), (1, [1.0, 2.5]), (-1, [1.2])):
        sol = solve_ivp(lambda t, y: 0 * y, (0.0, 4.0), torch.ones(1), events=event(cubic, direction=direction), first_step=4.0)
        assert sol.events[0].t.tolist() == pytest.approx(want, abs=1e-12)


def test_touching_is_no_crossing():
    touch = lambda t, y: (t - 1.3) ** 2 + 0 * y[0]  # noqa: E731
    sol = solve_ivp(lambda t, y: 0 * y, (0.0, 4.0), torch.ones(1), events=touch, first_step=3.0)
    assert sol.events[0].t.numel() == 0


def test_events_at_one_time_are_all_recorded():
    """Two functions with the same root, in either order, one of them terminal; batched too."""
    a, b = event(lambda t, y: y[..., 0] - 0.3), event(lambda t, y: 3 * y[..., 0] - 0.9, terminal=True)
    for events in ([a, b], [b, a]):
        for batched in (False, True):
            y0 = torch.ones(2, 1) if batched else torch.ones(1)
            sol = solve_ivp(lambda t, y: -y, (0.0, 3.0), y0, events=events, batched=batched, rtol=1e-8)
            assert [e.t.shape[0] for e in sol.events] == [1, 1]
            assert all(torch.allclose(e.t, torch.tensor(-math.log(0.3))) for e in sol.events)


@pytest.mark.parametrize("batched", [False, True])
def test_root_at_the_start(batched):
    """As SciPy has it: a function that begins at zero has an event there, if it goes in the wanted direction."""
    y0 = torch.zeros(2, 1) if batched else torch.zeros(1)
    rise = lambda t, y: y[..., 0]  # noqa: E731
    for direction, count in ((0, 1), (1, 1), (-1, 0)):
        sol = solve_ivp(lambda t, y: 1 + 0 * y, (0.0, 3.0), y0, events=event(rise, direction=direction), batched=batched)
        assert sol.events[0].t.shape[0] == count and bool((sol.events[0].t == 0).all())
    sol = solve_ivp(lambda t, y: 1 + 0 * y, (0.0, 3.0), y0, events=event(rise, terminal=True), batched=batched)
    assert bool((sol.t[-1] == 0).all()) and bool((torch.as_tensor(sol.status) == 1).all())


@pytest.mark.parametrize("method", ["tsit5", "radau5", "rodas5p", "bdf"])
def test_an_empty_state_has_a_dense_output(method):
    sol = solve_ivp(lambda t, y: 1.0 * y, (0.0, 10.0), torch.zeros(0), method=method, dense_output=True)
    assert sol(torch.tensor([1.0, 2.0])).shape == (2, 0) and sol.y.shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf"])
def test_until_an_event_however_late(method, dtype):
    """``y' = -k y`` to 0.3; an end at infinity is refused with this way out."""
    k = torch.tensor(0.01, dtype=dtype, requires_grad=True)
    late = event(lambda t, y, k: y[0] - 0.3, terminal=True)
    start = torch.ones(1, dtype=dtype)
    with pytest.raises(InvalidInput, match="1e30"):
        solve_ivp(lambda t, y, k: -k * y, (0.0, math.inf), start, (k,), events=late, method=method)
    sol = solve_ivp(lambda t, y, k: -k * y, (0.0, 1e30), start, (k,), events=late, method=method)
    want = math.log(1 / 0.3) / 0.01
    assert sol.status == 1 and sol.t[-1].item() == pytest.approx(want, rel=1e-3)
    assert torch.autograd.grad(sol.t[-1], k)[0].item() == pytest.approx(-want / 0.01, rel=1e-3)


def test_to_go_on_from_the_end_of_a_solve():
    """With the size of its last step: the same states, to the tolerances, and one differentiable computation."""
    k = torch.tensor(0.9, requires_grad=True)
    fun = lambda t, y, k: -k * y * torch.cos(t)  # noqa: E731
    first = solve_ivp(fun, (0.0, 1.0), torch.ones(1), (k,), t_eval="steps", rtol=1e-8)
    size = (first.t[-1] - first.t[-2]).item()
    second = solve_ivp(fun, (first.t[-1], 2.0), first.y[-1], (k,), first_step=size, rtol=1e-8)
    want = torch.exp(-k * torch.sin(torch.tensor(2.0)))
    assert torch.allclose(second.y[-1], want, rtol=1e-7)
    assert torch.allclose(torch.autograd.grad(second.y[-1].sum(), k)[0], torch.autograd.grad(want, k)[0], rtol=1e-6)


def sampled(t, method, **options):
    """``y = exp(-1.3 t)`` at ``t``."""
    return solve_ivp(lambda t, y: -1.3 * y, (0.0, 2.0), torch.ones(1, dtype=torch.float64), method=method, t_eval=t, **options).y[:, 0]


@pytest.mark.parametrize("twice", ["double backward", "forward over reverse", "mapped"])
@pytest.mark.parametrize("method, at", [("euler", 0.73), ("implicit_euler", 2.0), ("bdf", 0.0)])
def test_straight_lines_have_no_second_derivatives_of_sample_times(method, at, twice):
    t = torch.tensor(at, dtype=torch.float64)
    f = lambda t: sampled(t.reshape(1), method, first_step=0.02, rtol=1e-2)[0]  # noqa: E731
    assert float(torch.func.grad(f)(t)) == pytest.approx(-1.3 * math.exp(-1.3 * at), rel=0.2)
    with pytest.raises(InvalidInput, match=f"the dense output of '{method}' is a straight line"):
        TWICE[twice](f, t)


@pytest.mark.parametrize("twice", ["double backward", "forward over reverse", "mapped"])
@pytest.mark.parametrize("method", ["euler", "implicit_euler"])
def test_steps_of_first_order_have_no_second_derivatives_of_their_ends(method, twice):
    """They were 0, and twice what is right."""

    def f(end):
        options = {"method": method, "first_step": 0.02, "rtol": 1e-2}
        return solve_ivp(lambda t, y: -1.3 * y, (0.0, end), torch.ones(1, dtype=torch.float64), **options).y[-1, 0]

    end = torch.tensor(1.03, dtype=torch.float64)
    assert float(torch.func.grad(f)(end)) == pytest.approx(-1.3 * math.exp(-1.3 * 1.03), rel=0.1)
    with pytest.raises(InvalidInput, match=f"a step of '{method}', which is of first order"):
        TWICE[twice](f, end)


@pytest.mark.parametrize("method", ["midpoint", "trapezoid", "tsit5"])
def test_steps_of_higher_order_have_second_derivatives_of_their_ends(method):
    end = torch.tensor(1.03, dtype=torch.float64, requires_grad=True)
    options = {"method": method, "first_step": None if method == "tsit5" else 0.02, "rtol": 1e-2 if method == "trapezoid" else 1e-3}
    y = solve_ivp(lambda t, y: -1.3 * y, (0.0, end), torch.ones(1, dtype=torch.float64), **options).y[-1, 0]
    (first,) = torch.autograd.grad(y, end, create_graph=True)
    assert float(torch.autograd.grad(first, end)[0]) == pytest.approx(1.69 * math.exp(-1.3 * 1.03), rel=0.05)


def test_samples_on_curves_have_second_derivatives_in_their_times():
    t = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    for method in ("bdf", "tsit5"):
        (first,) = torch.autograd.grad(sampled(t, method, rtol=1e-8).sum(), t, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), t)
        torch.testing.assert_close(second, 1.69 * torch.exp(-1.3 * t.detach()), rtol=2e-2, atol=0.0)


def test_what_rounding_makes_of_a_dense_output_is_no_crossing():
    """From just above zero, at rest, upwards: the cubic through the step dips by less than the last digit of its values."""

    def lifted(x):
        return 3.5e-307 + 4.5e-20 * x * x - 1e-37 * x

    places = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0], dtype=torch.float64).unsqueeze(-1)
    for f, count in ((lifted, 0), (lambda x: lifted(x) - 4.5e-22 * x, 2)):
        roots = crossings(f, places, f(places), 0.0, torch.ones(1, dtype=torch.bool))
        assert int(roots.isfinite().sum()) == count


@pytest.mark.parametrize(
    "kind, dtype, options",
    [
        ("reset", torch.float64, {}),
        ("terminal", torch.float64, {}),
        ("dae", torch.float64, {}),
        ("reset", torch.float32, {}),
        pytest.param("reset", torch.float64, {"compile": True}, marks=pytest.mark.compile),
    ],
)
@pytest.mark.parametrize("when", [0.3, 1.3])
def test_an_event_at_an_end_of_the_span_that_is_a_named_time(kind, dtype, options, when):
    """``y' = 2 t`` from 1 at 0.3 to 1.3, with 5 added where the time is ``c``, an end: a time at which ``fun`` may jump is seen from within
    by ``fun`` alone. The derivative in ``c`` is that of a time in between: none."""
    c = torch.tensor(when, dtype=torch.float64, requires_grad=True)
    reset = None if kind == "terminal" else lambda t, y, c: y + 5
    event = adjoint.Event(lambda t, y, c: t - c.to(t.dtype) + 0 * y[0], reset=reset, terminal=int(kind == "terminal"), name="e")
    given = (0.3, 1.3), torch.ones(1, dtype=dtype)
    options = options | {"args": (c,), "step_ts": torch.tensor([when], dtype=torch.float64), "events": [event]}
    if kind == "dae":
        sol = adjoint.solve_dae(lambda t, y, yp, c: yp - 2 * t, *given, None, **options)
    else:
        sol = adjoint.solve_ivp(lambda t, y, c: 2 * t + 0 * y, *given, **options)
    wanted = 1.0 if kind == "terminal" and when == 0.3 else 2.6
    assert sol.events["e"].t.tolist() == pytest.approx([when], rel=1e-6)
    assert float(sol.y[-1]) == pytest.approx(wanted + 5 * (kind != "terminal"), rel=1e-5)
    slope = 2 * when if kind == "terminal" else 0.0
    (found,) = torch.autograd.grad(sol.y[-1].sum(), c, retain_graph=True)
    assert float(found) == pytest.approx(slope, abs=1e-4)
    assert float(torch.autograd.grad(sol.events["e"].t.sum(), c)[0]) == pytest.approx(1.0, rel=1e-5)
