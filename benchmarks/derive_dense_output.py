"""Derives the dense outputs of order 7 of dopri8 and verner7: ``python benchmarks/derive_dense_output.py`` prints them.

The order conditions are linear in the weights. With the stages of the step and ``f(t + h, y1)`` they can be solved up to
order 5 only, so further stages are evaluated at points of the dense output found so far, which then reaches a higher order.
When only one stage is missing for order 6, this order is reached without it at the two nodes ``(1 -+ 1/sqrt(7)) / 2``. So
dopri8 needs three stages, all of order 6, and verner7 five: one of order 5 at 1/2, and four of order 6. (The five stages and
the weights published for Verner's pair, in the numbers that OrdinaryDiffEq.jl keeps, miss 12 of the 48 conditions of order 7,
by up to 1e-4 in single powers.) What the conditions leave free is fixed by continuity, also of the slope, and by the least mean
error of order 8. The other nodes were chosen among multiples of 0.05 for a small error of order 8 and small coefficients.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from mpmath import mp, mpf
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from adjoint.methods.tableaux_high import DOPRI8_A, DOPRI8_B, VERNER7_A, VERNER7_B, fractions
from tests.helpers.rooted_trees import density, elementary_weights, symmetry, trees

Array = NDArray[Any]

mp.dps = 50
ORDER = 7
#: singular values below are zero: dopri8's published rationals hold the order conditions to 18 digits only
RANK = mpf("1e-12")
LOW, HIGH = (1 - 1 / mp.sqrt(7)) / 2, (1 + 1 / mp.sqrt(7)) / 2


@dataclass(frozen=True)
class Pair:
    """A method, the stages that its dense output leaves out (of too low an order), and order and node of each extra stage."""

    name: str
    a: str
    b: str
    unused: tuple[int, ...]
    extra: tuple[tuple[int, mpf], ...]


PAIRS = (
    Pair("dopri8", DOPRI8_A, DOPRI8_B, (1, 2, 3, 4), ((6, LOW), (6, HIGH), (6, mpf("0.55")))),
    Pair("verner7", VERNER7_A, VERNER7_B, (1, 2, 9), ((5, mpf("0.5")), (6, HIGH), (6, mpf("0.05")), (6, mpf("0.2")), (6, mpf("0.45")))),
)


def solve(matrix: Array, right: Array) -> tuple[Array, Array]:
    """The least-squares solution of least norm, and a basis of the null space."""
    values, vectors = mp.eigsy(mp.matrix((matrix.T @ matrix).tolist()))
    basis = np.array(vectors.tolist(), dtype=object)
    live = np.array([value > RANK**2 for value in values])
    scaled = (basis.T @ (matrix.T @ right))[live] / np.array(list(values), dtype=object)[live]
    return basis[:, live] @ scaled, basis[:, ~live]


def conditions(a: Array, used: list[int], n: int) -> tuple[Array, Array, Array]:
    """Rows of the order conditions up to order ``n`` over the used stages, their right-hand sides at 1, their orders."""
    rows = np.vstack(elementary_weights(a, n))[:, used]
    right = np.array([mpf(1) / density(tree) for k in range(1, n + 1) for tree in trees(k)], dtype=object)
    return rows, right, np.array([k for k in range(1, n + 1) for _ in trees(k)])


def leading(a: Array, used: list[int], n: int) -> tuple[Array, Array]:
    """The conditions of order ``n`` alone, weighed as in the solution's series."""
    rows, right, orders = conditions(a, used, n)
    scale = np.array([mpf(1) / symmetry(tree) for tree in trees(n)], dtype=object)
    return scale[:, None] * rows[orders == n], scale * right[orders == n]


