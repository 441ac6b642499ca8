"""Branches of ``F(x, lam) = 0``: natural-parameter and pseudo-arclength continuation, and the folds on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..linalg import DenseLU, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix
from .rows import product

__all__ = ["Branch", "BranchProblem", "Continuation", "Fold"]

_Status = Literal["end", "max_points", "step_too_small", "no_start"]


@dataclass(frozen=True)
class BranchProblem:
    """``residual(x, lam)`` with ``x`` (1, n) and ``lam`` (1,) gives (1, n); ``jacobian(x, lam)`` is ``F_x``, dense (1, n, n) or sparse.

    ``lam_derivative(x, lam)`` is ``F_lam`` (1, n); None for a central difference.
    """

    residual: Callable[[Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], Matrix]
    lam_derivative: Callable[[Tensor, Tensor], Tensor] | None = None
    linear_solver: LinearSolver = field(default_factory=DenseLU)
    log: Log = field(default_factory=Log)


@dataclass(frozen=True)
class Fold:
    """A point where ``d lam / ds = 0``; it lies between the points ``after`` and ``after + 1`` of the branch."""

    x: Tensor
    lam: Tensor
    after: int


@dataclass(frozen=True)
class Branch:
    """``K`` points: ``x`` (K, n), ``lam`` (K,), unit ``tangents`` (K, n + 1), last entry ``d lam / ds``; ``status`` says why it ends:
    "end" (of the interval of ``lam``), "max_points", "step_too_small", or "no_start" (no root at the start; ``K = 0``)."""

    x: Tensor
    lam: Tensor
    tangents: Tensor
    folds: tuple[Fold, ...]
    status: _Status

    @property
    def success(self) -> bool:
        """Whether the branch was followed as far as was asked."""
        return self.status in ("end", "max_points")


@dataclass(frozen=True)
class Continuation:
    """Predictor along the tangent, Newton's corrector on the plane across it (Keller 1977; Allgower & Georg 1990, chapter 6).

    ``kind="natural"`` keeps ``lam`` fixed in the corrector, and ends with "step_too_small" at a fold; "arclength" passes it. Arc length is
    ``|dx|^2 / n + dlam^2``, so that grids of any fineness give the same steps. Bordered systems are solved by block elimination with the
    factors of ``F_x`` and iterative refinement; where these fail, next to a fold, the bordered matrix itself is factorised.
    The step aims at ``iterations`` corrections. Folds are located by the regula falsi (Illinois) on ``d lam / ds``, to ``fold_tol``.
    """

    kind: Literal["arclength", "natural"] = "arclength"
    step: float = 0.1
    min_step: float = 1e-8
    max_step: float = 1.0
    max_points: int = 200
    tol: float = 1e-10
    iterations: int = 4
    max_iterations: int = 12
    fold_tol: float = 1e-10

    def __post_init__(self) -> None:
        if self.kind not in ("arclength", "natural"):
            raise InvalidInput(f"kind must be 'arclength' or 'natural', got {self.kind!r}")
        if not 0 < self.min_step <= self.step <= self.max_step:
            raise InvalidInput(f"need 0 < min_step <= step <= max_step, got {self.min_step!r}, {self.step!r}, {self.max_step!r}")
        if not (self.max_points >= 2 and 1 <= self.iterations <= self.max_iterations and self.tol > 0 and self.fold_tol > 0):
            raise InvalidInput(f"need max_points >= 2, 1 <= iterations <= max_iterations and positive tolerances, got {self!r}")

    @torch.no_grad()
    def trace(self, problem: BranchProblem, x0: Tensor, lam0: float, lam_end: float, direction: int = 1) -> Branch:
        """The branch through the root near ``x0`` (n,) at ``lam0``, followed until ``lam`` leaves the interval between ``lam0`` and
        ``lam_end`` (on either side), or for ``max_points``. ``direction`` -1 starts away from ``lam_end``."""
        if x0.dim() != 1:
            raise InvalidInput(f"x0 must have shape (n,), got {tuple(x0.shape)}: branches are followed one at a time")
        if direction not in (1, -1) or lam_end == lam0:
            raise InvalidInput(f"need direction 1 or -1 and lam_end != lam0, got {direction!r} and {lam_end!r}")
        if x0.is_complex():
            raise InvalidInput("x0 must be real: a complex branch has no arc length here")
        n = x0.numel()
        z = torch.cat([x0, x0.new_tensor([lam0])])
        parameter = _unit(z)
        start = self._correct(problem, z, parameter)
        if start is None:
            empty = x0.new_zeros(0, n)
            return Branch(empty, x0.new_zeros(0), x0.new_zeros(0, n + 1), (), "no_start")
        z = start[0]
        tangent = self._tangent(problem, z, parameter)
        if float(tangent[-1]) * (lam_end - lam0) * direction < 0:
            tangent = -tangent
        points, tangents, folds = [z], [tangent], []
        h, status = self.step, "max_points"
        low, high = min(lam0, lam_end), max(lam0, lam_end)
        while len(points) < self.max_points:
            across = tangent if self.kind == "arclength" else parameter
            found = self._correct(problem, z + h * tangent, across)
            turned = None if found is None else self._tangent(problem, found[0], tangent)
            # a sharp turn means that the corrector may have jumped to another part of the branch
            jumped = turned is not None and float(_dot(turned, tangent)) < 0.7
            back = found is not None and self.kind == "natural" and turned is not None and float(turned[-1]) * float(tangent[-1]) <= 0
            if found is None or turned is None or jumped or back:
                h /= 2
                if h < self.min_step:
                    status = "step_too_small"
                    break
                continue
            new, used = found
            if float(turned[-1]) * float(tangent[-1]) < 0:
                fold = self._fold(problem, z, tangent, h, len(points) - 1)
                if fold is not None:
                    folds.append(fold)
            outside = not low <= float(new[-1]) <= high
            if outside:
                edge = high if float(new[-1]) > high else low
                ended = self._edge(problem, z, new, edge)
                if ended is not None:
                    points.append(ended)
                    tangents.append(self._tangent(problem, ended, tangent))
                    status = "end"
                    break
                h /= 2
                if h < self.min_step:
                    status = "step_too_small"
                    break
                continue
            z, tangent = new, turned
            points.append(z)
            tangents.append(tangent)
            h = min(max(h * min(max(self.iterations / max(used, 1), 0.5), 2.0), self.min_step), self.max_step)
        Z = torch.stack(points)
        return Branch(Z[:, :-1], Z[:, -1], torch.stack(tangents), tuple(folds), status)

    def _correct(self, problem: BranchProblem, guess: Tensor, across: Tensor) -> tuple[Tensor, int] | None:
        """Newton on ``F = 0, <across, z - guess> = 0``; the root and the number of steps, or None."""
        z, last = guess, float("inf")
        for k in range(self.max_iterations):
            f = problem.residual(z[None, :-1], z[-1:])[0]
            if not bool(torch.isfinite(f).all()):
                return None
            move = _bordered(problem, z, across, -f, -_dot(across, z - guess))
            if move is None:
                return None
            size = float(_dot(move, move).sqrt())
            if k and size > 2 * last:
                return None
            z, last = z + move, size
            if size <= self.tol * (1 + float(_dot(z, z).sqrt())):
                return z, k + 1
        return None

    def _tangent(self, problem: BranchProblem, z: Tensor, along: Tensor) -> Tensor:
        """The unit tangent with a positive product with ``along``."""
        out = _bordered(problem, z, along, torch.zeros_like(z[:-1]), z.new_ones(()))
        if out is None:
            return torch.full_like(z, float("nan"))
        return out / _dot(out, out).sqrt()

    def _edge(self, problem: BranchProblem, z: Tensor, new: Tensor, edge: float) -> Tensor | None:
        """The point at ``lam = edge`` between two points."""
        part = (edge - z[-1]) / (new[-1] - z[-1])
        guess = z + part * (new - z)
        guess[-1] = edge
        found = self._correct(problem, guess, _unit(z))
        return None if found is None else found[0]

    def _fold(self, problem: BranchProblem, z: Tensor, tangent: Tensor, h: float, after: int) -> Fold | None:
        """Where ``d lam / ds`` changes sign within a step from ``z``."""

        def at(s: float) -> tuple[Tensor, float] | None:
            found = self._correct(problem, z + s * tangent, tangent)
            return None if found is None else (found[0], float(self._tangent(problem, found[0], tangent)[-1]))

        right = at(h)
        if right is None:
            return None
        a, fa, b, (point, fb) = 0.0, float(tangent[-1]), h, right
        for _ in range(60):
            s = b - fb * (b - a) / (fb - fa)
            here = at(s)
            if here is None:
                return None
            point, f = here
            if abs(f) <= self.fold_tol or abs(b - a) <= 1e-15 * h:
                break
            if f * fb < 0:
                a, fa = b, fb
            else:
                fa /= 2
            b, fb = s, f
        return Fold(point[:-1], point[-1], after)


def _unit(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[-1] = 1.0
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return a[:-1] @ b[:-1] / max(a.numel() - 1, 1) + a[-1] * b[-1]


def _bordered(problem: BranchProblem, z: Tensor, across: Tensor, f: Tensor, g: Tensor) -> Tensor | None:
    """Solve ``[F_x, F_lam; across] (dx, dlam) = (f, g)``; None where even the bordered matrix is singular.

    Block elimination (Keller 1977) loses digits near folds, where ``F_x`` is nearly singular though the bordered matrix is not. Two
    rounds of refinement on the whole system repair that (Govaerts 2000, section 3.6); if they do not, or ``F_x`` is exactly singular, the
    bordered matrix is factorised.
    """
    x, lam = z[None, :-1], z[-1:]
    A = problem.jacobian(x, lam)
    b = _lam_derivative(problem, x, lam)
    n = f.numel()
    c, d = across[:-1] / max(n, 1), across[-1]
    factors = problem.linear_solver.factor(A, problem.log)

    def solve(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        both = factors.solve(torch.stack([f, b], -1).unsqueeze(0))[0]
        mu = (g - c @ both[:, 0]) / (d - c @ both[:, 1])
        return both[:, 0] - mu * both[:, 1], mu

    def defect(dx: Tensor, mu: Tensor) -> tuple[Tensor, Tensor]:
        return f - product(A, dx.unsqueeze(0))[0] - mu * b, g - c @ dx - d * mu

    dx, mu = solve(f, g)
    for _ in range(2):
        ex, em = solve(*defect(dx, mu))
        dx, mu = dx + ex, mu + em
    r, rg = defect(dx, mu)
    scale = float(f.abs().max()) + float(g.abs()) + float(b.abs().max() * mu.abs())
    if float(r.abs().max()) + float(rg.abs()) <= 1e-9 * scale:
        return torch.cat([dx, mu.reshape(1)])
    if isinstance(A, LinearOperator):
        return None
    out = problem.linear_solver.factor(_with_border(A, b, c, d), problem.log).solve(torch.cat([f, g.reshape(1)]).unsqueeze(0))[0]
    return out if bool(torch.isfinite(out).all()) else None


def _with_border(A: Tensor | SparseMatrix, b: Tensor, c: Tensor, d: Tensor) -> Tensor | SparseMatrix:
    """``[A, b; c, d]``, dense (1, n + 1, n + 1) or sparse."""
    n = b.numel()
    if isinstance(A, Tensor):
        return torch.cat([torch.cat([A[0], b.unsqueeze(-1)], 1), torch.cat([c, d.reshape(1)]).unsqueeze(0)]).unsqueeze(0)
    i = torch.arange(n, device=b.device)
    rows = torch.cat([A.indices[0], i, torch.full_like(i, n), i.new_tensor([n])])
    columns = torch.cat([A.indices[1], torch.full_like(i, n), i, i.new_tensor([n])])
    order = torch.argsort(rows * (n + 1) + columns)
    values = torch.cat([A.values.reshape(-1), b, c, d.reshape(1)])
    return SparseMatrix(torch.stack([rows, columns])[:, order], values[order].unsqueeze(0), (n + 1, n + 1))


def _lam_derivative(problem: BranchProblem, x: Tensor, lam: Tensor) -> Tensor:
    if problem.lam_derivative is not None:
        return problem.lam_derivative(x, lam)[0]
    h = torch.finfo(x.dtype).eps ** (1 / 3) * (1 + lam.abs())
    return ((problem.residual(x, lam + h) - problem.residual(x, lam - h)) / (2 * h))[0]
