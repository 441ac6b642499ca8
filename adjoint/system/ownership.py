"""What passes between a solve and its user: what is lent, what is owned, and what front doors do first.

Tensors that the solve lends to a user's function come back unchanged, and those it is given are its own (`lending`, `own`). A solve keeps
the slopes of its stages, states, residuals and Jacobians for a while. A function that writes its value into a tensor of its own and
returns that, call after call, would change them afterwards; one that changes its argument in place would change the state itself.

What the derivatives of a solve need of its user's objects is kept so that Python's garbage collector can see it. A node of an autograd
graph that holds a function keeps alive whatever that function belongs to, such as a module. If the solution is stored on this very module
the two hold each other, and the collector, which breaks such circles, cannot follow a graph beyond a result whose own node is written in
Python. So nodes hold such things weakly (`owned`), and every result of a front door goes out through a node that does nothing but hold
them (`owning`): they live as long as a result, or anything that was computed from one, and the collector sees them.

Compilers of a door's callers stay out (`untraced`), and autocast is off (`full_precision`). Autocast means for a solve what it means for
PyTorch's own operators that need their precision: it runs in single precision at the least.
"""

from __future__ import annotations

import sys
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from sys import getrefcount
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput, UnsupportedCombination
from ..torch_internals import (
    Node,
    differentiates_in_inference_mode,
    dual_level,
    is_functorch_wrapped_tensor,
    is_written_down,
    leaves_of,
    mapped,
    skipped,
    storage_use_count,
)
from .transforms import functorch_active, naming_faults

__all__ = [
    "Owned",
    "WithTensors",
    "aliased",
    "as_part",
    "changed",
    "check_unchanged",
    "continuing",
    "copied",
    "full_precision",
    "lending",
    "own",
    "owned",
    "owning",
    "remembering",
    "under_transform",
    "untraced",
]

Flat = Callable[[Tensor, Tensor], Tensor]


def aliased(args: Any) -> Any:
    """A pytree with aliases in the place of its tensors: one that is both an argument and captured is then seen in both roles."""
    return mapped(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, args)


def copied(state: Any) -> Any:
    """A pytree with tensors of its own in the place of its tensors."""
    # a copy of a tensor of inference mode counts as changed once, its alias does not
    copy = lambda x: x.clone().data if x.is_inference() else x.clone()  # noqa: E731
    return mapped(lambda x: copy(x) if isinstance(x, Tensor) else x, state)


def remembering(function: Callable[..., Any], found: list[Any]) -> Callable[..., Any]:
    """``function``, whose results are added to ``found``, without the graphs that made them."""

    def call(*args: Any) -> Any:
        out = function(*args)
        found.append(mapped(lambda x: x.detach() if isinstance(x, Tensor) else x, out))
        return out

    return call


def check_unchanged(lent: Any, what: str) -> None:
    """Raise `InvalidInput` where a function has changed what `copied` made for it."""
    if any(isinstance(x, Tensor) and not x.is_inference() and x._version for x in leaves_of(lent)):
        changed(what, "the state")


def _counts(make: Callable[[], Tensor]) -> tuple[int, int, int]:
    """References to a tensor, to its memory, and to what it is a view of, as `own` sees them."""
    x = make()
    references = getrefcount(x)
    base = x._base
    # held here as in `_owned`: in some versions (2.6) an object for the memory is one more user of it, as long as it lives
    storage = x.untyped_storage()
    uses = 0 if storage_use_count is None else storage_use_count(storage._cdata)
    return references, uses, 0 if base is None else getrefcount(base)


# those of a tensor that nobody else knows, counted here, because versions of Python and PyTorch differ in what they count along
_REFERENCES, _USES, _ = _counts(lambda: torch.empty(1))
_, _USES_OF_VIEW, _REFERENCES_OF_BASE = _counts(lambda: torch.empty(1).view(1))


