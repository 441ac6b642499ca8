"""The error of functions that write into a tensor which they keep from call to call, where that cannot be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import UnsupportedCombination

__all__ = ["naming_writes"]

P = ParamSpec("P")
R = TypeVar("R")

#: how PyTorch says so: its transforms, and autograd
_SAID = (
    "would mutate a captured Tensor",
    "requires grad is being used in an in-place operation",
    "modified by an inplace operation",
    "backward through the graph a second time",
)


def naming_writes(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, with a named error in the place of PyTorch's own for such writes."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if type(error) is RuntimeError and any(words in str(error) for words in _SAID):
                raise UnsupportedCombination(
                    "fun (or an event function, jac, quadrature) keeps a tensor from call to call that it writes into, or computed in "
                    "another call, and its derivative is asked for, which goes through each call on its own: return a new tensor, and "
                    "make the one it writes into anew in every call"
                ) from error
            raise

    return call
