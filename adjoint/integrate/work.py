"""Equations of implicit steps at work: what loops ask of them, and counts of what is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..linalg import Log
from .numbers import Decision

__all__ = ["Equations", "StageWork"]


@dataclass
class StageWork:
    """Counts for each trajectory, ``(B,)``; of one alone they are numbers."""

    n_fun: Any
    n_jac: Any
    n_factorizations: Any
    n_solves: Any
    n_newton: Any
    log: Log = field(default_factory=Log)

    @classmethod
    def zero(cls, rows: int | None, device: torch.device) -> StageWork:
        """Nothing done yet; ``rows``: None for one trajectory alone."""
        fun, jac, factorizations, solves, newton = (
            0 if rows is None else torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(5)
        )
        return cls(fun, jac, factorizations, solves, newton)


class Equations:
    """What a loop asks of the equations of implicit steps, beside what a method asks in its step."""

    #: `StageWork`: what was done
    work: Any
    #: whether the iteration, and not ``fun``, failed in the last attempt
    stuck: Any
    #: whether there may be constraints, so that steps are tested between their ends
    constrained: bool = False

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The slope ``f(t, y)``, where the equations are solved for it; multistep methods begin by their own rules and ask for none."""
        raise NotImplementedError

    def linear_stages(
        self, tableau: Any, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, slope: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """See `StageEquations.linear_stages`: stage by stage."""
        return None

    def slope_at_start(self, stops: Tensor, sign: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, int]:
        """The slope with which the first step begins, and how many evaluations of it are not in `work`."""
        return self(t, y), 1

    def first_step(self, stops: Tensor, sign: Tensor, y: Tensor) -> Tensor | None:
        """Size ``(B,)`` of the first step; None where it is that of `initial_step`."""
        return None

    def slope_behind(self, jumped: Decision, t: Tensor, y: Tensor, slope: Tensor, sign: Tensor, room: Tensor) -> Tensor:
        """``slope``, and in rows that have ``jumped`` the one behind the jump, with ``room`` (B,) up to the next one."""
        return torch.where(jumped.unsqueeze(-1), self(t, y), slope)
