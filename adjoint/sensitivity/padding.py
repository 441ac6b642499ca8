"""What derivatives look at where a trajectory takes no step: steps of size zero, put where nothing can go wrong.

Trajectories of one solve take different numbers of steps, and some none: one that is done, or has failed, goes along with steps of size
zero. Nothing that they give is asked for. But whatever is evaluated for them is summed with the rest, and zero times NaN is NaN: the
derivative of ``fun`` may be infinite where a trajectory ended, and a state that failed may be anything. So these steps are put at the start
of the trajectory's own first step, and at its own start if it had no way to go; only those of a trajectory that failed at once are put at
the start of another one's, of whose parameters ``fun`` may know nothing there. Parameters of its own with which a trajectory failed are in
the way too: see `shelter`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid
from ..system.transforms import anywhere, functorch_active
from .problem import Problem
from .replacements import replacements, without_constants

__all__ = ["Padding", "Shelter", "padding", "shelter"]

Found = tuple[Tensor | None, ...]


class Padding(NamedTuple):
    """``still`` (K, B): steps in which the trajectory does nothing. ``source`` (B,): whose first step stands in for them, another one's
    where it failed and has none, which are those ``unborn`` (B,). ``busy`` (): who takes most steps."""

    still: Tensor
    source: Tensor
    unborn: Tensor
    busy: Tensor

    def first(self, x: Tensor) -> Tensor:
        """``x`` (B, ...) of the trajectories that stand in."""
        return x.index_select(0, self.source)

    def slopes(self, stages: Tensor) -> Tensor:
        """Recorded slopes (K, S, B, n) with those of the steps that stand in."""
        return torch.where(self.still[:, None, :, None], stages[0].index_select(1, self.source), stages)

    def start(self, y0: Tensor) -> Tensor:
        """Initial states (B, n) with others in the place of those from which no step was taken."""
        return torch.where(self.unborn.unsqueeze(-1), self.first(y0.detach()), y0)


def padding(grid: Grid) -> Padding | None:
    """From sizes and landings of all steps, and how they ended; None where no trajectory waits for another one. A step over a span of no
    length lands, others of size zero are padding: those of multistep methods over such a span too."""
    h = grid.h
    if not h.shape[0] or (h.shape[1] == 1 and not functorch_active()):
        return None
    still = (h == 0) & ~grid.lands
    count = (~still).sum(0)
    unborn, busy = (count == 0) & (grid.status < 0), count.argmax()
    place = torch.arange(count.shape[0], device=h.device)
    return Padding(still, torch.where(unborn, busy, place), unborn, busy)


class Shelter(NamedTuple):
    """What a sweep through recorded steps is given: the ``problem``, the ``grid`` with its ``sizes``, and the ``inputs``.

    ``replaced``: the entries of inputs in whose place others were put, None for none; ``dead`` (B,): trajectories that failed;
    ``unborn``: those of them without a step. Both None where there is none. ``part``: whether this is a round of a longer solve.
    """

    problem: Problem
    grid: Grid
    inputs: Sequence[Tensor]
    replaced: Sequence[Tensor | None]
    dead: Tensor | None = None
    unborn: Tensor | None = None
    part: bool = False

    def marked(self, found: Found, bars: Sequence[Tensor | None]) -> Found:
        """Cotangents of ``(anchors, t_eval, y0, *inputs)`` with NaN where they are of a trajectory that failed: at once, or with a loss
        on what it did not get to. Of one that fails at once in a later round the first is no reason: the rounds before it, in which
        it has its part of what is shared, end in numbers."""
        if self.dead is None or self.unborn is None:
            return found
        anchors, t_eval, y0, *rest = found
        final_bar, samples_bar, states_bar, stages_bar = bars
        lost = torch.zeros_like(self.dead) if self.part else self.unborn
        if final_bar is not None:
            lost = lost | (self.dead & (final_bar != 0).any(-1))
        if samples_bar is not None and samples_bar.shape[0]:
            missing = (self.grid.sample_step < 0) & (samples_bar != 0).any(-1)
            lost = lost | (self.dead & missing.any(0))
        # of a trajectory without a step there is its start alone
        for bar in (None if states_bar is None else states_bar[1:], None if stages_bar is None else stages_bar.flatten(0, 1)):
            if bar is not None and bar.shape[0]:
                lost = lost | (self.unborn & (bar != 0).any(-1).any(0))
        y0 = None if y0 is None else torch.where(lost.unsqueeze(-1), float("nan"), y0)
        rest = [x if x is None or mask is None else torch.where(mask, float("nan"), x) for x, mask in zip(rest, self.replaced, strict=True)]
        return (anchors, t_eval, y0, *rest)

    def still_dots(self, dots: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Tangents of inputs: what was put in their places does not move."""
        return [x if x is None or mask is None else torch.where(mask, 0.0, x) for x, mask in zip(dots, self.replaced, strict=True)]


