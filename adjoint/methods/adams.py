"""Adams methods: linear multistep formulas on any grid, as weights of the stored slopes.

A step of size ``h`` from ``t`` adds ``h sum_j w_j f_j`` to the state, where ``w`` integrates over [0, 1] the polynomial that
interpolates the slopes ``f_j`` at the places ``c_j`` (in steps from ``t``: 0 the present, negative the past, 1 the end). With the
present and k - 1 past slopes this is the Adams-Bashforth formula of order k; with the end as well, the Adams-Moulton formula of order k
+ 1 (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section III.1; variable steps in section III.5).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["ADAMS_NAMES", "MAX_ORDER", "adams_weights", "differentiable_weights", "exact_weights", "starter"]

#: "fixed_adams" is an old name of "implicit_adams"
ADAMS_NAMES = ("explicit_adams", "implicit_adams", "fixed_adams")
#: beyond this the formulas are of no use: they amplify rounding errors and have next to no stability
MAX_ORDER = 12


@cache
def exact_weights(places: tuple[int, ...]) -> tuple[float, ...]:
    """The weights for integer places, solved in rational arithmetic and rounded once.

    They satisfy ``sum_j w_j c_j**m = 1 / (m + 1)`` for every power up to their number.
    """
    size = len(places)
    rows = [[Fraction(c) ** m for c in places] + [Fraction(1, m + 1)] for m in range(size)]
    for i in range(size):
        pivot = next(r for r in range(i, size) if rows[r][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for r in range(size):
            if r != i and rows[r][i] != 0:
                rows[r] = [x - rows[r][i] * p for x, p in zip(rows[r], rows[i], strict=True)]
    return tuple(float(row[-1]) for row in rows)


def adams_weights(places: Sequence[float]) -> tuple[float, ...]:
    """The weights for any distinct places. Those of an even grid come from `exact_weights`."""
    whole = tuple(round(c) for c in places)
    if all(abs(c - w) < 1e-12 * max(1.0, abs(c)) for c, w in zip(places, whole, strict=True)):
        return exact_weights(whole)
    nodes, rule = _gauss(len(places))
    c = np.asarray(places)
    difference = nodes[:, None] - c
    out = []
    for j in range(len(c)):
        others = np.arange(len(c)) != j
        out.append(float(rule @ np.prod(difference[:, others] / (c[j] - c[others]), axis=1)))
    return tuple(out)


def differentiable_weights(places: Tensor) -> Tensor:
    """The weights, ``(k,)`` float64, as a differentiable function of the places ``(k,)``."""
    size = places.shape[0]
    nodes, rule = (torch.as_tensor(x, dtype=torch.float64, device=places.device) for x in _gauss(size))
    own = torch.eye(size, dtype=torch.bool, device=places.device)
    above = torch.where(own, 1.0, (nodes[:, None] - places)[:, None, :])
    below = torch.where(own, 1.0, places[:, None] - places)
    return rule @ (above.prod(-1) / below.prod(-1))


@cache
def _gauss(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A quadrature rule on [0, 1] that is exact for the polynomials through ``size`` points."""
    nodes, weights = np.polynomial.legendre.leggauss(size // 2 + 1)
    return (nodes + 1) / 2, weights / 2


def starter(order: int) -> tuple[str, int]:
    """The one-step method that begins an Adams method of this order, and with how many slopes it is done.

    Its few steps have local errors of ``h**(q + 1)`` with ``q`` its own order, so ``q >= order - 1`` keeps the order of the whole.
    Above order 9 the starter of order 8 ends at nine slopes and the order of the formula grows step by step from there.
    """
    if order <= 5:
        return "rk4", order
    if order == 6:
        return "dopri5", order
    return "dopri8", min(order, 9)
