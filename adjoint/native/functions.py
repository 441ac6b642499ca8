"""The user's function and its derivatives as C++ functions, which an engine calls by address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..methods.collocation import FullyImplicitRungeKutta
from ..methods.rosenbrock import Rosenbrock
from .emit import Compiled, is_residual
from .matrices import Matrices, matrices_of
from .reading import Reading, Unreadable
from .reverse import cotangents, jacobian, seeded
from .rolled import Rolled, rolled
from .text import Scatter, Target, statements

__all__ = ["MOST_VALUES", "UserFunctions", "depends", "user_functions"]

#: values that text may compute: compilers take minutes for more, and libraries multiply matrices better than text does
MOST_VALUES = 6_000


class _Size(NamedTuple):
    """Unknowns beyond which libraries take matrices apart in less time: full ones, and banded ones whose factors are at most so wide; and
    how many products the factors of sparse ones may take."""

    full: int
    banded: int
    widest: int
    products: int

    def too_large(self, matrices: Matrices) -> bool:
        """Whether that is so."""
        if matrices.sparse is not None:
            return matrices.sparse.operations > self.products
        return matrices.width > self.banded or matrices.row() > self.widest


#: of methods whose stages are coupled, and of others
_COUPLED, _ALONE = _Size(150, 400, 100, 40_000_000), _Size(400, 2000, 300, 400_000_000)


@dataclass(frozen=True)
class UserFunctions:
    """Text by the name of the function: "fun" and "vjp", for implicit methods "jac", for those whose steps hold the Jacobian "bend", with a
    matrix in front of the slopes "mass" and "mass_vjp", with events "events" and, where that can be, "events_vjp"; what has to stand
    before; and how the matrices of implicit steps are kept."""

    texts: dict[str, str]
    tables: str
    matrices: Matrices | None


def user_functions(
    reading: Reading,
    events: Sequence[Reading],
    mass: Reading | None,
    width: int,
    own: Sequence[int],
    timed: bool,
    method: Compiled,
    back: bool = True,
) -> UserFunctions:
    """For states of ``width`` numbers; ``own``: how many numbers of each input belong to one trajectory, 0 where all share it; ``timed``:
    whether the function looks at the time; ``mass``: the matrix in front of the slopes, row by row; ``back``: with what a way back takes.
    Raises `Unreadable` where text would be too long."""
    try:
        # of implicit equations values and slopes stand side by side
        arguments = 2 * width if is_residual(method) else width
        rest = width, events, method, mass, back
        try:
            return _texts(_Writer(reading, arguments, own, timed), *rest)
        except Unreadable as error:
            return _texts(_Writer(reading, arguments, own, timed), *rest, error)
    except NotImplementedError as error:
        raise Unreadable("", "", f"{error} is not known as a formula") from error


def _texts(
    writer: _Writer,
    width: int,
    events: Sequence[Reading],
    method: Compiled,
    mass: Reading | None,
    back: bool,
    too_long: Unreadable | None = None,
) -> UserFunctions:
    """See `user_functions`. ``too_long``: why outputs are not written as they are, but in loops over the terms that they are sums of."""
    reading, own = writer.reading, writer.own
    names = {"entry_name": "jy[PATTERN[{}]]".format, "weight_name": "weights[BENT[{}]]".format}
    loops = rolled(reading.graph, reading.outputs, _leaf, _cotangent, writer.shared, ("t", "y", "a"), **names, summed=too_long is not None)
    if loops is None and too_long is not None:
        raise too_long
    texts = writer.straight(("fun", "vjp") if back else ("fun", None)) if loops is None else writer.loops(loops)
    tables = "" if loops is None else loops.tables
    matrices = None
    if method.implicit:
        bends = isinstance(method, Rosenbrock) and back
        # full matrices alone are written out
        if width > _ALONE.full and (mass is not None or loops is None or not loops.jac or (bends and not loops.bend)):
            raise _too_many(width, _ALONE.full)
        matrices = writer.matrices(loops, width, is_residual(method), mass is not None, bends)
        size = _COUPLED if isinstance(method, FullyImplicitRungeKutta) else _ALONE
        if width > size.full and size.too_large(matrices):
            raise _too_many(width, size.full)
        texts["jac"] = writer.jacobian(loops, matrices)
        if loops is not None and loops.jac:
            tables += _places("PATTERN", matrices, loops.pattern)
        if bends:
            texts["bend"] = writer.bend(loops, matrices)
            if loops is not None and loops.bend:
                tables += _places("BENT", matrices, loops.bent)
    if events:
        texts["events"] = _events(reading, events, width, own)
        if back and (slopes := _events_vjp(reading, events, width, own)) is not None:
            texts["events_vjp"] = slopes
    if mass is not None:
        before = len(reading.tables) + sum(len(event.tables) for event in events)
        texts |= _Writer(mass, 0, own, False, before).straight(("mass", "mass_vjp"))
    return UserFunctions(texts, tables, matrices)


def _places(name: str, matrices: Matrices, entries: Sequence[tuple[int, int]]) -> str:
    return f"static const int {name}[] = {{{', '.join([*(str(matrices.place(i, j)) for i, j in entries), '0'])}}};\n"


def _events(reading: Reading, events: Sequence[Reading], width: int, own: Sequence[int]) -> str:
    """The values of all functions of events."""
    bodies, before = [], len(reading.tables)
    for i, event in enumerate(events):
        writer = _Writer(event, width, own, True, before)
        body, size = statements(event.graph, [(f"g[{i}]", event.outputs[0], "=")], writer.leaf, writer.shared, prefix=f"e{i}v")
        if size > MOST_VALUES:
            raise _too_long(size)
        bodies.append(body)
        before += len(event.tables)
    return _Writer(reading, width, own, True, before - len(reading.tables)).function("events", "const S* y, S* g", "\n".join(bodies))


def _events_vjp(reading: Reading, events: Sequence[Reading], width: int, own: Sequence[int]) -> str | None:
    """From the cotangent of one of them; None where that is not known as a formula, or would be too long: values alone are there then."""
    bodies, before = [], len(reading.tables)
    for i, event in enumerate(events):
        writer, graph = _Writer(event, width, own, True, before), event.graph
        try:
            found = cotangents(graph, seeded(graph, event.outputs), ("t", "y", "a"))
        except NotImplementedError:
            return None
        body, size = statements(graph, writer.of_state_and_inputs(found), writer.leaf, writer.shared, prefix=f"e{i}w")
        if size > MOST_VALUES:
            return None
        bodies.append(f"if (which == {i}) {{ {body} }}")
        before += len(event.tables)
    signature = "const S* y, long which, const S* v, S* yb, S* tb"
    return _Writer(reading, width, own, True, before - len(reading.tables)).function("events_vjp", signature, "\n".join(bodies))


class _Writer:
    """The functions of one reading; ``before``: so many tables stand before its own, in the one list of those of all functions."""

    def __init__(self, reading: Reading, width: int, own: Sequence[int], timed: bool, before: int = 0) -> None:
        self.before, self.n_tables = before, before + len(reading.tables)
        self.reading, self.width, self.own, self.timed = reading, width, own, timed
        self.graph = reading.graph
        self.shared = {k for k, n in enumerate(own) if not n}
        self._entries: tuple[dict[tuple[int, int], int], dict[int, int]] | None = None

    def leaf(self, place: tuple[Any, ...]) -> str:
        """The name of a leaf."""
        return _leaf(("k", place[1] + self.before, *place[2:])) if place[0] == "k" else _leaf(place)

    def straight(self, names: tuple[str, str | None] = ("fun", "vjp")) -> dict[str, str]:
        """The function, and its vjp where that is given a name, written out."""
        graph, outputs = self.graph, self.reading.outputs
        function = {names[0]: self._written(names[0], "const S* y, S* o", [(f"o[{i}]", node, "=") for i, node in enumerate(outputs)])}
        if names[1] is None:
            return function
        found = cotangents(graph, seeded(graph, outputs), ("t", "y", "a"))
        return function | {names[1]: self._written(names[1], "const S* y, const S* v, S* yb, S* tb", self.of_state_and_inputs(found))}

    def of_state_and_inputs(self, found: dict[int, int]) -> list[Target | Scatter]:
        """What is done with cotangents: those of the state are written, others added."""
        zero = self.graph.constant(0.0)
        of_state: list[Target | Scatter] = [(f"yb[{i}]", found.pop(self.graph.leaf("y", i), zero), "=") for i in range(self.width)]
        return of_state + self._added(found)

    def loops(self, loops: Rolled) -> dict[str, str]:
        """``fun`` and ``vjp``, in loops."""
        if loops.size > MOST_VALUES:
            raise _too_long(loops.size)
        clear = f"for (int i = 0; i < {self.width}; i++) yb[i] = K(R(0));\n"
        return {
            "fun": self.function("fun", "const S* y, S* o", loops.fun),
            "vjp": self.function("vjp", "const S* y, const S* v, S* yb, S* tb", clear + loops.vjp),
        }

    def matrices(self, loops: Rolled | None, width: int, residual: bool, mass: bool, bends: bool) -> Matrices:
        """How matrices of the Jacobian are kept."""
        if loops is not None and loops.jac:
            return matrices_of(width, {*loops.pattern, *(loops.bent if bends and loops.bend else ())}, loops.steady, residual, mass)
        entries, _ = self._slopes()
        return matrices_of(width, entries, [place for place, node in entries.items() if self.graph.value(node) is not None], residual, mass)

    def jacobian(self, loops: Rolled | None, matrices: Matrices) -> str:
        """``jac``."""
        zero, signature = self.graph.constant(0.0), "const S* y, S* jy, S* slope"
        if loops is not None and loops.jac:
            clear = f"for (int i = 0; i < {len(self.reading.outputs)}; i++) slope[i] = K(R(0));\n"
            return self.function("jac", signature, clear + loops.jac)
        entries, slopes = self._slopes()
        targets: list[Target | Scatter] = [(f"jy[{matrices.place(i, j)}]", node, "=") for (i, j), node in entries.items()]
        targets += [(f"slope[{i}]", slopes.get(i, zero), "=") for i in range(len(self.reading.outputs))]
        return self._written("jac", signature, targets)

    def bend(self, loops: Rolled | None, matrices: Matrices) -> str:
        """``phi = sum w_ij J_ij + sum x_i slope_i`` with its gradient."""
        if loops is not None and loops.bend:
            signature = "const S* y, const S* weights, const S* x, S* yb, S* tb, S* phi"
            return self.function("bend", signature, f"*phi = K(R(0));\n{loops.bend}")
        graph = self.graph
        phi = graph.constant(0.0)
        entries, slopes = self._slopes()
        for (i, j), node in entries.items():
            phi = graph.op("add", phi, graph.op("mul", node, graph.leaf("w", matrices.place(i, j))))
        for i, node in slopes.items():
            phi = graph.op("add", phi, graph.op("mul", node, graph.leaf("x", i)))
        found = cotangents(graph, {phi: graph.constant(1.0)}, ("t", "y", "a"))
        signature = "const S* y, const S* w, const S* x, S* yb, S* tb, S* phi"
        return self._written("bend", signature, [("*phi", phi, "="), *self._added(found)])

    def _slopes(self) -> tuple[dict[tuple[int, int], int], dict[int, int]]:
        """Nodes of ``f_y`` by row and column and of ``f_t`` by row, those that are not always zero."""
        if self._entries is None:
            graph, outputs = self.graph, self.reading.outputs
            slopes = jacobian(graph, outputs, "t") if self.timed else {}
            self._entries = jacobian(graph, outputs, "y"), {place[0]: node for place, node in slopes.items()}
        return self._entries

    def _written(self, name: str, signature: str, targets: Sequence[Target | Scatter]) -> str:
        body, size = statements(self.graph, targets, self.leaf, self.shared)
        if size > MOST_VALUES:
            raise _too_long(size)
        return self.function(name, signature, body)

    def function(self, name: str, signature: str, body: str) -> str:
        """Of the time and these arguments."""
        inputs = "".join(f"const S* a{k} = c->a[{k}]; " if own else f"const R* a{k} = c->u[{k}]; " for k, own in enumerate(self.own))
        tables = "".join(f"const R* k{k} = c->k[{k}]; " for k in range(self.n_tables))
        head = f"const S t = *tp; {inputs}{tables}"
        return f'EMITTED {name}(const Ctx* c, const S* tp, {signature}) {{ {head}\n{body}\n}}'

    def _added(self, found: Mapping[int, int]) -> list[Target | Scatter]:
        """Cotangents that are added to what is there already."""
        graph = self.graph
        out: list[Target | Scatter] = []
        for node, value in found.items():
            if graph.names[node] == "look":
                out.append(Scatter(_cotangent(graph.data[node][:2]), node, value))
            else:
                out.append((_cotangent(graph.data[node]), value, "+="))
        return out


def _too_many(width: int, most: int) -> Unreadable:
    return Unreadable("", "", f"there are {width} unknowns, and beyond {most} libraries take matrices apart quicker than native code")


def _too_long(size: int) -> Unreadable:
    return Unreadable("", "", f"its text would compute {size} values, more than {MOST_VALUES}: what is as large runs better uncompiled")


def _leaf(place: tuple[Any, ...]) -> str:
    kind, *index = place
    if kind == "t":
        return "t"
    if kind in ("a", "k"):
        return f"{kind}{index[0]}" + (f"[{index[1]}]" if len(index) > 1 else "")
    return f"{kind}[{index[0]}]"


def _cotangent(place: tuple[Any, ...]) -> str:
    kind, *index = place
    if kind == "t":
        return "*tb"
    return f"yb[{index[0]}]" if kind == "y" else f"c->b[{index[0]}]" + (f"[{index[1]}]" if len(index) > 1 else "")


def depends(reading: Reading, kind: str) -> bool:
    """Whether the outputs depend on a leaf of this kind."""
    return any(data[0] == kind for data in _leaves(reading))


def inputs_of(reading: Reading) -> set[int]:
    """The inputs on which the outputs depend."""
    return {data[1] for data in _leaves(reading) if data[0] == "a"}


def _leaves(reading: Reading) -> list[tuple[Any, ...]]:
    """Leaves, and what is looked up, of which the outputs are made."""
    graph = reading.graph
    return [graph.data[node] for node in graph.cone(reading.outputs) if graph.names[node] in ("leaf", "look", "search")]
