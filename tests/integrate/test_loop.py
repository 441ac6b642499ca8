"""What one loop must do alike for one trajectory and for many, whatever the method."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from adjoint import solve_dae, solve_ivp
from adjoint.integrate import AdamsSolver, BdfSolver, Plan, StageSolver
from adjoint.integrate.clock import TimelineOfMany, TimelineOfOne
from adjoint.integrate.numbers import any_of, negated
from adjoint.integrate.one_step import OneStepOfMany, OneStepOfOne
from adjoint.integrate.stepper import Attempt, Fate, StageWork
from adjoint.linalg import DenseLU
from adjoint.methods import METHODS as METHODS_BY_NAME
from adjoint.system.jacobians import DenseJacobian

METHODS = ("tsit5", "rodas5p", "kvaerno5", "radau5", "bdf", "abm")


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@pytest.mark.parametrize("method", METHODS)
def test_stops_behind_the_end_of_a_trajectory(method: str) -> None:
    """A trajectory that ends before a time of ``step_ts`` takes the steps that it takes without it."""
    ends = torch.tensor([1.0, 0.35, 0.6], requires_grad=True)
    sol = solve_ivp(decay, (0.0, ends), torch.ones(3, 1), method=method, batched=True, step_ts=torch.tensor([0.2, 0.6, 0.8]), max_steps=500)
    assert torch.equal(sol.status, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(sol.y[-1, :, 0], torch.exp(-ends), rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(sol.y[-1].sum(), ends)
    torch.testing.assert_close(slope, -torch.exp(-ends.detach()), rtol=0, atol=1e-5)
    for row, stops in enumerate(([0.2, 0.6, 0.8], [0.2], [0.2])):
        alone = solve_ivp(
            decay, (0.0, ends[row : row + 1].detach()), torch.ones(1, 1), method=method, batched=True, step_ts=torch.tensor(stops)
        )
        assert int(sol.stats.n_accepted[row]) == int(alone.stats.n_accepted[0])


@pytest.mark.parametrize("method", METHODS)
def test_stops_at_the_start(method: str) -> None:
    starts = torch.tensor([0.0, 0.2, 0.35], requires_grad=True)
    sol = solve_ivp(decay, (starts, 1.0), torch.ones(3, 1), method=method, batched=True, step_ts=torch.tensor([0.2, 0.3]), max_steps=500)
    torch.testing.assert_close(sol.y[-1, :, 0], torch.exp(starts - 1), rtol=0, atol=1e-5)
    (slope,) = torch.autograd.grad(sol.y[-1].sum(), starts)
    torch.testing.assert_close(slope, torch.exp(starts.detach() - 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_stops_behind_the_end_of_a_constrained_trajectory(method: str) -> None:
    def residual(t: Tensor, y: Tensor, yp: Tensor) -> Tensor:
        return torch.stack([yp[..., 0] + y[..., 0], y[..., 1] - y[..., 0] ** 2], -1)

    ends = torch.tensor([1.0, 0.35])
    sol = solve_dae(residual, (0.0, ends), torch.ones(2, 2), method=method, batched=True, step_ts=torch.tensor([0.2, 0.6]), max_steps=500)
    expected = torch.stack([torch.exp(-ends), torch.exp(-2 * ends)], -1)
    torch.testing.assert_close(sol.y[-1], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [None, 3])
def test_terminal_event_before_a_stop(method: str, rows: int | None) -> None:
    """A step that is cut short before an event does not end on an anchor: what follows is still in the same segment."""

    def event(t: Tensor, y: Tensor) -> Tensor:
        return y[..., 0] - 0.5

    event.terminal = True  # type: ignore[attr-defined]
    y0 = torch.tensor([1.0]) if rows is None else torch.tensor([[1.0], [1.5], [0.9]])
    stops = torch.tensor([0.3, 2.0, 3.0])
    sol = solve_ivp(decay, (0.0, 5.0), y0, method=method, batched=rows is not None, events=event, step_ts=stops, rtol=1e-8, atol=1e-10)
    expected = torch.log(y0[..., 0] / 0.5)
    torch.testing.assert_close(sol.events[0].t.reshape(expected.shape), expected, rtol=0, atol=1e-6)
    assert torch.equal(torch.as_tensor(sol.status), torch.ones(expected.shape, dtype=torch.int64))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batched", [False, True])
def test_samples_at_both_ends(method: str, batched: bool) -> None:
    y0 = torch.ones(2, 1) if batched else torch.ones(1)
    sol = solve_ivp(decay, (0.0, 1.0), y0, t_eval=torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]), method=method, batched=batched)
    expected = torch.tensor([1.0, 1.0, math.exp(-0.5), math.exp(-1.0), math.exp(-1.0)])
    torch.testing.assert_close(sol.y.reshape(5, -1)[:, 0], expected, rtol=0, atol=2e-5)
    assert torch.equal(sol.y[0], y0) and torch.equal(sol.y[1], y0) and torch.equal(sol.y[3], sol.y[4])


class Driven(NamedTuple):
    """A stepper of ``y' = -y`` from ``y(0) = 1``, with its plan and anchors."""

    stepper: Any
    plan: Plan
    line: Any


