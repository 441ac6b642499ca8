"""Butcher tableaux: the data of a Runge-Kutta method, checked when it is built."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Tableau"]

_TOLERANCE = 1e-12


@dataclass(frozen=True, eq=False)
class Tableau:
    """An explicit Runge-Kutta method with its error estimate and its dense output.

    With ``k_i = f(t + c_i h, y + h sum_j a_ij k_j)`` the step is ``y1 = y + h sum_i b_i k_i``, its error
    estimate is ``h sum_i error_i k_i`` and its dense output is
    ``y(t + theta h) = y + h sum_i b_i(theta) k_i`` with ``b_i(theta) = sum_m dense_im theta^(m+1)``.

    Parameters
    ----------
    name : str
        The name by which users choose the method.
    order : int
        Order of ``y1``.
    a : tuple of tuples
        Strictly lower triangular: row ``i`` has ``i`` entries (row 0 is empty). ``s`` rows.
    b, c : tuples of ``s`` floats
        Weights and nodes.
    error : tuple of floats or None
        ``b - b_hat`` over the ``s`` stages. It may have ``s + 1`` entries: the last then weighs ``f(t + h, y1)``, the
        first of the ``extra`` stages. None for methods without an embedded error estimate.
    error_order : int or None
        Order of the embedded solution ``y_hat``.
    extra_a, extra_c : tuples
        Rows and nodes of the stages that only the dense output needs (row ``j`` has ``s + j`` entries). A method that
        does not end with ``f(t + h, y1)`` by itself and whose dense output uses this value lists it as the first extra stage: its row is
        ``b``, its node is 1, and the loop hands it to the next step as its first stage.
    dense : tuple of tuples
        ``dense[i][m]``, one row for each stage (extra stages included); all rows equally long.
    dense_order : int
        The dense output has error ``O(h^(dense_order + 1))`` over one step, uniformly in theta.
    source : str
        Where the coefficients come from.
    n_stages, fsal, extra_is_next_first
        Derived: the stages of the step itself, whether the last one is ``f(t + h, y1)``, whether the first extra one is.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    dense: tuple[tuple[float, ...], ...]
    dense_order: int
    source: str
    error: tuple[float, ...] | None = None
    error_order: int | None = None
    extra_a: tuple[tuple[float, ...], ...] = ()
    extra_c: tuple[float, ...] = ()
    n_stages: int = field(init=False)
    fsal: bool = field(init=False)
    extra_is_next_first: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_stages", len(self.b))
        ends = len(self.b) > 1 and self.c[-1] == 1.0 and self.b[-1] == 0.0 and self.a[-1] == self.b[:-1]
        object.__setattr__(self, "fsal", ends)
        next_first = bool(self.extra_a) and self.extra_c[0] == 1.0 and self.extra_a[0] == self.b
        object.__setattr__(self, "extra_is_next_first", next_first)
        s, total = len(self.b), len(self.b) + len(self.extra_c)
        rows = (*self.a, *self.extra_a)
        nodes = (*self.c, *self.extra_c)
        if len(self.a) != s or len(self.c) != s or len(self.extra_a) != len(self.extra_c):
            raise ValueError(f"{self.name}: a, b, c (and extra_a, extra_c) must have one entry a stage")
        for i, (row, node) in enumerate(zip(rows, nodes, strict=True)):
            if len(row) != i:
                raise ValueError(f"{self.name}: row {i} of a has {len(row)} entries, an explicit method has {i}")
            if abs(sum(row) - node) > _TOLERANCE * max(1.0, sum(map(abs, row))):
                raise ValueError(f"{self.name}: row {i} of a sums to {sum(row)!r}, its node is {node!r}")
        if abs(sum(self.b) - 1) > _TOLERANCE * sum(map(abs, self.b)):
            raise ValueError(f"{self.name}: the weights sum to {sum(self.b)!r}, not to 1")
        if (self.error is None) != (self.error_order is None):
            raise ValueError(f"{self.name}: error and error_order come together")
        if self.error is not None and len(self.error) not in (s, s + 1):
            raise ValueError(f"{self.name}: error has {len(self.error)} entries for {s} stages")
        if self.error is not None and len(self.error) > s and not self.extra_is_next_first:
            raise ValueError(f"{self.name}: an error estimate with s + 1 entries needs f(t + h, y1) as first extra stage")
        if len(self.dense) != total or len({len(row) for row in self.dense}) != 1:
            raise ValueError(f"{self.name}: dense needs {total} rows of one length")
        ends = [sum(row) for row in self.dense]
        want = [*self.b, *([0.0] * (total - s))]
        if max(abs(x - y) for x, y in zip(ends, want, strict=True)) > 1e-10 * max(1.0, *(abs(x) for row in self.dense for x in row)):
            raise ValueError(f"{self.name}: the dense output does not end at y1")
