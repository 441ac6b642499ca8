"""Who keeps what the derivatives of a solve need of its user's objects, so that Python's garbage collector can see it.

A node of an autograd graph that holds a function keeps alive whatever that function belongs to, such as a module. If the solution is
stored on this very module the two hold each other, and the collector, which breaks such circles, cannot follow a graph beyond a result
whose own node is written in Python. So nodes hold such things weakly (`owned`), and every result of a front door goes out through a node
that does nothing but hold them (`owning`): they live as long as a result, or anything that was computed from one, and the collector sees
them.

And what every front door does before its own work: compilers of its callers stay out, and autocast is off. Autocast means for a solve what
it means for PyTorch's own operators that need their precision: it runs in single precision at the least.
"""

from __future__ import annotations

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..torch_internals import dual_level, mapped, skipped
from .transforms import functorch_active, naming_faults

__all__ = ["Owned", "WithTensors", "as_part", "full_precision", "owned", "owning", "under_transform", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class _Things(list[Any]):
    """What the results of one front door keep."""


class _Doors(threading.local):
    def __init__(self) -> None:
        #: for each front door that is open, from the outermost on; None for one that opened under a transform or forward mode
        self.open: list[_Things | None] = []
        #: whether a front door that opens now is a part of the one around it
        self.inner = False


_doors = _Doors()


class WithTensors(ABC):
    """A result of a front door with tensors in it."""

    @abstractmethod
    def with_tensors(self, function: Callable[[Any], Any]) -> Any:
        """The same with ``function`` of everything that may be differentiated."""


class Owned(Generic[T]):
    """What a node needs; called, it gives it."""

    def __init__(self, value: T, things: _Things | None) -> None:
        self._get: Callable[[], T | None] = (lambda: value) if things is None else weakref.ref(value)
        self._things: Callable[[], _Things | None] = (lambda: None) if things is None else weakref.ref(things)

    @property
    def alive(self) -> bool:
        """Whether it is there still."""
        return self._get() is not None

    def __call__(self) -> T:
        value = self._get()
        if value is None:
            raise RuntimeError("a derivative was asked for of what lies inside of a solve whose results are gone: keep one of them")
        return value

    def let_out(self, found: R) -> R:
        """Derivatives that the node has made: those that can be differentiated again ask it once more, and need it too."""
        things = self._things()
        return found if things is None or not torch.is_grad_enabled() or functorch_active() else cast(R, _let_out(found, things))


def owned(value: T) -> Owned[T]:
    """``value`` for a node: held by the results of the innermost open front door; by the node itself where no door is open, or where
    that opened under a transform, which takes graphs of its own through the door.
    """
    things = _doors.open[-1] if _doors.open else None
    if things is not None:
        things.append(value)
    return Owned(value, things)


def under_transform() -> bool:
    """Whether the innermost open front door opened under a transform or forward mode."""
    return bool(_doors.open) and _doors.open[-1] is None


def owning(function: Callable[P, R]) -> Callable[P, R]:
    """A front door whose results (tensors, pytrees of them, objects with a method ``with_tensors``, functions that give such) keep what
    their graphs need.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        inner, _doors.inner = _doors.inner, False
        plain = not functorch_active() and dual_level() < 0
        things = _doors.open[-1] if inner else _Things() if plain else None
        _doors.open.append(things)
        try:
            result = function(*args, **kwargs)
        finally:
            _doors.open.pop()
        # where nothing is recorded there is no graph that would need anything
        return _let_out(result, things) if things and not inner and torch.is_grad_enabled() else result

    return call


def as_part(door: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a front door from inside of another one, whose results are made from its own and keep what these would."""
    assert _doors.open
    _doors.inner = True
    try:
        return door(*args, **kwargs)
    finally:
        _doors.inner = False


def _let_out(result: Any, things: _Things) -> Any:
    def one(x: Any) -> Any:
        if isinstance(x, Tensor):
            return _held(x, things)
        if isinstance(x, WithTensors):
            return x.with_tensors(lambda inner: _let_out(inner, things))
        return wraps(x)(lambda *a: _let_out(x(*a), things)) if callable(x) else x

    return one(result) if isinstance(result, WithTensors) else mapped(one, result)


def _held(x: Tensor, things: _Things) -> Tensor:
    node: Any = x.grad_fn
    if node is None:
        return x
    if isinstance(node, _Owner._backward_cls):  # type: ignore[attr-defined]
        # it has gone through a door inside of this one
        if node.things is not things:
            node.things.append(things)
        return x
    shown: Any = node
    for _ in range(3):
        # torchdiffeq's users look for the options of the way back on the node of the result, or behind the views of its parts
        if getattr(shown, "adjoint_options", None):
            shown.things = things
            return x
        if not shown.next_functions or shown.next_functions[0][0] is None:
            break
        shown = shown.next_functions[0][0]
    return cast(Tensor, _Owner.apply(x, things))


class _Owner(torch.autograd.Function):
    """``apply(x, things)`` is ``x`` with a node of its own, alone on it, as the collector wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, things: _Things) -> Tensor:
        ctx.things = things
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, None]:
        return bar, None



def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable`` that does not import the compiler: that takes as long as PyTorch itself, and nobody traces a caller
    before somebody has imported it. (``torch.compiler.disable`` imports it at once, and forgets the signature.)
    """
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(cast(Callable[P, R], torch.compiler.disable(function)))
            skipped(call)  # its own frame is not worth a trace for each kind of arguments either
        return disabled[0](*args, **kwargs)

    mark: Any = call  # a compiler that traces a caller breaks off before this call, not inside of it
    mark._torchdynamo_disable = True
    mark._torchdynamo_disable_msg = None
    return call


def full_precision(function: Callable[P, R]) -> Callable[P, R]:
    """A front door under autocast: half precision tensors among the arguments become single, and autocast is off inside, there and on the
    way back. ``fun`` may switch it on for itself. Compilers of callers stay out too.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        devices = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if not devices:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in devices:
                stack.enter_context(torch.autocast(device, enabled=False))
            given, named = cast(Any, tree_map(_single, (args, kwargs)))
            return cast(Any, function)(*given, **named)

    return untraced(owning(naming_faults(call)))


def _single(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
