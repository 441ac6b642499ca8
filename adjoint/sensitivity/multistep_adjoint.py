"""The discrete adjoint of multistep methods: step by step back, with the cotangents of all differences; and of backward differentiation
formulas for one ODE with the equations of many steps linearised at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..linalg import Log
from ..linalg.dense import factor_one
from ..methods.bdf import SIZE, Formulas
from ..methods.family import row_dot
from ..system.capture import cut_apart
from ..system.system import Flat
from .adams import AdamsAdjoint
from .asked import Asked, Linearizer, Losses, vjp
from .bdf import BdfAdjoint, Formula, matrices
from .multistep_step import Schedule, StepBars
from .steps_as_rows import Rows, most_rows, rows_of

__all__ = ["BdfByRows", "MultistepOneByOne"]

class MultistepOneByOne:
    """A `Way` for multistep methods, a step after the other; what is carried: the cotangents ``(M, B, n)`` of the table of differences."""

    size = 1

    def __init__(self, asked: Asked, losses: Losses) -> None:
        problem, grid = asked.problem, asked.grid
        self._losses, self._moving, self._method = losses, asked.moving, problem.plan.method
        self._grid = replace(grid, states=grid.states.detach(), stages=grid.stages.detach())
        inputs = cut_apart(asked.inputs, asked.wants[3:])
        f = problem.system.bind(inputs)
        self.linearize = Linearizer(f, inputs, asked.wants[3:], asked.moving)
        kind = AdamsAdjoint if problem.algebra is None else BdfAdjoint
        self._steps: Any = kind(problem, self._grid, inputs, self.linearize, f)
        self._schedule = Schedule(problem, self._grid, asked.anchors.detach())
        self.linearize.check_next = asked.n_steps > 0

    def start(self, final_bar: Tensor | None) -> Tensor:
        """See `Way.start`."""
        states = self._grid.states
        bar = states.new_zeros(self._steps.size, *states.shape[1:])
        if final_bar is not None:
            bar[0] = final_bar
        return bar

    def back(self, part: range, bar: Tensor, t_bars: Tensor, h_bars: Tensor) -> Tensor:
        """See `Way.back`."""
        k, losses = part.start, self._losses
        for end in losses.at_end(k):
            bar = torch.cat([(bar[0] + end).unsqueeze(0), bar[1:]])
        back = self._steps.step(k, StepBars(self._method, bar, losses.at_stages(k), self._moving), self._schedule.step(k))
        valid = self._grid.h[k] != 0
        bar = torch.where(valid.reshape(1, -1, 1), back.table, bar)
        for total, found in ((t_bars, back.t), (h_bars, back.size)):
            if found is not None:
                total[k] += torch.where(valid, found, 0.0)
        start = losses.at_start(k)
        if start is not None:
            bar = torch.cat([(bar[0] + start).unsqueeze(0), bar[1:]])
        if self._moving:
            losses.add_time_bars(k, list(self._grid.stages[k].unbind()), t_bars[k], h_bars[k])
        return bar

    def begin(self, bar: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Way.begin`."""
        states = self._grid.states
        return self._steps.begin(bar, states[0], self._schedule.first) if len(states) > 1 else (bar[0], None)


