"""Who listens to a tensor that the solve uses (a hook, ``retain_grad``) hears the whole gradient, once; who freezes one after the solve
gets none of it, as in any graph of PyTorch."""

from __future__ import annotations

import pytest
import torch

import adjoint

START = torch.tensor([1.0, 0.5, 0.2], dtype=torch.float64)
STRATEGIES = {
    "recorded": {},
    "discrete": {"gradient": adjoint.DiscreteAdjoint(keep_bytes=0)},
    "checkpoints": {"gradient": adjoint.DiscreteAdjoint(checkpoints=3)},
    "interpolating": {"gradient": adjoint.InterpolatingAdjoint()},
    "quadrature": {"gradient": adjoint.QuadratureAdjoint()},
    "backsolve": {"gradient": adjoint.BacksolveAdjoint()},
    "forward": {"gradient": adjoint.ForwardSensitivity()},
    "backprop": {"gradient": adjoint.Backprop()},
    "rodas5p": {"method": "rodas5p"},
    "kvaerno5": {"method": "kvaerno5"},
    "bdf": {"method": "bdf"},
    "abm": {"method": "abm"},
    "compiled": {"compile": True},
    "batched": {"batched": True},
    "root": None,
    "dae": None,
    "odeint": None,
    "odeint_adjoint": None,
}


def end(name, rate, as_argument):
    """Of the decay of three numbers, by ``rate``, which is an argument, or captured."""
    how, args = STRATEGIES[name], (rate,) if as_argument else ()
    fun = (lambda t, y, k: -k * y) if as_argument else (lambda t, y: -rate * y)
    if name == "root":
        return adjoint.solve_root(lambda x, *a: fun(0.0, x, *a) + START, START, args).x
    if name == "dae":
        return adjoint.solve_dae(lambda t, y, yp, *a: yp - fun(t, y, *a), (0.0, 1.0), START, args=args).y[-1]
    if name == "odeint":
        return adjoint.odeint(lambda t, y: fun(t, y, *args), START, torch.tensor([0.0, 1.0]))[-1]
    if name == "odeint_adjoint":
        options = {"adjoint_method": "dopri5", "adjoint_params": (rate,)}
        return adjoint.odeint_adjoint(lambda t, y: fun(t, y, *args), START, torch.tensor([0.0, 1.0]), **options)[-1]
    y0 = START.expand(2, 3) if "batched" in how else START
    return adjoint.solve_ivp(fun, (0.0, 1.0), y0, args, **how).y[-1]


def gradient(name, as_argument):
    rate = torch.tensor([0.7, 0.2, 1.1], requires_grad=True)
    return torch.autograd.grad(end(name, rate, as_argument).sum(), rate)[0]


@pytest.mark.parametrize("as_argument", [False, True])
@pytest.mark.parametrize("name", STRATEGIES)
def test_hooks_and_retained_gradients(name, as_argument):
    base, heard = torch.tensor([0.7, 0.2, 1.1], requires_grad=True), []
    rate = base * 1.0
    rate.retain_grad()
    base.register_hook(lambda g: heard.append(g))
    rate.register_hook(lambda g: 2 * g)
    end(name, rate, as_argument).sum().backward()
    want = 2 * gradient(name, as_argument)
    assert len(heard) == 1
    torch.testing.assert_close(base.grad, want)
    torch.testing.assert_close(rate.grad, want)


@pytest.mark.parametrize("name", STRATEGIES)
def test_frozen_after_the_solve(name):
    rate, scale = torch.tensor([0.7, 0.2, 1.1], requires_grad=True), torch.tensor(1.0, requires_grad=True)
    y = scale * end(name, rate, False)
    rate.requires_grad_(False)
    y.sum().backward()
    assert rate.grad is None
    torch.testing.assert_close(scale.grad, y.sum().detach())
