"""The discrete adjoint sweep for first derivatives: from the last recorded step to the first, one at a time or many.

Plain reverse mode through ``fun`` at each stage, with one state kept for each step. How steps are taken back is the affair of a `Way`; what
comes in from the loss on it, and what follows from it for the times, is the same for all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..integrate import Monitor
from ..integrate.numbers import widened
from ..methods.family import StepCotangents, TakenStep
from ..system.capture import cut_apart
from ..system.system import System
from .asked import Asked, Linearizer, Losses, anchors_bar, both, in_shelter
from .equations import AdditiveLinearizer, recorded_adjoint
from .multistep_adjoint import BdfByRows, MultistepOneByOne
from .problem import stage_times
from .stages import StageLinearizer
from .steps_as_rows import LoneSweep
from .sweep import look_at_step

if TYPE_CHECKING:
    from .checkpoints import Recall

__all__ = ["eager_sweep"]

#: so many times of stages of many rows are made at once, of a few steps
_AT_ONCE = 16384


class Way(Protocol):
    """How steps are taken back, ``size`` at a time; what is ``carried`` from part to part is its own affair."""

    size: int
    #: counts evaluations of ``fun`` and gathers the cotangents of inputs
    linearize: Any

    def start(self, final_bar: Tensor | None) -> Any:
        """What is carried behind the last step, of which the state has this cotangent ``(B, n)``."""
        ...

    def back(self, part: range, carried: Any, /, t_bars: Tensor, h_bars: Tensor) -> Any:
        """These steps taken back; cotangents of their starts and sizes are added to ``t_bars``, ``h_bars`` (K, B), if asked for."""
        ...

    def begin(self, carried: Any, /) -> tuple[Tensor, Tensor | None]:
        """The cotangent ``(B, n)`` of the first state, and one ``(B,)`` of the start, if there is more than of steps."""
        ...


@in_shelter
def eager_sweep(asked: Asked, recall: Recall | None = None) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples, states, stages)``.

    ``recall``: makes the states and stages that the grid has not; only the first state is looked at there then.
    """
    if recall is None:
        asked.problem.witness.check()
    if asked.problem.plan.method.needs_time_slope and asked.problem.native.recognised is None:
        # the adjoint of a step goes by the derivative of the Jacobian
        look_at_step(asked.problem, asked.grid, asked.inputs, [i for i, want in enumerate(asked.wants[3:]) if want])
    grid, n_steps, losses = asked.grid, asked.n_steps, Losses(asked)
    way = _way(asked, losses, recall)
    t_bars, h_bars = torch.zeros_like(grid.t), torch.zeros_like(grid.t)
    carried = way.start(asked.final_bar)
    for stop in range(n_steps, 0, -way.size):
        carried = way.back(range(max(0, stop - way.size), stop), carried, t_bars, h_bars)
    y0_bar, start_bar = way.begin(carried)
    _, samples_bar, states_bar, _ = asked.bars
    if states_bar is not None:
        y0_bar = y0_bar + states_bar[0]
    if n_steps == 0 and samples_bar is not None:
        y0_bar = y0_bar + samples_bar.sum(0)
    asked.problem.backward_report(way.linearize.n_fun, n_steps)
    of_anchors = anchors_bar(asked.anchors, grid, t_bars, h_bars) if asked.wants[0] else None
    if of_anchors is not None and start_bar is not None:
        of_anchors[0] += start_bar
    return asked.answer(of_anchors, losses.t_eval_bar, y0_bar, way.linearize.bars)


def _way(asked: Asked, losses: Losses, recall: Recall | None) -> Way:
    """Many steps at a time where that can be, and pays; else one."""
    problem = asked.problem
    if problem.plan.method.multistep:
        by_rows = None if problem.algebra is None else BdfByRows.make(asked, losses)
        return MultistepOneByOne(asked, losses) if by_rows is None else by_rows
    many = LoneSweep.make(asked, losses) if recall is None and problem.algebra is not None and problem.alone else None
    return _OneByOne(asked, losses, recall) if many is None else many


