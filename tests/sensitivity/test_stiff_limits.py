"""Derivatives of implicit methods where the problem is as stiff as can be: ``h |J|`` up to 1e16."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint


def slow(name):
    return pytest.param(name, marks=pytest.mark.slow)


IMPLICIT = ("kvaerno5", "trbdf2", slow("kvaerno3"), slow("sdirk2"), "rodas5p", slow("rodas4"), "radau5", "bdf", slow("auto"))


def robertson(t, y, p):
    a, b, c = p[0] * y[0], p[1] * y[1] * y[2], p[2] * y[1] ** 2
    return torch.stack([-a + b, a - b - c, c])


@pytest.mark.parametrize("method", IMPLICIT)
def test_exponents_of_robertsons_kinetics_far_out(method):
    # y1 goes as (p1 / p2)^2 ... : d ln y1 / d ln p tends to (-2, 2, -1)
    p = torch.tensor([0.04, 1e4, 3e7], requires_grad=True)
    rtol = 1e-4 if method in ("trbdf2", "sdirk2") else 1e-6
    y1 = adjoint.solve_ivp(robertson, (0.0, 1e11), torch.tensor([1.0, 0, 0]), args=(p,), method=method, rtol=rtol, atol=1e-14).y[-1, 0]
    exponents = torch.autograd.grad(y1, p)[0] * p.detach() / y1.detach()
    torch.testing.assert_close(exponents, torch.tensor([-2.0, 2.0, -1.0]), atol=1e-3, rtol=0)


def relaxation(stiffness, split):
    """``y`` follows ``p^2 cos t`` and drives ``z' = -y z``; ``z`` ends at ``exp(-p^2 sin 1)``."""

    def fast(t, y, p):
        rate = -stiffness * (y[:1] - p**2 * torch.cos(t)) - p**2 * torch.sin(t)
        return torch.cat([rate, 0 * y[1:]])

    def slowly(t, y, p):
        return torch.cat([0 * y[:1], -y[:1] * y[1:]])

    return adjoint.SplitFunction(slowly, fast) if split else lambda t, y, p: fast(t, y, p) + slowly(t, y, p)


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batched"])
@pytest.mark.parametrize("stiffness", [1e12, 1e16])
@pytest.mark.parametrize("method", ["kvaerno5", slow("trbdf2"), slow("kvaerno3"), slow("sdirk2"), "rodas4", "radau5", "bdf", "kencarp4"])
@pytest.mark.slow_cases(
    "bdf-1e+16-one", "bdf-1000000000000.0-batched", "kencarp4-1000000000000.0-one", "kencarp4-1e+16-batched", "bdf-1e+16-batched",
)  # fmt: skip
def test_first_and_second_derivatives_on_a_slow_manifold(method, stiffness, batched):
    fun = relaxation(stiffness, method == "kencarp4")
    if batched:
        one = fun
        each = lambda part: lambda t, y, p: torch.vmap(part, in_dims=(0, 0, None))(t, y, p)  # noqa: E731
        fun = adjoint.SplitFunction(each(one.explicit), each(one.implicit)) if method == "kencarp4" else each(one)
    tol = 1e-4 if method == "trbdf2" else 1e-5

    def end(p):
        y0 = torch.cat([p**2, torch.ones(1)])
        y0 = y0.expand(2, -1) if batched else y0
        sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, args=(p,), method=method, rtol=tol, atol=tol * 1e-2, max_steps=600, batched=batched)
        return sol.y[-1, 0] if batched else sol.y[-1]

    p = torch.tensor([0.7], requires_grad=True)
    s = math.sin(1.0)
    z = math.exp(-0.49 * s)
    truth = 1.4 * math.cos(1.0), -1.4 * s * z, (-2 * s + 1.96 * s * s) * z
    y = end(p)
    fast = torch.autograd.grad(y[0], p, retain_graph=True)[0].item()
    first = torch.autograd.grad(y[1], p, create_graph=True)[0]
    second = torch.autograd.grad(first, p)[0].item()
    assert fast == pytest.approx(truth[0], rel=1e-9)
    assert first.item() == pytest.approx(truth[1], abs=20 * tol)
    assert second == pytest.approx(truth[2], abs=100 * tol)
    if not batched:
        along = torch.func.jvp(end, (p.detach(),), (torch.ones(1),))[1]
        torch.testing.assert_close(along, torch.stack([torch.tensor(fast), first.detach()[0]]), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batched"])
@pytest.mark.parametrize("method", ["kvaerno5", "kvaerno3", "trbdf2"])
def test_badly_scaled_kinetics_do_not_stall(method, batched):
    y0 = torch.tensor([1e4, 0.0, 0.0])
    fun = lambda t, y: robertson(t, y.T, (0.04, 1e4, 3e7)).T if batched else robertson(t, y, (0.04, 1e4, 3e7))  # noqa: E731
    y0 = y0.unsqueeze(0) if batched else y0
    with torch.no_grad():
        sol = adjoint.solve_ivp(fun, (0.0, 1e8), y0, method=method, rtol=1e-4, atol=1e-4, max_steps=300, batched=batched)
    assert int(sol.stats.n_steps) < 300


@pytest.mark.parametrize("method", ["kvaerno5", "auto"])
def test_stages_beyond_a_jump_have_no_derivative_in_its_time(method):
    fun = lambda t, y: -5 * (y - (t > 0.3).to(y.dtype))  # noqa: E731
    jump = torch.tensor([0.3], requires_grad=True)
    with pytest.raises(adjoint.UnsupportedCombination, match="kvaerno3"):
        adjoint.solve_ivp(fun, (0.0, 1.0), torch.zeros(1), method=method, step_ts=jump)
    value = adjoint.solve_ivp(fun, (0.0, 1.0), torch.zeros(1), method=method, step_ts=jump.detach(), rtol=1e-8, atol=1e-10).y[-1]
    assert value.item() == pytest.approx(1 - math.exp(-3.5), abs=1e-6)


@pytest.mark.parametrize("method", [slow("kvaerno3"), "trbdf2", slow("trapezoid")])
def test_slopes_handed_on_have_the_derivative_of_the_steps(method):
    """Jumps, samples, derivatives in times: the sweep, steps as rows, batches and checkpoints against plain autograd through the steps."""

    def solve(gradient, batched=False, jumps=True):
        p, end, jump, y0 = (torch.tensor(x, requires_grad=True) for x in (1.3, 2.0, 0.7, [1.0, 0.4]))
        fun = lambda t, y: -p * y * (1 + torch.cos(3 * t)).unsqueeze(-1) + (t > 0.7).to(y.dtype).unsqueeze(-1) * y.flip(-1) ** 2  # noqa: E731
        state = y0.expand(2, -1) * torch.tensor([[1.0], [2.0]]) if batched else y0
        more = {"step_ts": jump.unsqueeze(0)} if jumps else {}
        ts = torch.linspace(0.1, 1.9, 7)
        sol = adjoint.solve_ivp(
            fun, (torch.tensor(0.0), end), state, t_eval=ts, method=method, rtol=1e-3, gradient=gradient, batched=batched,
            **more,
        )  # fmt: skip
        loss = (sol.y**2).sum()
        wanted = (p, y0, end, jump) if jumps else (p, y0, end)
        return torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)

    for batched in (False, True):
        for jumps in (False, True):
            truth = solve(adjoint.Backprop(), batched, jumps)
            found = solve(adjoint.DiscreteAdjoint(keep_bytes=0), batched, jumps)
            for a, b in zip(found, truth, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
