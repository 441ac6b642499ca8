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
#: whether equal ones share the derivative, and have none at a bound that is a number: PyTorch from 2.14 on
_SHARED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_reads = registering(READERS)


def _unary(name: str) -> Reader:
    return lambda call, x, **_: call.elementwise(lambda a: call.graph.op(name, a), x)


def _binary(name: str) -> Reader:
    return lambda call, x, y, **_: call.elementwise(lambda a, b: call.graph.op(name, a, b), x, y)


READERS.update({name: _unary(name) for name in FUNCTIONS if name not in ("round", "softplus", "trigamma")})
READERS.update({"neg": _unary("neg"), "sgn": _unary("sign"), "special_expit": _unary("sigmoid"), "special_erfinv": _unary("erfinv")})
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
    """At a bound the derivative is one, or see `_SHARED`; NaN stays."""
    beyond = ("le", "ge") if _SHARED else ("lt", "gt")
    if _SHARED and isinstance(min, (Elements, torch.Tensor)):
        x = call.elementwise(lambda a, b: call.graph.op("max", a, b), x, min)
    elif min is not None:
        x = call.elementwise(lambda a, b: _bounded(call.graph, beyond[0], a, b), x, min)
    if _SHARED and isinstance(max, (Elements, torch.Tensor)):
        return call.elementwise(lambda a, b: call.graph.op("min", a, b), x, max)
    return x if max is None else call.elementwise(lambda a, b: _bounded(call.graph, beyond[1], a, b), x, max)


def _bounded(g: Graph, beyond: str, a: int, bound: int) -> int:
    if g.value(bound) is None:
        a = g.op("sel", g.op("ne", bound, bound), bound, a)
    return g.op("sel", g.op(beyond, a, bound), bound, a)


READERS["clamp_min"] = lambda call, x, min: _clamp(call, x, min)
READERS["clamp_max"] = lambda call, x, max: _clamp(call, x, None, max)


@_reads("conj_physical", "_conj", "resolve_conj", "resolve_neg", "positive")
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


@_reads("fill")
def _fill(call: Call, x: Elements, value: Any) -> Elements:
    getter = Call(call.graph, call.tables, ((),), call.dtypes).operand(value)
    return call.made(lambda place: getter(()))


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


@_each("fmax")
def _fmax(g: Graph, a: int, b: int) -> int:
    """The greater one, or the one which is a number; equal ones: the first has the derivative, or see `_SHARED`."""
    return _of_numbers(g, "max", a, b) if _SHARED else g.op("sel", g.op("or", g.op("ge", a, b), g.op("ne", b, b)), a, b)


@_each("fmin")
def _fmin(g: Graph, a: int, b: int) -> int:
    return _of_numbers(g, "min", a, b) if _SHARED else g.op("sel", g.op("or", g.op("le", a, b), g.op("ne", b, b)), a, b)


def _of_numbers(g: Graph, which: str, a: int, b: int) -> int:
    return g.op("sel", g.op("ne", b, b), a, g.op("sel", g.op("ne", a, a), b, g.op(which, a, b)))


@_each("copysign")
def _copysign(g: Graph, a: int, b: int) -> int:
    size, negative = g.op("abs", a), g.op("lt", g.op("atan2", b, g.constant(-1.0)), g.constant(0.0))
    return g.op("sel", negative, g.op("neg", size), size)


@_each("signbit")
def _signbit(g: Graph, a: int) -> int:
    # the angle of (-1, -0.0) is -pi
    return g.op("lt", g.op("atan2", a, g.constant(-1.0)), g.constant(0.0))


@_each("heaviside")
def _heaviside(g: Graph, a: int, b: int) -> int:
    zero = g.constant(0.0)
    return g.op("sel", g.op("eq", a, zero), b, g.as_float(g.op("gt", a, zero)))


@_each("xlogy", "special_xlogy")
def _xlogy(g: Graph, a: int, b: int) -> int:
    return _times_logarithm(g, a, b, b, g.op("log", b))


@_each("special_xlog1py")
def _xlog1py(g: Graph, a: int, b: int) -> int:
    return _times_logarithm(g, a, b, g.op("add", b, g.constant(1.0)), g.op("log1p", b))


