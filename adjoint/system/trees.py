"""Leaves of pytrees, quickly where they are tensors and numbers in tuples and lists: PyTorch's own walk takes as long as several operators,
and a solve makes a dozen of them."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["leaves_of", "mapped"]

_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, bool, NoneType, str, torch.dtype, torch.device})


def leaves_of(tree: Any) -> list[Any]:
    """``tree_leaves(tree)``."""
    kind = type(tree)
    if kind in _PLAIN:
        return [tree]
    if kind is tuple or kind is list:
        return [leaf for part in tree for leaf in leaves_of(part)]
    return tree_leaves(tree) if kind is not dict or tree else []


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree_map(function, tree)``."""
    kind = type(tree)
    if kind in _PLAIN:
        return function(tree)
    if kind is tuple or kind is list:
        return kind([mapped(function, part) for part in tree])
    if kind is dict:
        return {key: mapped(function, part) for key, part in tree.items()}
    return tree_map(function, tree)
