"""Linear systems: factorise once, solve and solve transposed many times. Imports nothing of ours but the errors."""

from .dense import DenseLU
from .protocol import Factorization, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix

__all__ = ["DenseLU", "Factorization", "LinearOperator", "LinearSolver", "Log", "Matrix", "SparseMatrix"]
