"""Functions whose way back is no linear function of what comes back: hooks and custom functions that clip gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedCombination
from ..system.system import System, VmappedSystem
from ..system.transforms import one_copy
from ..torch_internals import temporarily_clear_interpreter_stack
from .problem import GradientTraits, Problem

__all__ = ["refuse_altered", "refuse_altered_root"]

#: by what a cotangent is made larger: a power of two, which changes no digit of what is linear
_SCALE = -(2.0**20)
#: part of the largest entry that may differ: ways back that are iterations, or solves by steps of their own, are linear to their tolerance
_ALLOWED = 0.01
_ALTERS = (
    "fun alters what comes back through it (a hook on a tensor or a node, backward of a torch.autograd.Function), and not linearly, as one "
    "that clips does"
)


def refuse_altered(problem: Problem, strategy: Any, t: Tensor, y: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raise where hooks or custom functions in ``fun`` alter what comes back in a way that is not linear, and something is solved for with
    that: stages of implicit methods, adjoint equations. ``t`` (B,), ``y`` (B, n): a place at which to look. Explicit steps are taken back
    as autograd would do it, one evaluation of ``fun`` at a time, whatever is done to its cotangent.
    """
    system = problem.system
    as_autograd = isinstance(strategy, GradientTraits) and strategy.goes_by_steps and problem.algebra is None
    if not system.alters or not problem.derivatives or as_autograd:
        return
    if _altered(system, problem.plan.real, t, y, inputs):
        raise UnsupportedCombination(
            f"{_ALTERS}. {problem.plan.method.name!r} with {type(strategy).__name__} solves equations with these derivatives, which "
            "clipped ones do not satisfy. Clip what the solution or the parameters get (a hook on y0 or sol.y, "
            "torch.nn.utils.clip_grad_value_), or choose an explicit method with DiscreteAdjoint()"
        )


def refuse_altered_root(system: System, x: Tensor, inputs: Sequence[Tensor]) -> None:
    """As `refuse_altered`, of a function whose roots are differentiated: by systems with its Jacobian at ``x`` (B, n)."""
    if system.alters and _altered(system, x.dtype.to_real(), torch.zeros(x.shape[0], device=x.device), x, inputs):
        raise UnsupportedCombination(
            f"{_ALTERS}. Derivatives of roots solve equations with these derivatives, which clipped ones do not satisfy. Clip what the "
            "root or the parameters get (a hook on sol.x, torch.nn.utils.clip_grad_value_)"
        )


def _altered(system: System | VmappedSystem, real: torch.dtype, t: Tensor, y: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether what comes back through ``fun`` is no linear function of what goes in there."""
    with temporarily_clear_interpreter_stack():
        values = [one_copy(x).detach() for x in inputs]
        values = [x.requires_grad_(x.is_floating_point() or x.is_complex()) for x in values]
        at, time = one_copy(y).detach().requires_grad_(True), one_copy(t).detach().to(real).requires_grad_(True)
        with torch.enable_grad():
            point = at if system.residual is None else torch.cat([at, torch.zeros_like(at)], -1)
            value = system.bind(values)(time, point)
        if not value.requires_grad:
            return False
        wanted = [x for x in (time, at, *values) if x.requires_grad]
        weight = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)

        def pulled(scale: float) -> list[Tensor]:
            found = torch.autograd.grad(value, wanted, scale * weight, retain_graph=True, allow_unused=True)
            return [x.detach() / scale for x in found if x is not None]

        one, many = pulled(1.0), pulled(_SCALE)
        sizes = [max(float(a.abs().max()), float(b.abs().max())) if a.numel() else 0.0 for a, b in zip(one, many, strict=True)]
        largest, rounding = max(sizes, default=0.0), 1e3 * torch.finfo(real).eps
        allowed = [max(_ALLOWED * size, rounding * largest) for size in sizes]
        linear = all(bool(((a - b).abs() <= most).all()) for a, b, most in zip(one, many, allowed, strict=True))
    return not linear and largest < float("inf")
