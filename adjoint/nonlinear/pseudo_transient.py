"""Pseudo-transient continuation: follow the flow ``M dx/dt = f(x)`` with implicit Euler steps that grow into Newton's."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..linalg import Factorization, LinearOperator, Matrix, SparseMatrix
from .newton import merge
from .protocol import RootProblem, RootRecord, RootStatus, Rows, clip, ill_determined, need_jacobian, step_measure

__all__ = ["PseudoTransient", "add_diagonal"]


@dataclass(frozen=True)
class PseudoTransient:
    """``(M / dt - A) s = f(x)``, ``x <- x + s``, one ``dt`` a row (Kelley & Keyes 1998).

    The residual is the tendency of a flow that is stable at the root. ``dt`` follows switched evolution relaxation,
    ``dt <- dt |f| / |f_new|``, by at most ``growth`` a step. A step is repeated with a quarter of ``dt`` where it leaves the domain,
    raises the residual more than ``rise`` times, or raises it at all where the linear model is no longer right. Converged as Newton is,
    once ``|M s / dt| <= 0.1 |f|`` (the step is then Newton's).

    ``mass``: the diagonal of ``M``, broadcast to (B, n); zeros for algebraic equations. ``first``: the first ``dt``, None for a tenth of
    the time in which the tendency would change ``x`` by its own size.
    """

    first: float | None = None
    growth: float = 10.0
    rise: float = 10.0
    mass: Tensor | float = 1.0


    def __post_init__(self) -> None:
        if self.first is not None and not self.first > 0:
            raise InvalidInput(f"first must be positive or None, got {self.first!r}")
        if not (self.growth > 1 and self.rise > 1):
            raise InvalidInput(f"need growth > 1 and rise > 1, got {self.growth!r} and {self.rise!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`. Raises `InvalidInput` without a Jacobian."""
        need_jacobian(problem, "PseudoTransient")
        assert problem.jacobian is not None
        rows = Rows(problem, x0)
        mass = torch.as_tensor(self.mass, dtype=rows.norm.dtype, device=rows.x.device).expand(rows.x.shape)
        if self.first is None:
            size = problem.norm(rows.x / problem.x_scale).clamp(min=1.0)
            speed = problem.norm(rows.residual / problem.x_scale)
            dt = torch.where(speed > 0, 0.1 * size / speed, 1.0)
        else:
            dt = torch.full_like(rows.norm, self.first)
        jacobian: Matrix | None = None
        factors: Factorization | None = None
        refresh = rows.running
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            refresh = refresh & rows.running
            if jacobian is None or bool(refresh.any()):
                jacobian = merge(refresh, problem.jacobian(rows.x), jacobian)
                rows.n_jac = rows.n_jac + refresh
            shift = torch.where(rows.running.unsqueeze(-1), mass / dt.unsqueeze(-1), 0.0)
            matrix = add_diagonal(jacobian, -shift)
            solver = problem.linear_solver
            factors = solver.factor(matrix, problem.log) if factors is None else solver.refactor(factors, matrix)
            f = torch.where(rows.running.unsqueeze(-1), rows.residual, 0.0)
            step = -factors.solve(f)
            singular = ill_determined(matrix, factors) | ~torch.isfinite(step).all(-1)
            step = torch.where((rows.running & ~singular).unsqueeze(-1), step, 0.0)
            target = rows.x + step
            point = clip(problem, target)
            residual, norm = rows.evaluate(point, rows.running & ~singular)
            newton = problem.norm(shift * step / problem.f_scale) <= 0.1 * rows.norm
            last = newton & (step_measure(problem, step, rows.x) <= 1) & (point == target).all(-1)
            # along a step that the linear model describes, transient growth is the flow's own; else it is an overshoot
            modelled = problem.norm((residual - shift * step) / problem.f_scale) <= rows.norm
            fair = (norm <= rows.norm) | (modelled & (norm <= self.rise * rows.norm))
            good = rows.running & ~singular & torch.isfinite(norm) & (fair | last)
            ratio = torch.where(norm > 0, rows.norm / norm, self.growth)
            rows.move(good, point, residual, norm)
            settled = rows.settled(step, step_measure(problem, step, rows.x), good & last) <= 1
            rows.succeed((good & last & settled & (norm <= problem.tol)) | (rows.norm == 0))
            dt = torch.where(good, dt * ratio.clamp(0.1, self.growth), dt / 4)
            lost = ~good & (dt < 1e-14 * (1 + rows.x.abs().amax(-1)) / problem.norm(rows.residual).clamp(min=1e-300))
            rows.fail(lost & singular, RootStatus.SINGULAR)
            rows.fail(lost, RootStatus.STALLED)
            refresh = good
            rows.report(k)
        return rows.record("pseudo-transient continuation")


def add_diagonal(matrix: Matrix, diagonal: Tensor) -> Matrix:
    """``A + diag(d)`` for ``d`` (B, n). Places that a sparse pattern lacks on the diagonal are added."""
    if isinstance(matrix, Tensor):
        return matrix + torch.diag_embed(diagonal.to(matrix.dtype))
    if isinstance(matrix, LinearOperator):
        transposed = matrix.rmatvec
        return replace(
            matrix,
            matvec=lambda v: matrix.matvec(v) + diagonal * v,
            rmatvec=None if transposed is None else (lambda v: transposed(v) + diagonal * v),
        )
    n = matrix.shape[0]
    values = matrix.values.expand(diagonal.shape[0], -1)
    places = torch.arange(n, device=values.device)
    key = matrix.indices[0] * n + matrix.indices[1]
    union, where = torch.unique(torch.cat([key, places * (n + 1)]), return_inverse=True)
    total = values.new_zeros(values.shape[0], union.numel()).index_add(1, where, torch.cat([values, diagonal.to(values.dtype)], 1))
    return SparseMatrix(torch.stack([union // n, union % n]), total, matrix.shape)
