"""Linear solvers for the derivatives of fixed points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InvalidInput, RootError, SingularJacobian, UnsupportedCombination
from ..linalg import GMRES, BiCGStab, DenseLU, Factorization, LinearOperator, LinearSolver, Log, Matrix
from ..linalg.protocol import SolverTraits, traits_of
from ..nonlinear import Anderson, Broyden, FixedPoint, RootMethod, RootProblem

__all__ = ["ITERATIONS", "FixedPointSolver", "Guarded", "backward_solver"]

#: unknowns of one system up to which its Jacobian is formed and factorised
_SMALL = 128

#: iterations that need values of the module only; Broyden's begins with the inverse of ``-I`` for ``module(z, x) - z``
ITERATIONS: dict[str, RootMethod] = {"anderson": Anderson(), "broyden": Broyden(initial=-1.0), "fixed_point": FixedPoint()}


class _IteratedInverse(Factorization):
    def __init__(self, operator: LinearOperator, solver: FixedPointSolver, log: Log) -> None:
        self.operator, self.solver, self.log = operator, solver, log
        self.rows, self.n, self.dtype, self.device = operator.rows, operator.n, operator.dtype, operator.device

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        if b.dim() == 3:
            columns = [self.solve(column, transposed=transposed, conjugated=conjugated) for column in b.unbind(-1)]
            return torch.stack(columns, -1) if columns else b.clone()
        product = self.operator.rmatvec if transposed else self.operator.matvec
        if product is None:
            raise UnsupportedCombination("the operator has no transposed product: derivatives in reverse mode need one")
        self.log.n_solves += b.shape[0]
        flip = conjugated and b.is_complex()
        side = b.conj().resolve_conj() if flip else b
        size = side.abs().square().mean(-1, keepdim=True).sqrt()
        size = torch.where(size > 0, size, 1.0)  # NaN stays: it compares false, but its row is NaN by its right-hand side
        unit = side / size
        problem = RootProblem(
            residual=lambda u: product(u) - unit, tol=self.solver.tol, max_steps=self.solver.max_steps, x_rtol=0.0, x_atol=float("inf")
        )
        record = self.solver.method.solve(problem, torch.zeros_like(unit))
        self.log.n_iterations += int(record.n_steps.max()) if b.numel() else 0
        out = torch.where((record.status >= 0).unsqueeze(-1), record.x * size, float("nan"))
        return out.conj().resolve_conj() if flip else out


@dataclass(frozen=True)
class FixedPointSolver(SolverTraits):
    """Solves ``(J - I) u = b`` by the fixed-point iteration ``u <- J u - b`` as a root finder accelerates it; takes products only.

    It converges where the fixed-point iteration of the layer does, since ``J`` and its transpose have the same eigenvalues. ``tol`` bounds
    the residual relative to ``b``. Rows that do not converge in ``max_steps`` are NaN.
    """

    method: RootMethod
    tol: float
    max_steps: int
    matrix_free: ClassVar[bool] = True

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`."""
        if not isinstance(matrix, LinearOperator):
            raise InvalidInput(f"a fixed-point iteration takes an operator, got a {type(matrix).__name__}")
        return _IteratedInverse(matrix, self, Log() if log is None else log)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`."""
        return self.factor(matrix, factorization.log)


def backward_solver(choice: Any, n: int, dtype: torch.dtype, tol: float | None, max_steps: int) -> LinearSolver:
    """The solver for a name, for ``n`` unknowns; objects are handed through. Raises `InvalidInput` for anything else."""
    if not isinstance(choice, str):
        if not isinstance(choice, LinearSolver):
            raise InvalidInput(f"linear_solver must be a name or an object such as adjoint.linalg.GMRES(), got {choice!r}")
        return choice
    if choice == "auto":
        choice = "lu" if n <= _SMALL else "gmres"
    if choice == "lu":
        return DenseLU()
    tol = tol if tol is not None else (1e-5 if dtype.to_real().itemsize < 8 else 1e-10)
    if choice == "gmres":
        return GMRES(rtol=tol, max_iterations=max_steps)
    if choice == "bicgstab":
        return BiCGStab(rtol=tol, max_iterations=max_steps)
    if choice in ITERATIONS:
        return FixedPointSolver(ITERATIONS[choice], tol, max_steps)
    raise InvalidInput(f"no linear_solver {choice!r}: choose auto, lu, gmres, bicgstab, {', '.join(ITERATIONS)}, or give an object")


class Guarded(SolverTraits):
    """Another solver, which raises where a derivative was not found: a NaN gradient would only be seen much later.

    Newton's iterations look after failed rows themselves, so the guard is on only once ``for_derivatives`` is set.
    """

    def __init__(self, inner: LinearSolver, throw: bool) -> None:
        self.inner, self.throw, self.for_derivatives = inner, throw, False
        self.matrix_free = traits_of(inner).matrix_free
        self.dense = not self.matrix_free

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`."""
        return _GuardedFactors(self.inner.factor(matrix, log), self)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`."""
        inner = factorization.inner if isinstance(factorization, _GuardedFactors) else factorization
        return _GuardedFactors(self.inner.refactor(inner, matrix), self)


class _GuardedFactors(Factorization):
    def __init__(self, inner: Factorization, owner: Guarded) -> None:
        self.inner, self.owner = inner, owner
        self.rows, self.n, self.dtype, self.device, self.log = inner.rows, inner.n, inner.dtype, inner.device, inner.log

    def singular(self) -> Tensor:
        return self.inner.singular()

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        out = self.inner.solve(b, transposed=transposed, conjugated=conjugated)
        if self.owner.throw and self.owner.for_derivatives:
            asked = torch.isfinite(b).flatten(1).all(1) & (b != 0).flatten(1).any(1)
            failed = asked & ~torch.isfinite(out).flatten(1).all(1)
            if bool(failed.any()):
                self._raise(failed)
        return out

    def _raise(self, failed: Tensor) -> None:
        rows = failed.nonzero()[:, 0].tolist()
        many = f"sample {rows[0]} ({len(rows)} of {self.rows} failed)" if self.rows > 1 else "the fixed point"
        if bool(self.singular()[rows[0]]):
            raise SingularJacobian(f"the Jacobian of z - module(z, x) is singular at {many}: it has no derivatives there", row=rows[0])
        raise RootError(
            f"the derivative at {many} was not found: the iterative linear solver did not converge. Try more backward_max_steps, a looser "
            "backward_tol, linear_solver='lu' for a small state, or a penalty on jacobian_norm that keeps the module contracting.",
            row=rows[0],
        )
