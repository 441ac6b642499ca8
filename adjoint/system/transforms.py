"""Which transforms of ``torch.func`` run, and what of a tensor they wrap."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad

from .. import torch_internals as internals

__all__ = [
    "below_vmap",
    "every_copy",
    "functorch_active",
    "functorch_level",
    "has_tangent",
    "jvp_active",
    "transforming",
    "unwrapped",
    "vmap_active",
]


def functorch_active() -> bool:
    """Whether a ``torch.func`` transform (or its vmap) is running."""
    return internals.peek_interpreter_stack() is not None


def transforming() -> bool:
    """Whether a transform of ``torch.func`` or forward mode is running."""
    return functorch_active() or internals.dual_level() >= 0


def vmap_active() -> bool:
    """Whether a ``torch.vmap`` is running, directly or inside of a transform such as `torch.func.jacfwd`."""
    stack = internals.get_interpreter_stack()
    return any(level.key() == internals.TransformType.Vmap for level in stack or ())


def jvp_active() -> bool:
    """Whether a `torch.func.jvp` is running, and no ``torch.vmap``."""
    stack = internals.get_interpreter_stack() or ()
    return any(level.key() == internals.TransformType.Jvp for level in stack) and not vmap_active()


def unwrapped(x: Tensor) -> Tensor:
    """What holds the values of ``x``, those of all copies where ``torch.vmap`` maps over it, for use below all transforms."""
    while internals.is_functorch_wrapped_tensor(x):
        x = internals.get_unwrapped(x)
    return x


def every_copy(x: Tensor) -> Tensor:
    """The values of ``x`` without levels of transforms and tangents, those of all copies, ``(*copies, *x.shape)``. For use below all
    transforms."""
    while internals.is_functorch_wrapped_tensor(x):
        dim = internals.maybe_get_bdim(x) if internals.is_batchedtensor(x) else None
        x = internals.get_unwrapped(x)
        x = x if dim is None else x.movedim(dim, 0)
    return (forward_ad.unpack_dual(x).primal if internals.dual_level() >= 0 else x).detach()


def below_vmap(x: Tensor, size: int) -> Tensor:
    """``(size, *x.shape)``: what ``x`` is for each copy, as the vmap rule of a node sees it, which runs below the vmap itself."""
    level, mapped = functorch_level(), False
    while internals.maybe_get_level(x) > level:
        dim = internals.maybe_get_bdim(x)
        x = internals.get_unwrapped(x)
        if dim >= 0:
            x, mapped = x.movedim(dim, 0), True
    return x if mapped else x.expand(size, *x.shape)


def has_tangent(x: Tensor) -> bool:
    """Whether ``x`` is a dual tensor of forward mode."""
    # unpack_dual raises outside of a dual level, and sees none inside of a transform
    if internals.dual_level() < 0:
        return False
    with internals.DisableFuncTorch():
        return forward_ad.unpack_dual(x).tangent is not None


def functorch_level() -> int:
    stack = internals.peek_interpreter_stack()
    return 0 if stack is None else stack.level()
