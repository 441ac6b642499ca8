"""``method="auto"``: trajectories change between an explicit and an implicit method, and everything else stays as it is."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import Backprop, BacksolveAdjoint, DiscreteAdjoint, ForwardSensitivity, InterpolatingAdjoint, solve_ivp
from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.methods import METHODS, AutoSwitch

from ..helpers.stiff_problems import ROBER_40, ROBER_40_JACOBIAN, ROBER_P, rober

FINE = {"rtol": 1e-8, "atol": 1e-11}


def vdpol(t, y, mu):
    return torch.stack([y[..., 1], mu * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0]], -1)


def relax(t, y, k):
    """``y -> cos t`` at rate ``k``: stiff for large ``k``."""
    return -k * (y - torch.cos(t).reshape(-1, *[1] * (y.dim() - 1)) if y.dim() > 1 else y - torch.cos(t))


def exact_relax(t, k):
    """From 2 at zero."""
    steady = lambda s: (k**2 * torch.cos(s) + k * torch.sin(s)) / (1 + k**2)  # noqa: E731
    return steady(t) + (2 - steady(torch.zeros_like(t))) * torch.exp(-k * t)


def test_stays_with_the_explicit_method_where_nothing_is_stiff():
    y0 = torch.tensor([2.0, 0.0])
    sol, plain = (solve_ivp(vdpol, (0.0, 20.0), y0, (torch.tensor(1.0),), method=m) for m in ("auto", "tsit5"))
    assert sol.stats.n_jac == 0 and sol.stats.n_steps == plain.stats.n_steps and torch.equal(sol.y, plain.y)


def test_switches_there_and_back():
    """Van der Pol's oscillator is stiff between its jumps only: fewer Jacobians than steps, far fewer steps than the explicit method."""
    y0, mu = torch.tensor([2.0, 0.0]), torch.tensor(100.0)
    sol = solve_ivp(vdpol, (0.0, 170.0), y0, (mu,), method="auto", **FINE)
    stiff = solve_ivp(vdpol, (0.0, 170.0), y0, (mu,), method="kvaerno5", **FINE)
    assert 0 < sol.stats.n_jac < 0.6 * stiff.stats.n_jac and sol.stats.n_steps < 2 * stiff.stats.n_steps
    assert torch.allclose(sol.y[-1], stiff.y[-1], rtol=1e-5)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop(), ForwardSensitivity()], ids=["discrete", "backprop", "forward"])
@pytest.mark.slow_cases("backprop")
def test_reference_values(gradient):
    """Robertson's reaction, with derivatives, by every kind of strategy."""
    p = ROBER_P.clone().requires_grad_(True)
    y0 = torch.tensor([1.0, 0.0, 0.0])
    sol = solve_ivp(rober, (0.0, 40.0), y0, (p,), method="auto", rtol=1e-6, atol=1e-10, gradient=gradient)
    assert sol.stats.n_jac > 0 and torch.allclose(sol.y[-1, :2], ROBER_40, rtol=1e-4)
    for row, expected in enumerate(ROBER_40_JACOBIAN):
        (bar,) = torch.autograd.grad(sol.y[-1, row], p, retain_graph=True)
        assert torch.allclose(bar, expected, rtol=2e-4)


def test_discrete_adjoint_is_backprop():
    def derivative(strategy):
        mu = torch.tensor(20.0, requires_grad=True)
        y0 = torch.tensor([2.0, 0.0], requires_grad=True)
        times = torch.linspace(0.0, 20.0, 13)
        sol = solve_ivp(vdpol, (0.0, 20.0), y0, (mu,), method="auto", t_eval=times, gradient=strategy, rtol=1e-4)
        assert 0 < sol.stats.n_jac < sol.stats.n_steps
        return torch.autograd.grad((sol.y * torch.sin(torch.arange(26.0)).reshape(13, 2)).sum(), (mu, y0))

    expected = derivative(Backprop())
    for strategy in (DiscreteAdjoint(), DiscreteAdjoint(checkpoints=7)):
        for mine, theirs in zip(derivative(strategy), expected, strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-9)


