"""Events with implicit methods, of many trajectories at once, in compiled solves and of implicit equations."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, ForwardSensitivity, SplitFunction, solve_dae, solve_ivp
from adjoint.errors import InvalidInput
from adjoint.integrate.events import chandrupatla

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

RECORDED = ["kvaerno5", "rodas5p", "radau5", "bdf", "abm", "kencarp5"]
RECORDED += [pytest.param(method, marks=pytest.mark.slow) for method in ("kvaerno3", "rodas4")]
FINE = {"rtol": 1e-8, "atol": 1e-10}
W = torch.tensor([1.0, 1.5, 0.1], dtype=torch.float64)


def rotate(t, y, w):
    """``(cos wt, sin wt)`` from ``(1, 0)``; by halves where a method wants the right-hand side in two parts."""
    return torch.stack([-w * y[..., 1], w * y[..., 0]], -1)


def problem(method):
    half = lambda t, y, w: rotate(t, y, w) / 2  # noqa: E731
    return SplitFunction(half, half) if method.startswith("kencarp") else rotate


def event(f, terminal=False, direction=0.0):
    g = lambda t, y, *args: f(t, y, *args)  # noqa: E731
    g.terminal, g.direction = terminal, direction
    return g


def number(x):
    return x.detach().item()


X = event(lambda t, y, *args: y[..., 0])
#: stops at the second time that cos wt = -0.3
STOP = event(lambda t, y, *args: y[..., 0] + 0.3, terminal=2)
THIRD = 2 * math.pi - math.acos(-0.3)


@pytest.mark.parametrize("method", RECORDED)
@pytest.mark.slow_cases("bdf", "kvaerno5", "kencarp5")
def test_times_states_and_derivatives(method):
    """Against the closed form: where, when it stops, and first and second derivatives of the time in the frequency."""
    w = torch.tensor(1.5, requires_grad=True)
    y0 = torch.tensor([1.0, 0.0])
    tol = {"rtol": 1e-6, "atol": 1e-8} if method.endswith("3") else FINE
    sol = solve_ivp(problem(method), (0.0, 9.0), y0, (w,), method=method, events=[X, STOP], t_eval=[1.0, 2.9, 3.0], **tol)
    slack = 1e-5 if method in ("kvaerno3", "bdf") else 1e-6
    assert sol.status == 1 and sol.events[0].t.shape == (1,) and sol.events[1].t.shape == (2,)
    assert abs(number(sol.events[0].t[0]) - math.pi / 3) < slack and abs(number(sol.events[1].t[1]) - THIRD / 1.5) < slack
    assert torch.allclose(sol.events[0].y, torch.tensor([[0.0, 1.0]]), atol=slack)
    assert bool(sol.y[2].isnan().all()) and torch.allclose(sol.y[1], torch.tensor([math.cos(4.35), math.sin(4.35)]), atol=10 * slack)
    (first,) = torch.autograd.grad(sol.events[1].t[1], w, create_graph=True)
    (second,) = torch.autograd.grad(first, w)
    assert number(first) == pytest.approx(-THIRD / 1.5**2, abs=20 * slack)
    assert number(second) == pytest.approx(2 * THIRD / 1.5**3, abs=2000 * slack)


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "rk4", "kvaerno5", "rodas5p", "radau5", "bdf", "abm", "kencarp5"])
@pytest.mark.slow_cases("kencarp5", "abm", "rk4")
def test_batch_as_one_by_one(method):
    options = {"method": method, "events": [X, STOP], "rtol": 1e-6, "atol": 1e-8}
    if method == "rk4":
        options["first_step"] = 0.03
    y0 = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    times = torch.tensor([0.5, 2.9, 4.4, 9.0])
    w = W.clone().requires_grad_(True)
    many = solve_ivp(problem(method), (0.0, 9.0), y0, (w,), batched=True, t_eval=times, **options)
    stops = solve_ivp(problem(method), (0.0, 9.0), y0, (w,), batched=True, **options)
    assert many.status.tolist() == [1, 1, 0] and stops.t.shape == (2, 3)
    (bars,) = torch.autograd.grad(many.events[1].t[1, :2].sum() + stops.y[-1].sum(), w)
    for b in range(3):
        v = W[b].clone().requires_grad_(True)
        one = solve_ivp(problem(method), (0.0, 9.0), y0[b], (v,), t_eval=times, **options)
        for mine, theirs in zip(many.events, one.events, strict=True):
            count = theirs.t.numel()
            assert torch.allclose(mine.t[:count, b], theirs.t, rtol=0, atol=1e-9) and bool(mine.t[count:, b].isnan().all())
            assert torch.allclose(mine.y[:count, b], theirs.y, rtol=0, atol=1e-9)
        assert torch.allclose(many.y[:, b], one.y, rtol=0, atol=1e-9, equal_nan=True)
        stop = solve_ivp(problem(method), (0.0, 9.0), y0[b], (v,), **options)
        assert torch.allclose(stops.t[:, b], stop.t, rtol=0, atol=1e-9) and torch.allclose(stops.y[:, b], stop.y, rtol=0, atol=1e-9)
        loss = stop.y[-1].sum() + (one.events[1].t[1] if b < 2 else 0.0)
        assert torch.allclose(bars[b], torch.autograd.grad(loss, v)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("gradient", [Backprop(), ForwardSensitivity()], ids=["backprop", "forward"])
@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "radau5", "abm"])
@pytest.mark.slow_cases("kvaerno5-forward", "radau5-forward", "rodas5p-backprop", "abm-backprop")
def test_strategies_agree(method, gradient):
    def derivative(strategy):
        w = W.clone().requires_grad_(True)
        y0 = torch.tensor([[1.0, 0.0]]).repeat(3, 1).requires_grad_(True)
        sol = solve_ivp(rotate, (0.0, 9.0), y0, (w,), method=method, batched=True, events=[X, STOP], gradient=strategy, rtol=1e-6)
        loss = sol.events[0].t.nansum() + sol.events[1].y.nan_to_num().pow(2).sum() + sol.y[-1].sum()
        return torch.autograd.grad(loss, (w, y0))

    for mine, theirs in zip(derivative(gradient), derivative(DiscreteAdjoint()), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("method", ["tsit5", "radau5", "bdf", "abm"])
def test_own_steps_and_dense_output_end_at_the_event(method):
    y0 = torch.tensor([[1.0, 0.0]]).repeat(3, 1)
    sol = solve_ivp(
        rotate, (0.0, 9.0), y0, (W,), method=method, batched=True, events=STOP, t_eval="steps", dense_output=True, rtol=1e-8, atol=1e-10
    )
    for b, end in enumerate([THIRD, THIRD / 1.5, 9.0]):
        n = int(sol.stats.n_accepted[b])
        assert number(sol.t[n, b]) == pytest.approx(end, abs=1e-6) and bool(sol.t[n + 1 :, b].isnan().all())
        angle = sol.t[: n + 1, b] * W[b]
        assert torch.allclose(sol.y[: n + 1, b], torch.stack([angle.cos(), angle.sin()], -1), atol=1e-6)
    within = torch.tensor([0.0, 1.0, 2.5])
    angle = within.unsqueeze(-1) * W
    assert torch.allclose(sol(within), torch.stack([angle.cos(), angle.sin()], -1), atol=1e-6)
    with pytest.raises(InvalidInput, match="outside"):
        sol(torch.tensor([3.0]))


def test_order_of_several_terminal_events_in_one_step():
    """The first in time ends each trajectory; what would have come later in the same step is not recorded."""
    at = lambda when: event(lambda t, y, *args: t - when, terminal=True)  # noqa: E731
    rate = torch.tensor([0.0, 0.0])
    gs = [at(torch.tensor([0.5, 0.7])), at(torch.tensor([0.6, 0.6])), event(lambda t, y, *args: t - 0.55)]
    sol = solve_ivp(lambda t, y, r: r.unsqueeze(-1) + 0 * y, (0.0, 1.0), torch.ones(2, 1), (rate,), batched=True, events=gs)
    assert [e.t.shape[0] for e in sol.events] == [1, 1, 1]
    assert sol.events[0].t[0, 0].item() == pytest.approx(0.5, abs=1e-14) and bool(sol.events[0].t[0, 1].isnan())
    assert sol.events[1].t[0, 1].item() == pytest.approx(0.6, abs=1e-14) and bool(sol.events[1].t[0, 0].isnan())
    assert sol.events[2].t[0].isnan().tolist() == [True, False]
    assert torch.allclose(sol.t[-1], torch.tensor([0.5, 0.6]), rtol=0, atol=1e-14)


def test_failed_trajectory_keeps_to_itself():
    f = lambda t, y, a: a.unsqueeze(-1) * y**2  # noqa: E731
    sol = solve_ivp(
        f, (0.0, 2.0), torch.ones(2, 1), (torch.tensor([1.0, 0.1]),), batched=True, throw=False,
        events=event(lambda t, y, *args: y[:, 0] - 1.1, terminal=True),
    )  # fmt: skip
    assert sol.status.tolist() == [1, 1]
    sol = solve_ivp(
        f, (0.0, 2.0), torch.ones(2, 1), (torch.tensor([1.0, 0.1]),), batched=True, throw=False, rtol=1e-9,
        events=event(lambda t, y, *args: y[:, 0] - 1.1),
    )  # fmt: skip
    assert sol.status.tolist()[0] < 0 and sol.status.tolist()[1] == 0
    assert torch.allclose(sol.events[0].t[0], torch.tensor([1 - 1 / 1.1, 10 * (1 - 1 / 1.1)]), atol=1e-6)


def test_shape_of_a_batched_event():
    with pytest.raises(InvalidInput, match="one element for each of 3 trajectories"):
        solve_ivp(rotate, (0.0, 1.0), torch.ones(3, 2), (W,), batched=True, events=lambda t, y, w: y[0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("batched", [False, True])
def test_compiled(batched):
    y0 = torch.tensor([1.0, 0.0])
    found, tight = [], {"rtol": 1e-9, "atol": 1e-11}
    for compile in (False, True):
        w = (W if batched else W[1]).clone().requires_grad_(True)
        sol = solve_ivp(
            rotate, (0.0, 9.0), y0.expand(3, 2) if batched else y0, (w,), batched=batched, events=[X, STOP], compile=compile, **tight
        )
        (bar,) = torch.autograd.grad(sol.events[1].t.nan_to_num().sum() + sol.y[-1].sum(), w)
        found.append((sol.t, sol.events[0].y, bar))
    for mine, theirs in zip(*found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11, equal_nan=True)


# --- implicit equations ---


def square(t, y, yp, k):
    """``y' = -k y``, ``z = y^2``."""
    return torch.stack([yp[..., 0] + k * y[..., 0], y[..., 1] - y[..., 0] ** 2], -1)


