"""Scalar expressions as statements of C++.

What differs by trajectory has the types S, J, M (floats, integers, truth values), what all trajectories share R, I, bool: in
``engine/scalar.hpp`` they are the same, in ``engine/vector.hpp`` the first are vectors, a lane for a trajectory. A value that is made of
shared ones only is computed once for all lanes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .expressions import FUNCTIONS, Graph

__all__ = ["LeafName", "Scatter", "Target", "header", "statements", "vector_library"]

_SIGNS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_CALLED = {"max", "min", "pow", "atan2", "fmod", "remainder", "floordiv", "hypot"}
_SHARED = {"float": "R", "int": "I", "bool": "bool"}
_OWN = {"float": "S", "int": "J", "bool": "M"}
_MADE_OWN = {"float": "K", "int": "KI", "bool": "KM"}
_ENGINE = Path(__file__).parent / "engine"


class Scatter(NamedTuple):
    """``value`` is to be added to the element of an array at which ``look`` looked."""

    array: str
    look: int
    value: int


Target = tuple[str, int, str]
LeafName = Callable[[tuple], str]


def header(single: bool, lanes: int = 0) -> str:
    """What has to stand before emitted functions: numbers and functions, for ``lanes`` trajectories at once (0: for one)."""
    text = "#define SINGLE\n" * single + f"#define W {lanes}\n" * bool(lanes) + (_ENGINE / "scalar.hpp").read_text()
    return text + (_ENGINE / "vector.hpp").read_text() * bool(lanes)


def vector_library() -> tuple[str, ...]:
    """Flags of the compiler that let vectors call glibc's vector functions, where there are any."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, ValueError, OSError):
        return ()
    major, minor = (int(x) for x in version.split(".")[:2])
    if name != "glibc" or (major, minor) < (2, 22) or os.uname().machine != "x86_64":
        return ()
    return ("-DMVEC=35" if (major, minor) >= (2, 35) else "-DMVEC=22", "-lmvec", "-lm")


def statements(
    graph: Graph,
    targets: Sequence[Target | Scatter],
    leaf_name: LeafName,
    shared: Collection[int] = (),
    prefix: str = "v",
    known: Mapping[int, str] | None = None,
) -> tuple[str, int]:
    """Statements that compute nodes, every common part once.

    Args:
        graph: the expressions.
        targets: what is assigned to, the node, and "=" or "+="; or a `Scatter`.
        leaf_name: how a leaf is called, by its data: ("y", 3) may be "y[3]". An array that is looked up, (kind, k), must come out as a
            pointer: to R for tables and shared inputs, to S for others.
        shared: inputs k that all trajectories share; leaves ("a", k, j) of them, tables, and leaves of kind "c" (constants) are R.
        prefix: of the names of values.
        known: nodes whose values, of each trajectory, are there already, and how they are called.

    Returns:
        The statements, a line each, and how many values they compute.
    """
    writer = _Writer(graph, leaf_name, shared, prefix, known or {})
    needed = writer.needed([x for target in targets for x in ((target[1],) if not isinstance(target, Scatter) else target[1:])])
    lines = [line for node in needed if (line := writer.line(node))]
    for target in targets:
        if isinstance(target, Scatter):
            lines.append(writer.scatter(target))
        else:
            lines.append(f"  {target[0]}{target[2]}{writer.own(target[1])};")
    return "\n".join(lines), len(needed)


