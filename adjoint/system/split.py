"""Right-hand sides in two parts, for methods that treat one of them explicitly and the other one implicitly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..errors import InvalidInput

__all__ = ["SplitFunction"]


@dataclass(frozen=True, eq=False)
class SplitFunction:
    """``y' = explicit(t, y, *args) + implicit(t, y, *args)``: the ``fun`` of implicit-explicit (IMEX) methods in `solve_ivp`.

    With method "kencarp3", "kencarp4", "kencarp5", "ars232" or "ars443" only ``implicit``, the stiff part, enters the equations that
    Newton's iteration solves; ``explicit`` is evaluated, and never asked for a Jacobian. Other methods integrate the sum.

    Parameters
    ----------
    explicit, implicit : callable
        ``(t, y, *args) -> dy/dt`` each, with the structure, shapes and dtypes of ``y0``, and the same ``args``.

    Raises
    ------
    InvalidInput
        If one of the two is not callable.
    """

    explicit: Callable[..., Any]
    implicit: Callable[..., Any]

    def __post_init__(self) -> None:
        for name in ("explicit", "implicit"):
            if not callable(getattr(self, name)):
                raise InvalidInput(f"SplitFunction: {name} must be callable, got a {type(getattr(self, name)).__name__}")

    def __call__(self, t: Any, y: Any, *args: Any) -> Any:
        """The sum of both parts."""
        return tree_map(torch.add, self.explicit(t, y, *args), self.implicit(t, y, *args))
