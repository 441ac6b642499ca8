"""Root finders on batches of independent systems. Knows residuals, Jacobians and linear solvers; nothing of autograd or of users."""

from .bordered import border_problem, dependent_rows, replace_rows
from .continuation import Branch, BranchProblem, Continuation, Fold
from .diagnose import explain, left_null_vectors, right_null_vectors
from .fixed_point import Anderson, Broyden, FixedPoint
from .newton import Backtracking, EisenstatWalker, Newton
from .protocol import RootMethod, RootProblem, RootRecord, RootStatus, scaled_norm
from .pseudo_transient import PseudoTransient
from .robust import Auto
from .time_integration import TimeIntegration
from .trust_region import Dogleg, LevenbergMarquardt

__all__ = [
    "FLOW_METHODS",
    "METHODS",
    "Anderson",
    "Auto",
    "Backtracking",
    "Branch",
    "BranchProblem",
    "Broyden",
    "Continuation",
    "Dogleg",
    "EisenstatWalker",
    "FixedPoint",
    "Fold",
    "LevenbergMarquardt",
    "Newton",
    "PseudoTransient",
    "RootMethod",
    "RootProblem",
    "RootRecord",
    "RootStatus",
    "TimeIntegration",
    "border_problem",
    "dependent_rows",
    "explain",
    "left_null_vectors",
    "replace_rows",
    "right_null_vectors",
    "scaled_norm",
]

#: method objects with their default settings, by the names that front doors take
METHODS: dict[str, RootMethod] = {
    "auto": Auto(),
    "newton": Newton(),
    "chord": Newton(reuse="chord"),
    "shamanskii": Newton(reuse="shamanskii"),
    "dogleg": Dogleg(),
    "levenberg_marquardt": LevenbergMarquardt(),
    "fixed_point": FixedPoint(),
    "anderson": Anderson(),
    "broyden": Broyden(),
    "pseudo_transient": PseudoTransient(),
}

#: those that need an integrator, which the front door gives them
FLOW_METHODS: dict[str, RootMethod] = {"time_integration": TimeIntegration()}
