"""`abm` by compiled code: the steps, orders, counts and records of the eager engine, and what goes on from them."""

from __future__ import annotations

import warnings

import pytest
import torch

import adjoint
from adjoint.methods import Adams

from .solves import pair, same

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64
Y0 = torch.tensor([1.0, 1.5], dtype=F64)
P = torch.tensor([1.1, 0.9], dtype=F64)


def hunts(t, y, p):
    """Lotka and Volterra's equations, in a climate that changes."""
    a, b = y.unbind(-1)
    return torch.stack([p[..., 0] * a - a * b, a * b * (1 + 0.1 * torch.sin(t)) - p[..., 1] * b], -1)


def spread(rows):
    factor = torch.linspace(0.9, 1.1, rows, dtype=F64).unsqueeze(-1)
    return Y0 * factor, P * factor


def given(rows):
    return spread(rows) if rows else (Y0, P)


@pytest.mark.parametrize("tol", [1e-3, 1e-6, 1e-10])
@pytest.mark.parametrize("rows", [0, 3, 20])
@pytest.mark.slow_cases("20-1e-10", "0-0.001", "3-1e-06")
def test_every_count(rows, tol):
    """Values and gradients but for rounding, by one trajectory and by lanes, at the end and at samples."""
    y0, p = given(rows)
    options = {"method": "abm", "batched": bool(rows), "rtol": tol, "atol": 1e-2 * tol}
    same(pair(hunts, (0.0, 6.0), y0, (p,), **options), 1e-10)
    found = pair(hunts, (0.0, 6.0), y0, (p,), t_eval=torch.tensor([0.0, 1.3, 1.3, 4.4, 6.0], dtype=F64), **options)
    same(found, 1e-10)


@pytest.mark.parametrize("order", [1, 3, 12])
def test_orders(order):
    """The lowest possible one takes shorter steps; what they converge to is one solution."""
    method = Adams(order)
    same(pair(hunts, (0.0, 2.0), Y0, (P,), method=method, rtol=1e-3), 1e-10)
    options = {"rtol": 1e-8, "atol": 1e-10, "compile": True}
    tight, fine = (adjoint.solve_ivp(hunts, (0.0, 2.0), Y0, (P,), method=m, **options).y[-1] for m in (method, "dopri8"))
    torch.testing.assert_close(tight, fine, rtol=3e-6 if order == 1 else 1e-7, atol=0)


@pytest.mark.parametrize("rows", [0, 20])
def test_forms(rows):
    """Backwards, spans of their own, all steps, the dense output, single precision, limits of the steps."""
    y0, p = given(rows)
    options = {"method": "abm", "batched": bool(rows)}
    same(pair(hunts, (6.0, 0.0), y0, (p,), t_eval=torch.tensor([5.0, 2.0, 0.0], dtype=F64), **options), 1e-9)
    if rows:
        ends = torch.linspace(0.0, 5.0, rows, dtype=F64)
        same(pair(hunts, (torch.zeros_like(ends), ends), y0, (p,), **options), 1e-10)
    found = pair(hunts, (0.0, 6.0), y0, (p,), t_eval="steps", **options)
    same(found, 1e-10)
    torch.testing.assert_close(found[0][0].t, found[1][0].t, rtol=1e-10, atol=1e-10, equal_nan=True)
    found = pair(hunts, (0.0, 6.0), y0, (p,), dense_output=True, **options)
    same(found, 1e-10)
    torch.testing.assert_close(found[0][0](2.345), found[1][0](2.345), rtol=1e-10, atol=1e-10)
    same(pair(hunts, (0.0, 3.0), y0, (p,), max_step=0.05, **options), 1e-10)
    same(pair(hunts, (0.0, 3.0), y0, (p,), first_step=0.01, **options), 1e-10)
    same(pair(hunts, (0.0, 3.0), y0.float(), (p.float(),), rtol=1e-3, atol=1e-4, **options), 1e-3, ())


