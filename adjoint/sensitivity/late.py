"""Tensors of a transform that ``fun`` meets late, which the solve does not know of.

A node runs below the transforms that are around it, on plain tensors: those that ``fun`` captures are put in, as far as they were seen when
it was called at the start of the span. One that it uses only later on comes with the wrapper of a transform that is not active there, or
with a tangent; PyTorch drops both without a word, and the derivative with them. So where a transform is around, everything in reach of
``fun`` is looked through for such tensors, and if there are some, it is watched at every step whether it uses them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from ..errors import CapturedTensorLost
from ..integrate import Record
from ..system.capture import stood_in_for
from ..system.origins import attribute, closed_over
from ..system.system import System, VmappedSystem
from ..torch_internals import dual_level, is_functorch_wrapped_tensor, leaves_of, set_fwd_grad_enabled
from .asked import LOST

__all__ = ["check_strangers", "naming_strangers"]

#: what PyTorch says of tensors of a transform that is not active, where it says anything
_SAID = ("may have escaped from inside a function being vmapped", "ATen/functorch")
#: so many things in reach of a function are looked at
_MOST = 20_000


@contextmanager
def naming_strangers() -> Iterator[None]:
    """A solve under a transform, with a named error in the place of PyTorch's own for tensors that are lost."""
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in _SAID):
            raise CapturedTensorLost("within the span " + LOST) from error
        raise


def check_strangers(system: System | VmappedSystem, record: Record, inputs: Sequence[Tensor]) -> None:
    """Raise `CapturedTensorLost` if ``fun`` uses, at the start of a step or at the end, a tensor of a transform around the solve that is
    none of its inputs."""
    base: Any = system
    while isinstance(base, VmappedSystem):
        base = base.base
    if not isinstance(base, System):
        return
    known = {id(x) for x in base.inputs} | stood_in_for()
    strangers = {id(x): x for x in _in_reach(base.fun) if id(x) not in known and _moving(x)}
    if not strangers or base.residual is not None:
        return
    f, real = system.bind(inputs), record.last.dtype.to_real()
    with torch.no_grad(), _Watch(strangers):
        # without derivatives in anything that is known there is no state but the last
        for t, y in zip(record.t, record.states, strict=False):
            f(t.to(real), y)
        f(record.t_final.to(real), record.last)


class _Watch(TorchFunctionMode):
    def __init__(self, strangers: dict[int, Tensor]) -> None:
        super().__init__()
        self.strangers = strangers

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(id(x) in self.strangers for x in leaves_of((args, kwargs))):
            raise CapturedTensorLost("within the span " + LOST)
        return func(*args, **(kwargs or {}))


def _moving(x: Tensor) -> bool:
    if is_functorch_wrapped_tensor(x):
        return True
    if dual_level() < 0:
        return False
    with set_fwd_grad_enabled(True):
        return forward_ad.unpack_dual(x).tangent is not None


def _in_reach(function: Any) -> Iterator[Tensor]:
    """Tensors in closures, globals, attributes and containers that a function can get at."""
    todo, seen = [function], set()
    while todo and len(seen) < _MOST:
        x = todo.pop()
        if id(x) in seen or x is None or isinstance(x, (ModuleType, type, str, int, float)):
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, FunctionType):
            todo += [*closed_over(x), *(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
            if not (x.__module__ or "").startswith("torch."):
                todo += [x.__globals__[name] for name in _names(x.__code__) if name in x.__globals__]
        elif isinstance(x, MethodType):
            todo += [x.__self__, x.__func__]
        elif isinstance(x, partial):
            todo += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, dict):
            todo += x.values()
        elif isinstance(x, (list, tuple, set)):
            todo += x
        elif (own := attribute(x, "__dict__")) is not None:
            todo += own.values()
            todo += [m for name in ("forward", "__call__") if isinstance(m := getattr(type(x), name, None), FunctionType)]


def _names(code: CodeType) -> set[str]:
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)