class BdfByRows:
    """A `Way` for one ODE, which linearises the equations of ``size`` steps at once; carried are the cotangents ``(M, n)`` of the table.

    The cotangent of the table of differences before a step is ``C x + e u`` with that behind it, ``x``, and ``(I - c f_y)* u = s x``: the
    numbers ``C``, ``e`` and ``s`` come from order and distances alone.
    """

    def __init__(self, asked: Asked, losses: Losses, f: Flat, linearize: Linearizer, size: int) -> None:
        grid = asked.grid
        self._grid, self._losses, self._moving, self.linearize, self.size = grid, losses, asked.moving, linearize, size
        assert asked.problem.algebra is not None
        self._solver, self._log, self._mapped = asked.problem.algebra.linear_solver, Log(), rows_of(f)
        self._states, self._stages = grid.states.detach(), grid.stages.detach()
        h, order, kind = grid.h[:, 0], grid.extra[:, 0, 0].long(), self._states.dtype
        self._formulas = Formulas(kind, h.device)
        self._c, self._tables, self._moves = _numbers(grid.extra, h, kind)
        self._end = (grid.t[:, 0] + h).to(kind.to_real())
        self._shown = self._formulas.shown[order].mT.unbind()
        self._sizes, self._lands = h.tolist(), grid.lands[:, 0].tolist()

    @classmethod
    def make(cls, asked: Asked, losses: Losses) -> BdfByRows | None:
        """None where steps have to be taken back one by one."""
        problem, grid, time = asked.problem, asked.grid, asked.moving
        states = grid.states.detach()
        if asked.n_steps < 5 or asked.anchors.shape[0] > 2 or not problem.for_one or (time and states.is_complex()):
            return None
        inputs = cut_apart(asked.inputs, asked.wants[3:])
        f = problem.system.bind(inputs)
        size = most_rows(problem.system, f, grid.t[0].to(states.dtype.to_real()), states[0], inputs, 1)
        return None if size is None else cls(asked, losses, f, Linearizer(f, inputs, asked.wants[3:], time), size)

    def start(self, final_bar: Tensor | None) -> Tensor:
        """See `Way.start`."""
        bar = self._states.new_zeros(SIZE, self._states.shape[-1])
        if final_bar is not None:
            bar[0] = final_bar[0]
        return bar

    def begin(self, bar: Tensor) -> tuple[Tensor, None]:
        """See `Way.begin`."""
        return bar[:1], None

    def back(self, part: range, bar: Tensor, t_bars: Tensor, h_bars: Tensor) -> Tensor:
        """See `Way.back`."""
        rows, states, stages, linearize, losses = slice(part.start, part.stop), self._states, self._stages, self.linearize, self._losses
        points, when, leaf = Rows.at(self._mapped, self._end[rows], states[1:, 0][rows], self._moving)
        linearize.n_fun += len(leaf)
        linearize.check_next = True
        linearize.check(points.out, when, leaf)
        eye = torch.eye(states.shape[-1], dtype=states.dtype, device=states.device)
        matrices = (eye - self._c[rows, None, None] * points.matrix).unsqueeze(1).unbind()
        found: list[Tensor] = []
        for k in reversed(part):
            for at_end in losses.at_end(k):
                bar[0] = bar[0] + at_end[0]
            k_bar = losses.at_stages(k)
            if k_bar is not None:
                k_bar = k_bar[:, 0] / self._sizes[k]
                bar = bar + torch.mm(self._shown[k], k_bar)
            both = torch.mm(self._tables[k], bar)
            w = both[SIZE:]
            u = factor_one(self._solver, matrices[k - part.start], self._log).solve(w)
            if self._moving and self._lands[k]:
                formula = Formula.of(self._formulas, self._grid.extra[k], self._grid.h[k])
                h_bars[k] = _size_bar(formula, states[k + 1], stages[k], points.out[k - part.start], bar, w, u, k_bar)
            bar = torch.addr(both[:SIZE], self._moves[k], u[0])
            at_start = losses.at_start(k)
            if at_start is not None:
                bar[0] = bar[0] + at_start[0]
            found.append(u)
        v = torch.cat(found[::-1]) * self._c[rows].unsqueeze(-1)
        if points.slope is not None:
            t_bars[rows, 0] = row_dot(points.slope, v).double()
        if linearize.targets and points.out.requires_grad:
            linearize.accumulate(vjp((points.out,), linearize.targets, (v,)))
        if self._moving:
            # the end of a step moves with its size
            h_bars[rows] += t_bars[rows]
            for k in part:
                losses.add_time_bars(k, list(stages[k].unbind()), t_bars[k], h_bars[k])
        return bar


def _size_bar(
    formula: Formula, y: Tensor, stages: Tensor, rate: Tensor, bar: Tensor, w: Tensor, u: Tensor, k_bar: Tensor | None
) -> Tensor:
    """As in `BdfAdjoint.step`, of a step whose cotangents are ``bar`` (8, n) behind it and ``w``, ``u`` (1, n) of its equation."""
    out = formula.size_bar(y, stages, formula.table_bar(bar.unsqueeze(1), w, -u), row_dot(rate.detach().reshape(1, -1), u))
    return out if k_bar is None else out - row_dot(stages[:, 0].flatten(), k_bar.flatten()).double()


def _numbers(extra: Tensor, h: Tensor, kind: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """``c`` (K,); ``C`` with ``s`` below, (9, 8) for each step; ``e``, (K, 8)."""
    order, formulas = extra[:, 0, 0].long(), Formulas(torch.float64, h.device)
    (low, weights), S, s = formulas.reading[order].unbind(1), formulas.S[order], formulas.s[order]
    T = matrices(formulas, extra)[:, 0].mT
    C = T @ (S.mT - low.unsqueeze(-1) * s.unsqueeze(-2))
    tables = torch.cat([C, s.unsqueeze(-2)], 1).to(kind).unbind()
    moves = (T @ (low - weights).unsqueeze(-1)).squeeze(-1).to(kind)
    return (h / formulas.alpha[order]).to(kind.to_real()), tables, moves
