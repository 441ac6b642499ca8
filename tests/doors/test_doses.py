"""Doses of two compartments against the closed form: boluses, infusions, lag times, ragged schedules, every derivative."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint
from adjoint import Doses, solve_ivp

FINE = {"rtol": 1e-11, "atol": 1e-13, "method": "verner9"}


def two(t, y, k, k12, k21):
    a, b = y[..., 0], y[..., 1]
    return torch.stack([-(k + k12) * a + k21 * b, k12 * a - k21 * b], -1)


def matrix(k, k12, k21):
    return torch.stack([torch.stack([-k - k12, k21]), torch.stack([k12, -k21])])


def bolus(t, when, amount, place, A):
    if float(when) > t:
        return torch.zeros(2)
    return torch.linalg.matrix_exp(A * (t - when))[:, place] * amount


def infusion(t, when, until, rate, place, A):
    """The integral of the matrix exponential over the time of the infusion."""
    if float(when) > t:
        return torch.zeros(2)
    grown = lambda s: torch.linalg.solve(A, torch.linalg.matrix_exp(A * s) - torch.eye(2))[:, place] * rate  # noqa: E731
    return grown(t - when) - (grown(t - until) if float(until) < t else 0.0)


def values(*numbers):
    return [torch.tensor(x, requires_grad=True) for x in numbers]


def agree(found, wanted, inputs, tol=1e-9, second=True):
    assert torch.allclose(found, wanted, rtol=tol, atol=tol)
    one, other = (
        torch.autograd.grad((x * (1 + torch.arange(2.0))).sum(), inputs, create_graph=second, retain_graph=True, materialize_grads=True)
        for x in (found, wanted)
    )
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=tol, atol=tol)
    if second:
        one, other = (
            torch.autograd.grad(sum(x.sum() for x in xs), inputs, retain_graph=True, materialize_grads=True) for xs in (one, other)
        )
        for a, b in zip(one, other, strict=True):
            assert torch.allclose(a, b, rtol=100 * tol, atol=100 * tol)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.slow_cases("True")
def test_boluses_and_infusions(native):
    k, k12, k21 = p = values(0.3, 0.5, 0.2)
    times, amounts, lag, duration, start, dose = q = values([0.0, 1.0, 2.5], [1.0, 2.0, 0.5], 0.1, 0.75, [0.6, 1.9], 3.0)
    events = [Doses(times, amounts, 0, lag=lag, name="bolus"), Doses(start, dose, [0, 1], duration=duration, name="infusion")]
    sol = solve_ivp(two, (0.0, 4.0), torch.zeros(2), (k, k12, k21), events=events, t_eval=[2.0, 4.0], compile=native, **FINE)
    A = matrix(*p)
    for i, t in enumerate((2.0, 4.0)):
        wanted = sum(bolus(t, times[j] + lag, amounts[j], 0, A) for j in range(3))
        wanted = wanted + sum(infusion(t, start[j], start[j] + duration, dose / duration, j, A) for j in range(2))
        agree(sol.y[i], wanted, [*p, *q])
    assert torch.allclose(sol.events["bolus"].t, times + lag)
    assert torch.allclose(sol.events["bolus"].after - sol.events["bolus"].y, torch.stack([amounts, 0 * amounts], -1))
    assert torch.allclose(sol.events["infusion"].t, torch.tensor([0.6, 1.35, 1.9, 2.65]))


@pytest.mark.parametrize("rate", [False, True])
def test_infusions_into_complex_states(rate):
    """Amounts are complex, durations real."""
    w, when, long = values(1.3, 0.4, 0.5)
    amount = torch.tensor(0.7 if rate else 0.7 - 0.4j, requires_grad=True)
    other = {"rate": amount / long} if rate else {"duration": long}
    drip = Doses(when.unsqueeze(0), amount, 0, **other)
    sol = solve_ivp(lambda t, y: 1j * w * y, (0.0, 1.5), torch.zeros(1, dtype=torch.complex128), events=drip, **FINE)
    grown = lambda s: ((1j * w * (1.5 - s)).exp() - 1) / (1j * w) * amount / long  # noqa: E731
    wanted = grown(when) - grown(when + long)
    inputs = [w, when, long, amount]
    agree(torch.view_as_real(sol.y[-1, 0]), torch.view_as_real(wanted), inputs, second=not amount.is_complex())
    if rate:
        wrong = Doses([0.1], torch.tensor(1j), 0, rate=1.0)
        with pytest.raises(adjoint.InvalidInput, match="real where they enter at a rate"):
            solve_ivp(lambda t, y: y, (0.0, 1.0), torch.zeros(1, dtype=torch.complex128), events=wrong)


def test_a_rate_in_place_of_a_duration():
    p = values(0.3, 0.5, 0.2)
    rate, amount = q = values(2.0, [1.0, 3.0])
    sol = solve_ivp(two, (0.0, 4.0), torch.zeros(2), tuple(p), events=Doses([0.0, 1.0], amount, -2, rate=rate), **FINE)
    wanted = sum(infusion(4.0, torch.tensor(float(j)), j + amount[j] / rate, rate, 0, matrix(*p)) for j in range(2))
    agree(sol.y[-1], wanted, [*p, *q])


@pytest.mark.parametrize("gradient", ["discrete", "interpolating", "forward", "backprop", "checkpoints"])
def test_strategies(gradient):
    strategy = {
        "discrete": adjoint.DiscreteAdjoint(),
        "interpolating": adjoint.InterpolatingAdjoint(rtol=1e-11, atol=1e-13, method="verner9"),
        "forward": adjoint.ForwardSensitivity(),
        "backprop": adjoint.Backprop(),
        "checkpoints": adjoint.DiscreteAdjoint(checkpoints=4),
    }[gradient]
    p = values(0.3, 0.5, 0.2)
    times, amounts, duration = q = values([0.0, 1.0], [1.0, 2.0], 0.75)
    events = [Doses(times, amounts, 0), Doses([0.5], 1.0, 1, duration=duration)]
    sol = solve_ivp(two, (0.0, 3.0), torch.zeros(2), tuple(p), events=events, gradient=strategy, **FINE)
    wanted = sum(bolus(3.0, times[j], amounts[j], 0, matrix(*p)) for j in range(2))
    wanted = wanted + infusion(3.0, torch.tensor(0.5), 0.5 + duration, 1 / duration, 1, matrix(*p))
    agree(sol.y[-1], wanted, [*p, *q], second=False)


@pytest.mark.parametrize("method", ["verner9", "native tsit5", "native rodas5p", "bdf", "abm", "radau5"])
def test_ragged_schedules(method):
    """Patients with schedules of their own, in one call."""
    native, method = method.startswith("native"), method.removeprefix("native ")
    schedules = [[0.0, 1.0, 2.0], [0.5], [], [0.25, 2.25]]
    pad = torch.nn.utils.rnn.pad_sequence([torch.tensor(s) for s in schedules], padding_value=math.nan)
    times = pad.clone().requires_grad_(method not in ("bdf", "abm"))
    amounts = (1.0 + torch.rand(3, 4)).requires_grad_()
    p = [torch.tensor([x, 1.1 * x, 0.9 * x, x], requires_grad=True) for x in (0.3, 0.5, 0.2)]
    lag = torch.tensor([0.0, 0.1, 0.0, 0.2], requires_grad=times.requires_grad)
    tight = {"rtol": 1e-11, "atol": 1e-13} if method == "verner9" else {"rtol": 1e-9, "atol": 1e-11}
    sol = solve_ivp(
        two,
        (0.0, 3.0),
        torch.zeros(4, 2),
        tuple(p),
        events=Doses(times, amounts, 0, lag=lag),
        batched=True,
        compile=native,
        method=method,
        **tight,
    )
    wanted = []
    for i, schedule in enumerate(schedules):
        A = matrix(*(x[i] for x in p))
        wanted.append(sum((bolus(3.0, times[j, i] + lag[i], amounts[j, i], 0, A) for j in range(len(schedule))), torch.zeros(2)))
    assert (~sol.events["doses"].t.isnan()).sum(0).tolist() == [3, 1, 0, 2]
    inputs = [*p, amounts, *([times, lag] if times.requires_grad else [])]
    agree(sol.y[-1], torch.stack(wanted), inputs, 1e-9 if method == "verner9" else 1e-6, second=method == "verner9")


def test_vmap():
    p = [torch.tensor(x) for x in (0.3, 0.5, 0.2)]

    def end(times, amount):
        return solve_ivp(two, (0.0, 3.0), torch.zeros(2), tuple(p), events=Doses(times, amount, 0), **FINE).y[-1]

    times, amounts = torch.tensor([[0.0, 1.0], [0.5, 2.0]]), torch.tensor([1.0, 2.0])
    found = torch.vmap(end)(times, amounts)
    wanted = torch.stack([sum(bolus(3.0, t, a, 0, matrix(*p)) for t in ts) for ts, a in zip(times, amounts, strict=True)])
    assert torch.allclose(found, wanted, atol=1e-9)
    slopes = torch.vmap(torch.func.jacfwd(end))(times, amounts)
    assert torch.allclose(slopes[1, :, 0], torch.func.jacrev(end)(times[1], amounts[1])[:, 0], atol=1e-8)
    # the ends of the span alone are mapped
    stopped = lambda stop: solve_ivp(two, (0.0, stop), torch.zeros(2), tuple(p), events=Doses([0.5], 1.0, 0), **FINE).y[-1]  # noqa: E731
    wanted = torch.stack([bolus(stop, 0.5, 1.0, 0, matrix(*p)) for stop in (2.0, 3.0)])
    assert torch.allclose(torch.vmap(stopped)(torch.tensor([2.0, 3.0])), wanted, atol=1e-9)


def test_beside_events():
    """Doses and a reset at one time, in the order of ``events=``; a jump over the zero of an event is none."""
    still = lambda t, y: torch.zeros_like(y)  # noqa: E731
    double = adjoint.Event(lambda t, y: t - 0.5, reset=lambda t, y: 2 * y, name="double")
    level = adjoint.Event(lambda t, y: y[0] - 0.7, name="level")
    dose = Doses([0.5], [1.0], 0)
    for events, wanted in (([dose, double, level], 4.0), ([double, dose, level], 3.0)):
        sol = solve_ivp(still, (0.0, 1.0), torch.ones(1), events=events, t_eval=[0.5, 1.0])
        assert sol.y[:, 0].tolist() == [wanted, wanted] and sol.events["level"].t.shape == (0,)
    assert sol.events["double"].t.tolist() == sol.events["doses"].t.tolist() == [0.5]


def test_at_the_ends():
    still = lambda t, y: torch.zeros_like(y)  # noqa: E731
    sol = solve_ivp(still, (0.0, 1.0), torch.zeros(1), events=Doses([0.0, 1.0, 2.0], 1.0, 0), t_eval=[0.0, 0.5, 1.0])
    assert sol.y[:, 0].tolist() == [1.0, 1.0, 2.0] and sol.events[0].t.tolist() == [0.0, 1.0]
    both = solve_ivp(still, (0.0, 1.0), torch.zeros(1), events=Doses([0.0, 1.0], 1.0, 0), dense_output=True)
    assert both.y[:, 0].tolist() == [1.0, 2.0] and both(1.0, side="left").tolist() == [1.0] and both(0.0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Doses([0.1], 1.0, 0, duration=1.0, rate=1.0), "leave one"),
        (lambda: Doses([-0.1], 1.0, 0), "before the start"),
        (lambda: Doses([0.1], 1.0, 2), "compartment"),
        (lambda: Doses([0.1, 0.2], [1.0, 2.0, 3.0], 0), "amounts"),
        (lambda: Doses([0.1], 1.0, 0, duration=0.0), "positive"),
        (lambda: Doses([[0.1]], 1.0, 0), "times"),
    ],
)
def test_wrong_doses(make, match):
    with pytest.raises(adjoint.InvalidInput, match=match):
        solve_ivp(two, (0.0, 1.0), torch.zeros(2), tuple(values(0.3, 0.5, 0.2)), events=make())


def test_refused():
    with pytest.raises(adjoint.InvalidInput, match="forward"):
        solve_ivp(two, (1.0, 0.0), torch.zeros(2), tuple(values(0.3, 0.5, 0.2)), events=Doses([2.0], 1.0, 0))


# --- several at one time ---


@pytest.mark.parametrize("method", ["verner9", "native tsit5", "radau"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.slow_cases("True-radau", "False-radau")
def test_each_of_several_at_one_time_moves_alone(method, batched):
    """A bolus with the start of an infusion, two boluses, infusions one behind the other, and a reset that does nothing: each of the times
    and durations is differentiated as if it were alone there."""
    native, name = method.startswith("native"), method.removeprefix("native ")
    p = values(0.3, 0.5, 0.2)
    loading, start, duration, twice = q = values([0.25], [0.25, 0.875], 0.625, [1.5, 1.5])
    events = [
        Doses(start, 3.0, [0, 1], duration=duration),
        adjoint.Event(lambda t, y, *args: y[..., 0] * 0 + t - 0.875, reset=lambda t, y, *args: y, direction=1),
        Doses(loading, 2.0, 1, name="loading"),
        Doses(twice, [1.0, 0.5], [0, 1], name="twice"),
    ]
    y0 = torch.zeros(2, 2) if batched else torch.zeros(2)
    rtol = 1e-8 if name == "radau" else 1e-11
    tight = {"rtol": rtol, "atol": rtol / 100, "compile": native, "batched": batched, "events": events}
    if name == "radau":
        sol = adjoint.solve_dae(lambda t, y, yp, *args: yp - two(t, y, *args), (0.0, 2.0), y0, args=tuple(p), **tight)
    else:
        sol = solve_ivp(two, (0.0, 2.0), y0, tuple(p), method=name, **tight)
    A = matrix(*p)
    wanted = sum(infusion(2.0, start[j], start[j] + duration, 3.0 / duration, j, A) for j in range(2))
    wanted = wanted + bolus(2.0, loading[0], 2.0, 1, A) + bolus(2.0, twice[0], 1.0, 0, A) + bolus(2.0, twice[1], 0.5, 1, A)
    agree(sol.y[-1, 1] if batched else sol.y[-1], wanted, [*p, *q], 1e-7 if name == "radau" else 1e-8)
    at = sol.events["loading"].t[0]
    assert torch.autograd.grad(at.sum(), loading)[0].tolist() == [1.0 + batched]


@pytest.mark.parametrize("door", ["ode", "dae", "mass", "mass batched"])
@pytest.mark.slow_cases("mass", "dae", "mass batched")
def test_a_dose_at_the_start(door):
    """Before it the solution goes on by itself, as far as its time is moved: of samples at the start and behind, to the second."""
    x, k, size, when = p = values(0.5, 0.8, 1.5, 0.0)
    times, batched = torch.tensor([0.0, 1.0]), door.endswith("batched")
    options = {"args": (k,), "events": Doses(when.reshape(1), size, 0), "t_eval": times, "rtol": 1e-9, "atol": 1e-11, "batched": batched}

    def algebraic(t, y, k):
        return torch.stack([k * (torch.sin(t) - y[..., 1]) / 2, y[..., 1] - 2 * y[..., 0] - torch.sin(t)], -1)

    y0 = torch.stack([x, 2 * x])
    y0 = torch.stack([y0, y0]) if batched else y0
    if door == "ode":
        sol = solve_ivp(lambda t, y, k: -k * y, (0.0, 1.0), x.reshape(1), **options)
    elif door == "dae":
        parts = lambda t, y, yp, k: algebraic(t, y, k) - yp * torch.tensor([1.0, 0.0])  # noqa: E731
        sol = adjoint.solve_dae(parts, (0.0, 1.0), y0, **options)
    else:
        mass = torch.diag(torch.tensor([1.0, 0.0]))
        sol = solve_ivp(algebraic, (0.0, 1.0), y0, mass_matrix=mass, method="radau5", **options)
    wanted = x * torch.exp(-k * times) + size * torch.exp(-k * (times - when))
    agree(sol.y[:, 1, 0] if batched else sol.y[:, 0], wanted, p, 1e-7)


# --- implicit equations ---


def implicit(t, y, yp, k, k12, k21):
    """The flow between the compartments is an algebraic variable, and the second equation is that of the whole amount."""
    a, b, flow = y[..., 0], y[..., 1], y[..., 2]
    first = yp[..., 0] + k * a + flow
    return torch.stack([first, yp[..., 0] + yp[..., 1] + k * a, flow - k12 * a + k21 * b], -1)


def semi(t, y, k, k12, k21):
    a, b, flow = y[..., 0], y[..., 1], y[..., 2]
    return torch.stack([-k * a - flow, -k * a, flow - k12 * a + k21 * b], -1)


#: of the same equations: not a diagonal one
MASS = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def solved(method, y0, args, end=4.0, **options):
    """By implicit equations, or with a mass matrix, constant or a function."""
    native, method = method.startswith("native"), method.removeprefix("native ")
    kind, _, name = method.rpartition(" ")
    tight = {"rtol": 1e-9, "atol": 1e-11, "compile": native} | options
    if not kind:
        return adjoint.solve_dae(implicit, (0.0, end), y0, args=args, method=name, **tight)
    mass = torch.tensor(MASS)
    return solve_ivp(semi, (0.0, end), y0, args, method=name, mass_matrix=mass if kind == "mass" else lambda t, y, *args: mass, **tight)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("mass radau5", "varying radau5")]
ALL_IMPLICIT = ["radau", "native radau", "mass rodas5p", "native mass rodas5p", *SLOW]


@pytest.mark.parametrize("method", [*ALL_IMPLICIT, "bdf"])
@pytest.mark.slow_cases("mass rodas5p", "bdf", "radau")
def test_implicit_equations(method):
    """Boluses, lag times, and infusions that overlap and are repeated: derivatives in times, amounts, rates and lag."""
    _, k12, k21 = p = values(0.3, 0.5, 0.2)
    times, amounts, lag, duration, start, dose, rate, other = q = values(
        [0.0, 0.7, 1.4], [1.0, 2.0, 0.5], 0.1, 0.5, [0.3, 0.6], 3.0, 2.0, [1.0, 0.5]
    )
    events = [
        Doses(times, amounts, 0, lag=lag, name="bolus"),
        Doses(start, dose, [0, 1], duration=duration, lag=lag, name="infusion"),
        Doses([0.0, 1.5], other, 1, rate=rate, name="drip"),
    ]
    tight = {"rtol": 1e-7, "atol": 1e-9} if method == "bdf" else {}
    sol = solved(method, torch.zeros(3), tuple(p), 2.0, events=events, t_eval=[1.0, 2.0], **tight)
    A = matrix(*p)
    for i, t in enumerate((1.0, 2.0)):
        wanted = sum(bolus(t, times[j] + lag, amounts[j], 0, A) for j in range(3))
        wanted = wanted + sum(infusion(t, start[j] + lag, start[j] + lag + duration, dose / duration, j, A) for j in range(2))
        wanted = wanted + sum(infusion(t, torch.tensor(s), s + other[j] / rate, rate, 1, A) for j, s in enumerate((0.0, 1.5)))
        agree(sol.y[i, :2], wanted, [*p, *q], 1e-4 if method == "bdf" else 1e-7, second=False)
        assert torch.allclose(sol.y[i, 2], k12 * sol.y[i, 0] - k21 * sol.y[i, 1], atol=1e-9)
    after = sol.events["bolus"].after
    assert torch.allclose(after[:, 2], k12 * after[:, 0] - k21 * after[:, 1], atol=1e-9)


@pytest.mark.parametrize("method", ["radau", "native radau", SLOW[0], "native mass rodas5p"])
@pytest.mark.slow_cases("native mass rodas5p", "radau")
def test_implicit_equations_of_many(method):
    """Patients with schedules of their own; first and second derivatives."""
    times = torch.tensor([[0.0, 0.5], [1.0, math.nan]], requires_grad=True)
    amounts, rate = torch.tensor([[1.0, 2.0], [0.5, 7.0]], requires_grad=True), torch.tensor([[0.8, 1.5], [0.4, 9.0]], requires_grad=True)
    p = [torch.tensor([x, 1.1 * x], requires_grad=True) for x in (0.3, 0.5, 0.2)]
    lag = torch.tensor([0.1, 0.2], requires_grad=True)
    events = [Doses(times, amounts, 0, rate=rate, lag=lag), Doses([0.7], 1.0, 1, name="bolus")]
    end = 2.5
    sol = solved(method, torch.zeros(2, 3), tuple(p), end, events=events, batched=True)
    wanted = []
    for i in (0, 1):
        A = matrix(*(x[i] for x in p))
        each = [
            infusion(end, times[j, i] + lag[i], times[j, i] + lag[i] + amounts[j, i] / rate[j, i], rate[j, i], 0, A) for j in range(2 - i)
        ]
        wanted.append(sum(each) + bolus(end, torch.tensor(0.7), 1.0, 1, A))
    agree(sol.y[-1, :, :2], torch.stack(wanted), [*p, amounts, rate, lag], 1e-7, second=False)
    found, true = (torch.autograd.grad(x[..., 0].sum(), times)[0].nan_to_num() for x in (sol.y[-1], torch.stack(wanted)))
    assert torch.allclose(found, true, atol=1e-7)


def test_second_derivatives_of_implicit_equations():
    p = values(0.3, 0.5, 0.2)
    start, dose, duration = q = values([0.6], 3.0, 0.75)
    sol = solved("radau", torch.zeros(3), tuple(p), 1.5, events=Doses(start, dose, 0, duration=duration))
    agree(sol.y[-1, :2], infusion(1.5, start[0], start[0] + duration, dose / duration, 0, matrix(*p)), [*p, *q], 1e-7)


@pytest.mark.parametrize("gradient", [adjoint.ForwardSensitivity(), adjoint.Backprop(), adjoint.GaussAdjoint(rtol=1e-11, atol=1e-13)])
@pytest.mark.slow_cases("gradient2", "gradient0")
def test_strategies_of_implicit_equations(gradient):
    p = values(0.3, 0.5, 0.2)
    start, dose, rate, when = q = values([0.6], 3.0, 4.0, [1.0])
    events = [Doses(start, dose, 1, rate=rate), Doses(when, 1.0, 0)]
    sol = solved("radau", torch.zeros(3), tuple(p), 1.6, events=events, gradient=gradient)
    wanted = infusion(1.6, start[0], start[0] + dose / rate, rate, 1, matrix(*p)) + bolus(1.6, when[0], 1.0, 0, matrix(*p))
    agree(sol.y[-1, :2], wanted, [*p, *q], 1e-7, second=False)


@pytest.mark.parametrize("method", ["radau", "mass radau5", "mass rodas5p", "varying radau5"])
@pytest.mark.parametrize("rate", [None, 1.0])
def test_doses_into_algebraic_variables_are_refused(method, rate):
    """They would be lost without a word."""
    p = tuple(values(0.3, 0.5, 0.2))
    with pytest.raises(adjoint.InvalidInput, match=r"y\[2\], which is an algebraic variable"):
        solved(method, torch.zeros(3), p, events=Doses([0.5], 1.0, 2, rate=rate))


@pytest.mark.parametrize("method", ["bdf", "radau"])
def test_dense_output_of_implicit_equations_with_a_dose_at_the_start(method):
    """``y' = -y`` from 1, with a half at once: a round of no length takes no step by ``bdf``."""
    options = {"dense_output": True, "method": method, "rtol": 1e-8, "atol": 1e-10}
    sol = adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), torch.ones(1), None, events=adjoint.Doses([0.0], 0.5, 0), **options)
    found = [float(sol(t)) for t in (0.0, 0.5)] + [float(sol(0.0, side="left"))]
    assert found == pytest.approx([1.5, 1.5 * math.exp(-0.5), 1.0], rel=1e-6)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "bdf", "abm"])
