"""Integrals along the solution: values and derivatives against closed forms, alone and together with everything else."""

from __future__ import annotations

import math

import pytest
import scipy.integrate
import torch
from torch.autograd import gradcheck

from adjoint import Backprop, DiscreteAdjoint, solve_ivp
from adjoint.methods import METHODS

from ..helpers.problems import ALL, driven, options

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

TIGHT = {"rtol": 1e-9, "atol": 1e-11}
BOTH = pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])


def growth(t, y, p):
    return p * y


def energy(t, y, p):
    """``integral y0^2 exp(2 p t) = y0^2 (exp(2 p T) - 1) / (2 p)``"""
    return (y**2).sum(-1)


def closed(y0, p, t0, t1):
    return (y0**2).sum(-1) * torch.expm1(2 * p * (t1 - t0)) / (2 * p)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_closed_form(method, backwards):
    span = (1.0, -0.5) if backwards else (-0.5, 1.0)
    y0, p = torch.tensor([1.0, -2.0]), torch.tensor(-0.7)
    adaptive, order = METHODS[method].adaptive, METHODS[method].order
    opts = options(method, 60, 1.5, **(TIGHT if order > 3 else {}))
    sol = solve_ivp(growth, span, y0, (p,), quadrature=energy, **opts)
    tol = 5e-2 if order == 1 else 1e-3 if order < 4 else 1e-7 if adaptive else 1e-6
    assert sol.quadrature.shape == () and torch.allclose(sol.quadrature, closed(y0, p, *map(torch.tensor, span)), rtol=tol)
    assert sol.y.shape == (2, 2) and torch.allclose(sol.y[-1], y0 * torch.exp(p * (span[1] - span[0])), rtol=tol)


def test_against_scipy_quad():
    """An integrand with time, the state and a parameter; the state known, the integral not elementary."""
    g = lambda t, y, p: torch.exp(-p * t * y[0]) * torch.cos(5 * t)  # noqa: E731
    sol = solve_ivp(lambda t, y, p: -y * p, (0.0, 3.0), torch.tensor([2.0]), (torch.tensor(0.6),), quadrature=g, **TIGHT)
    truth, _ = scipy.integrate.quad(lambda t: math.exp(-0.6 * t * 2 * math.exp(-0.6 * t)) * math.cos(5 * t), 0, 3, epsabs=1e-13)
    assert abs(float(sol.quadrature) - truth) < 1e-8


def test_it_is_under_error_control():
    """A fast integrand on a slow state: the steps follow the integrand."""
    g = lambda t, y: torch.cos(40 * t)  # noqa: E731
    sol = solve_ivp(lambda t, y: 0 * y, (0.0, 2.0), torch.ones(1), quadrature=g, first_step=0.01, rtol=1e-8, atol=1e-10)
    plain = solve_ivp(lambda t, y: 0 * y, (0.0, 2.0), torch.ones(1), first_step=0.01, rtol=1e-8, atol=1e-10)
    assert abs(float(sol.quadrature) - math.sin(80) / 40) < 1e-7 and sol.stats.n_steps > 5 * plain.stats.n_steps


def test_pytree_integrand_and_state():
    """Leaves come back as ``g`` gives them; nothing of the integral shows in ``sol.y``."""
    y0 = {"x": torch.tensor([1.0, 2.0]), "v": (torch.tensor(3.0),)}
    fun = lambda t, y: {"x": -y["x"], "v": (-2 * y["v"][0],)}  # noqa: E731
    g = lambda t, y: [y["x"].unsqueeze(-1) * torch.ones(3), {"v": y["v"][0], "t": t}]  # noqa: E731
    sol = solve_ivp(fun, (0.0, 1.0), y0, quadrature=g, **TIGHT)
    e1 = 1 - math.exp(-1)
    assert set(sol.y) == {"x", "v"} and sol.y["x"].shape == (2, 2)
    assert torch.allclose(sol.quadrature[0], e1 * y0["x"].unsqueeze(-1).expand(2, 3), rtol=1e-8)
    assert abs(float(sol.quadrature[1]["v"]) - 1.5 * (1 - math.exp(-2))) < 1e-8 and abs(float(sol.quadrature[1]["t"]) - 0.5) < 1e-12


def test_complex_integrand_of_a_real_state():
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), quadrature=lambda t, y: y[0] * torch.exp(2j * t), **TIGHT)
    assert (
        sol.y.dtype == torch.float64
        and abs(complex(sol.quadrature) - (1 - complex(math.cos(2), math.sin(2)) * math.exp(-1)) / (1 - 2j)) < 1e-8
    )


def test_float32():
    y0 = torch.ones(2, dtype=torch.float32)
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), y0, quadrature=lambda t, y: y.sum())
    assert sol.quadrature.dtype == torch.float32 and abs(float(sol.quadrature) - 2 * (1 - math.exp(-1))) < 1e-4


