"""Readers of operators on complex numbers, an element of which is a pair of nodes.

Operators that only move elements about do not look at what they move: their readers are those of real numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from . import operators_indexing, operators_views
from .elements import Call, Elements, Getter, Pair, Place, Reader, Refused, dimensions, numbered, registering
from .expressions import Graph

__all__ = ["MOVING", "READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)
_MADE = {"constant_pad_nd", "diag_embed", "tril", "triu", "full_like", "new_full", "full", "scalar_tensor"}
#: readers of real numbers which do for pairs
MOVING: dict[str, Reader] = {
    name: reader
    for name, reader in {**operators_views.READERS, **operators_indexing.READERS}.items()
    if name not in _MADE and not name.startswith(("zeros", "ones", "empty", "new_")) and name not in ("searchsorted", "bucketize")
}


def _pair(g: Graph, x: Any) -> Pair:
    """A real node, or a pair, as a pair."""
    return x if isinstance(x, Pair) else Pair(g.as_float(x), g.constant(0.0))


def _operand(call: Call, x: Any) -> Callable[[Place], Pair]:
    g = call.graph
    if isinstance(x, Elements):
        return lambda place: _pair(g, x.spread(place))
    z = complex(x)
    made = Pair(g.constant(z.real), g.constant(z.imag))
    return lambda place: made


def _made(call: Call, get: Callable[[Place], Any]) -> Elements:
    """Elements that are pairs, which those who move them do not look at."""
    wanted: Getter = get
    return call.made(wanted)


def _each(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A reader from a function of a graph and pairs."""

    def put(function: Callable[..., Any]) -> Callable[..., Any]:
        def reader(call: Call, *operands: Any, **_: Any) -> Elements:
            getters = [_operand(call, x) for x in operands]
            return _made(call, lambda place: function(call.graph, *[get(place) for get in getters]))

        READERS.update(dict.fromkeys(names, reader))
        return function

    return put


def _sum(g: Graph, a: Pair, b: Pair) -> Pair:
    return Pair(g.op("add", a.re, b.re), g.op("add", a.im, b.im))


def _less(g: Graph, a: Pair, b: Pair) -> Pair:
    return Pair(g.op("sub", a.re, b.re), g.op("sub", a.im, b.im))


@_each("mul")
def _mul(g: Graph, a: Pair, b: Pair) -> Pair:
    if g.is_zero(b.im):
        return Pair(g.op("mul", a.re, b.re), g.op("mul", a.im, b.re))
    if g.is_zero(a.im):
        return _mul(g, b, a)
    return Pair(
        g.op("sub", g.op("mul", a.re, b.re), g.op("mul", a.im, b.im)), g.op("add", g.op("mul", a.re, b.im), g.op("mul", a.im, b.re))
    )


def _square_size(g: Graph, a: Pair) -> int:
    return g.op("add", g.op("mul", a.re, a.re), g.op("mul", a.im, a.im))


@_each("div", "true_divide")
def _div(g: Graph, a: Pair, b: Pair) -> Pair:
    if g.is_zero(b.im):
        return Pair(g.op("div", a.re, b.re), g.op("div", a.im, b.re))
    size = _square_size(g, b)
    top = _mul(g, a, _conjugate(g, b))
    return Pair(g.op("div", top.re, size), g.op("div", top.im, size))


@_each("reciprocal")
def _reciprocal(g: Graph, a: Pair) -> Pair:
    return _div(g, Pair(g.constant(1.0), g.constant(0.0)), a)


@_each("_conj", "conj_physical", "_conj_physical")
def _conjugate(g: Graph, a: Pair) -> Pair:
    return Pair(a.re, g.op("neg", a.im))


@_each("neg", "_neg_view")
def _neg(g: Graph, a: Pair) -> Pair:
    return Pair(g.op("neg", a.re), g.op("neg", a.im))


