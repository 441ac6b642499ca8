"""Readers of sums, extremes and other reductions, and of running sums."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .elements import Call, Elements, Place, Reader, Refused, dimensions, numbered, registering
from .expressions import Graph
from .rows import Along, Unlike

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
Dims = int | Sequence[int] | None


def _joined(call: Call, x: Elements, dims: Dims, keepdim: bool, join: Callable[[list[int]], int]) -> Elements:
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
    return _joined(call, x, dim, keepdim, _folded(call, "add", 0))


@_reads("nansum")
def _nansum(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    g, total = call.graph, _folded(call, "add", 0)
    zero = g.constant(0.0)
    return _joined(call, x, dim, keepdim, lambda nodes: total([g.op("sel", g.op("ne", a, a), zero, a) for a in nodes]))


@_reads("mean")
def _mean(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    g, total = call.graph, _folded(call, "add", 0)
    return _joined(call, x, dim, keepdim, lambda nodes: g.op("div", total(nodes), g.constant(float(len(nodes)))))


@_reads("prod")
def _prod(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    return _joined(call, x, dim, keepdim, _folded(call, "mul", 1))


@_reads("any")
def _any(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, _folded(call, "or", False))


@_reads("all")
def _all(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, _folded(call, "and", True))


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


def _rooted(call: Call, total: int) -> int:
    """The square root of a sum of squares, with derivative zero where it is zero, as norms have it."""
    g = call.graph
    zero, one = g.constant(0.0), g.constant(1.0)
    none = g.op("eq", total, zero)
    return g.op("sel", none, zero, g.op("sqrt", g.op("sel", none, one, total)))


@_reads("linalg_vector_norm", "norm")
def _vector_norm(call: Call, x: Elements, ord: float | None = 2, dim: Dims = None, keepdim: bool = False, **_: Any) -> Elements:
    """Derivatives are zero where the norm is, and are shared by those that are largest."""
    g, order = call.graph, 2.0 if ord is None else float(ord)

    def join(nodes: list[int]) -> int:
        if order == 2:
            return _rooted(call, g.total("add", [g.op("mul", a, a) for a in nodes]))
        sizes = [g.op("abs", a) for a in nodes]
        if abs(order) == math.inf:
            return _shared_extreme(g, "max" if order > 0 else "min", sizes)
        if order == 0:
            return g.total("add", [g.as_float(g.op("ne", a, g.constant(0.0))) for a in nodes])
        if order == 1:
            return g.total("add", sizes)
        total = g.total("add", [_power(g, a, order) for a in sizes])
        return _power(g, total, 1 / order)

    return _joined(call, x, dim, keepdim, join)


def _power(g: Graph, a: int, exponent: float) -> int:
    """A power with derivative zero at zero."""
    zero, one = g.constant(0.0), g.constant(1.0)
    none = g.op("eq", a, zero)
    return g.op("sel", none, zero if exponent > 0 else g.constant(math.inf), g.op("pow", g.op("sel", none, one, a), g.constant(exponent)))


def _shared_extreme(g: Graph, name: str, nodes: Sequence[int]) -> int:
    """The largest or smallest of nodes; all that are have equal shares of the derivative."""
    if len(nodes) == 1:
        return nodes[0]
    best = g.total(name, nodes)
    zero, one = g.constant(0.0), g.constant(1.0)
    same = [g.op("eq", x, best) for x in nodes]
    share = g.op("div", one, g.total("add", [g.as_float(x) for x in same]))
    return g.given(best, [(x, g.op("sel", is_best, share, zero)) for x, is_best in zip(nodes, same, strict=True)])


def _first_extreme(g: Graph, beyond: str, nodes: Sequence[int]) -> tuple[int, int]:
    """The largest ("gt") or smallest ("lt") of nodes and its number; of equal ones the first, NaN before all."""
    best, at = nodes[0], g.constant(0)
    for i, x in enumerate(nodes[1:], 1):
        better = g.op("or", g.op(beyond, x, best), g.op("and", g.op("ne", x, x), g.op("eq", best, best)))
        best, at = g.op("sel", better, x, best), g.op("sel", better, g.constant(i), at)
    return best, at


@_reads("amax")
def _amax(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, lambda nodes: _shared_extreme(call.graph, "max", nodes))


@_reads("amin")
def _amin(call: Call, x: Elements, dim: Dims = None, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, lambda nodes: _shared_extreme(call.graph, "min", nodes))


@_reads("aminmax")
def _aminmax(call: Call, x: Elements, *, dim: int | None = None, keepdim: bool = False) -> list[Elements]:
    return [_amin(call, x, dim, keepdim), _amax(call, x, dim, keepdim)]


def _extreme(reduced: Reader, beyond: str) -> Reader:
    """max and min: of all elements as amax; along a dimension the first one and its index."""

    def reader(call: Call, x: Elements, dim: int | None = None, keepdim: bool = False) -> Elements | list[Elements]:
        if dim is None:
            return reduced(call, x)
        both = [_joined(call, x, dim, keepdim, lambda nodes, n=n: _first_extreme(call.graph, beyond, nodes)[n]) for n in range(2)]
        return [both[0], Elements(call.shapes[1], call.dtypes[1], both[1].at)]

    return reader


READERS.update({"max": _extreme(_amax, "gt"), "min": _extreme(_amin, "lt")})


def _index_of_extreme(beyond: str) -> Reader:
    def reader(call: Call, x: Elements, dim: int | None = None, keepdim: bool = False) -> Elements:
        return _joined(call, x, dim, keepdim, lambda nodes: _first_extreme(call.graph, beyond, nodes)[1])

    return reader


READERS.update({"argmax": _index_of_extreme("gt"), "argmin": _index_of_extreme("lt")})


@_reads("count_nonzero")
def _count_nonzero(call: Call, x: Elements, dim: Dims = None) -> Elements:
    g = call.graph
    return _joined(call, x, dim, False, lambda nodes: g.total("add", [g.as_int(g.as_bool(a)) for a in nodes]))


def _moments(g: Graph, nodes: Sequence[int], correction: float) -> tuple[int, int]:
    """Variance and mean."""
    mean = g.op("div", g.total("add", nodes), g.constant(float(len(nodes))))
    squares = [g.op("mul", d, d) for d in (g.op("sub", a, mean) for a in nodes)]
    return g.op("div", g.total("add", squares), g.constant(float(max(len(nodes) - correction, 0)))), mean


@_reads("var")
def _var(call: Call, x: Elements, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, lambda nodes: _moments(call.graph, nodes, _corrected(correction))[0])


@_reads("std")
def _std(call: Call, x: Elements, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> Elements:
    return _joined(call, x, dim, keepdim, lambda nodes: _rooted(call, _moments(call.graph, nodes, _corrected(correction))[0]))


@_reads("var_mean")
def _var_mean(call: Call, x: Elements, dim: Dims = None, *, correction: float | None = 1, keepdim: bool = False) -> list[Elements]:
    return [_joined(call, x, dim, keepdim, lambda nodes, n=n: _moments(call.graph, nodes, _corrected(correction))[n]) for n in range(2)]


def _corrected(correction: float | None) -> float:
    return 1 if correction is None else correction


@_reads("logsumexp")
def _logsumexp(call: Call, x: Elements, dim: Dims, keepdim: bool = False) -> Elements:
    g = call.graph

    def join(nodes: list[int]) -> int:
        most = g.op("stop", g.total("max", nodes))
        most = g.op("sel", g.op("eq", g.op("abs", most), g.constant(math.inf)), g.constant(0.0), most)
        return g.op("add", g.op("log", g.total("add", [g.op("exp", g.op("sub", a, most)) for a in nodes])), most)

    return _joined(call, x, dim, keepdim, join)


@_reads("dist")
def _dist(call: Call, x: Elements, y: Elements, p: float = 2) -> Elements:
    g = call.graph
    shape = torch.broadcast_shapes(x.shape, y.shape)
    gap = Elements(shape, call.dtype, lambda place: g.op("sub", x.spread(place), y.spread(place)))
    return _vector_norm(call, gap, p)


@_reads("_cdist_forward")
def _cdist(call: Call, x: Elements, y: Elements, p: float, mode: int | None = None) -> Elements:
    g, size = call.graph, x.shape[-1]

    def get(place: Place) -> int:
        *batch, i, j = place
        gap = Elements((size,), call.dtype, lambda k: g.op("sub", x.spread((*batch, i, *k)), y.spread((*batch, j, *k))))
        return _vector_norm(Call(g, call.tables, ((),), call.dtypes), gap, p).at(())

    return call.made(get)


@_reads("native_layer_norm")
def _layer_norm(
    call: Call, x: Elements, shape: Sequence[int], weight: Elements | None, bias: Elements | None, eps: float
) -> list[Elements]:
    inner = len(x.shape) - len(shape)

    def group(place: Place) -> list[Place]:
        return [(*place[:inner], *q) for q in itertools.product(*map(range, shape))]

    return _normalised(call, x, group, lambda place: place[inner:], weight, bias, eps)


@_reads("native_group_norm")
def _group_norm(
    call: Call, x: Elements, weight: Elements | None, bias: Elements | None, n: int, channels: int, size: int, groups: int, eps: float
) -> list[Elements]:
    per = channels // groups

    def group(place: Place) -> list[Place]:
        first = place[1] // per * per  # type: ignore[operator]
        return [(place[0], first + c, *q) for c in range(per) for q in itertools.product(*map(range, x.shape[2:]))]

    return _normalised(call, x, group, lambda place: (place[1],), weight, bias, eps)


def _normalised(
    call: Call, x: Elements, group: Callable[[Place], list[Place]], scaled_at: Callable[[Place], Place],
    weight: Elements | None, bias: Elements | None, eps: float,
) -> list[Elements]:  # fmt: skip
    """Elements less their mean over their deviation, in groups; the statistics themselves are not given."""
    g = call.graph
    known: dict[tuple[Place, ...], tuple[int, int]] = {}

    def get(place: Place) -> int:
        places = tuple(group(place))
        if places not in known:
            variance, mean = _moments(g, [x.at(q) for q in places], 0)
            known[places] = mean, g.op("div", g.constant(1.0), g.op("sqrt", g.op("add", variance, g.constant(float(eps)))))
        mean, inverse = known[places]
        out = g.op("mul", g.op("sub", x.at(place), mean), inverse)
        out = out if weight is None else g.op("mul", out, weight.at(scaled_at(place)))
        return out if bias is None else g.op("add", out, bias.at(scaled_at(place)))

    def refused(place: Place) -> int:
        raise Refused("statistics of a normalisation")

    return [call.made(get), *(call.made(refused, n) for n in (1, 2))]
