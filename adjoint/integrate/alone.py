"""Newton's iteration for the stages of implicit methods, for one trajectory: as `stages` and `coupled`, but decisions are numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..linalg import Factorization, LinearOperator, LinearSolver, Log, Matrix
from ..linalg.dense import SmallFactors, as_numpy, factor_one
from ..methods.tableaux_implicit import CollocationTableau, Mode
from ..methods.tableaux_rosenbrock import RosenbrockTableau
from ..system.jacobians import dense_with_time, jvp
from ..system.stage_jacobian import StageJacobian
from .coupled import MOST as MOST_COUPLED
from .coupled import MOST_CONSTANT, solve_modes
from .guesses import LoneGuess
from .matrices import complex_shifted, jacobian_at, shifted
from .newton import iterate
from .numbers import less
from .plan import Plan, rms_norm
from .stages import MOST, TOLERANCE, tolerances_of_stages
from .work import Equations, StageWork

__all__ = ["LoneStages", "row_norm", "solved"]

Flat = Callable[[Tensor, Tensor], Tensor]


def row_norm(plan: Plan) -> Callable[[Tensor], float]:
    """The norm of the plan for one state of any shape, as a number."""
    if plan.norm is rms_norm:
        norm = torch.linalg.vector_norm
        return lambda x: norm(x).item() * max(x.numel(), 1) ** -0.5
    return lambda x: float(plan.norm(x.reshape(1, -1)))


def solved(factors: Factorization, b: Tensor) -> Tensor:
    """``A^-1 b`` for one side of any shape."""
    if isinstance(factors, SmallFactors):
        if b.dim() == 1:
            return torch.from_numpy(factors.solve_one(as_numpy(b)))
        return torch.from_numpy(factors.solve_one(as_numpy(b.reshape(-1)))).reshape(b.shape)
    return factors.solve(b.reshape(1, -1)).reshape(b.shape)


class LoneStages(Equations):
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
        tolerance: float = TOLERANCE,
    ) -> None:
        self.f, self.plan, self.jacobian, self.linear_solver, self.tolerance = f, plan, jacobian, linear_solver, tolerance
        self.rtol, self.atol = tolerances_of_stages(plan, tolerance)
        self.device, self.log, self.norm = device, Log(), row_norm(plan)
        self.n_fun = self.n_jac = self.n_factorizations = self.n_solves = self.n_newton = 0
        #: methods that weigh ``f_t`` get it with the Jacobian, where that is not the user's own
        self._timed = plan.method.needs_time_slope
        self._matrix: Matrix | None = None
        #: its entries, where it is a small dense one
        self._entries: np.ndarray | None = None
        self._slope: Tensor | None = None
        self._at: tuple[Tensor, Tensor] | None = None
        self._factors: dict[complex, tuple[float, Factorization]] = {}
        self._guess: LoneGuess | None = None
        self._modes: _Modes | None = None
        self._rows: tuple[list[np.ndarray], list[np.ndarray], np.ndarray] | None = None
        #: whether the iteration, and not ``f``, failed in the last attempt
        self.stuck = False

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``."""
        return self.f(t, y)

    @property
    def work(self) -> StageWork:
        """What was counted, as tensors ``(1,)``."""
        counts = (self.n_fun, self.n_jac, self.n_factorizations, self.n_solves, self.n_newton)
        return StageWork(*(torch.tensor([x], dtype=torch.int64, device=self.device) for x in counts), log=self.log)

    @property
    def matrix(self) -> Matrix:
        """The Jacobian at the start of the step."""
        assert self._matrix is not None
        return self._matrix

    def begin(self, t: Tensor, y: Tensor) -> None:
        """A step is attempted from here: the Jacobian is taken anew, unless the attempt before began at the same place."""
        self.stuck = False
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
        return isinstance(self.jacobian, StageJacobian) and self.jacobian.takes_dense(state)

    def _refresh(self) -> None:
        # what of the old factors is of use in a factorisation stays
        self._factors = {key: (math.nan, factors) for key, (_, factors) in self._factors.items()}
        self._entries = None
        self.n_jac += 1

    def _factors_for(self, value: complex, h: float) -> Factorization:
        """Of ``I - h value J``."""
        old = self._factors.get(value)
        if old is not None and old[0] == h:
            return old[1]
        assert self._matrix is not None
        if old is not None and isinstance(old[1], SmallFactors) and isinstance(self._matrix, Tensor):
            # the same solver would come to the same
            if self._entries is None:
                self._entries = as_numpy(self._matrix[0])
            hd = h * value if value.imag else h * value.real
            factors: Factorization = SmallFactors(np.eye(old[1].n, dtype=self._entries.dtype) - hd * self._entries, old[1].dtype, self.log)
            self._factors[value] = (h, factors)
            self.n_factorizations += 1
            return factors
        if value.imag == 0:
            hd = torch.tensor([[h * value.real]], dtype=self.plan.real, device=self.device)
            matrix = shifted(self._matrix, hd)
        else:
            step = torch.tensor([[h]], dtype=self.plan.real, device=self.device)
            matrix = complex_shifted(self._matrix, step * value)
        again = None if old is None or isinstance(matrix, LinearOperator) else old[1]
        factors = factor_one(self.linear_solver, matrix, self.log, again)
        self._factors[value] = (h, factors)
        self.n_factorizations += 1
        return factors

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`."""
        self.n_solves += 1
        return solved(self._factors_for(1.0, float(hd)), b)

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

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """See `StageEquations.implicit`."""
        f, step = self.f, float(hd)
        factors = self._factors_for(1.0, step)
        weight = abs(step) / (base.abs() * self.rtol + self.atol)

        def change(k: Tensor, _: bool) -> tuple[Tensor, float]:
            # (I - hd J) dk = -(k - f): in terms of the slopes
            found = solved(factors, k - f(t, torch.add(base, k, alpha=step)))
            self.n_fun += 1
            self.n_newton += 1
            self.n_solves += 1
            return found, self.norm(found * weight)

        k, failed, stalled = iterate(guess, change, less, True, self.tolerance, MOST, early=self.plan.method.adaptive)
        self.stuck = self.stuck or stalled
        return torch.full_like(k, math.nan) if failed else k

    def linear_stages(
        self, tableau: RosenbrockTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, slope: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The step of `Rosenbrock.step`; None where the matrix is not a small dense one."""
        tab, size, f = tableau, float(h), self.f
        factors = self._factors_for(1.0, size * tab.gamma)
        if not isinstance(factors, SmallFactors):
            return None
        if self._rows is None:
            self._rows = [np.array(row) for row in tab.a], [np.array(row) for row in tab.coupling], np.array(tab.b)
        a, coupling, b = self._rows
        start, first, moving = as_numpy(y.reshape(-1)), as_numpy(k1.reshape(-1)), as_numpy(slope.reshape(-1)) * size
        ks = np.empty((len(b), len(start)), dtype=start.dtype)
        values = []
        for i, same in enumerate(tab.same_as):
            if i == 0:
                value = first
            elif same < i:
                value = values[same]
            else:
                point = start + (a[i][:i] @ ks[:i]) * size
                value = as_numpy(f(times[i], torch.from_numpy(point.astype(start.dtype, copy=False)).reshape(y.shape)).reshape(-1))
            values.append(value)
            side = value + coupling[i][:i] @ ks[:i] if i else value
            if tab.d[i]:
                side = side + moving * tab.d[i]
            ks[i] = factors.solve_one((side * tab.gamma).astype(start.dtype, copy=False))
        self.n_solves += len(b)
        end = (start + (b @ ks) * size).astype(start.dtype, copy=False)
        return torch.from_numpy(end).reshape(y.shape), list(torch.from_numpy(ks).reshape(-1, *y.shape).unbind())

    # ---- coupled stages

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """See `solve_coupled`; slopes are rows of one tensor (s, n)."""
        plan, f, size = self.plan, self.f, float(h)
        start = y.reshape(-1)
        if self._modes is None:
            self._modes = _Modes(tableau, y)
        modes = self._modes
        ks = self._guesses(tuple(tableau.c), size, y, k1)
        systems = [(mode, self._mode_factors(mode, size)) for mode in tableau.distinct(y.is_complex())]
        magnitude = start.abs()
        bound = torch.maximum(self.tolerance * (magnitude * plan.rtol + plan.atol), 10 * torch.finfo(plan.real).eps * magnitude)
        weight = abs(size) / bound

        def change(ks: Tensor, _: bool) -> tuple[Tensor, float]:
            points = torch.addmm(start.unsqueeze(0), modes.a, ks, alpha=size).unbind()
            if y.dim() == 1:
                values = [f(t, x) for t, x in zip(times, points, strict=True)]
            else:
                values = [f(t, x.reshape(y.shape)).reshape(start.shape) for t, x in zip(times, points, strict=True)]
            found = modes.solve(systems, ks - torch.stack(values))
            self.n_fun += len(values)
            self.n_newton += 1
            self.n_solves += len(systems)
            return found, self._longest(torch.mm(modes.a, found) * weight)

        adaptive = tableau.error is not None
        ks, failed, self.stuck = iterate(ks, change, less, True, 1.0, MOST_COUPLED if adaptive else MOST_CONSTANT, early=adaptive)
        if failed:
            ks = torch.full_like(ks, math.nan)
        if self._guess is not None:
            self._guess.keep(size, y, ks)
        slopes = list(ks.unbind()) if y.dim() == 1 else list(ks.reshape(-1, *y.shape).unbind())
        return slopes, None if tableau.error is None else self._estimate(tableau, size, y, k1, ks, failed)

    def _longest(self, x: Tensor) -> float:
        """The largest norm of the rows."""
        if self.plan.norm is rms_norm:
            return torch.linalg.vector_norm(x, dim=-1).amax().item() * max(x.shape[-1], 1) ** -0.5
        return max(map(self.norm, x.unbind()))

    def _guesses(self, nodes: tuple[float, ...], h: float, y: Tensor, k1: Tensor) -> Tensor:
        """One stage has no polynomial; steps that are taken again must not depend on what was before."""
        if len(nodes) < 2 or self.plan.keep_grid:
            return k1.reshape(1, -1).expand(len(nodes), -1)
        if self._guess is None:
            self._guess = LoneGuess(nodes)
        return self._guess(h, y, k1)

    def _mode_factors(self, mode: Mode, h: float) -> Factorization:
        return self._factors_for(mode.value.real if mode.value.imag == 0 else mode.value, h)

    def _estimate(self, tableau: CollocationTableau, h: float, y: Tensor, k1: Tensor, ks: Tensor, failed: bool) -> Tensor:
        """See `coupled._estimate`."""
        assert tableau.gamma is not None and self._at is not None and self._modes is not None
        if failed:
            return torch.full_like(y, math.nan)
        plan, hg = self.plan, h * tableau.gamma
        from_stages, moved = (x.reshape(y.shape) for x in torch.mm(self._modes.ends, ks).mul_(h).unbind())
        estimate = self._filtered(tableau.gamma, h, torch.add(from_stages, k1, alpha=hg))
        size = torch.maximum(y.abs(), (y + moved).abs())
        if self.norm(plan.scaled(estimate, size)) > 1.0:
            self.n_fun += 1
            again = self.f(self._at[0], y + estimate)
            estimate = self._filtered(tableau.gamma, h, torch.add(from_stages, again, alpha=hg))
        return estimate

    def _filtered(self, gamma: float, h: float, b: Tensor) -> Tensor:
        self.n_solves += 1
        return solved(self._factors_for(gamma, h), b)


class _Modes:
    """The matrices of a collocation method for one trajectory: ``a`` (s, s); ``ends`` (2, s), the weights of the error and of the new
    state; and those that take slopes (s, n) to the eigenvectors of ``a`` and back, in real numbers for real states."""

    def __init__(self, tableau: CollocationTableau, like: Tensor) -> None:
        self.a = like.new_tensor(tableau.a)
        self.ends = like.new_tensor([tableau.b if tableau.error is None else tableau.error, tableau.b])
        self.real = not like.is_complex()
        kind = np.dtype(str(like.dtype.to_real()).removeprefix("torch."))
        rows, columns = [], []
        for mode in tableau.distinct(False):
            out_of, into = np.array(mode.out_of), np.array(mode.into)
            if mode.value.imag == 0:
                rows, columns = [*rows, out_of.real], [*columns, into.real]
            else:
                # the other of the pair is the conjugate
                rows, columns = [*rows, out_of.real, out_of.imag], [*columns, 2 * into.real, -2 * into.imag]
        self.out_of, self.into = np.array(rows).astype(kind), np.array(columns).T.astype(kind)

    def solve(self, systems: Sequence[tuple[Mode, Factorization]], residuals: Tensor) -> Tensor:
        """As `solve_modes`, for residuals (s, n)."""
        if not self.real or not all(isinstance(factors, SmallFactors) for _, factors in systems):
            return torch.cat(solve_modes(systems, [r.unsqueeze(0) for r in residuals.unbind()]))
        sides = self.out_of @ as_numpy(residuals)
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
        return torch.from_numpy(self.into @ sides)
