"""Right-hand sides that are known by what they read: they are traced as they stand, and no tracer of PyTorch's is imported for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..system.origins import parameter_homes
from ..system.system import System
from ..torch_internals import is_functorch_wrapped_tensor
from .fingerprint import fingerprint
from .graphs import Graph, Heard

__all__ = ["forget", "hear_directly"]

_MOST = 1024
#: graphs by fingerprint and kind of arguments, with the structure of their results; None where a tracer is to be asked
_graphs: dict[Hashable, tuple[Graph, TreeSpec] | None] = {}


def hear_directly(
    base: System, fun: Callable[..., Any], time: Tensor, states: Sequence[Any], arguments: Sequence[Tensor], kinds: Hashable
) -> Heard | None:
    """Which graph ``fun(time, *states, *args)`` is, for a function whose dependences can be read off; None for another one.

    ``arguments``: the tensors among ``args``. ``kinds``: what else graphs are told apart by.
    """
    found = fingerprint(fun, base.arguments(arguments))
    if found is None or not found.traceable or any(is_functorch_wrapped_tensor(x) for x in found.tensors):
        return None
    key = (found.key, kinds)
    given = {id(x) for x in arguments}
    own = [x for x in found.tensors if id(x) not in given]
    leaves, shape = tree_flatten(states)
    count = len(leaves)

    def module(*tensors: Tensor) -> list[Tensor]:
        """Of time, leaves of the states, arguments and captured tensors."""
        at, theirs, rest = tensors[0], list(tensors[1 : 1 + count]), tensors[1 + count :]
        # an argument may be captured as well
        system = replace(base, captured=(*arguments, *own), homes=(*([None] * len(arguments)), *parameter_homes([fun], own)))
        call = system.substituted(fun, rest)
        return tree_flatten(call(at, *tree_unflatten(theirs, shape), *base.arguments(rest[: len(arguments)])))[0]

    if key not in _graphs:
        if len(_graphs) > _MOST:
            _graphs.clear()
        with torch.inference_mode(False), torch.no_grad():
            copies = [x.detach().clone() for x in (time, *leaves)]
            result = fun(copies[0], *tree_unflatten(copies[1:], shape), *base.arguments(arguments))
        results, structure = tree_flatten(result)
        plain = all(isinstance(x, Tensor) for x in results) and not any(x._version for x in copies)
        _graphs[key] = (Graph(kinds=[(x.shape, x.dtype) for x in results]), structure) if plain else None
    known = _graphs[key]
    if known is None or known[0].refused:
        return None
    graph, structure = known
    places = {id(time): ("t", 0)} | {id(x): ("y", i) for i, x in enumerate(leaves)}
    places |= {id(x): ("argument", k) for k, x in reversed(list(enumerate(arguments)))}
    stand_ins = graph.stand_ins()
    results = tuple(("out", i) for i in range(len(stand_ins)))
    return Heard(graph, module, (time, *leaves, *arguments, *own), tuple(arguments), places, results, tree_unflatten(stand_ins, structure))


def forget() -> None:
    """Trace anew whatever comes."""
    _graphs.clear()