class _OneByOne:
    """A `Way` for one-step methods, which linearises each step where it was taken."""

    size = 1

    def __init__(self, asked: Asked, losses: Losses, recall: Recall | None) -> None:
        problem, grid, self._asked, self._recall, self._losses = asked.problem, asked.grid, asked, recall, losses
        system, self.plan = problem.system, problem.plan
        self._inputs = cut_apart(asked.inputs, asked.wants[3:])
        self._f = system.bind(self._inputs)
        self.implicit, self._rows = problem.algebra is not None, grid.t.shape[1]
        given = (self._inputs, asked.wants[3:], asked.moving)
        self._slopes: Any = grid.stages.detach() if recall is None else recall.stages
        self.linearize: Any = Linearizer(self._f, *given)
        if self.plan.method.additive:
            self.linearize = AdditiveLinearizer(problem, self._slopes, *given)
        elif self.implicit:
            self.linearize = StageLinearizer(problem, self._slopes, self._f, *given)
        self.times = asked.times(asked.anchors.detach())
        # of one row all at once, which takes few operators; of many for a few steps, which takes little memory
        self._at_once = asked.n_steps if self._rows == 1 else max(1, _AT_ONCE // (max(1, self._rows) * len(self.plan.method.nodes)))
        self._stage_t: tuple[int, list[list[Tensor]]] = -1, []
        self._shape, self._flat = None if self.implicit else system.natural_shape, grid.states.shape[1:]
        self.states = self._inner(grid.states.detach()).contiguous()
        if self._rows == 1:
            self._sizes: Any = grid.h[:, 0].tolist()
        else:
            self._sizes = grid.h.to(self.states.dtype.to_real()).unsqueeze(-1).unbind()
        self._checked = isinstance(system, System)
        self.watched = self._rows == 1 and type(self.plan.monitor).adjoint is not Monitor.adjoint
        end = self.plan.method.end_index
        # f(t + h, y1) of a step is the first stage of the next, which can take its cotangent over, unless fun jumps in between
        self.hands_over = not self.implicit and end == len(self.plan.method.nodes) - 1 and not asked.moving and self.times.jump_end is None

    def _inner(self, x: Tensor) -> Tensor:
        """``(..., B, n)`` as the steps carry it."""
        return x if self._shape is None else x.reshape((*x.shape[:-2], *self._shape))

    def _outer(self, x: Tensor) -> Tensor:
        """``(B, n)`` of what the steps carry."""
        return x.reshape(self._flat)

    def _cotangents(self, k: int) -> list[Tensor | None]:
        """Of the stages of step ``k``, but by way of the steps behind it."""
        out = self._losses.at_stages(k)
        return [] if out is None else list(self._inner(out).unbind())

    def start(self, final_bar: Tensor | None) -> tuple[Tensor, list[Tensor | None]]:
        """See `Way.start`; what is carried: the cotangents of the state and of the stages before it."""
        bar = torch.zeros_like(self.states[0])
        n_steps = self._asked.n_steps
        return bar if final_bar is None else bar + self._inner(final_bar), self._cotangents(n_steps - 1) if n_steps else []

    def back(self, part: range, carried: Any, t_bars: Tensor, h_bars: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """See `Way.back`."""
        k, (bar, k_bar), losses = part.start, carried, self._losses
        for end in losses.at_end(k):
            bar = bar + self._inner(end)
        below = self._cotangents(k - 1) if k else []
        if self.hands_over and below:
            k_bar = [both(k_bar[0] if k_bar else None, below.pop()), *k_bar[1:]]
        result, slope = self._taken_back(k, bar, k_bar)
        start = losses.at_start(k)
        bar = result.y if start is None else result.y + self._inner(start)
        if result.first is not None:
            # of the slope that the step began with: what the step before handed on, or behind a jump and at the start f itself
            anew = None if k == 0 else self.times.anew(k)
            if k:
                handed = result.first if anew is None else torch.where(anew.unsqueeze(-1), 0.0, result.first)
                below = below or [None] * self.plan.method.n_stages
                below[-1] = both(below[-1], handed)
            if k == 0 or anew is not None:
                own = result.first if anew is None else torch.where(anew.unsqueeze(-1), result.first, 0.0)
                u, time_bar = slope(own)
                bar = bar + u
                if time_bar is not None:
                    t_bars[k] += time_bar
        if self._asked.moving:
            losses.add_time_bars(k, [self._outer(x) for x in result.stages], t_bars[k], h_bars[k])
            if result.t is not None:
                t_bars[k] += result.t
            if result.h is not None:
                h_bars[k] += result.h
        return bar, below

    def begin(self, carried: Any) -> tuple[Tensor, None]:
        """See `Way.begin`."""
        return self._outer(carried[0]), None

    def _stage_times(self, k: int) -> list[Tensor]:
        first = k - k % self._at_once
        if self._stage_t[0] != first:
            self._stage_t = first, stage_times(self.plan, self.times.step(first, self._at_once), self.plan.real)
        return self._stage_t[1][k - first]

    def _taken_back(self, k: int, bar: Tensor, k_bar: list[Tensor | None]) -> tuple[StepCotangents, Callable[[Tensor], Any]]:
        """Step ``k`` taken back; and the slope at its start, for a cotangent of it that no step takes over."""
        plan, problem, recall, grid = self.plan, self._asked.problem, self._recall, self._asked.grid
        linearize, method, size = self.linearize, plan.method, self._sizes[k]
        linearize.check_next = self._checked
        y = self.states[k] if recall is None else recall[k].reshape(self._flat) if self.implicit else recall[k]
        if self.watched:
            plan.monitor.adjoint(float(grid.t[k, 0]), y, float(grid.h[k, 0]), bar)
        at = self._stage_times(k)
        if self.implicit:
            linearize.begin_step(k, at, size)
        elif self._rows > 1:
            size = widened(size, y.shape[-1])
        if method.adjoint_step is not None:
            result = method.adjoint_step(linearize, TakenStep(at, size, y, bar, k_bar, self._asked.moving))
        else:
            result = recorded_adjoint(problem, linearize, at, size, y, bar, k_bar, self._asked.moving)
        return result, lambda own: linearize(at[0], y)[1](own)
