"""The linear problems of a Levenberg-Marquardt step, ``min |A s + r|^2 + mu |D s|^2``, with dense or sparse ``A``; never normal equations.

Both leave ``active`` unknowns where they are: those at a bound that the steps would leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import Factorization, SparseMatrix
from .protocol import RootProblem, ill_determined, product

__all__ = ["DenseLeastSquares", "SparseLeastSquares"]

#: size of the block of residuals beside columns of size one: small singular values of the augmented matrix are not squared down to it
_BALANCE = 1e-3


class DenseLeastSquares:
    """By QR (Moré 1978)."""

    def __init__(self, A: Tensor, r: Tensor, active: Tensor) -> None:
        self.A, self.r, self.n = A, r, A.shape[-1]
        self.columns = torch.linalg.vector_norm(A, dim=-2)
        self.columns = torch.where(active, 0.0, self.columns)
        if bool(active.any()):
            # without the columns of what is active, and an equation that keeps it
            whole = torch.cat([torch.where(active.unsqueeze(-2), 0.0, A), torch.diag_embed(active.to(A.dtype))], -2)
            r = torch.cat([r, r.new_zeros(r.shape[0], self.n)], -1)
            self.columns = torch.where(active, 1.0, self.columns)
        else:
            whole = A
        Q, self.R = torch.linalg.qr(whole)
        self.projected = (Q.mH @ r.unsqueeze(-1)).squeeze(-1)

    def gauss(self) -> tuple[Tensor, Tensor]:
        """The step for ``mu = 0``, and where it is determined."""
        gauss = -torch.linalg.solve_triangular(self.R, self.projected.unsqueeze(-1), upper=True).squeeze(-1)
        sizes = self.R.diagonal(dim1=-2, dim2=-1).abs() / torch.where(self.columns > 0, self.columns, 1.0)
        least = sizes.amin(-1) if self.n else sizes.new_ones(sizes.shape[0])
        return gauss, torch.isfinite(gauss).all(-1) & (least > 8 * self.n * torch.finfo(least.dtype).eps)

    def damped(self, mu: Tensor, d: Tensor) -> Tensor:
        """The step for ``mu`` (B,) and ``D = diag(d)``: by a second QR, whose matrix is always of full rank."""
        diagonal = mu.sqrt().unsqueeze(-1) * d
        stacked = torch.cat([self.R, torch.diag_embed(diagonal.to(self.R.dtype))], -2)
        right = torch.cat([self.projected, torch.zeros_like(self.projected)], -1).unsqueeze(-1)
        Q, T = torch.linalg.qr(stacked)
        return -torch.linalg.solve_triangular(T, Q.mH @ right, upper=True).squeeze(-1)

    def product(self, s: Tensor) -> Tensor:
        """``A s``."""
        return (self.A @ s.unsqueeze(-1)).squeeze(-1)


class SparseLeastSquares:
    """By sparse factors of the augmented matrix ``[a I, -A; A*, mu / a]`` (Björck 1996, section 2.5.2), columns scaled to one,
    refined once. ``problem`` has the linear solver; ``earlier``: one for another matrix of the same pattern.
    """

    def __init__(self, problem: RootProblem, A: SparseMatrix, r: Tensor, active: Tensor, earlier: SparseLeastSquares | None = None) -> None:
        self.problem, self.A, self.r, self.active = problem, A, r, active
        (m, n), B = A.shape, r.shape[0]
        rows, columns = A.indices
        squares = A.values.abs().square().expand(B, -1)
        self.columns = squares.new_zeros(B, n).index_add(1, columns, squares).sqrt()
        self.columns = torch.where(active, 1.0, self.columns)
        self.inverse = 1 / torch.where(self.columns > 0, self.columns, 1.0)
        values = torch.where(active[:, columns], 0.0, A.values * self.inverse[:, columns])
        if earlier is None:
            i, j = torch.arange(m, device=r.device), torch.arange(m, m + n, device=r.device)
            down, right = torch.cat([i, rows, m + columns, j]), torch.cat([i, m + columns, rows, j])
            self.order = torch.argsort(down * (m + n) + right)
            self.indices = torch.stack([down, right])[:, self.order]
        else:
            self.order, self.indices = earlier.order, earlier.indices
        self.head = torch.cat([values.new_full((B, m), _BALANCE), -values, values.conj().resolve_conj()], 1)
        self._factors: Factorization | None = None if earlier is None else earlier._factors

    def gauss(self) -> tuple[Tensor, Tensor]:
        """See `DenseLeastSquares.gauss`. Square systems are solved as they are."""
        n, problem = self.A.shape[1], self.problem
        if self.A.shape[0] == n and not bool(self.active.any()):
            factors = problem.linear_solver.factor(self.A, problem.log)
            step, matrix = -factors.solve(self.r), self.A
        else:
            matrix, factors = self._augmented(torch.zeros_like(self.columns))
            step = self._solve(matrix, factors)
        return step, torch.isfinite(step).all(-1) & ~ill_determined(matrix, factors)

    def damped(self, mu: Tensor, d: Tensor) -> Tensor:
        """See `DenseLeastSquares.damped`."""
        return self._solve(*self._augmented(mu.unsqueeze(-1) * (d * self.inverse).square()))

    def product(self, s: Tensor) -> Tensor:
        """``A s``."""
        return product(self.A, s)

    def _augmented(self, corner: Tensor) -> tuple[SparseMatrix, Factorization]:
        m, n = self.A.shape
        tail = torch.where(self.active, 1.0, corner / _BALANCE).to(self.head.dtype)
        matrix = SparseMatrix(self.indices, torch.cat([self.head, tail], 1)[:, self.order], (m + n, m + n))
        solver, log = self.problem.linear_solver, self.problem.log
        self._factors = solver.factor(matrix, log) if self._factors is None else solver.refactor(self._factors, matrix)
        return matrix, self._factors

    def _solve(self, matrix: SparseMatrix, factors: Factorization) -> Tensor:
        side = torch.cat([self.r, self.r.new_zeros(self.r.shape[0], self.A.shape[1])], 1)
        out = factors.solve(side)
        out = out + factors.solve(side - product(matrix, out))
        return torch.where(self.active, 0.0, out[:, self.A.shape[0] :] * self.inverse)
