"""What the loop asks of a method at work, and of the equations of implicit steps; what they tell each other of a step, and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..linalg import Log
from .numbers import Decision, Measure

__all__ = ["Attempt", "Equations", "Fate", "StageWork", "Stepper", "Trial"]

class Attempt(NamedTuple):
    """A step that is to be attempted: numbers, or ``(B,)`` each.

    From ``t`` by ``h`` to ``end``, in a ``segment`` at whose anchor it ``lands``, of the ``running`` trajectories; others take part with a
    size of zero. ``cut``: it is shorter than ``size``, which was wanted, or a little longer, to end where it does. ``behind``, ``before``:
    ``fun`` jumps at its start, or its end, and is seen from within.
    """

    t: Measure
    h: Measure
    end: Measure
    segment: Any
    lands: Decision
    running: Decision
    size: Measure
    cut: Decision
    behind: Decision
    before: Decision


class Fate(NamedTuple):
    """What became of an attempt.

    ``again``: those that are taken once more, up to ``aim``, which is no fault of theirs; ``going``: who has a way to go; ``landed``: who
    stands on an anchor.
    """

    accepted: Decision
    again: Decision
    aim: Any
    going: Decision
    landed: Decision


class Trial(Protocol):
    """What came of an attempt."""

    #: the new state
    y: Tensor
    #: whether its error is small enough; whether there is none that is a number; whether, with this, there is no way to go on
    passed: Decision
    bad: Decision
    hopeless: Decision
    #: what is to be recorded beside, if anything
    extra: Any

    def stages(self, who: Decision) -> Sequence[Tensor]:
        """All that the dense output weighs; ``who`` looks at it, whose evaluations count."""
        ...

    def detach(self) -> None:
        """Let go of what autograd has recorded."""
        ...


class Stepper(Protocol):
    """A method at work, which knows the present state and what it needs of those before."""

    @property
    def f(self) -> Any:
        """The right-hand side, with the equations of its stages."""
        ...

    @property
    def y(self) -> Tensor:
        """The present state."""
        ...

    @property
    def scaled(self) -> Tensor | None:
        """The error of the last attempt, in units of the tolerance; None before the first."""
        ...

    @property
    def rate(self) -> float | Tensor:
        """What is known of the size of the Jacobian, see `SwitchWatch`."""
        ...

    def begin(self) -> tuple[Measure, Decision, Decision]:
        """The size (positive) of the first step; who has a way to go; who cannot because its state is not finite."""
        ...

    def fit(self, step: Measure, h: Measure, running: Decision) -> Measure:
        """The next step is not to have the size ``step``, as was said, but that of ``h``."""
        ...

    def attempt(self, step: Attempt) -> Any:
        """A `Trial`."""
        ...

    def follow(self, step: Attempt, trial: Any, size: Measure, fate: Fate) -> Measure:
        """Take over what was accepted; the size of the next step, after one of this ``size``."""
        ...

    def evaluations(self, attempts: Any) -> Any:
        """How often ``fun`` was evaluated, but for what is counted elsewhere, in so many attempts."""
        ...


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
