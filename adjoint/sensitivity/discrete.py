"""The discrete adjoint sweep for first derivatives: plain reverse mode through ``fun`` at each stage, one state kept per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..integrate import Monitor
from ..integrate.numbers import widened
from ..methods.sums import StepCotangents, row_dot
from ..system.capture import cut_apart
from ..system.system import System
from .additive import AdditiveLinearizer
from .asked import Asked, anchors_bar, in_shelter
from .equations import recorded_adjoint
from .linearize import Linearizer
from .lone_sweep import LoneSweep, goes_by_rows
from .multistep_adjoint import multistep_eager
from .multistep_rows import multistep_by_rows
from .problem import stage_times
from .stages import StageLinearizer

if TYPE_CHECKING:
    from .checkpoints import Recall

__all__ = ["eager_sweep"]


class _Samples:
    """Cotangents of the samples, sorted by the step that they lie in."""

    def __init__(self, asked: Asked) -> None:
        grid, t_eval, bar, time_bars = asked.grid, asked.t_eval, asked.bars[1], asked.moving
        self.method = asked.problem.plan.method
        # contiguous, whatever the layout of the times is: it is filled in flat
        self.t_eval_bar = torch.zeros_like(t_eval, memory_format=torch.contiguous_format) if t_eval is not None and time_bars else None
        n_steps, rows = grid.t.shape
        self.rows, self.time_bars = rows, time_bars
        self.inner = self.ends = [(0, 0)] * n_steps
        if bar is None or t_eval is None or n_steps == 0:
            return
        step = grid.sample_step
        index = step.clamp(min=0)
        h = grid.h.gather(0, index)
        theta = (t_eval - grid.t.gather(0, index)) / torch.where(h == 0, 1.0, h)
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
def eager_sweep(asked: Asked, recall: Recall | None = None) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples, states, stages)``.

    ``recall``: makes the states and stages that the grid has not; only the first state is looked at there then.
    """
    if recall is None:
        asked.problem.witness.check()
    samples = _Samples(asked)
    if asked.problem.plan.method.multistep:
        found = multistep_by_rows(asked, samples)
        return found if found is not None else multistep_eager(asked, samples)
    steps = _Steps(asked, samples, recall)
    one_by_one = recall is not None or steps.watched or not steps.implicit
    lone = None if one_by_one else steps.all_at_once()
    return _one_by_one(asked, steps) if lone is None else _by_rows(asked, steps, lone)


class _Steps:
    """The steps of a record as they are taken back: each linearised where it was taken."""

    def __init__(self, asked: Asked, samples: _Samples, recall: Recall | None) -> None:
        problem, grid, self._asked, self._recall, self.samples = asked.problem, asked.grid, asked, recall, samples
        system, self.plan = problem.system, problem.plan
        self._inputs = cut_apart(asked.inputs)
        self._f = system.bind(self._inputs)
        self.implicit, self._rows = problem.algebra is not None, grid.t.shape[1]
        given = (self._inputs, asked.wants[3:], asked.moving)
        self._slopes: Any = grid.stages.detach() if recall is None else recall.stages
        self.linearize: Any = Linearizer(self._f, *given)
        if self.plan.method.additive:
            self.linearize = AdditiveLinearizer(problem, self._slopes, *given)
        elif self.implicit:
            self.linearize = StageLinearizer(problem, self._slopes, self._f, *given)
        self.times, self._kept = asked.times(asked.anchors.detach()), asked.stages_bars()
        # of few rows all at once, which takes few operators; of many step by step, which takes little memory
        self._stage_t = stage_times(self.plan, self.times, self.plan.real) if self._rows == 1 else None
        self._shape, self._flat = None if self.implicit else system.natural_shape, grid.states.shape[1:]
        self.states = self.inner(grid.states.detach()).contiguous()
        if self._rows == 1:
            self._sizes: Any = grid.h[:, 0].tolist()
        else:
            self._sizes = grid.h.to(self.states.dtype.to_real()).unsqueeze(-1).unbind()
        self._checked = isinstance(system, System)
        self.watched = self._rows == 1 and type(self.plan.monitor).adjoint is not Monitor.adjoint
        end = self.plan.method.end_index
        # f(t + h, y1) of a step is the first stage of the next, which can take its cotangent over, unless fun jumps in between
        self.hands_over = not self.implicit and end == len(self.plan.method.nodes) - 1 and not asked.moving and self.times.jump_end is None

    def inner(self, x: Tensor) -> Tensor:
        """``(..., B, n)`` as the steps carry it."""
        return x if self._shape is None else x.reshape((*x.shape[:-2], *self._shape))

    def outer(self, x: Tensor) -> Tensor:
        """``(B, n)`` of what the steps carry."""
        return x.reshape(self._flat)

    def all_at_once(self) -> LoneSweep | None:
        """What takes all of them back with few operators; None where that cannot be, or does not pay."""
        asked, grid = self._asked, self._asked.grid
        if not goes_by_rows(asked.problem, asked.n_steps, self.times.jump_end is not None):
            return None
        plain = Linearizer(self._f, self._inputs, asked.wants[3:], asked.moving)
        tensors = (self.states, self._slopes, grid.t, grid.h)
        return LoneSweep.make(asked.problem, self._f, plain, tensors, self._inputs, self._stages_bar)

    def _stages_bar(self, k: int) -> Tensor | None:
        return _both(self.samples.stages_bar(k), self._kept.get(k))

    def cotangents(self, k: int) -> list[Tensor | None]:
        """Of the stages of step ``k``, but by way of the steps behind it."""
        out = self._stages_bar(k)
        return [] if out is None else list(self.inner(out).unbind())

    def back(self, k: int, bar: Tensor, k_bar: list[Tensor | None]) -> tuple[StepCotangents, Callable[[Tensor], Any]]:
        """Step ``k`` taken back; and the slope at its start, for a cotangent of it that no step takes over."""
        plan, problem, recall, grid = self.plan, self._asked.problem, self._recall, self._asked.grid
        linearize, method, size = self.linearize, plan.method, self._sizes[k]
        linearize.check_next = self._checked
        y = self.states[k] if recall is None else recall[k].reshape(self._flat) if self.implicit else recall[k]
        if self.watched:
            plan.monitor.adjoint(float(grid.t[k, 0]), y, float(grid.h[k, 0]), bar)
        at = stage_times(plan, self.times.step(k), plan.real)[0] if self._stage_t is None else self._stage_t[k]
        if self.implicit:
            linearize.begin_step(k, at, size)
        elif self._rows > 1:
            size = widened(size, y.shape[-1])
        if method.adjoint_step is not None:
            result = method.adjoint_step(linearize, at, size, y, bar, k_bar, self._asked.moving)
        else:
            result = recorded_adjoint(problem, linearize, at, size, y, bar, k_bar, self._asked.moving)
        return result, lambda own: linearize(at[0], y)[1](own)


