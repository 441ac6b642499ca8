"""Which right-hand side is this: its graph, found once, and known again by the guards of PyTorch's tracer.

``torch.compile`` reads the Python of ``fun``, lifts what it captured (closures, globals, parameters of modules) to inputs of a graph, and
guards whatever else of Python the graph depends on. Its backend here compiles nothing: it remembers which graph was asked for, and with
which tensors. That is for functions whose dependences cannot be read off: others are known by their fingerprint (`direct`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..system.origins import attribute
from ..system.system import System, VmappedSystem
from ..system.witness import beside, differs
from ..torch_internals import get_data_attr, is_functorch_wrapped_tensor, most_graphs
from .build import spending
from .direct import hear_directly
from .emit import Compiled, is_residual
from .graphs import Graph, Heard, ear
from .levels import above, relative
from .memory import in_parts
from .program import Program, program_of
from .reading import Unreadable, read
from .tracing import VALUE, PickedByNumbers, asks_for_values

__all__ = ["Recognised", "compile_key", "hear", "recognise"]

#: graphs of one piece of code (shapes, dtypes, constants) before recognising costs more than it brings
_MOST_GRAPHS = 64
#: how far beside the state a graph that is known is compared with its function
_BESIDE = 0.01
#: of a state, before it is looked at row by row
_FEWEST_ROWS = 8


def compile_key(fun: Callable[..., Any]) -> Hashable:
    """What makes two right-hand sides share compiled code: their Python code, with that of what they wrap, or for other callables their
    type."""
    code = attribute(fun, "__code__") or attribute(attribute(fun, "__func__"), "__code__")
    inner = attribute(fun, "__wrapped__")
    key: Hashable = code if code is not None else _kind_of(fun)
    return (key, compile_key(inner)) if callable(inner) and inner is not fun else key


def _kind_of(fun: Callable[..., Any]) -> Hashable:
    """Of an object, its type with the methods of its classes, and those of a module's parts: tracers do not look whether a class has got
    another method."""
    kinds = dict.fromkeys(type(m) for m in fun.modules()) if isinstance(fun, torch.nn.Module) else [type(fun)]
    owners = dict.fromkeys(c for kind in kinds for c in kind.__mro__ if c.__module__.split(".")[0] not in ("torch", "builtins"))
    return type(fun), tuple(x for c in owners for x in c.__dict__.values() if isinstance(x, FunctionType))


def _hear(module: GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
    graph = Graph(module)
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            # what the tracer writes for y.data, which hides from a reader that it has no derivative
            if node.target is get_data_attr:
                node.target = torch.detach
            graph.own_derivative |= getattr(node.target, "__name__", "") == "autograd_function_apply"
        if isinstance(part, GraphModule):
            relative(part)
            part.recompile()
    return graph


class _Call(NamedTuple):
    """What is asked: a function with its arguments, as `_evaluate` takes them."""

    fun: Callable[..., Any]
    time: Tensor
    states: tuple[Any, ...]
    args: tuple[Any, ...]
    lone: tuple[bool, ...] | None


def _evaluate(fun: Callable[..., Any], t: Tensor, states: tuple[Any, ...], args: tuple[Any, ...], lone: tuple[bool, ...] | None) -> Any:
    # of an input without dimensions the tracer knows the number that a branch asks for (float(t) > 1), and would take that of the first
    # call for that of all: times and states are inputs of one number, and lose their dimension on the way
    if lone is None:
        return fun(t, *states, *args)
    if any(lone):
        leaves, tree = tree_flatten(states)
        states = tree_unflatten([x.reshape(()) if one else x for x, one in zip(leaves, lone, strict=True)], tree)
    return fun(t.reshape(()), *states, *args)


@lru_cache(maxsize=512)
def _tracer(key: Hashable, turn: int) -> Callable[..., Any]:
    """A tracer of its own for each piece of code, since its cache is one for each code object; ``turn``: how often it began anew."""
    f = _evaluate
    copy = FunctionType(f.__code__.replace(co_name="fun"), f.__globals__, "fun", f.__defaults__, f.__closure__)
    return torch.compile(copy, backend=_hear, dynamic=False, fullgraph=True)


#: why code was not traced, by its key and the kinds of what it is called with: trying takes as long as a small solve, and is done once
_refusals: dict[Hashable, str] = {}
#: how often graphs of code were forgotten, by its key
_turns: dict[Hashable, int] = {}
#: code that picks numbers from tables by a computed integer
_picking: set[Hashable] = set()


def _asked(key: Hashable, *arguments: Any) -> Any:
    """A call of the tracer, by whose own means indices of one number are known beforehand or not at all."""
    if key not in _picking:
        try:
            return _traced(key, arguments)
        except Exception as error:
            if "integer from data-dependent" not in str(error):
                raise
            _picking.add(key)
            ear.heard = []
    with PickedByNumbers():
        return _traced(key, arguments)


def _traced(key: Hashable, arguments: Sequence[Any]) -> Any:
    """A call of the tracer, also where warnings are errors: it asks tensors for their gradients, and then hides what is said to that."""
    # shapes, and numbers of Python that fun depends on, have a graph each; told of the limit only when it is reached, the tracer would log
    # a warning for each graph beyond
    with most_graphs(_MOST_GRAPHS):
        tracer = _tracer(key, _turns.get(key, 0))
        try:
            return tracer(*arguments)
        except Exception as error:
            if "The .grad attribute" not in str(error):
                raise
        ear.heard = []
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute")
            return tracer(*arguments)


def hear(
    key: Hashable,
    base: System,
    t: Tensor,
    y0: Tensor,
    arguments: Sequence[Tensor],
    function: Callable[..., Any] | None = None,
) -> Heard:
    """Ask ``fun``, or another ``function`` of the same arguments, which graph it is.

    ``t`` (B,), ``y0`` (B, n); ``arguments``: the tensors among its ``args``.

    Raises `Unreadable`.
    """
    spec = base.spec
    if (spec.holds_complex and not spec.split) or any(d.to_real() != spec.dtype for d in spec.dtypes):
        raise Unreadable("", "", "the state is complex, or its leaves differ in dtype")
    if any(is_functorch_wrapped_tensor(x) for x in base.captured):
        raise Unreadable("", "", "fun captures a tensor of a transform around the solve (pass it through args=)")
    time = t[: base.rows].detach()
    ear.heard = []
    # where no gradient is wanted anyway, the tracer leaves out that fun turns gradients off, and that it has derivatives of its own
    with torch.enable_grad():
        # of implicit equations state and slope, which events do not see
        count = 2 if function is None and base.residual is not None else 1
        states = tuple(spec.unflatten(y0[: base.rows].detach().requires_grad_().clone()) for _ in range(count))
        lone = None if spec.batch is not None else tuple(not shape for shape in spec.shapes) * count
        kinds = (key, spec, count, base.args_tree, *((x.shape, x.dtype, x.requires_grad) for x in arguments))
        asked = base.fun if function is None else function
        known = hear_directly(base, asked, time if lone is None else time[0], states, arguments, kinds[1:])
        if known is not None:
            return known
        if kinds in _refusals:
            raise Unreadable("", "", _refusals[kinds])
        try:
            with above():
                call = _Call(asked, time, tuple(map(_with_dimensions, states)), base.arguments(arguments), lone)
                found = _found(key, call, arguments)
                if found is not None and not _holds(found, call):
                    _turns[key] = _turns.get(key, 0) + 1
                    found = _found(key, call, arguments)
        except Unreadable:
            raise
        except Exception as error:  # tracers, and fun where it is traced, raise whatever they like
            reason = _refusals[kinds] = _reason(error)
            raise Unreadable("", "", reason) from error
    if found is None:
        raise Unreadable("", "", "it is no single graph")
    if any(x.layout is not torch.strided for x in found.tensors):
        raise Unreadable("", "", "it uses a sparse tensor")
    if found.graph.writes:
        raise Unreadable("", "", "it changes the state, or a tensor that it captured, in place")
    if found.graph.own_derivative:
        raise Unreadable("", "", "a torch.autograd.Function in it has a derivative of its own")
    return found


def _found(key: Hashable, call: _Call, arguments: Sequence[Tensor]) -> Heard | None:
    """Which graph a call is, by the guards of the tracer; None where it is several."""
    ear.heard = []
    result = _asked(key, *call)
    if len(ear.heard) != 1:
        return None
    graph, tensors, stand_ins = ear.heard.pop()
    known = {id(call.time): ("t", 0)} | {id(x): ("y", i) for i, x in enumerate(tree_flatten(call.states)[0])}
    known |= {id(x): ("argument", k) for k, x in reversed(list(enumerate(arguments)))}
    results = tuple(_place(x, stand_ins, known) for x in tree_flatten(result)[0])
    assert graph.module is not None
    module = _with_dimensions_of(graph.module, [known.get(id(x), ("", 0))[0] in ("t", "y") for x in tensors])
    return Heard(graph, module, tensors, tuple(arguments), known, results, result)


def _holds(found: Heard, call: _Call) -> bool:
    """Whether a graph that was known already gives what ``fun`` gives now: guards of tracers do not see attributes of tensors, which of
    two objects without value there is, names whose absence is caught, nor modules that are imported anew.

    Beside the state, where a component that is zero does not hide a factor. Only of graphs that were read: others may be random.
    """
    if not found.graph.was_read:
        return True
    leaves, tree = tree_flatten(call.states)
    moved = [beside(x.detach(), _BESIDE).requires_grad_().clone() for x in leaves]
    place = {id(x): y for x, y in zip(leaves, moved, strict=True)}
    outs = found.module(*(place.get(id(x), x) for x in found.tensors))
    values = {"out": outs, "argument": found.arguments, "t": [call.time], "y": moved}
    known = [values[kind][k] for kind, k in found.results]
    now = tree_flatten(_evaluate(*call._replace(states=tree_unflatten(moved, tree))))[0]
    return len(now) == len(known) and all(_agree(x, y) for x, y in zip(now, known, strict=True))


def _agree(now: Any, known: Tensor) -> bool:
    if not isinstance(now, Tensor) or now.dtype != known.dtype or now.numel() != known.numel():
        return False
    return not bool(differs(now.detach().reshape(-1), known.detach().reshape(-1)))


def _reason(error: Exception) -> str:
    """Why code was not traced, in a line."""
    text = str(error).strip()
    if asks_for_values(text):
        return VALUE
    if "torch.autograd.grad" in text:
        return "it takes derivatives by torch.autograd: use torch.func.grad, vjp or jvp"
    return text.splitlines()[0] if text else type(error).__name__


def _with_dimensions(state: Any) -> Any:
    """Leaves without dimensions as those of one number: see `_evaluate`."""
    return tree_map(lambda x: x if x.dim() else x.reshape(1), state)


def _with_dimensions_of(module: Callable[..., Any], which: Sequence[bool]) -> Callable[..., Any]:
    """A graph that is given times and states (``which`` of its arguments are these) as they are."""
    return lambda *xs: module(*(x.reshape(1) if own and not x.dim() else x for x, own in zip(xs, which, strict=True)))


@dataclass(frozen=True)
class Recognised:
    """A program with the tensors that it reads now, and for each of them its place among the inputs of the system; None: it has none, as
    a captured tensor of which no derivative is known to be wanted."""

    program: Program
    tensors: tuple[Tensor, ...]
    slots: tuple[int | None, ...]

    def values(self, kept: bool) -> list[Tensor]:
        """See `Program.values`."""
        return self.program.values(self.tensors, kept)


def recognise(
    key: Hashable,
    system: System | VmappedSystem,
    method: Compiled,
    t: Tensor,
    y0: Tensor,
    inputs: Sequence[Tensor],
    batched: bool,
    heard: Heard | None = None,
    events: Sequence[Callable[..., Any]] = (),
) -> Recognised:
    """The program of a system's right-hand side, and of functions of events.

    ``t`` (B,) and ``y0`` (B, n) are those of all trajectories; ``heard``: where ``fun`` was asked already. Raises `Unreadable` where there
    is none.
    """
    base, levels = _unmapped(system)
    captured = len(inputs) - len(base.captured)
    asked = heard is None or bool(events) or base.mass is not None
    given = [_first(x, [dims[k] for _, dims in levels]) for k, x in enumerate(inputs[:captured])] if asked else []
    parts = [hear(key, base, t, y0, given) if heard is None else heard]
    parts += [hear((key, compile_key(e)), base, t, y0, given, e) for e in events]
    own = {id(x): captured + k for k, x in reversed(list(enumerate(base.captured)))}
    #: tensors that are read, each with its place among the inputs of the system, and their order
    read_from: dict[int, tuple[Tensor, int | None]] = {}
    layouts = [_layout(part, own, read_from) for part in parts]
    mass = None if base.mass is None else _read_of(read_from, given[base.mass], base.mass)
    slots = tuple(k for _, k in read_from.values())
    values = [x if k is None else inputs[k] for x, k in read_from.values()]
    dims = [(size, tuple(None if k is None else of[k] for k in slots)) for size, of in levels]
    kinds = tuple((x.shape, x.dtype) for x in values)
    graphs = tuple(part.graph for part in parts)
    layout = (graphs[1:], tuple(layouts), mass, method, batched, tuple(y0.shape), base.spec, tuple(dims), kinds)
    known = graphs[0].programs
    found = known.get(layout)
    if found is None:
        pairs = [x.is_complex() for x in values]
        flats = [_flat(part.module, *where, base, k > 0, pairs) for k, (part, where) in enumerate(zip(parts, layouts, strict=True))]
        flats += [] if mass is None else [_matrix(base, mass)]
        flats = [_mapped(flat, dims, base) for flat in flats]
        originals = frozenset(id(x) for part in parts if part.graph.module is None for x in part.tensors)
        try:
            # what is read is tried on copies, whose changes inference mode does not count
            with spending(), torch.inference_mode(False):
                found = _program(flats, method, t if batched else t[0], y0, values, batched, mass is not None, originals, base)
        except Unreadable as error:
            found = error
        known[layout] = found
    if isinstance(found, Exception):
        direct = [graph for graph in graphs if graph.module is None]
        if not direct:
            raise found
        for graph in direct:
            graph.refused = True
        return recognise(key, system, method, t, y0, inputs, batched, None, events)
    for graph in graphs:
        graph.was_read = True
    return Recognised(found, tuple(values), slots)


_Places = tuple[tuple[str, int], ...]


def _layout(heard: Heard, own: dict[int, int], read_from: dict[int, tuple[Tensor, int | None]]) -> tuple[_Places, _Places]:
    """What the tensors of a call and its results are: the time, a leaf of the state, or an input of the program.

    ``own``: places of captured tensors among the inputs of the system; ``read_from`` gets those that are new.
    """

    def read(x: Tensor, slot: int | None) -> tuple[str, int]:
        return "input", _read_of(read_from, x, slot)

    places = []
    for x in heard.tensors:
        kind, k = heard.known.get(id(x), ("captured", 0))
        places.append((kind, k) if kind in ("t", "y") else read(x, k if kind == "argument" else own.get(id(x))))
    results = [read(heard.arguments[k], k) if kind == "argument" else (kind, k) for kind, k in heard.results]
    return tuple(places), tuple(results)


def _read_of(read_from: dict[int, tuple[Tensor, int | None]], x: Tensor, slot: int | None) -> int:
    """The place of a tensor among those that are read, where it gets one if it has none."""
    read_from.setdefault(id(x), (x, slot))
    return list(read_from).index(id(x))


def _unmapped(system: System | VmappedSystem) -> tuple[System, list[tuple[int, tuple[int | None, ...]]]]:
    """The system of one copy, and sizes and mapped inputs of the ``torch.vmap`` around, the outermost first."""
    levels = []
    while isinstance(system, VmappedSystem):
        levels.append((system.size, system.in_dims))
        system = system.base
    return system, levels


def _first(x: Tensor, dims: Sequence[int | None]) -> Tensor:
    """An input of the first copy."""
    for dim in dims:
        x = x if dim is None else x.select(dim, 0)
    return x


def _place(x: Any, stand_ins: Sequence[Tensor], known: dict[int, tuple[str, int]]) -> tuple[str, int]:
    """Where a tensor of the result comes from."""
    for i, made in enumerate(stand_ins):
        if made is x:
            return "out", i
    if id(x) not in known:
        raise Unreadable("", "", "its result is made outside of what was traced")
    return known[id(x)]


def _flat(
    module: Callable[..., Any], places: _Places, results: _Places, base: System, event: bool, pairs: Sequence[bool]
) -> Callable[..., Tensor]:
    """``f(t, y, *inputs)`` with ``y`` (rows, n), of implicit equations (rows, 2 n), of a traced function; of one of an ``event`` the result
    is (rows,). ``pairs``: which inputs are real and imaginary parts of what the function takes."""
    spec, n = base.spec, sum(base.spec.sizes)
    returns = spec if base.residual is None else base.residual

    def flat(t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        states = [spec.unflatten(part) for part in y.split(n, 1)]
        inputs = tuple(torch.complex(x[..., 0], x[..., 1]) if pair else x for x, pair in zip(inputs, pairs, strict=True))
        values: dict[str, Sequence[Tensor]] = {"t": [t], "y": tree_flatten(states)[0], "input": inputs}
        with above():
            values["out"] = module(*(values[kind][i] for kind, i in places))
        found = [values[kind][i] for kind, i in results]
        if event and not found[0].is_floating_point():
            raise Unreadable("", "", "an event is a flag or a whole number, whose change is looked for by bisection")
        return found[0].reshape(spec.rows) if event else returns.flatten(tree_unflatten(found, returns.tree))

    return flat


def _matrix(base: System, place: int) -> Callable[..., Tensor]:
    """The matrix in front of the slopes, ``(rows, n * n)``, as a function like those of `_flat`."""

    def flat(t: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        matrix = base.mass_matrix([*([inputs[place]] * ((base.mass or 0) + 1))])
        assert matrix is not None
        return matrix.expand(base.rows, -1, -1).flatten(1)

    return flat


def _mapped(flat: Callable[..., Tensor], levels: Sequence[tuple[int, tuple[int | None, ...]]], base: System) -> Callable[..., Tensor]:
    """The same of all copies at once."""
    if not levels:
        return flat
    rows, lone = base.rows, base.spec.batch is None
    inner = (lambda t, y, *xs: flat(t.reshape(()), y, *xs)) if lone else flat
    for _, dims in reversed(levels):
        inner = torch.vmap(inner, in_dims=(0, 0, *dims))
    sizes = [size for size, _ in levels]

    def every(t: Tensor, y: Tensor, *xs: Tensor) -> Tensor:
        return inner(t.reshape(*sizes, rows), y.reshape(*sizes, rows, -1), *xs).flatten(0, len(sizes))

    return every


def rows_of(base: System) -> int:
    """How many rows a state has which may know nothing of each other, such as a mini-batch; 0 where it is none."""
    spec = base.spec
    shape = spec.shapes[0] if len(spec.shapes) == 1 and spec.batch is None and base.residual is None and base.mass is None else ()
    return shape[0] if len(shape) > 1 and shape[0] >= _FEWEST_ROWS else 0


def _program(
    flats: Sequence[Callable[..., Tensor]],
    method: Compiled,
    t: Tensor,
    y0: Tensor,
    given: Sequence[Tensor],
    batched: bool,
    mass: bool,
    originals: frozenset[int],
    base: System,
) -> Program:
    given = [in_parts(x) for x in given]
    for x in given:
        if x.is_floating_point() and x.dtype != y0.dtype:
            raise Unreadable("", "", f"it uses a tensor of {x.dtype} beside a state of {y0.dtype}")
    joint = rows_of(base) if len(flats) == 1 and not batched and not method.implicit else 0
    if joint:
        try:
            width = y0.shape[1] // joint
            whole = lambda t, y, *xs: flats[0](t, y.reshape(1, -1), *xs).reshape(joint, width)  # noqa: E731
            return program_of([read(whole, t, y0.reshape(joint, width), given, True, originals)], method, y0, given, joint=joint)
        except Unreadable:
            # one trajectory, whose numbers all depend on each other
            pass
    # of implicit equations values and slopes stand side by side
    arguments = [torch.cat([y0, y0], 1) if k == 0 and is_residual(method) else y0 for k in range(len(flats))]
    readings = [read(flat, t, y, given, batched, originals) for flat, y in zip(flats, arguments, strict=True)]
    return program_of(readings, method, y0, given, mass)