def own(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)``, or a copy of it where somebody else may write into its memory later on: it is held elsewhere too, is a view of such
    a tensor, or lies in memory that is not PyTorch's.

    ``f`` is called here because references are counted: of a result that were handed in, the caller's frame would hold one or not, as
    Python happens to make the call. A graph that autograd records holds results too, and never writes into them: there only objects
    count.
    """
    x = f(*args)
    references = getrefcount(x)
    return _owned(x, references)


def _owned(x: Any, references: int) -> Any:
    """See `own`; ``references``: as counted in the frame that called for ``x``."""
    if storage_use_count is None:
        return x.clone() if isinstance(x, Tensor) else x
    if references > _REFERENCES or type(x) is not Tensor:
        return x.clone() if isinstance(x, Tensor) else x
    try:
        storage = x.untyped_storage()
    except NotImplementedError:
        # sparse tensors, and those that a transform of torch.func has wrapped
        return x
    if not storage.resizable():
        return x.clone()
    uses = storage_use_count(storage._cdata)
    if uses <= _USES:
        return x
    if x._is_view():
        base = x._base
        if getrefcount(base) > _REFERENCES_OF_BASE or not (uses <= _USES_OF_VIEW or x.requires_grad):
            return x.clone()
        return x
    return x if x.requires_grad else x.clone()


def lending(f: Flat, what: str = "fun") -> Flat:
    """A flat function of time and state that changes neither, and whose results are `own`.

    Raises `InvalidInput` where ``f`` changes its arguments in place; where that cannot be seen (inference mode) it gets copies. It stands
    around every evaluation of a solve: a microsecond here is 2 % of a small network.
    """

    def call(t: Tensor, y: Tensor) -> Tensor:
        try:
            state, time = y._version, t._version
        except RuntimeError:
            # tensors of inference mode have no versions
            return own(f, t.clone(), y.clone())
        # as `own` does, without its star
        x = f(t, y)
        references = getrefcount(x)
        if y._version != state or t._version != time:
            changed(what, "the state" if y._version != state else "time")
        return _owned(x, references)

    return call


def changed(what: str, name: str) -> NoReturn:
    """Raise the error of a function that changes its argument in place."""
    raise InvalidInput(
        f"{what} changes its argument ({name}) in place, and the solve goes on with that tensor: make a new one instead, as by "
        "y = y.clamp(min=0) for y.clamp_(min=0), or begin with y = y.clone()"
    )


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


def continuing(name: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """For the backward of a node whose context holds what it needs under this ``name``: what is made on the way back, nodes of derivatives
    that can be differentiated again, is owned by those that own the node. No front door is open there."""

    def decorate(backward: Callable[..., R]) -> Callable[..., R]:
        @wraps(backward)
        def call(ctx: Any, *bars: Any) -> R:
            things = getattr(ctx, name)._things()
            if things is None or not torch.is_grad_enabled():
                return backward(ctx, *bars)
            _doors.open.append(things)
            try:
                return backward(ctx, *bars)
            finally:
                _doors.open.pop()

        return call

    return decorate


def under_transform() -> bool:
    """Whether the innermost open front door opened under a transform or forward mode."""
    return bool(_doors.open) and _doors.open[-1] is None


_TRACED = (
    "a tracer of graphs (torch.func.linearize, make_fx, torch.export, torch.jit.trace) writes down the operators of one call, and a solve "
    "whose steps and iterations go by what they find is no fixed list of them: take torch.func.jvp in the place of linearize, and trace "
    "fun alone"
)


def owning(function: Callable[P, R]) -> Callable[P, R]:
    """A front door whose results (tensors, pytrees of them, objects with a method ``with_tensors``, functions that give such) keep what
    their graphs need.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        inner, _doors.inner = _doors.inner, False
        if is_written_down():
            raise UnsupportedCombination(_TRACED)
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
    if is_functorch_wrapped_tensor(x):
        # of a solve around the transform: what is recorded there lies inside of the wrappers, which do not tell
        return cast(Tensor, _OwnerInside.apply(x, things)) if torch.is_grad_enabled() else x
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


class _Owner(Node):
    """``apply(x, things)`` is ``x`` with a node of its own, alone on it, as the collector wants it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, things: _Things) -> Tensor:
        ctx.things = things
        ctx.set_materialize_grads(False)
        return x.detach()

    @staticmethod
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, None]:
        return bar, None


class _OwnerInside(Node):
    """The same inside of transforms of ``torch.func``, at each level."""

    @staticmethod
    def forward(x: Tensor, things: _Things) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.things = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, bar: Tensor | None) -> tuple[Tensor | None, None]:
        return bar, None

    @staticmethod
    def jvp(ctx: Any, dot: Tensor | None, _: Any) -> Tensor | None:
        return dot

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, things: _Things) -> tuple[Tensor, Any]:
        return cast(Tensor, _OwnerInside.apply(x, things)), in_dims[0]


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
    way back. ``fun`` may switch it on for itself. Compilers of callers stay out too, and so does inference mode where PyTorch takes no
    Jacobians in it.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.is_inference_mode_enabled() and not differentiates_in_inference_mode():
            with torch.inference_mode(False), torch.no_grad():
                return call(*args, **kwargs)
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
