"""Trust regions: Powell's dogleg for square systems, Levenberg-Marquardt for least squares."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..linalg import Factorization, Matrix, SparseMatrix
from ..linalg.protocol import traits_of
from .linear_least_squares import DenseLeastSquares, SparseLeastSquares
from .newton import merge
from .protocol import (
    RootProblem,
    RootRecord,
    RootStatus,
    RootTraits,
    Rows,
    adjoint_product,
    as_dense,
    clip,
    ill_determined,
    need_jacobian,
    pick,
    product,
    rounding_floor,
    stationary,
    step_measure,
)

__all__ = ["Dogleg", "LevenbergMarquardt"]

#: unknowns up to which sparse matrices are made dense
_DENSE = 128


@dataclass(frozen=True)
class Dogleg:
    """Powell's dogleg (Powell 1970; Nocedal & Wright 2006, section 11.2), one radius a row, in the norm ``|s / x_scale|``.

    Where the Jacobian is singular it goes along the gradient alone. Needs transposed products of the Jacobian. ``radius`` is the first
    radius, None for ten times the scaled size of ``x0`` (at least ten).
    """

    radius: float | None = None
    accept: float = 1e-4


    def __post_init__(self) -> None:
        if self.radius is not None and not self.radius > 0:
            raise InvalidInput(f"radius must be positive or None, got {self.radius!r}")
        if not 0 <= self.accept < 0.25:
            raise InvalidInput(f"accept must lie in [0, 0.25), got {self.accept!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`. Raises `InvalidInput` without a Jacobian."""
        need_jacobian(problem, "Dogleg")
        assert problem.jacobian is not None
        rows = Rows(problem, x0)
        size = _length(rows.x / problem.x_scale)
        radius = 10 * size.clamp(min=1.0) if self.radius is None else torch.full_like(size, self.radius)
        matrix: Matrix | None = None
        factors: Factorization | None = None
        refresh, singular, moved = rows.running, torch.zeros_like(rows.running), torch.zeros_like(rows.running)
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            refresh = refresh & rows.running
            if factors is None or bool(refresh.any()):
                matrix = merge(refresh, problem.jacobian(rows.x), matrix)
                rows.n_jac = rows.n_jac + refresh
                moved = moved & ~refresh
                factors = (
                    problem.linear_solver.factor(matrix, problem.log)
                    if factors is None
                    else problem.linear_solver.refactor(factors, matrix)
                )
                singular = torch.where(refresh, ill_determined(matrix, factors), singular)
            assert matrix is not None
            active = rows.running.unsqueeze(-1)
            residual = torch.where(active, rows.residual, 0.0)
            rows.fail(stationary(matrix, residual / problem.f_scale) & ~_negligible(rows, matrix), RootStatus.STALLED)
            newton = -factors.solve(residual)
            singular = singular | ~torch.isfinite(newton).all(-1)
            step, full = _dogleg(problem, matrix, residual, pick(singular, torch.zeros_like(newton), newton), singular, radius)
            target = rows.x + step
            point = clip(problem, target)
            step = torch.where(rows.running.unsqueeze(-1), point - rows.x, 0.0)
            trial, norm = rows.evaluate(rows.x + step, rows.running)
            model = problem.norm((residual + product(matrix, step)) / problem.f_scale)
            predicted, actual = rows.norm.square() - model.square(), rows.norm.square() - norm.square()
            ratio = torch.where((predicted > 0) & torch.isfinite(norm), actual / predicted, -1.0)
            small = (step_measure(problem, step, rows.x) <= 1) & full & (point == target).all(-1)
            good = rows.running & torch.isfinite(norm) & ((ratio > self.accept) | small)
            length = _length(step / problem.x_scale)
            radius = torch.where(ratio < 0.25, 0.25 * torch.minimum(length, radius), radius)
            radius = torch.where((ratio > 0.75) & (length > 0.9 * radius), 2 * radius, radius)
            floor = _negligible(rows, matrix)
            rows.move(good, point, trial, norm)
            moved = moved | good
            measure = step_measure(problem, step, rows.x)
            settled = rows.settled(torch.where((good & small).unsqueeze(-1), step, 0.0), measure, good & small & ~singular) <= 1
            rows.fail((rows.norm == 0) & singular, RootStatus.SINGULAR)  # one root of many: the equations do not determine it
            rows.succeed(((good & small & settled) | (~good & floor & ~singular) | (rows.norm == 0)) & (rows.norm <= problem.tol))
            tiny = torch.finfo(size.dtype).eps * _length(rows.x / problem.x_scale).clamp(min=torch.finfo(size.dtype).eps)
            rows.fail(~good & (radius <= tiny), RootStatus.STALLED)
            refresh = good
            rows.report(k)
        unmoved = factors is not None and not bool(moved.any()) and bool((rows.n_jac > 0).all())
        return dataclasses.replace(rows.record("dogleg"), factors=factors if unmoved else None)


