"""Root finders on batches of independent systems. Knows residuals, Jacobians and linear solvers; nothing of autograd or of users."""

from .protocol import RootMethod, RootProblem, RootRecord, RootStatus, scaled_norm

__all__ = ["RootMethod", "RootProblem", "RootRecord", "RootStatus", "scaled_norm"]
