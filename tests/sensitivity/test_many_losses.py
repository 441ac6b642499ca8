"""Continuous adjoints of losses on many samples by implicit methods, which go back side by side."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from adjoint import DiscreteAdjoint, GaussAdjoint, InterpolatingAdjoint, QuadratureAdjoint, solve_dae, solve_ivp
from adjoint.sensitivity import way_back

F64 = torch.float64


def robertson(t, y, p):
    a, b, c = p[0] * y[..., 0], p[1] * y[..., 1] * y[..., 2], p[2] * y[..., 1] ** 2
    return torch.stack([-a + b, a - b - c, c], -1)


def gradients(gradient, count, method="rodas5p", rtol=1e-7, rows=0, fun=robertson):
    """In logarithms of parameters and the initial state; and steps of the way back."""
    p = torch.tensor([0.04, 1e4, 3e7], dtype=F64).requires_grad_()
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=F64).requires_grad_()
    times = torch.logspace(1.9, -3, count, dtype=F64)
    start = y0 * torch.linspace(1.0, 1.2, rows, dtype=F64).unsqueeze(-1) if rows else y0
    options = dict(method=method, rtol=rtol, atol=1e-4 * rtol, batched=rows > 0, gradient=gradient)
    sol = solve_ivp(fun, (0.0, 1e2), start, args=(p,), t_eval=times, **options)
    loss = (sol.y * torch.tensor([1.0, 1e4, 1.0], dtype=F64)).square().sum() / (count * max(rows, 1))
    found = torch.autograd.grad(loss, (p, y0))
    return [found[0] * p.detach(), found[1]], sol.stats.backward


@cache
def truth(count, rows=0, rtol=1e-9):
    """By a tight solve."""
    return gradients(DiscreteAdjoint(), count, "radau5", rtol, rows)[0]


def furthest(found, exact):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("back, rows, tolerance", [("kvaerno5", 2, 5e-4), ("radau5", 0, 2e-6)])
@pytest.mark.slow_cases("radau5-0-2e-06")
def test_many_samples_take_about_the_steps_of_one(back, rows, tolerance):
    _, one = gradients(InterpolatingAdjoint(method=back), 1, rows=rows)
    found, many = gradients(InterpolatingAdjoint(method=back), 30, rows=rows)
    assert furthest(found, truth(30, rows, 1e-3 * tolerance)) < tolerance
    # one after the other they took 20 times as many
    assert int(many.n_steps) < 2 * int(one.n_steps)


@pytest.mark.parametrize("strategy", [InterpolatingAdjoint, QuadratureAdjoint])
@pytest.mark.slow_cases("QuadratureAdjoint")
def test_in_several_goes(strategy, monkeypatch):
    at_once = gradients(strategy(method="radau5"), 6, rtol=1e-5)
    monkeypatch.setattr(way_back, "_MOST", 3)
    in_goes = gradients(strategy(method="radau5"), 6, rtol=1e-5)
    for found, _ in (at_once, in_goes):
        assert furthest(found, truth(6, rtol=1e-7)) < 1e-3
    assert int(at_once[1].n_steps) < int(in_goes[1].n_steps)


def test_functions_that_cannot_be_mapped_go_back_one_sample_after_another():
    def unmapped(t, y, p):
        return robertson(t, y, p) if float(y.detach().abs().sum()) < 1e9 else y

    found, many = gradients(InterpolatingAdjoint(method="radau5"), 3, rtol=1e-5, fun=unmapped)
    mapped, fewer = gradients(InterpolatingAdjoint(method="radau5"), 3, rtol=1e-5)
    exact = truth(3, rtol=1e-7)
    assert furthest(found, exact) < 1e-3 and furthest(mapped, exact) < 1e-3
    assert int(many.n_steps) > int(fewer.n_steps)


@pytest.mark.parametrize("tolerance", [1e-6, 1e-8])
@pytest.mark.parametrize("method", ["kvaerno5", "radau5"])
@pytest.mark.slow_cases("kvaerno5-1e-06", "radau5-1e-08")
def test_integrals_through_layers(method, tolerance):
    """``y = p cos t`` up to a layer at every sample; by its dense output kvaerno5 was off by 3e-5 at any tolerance."""
    p = torch.tensor(1.3, dtype=F64, requires_grad=True)
    fun = lambda t, y, p: -1e5 * (y - p * torch.cos(t)) - p * torch.sin(t)  # noqa: E731
    times = torch.linspace(0.1, 2.0, 20, dtype=F64)
    for strategy in (InterpolatingAdjoint(method=method, max_steps=10_000), GaussAdjoint(method=method)):
        options = dict(method="radau5", rtol=tolerance, atol=tolerance, gradient=strategy)
        sol = solve_ivp(fun, (0.0, 2.0), (p * torch.ones(1, dtype=F64)), args=(p,), t_eval=times, **options)
        (found,) = torch.autograd.grad(sol.y.sum(), p)
        assert abs(float(found / torch.cos(times).sum()) - 1) < 30 * tolerance


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("index", [1, 2])
@pytest.mark.slow_cases("1-True", "2-False")
def test_differential_algebraic_equations(index, batched):
    """``x = x0 exp(-a t)``, ``z = a x`` by a constraint on ``z``, or (index 2) on ``x`` and ``u``: ``u = x``, ``u' = -z``."""

    def residual(t, y, yp, a):
        x, u, z = y.unbind(-1)
        last = z - a * x if index == 1 else u - x
        return torch.stack([yp[..., 0] + a * x, yp[..., 1] + z, last], -1)

    a, x0 = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (1.7, 0.8))
    times = torch.linspace(0.1, 2.0, 15, dtype=F64).requires_grad_()
    y0, yp0 = torch.stack([x0, x0, a * x0]), torch.stack([-a * x0, -a * x0, -a * a * x0])
    scale = torch.tensor([1.0, 1.5], dtype=F64).unsqueeze(-1) if batched else torch.tensor(1.0, dtype=F64)
    options = dict(method="radau", rtol=1e-7, atol=1e-7, batched=batched, gradient=InterpolatingAdjoint())
    sol = solve_dae(residual, (0.0, 2.5), scale * y0, scale * yp0, args=(a,), t_eval=times, **options)
    found = torch.autograd.grad((sol.y**2).sum(), (a, x0, times))
    x = x0 * torch.exp(-a * times)
    exact = torch.autograd.grad(((2 * x**2 + (a * x) ** 2) * (scale**2).sum()).sum(), (a, x0, times))
    for g, want in zip(found, exact, strict=True):
        torch.testing.assert_close(g, want, rtol=2e-5, atol=2e-6)


def test_losses_of_failed_and_of_other_rows_stay_apart():
    """A cotangent that is NaN has its row to itself."""
    y0 = torch.tensor([[1.0], [2.0]], dtype=F64, requires_grad=True)
    times = torch.linspace(0.1, 1.0, 6, dtype=F64)
    options = dict(method="kvaerno5", rtol=1e-8, atol=1e-8, batched=True, gradient=InterpolatingAdjoint())
    sol = solve_ivp(lambda t, y: -3.0 * y, (0.0, 1.0), y0, t_eval=times, **options)
    bar = torch.ones_like(sol.y)
    bar[2, 1] = float("nan")
    (found,) = torch.autograd.grad(sol.y, y0, bar)
    torch.testing.assert_close(found[0, 0], torch.exp(-3.0 * times).sum(), rtol=1e-6, atol=0)
    assert found[1].isnan().all()
