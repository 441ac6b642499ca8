"""Backward differentiation formulas at work for one trajectory: as `bdf`, but times, sizes, orders and decisions are numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..linalg import Factorization, Matrix
from ..linalg.dense import factor_one, solved
from ..methods.bdf import MAX_ORDER, coefficients, rescaling_alone
from .bdf import BOUND, NEWTON, SIZE, BdfSolver, changed, safety_after, shrunk, update_matrix
from .clock import TimelineOfOne, initial_step
from .loop import Walk
from .newton import iterate, jacobian_at, shifted
from .numbers import Decision
from .plan import Plan, Record, row_norm, shifted_times
from .stepper import Attempt, Fate, StageWork

__all__ = ["LoneBdf", "solve_bdf_alone"]

#: a new state, its distance from the prediction, and that plus ``psi``
_Three = tuple[Tensor, Tensor, Tensor]


class _Formulas:
    """Numbers of every order, and the matrices that act on the table of differences (8, n), made when they are first asked for."""

    def __init__(self, like: Tensor) -> None:
        self.gamma, self.alpha, self.constants = (x.tolist() for x in coefficients(torch.float64, torch.device("cpu")))
        self._like = like
        self._found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __getitem__(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the prediction and of ``psi``; ``S`` and ``s`` of `update_matrix`."""
        if order not in self._found:
            low = [float(i <= order) for i in range(SIZE)]
            psi = [x / self.alpha[order] if i <= order else 0.0 for i, x in enumerate(self.gamma)]
            both = self._like.new_tensor([low, psi + [0.0] * (SIZE - len(psi))])
            S, s = update_matrix(torch.tensor([order], device=self._like.device))
            self._found[order] = both, S[0].to(self._like.dtype), s[0].to(self._like.dtype)
        return self._found[order]


class _Newton:
    """The iteration of `BdfSolver` for one ODE."""

    def __init__(self, solver: BdfSolver, device: torch.device) -> None:
        self.solver, self.device, self.norm = solver, device, row_norm(solver.plan)
        self.n_fun = self.n_jac = self.n_factorizations = self.n_newton = 0
        self.stuck = False
        self._matrix: Matrix | None = None
        self._factors: Factorization | None = None
        self._c = math.nan

    def finish(self) -> None:
        """Tell the solver what was counted."""
        counts = (self.n_fun, self.n_jac, self.n_factorizations, self.n_newton, self.n_newton)
        self.solver.work = StageWork(*(torch.tensor([x], dtype=torch.int64, device=self.device) for x in counts), log=self.solver.work.log)
        self.solver.stuck = torch.tensor([self.stuck], device=self.device)

    def _take(self, t: Tensor, y: Tensor) -> None:
        self._matrix = jacobian_at(self.solver.jacobian, self.solver.f, t.reshape(1), y.reshape(1, -1))
        self._c = math.nan
        self.n_jac += 1

    def _factor(self, c: float) -> Factorization:
        if c != self._c or self._factors is None:
            assert self._matrix is not None
            matrix = shifted(self._matrix, torch.tensor([[c]], dtype=self.solver.plan.real, device=self.device))
            linear, log = self.solver.linear_solver, self.solver.work.log
            self._factors = factor_one(linear, matrix, log, self._factors)
            self._c = c
            self.n_factorizations += 1
        return self._factors

    def correct(self, t: Tensor, predicted: Tensor, psi: Tensor, c: float) -> tuple[Tensor, Tensor, bool, int]:
        """The new state, its distance from the prediction, whether the iteration converged, and after how many rounds."""
        fresh = self._matrix is None
        if fresh:
            self._take(t, predicted)
        weight = 1 / (predicted.abs() * self.solver.rtol + self.solver.atol)
        y, d, failed, self.stuck, count = self._iterate(t, predicted, psi, c, weight)
        if failed and not fresh:
            self._take(t, predicted)
            y, d, failed, self.stuck, count = self._iterate(t, predicted, psi, c, weight)
        return y, d, not failed, count

    def _iterate(self, t: Tensor, predicted: Tensor, psi: Tensor, c: float, weight: Tensor) -> tuple[Tensor, Tensor, bool, bool, int]:
        """The new state, its distance from the prediction, whether the iteration failed, though all was finite, after how many rounds."""
        f, factors, rounds = self.solver.f, self._factor(c), self.n_newton

        def change(x: _Three, _: bool) -> tuple[Tensor, float]:
            # c F(t, y, (psi + d) / c) = psi + d - c f
            found = solved(factors, torch.sub(x[2], f(t, x[0]), alpha=c))
            self.n_fun += 1
            self.n_newton += 1
            return found, self.norm(found * weight)

        def moved(x: _Three, found: Tensor, on: bool) -> _Three:
            return (x[0] - found, x[1] - found, x[2] - found) if on else x

        start = (predicted, torch.zeros_like(predicted), psi)
        (y, d, _), failed, stalled = iterate(start, change, moved, True, BOUND, NEWTON, worst=1.0)
        return y, d, failed, stalled, self.n_newton - rounds


