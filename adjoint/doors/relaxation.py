"""Time integration to a steady state: the last resort of root finding where the residual is a tendency."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..integrate import IController, Plan, Status, integrate
from ..integrate.stages import StageSolver
from ..linalg import LinearSolver, Matrix, SparseMatrix
from ..methods import METHODS

__all__ = ["relax"]

#: decades of time, from the first step of Euler's method on, and the change over the last decade that counts as none
_DECADES, _STILL = 24, 1e-6


def relax(
    r: Callable[[Tensor], Tensor], jacobian: Callable[[Tensor], Matrix], linear_solver: LinearSolver, x0: Tensor
) -> tuple[Tensor, Tensor]:
    """Integrate ``x' = r(x)`` from ``x0`` (B, n) by "kvaerno5", decade after decade of time, until the state moves no more.

    Tolerances are loose: what is wanted is the basin of the steady state, not the way there. Returns the states, those of failed rows as
    they were last finite, and the times that were reached, ``(B,)``.
    """
    real = x0.dtype.to_real()
    size = x0.abs().amax(1, keepdim=True).clamp(min=1e-30)
    plan = Plan(
        method=METHODS["kvaerno5"], real=real, controller=IController(), rtol=1e-3, atol=1e-6 * size, keep_states=False, max_steps=500
    )
    # where nothing is known of the time scales of a problem, its tendency at the start says most
    rate = r(x0).abs().amax(1).clamp(min=torch.finfo(real).tiny)
    unit = (1e-3 * size.squeeze(-1) / rate).to(torch.float64).clamp(min=1e-12, max=1e12)
    x, reached = x0, torch.zeros_like(unit)
    running = torch.isfinite(rate)

    def derivative(_: Tensor, y: Tensor) -> Tensor:
        return r(y)

    solver = StageSolver(derivative, plan, _WithDiagonal(jacobian), linear_solver, x0.shape[0], x0.device)
    for decade in range(_DECADES):
        if not bool(running.any()):
            break
        end = torch.where(running, unit * 10.0**decade, reached)
        record = integrate(solver, plan, torch.stack([reached, end]), None, x, True)
        good = running & (record.status == int(Status.SUCCESS)) & torch.isfinite(record.final).all(-1)
        change = ((record.final - x).abs() / (record.final.abs() + 1e-6 * size)).amax(1)
        x = torch.where(good.unsqueeze(-1), record.final, x)
        reached = torch.where(good, end, reached)
        # the first decades are short: nothing moves in them
        running = good & ((change > _STILL) | (decade < 4))
    return x, reached


class _WithDiagonal:
    """Jacobians whose pattern has the diagonal, as the matrices of stages need it."""

    def __init__(self, jacobian: Callable[[Tensor], Matrix]) -> None:
        self.jacobian = jacobian

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        found = self.jacobian(x)
        if not isinstance(found, SparseMatrix):
            return found
        n = found.shape[0]
        rows, columns = found.indices
        missing = torch.ones(n, dtype=torch.bool, device=rows.device)
        missing[rows[rows == columns]] = False
        extra = missing.nonzero()[:, 0]
        if not len(extra):
            return found
        indices = torch.cat([found.indices, extra.expand(2, -1)], 1)
        values = found.values if found.values.dim() == 2 else found.values.unsqueeze(0)
        values = torch.cat([values, values.new_zeros(values.shape[0], len(extra))], 1)
        order = torch.argsort(indices[0] * n + indices[1])
        return SparseMatrix(indices[:, order], values[:, order], found.shape)
