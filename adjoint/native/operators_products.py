"""Readers of products of matrices and vectors."""

from __future__ import annotations

from collections.abc import Iterable

from .elements import Call, Elements, Reader, registering
from .expressions import Graph

__all__ = ["READERS", "inner"]

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
    def get(place) -> int:
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

        def get(place) -> int:
            part = made.at(place)
            part = part if alpha == 1 else g.op("mul", part, g.constant(float(alpha)))
            if beta == 0:
                return part
            start = added(place)
            return g.op("add", start if beta == 1 else g.op("mul", start, g.constant(float(beta))), part)

        return call.made(get)

    return reader


READERS.update({"addmm": _added(_mm), "baddbmm": _added(_bmm), "addmv": _added(_mv)})
