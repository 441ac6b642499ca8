"""The progress bar of long solves, by tqdm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import InvalidInput
from ..integrate import Monitor

__all__ = ["progress_monitor", "root_monitor"]


class _Bar(Monitor):
    """Shows the part of the span that the slowest trajectory has covered, in per cent."""

    def __init__(self) -> None:
        self.bar = _tqdm()(total=100.0, desc="solve", unit="%", bar_format="{l_bar}{bar}| {n:.1f}/{total:.0f} % [{elapsed}<{remaining}]")

    def advanced(self, fraction: float) -> None:
        self.bar.update(100.0 * fraction - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise InvalidInput("progress=True needs tqdm: pip install tqdm") from error
    return tqdm


def root_monitor() -> Callable[[int, Tensor, Tensor], None]:
    """A callback that shows the largest residual norm after every iteration of a root finder."""
    bar = _tqdm()(desc="iterations", unit="")

    def show(iteration: int, x: Tensor, norms: Tensor) -> None:
        bar.update(1)
        bar.set_postfix(residual=f"{float(norms.max()):.2e}")

    return show


def progress_monitor() -> Monitor:
    """A monitor that shows a bar."""
    return _Bar()
