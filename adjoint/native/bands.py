"""In which order of unknowns the Jacobian has its entries near the diagonal.

Factors of a banded matrix with row exchanges stay within the band and as much again above it (Golub & Van Loan, Matrix Computations,
section 4.3). The order is that of reverse Cuthill & McKee (George & Liu 1981, section 4.3), from SciPy, or the one that is there.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

__all__ = ["Bands", "bands_of"]

#: unknowns below which matrices are full in any case, and the part of a full matrix below which factors are banded
_SMALL, _WORTH = 16, 0.7


class Bands(NamedTuple):
    """Row and column ``r`` of the factors are those of unknown ``order[r]``, or of ``r`` itself without one; entries are ``below`` the
    diagonal, or ``above`` it, by so many at the most."""

    order: list[int] | None
    below: int
    above: int

    def part(self, width: int) -> float:
        """Of a full matrix, what factors have room for."""
        return min(1.0, (2 * self.below + self.above + 1) / width)


def bands_of(width: int, nonzero: Collection[tuple[int, int]]) -> Bands:
    """Of a matrix (width, width) with these entries and the diagonal."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    full = Bands(None, width - 1, width - 1)
    if width < _SMALL or len(nonzero) >= _WORTH * width * width:
        return full
    rows, columns = np.array([*nonzero, (0, 0)]).T
    pattern = coo_array((np.ones(len(rows)), (rows, columns)), shape=(width, width)).tocsr()
    order = reverse_cuthill_mckee(pattern + pattern.T, symmetric_mode=True)
    place = np.empty(width, dtype=int)
    place[order] = np.arange(width)
    found = [_within(None, rows - columns), _within(order.tolist(), place[rows] - place[columns])]
    best = min(found, key=lambda x: 2 * x.below + x.above)
    return best if best.part(width) <= _WORTH else full


def _within(order: list[int] | None, apart: np.ndarray) -> Bands:
    return Bands(order, max(0, int(apart.max())), max(0, int(-apart.min())))
