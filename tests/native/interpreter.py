"""Scalar expressions computed by PyTorch, all trajectories at once."""

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
    "and": torch.logical_and, "or": torch.logical_or, "not": torch.logical_not, "sel": torch.where,
    "stop": operator.pos, "single": lambda x: x.float().to(x.dtype), "given": operator.pos,
    "toint": lambda x: x.long(), "trigamma": lambda x: torch.polygamma(1, x),
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}  # fmt: skip


def evaluated(
    graph: Graph, nodes: Sequence[int], dtype: torch.dtype, leaf: Callable[[tuple], Tensor], array: Callable[[tuple], Tensor]
) -> list[Tensor]:
    """Values of nodes, from those of leaves (by their data), and of arrays (by kind and number) with trajectories in front."""
    known: dict[int, Tensor] = {}
    waiting, needed = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += graph.parts(node)
    for node in sorted(needed):
        name, data = graph.names[node], graph.data[node]
        parts = [known[x] for x in graph.parts(node)]
        if name == "constant":
            known[node] = torch.tensor(data[0], dtype={"float": dtype, "int": torch.int64, "bool": torch.bool}[graph.types[node]])
        elif name == "leaf":
            known[node] = leaf(data)
        elif name == "look":
            kind, k, base, step, count = data
            rows, i = torch.broadcast_tensors(array((kind, k)), parts[0].reshape(-1, 1))[0], parts[0].reshape(-1, 1)
            found = rows.gather(1, (base + step * i.clamp(0, count - 1)).expand(len(rows), 1))
            known[node] = torch.where((i >= 0) & (i < count), found, torch.nan)[:, 0]
        elif name == "search":
            kind, k, base, count, right = data
            rows = array((kind, k))[:, base : base + count]
            values = parts[0].reshape(-1, 1).expand(max(len(rows), parts[0].numel()), 1)
            known[node] = torch.searchsorted(rows.expand(len(values), -1).contiguous(), values.contiguous(), right=right)[:, 0]
        elif name == "pow" and (exponent := graph.value(graph.arguments[node][1])) is not None:
            known[node] = parts[0] ** float(exponent)
        elif name == "tofloat":
            known[node] = parts[0].to(dtype)
        else:
            known[node] = (_OPERATIONS.get(name) or getattr(torch, name))(*parts)
    return [known[node] for node in nodes]


def values(
    reading: Reading, nodes: Sequence[int], t: Tensor, y: Tensor, inputs: Sequence[Tensor], others: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Nodes of all trajectories, (B, nodes): ``t`` () or (B,), ``y`` (B, m); ``others``: leaves of other kinds, by their last index."""
    rows = y.shape[0]

    def array(data: tuple) -> Tensor:
        kind, k = data
        if kind == "k":
            return reading.tables[k][None]
        return inputs[k].reshape(rows if reading.strides[k] else 1, -1).to(y.dtype)

    def leaf(data: tuple) -> Tensor:
        match data:
            case ("t",):
                return t.to(y.dtype)
            case ("y", i):
                return y.reshape(rows, -1)[:, i]
            case ("a" | "k", _, j):
                return array(data[:2])[:, j]
        assert others is not None
        return others[data[0]][..., data[-1]]

    found = evaluated(reading.graph, nodes, y.dtype, leaf, array)
    return torch.stack([x.to(y.dtype).expand(rows) for x in found], -1)
