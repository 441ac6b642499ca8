"""Small operations on values of every trajectory, of shape ``()`` for one and ``(B,)`` for a batch, in front of whatever a state is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..system.capture import readable

__all__ = ["chosen", "forward_fill", "gathered", "no_number", "still", "usable", "wholly_lost", "wide"]


def wide(x: Tensor, like: Tensor) -> Tensor:
    """``x`` with as many dimensions as ``like``, of which it has the leading ones."""
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim()))


def chosen(on: Tensor, new: Any, old: Any) -> Any:
    """``new`` where ``on``, else ``old``: trees of tensors whose leading dimensions are those of ``on``."""
    if on.dim() == 0 and readable(on):
        return new if bool(on) else old
    return tree_map(lambda a, b: torch.where(wide(on, a), a, b), new, old)


def no_number(like: Tensor) -> float | complex:
    """NaN, of complex numbers in both parts: an imaginary part of zero would be a plausible number."""
    return complex(math.nan, math.nan) if like.is_complex() else math.nan


def wholly_lost(x: Tensor) -> Tensor:
    """The same with complex numbers NaN in both parts where they are in one; differentiated as it is."""
    return x + x.new_tensor(no_number(x)).where(x.detach().isnan(), 0.0) if x.is_complex() else x


def usable(tree: Any) -> Any:
    """A tree with copies of tensors of inference mode, outside of it, so that derivatives can be taken."""
    copy = lambda x: isinstance(x, Tensor) and x.is_inference() and not torch.is_inference_mode_enabled()  # noqa: E731
    return tree_map(lambda x: x.clone() if copy(x) else x, tree)


def still(tree: Any) -> Any:
    """A tree of tensors without derivatives, of which derivatives can be taken."""
    return tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, usable(tree))


def forward_fill(on: Tensor, tree: Any) -> Any:
    """``tree`` where ``on``, and constants elsewhere: what the first trajectory that is ``on`` has.

    A function that is asked for all trajectories, and wanted for some, then meets no state that it is not made for.
    """
    if on.dim() == 0:
        return tree
    first = on.to(torch.int64).argmax()
    return chosen(on, tree, tree_map(lambda x: x.detach().index_select(0, first.reshape(1)).expand_as(x), tree))


def gathered(pieces: Sequence[Any], empty: Sequence[Tensor], ragged: bool) -> Any:
    """Trees with leading dimensions ``(E_k, ...)`` one behind the other; ``ragged``: with ``(E_k, B, ...)``, where ``empty`` says in which
    places there is nothing, moved to the end of each trajectory.
    """
    joined = tree_map(lambda *xs: torch.cat(xs), *pieces)
    if not ragged:
        return joined
    gone = torch.cat(list(empty))
    order = torch.argsort(gone.to(torch.uint8), dim=0, stable=True)
    if readable(gone):
        order = order[: int((~gone).sum(0).max()) if gone.numel() else 0]

    def one(x: Tensor) -> Tensor:
        moved = x.gather(0, wide(order, x).expand(*order.shape, *x.shape[order.dim() :]))
        return torch.where(wide(gone.gather(0, order), x), no_number(x), moved)

    return tree_map(one, joined)
