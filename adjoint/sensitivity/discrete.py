"""The discrete adjoint sweep for first derivatives: plain reverse mode through ``fun`` at each stage, one state kept per step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..integrate import Monitor
from ..integrate.spread import widened
from ..methods.sums import row_dot
from ..system.capture import cut_apart
from ..system.system import System
from .additive import AdditiveLinearizer
from .equations import recorded_adjoint
from .linearize import Linearizer
from .lone_sweep import LoneSweep, goes_by_rows
from .multistep_adjoint import multistep_eager
from .multistep_rows import multistep_by_rows
from .padding import in_shelter
from .problem import Problem, kept_steps, stage_times, step_times
from .stages import StageLinearizer

if TYPE_CHECKING:
    from .checkpoints import Recall

__all__ = ["anchors_bar", "eager_sweep"]


class _Samples:
    """Cotangents of the samples, sorted by the step that they lie in."""

    def __init__(self, problem: Problem, grid: dict[str, Tensor], t_eval: Tensor | None, bar: Tensor | None, time_bars: bool) -> None:
        self.method = problem.plan.method
        # contiguous, whatever the layout of the times is: it is filled in flat
        self.t_eval_bar = torch.zeros_like(t_eval, memory_format=torch.contiguous_format) if t_eval is not None and time_bars else None
        n_steps, rows = grid["t"].shape
        self.rows, self.time_bars = rows, time_bars
        self.inner = self.ends = [(0, 0)] * n_steps
        if bar is None or t_eval is None or n_steps == 0:
            return
        step = grid["sample_step"]
        index = step.clamp(min=0)
        h = grid["h"].gather(0, index)
        theta = (t_eval - grid["t"].gather(0, index)) / torch.where(h == 0, 1.0, h)
        # a sample at the end of a step is the state there, whose own cotangent does the rest
        group = torch.where((theta == 1.0) & (not time_bars) & (step >= 0), step + n_steps, step).reshape(-1)
        order = group.argsort(stable=True)
        counts = torch.bincount(group + 1, minlength=2 * n_steps + 1).tolist()
        self.order = order
        self.row = order % rows
        self.h, self.theta = h.reshape(-1)[order], theta.reshape(-1)[order]
        self.bar = bar.flatten(0, 1)[order]
        self.weights = self.method.dense_weights(self.theta)
        self.scaled = (self.weights * self.h.unsqueeze(-1)).to(bar.dtype)
        edges = [0]
        for count in counts:
            edges.append(edges[-1] + count)
        pairs = list(pairwise(edges[1:]))
        self.inner, self.ends = pairs[:n_steps], pairs[n_steps:]

    def _rows_sum(self, start: int, stop: int) -> Tensor:
        values = self.bar[start:stop]
        if self.rows == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(self.rows, values.shape[-1]).index_add_(0, self.row[start:stop], values)

    def at_end(self, k: int) -> Tensor | None:
        """Cotangent of the state at the end of step ``k``."""
        start, stop = self.ends[k]
        return self._rows_sum(start, stop) if stop > start else None

    def at_start(self, k: int) -> Tensor | None:
        """Cotangent of the state at the start of step ``k``, by way of the dense output."""
        start, stop = self.inner[k]
        return self._rows_sum(start, stop) if stop > start else None

    def stages_bar(self, k: int) -> Tensor | None:
        """Cotangents ``(S, B, n)`` of the stages of step ``k``."""
        start, stop = self.inner[k]
        if stop == start:
            return None
        bar, scaled = self.bar[start:stop], self.scaled[start:stop]
        if self.rows == 1:
            return (scaled.T @ bar).unsqueeze(1)
        out = bar.new_zeros(scaled.shape[1], self.rows, bar.shape[-1])
        return out.index_add_(1, self.row[start:stop], scaled.T.unsqueeze(-1) * bar)

    def add_time_bars(self, k: int, ks: Sequence[Tensor], t_bar: Tensor, h_bar: Tensor) -> None:
        """Cotangents of the sample times in step ``k``; adds those of its start and size to ``t_bar``, ``h_bar`` (B,)."""
        start, stop = self.inner[k]
        if stop == start:
            return
        row, bar, theta = (x[start:stop] for x in (self.row, self.bar, self.theta))
        products = torch.stack([row_dot(k_i[row], bar) for k_i in ks], dim=-1).double()
        # d/dtheta of h sum b_i(theta) k_i . bar, over h
        slope = (self.method.dense_slopes(theta) * products).sum(-1)
        size = (self.weights[start:stop] * products).sum(-1) - theta * slope
        assert self.t_eval_bar is not None
        self.t_eval_bar.view(-1)[self.order[start:stop]] = slope
        t_bar.index_add_(0, row, -slope)
        h_bar.index_add_(0, row, size)


@in_shelter
def eager_sweep(
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    wants: Sequence[bool],
    recall: Recall | None = None,
) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples, states, stages)``.

    ``recall``: makes the states and stages that the grid has not; only the first state is looked at there then.
    """
    if recall is None:
        problem.witness.check()
    if problem.plan.method.multistep:
        moving = bool(wants[0] or wants[1])
        samples = _Samples(problem, grid, t_eval, bars[1], moving)
        found = multistep_by_rows(problem, grid, anchors, t_eval, inputs, bars, wants, samples)
        return found if found is not None else multistep_eager(problem, grid, anchors, t_eval, inputs, bars, wants, samples)
    final_bar, samples_bar, states_bar, stages_bar = bars
    system, plan = problem.system, problem.plan
    method = plan.method
    states = grid["states"].detach()
    n_steps, rows = grid["t"].shape
    n_all = len(method.nodes)
    time_bars = bool(wants[0] or wants[1])
    inputs = cut_apart(inputs)
    f = system.bind(inputs)
    implicit = problem.algebra is not None
    linearize: Any = Linearizer(f, inputs, wants[3:], time_bars)
    slopes: Any = grid["stages"].detach() if recall is None else recall.stages
    if method.additive:
        linearize = AdditiveLinearizer(problem, slopes, inputs, wants[3:], time_bars)
    elif implicit:
        linearize = StageLinearizer(problem, slopes, f, inputs, wants[3:], time_bars)
    samples = _Samples(problem, grid, t_eval, samples_bar, time_bars)
    times = step_times(grid["t"], grid["h"], grid["segment"], grid["lands"], anchors.detach(), plan.shift)
    kept: dict[int, Tensor] = {}
    if stages_bar is not None and len(stages_bar):
        kept = dict(zip(kept_steps(plan, grid["event_step"], n_steps), stages_bar, strict=True))
    # of few rows all at once, which takes few operators; of many step by step, which takes little memory
    stage_t = stage_times(plan, times, plan.real) if rows == 1 else None
    shape = None if implicit else system.natural_shape
    flat = states.shape[1:]

    def inner(x: Tensor) -> Tensor:
        """``(..., B, n)`` as the steps carry it."""
        return x.reshape((*x.shape[:-2], *shape)) if shape is not None else x

    def outer(x: Tensor) -> Tensor:
        return x.reshape(flat)

    states = inner(states).contiguous()
    state_at = states if recall is None else recall
    if rows == 1:
        sizes: Any = grid["h"][:, 0].tolist()
    else:
        sizes = grid["h"].to(states.dtype.to_real()).unsqueeze(-1).unbind()

    bar = torch.zeros_like(states[0])
    if final_bar is not None:
        bar = bar + inner(torch.where((grid["status"] >= 0).unsqueeze(-1), final_bar, 0.0))
    t_bars, h_bars = torch.zeros_like(grid["t"]), torch.zeros_like(grid["t"])
    # f(t + h, y1) of a step is the first stage of the next, which can take its cotangent over, unless fun jumps in between
    hand_over = not implicit and method.end_index == n_all - 1 and not time_bars and times.jump_end is None

    def stage_cotangents(k: int) -> list[Tensor | None]:
        out = samples.stages_bar(k)
        if k in kept:
            out = kept[k] if out is None else out + kept[k]
        return [] if out is None else list(inner(out).unbind())

    checked = isinstance(system, System)
    watched = rows == 1 and type(plan.monitor).adjoint is not Monitor.adjoint
    if recall is None and not watched and goes_by_rows(problem, n_steps, times.jump_end is not None):
        plain = Linearizer(f, inputs, wants[3:], time_bars)
        tensors = (states, slopes, grid["t"], grid["h"])
        lone = LoneSweep.make(problem, f, plain, tensors, inputs, lambda k: _both(samples.stages_bar(k), kept.get(k)))
        if lone is not None:
            return _by_rows(lone, problem, grid, anchors, bar, states_bar, samples, wants)
    k_bar = stage_cotangents(n_steps - 1) if n_steps else []
    for k in reversed(range(n_steps)):
        if states_bar is not None:
            bar = bar + inner(states_bar[k + 1])
        end = samples.at_end(k)
        if end is not None:
            bar = bar + inner(end)
        below = stage_cotangents(k - 1) if k else []
        if hand_over and below:
            handed = below.pop()
            if k_bar:
                first = k_bar[0]
                k_bar[0] = first if handed is None else handed if first is None else first + handed
            else:
                k_bar = [handed]
        linearize.check_next = checked
        y = state_at[k].reshape(flat) if implicit and recall is not None else state_at[k]
        if watched:
            plan.monitor.adjoint(float(grid["t"][k, 0]), y, float(grid["h"][k, 0]), bar)
        at = stage_times(plan, times.step(k), plan.real)[0] if stage_t is None else stage_t[k]
        if implicit:
            linearize.begin_step(k, at, sizes[k])
        size = sizes[k]
        if rows > 1 and not implicit:
            size = widened(size, y.shape[-1])
        if hasattr(method, "adjoint_step"):
            result = method.adjoint_step(linearize, at, size, y, bar, k_bar, time_bars)
        else:
            result = recorded_adjoint(problem, linearize, at, size, y, bar, k_bar, time_bars)
        start = samples.at_start(k)
        bar = result.y if start is None else result.y + inner(start)
        if result.first is not None:
            # of the slope that the step began with: what the step before handed on, or behind a jump and at the start f itself
            anew = None if k == 0 else times.anew(k)
            if k:
                handed = result.first if anew is None else torch.where(anew.unsqueeze(-1), 0.0, result.first)
                below = below or [None] * method.n_stages
                below[-1] = handed if below[-1] is None else below[-1] + handed
            if k == 0 or anew is not None:
                own = result.first if anew is None else torch.where(anew.unsqueeze(-1), result.first, 0.0)
                u, time_bar = linearize(at[0], y)[1](own)
                bar = bar + u
                if time_bar is not None:
                    t_bars[k] += time_bar
        if time_bars:
            samples.add_time_bars(k, [outer(x) for x in result.stages], t_bars[k], h_bars[k])
            if result.t is not None:
                t_bars[k] += result.t
            if result.h is not None:
                h_bars[k] += result.h
        k_bar = below
    if states_bar is not None:
        bar = bar + inner(states_bar[0])
    if n_steps == 0 and samples_bar is not None:
        bar = bar + inner(samples_bar.sum(0))
    problem.backward_report(linearize.n_fun, n_steps)
    of_anchors = anchors_bar(anchors, grid, t_bars, h_bars) if wants[0] else None
    return (of_anchors, samples.t_eval_bar if wants[1] else None, outer(bar) if wants[2] else None, *linearize.bars)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _by_rows(
    lone: LoneSweep,
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    bar: Tensor,
    states_bar: Tensor | None,
    samples: _Samples,
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The rest of `eager_sweep` where all steps are linearised at once."""
    n_steps = len(grid["t"])
    bar, t_bars, h_bars = lone.run(
        bar, lambda k: _both(samples.at_end(k), None if states_bar is None else states_bar[k + 1]), samples.at_start
    )
    if states_bar is not None:
        bar = bar + states_bar[0]
    of_anchors = None
    if t_bars is not None and h_bars is not None:
        for k in range(n_steps):
            samples.add_time_bars(k, list(grid["stages"][k].unbind()), t_bars[k], h_bars[k])
        of_anchors = anchors_bar(anchors, grid, t_bars, h_bars) if wants[0] else None
    problem.backward_report(lone.linearize.n_fun, n_steps)
    return (of_anchors, samples.t_eval_bar if wants[1] else None, bar if wants[2] else None, *lone.linearize.bars)


def anchors_bar(anchors: Tensor, grid: dict[str, Tensor], t_bars: Tensor, h_bars: Tensor) -> Tensor:
    """Cotangents of steps to those of the anchors: see `step_times`."""
    landed = torch.where(grid["lands"], h_bars, 0.0)
    out = torch.zeros_like(anchors)
    out.scatter_add_(0, grid["segment"], t_bars - landed)
    out.scatter_add_(0, (grid["segment"] + 1).clamp(max=anchors.shape[0] - 1), landed)
    return out
