"""Readers of sums, extremes and other reductions, and of running sums."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from .elements import Call, Elements, Place, Reader, dimensions, numbered, registering
from .rows import Along, Unlike

__all__ = ["READERS", "joined", "rooted"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
Dims = int | Sequence[int] | None


def joined(call: Call, x: Elements, dims: Dims, keepdim: bool, join: Callable[[list[int]], int]) -> Elements:
    """Elements of a result from lists of the elements that it is reduced from."""
    rank = len(x.shape)
    reduced = set(dimensions(dims, rank))

    def get(place: Place) -> int:
        left = iter(place)
        ranges = []
        for d in range(rank):
            if d not in reduced:
                ranges.append((next(left),))
                continue
            if keepdim:
                next(left)
            ranges.append(range(x.shape[d]))
        return join([x.at(p) for p in itertools.product(*ranges)])

    return call.made(get)


def _folded(call: Call, name: str, empty: float | bool) -> Callable[[list[int]], int]:
    g = call.graph
    if call.dtype.is_floating_point:
        return lambda nodes: g.total(name, map(g.as_float, nodes)) if nodes else g.constant(float(empty))
    return lambda nodes: g.total(name, nodes) if nodes else g.constant(empty)


@_reads("sum")
def _sum(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    return joined(call, x, dim, keepdim, _folded(call, "add", 0))


@_reads("mean")
def _mean(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    g, total = call.graph, _folded(call, "add", 0)
    return joined(call, x, dim, keepdim, lambda nodes: g.op("div", total(nodes), g.constant(float(len(nodes)))))


@_reads("prod")
def _prod(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    return joined(call, x, dim, keepdim, _folded(call, "mul", 1))


@_reads("any")
def _any(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return joined(call, x, dim, keepdim, _folded(call, "or", False))


@_reads("all")
def _all(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return joined(call, x, dim, keepdim, _folded(call, "and", True))


@_reads("cumsum")
def _cumsum(call: Call, x: Elements, dim: int, **_: Any) -> Elements:
    return _running(call, x, dim, "add")


@_reads("cumprod")
def _cumprod(call: Call, x: Elements, dim: int, **_: Any) -> Elements:
    return _running(call, x, dim, "mul")


def _running(call: Call, x: Elements, dim: int, name: str) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))

    def get(place: Place) -> int:
        if not x.shape:
            return x.at(place)
        last = place[dim]
        if isinstance(last, Along):
            raise Unlike("it runs along the rows of the batch")
        total = None
        # from the front, so that none asks for one which asks for one ...
        for i in range(last + 1):
            here = (*place[:dim], i, *place[dim + 1 :])
            total = known.get(here) if here in known else x.at(here) if total is None else g.op(name, total, x.at(here))
            known[here] = total  # type: ignore[assignment]
        assert total is not None
        return total

    known: dict[Place, int] = {}
    return call.made(get)


def rooted(call: Call, total: int) -> int:
    """The square root of a sum of squares, with derivative zero where it is zero, as norms have it."""
    g = call.graph
    zero, one = g.constant(0.0), g.constant(1.0)
    none = g.op("eq", total, zero)
    return g.op("sel", none, zero, g.op("sqrt", g.op("sel", none, one, total)))


@_reads("linalg_vector_norm")
def _vector_norm(call: Call, x: Elements, ord: float = 2, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    g = call.graph
    return joined(call, x, dim, keepdim, lambda nodes: rooted(call, g.total("add", [g.op("mul", a, a) for a in nodes])))
