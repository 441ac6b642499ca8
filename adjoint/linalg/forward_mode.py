"""Forward mode inside of nodes. Here, and not with the other tools for transforms, because this folder imports nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..torch_internals import (
    TransformType,
    peek_interpreter_stack,
    retrieve_current_functorch_interpreter,
    set_fwd_grad_enabled,
    unwrap_for_grad,
    wrap_for_grad,
)

__all__ = ["below_jvp", "unviewed"]


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
