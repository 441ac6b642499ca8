"""Many cotangents at once (``is_grads_batched=True``, which ``torch.autograd.functional.jacobian(vectorize=True)`` asks for)."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from ..torch_internals import (
    is_legacy_batchedtensor,
    legacy_add_batch_dim,
    legacy_remove_batch_dim,
    vmapmode_decrement_nesting,
    vmapmode_increment_nesting,
)

__all__ = ["copy_by_copy"]

_Backward = Callable[..., tuple[Tensor | None, ...]]


def _is_mapped(x: Any) -> bool:
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)


def copy_by_copy(backward: _Backward) -> _Backward:
    """The ``backward`` of a node, called for one cotangent after the other: autograd maps it by a vmap of its own from before torch.func,
    which has rules for few operators, and none for compiled code. Derivatives of derivatives are left to that.
    """

    @wraps(backward)
    def call(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not any(map(_is_mapped, bars)):
            return backward(ctx, *bars)
        vmapmode_increment_nesting()
        level = vmapmode_decrement_nesting()
        whole = [legacy_remove_batch_dim(x, level, 1, 0) if x is not None and _is_mapped(x) else x for x in bars]
        size = next(len(x) for x, bar in zip(whole, bars, strict=True) if x is not None and _is_mapped(bar))
        found = [
            backward(ctx, *(x[k] if _is_mapped(bar) else x for x, bar in zip(whole, bars, strict=True)))  # type: ignore[index]
            for k in range(size)
        ]
        return tuple(_as_mapped(xs, level) for xs in zip(*found, strict=True))

    return call


def _as_mapped(copies: tuple[Tensor | None, ...], level: int) -> Tensor | None:
    if all(x is None for x in copies):
        return None
    like = next(x for x in copies if x is not None)
    stacked = torch.stack([torch.zeros_like(like) if x is None else x for x in copies])
    return cast(Tensor, legacy_add_batch_dim(stacked, 0, level))
