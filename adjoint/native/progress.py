"""How far a solve by compiled code has come, told while it goes on.

The code writes the time that each trajectory has come to into memory that is looked at now and then from another thread: the call itself
does not hold Python's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor

from ..integrate.plan import Monitor

__all__ = ["tell", "told", "watches_steps"]

#: seconds between two looks
_PAUSE = 0.1
_SILENT = nullcontext()


def watches_steps(monitor: Monitor) -> bool:
    """Whether it is to be told of single steps, which only the eager engine does."""
    kind = type(monitor)
    theirs = (kind.step, kind.accepted, kind.rejected, kind.adjoint)
    return theirs != (Monitor.step, Monitor.accepted, Monitor.rejected, Monitor.adjoint)


def tell(monitor: Monitor, anchors: Tensor, covered: Tensor) -> None:
    """Tell ``monitor`` which part of the spans between the first and the last of ``anchors`` (A, B) is covered, in the mean of all
    trajectories, which have come to the times ``covered`` (B,)."""
    if type(monitor).advanced is Monitor.advanced:
        return
    whole = (anchors[-1] - anchors[0]).abs()
    part = torch.where(whole > 0, (covered - anchors[0]).abs() / whole, 1.0)
    monitor.advanced(float(part.mean()) if part.numel() else 1.0)


def told(monitor: Monitor, call: Any, anchors: Tensor) -> AbstractContextManager[None]:
    """`tell` ``monitor`` now and then of what ``call``, made within, has covered: trajectories are not solved side by side."""
    return _SILENT if type(monitor).advanced is Monitor.advanced else _telling(monitor, call, anchors)


@contextmanager
def _telling(monitor: Monitor, call: Any, anchors: Tensor) -> Iterator[None]:
    covered, done = anchors[0].clone(), Event()
    call.covered = covered.data_ptr()

    def look() -> None:
        while not done.wait(_PAUSE):
            tell(monitor, anchors, covered)

    thread = Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    tell(monitor, anchors, covered)
