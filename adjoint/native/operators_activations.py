"""Readers of activations of networks. Derivatives at kinks are those of ATen, whose rules say on which side a tie falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .elements import Call, Elements, Place, Reader, numbered, registering
from .expressions import Graph

__all__ = ["READERS", "exponentials"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)


def _each(*names: str) -> Callable[[Callable[[Graph, int], int]], Callable[[Graph, int], int]]:
    """A reader from a function of a graph and one element."""

    def put(function: Callable[[Graph, int], int]) -> Callable[[Graph, int], int]:
        READERS.update(dict.fromkeys(names, lambda call, x: call.elementwise(lambda a: function(call.graph, a), x)))
        return function

    return put


@_each("relu")
def _relu(g: Graph, a: int) -> int:
    return g.op("sel", g.op("le", a, g.constant(0.0)), g.constant(0.0), a)


@_each("silu")
def _silu(g: Graph, a: int) -> int:
    return g.op("mul", a, g.op("sigmoid", a))


@_each("mish")
def _mish(g: Graph, a: int) -> int:
    return g.op("mul", a, g.op("tanh", g.op("softplus", a)))


@_each("log_sigmoid")
def _log_sigmoid(g: Graph, a: int) -> int:
    return g.op("neg", g.op("softplus", g.op("neg", a)))


@_reads("log_sigmoid_forward")
def _log_sigmoid_forward(call: Call, x: Elements) -> list[Elements]:
    return [call.elementwise(lambda a: _log_sigmoid(call.graph, a), x), Elements(call.shapes[1], call.dtypes[1], x.at)]


@_reads("softplus")
def _softplus(call: Call, x: Elements, beta: float = 1.0, threshold: float = 20.0) -> Elements:
    g = call.graph
    scale, bound = g.constant(float(beta)), g.constant(float(threshold))

    def element(a: int) -> int:
        scaled = g.op("mul", a, scale)
        return g.op("sel", g.op("gt", scaled, bound), a, g.op("div", g.op("softplus", scaled), scale))

    return call.elementwise(element, x)


@_reads("elu")
def _elu(call: Call, x: Elements, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Elements:
    g = call.graph
    below, above, inner = g.constant(float(alpha * scale)), g.constant(float(scale)), g.constant(float(input_scale))

    def element(a: int) -> int:
        # the exponential must not overflow where it is not taken
        is_low, zero = g.op("le", a, g.constant(0.0)), g.constant(0.0)
        negative = g.op("mul", g.op("expm1", g.op("mul", g.op("sel", is_low, a, zero), inner)), below)
        return g.op("sel", is_low, negative, g.op("mul", a, above))

    return call.elementwise(element, x)


@_reads("celu")
def _celu(call: Call, x: Elements, alpha: float = 1.0) -> Elements:
    return _elu(call, x, alpha, 1.0, 1.0 / alpha)


@_reads("leaky_relu")
def _leaky_relu(call: Call, x: Elements, slope: float = 0.01) -> Elements:
    g = call.graph
    return call.elementwise(lambda a: g.op("sel", g.op("gt", a, g.constant(0.0)), a, g.op("mul", a, g.constant(float(slope)))), x)


@_reads("gelu")
def _gelu(call: Call, x: Elements, *, approximate: str = "none") -> Elements:
    g = call.graph
    half, one = g.constant(0.5), g.constant(1.0)

    def exact(a: int) -> int:
        return g.op("mul", g.op("mul", a, half), g.op("add", one, g.op("erf", g.op("mul", a, g.constant(math.sqrt(0.5))))))

    def by_tanh(a: int) -> int:
        inner = g.op("add", a, g.op("mul", g.constant(0.044715), g.op("pow", a, g.constant(3.0))))
        return g.op("mul", g.op("mul", a, half), g.op("add", one, g.op("tanh", g.op("mul", g.constant(math.sqrt(2 / math.pi)), inner))))

    return call.elementwise(exact if approximate == "none" else by_tanh, x)


@_reads("hardtanh")
def _hardtanh(call: Call, x: Elements, min_val: float = -1.0, max_val: float = 1.0) -> Elements:
    """At a bound the derivative is zero, unlike that of clamp."""
    g, low, high = call.graph, call.graph.constant(float(min_val)), call.graph.constant(float(max_val))
    return call.elementwise(lambda a: g.op("sel", g.op("le", a, low), low, g.op("sel", g.op("ge", a, high), high, a)), x)


@_reads("hardswish")
def _hardswish(call: Call, x: Elements) -> Elements:
    g = call.graph
    zero, three, six = (g.constant(v) for v in (0.0, 3.0, 6.0))

    def element(a: int) -> int:
        within = g.op("div", g.op("mul", a, g.op("add", a, three)), six)
        return g.op("sel", g.op("le", a, g.constant(-3.0)), zero, g.op("sel", g.op("ge", a, three), a, within))

    return call.elementwise(element, x)


@_reads("hardsigmoid")
def _hardsigmoid(call: Call, x: Elements) -> Elements:
    g = call.graph
    zero, one, three = (g.constant(v) for v in (0.0, 1.0, 3.0))

    def element(a: int) -> int:
        within = g.op("div", g.op("add", a, three), g.constant(6.0))
        return g.op("sel", g.op("le", a, g.constant(-3.0)), zero, g.op("sel", g.op("ge", a, three), one, within))

    return call.elementwise(element, x)


@_reads("softshrink")
def _softshrink(call: Call, x: Elements, lambd: float = 0.5) -> Elements:
    g, width = call.graph, call.graph.constant(float(lambd))

    def element(a: int) -> int:
        above, below = g.op("sub", a, width), g.op("add", a, width)
        inside = g.op("mul", a, g.constant(0.0))  # NaN stays
        return g.op("sel", g.op("gt", a, width), above, g.op("sel", g.op("lt", a, g.op("neg", width)), below, g.op("stop", inside)))

    return call.elementwise(element, x)


@_reads("hardshrink")
def _hardshrink(call: Call, x: Elements, lambd: float = 0.5) -> Elements:
    g, width = call.graph, call.graph.constant(float(lambd))
    return call.elementwise(lambda a: g.op("sel", g.op("le", g.op("abs", a), width), g.constant(0.0), a), x)


@_reads("threshold")
def _threshold(call: Call, x: Elements, threshold: float, value: float) -> Elements:
    g = call.graph
    return call.elementwise(lambda a: g.op("sel", g.op("le", a, g.constant(float(threshold))), g.constant(float(value)), a), x)


@_reads("_prelu_kernel", "prelu")
def _prelu(call: Call, x: Elements, weight: Elements) -> Elements:
    g = call.graph
    return call.elementwise(lambda a, w: g.op("sel", g.op("gt", a, g.constant(0.0)), a, g.op("mul", a, w)), x, weight)


@_reads("glu")
def _glu(call: Call, x: Elements, dim: int = -1) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))
    half = x.shape[dim] // 2

    def get(place: Place) -> int:
        gate = x.at((*place[:dim], place[dim] + half, *place[dim + 1 :]))
        return g.op("mul", x.at(place), g.op("sigmoid", gate))

    return call.made(get)


def _along(x: Elements, place: Place, dim: int) -> list[int]:
    return [x.at((*place[:dim], q, *place[dim + 1 :])) for q in range(x.shape[dim])] if x.shape else [x.at(())]


def exponentials(g: Graph, nodes: Sequence[int]) -> tuple[int, list[int]]:
    """The largest of nodes, which no derivative goes through, and the exponentials of all less it."""
    most = g.op("stop", g.total("max", nodes))
    return most, [g.op("exp", g.op("sub", x, most)) for x in nodes]


@_reads("_softmax", "softmax", "_safe_softmax")
def _softmax(call: Call, x: Elements, dim: int, *_: object) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))

    def get(place: Place) -> int:
        most, powers = exponentials(g, _along(x, place, dim))
        return g.op("div", g.op("exp", g.op("sub", x.at(place), most)), g.total("add", powers))

    return call.made(get)


@_reads("_log_softmax", "log_softmax")
def _log_softmax(call: Call, x: Elements, dim: int, *_: object) -> Elements:
    g, dim = call.graph, numbered(dim, len(x.shape))

    def get(place: Place) -> int:
        most, powers = exponentials(g, _along(x, place, dim))
        return g.op("sub", g.op("sub", x.at(place), most), g.op("log", g.total("add", powers)))

    return call.made(get)
