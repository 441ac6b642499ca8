"""Jacobians of outputs that are made of kept values, and gradients of what is linear in them, in loops.

Slopes of kept values by the leaves are sums of products: of a slope of an expression by a kept value in it, and one of that value by a
leaf. They are added up level by level, through tables that name the factors of each product. Slopes in time are a column of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .alike import Group, Loops, added, is_constant
from .reverse import cotangents, times
from .text import LeafName, Scatter, Target

__all__ = ["Chained"]

_TIME = -1
_Products = list[tuple[int, int, int]]


@dataclass
class Chained:
    """Of the groups of `rolled`, level by level, the outputs last.

    Attributes:
        pattern: row and column of every entry of the Jacobian.
        local: how many slopes there are of expressions by what stands in them.
        kept: how many there are of kept values by leaves, with the number one as the first of them.
    """

    writer: Loops
    levels: Sequence[Sequence[Group]]
    pattern: list[tuple[int, int]] = field(default_factory=list)
    local: int = 0
    kept: int = 1
    #: loops of local slopes; by level products (sum, slope, slope of what is in it), and at last those of slopes in time
    _loops: list[str] = field(default_factory=list)
    _products: list[_Products] = field(default_factory=list)
    _of_time: _Products = field(default_factory=list)
    #: of each group, level by level, slots (or the time) with their slopes' nodes, and the first number of these
    _slopes: list[list[tuple[Group, list[tuple[int, int, int]]]]] = field(default_factory=list)

    #: entries that are no constants
    _varying: set[tuple[int, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        rows: dict[int, dict[int, int]] = {}
        for k, level in enumerate(self.levels):
            self._products.append([])
            self._slopes.append([])
            found: dict[int, dict[int, int]] = {}
            for group in level:
                self._group(group, found, rows, k == len(self.levels) - 1)
            rows |= found

    def _group(self, group: Group, found: dict[int, dict[int, int]], rows: dict[int, dict[int, int]], last: bool) -> None:
        g, members = group.graph, list(zip(group.targets, group.members, strict=True))
        targets: list[Target | Scatter] = []
        parts = []
        for leaf, node in cotangents(g, {group.root: g.constant(1.0)}, ("y", "t", "w")).items():
            first, kind = self.local, g.data[leaf][0]
            self.local += len(members)
            parts.append((leaf, node, first))
            targets.append((f"dl[{self.writer.index(range(first, self.local))}]", node, "="))
            constant = is_constant(g, node)
            for q, (row, member) in enumerate(members):
                columns = rows[int(member[g.data[leaf][1]])] if kind == "w" else {_TIME if kind == "t" else int(member[g.data[leaf][1]]): 0}
                for column, factor in columns.items():
                    self._product(found.setdefault(row, {}), row, column, first + q, factor, last, constant and kind == "y")
        for row in group.targets:
            found.setdefault(row, {})
        self._slopes[-1].append((group, parts))
        if targets:
            self._loops.append(self.writer.loop(group, targets))

    def _product(self, sums: dict[int, int], row: int, column: int, slope: int, factor: int, last: bool, constant: bool) -> None:
        if last and column == _TIME:
            self._of_time.append((row, slope, factor))
            return
        if column not in sums:
            sums[column] = len(self.pattern) if last else self.kept
            if last:
                self.pattern.append((row, column))
            else:
                self.kept += 1
        if last and not constant:
            self._varying.add((row, column))
        self._products[-1].append((sums[column], slope, factor))

    def products(self) -> int:
        """How many products there are."""
        return self.local + len(self._of_time) + sum(map(len, self._products))

    def steady(self) -> list[tuple[int, int]]:
        """Entries that are constants."""
        return [entry for entry in self.pattern if entry not in self._varying]

    def _through(self, products: _Products, text: str) -> str:
        """A loop over products, in whose text are the numbers of each as {0}, {1}, {2}."""
        if not products:
            return ""
        columns = [self.writer.index(column) for column in zip(*products, strict=True)]
        return f"  for (int q = 0; q < {len(products)}; q++) {{ {text.format(*columns)} }}"

    def _slopes_of_kept(self, forward: Sequence[str]) -> list[str]:
        room = f"  S dl[{self.local + 1}], sl[{self.kept}];\n  for (int i = 0; i < {self.kept}; i++) sl[i] = K(R(i == 0));"
        return [*forward, room, *self._loops, *(self._through(level, "sl[{0}] += dl[{1}] * sl[{2}];") for level in self._products[:-1])]

    def jacobian(self, forward: Sequence[str], entry: Callable[[str], str], slope: Callable[[str], str]) -> str:
        """Loops that write the entries, and add to slopes in time. ``forward``: those that compute kept values."""
        clear = f"  for (int i = 0; i < {len(self.pattern)}; i++) {entry('i')} = K(R(0));"
        entries = self._through(self._products[-1], f"{entry('{0}')} += dl[{{1}}] * sl[{{2}}];")
        of_time = self._through(self._of_time, f"{slope('{0}')} += dl[{{1}}] * sl[{{2}}];")
        return "\n".join([*self._slopes_of_kept(forward), clear, entries, of_time])

    def bend(
        self,
        forward: Sequence[str],
        weight: Callable[[str], str],
        of_slope: Callable[[str], str],
        cotangent_name: LeafName,
        kinds: Collection[str],
    ) -> str:
        """Loops that add ``phi = sum weight * entry + sum of_slope * slope`` to ``*phi``, and its derivatives to those by leaves."""
        text = [
            *self._slopes_of_kept(forward),
            f"  S dlb[{self.local + 1}], slb[{self.kept}];",
            f"  for (int i = 0; i < {self.local}; i++) dlb[i] = K(R(0));",
            f"  for (int i = 0; i < {self.kept}; i++) slb[i] = K(R(0));",
        ]
        back = "dlb[{{1}}] += {0} * sl[{{2}}]; slb[{{2}}] += {0} * dl[{{1}}];"
        summed = "*phi += {0} * dl[{{1}}] * sl[{{2}}]; " + back
        text.append(self._through(self._products[-1], summed.format(weight("{0}"))))
        text.append(self._through(self._of_time, summed.format(of_slope("{0}"))))
        text += [self._through(level, back.format("slb[{0}]")) for level in reversed(self._products[:-1])]
        for k in reversed(range(len(self.levels))):
            for group, parts in self._slopes[k]:
                text.append(self._second(group, parts, cotangent_name, kinds))
                if k < len(self.levels) - 1:
                    text.append(self.writer.derivatives(group, "wb[{}]".format, cotangent_name, kinds, True))
        return "\n".join(text)

    def _second(self, group: Group, parts: Sequence[tuple[int, int, int]], cotangent_name: LeafName, kinds: Collection[str]) -> str:
        """Derivatives of what is linear in the local slopes of a group."""
        g = group.graph
        total = g.constant(0.0)
        names = {}
        for _, node, first in parts:
            names["dl", first] = f"dlb[{self.writer.index(range(first, first + len(group.members)))}]"
            total = g.op("add", total, times(g, node, g.leaf("dl", first)))
        found = cotangents(g, {total: g.constant(1.0)}, (*kinds, "w"))
        if not found:
            return ""
        return self.writer.loop(group, list(added(g, found, self.writer.indices(group), cotangent_name)), names)
