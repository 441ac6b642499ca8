"""Whether ``fun`` is on the way back what it was in the solve.

Derivatives evaluate ``fun`` again. Where something that it uses was changed in between (an attribute or buffer of a module, `train` or
`eval`, a variable of a closure), or where it draws random numbers, the gradient would be that of another function, without a sign of it.
So a solve remembers a few of its evaluations, and they are made once more before anything else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import SolveError
from ..torch_internals import is_functorch_wrapped_tensor, leaves_of, mapped

__all__ = ["CHANGED", "Witness", "beside", "differs"]

#: what the errors say
CHANGED = (
    "fun must give the same value whenever it is called with the same arguments (no dropout, no counters, no parameters or attributes "
    "changed in between)"
)
#: one evaluation in so many is remembered at first, and so many at the most beside the first and the last one
_STRIDE, _MOST = 16, 8


class Witness:
    """A few evaluations of a function: the first, the last, and some between."""

    def __init__(self) -> None:
        #: whether a strategy evaluates again though it keeps no states
        self.wanted = False
        self._notes: list[tuple[Any, Any, Any, Any]] = []
        self._others: list[Callable[[], bool]] = []
        self._last: tuple[Any, Any, Any, Any] | None = None
        self._calls, self._next, self._stride = 0, 0, _STRIDE

    def watch(self, f: Callable[..., Any], anew: Callable[[], Callable[..., Any]] | None = None) -> Callable[..., Any]:
        """``f(t, y)``, some of whose calls are remembered. ``anew`` gives it again later on, when parameters that were put into a module
        for the solve may have been taken out."""
        again = (lambda: f) if anew is None else anew

        def call(t: Tensor, y: Any) -> Any:
            k = f(t, y)
            if self._calls >= self._next:
                self._note(again, t, y, k)
            self._calls += 1
            self._last = (again, t, y, k)
            return k

        return call

    def add(self, asked: Iterable[Callable[[], bool]]) -> None:
        """More to be asked later on: whether ``fun`` gives what it gave."""
        self._others += asked

    def settle(self) -> None:
        """The solve is done."""
        if self._last is not None and self._calls > 1 and not _within(*self._last[1:]):
            self._notes.append(_copied(*self._last))
        self._last = None
        self._next = self._calls

    def _note(self, f: Any, t: Any, y: Any, k: Any) -> None:
        if _within(t, y, k):
            return
        self._notes.append(_copied(f, t, y, k))
        if len(self._notes) > _MOST:
            # every second one: those that are left are as far from each other as those that come
            del self._notes[2::2]
            self._stride *= 2
        self._next = self._calls + self._stride

    def check(self, what: str = "The way back evaluates fun again, and it is another function than in the solve") -> None:
        """Evaluate again; raise `SolveError` if other values come out."""
        notes, wrong = self._notes, []
        with torch.no_grad():
            for f, t, y, k in notes:
                again = f()(t, y)
                wrong += [differs(a, b) for a, b in zip(leaves_of(again), leaves_of(k), strict=True)]
            if not all(same() for same in self._others) or (wrong and bool(torch.stack(wrong).any())):
                raise SolveError(f"{what}: {CHANGED}. Call backward() before anything changes, or hand over what does through args=")


def _within(*tensors: Any) -> bool:
    """Whether they are those of a transform, at whose level alone they can be used: the way back may be below it. (Doors look at functions
    there; the solve itself is at the bottom.)"""
    return any(is_functorch_wrapped_tensor(x) for x in leaves_of(tensors))


def _copied(f: Any, *tensors: Any) -> tuple[Any, Any, Any, Any]:
    t, y, k = (mapped(lambda x: x.detach().clone(), x) for x in tensors)
    return f, t, y, k


def beside(x: Tensor, part: float) -> Tensor:
    """``x`` (..., n) with every entry moved by between 0.5 and 2.5 times ``part`` of its size, outward from zero, so that what is positive
    stays so."""
    k = torch.arange(x.shape[-1], device=x.device, dtype=x.dtype.to_real()) + 1
    size = x.abs()
    size = size + 1e-3 * size.amax(-1, keepdim=True) if x.shape[-1] else size
    size = torch.where(size > 0, size, 1.0)
    away = torch.where(x.real < 0, -torch.ones_like(k), 1.0)
    return x + part * size * (1.5 + torch.cos(k * k)) * away


def differs(again: Tensor, known: Tensor) -> Tensor:
    """Whether two evaluations at one point differ by more than kernels do that add in another order; 0-d.

    A number counts beside the largest one of all: sums of terms that nearly cancel are rounded as these terms are.
    """
    single = torch.finfo(known.dtype).eps > 1e-10
    size = known.abs().nan_to_num(0.0, 0.0, 0.0)
    near, far = (1e-3, 1e-5) if single else (1e-6, 1e-9)
    allowed = near * size + far * size.amax() if size.numel() else size
    # what was not finite (a step that was rejected) says nothing
    return (~((again - known).abs() <= allowed) & torch.isfinite(known)).any()
