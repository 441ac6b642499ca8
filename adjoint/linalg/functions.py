"""Differentiable least squares and Sylvester/Lyapunov equations, to any order.

Rules: Giles (2008), "An extended collection of matrix derivative results for forward and reverse mode AD".
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..torch_internals import Node, below_jvp, copy_by_copy, peek_interpreter_stack

__all__ = ["discrete_lyapunov", "inverse", "lstsq", "lyapunov", "sylvester"]


def lstsq(A: Tensor, b: Tensor) -> Tensor:
    """``x`` that minimises ``|A x - b|``, of least norm where ``A`` is wide.

    ``A`` is ``(..., m, n)`` of full rank, ``b`` is ``(..., m, k)``.

    By QR of ``A`` or ``A^H``, whose derivatives are torch's; unlike ``torch.linalg.lstsq`` a lost rank is never hidden: it raises
    `InvalidInput`, or under ``torch.func`` transforms gives NaN.
    """
    if A.dim() < 2 or b.dim() < 2 or A.shape[-2] != b.shape[-2]:
        raise InvalidInput(f"lstsq needs A (..., m, n) and b (..., m, k), got {tuple(A.shape)} and {tuple(b.shape)}")
    m, n = A.shape[-2:]
    q, r = torch.linalg.qr(A if m >= n else A.mH)
    # the diagonal of an unpivoted R can hide a small singular value
    sizes = torch.linalg.svdvals(r.detach())
    lost = ~(sizes[..., -1] > max(m, n) * torch.finfo(A.dtype).eps * sizes[..., 0])
    if peek_interpreter_stack() is None and bool(lost.any()):
        raise InvalidInput(f"lstsq: A of shape {tuple(A.shape)} has not full rank {min(m, n)} (or is not finite)")
    if m >= n:
        x = torch.linalg.solve_triangular(r, q.mH @ b, upper=True)
    else:
        x = q @ torch.linalg.solve_triangular(r.mH, b, upper=False)
    return torch.where(lost[..., None, None], torch.full_like(x, float("nan")), x)


def sylvester(A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``X`` with ``A X + X B = C``: ``A`` ``(..., m, m)``, ``B`` ``(..., n, n)``, ``C`` ``(..., m, n)``, batches broadcast; on the CPU.

    Schur forms and LAPACK's trsyl (Bartels and Stewart 1972); derivatives are other Sylvester equations.
    Raises `InvalidInput` where an eigenvalue of ``A`` is one of ``-B`` to rounding, `UnsupportedCombination` on other devices.
    """
    if min(A.dim(), B.dim(), C.dim()) < 2 or A.shape[-2:] != (C.shape[-2],) * 2 or B.shape[-2:] != (C.shape[-1],) * 2:
        shapes = [tuple(x.shape) for x in (A, B, C)]
        raise InvalidInput(f"sylvester needs A (..., m, m), B (..., n, n), C (..., m, n), got {shapes}")
    if any(x.device.type != "cpu" for x in (A, B, C)):
        raise UnsupportedCombination(f"sylvester runs on the CPU (SciPy), got {A.device}: move the tensors there")
    dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), C.dtype)
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2], C.shape[:-2])
    a, b, c = (x.to(dtype).expand(*batch, *x.shape[-2:]) for x in (A, B, C))
    return _Sylvester.apply(a, b, c)  # pyright: ignore[reportReturnType]


def lyapunov(A: Tensor, Q: Tensor) -> Tensor:
    """``X`` with ``A X + X A^H + Q = 0``. See `sylvester`."""
    return sylvester(A, A.mH, -Q)


def inverse(A: Tensor) -> Tensor:
    """``A^-1``, for small matrices that are differentiated: forward mode of ``torch.linalg.solve`` loses terms where it is nested, and is
    NaN for all copies but the first under ``torch.vmap`` (seen on torch 2.13). That of a singular matrix is NaN."""
    found, info = torch.linalg.inv_ex(A)
    return torch.where((info != 0)[..., None, None], float("nan"), found)


def discrete_lyapunov(A: Tensor, Q: Tensor) -> Tensor:
    """``X`` with ``A X A^H - X + Q = 0``, by the bilinear map to the continuous equation: -1 must not be an eigenvalue of ``A``.

    With ``F = (A + I)^-1``: ``S X + X S^H + 2 F Q F^H = 0`` where ``S = F (A - I)``. Otherwise see `sylvester`.
    """
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    f = inverse(A + eye)
    return lyapunov(f @ (A - eye), 2 * f @ Q @ f.mH)


class _Sylvester(Node):
    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        flat = [x.detach().resolve_conj().reshape(-1, *x.shape[-2:]).numpy() for x in (a, b, c)]
        rows = [_solve(*row) for row in zip(*flat, strict=True)]
        return torch.as_tensor(np.array(rows), dtype=c.dtype).reshape(c.shape) if rows else c.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2], output)
        ctx.save_for_forward(*inputs[:2], output)

    @staticmethod
    @copy_by_copy
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, x = ctx.saved_tensors
        w = sylvester(a.mH, b.mH, grad)
        return -w @ x.mH, -x.mH @ w, w

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        with below_jvp() as (lower, raise_):
            a, b, x = (lower(y) for y in ctx.saved_tensors)
            da, db, dc = (None if t is None else lower(t) for t in tangents)
            right = torch.zeros_like(x) if dc is None else dc
            right = right if da is None else right - da @ x
            right = right if db is None else right - x @ db
            out = sylvester(a, b, right)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[Tensor, int]:  # pyright: ignore
        pairs = zip(inputs, dims, strict=True)
        moved = [x.expand(info.batch_size, *x.shape) if d is None else x.movedim(d, 0) for x, d in pairs]
        return _Sylvester.apply(*moved), 0  # pyright: ignore[reportReturnType]


def _solve(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    import scipy.linalg

    if not c.size:
        return c
    if not all(np.isfinite(x).all() for x in (a, b, c)):
        return np.full_like(c, np.nan)
    both: Any = scipy.linalg.schur(a, output="complex"), scipy.linalg.schur(b, output="complex")
    (r, u), (s, v) = both
    gap = np.abs(np.diag(r)[:, None] + np.diag(s)).min()
    size = np.linalg.norm(a) + np.linalg.norm(b)
    if gap <= 10 * max(c.shape) * np.finfo(c.dtype).eps * size:
        raise InvalidInput(f"singular Sylvester equation: eigenvalues of A and -B coincide (gap {gap:.1e}, norms {size:.1e})")
    (trsyl,) = scipy.linalg.get_lapack_funcs(("trsyl",), (r, s))
    y, scale, info = trsyl(r, s, u.conj().T @ c @ v)
    if info:
        raise InvalidInput(f"singular Sylvester equation: eigenvalues of A and -B nearly coincide (gap {gap:.1e}, norms {size:.1e})")
    x = u @ (y / scale) @ v.conj().T
    return x if np.iscomplexobj(c) else x.real
