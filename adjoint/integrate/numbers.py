"""Decisions and measures of one trajectory, Python's own, and of many, tensors ``(B,)``.

The rules of a solve (where a step ends, whether it is accepted, when an iteration has converged) are written once, with what is here in the
place of Python's operators where the two differ. Decisions are joined by ``&`` and ``|``, which serve both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Decision",
    "Measure",
    "absent",
    "added",
    "along",
    "any_of",
    "any_of_each",
    "at_least",
    "at_most",
    "choose",
    "choose_states",
    "column",
    "entry",
    "finite",
    "highest",
    "larger",
    "less",
    "lifted",
    "lost",
    "lowered",
    "negated",
    "precise",
    "product",
    "read",
    "same",
    "unset",
    "widened",
]

#: a flag, or a mask ``(B,)``
Decision = Any
#: a float, or ``(B,)``
Measure = Any
#: widest state beside which what belongs to a row is spread out
_NARROW = 4


def choose(on: Decision, new: Any, old: Any) -> Any:
    """``new`` where ``on``, else ``old``."""
    # a test for Python's own flags is the quicker one, and these functions are called some fifty times a step
    return new if on is True else old if on is False else torch.where(on, new, old)


def choose_states(on: Decision, new: Any, old: Any) -> Any:
    """`choose` of states ``(B, n)``."""
    return new if on is True else old if on is False else torch.where(on.unsqueeze(-1), new, old)


def negated(x: Decision) -> Decision:
    """Not."""
    return (not x) if type(x) is bool else ~x


def finite(x: Measure) -> Decision:
    """Neither infinite nor NaN."""
    return math.isfinite(x) if type(x) is float else torch.isfinite(x)


def unset(x: Measure) -> Decision:
    """NaN, which stands for no number."""
    return x != x if type(x) is float else torch.isnan(x)


def absent(x: Decision) -> bool:
    """Whether it is known without waiting for a device that there is none."""
    return x is False


def any_of(x: Decision) -> bool:
    """Whether one of them is so: waits for the device."""
    return x if type(x) is bool else bool(x.any())


def any_of_each(*decisions: Decision) -> list[bool]:
    """`any_of` each, read at once."""
    tensors = [x.any() for x in decisions if isinstance(x, Tensor)]
    return torch.stack(tensors).tolist() if len(tensors) == len(decisions) else [any_of(x) for x in decisions]


def read(like: Decision, *values: Tensor) -> Any:
    """Tensors ``(B,)`` as they are, or as numbers where ``like`` is a flag, all read at once."""
    return values if isinstance(like, Tensor) else torch.cat(values).tolist()


def column(x: Measure, kind: torch.dtype | None = None) -> Any:
    """``(B, 1)`` of ``(B,)``, as numbers of this ``kind``; those of Python are for every shape and kind."""
    return (x if kind is None else x.to(kind)).unsqueeze(-1) if isinstance(x, Tensor) else x


def precise(x: Measure) -> Measure:
    """In double precision, as Python's own numbers are."""
    return x.double() if isinstance(x, Tensor) else x


def widened(x: Tensor, width: int) -> Tensor:
    """``(B, 1)``, or ``(B, width)`` for a few columns: there operators that broadcast take several times as long as those that need not."""
    return x.expand(-1, width).contiguous() if 1 < width <= _NARROW else x


def lowered(like: Decision, x: Tensor) -> Any:
    """A tensor ``(B,)`` as it is, or as a number where ``like`` is a flag."""
    return x if isinstance(like, Tensor) else x.item()


def lifted(x: Any, like: Tensor) -> Tensor:
    """A number as a tensor, which others are already."""
    return x if isinstance(x, Tensor) else torch.full_like(like, x)


def at_least(x: Measure, low: float) -> Measure:
    """The larger one of a measure and a number."""
    return x.clamp(min=low) if isinstance(x, Tensor) else x if x >= low else low


def at_most(x: Measure, high: float) -> Measure:
    """The smaller one of a measure and a number."""
    return x.clamp(max=high) if isinstance(x, Tensor) else x if x <= high else high


def larger(x: Measure, y: Measure) -> Measure:
    """The larger one of two measures."""
    return torch.maximum(x, y) if isinstance(x, Tensor) else x if x >= y else y


def same(x: Any, y: Any) -> bool:
    """Whether two numbers, or two tensors, are the same."""
    return x == y if type(x) is float else torch.equal(x, y)


def along(x: Tensor, slope: Tensor, h: Any) -> Tensor:
    """``x + h slope`` of states; ``h``: a float, or ``(B, 1)``."""
    return torch.add(x, slope, alpha=h) if type(h) is float else x + h * slope


def less(x: Tensor, change: Tensor, on: Decision) -> Tensor:
    """``x - change`` in the trajectories ``on``, of states: of one, in any shape, or ``(B, n)``."""
    return x if on is False else choose_states(on, x - change, x)


def lost(on: Decision, x: Tensor) -> Tensor:
    """States ``x``, in the trajectories ``on`` NaN."""
    return torch.full_like(x, math.nan) if on is True else choose_states(on, math.nan, x)


# ---- tables of differences: ``(M, n)`` of one trajectory, ``(M, B, n)`` of many, and small matrices, ``(B, K, M)`` for these


def product(matrix: Tensor, table: Tensor) -> Tensor:
    """The rows ``(K, n)``, or ``(K, B, n)``, of ``matrix`` times ``table``."""
    return torch.mm(matrix, table) if table.dim() == 2 else torch.einsum("bij,jbn->ibn", matrix, table)


def added(table: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """``x`` added to the rows, with ``weights`` (M,), or (B, M)."""
    return torch.addr(table, weights, x) if table.dim() == 2 else table + torch.einsum("bi,bn->ibn", weights, x)


def entry(table: Tensor, place: Any) -> Tensor:
    """The row at a ``place``; of many at one for each."""
    return table[place] if table.dim() == 2 else table[place, torch.arange(table.shape[1], device=table.device)]


def highest(values: Sequence[Measure], order: Any) -> tuple[Measure, Any]:
    """The largest of ``value_i ** (-1 / (order + i))``, for values no smaller than 1e-30, and which one it is: NaN, if there is one."""
    if isinstance(order, Tensor):
        powers = torch.stack([order + i for i in range(len(values))]).double()
        factors = torch.stack([precise(x) for x in values]).clamp(min=1e-30) ** (-1 / powers)
        return factors.amax(0), factors.argmax(0)
    factors = [max(x, 1e-30) ** (-1 / (order + i)) for i, x in enumerate(values)]
    best = next((i for i, x in enumerate(factors) if x != x), None)
    best = factors.index(max(factors)) if best is None else best
    return factors[best], best
