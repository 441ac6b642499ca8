"""Derivatives of differential equations and implicit solves in PyTorch."""

from . import methods, nn
from ._version import __version__
from .errors import (
    AdjointError,
    CapturedTensorLost,
    InvalidInput,
    MaxStepsReached,
    NonFiniteState,
    SolveError,
    StepSizeTooSmall,
    UnsupportedCombination,
)
from .integrate import IController, PIController, PIDController
from .ivp import solve_ivp
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from .sensitivity import Backprop, DiscreteAdjoint
from .solution import EventRecord, Solution, Stats

__all__ = [
    "AdjointError",
    "Backprop",
    "CapturedTensorLost",
    "DiscreteAdjoint",
    "EventRecord",
    "IController",
    "InvalidInput",
    "MaxStepsReached",
    "NonFiniteState",
    "PIController",
    "PIDController",
    "Solution",
    "SolveError",
    "Stats",
    "StepSizeTooSmall",
    "UnsupportedCombination",
    "__version__",
    "methods",
    "nn",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "solve_ivp",
]
