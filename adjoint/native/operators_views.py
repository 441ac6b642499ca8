"""Readers of operators that only move elements about, and of those that make constants of a shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .elements import Call, Elements, Place, Reader, Refused, numbered, registering
from .rows import Index, flat, same, strides, unflat

__all__ = ["READERS"]

READERS: dict[str, Reader] = {}
_reads = registering(READERS)


@_reads("view", "_unsafe_view", "reshape", "_reshape_alias", "view_copy", "flatten", "unflatten")
def _view(call: Call, x: Elements, size: Any, *_: Any) -> Elements:
    if x.dtype != call.dtype:
        raise Refused("bits taken for those of another type")
    outer, inner = strides(call.shape), strides(x.shape)
    return call.made(lambda place: x.at(unflat(flat(place, outer), inner)))


@_reads("permute", "permute_copy")
def _permute(call: Call, x: Elements, dims: Sequence[int]) -> Elements:
    rank = len(dims)
    back = [0] * rank
    for new, old in enumerate(dims):
        back[numbered(old, rank)] = new
    return call.made(lambda place: x.at(tuple([place[n] for n in back])))


@_reads("t", "t_copy")
def _t(call: Call, x: Elements) -> Elements:
    return call.made(lambda place: x.at(place[::-1]))


@_reads("transpose", "transpose_copy")
def _transpose(call: Call, x: Elements, dim0: int, dim1: int) -> Elements:
    rank = len(call.shape)
    dims = list(range(rank))
    if rank:
        i, j = numbered(dim0, rank), numbered(dim1, rank)
        dims[i], dims[j] = dims[j], dims[i]
    return _permute(call, x, dims)  # type: ignore[return-value]


@_reads("unsqueeze", "unsqueeze_copy")
def _unsqueeze(call: Call, x: Elements, dim: int) -> Elements:
    dim = numbered(dim, len(call.shape))
    return call.made(lambda place: x.at(place[:dim] + place[dim + 1 :]))


@_reads("squeeze", "squeeze_copy")
def _squeeze(call: Call, x: Elements, dim: int | Sequence[int] | None = None) -> Elements:
    rank = len(x.shape)
    asked = range(rank) if dim is None else [numbered(d, rank) for d in ([dim] if isinstance(dim, int) else dim)]
    gone = {d for d in asked if rank and x.shape[d] == 1}

    def get(place: Place) -> int:
        left = iter(place)
        return x.at(tuple([0 if d in gone else next(left) for d in range(rank)]))

    return call.made(get)


@_reads("expand", "expand_copy")
def _expand(call: Call, x: Elements, size: Sequence[int], **_: Any) -> Elements:
    return call.made(x.spread)


@_reads("slice", "slice_copy")
def _slice(call: Call, x: Elements, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Elements:
    dim = numbered(dim, len(x.shape))
    first = slice(start, end, step).indices(x.shape[dim])[0]
    return call.made(lambda place: x.at((*place[:dim], place[dim] * step + first, *place[dim + 1 :])))


@_reads("select", "select_copy")
def _select(call: Call, x: Elements, dim: int, index: int) -> Elements:
    dim = numbered(dim, len(x.shape))
    index %= x.shape[dim]
    return call.made(lambda place: x.at((*place[:dim], index, *place[dim:])))


@_reads("cat", "concat", "concatenate")
def _cat(call: Call, tensors: Sequence[Elements], dim: int = 0) -> Elements:
    dim = numbered(dim, len(call.shape))
    parts = [x for x in tensors if x.shape != (0,)]

    def get(place: Place) -> int:
        i = place[dim]
        for x in parts:
            if i < x.shape[dim]:
                return _typed(call, x.at((*place[:dim], i, *place[dim + 1 :])))
            i = i - x.shape[dim]
        raise AssertionError(place)

    return call.made(get)


def _typed(call: Call, node: int) -> int:
    return call.graph.as_float(node) if call.dtype.is_floating_point else node


@_reads("stack")
def _stack(call: Call, tensors: Sequence[Elements], dim: int = 0) -> Elements:
    dim = numbered(dim, len(call.shape))
    return call.made(lambda place: _typed(call, tensors[place[dim]].at((*place[:dim], *place[dim + 1 :]))))  # type: ignore[index]


@_reads("split", "split_with_sizes", "split_copy", "split_with_sizes_copy", "chunk", "tensor_split")
def _split(call: Call, x: Elements, sizes: Any, dim: int = 0) -> list[Elements]:
    dim = numbered(dim, len(x.shape))
    parts, start = [], 0
    for which, shape in enumerate(call.shapes):
        parts.append(call.made(lambda place, s=start: x.at((*place[:dim], place[dim] + s, *place[dim + 1 :])), which))
        start += shape[dim]
    return parts


@_reads("unbind", "unbind_copy")
def _unbind(call: Call, x: Elements, dim: int = 0) -> list[Elements]:
    dim = numbered(dim, len(x.shape))
    return [call.made(lambda place, i=which: x.at((*place[:dim], i, *place[dim:])), which) for which in range(len(call.shapes))]


@_reads("flip")
def _flip(call: Call, x: Elements, dims: Sequence[int]) -> Elements:
    turned = {numbered(d, len(x.shape)) for d in dims}
    return call.made(lambda place: x.at(tuple([x.shape[d] - 1 - i if d in turned else i for d, i in enumerate(place)])))


@_reads("roll")
def _roll(call: Call, x: Elements, shifts: int | Sequence[int], dims: int | Sequence[int] = ()) -> Elements:
    shifts, dims = ([q] if isinstance(q, int) else list(q) for q in (shifts, dims))
    if not dims:
        steps, size = strides(x.shape), max(1, _numel(x.shape))
        return call.made(lambda place: x.at(unflat(_rolled(flat(place, steps), shifts[0], size), steps)))
    by = dict.fromkeys(range(len(x.shape)), 0)
    for shift, d in zip(shifts, dims, strict=True):
        by[numbered(d, len(x.shape))] += shift
    return call.made(lambda place: x.at(tuple([_rolled(i, by[d], x.shape[d]) for d, i in enumerate(place)])))


def _rolled(i: Index, by: int, size: int) -> Index:
    return (i - by) % size if by % size else i


def _numel(shape: Sequence[int]) -> int:
    return strides((1, *shape))[0]


@_reads("constant_pad_nd")
def _constant_pad(call: Call, x: Elements, pad: Sequence[int], value: float = 0) -> Elements:
    rank = len(x.shape)
    before = [0] * rank
    for n in range(len(pad) // 2):
        before[rank - 1 - n] = pad[2 * n]
    fill = call.graph.constant(float(value) if call.dtype.is_floating_point else value)

    def get(place: Place) -> int:
        inner = tuple([i - b for i, b in zip(place, before, strict=True)])
        return x.at(inner) if all(i >= 0 and i < size for i, size in zip(inner, x.shape, strict=True)) else fill

    return call.made(get)


def _padded(inner: Callable[[int, int], int]) -> Reader:
    """Padding that takes elements from within."""

    def reader(call: Call, x: Elements, padding: Sequence[int]) -> Elements:
        rank = len(x.shape)
        before = {rank - 1 - n: padding[2 * n] for n in range(len(padding) // 2)}

        def get(place: Place) -> int:
            found = []
            for d, i in enumerate(place):
                if d in before and not isinstance(i, int):
                    raise Refused("rows of the batch are padded")
                found.append(inner(i - before[d], x.shape[d]) if d in before else i)  # type: ignore[arg-type]
            return x.at(tuple(found))

        return call.made(get)

    return reader


def _reflected(i: int, size: int) -> int:
    i = abs(i)
    return i if i < size else 2 * (size - 1) - i


for _n in (1, 2, 3):
    READERS[f"reflection_pad{_n}d"] = _padded(_reflected)
    READERS[f"replication_pad{_n}d"] = _padded(lambda i, size: min(max(i, 0), size - 1))


@_reads("select_scatter")
def _select_scatter(call: Call, x: Elements, source: Elements, dim: int, index: int) -> Elements:
    dim = numbered(dim, len(x.shape))
    index %= x.shape[dim]
    return call.made(lambda place: source.at((*place[:dim], *place[dim + 1 :])) if same(place[dim], index) else x.at(place))


@_reads("slice_scatter")
def _slice_scatter(
    call: Call, x: Elements, source: Elements, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Elements:
    dim = numbered(dim, len(x.shape))
    first, stop, _ = slice(start, end, step).indices(x.shape[dim])

    def get(place: Place) -> int:
        i = place[dim]
        if i >= first and i < stop and same((i - first) % step, 0):
            return source.at((*place[:dim], (i - first) // step, *place[dim + 1 :]))
        return x.at(place)

    return call.made(get)


@_reads("full_like", "new_full", "full", "scalar_tensor")
def _full(call: Call, *args: Any, fill_value: Any = None, **_: Any) -> Elements:
    value = args[-1] if fill_value is None else fill_value
    if isinstance(value, complex):
        raise Refused("complex numbers")
    getter = call.operand(value)
    return call.made(lambda place: getter(place))


def _filled(value: int) -> Reader:
    return lambda call, *_, **__: call.made(lambda place: call.graph.constant(float(value) if call.dtype.is_floating_point else value))


READERS.update(
    dict.fromkeys(("zeros_like", "zeros", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided", "empty_permuted"), _filled(0))
)
READERS.update(dict.fromkeys(("ones_like", "ones", "new_ones"), _filled(1)))


@_reads("diagonal", "diagonal_copy")
def _diagonal(call: Call, x: Elements, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Elements:
    rank = len(x.shape)
    first, second = numbered(dim1, rank), numbered(dim2, rank)
    down, right = max(-offset, 0), max(offset, 0)

    def get(place: Place) -> int:
        left = iter(place[:-1])
        return x.at(tuple([place[-1] + down if d == first else place[-1] + right if d == second else next(left) for d in range(rank)]))

    return call.made(get)


@_reads("diagonal_scatter")
def _diagonal_scatter(call: Call, x: Elements, source: Elements, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Elements:
    rank = len(x.shape)
    first, second = numbered(dim1, rank), numbered(dim2, rank)
    down, right = max(-offset, 0), max(offset, 0)

    def get(place: Place) -> int:
        on = place[first] - down
        if not isinstance(on, int) or not isinstance(place[second], int):
            raise Refused("a diagonal along the rows of the batch is written")
        if on >= 0 and place[second] - right == on:
            return source.at((*[i for d, i in enumerate(place) if d not in (first, second)], on))
        return x.at(place)

    return call.made(get)


@_reads("diag_embed")
def _diag_embed(call: Call, x: Elements, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Elements:
    rank = len(call.shape)
    first, second = numbered(dim1, rank), numbered(dim2, rank)
    down, right = max(-offset, 0), max(offset, 0)
    zero = call.graph.constant(0.0 if call.dtype.is_floating_point else 0)

    def get(place: Place) -> int:
        on = place[first] - down
        if not isinstance(on, int) or not isinstance(place[second], int):
            raise Refused("a diagonal along the rows of the batch is made")
        if on < 0 or place[second] - right != on:
            return zero
        return x.at((*[i for d, i in enumerate(place) if d not in (first, second)], on))

    return call.made(get)


@_reads("tril")
def _tril(call: Call, x: Elements, diagonal: int = 0) -> Elements:
    return _triangle(call, x, lambda i, j: j - i <= diagonal)


@_reads("triu")
def _triu(call: Call, x: Elements, diagonal: int = 0) -> Elements:
    return _triangle(call, x, lambda i, j: j - i >= diagonal)


def _triangle(call: Call, x: Elements, inside: Callable[[Index, Index], bool]) -> Elements:
    zero = call.graph.constant(0.0 if call.dtype.is_floating_point else 0)
    return call.made(lambda place: x.at(place) if inside(place[-2], place[-1]) else zero)


@_reads("unfold", "unfold_copy")
def _unfold(call: Call, x: Elements, dimension: int, size: int, step: int) -> Elements:
    dim = numbered(dimension, len(x.shape))
    return call.made(lambda place: x.at((*place[:dim], place[dim] * step + place[-1], *place[dim + 1 : -1])))


@_reads("repeat")
def _repeat(call: Call, x: Elements, repeats: Sequence[int]) -> Elements:
    times = repeats[len(repeats) - len(x.shape) :]

    def get(place: Place) -> int:
        inner = place[len(place) - len(x.shape) :]
        return x.at(tuple([i if n == 1 else i % size for i, size, n in zip(inner, x.shape, times, strict=True)]))

    return call.made(get)