# --- batched ---


@pytest.mark.parametrize("vector", [False, True])
def test_batched(vector):
    """Every trajectory its own integral over its own span; shapes ``(B,)`` and ``(B, k)``; gradients as alone."""
    t1 = torch.tensor([0.5, 2.0, -1.0])
    y0 = torch.tensor([[1.0, 2.0], [0.3, -1.0], [2.0, 0.1]]).requires_grad_()
    p = torch.tensor([-0.5, 0.3, -1.0], requires_grad=True)
    g = lambda t, y, p: energy(t, y, p).unsqueeze(-1) * torch.ones(4) if vector else energy(t, y, p)  # noqa: E731
    fun = lambda t, y, p: p.unsqueeze(-1) * y  # noqa: E731
    sol = solve_ivp(fun, (0.0, t1), y0, (p,), batched=True, quadrature=g, **TIGHT)
    truth = closed(y0, p, 0.0, t1)
    got = sol.quadrature
    assert got.shape == ((3, 4) if vector else (3,))
    got = got[:, 2] if vector else got
    assert torch.allclose(got, truth, rtol=1e-8) and sol.y.shape == (2, 3, 2)
    for a, b in zip(torch.autograd.grad(got.sin().sum(), (y0, p)), torch.autograd.grad(truth.sin().sum(), (y0, p)), strict=True):
        assert torch.allclose(a, b, rtol=1e-6)


def test_a_failed_trajectory_has_no_integral():
    p = torch.tensor([2.0, -1.0], requires_grad=True)
    g = lambda t, y, p: y[:, 0]  # noqa: E731
    sol = solve_ivp(
        lambda t, y, p: p.unsqueeze(-1) * y**2, (0.0, 1.0), torch.ones(2, 1), (p,), batched=True, quadrature=g, throw=False, **TIGHT
    )
    assert bool(sol.quadrature[0].isnan()) and abs(float(sol.quadrature[1].detach()) - math.log(2)) < 1e-8
    (got,) = torch.autograd.grad(sol.quadrature[1], p)
    # integral 1 / (1 - p t) = -log(1 - p) / p
    assert float(got[0]) == 0.0 and abs(float(got[1]) - (math.log(2) - 0.5)) < 1e-7


# --- derivatives ---


@BOTH
def test_derivatives(gradient):
    """In the state, the parameter and both ends: ``dG/dT = g(T)``, ``dG/dt0`` by the closed form; second derivatives too."""
    inputs = [torch.tensor(x, requires_grad=True) for x in ([1.0, -2.0], -0.7, 0.2, 1.5)]
    y0, p, t0, t1 = inputs
    sol = solve_ivp(growth, (t0, t1), y0, (p,), quadrature=energy, gradient=gradient, max_step=0.05, **TIGHT)
    got = torch.autograd.grad(sol.quadrature, inputs, create_graph=True)
    want = torch.autograd.grad(closed(y0, p, t0, t1), inputs, create_graph=True)
    assert all(torch.allclose(a, b, rtol=1e-7) for a, b in zip(got, want, strict=True))
    end = energy(t1, y0 * torch.exp(p * (t1 - t0)), p)
    assert torch.allclose(got[3], end, rtol=1e-7)
    weights = [torch.randn_like(x) for x in inputs]
    second = [torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, grads, strict=True)), inputs) for grads in (got, want)]
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(*second, strict=True))


@BOTH
def test_gradcheck_together_with_samples(gradient):
    """Samples, integral and final state share one sweep."""
    weight = torch.tensor(0.3, requires_grad=True)  # captured by the integrand alone

    def value(y0, p, weight, ts):
        g = lambda t, y, p: {"a": weight * y.prod() * t, "b": y * p}  # noqa: E731
        opts = {"rtol": 1e30, "atol": 1e30, "first_step": 0.25, "max_step": 0.25}
        sol = solve_ivp(driven, (0.0, 1.0), y0, (p,), t_eval=ts, quadrature=g, gradient=gradient, **opts)
        return sol.y, sol.quadrature["a"], sol.quadrature["b"]

    y0, p = torch.tensor([0.7, -0.4], requires_grad=True), torch.tensor([1.2, 0.5], requires_grad=True)
    assert gradcheck(value, (y0, p, weight, torch.tensor([0.1, 0.6, 0.9], requires_grad=True)), atol=1e-6, fast_mode=True)


