"""Methods that need residuals only: damped fixed-point iteration, Anderson acceleration, Broyden's good method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..linalg import Factorization
from .protocol import ErrorMeasure, RootProblem, RootRecord, RootStatus, Rows, clip, ill_determined, need_jacobian, pick

__all__ = ["Anderson", "Broyden", "FixedPoint"]

_Form = Literal["g-x", "x-g"]


def _sign(form: str) -> float:
    if form not in ("g-x", "x-g"):
        raise InvalidInput(f"form must be 'g-x' or 'x-g', got {form!r}")
    return 1.0 if form == "g-x" else -1.0


class _Ends:
    """When to end: by the residual where ``tol`` is finite, else by the error of ``x``."""

    def __init__(self, rows: Rows) -> None:
        self.by_residual = rows.problem.tol < float("inf")
        self.best, self.measure = rows.norm, ErrorMeasure(rows)
        if self.by_residual:
            rows.succeed(rows.norm <= rows.problem.tol)

    def __call__(self, rows: Rows, norm: Tensor, growth: float, dx: Tensor, df: Tensor) -> None:
        """After the residual has changed by ``df`` over ``dx``: a residual ``r`` means an error of about ``|dx| / |df| r``."""
        self.best = torch.minimum(self.best, rows.norm)
        rows.fail(~torch.isfinite(norm), RootStatus.NON_FINITE)
        if self.by_residual:
            rows.succeed(rows.norm <= rows.problem.tol)
        else:
            problem = rows.problem
            moved, change = problem.norm(dx), problem.norm(df)
            # where nothing changes any more, residuals are steps
            error = rows.residual * torch.where((change > 0) & (moved > 0), moved / change, 1.0).unsqueeze(-1)
            rows.succeed((self.measure(rows, error) <= 1) | (rows.norm == 0))
        rows.fail(rows.norm > growth * self.best, RootStatus.DIVERGED)


@dataclass(frozen=True)
class FixedPoint:
    """``x <- x + damping (g(x) - x)`` until the residual is within ``tol``.

    ``form`` says which residual the problem has: ``g(x) - x`` ("g-x", also the tendency of a stable flow) or ``x - g(x)`` ("x-g").
    Rows whose residual grows to ``growth`` times its smallest have diverged.
    """

    damping: float = 1.0
    form: _Form = "g-x"
    growth: float = 1e6

    def __post_init__(self) -> None:
        _sign(self.form)
        if not (self.damping > 0 and self.growth > 1):
            raise InvalidInput(f"need damping > 0 and growth > 1, got {self!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`."""
        rows, rate = Rows(problem, x0), self.damping * _sign(self.form)
        ends = _Ends(rows)
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            point = clip(problem, rows.x + rate * torch.where(rows.running.unsqueeze(-1), rows.residual, 0.0))
            residual, norm = rows.evaluate(point, rows.running)
            dx, df = point - rows.x, residual - rows.residual
            rows.move(rows.running & torch.isfinite(norm), point, residual, norm)
            ends(rows, norm, self.growth, dx, df)
            rows.report(k)
        return rows.record("fixed-point iteration")


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration, type II (Walker & Ni 2011), least squares per row by QR.

    ``mixing`` is the part of the residual that is added, ``regularisation`` a Tikhonov term relative to the (normalised) columns. A row
    that would leave the domain of the residual, or whose residual grows tenfold, forgets its history and makes a plain step.
    """

    depth: int = 5
    mixing: float = 1.0
    regularisation: float = 1e-10
    form: _Form = "g-x"
    growth: float = 1e6

    def __post_init__(self) -> None:
        _sign(self.form)
        if not (isinstance(self.depth, int) and self.depth >= 1 and self.mixing > 0 and self.regularisation > 0 and self.growth > 1):
            raise InvalidInput(f"need an integer depth >= 1, mixing > 0, regularisation > 0 and growth > 1, got {self!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`."""
        rows, sign = Rows(problem, x0), _sign(self.form)
        B, n = rows.x.shape
        dx = rows.x.new_zeros(B, n, self.depth)
        df = torch.zeros_like(dx)
        ends = _Ends(rows)
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            running, f = rows.running, sign * torch.where(rows.running.unsqueeze(-1), rows.residual, 0.0)
            plain = self.mixing * f
            gamma = _regularised(df / _column_scale(problem), f / problem.f_scale, self.regularisation)
            step = plain - ((dx + self.mixing * df) @ gamma.unsqueeze(-1)).squeeze(-1)
            point = clip(problem, rows.x + torch.where(running.unsqueeze(-1), step, 0.0))
            residual, norm = rows.evaluate(point, running)
            bad = running & ~(norm <= 10 * ends.best)
            if k and bool(bad.any()):
                safe = clip(problem, rows.x + torch.where(bad.unsqueeze(-1), plain, 0.0))
                again, norm_again = rows.evaluate(safe, bad)
                point, residual, norm = pick(bad, safe, point), pick(bad, again, residual), pick(bad, norm_again, norm)
                dx, df = pick(bad, torch.zeros_like(dx), dx), pick(bad, torch.zeros_like(df), df)
            slot = k % self.depth
            moved = running & torch.isfinite(norm)
            new_dx, new_df = pick(moved, point - rows.x, torch.zeros_like(point)), pick(moved, sign * residual - f, torch.zeros_like(f))
            dx[:, :, slot], df[:, :, slot] = new_dx, new_df
            rows.move(moved, point, residual, norm)
            ends(rows, norm, self.growth, new_dx, new_df)
            rows.report(k)
        return rows.record(f"Anderson({self.depth})")


