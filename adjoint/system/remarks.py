"""Who calls: warnings at the place of the user's call, and operators that are not the user's. And what is looked at only now and then."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["Seldom", "called_by_us", "remark"]

_OURS, _TORCH = str(Path(__file__).parents[1]), str(Path(torch.__file__).parent)
_INSIDE = (_OURS, _TORCH, contextlib.__file__)


def remark(text: str, category: type[Warning]) -> None:
    """Warn, as if by the innermost line that is neither ours nor PyTorch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


def called_by_us(depth: int = 2) -> bool:
    """Whether the operator that a mode of torch functions is asked about was called by this package: of a solve inside of the user's
    function, say. ``depth``: how many calls from here on are surely ours."""
    frame = sys._getframe(depth)
    # modes hand on what they see
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_name == "__torch_function__"):
        if frame.f_code.co_name == "_call_impl":
            # a module, which is the user's
            return False
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_filename.startswith(_OURS)


class Seldom:
    """Something to be done ever more seldom: the first time, the fourth, the sixteenth, the 64th."""

    count, next = 0, 1

    def due(self) -> bool:
        """Whether it is to be done this time."""
        self.count += 1
        if self.count < self.next:
            return False
        self.next *= 4
        return True

    def coming(self) -> bool:
        """Whether it is to be done this time, which somebody else will ask for with `due`; if not, this was one."""
        if self.count + 1 >= self.next:
            return True
        self.count += 1
        return False
