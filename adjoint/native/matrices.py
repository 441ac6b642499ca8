"""How the matrices of implicit steps are kept and taken apart: full, within a band, or by a sparse pattern, whichever costs least."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .bands import Bands, bands_of
from .sparse import Sparse, sparse_of

__all__ = ["Matrices", "matrices_of"]

#: unknowns below which matrices are not sparse in any case, and how much longer a product takes whose places are looked up
_SMALL, _LOOKED_UP = 32, 4


@dataclass(frozen=True, eq=False)
class Matrices:
    """Of ``width`` equations. ``nonzero``: entries of the Jacobian by the state, or by the state and its slope side by side, that are not
    always zero; ``bands``: where they are, unless the factors are ``sparse``."""

    width: int
    residual: bool
    nonzero: Collection[tuple[int, int]]
    bands: Bands
    sparse: Sparse | None

    def place(self, i: int, j: int) -> int:
        """Where an entry of the Jacobian is kept."""
        if self.sparse is None:
            return i * (1 + self.residual) * self.width + j
        return self.sparse.entries[i, j % self.width] + (len(self.sparse.entries) if j >= self.width else 0)

    def operations(self) -> int:
        """Products that factors take, in units of those whose places follow each other."""
        if self.sparse is not None:
            return self.sparse.operations * _LOOKED_UP
        return _banded(self.width, self.bands)

    def row(self) -> float:
        """The mean number of entries in a row of the factors."""
        return self.bands.part(self.width) * self.width if self.sparse is None else self.sparse.factors / self.width


def _banded(width: int, bands: Bands) -> int:
    if bands.part(width) == 1.0:
        return width**3 // 3
    return width * bands.below * (bands.below + bands.above + 1)


def matrices_of(
    width: int, nonzero: Collection[tuple[int, int]], steady: Collection[tuple[int, int]] = (), residual: bool = False, mass: bool = False
) -> Matrices:
    """``steady``: entries that do not depend on the state; ``residual``: see `Matrices`; ``mass``: with a matrix in front of the slopes,
    which may be full."""
    full = Bands(None, width - 1, width - 1)
    if mass:
        return Matrices(width, residual, nonzero, full, None)
    places = {(i, j % width) for i, j in nonzero}
    found = Matrices(width, residual, nonzero, bands_of(width, places), None)
    if width < _SMALL or len(places) * _LOOKED_UP > width * width:
        return found
    sparse = sparse_of(width, places, _costs(width, nonzero, steady) if residual else None)
    if sparse is None:
        return found
    other = Matrices(width, residual, nonzero, full, sparse)
    return other if other.operations() < found.operations() else found


def _costs(width: int, nonzero: Collection[tuple[int, int]], steady: Collection[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Of pairing equations with unknowns: in short steps slopes have the larger part, and constants do not vanish."""
    certain, found = set(steady), dict[tuple[int, int], float]()
    for i, j in nonzero:
        cost = (1.0 if j >= width else 16.0) + (0.0 if (i, j) in certain else 2.0) + (0.0 if i == j % width else 0.5)
        found[i, j % width] = min(cost, found.get((i, j % width), cost))
    return found
