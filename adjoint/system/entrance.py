"""What every front door does before its own work: compilers of its callers stay out, and autocast is off.

Autocast means for a solve what it means for PyTorch's own operators that need their precision: it runs in single precision at the least.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..torch_internals import skipped
from .ownership import owning
from .rewriting import naming_faults

__all__ = ["full_precision", "untraced"]

P = ParamSpec("P")
R = TypeVar("R")


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
