"""Outputs whose expressions are alike but for the indices of their leaves, as loops over tables of indices.

A discretised equation has thousands of outputs and a handful of different expressions. Written out, its text grows with the number of
outputs, and so does the time of the compiler; as loops it does not. Values that many outputs are made of (hidden units of a network, say)
are computed first, in loops of their own, and kept in an array ``w``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from .alike import Loops, groups_of, kept_values
from .chained import Chained
from .expressions import Graph
from .text import LeafName

__all__ = ["LEAST", "Rolled", "rolled"]

#: fewer outputs are written out, unless they are made of this many values
LEAST = 24
_LONG = 2000
#: expressions of the Jacobian, each of one output by itself, are looked for if they are not longer
_MOST_OF_JACOBIAN = 60_000
_LONGEST_JACOBIAN = 3000
#: so many rows of it are computed one by one, all columns of them
_MOST_ROWS = 128
#: products through kept values that one takes, and the part of it that may be filled
_MOST_PRODUCTS, _FILLED = 200_000, 0.25


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
        bend: adds the sum of weighted entries of the Jacobian, and of slopes in time by ``x``, to ``*phi``, and its derivatives to those by
            leaves; "" where that is longer than is sensible.
        bent: row and column of every entry that is weighted.
        loops: how many loops the outputs have become.
        size: how many values are computed in the text of ``fun`` and ``vjp``.
    """

    tables: str
    fun: str
    vjp: str
    jac: str
    pattern: tuple[tuple[int, int], ...]
    steady: tuple[tuple[int, int], ...]
    bend: str
    bent: tuple[tuple[int, int], ...]
    loops: int
    size: int


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
    weight_name: Callable[[str], str] = "weights[{}]".format,
    summed: bool = False,
) -> Rolled | None:
    """Functions that compute outputs and their derivatives in loops; None where that is not shorter.

    Args:
        graph: the expressions.
        outputs: nodes of the outputs.
        leaf_name: how a leaf is called, by its data. Its last index may be text: ("y", "I[2]").
        cotangent_name: how the derivative by a leaf is called; by (kind, k) the array of them, for look-ups.
        shared: inputs that all trajectories share.
        kinds: of leaves that derivatives are wanted by.
        output_name, seed_name, entry_name, slope_name, weight_name: how outputs, their cotangents, entries of the Jacobian, slopes in
            time and weights of entries are called.
        summed: outputs that are unlike each other may be sums of terms that are alike (the rates of a network): loops go over terms.
    """
    straight = len(graph.cone(outputs))
    if len(outputs) < LEAST and straight < _LONG:
        return None
    kept = kept_values(graph, outputs)
    levels = groups_of(graph, outputs, kept, summed)
    length = sum(len(group.graph) for level in levels for group in level)
    if 2 * length > straight:
        return None
    writer = Loops(leaf_name, shared)
    forward = [writer.values(group, "w[{}]".format) for level in levels[:-1] for group in level]
    results = [f"  for (int i = 0; i < {len(outputs)}; i++) {output_name('i')} = K(R(0));"] if summed else []
    results += [writer.values(group, output_name, "+=" if summed else "=") for group in levels[-1]]

    def backward(seed: Callable[[str], str], by: LeafName, wanted: Collection[str]) -> str:
        found = [writer.derivatives(group, seed, by, wanted) for group in levels[-1]]
        found += [writer.derivatives(group, "wb[{}]".format, by, wanted, True) for level in reversed(levels[:-1]) for group in level]
        return "\n".join(found)

    room = f"  S w[{len(kept)}], wb[{len(kept)}];\n" if kept else ""
    cleared = f"  for (int i = 0; i < {len(kept)}; i++) wb[i] = K(R(0));\n" if kept else ""
    vjp = backward(seed_name, cotangent_name, kinds)
    size = writer.size
    chain = Chained(writer, levels)
    sparse = chain.products() <= _MOST_PRODUCTS and len(chain.pattern) <= _FILLED * len(outputs) ** 2
    jac, pattern, steady = "", [], []
    if not summed and sum(_lengths(graph, outputs)) <= _MOST_OF_JACOBIAN:
        (whole,) = groups_of(graph, outputs, {}) if kept else levels
        if sum(len(group.graph) for group in whole) <= min(straight, _LONGEST_JACOBIAN):
            jac, pattern, steady = writer.jacobian(whole, entry_name, slope_name)
    if not jac and sparse:
        jac, pattern, steady = room + chain.jacobian(forward, entry_name, slope_name), chain.pattern, chain.steady()
    if not jac and len(outputs) <= _MOST_ROWS:
        states = [data[1] for name, data in zip(graph.names, graph.data, strict=True) if name == "leaf" and data[0] == "y"]
        columns = 1 + max(states, default=0)
        rows = _ROWS.format(
            forward="\n".join(forward), cleared=cleared, outputs=len(outputs), columns=columns, entry=entry_name(f"r*{columns}+i"),
            row=backward("seed[{}]".format, lambda data: slope_name("r") if data == ("t",) else f"row[{data[1]}]", ("y", "t")),
        )  # fmt: skip
        jac, pattern = room + rows, [(i, j) for i in range(len(outputs)) for j in range(columns)]
    bend = room + cleared + chain.bend(forward, weight_name, "x[{}]".format, cotangent_name, kinds) if sparse else ""
    return Rolled(
        "".join(writer.tables),
        room + "\n".join([*forward, *results]),
        room + cleared + "\n".join([*forward, vjp]),
        jac,
        tuple(pattern),
        tuple(steady),
        bend,
        tuple(chain.pattern),
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


