"""Jumps of ``fun`` that nobody declared: told of by name where there is one, and never where there is none."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

import adjoint
from adjoint import Event, Forcing, solve_dae, solve_ivp

#: all native solves here are
pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

METHODS = ["tsit5", "dopri8", "bosh3", "kvaerno5", "rodas5p", "radau5", "bdf", "abm", "auto"]
NATIVE = ["native tsit5", "native rodas5p", "native kvaerno5"]


def named(method):
    kind, _, name = method.rpartition(" ")
    return {"method": name, "compile": kind == "native"}


@pytest.fixture(autouse=True)
def _always(request, monkeypatch):
    """Compiled solves are looked at each time."""
    if "seldom" not in request.node.name:
        monkeypatch.setattr("adjoint.native.program.Seldom.due", lambda self: True)
        monkeypatch.setattr("adjoint.native.program.Seldom.coming", lambda self: True)


def heard(solve):
    """What a solve returned, and the jumps that it told of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sol = solve()
    return sol, [x for x in said if "fun jumps" in str(x.message)]


def where(told):
    return float(re.search(r"at t = ([-+.\de]+)", str(told.message)).group(1))


def slower(t, y, p):
    """1 a unit of time up to a level of ``p``, then a fifth."""
    return 0.2 + 0.8 * (y < p).to(y.dtype)


def braked(t, y, p):
    """An oscillator with dry friction, which turns at pi."""
    return torch.stack([y[..., 1], -y[..., 0] - 0.1 * p * torch.sign(y[..., 1])], -1)


def timed(t, y, p):
    return torch.where(t < 0.7371, 1.0, 0.0).unsqueeze(-1) * p - y


@pytest.mark.parametrize("method", [*METHODS, *NATIVE])
@pytest.mark.parametrize("rtol", [1e-4, 1e-6, 1e-9])
def test_by_the_state(method, rtol):
    p = torch.tensor(0.5, requires_grad=True)
    options = {"rtol": rtol, "atol": 1e-2 * rtol, **named(method)}
    _, told = heard(lambda: solve_ivp(slower, (0.0, 2.0), torch.zeros(1), (p,), **options))
    assert len(told) == 1 and abs(where(told[0]) - 0.5) < 20 * rtol**0.5
    text = str(told[0].message)
    assert "component y[0] of its result from 1 to 0.2" in text and "by the state" in text and "adjoint.Event" in text
    assert told[0].filename == __file__
    if rtol <= 1e-6:
        _, told = heard(lambda: solve_ivp(braked, (0.0, 5.0), torch.tensor([1.0, 0.0]), (p,), **options))
        assert len(told) == 1 and abs(where(told[0]) - torch.pi) < 1e-3 and "y[1]" in str(told[0].message)


@pytest.mark.parametrize("method", [*METHODS, *NATIVE])
@pytest.mark.parametrize("end", [2.0, -2.0])
def test_by_the_time(method, end):
    p = torch.tensor(0.5, requires_grad=True)
    fun = lambda t, y, p: timed(t if end > 0 else -t, y, p)  # noqa: E731
    _, told = heard(lambda: solve_ivp(fun, (0.0, end), torch.ones(1), (p,), **named(method)))
    assert len(told) == 1 and abs(abs(where(told[0])) - 0.7371) < 1e-8
    assert "by the time" in str(told[0].message) and "step_ts" in str(told[0].message)


@pytest.mark.parametrize("method", ["tsit5", "bdf", "native tsit5"])
def test_of_many(method):
    """Which trajectory it is in; and once for all of them."""
    p = torch.tensor(0.5, requires_grad=True)
    _, told = heard(lambda: solve_ivp(slower, (0.0, 0.45), torch.tensor([[0.0], [0.2], [-1.0]]), (p,), batched=True, **named(method)))
    assert len(told) == 1 and abs(where(told[0]) - 0.3) < 1e-4 and "in trajectory 1" in str(told[0].message)
    _, told = heard(lambda: solve_ivp(slower, (0.0, 2.0), torch.tensor([[0.0], [0.2], [-1.0]]), (p,), batched=True, **named(method)))
    assert len(told) == 1 and abs(where(told[0]) - 0.3) < 1e-4 and "the first of 3 in which" in str(told[0].message)


