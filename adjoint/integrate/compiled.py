"""Steps under ``torch.compile``, kept for later solves of the same functions and shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch

from .columns import column_options

__all__ = ["compile_key", "compiled"]

_warned: set[tuple[Hashable, str]] = set()


def compile_key(fun: Callable[..., Any]) -> Hashable:
    """What makes two right-hand sides share compiled code: their Python code, or for other callables their type."""
    code = getattr(fun, "__code__", None) or getattr(getattr(fun, "__func__", None), "__code__", None)
    return code if code is not None else type(fun)


@lru_cache(maxsize=512)
def compiled(function: FunctionType, key: Hashable, columns: bool = False) -> Callable[..., Any]:
    """``function`` compiled whole, for static shapes; where that fails, itself, after one warning that says why.

    One compiled copy for each ``key``: the compiler counts recompilations by code object, and many right-hand sides must not
    use up one limit. Within a key its guards tell shapes, options and captured objects apart. ``columns``: with the pass that takes
    narrow matrices apart.
    """
    copy = FunctionType(
        function.__code__.replace(co_name=function.__name__),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    whole = torch.compile(copy, dynamic=False, fullgraph=True, options=column_options() if columns else None)

    def call(*args: Any) -> Any:
        try:
            return whole(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if (key, reason) not in _warned:  # once for each right-hand side
                _warned.add((key, reason))
                warnings.warn(f"compile=True: {function.__name__} runs uncompiled, because: {reason}", RuntimeWarning, stacklevel=2)
        return function(*args)

    return call
