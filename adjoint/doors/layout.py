"""How parameters of any structure map to a flat vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..errors import InvalidInput

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    """How the user's parameters map to a flat vector."""

    tree: TreeSpec
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, value: Any, what: str) -> Layout:
        """Read the layout; raises `InvalidInput` for anything but real floating tensors."""
        leaves, tree = tree_flatten(value)
        if not leaves:
            raise InvalidInput(f"{what} holds no tensor")
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                got = f"dtype {leaf.dtype}" if isinstance(leaf, Tensor) else f"a {type(leaf).__name__}"
                raise InvalidInput(f"{what} must be a real floating tensor or a pytree of such, got {got}")
        return cls(tree, tuple(x.shape for x in leaves), tuple(x.dtype for x in leaves))

    @property
    def single(self) -> bool:
        """Whether it is one tensor."""
        return self.tree.is_leaf()

    def flatten(self, value: Any, what: str) -> Tensor:
        """``(m,)``; raises `InvalidInput` where the layout differs."""
        leaves, tree = tree_flatten(value)
        if tree != self.tree or any(not isinstance(x, Tensor) or x.shape != s for x, s in zip(leaves, self.shapes, strict=True)):
            got = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in leaves]
            raise InvalidInput(f"{what} must be like the parameters, {[tuple(s) for s in self.shapes]}, got {got}")
        return torch.cat([x.reshape(-1) for x in leaves])

    def unflatten(self, flat: Tensor) -> Any:
        """``(m,)`` to the user's structure."""
        sizes = [s.numel() for s in self.shapes]
        leaves = [x.reshape(s).to(d) for x, s, d in zip(flat.split(sizes), self.shapes, self.dtypes, strict=True)]
        return tree_unflatten(leaves, self.tree)