class _Trial:
    """See `Trial`: the table of differences behind the step, made when it is first asked for, and the stages."""

    __slots__ = ("_known", "_stages", "bad", "count", "d", "error", "h", "hopeless", "order", "passed", "scale", "size", "table", "y")

    def __init__(self, y: Tensor, d: Tensor, converged: bool, count: int, known: tuple[int, float, float], h: float) -> None:
        self.y, self.d, self.bad, self.count, self._known, self.order, self.h = y, d, not converged, count, known, known[0], h
        self.hopeless, self._stages = False, None

    @property
    def extra(self) -> Tensor:
        """See `Trial`."""
        return torch.tensor(self._known, dtype=torch.float64, device="cpu")

    def stages(self, who: Decision) -> Sequence[Tensor]:
        """(6, ...): the differences behind the state up to the order, and the correction, over ``h``."""
        if self._stages is None:
            out = self.table.new_zeros(MAX_ORDER + 1, *self.d.shape)
            out[: self.order] = self.table[1 : self.order + 1]
            out[MAX_ORDER] = self.d
            self._stages = (out / self.h).reshape(MAX_ORDER + 1, *self.y.shape).unbind()
        return self._stages

    def detach(self) -> None:
        """See `Trial.detach`: no solve is recorded."""


class LoneBdf:
    """A `Stepper`: what `BdfSolver` does for one ODE, with states in any shape."""

    rate = 0.0

    def __init__(self, solver: BdfSolver, plan: Plan, line: TimelineOfOne, y0: Tensor) -> None:
        self.f, self.plan, self._line, self.y = solver.f, plan, line, y0
        self._newton, self._formulas = _Newton(solver, y0.device), _Formulas(y0)
        self.scaled: Tensor | None = None
        self._n_fun = 1
        #: see `BdfSolver`
        self.order, self.equal, self.ratio, self.kept = 1, 0, 1.0, 1.0
        self.idle = torch.ones(3, dtype=torch.float64, device=y0.device)

    def begin(self) -> tuple[float, bool, bool]:
        """See `Stepper.begin`."""
        plan, line, flat, f = self.plan, self._line, (1, self.y.numel()), self.f
        y0 = self.y.reshape(flat)
        slope = f(line.anchors[0].to(plan.real), y0)
        if plan.first_step is None:
            step = float(initial_step(f, plan, line.anchors, y0, slope, torch.full_like(line.anchors[0], line.sign)))
            self._n_fun += 1
        else:
            step = plan.first_step
        step = min(max(step, plan.min_step), plan.max_step)
        # the table of differences, one row each
        self.D = y0.new_zeros(SIZE, y0.numel())
        self.D[0], self.D[1] = y0.reshape(-1), slope.reshape(-1) * (step * line.sign)
        self._size = self.y.abs()
        return step, True, False

    def _change(self, factor: float) -> None:
        """Bring the differences to another distance."""
        matrix = rescaling_alone(self.order, factor, SIZE)
        self.D = torch.mm(torch.from_numpy(matrix).to(self.D), self.D)
        self.ratio *= factor
        self.equal = 0

    def fit(self, step: float, h: float, running: bool) -> float:
        """See `Stepper.fit`."""
        size = abs(h)
        if size != step:
            self._change(size / step)
        return size

    def attempt(self, step: Attempt) -> _Trial:
        """See `Stepper.attempt`."""
        plan, formulas, order, shape, h = self.plan, self._formulas, self.order, self.y.shape, step.h
        when = torch.full((), step.end, dtype=plan.real, device=self.y.device)
        if step.before:
            when = shifted_times([when], [1.0], False, True, self._line.sign)[0]
        both, S, s = formulas[order]
        predicted, psi = (x.reshape(shape) for x in torch.mm(both, self.D).unbind())
        y, minus, converged, count = self._newton.correct(when, predicted, psi, h / formulas.alpha[order])
        trial = _Trial(y, minus.reshape(-1), converged, count, (order, self.ratio, self.kept), h)
        trial.size = y.abs()
        trial.scale = torch.maximum(trial.size, self._size)
        self.scaled = plan.scaled(trial.d.reshape(shape) * formulas.constants[order], trial.scale)
        trial.error = self._newton.norm(self.scaled)
        trial.passed = converged and trial.error <= 1.0
        if trial.passed:
            trial.table = torch.addr(torch.mm(S, self.D), s, trial.d)
        return trial

    def follow(self, step: Attempt, trial: _Trial, size: float, fate: Fate) -> float:
        """See `Stepper.follow`."""
        if fate.again:
            return size
        safety, factor = safety_after(trial.count), 1.0
        if not fate.accepted:
            factor = 0.5 if trial.bad else shrunk(trial.error, self.order, safety)
        else:
            self.y, self._size, self.D, self.ratio, self.kept = trial.y, trial.size, trial.table, 1.0, 1.0
            self.equal += 1
            if fate.landed and fate.going:
                # behind a discontinuity the differences say nothing
                self.D[2:], self.kept = 0.0, 0.0
                self.order, self.equal, factor = 1, 0, 0.1
            elif fate.going and self.equal > self.order:
                factor, self.order = self._next_order(trial, safety)
        if factor == 1.0:
            return size
        self._change(factor)
        return size * factor

    def _next_order(self, trial: _Trial, safety: float) -> tuple[float, int]:
        """See `BdfSolver`."""
        order, scale, norm = self.order, trial.scale, self._newton.norm

        def level(q: int) -> float:
            return norm(self.plan.scaled(self.D[q + 1].reshape(scale.shape) * self._formulas.constants[q], scale))

        norms = [level(order - 1) if order > 1 else math.inf, trial.error, level(order + 1) if order < MAX_ORDER else math.inf]
        factors = [max(x, 1e-30) ** (-1 / (order + i)) if x == x else math.nan for i, x in enumerate(norms)]
        best = int(np.argmax(factors))
        return changed(safety * factors[best], best == 1), order + best - 1

    def evaluations(self, attempts: int) -> int:
        """See `Stepper.evaluations`; those of the iteration are in the work of the solver."""
        self._newton.finish()
        return self._n_fun


def solve_bdf_alone(
    solver: BdfSolver, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor], shape: Sequence[int] | None
) -> Record:
    """Solve one ODE; arguments as for `integrate`."""
    line, start = TimelineOfOne(plan, anchors), y0 if shape is None else y0.reshape(tuple(shape))
    stepper = LoneBdf(solver, plan, line, start)
    return Walk(plan, line, t_eval, start, inputs, stepper.idle).solve(stepper)
