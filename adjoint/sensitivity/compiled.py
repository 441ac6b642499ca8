"""The adjoint of a step under ``torch.compile``, called once per step of the sweep.

Where the inputs of ``fun`` are all known by name (arguments, parameters of a module) the step and its pullback are one graph. Where a
closure captured tensors, the step is compiled with autograd's own backward, which finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..integrate import Plan
from ..integrate.compiled import compiled
from ..methods.runge_kutta import StepCotangents
from ..system import Flat, System
from .linearize import Linearizer, vjp
from .problem import Problem
from .replay import replay_step

__all__ = ["compiled_adjoint_step"]


#: cotangents of the targets, and the stages
_Pulled = tuple[Sequence[Tensor | None], Tensor]


def _timed_step(f: Flat, plan: Plan, t: Tensor, h: Tensor, y: Tensor, dense: bool) -> tuple[Tensor, Tensor]:
    """A step as a function of its start and size, float64, ``(B,)`` or 0-d for a single trajectory."""
    times = [(t + h * c).to(plan.real) for c in plan.method.nodes]
    return replay_step(f, plan, times, h, y, dense)


def _step_pullback(
    system: System,
    plan: Plan,
    wanted: tuple[int, ...],
    timed: bool,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    inputs: tuple[Tensor, ...],
    end_bar: Tensor,
    k_bar: Tensor | None,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Cotangents of ``(y, *wanted inputs)``, behind those of ``(t, h)`` if ``timed``, and the stages. ``k_bar``: of the first stages."""
    dense = timed or k_bar is not None

    def step(*x: Tensor) -> tuple[Tensor, Tensor]:
        start, size, rest = (x[0], x[1], x[2:]) if timed else (t, h, x)
        merged = list(inputs)
        for i, value in zip(wanted, rest[1:], strict=True):
            merged[i] = value
        y1, ks = _timed_step(system.bind_module(merged), plan, start, size, rest[0], dense)
        return y1, ks if timed or k_bar is None else ks[: k_bar.shape[0]]

    primals = (*((t, h) if timed else ()), y, *(inputs[i] for i in wanted))
    (_, ks), pullback, *_ = torch.func.vjp(step, *primals)
    if k_bar is None:
        ks_bar = torch.zeros_like(ks)
    elif timed:
        ks_bar = torch.cat([k_bar, torch.zeros_like(ks[k_bar.shape[0] :])])
    else:
        ks_bar = k_bar
    return pullback((end_bar, ks_bar)), ks


def compiled_adjoint_step(problem: Problem, f: Flat, linearize: Linearizer) -> Callable[..., StepCotangents]:
    """A stand-in for the method's ``adjoint_step``, with start and size of the step in the place of stage times."""
    plan, system = problem.plan, problem.system
    named = isinstance(system, System) and (not system.captured or system.parameter_names is not None)
    step, pull = compiled(_timed_step, plan.compile), compiled(_step_pullback, plan.compile)

    def by_name(t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Tensor | None, timed: bool) -> _Pulled:
        if linearize.check_next:
            linearize(t.to(plan.real), y)
        inputs = tuple(x.detach() for x in linearize.inputs)
        return pull(system, plan, tuple(linearize.wanted), timed, t, h, y, inputs, end_bar, k_bar)

    def by_autograd(t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Tensor | None, timed: bool) -> _Pulled:
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            if timed:
                t, h = t.detach().requires_grad_(True), h.detach().requires_grad_(True)
            y1, ks = step(f, plan, t, h, y, timed or k_bar is not None)
            linearize.check(y1, t, y, h)
            outputs, cotangents = [y1], [end_bar]
            if k_bar is not None:
                outputs.append(ks[: k_bar.shape[0]])
                cotangents.append(k_bar)
        targets = (*((t, h) if timed else ()), y, *linearize.targets)
        return vjp(tuple(outputs), targets, tuple(cotangents)), ks.detach()

    def adjoint(t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Sequence[Tensor | None], time_bars: bool) -> StepCotangents:
        linearize.n_fun += plan.method.n_stages
        stacked = None
        if any(bar is not None for bar in k_bar):
            zero = torch.zeros_like(end_bar)
            stacked = torch.stack([zero if bar is None else bar for bar in k_bar])
        found, ks = (by_name if named else by_autograd)(t, h, y, end_bar, stacked, time_bars)
        t_bar, h_bar, *bars = found if time_bars else (None, None, *found)
        linearize.accumulate(bars[1:])
        stages = list(ks.unbind()) if time_bars else []
        return StepCotangents(torch.zeros_like(y) if bars[0] is None else bars[0], t_bar, h_bar, stages)

    return adjoint
