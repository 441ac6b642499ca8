"""Readers of operators that write by index: index_put, scatter and their like.

Where indices are constants, the elements that are written are known. Where they are computed, every element asks of every write whether
it is meant.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .elements import Call, Computed, Elements, Place, Reader, Refused, numbered, registering
from .operators_indexing import without_masks
from .rows import Along, Index

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
#: so many writes with a computed index are asked by every element
_MOST_WRITES = 64
Join = Callable[[int, int], int]


def _replaced(old: int, new: int) -> int:
    return new


def _written(call: Call, old: int, writes: Sequence[tuple[int | None, Callable[[], int]]], join: Join) -> int:
    """An element after writes of (condition, or None for none; value), the first one first."""
    g = call.graph
    for condition, value in writes:
        new = join(old, value())
        old = new if condition is None else g.op("sel", condition, new, old)
    return old


def _hits(call: Call, places: Sequence[Index], wanted: Sequence[Index | Computed]) -> int | bool | None:
    """Whether components of an index are those of a place: True, False, or the node that tells."""
    g, condition = call.graph, None
    for i, j in zip(places, wanted, strict=True):
        if isinstance(j, Computed):
            if isinstance(i, Along):
                raise Refused("an index along the rows of the batch is computed")
            same = g.op("eq", j.node, g.constant(i))
            condition = same if condition is None else g.op("and", condition, same)
        elif i != j:
            # two that go along the rows must be the same, or never meet
            if isinstance(i, Along) or isinstance(j, Along):
                raise Refused("rows of the batch are written by an index of other rows")
            return False
    return True if condition is None else condition


@_reads("index_put", "_unsafe_index_put")
def _index_put(call: Call, x: Elements, indices: Sequence[Elements | None], values: Elements, accumulate: bool = False) -> Elements:
    g = call.graph
    indices = without_masks(call, indices)
    where = [d for d, i in enumerate(indices) if i is not None]
    tensors = {d: i for d, i in enumerate(indices) if i is not None}
    if any(i.dtype == torch.bool for i in tensors.values()):
        return _put_by_mask(call, x, list(tensors.values()), values, accumulate)
    shape = torch.broadcast_shapes(*(i.shape for i in tensors.values()))
    together = where == list(range(where[0], where[-1] + 1))
    front = where[0] if together else 0
    join: Join = (lambda old, new: g.op("add", old, new)) if accumulate else _replaced

    def component(d: int, source: Place) -> Index | Computed:
        i = tensors[d]
        tail = source[len(source) - len(i.shape) :]
        found = i.position(g, tuple([0 if n == 1 else q for q, n in zip(tail, i.shape, strict=True)]))
        return found + x.shape[d] if not isinstance(found, Computed) and found < 0 else found

    def get(place: Place) -> int:
        rest = tuple([i for d, i in enumerate(place) if d not in tensors])
        along = next((place[d] for d in where if isinstance(place[d], Along)), None)
        writes = []
        for source in _sources(shape, along):
            wanted = [component(d, source) for d in where]
            hit = _hits(call, [place[d] for d in where], wanted)
            if hit is False:
                continue
            if hit is not True and len(writes) >= _MOST_WRITES:
                raise Refused("many elements are written by a computed index")
            full = (*rest[:front], *source, *rest[front:])
            writes.append((None if hit is True else hit, lambda full=full: _floated(call, values.spread(full))))
        return _written(call, x.at(place), writes, join)

    return call.made(get)


def _floated(call: Call, node: int) -> int:
    return call.graph.as_float(node) if call.dtype.is_floating_point else node


def _sources(shape: Sequence[int], along: Index | None) -> list[Place]:
    """Places of index tensors; the dimension that goes along the rows of the batch is gone through with them."""
    ranges: list[Sequence[Index]] = [range(n) for n in shape]
    if isinstance(along, Along):
        dims = [d for d, n in enumerate(shape) if n == along.count]
        if len(dims) != 1 or along.step != 1 or along.start:
            raise Refused("rows of the batch are written by an index of other rows")
        ranges[dims[0]] = [along]
    return list(itertools.product(*ranges))


def _put_by_mask(call: Call, x: Elements, masks: Sequence[Elements], values: Elements, accumulate: bool) -> Elements:
    """One mask of the leading dimensions, and a value that is the same wherever it lets through."""
    g = call.graph
    if len(masks) > 1 or any(n != 1 for n in values.shape):
        raise Refused("which values are written where depends on a mask: use torch.where")
    (mask,) = masks

    def get(place: Place) -> int:
        old = x.at(place)
        value = _floated(call, values.at((0,) * len(values.shape)))
        return g.op("sel", mask.at(place[: len(mask.shape)]), g.op("add", old, value) if accumulate else value, old)

    return call.made(get)


def _scattered(call: Call, x: Elements, dim: int, index: Elements, value: Callable[[Place], int], join: Join) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))

    def get(place: Place) -> int:
        # rows of the index may be fewer than those of what is written
        if any(d != dim and not i < index.shape[d] for d, i in enumerate(place)):
            return x.at(place)
        if isinstance(place[dim], Along):
            raise Refused("it writes along the rows of the batch")
        writes = []
        for q in range(index.shape[dim]):
            source = (*place[:dim], q, *place[dim + 1 :])
            hit = _hits(call, [place[dim]], [index.position(g, source)])
            if hit is not False:
                writes.append((None if hit is True else hit, lambda source=source: value(source)))
        return _written(call, x.at(place), writes, join)

    return call.made(get)


@_reads("scatter")
def _scatter(call: Call, x: Elements, dim: int, index: Elements, src: Any, *, reduce: str | None = None) -> Elements:
    g = call.graph
    joins: dict[str | None, Join] = {
        None: _replaced, "add": lambda old, new: g.op("add", old, new), "multiply": lambda old, new: g.op("mul", old, new)
    }  # fmt: skip
    constant = g.constant(float(src) if call.dtype.is_floating_point else src) if not isinstance(src, Elements) else -1
    return _scattered(call, x, dim, index, src.at if isinstance(src, Elements) else lambda place: constant, joins[reduce])


@_reads("scatter_add")
def _scatter_add(call: Call, x: Elements, dim: int, index: Elements, src: Elements) -> Elements:
    return _scattered(call, x, dim, index, src.at, lambda old, new: call.graph.op("add", old, new))


@_reads("scatter_reduce")
def _scatter_reduce(
    call: Call, x: Elements, dim: int, index: Elements, src: Elements, reduce: str, *, include_self: bool = True
) -> Elements:
    if reduce != "sum" or not include_self:
        raise Refused(f"scatter_reduce by {reduce}")
    return _scatter_add(call, x, dim, index, src)


@_reads("index_add")
def _index_add(call: Call, x: Elements, dim: int, index: Elements, source: Elements, *, alpha: float = 1) -> Elements:
    g = call.graph
    return _at_dimension(call, x, dim, index, source, lambda old, new: g.op("add", old, g.op("mul", new, g.constant(float(alpha)))))


@_reads("index_copy")
def _index_copy(call: Call, x: Elements, dim: int, index: Elements, source: Elements) -> Elements:
    return _at_dimension(call, x, dim, index, source, _replaced)


@_reads("index_fill")
def _index_fill(call: Call, x: Elements, dim: int, index: Elements, value: Any) -> Elements:
    getter = Call(call.graph, call.tables, ((),), call.dtypes).operand(value)
    source = Elements((), call.dtype, lambda place: getter(()))
    return _at_dimension(call, x, dim, index, source, _replaced)


def _at_dimension(call: Call, x: Elements, dim: int, index: Elements, source: Elements, join: Join) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))
    count = index.shape[0] if index.shape else 1
    value = source.at if source.shape else source.spread

    def get(place: Place) -> int:
        if isinstance(place[dim], Along):
            raise Refused("it writes along the rows of the batch")
        writes = []
        for q in range(count):
            hit = _hits(call, [place[dim]], [index.position(g, (q,) if index.shape else ())])
            if hit is not False:
                full = (*place[:dim], q, *place[dim + 1 :])
                writes.append((None if hit is True else hit, lambda full=full: value(full)))
        return _written(call, x.at(place), writes, join)

    return call.made(get)
