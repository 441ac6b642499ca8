"""Equations with those of something small beside them, ``y' = f(t, y, p)``, ``d' = f_y d + f_p s``.

A displacement starts anywhere, and ``s`` displaces what ``fun`` depends on, as `integrate.companion.displaced` does. Steps that are small
enough for both are so for derivatives too, where the state alone asks for none: see `Companion`, whose displaced solution this is in the
limit. A tangent starts where it is told to, ``s`` is given, and derivatives of it are second ones: see `second.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace

import torch
from torch import Tensor

from .alike import copied
from .expressions import Graph
from .reading import Reading
from .reverse import cotangents, seeded, times

__all__ = ["apart", "matrix_with_tangents", "together", "with_displacement", "with_slopes_apart", "with_tangents"]

#: displacement of what is zero
_OF_ZERO = 1e-3


def with_displacement(reading: Reading, whole: Collection[int], real: torch.dtype) -> Reading:
    """The same of states of twice as many numbers, the second half of which is the displacement.

    ``whole``: inputs of whole numbers, which are not displaced. Raises `NotImplementedError` where a derivative is not known.
    """
    shift = torch.finfo(real).eps ** 0.4
    return _beside(reading, whole, lambda graph, leaf: _displaced(graph, leaf, shift))


def together(y: Tensor, dot: Tensor, blocks: int) -> Tensor:
    """States (..., n) with their tangents, (..., 2 n), those of each of so many ``blocks`` behind it."""
    return torch.cat([x.unflatten(-1, (blocks, -1)) for x in (y, dot)], -1).flatten(-2)


def apart(both: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The reverse of `together`."""
    y, dot = both.unflatten(-1, (blocks, -1)).chunk(2, -1)
    return y.flatten(-2), dot.flatten(-2)


def matrix_with_tangents(mass: Reading, whole: Collection[int]) -> Reading:
    """A matrix ``M`` in front of slopes, row by row, as that in front of slopes with their tangents: ``[[M, 0], [M', M]]``."""
    both = with_tangents(mass, whole)
    width, zero = math.isqrt(len(mass.outputs)), both.graph.constant(0.0)
    matrix, moved = both.outputs[: len(mass.outputs)], both.outputs[len(mass.outputs) :]
    outputs: list[int] = []
    for below in (False, True):
        for i in range(width):
            row = matrix[i * width : (i + 1) * width]
            outputs += [*moved[i * width : (i + 1) * width], *row] if below else [*row, *[zero] * width]
    return replace(both, outputs=tuple(outputs))


def with_slopes_apart(reading: Reading) -> Reading:
    """Implicit equations of values and slopes side by side, with room for tangents behind the values: then slopes stand behind both."""
    old, graph, width = reading.graph, Graph(), len(reading.outputs)
    nodes: list[int] = []
    for name, arguments, data in zip(old.names, old.arguments, old.data, strict=True):
        if name == "leaf" and data[0] == "y" and data[1] >= width:
            data = ("y", data[1] + width)
        nodes.append(copied(graph, name, [nodes[i] for i in arguments], data))
    return replace(reading, graph=graph, outputs=tuple(nodes[i] for i in reading.outputs))


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
