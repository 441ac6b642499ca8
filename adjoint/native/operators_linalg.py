"""Readers of linear algebra with small matrices, by elimination written out."""

from __future__ import annotations

from collections.abc import Sequence

from .elements import Call, Elements, Place, Reader, Refused, registering
from .expressions import Graph

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
#: larger matrices are better left to libraries, and so are solutions that need more operations
_LARGEST = 8
_LARGEST_SOLVED = 64
_MOST_WORK = 6000
Matrix = list[list[int]]


def _matrix(x: Elements, batch: Place) -> Matrix:
    rows, columns = x.shape[-2:]
    return [[x.at((*batch, i, j)) for j in range(columns)] for i in range(rows)]


def _check_size(n: int, most: int = _LARGEST) -> None:
    if n > most:
        raise Refused(f"linear algebra with a matrix of size {n} (at most {most})")


def _swap(g: Graph, first: Sequence[int], second: Sequence[int], swaps: int) -> tuple[list[int], list[int]]:
    pairs = list(zip(first, second, strict=True))
    return [g.op("sel", swaps, b, a) for a, b in pairs], [g.op("sel", swaps, a, b) for a, b in pairs]


def _eliminated(g: Graph, a: Matrix, b: Matrix) -> tuple[Matrix, Matrix, int]:
    """Upper triangle, right-hand sides and sign of the permutation after elimination with pivots, which are chosen as numbers come.

    Zeros that are constants cost nothing: matrices of narrow bands may be larger than others.
    """
    n, before = len(a), len(g)
    rows = [[*x, *y] for x, y in zip(a, b, strict=True)]
    sign, minus = g.constant(1.0), g.constant(-1.0)
    for k in range(n):
        below = [i for i in range(k + 1, n) if not g.is_zero(rows[i][k])]
        for i in below:
            swaps = g.op("gt", g.op("abs", rows[i][k]), g.op("abs", rows[k][k]))
            rows[k][k:], rows[i][k:] = _swap(g, rows[k][k:], rows[i][k:], swaps)
            sign = g.op("sel", swaps, g.op("mul", sign, minus), sign)
        right = [j for j in range(k + 1, len(rows[k])) if not g.is_zero(rows[k][j])]
        for i in below:
            factor = g.op("div", rows[i][k], rows[k][k])
            for j in right:
                rows[i][j] = g.op("sub", rows[i][j], g.op("mul", factor, rows[k][j]))
        if len(g) - before > _MOST_WORK:
            raise Refused(f"linear algebra with a matrix of size {n}")
    return [row[:n] for row in rows], [row[n:] for row in rows], sign


def _substituted(g: Graph, u: Matrix, b: Matrix, upper: bool = True, unit: bool = False) -> Matrix:
    """Solution of a triangular system."""
    n = len(u)
    x: Matrix = [[] for _ in range(n)]
    for i in reversed(range(n)) if upper else range(n):
        known = [j for j in (range(i + 1, n) if upper else range(i)) if not g.is_zero(u[i][j])]
        for c, right in enumerate(b[i]):
            for j in known:
                right = g.op("sub", right, g.op("mul", u[i][j], x[j][c]))
            x[i].append(right if unit else g.op("div", right, u[i][i]))
    return x


def _solved(g: Graph, a: Matrix, b: Matrix) -> Matrix:
    """Solution of ``a x = b``."""
    upper, right, _ = _eliminated(g, a, b)
    return _substituted(g, upper, right)


def _expanded(g: Graph, a: Matrix) -> int | None:
    """A determinant by its rows, each minor computed once; None where that takes long: of more than four rows, but for bands."""
    n, products = len(a), 0
    most = n**3 // 2 + 1
    known: dict[tuple[int, ...], int] = {(): g.constant(1.0)}
    #: behind the last row in which a column is not zero
    ends = [max((i + 1 for i in range(n) if not g.is_zero(a[i][j])), default=0) for j in range(n)]

    def minor(columns: tuple[int, ...]) -> int:
        nonlocal products
        row = n - len(columns)
        if products > most or columns in known:
            return known.get(columns, known[()])
        total = zero = g.constant(0.0)
        for k, j in enumerate(columns) if min(ends[j] for j in columns) > row else ():
            if g.is_zero(a[row][j]) or g.is_zero(rest := minor(columns[:k] + columns[k + 1 :])):
                continue
            products += 1
            part = g.op("mul", a[row][j], rest) if len(columns) > 1 else a[row][j]
            total = (g.op("neg", part) if k % 2 else part) if total == zero else g.op("sub" if k % 2 else "add", total, part)
        known[columns] = total
        return total

    found = minor(tuple(range(n)))
    return found if products <= most else None


