"""Functions ``g(t, q)`` of the coordinates of a mechanism, ``(..., m)``, along its motion; rows of a batch are independent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..linalg.functions import inverse

__all__ = ["Rows", "bend", "independent_rows", "jacobian", "linear", "products", "rate", "saddle", "solved"]

Rows = Callable[[Tensor, Tensor], Tensor]


def linear(g: Rows, t: Tensor, q: Tensor) -> tuple[Tensor, Any, Any]:
    """``g``, the products ``w -> (g_t^T w, G^T w)``, and their transpose ``(s, x) -> g_t s + G x``: by two reverse sweeps, as forward mode
    takes many times as long wherever a constant enters."""
    value, pull, *_ = torch.func.vjp(g, t, q)
    _, push, *_ = torch.func.vjp(pull, torch.zeros_like(value))
    return value, pull, push


def rate(g: Rows, t: Tensor, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``g`` and ``dg/dt = G v + g_t``."""
    value, _, push = linear(g, t, q)
    return value, push((torch.ones_like(t), v))[0]


def bend(g: Rows, t: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """The second derivative of ``g`` along the motion without acceleration."""
    return rate(lambda s, x: rate(g, s, x, v)[1], t, q, v)[1]


def products(g: Rows, t: Tensor, q: Tensor, *ws: Tensor) -> list[Tensor]:
    """``G^T w`` of each."""
    _, pull, *_ = torch.func.vjp(lambda x: g(t, x), q)
    return [pull(w)[0] for w in ws]


def jacobian(g: Rows, t: Tensor, q: Tensor) -> Tensor:
    """``G`` (..., m, n)."""
    value, pull, *_ = torch.func.vjp(lambda x: g(t, x), q)
    eye = torch.eye(value.shape[-1], dtype=value.dtype, device=value.device)
    return torch.stack([pull(row.expand_as(value).contiguous())[0] for row in eye], -2)


def independent_rows(G: Tensor) -> tuple[Tensor, Tensor]:
    """Whether the rows of ``G`` (..., m, n) are independent, (...,), and the rank; of one that is not finite they are not."""
    G = G.detach()
    values = torch.linalg.svdvals(torch.where(torch.isfinite(G).all(-1, keepdim=True).all(-2, keepdim=True), G, 0.0))
    rank = (values > 1e-10 * values[..., :1]).sum(-1)
    return rank == G.shape[-2], rank


def saddle(M: Tensor, G: Tensor) -> Tensor:
    """``[[M, G^T], [G, 0]]``."""
    corner = G.new_zeros(*G.shape[:-1], G.shape[-2])
    return torch.cat([torch.cat([M, G.mT], -1), torch.cat([G, corner], -1)], -2)


def solved(matrix: Tensor, *parts: Tensor) -> Tensor:
    """The solution (..., n) of linear equations whose right-hand side is the ``parts``, one below the other; NaN if they are singular."""
    return (inverse(matrix) @ torch.cat(parts, -1).unsqueeze(-1)).squeeze(-1)
