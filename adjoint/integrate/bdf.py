"""Backward differentiation formulas at work: the table of differences, and Newton's iteration for the correction of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg import Factorization, LinearSolver, Matrix, SparseMatrix
from ..linalg.dense import factor_again
from ..linalg.pencil import Pencil, ScaledFactors, scaled_factors, split
from ..methods.bdf import MAX_ORDER, coefficients, rescaling
from .clock import initial_step
from .multistep import MultistepSolver, Outcome, Predicted
from .newton import iterate, jacobian_at, shifted
from .numbers import Decision, Measure, at_least, at_most, choose, finite, less
from .plan import Plan
from .residual import ResidualSolver
from .stages import tolerances_of_stages
from .stepper import StageWork

__all__ = ["BOUND", "LARGEST", "NEWTON", "SAFETY", "SIZE", "SMALLEST", "BdfSolver", "changed", "safety_after", "shrunk", "update_matrix"]

#: rows of the table of differences
SIZE = MAX_ORDER + 3
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


def update_matrix(order: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` (B, 8, 8) and ``s`` (B, 8): after a step the differences are ``S D + s d``, where ``d`` is the correction of the prediction."""
    place = torch.arange(SIZE, device=order.device)
    q = order.unsqueeze(-1)
    low = (place <= q).double()
    # D_j = sum_{i = j}^{q} D_i + d for j <= q, then d itself, then d - D_{q + 1}
    S = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.float64, device=order.device)) * low.unsqueeze(-1) * low.unsqueeze(-2)
    after, next_ = (place == q + 2).double(), (place == q + 1).double()
    S = S - after.unsqueeze(-1) * next_.unsqueeze(-2)
    rest = (place > q + 2).double()
    S = S + torch.diag_embed(rest)
    return S, (place <= q + 2).double()


