"""Whether a function is later on what it was at a root: its values at a point beside it.

At the root itself a residual is rounding, and a change may leave the root where it is and alter the derivatives alone. At a point beside
it every part of the function counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import SolveError
from ..system.witness import CHANGED, beside, differs

__all__ = ["Fingerprint", "RootWitness"]

#: how far beside the root, as parts of every unknown; a function that is defined at none of these points is looked at in the root
_PARTS = (1e-2, 1e-4, 0.0)


@dataclass(frozen=True)
class Fingerprint:
    """Values of a function beside a point: where they are the same later on, it is the same function of that point's surroundings."""

    points: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def of(cls, function: Callable[..., Any], *points: Tensor) -> Fingerprint:
        """Of ``function(*points)``, which gives a pytree of tensors. Raises what it raises at ``points`` themselves."""
        for part in _PARTS:
            moved = tuple(beside(x, part) if part else x for x in points)
            try:
                values = _values(function, moved)
            except Exception:  # outside of its domain a function may raise whatever it likes
                if part == 0:
                    raise
                continue
            if part == 0 or all(bool(torch.isfinite(x).all()) for x in values):
                break
        return cls(moved, tuple(x.clone() for x in values))

    def again(self, function: Callable[..., Any]) -> list[Tensor]:
        """The values that ``function`` has now."""
        return _values(function, self.points)

    def same(self, function: Callable[..., Any]) -> bool:
        """Whether ``function`` still has these values: to the last bit on the CPU, to rounding where sums are not always taken in one
        order."""
        try:
            again = self.again(function)
        except Exception:  # it did not do so before; who asks next sees why
            return False
        return len(again) == len(self.values) and all(_equal(a, b) for a, b in zip(again, self.values, strict=True))


def _values(function: Callable[..., Any], points: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [x.detach() for x in tree_leaves(function(*points)) if isinstance(x, Tensor)]


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type == "cpu" or not (a.is_floating_point() or a.is_complex()):
        return bool(((a == b) | (a != a) & (b != b)).all())
    return bool(torch.isclose(a, b, rtol=256 * torch.finfo(a.dtype).eps, atol=0.0, equal_nan=True).all())


class RootWitness:
    """Remembers the function of which a root was found, for the derivatives, which evaluate it again."""

    def __init__(self) -> None:
        self._x: Tensor | None = None
        self._seen: Fingerprint | None = None

    def note(self, r: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """The root ``x`` (B, n) of ``r`` was found."""
        try:
            self._x, self._seen = x, Fingerprint.of(r, x)
        except Exception:  # a row that failed lies where the function is not defined
            self._x = self._seen = None

    def check(self, r: Callable[[Tensor], Tensor], x: Tensor) -> None:
        """Raise `SolveError` where ``r``, the function of the root ``x`` now, has other values than in the solve."""
        if self._seen is None or self._x is None or self._x.data_ptr() != x.data_ptr() or self._x.shape != x.shape:
            return
        if any(bool(differs(a, b)) for a, b in zip(self._seen.again(r), self._seen.values, strict=True)):
            raise SolveError(
                f"The derivatives evaluate fun again, and it is another function than in the solve: {CHANGED}. Take derivatives before "
                "anything changes, or hand over what does through args="
            )
