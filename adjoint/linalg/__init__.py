"""Linear systems: factorise once, solve and solve transposed many times. Imports nothing of ours but the errors."""

from .choice import default_solver
from .coloring import Coloring, color_columns, color_pattern, color_rows
from .condition import condition_estimate
from .cudss import CuDSS
from .dense import DenseLU
from .eigen import DegenerateEigenvalue, eigenpair
from .functions import discrete_lyapunov, lstsq, lyapunov, sylvester
from .idr import IDR
from .krylov import GMRES, BiCGStab
from .pardiso import Pardiso
from .preconditioners import ILU
from .protocol import Factorization, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix
from .solve import linear_solve
from .sparse_lu import SparseLU
from .sparsity import PatternTooDense, SparsityPattern, detect_pattern
from .umfpack import UMFPACK

__all__ = [
    "GMRES",
    "IDR",
    "ILU",
    "UMFPACK",
    "BiCGStab",
    "Coloring",
    "CuDSS",
    "DegenerateEigenvalue",
    "DenseLU",
    "Factorization",
    "LinearOperator",
    "LinearSolver",
    "Log",
    "Matrix",
    "Pardiso",
    "PatternTooDense",
    "SparseLU",
    "SparseMatrix",
    "SparsityPattern",
    "color_columns",
    "color_pattern",
    "color_rows",
    "condition_estimate",
    "default_solver",
    "detect_pattern",
    "discrete_lyapunov",
    "eigenpair",
    "linear_solve",
    "lstsq",
    "lyapunov",
    "sylvester",
]
