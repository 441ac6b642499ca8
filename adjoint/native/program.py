"""A right-hand side that was read, with an engine for a method: what is compiled, and how often for how many lanes."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .build import library
from .emit import Compiled, engine_text, prologue
from .reading import Reading, Unreadable
from .reverse import cotangents, jacobian
from .text import Scatter, Target, statements, vector_library

__all__ = ["Engine", "Program", "program_of"]

_CONTEXT = "struct Ctx { const R* const* u; const S* const* a; const R* const* k; S* const* b; };"
#: bytes of a vector of trajectories, and fewest trajectories for which there are vectors
_VECTOR, _FEWEST = 64, 16
#: most characters of formulas: a compiler takes ten seconds or more for so many
_LONGEST = 500_000


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
    method: Compiled
    real: torch.dtype
    width: int
    own: tuple[int, ...]
    numbers: tuple[int, ...]
    timed: bool
    tables: tuple[Tensor, ...]
    room: dict[int, int] = field(default_factory=dict)
    _engines: dict[int, Engine] = field(default_factory=dict)
    #: why it is not compiled
    refusal: Unreadable | None = None

    def lanes(self, rows: int) -> int:
        """How many trajectories go side by side."""
        return _VECTOR // self.real.itemsize if rows >= _FEWEST else 1

    def engine(self, lanes: int) -> Engine:
        """The compiled code, made when it is first asked for. Raises `NoCompiler`, and `Unreadable` where it would take minutes."""
        found = self._engines.get(lanes)
        if self.refusal is not None:
            raise self.refusal
        if found is None:
            start = prologue(self.real, lanes)
            texts = self.functions()
            length = sum(map(len, texts.values()))
            if length > _LONGEST:
                reason = f"fun is {length // 1024} KiB of formulas, one by one, which compilers take minutes for: leave compile out"
                self.refusal = Unreadable("", "", reason)
                raise self.refusal
            users = library("\n".join([start, _CONTEXT, *texts.values()]), False, links(lanes))
            nonzero = self._jacobian()[0] if self.method.implicit else ()
            engine = engine_text(self.method, self.real, self.width, self.timed, self.own, self.numbers, nonzero)
            loop = library("\n".join([start, engine]), True, links(lanes))
            addresses = {name: _address(users, name) for name in texts}
            loop.forward.restype = ctypes.c_void_p
            loop.seal.restype = loop.backward.restype = None
            found = self._engines[lanes] = Engine(loop.forward, loop.seal, loop.backward, addresses)
        return found

    def functions(self) -> dict[str, str]:
        """The user's function and its derivatives, as text."""
        graph, outputs = self.reading.graph, self.reading.outputs
        seeds: dict[int, int] = {}
        for i, node in enumerate(outputs):
            v = graph.leaf("v", i)
            seeds[node] = graph.op("add", seeds[node], v) if node in seeds else v
        found = cotangents(graph, seeds, ("t", "y", "a"))
        zero = graph.constant(0.0)
        of_state = [(f"yb[{i}]", found.pop(graph.leaf("y", i), zero), "=") for i in range(self.width)]
        texts = {
            "fun": self._function("fun", "const S* y, S* o", [(f"o[{i}]", node, "=") for i, node in enumerate(outputs)]),
            "vjp": self._function("vjp", "const S* y, const S* v, S* yb, S* tb", of_state + self._added(found)),
        }
        if self.method.implicit:
            entries, slopes = self._jacobian()
            targets = [(f"J[{i * self.width + j}]", node, "=") for (i, j), node in entries.items()]
            targets += [(f"slope[{i}]", slopes.get(i, zero), "=") for i in range(self.width)]
            texts["jac"] = self._function("jac", "const S* y, S* J, S* slope", targets)
            phi = zero
            for (i, j), node in entries.items():
                phi = graph.op("add", phi, graph.op("mul", node, graph.leaf("w", i * self.width + j)))
            for i, node in slopes.items():
                phi = graph.op("add", phi, graph.op("mul", node, graph.leaf("x", i)))
            found = cotangents(graph, {phi: graph.constant(1.0)}, ("t", "y", "a"))
            signature = "const S* y, const S* w, const S* x, S* yb, S* tb, S* phi"
            texts["bend"] = self._function("bend", signature, [("*phi", phi, "="), *self._added(found)])
        return texts

    def _jacobian(self) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
        """Nodes of ``f_y`` by row and column and of ``f_t`` by row, those that are not always zero."""
        graph, outputs = self.reading.graph, self.reading.outputs
        slopes = jacobian(graph, outputs, "t") if self.timed else {}
        return jacobian(graph, outputs, "y"), {place[0]: node for place, node in slopes.items()}

    def _function(self, name: str, signature: str, targets: list[Target | Scatter]) -> str:
        shared = {k for k, own in enumerate(self.own) if not own}
        body, _ = statements(self.reading.graph, targets, self._leaf, shared)
        return f'extern "C" void {name}(const Ctx* c, const S* tp, {signature}) {{ const S t = *tp; {self._names()}\n{body}\n}}'

    def _added(self, found: Mapping[Any, int]) -> list[Target | Scatter]:
        """Cotangents that are added to what is there already."""
        graph = self.reading.graph
        out: list[Target | Scatter] = []
        for node, value in found.items():
            kind, *index = graph.data[node]
            if graph.names[node] == "look":
                out.append(Scatter(f"c->b[{index[0]}]", node, value))
            else:
                name = "*tb" if kind == "t" else f"yb[{index[0]}]" if kind == "y" else f"c->b[{index[0]}][{index[1]}]"
                out.append((name, value, "+="))
        return out

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


def links(lanes: int) -> tuple[str, ...]:
    """Flags that vectors need."""
    return vector_library() if lanes > 1 else ()


def _address(loaded: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
    assert address is not None
    return address


def program_of(reading: Reading, method: Compiled, y0: Tensor, inputs: Sequence[Tensor]) -> Program:
    """The program of a right-hand side for states like ``y0`` (B, n) and inputs like these."""
    own = tuple(prod(x.shape[1:]) if stride else 0 for stride, x in zip(reading.strides, inputs, strict=True))
    numbers = tuple(x.numel() if not stride and x.is_floating_point() else 0 for stride, x in zip(reading.strides, inputs, strict=True))
    timed = uses(reading, "t")
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
