"""Rooted trees and elementary weights: the order conditions of Runge-Kutta methods.

A tree is the sorted tuple of its subtrees, so ``()`` is the single vertex and ``((), ())`` a root with two leaves. A method
``(A, b)`` has order ``p`` if ``sum_i b_i Phi_i(tree) = 1 / density(tree)`` for all trees of at most ``p`` vertices, and weights
``b(theta)`` give a solution of order ``p`` at ``t + theta h`` if the sum is ``theta**order(tree) / density(tree)``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import factorial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Tree", "density", "elementary_weights", "inverse_densities", "order", "symmetry", "trees"]

Tree: TypeAlias = "tuple[Tree, ...]"


@cache
def trees(n: int) -> tuple[Tree, ...]:
    """All rooted trees of exactly ``n`` vertices."""
    return tuple(_forests(n - 1, n - 1, 0))


def _forests(vertices: int, largest: int, first: int) -> Iterator[Tree]:
    """Forests of so many vertices whose trees come, in order, from ``trees(largest)[first:]`` or are smaller."""
    if vertices == 0:
        yield ()
    for size in range(min(vertices, largest), 0, -1):
        start = first if size == largest else 0
        for index, tree in enumerate(trees(size)[start:], start):
            for rest in _forests(vertices - size, size, index):
                yield (tree, *rest)


@cache
def order(tree: Tree) -> int:
    """Number of vertices."""
    return 1 + sum(map(order, tree))


@cache
def density(tree: Tree) -> int:
    """Product, over all vertices, of the number of vertices that hang from it (itself included)."""
    product = order(tree)
    for child in tree:
        product *= density(child)
    return product


@cache
def symmetry(tree: Tree) -> int:
    """Number of automorphisms: an error of the solution's series is weighed by its inverse."""
    product = 1
    for child, times in Counter(tree).items():
        product *= symmetry(child) ** times * factorial(times)
    return product


def inverse_densities(n: int) -> NDArray[np.float64]:
    """``1 / density`` of ``trees(n)``."""
    return np.array([1 / density(tree) for tree in trees(n)])


def elementary_weights(a: NDArray[Any], n: int) -> list[NDArray[Any]]:
    """``[Phi(trees(1)), ..., Phi(trees(n))]``, each of shape (trees, stages), for the square matrix ``a`` of any dtype."""
    known: dict[Tree, NDArray[Any]] = {}
    levels = []
    for size in range(1, n + 1):
        level = np.ones((len(trees(size)), len(a)), dtype=a.dtype)
        for phi, tree in zip(level, trees(size), strict=True):
            for child in tree:
                phi *= known[child]
        for tree, inner in zip(trees(size), level @ a.T, strict=True):
            known[tree] = inner
        levels.append(level)
    return levels
