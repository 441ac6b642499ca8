"""Functionals along a solution: the right-hand side with a running integral beside the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput
from ..system.ownership import copied
from ..system.split import SplitFunction
from ..system.system import StateSpec
from .arguments import Times

__all__ = ["first_rate", "with_integral"]


def first_rate(g: Callable[..., Any], spec: StateSpec, times: Times, y0: Any, args: tuple[Any, ...]) -> tuple[Any, StateSpec]:
    """What the integrand gives at the start, and its layout; raises `InvalidInput` unless it is one value per trajectory."""
    t0 = times.anchors[0].detach().to(spec.real_dtype)
    first = g(t0 if spec.batch is not None else t0.reshape(()), copied(y0), *args)
    integrand = StateSpec.of(first, spec.batch is not None, "what quadrature returned")
    if integrand.batch != spec.batch:
        shapes = [tuple(s) for s in integrand.shapes]
        raise InvalidInput(f"quadrature must return one value per trajectory, ({spec.batch}, ...), got {shapes}")
    return first, integrand


def with_integral(
    fun: Callable[..., Any], g: Callable[..., Any], spec: StateSpec, times: Times, y0: Any, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any, StateSpec]:
    """The state extended by the running integral, which starts at zero."""
    first, integrand = first_rate(g, spec, times, y0, args)

    def extended(part: Callable[..., Any], integrated: bool) -> Callable[..., Any]:
        def both(t: Tensor, state: tuple[Any, Any], *rest: Any) -> tuple[Any, Any]:
            rate = part(t, state[0], *rest)
            value = g(t, state[0], *rest) if integrated else tree_map(torch.zeros_like, state[1])
            return spec.check(rate, "what fun returned"), integrand.check(value, "what quadrature returned")

        return both

    # an integral feeds nothing back: it is never stiff
    split = isinstance(fun, SplitFunction)
    both = SplitFunction(extended(fun.explicit, True), extended(fun.implicit, False)) if split else extended(fun, True)
    return both, (y0, tree_map(lambda x: torch.zeros_like(x.detach()), first)), integrand
