"""A pass for the compiler: narrow matrices are computed column by column.

The state of a large ensemble has few components and many rows. A compiler that vectorises the innermost dimension finds a loop of length
two there, and every ``stack`` of a right-hand side forces its result through memory. Taken apart into columns, the whole step is one
vectorised loop over the rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

__all__ = ["NARROW", "column_major", "column_pass", "layout", "new_node", "takes_columns", "widened"]

#: widest state that is taken apart
NARROW = 8
#: widest one beside which what belongs to a row is spread out, see `widened`
NARROWEST = 4

aten = torch.ops.aten
_SAME = (aten.clone.default, aten.alias.default, aten.detach.default)
_TURN = (aten.permute.default, aten.t.default, aten.transpose.int)


def _value(x: Any) -> Any:
    return x.meta.get("val") if isinstance(x, Node) else x


def new_node(graph: Graph, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """A call in the graph, with the shape of its result."""
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
    return node


class _Rewrite:
    """One run of the pass: ``columns[node]`` are the columns of a narrow matrix, as nodes of shape ``(rows,)``.

    ``fewest``: rows that a narrow matrix has at least.
    """

    def __init__(self, graph: Graph, fewest: int) -> None:
        self.graph, self.fewest = graph, fewest
        self.columns: dict[Node, list[Node]] = {}
        #: results of ``unbind``
        self.unbound: dict[Node, list[Node]] = {}

    def narrow_axis(self, x: Any) -> int | None:
        """Which axis of a matrix counts its columns; None for anything but a narrow matrix."""
        value = _value(x)
        if not isinstance(value, Tensor) or value.dim() != 2:
            return None
        rows, columns = value.shape
        if not isinstance(rows, int) or not isinstance(columns, int):
            return None
        if 1 <= columns <= NARROW and rows >= self.fewest:
            return 1
        return 0 if 1 <= rows <= NARROW and columns >= max(self.fewest, 16 * NARROW) else None

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        return new_node(self.graph, target, *args, **kwargs)

    def of(self, x: Node, axis: int) -> list[Node]:
        """The columns of a narrow matrix, read from it if they are not known."""
        if x not in self.columns:
            self.columns[x] = [self.call(aten.select.int, x, axis, i) for i in range(_value(x).shape[axis])]
        return self.columns[x]

    def visit(self, node: Node) -> list[Node] | Node | None:
        """The columns of what this node computes, or another node in its place, or None to leave it alone."""
        target, args = node.target, node.args
        first = args[0] if args else None
        if target is operator.getitem and first in self.unbound:
            return self.unbound[first][args[1]]  # type: ignore[index]
        if node.op != "call_function" or not isinstance(_value(node), Tensor):
            return None
        known = isinstance(first, Node) and first in self.columns
        if known:
            axis = self.narrow_axis(first)
            assert axis is not None and isinstance(first, Node)
            if target is aten.select.int and args[1] % 2 == axis:  # type: ignore[operator]
                return self.columns[first][args[2]]  # type: ignore[index]
            if target is aten.linalg_vector_norm.default and self._over(node, axis) and (len(args) < 2 or args[1] == 2):
                squares = [self.call(aten.mul.Tensor, c, c) for c in self.columns[first]]
                return self.call(aten.sqrt.default, self._sum(squares))
            if target is aten.sum.dim_IntList and self._over(node, axis) and not node.kwargs:
                return self._sum(self.columns[first])
        axis = self.narrow_axis(node)
        if axis is None:
            return None
        if target is aten.cat.default:
            return self._cat(node, axis)
        if target is aten.stack.default and (args[1] if len(args) > 1 else 0) % 2 == axis:  # type: ignore[operator]
            return list(first)  # type: ignore[arg-type]
        turned = known and target in _TURN and axis != self.narrow_axis(first) and _value(node).shape != _value(first).shape
        if known and (target in _SAME or turned):
            return self.columns[first]  # type: ignore[index]
        if target is aten.select_scatter.default and args[2] % 2 == axis:  # type: ignore[operator]
            columns = list(self.of(first, axis))  # type: ignore[arg-type]
            columns[args[3]] = args[1]  # type: ignore[index, call-overload]
            return columns
        if self._pointwise(target) and any(x in self.columns for x in node.all_input_nodes):
            return [self._column(node, axis, i) for i in range(_value(node).shape[axis])]
        return None

    @staticmethod
    def _pointwise(target: Any) -> bool:
        if target is torch.ops.prims.convert_element_type.default:
            return True
        return isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags

    @staticmethod
    def _over(node: Node, axis: int) -> bool:
        """Whether a reduction runs over this axis alone and drops it."""
        dims: Any = node.args[2] if node.target is aten.linalg_vector_norm.default and len(node.args) > 2 else None
        if node.target is aten.sum.dim_IntList:
            dims = node.args[1]  # pyright: ignore[reportGeneralTypeIssues]
        value = _value(node)
        return isinstance(dims, (list, tuple)) and [d % 2 for d in dims] == [axis] and value.dim() == 1 and len(node.args) <= 3

    def _sum(self, columns: list[Node]) -> Node:
        total = columns[0]
        for c in columns[1:]:
            total = self.call(aten.add.Tensor, total, c)
        return total

    def _cat(self, node: Node, axis: int) -> list[Node] | None:
        pieces = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim % 2 != axis or any(_value(x).dim() != 2 for x in pieces):  # type: ignore[operator, union-attr]
            return None
        columns = []
        for x in pieces:  # type: ignore[union-attr]
            plain = x.target is aten.unsqueeze.default and x.args[1] % 2 == axis
            columns += [x.args[0]] if plain else self.of(x, axis)
        return columns

    def _column(self, node: Node, axis: int, i: int) -> Node:
        """Column ``i`` of a pointwise operator."""

        def pick(x: Node) -> Any:
            value = _value(x)
            if not isinstance(value, Tensor) or value.dim() == 0 or (value.dim() == 1 and axis == 0):
                return x
            if value.dim() == 1:
                return self.call(aten.select.int, x, 0, i if value.shape[0] > 1 else 0)
            if value.shape[axis] == 1:
                return self.call(aten.select.int, x, axis, 0)
            return self.of(x, axis)[i]

        return self.call(node.target, *map_arg(node.args, pick), **map_arg(node.kwargs, pick))  # type: ignore[arg-type]

    def joined(self, node: Node) -> Node:
        """A matrix again, for those who need it whole."""
        if self.narrow_axis(node) == 1 and _value(node).shape[0] < 16 * NARROW:
            # laid out as whoever made it would have
            return self.call(aten.cat.default, [self.call(aten.unsqueeze.default, c, 1) for c in self.columns[node]], 1)
        whole = self.call(aten.cat.default, [self.call(aten.unsqueeze.default, c, 0) for c in self.columns[node]], 0)
        return whole if self.narrow_axis(node) == 0 else self.call(aten.permute.default, whole, [1, 0])

    def unbind(self, node: Node) -> bool:
        """Note what is only an ``unbind`` into columns."""
        x = node.args[0] if node.args else None
        if node.target is not aten.unbind.int or x not in self.columns:
            return False
        if (node.args[1] if len(node.args) > 1 else 0) % 2 != self.narrow_axis(x):  # type: ignore[operator]
            return False
        self.unbound[node] = self.columns[x]  # type: ignore[index]
        return True

    def run(self) -> None:
        nodes = list(self.graph.nodes)
        first = next(node for node in nodes if node.op != "placeholder")
        apart: set[Node] = set()
        whole: dict[Node, Node] = {}
        for node in nodes:
            if node.op == "placeholder":
                axis = self.narrow_axis(node)
                if axis is not None:
                    with self.graph.inserting_before(first):
                        self.of(node, axis)
                continue
            with self.graph.inserting_before(node):
                found = self.visit(node)
                if isinstance(found, list):
                    self.columns[node] = found
                    apart.add(node)
                elif isinstance(found, Node):
                    node.replace_all_uses_with(found)
                elif not self.unbind(node):
                    for x in node.all_input_nodes:
                        if x in apart:
                            if x not in whole:
                                whole[x] = self.joined(x)
                            node.replace_input_with(x, whole[x])
        self.graph.eliminate_dead_code()


def column_pass(graph: Graph, fewest: int = 16 * NARROW) -> None:
    """Rewrite a graph of ATen operators in place; matrices with fewer rows than ``fewest`` are left as they are."""
    _Rewrite(graph, fewest).run()


def takes_columns(compiled: bool, rows: int, width: int) -> bool:
    """Whether an ensemble is carried as ``(width, rows)``: compiled, narrow and long."""
    return compiled and 1 < width <= NARROW and rows >= 16 * NARROW


def _same(x: Tensor) -> Tensor:
    return x


def layout(
    f: Callable[[Tensor, Tensor], Tensor], columns: bool, width: int = 0
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """``f`` in this layout; a ``(B,)`` tensor made to go with states; a state to ``(B, n)`` and back.

    ``width``: of the states, where the operators run one by one.
    """
    if not columns:
        return f, lambda x: widened(x.unsqueeze(-1), width), _same
    return lambda t, y: f(t, y.t()).t().contiguous(), _same, torch.t


def widened(x: Tensor, width: int) -> Tensor:
    """``(B, 1)``, or ``(B, width)`` for a few columns: there operators that broadcast take several times as long as those that need not."""
    return x.expand(-1, width).contiguous() if 1 < width <= NARROWEST else x


def column_major(x: Tensor, rows: int) -> Tensor:
    """The same matrix with its columns contiguous in memory, if it holds a few numbers for each row."""
    narrow = x.dim() == 2 and x.shape[0] == rows and 1 < x.shape[1] <= NARROW and x.is_contiguous()
    return x.detach().t().contiguous().t() if narrow else x
