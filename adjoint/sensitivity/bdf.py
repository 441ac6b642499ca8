"""Steps of backward differentiation formulas in derivatives: each new state is a root, each step back one transposed solve.

A step is linear in the table of differences but for the one equation that it solves, so the record of a step is its order and how far the
table was brought to its distance. Where that distance moves, because the step lands on an anchor, so does the matrix that did it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrate.newton import jacobian_at, shifted
from ..integrate.numbers import added, product
from ..integrate.plan import Grid
from ..linalg import Log, Matrix
from ..linalg.pencil import scaled_factors, split
from ..methods.bdf import MAX_ORDER, SIZE, Formulas, rescaling_slopes
from ..methods.family import row_dot
from ..system.jacobians import DenseJacobian
from ..system.system import Flat, System, VmappedSystem
from .asked import Linearizer
from .implicit import JacobianRule, RootNode, RootOutputs, RootTask, SystemConditions, known_root
from .multistep_step import Schedule, StepBack, StepBars, StepTime
from .problem import Problem, StageAlgebra

__all__ = ["BdfAdjoint", "BdfReplay", "Formula", "matrices"]


@dataclass(frozen=True)
class _StepConditions(SystemConditions):
    """``c F(t, y, (base + y) / c) = 0``, for an ODE ``base + y - c f(t, y) = 0``; inputs ``(t, base, c, *inputs of f)``."""

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``y``."""
        t, base, c, *rest = inputs
        f = self.system.bind(rest)
        if self.system.residual is not None:
            return lambda _, y: c * f(t, torch.cat([y, (base + y) / c], -1))
        return lambda _, y: base + y - c * f(t, y)


@dataclass(frozen=True)
class _Rule(JacobianRule):
    """``E + c G``: for an ODE the strategy is told the whole function; copies under vmap take a dense one."""

    system: System | VmappedSystem
    algebra: StageAlgebra

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        if self.system.residual is None:
            return self.algebra.jacobian(r, x)
        t, base, c, *rest = inputs
        f = self.system.bind(rest)
        return split(self.algebra.jacobian(lambda pair: f(t, pair), torch.cat([x, (base + x) / c], -1))).at(c)

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """See the class."""
        return self if self.system.residual is None else _DenseRule()


@dataclass(frozen=True)
class _DenseRule(JacobianRule):
    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        return DenseJacobian()(r, x)


def matrices(formulas: Formulas, extra: Tensor) -> Tensor:
    """``T`` (*, B, 8, 8) of steps, which brought the differences behind the step before to their distances.

    From ``extra`` (*, 3, B): the order, the ratio of the distances, and zero where all but the first difference was forgotten in between.
    """
    order, ratio, kept = extra.unbind(-2)
    T = formulas.rescaling(order.flatten().long(), ratio.flatten()).unflatten(0, order.shape)
    place = torch.arange(SIZE, device=extra.device)
    return torch.where((place < 2) | (kept != 0).unsqueeze(-1), 1.0, 0.0).to(T.dtype).unsqueeze(-1) * T