@dataclass
class BdfSolver(MultistepSolver):
    """The equation of a step, ``F(t, y_p + d, (psi + d) / c) = 0`` for the correction ``d``, by Newton's iteration with old matrices.

    For an ODE ``F = y' - f``. A row's matrices are taken anew when its iteration is slow or its ``c`` has changed, so a trajectory does not
    depend on the others.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    plan: Plan
    jacobian: Callable[[Callable[[Tensor], Tensor], Tensor], Matrix]
    linear_solver: LinearSolver
    residual: bool
    work: StageWork
    starter: ResidualSolver | None
    skipped: Tensor | None = None

    def __post_init__(self) -> None:
        self.rtol, self.atol = tolerances_of_stages(self.plan, BOUND)
        self.stuck = torch.zeros_like(self.work.n_fun, dtype=torch.bool)
        self._pencil: Pencil | Matrix | None = None
        self._factors: ScaledFactors | None = None
        self._plain: Factorization | None = None
        self._c: Tensor | None = None
        #: rows in the step that follows a named jump, see `_settle`, and the factor by which the next one is longer
        self._settling = torch.zeros_like(self.stuck)
        self._longer = torch.ones_like(self.stuck, dtype=torch.float64)

    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """See `MultistepSolver.start`."""
        plan, t = self.plan, anchors[0]
        if self.starter is not None:
            slope, step = self.starter.start(anchors, sign, y0)
        else:
            slope = self.f(t.to(plan.real), y0)
            step = initial_step(self.f, plan, anchors, y0, slope, sign) if plan.first_step is None else t
            self.work.n_fun += 1 + (plan.first_step is None)
        if plan.first_step is not None:
            step = torch.full_like(t, plan.first_step)
        step = step.clamp(min=plan.min_step, max=plan.max_step)
        self._sign, self._span, self._now, self._size = sign, (anchors[-1] - anchors[0]).abs(), t, step
        self.D = y0.new_zeros(SIZE, *y0.shape)
        self.D[0], self.D[1] = y0, slope * (step * sign).to(plan.real).unsqueeze(-1)
        self.eye = torch.eye(SIZE, dtype=torch.float64, device=y0.device)
        #: from the distance of the differences after the last accepted step to that of the next one, and 0.0 where they have been forgotten
        self.ratio, self.kept = torch.ones_like(step), torch.ones_like(step)
        self.order = torch.ones(len(y0), dtype=torch.int64, device=y0.device)
        self.equal = torch.zeros_like(self.order)
        self.gamma, self.alpha, self.constants = coefficients(torch.float64, y0.device)
        return step

    @property
    def idle(self) -> Tensor:
        """See `MultistepSolver.idle`."""
        return self.eye.new_ones(3)

    def resize(self, factor: Tensor, which: Tensor) -> None:
        """See `MultistepSolver.resize`."""
        matrix = rescaling(self.order, torch.where(which, factor, 1.0), SIZE)
        matrix = torch.where(which.reshape(-1, 1, 1), matrix, self.eye)
        self.D = torch.einsum("bij,jbn->ibn", matrix.to(self.D.dtype), self.D)
        self.ratio = torch.where(which, self.ratio * factor, self.ratio)
        self.equal = torch.where(which, 0, self.equal)

    def predict(self, when: Tensor, h: Tensor, running: Tensor) -> Predicted:
        """See `MultistepSolver.predict`."""
        D, order, real = self.D, self.order, self.plan.real
        self._size = h.abs()
        low = (torch.arange(SIZE, device=D.device) <= order.unsqueeze(-1)).to(real)
        predicted = torch.einsum("bi,ibn->bn", low.to(D.dtype), D)
        weights = torch.nn.functional.pad(self.gamma, (0, SIZE - self.gamma.shape[0])) * low / self.alpha[order].unsqueeze(-1)
        psi = torch.einsum("bi,ibn->bn", weights.to(D.dtype), D)
        c = (h / self.alpha[order]).to(real).unsqueeze(-1)
        d, converged, counts = self.correct(when, predicted, psi, c, running)
        S, s = update_matrix(order)
        new = torch.einsum("bij,jbn->ibn", S.to(D.dtype), D) + torch.einsum("bi,bn->ibn", s.to(D.dtype), d)
        keep = (torch.arange(1, MAX_ORDER + 1, device=D.device) <= order.unsqueeze(-1)).to(real)
        differences = torch.cat([new[1 : MAX_ORDER + 1] * keep.t().unsqueeze(-1), d.unsqueeze(0)])
        stages = differences / torch.where(running, h, 1.0).to(real).reshape(1, -1, 1)
        extra = torch.stack([order.double(), self.ratio, self.kept])
        estimate = self._shown(self.constants[order].to(real).unsqueeze(-1) * d)
        estimate = torch.where(self._settling.unsqueeze(-1), 0.0, estimate)
        return Predicted(predicted + d, estimate, converged, stages, extra, (new, counts))

    def accept(self, found: Predicted, passed: Tensor, restart: Tensor, after: Tensor) -> None:
        """See `MultistepSolver.accept`."""
        self.D = torch.where(passed.reshape(1, -1, 1), found.kept[0], self.D)
        self.ratio, self.kept = torch.where(passed, 1.0, self.ratio), torch.where(passed, 1.0, self.kept)
        self.equal = torch.where(passed, self.equal + 1, self.equal)
        self._now = after.double()

    def propose(self, found: Predicted, outcome: Outcome) -> Tensor:
        """See `MultistepSolver.propose`."""
        running, passed, failed, rejected, restart, error, scale = outcome
        safety = safety_after(found.kept[1].to(torch.float64))
        shrink = shrunk(error.double(), self.order, safety)
        ready = passed & running & (self.equal > self.order) & ~restart
        factor = torch.where(failed, 0.5, torch.where(rejected, shrink, 1.0))
        if bool(ready.any()):
            up, best = self._next_order(error, safety, scale)
            self.order = torch.where(ready, best, self.order)
            factor = torch.where(ready, up, factor)
        settled = self._settling & passed & running
        anew = restart | settled
        if bool(anew.any()):
            kill = torch.zeros(SIZE, dtype=torch.float64, device=scale.device)
            kill[:2] = 1.0
            mask = torch.where(anew.unsqueeze(-1), kill, 1.0)
            self.D, self.kept = self.D * mask.t().unsqueeze(-1).to(self.D.dtype), torch.where(anew, 0.0, self.kept)
            self.order, self.equal = torch.where(anew, 1, self.order), torch.where(anew, 0, self.equal)
            factor = torch.where(restart, 0.1, factor)
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

    def _next_order(self, error: Tensor, safety: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Factor of the step and order for the rows that may change them: the estimates at the orders around."""
        D, order, plan = self.D, self.order, self.plan
        rows = torch.arange(order.shape[0], device=order.device)

        def level(which: Tensor) -> Tensor:
            constant = self.constants[(order + which).clamp(0, MAX_ORDER + 1)]
            estimate = constant.to(plan.real).unsqueeze(-1) * D[order + which + 1, rows]
            return plan.norm(plan.scaled(self._shown(estimate), scale).abs()).double()

        below = torch.where(order > 1, level(torch.full_like(order, -1)), float("inf"))
        above = torch.where(order < MAX_ORDER, level(torch.ones_like(order)), float("inf"))
        norms = torch.stack([below, error.double(), above]).clamp(min=1e-30)
        powers = torch.stack([order, order + 1, order + 2]).double()
        factors = norms ** (-1 / powers)
        best = factors.argmax(0)
        return changed(safety * factors.amax(0), best == 1), order + best - 1

    def equation(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """``F(t, y, y')``."""
        return self.f(t, torch.cat([y, slope], -1)) if self.residual else slope - self.f(t, y)

    def _matrix(self, t: Tensor, y: Tensor, slope: Tensor, rows: Tensor) -> None:
        """Take the matrices of ``rows`` anew."""
        if self.residual:
            found = split(self.jacobian(lambda pair: self.f(t, pair), torch.cat([y, slope], -1)))
            old = self._pencil
            if isinstance(old, Pencil):
                found = Pencil(_mixed(rows, found.E, old.E), _mixed(rows, found.G, old.G))
            self._pencil = found
        else:
            new = jacobian_at(self.jacobian, self.f, t, y)
            self._pencil = new if self._pencil is None else _mixed(rows, new, self._pencil)  # type: ignore[arg-type]
        self._c = torch.full_like(t.unsqueeze(-1), torch.nan) if self._c is None else torch.where(rows.unsqueeze(-1), torch.nan, self._c)
        self.work.n_jac += rows

    def _solve(self, c: Tensor, b: Tensor, running: Tensor) -> Tensor:
        """``(E + c G)^-1 b`` in the ``running`` rows."""
        assert self._c is not None
        changed = running & (c != self._c).squeeze(-1)
        if bool(changed.any()):
            self._c = torch.where(running.unsqueeze(-1), c, self._c)
            # trajectories that are done have no step of their own
            safe = torch.where(torch.isfinite(self._c) & (self._c != 0), self._c, 1.0)
            if isinstance(self._pencil, Pencil):
                self._factors = scaled_factors(self.linear_solver, self._pencil.at(safe), self.work.log, self._factors)
            else:
                assert self._pencil is not None
                self._plain = factor_again(self.linear_solver, shifted(self._pencil, safe), self.work.log, self._plain)
            self.work.n_factorizations += changed
        self.work.n_solves += running
        factors = self._factors if isinstance(self._pencil, Pencil) else self._plain
        assert factors is not None
        return factors.solve(b)

    def correct(self, t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The correction, which rows have converged, and after how many iterations."""
        if self._pencil is None:
            self._matrix(t, predicted, psi / torch.where(running.unsqueeze(-1), c, 1.0), running)
            fresh = torch.ones_like(running)
        else:
            fresh = torch.zeros_like(running)
        size = predicted.abs() * self.rtol + self.atol
        d, converged, counts, stalled = self._iterate(t, predicted, psi, c, running, size)
        again = running & ~converged & ~fresh
        if bool(again.any()):
            safe = torch.where(running.unsqueeze(-1), c, 1.0)
            self._matrix(t, predicted, psi / safe, again)
            d2, better, more, stalled2 = self._iterate(t, predicted, psi, c, again, size)
            d = torch.where(again.unsqueeze(-1), d2, d)
            converged, stalled = torch.where(again, better, converged), torch.where(again, stalled2, stalled)
            counts = torch.where(again, more, counts)
        self.stuck = torch.where(running, stalled, self.stuck)
        return d, converged, counts

    def _iterate(
        self, t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor, running: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The correction, which rows have converged, after how many rounds, and which have not though all was finite."""
        safe = torch.where(running.unsqueeze(-1), c, 1.0)
        rounds = self.work.n_newton

        def change(d: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
            value = safe * self.equation(t, predicted + d, (psi + d) / safe)
            found = self._solve(c, torch.where(active.unsqueeze(-1), value, 0.0), active)
            self.work.n_fun += active
            self.work.n_newton = self.work.n_newton + active
            return found, self.plan.norm(found / size)

        d, failed, stalled = iterate(torch.zeros_like(predicted), change, less, running, BOUND, NEWTON, worst=1.0)
        return d, running & ~failed, self.work.n_newton - rounds, stalled


def _mixed(rows: Tensor, new: Matrix, old: Matrix) -> Matrix:
    """The matrices of ``new`` in these rows, those of ``old`` in the others."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return torch.where(rows.reshape(-1, 1, 1), new, old)
    if isinstance(new, SparseMatrix) and isinstance(old, SparseMatrix) and len(rows) > 1:
        # one pattern: that of a given Jacobian, which may change, is of one trajectory
        return SparseMatrix(new.indices, torch.where(rows.unsqueeze(-1), new.values, old.values), new.shape)
    return new
