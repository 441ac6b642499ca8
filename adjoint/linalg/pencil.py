"""The two matrices of an implicit equation ``F(t, y, y') = 0``, and what is factorised of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import Factorization, LinearSolver, Log, Matrix, SparseMatrix

__all__ = ["Pencil", "ScaledFactors", "regular_size", "scaled_factors", "split"]


@dataclass(frozen=True, eq=False)
class Pencil:
    """``E = F_y'`` and ``G = F_y``: two dense ``(B, n, n)`` tensors, or two sparse matrices with one pattern."""

    E: Matrix
    G: Matrix

    def at(self, c: Tensor) -> Matrix:
        """``E + c G`` for ``c`` of shape ``(B, 1)``, real or complex."""
        if isinstance(self.E, SparseMatrix) and isinstance(self.G, SparseMatrix):
            return SparseMatrix(self.E.indices, self.E.values + c * self.G.values, self.E.shape)
        assert isinstance(self.E, Tensor) and isinstance(self.G, Tensor)
        return self.E + c.unsqueeze(-1) * self.G

    def mass(self, v: Tensor) -> Tensor:
        """``E v`` for ``v`` of shape ``(B, n)``."""
        if isinstance(self.E, SparseMatrix):
            return self.E.matvec(v)
        assert isinstance(self.E, Tensor)
        return (self.E @ v.unsqueeze(-1)).squeeze(-1)


def regular_size(h: Tensor, pencil: Pencil) -> Tensor:
    """``h`` (B, 1), but a small step, in units of the two matrices, in rows where it is zero: there ``E + h G`` may be singular."""
    parts = [m.values if isinstance(m, SparseMatrix) else m for m in (pencil.E, pencil.G)]
    mass, slope = (x.detach().abs().flatten(1).amax(-1, keepdim=True).expand_as(h) for x in parts)  # type: ignore[union-attr]
    # no round number, which might be the one at which they cancel
    small = torch.where((mass > 0) & (slope > 0), 0.00618 * mass / slope, 1.0).to(h.dtype)
    return torch.where(h == 0, small, h)


def split(matrix: Matrix) -> Pencil:
    """The pencil from the Jacobian ``[G E]``, ``(n, 2 n)``, of ``F`` in ``y`` and ``y'`` side by side."""
    if isinstance(matrix, Tensor):
        n = matrix.shape[-2]
        return Pencil(matrix[..., n:], matrix[..., :n])
    if not isinstance(matrix, SparseMatrix):
        raise TypeError(f"the Jacobian of an implicit equation must be dense or sparse, got a {type(matrix).__name__}")
    n = matrix.shape[0]
    rows, columns = matrix.indices
    slope = columns >= n
    keys, place = torch.unique(rows * n + columns % n, return_inverse=True)
    indices = torch.stack([keys // n, keys % n])
    values = matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)

    def part(which: Tensor) -> SparseMatrix:
        out = values.new_zeros(values.shape[0], keys.shape[0])
        return SparseMatrix(indices, out.index_add(1, place[which], values[:, which]), (n, n))

    return Pencil(part(slope), part(~slope))


@dataclass(frozen=True, eq=False)
class ScaledFactors:
    """Factors of ``D A`` for the diagonal ``D`` that makes the largest entry of every row one: equations may have any units."""

    factors: Factorization
    scale: Tensor
    scaled: Matrix

    def solve(self, b: Tensor) -> Tensor:
        """``A^-1 b`` for ``(B, n)``."""
        return self.factors.solve(self.scale * b)

    def solve_adjoint(self, w: Tensor) -> Tensor:
        """``A^-* w`` for ``(B, n)``."""
        return self.scale * self.factors.solve(w, transposed=True, conjugated=True)


def scaled_factors(solver: LinearSolver, matrix: Matrix, log: Log, old: ScaledFactors | None = None) -> ScaledFactors:
    """Factorise, with what can be kept of old factors of the same pattern."""
    if isinstance(matrix, SparseMatrix):
        rows = matrix.indices[0]
        size = matrix.values.abs()
        largest = size.new_zeros(size.shape[0], matrix.shape[0]).scatter_reduce(1, rows.expand_as(size), size, "amax")
        scale = _reciprocal(largest)
        scaled: Matrix = SparseMatrix(matrix.indices, matrix.values * scale.index_select(1, rows), matrix.shape)
    else:
        assert isinstance(matrix, Tensor)
        scale = _reciprocal(matrix.abs().amax(-1))
        scaled = matrix * scale.unsqueeze(-1)
    factors = solver.factor(scaled, log) if old is None else solver.refactor(old.factors, scaled)
    return ScaledFactors(factors, scale, scaled)


def _reciprocal(largest: Tensor) -> Tensor:
    return torch.where(largest > 0, 1 / largest, 1.0)
