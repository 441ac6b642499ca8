"""The automatic first step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["initial_step"]


def initial_step(f: Callable[[Tensor, Tensor], Tensor], plan: Plan, stops: Tensor, y0: Tensor, f0: Tensor, sign: Tensor) -> Tensor:
    """Size (positive) of the first step of every trajectory, ``(B,)`` float64, by one more evaluation of ``fun``.

    Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4: the step for which an explicit Euler step
    changes the solution by 1 % of its size, then one for which the estimated second derivative gives an error of 1 %.
    ``stops`` (A, B): the anchors of the solve, beyond the first of which (and ``max_step``) ``fun`` is not evaluated; ``sign`` (B,): the
    direction of time.
    """
    t0, ahead = stops[0], stops[1:]
    room, nearest = torch.where(sign * (ahead - t0) > 0, (ahead - t0).abs(), float("inf")).min(0)
    room = torch.where(torch.isfinite(room), room, 0.0)
    size = y0.abs()
    d0 = plan.norm(plan.scaled(y0, size)).double()
    d1 = plan.norm(plan.scaled(f0, size)).double()
    h0 = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
    h0 = torch.where(torch.isfinite(h0), h0, 1e-6).clamp(max=plan.max_step)
    # the very anchor, to which a rounded distance need not lead
    there = torch.where(h0 < room, t0 + sign * h0, ahead.gather(0, nearest.unsqueeze(0))[0])
    h0 = torch.minimum(h0, room)
    real = size.dtype
    step = (sign * h0).to(real).unsqueeze(-1)
    f1 = f(there.to(real), y0 + step * f0)
    d2 = plan.norm(plan.scaled(f1 - f0, size)).double() / h0
    worst = torch.maximum(d1, d2)
    h1 = torch.where(worst <= 1e-15, torch.clamp(h0 * 1e-3, min=1e-6), (0.01 / worst) ** (1.0 / (plan.method.error_order + 1)))
    h = torch.minimum(100 * h0, h1)
    # a non-finite fun gives the smallest of all guesses, and the loop reports it
    return torch.where(torch.isfinite(h) & (h > 0), h, h0)
