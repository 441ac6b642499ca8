"""Equations with those of something small beside them, ``y' = f(t, y, p)``, ``d' = f_y d + f_p s``.

A displacement starts anywhere, and ``s`` displaces what ``fun`` depends on, as `integrate.companion.displaced` does. Steps that are small
enough for both are so for derivatives too, where the state alone asks for none: see `Companion`, whose displaced solution this is in the
limit. A tangent starts where it is told to, ``s`` is given, and derivatives of it are second ones: see `second.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace

import torch

from .expressions import Graph
from .reading import Reading
from .reverse import cotangents, seeded, times

__all__ = ["with_displacement", "with_tangents"]

#: displacement of what is zero
_OF_ZERO = 1e-3


def with_displacement(reading: Reading, whole: Collection[int], real: torch.dtype) -> Reading:
    """The same of states of twice as many numbers, the second half of which is the displacement.

    ``whole``: inputs of whole numbers, which are not displaced. Raises `NotImplementedError` where a derivative is not known.
    """
    shift = torch.finfo(real).eps ** 0.4
    return _beside(reading, whole, lambda graph, leaf: _displaced(graph, leaf, shift))


def with_tangents(reading: Reading, whole: Collection[int]) -> Reading:
    """The same of states of twice as many numbers, the second half of which is a tangent, and of twice as many inputs: behind all of them
    stand their tangents.

    ``whole``: inputs of whole numbers, which have none. Raises `NotImplementedError` where a derivative is not known.
    """
    count = len(reading.strides)

    def tangent(graph: Graph, leaf: int) -> int:
        kind, k, *rest = graph.data[leaf]
        if graph.names[leaf] == "leaf":
            return graph.leaf(kind, k + count, *rest)
        found: int = graph.look(kind, k + count, *rest, *graph.arguments[leaf])
        return found

    return replace(_beside(reading, whole, tangent), strides=reading.strides * 2)


def _beside(reading: Reading, whole: Collection[int], of_input: Callable[[Graph, int], int]) -> Reading:
    graph, width = reading.graph, len(reading.outputs)
    # sum_i v_i (f_y d + f_p s)_i, whose derivatives in v are wanted
    product = graph.constant(0.0)
    for leaf, bar in cotangents(graph, seeded(graph, reading.outputs), ("y", "a")).items():
        kind, *place = graph.data[leaf]
        if kind == "a" and place[0] in whole:
            continue
        d = graph.leaf("y", width + place[0]) if kind == "y" else of_input(graph, leaf)
        product = graph.op("add", product, times(graph, bar, d))
    found, zero = cotangents(graph, {product: graph.constant(1.0)}, ("v",)), graph.constant(0.0)
    tangents = (found.get(graph.leaf("v", i), zero) for i in range(width))
    return replace(reading, outputs=(*reading.outputs, *tangents))


def _displaced(graph: Graph, x: int, shift: float) -> int:
    size = graph.op("mul", graph.op("abs", x), graph.constant(shift))
    return graph.op("sel", graph.op("eq", x, graph.constant(0.0)), graph.constant(shift * _OF_ZERO), size)
