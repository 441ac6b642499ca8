"""A pass for the compiler, for small matrix products.

``x + A1 B1 + A2 B2 + ...`` is computed as ``x + [A1 A2 ...] [B1; B2; ...]``: so the cotangents of weights add up over the stages of a step,
and each product is so small that calling it takes longer than computing it. A product with few columns is computed as the transpose of one
with few rows, for which libraries were measured to be two to five times faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from .columns import NARROW, new_node

__all__ = ["gathering_pass"]

aten = torch.ops.aten
#: fewest products, and most numbers of their operands, that are put side by side
_FEWEST, _LARGEST = 3, 2**18


def _sum_with_product(node: Any) -> tuple[Node, Node] | None:
    """``(x, A B)`` of a sum ``x + A B`` whose product has no other use."""
    if not isinstance(node, Node) or node.target is not aten.add.Tensor or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    for x, product in ((a, b), (b, a)):
        if isinstance(x, Node) and isinstance(product, Node) and product.target is aten.mm.default and len(product.users) == 1:
            return (x, product) if x.meta["val"].shape == node.meta["val"].shape else None
    return None


def _gather(graph: Graph, last: Node) -> None:
    """Rewrite the longest chain of sums that ends at ``last``."""
    products: list[Node] = []
    x: Node = last
    while (found := _sum_with_product(x)) is not None and (x is last or len(x.users) == 1):
        x, product = found
        products.append(product)
    numbers = sum(operand.meta["val"].numel() for product in products for operand in product.args)  # type: ignore[union-attr]
    if len(products) < _FEWEST or numbers > _LARGEST:
        return

    with graph.inserting_before(last):
        left, right = ([product.args[side] for product in products] for side in (0, 1))
        if all(a.target is aten.permute.default and list(a.args[1]) == [1, 0] for a in left):  # type: ignore[union-attr, arg-type]
            # rows lie together in memory
            stacked = new_node(graph, aten.permute.default, new_node(graph, aten.cat.default, [a.args[0] for a in left], 0), [1, 0])  # type: ignore[union-attr]
        else:
            stacked = new_node(graph, aten.cat.default, left, 1)
        total = new_node(graph, aten.add.Tensor, x, new_node(graph, aten.mm.default, stacked, new_node(graph, aten.cat.default, right, 0)))
    last.replace_all_uses_with(total)


def _turn(graph: Graph, product: Node) -> None:
    """``A B`` as ``(B* A*)*`` (no conjugates) if it has few columns."""
    rows, columns = product.meta["val"].shape
    if columns > NARROW or rows < 4 * columns:
        return
    with graph.inserting_before(product):
        a, b = (new_node(graph, aten.permute.default, x, [1, 0]) for x in product.args)
        turned = new_node(graph, aten.permute.default, new_node(graph, aten.mm.default, b, a), [1, 0])
    product.replace_all_uses_with(turned)


def _is_matrix_result(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)


def gathering_pass(graph: Graph) -> None:
    """Rewrite a graph of ATen operators in place."""
    for node in list(graph.nodes):
        if not _is_matrix_result(node) or _sum_with_product(node) is None:
            continue
        (user,) = node.users if len(node.users) == 1 else (None,)
        longer = _sum_with_product(user)
        if longer is None or longer[0] is not node:
            _gather(graph, node)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if _is_matrix_result(node) and node.target is aten.mm.default:
            _turn(graph, node)
    graph.eliminate_dead_code()
