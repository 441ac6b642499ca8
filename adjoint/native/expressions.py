"""Scalar expressions in a graph without repetitions: every node is made once, and is a number that stands for it.

A node has a name, the nodes that it is made of, data that are no nodes (the value of a constant, the place of a leaf), and a type. Node
numbers and integers of any other meaning (elements of arrays, values) stand in different lists, so that one is never taken for the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

__all__ = ["BOOLEAN", "FUNCTIONS", "Graph", "Number", "Type"]

Number = float | int | bool
Type = Literal["float", "int", "bool"]

#: functions of one number that text calls by name, and how a constant is put through them (None: it is left to the compiler)
FUNCTIONS: dict[str, Callable[[np.float64], np.float64] | None] = {
    "exp": np.exp, "expm1": np.expm1, "exp2": np.exp2, "log": np.log, "log1p": np.log1p, "log2": np.log2, "log10": np.log10,
    "sin": np.sin, "cos": np.cos, "tan": np.tan, "asin": np.arcsin, "acos": np.arccos, "atan": np.arctan,
    "sinh": np.sinh, "cosh": np.cosh, "tanh": np.tanh, "asinh": np.arcsinh, "acosh": np.arccosh, "atanh": np.arctanh,
    "sqrt": np.sqrt, "abs": np.abs, "sign": np.sign, "floor": np.floor, "ceil": np.ceil, "trunc": np.trunc, "round": np.rint,
    "erf": None, "erfc": None, "erfinv": None, "lgamma": None, "digamma": None, "trigamma": None, "sigmoid": None, "softplus": None,
}  # fmt: skip
#: of two numbers
_ARITHMETIC = {"add", "sub", "mul", "div", "max", "min", "pow", "atan2", "fmod", "remainder", "floordiv", "hypot"}
_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
_LOGIC = {"and", "or", "not"}
BOOLEAN = frozenset(_COMPARISONS | _LOGIC)
_ALWAYS_FLOAT = {"div", "pow", "atan2", "hypot"}

_FOLDED: dict[str, Callable[..., Number]] = {
    "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "div": lambda x, y: np.float64(x) / y,
    "max": np.maximum, "min": np.minimum, "pow": lambda x, y: np.float64(x) ** np.float64(y),
    "atan2": np.arctan2, "hypot": np.hypot, "fmod": np.fmod, "remainder": np.remainder, "floordiv": lambda x, y: x // y,
    "lt": lambda x, y: x < y, "le": lambda x, y: x <= y, "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y,
    "eq": lambda x, y: x == y, "ne": lambda x, y: x != y,
    "and": lambda x, y: x and y, "or": lambda x, y: x or y, "not": lambda x: not x,
    "neg": lambda x: -x, "tofloat": float, "stop": lambda x: x, "single": np.float32,
}  # fmt: skip


class Graph:
    """Scalar expressions.

    ``names``, ``arguments``, ``data`` and ``types`` tell of every node: what it is called, the nodes it is made of, what belongs to it
    that is no node, and whether its value is a float, an integer or a truth value. An argument always has a lower number than a node
    made of it.

    Nodes without arguments: ``constant`` (data: the value) and ``leaf`` (data: kind and indices). Besides functions and arithmetic there
    are ``sel`` (condition, value if true, value if false), ``stop`` (its argument, but without a derivative), ``given`` (see `given`),
    ``toint``, ``tofloat``, ``single`` (rounded to single precision), ``look`` (see `look`) and ``search`` (see `search`).
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.arguments: list[tuple[int, ...]] = []
        self.data: list[tuple] = []
        self.types: list[Type] = []
        self._known: dict[tuple, int] = {}

    def __len__(self) -> int:
        return len(self.names)

    def equals(self, other: Graph) -> bool:
        """Whether two graphs have the same nodes in the same order."""
        return list(self._known) == list(other._known)

    def _node(self, name: str, arguments: tuple[int, ...], data: tuple, type: Type, key: object = None) -> int:
        known = (name, arguments, data if key is None else key)
        node = self._known.get(known)
        if node is None:
            node = self._known[known] = len(self.names)
            self.names.append(name)
            self.arguments.append(arguments)
            self.data.append(data)
            self.types.append(type)
        return node

    def constant(self, value: Number) -> int:
        """A constant; 1, 1.0 and True are three, and so are 0.0 and -0.0."""
        if isinstance(value, (bool, np.bool_)):
            return self._node("constant", (), (bool(value),), "bool", ("bool", bool(value)))
        if isinstance(value, (int, np.integer)):
            return self._node("constant", (), (int(value),), "int", ("int", int(value)))
        return self._node("constant", (), (float(value),), "float", ("float", float(value).hex()))

    def leaf(self, kind: str, *index: int) -> int:
        """A float that is given: ("t",), ("y", i), ("a", k, j), or any other kind."""
        return self._node("leaf", (), (kind, *index), "float")

    def look(self, kind: str, k: int, base: int, step: int, count: int, at: int) -> int:
        """Leaf ``(kind, k, base + step * i)`` with the value of node ``at`` for i; NaN where i is not in [0, count)."""
        return self._node("look", (at,), (kind, k, base, step, count), "float")

    def search(self, kind: str, k: int, base: int, count: int, right: bool, value: int) -> int:
        """Where ``value`` belongs among the sorted leaves ``(kind, k, base + i)``, i < count: how many of them are below it (``right``: or
        equal to it); all of them for NaN, as for ``torch.searchsorted``."""
        return self._node("search", (value,), (kind, k, base, count, right), "int")

    def given(self, value: int, slopes: Iterable[tuple[int, int]]) -> int:
        """``value``, with derivatives that are told: by every x of the pairs (x, slope) its slope."""
        return self.op("given", value, *(x for pair in slopes for x in pair))

    def cone(self, nodes: Iterable[int], parts: Callable[[int], Iterable[int]] | None = None) -> list[int]:
        """Nodes and what they are made of, arguments first; ``parts``: those of a node, by default its arguments."""
        found: set[int] = set()
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += self.arguments[node] if parts is None else parts(node)
        return sorted(found)

    def parts(self, node: int) -> tuple[int, ...]:
        """What the value of a node is made of: its arguments, but not told slopes."""
        return self.arguments[node][:1] if self.names[node] == "given" else self.arguments[node]

    def value(self, node: int) -> Number | None:
        """The value of a constant, None for others."""
        return self.data[node][0] if self.names[node] == "constant" else None

    def is_zero(self, node: int) -> bool:
        """Whether a node is the constant 0."""
        return self.names[node] == "constant" and self.data[node][0] == 0

    def as_float(self, node: int) -> int:
        """A node as a float."""
        if self.types[node] == "float":
            return node
        if (value := self.value(node)) is not None:
            return self.constant(float(value))
        if self.types[node] == "bool":
            return self.op("sel", node, self.constant(1.0), self.constant(0.0))
        return self._node("tofloat", (node,), (), "float")

    def as_int(self, node: int) -> int:
        """A node as an integer, floats cut towards zero."""
        if self.types[node] == "int":
            return node
        value = self.value(node)
        if value is not None and abs(value) < 2**62:
            return self.constant(int(value))
        if self.types[node] == "bool":
            return self.op("sel", node, self.constant(1), self.constant(0))
        return self._node("toint", (node,), (), "int")

    def as_bool(self, node: int) -> int:
        """Whether a node is not zero."""
        return node if self.types[node] == "bool" else self.op("ne", node, self.constant(0.0 if self.types[node] == "float" else 0))

    def op(self, name: str, *nodes: int) -> int:
        """A function, arithmetic, comparison, logic, ``neg``, ``sel`` or ``stop`` of nodes.

        Only what holds for every number is simplified: ``x * 0`` stays (NaN), and so does ``x + 0.0`` (the sign of zero).
        """
        if name == "tofloat":
            return self.as_float(*nodes)
        if name == "toint":
            return self.as_int(*nodes)
        nodes = self._alike(name, nodes)
        folded = self._fold(name, nodes)
        if folded is None:
            folded = self._simplify(name, nodes)
        if folded is not None:
            return folded
        if name in ("add", "mul", "eq", "ne", "and", "or") and nodes[0] > nodes[1]:
            nodes = nodes[::-1]
        return self._node(name, nodes, (), self._type(name, nodes))

    def total(self, name: str, nodes: Iterable[int]) -> int:
        """Nodes joined by an operation of two, first to last."""
        first, *others = nodes
        for node in others:
            first = self.op(name, first, node)
        return first

    def _alike(self, name: str, nodes: tuple[int, ...]) -> tuple[int, ...]:
        """Arguments of one type."""
        if name in _LOGIC:
            return tuple(self.as_bool(x) for x in nodes)
        if name in FUNCTIONS or name in _ALWAYS_FLOAT:
            keeps = name in ("abs", "sign", "floor", "ceil", "trunc", "round") and self.types[nodes[0]] == "int"
            return nodes if keeps else tuple(self.as_float(x) for x in nodes)
        head, numbers = (nodes[:1], nodes[1:]) if name == "sel" else ((), nodes)
        types = {self.types[x] for x in numbers}
        if "float" in types:
            numbers = tuple(self.as_float(x) for x in numbers)
        elif "int" in types or name not in ("sel", "stop", "eq", "ne"):
            numbers = tuple(self.as_int(x) for x in numbers)
        return tuple(self.as_bool(x) for x in head) + numbers

    def _type(self, name: str, nodes: tuple[int, ...]) -> Type:
        if name in BOOLEAN:
            return "bool"
        return self.types[nodes[-1]]

    def _fold(self, name: str, nodes: tuple[int, ...]) -> int | None:
        """Value of an operation on constants, as a constant."""
        if any(self.names[x] != "constant" for x in nodes):
            return None
        rule = FUNCTIONS.get(name) or _FOLDED.get(name)
        if rule is None:
            return None
        values = [self.data[x][0] for x in nodes]
        whole = all(self.types[x] != "float" for x in nodes)
        if whole and name in ("floordiv", "fmod", "remainder") and values[1] == 0:
            return None
        with np.errstate(all="ignore"):
            value = rule(*(values if whole and name not in FUNCTIONS else [np.float64(v) for v in values]))
        type = self._type(name, nodes)
        return self.constant({"float": float, "int": int, "bool": bool}[type](value))

    def _simplify(self, name: str, nodes: tuple[int, ...]) -> int | None:
        """What an operation is that need not be done."""
        names, value = self.names, self.value
        first, last = nodes[0], nodes[-1]
        match name:
            case "add":
                for x, y in (nodes, nodes[::-1]):
                    if names[x] == "neg":
                        return self.op("sub", y, self.arguments[x][0])
            case "sub":
                if self.is_zero(last) and str(value(last)) != "-0.0":
                    return first
                if names[last] == "neg":
                    return self.op("add", first, self.arguments[last][0])
            case "mul":
                for x, y in (nodes, nodes[::-1]):
                    if value(x) == 1:
                        return y
                    if value(x) == -1:
                        return self.op("neg", y)
            case "div" if value(last) == 1:
                return first
            case "neg" if names[first] == "neg":
                return self.arguments[first][0]
            case "sel":
                if (truth := value(first)) is not None:
                    return nodes[1] if truth else nodes[2]
                if nodes[1] == nodes[2]:
                    return nodes[1]
            case "and" | "or":
                for x, y in (nodes, nodes[::-1]):
                    if (truth := value(x)) is not None:
                        return y if truth == (name == "and") else x
                if first == last:
                    return first
            case "single" if names[first] == "single" or self.types[first] != "float":
                return first
            case "given" if len(nodes) == 1 or names[first] == "constant":
                return first
            case "not" if names[first] == "not":
                return self.arguments[first][0]
            case "pow" if value(last) in (0, 1):
                return first if value(last) == 1 else self.constant(1.0)
            case "floor" | "ceil" | "trunc" | "round" if self.types[first] == "int":
                return first
        return None
