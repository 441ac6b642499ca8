"""Stages of implicit-explicit methods: Newton's iteration for one part of the right-hand side, the other one is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .stages import StageSolver

__all__ = ["AdditiveStageSolver"]


class AdditiveStageSolver(StageSolver):
    """See `StageEquations`; a `StageSolver` of the implicit part.

    ``explicit``: the flat explicit part; the other arguments are those of `StageSolver` for the implicit part.
    """

    def __init__(self, explicit: Callable[[Tensor, Tensor], Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.explicit = explicit
        # the start of a step is evaluated by the loop first, as the end of the step before
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The sum of both parts."""
        parts = self.explicit(t, y), self.f(t, y)
        # two: a rejected step goes back to its start
        self._seen = [*self._seen[-1:], (t, y, *parts)]
        return parts[0] + parts[1]

    def both(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `StageEquations.both`."""
        for time, state, explicit, implicit in self._seen:
            if torch.equal(time, t) and torch.equal(state, y):
                self._seen = [(time, state, explicit, implicit)]
                return explicit, implicit
        parts = self.explicit(t, y), self.f(t, y)
        self._seen = [(t, y, *parts)]
        self.work.n_fun += 1
        return parts
