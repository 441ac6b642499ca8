"""Newton's method: fresh, chord and Shamanskii factors, exact or inexact inner solves, globalised by backtracking, of
every row with its own length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import Factorization, LinearOperator, Matrix, SparseMatrix
from .protocol import (
    RootProblem,
    RootRecord,
    RootStatus,
    Rows,
    clip,
    ill_determined,
    need_jacobian,
    pick,
    rounding_floor,
    stationary,
    step_measure,
)

__all__ = ["Backtracking", "EisenstatWalker", "Newton", "Searched"]

@dataclass(frozen=True)
class Searched:
    """Accepted points. ``accepted`` (B,); the others are where they were. ``length`` (B,) is the part of the step taken."""

    accepted: Tensor
    length: Tensor
    x: Tensor
    residual: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Backtracking:
    """Armijo's rule on a merit that falls at the rate ``-merit`` along the step (|residual| or Deuflhard's natural level along Newton's).

    A length ``a`` is accepted where ``merit(a) <= (1 - decrease a) merit(0)``; else the square of the merit is interpolated, by a parabola
    and then by cubics, within [0.1, 0.5] of the last length (Dennis & Schnabel 1983, A6.3.1; Kelley 1995, section 8.3).
    """

    decrease: float = 1e-4
    min_length: float = 1e-10
    max_trials: int = 40

    def __post_init__(self) -> None:
        if not (0 < self.decrease < 1 and 0 < self.min_length < 1 and self.max_trials >= 1):
            raise InvalidInput(f"need 0 < decrease < 1, 0 < min_length < 1 and max_trials >= 1, got {self!r}")

    def search(
        self,
        rows: Rows,
        step: Tensor,
        longest: Tensor,
        merit: Callable[[Tensor, Tensor], Tensor],
        start: Tensor,
        free: Tensor,
        single: Tensor,
    ) -> Searched:
        """``merit(residual, norm)`` is compared with ``start``. Lengths begin at ``longest`` (B,). Rows of ``free`` accept any finite
        point: their steps are too small to judge. Rows of ``single`` are tried once only."""
        problem, running = rows.problem, rows.running
        searching, accepted = running, torch.zeros_like(running)
        length, x, residual, norm = longest, rows.x, rows.residual, rows.norm
        before, value_before = length, start.square()
        for trial in range(self.max_trials):
            point = clip(problem, rows.x + length.unsqueeze(-1) * step)
            r, r_norm = rows.evaluate(torch.where(searching.unsqueeze(-1), point, rows.x), searching)
            value = torch.where(torch.isfinite(r_norm), merit(r, r_norm), float("inf"))
            good = searching & torch.isfinite(value) & ((value <= (1 - self.decrease * length) * start) | free)
            x, residual, norm = pick(good, point, x), pick(good, r, residual), pick(good, r_norm, norm)
            accepted = accepted | good
            searching = searching & ~good & ~single & (length > self.min_length)
            if not bool(searching.any()):
                break
            shorter = _interpolate(start.square(), length, value.square(), before, value_before, trial == 0)
            before, value_before = torch.where(searching, length, before), torch.where(searching, value.square(), value_before)
            length = torch.where(searching, shorter, length)
        return Searched(accepted, length, x, residual, norm)


def _interpolate(f0: Tensor, a: Tensor, fa: Tensor, b: Tensor, fb: Tensor, first: bool) -> Tensor:
    """The minimiser of the parabola (or cubic) through ``f(0), f'(0) = -2 f(0), f(a)`` (and ``f(b)``), kept in [0.1, 0.5] a."""
    slope = -2 * f0
    guess = -slope * a * a / (2 * (fa - f0 - slope * a))
    if not first:
        ra, rb = (fa - f0 - slope * a) / a**2, (fb - f0 - slope * b) / b**2
        cubic, square = (ra - rb) / (a - b), (a * rb - b * ra) / (a - b)
        root = (-square + (square * square - 3 * cubic * slope).clamp(min=0).sqrt()) / (3 * cubic)
        guess = torch.where(torch.isfinite(root), root, guess)
    guess = torch.where(torch.isfinite(guess), guess, 0.1 * a)
    return torch.minimum(torch.maximum(guess, 0.1 * a), 0.5 * a)


