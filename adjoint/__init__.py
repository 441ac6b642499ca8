"""Derivatives of differential equations and implicit solves in PyTorch."""

from . import linalg, methods, nn, nonlinear
from ._version import __version__
from .doors.branches import BranchSolution, FoldPoint, continuation
from .doors.dae import solve_dae
from .doors.doses import Doses
from .doors.event_data import Event
from .doors.explain import Explanation, explain
from .doors.forcing import Forcing
from .doors.index_reduction import ReducedDAE, reduce_index
from .doors.ivp import solve_ivp
from .doors.laplace import Laplace
from .doors.mechanics import MechanicalState, Mechanics, mechanics
from .doors.objective import SteadyStateObjective
from .doors.parameters import Parameter, ParameterSpace
from .doors.root_solution import RootSolution, RootStats
from .doors.solution import EventLog, EventRecord, Solution, Stats
from .doors.steady import solve_root
from .dropin.odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from .errors import (
    AdjointError,
    BacksolveDiverged,
    CapturedTensorLost,
    EventsAccumulate,
    HigherIndexDAE,
    InconsistentInitialCondition,
    InvalidInput,
    MaxStepsReached,
    NewtonDidNotConverge,
    NonFiniteDerivative,
    NonFiniteResidual,
    NonFiniteState,
    RootError,
    SingularJacobian,
    SolveError,
    StagesDidNotConverge,
    StepSizeTooSmall,
    UnsupportedCombination,
)
from .integrate import IController, PIController, PIDController
from .sensitivity import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
)
from .system.split import SplitFunction

__all__ = [
    "AdjointError",
    "Backprop",
    "BacksolveAdjoint",
    "BacksolveDiverged",
    "BranchSolution",
    "CapturedTensorLost",
    "DiscreteAdjoint",
    "Doses",
    "Event",
    "EventLog",
    "EventRecord",
    "EventsAccumulate",
    "Explanation",
    "FoldPoint",
    "Forcing",
    "ForwardSensitivity",
    "GaussAdjoint",
    "HigherIndexDAE",
    "IController",
    "InconsistentInitialCondition",
    "InterpolatingAdjoint",
    "InvalidInput",
    "Laplace",
    "MaxStepsReached",
    "MechanicalState",
    "Mechanics",
    "NewtonDidNotConverge",
    "NonFiniteDerivative",
    "NonFiniteResidual",
    "NonFiniteState",
    "PIController",
    "PIDController",
    "Parameter",
    "ParameterSpace",
    "QuadratureAdjoint",
    "ReducedDAE",
    "RootError",
    "RootSolution",
    "RootStats",
    "SingularJacobian",
    "Solution",
    "SolveError",
    "SplitFunction",
    "StagesDidNotConverge",
    "Stats",
    "SteadyStateObjective",
    "StepSizeTooSmall",
    "UnsupportedCombination",
    "__version__",
    "continuation",
    "explain",
    "linalg",
    "mechanics",
    "methods",
    "nn",
    "nonlinear",
    "odeint",
    "odeint_adjoint",
    "odeint_dense",
    "odeint_event",
    "reduce_index",
    "solve_dae",
    "solve_ivp",
    "solve_root",
]
