"""Solutions of implicit equations beside a consistent point, to second order: what samples at the start of a span are differentiated by.

The first step may be tiny. Second derivatives of its dense output are made of rounding errors, and of what the iteration for its stages
left. Those of the equations themselves are there without a step: along the solution values stay consistent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..sensitivity import Outputs
from ..sensitivity.consistent import Initial, complete, lost_rows, rtol_of_search
from ..sensitivity.problem import StageAlgebra
from ..sensitivity.products import tangent
from ..system.capture import moves, readable
from ..system.system import System
from .arguments import Times

__all__ = ["consistently", "from_start", "second_order"]

#: consistent values at times (B,), of which the state's differential part is given, and guesses of the rest
Consistent = Callable[[Tensor, Initial], Initial]


def consistently(system: System, algebra: StageAlgebra, inputs: Sequence[Tensor], throw: bool) -> Consistent:
    """Values that satisfy the equations, by the structure that is known of them. Without ``throw`` trajectories that have none stay as they
    are: NaN would reach the others by parameters that they share."""
    structure = algebra.structure
    assert structure is not None
    rtol = rtol_of_search(system.spec.real_dtype)

    def consistent(t: Tensor, at: Initial) -> Initial:
        found = complete(system, algebra, structure, t, at.y, at.yp, inputs, rtol, throw=throw)
        there = torch.isfinite(found.y.detach()).all(-1, keepdim=True)
        return found if throw else Initial(torch.where(there, found.y, at.y), torch.where(there, found.yp, at.yp))

    return consistent


def second_order(consistent: Consistent, t: Tensor, at: Initial) -> tuple[Tensor, Tensor]:
    """``y'`` and ``y''`` (B, n) of the solution through a consistent point, those of algebraic variables too; ``y'`` is differentiable."""
    one = torch.ones_like(t)

    def slope(t: Tensor, y: Tensor) -> Tensor:
        rate = consistent(t, Initial(y, at.yp)).yp
        found: Tensor = tangent(lambda t, y: consistent(t, Initial(y, at.yp)).y, [t, y], [one, rate])
        return found

    first = slope(t, at.y)
    return first, tangent(slope, [t, at.y], [one, first]).detach()


def from_start(out: Outputs, start: Initial, times: Times, real: torch.dtype, consistent: Consistent) -> tuple[Outputs, Tensor]:
    """Samples at the start as functions of its time and their own, and the slopes ``(T, B, n)`` there (of other samples: at the start)."""
    t0, samples = times.anchors[0], times.samples
    assert samples is not None
    slopes = start.yp.expand(samples.shape[0], *start.yp.shape)
    first = (samples == t0).detach()
    if not (moves(samples) or moves(t0)) or (readable(first) and not bool(first.any())):
        return out, slopes
    lost = lost_rows(start)
    at = start if lost is None else lost.replaced(start)
    rate, bend = second_order(consistent, t0.to(real), at)
    way = torch.where(first, samples - t0, 0.0).to(real).unsqueeze(-1)
    curve = start.y + way * (rate + way / 2 * bend)
    return out._replace(samples=torch.where(first.unsqueeze(-1), curve, out.samples)), slopes + way * bend
