"""Induced dimension reduction: short recurrences with a few more vectors than BiCGStab, and a steadier convergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import counted
from .krylov import Product, ShortRecurrence, residual_step, shadow_vectors

__all__ = ["IDR"]


@dataclass(frozen=True)
class IDR(ShortRecurrence):
    """IDR(s) with biorthogonal residuals (van Gijzen & Sonneveld 2011, ACM Trans. Math. Softw. 38:5, algorithm 913).

    ``s`` test vectors, each the size of a right-hand side; ``s = 1`` is BiCGStab in exact arithmetic. They are drawn from a generator of
    their own with a fixed seed, so results repeat; after a breakdown other ones are drawn.
    """

    s: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        counted(self.s, "s")

    def run(
        self, product: Product, precondition: Product, b: Tensor, running: Tensor, goal: Tensor, most: int, draw: int
    ) -> tuple[Tensor, int, Tensor]:
        """See `ShortRecurrence.run`."""
        rows, n = b.shape
        s = min(self.s, max(n, 1))
        P = shadow_vectors(b, s, draw)
        x, r = torch.zeros_like(b), b
        G, U = b.new_zeros(s, rows, n), b.new_zeros(s, rows, n)
        M = torch.eye(s, dtype=b.dtype, device=b.device).repeat(rows, 1, 1)
        omega = torch.ones_like(r[:, 0])
        used, solved = 0, ~running

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
                solved = solved | (norm <= goal)
                running = running & (norm > goal) & torch.isfinite(norm)
            v = precondition(r)
            t = product(v)
            used += 1
            omega = residual_step(t, r)
            step = torch.where(running, omega, 0.0).unsqueeze(-1)
            r, x = r - step * t, x + step * v
            norm = torch.linalg.vector_norm(r, dim=-1)
            solved = solved | (norm <= goal)
            running = running & (norm > goal) & torch.isfinite(norm) & (omega != 0)
        return x, used, solved