@dataclass(frozen=True)
class Formula:
    """The numbers of a recorded step: its order, the matrix ``T``, its size, ``alpha_q`` (B, 1), and the others as in `Formulas`."""

    order: Tensor
    T: Tensor
    size: Tensor
    alpha: Tensor
    reading: Tensor
    S: Tensor
    s: Tensor
    shown: Tensor

    @classmethod
    def of(cls, formulas: Formulas, extra: Tensor, h: Tensor, T: Tensor | None = None) -> Formula:
        """From ``extra`` (E, B), ``h`` (B,), of which none is zero, and ``T`` (B, 8, 8), which is that of the record if it is not given."""
        q, T = extra[0].long(), matrices(formulas, extra) if T is None else T
        looked = (x[q] for x in (formulas.reading, formulas.S, formulas.s, formulas.shown))
        return cls(q, T, h, formulas.alpha[q].unsqueeze(-1), *looked)

    def c(self, real: torch.dtype) -> Tensor:
        """``h / alpha_q`` (B, 1)."""
        return (self.size.unsqueeze(-1) / self.alpha).to(real)

    def table_bar(self, bar: Tensor, w: Tensor, base_bar: Tensor) -> Tensor:
        """The cotangent (8, B, n) of the table that was brought to the size of the step: from that behind it, of the correction ``w``, and
        of the ``base`` of the equation."""
        low, psi = self.reading.unbind(1)
        out = added(torch.einsum("bij,ibn->jbn", self.S, bar), low, -(w + base_bar))
        return added(out, psi, base_bar)

    def size_bar(self, y: Tensor, stages: Tensor, table_bar: Tensor, c_bar: Tensor) -> Tensor:
        """The cotangent (B,) of the size, but for what it has by the time of the end and by the stages that were divided by it.

        By the table, and by ``c``, whose cotangent is ``c_bar`` (B,).
        """
        real, q = y.dtype.to_real(), self.order.unsqueeze(-1)
        d = torch.cat([y.unsqueeze(0) / self.size.to(real).unsqueeze(-1), stages])
        place = torch.arange(MAX_ORDER + 1, device=y.device)
        # D_j after the step is the sum of those before it from j to q, and the correction, which comes last among the stages
        later = torch.cat([d[1 : MAX_ORDER + 1], torch.zeros_like(d[:1])])
        before = d[: MAX_ORDER + 1] - torch.where((place == q).t().unsqueeze(-1), d[-1], later)
        before = before * (place <= q).to(real).t().unsqueeze(-1)
        slopes = torch.as_tensor(rescaling_slopes(MAX_ORDER + 1), dtype=real, device=y.device)[self.order]
        moved = torch.einsum("bij,jbn->ibn", slopes.to(y.dtype), before)
        by_c = c_bar / self.alpha.squeeze(-1).to(real)
        return sum((row_dot(a, b) for a, b in zip(moved, table_bar, strict=False)), by_c).double()


