"""The progress bar of long solves, by tqdm."""

from __future__ import annotations

from .errors import InvalidInput
from .integrate import Monitor

__all__ = ["progress_monitor"]


class _Bar(Monitor):
    """Shows the part of the span that the slowest trajectory has covered, in per cent."""

    def __init__(self) -> None:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise InvalidInput("progress=True needs tqdm: pip install tqdm") from error
        self.bar = tqdm(total=100.0, desc="solve", unit="%", bar_format="{l_bar}{bar}| {n:.1f}/{total:.0f} % [{elapsed}<{remaining}]")

    def advanced(self, fraction: float) -> None:
        self.bar.update(100.0 * fraction - self.bar.n)

    def close(self) -> None:
        self.bar.close()


def progress_monitor(progress: bool) -> Monitor:
    """A monitor that shows a bar, or one that ignores everything."""
    return _Bar() if progress else Monitor()
