"""How steps follow each other: controllers, the loops, what they record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .adams import AdamsSolver
from .bdf import BdfSolver
from .clock import TimelineOfMany, TimelineOfOne
from .companion import Beside
from .loop import Walk
from .multistep import MultistepSolver, solve_multistep
from .numbers import lifted
from .one_step import OneStepOfMany, OneStepOfOne
from .paired import integrate_paired, stands, too_long
from .plan import Event, IController, Monitor, PIController, PIDController, Plan, Record, Status, rms_norm, shifted_times
from .recording import Recording
from .residual import ResidualSolver
from .stages import AdditiveStageSolver, StageSolver
from .stepper import Equations

__all__ = [
    "AdamsSolver",
    "AdditiveStageSolver",
    "BdfSolver",
    "Event",
    "IController",
    "Monitor",
    "MultistepSolver",
    "PIController",
    "PIDController",
    "Plan",
    "Record",
    "Recording",
    "ResidualSolver",
    "StageSolver",
    "Status",
    "integrate",
    "rms_norm",
    "shifted_times",
    "stands",
    "too_long",
]


def integrate(
    f: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    batched: bool,
    inputs: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
    recording: Recording | None = None,
    beside: Beside | None = None,
) -> Record:
    """Take the steps that fit: by numbers for one trajectory, by masks for many.

    Parameters
    ----------
    f : flat right-hand side, for implicit methods with their equations, for multistep methods at work
    anchors : (A, B) float64; start, times where a step must end, end; in the direction of integration
    t_eval : (T, B) float64 or None; sample times within the span, in any order
    y0 : (B, n)
    inputs : of the system, for its events
    shape : the shape in which ``f`` takes and gives states of one trajectory, ``(1, n)`` by default
    recording : stops autograd's recording of one trajectory when it has grown too large
    beside : see `Companion`; None for steps by the state alone
    """
    if isinstance(f, StageSolver) and f.alone:
        record = _of_one(f, plan, anchors, t_eval, y0, inputs, _flat(shape), None, beside)
    elif isinstance(f, MultistepSolver):
        record = solve_multistep(f, plan, anchors, t_eval, y0, inputs, _flat(shape))
        if beside is not None:
            doubtful, count = too_long(beside(False), plan, record, y0)
            record = replace(record, n_fun=record.n_fun + count)
            if bool(doubtful.any()):
                record = integrate_paired(f, plan, anchors, t_eval, y0, beside, record, doubtful)
    elif batched or isinstance(f, Equations):
        record = _of_many(f, plan, anchors, t_eval, y0, inputs, beside)
    else:
        return _of_one(f, plan, anchors, t_eval, y0, inputs, shape, recording, beside)
    if not isinstance(f, Equations):
        return record
    work = f.work
    # where the iteration failed to the last, its NaN are its own
    failed = f.stuck & (record.status == int(Status.NON_FINITE))
    return replace(
        record,
        status=torch.where(failed, int(Status.NEWTON_FAILED), record.status),
        n_fun=record.n_fun + work.n_fun,
        **{name: lifted(getattr(work, name), record.n_fun) for name in ("n_jac", "n_factorizations", "n_solves", "n_newton")},
    )


def _flat(shape: Sequence[int] | None) -> Sequence[int] | None:
    """Of the shapes of states, the one that equations of stages know beside ``(1, n)``."""
    return shape if shape is not None and len(shape) == 1 else None


def _of_many(
    f: Any, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor], beside: Beside | None
) -> Record:
    line = TimelineOfMany(plan, anchors)
    walk = Walk(plan, line, t_eval, y0, inputs)
    return walk.solve(OneStepOfMany(f, plan, line, y0, beside))


def _of_one(
    f: Any,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
    shape: Sequence[int] | None,
    recording: Recording | None,
    beside: Beside | None,
) -> Record:
    line, start = TimelineOfOne(plan, anchors), y0 if shape is None else y0.reshape(tuple(shape))
    walk = Walk(plan, line, t_eval, start, inputs)
    stepper = OneStepOfOne(f, plan, line, start, y0.shape, beside, recording)
    ended = walk.run(stepper, recording)
    if ended.status >= 0 and not plan.method.adaptive and not bool(torch.isfinite(ended.y).all()):
        # nobody looked at the states of constant steps: where did they cease to be finite?
        if not plan.keep_states:
            record = _of_one(f, replace(plan, keep_states=True), anchors, t_eval, y0, inputs, shape, None, None)
            return replace(record, states=y0.new_empty((0, *y0.shape)))
        ended = walk.cut_back(ended)
    return walk.record(stepper, ended)
