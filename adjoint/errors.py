"""Named errors, and checks of numbers that raise them. Every room may import this module; it imports nothing of ours."""

from __future__ import annotations

from math import isinf, isnan
from operator import index
from typing import Any

__all__ = [
    "AdjointError",
    "BacksolveDiverged",
    "CapturedTensorLost",
    "EventsAccumulate",
    "HigherIndexDAE",
    "InconsistentInitialCondition",
    "InvalidInput",
    "MaxStepsReached",
    "NewtonDidNotConverge",
    "NonFiniteDerivative",
    "NonFiniteResidual",
    "NonFiniteState",
    "RootError",
    "SingularJacobian",
    "SolveError",
    "StagesDidNotConverge",
    "StepSizeTooSmall",
    "UnsupportedCombination",
    "counted",
    "positive",
]


class AdjointError(Exception):
    """Base class of every error that this library raises on purpose."""


class InvalidInput(AdjointError, ValueError, AssertionError):
    """An argument, or what a user's function returned, cannot be used. The message quotes it and says what is expected."""


class UnsupportedCombination(AdjointError, NotImplementedError):
    """Two options that do not work together. The message names the alternative."""


class CapturedTensorLost(AdjointError, RuntimeError):
    """``fun`` uses a differentiable tensor that could not be found when the solve started, so its gradient would be missing."""


class SolveError(AdjointError, RuntimeError, AssertionError):
    """A solve stopped before its end.

    Attributes
    ----------
    t : float
        Time at which the (first failing) trajectory stopped.
    trajectory : int or None
        Index of the first failing trajectory of a batched solve.
    component : int or None
        Flat index of the worst component of the state of that trajectory.
    """

    def __init__(self, message: str, *, t: float = float("nan"), trajectory: int | None = None, component: int | None = None) -> None:
        super().__init__(message)
        self.t, self.trajectory, self.component = t, trajectory, component


class BacksolveDiverged(SolveError):
    """The state that was solved backwards is not the one that the solve passed through, so the gradient along it would be wrong."""


class EventsAccumulate(SolveError):
    """Events with resets came to ``max_events``, or follow each other within no time (Zeno behaviour). The message names the event."""


class MaxStepsReached(SolveError):
    """``max_steps`` attempted steps did not reach the end of ``t_span``."""


class StepSizeTooSmall(SolveError):
    """The error test kept failing until the step could not be told from zero, or fell below ``min_step``."""


class NonFiniteState(SolveError):
    """``fun`` or the state became infinite or NaN, also with the smallest step."""


class NonFiniteDerivative(NonFiniteState):
    """The derivative of ``fun`` is infinite or NaN where ``fun`` itself is finite. The message names the time and the component."""


class InconsistentInitialCondition(AdjointError, ValueError):
    """Initial values do not satisfy the equations, and could not be made to. The message says which rows fail and by how much."""


class HigherIndexDAE(AdjointError, ValueError):
    """The index of the equations is too high for the method. The message names the variables and equations that are to blame."""


class RootError(AdjointError, RuntimeError):
    """A root was not found.

    Attributes
    ----------
    row : int or None
        Index of the first failing sample of a batched solve.
    component : int or None
        Flat index of the component with the largest residual in it.
    """

    def __init__(self, message: str, *, row: int | None = None, component: int | None = None) -> None:
        super().__init__(message)
        self.row, self.component = row, component


class NewtonDidNotConverge(RootError):
    """The iteration ran out of steps, stalled, or diverged."""


class StagesDidNotConverge(SolveError, NewtonDidNotConverge):
    """Newton's iteration for the stages of an implicit method failed, also with the smallest step."""


class SingularJacobian(RootError, ArithmeticError):
    """The Jacobian is singular: at a fold of the solution, or because the equations do not determine every unknown."""


class NonFiniteResidual(RootError):
    """``fun`` gave NaN or infinity, and no smaller step avoided it."""


def positive(value: Any, name: str, *, zero: bool = False, finite: bool = False) -> float:
    """A positive (or with ``zero`` non-negative, with ``finite`` not infinite) number as a float: a number, an array or a tensor of one.

    Raises
    ------
    InvalidInput : anything else, truth values and strings too
    """
    try:
        if isinstance(value, (bool, str, bytes)) or any(kind in str(getattr(value, "dtype", "")) for kind in ("bool", "complex")):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} must be a number, got {value!r}") from error
    if isnan(number) or number < 0 or (number == 0 and not zero):
        raise InvalidInput(f"{name} must be {'at least' if zero else 'greater than'} zero, got {value!r}")
    if finite and isinf(number):
        raise InvalidInput(f"{name} must be finite, got {value!r}")
    return number


def counted(value: Any, name: str, least: int = 1) -> int:
    """An integer that is ``least`` at the least; raises `InvalidInput` for anything else, truth values too."""
    try:
        number = -1 if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")) else index(value)
    except TypeError:
        number = -1
    if number < least:
        wanted = {0: "an integer of at least zero", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
        raise InvalidInput(f"{name} must be {wanted}, got {value!r}")
    return number
