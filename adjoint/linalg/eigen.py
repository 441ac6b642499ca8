"""One simple eigenpair of dense matrices, differentiable to any order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import AdjointError, InvalidInput
from ..torch_internals import Node, below_jvp, copy_by_copy
from .functions import inverse

__all__ = ["DegenerateEigenvalue", "eigenpair"]


class DegenerateEigenvalue(AdjointError, ArithmeticError):
    """The eigenvalue is multiple to rounding. ``gap`` is the distance to the next one."""

    def __init__(self, message: str, gap: float) -> None:
        super().__init__(message)
        self.gap = gap


def eigenpair(A: Tensor, sigma: complex) -> tuple[Tensor, Tensor]:
    """The eigenvalue of ``A`` ``(..., n, n)`` nearest ``sigma``, and its vector: ``(...)`` and ``(..., n)``, complex.

    The vector has unit norm, its largest component is real and positive. Derivatives come from a bordered system and do not
    need the other pairs to be simple. Raises `DegenerateEigenvalue`, `InvalidInput` for shapes.
    """
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or A.shape[-1] == 0:
        raise InvalidInput(f"eigenpair needs square A (..., n, n), got {tuple(A.shape)}")
    value, u, _ = _Pair.apply(A.to(torch.promote_types(A.dtype, torch.complex64)), sigma)  # pyright: ignore
    # u has a component 1, its largest, so this is the phase that is promised
    return value, u / torch.linalg.vector_norm(u, dim=-1, keepdim=True)


class _Pair(Node):
    @staticmethod
    def forward(a: Tensor, sigma: complex) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eig(a)
        order = (values - sigma).abs().argsort(-1)
        value = values.gather(-1, order[..., :1])
        gap = (values - value).abs().scatter(-1, order[..., :1], float("inf")).amin(-1)
        # a double, defective eigenvalue splits by the root of the rounding error
        bad = gap <= 10 * torch.finfo(a.dtype).eps ** 0.5 * torch.linalg.matrix_norm(a)
        if bool(bad.any()):
            least = float(gap[bad].min())
            raise DegenerateEigenvalue(f"eigenpair: the eigenvalue nearest sigma={sigma} is not simple, gap {least:.1e}", least)
        u = torch.take_along_dim(vectors, order[..., None, :1], -1)[..., 0]
        k = u.abs().argmax(-1, keepdim=True)
        return value[..., 0].clone(), (u / u.gather(-1, k)).contiguous(), torch.zeros_like(u).scatter(-1, k, 1.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    @copy_by_copy
    def backward(ctx: Any, gv: Tensor, gu: Tensor, _: Any) -> tuple:  # pyright: ignore
        a, value, u, e = ctx.saved_tensors
        w = _inverse(a, value, u, e).mH @ torch.cat([gu, gv[..., None]], -1)[..., None]
        return -w[..., :-1, :] @ u[..., None, :].conj(), None

    @staticmethod
    def jvp(ctx: Any, da: Tensor, _: Any) -> tuple:  # pyright: ignore
        with below_jvp() as (lower, raise_):
            a, value, u, e = (lower(x) for x in ctx.saved_tensors)
            right = -(lower(da) @ u[..., None])
            out = (_inverse(a, value, u, e)[..., :-1] @ right)[..., 0]
            dv, du = out[..., -1].clone(), out[..., :-1].contiguous()
        return raise_(dv), raise_(du), None

    @staticmethod
    def vmap(info: Any, dims: tuple, a: Tensor, sigma: complex) -> tuple:  # pyright: ignore
        return _Pair.apply(a.movedim(dims[0], 0), sigma), (0, 0, 0)


def _inverse(a: Tensor, value: Tensor, u: Tensor, e: Tensor) -> Tensor:
    """Of ``[[A - value, -u], [e^T, 0]]``; see `inverse`."""
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    top = torch.cat([a - value[..., None, None] * eye, -u[..., None]], -1)
    return inverse(torch.cat([top, torch.cat([e, torch.zeros_like(e[..., :1])], -1)[..., None, :]], -2))