def stage(a: Array, used: list[int], order: int, node: mpf) -> Array:
    """A row of this order at this node whose next error and whose entries are small."""
    rows, right, orders = conditions(a, used, order)
    row, free = solve(rows, right * node**orders)
    assert max(abs(rows @ row - right * node**orders)) < mpf("1e-15")
    if free.size:
        phi, want = leading(a, used, order + 1)
        small = mpf("1e-3")
        target = np.concatenate([want * node ** (order + 1) - phi @ row, -small * row])
        row = row + free @ solve(np.vstack([phi @ free, small * free]), target)[0]
    full = np.full(len(a) + 1, mpf(0), dtype=object)
    full[used] = row
    return full


def extended(a: Array, row: Array) -> Array:
    """The matrix with one more row and column."""
    new = np.full((len(a) + 1, len(a) + 1), mpf(0), dtype=object)
    new[:-1, :-1], new[-1] = a, row
    return new


def weights(a: Array, used: list[int], b: Array, end: int) -> Array:
    """``dense[i][m]`` of the used stages; ``b`` and ``end``, the place of f(t + h, y1), are counted among these."""
    rows, right, orders = conditions(a, used, ORDER)
    powers = np.arange(1, ORDER + 1)
    dense = np.array([solve(rows, right * (orders == m))[0] for m in powers], dtype=object).T
    dense[:, 0] = [mpf(int(i == 0)) for i in range(len(b))]
    slope = np.array([mpf(int(i == end)) for i in range(len(b))], dtype=object)
    free = solve(rows, right)[1]
    for null in free.T:
        # null[i] * extra[m] is added, for the powers from 2 on; it must bring the end to b and the slope there to f(t + h, y1)
        ends = np.array([null @ (b - dense.sum(1)), null @ (slope - dense @ powers)], dtype=object)
        extra, kernel = solve(np.array([[mpf(1)] * (ORDER - 1), [mpf(int(m)) for m in powers[1:]]], dtype=object), ends)
        phi, want = leading(a, used, ORDER + 1)
        thetas = [mpf(i) / 40 for i in range(41)]
        high = np.array([[theta ** int(m) for m in powers] for theta in thetas], dtype=object)
        least = np.vstack([np.outer(phi @ null, line[1:] @ kernel) for line in high])
        start = [want * t ** (ORDER + 1) - phi @ (dense @ line + null * (line[1:] @ extra)) for t, line in zip(thetas, high, strict=True)]
        dense[:, 1:] += np.outer(null, extra + kernel @ solve(least, np.concatenate(start))[0])
    assert max(abs(rows @ dense - (orders[:, None] == powers) * right[:, None]).ravel()) < mpf("1e-14")
    assert max(*abs(dense.sum(1) - b), *abs(dense @ powers - slope)) < mpf("1e-13")
    return dense


def digits(x: mpf) -> str:
    """Twenty digits; what is below the accuracy of dopri8's rationals is zero."""
    return mp.nstr(x, 20) if abs(x) > mpf("1e-12") else "0"


def main() -> None:
    """Prints the extra rows, stage by stage, and the weights of all stages."""

    def exact(x: Fraction) -> mpf:
        return mpf(x.numerator) / x.denominator

    for pair in PAIRS:
        b = [exact(x) for x in fractions(pair.b)[0]]
        a = np.full((len(b) + 1, len(b) + 1), mpf(0), dtype=object)
        for i, line in enumerate(fractions(f"{pair.a};{pair.b}")):
            a[i, : len(line)] = [exact(x) for x in line]
        for order, node in pair.extra:
            row = stage(a, [i for i in range(len(a)) if i not in pair.unused], order, node)
            a = extended(a, row)
            print(pair.name, "extra stage at", mp.nstr(node, 20), *map(digits, row[:-1]), ";")
        used = [i for i in range(len(a)) if i not in pair.unused]
        ends = np.array([*b, *[mpf(0)] * (len(a) - len(b))], dtype=object)[used]
        for i, line in zip(used, weights(a, used, ends, used.index(len(b))), strict=True):
            print(pair.name, "weights of stage", i, *map(digits, line), ";")


if __name__ == "__main__":
    main()
