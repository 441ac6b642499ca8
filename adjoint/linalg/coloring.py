"""Groups of columns (or rows) of a sparse matrix that share no row (column), so that one product with the matrix reads them all.

Curtis, Powell and Reid (1974); Gebremedhin, Manne and Pothen, What color is your Jacobian? (SIAM Review 47, 2005).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .sparsity import SparsityPattern

__all__ = ["Coloring", "color_columns", "color_pattern", "color_rows"]

#: beyond this many entries only the cheap orders are tried
_LARGE = 300_000


@dataclass(frozen=True, eq=False)
class Coloring:
    """``colors`` (n,) int64 on the CPU: the colour of every column, or of every row if ``by_rows``; ``n_colors`` in all."""

    colors: Tensor
    n_colors: int
    by_rows: bool = False

    def valid(self, pattern: SparsityPattern) -> bool:
        """Whether no two columns of one colour have an entry in the same row (or the same with rows)."""
        rows, columns = pattern.indices.cpu() if not self.by_rows else pattern.indices.cpu().flip(0)
        key = rows * max(self.n_colors, 1) + self.colors[columns]
        return bool(torch.unique(key).numel() == key.numel())


def color_columns(pattern: SparsityPattern, order: str = "best") -> Coloring:
    """Greedy distance-2 colouring of the columns.

    ``order``: ``"natural"``, ``"largest_first"``, ``"smallest_last"``, ``"cyclic"`` (``colour = linear form of grid indices mod k``, which
    is the best for stencils; `InvalidInput` where none is found), or ``"best"``: the fewest colours of these, cheap ones only for large
    matrices.
    """
    matrix = pattern.to_scipy()
    bound = int(np.diff(matrix.indptr).max(initial=0))
    if order == "best":
        return _best(matrix, bound)
    if order == "cyclic":
        found = _cyclic(matrix, bound, max(4 * bound, 64))
        if found is None:
            raise InvalidInput("order='cyclic': the pattern is not that of a stencil; use order='best'")
        return _coloring(found)
    if order not in _ORDERS:
        raise InvalidInput(f"order={order!r}: use 'best', 'cyclic' or one of {sorted(_ORDERS)}")
    return _coloring(_greedy(matrix, _ORDERS[order](matrix)))


def color_rows(pattern: SparsityPattern, order: str = "best") -> Coloring:
    """The same for rows: for products with the transposed matrix."""
    found = color_columns(pattern.transpose(), order)
    return Coloring(found.colors, found.n_colors, by_rows=True)


def color_pattern(pattern: SparsityPattern) -> Coloring:
    """By rows or by columns, whichever needs fewer colours; by rows (reverse products, which are cheaper in PyTorch) if both need as
    many."""
    matrix = pattern.to_scipy()
    most_in_row = int(np.diff(matrix.indptr).max(initial=0))
    most_in_column = int(np.diff(matrix.tocsc().indptr).max(initial=0))
    first, second, bound = color_rows, color_columns, most_in_row
    if most_in_row < most_in_column:
        first, second, bound = color_columns, color_rows, most_in_column
    one = first(pattern)
    if one.n_colors <= bound:  # the other way cannot need fewer
        return one
    other = second(pattern)
    return min(one, other, key=lambda c: (c.n_colors, not c.by_rows))


def _coloring(colors: np.ndarray) -> Coloring:
    return Coloring(torch.from_numpy(colors.astype(np.int64)), int(colors.max(initial=-1)) + 1)


def _best(matrix: Any, bound: int) -> Coloring:
    n = matrix.shape[1]
    if bound == n:  # a full row: every column is alone
        return _coloring(np.arange(n))
    best = _cyclic(matrix, bound, max(2 * bound, 8))
    # meetings of columns, which smallest-last goes through one by one
    meetings = int((np.diff(matrix.indptr).astype(np.int64) ** 2).sum())
    small = matrix.nnz <= _LARGE
    names = ["natural", *(["largest_first"] if small else []), *(["smallest_last"] if meetings <= 10 * _LARGE else [])]
    for name in names:
        if best is not None and (best.max(initial=-1) + 1 <= bound or (not small and best.max() + 1 <= bound + 2)):
            break
        colors = _greedy(matrix, _ORDERS[name](matrix))
        if best is None or colors.max(initial=-1) < best.max(initial=-1):
            best = colors
    assert best is not None
    return _coloring(best)


def _greedy(matrix: Any, order: np.ndarray) -> np.ndarray:
    """First free colour in the given order. The colours that a row has seen are the bits of one integer."""
    columns = matrix.tocsc()
    starts, rows = columns.indptr.tolist(), columns.indices.tolist()
    seen = [0] * matrix.shape[0]
    colors = np.zeros(matrix.shape[1], np.int64).tolist()
    for j in order.tolist():
        mine = rows[starts[j] : starts[j + 1]]
        taken = 0
        for r in mine:
            taken |= seen[r]
        bit = ~taken & (taken + 1)
        colors[j] = bit.bit_length() - 1
        for r in mine:
            seen[r] |= bit
    return np.asarray(colors, np.int64)


def _natural(matrix: Any) -> np.ndarray:
    return np.arange(matrix.shape[1])


def _largest_first(matrix: Any) -> np.ndarray:
    """By the number of columns that each column meets (counted with repetition)."""
    per_row = np.diff(matrix.indptr)
    return np.argsort(-(matrix.T.astype(np.int64) @ per_row), kind="stable")


def _smallest_last(matrix: Any) -> np.ndarray:
    """Matula and Beck: the column that meets the fewest remaining ones comes last. Degrees are counted with repetition, in buckets."""
    columns = matrix.tocsc()
    n = matrix.shape[1]
    row_starts, row_columns = matrix.indptr.tolist(), matrix.indices.tolist()
    starts, rows = columns.indptr.tolist(), columns.indices.tolist()
    degree = (matrix.T.astype(np.int64) @ np.diff(matrix.indptr)).tolist()
    buckets: list[list[int]] = [[] for _ in range(max(degree, default=0) + 1)]
    for j, d in enumerate(degree):
        buckets[d].append(j)
    done, order, low = [False] * n, [], 0
    while len(order) < n:
        while not buckets[low]:
            low += 1
        j = buckets[low].pop()
        if done[j] or degree[j] != low:
            continue
        done[j] = True
        order.append(j)
        for r in rows[starts[j] : starts[j + 1]]:
            for other in row_columns[row_starts[r] : row_starts[r + 1]]:
                if not done[other]:
                    degree[other] -= 1
                    buckets[degree[other]].append(other)
                    low = min(low, degree[other])
    return np.asarray(order[::-1], np.int64)


_ORDERS = {"natural": _natural, "largest_first": _largest_first, "smallest_last": _smallest_last}


def _cyclic(matrix: Any, bound: int, most: int) -> np.ndarray | None:
    """``colour = (j + a (j // s) + b (j // t)) mod k`` with the smallest ``k <= most`` that works, or None.

    Stencils on grids have few distances between the columns of a row, and the strides ``s, t`` of the grid are among them.
    """
    n = matrix.shape[1]
    if matrix.nnz == 0:
        return np.zeros(n, np.int64)
    pairs = _pairs(matrix, bound) if bound <= _STENCIL else []
    gaps = _gaps(pairs, n)
    if bound > _STENCIL or gaps is None:
        return None
    places = [(gaps, np.zeros_like(gaps), np.zeros_like(gaps), 1, n)]
    places += [(*_steps(pairs, gaps, s, t, n), s, t) for s, t in _strides(gaps, n)]
    j = np.arange(n)
    for k in range(bound, most + 1):
        for gap, ds, dt, s, t in places:
            a = np.arange(k if ds.any() else 1)[:, None, None]
            b = np.arange(k if dt.any() else 1)[None, :, None]
            apart = ((gap + a * ds + b * dt) % k != 0).all(-1)
            if apart.any():
                a0, b0 = np.argwhere(apart)[0]
                return (j + a0 * (j // s) + b0 * (j // t)) % k
    return None


#: more columns in a row, or more distinct distances between them, than in any usual stencil
_STENCIL, _DISTANCES = 32, 256


def _pairs(matrix: Any, bound: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """All pairs ``left < right`` of columns with a row in common, by how many entries lie between them."""
    index, row = matrix.indices, np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    pairs = []
    for k in range(1, bound):
        same = row[:-k] == row[k:]
        pairs.append((index[:-k][same], index[k:][same]))
    return pairs


def _gaps(pairs: list[tuple[np.ndarray, np.ndarray]], n: int) -> np.ndarray | None:
    found = np.zeros(n, bool)
    for left, right in pairs:
        found[right - left] = True
        if found.sum() > _DISTANCES:
            return None
    return np.flatnonzero(found)


def _strides(gaps: np.ndarray, n: int) -> list[tuple[int, int]]:
    """Pairs of strides to try; ``n`` stands for none."""
    known = set(gaps.tolist())
    single = [g for g in sorted(known) if g > 2 and (2 * g in known or {g - 1, g + 1} <= known)][:6]
    return [(s, n) for s in single] + [(s, t) for s in single for t in single if s < t]


def _steps(
    pairs: list[tuple[np.ndarray, np.ndarray]], gaps: np.ndarray, s: int, t: int, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (distance, steps in ``j // s``, steps in ``j // t``) of all pairs."""
    number = np.zeros(n, np.int64)
    number[gaps] = np.arange(len(gaps))
    found = np.zeros(4 * len(gaps), bool)
    for left, right in pairs:
        gap = right - left
        wrap_s = left % s + gap % s >= s
        wrap_t = left % t + gap % t >= t
        found[4 * number[gap] + 2 * wrap_s + wrap_t] = True
    key = np.flatnonzero(found)
    gap = gaps[key // 4]
    return gap, gap // s + key // 2 % 2, gap // t + key % 2