def _length(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1)


def _negligible(rows: Rows, matrix: Matrix) -> Tensor:
    return (rows.residual.abs() <= rounding_floor(matrix, rows.x)).all(-1)


def _dogleg(
    problem: RootProblem, matrix: Matrix, residual: Tensor, newton: Tensor, singular: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    """The step within the radius, and whether it is Newton's."""
    f2 = problem.f_scale * problem.f_scale
    d = problem.x_scale
    gradient = d * adjoint_product(matrix, residual / f2)  # in scaled unknowns s / d
    slope = _length(gradient)
    curvature = _length(product(matrix, d * gradient) / problem.f_scale)
    shortest = torch.where(curvature > 0, slope**2 / curvature**2, 0.0)
    cauchy = -shortest.unsqueeze(-1) * gradient
    scaled = newton / d
    newton_size, cauchy_size = _length(scaled), _length(cauchy)
    full = ~singular & (newton_size <= radius)
    along = cauchy * torch.where(cauchy_size > radius, radius / cauchy_size, 1.0).unsqueeze(-1)
    # |cauchy + t (newton - cauchy)| = radius
    between = scaled - cauchy
    a, b = _length(between) ** 2, (between.conj() * cauchy).real.sum(-1) if between.is_complex() else (between * cauchy).sum(-1)
    c = (cauchy_size**2 - radius**2).clamp(max=0)
    root = (b * b - a * c).clamp(min=0).sqrt()
    t = torch.where(b > 0, -c / (b + root), (root - b) / a)
    leg = cauchy + torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0).clamp(0, 1).unsqueeze(-1) * between
    step = pick(full, scaled, pick(singular | (cauchy_size >= radius), along, leg))
    return d * step, full


