"""Trajectories in lock step are the trajectories one by one."""

from __future__ import annotations

import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.methods import METHODS

from ..helpers.problems import ALL, lotka_volterra, options

B = 5


def _data():
    p = torch.tensor([1.5, 1.0, 3.0, 1.0]) * (1 + 0.2 * (torch.rand(B, 4) - 0.5))
    return p, 0.5 + torch.rand(B, 2)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("t_eval", [None, [0.3, 0.7, 1.5]], ids=["ends", "samples"])
@pytest.mark.slow_cases("samples-kvaerno3", "ends-abm")
def test_equals_one_by_one(method, t_eval):
    """Values to rounding, gradients too, and the same step counts."""
    p, u = _data()
    p.requires_grad_()
    kwargs = {**options(method, steps=12, span=2.0), "t_eval": t_eval}
    together = solve_ivp(lotka_volterra, (0.0, 2.0), u, (p,), batched=True, **kwargs)
    assert together.y.shape == (2 if t_eval is None else 3, B, 2)
    grads = torch.autograd.grad(together.y.square().sum(), p)[0]
    for i in range(B):
        q = p[i].detach().requires_grad_()
        alone = solve_ivp(lotka_volterra, (0.0, 2.0), u[i], (q,), **kwargs)
        # controllers of tensors work in single precision, so steps differ in the eighth digit, and results by that much of an error
        assert torch.allclose(together.y[:, i], alone.y, rtol=1e-9 if METHODS[method].order > 1 else 1e-8, atol=1e-11)
        assert torch.allclose(grads[i], torch.autograd.grad(alone.y.square().sum(), q)[0], rtol=1e-7)
        assert int(together.stats.n_accepted[i]) == alone.stats.n_accepted
        assert int(together.stats.n_rejected[i]) == alone.stats.n_rejected


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
def test_own_spans_and_times(gradient):
    """Starts, ends (in both directions) and sample times per trajectory, all differentiable."""
    p, u = _data()
    t0 = torch.linspace(0.0, 0.4, B, requires_grad=True)
    t1 = torch.tensor([1.0, 2.0, -1.0, 0.9, 3.0], requires_grad=True)
    fraction = torch.tensor([0.0, 0.2, 0.7, 1.0]).unsqueeze(-1)
    times = (t0 + fraction * (t1 - t0)).detach().requires_grad_()
    sol = solve_ivp(lotka_volterra, (t0, t1), u, (p,), t_eval=times, batched=True, gradient=gradient)
    assert sol.t.shape == (4, B)
    got = torch.autograd.grad(sol.y[1:].square().sum(), (t0, t1, times))
    for i in range(B):
        a, b, s = (x[..., i].detach().requires_grad_() for x in (t0, t1, times))
        alone = solve_ivp(lotka_volterra, (a, b), u[i], (p[i],), t_eval=s, gradient=gradient)
        assert torch.allclose(sol.y[:, i], alone.y, rtol=1e-9)
        for x, y in zip(got, torch.autograd.grad(alone.y[1:].square().sum(), (a, b, s)), strict=True):
            assert torch.allclose(x[..., i], y, rtol=1e-6, atol=1e-6)


def test_time_that_fun_sees():
    seen = []

    def rate(t, y):
        seen.append((t.shape, y.shape))
        return -y

    solve_ivp(rate, (0.0, 1.0), torch.ones(3, 2, 2), batched=True)
    assert set(seen) == {(torch.Size([3]), torch.Size([3, 2, 2]))}


def test_one_failure_stays_alone():
    """y' = y^2 from 2 blows up at t = 0.5; its neighbours do not notice, in value or gradient."""
    y0 = torch.tensor([[0.1], [2.0], [0.3]], requires_grad=True)
    sol = solve_ivp(lambda t, y: y**2, (0.0, 1.0), y0, t_eval=[0.25, 0.4, 1.0], batched=True, rtol=1e-8, throw=False, max_steps=500)
    assert sol.success.tolist() == [True, False, True]
    exact = y0.detach()[:, 0] / (1 - y0.detach()[:, 0] * torch.tensor([[0.25], [0.4], [1.0]]))
    assert torch.allclose(sol.y[:, [0, 2], 0], exact[:, [0, 2]], rtol=1e-6)
    assert torch.allclose(sol.y[:2, 1, 0], exact[:2, 1], rtol=1e-5)
    assert torch.isnan(sol.y[2, 1]).all()
    good = torch.autograd.grad(sol.y[-1][sol.success].sum(), y0)[0]
    assert torch.allclose(good[[0, 2], 0], 1 / (1 - y0.detach()[[0, 2], 0]) ** 2, rtol=1e-5)
    assert float(good[1]) == 0.0


