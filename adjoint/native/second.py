"""Tangents of solves by compiled code, and products with their second derivatives.

Steps with an error test have chosen their sizes; along them the equations of `with_tangents` are solved: a step of these is the step of
the state and its tangent. The way back through them from cotangents of the tangent gives both first derivatives, those by the tangents,
and second ones times the direction of the tangent, those by the state and the inputs themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, Plan
from .again import taken_along
from .back import sweep_native
from .memory import in_parts, plain
from .program import Program
from .tangents import apart, together

__all__ = ["Along", "along", "second"]


class Along(NamedTuple):
    """A solve with its tangents beside: the ``grid`` of both, tangents of ``final`` (B, n), of all ``states`` (K + 1, B, n) and ``stages``
    (K, S, B, n), and the inputs of its program; ``plan``: that of both."""

    grid: Grid
    final: Tensor
    states: Tensor
    stages: Tensor
    inputs: list[Tensor]
    plan: Plan


def along(
    program: Program, plan: Plan, grid: Grid, anchors: Tensor, inputs: Sequence[Tensor], y0_dot: Tensor, dots: Sequence[Tensor | None]
) -> Along:
    """Tangents along ``y0_dot`` (B, n) and those of the inputs, None for zero. Raises `Unreadable`, `NoCompiler`."""
    twice, y0, blocks = program.tangential(), plain(grid.states[0]), program.joint or 1
    given = [torch.zeros_like(x) if dot is None else plain(in_parts(dot), program.real) for x, dot in zip(inputs, dots, strict=True)]
    both, start = _of_both(plan, y0), together(y0, plain(y0_dot, program.real), blocks)
    states, stages, final = taken_along(twice, both, grid, anchors, start, [*inputs, *given])
    # of trajectories that have ended nothing is written
    if grid.h.shape[1] > 1:
        states[1:] = torch.where((grid.h == 0).unsqueeze(-1), final, states[1:])
    final, beside, slopes = (apart(x, blocks)[1] for x in (final, states, stages))
    return Along(replace(grid, states=states, stages=stages), final, beside, slopes, [*inputs, *given], both)


def _of_both(plan: Plan, y0: Tensor) -> Plan:
    """The plan of states with tangents, of whose steps there is no choice any more."""
    rtol, atol = (x.expand(y0.shape).repeat(1, 2) if isinstance(x, Tensor) else x for x in (plan.rtol, plan.atol))
    return replace(plan, rtol=rtol, atol=atol, first_step=None, events=(), event_counts=None, switch=None)


def second(
    program: Program, beside: Along, anchors: Tensor, t_eval: Tensor | None, bars: Sequence[Tensor | None]
) -> tuple[Tensor, list[Tensor]]:
    """The second derivatives of the sum of ``final, samples, states``, weighed by the cotangents ``bars``, times the direction of the
    tangents: in the initial state, (B, n), and in every input. Raises `Unreadable`, `NoCompiler`."""
    blocks = program.joint or 1
    wide = [None if bar is None else together(torch.zeros_like(bar), bar, blocks) for bar in map(_plain, bars)]
    found = sweep_native(program.tangential(), beside.plan, beside.grid, anchors, t_eval, beside.inputs, [*wide, None], False)
    return apart(found.y0, blocks)[0], found.inputs[: len(program.own)]


def _plain(x: Tensor | None) -> Tensor | None:
    return None if x is None else plain(x)
