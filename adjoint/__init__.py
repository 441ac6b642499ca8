"""Derivatives of differential equations and implicit solves in PyTorch."""

from . import linalg, methods, nn, nonlinear
from ._version import __version__
from .branches import BranchSolution, FoldPoint, continuation
from .dae import solve_dae
from .errors import (
    AdjointError,
    BacksolveDiverged,
    CapturedTensorLost,
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
from .index_reduction import ReducedDAE, reduce_index
from .integrate import IController, PIController, PIDController
from .ivp import solve_ivp
from .laplace import Laplace
from .mechanics import MechanicalState, Mechanics, mechanics
from .objective import SteadyStateObjective
from .odeint import odeint, odeint_adjoint, odeint_dense, odeint_event
from .parameters import Parameter, ParameterSpace
from .root_solution import RootSolution, RootStats
from .sensitivity import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
)
from .solution import EventRecord, Solution, Stats
from .split import SplitFunction
from .steady import solve_root

__all__ = [
    "AdjointError",
    "Backprop",
    "BacksolveAdjoint",
    "BacksolveDiverged",
    "BranchSolution",
    "CapturedTensorLost",
    "DiscreteAdjoint",
    "EventRecord",
    "FoldPoint",
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
