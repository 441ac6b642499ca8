"""Whether two functions are one, by their values at a point beside the one that counts."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["beside", "differs"]


def beside(x: Tensor, part: float) -> Tensor:
    """``x`` (..., n) with every entry moved by between 0.5 and 2.5 times ``part`` of its size, outward from zero, so that what is positive
    stays so."""
    k = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype.to_real()) + 1
    size = x.abs()
    size = size + 1e-3 * size.amax(-1, keepdim=True) if x.shape[-1] else size
    size = torch.where(size > 0, size, 1.0)
    return x + part * size * (1.5 + torch.cos(k * k)) * torch.where(x.real < 0, -1.0, 1.0)


def differs(again: Tensor, known: Tensor) -> Tensor:
    """Whether two evaluations at one point differ by more than kernels do that add in another order; 0-d.

    A number counts beside the largest one of all: sums of terms that nearly cancel are rounded as these terms are.
    """
    single = torch.finfo(known.dtype).eps > 1e-10
    size = known.abs().nan_to_num(0.0, 0.0, 0.0)
    near, far = (1e-3, 1e-5) if single else (1e-6, 1e-9)
    allowed = near * size + far * size.amax() if size.numel() else size
    # what was not finite (a step that was rejected) says nothing
    return (~((again - known).abs() <= allowed) & torch.isfinite(known)).any()
