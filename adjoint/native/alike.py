"""Expressions that are alike but for the indices of their leaves, in groups, and loops over the members of a group."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from .expressions import FUNCTIONS, Graph
from .reverse import cotangents
from .text import LeafName, Scatter, Target, statements

__all__ = ["Group", "Loops", "added", "groups_of", "is_constant", "kept_values"]

#: a value is computed once and kept if it is used more than once and costs as much as this
_KEPT_COST = 6
_FUNCTION_COST = 8
_COMMUTATIVE = frozenset({"add", "mul", "eq", "ne", "and", "or"})


@dataclass
class Group:
    """Expressions alike: a graph with leaves (kind, ..., slot), and for each member the indices of its leaves by slot.

    Constants that differ from member to member are leaves ("c", slot). ``targets``: where each is written, or added to.
    """

    graph: Graph
    root: int
    slots: list[tuple]
    targets: list[int] = field(default_factory=list)
    members: list[tuple] = field(default_factory=list)


def kept_values(graph: Graph, outputs: Sequence[int]) -> dict[int, int]:
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


def groups_of(graph: Graph, outputs: Sequence[int], kept: dict[int, int], summed: bool = False) -> list[list[Group]]:
    """Groups of kept values, level by level, as they are made of each other, and at last those of the outputs; ``summed``: those of the
    terms that outputs are sums of, each with the output that it is added to."""
    parts = [_terms(graph, node, kept) if summed else [node] for node in outputs]
    shapes = _shapes(graph, [*outputs, *(term for terms in parts for term in terms)])
    level: dict[int, int] = {}
    height: dict[int, int] = {}
    for node in graph.cone(outputs):
        below = [level[x] + 1 if x in kept else height[x] for x in graph.arguments[node]]
        height[node] = max(below, default=0)
        if node in kept:
            level[node] = height[node]
    count = max(level.values(), default=-1) + 1
    tables: list[dict[tuple, Group]] = [{} for _ in range(count + 1)]
    for node, place in kept.items():
        _join(tables[level[node]], graph, node, place, kept, shapes)
    for place, terms in enumerate(parts):
        for node in terms:
            _join(tables[-1], graph, node, place, kept, shapes, whole=node not in kept)
    return [[_without_equal_constants(group) for group in table.values()] for table in tables]


def _terms(graph: Graph, root: int, kept: Collection[int]) -> list[int]:
    """What a node is the sum of, in its order."""
    found: list[int] = []
    waiting = [(root, False)]
    while waiting:
        node, negative = waiting.pop()
        name, below = graph.names[node], graph.arguments[node]
        if node in kept or name not in ("add", "sub", "neg") or graph.types[node] != "float":
            found.append(graph.op("neg", node) if negative else node)
        elif name == "neg":
            waiting.append((below[0], not negative))
        else:
            waiting += [(below[1], negative ^ (name == "sub")), (below[0], negative)]
    return found


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
    table: dict[tuple, Group], graph: Graph, root: int, place: int, kept: dict[int, int], shapes: dict[int, int], whole: bool = True
) -> None:
    """Put an expression to those it is like."""
    code, slots, indices = _canonical(graph, root, kept, shapes, whole)
    group = table.get(code)
    if group is None:
        group = table[code] = Group(*_local(code), slots)
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


def copied(graph: Graph, name: str, arguments: Sequence[int], data: tuple) -> int:
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
            nodes.append(copied(graph, name, [nodes[i] for i in rest[2:]], rest[0]))
    return graph, nodes[-1]


def _without_equal_constants(group: Group) -> Group:
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
            nodes.append(copied(graph, name, [nodes[x] for x in arguments], data))
    return Group(graph, nodes[group.root], group.slots, group.targets, group.members)


class Loops:
    """Text of loops, and the tables that they go through."""

    def __init__(self, leaf_name: LeafName, shared: Collection[int]) -> None:
        self._leaf_name, self._shared = leaf_name, frozenset(shared)
        self.tables: list[str] = []
        self.size = 0
        self._columns: dict[tuple, str] = {}

    def index(self, column: Sequence[int | float], kind: str = "int") -> str:
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

    def _names(self, group: Group) -> tuple[list[str], LeafName]:
        """Indices of slots, and names of leaves by slot."""
        columns = list(zip(*group.members, strict=True)) if group.slots else []
        used = {data[-1] for name, data in zip(group.graph.names, group.graph.data, strict=True) if name == "leaf" and len(data) > 1}
        index = [
            self.index(column, "R" if kind == ("c",) else "int") if slot in used else ""
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

    def indices(self, group: Group) -> list[str]:
        """The index of each slot."""
        return self._names(group)[0]

    def loop(
        self,
        group: Group,
        targets: Sequence[Target | Scatter],
        names: Mapping[tuple, str] = MappingProxyType({}),
        known: str = "",
    ) -> str:
        """A loop over the members of a group; ``names``: of leaves that are none of its slots; ``known``: of its values, where they are."""
        _, name = self._names(group)
        called = lambda data: names[data] if data in names else name(data)  # noqa: E731
        body, size = statements(group.graph, targets, called, self._shared, known={group.root: known} if known else None)
        self.size += size
        return f"  for (int q = 0; q < {len(group.members)}; q++) {{\n{body}\n  }}"

    def values(self, group: Group, target: Callable[[str], str], how: Literal["=", "+="] = "=") -> str:
        """A loop that computes the members of a group."""
        return self.loop(group, [(target(self.index(group.targets)), group.root, how)])

    def derivatives(
        self, group: Group, seed: Callable[[str], str], cotangent_name: LeafName, kinds: Collection[str], kept: bool = False
    ) -> str:
        """A loop that adds to the derivatives by the leaves of the members; ``kept``: their values are."""
        g = group.graph
        slopes = cotangents(g, {group.root: g.leaf("seed")}, (*kinds, "w"))
        if not slopes:
            return ""
        at = seed(self.index(group.targets))
        value = f"w[{self.index(group.targets)}]" if kept else ""
        targets = list(added(g, slopes, self.indices(group), cotangent_name))
        return self.loop(group, targets, {("seed",): at}, value)

    def jacobian(
        self, groups: Sequence[Group], entry: Callable[[str], str], slope: Callable[[str], str]
    ) -> tuple[str, list[tuple[int, int]], list[tuple[int, int]]]:
        """Loops that write entries of the Jacobian, and the rows and columns of these, and of those that are constants."""
        pattern: list[tuple[int, int]] = []
        steady: list[tuple[int, int]] = []
        loops = []
        for group in groups:
            g = group.graph
            slopes = cotangents(g, {group.root: g.constant(1.0)}, ("y", "t"))
            targets: list[Target | Scatter] = []
            for leaf, node in slopes.items():
                if g.data[leaf] == ("t",):
                    targets.append((slope(self.index(group.targets)), node, "="))
                    continue
                slot, start = g.data[leaf][1], len(pattern)
                pattern += [(row, int(member[slot])) for row, member in zip(group.targets, group.members, strict=True)]
                if is_constant(g, node):
                    steady += pattern[start:]
                targets.append((entry(self.index(range(start, len(pattern)))), node, "="))
            if targets:
                loops.append(self.loop(group, targets))
        return "\n".join(loops), pattern, steady


def is_constant(g: Graph, node: int) -> bool:
    """Whether a node is made of constants alone, which may differ from member to member."""
    return all(g.names[x] == "constant" or g.data[x][:1] == ("c",) for x in g.cone([node]) if not g.arguments[x])


def added(g: Graph, slopes: dict[int, int], index: Sequence[str], cotangent_name: LeafName) -> Iterator[Target | Scatter]:
    """What is added to which derivatives."""
    for leaf, node in slopes.items():
        data = g.data[leaf]
        if g.names[leaf] == "look":
            yield Scatter(cotangent_name(data[:2]), leaf, node)
        elif data[0] == "w":
            yield f"wb[{index[data[1]]}]", node, "+="
        else:
            yield cotangent_name(data if len(data) == 1 else (*data[:-1], index[data[-1]])), node, "+="
