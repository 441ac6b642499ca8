"""Induced dimension reduction: short recurrences with a few more vectors than BiCGStab, and a steadier convergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput
from .krylov import Krylov, Product

__all__ = ["IDR"]


@dataclass(frozen=True)
class IDR(Krylov):
    """IDR(s) with biorthogonal residuals (van Gijzen & Sonneveld 2011, ACM Trans. Math. Softw. 38:5, algorithm 913).

    ``s`` test vectors, each the size of a right-hand side; ``s = 1`` is BiCGStab in exact arithmetic. They are drawn from a generator of
    their own with a fixed seed, so results repeat.
    """

    s: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.s < 1:
            raise InvalidInput(f"s must be at least 1, got {self.s!r}")

    def iterate(self, product: Product, precondition: Product, b: Tensor, goal: Tensor, log: object) -> tuple[Tensor, Tensor]:
        """See `Krylov.iterate`."""
        x, residual, left = torch.zeros_like(b), b, self.max_iterations
        norm = torch.linalg.vector_norm(residual, dim=-1)
        while left > 0 and bool((norm > goal).any()):
            # as in BiCGStab: the residual of the recursion drifts from the true one
            step, used = self._run(product, precondition, residual, norm > goal, goal, left)
            left -= used
            log.n_iterations += used  # type: ignore[attr-defined]
            x_new = x + step
            residual_new = b - product(x_new)
            previous, norm_new = norm, torch.linalg.vector_norm(residual_new, dim=-1)
            taken = ~(norm_new >= norm)
            x = torch.where(taken.unsqueeze(-1), x_new, x)
            residual, norm = torch.where(taken.unsqueeze(-1), residual_new, residual), torch.where(taken, norm_new, norm)
            if not bool(((norm > goal) & (norm < 0.5 * previous)).any()):
                break
        return x, norm

    def _test_vectors(self, b: Tensor, s: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(b.shape[1], s, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn)[0].T.to(b)

    def _run(self, product: Product, precondition: Product, b: Tensor, running: Tensor, goal: Tensor, most: int) -> tuple[Tensor, int]:
        """The solution by the recursion for the rows that are ``running``, and how many products it took."""
        rows, n = b.shape
        s = min(self.s, max(n, 1))
        P = self._test_vectors(b, s)
        x, r = torch.zeros_like(b), b
        G, U = b.new_zeros(s, rows, n), b.new_zeros(s, rows, n)
        M = torch.eye(s, dtype=b.dtype, device=b.device).repeat(rows, 1, 1)
        omega = torch.ones_like(r[:, 0])
        used = 0

        def safe(top: Tensor, bottom: Tensor) -> Tensor:
            fine = bottom.abs() > torch.finfo(b.dtype).tiny
            return torch.where(fine, top / torch.where(fine, bottom, 1.0), 0.0)

        def tests(v: Tensor) -> Tensor:
            return v @ P.mH

        while used < most and bool(running.any()):
            f = tests(r)
            for k in range(s):
                c = torch.linalg.solve_triangular(M[:, k:, k:], f[:, k:, None], upper=False)[..., 0]
                v = precondition(r - torch.einsum("bi,ibn->bn", c, G[k:]))
                u = omega.unsqueeze(-1) * v + torch.einsum("bi,ibn->bn", c, U[k:])
                g = product(u)
                used += 1
                for i in range(k):
                    alpha = safe((g @ P[i].conj()), M[:, i, i]).unsqueeze(-1)
                    g, u = g - alpha * G[i], u - alpha * U[i]
                G[k], U[k] = g, u
                column = tests(g)[:, k:]
                # a row that has broken down (or is done) goes on with the identity, and does not move
                dead = column[:, 0].abs() <= torch.finfo(b.dtype).tiny
                column = torch.where(dead.unsqueeze(-1), torch.eye(s - k, dtype=b.dtype, device=b.device)[0], column)
                M[:, k:, k] = column
                beta = torch.where(dead | ~running, 0.0, safe(f[:, k], column[:, 0])).unsqueeze(-1)
                r, x = r - beta * g, x + beta * u
                f = torch.cat([f[:, : k + 1], f[:, k + 1 :] - beta * column[:, 1:]], 1)
                norm = torch.linalg.vector_norm(r, dim=-1)
                running = running & (norm > goal) & torch.isfinite(norm)
            v = precondition(r)
            t = product(v)
            used += 1
            omega = self._omega(t, r)
            step = torch.where(running, omega, 0.0).unsqueeze(-1)
            r, x = r - step * t, x + step * v
            norm = torch.linalg.vector_norm(r, dim=-1)
            running = running & (norm > goal) & torch.isfinite(norm) & (omega != 0)
        return x, used

    @staticmethod
    def _omega(t: Tensor, r: Tensor) -> Tensor:
        """Of least residual, kept away from zero where ``t`` and ``r`` are nearly orthogonal (Sleijpen & van der Vorst 1995)."""
        size_t, size_r = torch.linalg.vector_norm(t, dim=-1), torch.linalg.vector_norm(r, dim=-1)
        inner = (t.conj() * r).sum(-1)
        fine = (size_t > 0) & (size_r > 0)
        omega = torch.where(fine, inner / torch.where(fine, size_t**2, 1.0), 0.0)
        cosine = torch.where(fine, inner.abs() / torch.where(fine, size_t * size_r, 1.0), 1.0)
        return torch.where((cosine < 0.7) & (cosine > 0), omega * 0.7 / torch.where(cosine > 0, cosine, 1.0), omega)
