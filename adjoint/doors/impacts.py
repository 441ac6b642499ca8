"""Which contacts push: linear complementarity, of velocities at an impact and of accelerations while contacts last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SingularJacobian
from ..linalg.functions import inverse
from ..system.capture import readable
from ..system.transforms import anywhere
from .holonomic import saddle
from .round_rules import asked

__all__ = ["complementary", "compliance", "pressed"]


def pressed(M: Tensor, G: Tensor, N: Tensor, active: Tensor) -> Tensor:
    """The matrix (..., n + m + c) of ``M a + G^T lam - N^T p = .., G a = .., N a = ..``, with ``p = ..`` in the place of the last for
    contacts that are not ``active`` (..., c)."""
    m, c = G.shape[-2], N.shape[-2]
    corner = G.new_zeros(*G.shape[:-2], m, c)
    below = torch.cat([torch.where(active.unsqueeze(-1), N, 0.0), corner.mT, torch.diag_embed((~active).to(N.dtype))], -1)
    return torch.cat([torch.cat([saddle(M, G), torch.cat([-N.mT, corner], -2)], -1), below], -2)


def compliance(M: Tensor, G: Tensor, N: Tensor) -> Tensor:
    """``W`` (..., c, c): what impulses in the contacts do to the rates of the gaps, with the constraints ``G`` kept."""
    n, c = N.shape[-1], N.shape[-2]
    pushed = torch.cat([N.mT, N.new_zeros(*N.shape[:-2], G.shape[-2], c)], -2)
    return N @ (inverse(saddle(M, G)) @ pushed)[..., :n, :]


@torch.no_grad()
def complementary(
    W: Tensor, b: Tensor, among: Tensor, noise: Tensor, names: Sequence[str], throw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The contacts ``among`` (..., c) that push: ``p >= 0``, ``w = W p + b >= 0``, ``p w = 0``; with what ``p``, NaN where that is not
    determined; and whether it is (..., 1).

    All are tried first; then the first one that is wrong changes sides until none is (Murty 1974, Opsearch 11:123, which ends for positive
    definite ``W``). ``noise`` (..., c): what rates are uncertain by. Raises `SingularJacobian` for contacts that depend on each other, with
    ``throw`` and where values can be looked at.
    """
    W, b, noise = W.detach(), b.detach(), noise.detach()
    diagonal = W.diagonal(dim1=-2, dim2=-1)
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    bad = _dependent(W, diagonal, among)
    if throw and readable(bad):
        _refuse(asked(bad), among, names)
    # nothing is asked of a trajectory that is lost
    among = among & ~bad
    least = noise / torch.where(diagonal > 0, diagonal, 1.0)
    active, p = among, torch.zeros_like(b)
    for _ in range(2 ** min(W.shape[-1], 12) + 1):
        matrix = torch.where(active.unsqueeze(-1), W, eye)
        p = torch.linalg.solve(matrix, torch.where(active, -b, 0.0).unsqueeze(-1)).squeeze(-1)
        w = b + (W @ p.unsqueeze(-1)).squeeze(-1)
        wrong = among & torch.where(active, p < -least, w < -noise)
        if not anywhere(wrong):
            return active, torch.where(bad, float("nan"), p), ~bad
        active = active ^ (wrong & (wrong.to(torch.int64).cumsum(-1) == 1))
    if throw:
        raise SingularJacobian(
            f"it is not decided which of the contacts {', '.join(map(repr, names))} push: they all but depend on each other"
        )
    bad = bad | wrong.any(-1, keepdim=True)
    return active & ~bad, torch.where(bad, float("nan"), p), ~bad


def _dependent(W: Tensor, diagonal: Tensor, among: Tensor) -> Tensor:
    """``(..., 1)``: whether some of the contacts ``among`` follow from others."""
    size = torch.where(diagonal > 0, diagonal, 1.0).rsqrt()
    both = among.unsqueeze(-1) & among.unsqueeze(-2)
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    scaled = torch.where(both, W * size.unsqueeze(-1) * size.unsqueeze(-2), eye)
    # a trajectory that is lost already is found out elsewhere
    scaled = torch.where(torch.isfinite(scaled).all(-1, keepdim=True).all(-2, keepdim=True), scaled, eye)
    return torch.linalg.svdvals(scaled)[..., -1:] <= 1e3 * torch.finfo(W.dtype).eps


def _refuse(bad: Tensor, among: Tensor, names: Sequence[str]) -> None:
    """Raise for the first trajectory that is ``bad`` (..., 1)."""
    bad = bad.reshape(-1)
    if bool(bad.any()):
        row = int(bad.to(torch.int64).argmax())
        closed = among.reshape(-1, among.shape[-1])[row]
        which = ", ".join(repr(name) for name, on in zip(names, closed.tolist(), strict=True) if on)
        many = f" in trajectory {row}" if len(bad) > 1 else ""
        raise SingularJacobian(
            f"the contacts that are closed at one time{many} ({which}) depend on each other or on the constraints: their forces are not "
            "determined. Leave out those that follow from the others (a table stands on three legs)"
        )
