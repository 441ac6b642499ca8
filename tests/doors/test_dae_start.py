"""Consistent initial values: both standard modes, bounds, and their derivatives."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from adjoint import (
    DiscreteAdjoint,
    InconsistentInitialCondition,
    InterpolatingAdjoint,
    InvalidInput,
    UnsupportedCombination,
    solve_dae,
    solve_ivp,
)

from ..helpers.dae_problems import ROBERTSON_P, ROBERTSON_Y0, robertson


def tank(t, y, yp, p):
    """A level that drains through a valve of flow ``q``: ``level' = inflow - q``, ``q = c sqrt(level)``."""
    level, q = y
    return torch.stack([yp[0] - p[0] + q, q - p[1] * torch.sqrt(level)])


P = torch.tensor([2.0, 0.5], dtype=torch.float64)


def start(p, slopes, **options):
    y0 = torch.tensor([10.0, 1.0], dtype=torch.float64)
    return solve_dae(tank, (0.0, 0.1), y0, slopes, args=(p,), consistent="slopes", t_eval=[0.0, 0.1], **options)


def test_steady_start():
    sol = start(P, torch.zeros(2, dtype=torch.float64))
    steady = torch.tensor([16.0, 2.0], dtype=torch.float64)  # inflow = c sqrt(level)
    torch.testing.assert_close(sol.y, steady.expand(2, 2), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sol.yp[0], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-10)


def test_derivatives_of_a_start_from_slopes():
    slopes = torch.tensor([0.3, 0.0], dtype=torch.float64, requires_grad=True)
    p = P.clone().requires_grad_()

    def first(p, slopes):
        return start(p, slopes, rtol=1e-9, atol=1e-9).y

    assert gradcheck(first, (p, slopes), rtol=1e-5)
    assert gradgradcheck(lambda p, s: first(p, s)[0], (p, slopes), rtol=1e-4)
    # level = ((inflow - level') / c)^2
    (level,) = torch.autograd.grad(first(p, slopes)[0, 0], slopes)
    torch.testing.assert_close(float(level[0]), -2 * (2.0 - 0.3) / 0.25, rtol=1e-9, atol=0)
    batch = torch.vmap(lambda p: start(p, torch.zeros(2, dtype=torch.float64)).y[0, 0])(torch.stack([P, 2 * P]))
    torch.testing.assert_close(batch, torch.tensor([16.0, 16.0], dtype=torch.float64))


def test_batches_start_from_slopes():
    inflow = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def tanks(t, y, yp, inflow):
        return torch.stack([yp[:, 0] - inflow + y[:, 1], y[:, 1] - 0.5 * torch.sqrt(y[:, 0])], -1)

    guess = torch.tensor([10.0, 1.0], dtype=torch.float64).expand(3, 2)
    sol = solve_dae(tanks, (0.0, 0.1), guess, torch.zeros_like(guess), args=(inflow,), consistent="slopes", batched=True)
    torch.testing.assert_close(sol.y[0, :, 0], (inflow / 0.5) ** 2, rtol=1e-10, atol=0)


def two_roots(t, y, yp, p):
    """``a^2 = x + p``: of its two roots the bounds choose one."""
    return torch.stack([yp[0] + y[0], y[1] ** 2 - y[0] - p])


@pytest.mark.parametrize("bounds, root", [((0.0, None), 2.0), ((None, torch.tensor([5.0, 0.0])), -2.0)])
def test_bounds_of_a_start(bounds, root):
    p = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    guess = torch.tensor([1.0, 0.01 * root], dtype=torch.float64, requires_grad=True)
    sol = solve_dae(two_roots, (0.0, 0.1), guess, args=(p,), y0_bounds=bounds, t_eval=[0.0, 0.1])
    torch.testing.assert_close(float(sol.y[0, 1].detach()), root, rtol=1e-10, atol=0)
    sol.y[0, 1].backward()
    torch.testing.assert_close(float(p.grad), 1 / (2 * root), rtol=1e-9, atol=0)
    assert guess.grad[1] == 0


def test_bounds_without_a_root_inside():
    guess = torch.tensor([1.0, 3.0], dtype=torch.float64)
    with pytest.raises(InconsistentInitialCondition, match="within the bounds"):
        solve_dae(two_roots, (0.0, 0.1), guess, args=(3.0,), y0_bounds=(torch.tensor([0.0, 2.5]), None))