@pytest.mark.parametrize(
    "gradient", [adjoint.DiscreteAdjoint(keep_bytes=0), adjoint.Backprop(), adjoint.ForwardSensitivity(), adjoint.InterpolatingAdjoint()]
)
def test_by_every_strategy(gradient):
    p = torch.tensor(0.5, requires_grad=True)
    assert len(heard(lambda: solve_ivp(slower, (0.0, 2.0), torch.zeros(1), (p,), gradient=gradient))[1]) == 1


def test_under_transforms_and_in_single_precision():
    end = lambda p: solve_ivp(slower, (0.0, 2.0), torch.zeros(1), (p,)).y[-1, 0]  # noqa: E731
    assert len(heard(lambda: torch.vmap(torch.func.grad(end))(torch.tensor([0.3, 0.5])))[1]) == 1
    assert len(heard(lambda: torch.func.jvp(end, (torch.tensor(0.5),), (torch.tensor(1.0),)))[1]) == 1
    p = torch.tensor(0.5, dtype=torch.float32, requires_grad=True)
    assert len(heard(lambda: solve_ivp(slower, (0.0, 2.0), torch.zeros(1, dtype=torch.float32), (p,), rtol=1e-5))[1]) == 1
    assert not heard(lambda: solve_ivp(slower, (0.0, 2.0), torch.zeros(1), (p.detach(),)))[1]  # no derivatives, no steps kept


@pytest.mark.parametrize("method", ["radau", "bdf", "native radau"])
def test_implicit_equations(method):
    """Whose algebraic variable jumps along, but with BDF, which does not get over that."""
    p = torch.tensor(0.5, requires_grad=True)
    along = lambda t, y, yp, p: torch.stack([yp[0] - y[1], y[1] - slower(t, y[0], p)])  # noqa: E731
    beside = lambda t, y, yp, p: torch.stack([yp[0] - slower(t, y[1], p), y[1] - y[0]])  # noqa: E731
    residual, y1 = (beside, 0.0) if method == "bdf" else (along, 1.0)
    _, told = heard(lambda: solve_dae(residual, (0.0, 2.0), torch.tensor([0.0, y1]), args=(p,), **named(method)))
    assert len(told) == 1 and abs(where(told[0]) - 0.5) < 1e-3 and "residual" in str(told[0].message)


def test_once_for_all_rounds():
    p = torch.tensor(0.5, requires_grad=True)
    again = Event(lambda t, y, p: y[0] - 0.8, reset=lambda t, y, p: 0 * y)
    for method in ("tsit5", "auto"):
        assert len(heard(lambda m=method: solve_ivp(slower, (0.0, 9.0), torch.zeros(1), (p,), events=again, method=m))[1]) == 1


def test_compiled_solves_are_looked_at_ever_more_seldom():
    p = torch.tensor(0.5, requires_grad=True)
    fun = lambda t, y, p: 3.0 * slower(t, y, p)  # noqa: E731
    for step_ts in (None, [1.9]):  # straight to the code, and the general way
        said = [len(heard(lambda: solve_ivp(fun, (0.0, 2.0), torch.zeros(1), (p,), step_ts=step_ts, compile=True))[1]) for _ in range(9)]  # noqa: B023
        assert said == ([1, 0, 0, 1, 0, 0, 0, 0, 0] if step_ts is None else [0] * 6 + [1, 0, 0])


