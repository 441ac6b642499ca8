"""Derivatives by compiled code, of a solve that was by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid
from ..native.entry import Sought
from ..native.second import Along
from ..system.transforms import anywhere, functorch_active
from ..torch_internals import Node, by_copies
from .asked import Asked, all_finite, anchors_bar
from .discrete import eager_sweep
from .problem import Problem, interpolate, kept_steps

__all__ = ["Second", "by_native", "native_sweep", "second_by_native", "takes_second", "tangents_by_native"]


class Second(NamedTuple):
    """Of the gradient ``g`` that a way back gives, a function of first state, inputs and cotangents: the derivatives of ``<g, z'>`` by
    these, which are by the first two second derivatives times ``z'``, and by the cotangents of ``final, samples, states`` tangents."""

    y0: Tensor
    inputs: list[Tensor | None]
    bars: list[Tensor | None]


def native_sweep(asked: Asked) -> tuple[Tensor | None, ...]:
    """As `eager_sweep`."""
    found = by_native(asked)
    return eager_sweep(asked) if found is None else found


def by_native(asked: Asked, slots: int | None = None) -> tuple[Tensor | None, ...] | None:
    """As `eager_sweep`; None where that is to do it. ``slots``: the grid has the first state alone, and as many of the others as that exist
    at a time."""
    problem, grid, anchors, t_eval, inputs, bars, wants = asked
    plan, timed = problem.plan, asked.moving
    empty = anchors[0] == anchors[-1]
    if problem.idle is not None and problem.idle.shape == empty.shape:
        empty = empty & ~problem.idle
    if (timed or bars[3] is not None) and bool(empty.any()):
        # a span of no length has a step of no length, whose derivatives in the times, and of its slopes, are those of any step
        return None
    n_steps = grid.t.shape[0]
    stages_bar = bars[3]
    if stages_bar is not None and 0 < len(stages_bar) < n_steps:
        # of the steps with events alone
        kept = torch.tensor(kept_steps(plan, grid.event_step, n_steps), device=stages_bar.device)
        bars = (*bars[:3], stages_bar.new_zeros(n_steps, *stages_bar.shape[1:]).index_copy(0, kept, stages_bar.detach()))
    found = problem.native.backward(plan, grid, anchors, t_eval, len(inputs), bars, timed, slots)
    if found is None:
        return None
    bar, of_inputs = found
    problem.backward_report(n_steps * len(plan.method.nodes), n_steps)
    return (
        anchors_bar(anchors, grid, bar.t, bar.h) if wants[0] else None,
        bar.t_eval if wants[1] and len(bar.t_eval) else None,
        bar.y0 if wants[2] else None,
        *(x if want else None for x, want in zip(of_inputs, wants[3:], strict=True)),
    )


def takes_second(asked: Asked) -> bool:
    """Whether `second_by_native` may have second derivatives, as far as can be told without code for them."""
    return not asked.moving and asked.bars[3] is None and _has_tangents(asked.problem, asked.grid)


def _has_tangents(problem: Problem, grid: Grid) -> bool:
    found = problem.native.recognised
    return found is not None and problem.sweep is None and found.program.has_tangents and not anywhere(grid.status < 0)


class _Copies(Node):
    """``apply(function, *tensors)``: what ``function`` gives for these, below maps for one copy after the other. It has no derivative."""

    @staticmethod
    def forward(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], function: Any, *tensors: Tensor | None) -> Any:
        return by_copies(partial(_Copies.apply, function), tensors, in_dims[1:], info.batch_size)


def _by_copies(function: Callable[..., Sequence[Tensor | None] | None], *tensors: Tensor | None) -> list[Tensor | None] | None:
    """What ``function`` gives, which takes and gives tensors below all maps; None where it gives none."""
    if not functorch_active():
        found = function(*tensors)
        return None if found is None else list(found)
    there: list[bool] = []

    def known(*xs: Tensor | None) -> tuple[Tensor, ...]:
        found = function(*xs)
        if found is None:
            raise _NothingFound
        there[:] = [x is not None for x in found]
        return tuple(x for x in found if x is not None)

    try:
        values = iter(_Copies.apply(known, *tensors))
    except _NothingFound:
        return None
    return [next(values) if one else None for one in there]