@pytest.mark.parametrize("end", [20.0, -20.0])
@pytest.mark.slow_cases("20.0")
def test_batch_as_one_by_one(end):
    """Stiff and other trajectories side by side, each switched for itself; forwards and backwards in time."""
    sign = math.copysign(1.0, end)
    f = lambda t, y, mu: sign * vdpol(t, y, mu)  # noqa: E731
    mus = torch.tensor([1.0, 30.0, 200.0], requires_grad=True)
    y0 = torch.tensor([[2.0, 0.0]]).repeat(3, 1)
    times = torch.linspace(0.0, end, 9)
    options = {"method": "auto", "rtol": 1e-6, "atol": 1e-9}
    many = solve_ivp(f, (0.0, end), y0, (mus,), batched=True, t_eval=times, dense_output=True, **options)
    steps = solve_ivp(f, (0.0, end), y0, (mus,), batched=True, t_eval="steps", **options)
    assert many.stats.n_jac.tolist()[0] == 0 and all(n > 0 for n in many.stats.n_jac.tolist()[1:])
    (bars,) = torch.autograd.grad(many.y.square().sum(), mus)
    assert torch.allclose(many(times), many.y, rtol=1e-12, atol=1e-12)
    for b in range(3):
        mu = mus[b].detach().clone().requires_grad_(True)
        one = solve_ivp(f, (0.0, end), y0[b], (mu,), t_eval=times, **options)
        n = int(many.stats.n_accepted[b])
        assert (one.stats.n_accepted, one.stats.n_steps) == (n, int(many.stats.n_steps[b]))
        assert torch.allclose(many.y[:, b], one.y, rtol=1e-9, atol=1e-11)
        assert torch.allclose(torch.autograd.grad(one.y.square().sum(), mu)[0], bars[b], rtol=1e-7)
        own = solve_ivp(f, (0.0, end), y0[b], (mu,), t_eval="steps", **options)
        # steps at the edge of stability are bounded by differences, which are rounded
        assert torch.allclose(steps.t[: n + 1, b], own.t, rtol=1e-5) and bool(steps.t[n + 1 :, b].isnan().all())
        assert torch.allclose(steps.y[: n + 1, b], many(steps.t[: n + 1, b])[:, b], rtol=1e-9, atol=1e-10)


