"""Values of event functions as real numbers, and the refusal to differentiate events of functions that have no slope."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..system.capture import alive, below_jvp, readable
from ..torch_internals import Node

__all__ = ["NO_SLOPE", "once", "refused", "signed", "with_slope"]

NO_SLOPE = (
    "the time of an event was to be differentiated, but its event function has no slope there: it is piecewise constant "
    "(a comparison, a sign, an integer) or flat at its root, so that the time has no derivative. Give a smooth event function, "
    "such as y - level in place of y > level, or detach the time and state of the event"
)


def signed(value: Tensor) -> Tensor:
    """What an event function returned as real numbers with a sign: 1 and -1 for True and False."""
    if value.dtype == torch.bool:
        return torch.where(value, 1.0, -1.0).to(torch.float64)
    if value.is_complex():
        raise InvalidInput(f"an event function must return a real tensor, got {value.dtype}: take its real part or its size")
    return value if value.is_floating_point() else value.to(torch.float64)


def with_slope(t: Tensor, sloping: Tensor, *causes: Tensor) -> Tensor:
    """``t`` as it is; whoever differentiates an entry that is not ``sloping`` gets an error.

    ``causes``: what ``t`` depends on beside what it was computed from.
    """
    return refused(t, ~sloping, NO_SLOPE, *causes)


def refused(x: Tensor, wrong: Tensor, why: str, *causes: Tensor) -> Tensor:
    """``x`` as it is; whoever differentiates an entry that is ``wrong`` gets InvalidInput, which says ``why``."""
    if readable(wrong) and not bool(wrong.any()):
        return x
    out: Tensor = _Guarded.apply(x, ~wrong, why, *causes)
    return out


def once(x: Tensor, only: Tensor, why: str, *causes: Tensor) -> Tensor:
    """``x`` as it is; whoever differentiates it twice gets InvalidInput, which says ``why``, if there is an entry in ``only``.

    ``causes``: what ``x`` depends on. A second derivative is refused whatever its value, since it is not known where it would be zero.
    """
    if readable(only) and not bool(only.any()):
        return x
    out: Tensor = _Once.apply(x, ~only, why, *causes)
    return out


class _Guarded(Node):
    @staticmethod
    def forward(t: Tensor, sloping: Tensor, why: str, *causes: Tensor) -> Tensor:
        # no view: forward mode would ask that tangents are views too
        return t.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        return (_Demanded.apply(bar, *ctx.saved_tensors, ctx.why), *[None] * (2 + ctx.count))

    @staticmethod
    def jvp(ctx: Any, dot: Tensor, _: None, __: None, *dots: Tensor | None) -> Tensor:
        (sloping,) = alive(ctx.saved_tensors)
        with below_jvp() as (lower, raise_):
            own, sloping = lower(dot), lower(sloping)
            # whether anything moves, in the type of the tangent: a NaN of one trajectory shall stay its own
            moving = torch.stack([(lower(d).detach() != 0).any() for d in (dot, *dots) if d is not None]).any().to(own.dtype.to_real())
            out = own + 0 * _Demanded.apply(moving.expand_as(sloping), sloping, ctx.why)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], t: Tensor, sloping: Tensor, why: str, *causes: Tensor) -> tuple[Tensor, int]:
        t, sloping = _copies(info.batch_size, in_dims[:2], t, sloping)
        return _Guarded.apply(t, sloping, why, *causes), 0  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...]) -> None:
    """Which entries are free to be differentiated, what to say where one is not, and how many causes there are."""
    ctx.save_for_backward(inputs[1])
    ctx.save_for_forward(inputs[1])
    ctx.why, ctx.count = inputs[2], len(inputs) - 3


def _copies(size: int, in_dims: tuple[int | None, ...], *tensors: Tensor) -> list[Tensor]:
    """Tensors under ``torch.vmap`` with the copies in front."""
    return [x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in zip(tensors, in_dims, strict=True)]


class _Demanded(Node):
    """Passes a derivative on after a look at it, which under ``torch.vmap`` only a rule of its own can have."""

    @staticmethod
    def forward(x: Tensor, sloping: Tensor, why: str) -> Tensor:
        if bool(((x != 0) & ~sloping).any()):
            raise InvalidInput(why)
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor, None, None]:
        return _Demanded.apply(bar, *ctx.saved_tensors, ctx.why), None, None

    @staticmethod
    def jvp(ctx: Any, dot: Tensor, _: None, __: None) -> Tensor:
        with below_jvp() as (lower, raise_):
            out = _Demanded.apply(lower(dot), *(lower(x) for x in alive(ctx.saved_tensors)), ctx.why)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, sloping: Tensor, why: str) -> tuple[Tensor, int]:
        return _Demanded.apply(*_copies(info.batch_size, in_dims[:2], x, sloping), why), 0  # type: ignore[return-value]


class _Once(Node):
    """Passes a tensor on. Its derivative goes through a node that has none, tied to the causes: the cotangent may well be a constant."""

    @staticmethod
    def forward(x: Tensor, free: Tensor, why: str, *causes: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, free, ctx.why, *causes = inputs
        ctx.save_for_backward(free, *causes)
        ctx.save_for_forward(free, *causes)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        free, *causes = ctx.saved_tensors
        return (_Never.apply(bar, free, ctx.why, *causes), *[None] * (2 + len(causes)))

    @staticmethod
    def jvp(ctx: Any, dot: Tensor, _: None, __: None, *dots: Tensor | None) -> Tensor:
        with below_jvp() as (lower, raise_):
            free, *causes = (lower(x) for x in alive(ctx.saved_tensors))
            out = _Never.apply(lower(dot), free, ctx.why, *causes)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, free: Tensor, why: str, *causes: Tensor) -> tuple[Tensor, int]:
        x, free = _copies(info.batch_size, in_dims[:2], x, free)
        return _Once.apply(x, free, why, *causes), 0  # type: ignore[return-value]


class _Never(Node):
    """Passes a derivative on that may not be differentiated."""

    @staticmethod
    def forward(bar: Tensor, free: Tensor, why: str, *causes: Tensor) -> Tensor:
        return bar.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _keep(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, ...]:
        (free,) = ctx.saved_tensors
        return (bar + 0 * _Demanded.apply(torch.ones_like(bar), free, ctx.why), *[None] * (2 + ctx.count))

    @staticmethod
    def jvp(ctx: Any, dot: Tensor | None, _: None, __: None, *dots: Tensor | None) -> Tensor:
        with below_jvp() as (lower, raise_):
            (free,) = (lower(x) for x in alive(ctx.saved_tensors))
            own = torch.zeros_like(free, dtype=torch.float64) if dot is None else lower(dot)
            out = own + 0 * _Demanded.apply(torch.ones_like(own), free, ctx.why)
        return raise_(out)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], bar: Tensor, free: Tensor, why: str, *causes: Tensor) -> tuple[Tensor, int]:
        bar, free = _copies(info.batch_size, in_dims[:2], bar, free)
        return _Never.apply(bar, free, why, *causes), 0  # type: ignore[return-value]