class _Writer:
    """Names of nodes as they are written."""

    def __init__(self, graph: Graph, leaf_name: LeafName, shared: Collection[int], prefix: str, known: Mapping[int, str]) -> None:
        self._known = known
        self._graph, self._leaf_name, self._inputs, self._prefix = graph, leaf_name, frozenset(shared), prefix
        self._names: dict[int, str] = {}
        self._is_shared: dict[int, bool] = {}

    def needed(self, nodes: Sequence[int]) -> list[int]:
        """Nodes and what they are made of, arguments first."""
        return self._graph.cone(nodes, lambda node: () if node in self._known else self._graph.parts(node))

    def own(self, node: int) -> str:
        """The name of a node, as a value of each trajectory."""
        return f"{_MADE_OWN[self._graph.types[node]]}({self._names[node]})" if self._is_shared[node] else self._names[node]

    def line(self, node: int) -> str:
        """The statement of a node; "" for one that is written where it is used."""
        g = self._graph
        name, data = g.names[node], g.data[node]
        if node in self._known:
            self._names[node], self._is_shared[node] = self._known[node], False
            return ""
        self._is_shared[node] = all(self._is_shared[x] for x in g.parts(node)) and self._given(name, data)
        if name == "constant":
            self._names[node] = _literal(data[0])
            return ""
        if name == "leaf":
            self._names[node] = self._leaf_name(data)
            return ""
        if name in ("stop", "given"):
            self._names[node] = self._names[g.arguments[node][0]]
            return ""
        text = self._names[node] = f"{self._prefix}{node}"
        kind = (_SHARED if self._is_shared[node] else _OWN)[g.types[node]]
        return f"  const {kind} {text}={self._expression(node, name, data)};"

    def _given(self, name: str, data: tuple) -> bool:
        """Whether what a node reads of itself is shared."""
        if name not in ("leaf", "look", "search"):
            return True
        return data[0] in ("c", "k") or (data[0] == "a" and data[1] in self._inputs)

    def _expression(self, node: int, name: str, data: tuple) -> str:
        g = self._graph
        arguments = g.arguments[node]
        alike = [self._names[x] if self._is_shared[node] else self.own(x) for x in arguments]
        names = [self._names[x] for x in arguments]
        match name:
            case "neg":
                return f"(-{names[0]})"
            case "not":
                return f"m_not({alike[0]})"
            case "and" | "or":
                return f"({alike[0]}{'&' if name == 'and' else '|'}{alike[1]})"
            case "sel":
                return f"m_sel({names[0]},{alike[1]},{alike[2]})"
            case "tofloat":
                return f"m_float({names[0]})"
            case "single":
                return f"m_single({names[0]})"
            case "toint":
                return f"m_int({names[0]})"
            case "look":
                kind, k, base, step, count = data
                return f"m_look({self._leaf_name((kind, k))},{base},{step},{count},{names[0]})"
            case "search":
                kind, k, base, count, right = data
                return f"m_search({self._leaf_name((kind, k))},{base},{count},{'true' if right else 'false'},{alike[0]})"
        if name == "pow" and (power := _power(g.value(arguments[1]))):
            return power.format(names[0])
        if name in FUNCTIONS:
            return f"m_{name}({names[0]})"
        if name in _CALLED:
            return f"m_{name}({alike[0]},{alike[1]})"
        if name in ("lt", "le", "gt", "ge", "eq", "ne"):
            return f"({'bool' if self._is_shared[node] else 'M'})({alike[0]}{_SIGNS[name]}{alike[1]})"
        if g.types[node] == "int":
            names = alike
        return f"({names[0]}{_SIGNS[name]}{names[1]})"

    def scatter(self, target: Scatter) -> str:
        """The statement of a scatter."""
        g = self._graph
        _, _, base, step, count = g.data[target.look]
        at = self._names[g.arguments[target.look][0]]
        return f"  m_scatter({target.array},{base},{step},{count},{at},{self.own(target.value)});"


def _literal(value: float | int | bool) -> str:
    """A constant."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"I({value}LL)"
    if math.isfinite(value):
        return f"R({value!r})"
    return "NOT_A_NUMBER" if value != value else "INFINITE" if value > 0 else "(-INFINITE)"


def _power(exponent: float | int | bool | None) -> str:
    """A constant exponent by products, roots and quotients, as ATen does; "" for others."""
    if exponent == 0.5:
        return "m_sqrt({})"
    if exponent == -0.5:
        return "(R(1)/m_sqrt({}))"
    if exponent is None or exponent not in range(-8, 9):
        return ""
    product = f"m_pow{int(abs(exponent))}({{}})" if abs(exponent) > 1 else "{}"
    return product if exponent > 0 else f"(R(1)/{product})"
