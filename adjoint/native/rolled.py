"""Outputs whose expressions are alike but for the indices of their leaves, as loops over tables of indices.

A discretised equation has thousands of outputs and a handful of different expressions. Written out, its text grows with the number of
outputs, and so does the time of the compiler; as loops it does not. Values that many outputs are made of (hidden units of a network, say)
are computed first, in loops of their own, and kept in an array ``w``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

from .expressions import FUNCTIONS, Graph
from .reverse import cotangents
from .text import LeafName, Scatter, Target, statements

__all__ = ["LEAST", "Rolled", "rolled"]

#: fewer outputs are written out, unless they are made of this many values
LEAST = 24
_LONG = 2000
#: expressions of the Jacobian, each of one output by itself, are looked for if they are not longer
_MOST_OF_JACOBIAN = 60_000
_LONGEST_JACOBIAN = 3000
#: so many rows of it are computed one by one, all columns of them
_MOST_ROWS = 128
#: a value is computed once and kept if it is used more than once and costs as much as this
_KEPT_COST = 6
_FUNCTION_COST = 8
_COMMUTATIVE = frozenset({"add", "mul", "eq", "ne", "and", "or"})


@dataclass(frozen=True)
class Rolled:
    """Bodies of functions of one trajectory (or of a vector of them).

    Attributes:
        tables: constants that have to stand before the functions.
        fun: writes the outputs.
        vjp: adds derivatives of ``sum(v * outputs)`` to those by leaves, which have to be set before.
        jac: writes the entries of the Jacobian by "y", in the order of ``pattern``, and those slopes by "t" that are not zero; "" where
            that is longer than is sensible. Where outputs are few, and made of kept values, it is computed row by row, and all entries are
            in the pattern.
        pattern: row and column of every entry.
        steady: those of entries that are constants.
        loops: how many loops the outputs have become.
        size: how many values are computed in the text of ``fun`` and ``vjp``.
    """

    tables: str
    fun: str
    vjp: str
    jac: str
    pattern: tuple[tuple[int, int], ...]
    steady: tuple[tuple[int, int], ...]
    loops: int
    size: int


@dataclass
class _Group:
    """Expressions alike: a graph with leaves (kind, ..., slot), and for each member the indices of its leaves by slot.

    Constants that differ from member to member are leaves ("c", slot).
    """

    graph: Graph
    root: int
    slots: list[tuple]
    targets: list[int] = field(default_factory=list)
    members: list[tuple] = field(default_factory=list)


def rolled(
    graph: Graph,
    outputs: Sequence[int],
    leaf_name: LeafName,
    cotangent_name: LeafName,
    shared: Collection[int] = (),
    kinds: Collection[str] = ("y", "a"),
    output_name: Callable[[str], str] = "o[{}]".format,
    seed_name: Callable[[str], str] = "v[{}]".format,
    entry_name: Callable[[str], str] = "jy[{}]".format,
    slope_name: Callable[[str], str] = "slope[{}]".format,
) -> Rolled | None:
    """Functions that compute outputs and their derivatives in loops; None where that is not shorter.

    Args:
        graph: the expressions.
        outputs: nodes of the outputs.
        leaf_name: how a leaf is called, by its data. Its last index may be text: ("y", "I[2]").
        cotangent_name: how the derivative by a leaf is called; by (kind, k) the array of them, for look-ups.
        shared: inputs that all trajectories share.
        kinds: of leaves that derivatives are wanted by.
        output_name, seed_name, entry_name, slope_name: how outputs, their cotangents, entries of the Jacobian and slopes are called.
    """
    straight = len(graph.cone(outputs))
    if len(outputs) < LEAST and straight < _LONG:
        return None
    kept = _kept(graph, outputs)
    levels = _groups(graph, outputs, kept)
    length = sum(len(group.graph) for level in levels for group in level)
    if 2 * length > straight:
        return None
    writer = _Loops(leaf_name, shared)
    forward = [writer.values(group, "w[{}]".format) for level in levels[:-1] for group in level]
    results = [writer.values(group, output_name) for group in levels[-1]]

    def backward(seed: Callable[[str], str], by: LeafName, wanted: Collection[str]) -> str:
        found = [writer.derivatives(group, seed, by, wanted) for group in levels[-1]]
        found += [writer.derivatives(group, "wb[{}]".format, by, wanted, True) for level in reversed(levels[:-1]) for group in level]
        return "\n".join(found)

    room = f"  S w[{len(kept)}], wb[{len(kept)}];\n" if kept else ""
    cleared = f"  for (int i = 0; i < {len(kept)}; i++) wb[i] = K(R(0));\n" if kept else ""
    vjp = backward(seed_name, cotangent_name, kinds)
    size = writer.size
    jac, pattern, steady = "", [], []
    if sum(_lengths(graph, outputs)) <= _MOST_OF_JACOBIAN:
        (whole,) = _groups(graph, outputs, {}) if kept else levels
        if sum(len(group.graph) for group in whole) <= min(straight, _LONGEST_JACOBIAN):
            jac, pattern, steady = writer.jacobian(whole, entry_name, slope_name)
    if not jac and len(outputs) <= _MOST_ROWS:
        states = [data[1] for name, data in zip(graph.names, graph.data, strict=True) if name == "leaf" and data[0] == "y"]
        columns = 1 + max(states, default=0)
        rows = _ROWS.format(
            forward="\n".join(forward), cleared=cleared, outputs=len(outputs), columns=columns, entry=entry_name(f"r*{columns}+i"),
            row=backward("seed[{}]".format, lambda data: slope_name("r") if data == ("t",) else f"row[{data[1]}]", ("y", "t")),
        )  # fmt: skip
        jac, pattern = room + rows, [(i, j) for i in range(len(outputs)) for j in range(columns)]
    return Rolled(
        "".join(writer.tables),
        room + "\n".join([*forward, *results]),
        room + cleared + "\n".join([*forward, vjp]),
        jac,
        tuple(pattern),
        tuple(steady),
        sum(map(len, levels)),
        size,
    )


_ROWS = """{forward}
  S seed[{outputs}], row[{columns}];
  for (int r = 0; r < {outputs}; r++) {{
{cleared}  for (int i = 0; i < {outputs}; i++) seed[i] = K(R(i == r));
  for (int i = 0; i < {columns}; i++) row[i] = K(R(0));
{row}
  for (int i = 0; i < {columns}; i++) {entry} = row[i];
  }}"""


def _lengths(graph: Graph, outputs: Sequence[int]) -> list[int]:
    """How many values each output is made of, those that are used more than once counted as often."""
    length: dict[int, int] = {}
    for node in graph.cone(outputs):
        length[node] = min(1 + sum(length[x] for x in graph.arguments[node]), _MOST_OF_JACOBIAN)
    return [length[node] for node in outputs]


def _kept(graph: Graph, outputs: Sequence[int]) -> dict[int, int]:
    """Nodes that are computed once and kept, with their places in ``w``."""
    cone = graph.cone(outputs)
    uses = dict.fromkeys(cone, 0)
    for node in cone:
        for x in set(graph.arguments[node]):
            uses[x] += 1
    for node in outputs:
        uses[node] += 1
    kept: dict[int, int] = {}
    cost: dict[int, int] = {}
    for node in cone:
        name, arguments = graph.names[node], graph.arguments[node]
        own = 0 if not arguments else _FUNCTION_COST if name in FUNCTIONS or name in ("pow", "search", "look") else 1
        cost[node] = own + sum(cost[x] for x in arguments if x not in kept)
        if uses[node] > 1 and cost[node] >= _KEPT_COST and graph.types[node] == "float":
            kept[node] = len(kept)
    return kept


def _groups(graph: Graph, outputs: Sequence[int], kept: dict[int, int]) -> list[list[_Group]]:
    """Groups of kept values, level by level, as they are made of each other, and at last those of the outputs."""
    shapes = _shapes(graph, outputs)
    level: dict[int, int] = {}
    height: dict[int, int] = {}
    for node in graph.cone(outputs):
        below = [level[x] + 1 if x in kept else height[x] for x in graph.arguments[node]]
        height[node] = max(below, default=0)
        if node in kept:
            level[node] = height[node]
    count = max(level.values(), default=-1) + 1
    tables: list[dict[tuple, _Group]] = [{} for _ in range(count + 1)]
    for node, place in kept.items():
        _join(tables[level[node]], graph, node, place, kept, shapes)
    for place, node in enumerate(outputs):
        _join(tables[-1], graph, node, place, kept, shapes, whole=node not in kept)
    return [[_without_equal_constants(group) for group in table.values()] for table in tables]


def _shapes(graph: Graph, outputs: Sequence[int]) -> dict[int, int]:
    """A number for every node that is the same for nodes alike but for indices and constants."""
    numbers: dict[tuple, int] = {}
    shapes: dict[int, int] = {}
    for node in graph.cone(outputs):
        name, data = graph.names[node], graph.data[node]
        kind = data[:-1] if name == "leaf" and len(data) > 1 else () if name == "constant" else data
        below = [shapes[x] for x in graph.arguments[node]]
        key = (name, kind, graph.types[node], *(sorted(below) if name in _COMMUTATIVE else below))
        shapes[node] = numbers.setdefault(key, len(numbers))
    return shapes


def _join(
    table: dict[tuple, _Group], graph: Graph, root: int, place: int, kept: dict[int, int], shapes: dict[int, int], whole: bool = True
) -> None:
    """Put an expression to those it is like."""
    code, slots, indices = _canonical(graph, root, kept, shapes, whole)
    group = table.get(code)
    if group is None:
        group = table[code] = _Group(*_local(code), slots)
    group.targets.append(place)
    group.members.append(tuple(indices))


def _canonical(
    graph: Graph, root: int, kept: dict[int, int], shapes: dict[int, int], whole: bool
) -> tuple[tuple, list[tuple], list[int | float]]:
    """An expression as code in which leaves have numbers in the order of their use; what they are; and their indices."""
    names, arguments, data, types = graph.names, graph.arguments, graph.data, graph.types
    numbers: dict[int, int] = {}
    code: list[tuple] = []
    slots: list[tuple] = []
    indices: list[int | float] = []

    def slot(kind: tuple, index: int | float) -> tuple:
        slots.append(kind)
        indices.append(index)
        return ("slot", *kind, len(slots) - 1)

    waiting: list[tuple[int, tuple[int, ...] | None]] = [(root, None)]
    while waiting:
        node, below = waiting.pop()
        if node in numbers:
            continue
        if node in kept and not (node == root and whole):
            entry = slot(("w",), kept[node])
        elif names[node] == "leaf" and len(data[node]) > 1:
            entry = slot(data[node][:-1], data[node][-1])
        elif names[node] == "constant" and types[node] == "float":
            entry = slot(("c",), data[node][0])
        elif below is None and arguments[node]:
            below = arguments[node]
            if names[node] in _COMMUTATIVE:
                below = tuple(sorted(below, key=shapes.__getitem__))
            waiting.append((node, below))
            waiting += [(x, None) for x in reversed(below)]
            continue
        else:
            # 1 is not True
            entry = (names[node], data[node], types[node], *(numbers[x] for x in below or ()))
        numbers[node] = len(code)
        code.append(entry)
    return tuple(code), slots, indices


def _copied(graph: Graph, name: str, arguments: Sequence[int], data: tuple) -> int:
    """A node of another graph in this one."""
    match name:
        case "constant":
            return graph.constant(data[0])
        case "leaf":
            return graph.leaf(*data)
        case "look":
            kind, k, base, step, count = data
            return graph.look(kind, k, base, step, count, arguments[0])
        case "search":
            kind, k, base, count, right = data
            return graph.search(kind, k, base, count, right, arguments[0])
    return graph.op(name, *arguments)


def _local(code: tuple) -> tuple[Graph, int]:
    """The graph that code stands for."""
    graph = Graph()
    nodes: list[int] = []
    for name, *rest in code:
        if name == "slot":
            nodes.append(graph.leaf(*rest))
        else:
            nodes.append(_copied(graph, name, [nodes[i] for i in rest[2:]], rest[0]))
    return graph, nodes[-1]


def _without_equal_constants(group: _Group) -> _Group:
    """A group in which constants that are the same for all members stand in the expressions."""
    same = {
        slot: float(first)
        for slot, (kind, first) in enumerate(zip(group.slots, group.members[0], strict=True))
        if kind == ("c",) and all(float(m[slot]).hex() == float(first).hex() for m in group.members)
    }
    if not same:
        return group
    graph, old = Graph(), group.graph
    nodes: list[int] = []
    for name, arguments, data in zip(old.names, old.arguments, old.data, strict=True):
        if name == "leaf" and data[0] == "c" and data[1] in same:
            nodes.append(graph.constant(same[data[1]]))
        else:
            nodes.append(_copied(graph, name, [nodes[x] for x in arguments], data))
    return _Group(graph, nodes[group.root], group.slots, group.targets, group.members)


class _Loops:
    """Text of loops, and the tables that they go through."""

    def __init__(self, leaf_name: LeafName, shared: Collection[int]) -> None:
        self._leaf_name, self._shared = leaf_name, frozenset(shared)
        self.tables: list[str] = []
        self.size = 0
        self._columns: dict[tuple, str] = {}

    def _index(self, column: Sequence[int | float], kind: str = "int") -> str:
        """An index by the number q of the member: a number, an even progression, or a table."""
        first, step = column[0], (column[1] - column[0] if len(column) > 1 else 0)
        if kind == "int" and all(x == first + step * q for q, x in enumerate(column)):
            return str(first) if step == 0 else f"{first}+{'' if step == 1 else f'{step}*'}q"
        key = (kind, *column)
        if key not in self._columns:
            self._columns[key] = name = f"T{len(self._columns)}"
            values = ",".join(map(repr, column)).replace("nan", "NOT_A_NUMBER").replace("inf", "INFINITE")
            self.tables.append(f"TABLE {kind} {name}[{len(column)}]={{{values}}};\n")
        return f"{self._columns[key]}[q]"

    def _names(self, group: _Group) -> tuple[list[str], LeafName]:
        """Indices of slots, and names of leaves by slot."""
        columns = list(zip(*group.members, strict=True)) if group.slots else []
        used = {data[-1] for name, data in zip(group.graph.names, group.graph.data, strict=True) if name == "leaf" and len(data) > 1}
        index = [
            self._index(column, "R" if kind == ("c",) else "int") if slot in used else ""
            for slot, (kind, column) in enumerate(zip(group.slots, columns, strict=True))
        ]

        def name(data: tuple) -> str:
            kind, *rest = data
            if kind == "c":
                return index[rest[0]]
            if kind == "w":
                return f"w[{index[rest[0]]}]"
            if len(data) == 1 or (kind in ("a", "k") and len(rest) == 1):
                return self._leaf_name(data)
            return self._leaf_name((*data[:-1], index[rest[-1]]))

        return index, name

    def _loop(self, group: _Group, targets: Sequence[Target | Scatter], name: LeafName, known: str = "") -> str:
        body, size = statements(group.graph, targets, name, self._shared, known={group.root: known} if known else None)
        self.size += size
        return f"  for (int q = 0; q < {len(group.members)}; q++) {{\n{body}\n  }}"

    def values(self, group: _Group, target: Callable[[str], str]) -> str:
        """A loop that computes the members of a group."""
        _, name = self._names(group)
        return self._loop(group, [(target(self._index(group.targets)), group.root, "=")], name)

    def derivatives(
        self, group: _Group, seed: Callable[[str], str], cotangent_name: LeafName, kinds: Collection[str], kept: bool = False
    ) -> str:
        """A loop that adds to the derivatives by the leaves of the members; ``kept``: their values are."""
        index, name = self._names(group)
        g = group.graph
        slopes = cotangents(g, {group.root: g.leaf("seed")}, (*kinds, "w"))
        if not slopes:
            return ""
        at = seed(self._index(group.targets))
        value = f"w[{self._index(group.targets)}]" if kept else ""
        targets = list(_added(g, slopes, index, cotangent_name))
        return self._loop(group, targets, lambda data: at if data == ("seed",) else name(data), value)

    def jacobian(
        self, groups: Sequence[_Group], entry: Callable[[str], str], slope: Callable[[str], str]
    ) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Loops that write entries of the Jacobian, and the rows and columns of these, and of those that are constants."""
        pattern: list[tuple[int, int]] = []
        steady: list[tuple[int, int]] = []
        loops = []
        for group in groups:
            _, name = self._names(group)
            g = group.graph
            slopes = cotangents(g, {group.root: g.constant(1.0)}, ("y", "t"))
            targets: list[Target | Scatter] = []
            for leaf, node in slopes.items():
                if g.data[leaf] == ("t",):
                    targets.append((slope(self._index(group.targets)), node, "="))
                    continue
                slot, start = g.data[leaf][1], len(pattern)
                pattern += [(row, int(member[slot])) for row, member in zip(group.targets, group.members, strict=True)]
                if all(g.names[x] == "constant" or g.data[x][:1] == ("c",) for x in g.cone([node]) if not g.arguments[x]):
                    steady += pattern[start:]
                targets.append((entry(self._index(range(start, len(pattern)))), node, "="))
            if targets:
                loops.append(self._loop(group, targets, name))
        return "\n".join(loops), pattern, steady


def _added(g: Graph, slopes: dict[int, int], index: list[str], cotangent_name: LeafName) -> Iterator[Target | Scatter]:
    """What is added to which derivatives."""
    for leaf, node in slopes.items():
        data = g.data[leaf]
        if g.names[leaf] == "look":
            yield Scatter(cotangent_name(data[:2]), leaf, node)
        elif data[0] == "w":
            yield f"wb[{index[data[1]]}]", node, "+="
        else:
            yield cotangent_name(data if len(data) == 1 else (*data[:-1], index[data[-1]])), node, "+="
