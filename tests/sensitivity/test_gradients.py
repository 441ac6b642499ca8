"""One matrix: every method, every strategy, every form; against plain autograd, finite differences and trusted values."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, InterpolatingAdjoint, solve_ivp
from adjoint.errors import InvalidInput
from adjoint.methods import METHODS

from ..helpers.problems import ADAPTIVE, ALL, driven, lotka_volterra, options

STRATEGIES = [DiscreteAdjoint(), Backprop()]
FORMS = ["ends", "samples", "steps", "dense"]


def _relative(got, want):
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in zip(got, want, strict=True))


def _loss(form, gradient, method, y0, p, batched, t_span=(0.0, 1.0), times=None):
    kind = {"ends": {}, "steps": {"t_eval": "steps"}, "dense": {"dense_output": True}}
    extra = kind.get(form, {"t_eval": times if times is not None else torch.tensor([0.0, 0.21, 0.5, 0.5, 0.93, 1.0])})
    sol = solve_ivp(driven, t_span, y0, (p,), batched=batched, gradient=gradient, **options(method, rtol=1e-4, atol=1e-6), **extra)
    y = sol(torch.tensor([0.13, 0.48, 0.77])) if form == "dense" else sol.y
    weights = torch.linspace(1.0, 2.0, y[0].numel()).reshape(y[0].shape)
    # the norm of the steps' states, NaN padding left out
    return (torch.nan_to_num(y) * weights).sin().sum()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ALL)
def test_discrete_adjoint_equals_backprop(method, form, batched):
    """To 1e-10 of plain autograd through the same steps, in initial state, parameters, ends and sample times."""
    y0 = torch.tensor([[0.5, -1.0], [1.2, 0.3], [-0.4, 0.8]])
    p = torch.tensor([[0.9, 1.3], [1.1, 0.7], [2.0, 0.2]])
    y0, p = (y0, p) if batched else (y0[0], p[0])
    y0, p = y0.requires_grad_(), p.requires_grad_()
    ends = torch.tensor([0.0, 1.0], requires_grad=True)
    times = torch.tensor([0.0, 0.21, 0.5, 0.5, 0.93, 1.0], requires_grad=True)
    inputs = [y0, p, ends] + ([times] if form == "samples" else [])
    gradients = [torch.autograd.grad(_loss(form, s, method, y0, p, batched, tuple(ends.unbind()), times), inputs) for s in STRATEGIES]
    assert _relative(*gradients) < 1e-10
    without_times = torch.autograd.grad(_loss(form, DiscreteAdjoint(), method, y0, p, batched), [y0, p])
    assert _relative(without_times, gradients[1][:2]) < 1e-10


def _steps_of(method, size):
    """Options for steps of this size, whatever their error is."""
    # with wider tolerances iterations for coupled stages end early, whose rest is not differentiated
    wide = 0.1 if method in ("radau5", "radauIIA3") else 1e30
    return {"first_step": size} | ({"rtol": wide, "atol": wide, "max_step": size} if METHODS[method].adaptive else {})


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_gradcheck(method, batched, gradient):
    """First and second derivatives against finite differences of the fixed discretisation."""
    y0 = torch.tensor([[0.5, -1.0], [1.2, 0.3]])
    p = torch.tensor([[0.9, 1.3], [1.1, 0.7]])
    y0, p = (y0, p) if batched else (y0[0], p[0])
    grid = _steps_of(method, 0.25)

    def solve(y0, p):
        return solve_ivp(
            driven, (0.0, 0.5), y0, (p,), t_eval=[0.2, 0.5], batched=batched, gradient=gradient, method=method, **grid
        ).y

    inputs = (y0.requires_grad_(), p.requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
@pytest.mark.parametrize("method", ALL)
@pytest.mark.slow_cases("rodas4-backprop", "kvaerno3-backprop", "verner7-discrete", "abm-discrete")
def test_gradcheck_of_times(method, gradient):
    """Ends and sample times: with constant steps the discretisation moves with the start and its last step with the end."""
    grid = _steps_of(method, 0.2)
    p = torch.tensor([0.9, 1.3])

    def solve(t0, t1, ts):
        y0 = torch.tensor([0.5, -1.0])
        return solve_ivp(driven, (t0, t1), y0, (p,), t_eval=ts, gradient=gradient, method=method, **grid).y

    ends = torch.tensor(0.0, requires_grad=True), torch.tensor(0.5, requires_grad=True)
    assert torch.autograd.gradcheck(solve, (*ends, torch.tensor([0.11, 0.45], requires_grad=True)), fast_mode=True)
    if method in ("euler", "implicit_euler", "implicit_midpoint"):
        # samples of their steps lie on straight lines, whose second derivatives are not those of the solution
        with pytest.raises(InvalidInput, match=r"straight line|of first order"):
            torch.autograd.gradgradcheck(solve, (*ends, torch.tensor([0.11, 0.45], requires_grad=True)), fast_mode=True)
        return
    assert torch.autograd.gradgradcheck(solve, (*ends, torch.tensor([0.11, 0.45], requires_grad=True)), fast_mode=True)


#: of implicit methods plain autograd through so many iterations takes minutes, for what it equals in shorter solves too
REFERENCES = [
    pytest.param(method, gradient, id=f"{method}-{name}")
    for method in ADAPTIVE if METHODS[method].order >= 5
    for name, gradient in zip(("discrete", "backprop"), STRATEGIES, strict=True) if name == "discrete" or not METHODS[method].implicit
]  # fmt: skip


@pytest.mark.parametrize("method, gradient", REFERENCES)
@pytest.mark.slow_cases("tsit5-backprop", "dopri5-discrete", "abm-backprop")
def test_lotka_volterra_reference(method, gradient):
    """Trusted values: u(10), and the gradient of |1 - u(10)|^2 / 2 in parameters and initial state."""
    p = torch.tensor([1.5, 1.0, 3.0, 1.0], requires_grad=True)
    u0 = torch.ones(2, requires_grad=True)
    sol = solve_ivp(lotka_volterra, (0.0, 10.0), u0, (p,), method=method, rtol=1e-10, atol=1e-10, gradient=gradient)
    grads = torch.autograd.grad(0.5 * ((1 - sol.y[-1]) ** 2).sum(), (p, u0))
    assert torch.allclose(sol.y[-1], torch.tensor([1.0263447675750927, 0.9096910781360363]), rtol=0, atol=5e-8)
    want = torch.tensor([0.6219615855513164, 0.0680014041508733, 0.1691764639959054, 0.2725606939500151])
    assert torch.allclose(grads[0], want, rtol=0, atol=3e-7)
    assert torch.allclose(grads[1], torch.tensor([0.299599508303693, -0.0141518163448589]), rtol=0, atol=3e-7)


def test_van_der_pol_where_backsolve_is_wrong():
    """dx(T)/dmu at mu = 5, T = 5: trusted value 1.902; a contracting problem, on which integrating backwards goes astray."""

    def van_der_pol(t, u, mu):
        return torch.stack([u[1], mu * (1 - u[0] ** 2) * u[1] - u[0]])

    mu = torch.tensor(5.0, requires_grad=True)
    values = []
    for rtol in (1e-6, 1e-10):
        x = solve_ivp(van_der_pol, (0.0, 5.0), torch.tensor([2.0, 0.0]), (mu,), rtol=rtol, atol=rtol).y[-1, 0]
        values.append(float(torch.autograd.grad(x, mu)[0]))
    assert values[1] == pytest.approx(1.902, abs=5e-4)
    assert values[0] == pytest.approx(values[1], rel=1e-3)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
def test_autonomous_shift(gradient):
    """For an autonomous problem dy/dt0 + dy/dT = 0, and dy/dT = f(y(T))."""
    p = torch.tensor([1.5, 1.0, 3.0, 1.0])
    t0, t1 = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = solve_ivp(lotka_volterra, (t0, t1), torch.ones(2), (p,), rtol=1e-8, atol=1e-8, gradient=gradient).y[-1]
    rate = lotka_volterra(t1, y, p)
    for i in range(2):
        a, b = torch.autograd.grad(y[i], (t0, t1), retain_graph=True)
        assert float(a + b) == pytest.approx(0.0, abs=1e-12)
        assert float(b) == pytest.approx(float(rate[i]), rel=1e-5)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
def test_backwards_in_time(gradient):
    """There and back again is the identity, and so is its Jacobian."""
    p = torch.tensor([1.5, 1.0, 3.0, 1.0])
    tight = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-11, "gradient": gradient}

    def round_trip(u):
        there = solve_ivp(lotka_volterra, (0.0, 2.0), u, (p,), **tight).y[-1]
        return solve_ivp(lotka_volterra, (2.0, 0.0), there, (p,), **tight).y[-1]

    u = torch.tensor([1.0, 0.7])
    assert torch.allclose(round_trip(u), u, atol=1e-9)
    assert torch.allclose(torch.autograd.functional.jacobian(round_trip, u), torch.eye(2), atol=1e-7)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
def test_discontinuity(gradient):
    """A jump of fun at a named time: exact on both sides, and its time is a parameter like any other."""
    jump = torch.tensor(0.4, requires_grad=True)
    slopes = torch.tensor([1.0, -3.0], requires_grad=True)

    def rate(t, y, jump, slopes):
        return torch.where(t < jump, slopes[0], slopes[1]).expand_as(y)

    sol = solve_ivp(rate, (0.0, 1.0), torch.zeros(1), (jump.detach(), slopes), step_ts=jump.reshape(1), rtol=1e-6, gradient=gradient)
    assert float(sol.y[-1]) == pytest.approx(0.4 * 1.0 - 0.6 * 3.0, abs=1e-12)
    in_jump, in_slopes = torch.autograd.grad(sol.y[-1].sum(), (jump, slopes))
    assert float(in_jump) == pytest.approx(4.0, abs=1e-10)
    assert torch.allclose(in_slopes, torch.tensor([0.4, 0.6]), atol=1e-10)


@pytest.mark.parametrize("gradient", STRATEGIES, ids=["discrete", "backprop"])
@pytest.mark.slow_cases("discrete")
def test_complex_state(gradient):
    """y' = i w y + c conj(y): gradients of a real loss follow the convention of PyTorch."""
    w = torch.tensor(1.3, requires_grad=True)
    c = torch.tensor(0.2 - 0.1j, requires_grad=True)
    y0 = torch.tensor([1.0 + 0.5j, -0.3j], requires_grad=True)

    def end(y0, w, c):
        def rate(t, y, w, c):
            return 1j * w * y + c * y.conj()

        return solve_ivp(rate, (0.0, 1.0), y0, (w, c), rtol=1e-9, atol=1e-9, gradient=gradient).y[-1]

    assert torch.autograd.gradcheck(end, (y0, w, c), atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(end, (y0, w, c), atol=1e-5, fast_mode=True)


def test_float32_agrees_with_float64():
    p, u = torch.tensor([1.5, 1.0, 3.0, 1.0]), torch.ones(2)
    grads = []
    for dtype in (torch.float32, torch.float64):
        q = p.to(dtype).requires_grad_()
        y = solve_ivp(lotka_volterra, (0.0, 3.0), u.to(dtype), (q,), rtol=1e-6, atol=1e-6).y
        assert y.dtype == dtype
        grads.append(torch.autograd.grad(y[-1].sum(), q)[0].double())
    assert torch.allclose(*grads, rtol=1e-3)


@pytest.mark.parametrize("gradient", [None, InterpolatingAdjoint()], ids=["discrete", "interpolating"])
def test_third_derivatives_beside_an_integer(gradient):
    """``y' = -2 p y`` with the 2 an integer among the arguments: -8 exp(-2 p)."""
    p, one, n = torch.tensor(0.5, dtype=torch.float64), torch.ones((), dtype=torch.float64), torch.tensor(2)
    y0 = torch.ones(1, dtype=torch.float64)
    options = {"mass_matrix": torch.eye(1, dtype=torch.float64), "method": "radau5", "rtol": 1e-9, "atol": 1e-11, "gradient": gradient}

    def end(p):
        return solve_ivp(lambda t, y, p, n: -p * n * y, (0.0, 1.0), y0, (p, n), **options).y[-1].sum()

    third = torch.func.grad(lambda p: torch.func.jvp(torch.func.grad(end), (p,), (one,))[1])(p)
    assert float(third) == pytest.approx(-8 * math.exp(-1.0), rel=1e-6)
