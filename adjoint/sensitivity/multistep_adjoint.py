"""The discrete adjoint of backward differentiation formulas: one transposed solve a step, with the cotangents of all differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..capture import cut_apart
from ..integrate.multistep import SIZE, update_matrix
from ..integrate.pencil import scaled_factors, split
from ..integrate.plan import shifted_times
from ..integrate.stages import jacobian_at, shifted
from ..linalg import Log
from ..methods.bdf import MAX_ORDER, coefficients
from ..methods.runge_kutta import row_dot
from .linearize import Linearizer
from .problem import Problem

__all__ = ["multistep_eager"]


def multistep_eager(
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    wants: Sequence[bool],
    samples: Any,
) -> tuple[Tensor | None, ...]:
    """As `discrete.eager_sweep`, whose `_Samples` are the last argument.

    A step solves ``c F(t, y, (b + y) / c) = 0`` with ``b`` and the prediction linear in the differences ``D`` before it, and makes the
    new ones ``S T D + s (y - prediction)``. So with the cotangent ``w`` of ``y``: ``(E + c G)* l = w``, ``b_bar = -E* l``,
    ``p_bar = -c F_p* l``. For an ODE ``E = I`` and ``G = -f_y``.
    """
    final_bar, _, states_bar, stages_bar = bars
    plan, algebra, system = problem.plan, problem.algebra, problem.system
    assert algebra is not None
    states, stages = grid["states"].detach(), grid["stages"].detach()
    (n_steps, rows), n, real = grid["t"].shape, states.shape[-1], states.dtype.to_real()
    extra, h, segment = grid["extra"], grid["h"], grid["segment"]
    gamma, alpha, _ = coefficients(torch.float64, states.device)
    gamma = torch.nn.functional.pad(gamma, (0, SIZE - gamma.shape[0]))
    time_bars = bool(wants[0] or wants[1])
    inputs = cut_apart(inputs)
    f, implicit = system.bind(inputs), system.residual is not None
    linearize, log = Linearizer(f, inputs, wants[3:], time_bars), Log()
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).detach()
    inner = grid["lands"] & (segment < anchors.shape[0] - 2)
    place = torch.arange(SIZE, device=states.device)
    t_bars, late_bars = torch.zeros_like(grid["t"]), torch.zeros_like(grid["t"])
    unused = torch.zeros_like(grid["t"])
    bar = states.new_zeros(SIZE, rows, n)
    if final_bar is not None:
        bar[0] = torch.where((grid["status"] >= 0).unsqueeze(-1), final_bar, 0.0)
    factors: Any = None
    linearize.check_next = n_steps > 0
    for k in reversed(range(n_steps)):
        if states_bar is not None:
            bar[0] = bar[0] + states_bar[k + 1]
        end_bar = samples.at_end(k)
        if end_bar is not None:
            bar[0] = bar[0] + end_bar
        valid = (h[k] != 0).unsqueeze(-1)
        order, T = extra[k, 0].long(), extra[k, 1:].reshape(SIZE, SIZE, rows).permute(2, 0, 1).to(states.dtype)
        size = torch.where(h[k] == 0, 1.0, h[k])
        if time_bars:
            slope = torch.einsum("s,sbn->bn", plan.method.dense_slopes(h.new_ones(())).to(states.dtype), stages[k])
            late_bars[k] = row_dot(slope, bar[0]).double()
        k_bar = samples.stages_bar(k)
        if stages_bar is not None and len(stages_bar):
            k_bar = stages_bar[k] if k_bar is None else k_bar + stages_bar[k]
        new_bar = bar
        if k_bar is not None:
            keep = (torch.arange(1, MAX_ORDER + 1, device=states.device) <= order.unsqueeze(-1)).to(real)
            part = k_bar / size.to(real).reshape(1, -1, 1)
            new_bar = bar.clone()
            new_bar[1 : MAX_ORDER + 1] += part[:MAX_ORDER] * keep.t().unsqueeze(-1)
        S, s = (x.to(states.dtype) for x in update_matrix(order))
        near_bar = torch.einsum("bij,ibn->jbn", S, new_bar)
        w = torch.einsum("bi,ibn->bn", s, new_bar)
        c = (size / alpha[order]).to(real).unsqueeze(-1)
        end = (grid["t"][k] + h[k]).to(real)
        if plan.shift != "none" and anchors.shape[0] > 2:
            end = shifted_times([end], [1.0], False, inner[k], sign)[0]
        y = states[k + 1]
        low = (place <= order.unsqueeze(-1)).to(real)
        weights = (gamma * low / alpha[order].unsqueeze(-1)).to(states.dtype)
        if k_bar is not None:
            w = w + k_bar[MAX_ORDER] / size.to(real).unsqueeze(-1)
        w = torch.where(valid, w, 0.0)
        with torch.no_grad():
            if implicit:
                at = torch.cat([y, plan.method.formula_slope(order, stages[k])], -1)
                pencil = split(algebra.jacobian(lambda pair, end=end: f(end, pair), at))
                factors = scaled_factors(algebra.linear_solver, pencil.at(c), log, factors)
                solved = factors.solve_adjoint(w)
            else:
                at = y
                matrix = shifted(jacobian_at(problem.jacobian(inputs), f, end, y), c)
                solved = algebra.linear_solver.factor(matrix, log).solve(w, transposed=True, conjugated=True)
            solved = torch.where((w == 0).all(-1, keepdim=True), 0.0, solved)
        _, pull = linearize(end, at)
        pulled, time_bar = pull((-c if implicit else c) * solved)
        # what the slope passes on is -c E* l / c
        base_bar = pulled[:, n:] / c if implicit else -solved
        if time_bar is not None:
            t_bars[k] += torch.where(valid.squeeze(-1), time_bar, 0.0)
        near_bar = near_bar + torch.einsum("bi,bn->ibn", low.to(states.dtype), -(w + base_bar))
        near_bar = near_bar + torch.einsum("bi,bn->ibn", weights, base_bar)
        bar = torch.where(valid.unsqueeze(0), torch.einsum("bij,ibn->jbn", T, near_bar), bar)
        start = samples.at_start(k)
        if start is not None:
            bar = torch.cat([(bar[0] + start).unsqueeze(0), bar[1:]])
        if time_bars:
            samples.add_time_bars(k, list(stages[k].unbind()), t_bars[k], unused[k])
    y0_bar = bar[0]
    if states_bar is not None:
        y0_bar = y0_bar + states_bar[0]
    if n_steps == 0 and bars[1] is not None:
        y0_bar = y0_bar + bars[1].sum(0)
    problem.backward_report(linearize.n_fun, n_steps)
    anchors_bar = None
    if wants[0]:
        landed = torch.where(grid["lands"], late_bars, 0.0)
        anchors_bar = torch.zeros_like(anchors)
        anchors_bar.scatter_add_(0, segment, t_bars - landed)
        anchors_bar.scatter_add_(0, (segment + 1).clamp(max=anchors.shape[0] - 1), landed)
    return (anchors_bar, samples.t_eval_bar if wants[1] else None, y0_bar if wants[2] else None, *linearize.bars)
