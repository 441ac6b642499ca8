"""Newton's iteration for the stages of implicit equations ``F(t, y, y') = 0``, for many trajectories in lock step; and the error of what a
step of a differential-algebraic equation hands out between its ends, from the defect of its dense output.

An embedded formula differs from the step's own in what is integrated. It says nothing about variables that a constraint fixes (both
formulas satisfy the constraint at the same points), nor about the polynomial between those points. The equations themselves do: the
residual that the polynomial leaves in them is turned into an error of the state by one linear solve with the factors of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg import LinearSolver
from ..linalg.pencil import Pencil, ScaledFactors, regular_size, scaled_factors, split
from ..methods import Method
from ..methods.collocation import CollocationTableau, Mode
from ..methods.family import weighted_sum
from ..system.jacobians import JacobianStrategy
from .clock import resolved
from .coupled import CoupledSystem, StagesOfMany, solve_coupled
from .plan import Plan
from .stages import SEARCHES
from .stepper import StageWork

__all__ = ["NARROW", "NEWTON", "NOISE", "Point", "ResidualSolver", "inner_error", "points_of", "power_of"]

Flat = Callable[[Tensor, Tensor], Tensor]

#: Newton steps in each round of the search for the slope at the start
NEWTON = 8


def power_of(index: Tensor | None, real: torch.dtype) -> Tensor | None:
    """``(n,)``: the powers of ``h`` by which variables of this index count less in norms; None where all count alike."""
    return None if index is None or not bool((index > 1).any()) else (index - 1).clamp(min=0).to(real)


class ResidualSolver(CoupledSystem):
    """`StageEquations` for ``F(t, y, y') = 0``, with the matrices ``E = F_y'`` and ``G = F_y`` at the start of each step.

    The iteration and its convergence test are those of `solve_coupled`. Equations are scaled by rows, so their units do not count.

    Parameters
    ----------
    f : flat residual on ``(B,)`` times and ``(B, 2 n)``: ``y`` and ``y'`` side by side
    jacobian : ``(r, x) -> Matrix`` for ``r`` from ``(B, 2 n)`` to ``(B, n)``
    index : (n,) int64 or None
        Index of every variable (0 differential). Those of index 2 count ``h`` times less in norms, those of index 3 ``h^2`` times
        (Hairer, Lubich & Roche 1989; Hairer & Wanner, Solving ordinary differential equations II, section VII.4).
    skipped : (n,) bool or None
        Variables that the error test leaves out.
    tolerance : float
        Of the iteration, relative to the tolerance of the step.
    """

    def __init__(
        self,
        f: Flat,
        plan: Plan,
        jacobian: JacobianStrategy,
        linear_solver: LinearSolver,
        rows: int,
        device: torch.device,
        index: Tensor | None = None,
        skipped: Tensor | None = None,
        tolerance: float = 1e-3,
    ) -> None:
        self.f, self.plan, self.jacobian, self.linear_solver, self.tolerance = f, plan, jacobian, linear_solver, tolerance
        self.work = StageWork.zero(rows, device)
        self.power = power_of(index, plan.real)
        self.skipped = skipped
        self._at: tuple[Tensor, Tensor, Tensor] | None = None
        self._begin = torch.empty(0)
        #: ``(B,)``: whether the iteration, and not ``f``, failed in the last attempt of each row
        self.stuck = torch.zeros(rows, dtype=torch.bool, device=device)
        self._pencil: Pencil | None = None
        self._fresh = False
        self._real: dict[float, tuple[Tensor, ScaledFactors]] = {}
        self._old: dict[complex, ScaledFactors] = {}

    def residual(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """``F(t, y, y')``."""
        return self.f(t, torch.cat([y, slope], -1))

    #: steps are tested between their ends
    constrained = True

    # ---- the start of a solve

    def start(self, stops: Tensor, sign: Tensor, y0: Tensor) -> tuple[Tensor, Tensor]:
        """The slope ``(B, n)`` at the start, and the size ``(B,)`` of the first step: half of the time in which the state would change by
        its tolerance, and not more than a thousandth of the span (Brenan, Campbell & Petzold 1996, section 5.2)."""
        span = (stops[-1] - stops[0]).abs()
        slope, speed = self.slope(stops[0], y0, sign, 1e-3 * span)
        step = resolved(torch.minimum(1e-3 * span, 0.5 / speed.clamp(min=1e-300).double()), stops[0])
        # no step of a state that is not finite succeeds: it begins with one that is given up soon
        return slope, torch.where(torch.isfinite(y0).all(-1), step, torch.finfo(torch.float64).tiny)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope at a state that satisfies the constraints."""
        width = torch.full_like(t, 1e-3, dtype=torch.float64) * t.abs().clamp(min=1.0)
        return self.slope(t, y, torch.ones_like(width), width)[0]

    def slope_at_start(self, stops: Tensor, sign: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """See `Equations.slope_at_start`."""
        slope, self._first = self.start(stops, sign, y)
        return slope, 0

    def first_step(self, stops: Tensor, sign: Tensor, y: Tensor) -> Tensor | None:
        """See `Equations.first_step`."""
        return self._first

    def slope_behind(self, jumped: Tensor, t: Tensor, y: Tensor, slope: Tensor, sign: Tensor, room: Tensor) -> Tensor:
        """See `Equations.slope_behind`: as at a start."""
        if not bool(jumped.any()):
            return slope
        return torch.where(jumped.unsqueeze(-1), self.slope(t, y, sign, 1e-3 * room, jumped)[0], slope)

    def slope(self, t: Tensor, y: Tensor, sign: Tensor, width: Tensor, wanted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The slope of an implicit Euler step so small that nothing changes by more than a hundredth of its tolerance. Algebraic variables
        have one too, which the equations themselves do not give. ``wanted`` (B,): the rows that are asked for; all by default."""
        plan = self.plan
        # rows that are through stay as they are, so that none depends on the others
        going = torch.ones_like(width, dtype=torch.bool) if wanted is None else wanted
        size = y.abs() * plan.rtol + plan.atol
        slope, speed = torch.zeros_like(y), torch.zeros_like(width, dtype=plan.real)
        for _ in range(SEARCHES):
            step = (sign * width).to(plan.real).unsqueeze(-1)
            end = t.to(plan.real) + step.squeeze(-1)
            moving = going
            for _ in range(NEWTON):
                pencil = self._take(end, y + step * slope, slope)
                factors = scaled_factors(self.linear_solver, pencil.at(step), self.work.log)
                change = factors.solve(self.residual(end, y + step * slope, slope))
                change = torch.where(torch.isfinite(change).all(-1, keepdim=True), change, 0.0)
                slope = torch.where(moving.unsqueeze(-1), slope - change, slope)
                for count in (self.work.n_fun, self.work.n_jac, self.work.n_factorizations, self.work.n_solves, self.work.n_newton):
                    count += moving
                moving = moving & ~(plan.norm(step * change / size) <= 1e-4)
                if not bool(moving.any()):
                    break
            found = plan.norm(self.weigh(slope, step, True) / size)
            # a state that is not finite says nothing of sizes
            speed = torch.where(going, torch.where(torch.isfinite(found), found, 0.0), speed)
            narrow = torch.minimum(width, 1e-2 / speed.clamp(min=1e-300).double())
            going = going & ~(narrow >= 0.5 * width)
            if not bool(going.any()):
                break
            width = torch.where(going, narrow, width)
        return slope, speed

    # ---- a step

    def begin(self, t: Tensor, y: Tensor) -> None:
        """A step is attempted from here."""
        self._begin = t

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `StageEquations.coupled`; ``k1`` is the slope at the start."""
        step = h if isinstance(h, Tensor) else torch.full((y.shape[0], 1), h, dtype=self.plan.real, device=y.device)
        now = (self._begin, y, k1)
        if self._at is None or not all(torch.equal(a, b) for a, b in zip(self._at, now, strict=True)):
            self._at = now
            self._pencil, self._fresh = self._take(*now), True
        self._real.clear()
        return solve_coupled(self, StagesOfMany(tableau), tableau, times, step, y, k1)

    def _take(self, t: Tensor, y: Tensor, slope: Tensor) -> Pencil:
        return split(self.jacobian(lambda pair: self.f(t, pair), torch.cat([y, slope], -1)))

    def mass(self, v: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        assert self._pencil is not None
        return self._pencil.mass(v)

    def mode_factors(self, mode: Mode, step: Tensor) -> ScaledFactors:
        """See `CoupledSystem`."""
        if mode.value.imag == 0:
            return self._factors(mode.value.real, step * mode.value.real, step)
        return self._factors(mode.value, step * mode.value, step)

    def with_slope(self, b: Tensor, hg: Tensor, k1: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        return b + self.mass(hg * k1)

    def filtered(self, hg: Tensor, b: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        self.work.n_solves += (hg != 0).squeeze(-1)
        for c, factors in self._real.values():
            if torch.equal(c, hg):
                return factors.solve(b)
        return self._factors(0.0, hg, hg).solve(b)

    def _factors(self, key: complex, c: Tensor, step: Tensor) -> ScaledFactors:
        assert self._pencil is not None
        running = step != 0
        # trajectories that are done have steps of size zero, at which the matrix is singular
        regular = torch.where(running, c, regular_size(torch.where(running, c.real, 0.0), self._pencil))
        factors = scaled_factors(self.linear_solver, self._pencil.at(regular), self.work.log, self._old.get(key))
        self._old[key] = factors
        if not c.is_complex():
            self._real[key.real] = (c, factors)
        self.work.n_factorizations += running.squeeze(-1)
        if self._fresh:
            self.work.n_jac += running.squeeze(-1)
            self._fresh = False
        return factors

    def mass_slope(self, y: Tensor, k1: Tensor) -> Tensor:
        """See `CoupledSystem`."""
        assert self._at is not None
        return self.mass(k1) - self.residual(self._at[0], y, k1)

    def note_failure(self, failed: Tensor, attempted: Tensor) -> None:
        """See `CoupledSystem`."""
        self.stuck = torch.where(attempted, failed, self.stuck)

    def weigh(self, x: Tensor, step: Tensor, error: bool) -> Tensor:
        """See `CoupledSystem`."""
        if self.power is not None:
            x = x * step.abs() ** self.power
        if error and self.skipped is not None:
            x = torch.where(self.skipped, 0.0, x)
        return x


#: where methods are looked at whose stages are no points of their dense output: their ends need not satisfy the constraints either
_PLACES = (1 / 3, 2 / 3, 1.0)
#: part of the span below which nothing is resolved: the error of such a step counts as the square of its size
NARROW = 1e-7
#: times the tolerance of the iteration: what is taken for noise in the defect of a constraint, and in its slope
NOISE = 10.0


class Point(NamedTuple):
    """A place in the step: weights of the dense output and of its slope; ``rate``: how much faster the error of the polynomial changes
    at the end of the step, for a step of size one, than it is large here."""

    theta: float
    values: list[float]
    slopes: list[float]
    rate: float


@lru_cache(maxsize=64)
def points_of(method: Method) -> tuple[Point, ...]:
    """Between the nodes of a collocation polynomial, where its error is largest; at thirds of the step and at its end else."""
    dense = method.tableau.dense  # type: ignore[attr-defined]
    collocated = method.nodes[1:] if method.collocates and method.nodes[-1] == 1.0 else None
    if collocated is None:
        places = [(theta, 1.0) for theta in _PLACES]
    else:
        # the error is that of interpolation at 0 and at the nodes
        zeros = (0.0, *collocated)
        end = math.prod(1.0 - c for c in zeros[:-1])
        middles = [(a + b) / 2 for a, b in pairwise(collocated)] or [collocated[0] / 2]
        places = [(theta, end / math.prod(theta - c for c in zeros)) for theta in middles]
    return tuple(
        Point(
            theta,
            [sum(w * theta ** (m + 1) for m, w in enumerate(row)) for row in dense],
            [sum((m + 1) * w * theta**m for m, w in enumerate(row)) for row in dense],
            rate,
        )
        for theta, rate in places
    )


def inner_error(
    f: CoupledSystem, plan: Plan, start: Callable[[float], Tensor], h: Tensor, span: Tensor, y: Tensor, size: Tensor, ks: Sequence[Tensor]
) -> Tensor:
    """The largest error within the step, ``(B, n)``, in units of the tolerance.

    A defect ``r = F(t, u, u')`` of the dense output is that of an error ``e`` with ``E e' + G e = r``. With ``e / (g h)`` for ``e'``, ``g``
    the coefficient of the method, its solution is ``(E + g h G)^-1 g h r``: exact for variables of index 1, whose error this is whatever
    the step, and bounded for stiff ones. It does not depend on the scale or the order of the equations. Variables of index 2 follow
    from the slope of the others: there ``e'`` is that of the error of a collocation polynomial with this value here, at the end of the
    step, where it is largest (Hairer & Wanner, Solving ordinary differential equations II, sections VI.3 and VII.4).

    A part of the defect is what the step before left in the state, and no smaller step makes that less. It was no larger than the
    tolerance there, and so ``size`` is the largest of both steps: by its own tolerance a variable that falls to zero would stop the solve.

    Parameters
    ----------
    start : the time ``(B,)`` at a fraction of the step
    h : (B, 1); span : (B,); y : (B, n) at the start; size : (B, n), of the state, in the step before too; ks : the stages
    """
    method = plan.method
    g = method.tableau.gamma  # type: ignore[attr-defined]
    stages, hg = ks[: method.n_stages], h * g
    # a step over a jump of an algebraic variable that nobody named: it shall be small, and no more can be asked
    narrow = (h.squeeze(-1).abs() / (NARROW * span).to(h.dtype).clamp(min=torch.finfo(h.dtype).tiny)).clamp(max=1.0) ** 2
    worst: Tensor | None = None
    for point in points_of(method):
        moved, slope = weighted_sum(point.values, stages), weighted_sum(point.slopes, stages)
        assert moved is not None and slope is not None
        defect = f.residual(start(point.theta), y + h * moved, slope)
        f.work.n_fun += f.running(h)
        error = f.filtered(hg, hg * defect)
        if f.power is not None:
            error = error + _of_index_two(f, plan, hg, (1.0 - g * point.rate), error, size)
        error = plan.scaled(error, size).abs()
        worst = error if worst is None else torch.maximum(worst, error)
    assert worst is not None
    worst = worst * narrow.unsqueeze(-1)
    return worst if f.skipped is None else torch.where(f.skipped, 0.0, worst)


def _of_index_two(f: CoupledSystem, plan: Plan, hg: Tensor, rest: float, error: Tensor, size: Tensor) -> Tensor:
    """What is to be added to the error of variables of index 2. Their slope is that of the defect of a constraint, divided by ``h``, and so
    is what the iteration leaves in it: tolerance and noise add up, and no smaller step is asked for than one that shows the defect."""
    assert f.power is not None
    high = f.power > 0
    left = f.tolerance * (size * plan.rtol + plan.atol)
    unclear = NOISE * torch.maximum(left, 10 * torch.finfo(size.dtype).eps * size)
    noise = plan.norm(plan.scaled(unclear, size))
    seen = plan.norm(torch.where(high, 0.0, plan.scaled(error, size)).abs()).clamp(min=torch.finfo(size.dtype).tiny)
    slope = f.filtered(hg, f.mass(torch.where(high, 0.0, error)))
    # what does not come by a slope is there where the others do not move at all; noise of their slopes is in it too
    still, moved = error + slope, (rest - 1.0) * slope
    besides = f.filtered(hg, f.mass(torch.where(high, 0.0, unclear))).abs()
    still = still * (still.abs() / (still.abs() + besides).clamp(min=torch.finfo(size.dtype).tiny)).square()
    share = 1.0 + (noise / seen).unsqueeze(-1) * plan.scaled(moved, size).abs()
    return torch.where(high, still + moved / share - error, 0.0)
