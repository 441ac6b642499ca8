"""What the graph that autograd has recorded tells: where a tensor comes from, and what is kept for its derivatives."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import DisableFuncTorch, get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, unwrap_if_dead

__all__ = ["alive", "cut_apart", "has_unknown", "leads_to", "listed", "made_here", "readable", "saved_bytes", "unknown_leaves"]

#: on leaves that a function has made itself
_OWN = "_adjoint_made_here"


def made_here(x: Tensor) -> Tensor:
    """``x``, a leaf that a function makes to differentiate by: that no derivative goes on from it is how it is meant."""
    setattr(x, _OWN, True)
    return x


def unknown_leaves(output: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Leaf tensors in the autograd graph of ``output`` that are reached without passing through a known tensor."""
    return list(_unknown(output, known, nearest=False))


def has_unknown(output: Tensor, known: Sequence[Tensor]) -> bool:
    """Whether there is one: the nearest is looked for first, as what lies behind may be a long history."""
    return any(True for _ in _unknown(output, known, nearest=True))


def _unknown(output: Tensor, known: Sequence[Tensor], nearest: bool) -> Iterator[Tensor]:
    # by their nodes, not by their identities: hooks on saved tensors hand out others that share the node
    nodes = [torch.autograd.graph.get_gradient_edge(x).node for x in known if x.requires_grad]
    stop = {id(node) for node in nodes}
    leaves = {id(x) for x in known}
    seen: set[int] = set()
    todo = deque([output.grad_fn])
    keep = []
    while todo:
        node = todo.popleft() if nearest else todo.pop()
        if node is None or id(node) in seen or id(node) in stop:
            continue
        seen.add(id(node))
        keep.append(node)  # nodes are made on access: without this their identities could be given twice
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in leaves and not hasattr(variable, _OWN):
                yield variable
            continue
        todo.extend(n for n, _ in node.next_functions)


def saved_bytes(output: Tensor, inputs: Sequence[Tensor], *start: Tensor) -> int:
    """How much memory the autograd graph of ``output`` keeps, up to the inputs, without them, and up to ``start``.

    Read off the graph: hooks on saved tensors are refused inside of transforms, and by transforms inside of them.
    """
    stop = [torch.autograd.graph.get_gradient_edge(x).node for x in (*inputs, *start) if x.requires_grad]
    seen = {id(node): node for node in stop}
    kept: dict[int, int] = {}
    todo = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        for x in _saved(node):
            if x.layout == torch.strided and not x._is_zerotensor():
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        todo.extend(n for n, _ in node.next_functions)
    for x in inputs:
        if x.layout == torch.strided:
            kept.pop(x.untyped_storage().data_ptr(), None)
    return sum(kept.values())


#: names of the tensors that a kind of node saves
_SAVED: dict[type, list[str]] = {}


def _saved(node: Any) -> list[Tensor]:
    kind = type(node)
    if kind not in _SAVED:
        names = [name for name in dir(kind) if name.startswith("_saved_") and "_sym_" not in name]
        _SAVED[kind] = [*names, *(["saved_tensors"] if hasattr(kind, "saved_tensors") else [])]
    found: list[Any] = []
    for name in _SAVED[kind]:
        value = getattr(node, name)
        found += value if isinstance(value, (list, tuple)) else [value]
    return [x for x in found if isinstance(x, Tensor) and not is_functorch_wrapped_tensor(x)]


def leads_to(x: Tensor, wanted: Sequence[Tensor]) -> bool:
    """Whether ``x`` is one of the wanted tensors, or was computed from one outside of any transform."""
    if any(x is p for p in wanted):
        return True
    leaves = {id(p) for p in wanted if p.grad_fn is None}
    nodes = {id(p.grad_fn) for p in wanted if p.grad_fn is not None}
    seen: set[Any] = set()
    todo = [x.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(node) in nodes or id(getattr(node, "variable", None)) in leaves:
            return True
        todo.extend(n for n, _ in node.next_functions)
    return False


def cut_apart(inputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs, those cut off from their history that were computed from another one.

    Without the cut the cotangent of the one would go on to the other inside of a sweep, and a second time after it.
    """
    made = [x for x in inputs if x.grad_fn is not None]
    if not made or len(inputs) == 1:
        return list(inputs)
    others = {id(x): [p for p in inputs if p is not x and p.requires_grad] for x in made}
    return [x.detach().requires_grad_(True) if id(x) in others and leads_to(x, others[id(x)]) else x for x in inputs]


def alive(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Saved tensors without the wrappers of transforms that have ended.

    The pullback of `torch.func.vjp` runs when its transform is over. What it saved then still carries the number of that transform, which
    the next one will be given too: nested nodes would take the one for the other.
    """
    return [unwrap_if_dead(x) for x in tensors]


def listed(x: Tensor) -> list[Any]:
    """``x.tolist()``, which some versions of PyTorch refuse inside of a transform."""
    while is_functorch_wrapped_tensor(x) and not is_batchedtensor(x):
        x = get_unwrapped(x)
    with DisableFuncTorch():
        return x.tolist()


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: not where ``torch.vmap`` maps over it."""
    while is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            return False
        x = get_unwrapped(x)
    return True
