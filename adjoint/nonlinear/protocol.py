"""What a root finder is given and what it gives back. Everything has rows: ``B`` independent systems of ``n`` unknowns; what all finders
share is the state of all rows, which of them still move, and measures of a Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import DenseLU, Factorization, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix

__all__ = [
    "ErrorMeasure",
    "RootMethod",
    "RootProblem",
    "RootRecord",
    "RootStatus",
    "RootTraits",
    "Rows",
    "adjoint_product",
    "as_dense",
    "clip",
    "ill_determined",
    "near_null",
    "need_jacobian",
    "pick",
    "product",
    "rounding_floor",
    "scaled_norm",
    "sizes",
    "stationary",
    "step_measure",
]

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


def pick(mask: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` in the rows of ``mask`` (B,), ``b`` in the others, for tensors of any shape ``(B, ...)``."""
    return torch.where(mask.reshape(-1, *[1] * (max(a.dim(), b.dim()) - 1)), a, b)


def clip(problem: RootProblem, x: Tensor) -> Tensor:
    """``x`` projected on the bounds."""
    if problem.lower is not None:
        x = torch.maximum(x, problem.lower)
    return x if problem.upper is None else torch.minimum(x, problem.upper)


def step_measure(problem: RootProblem, step: Tensor, x: Tensor) -> Tensor:
    """``(B,)``: at most one where the step is below the tolerance on ``x``."""
    return problem.norm(step / (problem.x_atol + problem.x_rtol * x.abs()))


class ErrorMeasure:
    """Called with an estimated error (B, n) of the iterates: at most one in the rows (B,) where it is below the tolerances.

    With ``by_own_size`` they are relative to every unknown, and where that does not halve any more, to what rounding of the other unknowns
    leaves of it. One that vanishes counts as ``eps**1.5`` of what was there before.
    """

    def __init__(self, rows: Rows) -> None:
        self.largest = rows.problem.norm(rows.x)
        self.last = torch.full_like(self.largest, float("inf"))

    def __call__(self, rows: Rows, error: Tensor) -> Tensor:
        problem, x = rows.problem, rows.x
        if not problem.by_own_size:
            return step_measure(problem, error, x)
        norm = problem.norm(x)
        self.largest = torch.maximum(self.largest, norm)
        rtol = torch.as_tensor(problem.x_rtol, dtype=norm.dtype, device=x.device)
        eps = torch.finfo(norm.dtype).eps
        size = torch.maximum(x.abs(), eps**1.5 * self.largest.unsqueeze(-1))
        rounded = torch.maximum(size, torch.clamp(100 * eps / rtol, max=1.0) * norm.unsqueeze(-1))
        own, loose = (problem.norm(torch.where(error == 0, 0.0, error.abs() / (rtol * s))) for s in (size, rounded))
        resting = own > 0.5 * self.last
        self.last = own
        return torch.where(resting, loose, own)


