"""Derivatives of compiled solves where the state itself asks for no small steps: at rest, constant, on a slow manifold."""

from __future__ import annotations

import math
import warnings
from functools import cache

import pytest
import torch

import adjoint

from ..sensitivity.test_resting import CASES, jacobian

pytestmark = [pytest.mark.compile, pytest.mark.usefixtures("no_fallback")]

METHODS = ["tsit5", "dopri8", "kvaerno5", "rodas5p", "radau5", "bdf"]


@pytest.fixture
def natively(monkeypatch):
    """Nothing is solved without compiled code."""

    def refuses(*args, **options):
        raise AssertionError("this solve was made uncompiled")

    monkeypatch.setattr("adjoint.sensitivity.problem.integrate", refuses)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in ("chain", "fast mode") else pytest.mark.slow) for c in CASES])
@pytest.mark.parametrize("method", METHODS)
def test_linear_equations_against_the_matrix_exponential(method, case):
    fun, a, span, y0 = CASES[case]
    tight = method in ("bdf", "kvaerno5")
    options = {"method": method, "rtol": 1e-7 if tight else 1e-5, "atol": 1e-9 if tight else 1e-7, "compile": True}
    found = jacobian(lambda y: adjoint.solve_ivp(fun, (0.0, span), y, **options).y[-1], y0)
    torch.testing.assert_close(found, torch.linalg.matrix_exp(span * a), rtol=0, atol=1e-4)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_zero(method):
    """Of an input that is switched off: only what it would do asks for steps."""

    def forced(t, y, k):
        return -y + k * torch.sin(20 * t)

    y0, k = torch.zeros(1, requires_grad=True), torch.tensor(0.0, requires_grad=True)
    sol = adjoint.solve_ivp(forced, (0.0, 3.0), y0, (k,), method=method, rtol=1e-7, atol=1e-9, compile=True)
    by_y0, by_k = torch.autograd.grad(sol.y[-1].sum(), (y0, k))
    assert float(by_y0) == pytest.approx(math.exp(-3), rel=1e-6)
    assert float(by_k) == pytest.approx((math.sin(60) - 20 * math.cos(60) + 20 * math.exp(-3)) / 401, abs=1e-5)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_a_slow_manifold(rtol):
    """The error of the state lets explicit steps grow beyond their stability."""

    def drawn_in(t, y, k):
        a, b = y.unbind(-1)
        return torch.stack([-0.1 * a, -1000.0 * (b - a) - 0.1 * a * k], -1)

    y0, k = torch.ones(2, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = adjoint.solve_ivp(drawn_in, (0.0, 1.0), y0, args=(k,), method="dopri5", compile=True, rtol=rtol, atol=rtol).y[-1]
    slope, by_k = torch.autograd.grad(y.sum(), (y0, k))
    # the fast component is drawn to a(t) (1000 - 0.1 k) / 999.9
    a = math.exp(-0.1)
    torch.testing.assert_close(slope, torch.tensor([2 * a, 0.0]), rtol=0, atol=rtol)
    assert float(by_k) == pytest.approx(-0.1 / 999.9 * a, rel=rtol)


def slowing(t, y, k):
    a, b = y.unbind(-1)
    return torch.stack([0 * a, torch.where(t > 4.5, torch.nan, 1.0) * (a * torch.cos(b) - k * b)], -1)


def low(t, y, k):
    return y[..., 1] - 0.2


def solved(method, rows=slice(None), compile=True, **options):
    """Forty with a component that is constant, every third wholly at rest; some whose spans reach what is no number, one that is no number
    at once, one without a span; samples, dense output and events."""
    ends = torch.linspace(1, 5, 40)
    ends[7] = 0.0
    y0 = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    y0[::3], y0[11] = 0.0, torch.nan
    y0, k = y0[rows].requires_grad_(), torch.linspace(0.5, 2, 40)[rows].requires_grad_()
    times = torch.linspace(0, 1, 5).unsqueeze(-1) * ends[rows]
    keys = {"rtol": 1e-7, "atol": 1e-9, **options, "throw": False, "batched": True, "compile": compile}
    sol = adjoint.solve_ivp(slowing, (0.0, ends[rows]), y0, (k,), t_eval=times, method=method, events=[low], **keys)
    loss = (sol.y.nan_to_num() ** 2).sum() + sol.t_events[0].nan_to_num().sum() + sol.y_events[0].nan_to_num().sum()
    return sol, torch.autograd.grad(loss, (y0, k))


@cache
def tightly_solved():
    """The truth, without compiled code."""
    return solved("dopri8", compile=False, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("natively")
@pytest.mark.parametrize("method", ["tsit5", "rodas5p", "kvaerno5"])
@pytest.mark.slow_cases("kvaerno5", "tsit5")
def test_some_of_many(method, monkeypatch):
    sol, bars = solved(method)
    # what rows are beside does not matter
    for rows in (slice(6, 13), slice(36, 40)):
        few, some = solved(method, rows)
        assert torch.equal(few.status, sol.status[rows])
        torch.testing.assert_close(few.y, sol.y[:, rows], rtol=1e-12, atol=1e-14, equal_nan=True)
        reached = few.status >= 0
        for x, y in zip(some, bars, strict=True):
            torch.testing.assert_close(x[reached], y[rows][reached], rtol=1e-8, atol=1e-10)
    monkeypatch.undo()
    tight, wanted = tightly_solved()
    assert torch.equal(sol.status, tight.status) and {-3} < set(sol.status.tolist())
    fine = sol.status >= 0
    torch.testing.assert_close(sol.y[:, fine], tight.y[:, fine], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sol.t_events[0][:, fine], tight.t_events[0][:, fine], rtol=1e-5, atol=1e-6, equal_nan=True)
    for x, y in zip(bars, wanted, strict=True):
        torch.testing.assert_close(x[fine], y[fine], rtol=2e-4, atol=2e-4)


@pytest.mark.usefixtures("natively")
def test_single_precision():
    y0 = torch.zeros(20, 2, dtype=torch.float32, requires_grad=True)
    turns = lambda t, y: torch.stack([y[..., 1], -y[..., 0]], -1)  # noqa: E731
    y = adjoint.solve_ivp(turns, (0.0, 6.0), y0, method="tsit5", batched=True, rtol=1e-4, atol=1e-5, compile=True).y[-1]
    (slope,) = torch.autograd.grad(y[:, 0].sum(), y0)
    torch.testing.assert_close(slope, torch.tensor([math.cos(6), math.sin(6)], dtype=torch.float32).expand(20, 2), rtol=0, atol=5e-3)


@pytest.mark.usefixtures("natively")
def test_second_derivatives_and_continuous_adjoints_go_on_from_its_record():
    def chain(t, y, k):
        return torch.stack([-k * y[0], k * y[0] * (1 + y[1]) - y[1]])

    def end(y0, gradient):
        keys = {"method": "tsit5", "rtol": 1e-8, "atol": 1e-10, "compile": True, "gradient": gradient}
        return adjoint.solve_ivp(chain, (0.0, 2.0), y0, (torch.tensor(1.5),), **keys).y[-1, 1]

    zero = torch.zeros(2)
    slope, again = (torch.func.grad(end)(zero, g) for g in (adjoint.DiscreteAdjoint(), adjoint.QuadratureAdjoint()))
    torch.testing.assert_close(again, slope, rtol=1e-6, atol=1e-7)
    bent = torch.func.hessian(lambda y: end(y, adjoint.DiscreteAdjoint()))(zero)
    more, less = ([torch.func.grad(end)(d, adjoint.DiscreteAdjoint()) for d in s * 1e-4 * torch.eye(2)] for s in (1.0, -1.0))
    torch.testing.assert_close(bent, torch.stack([(a - b) / 2e-4 for a, b in zip(more, less, strict=True)]), rtol=1e-3, atol=1e-4)


def test_a_displacement_that_cannot_be_followed():
    """The root has no slope at zero: without compiled code such solves go on, and so does this one, which says so."""
    rests = lambda t, y: torch.stack([-torch.sqrt(y[0]), -y[1]])  # noqa: E731
    y0 = torch.tensor([0.0, 1.0], requires_grad=True)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        y = adjoint.solve_ivp(rests, (0.0, 1.0), y0, compile=True).y[-1]
    assert any("displacement beside it could not be followed" in str(x.message) for x in told)
    assert float(y[1].detach()) == pytest.approx(math.exp(-1), rel=1e-3)


def test_an_event_that_ends_a_solve_is_no_instability(natively):
    """The last step ends before it, and what is looked at there is the state at its end."""

    def swings(t, y, p):
        a, b = p.unbind(-1)
        x, v = y.unbind(-1)
        return torch.stack([v, -a * x - b * v * x * x + 0.3 * torch.sin(t)], -1)

    def ends(t, y, p):
        return y[..., 0] + 0.5

    ends.terminal = True
    p = torch.tensor([1.1, 0.1], requires_grad=True)
    steps = []
    for wanted in (True, False):
        keys = {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9, "compile": True, "events": [ends]}
        sol = adjoint.solve_ivp(swings, (0.0, 12.0), torch.tensor([1.0, 0.2]), (p if wanted else p.detach(),), **keys)
        steps.append(sol.stats.n_steps)
    assert steps[0] == steps[1]
