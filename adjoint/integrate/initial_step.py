"""The automatic first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["initial_step"]


def initial_step(f: Callable[[Tensor, Tensor], Tensor], plan: Plan, t0: Tensor, y0: Tensor, f0: Tensor, sign: Tensor) -> Tensor:
    """Size (positive) of the first step of every trajectory, ``(B,)`` float64, by one more evaluation of ``fun``.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4: the step for which an explicit Euler step
    changes the solution by 1 % of its size, then one for which the estimated second derivative gives an error of 1 %.
    ``t0`` and ``sign`` (the direction of time) are ``(B,)``.
    """
    size = y0.abs()
    d0 = plan.norm(plan.scaled(y0, size)).double()
    d1 = plan.norm(plan.scaled(f0, size)).double()
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.where(torch.isfinite(h0), h0, 1e-6)
    real = size.dtype
    step = (sign * h0).to(real).unsqueeze(-1)
    f1 = f((t0 + sign * h0).to(real), y0 + step * f0)
    d2 = plan.norm(plan.scaled(f1 - f0, size)).double() / h0
    worst = torch.maximum(d1, d2)
    h1 = torch.where(worst <= 1e-15, torch.clamp(h0 * 1e-3, min=1e-6), (0.01 / worst) ** (1.0 / (plan.method.error_order + 1)))
    h = torch.minimum(100 * h0, h1)
    # a non-finite fun gives the smallest of all guesses, and the loop reports it
    return torch.where(torch.isfinite(h) & (h > 0), h, h0)
