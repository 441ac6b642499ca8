"""Readers of products of matrices and vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from .elements import Call, Elements, Place, Reader, Refused, numbered, registering
from .expressions import Graph
from .operators_activations import exponentials
from .rows import Along, Index, Unlike

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)


def inner(g: Graph, pairs: Iterable[tuple[int, int]]) -> int:
    """A sum of products."""
    products = [g.op("mul", a, b) for a, b in pairs]
    return g.total("add", products) if products else g.constant(0.0)


@_reads("mm")
def _mm(call: Call, a: Elements, b: Elements) -> Elements:
    return call.made(lambda place: inner(call.graph, [(a.at((place[0], k)), b.at((k, place[1]))) for k in range(a.shape[1])]))


@_reads("bmm")
def _bmm(call: Call, a: Elements, b: Elements) -> Elements:
    def get(place: Place) -> int:
        n, i, j = place
        return inner(call.graph, [(a.at((n, i, k)), b.at((n, k, j))) for k in range(a.shape[2])])

    return call.made(get)


@_reads("mv")
def _mv(call: Call, a: Elements, b: Elements) -> Elements:
    return call.made(lambda place: inner(call.graph, [(a.at((place[0], k)), b.at((k,))) for k in range(a.shape[1])]))


@_reads("dot", "vdot")
def _dot(call: Call, a: Elements, b: Elements) -> Elements:
    return call.made(lambda place: inner(call.graph, [(a.at((k,)), b.at((k,))) for k in range(a.shape[0])]))


def _added(product: Reader) -> Reader:
    """A product that is added to something."""

    def reader(call: Call, c: Elements, a: Elements, b: Elements, *, beta: float = 1, alpha: float = 1) -> Elements:
        g, made, added = call.graph, product(call, a, b), call.operand(c)
        assert isinstance(made, Elements)

        def get(place: Place) -> int:
            part = made.at(place)
            part = part if alpha == 1 else g.op("mul", part, g.constant(float(alpha)))
            if beta == 0:
                return part
            start = added(place)
            return g.op("add", start if beta == 1 else g.op("mul", start, g.constant(float(beta))), part)

        return call.made(get)

    return reader


READERS.update({"addmm": _added(_mm), "baddbmm": _added(_bmm), "addmv": _added(_mv)})


@_reads("linalg_cross")
def _cross(call: Call, x: Elements, y: Elements, *, dim: int = -1) -> Elements:
    g, dim = call.graph, numbered(dim, len(call.shape))

    def get(place: Place) -> int:
        first, second = ((place[dim] + n) % 3 for n in (1, 2))

        def product(i: Index, j: Index) -> int:
            return g.op("mul", x.spread((*place[:dim], i, *place[dim + 1 :])), y.spread((*place[:dim], j, *place[dim + 1 :])))

        return g.op("sub", product(first, second), product(second, first))

    return call.made(get)


@_reads("_trilinear")
def _trilinear(
    call: Call, x: Elements, y: Elements, z: Elements, expand1: Sequence[int], expand2: Sequence[int], expand3: Sequence[int],
    sumdim: Sequence[int], unroll_dim: int = 1,
) -> Elements:  # fmt: skip
    g = call.graph

    def expanded(q: Elements, dims: Sequence[int], place: Place) -> int:
        return q.spread(tuple([i for d, i in enumerate(place) if d not in dims]))

    rank = len(x.shape) + len(expand1)
    sizes = [0] * rank
    for q, dims in ((x, expand1), (y, expand2), (z, expand3)):
        left = iter(q.shape)
        for d in range(rank):
            if d not in dims:
                sizes[d] = max(sizes[d], next(left))

    def get(place: Place) -> int:
        left = iter(place)
        ranges = [range(sizes[d]) if d in sumdim else (next(left),) for d in range(rank)]
        products = []
        for p in itertools.product(*ranges):
            a, b, c = (expanded(q, dims, p) for q, dims in ((x, expand1), (y, expand2), (z, expand3)))
            products.append(g.op("mul", g.op("mul", a, b), c))
        return g.total("add", products)

    return call.made(get)


@_reads("convolution", "_convolution")
def _convolution(
    call: Call, x: Elements, weight: Elements, bias: Elements | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    transposed: bool, output_padding: Sequence[int], groups: int, *_: object,
) -> Elements:  # fmt: skip
    """In any number of dimensions: x (B, in, ...), weight (out, in / groups, ...), or (in, out / groups, ...) where transposed."""
    g = call.graph
    kernel, spatial = weight.shape[2:], x.shape[2:]
    stride, padding, dilation = (list(q) * (len(kernel) if len(q) == 1 else 1) for q in (stride, padding, dilation))
    inputs, outputs = x.shape[1] // groups, call.shape[1] // groups

    def source(out: Sequence[int], tap: Sequence[int]) -> tuple[int, ...] | None:
        """The element of x that a tap of the kernel meets, if there is one."""
        found = []
        for o, k, s, p, d, size in zip(out, tap, stride, padding, dilation, spatial, strict=True):
            at = o * s - p + k * d
            if transposed:
                at, rest = divmod(o + p - k * d, s)
                if rest:
                    return None
            if not 0 <= at < size:
                return None
            found.append(at)
        return tuple(found)

    def get(place: Place) -> int:
        row, channel, *out = place
        if isinstance(channel, Along) or any(isinstance(i, Along) for i in out):
            raise Unlike("the rows of the batch lie along the kernel of a convolution")
        group = channel // outputs
        pairs = []
        for c in range(inputs):
            first, second = (group * inputs + c, channel % outputs) if transposed else (channel, c)
            for tap in itertools.product(*map(range, kernel)):
                at = source(out, tap)  # type: ignore[arg-type]
                if at is not None:
                    pairs.append((x.at((row, group * inputs + c, *at)), weight.at((first, second, *tap))))
        total = inner(g, pairs)
        return total if bias is None else g.op("add", total, bias.at((channel,)))

    return call.made(get)


@_reads("_scaled_dot_product_flash_attention_for_cpu")
def _attention(
    call: Call, query: Elements, key: Elements, value: Elements, dropout_p: float = 0.0, is_causal: bool = False, *,
    attn_mask: Elements | None = None, scale: float | None = None,
) -> list[Elements]:  # fmt: skip
    """Sums of values by the softmax of products of queries with keys; (..., places, width)."""
    g = call.graph
    if dropout_p:
        raise Refused("attention with dropout")
    width = query.shape[-1]
    factor = g.constant(float(width**-0.5 if scale is None else scale))
    places = key.shape[-2]
    known: dict[Place, list[int]] = {}

    def shares(batch: Place, i: Index) -> list[int]:
        here = (*batch, i)
        if here not in known:
            if is_causal and not isinstance(i, int):
                raise Refused("causal attention along the rows of the batch")
            scores = []
            for j in range(i + 1 if is_causal else places):  # type: ignore[operator]
                score = inner(g, [(query.at((*batch, i, e)), key.at((*batch, j, e))) for e in range(width)])
                score = g.op("mul", score, factor)
                scores.append(score if attn_mask is None else g.op("add", score, attn_mask.spread((*batch, i, j))))
            _, powers = exponentials(g, scores)
            total = g.total("add", powers)
            known[here] = [g.op("div", x, total) for x in powers]
        return known[here]

    def get(place: Place) -> int:
        *batch, i, e = place
        return inner(g, [(share, value.at((*batch, j, e))) for j, share in enumerate(shares(tuple(batch), i))])

    def refused(place: Place) -> int:
        raise Refused("statistics of attention")

    return [call.made(get), call.made(refused, 1)]