def test_parameters_of_the_integrand_alone():
    """Captured tensors and a module's parameters that only ``quadrature`` uses."""
    c, layer = torch.tensor(2.0, requires_grad=True), torch.nn.Linear(2, 1)
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.tensor([1.0, 3.0]), quadrature=lambda t, y: c**2 * layer(y).squeeze(), **TIGHT)
    gc, gw, gb = torch.autograd.grad(sol.quadrature, (c, layer.weight, layer.bias))
    e1 = 1 - math.exp(-1)
    assert torch.allclose(gw, 4 * e1 * torch.tensor([[1.0, 3.0]]), rtol=1e-7) and torch.allclose(gb, torch.tensor([4.0]), rtol=1e-9)
    assert torch.allclose(gc, 2 * sol.quadrature.detach() / 2, rtol=1e-7)


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd, torch.func.hessian], ids=lambda f: f.__name__)
def test_torch_func(transform):
    y0 = torch.tensor([1.0, -2.0])
    f = lambda p: solve_ivp(growth, (0.0, 1.0), y0, (p,), quadrature=energy, **TIGHT).quadrature  # noqa: E731
    p = torch.tensor(-0.7)
    assert torch.allclose(transform(f)(p), transform(lambda p: closed(y0, p, 0.0, 1.0))(p), rtol=1e-6)


def test_vmap():
    ps, y0 = torch.tensor([-0.7, 0.4, 1.0]), torch.tensor([1.0, -2.0])
    f = lambda p: solve_ivp(growth, (0.0, 1.0), y0, (p,), quadrature=energy, **TIGHT).quadrature  # noqa: E731
    assert torch.allclose(torch.vmap(f)(ps), closed(y0, ps, 0.0, 1.0), rtol=1e-8)
    got = torch.vmap(torch.func.grad(f))(ps)
    assert torch.allclose(got, torch.func.vmap(torch.func.grad(lambda p: closed(y0, p, 0.0, 1.0)))(ps), rtol=1e-6)


# --- together ---


@pytest.mark.parametrize("t_eval", [None, "steps", [0.25, 0.5]], ids=str)
@pytest.mark.parametrize("dense", [False, True])
def test_other_options_do_not_see_it(t_eval, dense):
    """The state, samples, own steps and dense output have the state's shape and values."""
    p, y0 = torch.tensor(-0.7), torch.tensor([1.0, -2.0])
    sol = solve_ivp(growth, (0.0, 1.0), y0, (p,), t_eval=t_eval, dense_output=dense, quadrature=energy, **TIGHT)
    assert torch.allclose(sol.y, y0 * torch.exp(p * sol.t).unsqueeze(-1), rtol=1e-7) and sol.y.shape == (*sol.t.shape, 2)
    assert torch.allclose(sol.quadrature, closed(y0, p, torch.tensor(0.0), torch.tensor(1.0)), rtol=1e-8)
    if dense:
        assert torch.allclose(sol(0.3), y0 * math.exp(-0.21), rtol=1e-7) and sol(torch.tensor([0.3, 0.4])).shape == (2, 2)


@BOTH
def test_up_to_a_terminal_event(gradient):
    """The integral ends at the event: its value, and gradients through the end that moves.

    ``y = y0 exp(-p t)`` falls to ``c``: ``integral y = (y0 - c) / p``.
    """
    y0, p, c = (torch.tensor(x, requires_grad=True) for x in (2.0, 0.7, 0.5))
    reach = lambda t, y, p: y - c  # noqa: E731
    reach.terminal = True
    sol = solve_ivp(
        lambda t, y, p: -p * y, (0.0, 9.0), y0, (p,), events=reach, quadrature=lambda t, y, p: y, gradient=gradient, max_step=0.05, **TIGHT
    )
    assert sol.quadrature.item() == pytest.approx(1.5 / 0.7, rel=1e-9) and sol.t[-1].item() == pytest.approx(math.log(4) / 0.7, rel=1e-9)
    grads = torch.autograd.grad(sol.quadrature, (y0, p, c), create_graph=True)
    assert torch.allclose(torch.stack(grads), torch.tensor([1 / 0.7, -1.5 / 0.49, -1 / 0.7]), rtol=1e-7)
    second = torch.autograd.grad(grads[0] + grads[2] * 2, (y0, p, c), materialize_grads=True)
    assert torch.allclose(torch.stack(second), torch.tensor([0.0, 1 / 0.49, 0.0]), atol=1e-5)


def test_events_see_the_state_only():
    """A state of several leaves, an integrand, and an event that is not terminal: nothing of the integral is cut off."""
    half = lambda t, y: y["x"][1] - 0.5  # noqa: E731
    y0 = {"x": torch.tensor([2.0, 1.0])}
    sol = solve_ivp(lambda t, y: {"x": -y["x"]}, (0.0, 3.0), y0, events=half, quadrature=lambda t, y: y["x"].sum(), **TIGHT)
    assert sol.t_events[0].item() == pytest.approx(math.log(2), abs=1e-8) and sol.events[0].y["x"].shape == (1, 2)
    assert sol.quadrature.item() == pytest.approx(3 * (1 - math.exp(-3)), rel=1e-8)
