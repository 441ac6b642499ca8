"""Newton's iteration for all stages of a fully implicit method at once, and the error estimate of its step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..linalg.dense import SmallFactors, as_numpy, unwarned
from ..methods.collocation import CollocationTableau, Mode
from ..methods.family import weighted_sum
from .newton import LoneGuess, StageGuess, iterate
from .numbers import Decision, Measure, along, any_of, choose_states, less, lost, negated
from .plan import Plan, rms_norm
from .stepper import Equations, StageWork

__all__ = ["CoupledSystem", "StagesOfMany", "StagesOfOne", "combined", "solve_coupled", "solve_modes"]

#: iterations before a step counts as failed: one that can be repeated with a smaller size is given up early
MOST, MOST_CONSTANT = 10, 50


class CoupledSystem(Equations, ABC):
    """The equations of implicit stages, ``F(t, Y, K) = 0`` for the slope ``K`` at the value ``Y``: for an ODE ``K - f(t, Y)``.

    With ``E = F_y'`` and ``G = F_y`` at the start of the step.
    """

    f: Any
    plan: Plan
    work: StageWork
    tolerance: float
    #: whether there is one trajectory, whose sizes of steps are numbers
    alone: bool = False
    #: of every variable, the powers of ``h`` by which it counts less in the iteration; None: of none
    power: Tensor | None = None
    #: (n,) flags of variables that the error test leaves out, or None
    skipped: Tensor | None = None
    _guess: StageGuess | LoneGuess | None = None

    def norm(self, x: Tensor) -> Measure:
        """Of errors ``(B, n)``."""
        return self.plan.norm(x)

    def running(self, step: Measure) -> Decision:
        """Who takes part: finished trajectories have steps of size zero, and what is done for them is no work of theirs."""
        return True if self.alone else (step != 0).squeeze(-1)

    def guess(self, nodes: tuple[float, ...]) -> StageGuess | LoneGuess | None:
        """Where the iteration starts from; None: from the slope at the start of the step.

        One stage has no polynomial; steps that are taken again must not depend on what was before.
        """
        if len(nodes) < 2 or self.plan.keep_grid:
            return None
        if self._guess is None:
            self._guess = LoneGuess(nodes) if self.alone else StageGuess(nodes)
        return self._guess

    @abstractmethod
    def residual(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """``F(t, y, y')``."""

    @abstractmethod
    def mass(self, v: Tensor) -> Tensor:
        """``E v``."""

    @abstractmethod
    def mode_factors(self, mode: Mode, step: Measure) -> Any:
        """Factors, which `solve`, of ``E + step l G`` for the eigenvalue ``l`` of the mode."""

    @abstractmethod
    def with_slope(self, b: Tensor, hg: Measure, k1: Tensor) -> Tensor:
        """``b + hg E k1``."""

    @abstractmethod
    def filtered(self, hg: Measure, b: Tensor) -> Tensor:
        """``(E + hg G)^-1 b``."""

    @abstractmethod
    def mass_slope(self, y: Tensor, k1: Tensor) -> Tensor:
        """``E y'`` at the state ``y`` at the start of the step, near which the slope is ``k1``."""

    @abstractmethod
    def note_failure(self, failed: Decision, attempted: Decision) -> None:
        """The iteration of these rows, of those that were attempted, did not converge."""

    def weigh(self, x: Tensor, step: Measure, error: bool) -> Tensor:
        """Changes (or, with ``error``, errors) of the state, as the norms shall see them."""
        return x


class StagesOfMany:
    """Slopes of the stages of many trajectories, ``(B, n)`` each."""

    def __init__(self, tableau: CollocationTableau) -> None:
        self._tableau = tableau

    def begin(self, k1: Tensor, guessed: Sequence[Tensor] | None, running: Tensor) -> list[Tensor]:
        """Slopes to begin with; those of finished trajectories are all f(t, y), which is known."""
        return [k1] * len(self._tableau.a) if guessed is None else [choose_states(running, k, k1) for k in guessed]

    def points(self, y: Tensor, step: Tensor, ks: list[Tensor]) -> list[Tensor]:
        """The values of the stages."""
        return [y + step * combined(row, ks) for row in self._tableau.a]

    def residuals(self, solver: CoupledSystem, times: Sequence[Tensor], points: list[Tensor], ks: list[Tensor], on: Tensor) -> list[Tensor]:
        """What is left of the equations of those who are still ``on``."""
        return [choose_states(on, solver.residual(t, x, k), 0.0) for t, x, k in zip(times, points, ks, strict=True)]

    def solve(self, systems: Sequence[tuple[Mode, Any]], residuals: list[Tensor]) -> list[Tensor]:
        """See `solve_modes`."""
        return solve_modes(systems, residuals)

    def length(self, solver: CoupledSystem, step: Tensor, found: list[Tensor], bound: Tensor) -> Tensor:
        """The largest change of a value, in units of the bound."""
        lengths = [solver.norm(solver.weigh(step * combined(row, found), step, False) / bound) for row in self._tableau.a]
        return torch.stack(lengths).amax(0)

    def less(self, ks: list[Tensor], changes: list[Tensor], on: Tensor) -> list[Tensor]:
        """See `numbers.less`."""
        return [less(k, x, on) for k, x in zip(ks, changes, strict=True)]

    def lost(self, on: Tensor, ks: list[Tensor]) -> list[Tensor]:
        """See `numbers.lost`."""
        return [lost(on, k) for k in ks]

    def ends(self, y: Tensor, step: Tensor, ks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """``h sum_i e_i K_i``, and the change of the state."""
        assert self._tableau.error is not None
        return step * combined(self._tableau.error, ks), step * combined(self._tableau.b, ks)

    def slopes(self, y: Tensor, ks: list[Tensor]) -> list[Tensor]:
        """As they are recorded."""
        return ks


class StagesOfOne:
    """As `StagesOfMany` for one trajectory, with slopes as rows of one tensor (s, n): ``a`` (s, s); ``ends`` (2, s), the weights of the
    error and of the new state; and matrices that take slopes to the eigenvectors of ``a`` and back, in real numbers for real states."""

    def __init__(self, tableau: CollocationTableau, like: Tensor, norm: Callable[[Tensor], float], plan: Plan) -> None:
        self._norm, self._plain = norm, plan.norm is rms_norm
        self._a = like.new_tensor(tableau.a)
        self._ends = like.new_tensor([tableau.b if tableau.error is None else tableau.error, tableau.b])
        self._real = not like.is_complex()
        kind = np.dtype(str(like.dtype.to_real()).removeprefix("torch."))
        rows, columns = [], []
        for mode in tableau.distinct(False):
            out_of, into = np.array(mode.out_of), np.array(mode.into)
            if mode.value.imag == 0:
                rows, columns = [*rows, out_of.real], [*columns, into.real]
            else:
                # the other of the pair is the conjugate
                rows, columns = [*rows, out_of.real, out_of.imag], [*columns, 2 * into.real, -2 * into.imag]
        self._out_of, self._into = np.array(rows).astype(kind), np.array(columns).T.astype(kind)

    def begin(self, k1: Tensor, guessed: Tensor | None, running: bool) -> Tensor:
        """Slopes to begin with."""
        return k1.reshape(1, -1).expand(len(self._a), -1) if guessed is None else guessed

    def points(self, y: Tensor, step: float, ks: Tensor) -> Sequence[Tensor]:
        """The values of the stages, in the shape of ``y``."""
        return self.slopes(y, torch.addmm(y.reshape(1, -1), self._a, ks, alpha=step))

    def residuals(self, solver: CoupledSystem, times: Sequence[Tensor], points: Sequence[Tensor], ks: Tensor, on: bool) -> Tensor:
        """What is left of the equations, (s, n)."""
        # of an ODE, all stages at once
        values = torch.stack([solver.f(t, x) for t, x in zip(times, points, strict=True)])
        return ks - (values if values.dim() == 2 else values.reshape(ks.shape))

    @unwarned
    def solve(self, systems: Sequence[tuple[Mode, Any]], residuals: Tensor) -> Tensor:
        """As `solve_modes`, for residuals (s, n)."""
        if not self._real or not all(isinstance(factors, SmallFactors) for _, factors in systems):
            return torch.cat(solve_modes(systems, [r.unsqueeze(0) for r in residuals.unbind()]))
        sides = self._out_of @ as_numpy(residuals)
        place = 0
        for mode, factors in systems:
            assert isinstance(factors, SmallFactors)
            if mode.value.imag == 0:
                sides[place] = factors.solve_one(sides[place])
                place += 1
            else:
                found = factors.solve_one(sides[place] + 1j * sides[place + 1])
                sides[place], sides[place + 1] = found.real, found.imag
                place += 2
        return torch.from_numpy(self._into @ sides)

    def length(self, solver: CoupledSystem, step: float, found: Tensor, bound: Tensor) -> float:
        """The largest change of a value, in units of the bound."""
        x = torch.mm(self._a, found) * (abs(step) / bound.reshape(-1))
        if self._plain:
            return torch.linalg.vector_norm(x, dim=-1).amax().item() * max(x.shape[-1], 1) ** -0.5
        return max(map(self._norm, x.unbind()))

    def less(self, ks: Tensor, change: Tensor, on: bool) -> Tensor:
        """See `numbers.less`."""
        return less(ks, change, on)

    def lost(self, on: bool, ks: Tensor) -> Tensor:
        """See `numbers.lost`."""
        return lost(on, ks)

    def ends(self, y: Tensor, step: float, ks: Tensor) -> Sequence[Tensor]:
        """``h sum_i e_i K_i``, and the change of the state."""
        return self.slopes(y, torch.mm(self._ends, ks).mul_(step))

    def slopes(self, y: Tensor, ks: Tensor) -> list[Tensor]:
        """Rows in the shape of ``y``."""
        return list((ks if y.dim() == 1 else ks.reshape(-1, *y.shape)).unbind())


def solve_coupled(
    solver: CoupledSystem, by: Any, tableau: CollocationTableau, times: Sequence[Tensor], step: Measure, y: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Simplified Newton iterations for ``F(t_i, y + h sum_j a_ij K_j, K_i) = 0`` with ``E`` and ``G`` at the start of the step.

    With ``A = T diag(l) T^-1`` the matrix ``I (x) E + h A (x) G`` falls apart into ``E + h l_i G``: one of size n for each real eigenvalue
    and each conjugate pair (Butcher 1976; Hairer & Wanner, Solving ordinary differential equations II, section IV.8). The iteration is that
    of `StageSolver.implicit`: its error is estimated from the rate of convergence, rows that have converged do not move any more, and
    failed ones are NaN. Where the tolerance is below what rounding of ``y`` allows, that is the bound.

    ``by``: `StagesOfMany`, or `StagesOfOne`. Returns the ``s`` slopes and, for methods with an error estimate, that of the step, all
    ``(B, n)``, of one trajectory in the shape of ``y``.
    """
    plan, work = solver.plan, solver.work
    running = solver.running(step)
    guess = solver.guess(tuple(tableau.c))
    ks = by.begin(k1, None if guess is None else guess(step, y, k1), running)
    systems = [(mode, solver.mode_factors(mode, step)) for mode in tableau.distinct(y.is_complex())]
    magnitude = y.abs()
    bound = torch.maximum(solver.tolerance * (magnitude * plan.rtol + plan.atol), 10 * torch.finfo(plan.real).eps * magnitude)
    before = work.n_newton

    def change(ks: Any, running: Decision) -> tuple[Any, Measure]:
        found = by.solve(systems, by.residuals(solver, times, by.points(y, step, ks), ks, running))
        work.n_newton = work.n_newton + running
        return found, by.length(solver, step, found, bound)

    adaptive = tableau.error is not None
    ks, failed, stalled = iterate(ks, change, by.less, running, 1.0, MOST if adaptive else MOST_CONSTANT, early=adaptive)
    rounds = work.n_newton - before
    work.n_fun += rounds * len(times)
    work.n_solves += rounds * len(systems)
    solver.note_failure(stalled, running)
    ks = by.lost(failed, ks)
    if guess is not None:
        guess.keep(step, y, ks)
    if not adaptive:
        return by.slopes(y, ks), None
    # of one trajectory it is known that there is no estimate
    return by.slopes(y, ks), torch.full_like(y, torch.nan) if failed is True else _estimate(solver, by, tableau, step, y, k1, ks)


def _estimate(solver: CoupledSystem, by: Any, tableau: CollocationTableau, step: Measure, y: Tensor, k1: Tensor, ks: Any) -> Tensor:
    """``(E + h g G)^-1 E h (g y'(t) + sum_i e_i K_i)``, bounded for stiff problems where the raw difference is not.

    In rows where that is too large, ``E y'(t)`` is taken again at ``y`` plus the estimate: for ``h l -> -inf`` the estimate then goes to
    zero as the error does (Hairer & Wanner II, equations IV.8.19 and 20). They do so in first and repeated steps only; a step that fails
    is repeated, so in any other the second estimate costs less than what it may save.
    """
    assert tableau.gamma is not None
    hg = step * tableau.gamma
    from_stages, moved = by.ends(y, step, ks)
    from_stages = solver.mass(from_stages)
    estimate = solver.filtered(hg, solver.with_slope(from_stages, hg, k1))
    size = torch.maximum(y.abs(), (y + moved).abs())
    running = solver.running(step)
    large = (solver.norm(solver.plan.scaled(solver.weigh(estimate, step, True), size).abs()) > 1.0) & running
    if any_of(large):
        again = solver.mass_slope(choose_states(large, y + estimate, y), k1)
        solver.work.n_fun += large
        second = solver.filtered(hg, along(from_stages, again, hg))
        # not work of the rows that did not ask for it
        solver.work.n_solves -= 1 * (running & negated(large))
        estimate = choose_states(large, second, estimate)
    return solver.weigh(estimate, step, True)


def combined(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """``sum_j weights_j ks_j``."""
    total = weighted_sum(weights, ks)
    assert total is not None
    return total


def solve_modes(systems: Sequence[tuple[Mode, Any]], residuals: Sequence[Tensor]) -> list[Tensor]:
    """``(I (x) E + h A (x) G)^-1 residuals``, through the eigenvectors of ``A``."""
    is_complex = residuals[0].is_complex()
    totals: list[Tensor | None] = [None] * len(residuals)
    for mode, factors in systems:
        pair = mode.value.imag != 0
        side = _weighed(mode.out_of, residuals, pair)
        found = factors.solve(side)
        for i, weight in enumerate(mode.into):
            # for real states the other of the pair is the conjugate
            part = found * weight.real if not pair else found * weight if is_complex else 2 * (found * weight).real
            total = totals[i]
            totals[i] = part if total is None else total + part
    return [total for total in totals if total is not None]


def _weighed(weights: Sequence[complex], xs: Sequence[Tensor], pair: bool) -> Tensor:
    parts = [x * (w if pair else w.real) for w, x in zip(weights, xs, strict=True)]
    return sum(parts[1:], parts[0])
