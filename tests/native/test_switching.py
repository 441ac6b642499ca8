"""`auto` by compiled code: every phase has the steps of the eager engine, and ends where that ends."""

from __future__ import annotations

import itertools

import pytest
import torch

import adjoint
from adjoint.methods import METHODS, AutoSwitch

from ..helpers.stiff_problems import ROBER_40, ROBER_40_JACOBIAN, ROBER_P, rober
from .solves import COUNTS, pair, same

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults, pytest.mark.usefixtures("no_fallback")]
F64 = torch.float64
Y0 = torch.tensor([2.0, 0.0], dtype=F64)


def vdpol(t, y, mu):
    return torch.stack([y[..., 1], mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def spread(rows):
    """From no stiffness at all to a good deal."""
    return Y0.repeat(rows, 1), torch.logspace(0, 2, rows, dtype=F64)


def solved(compile, span, y0, mu, **options):
    """A solution, and its gradients."""
    y0, mu = y0.clone().requires_grad_(), mu.clone().requires_grad_()
    sol = adjoint.solve_ivp(vdpol, span, y0, (mu,), compile=compile, **{"method": "auto", "rtol": 1e-5, "atol": 1e-8} | options)
    weights = torch.cos(torch.arange(len(sol.y), dtype=F64)).reshape(-1, *[1] * (sol.y.dim() - 1))
    return sol, torch.autograd.grad((sol.y.nan_to_num() * weights).sum(), (y0, mu))


def as_one_by_one(span, rows, tolerance=1e-6, **options):
    """Natively many at once, each of which is solved by the eager engine: the same counts, values and gradients. (That evaluates
    ``fun`` to see whether components rest; native code sees it in the record.)"""
    y0, mu = spread(rows)
    many, grads = solved(True, span, y0, mu, batched=True, **options)
    assert 0 == many.stats.n_jac.min() < many.stats.n_jac.max()
    for b in range(0, rows, max(1, rows // 5)):
        one, theirs = solved(False, tuple(x[b] if isinstance(x, torch.Tensor) else x for x in span), y0[b], mu[b], **options)
        counts = [name for name in COUNTS if name != "n_fun"]
        assert [int(getattr(many.stats, name)[b]) for name in counts] == [getattr(one.stats, name) for name in counts]
        torch.testing.assert_close(many.y[: len(one.y), b], one.y, rtol=tolerance, atol=tolerance)
        for x, y in zip(grads, theirs, strict=True):
            torch.testing.assert_close(x[b], y, rtol=10 * tolerance, atol=10 * tolerance * float(y.abs().max()))


@pytest.mark.parametrize("rows", [5, 17])
@pytest.mark.slow_cases("5")
def test_many_are_as_the_eager_engine_solves_each(rows):
    as_one_by_one((0.0, 20.0), rows, 1e-5, t_eval=torch.linspace(0, 20, 7, dtype=F64))


def test_steps_and_spans_of_their_own():
    as_one_by_one((0.0, 20.0), 5, t_eval="steps")
    ends = torch.linspace(0.0, 25.0, 21, dtype=F64)
    as_one_by_one((torch.zeros_like(ends), ends), 21, 1e-5)


@pytest.mark.parametrize("mu", [60.0, 1000.0])
def test_there_and_back(mu):
    found = pair(vdpol, (0.0, 2 * mu), Y0, (torch.tensor(mu, dtype=F64),), method="auto")
    same(found, 1e-5)
    assert 0 < found[0][0].stats.n_jac < found[0][0].stats.n_accepted


@pytest.mark.parametrize("rows", [5, 21, 70])
@pytest.mark.slow_cases("70")
def test_values_alone(rows):
    """Of steps that no derivatives are wanted of, many at once are as those of the eager engine."""
    y0, mu = spread(rows)
    mine, theirs = (adjoint.solve_ivp(vdpol, (0.0, 15.0), y0, (mu,), method="auto", batched=True, compile=x) for x in (True, False))
    for name in ("n_accepted", "n_factorizations"):
        assert torch.equal(getattr(mine.stats, name), getattr(theirs.stats, name))
    torch.testing.assert_close(mine.y, theirs.y, rtol=1e-5, atol=1e-5)


def test_phases(monkeypatch):
    """Every one is native, and ends where it should; trajectories that have no part in it take no step."""
    from adjoint.sensitivity.problem import Problem

    seen = []
    run = Problem.run
    monkeypatch.setattr(Problem, "run", lambda self, *args: seen.append((self, run(self, *args))) or seen[-1][1])
    solved(True, (0.0, 60.0), *spread(20), batched=True)
    assert len(seen) > 3 and all(p.native.recognised is not None for p, _ in seen)
    assert [p.plan.method.implicit for p, _ in seen] == [k % 2 == 1 for k in range(len(seen))]
    for (_, before), (_, record) in itertools.pairwise(seen):
        going = before.status == 2
        assert bool((record.n_accepted[going] > 0).all()) and bool((record.n_accepted[~going] == 0).all())
        assert torch.equal(record.states[0], torch.where(going.unsqueeze(-1), before.last, record.states[0]))
    assert bool((record.status != 2).all())


def test_published_values():
    y0, p = torch.tensor([1.0, 0.0, 0.0], dtype=F64), ROBER_P.clone().requires_grad_()
    for pair_ in ("auto", AutoSwitch(METHODS["dopri5"], METHODS["rodas5p"]), AutoSwitch(METHODS["tsit5"], METHODS["radau5"])):
        sol = adjoint.solve_ivp(rober, (0.0, 40.0), y0, (p,), method=pair_, rtol=1e-8, atol=1e-12, compile=True)
        assert 0 < sol.stats.n_jac < sol.stats.n_steps
        torch.testing.assert_close(sol.y[-1, :2].detach(), ROBER_40, rtol=1e-6, atol=0)
        slopes = torch.stack([torch.autograd.grad(sol.y[-1, i], p, retain_graph=True)[0] for i in range(2)])
        torch.testing.assert_close(slopes, ROBER_40_JACOBIAN, rtol=1e-5, atol=0)


@pytest.mark.parametrize("method", [AutoSwitch(METHODS["dopri5"], METHODS["rodas5p"]), AutoSwitch(METHODS["tsit5"], METHODS["radau5"])])
@pytest.mark.slow_cases("method0")
def test_other_pairs(method):
    same(pair(vdpol, (0.0, 60.0), Y0, (torch.tensor(50.0, dtype=F64),), method=method), 1e-5, ("n_steps", "n_accepted", "n_factorizations"))


def test_forms():
    """Backwards, with repeated samples, all steps, the dense output, and named times."""
    back = lambda t, y, mu: -vdpol(t, y, mu)  # noqa: E731
    times, mu = torch.tensor([0.0, 3.0, 3.0, 20.0, 31.0, 40.0], dtype=F64), (torch.tensor(60.0, dtype=F64),)
    same(pair(back, (0.0, -40.0), Y0, mu, method="auto", t_eval=-times), 1e-6)
    found = pair(vdpol, (0.0, 40.0), Y0, mu, method="auto", t_eval="steps")
    same(found, 1e-6)
    torch.testing.assert_close(found[0][0].t, found[1][0].t, rtol=1e-6, atol=1e-6)
    found = pair(vdpol, (0.0, 40.0), Y0, mu, method="auto", dense_output=True, step_ts=[11.0, 23.0])
    same(found, 1e-6)
    torch.testing.assert_close(found[0][0](12.3), found[1][0](12.3), rtol=1e-6, atol=1e-6)


def test_single_precision():
    found = pair(vdpol, (0.0, 40.0), Y0.float(), (torch.tensor(50.0, dtype=torch.float32),), method="auto", rtol=1e-3, atol=1e-4)
    same(found, 2e-2, ())
    assert found[0][0].stats.n_jac > 0


def relax(t, y, k):
    return -k * (y - torch.cos(t))


def test_derivatives_in_times():
    found = []
    for compile in (True, False):
        k, y0 = torch.tensor(2000.0, dtype=F64, requires_grad=True), torch.tensor([2.0], dtype=F64, requires_grad=True)
        end, sample = torch.tensor(3.0, dtype=F64, requires_grad=True), torch.tensor([0.001, 2.0], dtype=F64, requires_grad=True)
        times = torch.cat([sample, end.reshape(1)])
        y = adjoint.solve_ivp(relax, (0.0, end), y0, (k,), method="auto", t_eval=times, rtol=1e-7, atol=1e-9, compile=compile).y
        found.append(torch.autograd.grad((y[:, 0] * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum(), (k, y0, end, sample)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    # near the slow manifold y = cos t the slope is -sin t
    torch.testing.assert_close(found[0][3][1], 2 * torch.tensor(2.0, dtype=F64).sin().neg(), rtol=1e-3, atol=0)


def falls(t, y, mu):
    return y[..., 0]


falls.terminal = 2


def passes(t, y, mu):
    return y[..., 0] - 1.5


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.slow_cases("20")
def test_events_count_through_all_phases(rows):
    y0, mu = (Y0.repeat(rows, 1), torch.linspace(1.0, 30.0, rows, dtype=F64)) if rows else (Y0, torch.tensor(30.0, dtype=F64))
    found = []
    for compile in (True, False):
        p = mu.clone().requires_grad_()
        options = {"method": "auto", "events": [falls, passes], "rtol": 1e-5, "atol": 1e-7, "batched": bool(rows), "compile": compile}
        sol = adjoint.solve_ivp(vdpol, (0.0, 60.0), y0, (p,), **options)
        assert bool((torch.as_tensor(sol.status) == 1).all())
        times, states = [x.nan_to_num() for x in sol.t_events], [x.nan_to_num() for x in sol.y_events]
        (slope,) = torch.autograd.grad(sum(x.sum() for x in times) + states[1][..., 1].sum(), p)
        found.append([*times, *states, slope])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_failed_says_so():
    def grows(t, y, p):
        return p * y * y

    y0, p = torch.ones(3, 1, dtype=F64), torch.tensor([[50.0], [0.1], [float("nan")]], dtype=F64)
    options = {"method": "auto", "batched": True, "throw": False}
    found = [adjoint.solve_ivp(grows, (0.0, 1.0), y0, (p,), compile=compile, **options) for compile in (True, False)]
    assert torch.equal(found[0].status, found[1].status) and found[0].status.sign().tolist() == [-1, 0, -1]
    torch.testing.assert_close(found[0].y, found[1].y, rtol=1e-8, atol=1e-8, equal_nan=True)
    for compile in (True, False):
        with pytest.raises(adjoint.MaxStepsReached):
            adjoint.solve_ivp(vdpol, (0.0, 60.0), Y0, (torch.tensor(100.0, dtype=F64),), method="auto", max_steps=25, compile=compile)


def test_transforms():
    def end(k, compile):
        y0 = torch.tensor([2.0], dtype=F64)
        return adjoint.solve_ivp(relax, (0.0, 0.5), y0, (k,), method="auto", rtol=1e-4, compile=compile).y[-1, 0]

    ks = torch.tensor([3.0, 400.0, 1000.0], dtype=F64)
    for f in (torch.vmap, lambda f: torch.vmap(torch.func.grad(f)), lambda f: torch.vmap(torch.func.jacfwd(torch.func.grad(f)))):
        mine, theirs = (f(lambda k, x=x: end(k, x))(ks) for x in (True, False))
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-12)


def test_many_trajectories_are_those_of_few():
    """Registers side by side, and phases in which most of them have no part."""

    def by(rows):
        y0, mu = Y0.repeat(150, 1)[rows].requires_grad_(), torch.logspace(0, 2.5, 150, dtype=F64)[rows].requires_grad_()
        sol = adjoint.solve_ivp(vdpol, (0.0, 60.0), y0, (mu,), method="auto", batched=True, compile=True, rtol=1e-6, atol=1e-8)
        return sol, torch.autograd.grad(sol.y[-1].square().sum(), (y0, mu))

    many, grads = by(slice(None))
    for rows in (slice(0, 3), slice(80, 98), slice(149, 150)):
        few, theirs = by(rows)
        assert torch.equal(few.stats.n_accepted, many.stats.n_accepted[rows])
        torch.testing.assert_close(few.y, many.y[:, rows], rtol=1e-6, atol=1e-6)
        for a, b in zip(theirs, grads, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=1e-4, atol=1e-6)
