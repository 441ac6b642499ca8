"""The adjoint of a step under ``torch.compile``: the step compiled with its backward, called once per step of the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..integrate import Plan
from ..integrate.compiled import compiled
from ..methods.runge_kutta import StepCotangents
from ..system import Flat
from .discrete import Linearizer, vjp
from .problem import Problem
from .replay import replay_step

__all__ = ["compiled_adjoint_step"]


def _timed_step(f: Flat, plan: Plan, t: Tensor, h: Tensor, y: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """A step as a function of its start and size, float64, ``(B,)`` or 0-d for a single trajectory."""
    times = [(t + h * c).to(plan.real) for c in plan.method.nodes]
    return replay_step(f, plan, times, h, y, dense)


def compiled_adjoint_step(problem: Problem, f: Flat, linearize: Linearizer) -> Callable[..., StepCotangents]:
    """A stand-in for the method's ``adjoint_step``, with start and size of the step in the place of stage times."""
    step = compiled(_timed_step, problem.plan.compile)
    plan = problem.plan
    n_all = len(plan.method.nodes)

    def adjoint(t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Sequence[Tensor | None], time_bars: bool) -> StepCotangents:
        dense = any(bar is not None for bar in k_bar) or time_bars
        linearize.n_fun += plan.method.n_stages
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            if time_bars:
                t, h = t.detach().requires_grad_(True), h.detach().requires_grad_(True)
            y1, ks = step(f, plan, t, h, y, dense)
        linearize.check(y1, t, y, h)
        outputs, cotangents = [y1], [end_bar]
        if dense and any(bar is not None for bar in k_bar):
            outputs.append(ks)
            zero = torch.zeros_like(end_bar)
            cotangents.append(torch.stack([zero if bar is None else bar for bar in [*k_bar, *([None] * (n_all - len(k_bar)))]]))
        targets = (y, t, h, *linearize.targets) if time_bars else (y, *linearize.targets)
        y_bar, *rest = vjp(tuple(outputs), targets, tuple(cotangents))
        t_bar = h_bar = None
        if time_bars:
            t_bar, h_bar, *rest = rest
        linearize.accumulate(rest)
        stages = list(ks.detach().unbind()) if dense else []
        return StepCotangents(torch.zeros_like(y) if y_bar is None else y_bar, t_bar, h_bar, stages)

    return adjoint
