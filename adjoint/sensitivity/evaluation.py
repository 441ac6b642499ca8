"""One evaluation of ``fun`` as an autograd node that keeps its arguments only and evaluates again on the way back.

For solves that are plain compositions of differentiable steps: their graph then holds one state for each evaluation, whatever ``fun``
allocates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import SolveError
from ..system.capture import cut_apart
from ..system.ownership import continuing, owned
from ..system.system import System
from ..system.transforms import naming_writes
from ..system.witness import CHANGED, differs
from ..torch_internals import Node, copy_by_copy
from .asked import Linearizer
from .products import exchanged

__all__ = ["Evaluation"]


class Evaluation(Node):
    """``apply(system, t, y, *inputs)`` is ``fun`` at a time, 0-d, and a flat state, ``(1, n)``.

    Differentiable to any order; made for plain autograd, not for ``torch.func`` transforms and forward mode.
    """

    @staticmethod
    def forward(system: System, t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        return system.bind(inputs)(t, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.system = owned(inputs[0])
        # the captured tensors themselves need no substitution, which hooks on saved tensors would ask for
        ctx.own = all(x is y for x, y in zip(inputs[3:], inputs[0].inputs, strict=True))
        # the value too: it is alive anyway while later steps weigh it
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    @copy_by_copy
    @naming_writes
    @continuing("system")
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        system = ctx.system()
        known, t, y, *inputs = ctx.saved_tensors
        _, time, _, *wants = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return ctx.system.let_out(_differentiable(system, t, y, inputs, wants, bar, known))
        inputs = cut_apart(system.inputs if ctx.own else inputs, wants)
        linearize = Linearizer(system.bind(inputs), inputs, wants, time)
        linearize.check_next = True
        again, pullback = linearize(t, y)
        _compare(again, known)
        y_bar, t_bar = pullback(bar)
        return (None, t_bar, y_bar, *linearize.bars)


def _compare(again: Tensor, known: Tensor) -> None:
    if bool(differs(again.detach(), known.detach())):
        raise SolveError(f"The way back evaluates fun again, and it is another function than in the solve: {CHANGED}")


def _differentiable(
    system: System, t: Tensor, y: Tensor, inputs: list[Tensor], wants: list[bool], bar: Tensor, known: Tensor
) -> tuple[Tensor | None, ...]:
    """The cotangents as functions that can be differentiated again."""
    smooth = [i for i, want in enumerate(wants) if want]

    def call(t: Tensor, y: Tensor, *some: Tensor) -> Tensor:
        return system.bind(exchanged(inputs, smooth, some))(t, y)

    again, pull, *_ = torch.func.vjp(call, t, y, *(inputs[i] for i in smooth))
    _compare(again, known)
    t_bar, y_bar, *rest = pull(bar)
    out: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(smooth, rest, strict=True):
        out[i] = g
    return (None, t_bar, y_bar, *out)
