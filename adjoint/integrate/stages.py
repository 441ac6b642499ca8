"""Newton's iteration for the stages of implicit methods, for many trajectories in lock step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..linalg import Factorization, LinearOperator, LinearSolver, Matrix
from ..methods.tableaux_implicit import CollocationTableau, Mode
from .coupled import solve_coupled
from .guesses import StageGuess
from .matrices import complex_shifted, jacobian_at, mass_product, shifted, tangent
from .newton import iterate
from .numbers import less
from .plan import Plan
from .work import Equations, StageWork

__all__ = ["LOOSEST", "MOST", "SEARCHES", "TOLERANCE", "StageSolver", "tolerances_of_stages"]

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


class StageSolver(Equations):
    """A flat right-hand side with `implicit`: simplified Newton iterations with the Jacobian at the start of the step.

    The iteration ends when its error, estimated from the rate of convergence, is below ``tolerance`` in units of the error tolerance
    (Hairer & Wanner, Solving ordinary differential equations II, section IV.8). Rows that have converged do not move any more, so a
    trajectory does not depend on the others of its batch.

    Parameters
    ----------
    f : flat right-hand side on ``(B,)`` times and ``(B, n)`` states
    jacobian : ``(r, x) -> Matrix`` for a function ``r`` of ``(B, n)``
    tolerance : float
        Of the iteration, relative to the tolerance of the step.
    mass_matrix : (1 or B, n, n) or None
        That of ``M y' = f(t, y)``, for Rosenbrock methods.
    """

    #: see `Constrained`
    power = skipped = None

    def __init__(
        self,
        f: Flat,
        plan: Plan,
        jacobian: Callable[[Callable[[Tensor], Tensor], Tensor], Matrix],
        linear_solver: LinearSolver,
        rows: int,
        device: torch.device,
        tolerance: float = TOLERANCE,
        mass_matrix: Tensor | None = None,
    ) -> None:
        self.f, self.plan, self.jacobian, self.linear_solver, self.tolerance = f, plan, jacobian, linear_solver, tolerance
        self.rtol, self.atol = tolerances_of_stages(plan, tolerance)
        self.mass_matrix = mass_matrix
        self.work = StageWork.zero(rows, device)
        self._matrix: Matrix | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        self._factors: Factorization | None = None
        self._factored: Tensor | None = None
        self._fresh = False
        self._guess: StageGuess | None = None
        #: ``(B,)``: whether the iteration, and not ``f``, failed in the last attempt of each row
        self.stuck = torch.zeros(rows, dtype=torch.bool, device=device)
        self._failing = torch.zeros_like(self.stuck)
        #: of coupled stages, by the eigenvalue: kept for what the next factorisation can use of them
        self._complex: dict[complex, Factorization] = {}

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
        self._failing = torch.zeros_like(self.stuck)
        if self._at is not None and torch.equal(self._at[0], t) and torch.equal(self._at[1], y):
            return
        self._at, self._factored = (t, y), None
        self._matrix = jacobian_at(self.jacobian, self.f, t, y)
        self._fresh = True

    def _factors_for(self, hd: Tensor) -> Factorization:
        if self._factored is None or not torch.equal(self._factored, hd):
            assert self._matrix is not None
            matrix = shifted(self._matrix, hd, self.mass_matrix)
            again = self._factors is not None and not isinstance(matrix, LinearOperator)
            solver, log = self.linear_solver, self.work.log
            self._factors = solver.refactor(self._factors, matrix) if again and self._factors is not None else solver.factor(matrix, log)
            self._factored = hd
            # finished trajectories take part with steps of size zero: that is no work of theirs
            self._count((hd != 0).squeeze(-1))
        assert self._factors is not None
        return self._factors

    def _count(self, running: Tensor) -> None:
        """A factorisation, and the Jacobian if it is the first with it."""
        self.work.n_factorizations += running
        if self._fresh:
            self.work.n_jac += running
            self._fresh = False

    def guess(self, nodes: tuple[float, ...]) -> StageGuess | None:
        """See `CoupledSystem`. One stage has no polynomial; steps that are taken again must not depend on what was before."""
        if len(nodes) < 2 or self.plan.keep_grid:
            return None
        if self._guess is None:
            self._guess = StageGuess(nodes)
        return self._guess

    def note_failure(self, failed: Tensor, attempted: Tensor) -> None:
        """The iteration of these rows did not converge; see ``stuck``."""
        self._failing = self._failing | failed
        self.stuck = torch.where(attempted, self._failing, self.stuck)

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`."""
        step = hd if isinstance(hd, Tensor) else torch.full((b.shape[0], 1), hd, dtype=self.plan.real, device=b.device)
        self.work.n_solves += (step != 0).squeeze(-1)
        return self._factors_for(step).solve(b)

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """See `StageEquations.time_slope`."""
        return tangent(lambda s: self.f(s, y), t)

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `CoupledEquations.coupled`."""
        return solve_coupled(self, tableau, times, h, y, k1)

    def stage_residual(self, t: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """See `CoupledSystem`: ``K - f(t, Y)``."""
        return slope - self.f(t, value)

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
        return torch.where(torch.isfinite(first), first, 1e-6 * span)

    def mode_factors(self, mode: Mode, step: Tensor) -> Factorization:
        """See `CoupledSystem`: ``I - step l J``; factors of a real ``l`` serve the error estimate too."""
        if mode.value.imag == 0:
            return self._factors_for(step * mode.value.real)
        assert self._matrix is not None
        matrix = complex_shifted(self._matrix, step * mode.value)
        old = None if isinstance(matrix, LinearOperator) else self._complex.get(mode.value)
        factors = self.linear_solver.factor(matrix, self.work.log) if old is None else self.linear_solver.refactor(old, matrix)
        self._complex[mode.value] = factors
        self._count((step != 0).squeeze(-1))
        return factors

    def filtered(self, hg: Tensor, b: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        assert self._at is not None
        return self.solve(*self._at, hg, b)

    def mass_slope(self, y: Tensor, k1: Tensor) -> Tensor:
        """See `CoupledSystem`: ``f`` at the start of the step."""
        assert self._at is not None
        return self.f(self._at[0], y)

    @property
    def constrained(self) -> bool:
        """Whether there may be constraints, so that steps are tested between their ends; see `Constrained`."""
        return self.mass_matrix is not None

    def residual(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """See `Constrained`: ``M y' - f(t, y)``."""
        return self.mass(slope) - self.f(t, y)

    def count_residual(self, h: Tensor) -> None:
        """See `Constrained`."""
        self.work.n_fun += (h != 0).squeeze(-1)

    def weigh(self, x: Tensor, step: Tensor, error: bool) -> Tensor:
        """See `CoupledSystem`: all components alike."""
        return x

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """See `StageEquations.implicit`."""
        plan = self.plan
        step = hd if isinstance(hd, Tensor) else torch.full((base.shape[0], 1), hd, dtype=plan.real, device=base.device)
        factors = self._factors_for(step)
        size = base.abs() * self.rtol + self.atol
        running = (step != 0).squeeze(-1)
        # rows of finished trajectories take part with steps of size zero: their slope is asked for all the same
        done = ~running
        still = self.f(t, base) if bool(done.any()) else guess
        self.work.n_fun += done

        def change(k: Tensor, running: Tensor) -> tuple[Tensor, Tensor]:
            residual = k - self.f(t, base + step * k)
            # (I - hd J) dk = -(k - f): in terms of the slopes the iteration is the same, and hd = 0 is no special case
            found = factors.solve(torch.where(running.unsqueeze(-1), residual, 0.0))
            self.work.n_fun += running
            self.work.n_newton += running
            self.work.n_solves += running
            return found, plan.norm(step * found / size)

        k, failed, stalled = iterate(guess, change, less, running, self.tolerance, MOST, early=plan.method.adaptive)
        self.note_failure(stalled, running)
        k = torch.where(done.unsqueeze(-1), still, k)
        return torch.where(failed.unsqueeze(-1), float("nan"), k)
