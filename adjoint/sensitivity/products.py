"""Products with Jacobians as differentiable code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["tangent", "vjp"]


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """`torch.func.vjp` without auxiliary output: the value and the pullback."""
    value, pullback, *_ = torch.func.vjp(function, *primals)
    return value, pullback


def tangent(function: Callable[..., Any], primals: Sequence[Tensor], dots: Sequence[Tensor]) -> Any:
    """Tangent of a function by two reverse sweeps: it nests with a user's dual level, where `torch.func.jvp` does not."""
    out, pull = vjp(function, *primals)
    zeros = tuple(torch.zeros_like(x) for x in out) if isinstance(out, tuple) else torch.zeros_like(out)
    _, push = vjp(pull, zeros)
    return push(tuple(dots))[0]
