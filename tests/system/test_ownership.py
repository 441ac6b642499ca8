"""Solutions that are stored on what they were computed from are freed, and graphs keep what their derivatives need."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from adjoint import (
    Backprop,
    DiscreteAdjoint,
    Event,
    ForwardSensitivity,
    InterpolatingAdjoint,
    odeint,
    odeint_dense,
    solve_dae,
    solve_ivp,
    solve_root,
)
from adjoint.nn import NeuralODE
from adjoint.torchdiffeq import odeint_adjoint, odeint_event

TIMES = torch.linspace(0.0, 1.0, 3)
NODE = DiscreteAdjoint(keep_bytes=0)


class Decay(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, t, y):
        return -self.w * y

    def root(self, x):
        return x**2 - self.w

    def residual(self, t, y, slope):
        return slope + self.w * y


def ivp(m, **options):
    return solve_ivp(m, (0.0, 1.0), torch.ones(2), rtol=1e-8, atol=1e-8, **options)


def falling(t, y):
    return y[0] - 0.5


CASES = {
    "recorded": lambda m: ivp(m),
    "node": lambda m: ivp(m, gradient=NODE).y,
    "samples": lambda m: {"kept": [ivp(m, gradient=NODE, t_eval=TIMES)]},
    "own method": lambda m: solve_ivp(m.forward, (0.0, 1.0), torch.ones(2), gradient=NODE),
    "closure": lambda m: solve_ivp(lambda t, y: m(t, y), (0.0, 1.0), torch.ones(2), gradient=NODE),
    "stiff": lambda m: ivp(m, method="kvaerno5"),
    "multistep": lambda m: ivp(m, method="bdf"),
    "dense": lambda m: ivp(m, dense_output=True),
    "dense with resets": lambda m: ivp(m, dense_output=True, events=Event(falling, reset=lambda t, y: y + 1)),
    "event": lambda m: ivp(m, events=falling),
    "quadrature": lambda m: ivp(m, quadrature=lambda t, y: m(t, y)),
    "mass": lambda m: ivp(m, mass_matrix=torch.eye(2), method="radau5"),
    "checkpoints": lambda m: ivp(m, gradient=DiscreteAdjoint(checkpoints=3)),
    "backprop": lambda m: solve_ivp(m, (0.0, 1.0), torch.ones(3, 2), batched=True, method="kvaerno3", gradient=Backprop()),
    "forward": lambda m: ivp(m, gradient=ForwardSensitivity()),
    "continuous": lambda m: ivp(m, gradient=InterpolatingAdjoint()),
    "dae": lambda m: solve_dae(m.residual, (0.0, 1.0), torch.ones(2)),
    "root": lambda m: solve_root(m.root, torch.ones(2)),
    "drop-in": lambda m: odeint_adjoint(m, torch.ones(2), TIMES),
    "drop-in, continuous": lambda m: odeint_adjoint(m, torch.ones(2), TIMES, adjoint_options={}),
    "drop-in, dense": lambda m: odeint_dense(m, torch.ones(2), 0.0, 1.0),
    "drop-in, event": lambda m: odeint_event(m, torch.ones(2), torch.tensor(0.0), event_fn=falling),
    "layer": lambda m: NeuralODE(m, time_dependent=True, t_span=(0.0, 1.0))(torch.ones(2)),
}


@pytest.mark.parametrize("case", CASES)
def test_stored_on_their_own_module(case):
    module = Decay()
    module.last = CASES[case](module)
    seen = weakref.ref(module)
    del module
    gc.collect()
    assert seen() is None


@pytest.mark.users_defaults
def test_stored_on_their_own_module_when_recorded():
    test_stored_on_their_own_module("recorded")


END = math.exp(-1.0)
#: one result each, and its derivative in w: of exp(-w), of what is behind it, of (log 2) / w, sqrt(w)
LEFT = {
    "end": (lambda m: ivp(m, gradient=NODE).y[-1, 0], -END),
    "recorded": (lambda m: ivp(m).y[-1, 0], -END),
    "dense": (lambda m: ivp(m, dense_output=True)(1.0)[0], -END),
    "event": (lambda m: ivp(m, events=falling).events[0].t[0], -math.log(2.0)),
    "quadrature": (lambda m: ivp(m, quadrature=lambda t, y: y[0]).quadrature, -1 + 2 * END),
    "dae": (lambda m: solve_dae(m.residual, (0.0, 1.0), torch.ones(2), rtol=1e-8, atol=1e-8).y[-1, 0], -END),
    "root": (lambda m: solve_root(m.root, torch.ones(2)).x[0], 0.5),
    "drop-in, dense": (lambda m: odeint_dense(m, torch.ones(2), 0.0, 1.0)(torch.tensor(1.0))[0], -END),
    "a root of a root": (lambda m: solve_root(lambda x, a: x - a, torch.ones(1), (solve_root(m.root, torch.ones(1)).x,)).x[0], 0.5),
}


@pytest.mark.parametrize("case", LEFT)
def test_one_result_is_enough(case):
    """Everything else may be gone, the function too."""
    value, want = LEFT[case]
    module = Decay()
    w, left = module.w, value(module)
    del module
    gc.collect()
    assert float(torch.autograd.grad(left, w)[0]) == pytest.approx(want, rel=1e-5)


#: of exp(-w), of sqrt(w)
SECOND = {"end": END, "root": -0.25, "stiff": END, "checkpoints": END, "drop-in": END}


@pytest.mark.parametrize("case", SECOND)
def test_a_derivative_is_enough(case):
    """Those that can be differentiated again keep what that needs, without the result that they are of."""
    module = Decay()
    w = module.w
    solve = {
        **{name: value for name, (value, _) in LEFT.items()},
        "stiff": lambda m: ivp(m, method="kvaerno5").y[-1, 0],
        "checkpoints": lambda m: ivp(m, gradient=DiscreteAdjoint(checkpoints=3)).y[-1, 0],
        "drop-in": lambda m: odeint(m, torch.ones(2), TIMES)[-1, 0],
    }[case]
    first = torch.autograd.grad(solve(module), w, create_graph=True)[0]
    del module
    gc.collect()
    assert float(torch.autograd.grad(first, w)[0]) == pytest.approx(SECOND[case], rel=1e-4)


#: dense output, and how many times exp(-w t) it is where t = 0.4
SLOPES = {
    "dense": (lambda m: ivp(m, dense_output=True, gradient=NODE), 1.0),
    "drop-in, dense": (lambda m: odeint_dense(m, torch.ones(2), 0.0, 1.0, rtol=1e-8, atol=1e-8), 1.0),
    "resets": (lambda m: ivp(m, dense_output=True, gradient=NODE, events=Event(lambda t, y: t - 0.2, reset=lambda t, y: 2 * y)), 2.0),
}


def by_autograd(at):
    t = torch.tensor(0.4, requires_grad=True)
    return torch.autograd.grad(at(t), t, create_graph=True)[0]


WAYS = {
    "autograd": by_autograd,
    "grad": lambda at: torch.func.grad(at)(torch.tensor(0.4)),
    "jvp": lambda at: torch.func.jvp(at, (torch.tensor(0.4),), (torch.ones(()),))[1],
    "mapped": lambda at: torch.vmap(torch.func.grad(at))(torch.tensor([0.4, 0.6]))[0],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", SLOPES)
def test_a_slope_of_the_dense_output_is_enough(case, way):
    """Derivatives in the time lead past the states to what these are made of; solutions are looked at in transforms, too."""
    solve, height = SLOPES[case]
    module = Decay()
    w, slope = module.w, (lambda sol: WAYS[way](lambda t: sol(t)[0]))(solve(module))
    del module
    gc.collect()
    assert float(slope) == pytest.approx(-height * math.exp(-0.4), rel=1e-5)
    # d/dw of -w exp(-w t)
    assert float(torch.autograd.grad(slope, w)[0]) == pytest.approx(-height * 0.6 * math.exp(-0.4), rel=1e-4)


@pytest.mark.users_defaults
def test_what_a_function_put_aside_outlives_the_solve():
    """While a solve is recorded the function sees tensors of its graph."""
    w, aside = torch.tensor(1.0, requires_grad=True), []

    def rate(t, y):
        aside.append(w * y.sum())
        return -w * y

    solve_ivp(rate, (0.0, 1.0), torch.ones(2), method="euler", first_step=0.5)
    gc.collect()
    # w (2 - w) is least at w = 1: the state after half a step is 1 - w / 2, for each of two
    (got,) = torch.autograd.grad(aside[-1], w)
    assert float(got) == pytest.approx(0.0, abs=1e-6)


def test_results_may_be_changed_in_place():
    w = torch.tensor(1.0, requires_grad=True)
    y = solve_ivp(lambda t, y: -w * y, (0.0, 1.0), torch.ones(2), gradient=NODE, rtol=1e-8, atol=1e-8).y
    y.mul_(3.0)
    assert float(torch.autograd.grad(y[-1, 0], w)[0]) == pytest.approx(-3 * END, rel=1e-6)
