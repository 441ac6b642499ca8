"""Differentiable tensors that a plain function captured: finding them, and running the function with others in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .linalg.forward_mode import below_jvp

__all__ = [
    "Substitute",
    "alive",
    "below_jvp",
    "below_vmap",
    "cut_apart",
    "find_captured",
    "find_constants",
    "functorch_active",
    "is_differentiable",
    "leads_to",
    "listed",
    "needs_derivatives",
    "parameter_homes",
    "readable",
    "unknown_leaves",
    "vmap_active",
]


def functorch_active() -> bool:
    """Whether a ``torch.func`` transform (or its vmap) is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def vmap_active() -> bool:
    """Whether a ``torch.vmap`` is running, directly or inside of a transform such as `torch.func.jacfwd`."""
    stack = torch._C._functorch.get_interpreter_stack()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack or ())


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at: not where ``torch.vmap`` maps over it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return False
        x = torch._C._functorch.get_unwrapped(x)
    return True


def listed(x: Tensor) -> list[Any]:
    """``x.tolist()``, which some versions of PyTorch refuse inside of a transform."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x) and not torch._C._functorch.is_batchedtensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    with torch._C._DisableFuncTorch():
        return x.tolist()


def below_vmap(x: Tensor, size: int) -> Tensor:
    """``(size, *x.shape)``: what ``x`` is for each copy, as the vmap rule of a node sees it, which runs below the vmap itself."""
    level, mapped = _functorch_level(), False
    while torch._C._functorch.maybe_get_level(x) > level:
        dim = torch._C._functorch.maybe_get_bdim(x)
        x = torch._C._functorch.get_unwrapped(x)
        if dim >= 0:
            x, mapped = x.movedim(dim, 0), True
    return x if mapped else x.expand(size, *x.shape)


def is_differentiable(x: Any) -> bool:
    """Whether some derivative may be asked of ``x``: reverse mode, forward mode or a ``torch.func`` transform."""
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return False
    return x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x) or _has_tangent(x)


def needs_derivatives(tensors: Iterable[Tensor]) -> bool:
    """Whether a solve that depends on these tensors must keep what derivatives need."""
    if functorch_active():
        return any(is_differentiable(x) for x in tensors)
    grad = torch.is_grad_enabled()
    return any((grad and x.requires_grad) or _has_tangent(x) for x in tensors)


def _has_tangent(x: Tensor) -> bool:
    # unpack_dual raises outside of a dual level
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def alive(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Saved tensors without the wrappers of transforms that have ended.

    The pullback of `torch.func.vjp` runs when its transform is over. What it saved then still carries the number of that transform, which
    the next one will be given too: nested nodes would take the one for the other.
    """
    return [torch._C._functorch.unwrap_if_dead(x) for x in tensors]


def _functorch_level() -> int:
    stack = torch._C._functorch.peek_interpreter_stack()
    return 0 if stack is None else stack.level()


def _outer(x: Any, level: int) -> Any:
    """``x`` without the wrappers of transforms that began after ``level``: those that ``fun`` uses itself."""
    while isinstance(x, Tensor) and torch._C._functorch.maybe_get_level(x) > level:
        x = torch._C._functorch.get_unwrapped(x)
    return x


class _Watch(TorchFunctionMode):
    """Records the (differentiable) tensors that enter operators without having come out of one."""

    def __init__(self, known: Iterable[Any], wanted: Callable[[Any], bool] = is_differentiable) -> None:
        super().__init__()
        self.wanted, self.level = wanted, _functorch_level()
        self.known = {id(x): x for x in known if isinstance(x, Tensor)}
        self.captured: dict[int, Tensor] = {}

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        produced = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if produced:
            for leaf in tree_leaves((args, kwargs)):
                x = _outer(leaf, self.level)
                if id(x) not in self.known and self.wanted(x):
                    self.captured[id(x)] = self.known[id(x)] = x
            # kept alive here, so that no identity is given twice
            self.known.update((id(x), x) for x in produced)
        return out


def find_captured(calls: Sequence[Callable[[], Any]], known: Iterable[Any], owners: Iterable[Any] = ()) -> list[Tensor]:
    """Differentiable tensors that the calls use and that are not among ``known``, leaf or not, in order of first use.

    ``owners`` are the functions themselves: where one is (bound to) an ``nn.Module``, its parameters count even if this call does
    not reach them, because another time may.
    """
    known = list(known)
    watch = _Watch(known)
    with torch.enable_grad(), watch:
        for call in calls:
            call()
    found = dict(watch.captured)
    inputs = {id(x) for x in known if isinstance(x, Tensor)}
    for owner in owners:
        module = owner if isinstance(owner, torch.nn.Module) else getattr(owner, "__self__", None)
        if isinstance(module, torch.nn.Module):
            found.update((id(p), p) for p in module.parameters() if id(p) not in inputs and is_differentiable(p))
    return list(found.values())


