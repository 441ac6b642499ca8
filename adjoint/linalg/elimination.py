"""Elimination of many small matrices written out entry by entry, so that a compiler makes one loop over the matrices of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Elimination"]


class Elimination:
    """LU with partial pivoting of ``B`` matrices whose entries are ``(B,)`` tensors: ``entries[i][j]``.

    Rows change places by masks, so there is no branch on data, and no kernel of its own. Singular matrices give solutions of NaN.
    """

    def __init__(self, entries: Sequence[Sequence[Tensor]]) -> None:
        a = [list(row) for row in entries]
        self.n = n = len(a)
        #: for every column: whether the row below changes places with that of the pivot, one after the other; the factors
        self.swaps: list[list[Tensor]] = []
        self.lower: list[list[Tensor]] = []
        #: reciprocals of the pivots
        self.inverse: list[Tensor] = []
        for k in range(n):
            masks = []
            for i in range(k + 1, n):
                larger = a[i][k].abs() > a[k][k].abs()
                masks.append(larger)
                for j in range(k, n):
                    a[k][j], a[i][j] = torch.where(larger, a[i][j], a[k][j]), torch.where(larger, a[k][j], a[i][j])
            inverse = torch.where(a[k][k] == 0, float("nan"), 1 / a[k][k])
            factors = [a[i][k] * inverse for i in range(k + 1, n)]
            for i, factor in enumerate(factors, k + 1):
                for j in range(k + 1, n):
                    a[i][j] = a[i][j] - factor * a[k][j]
            self.swaps.append(masks)
            self.lower.append(factors)
            self.inverse.append(inverse)
        self.upper = a

    def solve(self, b: Sequence[Tensor]) -> list[Tensor]:
        """``A^-1 b``, component by component."""
        x, n = list(b), self.n
        for k in range(n):
            for i, larger in enumerate(self.swaps[k], k + 1):
                x[k], x[i] = torch.where(larger, x[i], x[k]), torch.where(larger, x[k], x[i])
            for i, factor in enumerate(self.lower[k], k + 1):
                x[i] = x[i] - factor * x[k]
        for k in reversed(range(n)):
            for j in range(k + 1, n):
                x[k] = x[k] - self.upper[k][j] * x[j]
            x[k] = x[k] * self.inverse[k]
        return x

    def solve_transposed(self, b: Sequence[Tensor]) -> list[Tensor]:
        """``A^-T b``."""
        x, n = list(b), self.n
        for k in range(n):
            for j in range(k):
                x[k] = x[k] - self.upper[j][k] * x[j]
            x[k] = x[k] * self.inverse[k]
        for k in reversed(range(n)):
            for i, factor in enumerate(self.lower[k], k + 1):
                x[k] = x[k] - factor * x[i]
            for i, larger in reversed(list(enumerate(self.swaps[k], k + 1))):
                x[k], x[i] = torch.where(larger, x[i], x[k]), torch.where(larger, x[k], x[i])
        return x