def test_finished_trajectories_are_inert():
    """A trajectory that ends early is not moved, nor counted, while others go on."""
    sol = solve_ivp(lambda t, y: torch.cos(t).unsqueeze(-1) + 0 * y, (0.0, torch.tensor([0.5, 20.0])), torch.zeros(2, 1), batched=True)
    assert torch.allclose(sol.y[-1, :, 0], torch.sin(torch.tensor([0.5, 20.0])), atol=1e-5)
    assert int(sol.stats.n_steps[0]) < int(sol.stats.n_steps[1])


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batch(gradient, batch):
    y0 = torch.ones(batch, 2, requires_grad=True)
    w = torch.tensor(0.7, requires_grad=True)
    sol = solve_ivp(lambda t, y: -w * y, (0.0, 1.0), y0, t_eval=[0.5, 1.0], batched=True, gradient=gradient)
    assert sol.y.shape == (2, batch, 2)
    got = torch.autograd.grad(sol.y.sum(), (y0, w), allow_unused=True)
    assert got[0].shape == y0.shape
    assert got[1] is None if batch == 0 else torch.isfinite(got[1])


def test_steps_of_a_batch():
    p, u = _data()
    sol = solve_ivp(lotka_volterra, (0.0, 3.0), u, (p,), t_eval="steps", batched=True)
    for i in range(B):
        n = int(sol.stats.n_accepted[i])
        assert float(sol.t[0, i]) == 0.0 and float(sol.t[n, i]) == 3.0
        assert (sol.t[: n + 1, i].diff() > 0).all()
        assert torch.isnan(sol.t[n + 1 :, i]).all() and torch.isnan(sol.y[n + 1 :, i]).all()
        assert torch.isfinite(sol.y[: n + 1, i]).all()


def test_per_trajectory_tolerances():
    p, u = _data()
    atol = torch.full((B, 1), 1e-3)
    atol[2] = 1e-10
    sol = solve_ivp(lotka_volterra, (0.0, 3.0), u, (p,), rtol=0.0, atol=atol, batched=True)
    counts = sol.stats.n_accepted
    assert (counts[2] > 2 * counts[[0, 1, 3, 4]]).all()


def test_pytree_batch():
    state = {"a": torch.ones(4), "b": (torch.zeros(4, 2, 2),)}
    sol = solve_ivp(lambda t, y: {"a": -y["a"], "b": (t.reshape(-1, 1, 1) + 0 * y["b"][0],)}, (0.0, 1.0), state, batched=True, rtol=1e-9)
    assert torch.allclose(sol.y["a"][-1], torch.exp(torch.tensor(-1.0)).expand(4), rtol=1e-7)
    assert torch.allclose(sol.y["b"][0][-1], torch.full((4, 2, 2), 0.5), atol=1e-9)
    assert METHODS["tsit5"].adaptive


def test_many_samples_in_a_step():
    """More samples than steps, repeated ones and both ends among them: each lies on the solution."""
    t = torch.cat([torch.zeros(2), torch.linspace(0.0, 3.0, 200), torch.full((2,), 3.0)])
    rate = torch.rand(5, 1) + 0.5
    for first, last in ((0.0, 3.0), (3.0, 0.0)):
        times = t if last > first else t.flip(0)
        sol = solve_ivp(lambda s, y: -rate * y, (first, last), torch.ones(5, 1), t_eval=times, batched=True, rtol=1e-9, atol=1e-12)
        exact = torch.exp(-rate * (times[:, None, None] - first))
        assert sol.stats.n_steps.max() < 150
        assert torch.allclose(sol.y, exact, rtol=1e-6)