@pytest.mark.parametrize("rows", [0, 20])
def test_named_times_and_derivatives_in_times(rows):
    def kicked(t, y, p):
        push = (t > 0.7).to(t.dtype) - (t > 1.3).to(t.dtype)
        return hunts(t, y, p) + 0.5 * torch.stack([torch.zeros_like(push), push], -1)

    y0, p = given(rows)
    options = {"method": "abm", "batched": bool(rows), "rtol": 1e-6, "atol": 1e-8}
    same(pair(kicked, (0.0, 2.0), y0, (p,), step_ts=[0.7, 1.3], t_eval=torch.tensor([0.5, 0.7, 2.0], dtype=F64), **options), 1e-10)
    found = []
    for compile in (True, False):
        span, times, at = (torch.tensor(x, dtype=F64, requires_grad=True) for x in ([0.1, 2.1], [0.3, 1.1, 1.9], [0.7, 1.3]))
        y = adjoint.solve_ivp(kicked, span, y0, (p,), step_ts=at, t_eval=times, compile=compile, **options).y
        found.append(torch.autograd.grad((y * torch.cos(torch.arange(y.numel(), dtype=F64)).reshape(y.shape)).sum(), (span, times, at)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_record_is_the_eager_one(monkeypatch):
    """Orders and past times of all steps, and their stages, with a named time between."""
    from adjoint.sensitivity.problem import Problem

    seen = []
    run = Problem.run
    monkeypatch.setattr(Problem, "run", lambda self, *args: seen.append((self, run(self, *args))) or seen[-1][1])
    for rows in (0, 18):
        y0, p = given(rows)
        pair(hunts, (0.0, 3.0), y0, (p,), method="abm", batched=bool(rows), step_ts=[1.1])
        (problem, mine), (_, theirs) = seen[-2:]
        assert problem.native.recognised is not None
        assert torch.equal(mine.extra[:, 0], theirs.extra[:, 0]) and set(mine.extra[:, 0].unique().tolist()) >= {1.0, 2.0, 3.0, 4.0}
        for name in ("extra", "t", "h", "states", "stages"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-7, atol=1e-7)
        assert torch.equal(mine.lands, theirs.lands) and torch.equal(mine.segment, theirs.segment)


def test_a_long_record():
    """More steps than there was room for at first, in the first solve of as many rows."""
    for rows in (0, 17):
        y0, p = given(rows)
        found = pair(hunts, (0.0, 6.0), y0, (p,), method="abm", batched=bool(rows), t_eval="steps", max_step=0.05)
        assert int(torch.as_tensor(found[0][0].stats.n_accepted).max()) > 120
        same(found, 1e-10)


def test_other_derivatives_go_on_from_the_record():
    def end(p, compile, **options):
        return adjoint.solve_ivp(hunts, (0.0, 0.5), Y0, (p,), method="abm", rtol=1e-3, compile=compile, **options).y[-1].square().sum()

    for transform in (torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        mine, theirs = (transform(lambda p, x=x: end(p, x))(P) for x in (True, False))
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)
    for gradient in (adjoint.Backprop(), adjoint.InterpolatingAdjoint(), adjoint.GaussAdjoint()):
        found = []
        for compile in (True, False):
            p = P.clone().requires_grad_()
            found += torch.autograd.grad(end(p, compile, gradient=gradient), p)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


def test_maps_and_integrals():
    def total(p, compile):
        keys = {"method": "abm", "quadrature": lambda t, y, p: y.square().sum(-1, keepdim=True), "rtol": 1e-4, "compile": compile}
        sol = adjoint.solve_ivp(hunts, (0.0, 0.5), Y0, (p,), t_eval=torch.tensor([0.3, 0.5], dtype=F64), **keys)
        return sol.quadrature.sum() + sol.y.sum()

    p = spread(18)[1]
    mine, theirs = (torch.vmap(torch.func.grad(lambda p, x=x: total(p, x)))(p) for x in (True, False))
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def crowded(t, y, p):
    return y[..., 0] - 1.2


crowded.terminal = 2


def equal(t, y, p):
    return y[..., 0] - y[..., 1]


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.slow_cases("20")
def test_events(rows):
    y0, p = given(rows)
    found = []
    for compile in (True, False):
        q = p.clone().requires_grad_()
        options = {"method": "abm", "events": [crowded, equal], "rtol": 1e-8, "atol": 1e-10, "batched": bool(rows), "compile": compile}
        sol = adjoint.solve_ivp(hunts, (0.0, 30.0), y0, (q,), **options)
        assert bool((torch.as_tensor(sol.status) == 1).all())
        values = [x.nan_to_num() for x in (*sol.t_events, *sol.y_events)]
        found.append([*values, *torch.autograd.grad(sum(x.sum() for x in values), q)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_what_failed_says_so():
    def blows_up(t, y, p):
        return p[..., :1] * y * y

    for options in ({}, {"max_steps": 12}):
        found = []
        for compile in (True, False):
            y0, p = torch.ones(3, 1, dtype=F64), torch.tensor([[0.2], [3.0], [float("nan")]], dtype=F64)
            sol = adjoint.solve_ivp(blows_up, (0.0, 1.0), y0, (p,), method="abm", batched=True, compile=compile, throw=False, **options)
            found.append(sol.status)
        assert torch.equal(*found) and bool((found[0] < 0).any())


def test_again_with_other_numbers():
    """Values alone straight by the compiled code, which is told of nothing else; gradients with a look at the steps."""
    for factor in (1.0, 1.05, 1.1):
        same(pair(hunts, (0.0, 3.0), Y0, (P * factor,), method="abm"), 1e-10)
        y, want = (adjoint.solve_ivp(hunts, (0.0, 3.0), Y0, (P * factor,), method="abm", compile=x).y for x in (True, False))
        torch.testing.assert_close(y, want, rtol=1e-11, atol=0)


def test_many_trajectories_are_those_of_few():
    """Registers side by side, of every width."""
    y0, p = spread(150)
    many = adjoint.solve_ivp(hunts, (0.0, 6.0), y0, (p,), method="abm", batched=True, compile=True)
    for rows in (slice(0, 3), slice(70, 90)):
        few = adjoint.solve_ivp(hunts, (0.0, 6.0), y0[rows], (p[rows],), method="abm", batched=True, compile=True)
        assert torch.equal(few.stats.n_fun, many.stats.n_fun[rows])
        torch.testing.assert_close(few.y, many.y[:, rows], rtol=1e-10, atol=1e-10)


def slowly(t, y, k):
    return -k * y


def swings(t, y, mu):
    a, b = y.unbind(-1)
    return torch.stack([b, mu[..., 0] * (1 - a * a) * b - a], -1)


def test_steps_that_are_too_long_for_derivatives():
    """At rest steps are as long as the span, whatever a displacement would do, and elsewhere now and then longer than stability allows:
    as without native code, such solves are made with a displacement beside, alone and among others."""
    warnings.filterwarnings("ignore", "compile=True", RuntimeWarning)
    k = torch.tensor([2.0], dtype=F64)
    for start in ([0.0], [[1.0], [0.0], [0.5]]):
        y0 = torch.tensor(start, dtype=F64, requires_grad=True)
        y = adjoint.solve_ivp(slowly, (0.0, 3.0), y0, (k,), method="abm", batched=y0.dim() > 1, compile=True).y[-1]
        (slope,) = torch.autograd.grad(y.sum(), y0, create_graph=True)
        torch.testing.assert_close(slope, torch.exp(-3 * k).expand_as(slope), rtol=2e-3, atol=0)
    y0, mu = torch.tensor([2.0, 0.0], dtype=F64), torch.ones(1, dtype=F64)

    def end(mu, **options):
        return adjoint.solve_ivp(swings, (0.0, 5.0), y0, (mu,), compile=True, **options).y[-1]

    options = {"method": "abm", "rtol": 1e-7}, {"method": "dopri8", "rtol": 1e-11}
    found = [torch.func.jacrev(lambda m, o=o: end(m, **o))(mu) for o in options]
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)