@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "bdf", "native tsit5"])
def test_nothing_is_said_of_what_is_declared(method):
    p = torch.tensor(0.5, requires_grad=True)
    solves = [
        lambda: solve_ivp(timed, (0.0, 2.0), torch.ones(1), (p,), step_ts=[0.7371], **named(method)),
        lambda: solve_ivp(
            lambda t, y, u: u(t).unsqueeze(-1) - y,
            (0.0, 2.0),
            torch.ones(1),
            (Forcing([0.0, 0.7371], [p, 0 * p], "constant"),),
            **named(method),
        ),
        lambda: solve_ivp(
            lambda t, y, on, p: torch.where(on == 0, 1.0, 0.2) + 0 * y,
            (0.0, 2.0),
            torch.zeros(1),
            (p,),
            mode=0,
            events=Event(lambda t, y, on, p: y[0] - p, reset=lambda t, y, on, p: (y, on + 1), direction=1),
            **named(method),
        ),
        lambda: solve_ivp(slower, (0.0, 2.0), torch.zeros(1), (p,), events=Event(lambda t, y, p: y[0] - p, terminal=True), **named(method)),
    ]
    for solve in solves:
        assert not heard(solve)[1]


def test_results_are_the_same_to_the_bit(monkeypatch):
    p = torch.tensor(0.5, requires_grad=True)

    def numbers():
        sol, told = heard(lambda: solve_ivp(braked, (0.0, 5.0), torch.eye(2), (p,), batched=True, t_eval="steps"))
        return [sol.t, sol.y, torch.autograd.grad(sol.y.nansum(), p)[0], sol.stats.n_fun], told

    one, told = numbers()
    monkeypatch.setattr("adjoint.sensitivity.problem.tell_of_jumps", lambda *args: None)
    other, none = numbers()
    assert told and not none
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


# --- what is smooth ---


def lotka(t, y, p):
    return torch.stack([y[..., 0] * (1.5 * p - y[..., 1]), y[..., 1] * (y[..., 0] - 3.0)], -1)


