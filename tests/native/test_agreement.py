"""Compiled code is compared with ``fun`` where it is used for the first time: code that was made wrongly is not used."""

from __future__ import annotations

import itertools
import math
import warnings
from types import FunctionType

import pytest
import torch

from adjoint import GaussAdjoint, SolveError, solve_dae, solve_ivp
from adjoint.native import reverse
from adjoint.native.operators import READERS

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]


_numbers = itertools.count()


def wrong_value(monkeypatch):
    monkeypatch.setitem(READERS, "sin", READERS["cos"])


def wrong_slope(monkeypatch):
    monkeypatch.setitem(reverse.RULES, "sin", reverse.RULES["cos"])


def swing(t, y, length, damping):
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -torch.sin(angle) / length - damping * speed], -1)


def hit(t, y, p):
    return torch.sin(y[0]) - 0.5


def steady(t, y, p):
    return p * torch.ones_like(y)


def anew(function):
    """A function whose code nobody has compiled."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__)


def pendulums(rows):
    """Each with a length of its own, and one damping of all."""

    length = torch.linspace(0.8, 1.2, max(rows, 1), dtype=torch.float64)
    length = (length if rows else length[0]).clone().requires_grad_()
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y0 = y0.repeat(rows, 1) if rows else y0
    return y0, (length, torch.tensor(0.1, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize(
    ("method", "fault", "rows"),
    [
        ("tsit5", wrong_value, 0),
        ("tsit5", wrong_slope, 0),
        ("tsit5", wrong_value, 20),
        ("tsit5", wrong_slope, 70),
        ("kvaerno5", wrong_slope, 20),
    ],
)
def test_code_that_is_wrong(monkeypatch, method, fault, rows):
    fun = anew(swing)

    def solved(compile):
        y0, args = pendulums(rows)
        sol = solve_ivp(fun, (0.0, 1.0), y0, args=args, method=method, batched=rows > 0, compile=compile)
        return sol.y[-1], *torch.autograd.grad(sol.y[-1].sin().sum(), args)

    known = solved(False)
    fault(monkeypatch)
    with pytest.warns(RuntimeWarning, match="compiled code gives other values or derivatives than fun"):
        found = solved(True)
    for a, b in zip(found, known, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=0)


def test_an_event_that_is_wrong(monkeypatch):
    p, y0 = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    wrong_value(monkeypatch)
    with pytest.warns(RuntimeWarning, match="compiled code gives other values or derivatives than fun"):
        sol = solve_ivp(anew(steady), (0.0, 1.0), y0, args=(p,), events=anew(hit), compile=True)
    torch.testing.assert_close(sol.events[0].t, torch.tensor([math.pi / 6], dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("rows", [0, 70])
def test_what_a_solve_went_by_is_known_later_on(rows):
    """Slopes that all but cancel, along a slow manifold, and a table that jumps at the starts of steps are no change; a change is."""
    table = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)

    class Fast:
        rate = 1e9

    fast = Fast()

    def fun(t, y, p):
        pull = fast.rate * (y[..., 1] - y[..., 0].square())
        return torch.stack([-p * y[..., 0] + table[(t * 4).floor().long().clamp(0, 3)], -pull], -1)

    y0 = torch.tensor([1.0, 1.0], dtype=torch.float64).repeat(rows, 1) if rows else torch.tensor([1.0, 1.0], dtype=torch.float64)

    def gradient():
        p = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="compile=True")
            warnings.filterwarnings("ignore", message="fun jumps")
            options = {"method": "radau5", "compile": True, "gradient": GaussAdjoint(), "batched": rows > 0}
            sol = solve_ivp(fun, (0.0, 1.0), y0, args=(p,), **options)
        return p, sol.y[-1].sum()

    p, loss = gradient()
    assert torch.isfinite(torch.autograd.grad(loss, p)[0])
    p, loss = gradient()
    fast.rate = 2e9
    with pytest.raises(SolveError, match="another function than in the solve"):
        torch.autograd.grad(loss, p)


@pytest.mark.parametrize("form", ["closure", "argument", "module", "tracer", "implicit"])
def test_first_solves_in_inference_mode(form):
    """Functions are read and compared there as elsewhere, and what was read there is good for derivatives later on."""
    k = torch.tensor(0.7, dtype=torch.float64)
    layer = torch.nn.Linear(2, 2, dtype=torch.float64)
    fun = {
        "closure": lambda t, y: -k * y.sin(),
        "argument": lambda t, y, k: -k * y.sin(),
        "module": lambda t, y: layer(y).tanh(),
        "tracer": lambda t, y: -y * len([x for x in range(2)]),
        "implicit": lambda t, y, yp: yp + k * y.sin(),
    }[form]

    def solved(compile):
        y0, args = torch.ones(2, dtype=torch.float64), (torch.tensor(0.7, dtype=torch.float64),) if form == "argument" else ()
        return (solve_dae if form == "implicit" else solve_ivp)(fun, (0.0, 0.5), y0, args=args, compile=compile).y[-1]

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        inside = solved(True)
    known = solved(False)
    torch.testing.assert_close(inside.clone(), known, rtol=1e-9, atol=0)
    torch.testing.assert_close(solved(True), known, rtol=1e-9, atol=0)
    if form == "module":
        gradients = [torch.autograd.grad(solved(compile).sum(), layer.weight)[0] for compile in (True, False)]
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solve", [solve_ivp, solve_dae])
@pytest.mark.parametrize("shape, rows", [((0,), 0), ((0, 2), 2)])
def test_a_tensor_without_entries_is_compared_too(solve, shape, rows):
    """``y' = -k y``, with the sum of nothing beside it."""
    none, k = torch.zeros(shape, dtype=torch.float64, requires_grad=True), torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones((rows, 1) if rows else 2, dtype=torch.float64)
    if solve is solve_ivp:
        given = ((lambda t, y, none, k: -k * y + none.sum()), (0.0, 1.0), y0)
    else:
        given = ((lambda t, y, yp, none, k: yp + k * y + none.sum()), (0.0, 1.0), y0, None)
    with warnings.catch_warnings():
        # whatever is not compiled is told of
        warnings.simplefilter("error")
        sol = solve(*given, (none, k), batched=rows > 0, compile=True, rtol=1e-8, atol=1e-10)
    by_none, by_k = torch.autograd.grad(sol.y[-1].sum(), (none, k))
    assert by_none.shape == shape
    assert float(by_k) == pytest.approx(-2 * math.exp(-0.5), rel=1e-6)
