"""From a failed root record to an error that says what happened, where, why probably, and what to try."""

from __future__ import annotations

import torch

from ..errors import NewtonDidNotConverge, NonFiniteResidual, RootError, SingularJacobian
from ..nonlinear import RootRecord, RootStatus
from ..system.system import StateSpec

__all__ = ["raise_root_failure"]

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
