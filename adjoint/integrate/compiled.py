"""Steps under ``torch.compile``, kept for later solves of the same shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .batched import Attempt, Carry, advance
from .plan import Plan

__all__ = ["compiled", "compiled_advance"]

_warned: set[str] = set()


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled whole, for static shapes; where that fails, itself, after one warning that says why.

    One compiled object for each of our functions: the compiler's own guards tell user functions, shapes and options apart. Solves with many different
    functions compile each of them, hence the raised limit.
    """
    whole = torch.compile(function, dynamic=False, fullgraph=True)

    def call(*args: Any) -> Any:
        with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
            try:
                return whole(*args)
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                if reason not in _warned:
                    _warned.add(reason)
                    warnings.warn(f"compile=True: {function.__name__} runs uncompiled, because: {reason}", RuntimeWarning, stacklevel=2)
        return function(*args)

    return call


def compiled_advance(f: Callable[[Tensor, Tensor], Tensor], plan: Plan) -> Callable[..., tuple[Carry, Attempt]]:
    """`advance` compiled for one right-hand side and plan."""
    step = compiled(advance)

    def attempt(carry: Carry, stops: Tensor, sign: Tensor, dense: bool) -> tuple[Carry, Attempt]:
        return step(f, plan, stops, sign, carry, dense)

    return attempt
