"""Derivatives of scalar expressions, as scalar expressions: the reverse mode. At kinks they are those of ATen."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from .expressions import BOOLEAN, Graph

__all__ = ["cotangents", "jacobian", "seeded"]

#: node, its arguments, its cotangent -> cotangents of its arguments (None: the derivative is zero)
Rule = Callable[[Graph, int, tuple[int, ...], int], Iterable[int | None]]


def times(g: Graph, a: int, b: int) -> int:
    """A product in which a zero that stands for the lack of a derivative wins over everything."""
    if g.is_zero(a) or g.is_zero(b):
        return g.constant(0.0)
    return g.op("mul", a, b)


def _plus(g: Graph, a: int, b: int) -> int:
    return b if g.is_zero(a) else a if g.is_zero(b) else g.op("add", a, b)


def _over(g: Graph, a: int, b: int) -> int:
    return a if g.is_zero(a) else g.op("div", a, b)


def _by(slope: Callable[[Graph, int, int], int]) -> Rule:
    """The rule of a function of one number, from its derivative, a function of argument and value."""
    return lambda g, node, args, v: [times(g, v, slope(g, args[0], node))]


def _square(g: Graph, x: int) -> int:
    return g.op("mul", x, x)


def _one_minus(g: Graph, x: int) -> int:
    return g.op("sub", g.constant(1.0), x)


def _one_plus(g: Graph, x: int) -> int:
    return g.op("add", x, g.constant(1.0))


def _inverse(g: Graph, x: int) -> int:
    return g.op("div", g.constant(1.0), x)


def _scaled(g: Graph, x: int, factor: float) -> int:
    return g.op("mul", x, g.constant(factor))


def _div(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int]:
    share = _over(g, v, args[1])
    return [share, g.op("neg", times(g, share, node))]


def _pow(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int | None]:
    x, p = args
    zero = g.constant(0.0)
    slope = g.op("mul", p, g.op("pow", x, g.op("sub", p, g.constant(1.0))))
    first = times(g, v, slope)
    if g.value(p) is not None:
        return [first, None]
    first = g.op("sel", g.op("eq", p, zero), zero, first)
    # 0 ** p is 0 for all p > 0
    flat = g.op("and", g.op("eq", x, zero), g.op("ge", p, zero))
    return [first, g.op("sel", flat, zero, times(g, v, g.op("mul", node, g.op("log", x))))]


def _extreme(less: str) -> Rule:
    """Of the greater of two, or the smaller: equal ones share."""

    def rule(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int]:
        a, b = args
        zero, tie, half = g.constant(0.0), g.op("eq", a, b), _scaled(g, v, 0.5)
        return [g.op("sel", g.op(less, x, y), zero, g.op("sel", tie, half, v)) for x, y in ((a, b), (b, a))]

    return rule


def _sel(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int | None]:
    zero = g.constant(0.0)
    return [None, g.op("sel", args[0], v, zero), g.op("sel", args[0], zero, v)]


def _atan2(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int]:
    y, x = args
    size, zero = g.op("add", _square(g, x), _square(g, y)), g.constant(0.0)
    share = g.op("sel", g.op("eq", size, zero), zero, _over(g, v, size))
    return [times(g, share, x), g.op("neg", times(g, share, y))]


def _hypot(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int]:
    return [times(g, v, g.op("div", x, node)) for x in args]


def _given(g: Graph, node: int, args: tuple[int, ...], v: int) -> list[int | None]:
    found: list[int | None] = [None]
    for slope in args[2::2]:
        found += [times(g, v, slope), None]
    return found


RULES: dict[str, Rule] = {
    "add": lambda g, node, args, v: [v, v],
    "sub": lambda g, node, args, v: [v, g.op("neg", v)],
    "mul": lambda g, node, args, v: [times(g, v, args[1]), times(g, v, args[0])],
    "div": _div,
    "single": lambda g, node, args, v: [v],
    "neg": lambda g, node, args, v: [g.op("neg", v)],
    "pow": _pow,
    "max": _extreme("lt"),
    "min": _extreme("gt"),
    "sel": _sel,
    "given": _given,
    "atan2": _atan2,
    "hypot": _hypot,
    "fmod": lambda g, node, args, v: [v, g.op("neg", times(g, v, g.op("trunc", g.op("div", *args))))],
    "remainder": lambda g, node, args, v: [v, g.op("neg", times(g, v, g.op("floordiv", *args)))],
    "exp": _by(lambda g, x, y: y),
    "expm1": _by(lambda g, x, y: _one_plus(g, y)),
    "exp2": _by(lambda g, x, y: _scaled(g, y, math.log(2))),
    "log": _by(lambda g, x, y: _inverse(g, x)),
    "log1p": _by(lambda g, x, y: _inverse(g, _one_plus(g, x))),
    "log2": _by(lambda g, x, y: _inverse(g, _scaled(g, x, math.log(2)))),
    "log10": _by(lambda g, x, y: _inverse(g, _scaled(g, x, math.log(10)))),
    "sin": _by(lambda g, x, y: g.op("cos", x)),
    "cos": _by(lambda g, x, y: g.op("neg", g.op("sin", x))),
    "tan": _by(lambda g, x, y: _one_plus(g, _square(g, y))),
    "asin": _by(lambda g, x, y: _inverse(g, g.op("sqrt", _one_minus(g, _square(g, x))))),
    "acos": _by(lambda g, x, y: g.op("neg", _inverse(g, g.op("sqrt", _one_minus(g, _square(g, x)))))),
    "atan": _by(lambda g, x, y: _inverse(g, _one_plus(g, _square(g, x)))),
    "sinh": _by(lambda g, x, y: g.op("cosh", x)),
    "cosh": _by(lambda g, x, y: g.op("sinh", x)),
    "tanh": _by(lambda g, x, y: _one_minus(g, _square(g, y))),
    "asinh": _by(lambda g, x, y: _inverse(g, g.op("sqrt", _one_plus(g, _square(g, x))))),
    "acosh": _by(lambda g, x, y: _inverse(g, g.op("sqrt", g.op("sub", _square(g, x), g.constant(1.0))))),
    "atanh": _by(lambda g, x, y: _inverse(g, _one_minus(g, _square(g, x)))),
    "sqrt": lambda g, node, args, v: [_over(g, _scaled(g, v, 0.5), node)],
    "abs": _by(lambda g, x, y: g.op("sign", x)),
    "erf": _by(lambda g, x, y: _scaled(g, g.op("exp", g.op("neg", _square(g, x))), 2 / math.sqrt(math.pi))),
    "erfc": _by(lambda g, x, y: _scaled(g, g.op("exp", g.op("neg", _square(g, x))), -2 / math.sqrt(math.pi))),
    "erfinv": _by(lambda g, x, y: _scaled(g, g.op("exp", _square(g, y)), math.sqrt(math.pi) / 2)),
    "lgamma": _by(lambda g, x, y: g.op("digamma", x)),
    "digamma": _by(lambda g, x, y: g.op("trigamma", x)),
    "sigmoid": _by(lambda g, x, y: g.op("mul", y, _one_minus(g, y))),
    "softplus": _by(lambda g, x, y: g.op("sigmoid", x)),
}
#: their derivatives are zero or not defined
_FLAT = BOOLEAN | {"sign", "floor", "ceil", "trunc", "round", "floordiv", "toint", "tofloat", "search", "stop", "constant", "leaf", "look"}


class _Leading:
    """Which nodes lead to leaves of the kinds that derivatives are wanted by; asked of many outputs, every node is looked at once."""

    def __init__(self, graph: Graph, kinds: Collection[str]) -> None:
        self._graph, self._kinds = graph, frozenset(kinds)
        self._known: dict[int, bool] = {}

    def __call__(self, node: int) -> bool:
        known, g = self._known, self._graph
        waiting = [node]
        while waiting:
            n = waiting[-1]
            if n in known:
                waiting.pop()
                continue
            name = g.names[n]
            if name in ("leaf", "look"):
                known[n] = g.data[n][0] in self._kinds
            elif name in _FLAT or g.types[n] != "float":
                known[n] = False
            else:
                arguments = g.arguments[n][1::2] if name == "given" else g.arguments[n]
                new = [x for x in arguments if x not in known]
                if new:
                    waiting += new
                    continue
                known[n] = any(known[x] for x in arguments)
            waiting.pop()
        return known[node]


def seeded(graph: Graph, outputs: Sequence[int]) -> dict[int, int]:
    """Output nodes with their cotangents ``("v", i)``, the sum of them where outputs are one node."""
    seeds: dict[int, int] = {}
    for i, node in enumerate(outputs):
        v = graph.leaf("v", i)
        seeds[node] = graph.op("add", seeds[node], v) if node in seeds else v
    return seeds


def cotangents(graph: Graph, seeds: Mapping[int, int], wanted_kinds: Collection[str]) -> dict[int, int]:
    """Derivatives of ``sum(seed * output)``.

    Args:
        graph: holds the expressions, and gets those of the derivatives.
        seeds: cotangent node of every output node.
        wanted_kinds: kinds of leaves that derivatives are wanted by.

    Returns:
        The cotangent node of every leaf, and of every ``look`` (whose cotangent is to be added to the element of the array that it looked
        at), of these kinds, of which there is any; where there is none, the derivative is zero.

    Raises:
        NotImplementedError: the derivative of a function is not known.
    """
    return _swept(graph, seeds, _Leading(graph, wanted_kinds))


def _swept(graph: Graph, seeds: Mapping[int, int], leading: _Leading) -> dict[int, int]:
    found = {node: v for node, v in seeds.items() if leading(node) and not graph.is_zero(v)}
    waiting = [-node for node in found]
    heapq.heapify(waiting)
    leaves: dict[int, int] = {}
    while waiting:
        node = -heapq.heappop(waiting)
        name, v = graph.names[node], found[node]
        if name in ("leaf", "look"):
            leaves[node] = v
            continue
        rule = RULES.get(name)
        if rule is None:
            raise NotImplementedError(f"the derivative of {name}")
        arguments = graph.arguments[node]
        for x, part in zip(arguments, rule(graph, node, arguments, v), strict=True):
            if part is None or graph.is_zero(part) or not leading(x):
                continue
            if x in found:
                found[x] = _plus(graph, found[x], part)
            else:
                found[x] = part
                heapq.heappush(waiting, -x)
    return leaves


def jacobian(graph: Graph, outputs: Sequence[int], kind: str = "y") -> dict[tuple[int, int], int]:
    """Derivatives of every output by every leaf ``(kind, j)``: of row and column, only those that are not zero whatever the values are."""
    leading = _Leading(graph, (kind,))
    entries: dict[tuple[int, int], int] = {}
    one = graph.constant(1.0)
    for row, output in enumerate(outputs):
        for leaf, v in _swept(graph, {output: one}, leading).items():
            if graph.names[leaf] == "look":
                raise NotImplementedError("the derivative by an element that is picked by a computed index")
            entries[row, graph.data[leaf][1] if len(graph.data[leaf]) > 1 else 0] = v
    return entries