def _determinant(g: Graph, a: Matrix) -> int:
    """As in `adjoint.system.normalizing`: nothing is divided by what shows that a matrix is singular."""
    n, before, factors = len(a), len(g), []
    while not _short(a, g):
        pivot, a = _largest_eliminated(g, a)
        factors.append(pivot)
        if len(g) - before > 2 * _MOST_WORK:
            raise Refused(f"a determinant of a matrix of size {n}")
    rest = _expanded(g, a)
    assert rest is not None
    return g.total("mul", [*factors, rest])


def _short(a: Matrix, g: Graph) -> bool:
    """Whether a determinant is expanded; tried elsewhere, so that nothing is left in the graph."""
    aside = Graph()
    entries = [[aside.constant(0.0) if g.is_zero(x) else aside.leaf("y", i, j) for j, x in enumerate(row)] for i, row in enumerate(a)]
    return _expanded(aside, entries) is not None


def _first(g: Graph, a: Matrix, place: int, sign: int) -> tuple[Matrix, int]:
    """A matrix whose first row has changed places with that at ``place``, and ``sign`` with that of the change."""
    rows = [list(row) for row in a]
    for i in range(1, len(a)):
        here = g.op("eq", place, g.constant(float(i)))
        rows[0] = [g.op("sel", here, x, y) for x, y in zip(a[i], rows[0], strict=True)]
        rows[i] = [g.op("sel", here, x, y) for x, y in zip(a[0], a[i], strict=True)]
        sign = g.op("sel", here, g.op("neg", sign), sign)
    return rows, sign


def _largest_eliminated(g: Graph, a: Matrix) -> tuple[int, Matrix]:
    """The largest entry of a matrix, with the sign of its place, and what is left without its row and column."""
    zero, one = g.constant(0.0), g.constant(1.0)
    largest, row_of, column_of = zero, zero, zero
    for i, row in enumerate(a):
        most, place = zero, zero
        for j, x in enumerate(row):
            if not g.is_zero(x):
                size = g.op("abs", x)
                larger = g.op("gt", size, most)
                most, place = g.op("sel", larger, size, most), g.op("sel", larger, g.constant(float(j)), place)
        larger = g.op("gt", most, largest)
        largest = g.op("sel", larger, most, largest)
        row_of, column_of = g.op("sel", larger, g.constant(float(i)), row_of), g.op("sel", larger, place, column_of)
    rows, sign = _first(g, a, row_of, one)
    columns, sign = _first(g, _turned(rows), column_of, sign)
    (pivot, *right), *below = _turned(columns)
    safe, left = g.op("sel", g.op("eq", pivot, zero), one, pivot), []
    for head, *rest in below:
        factor = g.op("div", head, safe)
        left.append([g.op("sub", x, g.op("mul", factor, y)) for x, y in zip(rest, right, strict=True)])
    return g.op("mul", sign, pivot), left


def _by_matrix(call: Call, x: Elements, function, rank: int = 2) -> Elements:
    """Elements of the last ``rank`` dimensions from a function of the matrix before them, which is computed once."""
    known: dict[Place, object] = {}

    def get(place: Place) -> int:
        batch = place[: len(place) - rank]
        if batch not in known:
            known[batch] = function(batch)
        found = known[batch]
        for i in place[len(place) - rank :]:
            found = found[i]  # type: ignore[index]
        return found  # type: ignore[return-value]

    return call.made(get)


def _identity(g: Graph, n: int) -> Matrix:
    return [[g.constant(float(i == j)) for j in range(n)] for i in range(n)]


def _with_info(call: Call, result: Elements, count: int) -> list[Elements]:
    """A result and others that are not read."""

    def refused(place: Place) -> int:
        raise Refused("this result of a factorisation")

    return [result, *(Elements(call.shapes[n], call.dtypes[n], refused) for n in range(1, count))]


@_reads("linalg_inv_ex")
def _inv(call: Call, x: Elements, *, check_errors: bool = False) -> list[Elements]:
    n = x.shape[-1]
    _check_size(n, _LARGEST_SOLVED)
    g = call.graph

    def info(place: Place) -> int:
        """The number of the first pivot that is zero."""
        upper, none = _eliminated(g, _matrix(x, place), [[] for _ in range(n)])[0], g.constant(0.0)
        found = none
        for i in reversed(range(n)):
            found = g.op("sel", g.op("eq", upper[i][i], none), g.constant(i + 1.0), found)
        return found

    return [_by_matrix(call, x, lambda batch: _solved(g, _matrix(x, batch), _identity(g, n))), call.made(info, 1)]


