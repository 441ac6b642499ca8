"""Readers of operators that pick and place elements by index."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch

from .elements import Call, Computed, Constant, Elements, Place, Reader, Refused, numbered, registering
from .rows import Index, strides, unflat

__all__ = ["READERS", "without_masks"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
#: computed values picked by a computed index are chosen from one after the other
_MOST_CHOICES = 64
_MOST_LOOKED_AT = 65536


def _picked(call: Call, x: Elements, place: Sequence[Index | Computed]) -> int:
    """The element of ``x`` at a place, of which components may be computed."""
    g = call.graph
    computed = [d for d, i in enumerate(place) if isinstance(i, Computed)]
    if not computed:
        return x.at(tuple([_wrapped(i, size) for i, size in zip(place, x.shape, strict=True)]))  # type: ignore[arg-type]
    if len(computed) > 1:
        raise Refused("two components of an index are computed")
    (d,) = computed
    size, at = x.shape[d], place[d].node  # type: ignore[union-attr]
    at = g.op("sel", g.op("lt", at, g.constant(0)), g.op("add", at, g.constant(size)), at)
    before = tuple([i if isinstance(i, Computed) else _wrapped(i, n) for i, n in zip(place, x.shape, strict=True)])
    if isinstance(x, Constant) and x.dtype.is_floating_point and size > 2:
        start = (*before[:d], 0, *before[d + 1 :])
        step = 1
        for n in x.shape[d + 1 :]:
            step *= n
        return x.look(start, step, size, at)  # type: ignore[arg-type]
    if size > _MOST_LOOKED_AT:
        raise Refused(f"an element is picked from {size} by a computed index")
    nodes = [x.at((*before[:d], q, *before[d + 1 :])) for q in range(size)]  # type: ignore[arg-type]
    table = _look(call, nodes, at)
    if table is not None:
        return table
    if size > _MOST_CHOICES:
        raise Refused(f"one of {size} computed values is picked by a computed index")
    chosen = g.constant(float("nan")) if call.dtype.is_floating_point else nodes[-1]
    for q in reversed(range(size)):
        chosen = g.op("sel", g.op("eq", at, g.constant(q)), nodes[q], chosen)
    return chosen


def _look(call: Call, nodes: list[int], at: int) -> int | None:
    """A look-up in memory, where elements are leaves of one array at an even distance."""
    g = call.graph
    if len(nodes) <= 2 or any(g.names[n] != "leaf" or g.data[n][0] not in ("a", "k") for n in nodes):
        return None
    kind, k, base = g.data[nodes[0]]
    step = g.data[nodes[1]][2] - base
    if any(g.data[n] != (kind, k, base + step * i) for i, n in enumerate(nodes)):
        return None
    return g.look(kind, k, base, step, len(nodes), at)


def _wrapped(i: Index, size: int) -> Index:
    """Indices count from the end where they are negative."""
    return i + size if i < 0 else i


@_reads("index", "_unsafe_index")
def _index(call: Call, x: Elements, indices: Sequence[Elements | None]) -> Elements:
    indices = without_masks(call, indices)
    where = [d for d, i in enumerate(indices) if i is not None]
    tensors = {d: i for d, i in enumerate(indices) if i is not None}
    if any(i.dtype == torch.bool for i in tensors.values()):
        raise Refused("how many elements it gives depends on values: use torch.where")
    rank = max(len(i.shape) for i in tensors.values())
    together = where == list(range(where[0], where[-1] + 1))
    front = where[0] if together else 0

    def get(place: Place) -> int:
        inner = place[front : front + rank]
        left = iter(place[:front] + place[front + rank :])
        return _picked(call, x, [_position(call, tensors[d], inner) if d in tensors else next(left) for d in range(len(x.shape))])

    return call.made(get)


def without_masks(call: Call, indices: Sequence[Elements | None]) -> list[Elements | None]:
    """Constant masks as the indices of what they let through."""
    found: list[Elements | None] = []
    for i in indices:
        if isinstance(i, Constant) and i.dtype == torch.bool:
            found += [Constant(call.graph, call.tables, q) for q in i.tensor.nonzero(as_tuple=True)]
        else:
            found.append(i)
    return found


def _position(call: Call, x: Elements, place: Place) -> Index | Computed:
    """A component of an index, broadcast."""
    shape = x.shape
    tail = place[len(place) - len(shape) :]
    return x.position(call.graph, tuple([0 if size == 1 else i for i, size in zip(tail, shape, strict=True)]))


@_reads("gather")
def _gather(call: Call, x: Elements, dim: int, index: Elements, **_: Any) -> Elements:
    if not x.shape:
        return call.made(lambda place: x.at(()))
    dim = numbered(dim, len(x.shape))
    return call.made(lambda place: _picked(call, x, [*place[:dim], index.position(call.graph, place), *place[dim + 1 :]]))


@_reads("index_select")
def _index_select(call: Call, x: Elements, dim: int, index: Elements) -> Elements:
    dim = numbered(dim, len(x.shape))
    return call.made(lambda place: _picked(call, x, [*place[:dim], index.position(call.graph, (place[dim],)), *place[dim + 1 :]]))


@_reads("embedding")
def _embedding(call: Call, weight: Elements, index: Elements, *_: Any, **__: Any) -> Elements:
    return call.made(lambda place: _picked(call, weight, [index.position(call.graph, place[:-1]), place[-1]]))


def _sought(call: Call, table: Elements, value: int, right: bool) -> int:
    """Where a value belongs in a sorted table of one dimension."""
    g, size = call.graph, table.shape[-1]
    nodes = [table.at((q,)) for q in range(size)]
    first = nodes[0] if nodes else -1
    if nodes and g.names[first] == "leaf" and g.data[first][0] in ("a", "k"):
        kind, k, base = g.data[first]
        if all(g.names[n] == "leaf" and g.data[n] == (kind, k, base + i) for i, n in enumerate(nodes)):
            return g.search(kind, k, base, size, right, value)
    if isinstance(table, Constant) and size > 8:
        return g.search("k", call.tables.number(table.tensor), 0, size, right, value)
    if size > _MOST_CHOICES:
        raise Refused(f"a search among {size} computed values")
    place = g.constant(0)
    for q, node in enumerate(nodes):
        # not (node >= value), as NaN belongs at the end
        below = g.op("not", g.op("gt" if right else "ge", node, value))
        place = g.op("sel", below, g.constant(q + 1), place)
    return place


@_reads("searchsorted")
def _searchsorted(
    call: Call, table: Elements, values: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None, sorter: Any = None
) -> Elements:
    if sorter is not None:
        raise Refused("a search in a table which is not sorted")
    right = right or side == "right"
    if len(table.shape) == 1:
        return call.elementwise(lambda value: _sought(call, table, value, right), values)
    getter = call.operand(values)

    def get(place: Place) -> int:
        row = Elements((table.shape[-1],), table.dtype, lambda last: table.at((*place[:-1], *last)))
        return _sought(call, row, getter(place), right)

    return call.made(get)


@_reads("bucketize")
def _bucketize(call: Call, values: Any, table: Elements, *, out_int32: bool = False, right: bool = False) -> Elements:
    return call.elementwise(lambda value: _sought(call, table, value, right), values)


@_reads("take")
def _take(call: Call, x: Elements, index: Elements) -> Elements:
    steps = strides(x.shape)
    whole = Elements((prod(x.shape),), x.dtype, lambda place: x.at(unflat(place[0], steps)))
    return call.made(lambda place: _picked(call, whole, [index.position(call.graph, place)]))
