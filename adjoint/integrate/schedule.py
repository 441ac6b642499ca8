"""Going back through many steps with few states: which of them are kept, and which steps are taken again for the others."""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Generic, TypeVar

__all__ = ["Schedule", "first_part", "repetitions"]

T = TypeVar("T")


def repetitions(length: int, slots: int) -> int:
    """How often some step must be taken again to go back through ``length`` steps with ``slots`` states, the first one included: the
    smallest ``r`` with ``length <= C(slots + r, slots)`` (Griewank & Walther 2000, proposition 1)."""
    r = 0
    while comb(slots + r, slots) < length:
        r += 1
    return r


def first_part(length: int, slots: int) -> int:
    """Where to keep the next state on the way to the last of ``length`` steps, so that the fewest steps are taken again in all
    (Griewank & Walther 2000, equation 4): one of the best places, ``1 <= m < length``. ``slots`` (two or more) includes the first state."""
    r = repetitions(length, slots)
    return min(comb(slots + r - 1, slots), length - comb(slots + r - 2, slots - 1))


class Schedule(Generic[T]):
    """What steps start from, from the last one to the first; at most ``slots`` of them exist at a time, the first one included."""

    def __init__(self, first: T, slots: int) -> None:
        self._slots = slots
        self._kept: list[tuple[int, T]] = [(0, first)]
        self._latest: tuple[int, T] | None = None
        #: the most that were kept at a time
        self.peak = 1

    def start(self, k: int, advance: Callable[[T, int, int], T]) -> T:
        """What step ``k`` starts from; ``k`` must not grow from call to call. ``advance(start, i, stop)`` takes the steps from ``i``, which
        starts there, up to ``stop``, and gives what that one starts from."""
        if self._latest is not None and self._latest[0] == k:
            return self._latest[1]
        self._latest = None
        while self._kept[-1][0] > k:
            self._kept.pop()
        place, start = self._kept[-1]
        while place < k:
            free = self._slots - len(self._kept)
            stop = place + first_part(k - place + 1, free + 1) if free else k
            start, place = advance(start, place, stop), stop
            if free:
                self._kept.append((place, start))
                self.peak = max(self.peak, len(self._kept))
        self._latest = (k, start)
        return start
