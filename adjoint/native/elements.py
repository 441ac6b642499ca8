"""Tensors whose elements are read one by one, when they are asked for: what readers of operators take and give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .expressions import Graph, Number
from .rows import Along, Index, Unlike, flat, strides

__all__ = [
    "LARGE", "Call", "Computed", "Constant", "Elements", "Getter", "Pair", "Place", "Reader", "Refused", "Tables", "dimensions", "numbered",
    "registering",
]  # fmt: skip

Place = tuple[Index, ...]
Getter = Callable[[Place], int]
#: constants of more numbers are handed to the compiled code as arrays
LARGE = 4096


class Refused(Exception):
    """A reader cannot do what an operator asks for; the message says what, in plain words."""


class Computed(NamedTuple):
    """A component of an index which is not known before the function runs: the integer that a node stands for."""

    node: int


class Pair(NamedTuple):
    """An element of a tensor of complex numbers: the nodes of its real and imaginary part."""

    re: int
    im: int


class Elements:
    """A tensor of ``shape`` and ``dtype``, whose element at a place is the node that ``get`` gives; every place is asked for once."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, get: Getter) -> None:
        self.shape, self.dtype, self._get = tuple(shape), dtype, get
        self._known: dict[Place, int] = {}

    def at(self, place: Place) -> int:
        """The node of one element."""
        node = self._known.get(place)
        if node is None:
            node = self._known[place] = self._get(place)
        return node

    def spread(self, place: Place) -> int:
        """The element that broadcasting puts at a place of a larger shape."""
        shape = self.shape
        return self.at(tuple([0 if size == 1 else i for i, size in zip(place[len(place) - len(shape) :], shape, strict=True)]))

    def position(self, graph: Graph, place: Place) -> Index | Computed:
        """An element that is a component of an index."""
        node = self.at(place)
        value = graph.value(node)
        return Computed(node) if value is None else int(value)


class Tables:
    """Constants that are handed over as arrays, numbered as they come."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}

    def number(self, tensor: Tensor) -> int:
        """The number of a constant among the tables."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._numbers[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return number

    def arrays(self) -> tuple[Tensor, ...]:
        """The tables, contiguous and in the type of the state."""
        return tuple(x.detach().to(self.dtype).contiguous().reshape(-1) for x in self.tensors)


class Constant(Elements):
    """A tensor whose numbers are known."""

    def __init__(self, graph: Graph, tables: Tables, tensor: Tensor) -> None:
        super().__init__(tensor.shape, tensor.dtype, self._node)
        self.tensor = tensor.detach()
        self._graph, self._tables = graph, tables
        self._steps = strides(tensor.shape)
        self._large = tensor.numel() > LARGE and tensor.is_floating_point()
        self._values: list[Number] | None = None

    def _flat(self) -> Tensor:
        return self.tensor.reshape(-1)

    def value(self, place: int) -> Number:
        """The number at a place of the flat tensor."""
        if self._values is None and self.tensor.numel() <= LARGE:
            self._values = self._flat().tolist()
        return self._flat()[place].item() if self._values is None else self._values[place]

    def _along(self, place: Along) -> Tensor:
        """The numbers of all rows."""
        return self._flat()[place.start + place.step * torch.arange(place.count, device=self.tensor.device)]

    def _node(self, place: Place) -> int:
        where = flat(place, self._steps)
        if isinstance(where, Along):
            values = self._along(where)
            if not bool(((values == values[0]) | ((values != values) & (values[0] != values[0]))).all()):
                raise Unlike("a constant tensor has other numbers in one row than in another: pass it by args, or as a captured tensor")
            where = where.start
        if self.tensor.is_complex():
            z = self._flat()[where].item()
            return Pair(self._graph.constant(z.real), self._graph.constant(z.imag))  # type: ignore[return-value]
        if self._large:
            return self._graph.leaf("k", self._tables.number(self.tensor), where)
        return self._graph.constant(self.value(where))

    def position(self, graph: Graph, place: Place) -> Index | Computed:
        """As of other elements; numbers that grow evenly from row to row go along the rows."""
        where = flat(place, self._steps)
        if not isinstance(where, Along):
            return int(self.value(where))
        values = self._along(where)
        start, step = int(values[0]), int(values[1] - values[0])
        if not bool((values == start + step * torch.arange(where.count, device=values.device)).all()):
            raise Unlike("an index differs from row to row of the batch")
        return Along(start, step, where.count) if step else start

    def look(self, place: Place, step: int, count: int, at: int) -> int:
        """The float ``at`` steps from a place, by a table."""
        where = flat(place, self._steps)
        if isinstance(where, Along):
            raise Unlike("every row of the batch looks into another part of a constant table")
        return self._graph.look("k", self._tables.number(self.tensor), where, step, count, at)


@dataclass(frozen=True)
class Call:
    """One call of an operator: where its results go. ``shape`` and ``dtype`` are those of the first result."""

    graph: Graph
    tables: Tables
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.dtypes[0]

    def made(self, get: Getter, which: int = 0) -> Elements:
        """A result from the getter of its elements."""
        return Elements(self.shapes[which], self.dtypes[which], get)

    def operand(self, x: Any) -> Getter:
        """The getter of an operand, tensor or number, that is broadcast to the shape of a result."""
        if isinstance(x, Elements):
            return x.at if x.shape == self.shape else x.spread
        if isinstance(x, complex):
            raise Refused("complex numbers")
        node = self.graph.constant(float(x) if self.dtype.is_floating_point and not isinstance(x, bool) else x)
        return lambda place: node

    def elementwise(self, function: Callable[..., int], *operands: Any) -> Elements:
        """A result whose every element is a function of the elements at its place."""
        getters = [self.operand(x) for x in operands]
        return self.made(lambda place: function(*[get(place) for get in getters]))


def dimensions(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimensions counted from the front; None and () are all of them."""
    if dims is None or (not isinstance(dims, int) and not len(dims)):
        return tuple(range(rank))
    return tuple(numbered(d, rank) for d in ([dims] if isinstance(dims, int) else dims))


def numbered(dim: int, rank: int) -> int:
    """A dimension counted from the front."""
    return dim % max(rank, 1)


Reader = Callable[..., Elements | list[Elements]]


_SomeReader = TypeVar("_SomeReader", bound=Reader)


def registering(table: dict[str, Reader]) -> Callable[..., Callable[[_SomeReader], _SomeReader]]:
    """A decorator which puts a reader into a table under names of ATen operators (without overloads)."""

    def reads(*names: str) -> Callable[[_SomeReader], _SomeReader]:
        def put(reader: _SomeReader) -> _SomeReader:
            table.update(dict.fromkeys(names, reader))
            return reader

        return put

    return reads
