"""What a root finder is given and what it gives back. Everything has rows: ``B`` independent systems of ``n`` unknowns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..linalg import DenseLU, Factorization, LinearSolver, Log, Matrix

__all__ = ["RootMethod", "RootProblem", "RootRecord", "RootStatus", "RootTraits", "scaled_norm"]


class RootStatus(IntEnum):
    """How the iteration of one row ended."""

    RUNNING = 1
    SUCCESS = 0
    MAX_STEPS = -1
    STALLED = -2  # no acceptable step: a local minimum of the residual, or a fold nearby
    NON_FINITE = -3
    SINGULAR = -4
    DIVERGED = -5
    UNSOLVED = -6  # an iterative linear solver did not converge


@dataclass(frozen=True)
class RootProblem:
    """``residual(x) = 0`` with ``residual`` from ``(B, n)`` to ``(B, n)`` (``(B, m)`` for least squares), rows independent.

    A row has converged when ``norm(residual / f_scale) <= tol`` and, for methods of Newton type and for others with an infinite ``tol``,
    the last step (the estimated error) was at most ``norm(step / (x_atol + x_rtol |x|)) <= 1`` (both recorded). ``jacobian`` gives a
    matrix at ``x``; ``jvp(x, v)`` and ``vjp(x, w)``
    its products. ``lower`` and ``upper`` bound ``x`` (broadcast to ``(B, n)``), None for none.
    """

    residual: Callable[[Tensor], Tensor]
    jacobian: Callable[[Tensor], Matrix] | None = None
    jvp: Callable[[Tensor, Tensor], Tensor] | None = None
    vjp: Callable[[Tensor, Tensor], Tensor] | None = None
    tol: float = 1e-10
    x_rtol: float = 1e-10
    x_atol: float = 1e-12
    #: steps within ``x_atol`` end the iteration only when they are within ``x_rtol`` of each unknown too, or shrink no more: an unknown of
    #: 1e-14 is found to as many digits as one of size one
    by_own_size: bool = False
    max_steps: int = 100
    f_scale: Tensor | float = 1.0
    x_scale: Tensor | float = 1.0
    lower: Tensor | None = None
    upper: Tensor | None = None
    #: whether a minimum of the residual that is no root is an answer too (more residuals than unknowns always mean that)
    least_squares: bool = False
    norm: Callable[[Tensor], Tensor] = field(default=lambda v: torch.linalg.vector_norm(v, dim=-1) / max(v.shape[-1], 1) ** 0.5)
    linear_solver: LinearSolver = field(default_factory=DenseLU)
    log: Log = field(default_factory=Log)
    #: called after every iteration with the number of the iteration, ``x`` and the residual norms
    callback: Callable[[int, Tensor, Tensor], None] | None = None

    def bound(self, x: Tensor) -> Tensor:
        """``(B, n)``: which unknowns lie at a bound."""
        at = torch.zeros_like(x, dtype=torch.bool)
        at = at if self.lower is None else at | (x <= self.lower)
        return at if self.upper is None else at | (x >= self.upper)


@dataclass(frozen=True)
class RootRecord:
    """``x`` and ``residual`` are ``(B, n)``; ``status``, ``residual_norm`` and the counts ``(B,)``.

    ``factors`` are those of the Jacobian *at* ``x`` (not of an earlier iterate), or None.
    """

    x: Tensor
    residual: Tensor
    residual_norm: Tensor
    status: Tensor
    n_steps: Tensor
    n_fun: Tensor
    n_jac: Tensor
    factors: Factorization | None = None
    note: str = ""


@runtime_checkable
class RootMethod(Protocol):
    """A root finder with its settings."""

    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """Iterate from ``x0`` (B, n) until every row has converged or failed; rows that are done do not move any more."""
        ...


class RootTraits:
    """What a root finder may say of itself beside `RootMethod.solve`, by deriving from this: whatever it does not say is not so."""

    #: finds minima of the residual that are no roots, of more residuals than unknowns too
    least_squares: bool = False

    def with_flow(self, integrate: Callable[[Tensor], Tensor]) -> Any:
        """The same where it has no use for the flow of the residual, or was given it; ``integrate(x) -> x`` (B, n) carries ``x`` along it
        towards a steady state."""
        return self


def scaled_norm(problem: RootProblem, residual: Tensor) -> Tensor:
    """``(B,)``: the norm that is compared with ``tol``."""
    return problem.norm(residual / problem.f_scale)
