"""What belongs to a row, laid out beside its state."""

from __future__ import annotations

from torch import Tensor

__all__ = ["widened"]

#: widest state beside which what belongs to a row is spread out
_NARROW = 4


def widened(x: Tensor, width: int) -> Tensor:
    """``(B, 1)``, or ``(B, width)`` for a few columns: there operators that broadcast take several times as long as those that need not."""
    return x.expand(-1, width).contiguous() if 1 < width <= _NARROW else x