@dataclass(frozen=True)
class EisenstatWalker:
    """Forcing terms of inexact Newton: choice 2 with safeguards (Eisenstat & Walker 1996, eq. 2.6 and section 2.2)."""

    first: float = 0.1
    largest: float = 0.5
    smallest: float = 1e-6
    gamma: float = 0.9
    power: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.smallest <= self.first <= self.largest < 1 and 0 < self.gamma <= 1 and 1 < self.power <= 2):
            raise InvalidInput(f"need 0 < smallest <= first <= largest < 1, 0 < gamma <= 1 and 1 < power <= 2, got {self!r}")

    def next(self, eta: float, ratio: float) -> float:
        """The relative tolerance after the residual norm changed by ``ratio``."""
        new, old = self.gamma * ratio**self.power, self.gamma * eta**self.power
        new = max(new, old) if old > 0.1 else new
        return min(max(new, self.smallest), self.largest)


@dataclass(frozen=True)
class Newton:
    """``A s = -r(x)``, ``x <- x + a s``.

    A row has converged after a full step within the tolerance on ``x`` that ends with ``norm(r / f_scale) <= tol``.

    Parameters
    ----------
    linesearch : "backtracking", "natural" or None
        Armijo's rule on ``|r / f_scale|``; the natural level ``|A^-1 r / x_scale|``, which no scaling of equations changes
        (Deuflhard 2004, section 3.3; one more solve a trial); or full steps always.
    reuse : "none", "shamanskii" or "chord"
        New factors every step; when the residual has not fallen by ``factor`` in a step; or only when a step with old ones fails, or
        leaves more than nine tenths of the residual. Steps with old factors are judged by the error that their rate of convergence leaves.
        Matrix-free Jacobians are cheap to renew and take "none" only.
    forcing : "eisenstat-walker", `EisenstatWalker`, or None
        How exactly linear solvers that have a field ``rtol`` are run (the worst row decides); None leaves their tolerance alone.
        Direct solvers have none, and are not concerned.
    bounds : "project" or "interior"
        Where a step leaves the bounds, project it on them, or shorten the whole of it to 0.995 of the way to the first one.
    """

    linesearch: Literal["backtracking", "natural"] | Backtracking | None = "backtracking"
    reuse: Literal["none", "shamanskii", "chord"] = "none"
    forcing: Literal["eisenstat-walker"] | EisenstatWalker | None = "eisenstat-walker"
    bounds: Literal["project", "interior"] = "project"
    factor: float = 2.0


    def __post_init__(self) -> None:
        if not (self.linesearch in ("backtracking", "natural", None) or isinstance(self.linesearch, Backtracking)):
            raise InvalidInput(f"linesearch must be 'backtracking', 'natural', a Backtracking or None, got {self.linesearch!r}")
        if self.reuse not in ("none", "shamanskii", "chord"):
            raise InvalidInput(f"reuse must be 'none', 'shamanskii' or 'chord', got {self.reuse!r}")
        if not (self.forcing in ("eisenstat-walker", None) or isinstance(self.forcing, EisenstatWalker)):
            raise InvalidInput(f"forcing must be 'eisenstat-walker', an EisenstatWalker or None, got {self.forcing!r}")
        if self.bounds not in ("project", "interior"):
            raise InvalidInput(f"bounds must be 'project' or 'interior', got {self.bounds!r}")
        if not self.factor > 1:
            raise InvalidInput(f"factor must be more than 1, got {self.factor!r}")

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`. Raises `InvalidInput` without a Jacobian."""
        need_jacobian(problem, "Newton")
        assert problem.jacobian is not None
        rows = Rows(problem, x0)
        matrix: Matrix | None = None
        factors: Factorization | None = None
        bad, moved = ~rows.running, torch.zeros_like(rows.running)
        refresh, eta, forcing = rows.running, None, self._forcing(problem)
        for k in range(problem.max_steps):
            if not rows.begin_step():
                break
            start = rows.norm
            refresh = refresh & rows.running
            if factors is None or self.reuse == "none" or bool(refresh.any()):
                fresh = problem.jacobian(rows.x)
                if isinstance(fresh, LinearOperator) and self.reuse != "none":
                    raise UnsupportedCombination(f"reuse={self.reuse!r} needs a dense or sparse Jacobian; use reuse='none' with operators")
                matrix = merge(refresh, fresh, matrix)
                rows.n_jac = rows.n_jac + refresh
                moved = moved & ~refresh
                eta = forcing.first if forcing is not None and eta is None else eta
                solver: Any = problem.linear_solver if eta is None else dataclasses.replace(problem.linear_solver, rtol=eta)  # type: ignore[type-var]
                factors = solver.factor(matrix, problem.log) if factors is None or eta is not None else solver.refactor(factors, matrix)
                assert factors is not None
                bad = torch.where(refresh, ill_determined(matrix, factors), bad)
                minimum = stationary(matrix, rows.residual)
                rows.fail(bad & refresh & minimum, RootStatus.STALLED)
                rows.fail(bad & refresh, RootStatus.SINGULAR)
            assert matrix is not None and factors is not None
            step = -factors.solve(torch.where(rows.running.unsqueeze(-1), rows.residual, 0.0))
            lost = ~torch.isfinite(step).all(-1)
            if isinstance(matrix, LinearOperator):
                rows.fail(lost & ~factors.singular(), RootStatus.UNSOLVED)
            rows.fail(lost, RootStatus.SINGULAR)
            step = torch.where(rows.running.unsqueeze(-1), step, 0.0)
            measure = step_measure(problem, step, rows.x)
            small = measure <= 1
            longest = to_boundary(problem, rows.x, step) if self.bounds == "interior" else torch.ones_like(rows.norm)
            found = self._advance(rows, factors, step, longest, small, ~refresh)
            blocked = (clip(problem, rows.x + step) != rows.x + step).any(-1) if self.bounds == "project" else longest < 1
            moved = moved | (found.accepted & (found.x != rows.x).any(-1))
            rows.move(found.accepted, found.x, found.residual, found.norm)
            last = found.accepted & small & (found.length >= 1) & ~blocked
            settled = rows.settled(torch.where(last.unsqueeze(-1), step, 0.0), measure, last, refresh)
            if eta is None or eta <= 1e-2:
                # linear convergence at the rate q leaves q / (1 - q) of a step; a fresh step leaves next to nothing
                rate = torch.where(refresh, 0.0, (rows.norm / start).clamp(max=1.0))
                sure = last & (settled <= 1) & (rate * settled <= 1 - rate) & (rate < 1)
                rows.succeed(sure & (rows.norm <= problem.tol))
                # at rounding level already, and still above tol: more steps would not help
                rows.fail(sure & refresh & (rows.norm > 0.5 * start), RootStatus.STALLED)
            rows.succeed(rows.norm == 0)
            self._stall(rows, matrix, found, refresh)
            if eta is not None and forcing is not None:
                ratio = torch.where(rows.running, rows.norm / start, 0.0).amax()
                eta = forcing.next(eta, float(ratio))
                if bool((rows.running & small).any()):  # a step that may be the last must be exact enough to be judged by its size
                    eta = min(eta, 1e-2)
            refresh = self._outdated(rows, found, start)
            rows.report(k)
        record = rows.record(note=self._note())
        unmoved = factors is not None and eta is None and not bool(moved.any()) and bool((record.n_jac > 0).all())
        return dataclasses.replace(record, factors=factors if unmoved else None)

    def _note(self) -> str:
        return "Newton" if self.reuse == "none" else f"Newton with {self.reuse} factors"

    def _forcing(self, problem: RootProblem) -> EisenstatWalker | None:
        solver: Any = problem.linear_solver
        # one whose accuracy is a setting
        inexact = dataclasses.is_dataclass(solver) and any(x.name == "rtol" for x in dataclasses.fields(solver))
        if self.forcing is None or not inexact:
            return None
        return EisenstatWalker() if self.forcing == "eisenstat-walker" else self.forcing

    def _advance(self, rows: Rows, factors: Factorization, step: Tensor, longest: Tensor, small: Tensor, stale: Tensor) -> Searched:
        problem = rows.problem
        if self.linesearch is None:
            x = clip(problem, rows.x + longest.unsqueeze(-1) * step)
            residual, norm = rows.evaluate(x, rows.running)
            good = rows.running & torch.isfinite(norm)
            rows.fail(~torch.isfinite(norm), RootStatus.NON_FINITE)
            return Searched(good, longest, x, residual, norm)
        natural = self.linesearch == "natural"
        search = self.linesearch if isinstance(self.linesearch, Backtracking) else Backtracking(decrease=0.25 if natural else 1e-4)
        if natural:
            start = problem.norm(step / problem.x_scale)
            return search.search(rows, step, longest, lambda r, _: problem.norm(factors.solve(r) / problem.x_scale), start, small, stale)
        return search.search(rows, step, longest, lambda _, norm: norm, rows.norm, small, stale)

    def _stall(self, rows: Rows, matrix: Matrix, found: Searched, refresh: Tensor) -> None:
        """Rows whose fresh step led nowhere: at the level of rounding that is success, else a failure."""
        stuck = rows.running & ~found.accepted & refresh
        floor = rounding_floor(matrix, rows.x)
        rows.succeed(stuck & (rows.residual.abs() <= floor).all(-1) & (rows.norm <= rows.problem.tol))
        rows.fail(stuck, RootStatus.STALLED)

    def _outdated(self, rows: Rows, found: Searched, start: Tensor) -> Tensor:
        if self.reuse == "none":
            return rows.running
        slow = rows.norm * (self.factor if self.reuse == "shamanskii" else 1 / 0.9) > start
        return ~found.accepted | slow


def merge(mask: Tensor, new: Matrix, old: Matrix | None) -> Matrix:
    """The new matrices in the rows of ``mask``, the old ones elsewhere; the identity where there is none, so that rows that have failed
    do not hinder the others."""
    if isinstance(new, LinearOperator):
        return new
    if isinstance(new, SparseMatrix):
        values = new.values.expand(mask.shape[0], -1)
        if old is None:
            diagonal = (new.indices[0] == new.indices[1]).to(values.dtype)
            return SparseMatrix(new.indices, pick(mask, values, diagonal.expand_as(values)), new.shape)
        assert isinstance(old, SparseMatrix)
        return SparseMatrix(new.indices, pick(mask, values, old.values), new.shape)
    if old is None:
        old = torch.eye(new.shape[-2], new.shape[-1], dtype=new.dtype, device=new.device).expand(mask.shape[0], -1, -1)
    assert isinstance(old, Tensor)
    return pick(mask, new.expand(mask.shape[0], -1, -1), old)


def to_boundary(problem: RootProblem, x: Tensor, step: Tensor, fraction: float = 0.995) -> Tensor:
    """``(B,)``: the longest part of the step, at most one, that keeps ``fraction`` of the distance to every bound."""
    longest = torch.ones_like(x[:, 0])
    for bound, sign in ((problem.lower, -1.0), (problem.upper, 1.0)):
        if bound is not None:
            outward = sign * step
            room = fraction * (sign * (bound - x)) / outward
            longest = torch.minimum(longest, torch.where(outward > 0, room, float("inf")).amin(-1))
    return longest
