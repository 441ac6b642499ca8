"""Krylov methods on batches of systems, for matrices and for operators that are known by their products only."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination, counted, positive
from .preconditioners import Preconditioner, make_preconditioner, needs_entries
from .protocol import Factorization, LinearOperator, Log, Matrix, SolverTraits, SparseMatrix, check_sides

__all__ = ["GMRES", "BiCGStab", "Krylov"]

Product = Callable[[Tensor], Tensor]

#: solves with a preconditioner from the left, each as accurate as rounding lets the true residual see
_ROUNDS = 10


class _Iterative(Factorization):
    """The matrix and its preconditioner, in the place of factors."""

    def __init__(self, matrix: Matrix, solver: Krylov, log: Log, preconditioner: Preconditioner | None) -> None:
        start = time.perf_counter()
        self.matrix, self.solver, self.log = matrix, solver, log
        if not isinstance(matrix, LinearOperator) and matrix.shape[-1] != matrix.shape[-2]:
            raise InvalidInput(f"only square matrices can be solved with, got {tuple(matrix.shape)}")
        if isinstance(matrix, LinearOperator):
            self.rows, self.n, self.dtype, self.device = matrix.rows, matrix.n, matrix.dtype, matrix.device
        elif isinstance(matrix, SparseMatrix):
            self.rows = matrix.values.shape[0] if matrix.values.dim() == 2 else 1
            self.n, self.dtype, self.device = matrix.shape[0], matrix.dtype, matrix.device
        else:
            self.rows, self.n, self.dtype, self.device = matrix.shape[0], matrix.shape[-1], matrix.dtype, matrix.device
        self.preconditioner = make_preconditioner(solver.preconditioner, matrix, log) if preconditioner is None else preconditioner
        #: which rows of the last solve met the tolerance
        self.converged = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        log.n_factorizations += self.rows
        log.factor_seconds += time.perf_counter() - start

    def products(self, transposed: bool, conjugated: bool) -> tuple[Product, Product]:
        """The products with the matrix and with the preconditioner's inverse, for the system that is asked for."""
        matrix = self.matrix
        if isinstance(matrix, LinearOperator):
            if transposed and matrix.rmatvec is None:
                raise UnsupportedCombination("this operator has no transposed product (rmatvec), which adjoints need: give one")
            plain = matrix.rmatvec if transposed else matrix.matvec
            assert plain is not None
        elif isinstance(matrix, SparseMatrix):
            plain = lambda v: matrix.matvec(v, transposed=transposed)  # noqa: E731
        else:
            turned = matrix.mT if transposed else matrix
            plain = lambda v: (turned @ v.unsqueeze(-1)).squeeze(-1)  # noqa: E731
        apply = self.preconditioner
        inner = lambda v: apply(v, transposed)  # noqa: E731
        if conjugated and self.dtype.is_complex:
            return (lambda v: plain(v.conj()).conj()), (lambda v: inner(v.conj()).conj())
        return plain, inner

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        check_sides(self, b)
        product, precondition = self.products(transposed, conjugated)
        sides = b.unsqueeze(-1) if b.dim() == 2 else b
        scale = _scale(sides)
        self.log.n_solves += sides.shape[0] * sides.shape[2]
        columns, good = [], torch.ones(self.rows, dtype=torch.bool, device=self.device)
        for k in range(sides.shape[2]):
            unit = scale[:, k]
            side = sides[..., k] / unit.unsqueeze(-1)
            goal = self.solver.goal(side, unit)
            if self.solver.side == "right":
                x, norm = self.solver.iterate(product, precondition, side, goal, self.log)
            else:
                x, norm = self._from_the_left(product, precondition, side, goal)
            # a factor of two for the rounding of the recursions; an infinite side would have an infinite goal
            ok = (norm <= 2 * goal) & torch.isfinite(norm)
            # never a number that only looks like a solution
            columns.append(torch.where(ok.unsqueeze(-1), x * unit.unsqueeze(-1), float("nan")))
            good = good & ok
        self.converged = good
        self.log.solve_seconds += time.perf_counter() - start
        return torch.stack(columns, -1).reshape(b.shape) if columns else b.clone()

    def _from_the_left(self, product: Product, precondition: Product, b: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
        """``M^-1 A x = M^-1 b``. The iteration sees preconditioned residuals only: it is begun again until the true one is small."""
        x, r, norm = torch.zeros_like(b), b, torch.linalg.vector_norm(b, dim=-1)
        for _ in range(_ROUNDS):
            if not bool((norm > goal).any()):
                break
            turned = precondition(r)
            size = torch.linalg.vector_norm(turned, dim=-1)
            # as much smaller as the true residual has to become
            inner = torch.where(norm > goal, 0.5 * goal / torch.where(norm > 0, norm, 1.0), 1.0) * size
            change, _ = self.solver.iterate(lambda v: precondition(product(v)), lambda v: v, turned, inner, self.log)
            x_new = x + torch.where((norm > goal).unsqueeze(-1), change, 0.0)
            r_new = b - product(x_new)
            found = torch.linalg.vector_norm(r_new, dim=-1)
            better = ~(found >= norm)
            stalled = not bool((better & (found < 0.9 * norm) & (norm > goal)).any())
            x, r, norm = (
                torch.where(better.unsqueeze(-1), x_new, x),
                torch.where(better.unsqueeze(-1), r_new, r),
                torch.where(better, found, norm),
            )
            if stalled:
                break
        return x, norm


def _scale(sides: Tensor) -> Tensor:
    """``(B, k)``: 1, or the size of a side whose norm would overflow or underflow."""
    if sides.shape[1] == 0:
        return torch.ones(sides.shape[0], sides.shape[2], dtype=sides.abs().dtype, device=sides.device)
    size, limits = sides.abs().amax(1), torch.finfo(sides.dtype)
    extreme = ((size > limits.max**0.25) | (size < limits.tiny**0.25)) & (size > 0) & torch.isfinite(size)
    return torch.where(extreme, size, 1.0)


@dataclass(frozen=True)
class Krylov(SolverTraits, ABC):
    """Common settings of the Krylov methods.

    Parameters
    ----------
    rtol : float or None
        None: 1e-10, in single precision 1e-5.
    atol : float
        A row is solved when ``|A x - b| <= max(rtol |b|, atol)``, the residual computed anew (up to a factor of 2 where rounding lets it
        fall no further). Rows that are not are NaN.
    max_iterations : int
        Products with the matrix for one right-hand side, at most.
    preconditioner : None, "jacobi", "ilu", a `Factorization`, or callable
        "ilu": SciPy's incomplete LU (CPU, matrices with entries; for an operator it needs a matrix of its own: see
        `ILU`). A factorisation, for example that of a nearby point. A callable ``M(v, transposed)`` maps ``(B, n)`` to ``(B, n)``.
    side : "right" or "left"
        Where the preconditioner is applied: ``A M^-1 (M x) = b``, whose residuals are the true ones, or ``M^-1 A x = M^-1 b``.
        Solutions are accepted by their true residual in both cases.
    """

    rtol: float | None = None
    atol: float = 0.0
    max_iterations: int = 1000
    preconditioner: Any = None
    side: str = "right"

    def __post_init__(self) -> None:
        rtol = 1e-10 if self.rtol is None else positive(self.rtol, "rtol", zero=True)
        if not (rtol < 1 and rtol + positive(self.atol, "atol", zero=True) > 0):
            raise InvalidInput(f"need 0 <= rtol < 1 and atol >= 0, not both zero, got {self.rtol!r} and {self.atol!r}")
        if self.side not in ("right", "left"):
            raise InvalidInput(f"side must be 'right' or 'left', got {self.side!r}")
        counted(self.max_iterations, "max_iterations")

    @property
    def matrix_free(self) -> bool:
        """Whether products with the Jacobian are all that is needed."""
        return not needs_entries(self.preconditioner)

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`: builds the preconditioner."""
        return _Iterative(matrix, self, Log() if log is None else log, None)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`."""
        return _Iterative(matrix, self, factorization.log, None)

    @abstractmethod
    def iterate(self, product: Product, precondition: Product, b: Tensor, goal: Tensor, log: Log) -> tuple[Tensor, Tensor]:
        """The solution ``(B, n)`` and the norms of its residuals ``(B,)``, computed anew, which are to reach ``goal``."""

    def goal(self, b: Tensor, unit: Tensor) -> Tensor:
        """``(B,)``: what the norm of the residual is to reach, for sides that have been divided by ``unit``."""
        rtol = self.rtol if self.rtol is not None else 1e-5 if torch.finfo(b.dtype).bits == 32 else 1e-10
        return torch.maximum(rtol * torch.linalg.vector_norm(b, dim=-1), self.atol / unit)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.conj() * y).sum(-1)


@dataclass(frozen=True)
class GMRES(Krylov):
    """Restarted GMRES (Saad & Schultz 1986), classical Gram-Schmidt, twice.

    ``restart``: vectors of the basis, each the size of a right-hand side.
    """

    restart: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self.restart, "restart")

    def iterate(self, product: Product, precondition: Product, b: Tensor, goal: Tensor, log: Log) -> tuple[Tensor, Tensor]:
        """See `Krylov.iterate`."""
        x = torch.zeros_like(b)
        residual, left = b, self.max_iterations
        norm = torch.linalg.vector_norm(residual, dim=-1)
        while left > 0 and bool((norm > goal).any()):
            x_new, used = self._cycle(product, precondition, residual, norm, goal, min(self.restart, left))
            left -= used
            log.n_iterations += used
            x = x + torch.where((norm > goal).unsqueeze(-1), x_new, 0.0)
            residual = b - product(x)
            previous, norm = norm, torch.linalg.vector_norm(residual, dim=-1)
            if not bool(((norm > goal) & (norm < 0.999 * previous)).any()):
                break
        return x, norm

    def _cycle(
        self, product: Product, precondition: Product, residual: Tensor, norm: Tensor, goal: Tensor, size: int
    ) -> tuple[Tensor, int]:
        rows, n = residual.shape
        safe = torch.where(norm > 0, norm, 1.0)
        basis = residual.new_zeros(size + 1, rows, n)
        basis[0] = residual / safe.unsqueeze(-1)
        hessenberg = residual.new_zeros(rows, size + 1, size)
        # least squares by Givens rotations, column by column, for all rows at once
        rotated = residual.new_zeros(rows, size + 1, size)
        right = residual.new_zeros(rows, size + 1)
        right[:, 0] = norm.to(residual.dtype)
        cosines, sines = residual.new_zeros(rows, size), residual.new_zeros(rows, size)
        used = 0
        for j in range(size):
            w = product(precondition(basis[j]))
            known = basis[: j + 1]
            total = torch.zeros_like(hessenberg[:, : j + 1, j])
            for _ in range(2):
                h = (known.conj() * w).sum(-1).T
                w = w - torch.einsum("bj,jbn->bn", h, known)
                total = total + h
            length = torch.linalg.vector_norm(w, dim=-1)
            hessenberg[:, : j + 1, j] = total
            hessenberg[:, j + 1, j] = length.to(w.dtype)
            broke = length <= 50 * torch.finfo(w.dtype).eps * torch.linalg.vector_norm(hessenberg[:, : j + 1, j], dim=-1)
            basis[j + 1] = torch.where(broke.unsqueeze(-1), 0.0, w / torch.where(length > 0, length, 1.0).unsqueeze(-1))
            column = hessenberg[:, :, j].clone()
            for i in range(j):
                upper = cosines[:, i] * column[:, i] + sines[:, i] * column[:, i + 1]
                column[:, i + 1] = -sines[:, i].conj() * column[:, i] + cosines[:, i].conj() * column[:, i + 1]
                column[:, i] = upper
            size_ = torch.sqrt(column[:, j].abs() ** 2 + column[:, j + 1].abs() ** 2)
            denominator = torch.where(size_ > 0, size_, 1.0)
            cosines[:, j], sines[:, j] = column[:, j].conj() / denominator, column[:, j + 1].conj() / denominator
            column[:, j], column[:, j + 1] = size_.to(column.dtype), 0.0
            rotated[:, :, j] = column
            right[:, j + 1] = -sines[:, j].conj() * right[:, j]
            right[:, j] = cosines[:, j] * right[:, j]
            used = j + 1
            if bool(((right[:, j + 1].abs() <= goal) | broke).all()):
                break
        triangle = rotated[:, :used, :used]
        # rows that were done at once have zeros on the diagonal
        diagonal = triangle.diagonal(dim1=-2, dim2=-1)
        triangle = triangle + torch.diag_embed((diagonal == 0).to(triangle.dtype))
        y = torch.linalg.solve_triangular(triangle, right[:, :used].unsqueeze(-1), upper=True).squeeze(-1)
        y = torch.where(diagonal == 0, 0.0, y)
        return precondition(torch.einsum("bj,jbn->bn", y, basis[:used])), used


#: runs of a short recurrence that may end in a breakdown without bringing the residual down, one after the other
_BREAKDOWNS = 3


class ShortRecurrence(Krylov):
    """Methods whose recursion drifts from the true residual and may break down: it is begun again from the true one."""

    def iterate(self, product: Product, precondition: Product, b: Tensor, goal: Tensor, log: Log) -> tuple[Tensor, Tensor]:
        """See `Krylov.iterate`."""
        x, residual, left = torch.zeros_like(b), b, self.max_iterations
        norm = torch.linalg.vector_norm(residual, dim=-1)
        draw, broken = 0, 0
        while left > 0 and bool((norm > goal).any()):
            step, used, finished = self.run(product, precondition, residual, norm > goal, goal, left, draw)
            left -= used
            log.n_iterations += used
            x_new = x + step
            residual_new = b - product(x_new)
            previous, norm_new = norm, torch.linalg.vector_norm(residual_new, dim=-1)
            taken = norm_new < norm  # not so for NaN: what a breakdown has spoilt is thrown away
            x = torch.where(taken.unsqueeze(-1), x_new, x)
            residual, norm = torch.where(taken.unsqueeze(-1), residual_new, residual), torch.where(taken, norm_new, norm)
            if bool(((norm > goal) & (norm < 0.5 * previous)).any()):
                broken = 0
                continue
            # a recursion that says it has finished has come as far as rounding lets it; one that has not may with other shadow vectors
            draw, broken = draw + 1, broken + 1
            if broken >= _BREAKDOWNS or not bool(((norm > goal) & ~finished).any()):
                break
        return x, norm

    @abstractmethod
    def run(
        self, product: Product, precondition: Product, b: Tensor, running: Tensor, goal: Tensor, most: int, draw: int
    ) -> tuple[Tensor, int, Tensor]:
        """The solution by the recursion for the rows that are ``running``, how many products it took, and ``(B,)`` which rows it
        thinks are solved. ``draw`` numbers the shadow vectors: other numbers, other vectors."""


def shadow_vectors(b: Tensor, s: int, draw: int) -> Tensor:
    """``(s, n)`` orthonormal random vectors, the same ones for the same ``draw``."""
    generator = torch.Generator().manual_seed(draw)
    drawn = torch.randn(b.shape[1], s, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(drawn)[0].T.to(b)


def residual_step(t: Tensor, r: Tensor) -> Tensor:
    """``(B,)``: the ``omega`` of least ``|r - omega t|``, but kept away from zero where ``t`` and ``r`` are nearly orthogonal: there it
    would spoil the recursion's other coefficients (Sleijpen & van der Vorst 1995). Zero only where ``t`` or ``r`` is."""
    size_t, size_r = torch.linalg.vector_norm(t, dim=-1), torch.linalg.vector_norm(r, dim=-1)
    inner = _dot(t, r)
    size, fine = inner.abs(), (size_t > 0) & (size_r > 0)
    direction = torch.where(size > 0, inner / torch.where(size > 0, size, 1.0), 1.0)
    least = torch.where(fine, size_r / torch.where(fine, size_t, 1.0), 0.0)
    cosine = torch.where(fine, size / torch.where(fine, size_t * size_r, 1.0), 1.0)
    return direction * least * cosine.clamp(min=0.7)


@dataclass(frozen=True)
class BiCGStab(ShortRecurrence):
    """Stabilised biconjugate gradients (van der Vorst 1992): short recurrences, little memory. Where the recursion breaks down it
    begins again with another shadow residual."""

    def run(
        self, product: Product, precondition: Product, b: Tensor, running: Tensor, goal: Tensor, most: int, draw: int
    ) -> tuple[Tensor, int, Tensor]:
        """See `ShortRecurrence.run`."""
        x, r = torch.zeros_like(b), b
        shadow = r.clone() if draw == 0 else _mixed(r, draw)
        rho = alpha = omega = torch.ones_like(_dot(r, r))
        v = p = torch.zeros_like(b)
        used, restarts, tiny, small = 0, 0, torch.finfo(b.dtype).tiny, 10 * torch.finfo(b.dtype).eps

        def ratio(top: Tensor, bottom: Tensor) -> Tensor:
            return torch.where(bottom.abs() > tiny, top / torch.where(bottom.abs() > tiny, bottom, 1.0), 0.0)

        def orthogonal(inner: Tensor, y: Tensor) -> Tensor:
            return inner.abs() <= small * torch.linalg.vector_norm(shadow, dim=-1) * torch.linalg.vector_norm(y, dim=-1)

        solved = ~running
        while used < most and bool(running.any()):
            used += 2
            rho_new = _dot(shadow, r)
            beta = ratio(rho_new, rho) * ratio(alpha, omega)
            p = r + beta.unsqueeze(-1) * (p - omega.unsqueeze(-1) * v)
            p_hat = precondition(p)
            v = product(p_hat)
            along = _dot(shadow, v)
            # the quotient of what rounding has left of two inner products that are zero would be anything
            broken = orthogonal(along, v) | orthogonal(rho_new, r)
            alpha = torch.where(broken, 0.0, ratio(rho_new, along))
            s = r - alpha.unsqueeze(-1) * v
            s_hat = precondition(s)
            t = product(s_hat)
            omega = residual_step(t, s)
            mask = running.unsqueeze(-1)
            x = torch.where(mask, x + alpha.unsqueeze(-1) * p_hat + omega.unsqueeze(-1) * s_hat, x)
            r = torch.where(mask, s - omega.unsqueeze(-1) * t, r)
            rho = rho_new
            norm = torch.linalg.vector_norm(r, dim=-1)
            # a row that has broken down begins again from where it is
            stuck = running & broken & (norm > goal)
            if bool(stuck.any()):
                restarts += 1
                again = stuck.unsqueeze(-1)
                shadow = torch.where(again, _mixed(r, draw + restarts), shadow)
                p, v = torch.where(again, 0.0, p), torch.where(again, 0.0, v)
                rho, alpha, omega = (torch.where(stuck, 1.0, q) for q in (rho, alpha, omega))
            solved = solved | (norm <= goal)
            running = running & (norm > goal) & torch.isfinite(norm)
        return x, used, solved


def _mixed(r: Tensor, draw: int) -> Tensor:
    """The residual's direction and a random one: orthogonal to neither ``r`` nor, as ``r`` itself is for a skew matrix, ``A r``."""
    norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True)
    return r / torch.where(norm > 0, norm, 1.0) + 0.5 * shadow_vectors(r, 1, draw)