def lorenz(t, y, p):
    a, b, c = y.unbind(-1)
    return torch.stack([10 * p * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)


def kepler(t, y, p):
    r3 = (y[..., 0] ** 2 + y[..., 1] ** 2) ** 1.5
    return torch.stack([y[..., 2], y[..., 3], -p * y[..., 0] / r3, -p * y[..., 1] / r3], -1)


def robertson(t, y, p):
    a, b, c = 0.04 * p * y[..., 0], 1e4 * y[..., 1] * y[..., 2], 3e7 * y[..., 1] ** 2
    return torch.stack([-a + b, a - b - c, c], -1)


def vanderpol(t, y, p):
    return torch.stack([y[..., 1], 1000 * p * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def hires(t, y, p):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    fast = 280 * f * h
    return torch.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007 * p,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -fast + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            fast - 1.81 * g,
            -fast + 1.81 * g,
        ],
        -1,
    )


PLAIN = [(lotka, 12.0, [1.0, 1.0]), (lorenz, 5.0, [1.0, 1.0, 1.0]), (kepler, 13.0, [0.1, 0.0, 0.0, 19.0**0.5])]
STIFF = [(robertson, 1e5, [1.0, 0.0, 0.0]), (vanderpol, 2000.0, [2.0, 0.0]), (hires, 321.8, [1.0, 0, 0, 0, 0, 0, 0, 0.0057])]
IMPLICIT = ["kvaerno5", "rodas5p", "radau5", "bdf", "auto"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tight", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.slow_cases("False-kvaerno5", "False-radau5", "False-bdf", "False-abm", "False-auto")
def test_no_false_alarms(method, tight):
    p = torch.tensor(1.0, requires_grad=True)
    for fun, end, y0 in PLAIN + (STIFF if method in IMPLICIT else []):
        for rtol in [1e-8] if method == "bosh3" and tight else [1e-5, 1e-8, 1e-10] if tight else [1e-3, 1e-4]:
            solve = lambda f=fun, e=end, y=y0, r=rtol: solve_ivp(f, (0.0, e), torch.tensor(y), (p,), method=method, rtol=r, atol=1e-3 * r)  # noqa: E731
            assert not heard(solve)[1], (fun.__name__, rtol)


@pytest.mark.parametrize("method", ["native tsit5", *(pytest.param(m, marks=pytest.mark.slow) for m in NATIVE[1:])])
def test_no_false_alarms_of_native_code(method):
    p = torch.tensor(1.0, requires_grad=True)
    for fun, end, y0 in PLAIN[:2] if method == "native tsit5" else PLAIN + STIFF:
        for rtol in (1e-3, 1e-5, 1e-8):
            many = torch.tensor(y0) * torch.linspace(0.9, 1.1, 5).unsqueeze(-1)
            solve = lambda f=fun, e=end, y=many, r=rtol: solve_ivp(  # noqa: E731
                f, (0.0, e), y, (p,), batched=True, rtol=r, atol=1e-3 * r, **named(method)
            )
            assert not heard(solve)[1], (fun.__name__, rtol)


def test_a_steep_front_a_kink_and_noise_are_no_jumps():
    p = torch.tensor(0.5, requires_grad=True)
    steep = lambda t, y, p: 0.6 - 0.4 * torch.tanh(1e4 * (y - p))  # noqa: E731
    assert not heard(lambda: solve_ivp(steep, (0.0, 2.0), torch.zeros(1), (p,), rtol=1e-8))[1]
    kink = lambda t, y, p: 1.0 - 5.0 * torch.relu(y - p)  # noqa: E731
    assert not heard(lambda: solve_ivp(kink, (0.0, 2.0), torch.zeros(1), (p,), rtol=1e-10, atol=1e-12))[1]


def test_what_is_missing():
    """A jump at ``y = c`` from slope 1 to q: ``y(T) = c + q (T - c)``, of which a step over it gives nothing in place of 1 - q in c; with a
    mode it is whole (docs/hybrid.md)."""
    c, q = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)
    fun = lambda t, y, c, q: torch.where(y < c, 1.0, q)  # noqa: E731
    sol, told = heard(lambda: solve_ivp(fun, (0.0, 2.0), torch.zeros(1), (c, q), rtol=1e-9, atol=1e-11))
    assert told and abs(float(sol.y[-1, 0]) - 0.8) < 1e-8
    (lacking,) = torch.autograd.grad(sol.y[-1, 0], c, materialize_grads=True)
    assert abs(float(lacking) - 0.0) < 1e-6  # (1 - q) dt/dc is all of it
    event = Event(lambda t, y, on, c, q: y[0] - c, direction=1, reset=lambda t, y, on, c, q: (y, on + 1))
    fun = lambda t, y, on, c, q: torch.where(on == 0, 1.0, q) + 0 * y  # noqa: E731
    sol = solve_ivp(fun, (0.0, 2.0), torch.zeros(1), (c, q), events=event, mode=0)
    assert abs(float(sol.y[-1, 0]) - 0.8) < 1e-12
    found = torch.autograd.grad(sol.y[-1, 0], [c, q])
    assert abs(float(found[0]) - 0.8) < 1e-12 and abs(float(found[1]) - 1.5) < 1e-12


@pytest.mark.parametrize("method", ["tsit5", "kvaerno3", "native tsit5", "dae"])
@pytest.mark.parametrize("end", [0, 1])
def test_a_jump_at_an_end_that_is_differentiated(method, end):
    """The slope there is that beyond it: told of, and right where it is named."""
    knots, levels = torch.tensor([0.5, 1.0]), torch.tensor([7.0, 1.0, 20.0])
    # at the start the other side counts
    table = lambda t, y: levels[((t >= knots) if end else (t > knots)).sum()] + 0 * y  # noqa: E731

    def solve(**more):
        span = [torch.tensor(x, requires_grad=True) for x in (0.5, 1.0)]
        if method == "dae":
            y = solve_dae(lambda t, y, yp: yp - table(t, y), tuple(span), torch.zeros(1), torch.ones(1) * (1 if end else 7.0), **more).y[-1]
        else:
            y = solve_ivp(table, tuple(span), torch.zeros(1), **named(method), **more).y[-1]
        return torch.autograd.grad(y.sum(), span[end])[0].item()

    _, told = heard(solve)
    assert [where(x) for x in told] == [[0.5, 1.0][end]] and "end of the span" in str(told[0].message)
    if method != "dae":
        found, told = heard(lambda: solve(step_ts=knots))
        assert not told and found == pytest.approx([-1.0, 1.0][end])