def _moved(formulas: Formulas, grid: Grid, h: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes (K, B), none of them zero, and ``T`` (K, B, 8, 8) of all steps, if their sizes are ``h``: the same numbers, and derivatives."""
    recorded, T, rescaling = grid.size, matrices(formulas, grid.extra), formulas.rescaling
    if not recorded.numel():
        return recorded, T
    size = recorded + (h - grid.h)
    factor, order = (size / recorded).flatten(), grid.extra[:, 0].flatten().long()
    change = rescaling(order, factor, True) - rescaling(order, torch.ones_like(factor), True)
    return size, T + change.unflatten(0, size.shape) @ T


class BdfReplay:
    """The steps as differentiable functions of the table."""

    size = SIZE

    def __init__(self, problem: Problem, grid: Grid, inputs: Sequence[Tensor], schedule: Schedule) -> None:
        algebra = problem.algebra
        assert algebra is not None
        self.problem, self.grid, self.inputs, self.algebra = problem, grid, inputs, algebra
        self.formulas = Formulas(grid.states.dtype, grid.states.device)
        self.h, self.T = _moved(self.formulas, grid, schedule.h)

    def begin(self, y0: Tensor, time: Tensor) -> Tensor:
        """The table at the start."""
        return torch.cat([y0.unsqueeze(0), y0.new_zeros(SIZE - 1, *y0.shape)])

    def step(self, k: int, D: Tensor, time: StepTime) -> tuple[Tensor, Tensor]:
        """Stages and the table after step ``k``."""
        grid, system = self.grid, self.problem.system
        h, real = grid.h[k], D.dtype.to_real()
        formula = Formula.of(self.formulas, grid.extra[k], self.h[k], self.T[k])
        near = product(formula.T.to(D.dtype), D)
        predicted, psi = product(formula.reading, near).unbind()
        c = formula.c(real)
        conditions, solver = _StepConditions(system), self.algebra.linear_solver
        task = RootTask(conditions, conditions, known_root, _Rule(system, self.algebra), solver, Log(), lambda record: None)
        known = grid.states[k + 1].detach()
        y = RootOutputs(*RootNode.apply(task, known, time.end, psi - predicted, c, *self.inputs)).raw
        new = added(product(formula.S, near), formula.s, y - predicted)
        stages = product(formula.shown, new) / formula.size.to(real).reshape(1, -1, 1)
        stages = torch.where((h != 0).reshape(1, -1, 1), stages, 0.0)
        return stages, new


class BdfAdjoint:
    """The steps back; see `multistep_adjoint`.

    A step solves ``c F(t, y, (b + y) / c) = 0`` with ``b`` and the prediction linear in the differences ``D`` before it, and makes the
    new ones ``S T D + s (y - prediction)``. So with the cotangent ``w`` of ``y``: ``(E + c G)* l = w``, ``b_bar = -E* l``,
    ``p_bar = -c F_p* l``. For an ODE ``E = I`` and ``G = -f_y``.
    """

    size = SIZE

    def __init__(self, problem: Problem, grid: Grid, inputs: Sequence[Tensor], linearize: Linearizer, f: Flat) -> None:
        algebra = problem.algebra
        assert algebra is not None
        self.problem, self.grid, self.inputs, self.algebra = problem, grid, inputs, algebra
        self.linearize, self.f, self.log = linearize, f, Log()
        #: steps whose sizes count: that of no other one moves
        self.lands: list[bool] = grid.lands.any(-1).tolist()
        self._factors: Any = None
        self.formulas = Formulas(grid.states.dtype, grid.states.device)

    def begin(self, bar: Tensor, y0: Tensor, time: Tensor) -> tuple[Tensor, Tensor | None]:
        """The cotangents of the state and the time at the start."""
        return bar[0], None

    def step(self, k: int, bars: StepBars, time: StepTime) -> StepBack:
        """Cotangents before step ``k`` from those behind it."""
        grid, linearize, bar, k_bar = self.grid, self.linearize, bars.table, bars.stages
        states, stages, h = grid.states, grid.stages, grid.h[k]
        dtype, real = states.dtype, states.dtype.to_real()
        formula = Formula.of(self.formulas, grid.extra[k], grid.size[k])
        new_bar, size_bar = bar, None
        lands = bars.moving and self.lands[k]
        if lands and k_bar is not None:
            size_bar = -sum(row_dot(x, y) for x, y in zip(stages[k], k_bar, strict=True)).double() / formula.size
        if k_bar is not None:
            new_bar = bar + product(formula.shown.mT, k_bar / formula.size.to(real).reshape(1, -1, 1))
        w = torch.einsum("bi,ibn->bn", formula.s, new_bar)
        w = torch.where((h != 0).unsqueeze(-1), w, 0.0)
        c, y, n = formula.c(real), states[k + 1], states.shape[-1]
        implicit = self.problem.system.residual is not None
        at = torch.cat([y, self.problem.plan.method.formula_slope(formula.order, stages[k])], -1) if implicit else y  # type: ignore[attr-defined]
        solved = self._solved(at, time.end, c, w)
        rate, pull = linearize(time.end, at)
        pulled, t_bar = pull((-c if implicit else c) * solved)
        # what the slope passes on is -c E* l / c
        base_bar = pulled[:, n:] / c if implicit else -solved
        near_bar = formula.table_bar(new_bar, w, base_bar)
        if lands:
            # c F moves with c by F - F_y' y'
            c_bar = -row_dot(rate, solved) - row_dot(at[:, n:], base_bar) if implicit else row_dot(rate, solved)
            by_size = formula.size_bar(y, stages[k], near_bar, c_bar)
            size_bar = sum((x for x in (t_bar, size_bar) if x is not None), by_size)
        return StepBack(torch.einsum("bij,ibn->jbn", formula.T.to(dtype), near_bar), t_bar, size_bar)

    def _solved(self, at: Tensor, end: Tensor, c: Tensor, w: Tensor) -> Tensor:
        """``(E + c G)*^-1 w``, zero where ``w`` is."""
        solver = self.algebra.linear_solver
        with torch.no_grad():
            if self.problem.system.residual is not None:
                pencil = split(self.algebra.jacobian(lambda pair: self.f(end, pair), at))
                self._factors = scaled_factors(solver, pencil.at(c), self.log, self._factors)
                solved = self._factors.solve_adjoint(w)
            else:
                matrix = shifted(jacobian_at(self.problem.jacobian(self.inputs), self.f, end, at), c)
                solved = solver.factor(matrix, self.log).solve(w, transposed=True, conjugated=True)
            return torch.where((w == 0).all(-1, keepdim=True), 0.0, solved)
