"""Sums of stages, and what the adjoint of a step gives back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Flat", "Linearize", "Pullback", "StepCotangents", "added", "combine", "over", "powers", "row_dot", "update", "weighted_sum"]

Flat = Callable[[Tensor, Tensor], Tensor]
#: ``linearize(t, y) -> (f(t, y), pullback)`` with ``pullback(v) -> (f_y* v, f_t* v or None)``
Pullback = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Linearize = Callable[[Tensor, Tensor], tuple[Tensor, Pullback]]


def combine(y: Tensor, h: float | Tensor, weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """``y + h sum_j weights_j ks_j``; ``h`` is a number, or a tensor that broadcasts against ``y``."""
    if isinstance(h, float):
        for w, k in zip(weights, ks, strict=False):
            if w:
                y = torch.add(y, k, alpha=h * w)
        return y
    total = weighted_sum(weights, ks)
    return y if total is None else _plus(y, h, total)


def update(y: Tensor, h: float | Tensor, weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """As `combine`, but the state is rounded once and not once a stage: in single precision the difference adds up over many steps."""
    total = weighted_sum(weights, ks)
    if total is None:
        return y
    return torch.add(y, total, alpha=h) if isinstance(h, float) else _plus(y, h, total)


def _plus(y: Tensor, h: float | Tensor, total: Tensor) -> Tensor:
    """``y + h total``; where nothing broadcasts in one operator."""
    assert isinstance(h, Tensor)
    return torch.addcmul(y, h, total) if h.shape == y.shape and h.dtype == y.dtype else y + h * total


def weighted_sum(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor | None:
    """``sum_j weights_j ks_j``, or None when all weights are zero."""
    total: Tensor | None = None
    for w, k in zip(weights, ks, strict=False):
        if w:
            total = k * w if total is None else torch.add(total, k, alpha=w)
    return total


def powers(theta: Tensor, count: int, lowest: int = 1) -> Tensor:
    """``count`` powers of ``theta`` from the ``lowest`` (0 or 1) on, ``(*theta.shape, count)``, by products: powers of doubles are slow,
    and second derivatives of PyTorch's at zero are NaN."""
    found = [theta if lowest else torch.ones_like(theta)]
    for _ in range(count - 1):
        found.append(found[-1] * theta)
    return torch.stack(found, dim=-1)


@dataclass(frozen=True)
class StepCotangents:
    """What the adjoint of a step gives back: cotangents of ``y``, of ``t`` and ``h`` per trajectory where asked for, and the stages.

    ``first``: of methods whose first stage is the last one of the step before, the cotangent of that slope, which is not part of ``y``.
    """

    y: Tensor
    t: Tensor | None
    h: Tensor | None
    stages: Sequence[Tensor]
    first: Tensor | None = None


def over(x: Tensor, hd: float | Tensor) -> Tensor:
    """``x / hd``, and zero in rows whose steps have no length."""
    if not isinstance(hd, Tensor):
        return x / hd if hd else torch.zeros_like(x)
    none = hd == 0
    return torch.where(none, 0.0, x / torch.where(none, 1.0, hd))


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Real inner product of every row: ``(B, n), (B, n) -> (B,)``."""
    return (x.conj() * y).real.sum(-1) if x.is_complex() else (x * y).sum(-1)


def added(total: Tensor | None, x: Tensor) -> Tensor:
    """``total + x``, where there is a total already."""
    return x if total is None else total + x
