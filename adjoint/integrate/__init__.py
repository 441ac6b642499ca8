"""How steps follow each other: controllers, the loops, what they record."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .adams import AdamsSolver
from .additive import AdditiveStageSolver
from .alone import LoneStages
from .batched import integrate_batched
from .bdf import BdfSolver
from .companion import Beside
from .controller import IController, PIController, PIDController
from .multistep import MultistepSolver, integrate_multistep
from .multistep_alone import integrate_multistep_alone
from .paired import integrate_paired, too_long
from .plan import Event, Monitor, Plan, Record, Status, rms_norm, shifted_times
from .recording import Recording
from .residual import ResidualSolver
from .single import integrate_single
from .stages import StageSolver

__all__ = [
    "AdamsSolver",
    "AdditiveStageSolver",
    "BdfSolver",
    "Event",
    "IController",
    "LoneStages",
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
    """Run the loop that fits: float decisions for one trajectory, masks for many. ``beside``: see `Companion`; None for steps by the state
    alone."""
    if isinstance(f, (StageSolver, LoneStages, ResidualSolver, MultistepSolver)):
        carried = shape if shape is not None and len(shape) == 1 else None
        if isinstance(f, BdfSolver) and not batched and not f.residual:
            record = integrate_multistep_alone(f, plan, anchors, t_eval, y0, inputs, carried)
        elif isinstance(f, MultistepSolver):
            record = integrate_multistep(f, plan, anchors, t_eval, y0, inputs)
        elif isinstance(f, LoneStages):
            record = integrate_single(f, plan, anchors, t_eval, y0, inputs, carried, None, beside)
        else:
            record = integrate_batched(f, plan, anchors, t_eval, y0, inputs, beside)
        if isinstance(f, MultistepSolver) and beside is not None:
            doubtful, count = too_long(beside(False), plan, record, y0)
            record = replace(record, n_fun=record.n_fun + count)
            if bool(doubtful.any()):
                record = integrate_paired(f, plan, anchors, t_eval, y0, beside, record, doubtful)
        work = f.work
        # where the iteration failed to the last, its NaN are its own
        failed = f.stuck & (record.status == int(Status.NON_FINITE))
        return replace(
            record,
            status=torch.where(failed, int(Status.NEWTON_FAILED), record.status),
            n_fun=record.n_fun + work.n_fun,
            n_jac=work.n_jac,
            n_factorizations=work.n_factorizations,
            n_solves=work.n_solves,
            n_newton=work.n_newton,
        )
    if batched:
        return integrate_batched(f, plan, anchors, t_eval, y0, inputs, beside)
    return integrate_single(f, plan, anchors, t_eval, y0, inputs, shape, recording, beside)