@dataclass(frozen=True)
class LevenbergMarquardt(RootTraits):
    """Least squares ``min |r(x) / f_scale|``, ``r`` from (B, n) to (B, m) with ``m >= n``; roots too.

    Each step solves ``[A; sqrt(mu) D] s = [-r; 0]`` by QR or an augmented matrix (never normal equations; Moré 1978), ``D`` the largest
    column norms so far, ``mu`` by the rule of Nielsen (1999). A row has converged when the undamped Gauss-Newton step is within the
    tolerance on ``x`` (so that ``A* r`` vanishes), when ``|r| <= tol`` for a finite ``tol``, or when no reduction above rounding is
    predicted any more. ``gradient_tol`` bounds the cosine between ``r`` and the columns in that last test. Of square problems a minimum
    that is no root is an answer with ``RootProblem.least_squares`` only; without it the row has stalled. A row that ends with SINGULAR is
    at a root with a singular Jacobian: a multiple root, or one of many. Unknowns at a bound that the sum of squares pushes against stay
    there, and the minimum is that of the others. Sparse Jacobians of many unknowns stay sparse on the CPU, with the problem's linear
    solver for augmented matrices.
    """

    damping: float = 1e-3
    gradient_tol: float = 1e-7

    least_squares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (self.damping > 0 and 0 < self.gradient_tol < 1):
            raise InvalidInput(f"need damping > 0 and 0 < gradient_tol < 1, got {self!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`. Raises `InvalidInput` for fewer residuals than unknowns, or without a Jacobian."""
        need_jacobian(problem, "LevenbergMarquardt")
        assert problem.jacobian is not None
        rows = Rows(problem, x0)
        B, n = rows.x.shape
        m = rows.residual.shape[1]
        if m < n:
            raise InvalidInput(f"LevenbergMarquardt needs at least as many residuals as unknowns, got {m} for {n}")
        scale = torch.zeros_like(rows.x.abs())
        mu, grow = torch.full_like(rows.norm, self.damping), torch.full_like(rows.norm, 2.0)
        last = torch.full_like(rows.norm, float("inf"))
        jacobian: Tensor | SparseMatrix | None = None
        linear: DenseLeastSquares | SparseLeastSquares | None = None
        refresh = rows.running
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            refresh = refresh & rows.running
            if jacobian is None or bool(refresh.any()):
                fresh = _entries(problem, problem.jacobian(rows.x), B)
                numbers = fresh if isinstance(fresh, Tensor) else fresh.values.expand(B, -1)
                rows.fail(~torch.isfinite(numbers).flatten(1).all(-1), RootStatus.NON_FINITE)
                jacobian = merge(refresh & rows.running, fresh, jacobian)  # type: ignore[assignment]
                rows.n_jac = rows.n_jac + refresh
            assert isinstance(jacobian, (Tensor, SparseMatrix))
            f = torch.as_tensor(problem.f_scale, dtype=rows.norm.dtype, device=rows.x.device)
            A = _scaled(jacobian, f)
            r = torch.where(rows.running.unsqueeze(-1), rows.residual / f, 0.0)
            slopes = adjoint_product(A, r)
            active = _at_bound(problem, rows.x, slopes)
            if isinstance(A, Tensor):
                linear = DenseLeastSquares(A, r, active)
            else:
                linear = SparseLeastSquares(problem, A, r, active, linear if isinstance(linear, SparseLeastSquares) else None)
            scale = torch.maximum(scale, linear.columns)
            d = torch.where(scale > 0, scale, 1.0)
            gauss, regular = linear.gauss()
            cosine = torch.where(active, 0.0, slopes.abs() / (d * _length(r).unsqueeze(-1))).nan_to_num(0.0)
            cosine = cosine.amax(-1) if n else rows.norm
            damped = linear.damped(mu, d)
            # so close to the minimum the sum of squares is flat to rounding: judge Gauss-Newton steps by whether they shrink
            measure = step_measure(problem, gauss, rows.x)
            near = regular & (measure <= 1)
            flat = regular & (cosine <= self.gradient_tol)
            quiet = flat & (measure < last) & (measure <= 1e6)
            last = torch.where(rows.running, torch.where(flat, measure, float("inf")), last)
            step = pick(near | quiet, gauss, damped)
            target = rows.x + step
            point = clip(problem, target)
            step = torch.where(rows.running.unsqueeze(-1), point - rows.x, 0.0)
            trial, norm = rows.evaluate(rows.x + step, rows.running)
            before, after = _length(r), _length(trial / f)
            model = _length(r + linear.product(step))
            predicted = (before - model) * (before + model)
            ratio = torch.where((predicted > 0) & torch.isfinite(norm), (before - after) * (before + after) / predicted, -1.0)
            inside = (point == target).all(-1)
            good = rows.running & torch.isfinite(norm) & ((ratio > 1e-4) | ((near | quiet) & inside))
            wanted = torch.isfinite(norm.new_tensor(problem.tol))
            rows.move(good, point, trial, norm)
            settled = rows.settled(torch.where(near.unsqueeze(-1), step, 0.0), measure, good & near & inside) <= 1
            rows.succeed(good & near & inside & settled)
            # a root where the matrix is singular: the least of the steps that solve the linear model leads nowhere any more
            solved = (model <= 1e-3 * before) & (step_measure(problem, step, rows.x) <= 1) & (mu <= 1e-8)
            rows.end(((rows.norm == 0) | (good & inside & solved)) & ~regular, RootStatus.SINGULAR)
            rows.succeed((wanted & (rows.norm <= problem.tol)) | (rows.norm == 0))
            negligible = (rows.residual.abs() <= rounding_floor(jacobian, rows.x)).all(-1)
            minimum = flat & (predicted <= 1e-13 * before**2)
            if m == n and not problem.least_squares:
                rows.succeed(~good & inside & regular & negligible)
                rows.fail(~good & minimum, RootStatus.STALLED)
            rows.succeed(~good & inside & regular & (negligible | minimum))
            factor = torch.maximum(1 - (2 * ratio - 1) ** 3, torch.full_like(ratio, 1 / 3))
            mu = torch.where(good, mu * factor, mu * grow)
            grow = torch.where(good, 2.0, 2 * grow)
            rows.fail(~good & ((mu > 1e30) | (grow > 1e30)), RootStatus.STALLED)
            refresh = good
            rows.report(k)
        return rows.record("Levenberg-Marquardt")


def _entries(problem: RootProblem, matrix: Matrix, rows: int) -> Tensor | SparseMatrix:
    """The Jacobian, sparse where that pays and the linear solver has sparse factors."""
    sparse = isinstance(matrix, SparseMatrix) and matrix.shape[1] > _DENSE and matrix.device.type == "cpu"
    return matrix if sparse and not traits_of(problem.linear_solver).dense else as_dense(matrix, rows)  # type: ignore[return-value]


def _scaled(matrix: Tensor | SparseMatrix, f: Tensor) -> Tensor | SparseMatrix:
    """Every row divided by its ``f``, 0-d or (..., m)."""
    if isinstance(matrix, Tensor):
        return matrix / (f if f.dim() == 0 else f.unsqueeze(-1))
    return SparseMatrix(matrix.indices, matrix.values / (f if f.dim() == 0 else f[..., matrix.indices[0]]), matrix.shape)


def _at_bound(problem: RootProblem, x: Tensor, slopes: Tensor) -> Tensor:
    """``(B, n)``: unknowns at a bound that lower sums of squares lie beyond."""
    active = torch.zeros_like(x, dtype=torch.bool)
    if problem.lower is not None:
        active = active | ((x <= problem.lower) & (slopes > 0))
    return active if problem.upper is None else active | ((x >= problem.upper) & (slopes < 0))