class Rows:
    """Iterates, residuals, statuses and counts of ``B`` rows. Rows that are no longer `running` never change."""

    def __init__(self, problem: RootProblem, x0: Tensor) -> None:
        if x0.dim() != 2:
            raise InvalidInput(f"x0 must have shape (B, n), got {tuple(x0.shape)}")
        self.problem, self.x = problem, clip(problem, x0)
        self.status = torch.full(x0.shape[:1], int(RootStatus.RUNNING), dtype=torch.int64, device=x0.device)
        self.n_steps, self.n_fun, self.n_jac = (torch.zeros_like(self.status) for _ in range(3))
        # for `settled`: the measure of the last step, and rows that would do if nothing better came
        self.last_measure = torch.full_like(x0[:, 0].abs(), float("inf")) if x0.shape[1] else torch.zeros_like(self.status)
        self.would_do = torch.zeros_like(self.status, dtype=torch.bool)
        self.residual, self.norm = self.evaluate(self.x, self.running)
        self.fail(~torch.isfinite(self.norm), RootStatus.NON_FINITE)
        # an exact root needs no step, and has no need of a regular Jacobian
        self.succeed(self.norm == 0 if x0.shape[1] else self.running)

    @property
    def running(self) -> Tensor:
        return self.status == int(RootStatus.RUNNING)

    def evaluate(self, x: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
        """Residual and its norm (infinite where the residual is not finite); counts one evaluation in the rows given."""
        residual = self.problem.residual(x)
        self.n_fun = self.n_fun + counted
        norm = scaled_norm(self.problem, residual)
        finite = torch.isfinite(residual).all(-1) & torch.isfinite(norm)
        return residual, torch.where(finite, norm, float("inf"))

    def move(self, mask: Tensor, x: Tensor, residual: Tensor, norm: Tensor) -> None:
        """Take a new iterate in the rows of ``mask``."""
        self.x, self.residual, self.norm = pick(mask, x, self.x), pick(mask, residual, self.residual), pick(mask, norm, self.norm)

    def end(self, mask: Tensor, status: RootStatus) -> None:
        """End running rows."""
        if status < 0:
            self.status = torch.where(mask & self.running & self.would_do, int(RootStatus.SUCCESS), self.status)
        self.status = torch.where(mask & self.running, int(status), self.status)

    fail = end

    def succeed(self, mask: Tensor) -> None:
        """Rows that have converged."""
        self.end(mask, RootStatus.SUCCESS)

    def settled(self, step: Tensor, measure: Tensor, last: Tensor, fresh: Tensor | bool = True) -> Tensor:
        """``(B,)``: what to judge a step by, whose `step_measure` is ``measure``. ``last``: rows that may end with it;
        ``fresh``: those whose matrix is that of the point, so that steps that do not halve mean rounding.

        With ``by_own_size`` a step that ``x_atol`` alone lets pass is judged by the size of each unknown, until steps shrink no more (what
        remains is rounding). Rows for which no better step comes are content with it.
        """
        if not self.problem.by_own_size:
            return measure
        own = self.problem.norm(torch.where(step == 0, 0.0, step.abs() / (self.problem.x_rtol * (self.x + step).abs())))
        own = torch.where(torch.isnan(own), float("inf"), own)
        resting = (measure <= 1) & (measure > 0.5 * self.last_measure) & fresh
        self.last_measure = measure
        self.would_do = last & (measure <= 1) & (self.norm <= self.problem.tol)
        return torch.where(resting, measure, torch.maximum(own, measure))

    def begin_step(self) -> bool:
        """Whether any row runs (the one wait for the device in an iteration); counts the step."""
        running = self.running
        self.n_steps = self.n_steps + running
        return bool(running.any())

    def report(self, k: int) -> None:
        """Call the problem's callback."""
        if self.problem.callback is not None:
            self.problem.callback(k, self.x, self.norm)

    def record(self, note: str = "", factors: Factorization | None = None) -> RootRecord:
        """What is given back; rows that still run ran out of steps."""
        self.end(self.running, RootStatus.MAX_STEPS)
        return RootRecord(self.x, self.residual, self.norm, self.status, self.n_steps, self.n_fun, self.n_jac, factors=factors, note=note)


def need_jacobian(problem: RootProblem, method: str) -> None:
    """Raise `InvalidInput` where a method needs a Jacobian and the problem has none."""
    if problem.jacobian is None:
        raise InvalidInput(f"{method} needs RootProblem.jacobian, got None: give one, or use Broyden or Anderson")


def product(matrix: Matrix, v: Tensor) -> Tensor:
    """``A v`` for ``v`` (B, n)."""
    return (matrix @ v.unsqueeze(-1)).squeeze(-1) if isinstance(matrix, Tensor) else matrix.matvec(v)


def adjoint_product(matrix: Matrix, v: Tensor) -> Tensor:
    """``A* v`` (conjugated and transposed) for ``v`` (B, m)."""
    if isinstance(matrix, Tensor):
        return (matrix.mH @ v.unsqueeze(-1)).squeeze(-1)
    if isinstance(matrix, SparseMatrix):
        return matrix.matvec(v, transposed=True, conjugated=True)
    if matrix.rmatvec is None:
        raise UnsupportedCombination("this method needs transposed products, but LinearOperator.rmatvec is None: give it, or use Newton")
    return matrix.rmatvec(v.conj()).conj()


def as_dense(matrix: Matrix, rows: int) -> Tensor:
    """``(B, m, n)``; operators raise `UnsupportedCombination`."""
    if isinstance(matrix, LinearOperator):
        raise UnsupportedCombination("this method needs the entries of the Jacobian, got a LinearOperator: give a dense or sparse one")
    dense = matrix if isinstance(matrix, Tensor) else matrix.dense()
    return dense.expand(rows, -1, -1)


def sizes(matrix: Matrix) -> Matrix:
    """The absolute values of the entries."""
    if isinstance(matrix, Tensor):
        return matrix.abs()
    if isinstance(matrix, SparseMatrix):
        return SparseMatrix(matrix.indices, matrix.values.abs(), matrix.shape)
    raise UnsupportedCombination("the entries of a LinearOperator are not known")


def rounding_floor(matrix: Matrix, x: Tensor) -> Tensor:
    """``(B, m)``: rounding errors to be expected in the residual, ``eps |A| |x|`` (zero where entries are not known)."""
    if isinstance(matrix, LinearOperator):
        return torch.zeros_like(x.abs())
    floor = product(sizes(matrix), x.abs())
    return 4 * torch.finfo(floor.dtype).eps * floor


def ill_determined(matrix: Matrix, factors: Factorization) -> Tensor:
    """``(B,)``: matrices that are singular to rounding, whatever the scaling of rows and columns.

    Solves once with a vector of the size of ``|A| d``, where ``d`` brings the columns to size one: a componentwise (Skeel) estimate of
    the condition number. Operators are judged by their own factorisation alone.
    """
    return near_null(matrix, factors)[0]


def near_null(matrix: Matrix, factors: Factorization) -> tuple[Tensor, Tensor | None]:
    """As `ill_determined`, and with it the solution (B, n) that it judges by: where the matrix is nearly singular, almost a null vector.
    None for operators."""
    flag = factors.singular()
    if isinstance(matrix, LinearOperator):
        return flag, None
    size = sizes(matrix)
    if isinstance(size, Tensor):
        columns = size.amax(-2)
    else:
        assert isinstance(size, SparseMatrix)
        values = size.values if size.values.dim() == 2 else size.values.unsqueeze(0)
        columns = values.new_zeros(values.shape[0], size.shape[1])
        columns = columns.scatter_reduce(1, size.indices[1].expand_as(values), values, "amax")
    d = 1 / columns.expand(factors.rows, -1)
    k = torch.arange(factors.n, device=factors.device, dtype=d.dtype)
    probe = product(size, torch.nan_to_num(d, nan=0.0, posinf=0.0)) * torch.cos(1 + k * k)
    solution = factors.solve(probe.to(factors.dtype))
    found = solution.abs() / d
    # singular matrices with rounding in them give 0.01 / eps and more, rarely less; in single precision regular ones come near
    limit = (0.001 if d.dtype == torch.float64 else 0.01) / torch.finfo(d.dtype).eps
    return flag | ~(found.amax(-1) < limit) if factors.n else flag, solution


def stationary(matrix: Matrix, residual: Tensor) -> Tensor:
    """``(B,)``: whether ``A* r`` vanishes to rounding though ``r`` does not: a minimum of ``|r|``, not a root."""
    if isinstance(matrix, LinearOperator) and matrix.rmatvec is None:
        return torch.zeros(residual.shape[0], dtype=torch.bool, device=residual.device)
    gradient = adjoint_product(matrix, residual).abs()
    bound = gradient if isinstance(matrix, LinearOperator) else adjoint_product(sizes(matrix), residual.abs())
    return (gradient <= 1e3 * torch.finfo(gradient.dtype).eps * bound).all(-1)
