"""The discrete adjoint of backward differentiation formulas for one ODE, with the equations of all steps linearised at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..integrate.bdf import SIZE, update_matrix
from ..linalg import Log
from ..linalg.dense import factor_one
from ..methods.bdf import MAX_ORDER, coefficients
from ..methods.sums import row_dot
from ..system.capture import cut_apart
from .asked import Asked
from .bdf import Formula, matrices
from .linearize import Linearizer, vjp
from .steps_as_rows import Rows, most_rows, rows_of

__all__ = ["multistep_by_rows"]


def multistep_by_rows(asked: Asked, samples: Any) -> tuple[Tensor | None, ...] | None:
    """As `multistep_eager`; None where that has to do it.

    The cotangent of the table of differences before a step is ``C x + e u`` with that behind it, ``x``, and ``(I - c f_y)* u = s x``: the
    numbers ``C``, ``e`` and ``s`` come from order and distances alone.
    """
    problem, grid, anchors, _, inputs, bars, wants = asked
    algebra, system, n_steps, time_bars = problem.algebra, problem.system, asked.n_steps, asked.moving
    states = grid.states.detach()
    if n_steps < 5 or anchors.shape[0] > 2 or not problem.for_one or algebra is None or (time_bars and states.is_complex()):
        return None
    inputs = cut_apart(inputs)
    f = system.bind(inputs)
    real = states.dtype.to_real()
    size = most_rows(f, grid.t[0].to(real), states[0], inputs, 1)
    if size is None:
        return None
    states_bar, stages_bar, final_bar = bars[2], bars[3], asked.final_bar
    linearize, log, mapped = Linearizer(f, inputs, wants[3:], time_bars), Log(), rows_of(f)
    h, order = grid.h[:, 0], grid.extra[:, 0, 0].long()
    c, tables, moves = _numbers(grid.extra, h, order, states.dtype)
    end = (grid.t[:, 0] + h).to(real)
    keep = (torch.arange(1, MAX_ORDER + 1, device=h.device) <= order.unsqueeze(-1)).to(states.dtype)
    bar = states.new_zeros(SIZE, states.shape[-1])
    if final_bar is not None:
        bar[0] = final_bar[0]
    t_bars, size_bars = torch.zeros_like(grid.t), torch.zeros_like(grid.t)
    lands, stages = grid.lands[:, 0].tolist(), grid.stages.detach()
    eye = torch.eye(states.shape[-1], dtype=states.dtype, device=states.device)
    for stop in range(n_steps, 0, -size):
        part = slice(max(0, stop - size), stop)
        points, when, leaf = Rows.at(mapped, end[part], states[1:, 0][part], time_bars)
        linearize.n_fun += len(leaf)
        linearize.check_next = True
        linearize.check(points.out, when, leaf)
        matrices = (eye - c[part, None, None] * points.matrix).unsqueeze(1).unbind()
        found: list[Tensor] = []
        for k in reversed(range(part.start, part.stop)):
            if states_bar is not None:
                bar[0] = bar[0] + states_bar[k + 1, 0]
            at_end = samples.at_end(k)
            if at_end is not None:
                bar[0] = bar[0] + at_end[0]
            k_bar = samples.stages_bar(k)
            if stages_bar is not None and len(stages_bar):
                k_bar = stages_bar[k] if k_bar is None else k_bar + stages_bar[k]
            if k_bar is not None:
                k_bar = k_bar[:, 0] / float(h[k])
                bar = bar.clone()
                bar[1 : MAX_ORDER + 1] += k_bar[:MAX_ORDER] * keep[k].unsqueeze(-1)
            both = torch.mm(tables[k], bar)
            w = both[SIZE:] if k_bar is None else both[SIZE:] + k_bar[MAX_ORDER:]
            u = factor_one(algebra.linear_solver, matrices[k - part.start], log).solve(w)
            if time_bars and lands[k]:
                formula = Formula.of(grid.extra[k], grid.h[k])
                size_bars[k] = _size_bar(formula, states[k + 1], stages[k], points.out[k - part.start], bar, w, u, k_bar)
            # the correction that is one of the stages takes its part back from the prediction
            bar = both[:SIZE] if k_bar is None else torch.addr(both[:SIZE], moves[k, 1], k_bar[MAX_ORDER])
            bar = torch.addr(bar, moves[k, 0], u[0])
            at_start = samples.at_start(k)
            if at_start is not None:
                bar[0] = bar[0] + at_start[0]
            found.append(u)
        v = torch.cat(found[::-1]) * c[part].unsqueeze(-1)
        if points.slope is not None:
            t_bars[part, 0] = row_dot(points.slope, v).double()
        if linearize.targets and points.out.requires_grad:
            linearize.accumulate(vjp((points.out,), linearize.targets, (v,)))
    y0_bar = bar[:1]
    if states_bar is not None:
        y0_bar = y0_bar + states_bar[0]
    problem.backward_report(linearize.n_fun, n_steps)
    of_anchors = None
    if time_bars:
        size_bars = size_bars + t_bars
        for k in range(n_steps):
            samples.add_time_bars(k, list(stages[k].unbind()), t_bars[k], size_bars[k])
        if wants[0]:
            landed = torch.where(grid.lands, size_bars, 0.0)
            of_anchors = torch.stack([(t_bars - landed).sum(0), landed.sum(0)])
    return asked.answer(of_anchors, samples.t_eval_bar, y0_bar, linearize.bars)


def _size_bar(
    formula: Formula, y: Tensor, stages: Tensor, rate: Tensor, bar: Tensor, w: Tensor, u: Tensor, k_bar: Tensor | None
) -> Tensor:
    """As in `BdfAdjoint.step`, of a step whose cotangents are ``bar`` (8, n) behind it and ``w``, ``u`` (1, n) of its equation."""
    S = update_matrix(formula.order)[0].to(y.dtype)
    out = formula.size_bar(y, stages, formula.table_bar(S, bar.unsqueeze(1), w, -u), row_dot(rate.detach().reshape(1, -1), u))
    return out if k_bar is None else out - row_dot(stages[:, 0].flatten(), k_bar.flatten()).double()


def _numbers(extra: Tensor, h: Tensor, order: Tensor, kind: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """``c`` (K,); ``C`` with ``s`` below, (9, 8) for each step; ``e`` and ``-T* low``, (K, 2, 8)."""
    gamma, alpha, _ = coefficients(torch.float64, h.device)
    place = torch.arange(SIZE, device=h.device)
    low = (place <= order.unsqueeze(-1)).double()
    weights = torch.nn.functional.pad(gamma, (0, SIZE - len(gamma))) * low / alpha[order].unsqueeze(-1)
    S, s = update_matrix(order)
    T = matrices(extra)[:, 0].mT
    C = T @ (S.mT - low.unsqueeze(-1) * s.unsqueeze(-2))
    tables = torch.cat([C, s.unsqueeze(-2)], 1).to(kind).unbind()
    moves = torch.stack([(T @ x.unsqueeze(-1)).squeeze(-1) for x in (low - weights, -low)], 1).to(kind)
    return (h / alpha[order]).to(kind.to_real()), tables, moves