def find_constants(calls: Sequence[Callable[[], Any]], known: Iterable[Any]) -> list[Tensor]:
    """All tensors, differentiable or not, that the calls use and that are not among ``known``."""
    watch = _Watch(known, lambda x: isinstance(x, Tensor))
    with torch.no_grad(), watch:
        for call in calls:
            call()
    return list(watch.captured.values())


#: where a captured tensor was found: a module and the name of its parameter
Home = tuple[torch.nn.Module, str]


def parameter_homes(functions: Iterable[Any], captured: Sequence[Tensor]) -> list[Home | None]:
    """For each captured tensor the module that it is a parameter of, if one that a function can reach has it.

    `torch.func.functional_call` puts other tensors in the place of parameters and takes them out when it returns. A function that is
    called again later, on the way back, would then see the originals: it has to be told by their places.
    """
    wanted = {id(x): i for i, x in enumerate(captured)}
    homes: list[Home | None] = [None] * len(captured)
    for module in _modules(functions) if wanted else ():
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                i = wanted.get(id(parameter))
                if i is not None and homes[i] is None:
                    homes[i] = (owner, name)
    return homes


def _modules(functions: Iterable[Any]) -> Iterator[torch.nn.Module]:
    """Modules that functions are, are bound to, or hold: in closures, defaults, arguments of partials, attributes, and by a global name."""
    todo, seen = [(f, 0) for f in functions], set()
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen or depth > 3:
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.nn.Module):
            yield thing
        else:
            todo.extend((part, depth + 1) for part in _parts(thing))


def _parts(thing: Any) -> Iterable[Any]:
    """What a function, or an object that is called, may use."""
    if isinstance(thing, MethodType):
        return [thing.__self__, thing.__func__]
    if isinstance(thing, partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if isinstance(thing, FunctionType):
        held = [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
        named = [thing.__globals__[name] for name in thing.__code__.co_names if name in thing.__globals__]
        wrapped = getattr(thing, "__wrapped__", None)
        return [x for x in (*held, *named, *(thing.__defaults__ or ()), wrapped) if not isinstance(x, (type, ModuleType, Tensor))]
    if isinstance(thing, (list, tuple)):
        return thing if len(thing) <= 100 else ()
    if isinstance(thing, dict):
        return thing.values() if len(thing) <= 100 else ()
    if isinstance(thing, (type, ModuleType, Tensor)):
        return ()
    own = getattr(thing, "__dict__", None)
    return own.values() if isinstance(own, dict) else ()


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


class Substitute(TorchFunctionMode):
    """Runs operators with other tensors in the place of captured ones (needed where a transform wraps the node's inputs).

    ``homes``: see `parameter_homes`; what lies there now is replaced too.
    """

    def __init__(self, captured: Sequence[Tensor], replacements: Sequence[Tensor], homes: Sequence[Home | None] = ()) -> None:
        super().__init__()
        self.table = {id(x): r for x, r in zip(captured, replacements, strict=True)}
        for home, r in zip(homes, replacements, strict=False):
            if home is not None:
                self.table[id(home[0]._parameters[home[1]])] = r

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        swap = self._swap
        return func(*tree_map(swap, args), **tree_map(swap, kwargs or {}))

    def _swap(self, x: Any) -> Any:
        return self.table.get(id(x), x) if isinstance(x, Tensor) else x


def unknown_leaves(output: Tensor, known: Sequence[Tensor]) -> list[Tensor]:
    """Leaf tensors in the autograd graph of ``output`` that are reached without passing through a known tensor."""
    # by their nodes, not by their identities: hooks on saved tensors hand out others that share the node
    nodes = [torch.autograd.graph.get_gradient_edge(x).node for x in known if x.requires_grad]
    stop = {id(node) for node in nodes}
    leaves = {id(x) for x in known}
    seen: set[int] = set()
    todo = [output.grad_fn]
    keep, unknown = [], []
    while todo:
        node = todo.pop()
        if node is None or id(node) in seen or id(node) in stop:
            continue
        seen.add(id(node))
        keep.append(node)  # nodes are made on access: without this their identities could be given twice
        variable = getattr(node, "variable", None)
        if variable is not None:
            if id(variable) not in leaves:
                unknown.append(variable)
            continue
        todo.extend(n for n, _ in node.next_functions)
    return unknown


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
