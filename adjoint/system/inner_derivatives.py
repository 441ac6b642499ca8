"""Functions of the user that take derivatives themselves: forces as gradients of an energy, divergences of a flow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedCombination
from ..torch_internals import get_unwrapped, is_functorch_wrapped_tensor, leaves_of, mapped, maybe_get_level, peek_interpreter_stack
from .capture import ask, asking, asks_for_gradients, unmapped
from .origins import made_here
from .transforms import functorch_active

__all__ = ["beneath", "differentiating"]


def _highest(tensors: Sequence[Tensor]) -> int:
    """The number of the latest transform whose wrappers the tensors carry, 0 for none."""
    return max((maybe_get_level(x) for x in tensors), default=0)


def beneath(call: Callable[..., Any], captured: Sequence[Tensor]) -> Callable[..., Any]:
    """``call``, so that a transform which it begins gets a later number than those whose wrappers the captured tensors carry.

    A node runs its function below the transform that called for it. The next transform then has the same number, and PyTorch refuses to
    wrap a captured tensor that carries it already, though every operator is going to see another one in its place. Transforms that do
    nothing fill the numbers.
    """
    highest = _highest(captured)
    if highest <= 0:
        return call

    def deeper(*a: Any) -> Any:
        stack = peek_interpreter_stack()
        level = 0 if stack is None else stack.level()
        if level >= highest:
            return call(*a)
        return torch.func.grad(lambda nothing: (nothing, deeper(*a)), has_aux=True)(torch.zeros(()))[1]

    return deeper


def _unwrapped(x: Tensor) -> Iterator[Tensor]:
    """``x``, and what lies in it below the wrappers of transforms."""
    yield x
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
        yield x


class Differentiable(TorchFunctionMode):
    """What `torch.autograd.grad` gives can be differentiated again, and tensors may be asked for derivatives where they have them."""

    def __init__(self, again: bool, others: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.again, self.others = again, {id(layer): layer for x in others for layer in _unwrapped(x)}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if asks_for_gradients(func):
            if args[0].requires_grad:
                # nothing to do, and a transform would refuse it
                return args[0]
            with asking():
                out = func(*args, **kwargs)
            made_here(args[0])
            return out
        if func is not torch.autograd.grad:
            return func(*args, **kwargs)
        wanted = leaves_of(args[1] if len(args) > 1 else kwargs.get("inputs"))
        others = any(id(layer) in self.others for x in wanted for layer in _unwrapped(x))
        if not others:
            return func(*args, **(kwargs | {"create_graph": True} if self.again else kwargs))
        try:
            if not self.again:
                return func(*args, **kwargs)
        except RuntimeError:
            # where the solve is not recorded something that does not require grad may stand in the parameter's place
            pass
        raise UnsupportedCombination(
            "fun calls torch.autograd.grad for the derivative in a parameter. Along a solution the state depends on the parameter "
            "too, and the derivative would go through the steps before: use torch.func.grad there, or solve under torch.no_grad()"
        )


def differentiating(call: Callable[..., Any], others: Sequence[Tensor] = ()) -> Callable[..., Any]:
    """``call(t, y, *args)``, which uses `torch.autograd.grad`, wherever a solve calls it; not in ``others``, on which the state depends.

    Gradients are on, and time and state can be differentiated by, as where plain autograd records the solve. What the derivatives depend on
    is differentiated again if anything is, whether ``create_graph`` is given or not.
    """

    def run(t: Tensor, y: Any, *args: Any) -> Any:
        recording, inside = torch.is_grad_enabled(), functorch_active()
        # without gradients around, a state may be a view that belongs to no graph
        t, y = mapped(_asked if recording or inside else lambda x: _asked(_plain(x)), (t, y))
        with torch.enable_grad(), unmapped(), Differentiable(recording or inside, others):
            out = call(t, y, *args)
        return out if recording or inside else mapped(_plain, out)

    return run


def _asked(x: Any) -> Any:
    """See `ask`; what is asked here, and was not before, is nobody's input."""
    other = ask(x)
    return other if other is x else made_here(other)


def _plain(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