def test_derivatives_in_times_and_of_second_order():
    """Against the closed form, with a phase of each kind."""
    k, end = torch.tensor(2000.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    sample = torch.tensor([0.001, 2.0], requires_grad=True)
    y0 = torch.tensor([2.0], requires_grad=True)
    sol = solve_ivp(relax, (0.0, end), y0, (k,), method="auto", t_eval=torch.cat([sample, end.reshape(1)]), rtol=1e-7, atol=1e-9)
    assert 0 < sol.stats.n_jac < sol.stats.n_steps
    loss = (sol.y[:, 0] * torch.tensor([1.0, 2.0, 3.0])).sum()
    truth = (exact_relax(torch.cat([sample, end.reshape(1)]), k) * torch.tensor([1.0, 2.0, 3.0])).sum()
    assert torch.allclose(loss, truth, rtol=1e-6)
    mine = torch.autograd.grad(loss, (k, end, sample), create_graph=True)
    theirs = torch.autograd.grad(truth, (k, end, sample), create_graph=True)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    again = [torch.autograd.grad(x[0] * 1e3 + x[2][0], k)[0] for x in (mine, theirs)]
    assert torch.allclose(*again, rtol=1e-3)


def test_transforms():
    y0 = torch.tensor([2.0])

    def end(k):
        return solve_ivp(relax, (0.0, 0.5), y0, (k,), method="auto", **FINE).y[-1, 0]

    ks = torch.tensor([3.0, 400.0])
    half = torch.tensor(0.5)
    assert torch.allclose(torch.vmap(end)(ks), exact_relax(half, ks), rtol=1e-6)
    expected = torch.func.vmap(torch.func.grad(lambda k: exact_relax(half, k)))(ks)
    assert torch.allclose(torch.vmap(torch.func.grad(end))(ks), expected, rtol=1e-4, atol=1e-9)
    out, tangent = torch.func.jvp(end, (ks[1],), (torch.tensor(1.0),))
    assert torch.allclose(out, exact_relax(half, ks[1]), rtol=1e-6) and torch.allclose(tangent, expected[1], rtol=1e-4, atol=1e-9)


def test_events_count_through_all_phases():
    """The third time that a relaxation oscillator passes zero ends the solve; the others are recorded, whichever method was at work."""
    g = lambda t, y, mu: y[0]  # noqa: E731
    g.terminal = 3
    mu = torch.tensor(30.0, requires_grad=True)
    y0 = torch.tensor([2.0, 0.0])
    found = {}
    for method in ("auto", "kvaerno5"):
        sol = solve_ivp(vdpol, (0.0, 200.0), y0, (mu,), method=method, events=g, rtol=1e-7, atol=1e-9)
        assert sol.status == 1 and sol.events[0].t.shape == (3,)
        found[method] = sol.events[0].t, torch.autograd.grad(sol.t[-1], mu)[0]
    assert torch.allclose(found["auto"][0], found["kvaerno5"][0], rtol=1e-5)
    assert torch.allclose(found["auto"][1], found["kvaerno5"][1], rtol=1e-3)


def test_quadrature_jumps_and_states_of_any_kind():
    f = lambda t, y, k: {"x": -k * (y["x"] - (t > 1.0).to(y["x"].dtype)), "z": 1j * y["z"]}  # noqa: E731
    y0 = {"x": torch.zeros(2), "z": torch.ones((), dtype=torch.complex128)}
    sol = solve_ivp(
        f, (0.0, 3.0), y0, (torch.tensor(1000.0),), method="auto", step_ts=[1.0], quadrature=lambda t, y, k: y["x"].sum(), **FINE
    )
    assert sol.stats.n_jac > 0
    assert torch.allclose(sol.y["x"][-1].real, torch.ones(2), atol=1e-7)
    assert torch.allclose(sol.y["z"][-1], torch.exp(torch.tensor(3j, dtype=torch.complex128)), atol=1e-6)
    assert torch.allclose(sol.quadrature.real, torch.tensor(2 * (2.0 - 1 / 1000.0)), atol=1e-6)


def test_another_pair():
    pair = AutoSwitch(METHODS["dopri5"], METHODS["rodas5p"])
    assert pair.interval == pytest.approx(3.3066, abs=1e-3) and AutoSwitch(METHODS["tsit5"], METHODS["kvaerno5"]).interval == pytest.approx(
        3.5068, abs=1e-3
    )
    p = ROBER_P.clone().requires_grad_(True)
    sol = solve_ivp(rober, (0.0, 40.0), torch.tensor([1.0, 0.0, 0.0]), (p,), method=pair, rtol=1e-8, atol=1e-12)
    (bar,) = torch.autograd.grad(sol.y[-1, 0], p)
    assert torch.allclose(bar, ROBER_40_JACOBIAN[0], rtol=1e-5)


def test_what_is_refused():
    with pytest.raises(InvalidInput, match="two stages at the end"):
        AutoSwitch(METHODS["bosh3"], METHODS["kvaerno5"])
    with pytest.raises(InvalidInput, match="one-step"):
        AutoSwitch(METHODS["tsit5"], METHODS["bdf"])
    for strategy in (InterpolatingAdjoint(), BacksolveAdjoint()):
        k = torch.tensor(1.0, requires_grad=True)
        with pytest.raises(UnsupportedCombination, match="auto"):
            solve_ivp(relax, (0.0, 1.0), torch.ones(1), (k,), method="auto", gradient=strategy).y.sum().backward()


def test_failures_have_names():
    grow = lambda t, y: 50 * y**2  # noqa: E731
    sol = solve_ivp(grow, (0.0, 1.0), torch.ones(2, 1) * torch.tensor([[1.0], [1e-3]]), method="auto", batched=True, throw=False)
    assert sol.status[0] < 0 and sol.status[1] == 0 and bool(sol.y[-1, 0].isnan().all())
    assert sol.y[-1, 1].item() == pytest.approx(1 / (1000 - 50), rel=1e-5)