@_each("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "_to_copy", "resolve_conj", "resolve_neg")
def _same(g: Graph, a: Pair) -> Pair:
    return a


@_each("square")
def _square(g: Graph, a: Pair) -> Pair:
    return _mul(g, a, a)


@_each("exp")
def _exp(g: Graph, a: Pair) -> Pair:
    size = g.op("exp", a.re)
    return Pair(g.op("mul", size, g.op("cos", a.im)), g.op("mul", size, g.op("sin", a.im)))


@_each("log")
def _log(g: Graph, a: Pair) -> Pair:
    return Pair(g.op("log", g.op("hypot", a.re, a.im)), g.op("atan2", a.im, a.re))


@_each("sin")
def _sin(g: Graph, a: Pair) -> Pair:
    return Pair(g.op("mul", g.op("sin", a.re), g.op("cosh", a.im)), g.op("mul", g.op("cos", a.re), g.op("sinh", a.im)))


@_each("cos")
def _cos(g: Graph, a: Pair) -> Pair:
    return Pair(g.op("mul", g.op("cos", a.re), g.op("cosh", a.im)), g.op("neg", g.op("mul", g.op("sin", a.re), g.op("sinh", a.im))))


@_each("abs")
def _abs(g: Graph, a: Pair) -> int:
    """With derivative zero at zero."""
    size, zero = g.op("hypot", a.re, a.im), g.constant(0.0)
    none = g.op("eq", size, zero)
    return g.given(size, [(x, g.op("sel", none, zero, g.op("div", x, size))) for x in a])


@_each("angle")
def _angle(g: Graph, a: Pair) -> int:
    return g.op("atan2", a.im, a.re)


@_each("eq")
def _eq(g: Graph, a: Pair, b: Pair) -> int:
    return g.op("and", g.op("eq", a.re, b.re), g.op("eq", a.im, b.im))


@_each("ne")
def _ne(g: Graph, a: Pair, b: Pair) -> int:
    return g.op("not", _eq(g, a, b))


@_reads("add", "sub", "rsub")
def _add(call: Call, x: Any, y: Any, *, alpha: float = 1, join: Callable[[Graph, Pair, Pair], Pair] = _sum) -> Elements:
    g, scale = call.graph, call.graph.constant(float(alpha))
    first, second = _operand(call, x), _operand(call, y)

    def get(place: Place) -> Pair:
        b = second(place)
        return join(g, first(place), b if alpha == 1 else Pair(g.op("mul", b.re, scale), g.op("mul", b.im, scale)))

    return _made(call, get)


READERS["sub"] = lambda call, x, y, alpha=1: _add(call, x, y, alpha=alpha, join=_less)
READERS["rsub"] = lambda call, x, y, alpha=1: _add(call, y, x, join=_less) if alpha == 1 else _refused("rsub with alpha")


def _refused(what: str) -> Elements:
    raise Refused(f"{what}, of complex numbers")


@_reads("pow")
def _pow(call: Call, x: Any, exponent: Any) -> Elements:
    g = call.graph
    base = _operand(call, x)
    if isinstance(exponent, (int, float)) and exponent == int(exponent) and 0 < abs(exponent) <= 8:

        def product(place: Place) -> Pair:
            a = base(place)
            out = a
            for _ in range(int(abs(exponent)) - 1):
                out = _mul(g, out, a)
            return out if exponent > 0 else _reciprocal(g, out)

        return _made(call, product)
    power = _operand(call, exponent)
    return _made(call, lambda place: _exp(g, _mul(g, power(place), _log(g, base(place)))))


@_reads("sqrt")
def _sqrt(call: Call, x: Elements) -> Elements:
    """The half with the smaller rounding first, the other by a quotient."""
    g = call.graph
    zero, half, one = g.constant(0.0), g.constant(0.5), g.constant(1.0)
    base = _operand(call, x)

    def get(place: Place) -> Pair:
        a = base(place)
        size = _abs(g, a)
        root = g.op("sqrt", g.op("mul", g.op("add", size, g.op("abs", a.re)), half))
        other = g.op("mul", g.op("div", a.im, g.op("sel", g.op("eq", root, zero), one, root)), half)
        right = g.op("ge", a.re, zero)
        negative = g.op("lt", g.op("atan2", a.im, g.constant(-1.0)), zero)
        turned = Pair(g.op("abs", other), g.op("sel", negative, g.op("neg", root), root))
        return Pair(g.op("sel", right, root, turned.re), g.op("sel", right, other, turned.im))

    return _made(call, get)


@_reads("complex")
def _complex(call: Call, re: Elements, im: Elements) -> Elements:
    return _made(call, lambda place: Pair(re.spread(place), im.spread(place)))


@_reads("polar")
def _polar(call: Call, size: Elements, angle: Elements) -> Elements:
    g = call.graph

    def get(place: Place) -> Pair:
        r, a = size.spread(place), angle.spread(place)
        return Pair(g.op("mul", r, g.op("cos", a)), g.op("mul", r, g.op("sin", a)))

    return _made(call, get)


@_reads("view_as_complex", "view_as_complex_copy")
def _view_as_complex(call: Call, x: Elements) -> Elements:
    return _made(call, lambda place: Pair(x.at((*place, 0)), x.at((*place, 1))))


@_reads("view_as_real", "view_as_real_copy", "_view_as_real_physical")
def _view_as_real(call: Call, x: Elements) -> Elements:
    def get(place: Place) -> int:
        if not isinstance(place[-1], int):
            raise Refused("rows of the batch are the parts of complex numbers")
        return _pair(call.graph, x.at(place[:-1]))[place[-1]]

    return call.made(get)


@_reads("copy")
def _copy(call: Call, x: Elements, source: Elements, *_: Any) -> Elements:
    return _made(call, _operand(call, source))


@_reads("where")
def _where(call: Call, condition: Elements, x: Any, y: Any) -> Elements:
    g, first, second = call.graph, _operand(call, x), _operand(call, y)

    def get(place: Place) -> Pair:
        mask, a, b = condition.spread(place), first(place), second(place)
        return Pair(g.op("sel", mask, a.re, b.re), g.op("sel", mask, a.im, b.im))

    return _made(call, get)


@_reads("zeros_like", "zeros", "new_zeros", "empty_like", "empty", "new_empty")
def _zeros(call: Call, *_: Any, **__: Any) -> Elements:
    zero = call.graph.constant(0.0)
    return _made(call, lambda place: Pair(zero, zero))


@_reads("full_like", "full", "new_full", "ones_like", "scalar_tensor", "fill")
def _full(call: Call, *args: Any, **_: Any) -> Elements:
    value = args[-1] if args and isinstance(args[-1], (int, float, complex)) else 1.0
    return _made(call, _operand(call, value))


def _total(g: Graph, pairs: Sequence[Pair]) -> Pair:
    return Pair(g.total("add", [p.re for p in pairs]), g.total("add", [p.im for p in pairs]))


@_reads("sum", "mean")
def _summed(call: Call, x: Elements, dim: Any = None, keepdim: bool = False, *, mean: bool = False, **_: Any) -> Elements:
    g, rank = call.graph, len(x.shape)
    reduced = set(dimensions(dim, rank))

    def get(place: Place) -> Pair:
        left = iter(place)
        ranges: list[Any] = []
        for d in range(rank):
            if d not in reduced:
                ranges.append((next(left),))
                continue
            if keepdim:
                next(left)
            ranges.append(range(x.shape[d]))
        parts = [_pair(g, x.at(p)) for p in itertools.product(*ranges)]
        total = _total(g, parts)
        count = g.constant(float(len(parts)))
        return Pair(g.op("div", total.re, count), g.op("div", total.im, count)) if mean else total

    return _made(call, get)


READERS["mean"] = lambda call, x, dim=None, keepdim=False, **_: _summed(call, x, dim, keepdim, mean=True)


def _inner(g: Graph, pairs: Sequence[tuple[Any, Any]]) -> Pair:
    return _total(g, [_mul(g, _pair(g, a), _pair(g, b)) for a, b in pairs])


@_reads("mm")
def _mm(call: Call, a: Elements, b: Elements) -> Elements:
    return _made(call, lambda p: _inner(call.graph, [(a.at((p[0], k)), b.at((k, p[1]))) for k in range(a.shape[1])]))


@_reads("bmm")
def _bmm(call: Call, a: Elements, b: Elements) -> Elements:
    return _made(call, lambda p: _inner(call.graph, [(a.at((p[0], p[1], k)), b.at((p[0], k, p[2]))) for k in range(a.shape[2])]))


@_reads("mv")
def _mv(call: Call, a: Elements, b: Elements) -> Elements:
    return _made(call, lambda p: _inner(call.graph, [(a.at((p[0], k)), b.at((k,))) for k in range(a.shape[1])]))


@_reads("dot")
def _dot(call: Call, a: Elements, b: Elements) -> Elements:
    return _made(call, lambda p: _inner(call.graph, [(a.at((k,)), b.at((k,))) for k in range(a.shape[0])]))


@_reads("vdot")
def _vdot(call: Call, a: Elements, b: Elements) -> Elements:
    g = call.graph
    return _made(call, lambda p: _inner(g, [(_conjugate(g, _pair(g, a.at((k,)))), b.at((k,))) for k in range(a.shape[0])]))


@_reads("stack")
def _stack(call: Call, tensors: Sequence[Elements], dim: int = 0) -> Elements:
    g, dim = call.graph, numbered(dim, len(call.shape))
    return _made(call, lambda p: _pair(g, tensors[p[dim]].at((*p[:dim], *p[dim + 1 :]))))  # type: ignore[index]


@_reads("cat")
def _cat(call: Call, tensors: Sequence[Elements], dim: int = 0) -> Elements:
    g, dim = call.graph, numbered(dim, len(call.shape))

    def get(place: Place) -> Pair:
        i = place[dim]
        for x in tensors:
            if i < x.shape[dim]:
                return _pair(g, x.at((*place[:dim], i, *place[dim + 1 :])))
            i = i - x.shape[dim]
        raise AssertionError(place)

    return _made(call, get)
