"""What autograd asks of a node beside its derivative: many cotangents at once, forward mode within forward mode, views.

Many cotangents come with ``is_grads_batched=True``, which ``torch.autograd.functional.jacobian(vectorize=True)`` asks for. All of this is
here, and not with the other tools for transforms, because this folder imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor

from ..torch_internals import (
    TransformType,
    is_legacy_batchedtensor,
    legacy_add_batch_dim,
    legacy_remove_batch_dim,
    peek_interpreter_stack,
    retrieve_current_functorch_interpreter,
    set_fwd_grad_enabled,
    unwrap_for_grad,
    vmapmode_decrement_nesting,
    vmapmode_increment_nesting,
    wrap_for_grad,
)

__all__ = ["below_jvp", "copy_by_copy", "unviewed"]

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


@contextmanager
def below_jvp() -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """For the body of a node's ``jvp``: run it one transform further out, and give the functions that carry
    tensors down (inside) and back up (after the context has ended).

    PyTorch runs this body with forward mode off, at the level of the ``torch.func.jvp`` that asked. An outer forward-mode transform
    would then see no tangents, and nested forward mode would silently lose terms.
    """
    top = peek_interpreter_stack()
    if top is None or top.key() != TransformType.Jvp:
        yield _same, _same
        return
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    with interpreter.lower(), torch.enable_grad(), set_fwd_grad_enabled(True):
        yield lambda x: unwrap_for_grad(x, level), lambda x: wrap_for_grad(x, level)


def _same(x: Tensor) -> Tensor:
    return x


def unviewed(x: Tensor) -> Tensor:
    """An output of a node's ``forward`` without what it is a view of: PyTorch asks that tangents of views are laid out as these are, and
    fails an internal assertion where they are not."""
    return x.data if x._is_view() else x
