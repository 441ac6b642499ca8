"""The user's function, element by element, as scalar expressions.

The function is traced into a graph of ATen operators. Of its result single elements are asked for; every operator answers for one element
by asking for elements of its arguments (`operators.py`), down to elements of the state, the inputs and constants. Views, concatenations
and writes by index vanish on the way. Rows of a batch are read all at once, by an index along them (`rows.py`), which proves that they are
independent.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import maybe_current_level
from .elements import Call, Constant, Elements, Place, Refused, Tables
from .expressions import Graph
from .operators import COMPLEX, READERS
from .rows import Along, Index, Unlike, flat, strides
from .tracing import Node, Result, Trace, Untraceable, trace

__all__ = ["MOST_NODES", "Reading", "Unreadable", "read"]

#: larger graphs are not read, unless they have few nodes for each number of the state: matrix products are better left to libraries
MOST_NODES = 30_000
_FEW_EACH = 24
_DEPTH = 50_000
_READ = frozenset(READERS) | frozenset(COMPLEX)


class Unreadable(Exception):
    """A function cannot be read: because of an ATen operator (or ""), at a line of the user's code (or ""), for a reason in plain words."""

    def __init__(self, operator: str, line: str, reason: str) -> None:
        place = f" ({line})" if line else ""
        super().__init__(f"{operator + ': ' if operator else ''}{reason}{place}")
        self.operator, self.line, self.reason = operator, line, reason


@dataclass(frozen=True)
class Reading:
    """What a function computes of one trajectory.

    Attributes:
        graph: expressions of leaves ("t",), ("y", i), ("a", k, j), ("k", k, j). All leaves are floats: inputs of integers and truth values
            are to be passed as numbers of the type of the state.
        outputs: the elements of the result for one trajectory, or of all of it.
        strides: of every input, how many numbers lie between one trajectory's elements and the next's; 0: all share them. Leaf
            ("a", k, j) is element j counted from the start of the trajectory's own.
        tables: constants too large for text, or looked up by a computed index: leaf ("k", k, j), flat and in the type of the state.
        operators: names of the ATen operators that were read.
    """

    graph: Graph
    outputs: tuple[int, ...]
    strides: tuple[int, ...]
    tables: tuple[Tensor, ...]
    operators: frozenset[str]


def read(
    function: Callable[..., Tensor],
    t: Tensor,
    y: Tensor,
    inputs: Sequence[Tensor],
    batched: bool,
    originals: frozenset[int] = frozenset(),
) -> Reading:
    """Read ``function(t, y, *inputs)``.

    Args:
        function: flat: ``t`` is () or (B,), ``y`` (B, m), and the result (B, n) or (B,).
        t: the time, of the type of ``y``, or of any other that the function is to get.
        y: the state; its values do not matter, but are computed with once.
        inputs: whatever else the function depends on.
        batched: the B rows are trajectories. That they are independent and treated alike is proved: otherwise this raises. When false,
            everything is one trajectory.
        originals: ids of tensors in whose place the function is given others, and which must not be met in it.

    Raises:
        Unreadable: an operator, or a use of one, that is not read; a value that decides what is done; rows that depend on each other.
    """
    if maybe_current_level() is not None:
        raise Unreadable("", "", "it is called inside of a function transform (vmap, jvp, grad)")
    try:
        traced = trace(function, [t, y, *inputs], _READ, originals)
        reader, outputs = _read(traced, t, y, inputs, batched)
        if traced.plain:
            # PyTorch's own derivatives may hide numbers: they must come out the same for others
            others = [x + torch.rand_like(x) if x.is_floating_point() else x for x in (t, y, *inputs)]
            again, same = _read(trace(function, others, _READ, originals), t, y, inputs, batched)
            if same != outputs or not reader.graph.equals(again.graph):
                raise Unreadable("", "", "derivatives by torch.autograd inside of it hide numbers: use torch.func.grad")
    except Untraceable as error:
        raise Unreadable("", error.line, error.reason) from error
    steps = tuple(reader.steps.get(k, 0) for k in range(len(inputs)))
    return Reading(reader.graph, outputs, steps, reader.tables.arrays(), frozenset(reader.operators))


