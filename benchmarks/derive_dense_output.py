"""Derives the dense output of dopri8 of order 7: ``python benchmarks/derive_dense_output.py`` prints its extra stages and weights.

With the 13 stages and ``f(t + h, y1)`` weights of order 6 exist at two nodes only, ``(1 -+ 1/sqrt(7)) / 2``. Stages at these
nodes make order 6 possible everywhere, and with one more stage of order 6, at 0.55, so is order 7: the order conditions
are linear in the weights, and one family of weights is left free. It is fixed by C0 and C1 at the ends and by the least
mean error of order 8. Other second and third nodes give larger errors or larger coefficients.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from mpmath import mp, mpf
from numpy.typing import NDArray

root = Path(__file__).parents[1]
sys.path[:0] = [str(root), str(root / "tests")]

from rooted_trees import density, elementary_weights, symmetry, trees  # noqa: E402

from adjoint.methods.tableaux_high import DOPRI8_A, DOPRI8_B, fractions  # noqa: E402

Array = NDArray[Any]

ORDER = 7
#: stages without the third-order property ``sum_j a_ij c_j^3 = c_i^4 / 4``: the dense output leaves them out
UNUSED = (1, 2, 3, 4)
#: singular values below are zero: the published rationals hold the order conditions to 18 digits only
RANK = mpf("1e-12")


def solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """The least-squares solution of least norm, and a basis of the null space."""
    values, vectors = mp.eigsy(mp.matrix((matrix.T @ matrix).tolist()))
    basis = np.array(vectors.tolist(), dtype=object)
    live = np.array([value > RANK**2 for value in values])
    scaled = (basis.T @ (matrix.T @ right))[live] / np.array(list(values), dtype=object)[live]
    return basis[:, live] @ scaled, basis[:, ~live]


def conditions(a: Array, n: int) -> tuple[Array, Array, Array]:
    """Rows of the order conditions up to order ``n`` over the used stages, their right-hand sides at 1, their orders."""
    used = [i for i in range(len(a)) if i not in UNUSED]
    rows = np.vstack(elementary_weights(a, n))[:, used]
    right = np.array([mpf(1) / density(tree) for k in range(1, n + 1) for tree in trees(k)], dtype=object)
    return rows, right, np.array([k for k in range(1, n + 1) for _ in trees(k)])


def leading(a: Array, n: int) -> tuple[Array, Array]:
    """The conditions of order ``n`` alone, weighed as in the solution's series."""
    rows, right, orders = conditions(a, n)
    scale = np.array([mpf(1) / symmetry(tree) for tree in trees(n)], dtype=object)
    return scale[:, None] * rows[orders == n], scale * right[orders == n]


def stage(a: Array, node: mpf) -> Array:
    """A row of order 6 at this node whose error of order 7 and whose entries are small."""
    rows, right, orders = conditions(a, ORDER - 1)
    row, free = solve(rows, right * node**orders)
    assert max(abs(rows @ row - right * node**orders)) < mpf("1e-15")
    phi, want = leading(a, ORDER)
    small = mpf("1e-3")
    shift, _ = solve(np.vstack([phi @ free, small * free]), np.concatenate([want * node**ORDER - phi @ row, -small * row]))
    full = np.full(len(a) + 1, mpf(0), dtype=object)
    full[[i for i in range(len(a)) if i not in UNUSED]] = row + free @ shift
    return full


def extended(a: Array, row: Array) -> Array:
    """The matrix with one more row and column."""
    new = np.full((len(a) + 1, len(a) + 1), mpf(0), dtype=object)
    new[:-1, :-1], new[-1] = a, row
    return new


def weights(a: Array, b: Array, end: int) -> Array:
    """``dense[i][m]`` of the used stages; ``b`` and ``end``, the place of f(t + h, y1), are counted among these."""
    rows, right, orders = conditions(a, ORDER)
    powers = np.arange(1, ORDER + 1)
    dense = np.array([solve(rows, right * (orders == m))[0] for m in powers], dtype=object).T
    free = solve(rows, right)[1][:, 0]
    dense[:, 0] = mpf(0)
    dense[0, 0] = mpf(1)
    # what is added, free[i] * extra[m] for the powers from 2 on, must bring the end to b and the slope there to f(t + h, y1)
    slope = np.array([mpf(int(i == end)) for i in range(len(b))], dtype=object)
    ends = np.array([free @ (b - dense.sum(1)), free @ (slope - dense @ powers)], dtype=object)
    extra, kernel = solve(np.array([[mpf(1)] * (ORDER - 1), [mpf(int(m)) for m in powers[1:]]], dtype=object), ends)
    phi, want = leading(a, ORDER + 1)
    thetas = [mpf(i) / 40 for i in range(41)]
    high = np.array([[theta ** int(m) for m in powers] for theta in thetas], dtype=object)
    least = np.vstack([np.outer(phi @ free, line[1:] @ kernel) for line in high])
    start = [want * t ** (ORDER + 1) - phi @ (dense @ line + free * (line[1:] @ extra)) for t, line in zip(thetas, high, strict=True)]
    extra = extra + kernel @ solve(least, np.concatenate(start))[0]
    dense[:, 1:] += np.outer(free, extra)
    assert max(abs(rows @ dense - (orders[:, None] == powers) * right[:, None]).ravel()) < mpf("1e-14")
    assert max(abs(dense.sum(1) - b)) < mpf("1e-15") and max(abs(dense @ powers - slope)) < mpf("1e-14")
    return dense


def main() -> None:
    """Prints the extra rows, stage by stage, and the weights of all stages."""
    mp.dps = 50

    def exact(x: Fraction) -> mpf:
        return mpf(x.numerator) / x.denominator

    a = np.full((14, 14), mpf(0), dtype=object)
    b = [exact(x) for x in fractions(DOPRI8_B)[0]]
    for i, row in enumerate([*fractions(DOPRI8_A), fractions(DOPRI8_B)[0]]):
        a[i, : len(row)] = [exact(x) for x in row]
    for node in ((1 - 1 / mp.sqrt(7)) / 2, (1 + 1 / mp.sqrt(7)) / 2, mpf("0.55")):
        row = stage(a, node)
        a = extended(a, row)
        print("extra stage", mp.nstr(node, 20), "row", *(mp.nstr(x, 20) for x in row[:-1]), ";")
    used = [i for i in range(len(a)) if i not in UNUSED]
    dense = weights(a, np.array([*b, *[mpf(0)] * 4], dtype=object)[used], used.index(13))
    for i, line in zip(used, dense, strict=True):
        print("weights of stage", i, *(mp.nstr(x, 20) for x in line), ";")


if __name__ == "__main__":
    main()
