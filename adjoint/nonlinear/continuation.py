"""Branches of ``F(x, lam) = 0``: natural-parameter and pseudo-arclength continuation, and the folds on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..errors import InvalidInput, counted, positive
from ..linalg import DenseLU, Factorization, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix
from .protocol import product

__all__ = ["Branch", "BranchProblem", "Continuation", "Fold"]

#: part of the first step within which two branches that come so close cross, crossings in one step, and steps after a jump that do not grow
_CROSSING, _CROSSINGS, _WARY = 1e-4, 3, 4
#: unknowns up to which all eigenvalues are found, and size of the Krylov space beyond
_ALL, _KRYLOV = 64, 12

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
    The step aims at ``iterations`` corrections. It is halved where its end may lie on another branch: where the branch turns sharply, the
    end is far from the prediction or off the curve that its tangents make, or the bordered matrix ``[F_x, F_lam; tangent]``, which is
    regular all along a branch, is turned over: ``M(start)^-1 M(end)`` has an eigenvalue on the negative side (the sign of the determinant
    shows that of an odd number only). Where two branches cross it is turned over too, in the shortest step that leads over: that is passed.
    Folds are located by the regula falsi (Illinois) on ``d lam / ds``, to ``fold_tol``.
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
        for name in ("step", "min_step", "max_step", "tol", "fold_tol"):
            positive(getattr(self, name), name)
        for name in ("max_points", "iterations", "max_iterations"):
            counted(getattr(self, name), name)
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
        if isinstance(direction, Tensor) or direction not in (1, -1) or lam_end == lam0:
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
        h, status, wary = self.step, "max_points", 0
        low, high = min(lam0, lam_end), max(lam0, lam_end)
        here = _Bordered.at(problem, z, tangent)
        while len(points) < self.max_points:
            across = tangent if self.kind == "arclength" else parameter
            found = self._correct(problem, z + h * tangent, across)
            there = None if found is None else _Bordered.at(problem, found[0], tangent)
            turned = None if there is None else there.tangent()
            jumped = found is None or turned is None or _leaves(z, tangent, found[0], turned, h)
            if not (jumped or found is None or there is None):
                jumped = not self._connected(problem, z, tangent, across, h, here, found[0], there)
                wary = _WARY if jumped else wary
            back = turned is not None and self.kind == "natural" and float(turned[-1]) * float(tangent[-1]) <= 0
            if found is None or there is None or turned is None or jumped or back:
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
            z, tangent, here = new, turned, there
            points.append(z)
            tangents.append(tangent)
            growth = min(max(self.iterations / max(used, 1), 0.5), 1.0 if wary else 2.0)
            wary = max(wary - 1, 0)
            h = min(max(h * growth, self.min_step), self.max_step)
        Z = torch.stack(points)
        return Branch(Z[:, :-1], Z[:, -1], torch.stack(tangents), tuple(folds), status)

    def _correct(self, problem: BranchProblem, guess: Tensor, across: Tensor) -> tuple[Tensor, int] | None:
        """Newton on ``F = 0, <across, z - guess> = 0``; the root and the number of steps, or None."""
        z, last = guess, float("inf")
        for k in range(self.max_iterations):
            f = problem.residual(z[None, :-1], z[-1:])[0]
            if not bool(torch.isfinite(f).all()):
                return None
            move = _Bordered.at(problem, z, across).solve(-f, -_dot(across, z - guess))
            if move is None:
                return None
            size = float(_dot(move, move).sqrt())
            if k and size > 2 * last:
                return None
            z, last = z + move, size
            if size <= self.tol * (1 + float(_dot(z, z).sqrt())):
                return z, k + 1
        return None

    def _connected(
        self, problem: BranchProblem, z: Tensor, tangent: Tensor, across: Tensor, h: float, here: _Bordered, new: Tensor, there: _Bordered
    ) -> bool:
        """Whether the end ``new`` of a step of length ``h`` from ``z`` is on the same branch, as far as matrices tell.

        Where the matrix is turned over, the place is looked for by bisection. If it is a crossing, points on its two sides come together
        there; those on the two arms of a pair of branches that turn away from each other do not.
        """
        shortest = max(self.min_step, _CROSSING * self.step)
        low, at_low = 0.0, z
        for _ in range(_CROSSINGS):
            if not _turned_over(here, there):
                return True
            high, at_high, beyond = h, new, there
            while high - low > shortest:
                middle = (low + high) / 2
                found = self._correct(problem, z + middle * tangent, across)
                if found is None:
                    return False
                between = _Bordered.at(problem, found[0], tangent)
                if _turned_over(here, between):
                    high, at_high, beyond = middle, found[0], between
                else:
                    low, at_low = middle, found[0]
                apart = at_high - at_low
                if not float(_dot(apart, apart).sqrt()) <= 2 * (high - low):
                    return False
            low, at_low, here = high, at_high, beyond
        return False

    def _tangent(self, problem: BranchProblem, z: Tensor, along: Tensor) -> Tensor:
        """The unit tangent with a positive product with ``along``."""
        out = _Bordered.at(problem, z, along).tangent()
        return torch.full_like(z, float("nan")) if out is None else out

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


@dataclass
class _Bordered:
    """``M = [F_x, F_lam; c, d]`` at one point, with ``(c, d)`` the functional of `_dot` with a direction.

    Block elimination (Keller 1977) loses digits near folds, where ``F_x`` is nearly singular though the bordered matrix is not. Two
    rounds of refinement on the whole system repair that (Govaerts 2000, section 3.6); if they do not, or ``F_x`` is exactly singular, the
    bordered matrix is factorised.
    """

    problem: BranchProblem
    A: Matrix
    b: Tensor
    c: Tensor
    d: Tensor
    factors: Factorization | None = None
    whole: Factorization | None = None

    @classmethod
    def at(cls, problem: BranchProblem, z: Tensor, across: Tensor) -> _Bordered:
        """At the point ``z``, bordered by the direction ``across``."""
        x, lam = z[None, :-1], z[-1:]
        return cls(problem, problem.jacobian(x, lam), _lam_derivative(problem, x, lam), across[:-1] / max(z.numel() - 1, 1), across[-1])

    def product(self, v: Tensor) -> Tensor:
        """``M v``."""
        dx, mu = v[:-1], v[-1]
        return torch.cat([product(self.A, dx.unsqueeze(0))[0] + mu * self.b, (self.c @ dx + self.d * mu).reshape(1)])

    def dense(self) -> Tensor | None:
        """``M`` itself, where its entries are known."""
        if isinstance(self.A, LinearOperator):
            return None
        whole = _with_border(self.A, self.b, self.c, self.d)
        return whole[0] if isinstance(whole, Tensor) else whole.dense()[0]

    def tangent(self) -> Tensor | None:
        """The unit tangent with a positive product with the direction of the border."""
        out = self.solve(torch.zeros_like(self.b), self.d.new_ones(()))
        return None if out is None else out / _dot(out, out).sqrt()

    def solve(self, f: Tensor, g: Tensor) -> Tensor | None:
        """``M^-1 (f, g)``; None where even the bordered matrix is singular."""
        A, b, c, d, problem = self.A, self.b, self.c, self.d, self.problem
        if self.whole is None:
            if self.factors is None:
                self.factors = problem.linear_solver.factor(A, problem.log)
            factors = self.factors

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
            self.whole = problem.linear_solver.factor(_with_border(A, b, c, d), problem.log)
        out = self.whole.solve(torch.cat([f, g.reshape(1)]).unsqueeze(0))[0]
        return out if bool(torch.isfinite(out).all()) else None


def _leaves(z: Tensor, tangent: Tensor, new: Tensor, turned: Tensor, h: float) -> bool:
    """Whether a step of length ``h`` may have left the branch, as its two ends show."""
    size = lambda v: float(_dot(v, v).sqrt())  # noqa: E731
    mean = tangent + turned
    chord = new - z
    # a chord of a smooth arc has the direction of the mean of its end tangents, but for a term of third order
    aside = chord - mean * (_dot(chord, mean) / _dot(mean, mean))
    near = size(chord - h * tangent) <= 0.5 * h and size(aside) <= 0.1 * h
    return not (near and float(_dot(turned, tangent)) >= 0.7)


def _turned_over(here: _Bordered, there: _Bordered) -> bool:
    """Whether ``M(here)^-1 M(there)`` has an eigenvalue of negative real part (and no larger imaginary one), so that on the straight way
    from the one to the other a matrix is singular: all eigenvalues of small matrices, else those that a Krylov space of it finds, the
    outermost ones."""
    n = here.b.numel() + 1
    A, B = (here.dense(), there.dense()) if n <= _ALL else (None, None)
    if A is not None and B is not None:
        ratio, info = torch.linalg.solve_ex(A, B)
        if int(info) or not bool(torch.isfinite(ratio).all()):
            return False
        small = ratio
    else:
        k = torch.arange(n, device=here.b.device, dtype=here.b.dtype) + 1
        basis = [torch.cos(k * k)]
        basis[0] = basis[0] / torch.linalg.vector_norm(basis[0])
        small = here.b.new_zeros(_KRYLOV, _KRYLOV)
        for j in range(_KRYLOV):
            w = there.product(basis[j])
            out = here.solve(w[:-1], w[-1])
            if out is None:
                return False
            whole = float(torch.linalg.vector_norm(out))
            for _ in range(2):  # twice is enough
                known = torch.stack(basis)
                part = known @ out
                small[: j + 1, j] += part
                out = out - part @ known
            left = torch.linalg.vector_norm(out)
            if j + 1 == _KRYLOV or float(left) <= 1e-10 * whole:
                small = small[: j + 1, : j + 1]
                break
            small[j + 1, j] = left
            basis.append(out / left)
    values = torch.linalg.eigvals(small)
    return bool(((values.real < 0) & (values.imag.abs() <= values.real.abs())).any())


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
