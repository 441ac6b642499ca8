"""Gradients that are not finite though the solution is: an error that says where they cease to be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import NonFiniteDerivative
from ..integrate.plan import Grid
from ..methods.family import TableauMethod, combine
from ..system.finite import REWRITE, bad_component
from ..system.system import Flat
from .asked import all_finite, visible
from .problem import Problem

__all__ = ["guarded", "raise_not_finite"]


def raise_not_finite(problem: Problem, grid: Grid, inputs: Sequence[Tensor]) -> NoReturn:
    """Raise `NonFiniteDerivative` for cotangents of one trajectory that are not `Asked.sound`."""
    _name(problem, grid, inputs)
    raise NonFiniteDerivative(
        "the gradient of the solution is not finite, though the solution is: derivatives of fun (those in the parameters too) are infinite "
        f"or NaN, or the adjoint grew beyond all numbers on the way back. {REWRITE}."
    )


def guarded(problem: Problem, f: Flat, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> tuple[Flat, Tensor]:
    """``f`` and ``y0`` for a solve that autograd records, whose first cotangents are looked at as `Asked.sound` does. Whatever is not
    finite later in the solve has reached them; a loss that is not finite itself is left alone."""

    def look(bar: Tensor) -> None:
        if visible(problem, (bar,)) and not all_finite((bar,)):
            with torch.no_grad():
                record = problem.run([x.detach() for x in inputs], y0.detach(), anchors.detach(), t_eval)
            _name(problem, Grid.of(record), inputs)

    start = y0
    if y0.requires_grad:
        start = y0.view_as(y0)
        start.register_hook(look)
    fresh = True

    def first_watched(t: Tensor, y: Tensor) -> Tensor:
        nonlocal fresh
        k = f(t, y)
        if fresh:
            fresh = False
            if k.requires_grad and not k.is_leaf:
                k.register_hook(look)
        return k

    return first_watched, start


def _name(problem: Problem, grid: Grid, inputs: Sequence[Tensor]) -> None:
    """Raise with the last point of the solution where a derivative of ``fun`` is not finite; return if there is none."""
    spec, f = problem.system.spec, problem.system.bind(inputs)
    for t, y in _points(problem, grid, inputs):
        culprit = bad_component(f, t, y) if bool(torch.isfinite(y).all()) else None
        if culprit is not None:
            raise NonFiniteDerivative(
                f"{culprit[1]} is not finite at t = {float(t[0]):.8g}, component {spec.component(culprit[0])} of its result, where fun "
                f"itself is: the gradient of the solution would be NaN. {REWRITE}.",
                t=float(t[0]),
                component=culprit[0],
            )


def _points(problem: Problem, grid: Grid, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Times ``(1,)`` and states ``(1, n)`` at which the steps evaluated ``fun``, from the last to the first. Not those of implicit
    equations, and of multistep methods the ends of the steps alone."""
    method, system = problem.plan.method, problem.system
    states, times, sizes = grid.states.detach(), grid.t, grid.h
    tableau: Any = method.tableau if isinstance(method, TableauMethod) else None
    n_steps = len(times)
    if system.residual is not None or len(states) != n_steps + 1:
        return
    real = states.dtype.to_real()
    f = system.bind(inputs)
    for k in reversed(range(n_steps)):
        yield (times[k] + sizes[k]).to(real), states[k + 1]
        seen: list[tuple[Tensor, Tensor]] = []
        h, y = sizes[k].to(real).unsqueeze(-1), states[k]
        if problem.algebra is None and not method.multistep:

            def watched(t: Tensor, y: Tensor, seen: list[tuple[Tensor, Tensor]] = seen) -> Tensor:
                seen.append((t, y))
                return f(t, y)

            with torch.no_grad():
                at = [(times[k] + c * sizes[k]).to(real) for c in method.nodes]
                method.step(watched, at, h, y, f(at[0], y))
        elif tableau is not None and len(grid.stages) == n_steps and not method.additive:
            ks = list(grid.stages[k].detach().unbind())
            for row, c in zip(tableau.a, tableau.c, strict=True):
                seen.append(((times[k] + c * sizes[k]).to(real), combine(y, h, row, ks)))
        yield from reversed(seen)
        yield times[k].to(real), y
