"""The derivative of an event's time and state, from a solution whose derivative is known at a fixed time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..doors.event_slope import signed, with_slope
from ..sensitivity.backsolve import Refuse
from ..sensitivity.sweep import tangent
from ..torch_internals import Node

__all__ = ["through_event"]

_TWICE = (
    "the time of this event has first derivatives only: call odeint_event with odeint_interface=odeint, or odeint_adjoint without any "
    "adjoint_* solver argument, whose derivatives are complete"
)


class _Once(Node):
    """Passes a tensor on; its derivative may not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return bar
        # tied to the shift itself, since the cotangent alone may well be a constant
        return Refuse.apply(_TWICE, 1, bar, *ctx.saved_tensors)[0]


def through_event(fun: Callable[..., Any], event_fn: Callable[..., Tensor], t: Tensor, y: Any, real: torch.dtype) -> tuple[Tensor, Any]:
    """``t`` and ``y`` with the first derivatives of the root of ``event_fn(t, y(t))``.

    The time moves by one Newton step, ``-event_fn / (d event_fn / dt)``, and the state along ``fun`` with it. Values stay what they
    are. Where the derivatives are complete already the event function does not move, and nothing is added.

    Parameters
    ----------
    t : 0-d tensor, the time of the event
    y : state at ``t``, a tensor or a pytree, differentiable
    real : dtype in which ``fun`` and ``event_fn`` see the time
    """
    value = signed(event_fn(t.to(real), y))
    with torch.no_grad():
        fixed = tree_map(lambda x: x.detach(), y)
        rate = fun(t.detach().to(real), fixed)
        signs = torch.ones_like(value) if value.numel() == 1 else (value.abs() == value.abs().min()).to(value.dtype)
    value = (value * signs).sum()

    def along(s: Tensor) -> Tensor:
        moved = tree_map(lambda x, k: x + s.to(x.dtype) * k, fixed, rate)
        return (signed(event_fn((t.detach() + s).to(real), moved)) * signs).sum()

    zero = torch.zeros((), dtype=torch.float64, device=t.device)
    with torch.enable_grad():
        slope = tangent(along, (zero,), (torch.ones_like(zero),)).detach()
    sloping = torch.isfinite(slope) & (slope != 0)
    if not bool(sloping):
        # the time depends on the state, though nobody can say how
        return with_slope(t, sloping, *tree_leaves(y)), tree_map(lambda x: with_slope(x, sloping), y)
    shift = _Once.apply((value.detach() - value) / slope)
    return t + shift.to(t.dtype), tree_map(lambda x, k: x + shift.to(x.dtype) * k, y, rate)
