"""From a failed record, or that of a root, to an error that says what happened, where, why probably, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import (
    MaxStepsReached,
    NewtonDidNotConverge,
    NonFiniteDerivative,
    NonFiniteResidual,
    NonFiniteState,
    RootError,
    SingularJacobian,
    SolveError,
    StagesDidNotConverge,
    StepSizeTooSmall,
)
from ..integrate import Plan, Record, Status
from ..nonlinear import RootRecord, RootStatus
from ..system.finite import REWRITE, WAVERS, bad_component, wavers
from ..system.system import Flat, StateSpec, System

__all__ = ["raise_failure", "raise_root_failure"]

def raise_failure(record: Record, plan: Plan, system: System, inputs: Sequence[Tensor]) -> None:
    """Raise the named error of the first of the trajectories that failed."""
    failed = (record.status < 0).nonzero()[:, 0]
    b = int(failed[0])
    status, t = Status(int(record.status[b])), float(record.t_final[b])
    # vmapped copies lie next to each other: the layout is that of the original state
    spec = system.spec
    y = record.last[b]
    rows = record.status.shape[0]
    rate = beyond = None
    advice = _ADVICE[status]
    if rows == spec.rows and system.residual is None:
        with torch.no_grad():
            f = system.bind(inputs)
            rate = f(record.t_final.to(spec.real_dtype), record.last)[b]
            if status == Status.NON_FINITE:
                beyond = _ahead(f, record, plan, b)
            elif wavers(lambda: f(record.t_final.to(spec.real_dtype), record.last)):
                advice = f"The cause: {WAVERS}, or take constant steps (rk4 and others), which follow one draw"
            culprit = None
            if plan.method.implicit and status != Status.MAX_STEPS and bool(torch.isfinite(rate).all()):
                culprit = bad_component(f, record.t_final.to(spec.real_dtype), record.last, b)
        if culprit is not None:
            raise NonFiniteDerivative(
                f"{culprit[1]} is not finite at t = {t:.8g}{'' if rows == 1 else f' in trajectory {b}'}, component "
                f"{spec.component(culprit[0])} of its result, where fun itself is: {plan.method.name}, which needs the Jacobian, stopped. "
                f"{REWRITE}, or take an explicit method.",
                t=t,
                trajectory=b if rows > 1 else None,
                component=culprit[0],
            )
    component = _worst(y, rate if beyond is None else beyond, record.scaled_error[b])
    unmeasured = None
    if status in (Status.NON_FINITE, Status.NEWTON_FAILED) and beyond is None and (rate is None or bool(torch.isfinite(rate).all())):
        unmeasured = _unmeasured(y, plan, b)
    component = component if unmeasured is None else unmeasured
    many = f" in trajectory {b} ({failed.numel()} of {rows} failed)" if rows > 1 else ""
    where = f"at t = {t:.8g}{many}, worst component {spec.component(component)} = {_number(y[component])}"
    steps = f"after {int(record.n_accepted[b])} accepted and {int(record.n_rejected[b])} rejected steps"
    if unmeasured is not None:
        why = f"0/0: atol is zero, and so is {spec.component(component)}" if y[component] == 0 else "infinite: rtol and atol are zero"
        raise NonFiniteState(
            f"the error norm is {why}: {plan.method.name} stopped {where}, {steps}. "
            "Nothing is small beside zero: give a positive atol (one number for each component, if they differ much)",
            t=t,
            trajectory=b if rows > 1 else None,
            component=component,
        )
    error, text = _explain(status, plan, y, rate)
    raise error(f"{text} {where}, {steps}. {advice}", t=t, trajectory=b if rows > 1 else None, component=component)


def _ahead(f: Flat, record: Record, plan: Plan, b: int) -> Tensor | None:
    """The rates of row ``b`` at the first point beyond its last one where they are not finite; None if there is none close by."""
    t, y, h = record.t_final, record.last, record.h[:, b]
    signs = [float(h[0].sign())] if h.numel() else [1.0, -1.0]
    smallest = 16 * torch.finfo(y.dtype).eps * max(1.0, float(t[b].abs()))
    sizes = [smallest * 8.0**k for k in range(8)]
    if not plan.method.adaptive and plan.first_step is not None:
        sizes += [plan.first_step / 2, plan.first_step]
    for size in sizes:
        for sign in signs:
            time = (t + sign * size).to(y.dtype.to_real())
            rate = f(time, y)
            if bool(torch.isfinite(rate[b]).all()):
                rate = f(time, y + sign * size * rate)
            if not bool(torch.isfinite(rate[b]).all()):
                return rate[b]
    return None


def _worst(y: Tensor, rate: Tensor | None, scaled_error: Tensor) -> int:
    """Flat index of the component that is non-finite itself, or has a non-finite rate, or else the largest scaled error."""
    if y.numel() == 0:
        return 0
    for candidate in (y, rate):
        if candidate is not None and not bool(torch.isfinite(candidate).all()):
            return int((~torch.isfinite(candidate)).to(torch.uint8).argmax())
    return int(torch.nan_to_num(scaled_error, nan=float("inf"), posinf=float("inf")).argmax())


def _unmeasured(y: Tensor, plan: Plan, b: int) -> int | None:
    """Flat index of the first component whose tolerance is zero at the state ``y`` of row ``b``; None if there is none."""
    atol, rtol = (torch.as_tensor(x, dtype=y.dtype.to_real(), device=y.device) for x in (plan.atol, plan.rtol))
    atol, rtol = (x if x.dim() < 2 else x[min(b, len(x) - 1)] for x in (atol, rtol))
    none = (atol == 0) & ((y == 0) | (rtol == 0))
    return int(none.to(torch.uint8).argmax()) if bool(none.any()) else None


def _explain(status: Status, plan: Plan, y: Tensor, rate: Tensor | None) -> tuple[type[SolveError], str]:
    if status == Status.MAX_STEPS:
        return MaxStepsReached, f"{plan.method.name} made max_steps = {plan.max_steps} attempts and stopped"
    if status == Status.NON_FINITE:
        what = "the state" if not bool(torch.isfinite(y).all()) else "fun"
        if rate is not None and what == "fun" and bool(torch.isfinite(rate).all()):
            what = "fun, close to this point,"
        return NonFiniteState, f"{what} became non-finite: {plan.method.name} stopped"
    if status == Status.NEWTON_FAILED:
        size = "" if plan.method.adaptive else " with the given step size"
        return StagesDidNotConverge, f"Newton's iteration for the stages of {plan.method.name} did not converge{size}: it stopped"
    return StepSizeTooSmall, f"underflow in dt: the error test of {plan.method.name} kept failing and it stopped"


_ADVICE = {
    Status.MAX_STEPS: (
        "Likely causes: the problem is stiff (the step is held down by stability, not accuracy), or the span is long for these "
        "tolerances. Try method='kvaerno5' or another one for stiff problems, a larger rtol/atol, or a larger max_steps."
    ),
    Status.NON_FINITE: (
        "Likely causes: the solution blows up in finite time, or fun leaves its domain (log or sqrt of a negative number, division by "
        "zero, overflow). Try a shorter span, a tighter tolerance or max_step, or rewrite fun in safe variables."
    ),
    Status.NEWTON_FAILED: (
        "Likely causes: a discontinuity of fun (name its times in step_ts), a right-hand side that is not differentiable there, a Jacobian "
        "that is singular or wrong, or, with constant steps, steps that are too large: try smaller ones, or a Rosenbrock method such as "
        "'rodas5p', which does not iterate."
    ),
    Status.STEP_TOO_SMALL: (
        "Likely causes: a discontinuity of fun (name its times in step_ts), a solution that blows up, tolerances below the rounding "
        "error of the state's dtype, times too large for float64 to resolve the step, or min_step set too large."
    ),
}


def _number(x: Tensor) -> str:
    value = x.item()
    return f"{value:.6g}"


_WHAT: dict[RootStatus, tuple[type[RootError], str, str]] = {
    RootStatus.MAX_STEPS: (
        NewtonDidNotConverge,
        "no root after {steps} iterations",
        "Try a better guess x0 (a root at nearby parameters), more max_steps, method='pseudo_transient' if fun is the tendency of a "
        "stable system, or a looser ftol if rounding keeps the residual up.",
    ),
    RootStatus.STALLED: (
        NewtonDidNotConverge,
        "the iteration stalled after {steps} iterations: no step makes the residual smaller",
        "Likely causes: there is no root nearby (past a fold, or within the bounds), the residual is not smooth, or the Jacobian given is "
        "wrong. Try another guess, continuation in a parameter, or least_squares=True for a minimum.",
    ),
    RootStatus.NON_FINITE: (
        NonFiniteResidual,
        "fun gave NaN or infinity after {steps} iterations",
        "Likely causes: log, sqrt or a power of a negative number, or overflow. Give bounds=, a guess inside of the domain, or rewrite fun "
        "in safe variables.",
    ),
    RootStatus.SINGULAR: (
        SingularJacobian,
        "the Jacobian is singular after {steps} iterations",
        "Likely causes: a conserved quantity (name it with conserved=W, where W fun = 0), equations that do not depend on some unknown, or "
        "a fold of the solution at these parameters.",
    ),
    RootStatus.UNSOLVED: (
        NewtonDidNotConverge,
        "the iterative linear solver did not converge in a step of Newton's method, after {steps} iterations",
        "Give it a preconditioner, more max_iterations or a looser rtol, or take linear_solver=adjoint.linalg.SparseLU() or DenseLU().",
    ),
    RootStatus.DIVERGED: (
        NewtonDidNotConverge,
        "the iteration diverged after {steps} iterations",
        "Try a better guess x0, a damped method such as 'newton' or 'dogleg', or smaller mixing for a fixed-point method.",
    ),
}


def raise_root_failure(record: RootRecord, spec: StateSpec) -> None:
    """Raise the named error of the first failed system; return if there is none."""
    if not bool((record.status < 0).any()):
        return
    failed = (record.status < 0).nonzero()[:, 0]
    b = int(failed[0])
    residual = record.residual[b]
    component = int(torch.nan_to_num(residual.abs(), nan=float("inf"), posinf=float("inf")).argmax()) if residual.numel() else 0
    error, what, advice = _WHAT[RootStatus(int(record.status[b]))]
    rows = record.status.shape[0]
    many = f" in system {b} ({failed.numel()} of {rows} failed)" if rows > 1 else ""
    same = residual.numel() == sum(spec.sizes)
    where = f", largest in equation {component}" + (f" (that of {spec.component(component, 'x')})" if same else "")
    text = f"{what.format(steps=int(record.n_steps[b]))}{many}; residual norm {float(record.residual_norm[b]):.3g}{where}."
    raise error(f"{text} {record.note.rstrip('.') + '. ' if record.note else ''}{advice}", row=b if rows > 1 else None, component=component)