def _column_scale(problem: RootProblem) -> Tensor | float:
    """``f_scale`` for columns (B, n, k)."""
    scale = problem.f_scale
    return scale.unsqueeze(-1) if isinstance(scale, Tensor) and scale.dim() else scale


def _regularised(columns: Tensor, f: Tensor, weight: float) -> Tensor:
    """``min |columns g - f|^2 + weight^2 |g|^2`` on columns of length one; zero columns get zero."""
    size = torch.linalg.vector_norm(columns, dim=-2, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    k = columns.shape[-1]
    eye = weight * torch.eye(k, dtype=columns.dtype, device=columns.device).expand(columns.shape[0], k, k)
    Q, R = torch.linalg.qr(torch.cat([columns / size, eye], -2))
    right = torch.cat([f, f.new_zeros(f.shape[0], k)], -1).unsqueeze(-1)
    return torch.linalg.solve_triangular(R, Q.mH @ right, upper=True).squeeze(-1) / size.squeeze(-2)


@dataclass(frozen=True)
class Broyden:
    """Broyden's good method with limited memory (Broyden 1965; Kelley 1995, chapter 7).

    The inverse is ``H0 + U V*`` with at most ``memory`` columns, emptied when full. ``initial``: "jacobian" takes factors of the Jacobian
    at the start (and again whenever the memory is emptied), "scaled" a multiple of the identity found by one probe along the residual,
    a number is that multiple itself (an approximate inverse of the Jacobian); None "jacobian" if the problem has one, else "scaled".
    Steps are halved by the derivative-free rule of Li & Fukushima (2000).
    """

    memory: int = 30
    initial: Literal["jacobian", "scaled"] | float | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.memory, int) and self.memory >= 1):
            raise InvalidInput(f"memory must be a positive integer, got {self.memory!r}")
        number = isinstance(self.initial, (int, float)) and not isinstance(self.initial, bool) and self.initial != 0
        if not (self.initial in ("jacobian", "scaled", None) or number):
            raise InvalidInput(f"initial must be 'jacobian', 'scaled', a non-zero number or None, got {self.initial!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`."""
        rows = Rows(problem, x0)
        by_residual = problem.tol < float("inf")
        if by_residual:
            rows.succeed(rows.norm <= problem.tol)
        error = ErrorMeasure(rows)
        B, n = rows.x.shape
        U = rows.x.new_zeros(B, n, self.memory)
        V = torch.zeros_like(U)
        base = _Inverse(self.initial, rows)
        failed = torch.zeros_like(rows.running)
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            slot = k % self.memory
            if slot == 0:
                base.renew(rows)
                U, V = torch.zeros_like(U), torch.zeros_like(V)
            running = rows.running
            f = torch.where(running.unsqueeze(-1), rows.residual, 0.0)
            step = -(base(f) + _low_rank(U, V, f))
            rows.fail(~torch.isfinite(step).all(-1), RootStatus.SINGULAR)
            step = torch.where(rows.running.unsqueeze(-1), step, 0.0)
            good, point, residual, norm = _halve(rows, step, 1 / (k + 1) ** 2)
            s, y = pick(good, point - rows.x, torch.zeros_like(step)), pick(good, residual - f, torch.zeros_like(f))
            Hy = base(y) + _low_rank(U, V, y)
            Hs = base.adjoint(s) + _low_rank(V, U, s)
            denominator = (s.conj() * Hy).sum(-1, keepdim=True)
            usable = denominator.abs() > 1e-12 * torch.linalg.vector_norm(s, dim=-1, keepdim=True) ** 2
            U[:, :, slot] = torch.where(usable, (s - Hy) / denominator, 0.0)
            V[:, :, slot] = torch.where(usable, Hs, 0.0)
            rate = torch.where(good, norm / rows.norm, 0.0).clamp(max=0.9)
            rows.move(good, point, residual, norm)
            if by_residual:
                rows.succeed(rows.norm <= problem.tol)
            else:
                # linear convergence at the rate q leaves q / (1 - q) of a step; a small one that leads nowhere is rounding
                measure = error(rows, step)
                rows.succeed(((measure <= 1) & (measure * rate <= 1 - rate)) | (rows.norm == 0))
            stuck = rows.running & ~good
            rows.fail(stuck & (failed | (slot == 0)), RootStatus.STALLED)
            failed = stuck
            U, V = pick(stuck, torch.zeros_like(U), U), pick(stuck, torch.zeros_like(V), V)
            rows.report(k)
        return rows.record(f"Broyden, {base.note}")


def _low_rank(U: Tensor, V: Tensor, v: Tensor) -> Tensor:
    return (U @ (V.mH @ v.unsqueeze(-1))).squeeze(-1)


def _halve(rows: Rows, step: Tensor, slack: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accept ``|r(x + a s)| <= (1 + slack) |r(x)| - 1e-4 a^2 |s|^2``, ``a`` = 1, 1/2, ..."""
    problem, searching = rows.problem, rows.running
    accepted = torch.zeros_like(searching)
    a = torch.ones_like(rows.norm)
    x, residual, norm = rows.x, rows.residual, rows.norm
    size = problem.norm(step / problem.x_scale).square()
    for _ in range(30):
        point = clip(problem, rows.x + a.unsqueeze(-1) * step)
        r, r_norm = rows.evaluate(torch.where(searching.unsqueeze(-1), point, rows.x), searching)
        # the term in |s|^2 has no scale of its own: it is kept below a part of the residual
        demand = (1 + slack) * rows.norm - torch.minimum(1e-4 * a * a * size, 1e-4 * rows.norm)
        good = searching & torch.isfinite(r_norm) & (r_norm <= demand)
        x, residual, norm = pick(good, point, x), pick(good, r, residual), pick(good, r_norm, norm)
        accepted, searching = accepted | good, searching & ~good
        if not bool(searching.any()):
            break
        a = torch.where(searching, a / 2, a)
    return accepted, x, residual, norm


class _Inverse:
    """The part of Broyden's inverse that updates do not touch."""

    def __init__(self, initial: str | float | None, rows: Rows) -> None:
        if initial is None:
            initial = "scaled" if rows.problem.jacobian is None else "jacobian"
        if initial == "jacobian":
            need_jacobian(rows.problem, "Broyden(initial='jacobian')")
        self.kind, self.factors = initial, None
        self.factors: Factorization | None
        self.scale = torch.ones_like(rows.x[:, :1])
        self.note = f"initial {initial}"

    def renew(self, rows: Rows) -> None:
        problem, running = rows.problem, rows.running
        if self.kind == "jacobian":
            from .newton import merge

            assert problem.jacobian is not None
            matrix = merge(running, problem.jacobian(rows.x), None)
            rows.n_jac = rows.n_jac + running
            solver = problem.linear_solver
            self.factors = solver.factor(matrix, problem.log) if self.factors is None else solver.refactor(self.factors, matrix)
            rows.fail(ill_determined(matrix, self.factors), RootStatus.SINGULAR)
        elif self.kind == "scaled":
            f = torch.where(running.unsqueeze(-1), rows.residual, 0.0)
            size, length = (torch.linalg.vector_norm(v, dim=-1, keepdim=True) for v in (f, rows.x))
            s = f * (1e-4 * torch.where(length > 0, length, 1.0) / torch.where(size > 0, size, 1.0))
            probe, norm = rows.evaluate(clip(problem, rows.x + s), running)
            y = torch.where(torch.isfinite(norm).unsqueeze(-1), probe - f, 0.0)
            square = torch.linalg.vector_norm(y, dim=-1, keepdim=True) ** 2
            self.scale = torch.where(square > 0, (y.conj() * s).sum(-1, keepdim=True) / square, 1.0)
        else:
            self.scale = torch.full_like(self.scale, float(self.kind))

    def __call__(self, v: Tensor) -> Tensor:
        return self.scale * v if self.factors is None else self.factors.solve(v)

    def adjoint(self, v: Tensor) -> Tensor:
        return self.scale.conj() * v if self.factors is None else self.factors.solve(v, transposed=True, conjugated=True)
