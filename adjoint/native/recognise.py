"""Which right-hand side is this: its graph, found once, and known again by the guards of PyTorch's tracer.

``torch.compile`` reads the Python of ``fun``, lifts what it captured (closures, globals, parameters of modules) to inputs of a graph, and
guards whatever else of Python the graph depends on. Its backend here computes nothing: it remembers which graph was asked for, and with
which tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..methods import Method
from ..system.system import StateSpec, System
from .program import Program, program_of
from .reading import Unreadable, read

__all__ = ["Recognised", "compile_key", "recognise"]

_ear = threading.local()
#: graphs of one piece of code (shapes, dtypes, constants) before recognising costs more than it brings
_MOST_GRAPHS = 64


def compile_key(fun: Callable[..., Any]) -> Hashable:
    """What makes two right-hand sides share compiled code: their Python code, or for other callables their type."""
    code = getattr(fun, "__code__", None) or getattr(getattr(fun, "__func__", None), "__code__", None)
    return code if code is not None else type(fun)


@dataclass(eq=False)
class _Graph:
    """A traced right-hand side: called, it says so to `recognise` and gives tensors that stand for results."""

    module: GraphModule
    programs: dict[Hashable, Program | Exception] = field(default_factory=dict)
    kinds: list[tuple[torch.Size, torch.dtype]] | None = None
    #: whether it changes tensors in place that it is given
    writes: bool = False

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        if self.kinds is None:
            with torch.inference_mode(False), torch.no_grad():
                copies = [x.clone() for x in tensors]
                outs = self.module(*copies)
            self.kinds = [(x.shape, x.dtype) for x in outs]
            self.writes = any(x._version for x in copies)
        stand_ins = [torch.empty(shape, dtype=dtype) for shape, dtype in self.kinds]
        _ear.heard.append((self, tensors, stand_ins))
        return stand_ins


def _hear(module: GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    return _Graph(module)


def _evaluate(fun: Callable[..., Any], t: Tensor, y: Any, args: tuple[Any, ...]) -> Any:
    return fun(t, y, *args)


@lru_cache(maxsize=512)
def _tracer(key: Hashable) -> Callable[..., Any]:
    """A tracer of its own for each piece of code, since its cache is one for each code object."""
    f = _evaluate
    copy = FunctionType(f.__code__.replace(co_name="fun"), f.__globals__, "fun", f.__defaults__, f.__closure__)
    return torch.compile(copy, backend=_hear, dynamic=False, fullgraph=True)


@dataclass(frozen=True)
class Recognised:
    """A program with the tensors that it reads now.

    ``slots``: for each of them its place among the inputs of the system, or None for a captured tensor that has none.
    """

    program: Program
    tensors: tuple[Tensor, ...]
    slots: tuple[int | None, ...]


def recognise(key: Hashable, system: System, method: Method, t: Tensor, y0: Tensor, inputs: Sequence[Tensor], batched: bool) -> Recognised:
    """The program of a system's right-hand side; raises `Unreadable` where there is none, or what the tracer raises."""
    spec = system.spec
    if spec.holds_complex or spec.split or any(d != spec.dtype for d in spec.dtypes):
        raise Unreadable("", "", "it is complex, or its leaves differ in dtype")
    time = t if batched else t.reshape(())
    state = spec.unflatten(y0)
    _ear.heard = []
    with torch.no_grad():
        result = _tracer(key)(system.fun, time, state, system.arguments(inputs))
    if len(_ear.heard) != 1:
        raise Unreadable("", "", "it is no single graph")
    graph, tensors, stand_ins = _ear.heard.pop()
    if graph.writes:
        raise Unreadable("", "", "it changes the state, or a tensor that it captured, in place")
    leaves = tree_flatten(state)[0]
    known = {id(time): ("t", 0)} | {id(x): ("y", i) for i, x in enumerate(leaves)}
    places, given = [], []
    for x in tensors:
        if id(x) in known:
            places.append(known[id(x)])
        else:
            known[id(x)] = ("input", len(given))
            places.append(known[id(x)])
            given.append(x)
    results = []
    for x in tree_flatten(result)[0]:
        index = next((i for i, made in enumerate(stand_ins) if made is x), None)
        if index is not None:
            results.append(("out", index))
        elif id(x) in known:
            results.append(known[id(x)])
        else:
            raise Unreadable("", "", "its result is made outside of what was traced")
    # a tensor that is an input twice gets its whole cotangent the first time
    slot = {id(x): k for k, x in reversed(list(enumerate(inputs)))}
    layout = (tuple(places), tuple(results), method, batched, tuple(y0.shape), y0.dtype, spec.shapes, spec.tree)
    found = graph.programs.get(layout)
    if found is None:
        try:
            found = _program(graph.module, places, results, spec, method, time, y0, given, batched)
        except Unreadable as error:
            found = error
        graph.programs[layout] = found
    if isinstance(found, Exception):
        raise found
    return Recognised(found, tuple(given), tuple(slot.get(id(x)) for x in given))


def _program(
    module: GraphModule,
    places: Sequence[tuple[str, int]],
    results: Sequence[tuple[str, int]],
    spec: StateSpec,
    method: Method,
    t: Tensor,
    y0: Tensor,
    given: Sequence[Tensor],
    batched: bool,
) -> Program:
    for x in given:
        if x.is_complex() or (x.is_floating_point() and x.dtype != y0.dtype):
            raise Unreadable("", "", f"a tensor of dtype {x.dtype} beside a state of {y0.dtype}")

    def flat(t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        leaves = tree_flatten(spec.unflatten(y))[0]
        values = {"t": [t], "y": leaves, "input": inputs}
        outs = module(*(values[kind][i] for kind, i in places))
        values["out"] = outs
        return spec.flatten(tree_unflatten([values[kind][i] for kind, i in results], spec.tree))

    reading = read(flat, t, y0, given, batched)
    return program_of(reading, method, y0, given, batched)  # type: ignore[arg-type]
