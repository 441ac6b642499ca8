"""The equations of a recorded step, by the kind of its method, and its adjoint by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods.family import StepCotangents
from .additive import RecordedAdditive
from .linearize import vjp
from .problem import Problem
from .stages import RecordedStages, StageLinearizer

__all__ = ["equations", "recorded_adjoint"]


def equations(problem: Problem, inputs: Sequence[Tensor], stages: Tensor | None) -> Any:
    """The right-hand side for one recorded step, whose implicit stages (``stages``: their slopes) are differentiable roots."""
    if problem.algebra is None:
        return problem.system.bind(inputs)
    assert stages is not None
    if problem.plan.method.additive:
        return RecordedAdditive(problem.system, inputs, stages, problem.algebra)
    return RecordedStages(problem.system, inputs, stages, problem.algebra)


def recorded_adjoint(
    problem: Problem,
    linearize: StageLinearizer,
    times: Sequence[Tensor],
    h: float | Tensor,
    y: Tensor,
    end_bar: Tensor,
    k_bar: Sequence[Tensor | None],
    time_bars: bool,
) -> StepCotangents:
    """The adjoint of a step by plain autograd through the step itself, for methods that bring none of their own."""
    method = problem.plan.method
    rows = y.shape[0]
    size = h if isinstance(h, Tensor) else torch.full((rows, 1), h, dtype=y.dtype.to_real(), device=y.device)
    with torch.enable_grad():
        start, length = y.detach().requires_grad_(True), size.detach().requires_grad_(time_bars)
        begin = [t.detach() for t in times]
        moved = torch.zeros(rows, dtype=size.dtype, device=y.device, requires_grad=time_bars)
        if time_bars:
            begin = [t + moved + c * (length - length.detach()).squeeze(-1) for t, c in zip(begin, method.nodes, strict=True)]
        f = equations(problem, linearize.inputs, linearize.recorded[linearize.k])
        y1, ks = method.step(f, begin, length, start, f(begin[0], start))
    outputs, bars = [y1], [end_bar]
    for k, bar in zip(ks, k_bar, strict=False):
        if bar is not None:
            outputs.append(k)
            bars.append(bar)
    times_too = (length, moved) if time_bars else ()
    found = vjp(tuple(outputs), (start, *times_too, *linearize.targets), tuple(bars))
    y_bar, *rest = found
    h_bar = t_bar = None
    if time_bars:
        h_bar, t_bar, *rest = rest
        h_bar = None if h_bar is None else h_bar.sum(-1)
    linearize.accumulate(rest)
    linearize.n_fun += len(ks)
    return StepCotangents(torch.zeros_like(y) if y_bar is None else y_bar, t_bar, h_bar, [k.detach() for k in ks])
