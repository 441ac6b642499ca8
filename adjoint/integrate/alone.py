"""Newton's iteration for the stages of implicit methods, for one trajectory: as `stages` and `coupled`, but decisions are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..jacobians import dense_with_time, jvp
from ..linalg import Factorization, LinearOperator, LinearSolver, Log, Matrix
from ..methods.runge_kutta import weighted_sum
from ..methods.tableaux_implicit import CollocationTableau, Mode
from .coupled import MOST as MOST_COUPLED
from .coupled import MOST_CONSTANT, combined, complex_shifted, solve_modes
from .guesses import LoneGuess
from .plan import Plan, rms_norm
from .stages import LOOSEST, MOST, StageWork, _between, jacobian_at, shifted

__all__ = ["LoneStages", "row_norm"]

Flat = Callable[[Tensor, Tensor], Tensor]


def row_norm(plan: Plan) -> Callable[[Tensor], float]:
    """The norm of the plan for one state of any shape, as a number."""
    if plan.norm is rms_norm:
        norm = torch.linalg.vector_norm
        return lambda x: norm(x).item() * max(x.numel(), 1) ** -0.5
    return lambda x: float(plan.norm(x.reshape(1, -1)))


class LoneStages:
    """`StageEquations` and `CoupledEquations` for one trajectory: the iterations of `StageSolver`, in the same order.

    States have the shape ``(n,)`` or ``(1, n)`` in which the loop carries them, and sizes of steps are floats. Arguments as for
    `StageSolver`.
    """

    def __init__(
        self,
        f: Flat,
        plan: Plan,
        jacobian: Callable[[Callable[[Tensor], Tensor], Tensor], Matrix],
        linear_solver: LinearSolver,
        device: torch.device,
        tolerance: float = 1e-3,
    ) -> None:
        self.f, self.plan, self.jacobian, self.linear_solver, self.tolerance = f, plan, jacobian, linear_solver, tolerance
        smallest = 4 * torch.finfo(plan.real).eps / tolerance
        self.rtol, self.atol = _between(plan.rtol, smallest, LOOSEST[0]), _between(plan.atol, 0.0, LOOSEST[1])
        self.device, self.log, self.norm = device, Log(), row_norm(plan)
        self.n_fun = self.n_jac = self.n_factorizations = self.n_solves = self.n_newton = 0
        #: methods that weigh ``f_t`` get it with the Jacobian, where that is not the user's own
        self._timed = getattr(plan.method, "needs_time_slope", False)
        self._matrix: Matrix | None = None
        self._slope: Tensor | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        self._factors: dict[complex, tuple[float, Factorization]] = {}
        self._guess: LoneGuess | None = None
        self._stuck = False

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``."""
        return self.f(t, y)

    @property
    def work(self) -> StageWork:
        """What was counted, as tensors ``(1,)``."""
        counts = (self.n_fun, self.n_jac, self.n_factorizations, self.n_solves, self.n_newton)
        return StageWork(*(torch.tensor([x], dtype=torch.int64, device=self.device) for x in counts), log=self.log)

    @property
    def stuck(self) -> Tensor:
        """``(1,)``: whether the iteration, and not ``f``, failed in the last attempt."""
        return torch.tensor([self._stuck], device=self.device)

    @property
    def matrix(self) -> Matrix:
        """The Jacobian at the start of the step."""
        assert self._matrix is not None
        return self._matrix

    def begin(self, t: Tensor, y: Tensor) -> None:
        """A step is attempted from here: the Jacobian is taken anew, unless the attempt before began at the same place."""
        self._stuck = False
        at = self._at
        if at is not None and at[1] is y and torch.equal(at[0], t):
            return
        self._at, self._slope = (t, y), None
        time, state = t.reshape(1), y.reshape(1, -1)
        found = dense_with_time(self.f, time, state) if self._timed and self._dense(state) else None
        if found is not None:
            self._matrix, slope = found
            self._slope = slope.reshape(y.shape)
        else:
            self._matrix = jacobian_at(self.jacobian, self.f, time, state)
        self._refresh()

    def _dense(self, state: Tensor) -> bool:
        plain = getattr(self.jacobian, "takes_dense", None)
        return plain is not None and plain(state)

    def _refresh(self) -> None:
        # what of the old factors is of use in a factorisation stays
        self._factors = {key: (math.nan, factors) for key, (_, factors) in self._factors.items()}
        self.n_jac += 1

    def _factors_for(self, value: complex, h: float) -> Factorization:
        """Of ``I - h value J``."""
        old = self._factors.get(value)
        if old is not None and old[0] == h:
            return old[1]
        assert self._matrix is not None
        if value.imag == 0:
            hd = torch.tensor([[h * value.real]], dtype=self.plan.real, device=self.device)
            matrix = shifted(self._matrix, hd)
        else:
            step = torch.tensor([[h]], dtype=self.plan.real, device=self.device)
            matrix = complex_shifted(self._matrix, step * value)
        again = None if old is None or isinstance(matrix, LinearOperator) else old[1]
        factors = self.linear_solver.factor(matrix, self.log) if again is None else self.linear_solver.refactor(again, matrix)
        self._factors[value] = (h, factors)
        self.n_factorizations += 1
        return factors

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`."""
        self.n_solves += 1
        return self._factors_for(1.0, float(hd)).solve(b.reshape(1, -1)).reshape(b.shape)

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """See `StageEquations.time_slope`."""
        if self._slope is not None:
            # the loop counts an evaluation for it, which there was none of
            self.n_fun -= 1
        else:
            self._slope = jvp(lambda s: self.f(s, y).reshape(1, -1), t.reshape(1), torch.ones_like(t).reshape(1), False).reshape(y.shape)
        return self._slope

    def mass(self, v: Tensor) -> Tensor:
        """See `StageEquations.mass`: there is no matrix in front of the slopes here."""
        return v

    def _accept(self, iteration: int, length: float, rate: float, bound: float) -> bool:
        """Whether the error after this iteration, by the geometric series, is small enough."""
        left = rate / max(1 - rate, 1e-3) * length if iteration else length
        return left <= bound and (iteration == 0 or rate < 1)

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """See `StageEquations.implicit`."""
        f, step = self.f, float(hd)
        factors = self._factors_for(1.0, step)
        weight = abs(step) / (base.abs() * self.rtol + self.atol)
        k, before, rate = guess, math.nan, 1.0
        for iteration in range(MOST):
            residual = k - f(t, torch.add(base, k, alpha=step))
            # (I - hd J) dk = -(k - f): in terms of the slopes
            change = factors.solve(residual.reshape(1, -1)).reshape(k.shape)
            self.n_fun += 1
            self.n_newton += 1
            self.n_solves += 1
            length = self.norm(change * weight)
            if iteration:
                rate = length / before if before else math.inf
            finite = math.isfinite(length)
            if not finite or (iteration and rate >= 2.0):
                self._stuck = self._stuck or finite
                return torch.full_like(k, math.nan)
            k = k - change
            if length == 0 or self._accept(iteration, length, rate, self.tolerance):
                return k
            before = length
        self._stuck = True
        return torch.full_like(k, math.nan)

    # ---- coupled stages

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `solve_coupled`."""
        plan, f, size = self.plan, self.f, float(h)
        ks = self._guesses(tuple(tableau.c), size, y, k1)
        systems = [(mode, self._mode_factors(mode, size)) for mode in tableau.distinct(y.is_complex())]
        magnitude = y.abs()
        bound = torch.maximum(self.tolerance * (magnitude * plan.rtol + plan.atol), 10 * torch.finfo(plan.real).eps * magnitude)
        weight = abs(size) / bound
        before, rate = math.nan, 1.0
        failed = True
        for iteration in range(MOST_COUPLED if tableau.error is not None else MOST_CONSTANT):
            residuals = [
                k - f(t, torch.add(y, combined(row, ks), alpha=size)) for k, t, row in zip(ks, times, tableau.a, strict=True)
            ]
            changes = [c.reshape(y.shape) for c in solve_modes(systems, [r.reshape(1, -1) for r in residuals])]
            self.n_fun += len(ks)
            self.n_newton += 1
            self.n_solves += len(systems)
            length = max(map(self.norm, [combined(row, changes) * weight for row in tableau.a]))
            if iteration:
                rate = length / before if before else math.inf
            finite = math.isfinite(length)
            if not finite or (iteration and rate >= 2.0):
                self._stuck = finite
                break
            ks = [k - change for k, change in zip(ks, changes, strict=True)]
            if length == 0 or self._accept(iteration, length, rate, 1.0):
                failed = False
                break
            before = length
        else:
            self._stuck = True
        if failed:
            ks = [torch.full_like(y, math.nan)] * len(ks)
        if self._guess is not None:
            self._guess.keep(size, y, ks)
        return ks, None if tableau.error is None else self._estimate(tableau, size, y, k1, ks, failed)

    def _guesses(self, nodes: tuple[float, ...], h: float, y: Tensor, k1: Tensor) -> list[Tensor]:
        """One stage has no polynomial; steps that are taken again must not depend on what was before."""
        if len(nodes) < 2 or self.plan.keep_grid:
            return [k1] * len(nodes)
        if self._guess is None:
            self._guess = LoneGuess(nodes)
        return self._guess(h, y, k1)

    def _mode_factors(self, mode: Mode, h: float) -> Factorization:
        return self._factors_for(mode.value.real if mode.value.imag == 0 else mode.value, h)

    def _estimate(
        self, tableau: CollocationTableau, h: float, y: Tensor, k1: Tensor, ks: Sequence[Tensor], failed: bool
    ) -> Tensor:
        """See `coupled._estimate`."""
        assert tableau.error is not None and tableau.gamma is not None and self._at is not None
        if failed:
            return ks[0]
        plan, hg = self.plan, h * tableau.gamma
        from_stages = combined(tableau.error, ks) * h
        estimate = self._filtered(tableau.gamma, h, torch.add(from_stages, k1, alpha=hg))
        size = torch.maximum(y.abs(), torch.add(y, combined(tableau.b, ks), alpha=h).abs())
        if self.norm(plan.scaled(estimate, size)) > 1.0:
            self.n_fun += 1
            again = self.f(self._at[0], y + estimate)
            estimate = self._filtered(tableau.gamma, h, torch.add(from_stages, again, alpha=hg))
        return estimate

    def _filtered(self, gamma: float, h: float, b: Tensor) -> Tensor:
        self.n_solves += 1
        return self._factors_for(gamma, h).solve(b.reshape(1, -1)).reshape(b.shape)