QUARTER = event(lambda t, y, *args: y[..., 1] - 0.25, terminal=True, direction=-1)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_dae(method):
    """``z = exp(-2 k t)`` passes 1/4 at ``log 2 / k``, where ``y' = -k/2`` and ``z' = -k/2``."""
    k = torch.tensor(2.0, requires_grad=True)
    sol = solve_dae(square, (0.0, 9.0), torch.tensor([1.0, 1.0]), args=(k,), method=method, events=QUARTER, rtol=1e-9, atol=1e-11)
    when = math.log(2) / 2
    assert sol.status == 1 and number(sol.t[-1]) == pytest.approx(when, abs=1e-7)
    assert torch.allclose(sol.y[-1], torch.tensor([0.5, 0.25]), atol=1e-7) and torch.allclose(
        sol.yp[-1], torch.tensor([-1.0, -1.0]), atol=1e-4
    )
    (first,) = torch.autograd.grad(sol.t[-1], k, create_graph=True)
    (second,) = torch.autograd.grad(first, k, retain_graph=True)
    assert number(first) == pytest.approx(-when / 2, abs=1e-6) and number(second) == pytest.approx(when / 2, abs=1e-4)
    (still,) = torch.autograd.grad(sol.y[-1, 1], k)
    assert abs(number(still)) < 1e-6


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_dae_batch(method):
    k = torch.tensor([2.0, 0.5, 0.01], requires_grad=True)
    y0 = torch.ones(3, 2)
    sol = solve_dae(square, (0.0, 9.0), y0, args=(k,), batched=True, method=method, events=QUARTER, rtol=1e-9, atol=1e-11)
    when = math.log(2) / k.detach()[:2]
    assert sol.status.tolist() == [1, 1, 0] and torch.allclose(sol.events[0].t[0, :2], when, rtol=1e-6)
    assert torch.allclose(sol.yp[-1, :2, 0], -k.detach()[:2] / 2, atol=1e-4)
    (bar,) = torch.autograd.grad(sol.t[-1].sum(), k)
    assert torch.allclose(bar, torch.cat([-when / k.detach()[:2], torch.zeros(1)]), rtol=1e-5)


