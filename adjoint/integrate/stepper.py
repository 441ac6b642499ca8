"""What the loop asks of a method at work, and what the two tell each other of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from .numbers import Decision, Measure

__all__ = ["Attempt", "Fate", "Stepper", "Trial"]


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

    def stages(self) -> Sequence[Tensor]:
        """All that the dense output weighs."""
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