def _read(traced: Trace, t: Tensor, y: Tensor, inputs: Sequence[Tensor], batched: bool) -> tuple[_Reader, tuple[int, ...]]:
    reader = _Reader(traced, t, y, inputs, batched)
    with _deep():
        return reader, reader.outputs()


@contextlib.contextmanager
def _deep() -> Iterator[None]:
    """Elements ask for elements: as deep as the function is long."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(max(before, _DEPTH))
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


def _dtypes(x: Any) -> Iterator[torch.dtype]:
    """Types of tensors among arguments."""
    if isinstance(x, Result):
        yield x.node.dtypes[x.which]
    elif isinstance(x, Tensor):
        yield x.dtype
    elif isinstance(x, (list, tuple)):
        for part in x:
            yield from _dtypes(part)


class _Reader:
    """One function as it is read."""

    def __init__(self, traced: Trace, t: Tensor, y: Tensor, inputs: Sequence[Tensor], batched: bool) -> None:
        self.graph = Graph()
        self.tables = Tables(y.dtype)
        self.operators: set[str] = set()
        self.steps: dict[int, int] = {}
        self._trace, self._dtype = traced, y.dtype
        self._rows = y.shape[0] if batched else 1
        self._batched = batched
        self._width = prod(y.shape[1:])
        self._known: dict[Node, list[Elements]] = {}
        self._constants: dict[int, Constant] = {}
        given = [self._time(t), self._state(y), *(self._input(k, x) for k, x in enumerate(inputs))]
        for node, elements in zip(traced.inputs, given, strict=True):
            self._known[node] = [elements]
        for node in traced.nodes:
            self._known[node] = self._made(node)

    def outputs(self) -> tuple[int, ...]:
        """Nodes of the result, of one trajectory or of all."""
        out = self._elements(self._trace.result)
        if not isinstance(out, Elements):
            raise Unreadable("", "", "the result is not one tensor")
        if out.dtype != self._dtype:
            raise Unreadable("", "", f"the result is of {out.dtype}, the state of {self._dtype}")
        steps = strides(out.shape)
        if not self._batched:
            places = [tuple((i // step) % size for step, size in zip(steps, out.shape, strict=True)) for i in range(prod(out.shape))]
        else:
            if not out.shape or out.shape[0] != self._rows:
                raise Unreadable("", "", f"the result is of shape {out.shape}, for {self._rows} trajectories")
            first: Index = Along(0, 1, self._rows) if self._rows > 1 else 0
            inner = list(zip(steps[1:], out.shape[1:], strict=True))
            places = [(first, *((i // step) % size for step, size in inner)) for i in range(prod(out.shape[1:]))]
        try:
            return tuple(out.at(place) for place in places)
        except (Refused, Unlike) as error:
            raise Unreadable("", "", str(error)) from error

    # leaves

    def _time(self, t: Tensor) -> Elements:
        def get(place: Place) -> int:
            if self._batched and self._rows > 1 and place and not (isinstance(place[0], Along) and place[0] == Along(0, 1, self._rows)):
                raise Unlike("one row of the batch reads the time of another")
            return self.graph.leaf("t")

        return Elements(t.shape, t.dtype, get)

    def _state(self, y: Tensor) -> Elements:
        steps, width = strides(y.shape), self._width

        def get(place: Place) -> int:
            where = flat(place, steps)
            if not self._batched:
                return self.graph.leaf("y", where)  # type: ignore[arg-type]
            if isinstance(where, Along):
                if where.step != width or not 0 <= where.start < width:
                    raise Unlike("one row of the batch reads the state of another")
                return self.graph.leaf("y", where.start)
            if self._rows > 1:
                raise Unlike(f"every row of the batch reads the state of row {where // width}")
            return self.graph.leaf("y", where)

        return Elements(y.shape, y.dtype, get)

    def _input(self, k: int, x: Tensor) -> Elements:
        steps = strides(x.shape)

        def get(place: Place) -> int:
            where = flat(place, steps)
            start, step = (where.start, where.step) if isinstance(where, Along) else (where, 0)
            if self.steps.setdefault(k, step) != step:
                raise Unlike(f"input {k} is used by rows of the batch in one place, and otherwise in another")
            if step < 0 or (step and not 0 <= start < step):
                raise Unlike(f"input {k} is read out of the order of the rows")
            leaf = self.graph.leaf("a", k, start)
            if x.dtype == torch.bool:
                return self.graph.as_bool(leaf)
            return leaf if x.is_floating_point() else self.graph.as_int(leaf)

        return Elements(x.shape, x.dtype, get)

    # operators

    def _elements(self, x: Any) -> Any:
        """An argument of an operator: tensors as their elements."""
        if isinstance(x, Result):
            return self._known[x.node][x.which]
        if isinstance(x, Tensor):
            if type(x) not in (Tensor, torch.nn.Parameter) or x.layout != torch.strided:
                raise Refused(f"a constant is a {type(x).__name__} of layout {x.layout}")
            known = self._constants.get(id(x))
            if known is None:
                known = self._constants[id(x)] = Constant(self.graph, self.tables, x)
            return known
        return [self._elements(i) for i in x] if isinstance(x, (list, tuple)) else x

    def _made(self, node: Node) -> list[Elements]:
        """Results of an operator; what goes wrong is told when an element is asked for, for much of a trace is not needed."""
        call = Call(self.graph, self.tables, node.shapes, node.dtypes)
        is_complex = any(x.is_complex for x in (*node.dtypes, *_dtypes(node.args)))
        reader = (COMPLEX if is_complex else READERS).get(node.name)

        def refused(reason: str) -> list[Elements]:
            def get(place: Place) -> int:
                raise Unreadable(node.name, node.line, reason)

            return [call.made(get, which) for which in range(len(node.shapes))]

        if reader is None:
            return refused("there is no scalar form of this operator" + " for complex numbers" * is_complex)
        try:
            made = reader(call, *map(self._elements, node.args), **{k: self._elements(x) for k, x in node.kwargs.items()})
        except (Refused, Unlike) as error:
            return refused(str(error))
        except (TypeError, NotImplementedError) as error:
            return refused(f"this way of calling it is not read ({error})")
        return [self._watched(x, node.name, node.line, node.stopped) for x in (made if isinstance(made, list) else [made])]

    def _watched(self, made: Elements, name: str, line: str, stopped: bool) -> Elements:
        """Elements with what every operator has in common: its name noted, errors with its line, its type checked."""
        graph, most = self.graph, max(MOST_NODES, _FEW_EACH * self._width)
        foreign = made.dtype.is_floating_point and made.dtype != self._dtype
        single = foreign and (made.dtype, self._dtype) == (torch.float32, torch.float64)

        def get(place: Place) -> int:
            try:
                node = made.at(place)
            except (Refused, Unlike) as error:
                raise Unreadable(name, line, str(error)) from error
            except TypeError as error:
                raise Unreadable(name, line, f"rows of the batch are taken apart, or put together, one by one ({error})") from error
            except RecursionError as error:
                raise Unreadable(name, line, "the function is too long") from error
            if len(graph) > most:
                raise Unreadable(name, line, f"more than {most} scalar operations")
            self.operators.add(name)
            if made.dtype.is_complex:
                # a pair of nodes, which moves like one
                return type(node)(*(graph.op("stop", x) for x in node)) if stopped else node  # type: ignore[attr-defined]
            if single:
                node = graph.op("single", node)
            elif foreign and graph.names[node] not in ("constant", "leaf", "look"):
                raise Unreadable(name, line, f"it computes in {made.dtype}, where the state is of {self._dtype}")
            return graph.op("stop", node) if stopped else node

        return Elements(made.shape, made.dtype, get)
