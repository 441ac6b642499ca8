"""Readers of operators that act element by element. Derivatives at kinks are those of ATen, whose rules say on which side a tie falls."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from .elements import Call, Elements, Reader, Refused, registering
from .expressions import FUNCTIONS, Graph

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)


def _unary(name: str) -> Reader:
    return lambda call, x, **_: call.elementwise(lambda a: call.graph.op(name, a), x)


def _binary(name: str) -> Reader:
    return lambda call, x, y, **_: call.elementwise(lambda a, b: call.graph.op(name, a, b), x, y)


READERS.update({name: _unary(name) for name in FUNCTIONS if name not in ("round", "softplus", "trigamma")})
READERS.update({"neg": _unary("neg"), "special_expit": _unary("sigmoid"), "special_erfinv": _unary("erfinv")})
READERS.update({name: _binary(name) for name in ("atan2", "hypot", "lt", "le", "gt", "ge", "eq", "ne")})
READERS.update({"maximum": _binary("max"), "minimum": _binary("min")})


def _each(*names: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """A reader from a function of a graph and the elements at a place."""

    def put(function: Callable[..., int]) -> Callable[..., int]:
        def reader(call: Call, *operands: Any, **_: Any) -> Elements:
            return call.elementwise(lambda *nodes: function(call.graph, *nodes), *operands)

        READERS.update(dict.fromkeys(names, reader))
        return function

    return put


@_reads("add", "sub", "rsub")
def _sum(call: Call, x: Any, y: Any, alpha: float = 1, *, sign: str = "add") -> Elements:
    g = call.graph
    if call.dtype == torch.bool:
        return call.elementwise(lambda a, b: g.op("or", a, b), x, y)
    return call.elementwise(lambda a, b: g.op(sign, a, b if alpha == 1 else g.op("mul", b, g.constant(alpha))), x, y)


READERS["sub"] = lambda call, x, y, alpha=1: _sum(call, x, y, alpha, sign="sub")
READERS["rsub"] = lambda call, x, y, alpha=1: call.elementwise(
    lambda a, b: call.graph.op("sub", b, a if alpha == 1 else call.graph.op("mul", a, call.graph.constant(alpha))), x, y
)


@_reads("mul")
def _mul(call: Call, x: Any, y: Any) -> Elements:
    name = "and" if call.dtype == torch.bool else "mul"
    return call.elementwise(lambda a, b: call.graph.op(name, a, b), x, y)


@_reads("div")
def _div(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Elements:
    g = call.graph
    if rounding_mode == "floor":
        return _divided(call, "floordiv", x, y)
    if rounding_mode == "trunc":
        if not call.dtype.is_floating_point:
            raise Refused("integers divided towards zero")
        return call.elementwise(lambda a, b: g.op("trunc", g.op("div", a, b)), x, y)
    return call.elementwise(lambda a, b: g.op("div", a, b), x, y)


def _divided(call: Call, name: str, x: Any, y: Any) -> Elements:
    g = call.graph

    def element(a: int, b: int) -> int:
        if g.types[a] != "float" and g.types[b] != "float" and not g.value(b):
            raise Refused("integers divided by what may be zero")
        return g.op(name, a, b)

    return call.elementwise(element, x, y)


READERS["floor_divide"] = lambda call, x, y: _divided(call, "floordiv", x, y)
READERS["fmod"] = lambda call, x, y: _divided(call, "fmod", x, y)
READERS["remainder"] = lambda call, x, y: _divided(call, "remainder", x, y)


@_reads("pow", "float_power")
def _pow(call: Call, x: Any, y: Any) -> Elements:
    if not call.dtype.is_floating_point:
        raise Refused("powers of integers")
    return call.elementwise(lambda a, b: call.graph.op("pow", a, b), x, y)


@_reads("round")
def _round(call: Call, x: Elements, *, decimals: int = 0) -> Elements:
    g, scale = call.graph, call.graph.constant(10.0**decimals)
    if not decimals:
        return call.elementwise(lambda a: g.op("round", a), x)
    return call.elementwise(lambda a: g.op("div", g.op("round", g.op("mul", a, scale)), scale), x)


@_reads("logical_and", "bitwise_and")
def _and(call: Call, x: Any, y: Any) -> Elements:
    return _logic(call, "and", x, y)


@_reads("logical_or", "bitwise_or")
def _or(call: Call, x: Any, y: Any) -> Elements:
    return _logic(call, "or", x, y)


@_reads("logical_xor", "bitwise_xor")
def _xor(call: Call, x: Any, y: Any) -> Elements:
    g = call.graph
    if call.dtype != torch.bool:
        raise Refused("bits of integers")
    return call.elementwise(lambda a, b: g.op("ne", g.as_bool(a), g.as_bool(b)), x, y)


@_reads("logical_not", "bitwise_not")
def _not(call: Call, x: Any) -> Elements:
    return _logic(call, "not", x)


def _logic(call: Call, name: str, *operands: Any) -> Elements:
    if call.dtype != torch.bool:
        raise Refused("bits of integers")
    return call.elementwise(lambda *nodes: call.graph.op(name, *nodes), *operands)


@_each("reciprocal")
def _reciprocal(g: Graph, a: int) -> int:
    return g.op("div", g.constant(1.0), a)


@_each("rsqrt")
def _rsqrt(g: Graph, a: int) -> int:
    return g.op("div", g.constant(1.0), g.op("sqrt", a))


@_each("square")
def _square(g: Graph, a: int) -> int:
    return g.op("mul", a, a)


@_each("relu")
def _relu(g: Graph, a: int) -> int:
    return g.op("sel", g.op("le", a, g.constant(0.0)), g.constant(0.0), a)


@_each("frac")
def _frac(g: Graph, a: int) -> int:
    return g.op("sub", a, g.op("trunc", a))


@_each("isnan")
def _isnan(g: Graph, a: int) -> int:
    return g.op("ne", a, a)


@_each("isinf")
def _isinf(g: Graph, a: int) -> int:
    return g.op("eq", g.op("abs", a), g.constant(math.inf))


@_each("isfinite")
def _isfinite(g: Graph, a: int) -> int:
    return g.op("lt", g.op("abs", a), g.constant(math.inf))


@_each("isposinf")
def _isposinf(g: Graph, a: int) -> int:
    return g.op("eq", a, g.constant(math.inf))


@_each("isneginf")
def _isneginf(g: Graph, a: int) -> int:
    return g.op("eq", a, g.constant(-math.inf))


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
        negative = g.op("mul", g.op("expm1", g.op("mul", a, inner)), below)
        return g.op("sel", g.op("le", a, g.constant(0.0)), negative, g.op("mul", a, above))

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


@_reads("where")
def _where(call: Call, condition: Any, x: Any = None, y: Any = None) -> Elements:
    if x is None:
        raise Refused("how many elements it gives depends on values: use the form of three arguments")
    g, (mask, first, second) = call.graph, (call.operand(q) for q in (condition, x, y))

    def get(place: Any) -> int:
        # what a constant condition does not take is not read: it may be an element that there is none of in this row
        chosen = g.value(mask(place))
        if chosen is not None:
            node = first(place) if chosen else second(place)
            return g.as_float(node) if call.dtype.is_floating_point else node
        return g.op("sel", mask(place), first(place), second(place))

    return call.made(get)


@_reads("masked_fill")
def _masked_fill(call: Call, x: Any, mask: Any, value: Any) -> Elements:
    return _where(call, mask, value, x)


@_reads("clamp")
def _clamp(call: Call, x: Any, min: Any = None, max: Any = None) -> Elements:
    """At a bound the derivative is one; NaN stays."""
    if min is not None:
        x = call.elementwise(lambda a, b: _bounded(call.graph, "lt", a, b), x, min)
    return x if max is None else call.elementwise(lambda a, b: _bounded(call.graph, "gt", a, b), x, max)


def _bounded(g: Graph, beyond: str, a: int, bound: int) -> int:
    if g.value(bound) is None:
        a = g.op("sel", g.op("ne", bound, bound), bound, a)
    return g.op("sel", g.op(beyond, a, bound), bound, a)


READERS["clamp_min"] = lambda call, x, min: _clamp(call, x, min)
READERS["clamp_max"] = lambda call, x, max: _clamp(call, x, None, max)


@_reads("hardtanh")
def _hardtanh(call: Call, x: Elements, min_val: float = -1.0, max_val: float = 1.0) -> Elements:
    """At a bound the derivative is zero, unlike that of clamp."""
    g, low, high = call.graph, call.graph.constant(float(min_val)), call.graph.constant(float(max_val))
    return call.elementwise(lambda a: g.op("sel", g.op("le", a, low), low, g.op("sel", g.op("ge", a, high), high, a)), x)


@_reads("clone", "alias", "detach", "contiguous", "lift_fresh_copy", "lift_fresh", "_to_copy", "to", "view_copy_", "type_as")
def _copied(call: Call, x: Elements, *_: Any, **__: Any) -> Elements:
    g = call.graph
    if x.dtype == call.dtype:
        return call.made(x.at)
    if call.dtype.is_floating_point:
        return call.made(lambda place: g.as_float(x.at(place)))
    if call.dtype == torch.bool:
        return call.made(lambda place: g.as_bool(x.at(place)))
    if call.dtype.is_complex:
        raise Refused("complex numbers")
    return call.made(lambda place: g.as_int(x.at(place)))


@_reads("copy")
def _copy(call: Call, x: Elements, source: Elements, *_: Any) -> Elements:
    return _copied(call, call.elementwise(lambda a: a, source))


@_reads("lerp")
def _lerp(call: Call, x: Any, y: Any, weight: Any) -> Elements:
    g = call.graph
    return call.elementwise(lambda a, b, w: g.op("add", a, g.op("mul", w, g.op("sub", b, a))), x, y, weight)


@_reads("addcmul")
def _addcmul(call: Call, x: Any, a: Any, b: Any, *, value: float = 1) -> Elements:
    g = call.graph
    return call.elementwise(lambda p, q, r: g.op("add", p, g.op("mul", g.op("mul", g.constant(float(value)), q), r)), x, a, b)


@_reads("addcdiv")
def _addcdiv(call: Call, x: Any, a: Any, b: Any, *, value: float = 1) -> Elements:
    g = call.graph
    return call.elementwise(lambda p, q, r: g.op("add", p, g.op("mul", g.constant(float(value)), g.op("div", q, r))), x, a, b)