def test_what_is_refused():
    guess, zero = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InvalidInput, match="give yp0"):
        solve_dae(two_roots, (0.0, 0.1), guess, args=(3.0,), consistent="slopes")
    with pytest.raises(InvalidInput, match="y0 lies outside"):
        solve_dae(two_roots, (0.0, 0.1), guess, args=(3.0,), y0_bounds=(2.0, None))
    with pytest.raises(InvalidInput, match="nothing to bound"):
        solve_dae(two_roots, (0.0, 0.1), guess, zero, args=(3.0,), y0_bounds=(0.0, None), consistent="trust")
    with pytest.raises(UnsupportedCombination, match="quadrature"):
        solve_dae(two_roots, (0.0, 0.1), guess, zero, args=(3.0,), consistent="slopes", quadrature=lambda t, y, p: y[0])
    with pytest.raises(InconsistentInitialCondition, match="F_y must be regular"):
        solve_dae(lambda t, y, yp: torch.stack([yp[0] - 1, y[1] - y[0]]), (0.0, 0.1), guess, zero, consistent="slopes")


@pytest.mark.slow
def test_continuous_adjoint_at_the_tolerances_of_the_solve():
    """The solve's absolute tolerance, that of small concentrations, must not be asked of an adjoint of size 1 and more."""

    def gradient(rtol, strategy):
        p = ROBERTSON_P.clone().requires_grad_()
        options = dict(rtol=rtol, atol=1e-4 * rtol, gradient=strategy)
        solve_dae(robertson, (0.0, 50.0), ROBERTSON_Y0, args=(p,), **options).y[-1, 2].backward()
        return p.grad

    exact = gradient(1e-10, DiscreteAdjoint())
    errors = [float((gradient(rtol, InterpolatingAdjoint()) / exact - 1).abs().max()) for rtol in (1e-5, 1e-7, 1e-8)]
    assert errors[0] < 1e-5 and errors[1] < 1e-7 and errors[2] < 1e-8


@pytest.mark.parametrize("method", ["radau", "rodas5p"])
@pytest.mark.slow_cases("radau")
def test_a_first_step_does_not_depend_on_the_other_trajectories(method):
    """Of a batch some rows have found the size of their first step before others: they keep it, and count no work that is not theirs."""
    rate = torch.tensor([1.0, 3e7, 0.0, 50.0], dtype=torch.float64)

    def residual(t, y, yp, k):
        return torch.stack([yp[..., 0] + k * y[..., 0], y[..., 1] - y[..., 0] ** 2 - torch.sin(t)], -1)

    def solve(k):
        y0 = torch.ones(len(k), 2, dtype=torch.float64)
        if method == "radau":
            return solve_dae(residual, (0.0, 1.0), y0, args=(k,), batched=True, t_eval="steps")
        mass = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
        fun = lambda t, y, k: -residual(t, y, torch.zeros_like(y), k)  # noqa: E731
        return solve_ivp(fun, (0.0, 1.0), y0, args=(k,), batched=True, t_eval="steps", method=method, mass_matrix=mass)

    whole = solve(rate)
    for row in range(len(rate)):
        alone = solve(rate[row : row + 1])
        torch.testing.assert_close(whole.t[1, row], alone.t[1, 0], rtol=1e-14, atol=0)
        torch.testing.assert_close(whole.stats.n_factorizations[row], alone.stats.n_factorizations[0])


