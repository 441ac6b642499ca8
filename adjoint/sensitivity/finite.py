"""Gradients that are not finite though the solution is: an error that says where they cease to be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteDerivative
from ..integrate.plan import Grid
from ..methods.family import TableauMethod, combine
from ..system.finite import COMPONENTS, REWRITE, bad_component
from ..system.ownership import owned
from ..system.system import Flat
from ..system.transforms import functorch_active
from ..torch_internals import dual_level
from .asked import all_finite, visible
from .problem import Problem

__all__ = ["guarded", "tell_not_finite"]

#: so many trajectories of a batch, and numbers in their states, are gone through in the search for the point that is behind it
_ROWS, _NUMBERS = 3, 10_000_000
_NOWHERE = (
    "is not finite, though the solution is: derivatives of fun (those in the parameters too) are infinite or NaN, or the adjoint grew "
    "beyond all numbers on the way back"
)


def tell_not_finite(problem: Problem, grid: Grid, inputs: Sequence[Tensor], y0_bar: Tensor | None) -> None:
    """Name what is behind cotangents that are not `Asked.sound`: of one trajectory it is an error, `NonFiniteDerivative`. In a batch, each
    of which has a gradient of its own, it is a warning. ``y0_bar`` (B, n): where there is one, it tells the trajectories apart."""
    if not problem.batched:
        _name(problem, grid, inputs)
        raise NonFiniteDerivative(f"the gradient of the solution {_NOWHERE}. {REWRITE}.")
    finished = grid.status >= 0
    own = finished if y0_bar is None else finished & ~torch.isfinite(y0_bar).all(-1)
    blamed = y0_bar is not None and bool(own.any())
    if y0_bar is not None and not blamed and not bool(finished.all()):
        # what is not finite within a trajectory reaches its initial state: this belongs to those that failed
        return
    rows = (own if blamed else finished).nonzero()[:_ROWS, 0].tolist()
    try:
        for row in rows:
            _name(problem, grid, inputs, row)
    except NonFiniteDerivative as culprit:
        found = str(culprit)
    else:
        if not blamed and not bool(finished.all()):
            # what belongs to trajectories that failed
            return
        found = f"the gradient of {f'trajectory {rows[0]}' if blamed else 'a batch'} {_NOWHERE}. {REWRITE}."
    warnings.warn(f"{found} So is that of whatever this trajectory shares with others.", RuntimeWarning, stacklevel=2)


def guarded(problem: Problem, f: Flat, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> tuple[Flat, Tensor]:
    """``f`` and ``y0`` for a solve that autograd records, whose first cotangents are looked at as `Asked.sound` does. Whatever is not
    finite later in the solve has reached them; a loss that is not finite itself is left alone."""

    if functorch_active() or dual_level() >= 0:
        return f, y0
    # a tensor that ``fun`` put aside may outlive the problem: nothing is looked at then
    held, told = owned(problem), False

    def look(bar: Tensor) -> None:
        nonlocal told
        if told or not held.alive:
            return
        problem = held()
        if visible(problem, (bar,)) and not all_finite((bar,)):
            with torch.no_grad():
                record = problem.run([x.detach() for x in inputs], y0.detach(), anchors.detach(), t_eval)
            if not problem.batched:
                return _name(problem, Grid.of(record), inputs)
            told = True
            tell_not_finite(problem, Grid.of(record), inputs, bar)

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


def _name(problem: Problem, grid: Grid, inputs: Sequence[Tensor], row: int = 0) -> None:
    """Raise with the last point of the solution ``row`` where a derivative of ``fun`` is not finite; return if none is found."""
    spec, f, left = problem.system.spec, problem.system.bind(inputs), _NUMBERS
    for t, y in _points(problem, grid, inputs):
        left -= y.numel() * min(y.shape[1], COMPONENTS)
        if problem.batched and left < 0:
            return
        culprit = bad_component(f, t, y, row) if bool(torch.isfinite(y[row]).all()) else None
        if culprit is not None:
            many = f" in trajectory {row}" if problem.batched else ""
            raise NonFiniteDerivative(
                f"{culprit[1]} is not finite at t = {float(t[row]):.8g}{many}, component {spec.component(culprit[0])} of its result, where "
                f"fun itself is: the gradient of the solution would be NaN. {REWRITE}.",
                t=float(t[row]),
                trajectory=row if problem.batched else None,
                component=culprit[0],
            )


def _points(problem: Problem, grid: Grid, inputs: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Times ``(B,)`` and states ``(B, n)`` at which the steps evaluated ``fun``, from the last to the first. Not those of implicit
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
