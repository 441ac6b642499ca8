"""What solves of one trajectory do otherwise than those of many, because operators cost more than their arithmetic there."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..linalg.dense import SmallFactors, as_numpy
from ..methods.tableaux_rosenbrock import RosenbrockTableau
from .plan import Plan, rms_norm

__all__ = ["row_norm", "small_linear_stages"]


def row_norm(plan: Plan) -> Callable[[Tensor], float]:
    """The norm of the plan for one state of any shape, as a number."""
    if plan.norm is rms_norm:
        norm = torch.linalg.vector_norm
        return lambda x: norm(x).item() * max(x.numel(), 1) ** -0.5
    return lambda x: float(plan.norm(x.reshape(1, -1)))


def small_linear_stages(
    f: Callable[[Tensor, Tensor], Tensor],
    factors: SmallFactors,
    tableau: RosenbrockTableau,
    rows: tuple[list[np.ndarray], list[np.ndarray], np.ndarray],
    times: Sequence[Tensor],
    size: float,
    y: Tensor,
    k1: Tensor,
    slope: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """The step of `Rosenbrock.step` by NumPy and LAPACK; ``rows``: those of the tableau as arrays."""
    a, coupling, b = rows
    start, first, moving = as_numpy(y.reshape(-1)), as_numpy(k1.reshape(-1)), as_numpy(slope.reshape(-1)) * size
    ks = np.empty((len(b), len(start)), dtype=start.dtype)
    values = []
    for i, same in enumerate(tableau.same_as):
        if i == 0:
            value = first
        elif same < i:
            value = values[same]
        else:
            point = start + (a[i][:i] @ ks[:i]) * size
            value = as_numpy(f(times[i], torch.from_numpy(point.astype(start.dtype, copy=False)).reshape(y.shape)).reshape(-1))
        values.append(value)
        side = value + coupling[i][:i] @ ks[:i] if i else value
        if tableau.d[i]:
            side = side + moving * tableau.d[i]
        ks[i] = factors.solve_one((side * tableau.gamma).astype(start.dtype, copy=False))
    end = (start + (b @ ks) * size).astype(start.dtype, copy=False)
    return torch.from_numpy(end).reshape(y.shape), list(torch.from_numpy(ks).reshape(-1, *y.shape).unbind())
