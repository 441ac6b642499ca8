"""The discrete adjoint of multistep methods: step by step back, with the cotangents of all differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..system.capture import cut_apart
from .adams import AdamsAdjoint
from .asked import Asked, anchors_bar
from .bdf import BdfAdjoint
from .linearize import Linearizer
from .multistep_step import Schedule, StepBars

__all__ = ["multistep_eager"]


def multistep_eager(asked: Asked, samples: Any) -> tuple[Tensor | None, ...]:
    """As `discrete.eager_sweep`, whose `_Samples` are the last argument."""
    problem, grid, anchors, _, inputs, bars, wants = asked
    states_bar, stages_bar = bars[2:]
    plan, moving, final_bar = problem.plan, asked.moving, asked.final_bar
    grid = replace(grid, states=grid.states.detach(), stages=grid.stages.detach())
    states, stages, h = grid.states, grid.stages, grid.h
    n_steps, rows = h.shape
    inputs = cut_apart(inputs)
    f = problem.system.bind(inputs)
    linearize = Linearizer(f, inputs, wants[3:], moving)
    steps = (AdamsAdjoint if problem.algebra is None else BdfAdjoint)(problem, grid, inputs, linearize, f)
    schedule = Schedule(problem, grid, anchors.detach())
    t_bars, size_bars = torch.zeros_like(grid.t), torch.zeros_like(grid.t)
    bar = states.new_zeros(steps.size, rows, states.shape[-1])
    if final_bar is not None:
        bar[0] = final_bar
    linearize.check_next = n_steps > 0
    for k in reversed(range(n_steps)):
        ends = [x for x in (None if states_bar is None else states_bar[k + 1], samples.at_end(k)) if x is not None]
        if ends:
            bar = torch.cat([(bar[0] + sum(ends)).unsqueeze(0), bar[1:]])
        k_bar = samples.stages_bar(k)
        if stages_bar is not None and len(stages_bar):
            k_bar = stages_bar[k] if k_bar is None else k_bar + stages_bar[k]
        back = steps.step(k, StepBars(plan.method, bar, k_bar, moving), schedule.step(k))
        valid = h[k] != 0
        bar = torch.where(valid.reshape(1, -1, 1), back.table, bar)
        if back.t is not None:
            t_bars[k] += torch.where(valid, back.t, 0.0)
        if back.size is not None:
            size_bars[k] += torch.where(valid, back.size, 0.0)
        start = samples.at_start(k)
        if start is not None:
            bar = torch.cat([(bar[0] + start).unsqueeze(0), bar[1:]])
        if moving:
            samples.add_time_bars(k, list(stages[k].unbind()), t_bars[k], size_bars[k])
    first = None
    y0_bar = bar[0]
    if n_steps:
        y0_bar, first = steps.begin(bar, states[0], schedule.first)
    if states_bar is not None:
        y0_bar = y0_bar + states_bar[0]
    if n_steps == 0 and bars[1] is not None:
        y0_bar = y0_bar + bars[1].sum(0)
    problem.backward_report(linearize.n_fun, n_steps)
    of_anchors = None
    if wants[0]:
        of_anchors = anchors_bar(anchors, grid, t_bars, size_bars)
        if first is not None:
            of_anchors[0] += first
    return asked.answer(of_anchors, samples.t_eval_bar, y0_bar, linearize.bars)
