"""Warnings at the place of the user's call."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path

import torch

__all__ = ["remark"]

_INSIDE = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent), contextlib.__file__)


def remark(text: str, category: type[Warning]) -> None:
    """Warn, as if by the innermost line that is neither ours nor PyTorch's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)
