"""A right-hand side that was read, with an engine for a method: what is compiled, and how often for how many lanes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..methods.runge_kutta import ExplicitRungeKutta
from .build import library
from .emit import engine_text, prologue
from .reading import Reading
from .reverse import cotangents
from .text import statements

__all__ = ["Engine", "Program", "program_of"]

_CONTEXT = "struct Ctx { const R* const* u; const S* const* a; const R* const* k; S* const* b; };"
#: bytes of a vector of trajectories, and fewest trajectories for which there are vectors
_VECTOR, _FEWEST = 32, 16


@dataclass(frozen=True)
class Engine:
    """Compiled functions: of the solve, of the way back, and of the user's, as addresses."""

    forward: Callable[..., int]
    seal: Callable[..., None]
    backward: Callable[..., None]
    functions: dict[str, int]


@dataclass(eq=False)
class Program:
    """A right-hand side as scalar expressions, for one method, dtype and width.

    ``own``: how many numbers of each input belong to one trajectory, 0 where all share it; ``numbers``: how many cotangents the shared ones
    have. ``room``: steps that the last solve of so many rows took, and some more.
    """

    reading: Reading
    method: ExplicitRungeKutta
    real: torch.dtype
    width: int
    own: tuple[int, ...]
    numbers: tuple[int, ...]
    timed: bool
    tables: tuple[Tensor, ...]
    room: dict[int, int] = field(default_factory=dict)
    _engines: dict[int, Engine] = field(default_factory=dict)

    def lanes(self, rows: int) -> int:
        """How many trajectories go side by side."""
        return _VECTOR // self.real.itemsize if rows >= _FEWEST else 1

    def engine(self, lanes: int) -> Engine:
        """The compiled code, made when it is first asked for. Raises `NoCompiler`."""
        found = self._engines.get(lanes)
        if found is None:
            start = prologue(self.real, lanes)
            users = library("\n".join([start, _CONTEXT, *self.functions()]), False, links(lanes))
            loop = library("\n".join([start, engine_text(self.method, self.width, self.timed, self.own, self.numbers)]), True, links(lanes))
            addresses = {name: _address(users, name) for name in ("fun", "vjp")}
            loop.forward.restype = ctypes.c_void_p
            loop.seal.restype = loop.backward.restype = None
            found = self._engines[lanes] = Engine(loop.forward, loop.seal, loop.backward, addresses)
        return found

    def functions(self) -> list[str]:
        """The user's function and its derivatives as text."""
        graph, outputs = self.reading.graph, self.reading.outputs
        shared = {k for k, own in enumerate(self.own) if not own}
        graph_seeds = [graph.leaf("v", i) for i in range(len(outputs))]
        seeds: dict[int, int] = {}
        for node, v in zip(outputs, graph_seeds, strict=True):
            seeds[node] = graph.op("add", seeds[node], v) if node in seeds else v
        found = cotangents(graph, seeds, ("t", "y", "a"))
        zero = graph.constant(0.0)
        targets = [(f"yb[{i}]", found.pop(graph.leaf("y", i), zero), "=") for i in range(self.width)]
        for place, node in found.items():
            targets.append((self._target(place), node, "+="))
        head = f"const S t = *tp; {self._names()}"
        fun, _ = statements(graph, [(f"o[{i}]", node, "=") for i, node in enumerate(outputs)], self._leaf, shared)
        vjp, _ = statements(graph, targets, self._leaf, shared)
        return [
            f'extern "C" void fun(const Ctx* c, const S* tp, const S* y, S* o) {{ {head}\n{fun}\n}}',
            f'extern "C" void vjp(const Ctx* c, const S* tp, const S* y, const S* v, S* yb, S* tb) {{ {head}\n{vjp}\n}}',
        ]

    def _names(self) -> str:
        inputs = "".join(f"const S* a{k} = c->a[{k}]; " if own else f"const R* a{k} = c->u[{k}]; " for k, own in enumerate(self.own))
        tables = "".join(f"const R* k{k} = c->k[{k}]; " for k in range(len(self.tables)))
        return inputs + tables

    def _leaf(self, place: tuple[Any, ...]) -> str:
        kind, *index = place
        if kind == "t":
            return "t"
        if kind in ("a", "k"):
            return f"{kind}{index[0]}" + (f"[{index[1]}]" if len(index) > 1 and index[1] is not None else "")
        return f"{kind}[{index[0]}]"

    def _target(self, place: Any) -> str:
        kind, *index = self.reading.graph.data[place]
        return "*tb" if kind == "t" else f"c->b[{index[0]}][{index[1]}]"


def links(lanes: int) -> tuple[str, ...]:
    """Libraries that vectors need."""
    return ("-lmvec", "-lm") if lanes > 1 else ()


def _address(loaded: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
    assert address is not None
    return address


def program_of(reading: Reading, method: ExplicitRungeKutta, y0: Tensor, inputs: Sequence[Tensor], batched: bool) -> Program:
    """The program of a right-hand side for states like ``y0`` (B, n) and inputs like these."""
    own = tuple(prod(x.shape[1:]) if stride else 0 for stride, x in zip(reading.strides, inputs, strict=True))
    numbers = tuple(x.numel() if not stride and x.is_floating_point() else 0 for stride, x in zip(reading.strides, inputs, strict=True))
    graph = reading.graph
    timed = uses(reading, "t")
    del graph
    return Program(reading, method, y0.dtype, y0.shape[1], own, numbers, timed, tuple(x.contiguous().to(y0.dtype) for x in reading.tables))


def uses(reading: Reading, kind: str) -> bool:
    """Whether the outputs depend on a leaf of this kind."""
    graph, seen, todo = reading.graph, set(), list(reading.outputs)
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if graph.names[node] == "leaf" and graph.data[node][0] == kind:
            return True
        todo.extend(graph.arguments[node])
    return False