def test_dae_starts_again_after_an_event():
    """A circuit whose switch opens when the capacitor's voltage reaches 0.5: consistent values on the other side are solved for.

    Source 1 V, resistor, capacitor 1 F: ``R i = 1 - v``, ``v' = i``; then a second resistor comes in. ``i`` jumps, ``v`` does not.
    """
    full = event(lambda t, y, *args: y[0] - 0.5, terminal=True)

    def circuit(t, y, yp, resistance):
        return torch.stack([yp[0] - y[1], resistance * y[1] - (1 - y[0])])

    r = torch.tensor([1.0, 3.0], requires_grad=True)
    tight = {"rtol": 1e-9, "atol": 1e-11}
    first = solve_dae(circuit, (0.0, 9.0), torch.zeros(2), args=(r[0],), events=full, **tight)
    assert number(first.y[-1, 1]) == pytest.approx(0.5, abs=1e-7)
    second = solve_dae(circuit, (first.t[-1], 2.0), first.y[-1], args=(r[1],), **tight)
    assert number(second.y[0, 1]) == pytest.approx(0.5 / 3, abs=1e-7)
    # v(2) = 1 - exp(-(2 - log 2 R1) / R2) / 2
    last = math.exp(-(2 - math.log(2)) / 3) / 2
    assert number(second.y[-1, 0]) == pytest.approx(1 - last, abs=1e-7)
    (bar,) = torch.autograd.grad(second.y[-1, 0], r)
    expected = [-last * math.log(2) / 3, -last * (2 - math.log(2)) / 9]
    assert bar.tolist() == pytest.approx(expected, abs=1e-6)


