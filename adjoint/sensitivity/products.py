"""Products with Jacobians as differentiable code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import UnsupportedCombination
from ..system.capture import ask
from ..system.jacobians import UNRECORDED, unrecorded, wave
from ..system.origins import has_unknown
from ..system.transforms import functorch_active
from ..system.witness import beside
from ..torch_internals import Node, dual_level

__all__ = ["behind", "exchanged", "look_again", "smooth_places", "tangent", "vjp"]


#: how far beside a state `look_again` looks
_BESIDE = 0.01


def smooth_places(inputs: Sequence[Tensor]) -> list[int]:
    """Where those are that may have a derivative: integers and flags have none."""
    return [i for i, x in enumerate(inputs) if x.is_floating_point() or x.is_complex()]


def exchanged(inputs: Sequence[Any], where: Sequence[int], some: Sequence[Any]) -> list[Any]:
    """``inputs`` with others in some places."""
    found = list(inputs)
    for i, x in zip(where, some, strict=True):
        found[i] = x
    return found


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """The value and the pullback, as `torch.func.vjp` gives them. Outside of transforms by plain autograd, which is much faster."""
    if functorch_active():
        value, pullback, *_ = torch.func.vjp(function, *primals)
        return value, pullback
    value, pullback, _ = _recorded(function, primals)
    return value, pullback


def _recorded(function: Callable[..., Any], primals: Sequence[Tensor], known: bool | None = None) -> tuple[Any, Callable[..., Any], bool]:
    """As `vjp`, and whether what it gives can be differentiated in anything (``known``: the answer, where it is known)."""
    with torch.enable_grad():
        # others in their places: the pullback is to stop there, but derivatives of what it gives go on to them
        own = [x.view_as(x) if x.requires_grad else ask(x) for x in primals]
        value = function(*own)
    outputs, tree = tree_flatten(value)
    again = known if known is not None else any(x.requires_grad for x in primals) or any(has_unknown(x, own) for x in outputs)

    def pullback(bars: Any) -> tuple[Tensor, ...]:
        weights = tree_flatten(bars)[0]
        return tuple(_pull(outputs, own, weights, torch.is_grad_enabled() and (again or any(x.requires_grad for x in weights))))

    return tree_unflatten(outputs if again and torch.is_grad_enabled() else [x.detach() for x in outputs], tree), pullback, again


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], bars: Sequence[Tensor], again: bool) -> list[Tensor]:
    """Cotangents of the inputs, zero where nothing depends on them."""
    live = [(x, bar) for x, bar in zip(outputs, bars, strict=True) if x.requires_grad]
    if not live:
        return [torch.zeros_like(x) for x in inputs]
    values, weights = zip(*live, strict=True)
    found = torch.autograd.grad(values, inputs, weights, create_graph=again, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def tangent(function: Callable[..., Any], primals: Sequence[Tensor], dots: Sequence[Tensor]) -> Any:
    """Tangent of a function by two reverse sweeps: it nests with a user's dual level, where `torch.func.jvp` does not."""
    transformed, again = functorch_active(), False
    if transformed:
        out, pull = vjp(function, *primals)
    else:
        out, pull, again = _recorded(function, primals)
    many = isinstance(out, tuple)
    zeros = [behind(torch.zeros_like(x), x) for x in (out if many else (out,))]
    pulled = lambda *bars: pull(bars if many else bars[0])  # noqa: E731
    push = vjp(pulled, *zeros)[1] if transformed else _recorded(pulled, zeros, again)[1]
    found = push(tuple(dots))
    return found if many else found[0]


def look_again(function: Callable[..., Any], *primals: Tensor) -> None:
    """Raise `UnsupportedCombination` where a derivative of the derivatives of ``function`` would miss a part: see `unrecorded`. Where there
    is none at all, PyTorch says so as soon as it is taken.

    Looked at beside the first of the ``primals``, the state: where it is, derivatives may cancel (at an optimum all do), and what is left
    of them is rounding.
    """
    primals = (beside(primals[0].detach(), _BESIDE), *primals[1:])
    record = vjp if functorch_active() else lambda f, *own: _recorded(f, own, True)[:2]
    try:
        with torch.enable_grad():
            out, pull = record(function, *primals)
            many = isinstance(out, tuple)
            weights = [wave(x.detach()) for x in (out if many else (out,))]
            directions = tuple(wave(x.detach(), 1.0) for x in primals)
            pulled = lambda *bars: tuple(pull(bars if many else bars[0]))  # noqa: E731
            found, push = record(pulled, *weights)
            missing = unrecorded(pulled, weights, found, push(directions), directions)
    except RuntimeError:
        return
    if missing:
        raise UnsupportedCombination(UNRECORDED)


def behind(x: Tensor, *history: Tensor) -> Tensor:
    """``x`` as it is, recorded after all that ``history`` was computed from.

    Autograd leaves out what was recorded before the tensors that it differentiates in. A function of a new leaf and of the end of a long
    history would else have all of that looked through for every derivative in the leaf.
    """
    if functorch_active() or dual_level() >= 0 or not torch.is_grad_enabled():
        return x
    moving = [h for h in history if h.requires_grad]
    if not moving:
        return x
    out: Tensor = _Behind.apply(x, *moving)
    return out


class _Behind(Node):
    @staticmethod
    def forward(x: Tensor, *history: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.count = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        return (bar, *[None] * ctx.count)
