"""Derivatives of differential equations and implicit solves in PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import linalg, methods, nn, nonlinear
    from .doors.branches import BranchSolution, FoldPoint, continuation
    from .doors.contact_mechanics import ContactMechanics, ContactState
    from .doors.contacts import Contact
    from .doors.dae import solve_dae
    from .doors.doses import Doses
    from .doors.event_data import Event
    from .doors.explain import Explanation, explain
    from .doors.forcing import Forcing, Schedule
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
    "Contact",
    "ContactMechanics",
    "ContactState",
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
    "Schedule",
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

#: rooms that may be asked for by ``adjoint.name`` without an import of their own
_ROOMS = ("doors", "dropin", "errors", "integrate", "linalg", "methods", "native", "nn", "nonlinear", "sensitivity", "system")
#: where the public names are: a module is imported when one of its names is asked for
_HOMES = {
    ".doors.branches": "BranchSolution FoldPoint continuation",
    ".doors.contact_mechanics": "ContactMechanics ContactState",
    ".doors.contacts": "Contact",
    ".doors.dae": "solve_dae",
    ".doors.doses": "Doses",
    ".doors.event_data": "Event",
    ".doors.explain": "Explanation explain",
    ".doors.forcing": "Forcing Schedule",
    ".doors.index_reduction": "ReducedDAE reduce_index",
    ".doors.ivp": "solve_ivp",
    ".doors.laplace": "Laplace",
    ".doors.mechanics": "MechanicalState Mechanics mechanics",
    ".doors.objective": "SteadyStateObjective",
    ".doors.parameters": "Parameter ParameterSpace",
    ".doors.root_solution": "RootSolution RootStats",
    ".doors.solution": "EventLog EventRecord Solution Stats",
    ".doors.steady": "solve_root",
    ".dropin.odeint": "odeint odeint_adjoint odeint_dense odeint_event",
    ".errors": (
        "AdjointError BacksolveDiverged CapturedTensorLost EventsAccumulate HigherIndexDAE InconsistentInitialCondition "
        "InvalidInput MaxStepsReached NewtonDidNotConverge NonFiniteDerivative NonFiniteResidual NonFiniteState RootError "
        "SingularJacobian SolveError StagesDidNotConverge StepSizeTooSmall UnsupportedCombination"
    ),
    ".integrate": "IController PIController PIDController",
    ".sensitivity": (
        "Backprop BacksolveAdjoint DiscreteAdjoint ForwardSensitivity GaussAdjoint InterpolatingAdjoint QuadratureAdjoint"
    ),
    ".system.split": "SplitFunction",
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names.split()}

# counts what PyTorch holds of a tensor; the first name may be asked for inside a transform, where that would be something else
import_module(".system.ownership", __name__)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