def test_mass_matrix():
    """``2 y' = -y``: 0.5 at ``2 log 2``, and its derivative in the mass."""
    mass = torch.tensor([[2.0]], requires_grad=True)
    half = event(lambda t, y, rate: y[0] - 0.5, terminal=True)
    sol = solve_ivp(
        lambda t, y, rate: -rate * y, (0.0, 5.0), torch.ones(1), (torch.tensor(1.0),), mass_matrix=mass, method="radau5", events=half,
        rtol=1e-9, atol=1e-11,
    )  # fmt: skip
    assert number(sol.t[-1]) == pytest.approx(2 * math.log(2), abs=1e-7)
    assert torch.autograd.grad(sol.t[-1], mass)[0].item() == pytest.approx(math.log(2), abs=1e-6)


def test_chandrupatla():
    """Roots of many functions at once, nasty ones among them, to rounding."""
    power = torch.tensor([1.0, 3.0, 9.0, 25.0, 1.0])
    root = torch.tensor([0.3, 0.3, 0.7, 0.5, 1.0])
    f = lambda x: torch.sign(x - root) * (x - root).abs() ** power  # noqa: E731
    found = chandrupatla(f, f(torch.zeros(5)), f(torch.ones(5)), torch.tensor([True, True, True, True, False]))
    assert torch.allclose(found[:4], root[:4], rtol=0, atol=1e-12) and number(found[4]) == 1.0