@_reads("_linalg_det")
def _det(call: Call, x: Elements) -> list[Elements]:
    _check_size(x.shape[-1], _LARGEST_SOLVED)
    return _with_info(call, call.made(lambda place: _determinant(call.graph, _matrix(x, place))), 3)


@_reads("_linalg_slogdet")
def _slogdet(call: Call, x: Elements) -> list[Elements]:
    g = call.graph
    _check_size(x.shape[-1], _LARGEST_SOLVED)

    def sign(place: Place) -> int:
        return g.op("sign", _determinant(g, _matrix(x, place)))

    def size(place: Place) -> int:
        return g.op("log", g.op("abs", _determinant(g, _matrix(x, place))))

    return [call.made(sign), call.made(size, 1), *_with_info(call, call.made(sign), 4)[2:]]


@_reads("_linalg_solve_ex")
def _solve(call: Call, a: Elements, b: Elements, *, left: bool = True, check_errors: bool = False) -> list[Elements]:
    g, n = call.graph, a.shape[-1]
    _check_size(n, _LARGEST_SOLVED)
    vector = len(b.shape) == 1 or (len(b.shape) == len(a.shape) - 1 and b.shape == call.shape and call.shape[-1] == n)
    vector = vector and len(call.shape) == len(a.shape) - 1

    def by_batch(batch: Place) -> list:
        matrix = [[a.spread((*batch, i, j)) for j in range(n)] for i in range(n)]
        if vector:
            return [row[0] for row in _solved(g, matrix, [[b.spread((*batch, i))] for i in range(n)])]
        rows, columns = b.shape[-2:]
        right = [[b.spread((*batch, i, j)) for j in range(columns)] for i in range(rows)]
        if left:
            return _solved(g, matrix, right)
        return _turned(_solved(g, _turned(matrix), _turned(right)))

    return _with_info(call, _by_matrix(call, a, by_batch, 1 if vector else 2), 4)


def _turned(a: Matrix) -> Matrix:
    return [list(column) for column in zip(*a, strict=True)]


@_reads("linalg_cholesky_ex")
def _cholesky(call: Call, x: Elements, *, upper: bool = False, check_errors: bool = False) -> list[Elements]:
    """The derivative is spread over both triangles, as ATen has it."""
    g, n = call.graph, x.shape[-1]
    _check_size(n)
    half, zero = g.constant(0.5), g.constant(0.0)

    def by_batch(batch: Place) -> Matrix:
        a = _matrix(x, batch)
        # values of the triangle that is asked for, derivatives of the symmetric part
        pairs = [[(a[j][i], a[i][j]) if upper else (a[i][j], a[j][i]) for j in range(n)] for i in range(n)]
        a = [[p if p == q else g.given(p, [(p, half), (q, half)]) for p, q in row] for row in pairs]
        low: Matrix = [[zero] * n for _ in range(n)]
        for j in range(n):
            rest = a[j][j]
            for k in range(j):
                rest = g.op("sub", rest, g.op("mul", low[j][k], low[j][k]))
            low[j][j] = g.op("sqrt", rest)
            for i in range(j + 1, n):
                rest = a[i][j]
                for k in range(j):
                    rest = g.op("sub", rest, g.op("mul", low[i][k], low[j][k]))
                low[i][j] = g.op("div", rest, low[j][j])
        return _turned(low) if upper else low

    return _with_info(call, _by_matrix(call, x, by_batch), 2)


@_reads("linalg_solve_triangular")
def _solve_triangular(call: Call, a: Elements, b: Elements, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Elements:
    g, n = call.graph, a.shape[-1]
    _check_size(n)

    def by_batch(batch: Place) -> Matrix:
        matrix = [[a.spread((*batch, i, j)) for j in range(n)] for i in range(n)]
        right = [[b.spread((*batch, i, j)) for j in range(b.shape[-1])] for i in range(b.shape[-2])]
        if left:
            return _substituted(g, matrix, right, upper, unitriangular)
        return _turned(_substituted(g, _turned(matrix), _turned(right), not upper, unitriangular))

    return _by_matrix(call, a, by_batch)


@_reads("cholesky_solve")
def _cholesky_solve(call: Call, b: Elements, factor: Elements, upper: bool = False) -> Elements:
    g, n = call.graph, factor.shape[-1]
    _check_size(n)

    def by_batch(batch: Place) -> Matrix:
        matrix = [[factor.spread((*batch, i, j)) for j in range(n)] for i in range(n)]
        low = _turned(matrix) if upper else matrix
        right = [[b.spread((*batch, i, j)) for j in range(b.shape[-1])] for i in range(n)]
        return _substituted(g, _turned(low), _substituted(g, low, right, upper=False), upper=True)

    return _by_matrix(call, b, by_batch)
