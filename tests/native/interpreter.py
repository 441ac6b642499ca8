"""Scalar expressions computed by PyTorch, number by number."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from adjoint.native.expressions import Graph
from adjoint.native.reading import Reading

_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "neg": torch.neg, "pow": torch.pow,
    "max": torch.maximum, "min": torch.minimum, "fmod": torch.fmod, "remainder": torch.remainder, "floordiv": torch.floor_divide,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not, "sel": torch.where, "stop": operator.pos,
    "toint": lambda x: x.long(), "trigamma": lambda x: torch.polygamma(1, x), "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}  # fmt: skip


def evaluated(graph: Graph, nodes: Sequence[int], leaf: Callable[[tuple], Tensor], array: Callable[[tuple], Tensor]) -> list[Tensor]:
    """Values of nodes, from those of leaves (by their data) and of arrays (by kind and number)."""
    known: dict[int, Tensor] = {}
    waiting = list(nodes)
    needed: set[int] = set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += graph.arguments[node]
    like = leaf(("like",))
    for node in sorted(needed):
        name, data = graph.names[node], graph.data[node]
        arguments = [known[x] for x in graph.arguments[node]]
        if name == "constant":
            dtype = {"float": like.dtype, "int": torch.int64, "bool": torch.bool}[graph.types[node]]
            known[node] = torch.tensor(data[0], dtype=dtype)
        elif name == "leaf":
            known[node] = leaf(data)
        elif name == "look":
            kind, k, base, step, count = data
            i = int(arguments[0])
            known[node] = array((kind, k))[base + step * i] if 0 <= i < count else torch.tensor(torch.nan, dtype=like.dtype)
        elif name == "search":
            kind, k, base, count, right = data
            known[node] = torch.searchsorted(array((kind, k))[base : base + count].contiguous(), arguments[0], right=right)
        elif name == "tofloat":
            known[node] = arguments[0].to(like.dtype)
        else:
            known[node] = (_OPERATIONS.get(name) or getattr(torch, name))(*arguments)
    return [known[node] for node in nodes]


def value_of_row(
    reading: Reading,
    nodes: Sequence[int],
    row: int,
    t: Tensor,
    y: Tensor,
    inputs: Sequence[Tensor],
    others: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Nodes of one trajectory: ``t`` () or (B,), ``y`` (B, m); ``others``: leaves of other kinds, by their last index."""
    flat = [x.reshape(-1) for x in inputs]

    def array(data: tuple) -> Tensor:
        kind, k = data
        return reading.tables[k] if kind == "k" else flat[k][reading.strides[k] * row :]

    def leaf(data: tuple) -> Tensor:
        match data:
            case ("like",):
                return y
            case ("t",):
                return (t if t.dim() == 0 else t[row]).to(y.dtype)
            case ("y", i):
                return y.reshape(y.shape[0], -1)[row, i]
            case ("a" | "k", _, j):
                return array(data[:2])[j].to(y.dtype)
        assert others is not None
        return others[data[0]][data[-1]]

    return torch.stack([x.to(y.dtype) for x in evaluated(reading.graph, nodes, leaf, array)])
