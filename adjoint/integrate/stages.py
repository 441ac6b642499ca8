"""Newton's iteration for the stages of implicit methods: of one trajectory by numbers, of many in lock step by masks;
of both parts of the right-hand side of implicit-explicit ones, of which one is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linalg import Factorization, LinearSolver, Matrix
from ..linalg.dense import SmallFactors, as_numpy, factor_again, factor_one, solved, unwarned
from ..methods.collocation import CollocationTableau, Mode
from ..methods.tableaux_rosenbrock import RosenbrockTableau
from ..system.jacobians import JacobianStrategy, dense_with_time, jvp
from ..system.stage_jacobian import StageJacobian
from .clock import resolved
from .coupled import CoupledSystem, StagesOfMany, StagesOfOne, solve_coupled
from .newton import complex_shifted, iterate, jacobian_at, mass_product, shifted, tangent
from .numbers import Decision, Measure, along, any_of, choose, choose_states, less, lost, negated, same
from .plan import Plan, row_norm
from .stepper import StageWork

__all__ = ["LOOSEST", "MOST", "SEARCHES", "TOLERANCE", "AdditiveStageSolver", "StageSolver", "tolerances_of_stages"]

Flat = Callable[[Tensor, Tensor], Tensor]

#: of the iteration, in units of the tolerances of the steps
TOLERANCE = 1e-3
#: iterations before a stage counts as failed; the convergence test ends most of them after two to four
MOST = 10
#: the loosest rtol and atol by which iterations are measured
LOOSEST = (1e-5, 1e-8)
#: rounds of the search for the first step
SEARCHES = 6


def tolerances_of_stages(plan: Plan, tolerance: float) -> tuple[float | Tensor, float | Tensor]:
    """``rtol`` and ``atol`` of the iteration for stages, which ends at ``tolerance`` times them.

    However loose those of the steps are, stages are roots: their derivatives are those of roots. No tighter than rounding allows.
    """
    smallest = 4 * torch.finfo(plan.real).eps / tolerance
    return _between(plan.rtol, smallest, LOOSEST[0]), _between(plan.atol, 0.0, LOOSEST[1])


def _between(value: float | Tensor, low: float, high: float) -> float | Tensor:
    """Clamped; the lower end wins."""
    if isinstance(value, Tensor):
        return value.clamp(max=high).clamp(min=low)
    return max(min(value, high), low)


class StageSolver(CoupledSystem):
    """A flat right-hand side with `implicit` and `coupled`: simplified Newton iterations with the Jacobian at the start of the step.

    The iteration ends when its error, estimated from the rate of convergence, is below ``tolerance`` in units of the error tolerance
    (Hairer & Wanner, Solving ordinary differential equations II, section IV.8). Rows that have converged do not move any more, so a
    trajectory does not depend on the others of its batch.

    Many trajectories have states ``(B, n)`` and sizes of steps ``(B, 1)``. One alone has its state in the shape ``(n,)`` or ``(1, n)`` in
    which the loop carries it; the size of its step is a float, and a small matrix goes to LAPACK itself.

    Parameters
    ----------
    f : flat right-hand side on ``(B,)`` times and ``(B, n)`` states
    jacobian : ``(r, x) -> Matrix`` for a function ``r`` of ``(B, n)``
    rows : how many trajectories; None for one alone
    tolerance : float
        Of the iteration, relative to the tolerance of the step.
    mass_matrix : (1 or B, n, n) or None
        That of ``M y' = f(t, y)``, for Rosenbrock methods of many trajectories.
    """

    def __init__(
        self,
        f: Flat,
        plan: Plan,
        jacobian: JacobianStrategy,
        linear_solver: LinearSolver,
        rows: int | None,
        device: torch.device,
        tolerance: float = TOLERANCE,
        mass_matrix: Tensor | None = None,
    ) -> None:
        self.f, self.plan, self.jacobian, self.linear_solver, self.tolerance = f, plan, jacobian, linear_solver, tolerance
        self.rtol, self.atol = tolerances_of_stages(plan, tolerance)
        self.mass_matrix, self.device, self.alone = mass_matrix, device, rows is None
        self.norm = row_norm(plan) if self.alone else plan.norm
        self.work = StageWork.zero(rows, device)
        self._matrix: Matrix | None = None
        #: its entries, where it is a small dense one
        self._entries: np.ndarray | None = None
        #: of one trajectory and methods that weigh it: ``f_t``, which comes with the Jacobian where that is not the user's own
        self._slope: Tensor | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        #: by the eigenvalue, 1 for all real ones: the step, None when the matrix is another by now, and what the next factors can use
        self._factors: dict[complex, tuple[Measure | None, Factorization]] = {}
        self._fresh = False
        self._layout: StagesOfOne | StagesOfMany | None = None
        self._rows: tuple[list[np.ndarray], list[np.ndarray], np.ndarray] | None = None
        #: whether the iteration, and not ``f``, failed in the last attempt of each row
        self.stuck: Decision = False if rows is None else torch.zeros(rows, dtype=torch.bool, device=device)
        self._sound = self._failing = self.stuck

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``; what is asked for at the start of a step is also where the Jacobian will be taken."""
        return self.f(t, y)

    @property
    def matrix(self) -> Matrix:
        """The Jacobian at the start of the step."""
        assert self._matrix is not None
        return self._matrix

    def begin(self, t: Tensor, y: Tensor) -> None:
        """A step is attempted from here: the Jacobian is taken anew, unless the attempt before began at the same place."""
        self._failing = self._sound
        at = self._at
        # of one trajectory that was not taken again the state is another object
        if at is not None and (at[1] is y if self.alone else torch.equal(at[1], y)) and torch.equal(at[0], t):
            return
        self._at, self._entries, self._slope = (t, y), None, None
        time, state, found = (t.reshape(1), y.reshape(1, -1), None) if self.alone else (t, y, None)
        if self.alone and self.plan.method.needs_time_slope:
            takes = isinstance(self.jacobian, StageJacobian) and self.jacobian.takes_dense(state)
            found = dense_with_time(self.f, time, state) if takes else None
        if found is not None:
            self._matrix, slope = found
            self._slope = slope.reshape(y.shape)
        else:
            self._matrix = jacobian_at(self.jacobian, self.f, time, state)
        self._factors = {key: (None, factors) for key, (_, factors) in self._factors.items()}
        self._fresh = True

    def _step(self, h: float | Tensor, like: Tensor) -> Measure:
        """Sizes of steps as they are compared here: a float, or ``(B, 1)``."""
        if self.alone:
            return float(h)
        return h if isinstance(h, Tensor) else torch.full((like.shape[0], 1), h, dtype=self.plan.real, device=like.device)

    def _factors_for(self, step: Measure, value: complex = 1.0) -> Factorization:
        """Of ``I - step value J`` (``M`` in the place of ``I``), for real steps of the value 1 and for complex values."""
        before, old = self._factors.get(value, (None, None))
        if old is not None and before is not None and same(before, step):
            return old
        matrix, log = self._matrix, self.work.log
        assert matrix is not None
        if isinstance(old, SmallFactors) and isinstance(matrix, Tensor):
            # the same solver would come to the same
            if self._entries is None:
                self._entries = as_numpy(matrix[0])
            with np.errstate(all="ignore"):
                shifted_entries = np.eye(old.n, dtype=self._entries.dtype) - step * value * self._entries
            factors: Factorization = SmallFactors(shifted_entries, old.dtype, log)
        else:
            size = torch.tensor([[step]], dtype=self.plan.real, device=self.device) if self.alone else step
            matrix = shifted(matrix, size, self.mass_matrix) if value == 1.0 else complex_shifted(matrix, size * value)
            factors = (factor_one if self.alone else factor_again)(self.linear_solver, matrix, log, old)
        self._factors[value] = step, factors
        running = self.running(step)
        self.work.n_factorizations += running
        if self._fresh:
            # the Jacobian counts with its first factors
            self.work.n_jac += running
            self._fresh = False
        return factors

    def note_failure(self, failed: Decision, attempted: Decision) -> None:
        """The iteration of these rows did not converge; see ``stuck``."""
        self._failing = self._failing | failed
        self.stuck = choose(attempted, self._failing, self.stuck)

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`."""
        step = self._step(hd, b)
        self.work.n_solves += self.running(step)
        return solved(self._factors_for(step), b)

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """See `StageEquations.time_slope`."""
        if not self.alone:
            return tangent(lambda s: self.f(s, y), t)
        if self._slope is None:
            self._slope = jvp(lambda s: self.f(s, y).reshape(1, -1), t.reshape(1), torch.ones_like(t).reshape(1), False).reshape(y.shape)
        return self._slope

    def mass(self, v: Tensor) -> Tensor:
        """See `StageEquations` and `CoupledSystem`."""
        return mass_product(self.mass_matrix, v)

    def first_step(self, stops: Tensor, sign: Tensor, y: Tensor) -> Tensor | None:
        """Size ``(B,)`` of the first step of ``M y' = f`` (in which ``f`` is no slope), by the rule of `ResidualSolver.start`.

        The slope is that of a linearly implicit Euler step in which nothing changes by more than a hundredth of its tolerance.
        """
        if self.mass_matrix is None:
            return None
        plan, t0 = self.plan, stops[0].to(self.plan.real)
        span = (stops[-1] - stops[0]).abs()
        size = y.abs() * plan.rtol + plan.atol
        width = speed = 1e-3 * span
        # rows that are through stay as they are, so that none depends on the others
        going = torch.ones_like(span, dtype=torch.bool)
        for _ in range(SEARCHES):
            step = torch.where(going, sign * width, 0.0).to(plan.real).unsqueeze(-1)
            self.begin(t0, y)
            slope = self.solve(t0, y, step, self.f(t0 + step.squeeze(-1), y))
            self.work.n_fun += going
            speed = torch.where(going, plan.norm(slope / size).double(), speed)
            wanted = torch.minimum(width, 1e-2 / speed.clamp(min=1e-300))
            going = going & (wanted < 0.5 * width)
            if not bool(going.any()):
                break
            width = torch.where(going & torch.isfinite(wanted), wanted, width)
        first = torch.minimum(1e-3 * span, 0.5 / speed.clamp(min=1e-300))
        return resolved(torch.where(torch.isfinite(first), first, 1e-6 * span), stops[0])

    @property
    def constrained(self) -> bool:
        """Whether there may be constraints, so that steps are tested between their ends."""
        return self.mass_matrix is not None

    def residual(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """See `CoupledSystem`: ``M y' - f(t, y)``."""
        return self.mass(slope) - self.f(t, y)

    # ---- stages one after the other

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """See `StageEquations.implicit`."""
        f, work, step = self.f, self.work, self._step(hd, base)
        factors = self._factors_for(step)
        weight = abs(step) / (base.abs() * self.rtol + self.atol)
        running = self.running(step)
        # rows of finished trajectories take part with steps of size zero: their slope is asked for all the same
        done = negated(running)
        still = f(t, base) if any_of(done) else guess
        before = work.n_newton

        def change(k: Tensor, running: Decision) -> tuple[Tensor, Measure]:
            # (I - hd J) dk = -(k - f): in terms of the slopes the iteration is the same, and hd = 0 is no special case
            found = solved(factors, choose_states(running, k - f(t, along(base, k, step)), 0.0))
            work.n_newton = work.n_newton + running
            return found, self.norm(found * weight)

        k, failed, stalled = iterate(guess, change, less, running, self.tolerance, MOST, early=self.plan.method.adaptive)
        rounds = work.n_newton - before
        work.n_fun += rounds
        work.n_solves += rounds
        self.note_failure(stalled, running)
        return lost(failed, choose_states(done, still, k))

    def linear_stages(
        self, tableau: RosenbrockTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, slope: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """See `StageEquations.linear_stages`: of one trajectory, where its matrix is a small dense one."""
        if not self.alone:
            return None
        size = float(h)
        factors = self._factors_for(size * tableau.gamma)
        if not isinstance(factors, SmallFactors):
            return None
        if self._rows is None:
            self._rows = [np.array(row) for row in tableau.a], [np.array(row) for row in tableau.coupling], np.array(tableau.b)
        self.work.n_solves += len(tableau.b)
        return _small_linear_stages(self.f, factors, tableau, self._rows, times, size, y, k1, slope)

    # ---- coupled stages

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `StageEquations.coupled`."""
        if self._layout is None:
            self._layout = StagesOfOne(tableau, y, self.norm, self.plan) if self.alone else StagesOfMany(tableau)
        return solve_coupled(self, self._layout, tableau, times, self._step(h, y), y, k1)

    def mode_factors(self, mode: Mode, step: Measure) -> Factorization:
        """See `CoupledSystem`: ``I - step l J``; factors of a real ``l`` serve the error estimate too."""
        return self._factors_for(step, mode.value) if mode.value.imag else self._factors_for(step * mode.value.real)

    def filtered(self, hg: Measure, b: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        assert self._at is not None
        return self.solve(*self._at, hg, b)

    def with_slope(self, b: Tensor, hg: Measure, k1: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        return along(b, k1, hg)

    def mass_slope(self, y: Tensor, k1: Tensor) -> Tensor:
        """See `CoupledSystem`: ``f`` at the start of the step."""
        assert self._at is not None
        return self.f(self._at[0], y)


class AdditiveStageSolver(StageSolver):
    """See `StageEquations`; a `StageSolver` of the implicit part.

    ``explicit``: the flat explicit part; the other arguments are those of `StageSolver` for the implicit part.
    """

    def __init__(self, explicit: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit = explicit
        # the start of a step is evaluated by the loop first, as the end of the step before
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The sum of both parts."""
        parts = self.explicit(t, y), self.f(t, y)
        # two: a rejected step goes back to its start
        self._seen = [*self._seen[-1:], (t, y, *parts)]
        return parts[0] + parts[1]

    def both(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `StageEquations.both`."""
        for time, state, explicit, implicit in self._seen:
            if torch.equal(time, t) and torch.equal(state, y):
                self._seen = [(time, state, explicit, implicit)]
                return explicit, implicit
        parts = self.explicit(t, y), self.f(t, y)
        self._seen = [(t, y, *parts)]
        self.work.n_fun += 1
        return parts


@unwarned
def _small_linear_stages(
    f: Callable[[Tensor, Tensor], Tensor],
    factors: SmallFactors,
    tableau: RosenbrockTableau,
    rows: tuple[list[np.ndarray], list[np.ndarray], np.ndarray],
    times: Sequence[Tensor],
    size: float,
    y: Tensor,
    k1: Tensor,
    slope: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The step of `Rosenbrock.step` by NumPy and LAPACK; ``rows``: those of the tableau as arrays."""
    a, coupling, b = rows
    start, first, moving = as_numpy(y.reshape(-1)), as_numpy(k1.reshape(-1)), as_numpy(slope.reshape(-1)) * size
    ks = np.empty((len(b), len(start)), dtype=start.dtype)
    values = []
    for i, first_use in enumerate(tableau.same_as):
        if i == 0:
            value = first
        elif first_use < i:
            value = values[first_use]
        else:
            point = start + (a[i][:i] @ ks[:i]) * size
            value = as_numpy(f(times[i], torch.from_numpy(point.astype(start.dtype, copy=False)).reshape(y.shape)).reshape(-1))
        values.append(value)
        side = value + coupling[i][:i] @ ks[:i] if i else value
        if tableau.d[i]:
            side = side + moving * tableau.d[i]
        ks[i] = factors.solve_one((side * tableau.gamma).astype(start.dtype, copy=False))
    end = (start + (b @ ks) * size).astype(start.dtype, copy=False)
    return torch.from_numpy(end).reshape(y.shape), list(torch.from_numpy(ks).reshape(-1, *y.shape).unbind())