def _one_by_one(asked: Asked, steps: _Steps) -> tuple[Tensor | None, ...]:
    """`eager_sweep` of one-step methods, a step after the other."""
    grid, samples, times, inner, n_steps = asked.grid, steps.samples, steps.times, steps.inner, asked.n_steps
    _, samples_bar, states_bar, _ = asked.bars
    bar, final_bar = torch.zeros_like(steps.states[0]), asked.final_bar
    if final_bar is not None:
        bar = bar + inner(final_bar)
    t_bars, h_bars = torch.zeros_like(grid.t), torch.zeros_like(grid.t)
    k_bar = steps.cotangents(n_steps - 1) if n_steps else []
    for k in reversed(range(n_steps)):
        if states_bar is not None:
            bar = bar + inner(states_bar[k + 1])
        end = samples.at_end(k)
        if end is not None:
            bar = bar + inner(end)
        below = steps.cotangents(k - 1) if k else []
        if steps.hands_over and below:
            k_bar = [_both(k_bar[0] if k_bar else None, below.pop()), *k_bar[1:]]
        result, slope = steps.back(k, bar, k_bar)
        start = samples.at_start(k)
        bar = result.y if start is None else result.y + inner(start)
        if result.first is not None:
            # of the slope that the step began with: what the step before handed on, or behind a jump and at the start f itself
            anew = None if k == 0 else times.anew(k)
            if k:
                handed = result.first if anew is None else torch.where(anew.unsqueeze(-1), 0.0, result.first)
                below = below or [None] * steps.plan.method.n_stages
                below[-1] = _both(below[-1], handed)
            if k == 0 or anew is not None:
                own = result.first if anew is None else torch.where(anew.unsqueeze(-1), result.first, 0.0)
                u, time_bar = slope(own)
                bar = bar + u
                if time_bar is not None:
                    t_bars[k] += time_bar
        if asked.moving:
            samples.add_time_bars(k, [steps.outer(x) for x in result.stages], t_bars[k], h_bars[k])
            if result.t is not None:
                t_bars[k] += result.t
            if result.h is not None:
                h_bars[k] += result.h
        k_bar = below
    if states_bar is not None:
        bar = bar + inner(states_bar[0])
    if n_steps == 0 and samples_bar is not None:
        bar = bar + inner(samples_bar.sum(0))
    asked.problem.backward_report(steps.linearize.n_fun, n_steps)
    of_anchors = anchors_bar(asked.anchors, grid, t_bars, h_bars) if asked.wants[0] else None
    return asked.answer(of_anchors, samples.t_eval_bar, steps.outer(bar), steps.linearize.bars)


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _by_rows(asked: Asked, steps: _Steps, lone: LoneSweep) -> tuple[Tensor | None, ...]:
    """`eager_sweep` where all steps are linearised at once."""
    grid, samples, states_bar, n_steps = asked.grid, steps.samples, asked.bars[2], asked.n_steps
    bar, final_bar = torch.zeros_like(steps.states[0]), asked.final_bar
    bar, t_bars, h_bars = lone.run(
        bar if final_bar is None else bar + final_bar,
        lambda k: _both(samples.at_end(k), None if states_bar is None else states_bar[k + 1]),
        samples.at_start,
    )
    if states_bar is not None:
        bar = bar + states_bar[0]
    of_anchors = None
    if t_bars is not None and h_bars is not None:
        for k in range(n_steps):
            samples.add_time_bars(k, list(grid.stages[k].unbind()), t_bars[k], h_bars[k])
        of_anchors = anchors_bar(asked.anchors, grid, t_bars, h_bars) if asked.wants[0] else None
    asked.problem.backward_report(lone.linearize.n_fun, n_steps)
    return asked.answer(of_anchors, samples.t_eval_bar, bar, lone.linearize.bars)