@pytest.mark.parametrize("at", ["behind", "there", "in args"])
def test_an_infusion_that_ends_where_another_trajectory_fails(method, at):
    """From the end of the infusion on the second one is no number: it fails at once in the round behind, or in the last step before."""
    p, start, duration, amount = given = values(0.8, [0.2], 0.3, 1.0)
    last = torch.tensor([9.0, 0.5])
    beyond = torch.ge if at == "there" else torch.gt
    fun = lambda t, y, p, last=last: -p * y * torch.where(beyond(t, last), float("nan"), 1.0).unsqueeze(-1)  # noqa: E731
    events, args = Doses(start, amount, 0, duration=duration), (p, last) if at == "in args" else (p,)
    sol = adjoint.solve_ivp(
        fun, (0.0, 1.0), torch.ones(2, 1), args=args, batched=True, throw=False, method=method, events=events, rtol=1e-6, atol=1e-8
    )  # fmt: skip
    assert [int(x) < 0 for x in sol.status] == [False, True]
    rest = 1 - start[0] - duration
    truth = torch.exp(-p) + amount / duration / p * (torch.exp(-p * rest) - torch.exp(-p * (1 - start[0])))
    found, right = (torch.autograd.grad(x, given) for x in (sol.y[-1, 0, 0], truth))
    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-6)