def shelter(problem: Problem, grid: Grid, t_eval: Tensor | None, inputs: Sequence[Tensor]) -> Shelter:
    """A record and inputs with which steps can be taken again, or back, without harm from trajectories that are done or have failed.

    One-step methods are evaluated at the start of a step, of which only the last of ``states`` (K + 1, B, n) is none; multistep
    methods at its end, of which only the first of them is none, and at the start of the first one.

    Where trajectories failed, their own parts of the inputs (those with an entry for each trajectory) are replaced by those of another
    one if they are not finite, or if ``fun`` is not finite with them; of implicit methods all of a trajectory that took no step: see
    `replacements`. What ``fun`` captured without a derivative is replaced in the ``problem``.
    """
    pad = padding(grid)
    nothing: list[Tensor | None] = [None] * len(inputs)
    if pad is None:
        return Shelter(problem, replace(grid, sizes=None, moved=None), inputs, nothing)
    grid = _moved_grid(problem, grid, t_eval, pad)
    dead = grid.status < 0
    if not anywhere(dead):
        return Shelter(problem, grid, inputs, nothing)
    given, replaced = inputs, nothing
    if anywhere(~dead):
        donor = torch.where(dead, -1, (~pad.still).sum(0)).argmax()
        values = partial(_points, problem, grid)
        # fun says nothing about the mass matrix, which it does not see; and where steps solve with matrices that need not be regular, a
        # trajectory without a step may have failed for theirs
        more = {"unseen": problem.system.mass, "wholly": None if problem.algebra is None else pad.unborn}
        given, replaced = replacements(problem.system, values, dead, donor, inputs, **more)
        system = without_constants(problem.system, lambda other: _points(replace(problem, system=other), grid, given), dead, donor)
        problem = problem if system is problem.system else replace(problem, system=system)
    return Shelter(problem, grid, given, replaced, dead, pad.unborn, problem.idle is not None)


def _moved_grid(problem: Problem, grid: Grid, t_eval: Tensor | None, pad: Padding) -> Grid:
    h, states, stages, still = grid.h, grid.states, grid.stages, pad.still
    multistep = problem.plan.method.multistep
    moved = _moved(problem, grid, t_eval, still)
    t = pad.first(grid.t[0] + h[0] if multistep else grid.t[0])
    # a map's own trajectory without a step has nobody to tell a size; it counts for nothing, but is divided by
    size = pad.first(h[0])
    size = torch.where(size == 0, h[0].index_select(0, pad.busy.reshape(1)), size)
    sizes = torch.where(still, torch.where(size == 0, 1.0, size), h)
    out = replace(grid, moved=moved, sizes=sizes, t=torch.where(moved, t, grid.t))
    if states.shape[0] == h.shape[0] + 1:
        column = moved.unsqueeze(-1)
        if multistep:
            # the table of differences begins at the first state, where one has been moved from
            states = torch.cat([pad.start(states[0]).unsqueeze(0), torch.where(column, pad.first(states[1]), states[1:])])
        else:
            column = torch.cat([column, torch.zeros_like(column[:1])])
            states = torch.where(column, pad.first(states[0]), states)
    elif states.shape[0] == 1:
        states = pad.start(states[0]).unsqueeze(0)
    if stages.dim() == 4 and stages.shape[0] == h.shape[0]:
        stages = pad.slopes(stages)
    extra = grid.extra
    if extra.numel():
        extra = torch.where(still.unsqueeze(1), extra[0].index_select(-1, pad.source), extra)
    return replace(out, states=states, stages=stages, extra=extra)


def _moved(problem: Problem, grid: Grid, t_eval: Tensor | None, still: Tensor) -> Tensor:
    """Which of the steps are put elsewhere: all, but for the first behind a trajectory's last one where that hands on the cotangent of the
    slope at its end, which samples inside of it have, and its stages where they are outputs."""
    plan = problem.plan
    explicit = problem.algebra is None and not plan.method.multistep
    outputs = plan.keep_stages or bool(plan.events)
    sampled = t_eval is not None and t_eval.shape[0] > 0
    if not (outputs or sampled) or not explicit or plan.method.end_index != len(plan.method.nodes) - 1:
        return still
    last = (~still).sum(0) - 1
    inside = torch.ones_like(last, dtype=torch.bool)
    if t_eval is not None and not outputs:
        place = last.clamp(min=0).unsqueeze(0)
        end = (grid.t.gather(0, place) + grid.h.gather(0, place)).squeeze(0)
        inside = ((grid.sample_step == last) & (t_eval != end)).any(0)
    number = torch.arange(still.shape[0], device=still.device).unsqueeze(-1)
    return still & ~((number == last + 1) & inside & (last >= 0))


def _points(problem: Problem, grid: Grid, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``fun`` where steps start (multistep: and end)."""
    f, real = problem.system.bind(inputs), grid.states.dtype.to_real()
    states, slopes = grid.states, grid.stages
    out = []
    with torch.no_grad():
        for k in range(min(len(grid.t), len(states))):
            y = states[k + 1] if problem.plan.method.multistep else states[k]
            if problem.system.residual is not None:
                y = torch.cat([y, slopes[k][0]], -1)
            out.append(f(grid.t[k].to(real), y))
    return out