class _NothingFound(Exception):
    pass


def _beside(
    problem: Problem, grid: Grid, anchors: Tensor, inputs: Sequence[Tensor], y0_dot: Tensor | None, inputs_dot: Sequence[Tensor | None]
) -> Along | None:
    y0 = grid.states[0]
    sought = Sought(problem.plan, problem.system, problem.batched, inputs, y0, anchors)
    found = problem.native.beside(sought, grid, torch.zeros_like(y0) if y0_dot is None else y0_dot, inputs_dot)
    return found if found is not None and bool(torch.isfinite(found.final).all()) else None


def _samples_beside(problem: Problem, grid: Grid, t_eval: Tensor, beside: Along) -> Tensor:
    """Tangents of the samples (T, B, n)."""
    return interpolate(problem.plan, beside.states, beside.stages, grid.t, grid.h, t_eval, grid.sample_step)


def tangents_by_native(
    problem: Problem, grid: Grid, anchors: Tensor, t_eval: Tensor | None, inputs: Sequence[Tensor], dots: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """As `sweep.tangents`; None where that is to do it."""
    anchors_dot, t_eval_dot, y0_dot, *inputs_dot = dots
    if anchors_dot is not None or t_eval_dot is not None or not _has_tangents(problem, grid):
        return None

    def found(y0_dot: Tensor | None, *inputs_dot: Tensor | None) -> tuple[Tensor, ...] | None:
        beside = _beside(problem, grid, anchors, inputs, y0_dot, inputs_dot)
        if beside is None:
            return None
        final, n_steps = beside.final, grid.t.shape[0]
        if t_eval is None or not t_eval.shape[0] or not n_steps:
            samples = final.expand(0 if t_eval is None else t_eval.shape[0], *final.shape)
        else:
            samples = _samples_beside(problem, grid, t_eval, beside)
        kept = beside.stages[kept_steps(problem.plan, grid.event_step, n_steps)]
        return final, samples, beside.states, kept

    with torch.no_grad():
        return _by_copies(found, y0_dot, *inputs_dot)  # type: ignore[return-value]


def second_by_native(asked: Asked, y0_dot: Tensor | None, inputs_dot: Sequence[Tensor | None], outputs: bool) -> Second | None:
    """Second derivatives in the direction of a first state and inputs (None: zero); None where they are to be had in another way.
    ``outputs``: whether tangents are wanted too."""
    if not takes_second(asked):
        return None
    count = len(asked.bars)

    def found(y0_dot: Tensor | None, *rest: Tensor | None) -> tuple[Tensor | None, ...] | None:
        second = _second(asked._replace(bars=rest[:count]), y0_dot, rest[count:], outputs)
        return None if second is None else (second.y0, *second.inputs, *second.bars)

    with torch.no_grad():
        y0, *rest = _by_copies(found, y0_dot, *asked.bars, *inputs_dot) or (None,)
    return None if y0 is None else Second(y0, rest[:-count], rest[-count:])


def _second(asked: Asked, y0_dot: Tensor | None, inputs_dot: Sequence[Tensor | None], outputs: bool) -> Second | None:
    problem, grid, anchors, t_eval, inputs, bars, wants = asked
    beside = _beside(problem, grid, anchors, inputs, y0_dot, inputs_dot)
    found = None if beside is None else problem.native.second(beside, anchors, t_eval, len(inputs), bars[:3])
    if beside is None or found is None or not all_finite([found[0], *found[1]]):
        return None
    dots: list[Tensor | None] = [None] * len(bars)
    if outputs:
        samples = None if bars[1] is None or t_eval is None else _samples_beside(problem, grid, t_eval, beside)
        dots = [beside.final, samples, beside.states, None]
    problem.backward_report(2 * len(grid.t) * len(problem.plan.method.nodes), len(grid.t))
    return Second(found[0], [x if want else None for x, want in zip(found[1], wants[3:], strict=True)], dots)