def steppers(kind: str) -> Driven:
    rows, f = 2, lambda t, y: -y
    method = METHODS_BY_NAME[kind.split("-")[0]]
    one = kind.endswith("-one")
    plan = Plan(method=method, controller=None, real=torch.float64, rtol=1e-6, atol=1e-8, keep_stages=True)
    anchors = torch.tensor([[0.0], [1.0]]).expand(2, 1 if one else rows).contiguous()
    line = TimelineOfOne(plan, anchors) if one else TimelineOfMany(plan, anchors)
    y0 = torch.ones(1 if one else rows, 3)
    cpu, jacobian, linear = torch.device("cpu"), DenseJacobian(), DenseLU()
    if method.multistep:
        work = StageWork.zero(None if one else rows, cpu)
        bdf = BdfSolver(f, plan, jacobian, linear, False, work, None, alone=one)
        solver: Any = bdf if method.implicit else AdamsSolver(f, plan, rows, cpu)
        solver.enter(line, y0)
        return Driven(solver, plan, line)
    equations: Any = f
    if method.implicit:
        equations = StageSolver(f, plan, jacobian, linear, None if one else rows, cpu)
    if one:
        return Driven(OneStepOfOne(equations, plan, line, y0, (1, 3), None, None), plan, line)
    return Driven(OneStepOfMany(equations, plan, line, y0, None), plan, line)


@pytest.mark.parametrize("kind", [f"{m}-{form}" for m in METHODS for form in ("one", "many") if (m, form) != ("abm", "one")])
def test_what_the_loop_relies_on(kind: str) -> None:
    """Every stepper by hand: an attempt changes nothing, a refused one leaves the state and asks for a shorter step, an accepted one is the
    state from then on, and its stages are those of a polynomial that ends there."""
    stepper, plan, line = steppers(kind)
    step, running, bad = stepper.begin()
    assert any_of(running) and not any_of(bad)

    def attempted(t: Any, size: float) -> tuple[Attempt, Any]:
        h = size if line.rows is None else torch.full((line.rows,), size)
        no = False if line.rows is None else torch.zeros(line.rows, dtype=torch.bool)
        attempt = Attempt(t, h, t + h, line.first, no, running, h, no, False, False)
        return attempt, stepper.attempt(attempt)

    begun, size = stepper.y.clone(), 1e-3
    step = stepper.fit(step, size if line.rows is None else torch.full((line.rows,), size), running)
    attempt, trial = attempted(line.start, size)
    assert torch.equal(stepper.y, begun)
    assert any_of(trial.passed) and not any_of(trial.bad) and not any_of(trial.hopeless)
    torch.testing.assert_close(trial.y, torch.full_like(begun, math.exp(-size)), rtol=0, atol=1e-5)
    weights = plan.method.dense_weights(torch.tensor(1.0))
    stages = torch.stack(list(trial.stages(attempt.running))).reshape(len(weights), -1)
    inside = torch.einsum("s,sn->n", weights, stages).reshape(begun.shape)
    torch.testing.assert_close(begun + size * inside, trial.y, rtol=0, atol=1e-12)

    everybody = negated(attempt.cut)
    following = stepper.follow(attempt, trial, step, Fate(everybody, False, None, running, attempt.lands))
    assert torch.equal(stepper.y, trial.y)
    assert torch.as_tensor(following).gt(0).all()
    # a step that is far too long is refused, and nothing has moved
    large = 1e3
    following = stepper.fit(following, large if line.rows is None else torch.full((line.rows,), large), running)
    attempt, trial = attempted(attempt.end, large)
    if not any_of(trial.passed):
        before = stepper.y.clone()
        nobody = False if line.rows is None else torch.zeros(line.rows, dtype=torch.bool)
        shorter = stepper.follow(attempt, trial, following, Fate(nobody, False, None, running, nobody))
        assert torch.equal(stepper.y, before)
        assert torch.as_tensor(shorter).lt(large).all()
