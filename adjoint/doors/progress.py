"""The progress bar of long solves, by tqdm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ..errors import InvalidInput
from ..integrate import Monitor

__all__ = ["in_parts", "progress_monitor", "root_monitor"]


class _Bar(Monitor):
    """Shows the part of the span that the slowest trajectory has covered, in per cent. ``parts``: of solves one behind the other, after
    the last of which `end` is called."""

    def __init__(self, parts: bool = False) -> None:
        self._parts, self._begun, self._covered = parts, 0.0, 0.0
        self.bar = _tqdm()(total=100.0, desc="solve", unit="%", bar_format="{l_bar}{bar}| {n:.1f}/{total:.0f} % [{elapsed}<{remaining}]")

    def advanced(self, fraction: float) -> None:
        self._covered = self._begun + (1.0 - self._begun) * fraction
        self.bar.update(100.0 * self._covered - self.bar.n)

    def parted(self) -> None:
        self._begun = self._covered

    def close(self) -> None:
        if not self._parts:
            self.bar.close()

    def end(self) -> None:
        """No part follows."""
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


def progress_monitor(asked: bool | Monitor) -> Monitor:
    """The monitor of a solve that is to show a bar: its own, or that of the solve of which it is a part."""
    return asked if isinstance(asked, Monitor) else _Bar()


@contextmanager
def in_parts(asked: bool) -> Iterator[bool | Monitor]:
    """For ``progress=`` of solves that are parts of one: a monitor if a bar was asked for."""
    if not asked:
        yield False
        return
    bar = _Bar(parts=True)
    try:
        yield bar
    finally:
        bar.end()
