"""Indices that run with the rows of a batch: what is read of one row is read of all rows at once, so that their independence is proved.

A component of an index is an integer, or `Along` the rows: ``start + step * b`` in row b. Readers of operators do arithmetic with either.
Where a comparison does not come out the same for all rows, the rows are not alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

__all__ = ["Along", "Index", "Unlike", "flat", "same", "strides", "unflat"]


class Unlike(Exception):
    """Rows of a batch depend on each other, or are not treated alike; the message says how."""


@dataclass(frozen=True, slots=True)
class Along:
    """``start + step * b`` for rows b in [0, count); ``step`` is not 0, ``count`` at least 2."""

    start: int
    step: int
    count: int

    def _made(self, start: int, step: int) -> Index:
        return Along(start, step, self.count) if step else start

    @property
    def last(self) -> int:
        """The value in the last row."""
        return self.start + self.step * (self.count - 1)

    def __add__(self, other: Index) -> Index:
        if isinstance(other, Along):
            return self._made(self.start + other.start, self.step + other.step)
        return Along(self.start + other, self.step, self.count)

    __radd__ = __add__

    def __neg__(self) -> Index:
        return Along(-self.start, -self.step, self.count)

    def __sub__(self, other: Index) -> Index:
        return self + -other

    def __rsub__(self, other: Index) -> Index:
        return -self + other

    def __mul__(self, other: int) -> Index:
        return self._made(self.start * other, self.step * other)

    __rmul__ = __mul__

    def __floordiv__(self, other: int) -> Index:
        if self.step % other == 0:
            return self._made(self.start // other, self.step // other)
        if self.start // other == self.last // other:
            return self.start // other
        raise Unlike("elements are taken across the rows of the batch")

    def __mod__(self, other: int) -> Index:
        if self.step % other == 0:
            return self.start % other
        return self - (self // other) * other

    def _all(self, first: bool, last: bool) -> bool:
        if first != last:
            raise Unlike("some rows of the batch are treated differently from others")
        return first

    def __lt__(self, other: int) -> bool:
        return self._all(self.start < other, self.last < other)

    def __le__(self, other: int) -> bool:
        return self._all(self.start <= other, self.last <= other)

    def __gt__(self, other: int) -> bool:
        return self._all(self.start > other, self.last > other)

    def __ge__(self, other: int) -> bool:
        return self._all(self.start >= other, self.last >= other)


Index = int | Along


def same(index: Index, number: int) -> bool:
    """Whether an index is a number, in all rows or in none."""
    if not isinstance(index, Along):
        return index == number
    if (number - index.start) % index.step == 0 and 0 <= (number - index.start) // index.step < index.count:
        raise Unlike("some rows of the batch are treated differently from others")
    return False


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def flat(index: Sequence[Index], steps: Sequence[int]) -> Index:
    """Place of an element in memory."""
    place: Index = 0
    for i, step in zip(index, steps, strict=True):
        place = place + i * step
    return place


def unflat(place: Index, steps: Sequence[int]) -> tuple[Index, ...]:
    """The index of the element at a place of a contiguous tensor with these strides."""
    index = []
    for step in steps:
        index.append(place // step)
        place = place % step
    return tuple(index)
