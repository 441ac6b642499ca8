"""What is looked for behind a failure: derivatives that are not finite where the function is, and values that are others each time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .jacobians import jvp

__all__ = ["COMPONENTS", "REWRITE", "WAVERS", "bad_component", "wavers"]

#: what to do about it, for messages
REWRITE = (
    "Likely causes: sqrt, a power below one, or a norm at zero; clamp, abs or where do not help, as 0 * inf is NaN. Keep the argument "
    "itself away from there (torch.sqrt(torch.clamp(x, min=1e-30)), or torch.where around the argument as well as the result)"
)

WAVERS = (
    "fun gives another value when it is called again with the same arguments (dropout in train mode, random numbers, a counter), which "
    "nothing can be solved with to a tolerance: call .eval(), or draw before and hand over what was drawn through args="
)

#: components up to which each is asked by itself
COMPONENTS = 256


def bad_component(f: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor, row: int = 0) -> tuple[int, str] | None:
    """The first component of ``f(t, y)`` with a derivative in ``y`` (B, n) that is not finite in ``row``, though it is finite itself; and
    which: the derivative, that in forward mode, or the second one (clamp and where may hide a corner from one and not from another). None
    if there is none. Beyond some number of components it is only known that there is one: the first."""
    with torch.enable_grad():
        leaf = y.detach().requires_grad_(True)
        out = f(t.detach(), leaf)
    if not out.requires_grad or not bool(torch.isfinite(out[row]).all()):
        return None
    units = [torch.ones_like(out)]
    if out.shape[1] <= COMPONENTS:
        units = [torch.zeros_like(out) for _ in range(out.shape[1])]
        for j, unit in enumerate(units):
            unit[row, j] = 1.0
    slopes = [torch.autograd.grad(out, leaf, unit, create_graph=True, allow_unused=True)[0] for unit in units]
    bad = [j for j, slope in enumerate(slopes) if not _finite(slope, row)]
    pushed = jvp(lambda x: f(t, x), y.detach(), torch.ones_like(y), True)
    if not _finite(pushed, row):
        # on the way back zeros reach every component and turn into NaN in the bad ones: forward mode tells which those are
        kind = "the derivative of fun" if bad else "the derivative of fun in forward mode"
        return int((~torch.isfinite(pushed[row])).to(torch.uint8).argmax()), kind
    if bad:
        return bad[0], "the derivative of fun"
    for j, slope in enumerate(slopes):
        if slope is None or not slope.requires_grad:
            continue
        weights = torch.ones_like(slope)
        if not _finite(torch.autograd.grad(slope, leaf, weights, retain_graph=True, allow_unused=True)[0], row):
            return j, "the second derivative of fun (of which the method takes the first in its steps)"
    return None


def _finite(x: Tensor | None, row: int) -> bool:
    return x is None or bool(torch.isfinite(x[row]).all())


def wavers(call: Callable[[], Tensor]) -> bool:
    """Whether two calls differ."""
    with torch.no_grad():
        return not bool(torch.isclose(call(), call(), rtol=0.0, atol=0.0, equal_nan=True).all())
