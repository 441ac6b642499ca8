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
from .companion import Beside, rests
from .controller import IController, PIController, PIDController
from .multistep import MultistepSolver, integrate_multistep
from .multistep_alone import integrate_multistep_alone
from .paired import integrate_paired, too_long
from .plan import Event, Monitor, Plan, Record, Status, rms_norm, shifted_times
from .recording import Recording
from .residual import ResidualSolver
from .single import integrate_single
from .stages import StageSolver
from .whole import integrate_whole, takes_whole

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
    if plan.compile is not None:
        # numbers would be compiled in, and every other tolerance compile anew
        rtol, atol = (
            torch.full((), x, dtype=torch.float64, device=y0.device) if isinstance(x, float) else x for x in (plan.rtol, plan.atol)
        )
        plan = replace(plan, rtol=rtol, atol=atol)
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    # what autograd records is the steps themselves, one by one
    if not torch.is_grad_enabled() and takes_whole(plan, y0.shape[0], y0.shape[1], n_samples):
        record = integrate_whole(f, plan, anchors, t_eval, y0)
        if record is not None and (beside is None or not rests(record)):
            return record
    if batched or plan.direct:
        return integrate_batched(f, plan, anchors, t_eval, y0, inputs, beside)
    return integrate_single(f, plan, anchors, t_eval, y0, inputs, shape, recording, beside)
