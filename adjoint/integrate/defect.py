"""The error of what a step of a differential-algebraic equation hands out between its ends, from the defect of its dense output.

An embedded formula differs from the step's own in what is integrated. It says nothing about variables that a constraint fixes (both
formulas satisfy the constraint at the same points), nor about the polynomial between those points. The equations themselves do: the
residual that the polynomial leaves in them is turned into an error of the state by one linear solve with the factors of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods import Method
from ..methods.family import weighted_sum
from .coupled import CoupledSystem
from .plan import Plan

__all__ = ["NARROW", "NOISE", "Point", "inner_error", "points_of"]

#: where methods are looked at whose stages are no points of their dense output
_THIRDS = (1 / 3, 2 / 3)
#: part of the span below which nothing is resolved: the error of such a step counts as the square of its size
NARROW = 1e-7
#: times the tolerance of the iteration: what is taken for noise in the defect of a constraint, and in its slope
NOISE = 10.0


class Point(NamedTuple):
    """A place in the step: weights of the dense output and of its slope; ``rate``: how much faster the error of the polynomial changes
    at the end of the step, for a step of size one, than it is large here."""

    theta: float
    values: list[float]
    slopes: list[float]
    rate: float


@lru_cache(maxsize=64)
def points_of(method: Method) -> tuple[Point, ...]:
    """Between the nodes of a collocation polynomial, where its error is largest; at thirds of the step else."""
    dense = method.tableau.dense  # type: ignore[attr-defined]
    collocated = method.nodes[1:] if method.collocates and method.nodes[-1] == 1.0 else None
    if collocated is None:
        places = [(theta, 1.0) for theta in _THIRDS]
    else:
        # the error is that of interpolation at 0 and at the nodes
        zeros = (0.0, *collocated)
        end = math.prod(1.0 - c for c in zeros[:-1])
        middles = [(a + b) / 2 for a, b in pairwise(collocated)] or [collocated[0] / 2]
        places = [(theta, end / math.prod(theta - c for c in zeros)) for theta in middles]
    return tuple(
        Point(
            theta,
            [sum(w * theta ** (m + 1) for m, w in enumerate(row)) for row in dense],
            [sum((m + 1) * w * theta**m for m, w in enumerate(row)) for row in dense],
            rate,
        )
        for theta, rate in places
    )


def inner_error(
    f: CoupledSystem, plan: Plan, start: Callable[[float], Tensor], h: Tensor, span: Tensor, y: Tensor, size: Tensor, ks: Sequence[Tensor]
) -> Tensor:
    """The largest error between the ends of the step, ``(B, n)``, in units of the tolerance.

    A defect ``r = F(t, u, u')`` of the dense output is that of an error ``e`` with ``E e' + G e = r``. With ``e / (g h)`` for ``e'``, ``g``
    the coefficient of the method, its solution is ``(E + g h G)^-1 g h r``: exact for variables of index 1, whose error this is whatever
    the step, and bounded for stiff ones. It does not depend on the scale or the order of the equations. Variables of index 2 follow
    from the slope of the others: there ``e'`` is that of the error of a collocation polynomial with this value here, at the end of the
    step, where it is largest (Hairer & Wanner, Solving ordinary differential equations II, sections VI.3 and VII.4).

    Parameters
    ----------
    start : the time ``(B,)`` at a fraction of the step
    h : (B, 1); span : (B,); y : (B, n) at the start; size : (B, n), of the state; ks : the stages
    """
    method = plan.method
    g = method.tableau.gamma  # type: ignore[attr-defined]
    stages, hg = ks[: method.n_stages], h * g
    # a step over a jump of an algebraic variable that nobody named: it shall be small, and no more can be asked
    narrow = (h.squeeze(-1).abs() / (NARROW * span).to(h.dtype).clamp(min=torch.finfo(h.dtype).tiny)).clamp(max=1.0) ** 2
    worst: Tensor | None = None
    for point in points_of(method):
        moved, slope = weighted_sum(point.values, stages), weighted_sum(point.slopes, stages)
        assert moved is not None and slope is not None
        defect = f.residual(start(point.theta), y + h * moved, slope)
        f.work.n_fun += f.running(h)
        error = f.filtered(hg, hg * defect)
        if f.power is not None:
            error = error + _of_index_two(f, plan, hg, (1.0 - g * point.rate), error, size)
        error = plan.scaled(error, size).abs()
        worst = error if worst is None else torch.maximum(worst, error)
    assert worst is not None
    worst = worst * narrow.unsqueeze(-1)
    return worst if f.skipped is None else torch.where(f.skipped, 0.0, worst)


def _of_index_two(f: CoupledSystem, plan: Plan, hg: Tensor, rest: float, error: Tensor, size: Tensor) -> Tensor:
    """What is to be added to the error of variables of index 2. Their slope is that of the defect of a constraint, divided by ``h``, and so
    is what the iteration leaves in it: tolerance and noise add up, and no smaller step is asked for than one that shows the defect."""
    assert f.power is not None
    high = f.power > 0
    left = f.tolerance * (size * plan.rtol + plan.atol)
    noise = plan.norm(plan.scaled(NOISE * torch.maximum(left, 10 * torch.finfo(size.dtype).eps * size), size))
    seen = plan.norm(torch.where(high, 0.0, plan.scaled(error, size)).abs()).clamp(min=torch.finfo(size.dtype).tiny)
    whole = error + f.filtered(hg, rest * f.mass(torch.where(high, 0.0, error)))
    share = 1.0 + (noise / seen).unsqueeze(-1) * plan.scaled(whole, size).abs()
    return torch.where(high, whole / share - error, 0.0)
