"""What autocast means for a solve: as for PyTorch's own operators that need their precision, it runs in single precision at the least."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .ownership import owning
from .rewriting import naming_faults
from .untraced import untraced

__all__ = ["full_precision"]

P = ParamSpec("P")
R = TypeVar("R")


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