def _times_logarithm(g: Graph, a: int, b: int, of: int, logarithm: int) -> int:
    """Zero for ``a = 0``, whatever the logarithm is of, unless it is of NaN. The slope in ``a`` is the logarithm, but zero there where that
    is no number, and the one in ``b`` is ``a / of``: none at 0 / 0."""
    zero = g.constant(0.0)
    nothing = g.op("eq", a, zero)
    value = g.op("sel", g.op("and", nothing, g.op("eq", b, b)), zero, g.op("mul", a, logarithm))
    slope = g.op("sel", g.op("and", nothing, g.op("le", of, zero)), zero, logarithm)
    return g.given(value, ((a, slope), (b, g.op("div", a, of))))


@_each("special_entr")
def _entr(g: Graph, a: int) -> int:
    zero, logarithm = g.constant(0.0), g.op("log", a)
    inside = g.op("neg", g.op("mul", a, logarithm))
    outside = g.op("sel", g.op("lt", a, zero), g.constant(-math.inf), a)
    value = g.op("sel", g.op("gt", a, zero), inside, g.op("sel", g.op("eq", a, zero), zero, outside))
    return g.given(value, ((a, g.op("neg", g.op("add", logarithm, g.constant(1.0)))),))


@_each("sinc")
def _sinc(g: Graph, a: int) -> int:
    none, one, pi = g.op("eq", a, g.constant(0.0)), g.constant(1.0), g.constant(math.pi)
    angle = g.op("mul", g.op("sel", none, one, a), pi)
    return g.op("sel", none, one, g.op("div", g.op("sin", angle), angle))


@_each("logaddexp")
def _logaddexp(g: Graph, a: int, b: int) -> int:
    return _logarithm_of_sum(g, a, b, "exp", lambda x: g.op("log1p", g.op("exp", x)))


@_each("logaddexp2")
def _logaddexp2(g: Graph, a: int, b: int) -> int:
    scale = g.constant(1 / math.log(2))
    return _logarithm_of_sum(g, a, b, "exp2", lambda x: g.op("mul", g.op("log1p", g.op("exp2", x)), scale))


def _logarithm_of_sum(g: Graph, a: int, b: int, power: str, rest: Callable[[int], int]) -> int:
    """The greater one and a rest; infinities that are equal stay. Derivatives are the shares of either in the sum."""
    low, high = g.op("min", a, b), g.op("max", a, b)
    infinite = g.op("and", g.op("eq", a, b), g.op("eq", g.op("abs", a), g.constant(math.inf)))
    value = g.op("sel", infinite, a, g.op("add", high, rest(g.op("sub", low, high))))
    one = g.constant(1.0)
    shares = [g.op("div", one, g.op("add", one, g.op(power, g.op("sub", other, x)))) for x, other in ((a, b), (b, a))]
    return g.given(value, zip((a, b), shares, strict=True))


@_reads("nan_to_num")
def _nan_to_num(call: Call, x: Elements, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Elements:
    g, most = call.graph, torch.finfo(call.dtype).max if call.dtype.is_floating_point else 0
    if not most:
        return call.made(x.at)
    replaced = ((math.inf, most if posinf is None else posinf), (-math.inf, -most if neginf is None else neginf))

    def element(a: int) -> int:
        out = g.op("sel", g.op("ne", a, a), g.constant(float(nan or 0.0)), a)
        for what, by in replaced:
            out = g.op("sel", g.op("eq", a, g.constant(what)), g.constant(float(by)), out)
        return out

    return call.elementwise(element, x)


@_reads("logit", "special_logit")
def _logit(call: Call, x: Elements, eps: float | None = None) -> Elements:
    g, one = call.graph, call.graph.constant(1.0)
    if eps is not None:
        x = _clamp(call, x, eps, 1 - eps)
    return call.elementwise(lambda a: g.op("log", g.op("div", a, g.op("sub", one, a))), x)


@_reads("polygamma")
def _polygamma(call: Call, n: int, x: Elements) -> Elements:
    if n > 1:
        raise Refused("polygamma above the first")
    return call.elementwise(lambda a: call.graph.op("trigamma" if n else "digamma", a), x)


@_reads("ldexp")
def _ldexp(call: Call, x: Elements, power: Any) -> Elements:
    g = call.graph
    return call.elementwise(lambda a, n: g.op("mul", a, g.op("pow", g.constant(2.0), n)), x, power)


@_reads("deg2rad")
def _deg2rad(call: Call, x: Elements) -> Elements:
    return call.elementwise(lambda a: call.graph.op("mul", a, call.graph.constant(math.pi / 180)), x)


@_reads("rad2deg")
def _rad2deg(call: Call, x: Elements) -> Elements:
    return call.elementwise(lambda a: call.graph.op("mul", a, call.graph.constant(180 / math.pi)), x)