@pytest.mark.parametrize(
    ("method", "rtol"), [("radau", 1e-5), ("radau", 1e-9), ("radau3", 1e-5), pytest.param("radau3", 1e-9, marks=pytest.mark.slow)]
)
@pytest.mark.slow_cases("radau-1e-09")
def test_samples_at_the_start_have_second_derivatives(method, rtol):
    """Of ``x' = z``, ``z = -2 x + cos t``, however small the first step is: by times of samples and by that of the start."""
    curve = lambda t, x0, t0: forced(t) + (x0 - forced(t0)) * torch.exp(-2 * (t - t0))  # noqa: E731
    forced = lambda t: (2 * torch.cos(t) + torch.sin(t)) / 5  # noqa: E731

    def solved(t, x0, t0):
        fun = lambda t, y, yp: torch.stack([yp[0] - y[1], y[1] + 2 * y[0] - torch.cos(t)])  # noqa: E731
        y0 = torch.cat([x0.reshape(1), x0.new_zeros(1)])
        return solve_dae(fun, (t0, 0.4), y0, method=method, t_eval=t.reshape(1), rtol=rtol, atol=rtol / 100)

    at = tuple(torch.tensor(x, dtype=torch.float64) for x in (0.2, 0.7, 0.2))
    x = lambda *p: solved(*p).y[0, 0]  # noqa: E731
    z = lambda *p: solved(*p).y[0, 1]  # noqa: E731
    slope = lambda t, x0, t0: torch.cos(t) - 2 * curve(t, x0, t0)  # noqa: E731
    everything = (0, 1, 2)
    for got, want in ((x, curve), (z, slope), (lambda *p: solved(*p).yp[0, 0], slope)):
        first = torch.func.grad(got, everything)(*at)
        torch.testing.assert_close(first, torch.func.grad(want, everything)(*at), rtol=1e-9, atol=1e-9)
    for got, want in ((x, curve), (z, slope)):
        second = torch.autograd.functional.hessian(got, at)
        torch.testing.assert_close(second, torch.autograd.functional.hessian(want, at), rtol=1e-8, atol=1e-8)


def test_samples_at_the_start_of_many():
    """Of which one is not a number, under a map, forward over reverse."""
    fun = lambda t, y, yp: torch.stack([yp[:, 0] - y[:, 1], y[:, 1] + 2 * y[:, 0]], 1)  # noqa: E731

    def f(t, x0):
        y0 = torch.stack([x0, torch.zeros_like(x0)], 1)
        times = torch.stack([t, torch.ones_like(t)])
        sol = solve_dae(fun, (0.0, 1.0), y0, t_eval=times, batched=True, throw=False)
        return sol.y[0, 1, 1]

    x0 = torch.tensor([float("nan"), 0.7], dtype=torch.float64)
    along = torch.tensor([0.0, 1.0], dtype=torch.float64)
    by_time = torch.func.grad(f)
    _, second = torch.func.jvp(lambda t: by_time(t, x0), (torch.zeros(2, dtype=torch.float64),), (along,))
    # z = -2 x, x'' = 4 x
    assert float(second[1]) == pytest.approx(-8 * 0.7)
    mapped = torch.vmap(lambda t: by_time(t, x0))(torch.zeros(3, 2, dtype=torch.float64))
    assert mapped[:, 1].tolist() == pytest.approx([4 * 0.7] * 3)


@pytest.mark.parametrize("method", ["radau", "rodas5p"])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
def test_a_fast_layer_where_times_are_large(method, compile):
    """A first step by the slope alone would be shorter than what times resolve; the error test passes longer ones."""
    p = torch.tensor([1e6, 0.5], dtype=torch.float64, requires_grad=True)
    start, end, y0 = 1e5, 1e5 + 5e-5, torch.tensor([1e3, 1e3], dtype=torch.float64)
    options = {"args": (p,), "rtol": 1e-6, "atol": 1e-9, "compile": compile}

    def fun(t, y, p):
        return torch.stack([-p[0] * (y[..., 0] - p[1]), y[..., 1] - y[..., 0]], -1)

    mass = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    if method == "rodas5p":
        sol = solve_ivp(fun, (start, end), y0, mass_matrix=mass, method=method, **options)
    else:
        sol = solve_dae(lambda t, y, yp, p: mass @ yp - fun(t, y, p), (start, end), y0, **options)
    torch.testing.assert_close(sol.y[-1], p[1].expand(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(sol.y[-1, 1], p)[0], torch.tensor([0.0, 1.0], dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_fast_layer_on_the_way_back_where_times_are_large():
    p = torch.tensor([1e6, 0.5], dtype=torch.float64, requires_grad=True)
    start, end = torch.tensor([1e5 - 1, 1e5], dtype=torch.float64)

    def fun(t, y, yp, p):
        return torch.stack([yp[0] + p[0] * (y[0] - p[1] * torch.cos(t)), y[1] - y[0]])

    y0 = (0.5 * torch.cos(start)).expand(2)
    sol = solve_dae(fun, (start, end), y0, args=(p,), rtol=1e-6, atol=1e-9, gradient=InterpolatingAdjoint())
    gradient = torch.autograd.grad(sol.y[-1, 1], p)[0]
    torch.testing.assert_close(gradient, torch.stack([0 * end, torch.cos(end)]), rtol=0, atol=1e-5)
