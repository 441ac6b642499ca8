"""Backward differentiation formulas at work, of one trajectory and of many: the table of differences, Newton's iteration for the correction
of a step, the next order and size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import LinearSolver, Matrix, SparseMatrix
from ..linalg.dense import factor_again, factor_one, solved
from ..linalg.pencil import Pencil, scaled_factors, split
from ..methods.bdf import MAX_ORDER, SIZE, Formulas
from ..system.jacobians import JacobianStrategy
from .clock import initial_step
from .multistep import MultistepSolver, Outcome, Predicted
from .newton import iterate, jacobian_at, shifted
from .numbers import (
    Decision,
    Measure,
    absent,
    added,
    along,
    any_of,
    at_least,
    at_most,
    choose,
    choose_states,
    column,
    entry,
    finite,
    highest,
    less,
    negated,
    precise,
    product,
)
from .plan import Plan
from .residual import ResidualSolver
from .stages import tolerances_of_stages
from .stepper import Attempt, StageWork

__all__ = ["BOUND", "LARGEST", "NEWTON", "SAFETY", "SMALLEST", "BdfSolver"]

NEWTON, SMALLEST, LARGEST, SAFETY = 5, 0.2, 10.0, 0.9
#: what is left by the iteration, in units of its own tolerance
BOUND = 1e-3


def safety_after(rounds: Any) -> Any:
    """The safety factor of the next step, after so many rounds of the iteration."""
    return SAFETY * (2 * NEWTON + 1) / (2 * NEWTON + rounds)


def shrunk(error: Measure, order: Any, safety: Measure) -> Measure:
    """The factor of a step whose error was too large, or is no number."""
    factor = at_most(at_least(safety * at_least(error, 1e-30) ** (-1 / (order + 1)), SMALLEST), 1.0)
    return choose(finite(error), factor, SMALLEST)


def changed(factor: Measure, same_order: Decision) -> Measure:
    """The factor of a step after one that was accepted: small changes are not worth a new matrix."""
    factor = at_most(at_least(factor, SMALLEST), LARGEST)
    return choose((factor > 0.95) & (factor < 1.2) & same_order, 1.0, factor)


@dataclass
class BdfSolver(MultistepSolver):
    """The equation of a step, ``F(t, y_p + d, (psi + d) / c) = 0`` for the correction ``d``, by Newton's iteration with old matrices.

    For an ODE ``F = y' - f``. A row's matrices are taken anew when its iteration is slow or its ``c`` has changed, so a trajectory does not
    depend on the others. One ``alone``, which is that of an ODE, goes by numbers.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    plan: Plan
    jacobian: JacobianStrategy
    linear_solver: LinearSolver
    residual: bool
    work: StageWork
    starter: ResidualSolver | None
    skipped: Tensor | None = None
    alone: bool = False

    def __post_init__(self) -> None:
        self.rtol, self.atol = tolerances_of_stages(self.plan, BOUND)
        self.stuck: Decision = False if self.alone else torch.zeros_like(self.work.n_fun, dtype=torch.bool)
        #: the Jacobian, of implicit equations a `Pencil`
        self._matrix: Any = None
        self._factors: Any = None
        #: that of the factors, NaN where the matrix is another by now
        self._c: Measure = math.nan if self.alone else torch.full_like(self.work.n_fun, math.nan, dtype=self.plan.real)

    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """See `MultistepSolver.start`."""
        plan, t = self.plan, anchors[0]
        if self.starter is not None:
            slope, step = self.starter.start(anchors, sign, y0)
            #: rows in the step that follows a named jump, see `_settle`, and the factor by which the next one is longer
            self._settling, self._longer = torch.zeros_like(self.stuck), torch.ones_like(t)
            self._sign, self._span, self._now, self._size = sign, (anchors[-1] - t).abs(), t, step
        else:
            slope = self.f(t.to(plan.real), y0)
            step = initial_step(self.f, plan, anchors, y0, slope, sign) if plan.first_step is None else t
            self.work.n_fun += 1 + (plan.first_step is None)
        if plan.first_step is not None:
            step = torch.full_like(t, plan.first_step)
        step = step.clamp(min=plan.min_step, max=plan.max_step)
        self.formulas = Formulas(y0.dtype, y0.device, self.alone)
        D = y0.new_zeros(SIZE, *y0.shape)
        D[0], D[1] = y0, slope * (step * sign).to(plan.real).unsqueeze(-1)
        #: from the distance of the differences after the last accepted step to that of the next one, and 0.0 where they have been forgotten
        self.ratio: Measure = torch.ones_like(step)
        self.kept: Measure = torch.ones_like(step)
        self.order: Any = torch.ones(len(y0), dtype=torch.int64, device=y0.device)
        #: accepted steps since the last change of the distance
        self.equal: Any = torch.zeros_like(self.order)
        if self.alone:
            D, self.order, self.equal, self.ratio, self.kept = D[:, 0], 1, 0, 1.0, 1.0
        #: the state stands beside the table, in its own shape
        self.D, self._state = D, y0.reshape(self._shape)
        return step

    @property
    def idle(self) -> Tensor:
        """See `MultistepSolver.idle`."""
        return torch.ones(3, dtype=torch.float64, device=self.D.device)

    @property
    def y(self) -> Tensor:
        """See `Stepper.y`."""
        return self._state

    def resize(self, factor: Measure, which: Decision) -> None:
        """See `MultistepSolver.resize`."""
        matrix = self.formulas.rescaling(self.order, choose(which, factor, 1.0))
        matrix = choose(column(column(which)), matrix, self.formulas.eye)
        self.D = product(matrix.to(self.D.dtype), self.D)
        self.ratio = choose(which, self.ratio * factor, self.ratio)
        self.equal = choose(which, 0, self.equal)

    def predict(self, when: Tensor, h: Measure, running: Decision) -> Predicted:
        """See `MultistepSolver.predict`."""
        D, order, real, formulas = self.D, self.order, self.plan.real, self.formulas
        ratio, kept = self.ratio, self.kept
        predicted, psi = (x.reshape(self._shape) for x in product(formulas.reading[order], D).unbind())
        c = h / formulas.alpha[order]
        d, converged, counts = self.correct(when, predicted, psi, c if self.alone else c.to(real), running)
        new = D if absent(converged) else added(product(formulas.S[order], D), formulas.s[order], d.reshape(D.shape[1:]))

        def stages() -> Sequence[Tensor]:
            differences = product(formulas.shown[order], new) / column(choose(running, h, 1.0), real)
            return differences.reshape(-1, *self._shape).unbind()

        def extra() -> Tensor:
            known = precise(order), ratio, kept
            return torch.tensor(known, dtype=torch.float64, device="cpu") if self.alone else torch.stack(known)

        estimate = self._shown(formulas.constants[order] * d)
        if self.starter is not None:
            estimate = torch.where(self._settling.unsqueeze(-1), 0.0, estimate)
            self._size = h.abs()
        return Predicted(predicted + d, estimate, converged, stages, extra, (new, counts))

    def accept(self, found: Predicted, passed: Decision, restart: Decision, step: Attempt) -> None:
        """See `MultistepSolver.accept`."""
        self.D, self._state = choose_states(passed, found.kept[0], self.D), choose_states(passed, found.y, self._state)
        self.ratio, self.kept = choose(passed, 1.0, self.ratio), choose(passed, 1.0, self.kept)
        self.equal = choose(passed, self.equal + 1, self.equal)
        if self.starter is not None:
            self._now = self.seen(step.end, 0.0, step.before).double()

    def propose(self, found: Predicted, outcome: Outcome) -> Measure:
        """See `MultistepSolver.propose`."""
        running, passed, failed, rejected, restart, error, scale = outcome
        safety = safety_after(precise(found.kept[1]))
        ready = passed & running & (self.equal > self.order) & negated(restart)
        factor = 1.0 if absent(rejected) else choose(rejected, shrunk(precise(error), self.order, safety), 1.0)
        factor = choose(failed, 0.5, factor)
        if any_of(ready):
            up, best = self._next_order(error, safety, scale)
            self.order, factor = choose(ready, best, self.order), choose(ready, up, factor)
        settled = False if self.starter is None else self._settling & passed & running
        anew = restart | settled
        if any_of(anew):
            # behind a discontinuity the differences say nothing
            self.D = torch.cat([self.D[:2], choose_states(anew, torch.zeros_like(self.D[2:]), self.D[2:])])
            self.kept, self.order, self.equal = choose(anew, 0.0, self.kept), choose(anew, 1, self.order), choose(anew, 0, self.equal)
            factor = choose(restart, 0.1, factor)
            if self.starter is not None:
                factor = self._settle(restart, settled & ~restart, factor)
        return factor

    def _settle(self, restart: Tensor, settled: Tensor, factor: Tensor) -> Tensor:
        """The factors of the next steps of implicit equations at a named jump, where algebraic variables may jump too.

        The first step from there is so small that nothing else moves, and not tested: its end is consistent, and differentiable like that
        of any step. The solve goes on from it, with its slope, by steps of the size that it would have had.
        """
        assert self.starter is not None
        smallest = 64 * torch.finfo(self.plan.real).eps * self._now.abs()
        size = torch.where(self._size > 0, self._size, 1.0)
        brief = torch.minimum(0.1 * size, torch.maximum(1e-10 * self._span, smallest).clamp(min=self.plan.min_step))
        if bool(settled.any()):
            slope = self.starter.slope(self._now, self.D[0], self._sign, brief, settled)[0]
            moved = slope * (self._sign * self._size).to(self.plan.real).unsqueeze(-1)
            self.D[1] = torch.where(settled.unsqueeze(-1), moved, self.D[1])
        factor = torch.where(restart, brief / size, torch.where(settled, self._longer, factor))
        self._longer = torch.where(restart, 0.1 * size / brief, self._longer)
        self._settling = (self._settling & ~settled) | restart
        return factor

    def _shown(self, error: Tensor) -> Tensor:
        return error if self.skipped is None else torch.where(self.skipped, 0.0, error)

    def _next_order(self, error: Measure, safety: Measure, scale: Tensor) -> tuple[Measure, Any]:
        """Factor of the step and order for those that may change them: the estimates at the orders around."""
        D, order, plan, constants = self.D, self.order, self.plan, self.formulas.constants

        def level(q: Any, there: Decision) -> Measure:
            if absent(there):
                return math.inf
            estimate = constants[q] * entry(D, q + 1).reshape(self._shape)
            return choose(there, precise(self.norm(plan.scaled(self._shown(estimate), scale).abs())), math.inf)

        norms = level(order - 1, order > 1), precise(error), level(order + 1, order < MAX_ORDER)
        factor, best = highest(norms, order)
        return changed(safety * factor, best == 1), order + best - 1

    def _take(self, t: Tensor, y: Tensor, slope: Tensor, rows: Decision) -> None:
        """Take the matrices of ``rows`` anew."""
        if self.residual:
            found: Any = split(self.jacobian(lambda pair: self.f(t, pair), torch.cat([y, slope], -1)))
        else:
            found = jacobian_at(self.jacobian, self.f, t.reshape(-1), y.reshape(t.numel(), self.D.shape[-1]))
        old = self._matrix
        if old is not None and not self.alone:
            pencil = self.residual
            found = Pencil(_mixed(rows, found.E, old.E), _mixed(rows, found.G, old.G)) if pencil else _mixed(rows, found, old)
        self._matrix, self._c = found, choose(rows, math.nan, self._c)
        self.work.n_jac += rows

    def _solve(self, c: Measure, b: Tensor, running: Decision) -> Tensor:
        """``(E + c G)^-1 b`` where it is ``running``."""
        changed = running & (c != self._c)
        if any_of(changed):
            self._c, solver, log = choose(running, c, self._c), self.linear_solver, self.work.log
            if self.alone:
                size = torch.tensor([[c]], dtype=self.plan.real, device=b.device)
            else:
                # trajectories that are done have no step of their own
                size = torch.where(torch.isfinite(self._c) & (self._c != 0), self._c, 1.0).unsqueeze(-1)
            old = self._factors
            if self.residual:
                self._factors = scaled_factors(solver, self._matrix.at(size), log, old)
            else:
                self._factors = (factor_one if self.alone else factor_again)(solver, shifted(self._matrix, size), log, old)
            self.work.n_factorizations += changed
        self.work.n_solves += running
        return solved(self._factors, b)

    def correct(self, t: Tensor, predicted: Tensor, psi: Tensor, c: Measure, running: Decision) -> tuple[Tensor, Decision, Any]:
        """The correction, whether the iteration has converged, and after how many rounds."""
        fresh = self._matrix is None
        safe = column(choose(running, c, 1.0))
        if fresh:
            self._take(t, predicted, psi / safe, running)
        d, converged, counts, stalled = self._iterate(t, predicted, psi, c, safe, running)
        again = running & negated(converged)
        if not fresh and any_of(again):
            self._take(t, predicted, psi / safe, again)
            d2, better, more, stalled2 = self._iterate(t, predicted, psi, c, safe, again)
            d, counts = choose_states(again, d2, d), choose(again, more, counts)
            converged, stalled = choose(again, better, converged), choose(again, stalled2, stalled)
        self.stuck = choose(running, stalled, self.stuck)
        return d, converged, counts

    def _iterate(
        self, t: Tensor, predicted: Tensor, psi: Tensor, c: Measure, safe: Any, running: Decision
    ) -> tuple[Tensor, Decision, Any, Decision]:
        """The correction, whether it has converged, after how many rounds, and whether it has not though all was finite."""
        work, f, size = self.work, self.f, predicted.abs() * self.rtol + self.atol
        rounds = work.n_newton

        def change(d: Tensor, active: Decision) -> tuple[Tensor, Measure]:
            y, moved = predicted + d, psi + d
            # c F(t, y, (psi + d) / c)
            defect = safe * f(t, torch.cat([y, moved / safe], -1)) if self.residual else along(moved, f(t, y), -safe)
            found = self._solve(c, choose_states(active, defect, 0.0), active)
            work.n_fun += active
            work.n_newton = work.n_newton + active
            return found, self.norm(found / size)

        d, failed, stalled = iterate(torch.zeros_like(predicted), change, less, running, BOUND, NEWTON, worst=1.0)
        return d, running & negated(failed), work.n_newton - rounds, stalled


def _mixed(rows: Tensor, new: Matrix, old: Matrix) -> Matrix:
    """The matrices of ``new`` in these rows, those of ``old`` in the others."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return torch.where(rows.reshape(-1, 1, 1), new, old)
    if isinstance(new, SparseMatrix) and isinstance(old, SparseMatrix) and len(rows) > 1:
        # one pattern: that of a given Jacobian, which may change, is of one trajectory
        return SparseMatrix(new.indices, torch.where(rows.unsqueeze(-1), new.values, old.values), new.shape)
    return new
