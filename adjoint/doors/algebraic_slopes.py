"""Slopes of algebraic variables, which no equation names: those that keep the constraints.

Along a solution of ``F(t, y, y') = 0`` the derivative of the equations is zero, ``F_y' y'' + F_y y' + F_t = 0``. Where the rows of ``N``
are left null vectors of ``F_y'``, and the columns of ``V`` right ones, ``y' + V c`` satisfies ``F`` too for any ``c``, and

    N (F_y (y' + V c) + F_t) = 0

has one solution ``c`` for index 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..sensitivity.products import vjp
from ..system.system import StateSpec

__all__ = ["with_algebraic_slopes"]

#: relative sizes that count as zero
_ZERO = 1e-9
#: unknowns beyond which full matrices take too long for what is asked
_MOST = 200


def with_algebraic_slopes(
    residual: Callable[..., Any], point: tuple[Tensor, Any, Any], args: tuple[Any, ...], spec: StateSpec
) -> Any:
    """The slopes at a ``point`` ``(t, y, y')`` at which ``residual(t, y, y', *args)`` is zero, without derivatives. Of complex states, and
    of many unknowns, they are as they were."""
    t, y, yp = point
    leaves, tree = tree_flatten(y)
    count, n = len(leaves), sum(spec.sizes)
    if spec.holds_complex or n > _MOST:
        return yp

    def flat(time: Tensor, *both: Tensor) -> Tensor:
        out = residual(time, tree_unflatten(list(both[:count]), tree), tree_unflatten(list(both[count:]), tree), *args)
        return torch.cat([x.reshape(spec.rows, -1) for x in tree_leaves(out)], -1)

    with torch.enable_grad():
        out, pull = vjp(flat, t.detach().to(spec.real_dtype), *leaves, *tree_leaves(yp))
    rows = []
    for one in torch.eye(n, dtype=out.dtype, device=out.device):
        time, *bars = (x.detach() for x in pull(one.expand_as(out)))
        parts = [spec.flatten(tree_unflatten(part, tree)) for part in (bars[:count], bars[count:])]
        rows.append(torch.cat([time.reshape(-1, 1).to(out.dtype).expand(spec.rows, 1), *parts], -1))
    whole = torch.stack(rows, -2)
    whole = torch.where(torch.isfinite(whole).all(-1, keepdim=True).all(-2, keepdim=True), whole, 0.0)
    E, G = whole[..., 1 + n :], whole[..., 1 : 1 + n]
    # in units of their own: a large rate in an equation does not make its slopes small
    size = E.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, G.abs().amax(-1, keepdim=True))
    size = torch.where(size > 0, size, 1.0)
    E, G, F = E / size, G / size, whole[..., :1] / size
    left, sizes, right = torch.linalg.svd(E)
    none = sizes <= _ZERO * sizes[..., :1].clamp(min=torch.finfo(sizes.dtype).tiny)
    N, V = (left * none.unsqueeze(-2)).mT, right.mT * none.unsqueeze(-2)
    slopes = spec.flatten(yp).detach().unsqueeze(-1)
    moved = V @ (torch.linalg.pinv(N @ G @ V, rtol=_ZERO) @ (N @ (G @ slopes + F)))
    return spec.unflatten((slopes - moved).squeeze(-1))
