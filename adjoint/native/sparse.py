"""Factors of sparse matrices by a pattern that is found once: nothing is exchanged while numbers are computed.

Equations are paired with unknowns whose entries do not vanish (Duff & Koster 2001, by SciPy), unknowns ordered by minimum degree (that of
SuperLU), and the entries of the factors found row by row. Rows that have the same columns behind them form groups, whose products are
computed together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = ["Sparse", "sparse_of"]


@dataclass(frozen=True, eq=False)
class Sparse:
    """Row ``r`` of the factors is the equation ``equations[r]``, its column the unknown ``unknowns[r]``.

    ``entries``: row and column of each entry of the matrix, row by row, with its number. ``rows``: of each row of the factors its columns
    below the diagonal and above it. ``operations``: products that the factors take. ``factors``: how many numbers they are.
    """

    equations: list[int]
    unknowns: list[int]
    entries: dict[tuple[int, int], int]
    rows: list[Row]
    operations: int
    factors: int


class Row(NamedTuple):
    """Columns of a row of the factors below the diagonal and above it, in order."""

    below: list[int]
    above: list[int]


def sparse_of(width: int, nonzero: Collection[tuple[int, int]], costs: Mapping[tuple[int, int], float] | None = None) -> Sparse | None:
    """Of a matrix (width, width) with these entries. Without ``costs`` its diagonal is there and pairs equations with unknowns. Else the
    pairs with the least sum of these do, of entries that all have one; None where no pairing is complete."""
    entries = sorted({*nonzero, *(() if costs is not None else ((i, i) for i in range(width)))})
    partner = np.arange(width) if costs is None else _paired(width, entries, costs)
    if partner is None:
        return None
    # equation i is row partner[i] of a matrix with a full diagonal
    places = [(int(partner[i]), j) for i, j in entries]
    order = _ordered(width, places)
    place = np.empty(width, dtype=int)
    place[order] = np.arange(width)
    masks = [0] * width
    for i, j in places:
        masks[place[i]] |= 1 << int(place[j])
    rows = _filled(masks)
    count = np.zeros(width, dtype=int)
    for row in rows:
        count[row.below] += 1
    above = np.array([len(row.above) for row in rows])
    equations = np.empty(width, dtype=int)
    equations[partner] = np.arange(width)
    return Sparse(
        equations[order].tolist(),
        order.tolist(),
        {entry: k for k, entry in enumerate(entries)},
        rows,
        int((count * (1 + above)).sum()),
        int((1 + above).sum() + count.sum()),
    )


def _paired(width: int, entries: Sequence[tuple[int, int]], costs: Mapping[tuple[int, int], float]) -> np.ndarray | None:
    """The unknown of each equation."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import min_weight_full_bipartite_matching

    rows, columns = np.array(entries).T
    cost = np.array([costs[entry] for entry in entries])
    try:
        _, found = min_weight_full_bipartite_matching(coo_array((cost, (rows, columns)), shape=(width, width)).tocsr())
    except ValueError:
        return None
    return found


def _ordered(width: int, places: Sequence[tuple[int, int]]) -> np.ndarray:
    """Unknowns by minimum degree, of a pattern whose diagonal is full."""
    from scipy.sparse import coo_array, eye_array
    from scipy.sparse.linalg import splu

    rows, columns = np.array(places).T
    pattern = coo_array((np.full(len(rows), -1.0), (rows, columns)), shape=(width, width)).tocsr()
    pattern = pattern + pattern.T
    matrix = (pattern + (1.0 + 2.0 * float(abs(pattern).sum(axis=1).max())) * eye_array(width)).tocsc()
    options = {"SymmetricMode": True, "Equil": False}
    found = splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options)
    return np.argsort(found.perm_c)


def _filled(masks: list[int]) -> list[Row]:
    """Rows of the factors of a matrix whose rows have these columns (bits)."""
    above: list[int] = []
    rows = []
    for r, mask in enumerate(masks):
        row, below = mask | 1 << r, []
        left = row & ((1 << r) - 1)
        while left:
            k = (left & -left).bit_length() - 1
            below.append(k)
            row |= above[k]
            left = (row & ((1 << r) - 1)) >> (k + 1) << (k + 1)
        above.append(row >> (r + 1) << (r + 1))
        rows.append(Row(below, _bits(above[-1])))
    return rows


def _bits(mask: int) -> list[int]:
    digits = np.frombuffer(mask.to_bytes((mask.bit_length() + 7) // 8 or 1, "little"), dtype=np.uint8)
    return np.flatnonzero(np.unpackbits(digits, bitorder="little")).tolist()


def _runs(columns: Sequence[int]) -> list[tuple[int, int]]:
    """Whole numbers in order as first ones and lengths of runs."""
    runs: list[tuple[int, int]] = []
    for c in columns:
        if runs and c == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((c, 1))
    return runs


def tables(found: Sparse) -> dict[str, list[int]]:
    """What engine/sparse.hpp goes by, by name."""
    rows, width = found.rows, len(found.rows)
    group, last = [0] * width, [0]
    for r in range(1, width):
        same = rows[r - 1].above[:1] == [r] and rows[r - 1].above[1:] == rows[r].above
        if not same:
            last.append(r)
        group[r] = len(last) - 1
        last[-1] = r
    run, runs = [0], []
    for end in last:
        runs += _runs(rows[end].above)
        run.append(len(runs))
    start, middle, piece, pieces = [], [], [0], []
    at = 0
    for row in rows:
        start.append(at)
        middle.append(at + len(row.below))
        at += len(row.below) + 1 + len(row.above)
        cut: list[list[int]] = []
        for k in row.below:
            if cut and group[cut[-1][1]] == group[k]:
                assert k == cut[-1][1] + 1
                cut[-1][1] = k
            else:
                cut.append([k, k])
        pieces += cut
        piece.append(len(pieces))
    row_of = {equation: r for r, equation in enumerate(found.equations)}
    place_of = {unknown: c for c, unknown in enumerate(found.unknowns)}
    within = [{c: start[r] + k for k, c in enumerate([*row.below, r, *row.above])} for r, row in enumerate(rows)]
    counts = np.bincount([i for i, _ in found.entries], minlength=width)
    return {
        "EQUATION": found.equations,
        "UNKNOWN": found.unknowns,
        "ROWS": [0, *np.cumsum(counts).tolist()],
        "COLUMNS": [j for _, j in found.entries],
        "COLUMN": [place_of[j] for _, j in found.entries],
        "PLACE": [within[row_of[i]][place_of[j]] for i, j in found.entries],
        "START": start,
        "MIDDLE": middle,
        "PIECE": piece,
        "PIECES": [x for pair in pieces for x in pair],
        "GROUP": group,
        "LAST": last,
        "RUN": run,
        "RUNS": [x for pair in runs for x in pair],
    }
