"""Where tensors come from and live: what the graph tells that autograd has recorded, and what is kept for its derivatives; in which module,
under which name, what a function captured is found."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..torch_internals import DisableFuncTorch, get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, unwrap_if_dead

__all__ = [
    "Home",
    "alive",
    "attribute",
    "closed_over",
    "cut_apart",
    "has_unknown",
    "held_by",
    "is_apart",
    "leads_to",
    "listed",
    "made_here",
    "parameter_homes",
    "readable",
    "saved_bytes",
    "unknown_leaves",
]

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


def _node(x: Tensor) -> Any:
    """The node at which the graph reaches ``x``; None for leaves where a transform records."""
    if x.grad_fn is not None:
        return x.grad_fn
    with torch.enable_grad():
        view = x.view_as(x)
    return None if view.grad_fn is None else view.grad_fn.next_functions[0][0]


def _unknown(output: Tensor, known: Sequence[Tensor], nearest: bool) -> Iterator[Tensor]:
    # by their nodes, not by their identities: hooks on saved tensors hand out others that share the node
    nodes = [_node(x) for x in known if x.requires_grad]
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


def cut_apart(inputs: Sequence[Tensor], wants: Sequence[bool]) -> list[Tensor]:
    """The inputs, some cut off from their history: those that were computed from another one, whose cotangent would go on to the other
    inside of a sweep, and a second time after it; those that somebody listens to, who would hear every part of the cotangent beside the
    whole; and those that are ``wanted`` and were told since not to require grad."""
    cut = {id(x) for x, want in zip(inputs, wants, strict=True) if (x.requires_grad and _heard(x)) or (want and not x.requires_grad)}
    made = [x for x in inputs if x.grad_fn is not None] if len(inputs) > 1 else []
    for x in made:
        if id(x) not in cut and leads_to(x, [p for p in inputs if p is not x and p.requires_grad]):
            cut.add(id(x))
    if not cut:
        return list(inputs)
    # one that is an input twice stays one
    copies = {id(x): x.detach().requires_grad_(True) for x in inputs if id(x) in cut}
    return [copies.get(id(x), x) for x in inputs]


def is_apart(inputs: Sequence[Tensor]) -> bool:
    """Whether each of the inputs is there once, none was computed from another one, and nobody listens to any."""
    many = len(inputs) > 1
    if many and len({id(x) for x in inputs}) < len(inputs):
        return False
    return not any(_heard(x) or (many and x.grad_fn is not None and leads_to(x, [p for p in inputs if p is not x])) for x in inputs)


def _heard(x: Tensor) -> bool:
    """Whether a hook or ``retain_grad`` gets what comes to this tensor."""
    return bool(x._backward_hooks) or x.retains_grad


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


def attribute(thing: Any, name: str, default: Any = None) -> Any:
    """An attribute of an object of the user's, or what stands for none: a ``__getattr__`` that looks into a table may say so by the error
    of the table."""
    try:
        return getattr(thing, name, default)
    except LookupError:
        if any(name in kind.__dict__ for kind in type(thing).__mro__):
            # there is one, which failed
            raise
        return default


T = TypeVar("T")

#: where a captured tensor was found: a module and the name of its parameter
Home = tuple[torch.nn.Module, str]


def parameter_homes(functions: Iterable[Any], captured: Sequence[Tensor]) -> list[Home | None]:
    """For each captured tensor the module that it is a parameter of, if one that a function can reach has it.

    `torch.func.functional_call` puts other tensors in the place of parameters and takes them out when it returns. A function that is
    called again later, on the way back, would then see the originals: it has to be told by their places.
    """
    wanted = {id(x): i for i, x in enumerate(captured)}
    homes: list[Home | None] = [None] * len(captured)
    for module in held_by(functions, torch.nn.Module) if wanted else ():
        for owner in module.modules():
            if isinstance(owner, torch.jit.ScriptModule):
                # nothing is put in the places of its parameters
                continue
            for name, parameter in owner._parameters.items():
                i = wanted.get(id(parameter))
                if i is not None and homes[i] is None:
                    homes[i] = (owner, name)
    return homes


def held_by(functions: Iterable[Any], kind: type[T]) -> Iterator[T]:
    """The objects of a kind that functions are, are bound to, or hold: in closures, defaults, arguments of partials, attributes, and by a
    global name."""
    todo, seen = [(f, 0) for f in functions], set()
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen or depth > 3:
            continue
        seen.add(id(thing))
        if isinstance(thing, kind):
            yield thing
        else:
            # what is in a container, or in a module of modules, is no further away than that
            inside = depth if isinstance(thing, (list, tuple, dict)) else depth + 1
            todo.extend((part, inside) for part in _parts(thing))
            if isinstance(thing, torch.nn.Module):
                todo.extend((part, depth) for part in thing.children())


def _parts(thing: Any) -> Iterable[Any]:
    """What a function, or an object that is called, may use."""
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, FunctionType):
        held = list(closed_over(thing))
        named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
        wrapped = getattr(thing, "__wrapped__", None)
        return [x for x in (*held, *named, *(thing.__defaults__ or ()), wrapped) if not isinstance(x, (type, ModuleType, Tensor))]
    if isinstance(thing, (list, tuple)):
        return thing if len(thing) <= 100 else ()
    if isinstance(thing, dict):
        return thing.values() if len(thing) <= 100 else ()
    if isinstance(thing, (type, ModuleType, Tensor)):
        return ()
    own = attribute(thing, "__dict__")
    return own.values() if isinstance(own, dict) else ()


def closed_over(function: FunctionType) -> Iterator[Any]:
    """What is in the cells of a closure."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty still
            continue
