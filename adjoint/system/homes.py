"""Where the tensors that a function captured live: in which module, under which name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Home", "closed_over", "held_by", "parameter_homes"]

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
            todo.extend((part, depth + 1) for part in _parts(thing))


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
    own = getattr(thing, "__dict__", None)
    return own.values() if isinstance(own, dict) else ()


def closed_over(function: FunctionType) -> Iterator[Any]:
    """What is in the cells of a closure."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty still
            continue
