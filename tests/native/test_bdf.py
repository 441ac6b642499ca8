"""`bdf` by compiled code: the steps, orders, counts and records of the eager engine, and what goes on from them."""

from __future__ import annotations

import pytest
import torch

import adjoint
from benchmarks.frameworks import torch_function
from benchmarks.stiff_problems import STIFF

from ..helpers.stiff_problems import HIRES, HIRES_END, HIRES_Y0, ROBER_40, ROBER_40_JACOBIAN, ROBER_P, hires, rober
from .solves import pair, same

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.parametrize("name", ["robertson", "hires", "vdpol", pytest.param("pollu", marks=pytest.mark.slow)])
@pytest.mark.slow_cases("hires-20", "robertson-0")
def test_stiff_problems(name, rows):
    """Every count; values and gradients but for rounding, by one trajectory and by lanes, each with parameters of its own."""
    problem = STIFF[name]
    fun = torch_function(problem.rate, problem.vector)
    y0, p = torch.tensor(problem.y0), torch.tensor(problem.p)
    if rows:
        y0, p = y0.repeat(rows, 1), p * torch.linspace(0.9, 1.1, rows, dtype=F64).unsqueeze(-1)
    same(pair(fun, (0.0, problem.gradient_end), y0, (p,), atol=1e-5 * problem.small, batched=bool(rows)), 1e-7)


def test_published_values():
    y0, p = torch.tensor([1.0, 0.0, 0.0], dtype=F64), ROBER_P.clone().requires_grad_()
    options = {"method": "bdf", "rtol": 1e-9, "atol": 1e-13, "compile": True}
    y = adjoint.solve_ivp(rober, (0.0, 40.0), y0, (p,), **options).y[-1]
    torch.testing.assert_close(y[:2].detach(), ROBER_40, rtol=1e-7, atol=0)
    slopes = torch.stack([torch.autograd.grad(y[i], p, retain_graph=True)[0] for i in range(2)])
    torch.testing.assert_close(slopes, ROBER_40_JACOBIAN, rtol=1e-5, atol=0)
    y = adjoint.solve_ivp(hires, (0.0, HIRES_END), HIRES_Y0, **options).y[-1]
    torch.testing.assert_close(y, HIRES, rtol=1e-6, atol=1e-9)


def turns(t, y, p):
    """Turns, is damped, and is pushed by the time."""
    x, v = y.unbind(-1)
    return torch.stack([v - 0.1 * x, -p[..., 0] * x - p[..., 1] * v + torch.sin(t)], -1)


Y0 = torch.tensor([1.0, 0.5], dtype=F64)
P = torch.tensor([40.0, 0.3], dtype=F64)


def spread(rows):
    return Y0.repeat(rows, 1), P * torch.linspace(0.8, 1.2, rows, dtype=F64).unsqueeze(-1)


def test_spans_of_their_own_and_of_no_length():
    """Trajectories that end at once, among others, in lanes and one by one."""
    for rows in (3, 21, 70):
        y0, p = spread(rows)
        ends = torch.linspace(0.0, 0.8, rows, dtype=F64)
        ends[1] = 0.0
        span = torch.stack([torch.zeros_like(ends), ends])
        times = torch.linspace(0, 1, 4, dtype=F64).unsqueeze(-1) * ends
        for t_eval in (None, times):
            same(pair(turns, span, y0, (p,), batched=True, t_eval=t_eval), 1e-9)


def test_a_long_record():
    """More steps than there was room for at first, in the first solve of as many rows."""
    for rows in (0, 17):
        y0, p = spread(rows) if rows else (Y0, P)
        found = pair(turns, (0.0, 1.5), y0, (p,), batched=bool(rows), t_eval="steps")
        assert int(torch.as_tensor(found[0][0].stats.n_accepted).max()) > 70
        same(found, 1e-7)


def test_the_record_is_the_eager_one(monkeypatch):
    """Orders, distances and forgotten differences of all steps, with a named time between."""
    from adjoint.sensitivity.problem import Problem

    seen = []
    run = Problem.run
    monkeypatch.setattr(Problem, "run", lambda self, *args: seen.append(run(self, *args)) or seen[-1])
    for rows in (0, 18):
        y0, p = spread(rows) if rows else (Y0, P)
        pair(turns, (0.0, 3.0), y0, (p,), batched=bool(rows), step_ts=[1.1])
        mine, theirs = seen[-2:]
        assert torch.equal(mine.extra[:, 0], theirs.extra[:, 0]) and set(mine.extra[:, 0].unique().tolist()) >= {1.0, 2.0, 3.0, 4.0}
        assert torch.equal(mine.extra[:, 2], theirs.extra[:, 2]) and (mine.extra[:, 2] == 0).sum() == max(rows, 1)
        for name in ("extra", "t", "h", "states"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)
        assert torch.equal(mine.lands, theirs.lands) and torch.equal(mine.segment, theirs.segment)
        # of ODEs only derivatives in times need the differences
        assert not len(mine.stages) and not len(theirs.stages)


def test_other_derivatives_go_on_from_the_record():
    def end(p, compile, **options):
        return adjoint.solve_ivp(turns, (0.0, 0.3), Y0, (p,), method="bdf", rtol=1e-3, compile=compile, **options).y[-1].square().sum()

    for transform in (torch.func.hessian, torch.func.jacfwd, torch.func.jacrev):
        mine, theirs = (transform(lambda p, x=x: end(p, x))(P) for x in (True, False))
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    for gradient in (adjoint.Backprop(), adjoint.InterpolatingAdjoint(), adjoint.GaussAdjoint()):
        found = []
        for compile in (True, False):
            p = P.clone().requires_grad_()
            found += torch.autograd.grad(end(p, compile, gradient=gradient), p)
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


def test_maps_and_integrals():
    def total(p, compile):
        keys = {"method": "bdf", "quadrature": lambda t, y, p: y.square().sum(-1, keepdim=True), "rtol": 1e-4, "compile": compile}
        sol = adjoint.solve_ivp(turns, (0.0, 0.4), Y0, (p,), t_eval=torch.tensor([0.3, 0.4], dtype=F64), **keys)
        return sol.quadrature.sum() + sol.y.sum()

    p = spread(18)[1]
    mine, theirs = (torch.vmap(torch.func.grad(lambda p, x=x: total(p, x)))(p) for x in (True, False))
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_what_failed_says_so():
    def blows_up(t, y, p):
        return p[..., :1] * y * y

    def never(t, y, p):
        late = ((t > 0.5) & (p[..., 0] > 1)).unsqueeze(-1)
        return torch.where(late, torch.sign(torch.sin(1e9 * y)), -y)

    for fun in (blows_up, never):
        found = []
        for compile in (True, False):
            y0, p = torch.ones(2, 1, dtype=F64), torch.tensor([[0.2], [3.0]], dtype=F64)
            sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (p,), method="bdf", batched=True, compile=compile, throw=False, max_steps=150)
            found.append(sol.status)
        assert torch.equal(*found) and bool((found[0] < 0).any())


def test_again_with_other_numbers():
    """Straight to the compiled code, which is told of nothing else."""
    for factor in (1.0, 1.1, 1.2):
        same(pair(turns, (0.0, 1.0), Y0, (P * factor,)), 1e-9)
        y0, p = spread(18)
        same(pair(turns, (0.0, 1.0), y0, (p * factor,), batched=True, t_eval=torch.tensor([0.2, 0.9], dtype=F64)), 1e-9)
