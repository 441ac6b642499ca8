"""Front doors that compilers of their callers stay out of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

import torch

from ..torch_internals import skipped

__all__ = ["untraced"]

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
