"""``Event``: a function of the state whose zero is an event, and what happens there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import InvalidInput

__all__ = ["Event"]


@dataclass(frozen=True)
class Event:
    """Where ``function`` is zero along a solution, and what happens there: an entry of ``events=``.

    Parameters
    ----------
    function : callable
        ``function(t, y, *args) -> 0-d tensor``, with ``batched=True`` ``(B,)``; with ``mode=`` ``function(t, y, mode, *args)``.
    direction : float
        0: any crossing; positive: only where the function rises; negative: only where it falls.
    terminal : bool or int
        End the solve at the first (m-th) occurrence, after its reset.
    reset : callable
        ``reset(t, y, *args) -> y``, the state with which the solve goes on, of the same structure, shapes and dtypes; with ``mode=``
        ``reset(t, y, mode, *args) -> (y, mode)``. With ``batched=True`` it is given all trajectories at once, and what it returns counts
        for those that have the event. The solve is differentiated through it: write it in tensors, without changing its arguments.
    name : str
        ``sol.events[name]`` is its record.
    """

    function: Callable[..., Tensor]
    direction: float = 0.0
    terminal: bool | int = False
    reset: Callable[..., Any] | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for what, value in (("function", self.function), ("reset", self.reset)):
            if not callable(value) and not (what == "reset" and value is None):
                raise InvalidInput(f"{what} of an event must be callable, got a {type(value).__name__}")
        if self.name is not None and not isinstance(self.name, str):
            raise InvalidInput(f"name of an event must be a string, got {self.name!r}")

    def __call__(self, t: Tensor, y: Any, *args: Any) -> Tensor:
        """The value of the function."""
        return self.function(t, y, *args)
