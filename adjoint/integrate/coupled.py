"""Newton's iteration for all stages of a fully implicit method at once, and the error estimate of its step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..methods.sums import weighted_sum
from ..methods.tableaux_implicit import CollocationTableau, Mode
from .guesses import StageGuess
from .newton import iterate
from .numbers import less

if TYPE_CHECKING:
    from .plan import Plan
    from .work import StageWork

__all__ = ["CoupledSystem", "Solves", "combined", "solve_coupled", "solve_modes"]

#: iterations before a step counts as failed: one that can be repeated with a smaller size is given up early
MOST, MOST_CONSTANT = 10, 50


class Solves(Protocol):
    """A factorised matrix."""

    def solve(self, b: Tensor) -> Tensor:
        """Of ``(B, n)``."""
        ...


class CoupledSystem(Protocol):
    """The equations of the stages, ``F(t, Y, K) = 0`` for the slope ``K`` at the value ``Y``: for an ODE ``K - f(t, Y)``.

    With ``E = F_y'`` and ``G = F_y`` at the start of the step.
    """

    plan: Plan
    work: StageWork
    tolerance: float

    def stage_residual(self, t: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        """``F(t, Y, K)``."""
        ...

    def mass(self, v: Tensor) -> Tensor:
        """``E v``."""
        ...

    def mode_factors(self, mode: Mode, step: Tensor) -> Solves:
        """``E + step l G`` for the eigenvalue ``l`` of the mode."""
        ...

    def filtered(self, hg: Tensor, b: Tensor) -> Tensor:
        """``(E + hg G)^-1 b``."""
        ...

    def mass_slope(self, y: Tensor, k1: Tensor) -> Tensor:
        """``E y'`` at the state ``y`` at the start of the step, near which the slope is ``k1``."""
        ...

    def guess(self, nodes: tuple[float, ...]) -> StageGuess | None:
        """Where the iteration starts from; None: from the slope at the start of the step."""
        ...

    def note_failure(self, failed: Tensor, attempted: Tensor) -> None:
        """The iteration of these rows, of those that were attempted, did not converge."""
        ...

    def weigh(self, x: Tensor, step: Tensor, error: bool) -> Tensor:
        """Changes (or, with ``error``, errors) of the state, as the norms shall see them."""
        ...


def solve_coupled(
    solver: CoupledSystem, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Simplified Newton iterations for ``F(t_i, y + h sum_j a_ij K_j, K_i) = 0`` with ``E`` and ``G`` at the start of the step.

    With ``A = T diag(l) T^-1`` the matrix ``I (x) E + h A (x) G`` falls apart into ``E + h l_i G``: one of size n for each real eigenvalue
    and each conjugate pair (Butcher 1976; Hairer & Wanner, Solving ordinary differential equations II, section IV.8). The iteration is that
    of `StageSolver.implicit`: its error is estimated from the rate of convergence, rows that have converged do not move any more, and
    failed ones are NaN. Where the tolerance is below what rounding of ``y`` allows, that is the bound.

    Returns the ``s`` slopes and, for methods with an error estimate, that of the step, all ``(B, n)``.
    """
    plan, work = solver.plan, solver.work
    step = h if isinstance(h, Tensor) else torch.full((y.shape[0], 1), h, dtype=plan.real, device=y.device)
    running = (step != 0).squeeze(-1)
    # rows of finished trajectories take part with steps of size zero: their slopes are all f(t, y), which is known
    guess = solver.guess(tuple(tableau.c))
    ks = [k1] * len(times) if guess is None else [torch.where(running.unsqueeze(-1), k, k1) for k in guess(step, y, k1)]
    systems = [(mode, solver.mode_factors(mode, step)) for mode in tableau.distinct(y.is_complex())]
    bound = torch.maximum(solver.tolerance * (y.abs() * plan.rtol + plan.atol), 10 * torch.finfo(plan.real).eps * y.abs())

    def change(ks: list[Tensor], running: Tensor) -> tuple[list[Tensor], Tensor]:
        column = running.unsqueeze(-1)
        residuals = [
            torch.where(column, solver.stage_residual(t, y + step * combined(row, ks), k), 0.0)
            for k, t, row in zip(ks, times, tableau.a, strict=True)
        ]
        found = solve_modes(systems, residuals)
        work.n_fun += running * len(ks)
        work.n_newton += running
        work.n_solves += running * len(systems)
        lengths = [plan.norm(solver.weigh(step * combined(row, found), step, False) / bound) for row in tableau.a]
        return found, torch.stack(lengths).amax(0)

    def moved(ks: list[Tensor], changes: list[Tensor], on: Tensor) -> list[Tensor]:
        return [less(k, x, on) for k, x in zip(ks, changes, strict=True)]

    adaptive = tableau.error is not None
    ks, failed, stalled = iterate(ks, change, moved, running, 1.0, MOST if adaptive else MOST_CONSTANT, early=adaptive)
    solver.note_failure(stalled, running)
    failed = failed.unsqueeze(-1)
    ks = [torch.where(failed, float("nan"), k) for k in ks]
    if guess is not None:
        guess.keep(step, y, ks)
    return ks, None if tableau.error is None else _estimate(solver, tableau, step, y, k1, ks)


def _estimate(solver: CoupledSystem, tableau: CollocationTableau, step: Tensor, y: Tensor, k1: Tensor, ks: Sequence[Tensor]) -> Tensor:
    """``(E + h g G)^-1 E h (g y'(t) + sum_i e_i K_i)``, bounded for stiff problems where the raw difference is not.

    In rows where that is too large, ``E y'(t)`` is taken again at ``y`` plus the estimate: for ``h l -> -inf`` the estimate then goes to
    zero as the error does (Hairer & Wanner II, equations IV.8.19 and 20). They do so in first and repeated steps only; a step that fails
    is repeated, so in any other the second estimate costs less than what it may save.
    """
    assert tableau.error is not None and tableau.gamma is not None
    hg = step * tableau.gamma
    from_stages = solver.mass(step * combined(tableau.error, ks))
    estimate = solver.filtered(hg, from_stages + solver.mass(hg * k1))
    y1 = y + step * combined(tableau.b, ks)
    size = torch.maximum(y.abs(), y1.abs())
    large = (solver.plan.norm(solver.plan.scaled(solver.weigh(estimate, step, True), size).abs()) > 1.0) & (step != 0).squeeze(-1)
    if bool(large.any()):
        column = large.unsqueeze(-1)
        again = solver.mass_slope(torch.where(column, y + estimate, y), k1)
        solver.work.n_fun += large
        second = solver.filtered(hg, from_stages + hg * again)
        # not work of the rows that did not ask for it
        solver.work.n_solves -= ((step != 0).squeeze(-1) & ~large).to(solver.work.n_solves.dtype)
        estimate = torch.where(column, second, estimate)
    return solver.weigh(estimate, step, True)


def combined(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """``sum_j weights_j ks_j``."""
    total = weighted_sum(weights, ks)
    assert total is not None
    return total


def solve_modes(systems: Sequence[tuple[Mode, Solves]], residuals: Sequence[Tensor]) -> list[Tensor]:
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
