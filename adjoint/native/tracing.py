"""A function of tensors as a list of ATen operators, with the line of the user's code at each of them.

The function runs once, with real tensors, and what it does is written down below `torch.func.functionalize`, which makes writes in place
vanish. What does not depend on its inputs is not written down: such tensors are constants. (``make_fx`` does as much and more, but imports
compilers first, which takes seconds.)
"""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..torch_internals import (
    TorchDispatchMode,
    core_decompositions,
    from_functional_tensor,
    get_unwrapped,
    is_functional_tensor,
    is_functorch_wrapped_tensor,
    sync,
)

__all__ = ["VALUE", "Node", "PickedByNumbers", "Result", "Trace", "Untraceable", "asks_for_values", "trace"]

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
VALUE = "what is done depends on the value of a tensor (if, while, float(), .item()): use torch.where"
#: methods that take numbers out of tensors
_OUTWARD = frozenset(
    {"tolist", "numpy", "item", "is_nonzero", "equal", "data_ptr", "untyped_storage", "storage", "__array__", "__dlpack__", "__reduce_ex__"}
    | {"__float__", "__bool__", "__int__", "__index__", "__complex__"}
)


class Untraceable(Exception):
    """A function cannot be traced; ``line`` is that of the user's code, or empty."""

    def __init__(self, reason: str, line: str) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


class _Depends(Exception):
    """A value decides what is done."""


@dataclass(eq=False, slots=True)
class Node:
    """One call of an operator. Among its arguments stand `Result`s of earlier ones, and tensors, which are constants.

    ``several``: it gives a list of tensors. ``stopped``: no derivative goes through it. An input has no ``target``.
    """

    name: str
    target: Any
    args: Any
    kwargs: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    several: bool = False
    line: str = ""
    stopped: bool = False


class Result(NamedTuple):
    """One tensor that a node gives."""

    node: Node
    which: int = 0


@dataclass(frozen=True)
class Trace:
    """Inputs and further nodes of a function in their order, and its result; ``plain``: not traced below `functionalize`."""

    inputs: tuple[Node, ...]
    nodes: tuple[Node, ...]
    result: Any
    plain: bool


@functools.lru_cache(maxsize=1)
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Operators made of simpler ones."""
    aten = torch.ops.aten
    return core_decompositions([aten.native_batch_norm, aten.addr, aten._euclidean_dist])


def _is_ours(path: str) -> bool:
    return path.startswith((_OURS, _TORCH)) or (path.startswith("<") and path != "<stdin>")


def _line_of_frame() -> str:
    """The innermost line that is neither ours nor PyTorch's; of a traced graph, that which its node was traced from."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_ours(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if isinstance(module := frame.f_locals.get("self"), GraphModule) and (line := _line_of_node(module, frame)):
            return line
        frame = frame.f_back
    return ""


_lines_of: WeakKeyDictionary[GraphModule, dict[str, str]] = WeakKeyDictionary()


def _line_of_node(module: GraphModule, frame: FrameType) -> str:
    """The user's line of the node that a traced graph is at."""
    lines = _lines_of.get(module)
    if lines is None:
        lines = _lines_of[module] = {node.name: _last_line(node.stack_trace or "") for node in module.graph.nodes}
    return lines.get(linecache.getline(frame.f_code.co_filename, frame.f_lineno).split("=")[0].split(":")[0].strip(), "")


def _last_line(stack: str) -> str:
    own = [f"{path}:{line}" for path, line in re.findall(r'File "(.+?)", line (\d+)', stack) if not _is_ours(path)]
    return own[-1] if own else ""


def _line_of_error(error: BaseException) -> str:
    line, step = "", error.__traceback__
    while step is not None:
        if not _is_ours(step.tb_frame.f_code.co_filename):
            line = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return line


class _Recorder(TorchDispatchMode):
    """Writes down operators on tensors that depend on the inputs; ``everything``: all operators, as they are."""

    def __init__(self, read: frozenset[str], everything: bool = False, originals: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self._originals = originals
        self.nodes: list[Node] = []
        self.line, self.stopped = "", False
        self._read, self._everything = read, everything
        self._known: dict[int, Result] = {}
        self._dependent: set[int] = set()
        self._kept: list[Tensor] = []  # a tensor that is gone could lend its number to another

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer PyTorch would import its compiler only to keep it away from here."""
        return False

    def given(self, x: Tensor) -> Node:
        """An input."""
        node = Node("", None, (), {}, (tuple(x.shape),), (x.dtype,))
        self._note(x, Result(node), True)
        return node

    def _note(self, x: Tensor, result: Result, dependent: bool) -> None:
        self._known[id(x)] = result
        self._kept.append(x)
        if dependent:
            self._dependent.add(id(x))

    def result_of(self, x: Any) -> Any:
        """What a tensor is a result of; itself, if it is a constant or no tensor."""
        return self._known.get(id(x), x)

    def depends(self, *parts: Any) -> bool:
        """Whether any tensor among parts depends on the inputs."""
        return any(id(_inmost(x)) in self._dependent for x in tree_leaves(parts) if isinstance(x, Tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[-1]
        if self._originals and any(id(x) in self._originals for x in tree_leaves((args, kwargs))):
            raise NotImplementedError(f"{name} is given a captured tensor itself and not what stands in its place")
        random = torch.Tag.nondeterministic_seeded in func.tags
        dependent = random or self.depends(args, kwargs)
        if not dependent and not self._everything:
            return func(*args, **kwargs)
        if dependent and name in ("_local_scalar_dense", "item", "is_nonzero", "equal"):
            raise _Depends(VALUE)
        if name.rstrip("_") not in self._read and not random and not self._everything:
            with self:
                out = _made_of_simpler(func, args, kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._write(name, func, args, kwargs, out, dependent)
        return out

    def _write(self, name: str, func: Any, args: Any, kwargs: Any, out: Any, dependent: bool) -> None:
        """Write down a call whose result is known."""
        several = isinstance(out, (list, tuple))
        tensors = [x for x in (out if several else [out]) if isinstance(x, Tensor)]
        if not tensors:
            return
        node = Node(
            name, func, tree_map(self.result_of, args), tree_map(self.result_of, kwargs),
            tuple(tuple(x.shape) for x in tensors), tuple(x.dtype for x in tensors), several, self.line, self.stopped,
        )  # fmt: skip
        self.nodes.append(node)
        for which, x in enumerate(tensors):
            self._note(x, Result(node, which), dependent or id(x) in self._dependent)


def _inmost(x: Tensor) -> Tensor:
    """The tensor inside of the wrappers of function transforms."""
    while True:
        if is_functional_tensor(x):
            sync(x)
            x = from_functional_tensor(x)
        elif is_functorch_wrapped_tensor(x):
            x = get_unwrapped(x)
        else:
            return x


def _made_of_simpler(func: Any, args: Any, kwargs: Any) -> Any:
    rule = _decompositions().get(func)
    if rule is not None:
        out = rule(*args, **kwargs)
        if out is not NotImplemented:
            return out
    return func.decompose(*args, **kwargs)


def _is_integer(index: Any) -> bool:
    """Whether an index is a tensor of one integer; bytes are masks to PyTorch."""
    return isinstance(index, Tensor) and index.dim() == 0 and index.dtype in (torch.int64, torch.int32, torch.int16, torch.int8)


class _Lines(TorchFunctionMode):
    """Tells the recorder, at each call of the user's, its line, and whether a derivative goes through it."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if getattr(func, "__name__", "") in _OUTWARD and recorder.depends(args, kwargs):
            raise _Depends(VALUE)
        if func == Tensor.data.__set__:
            raise NotImplementedError("the numbers of a tensor are replaced (.data = ..., or a module is moved to another type)")
        before = recorder.line, recorder.stopped
        recorder.line = _line_of_frame() or recorder.line
        recorder.stopped = func in _DETACHING or not torch.is_grad_enabled()
        try:
            if func is Tensor.__getitem__ and any(map(_is_integer, args[1] if isinstance(args[1], tuple) else args[1:])):
                return _picked(*args)
            if func == Tensor.data.__get__:
                return args[0].detach()  # which is seen below
            return func(*args, **kwargs)
        finally:
            recorder.line, recorder.stopped = before


_DETACHING = {Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.data.__get__}


class PickedByNumbers(TorchFunctionMode):
    """Indexing by tensors of one integer as an operator, for tracers that would ask for its value."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and any(map(_is_integer, args[1] if isinstance(args[1], tuple) else args[1:])):
            return _picked(*args)
        return func(*args, **(kwargs or {}))


def _picked(x: Tensor, index: Any) -> Tensor:
    """Indexing by computed integers, for which Python would ask for their value. As in PyTorch each takes its dimension away by itself, and
    the other parts of the index, in their order, have those that are left."""
    parts: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    for k, part in enumerate(parts):
        if part is Ellipsis:
            others = parts[:k] + parts[k + 1 :]
            parts = (*parts[:k], *[slice(None)] * (x.dim() - sum(map(_dimensions, others))), *parts[k + 1 :])
            break
    dim = 0
    rest: list[Any] = []
    for part in parts:
        if _is_integer(part):
            x = x.index_select(dim, torch.where(part < 0, part + x.shape[dim], part).reshape(1).long()).squeeze(dim)
        else:
            rest.append(part)
            dim += _dimensions(part)
    return x[tuple(rest)]


def _dimensions(part: Any) -> int:
    """How many dimensions of a tensor a part of an index is for."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _traced(
    function: Callable[..., Any], tensors: Sequence[Tensor], read: frozenset[str], functional: bool, originals: frozenset[int]
) -> Trace:
    recorder = _Recorder(read, not functional, originals)
    inputs = tuple(recorder.given(x) for x in tensors)

    def watched(*given: Tensor) -> Any:
        with torch.enable_grad(), _Lines(recorder):
            return function(*given)

    with recorder:
        out = (torch.func.functionalize(watched) if functional else watched)(*tensors)
    found = Trace(inputs, tuple(recorder.nodes), tree_map(recorder.result_of, out), not functional)
    # what operators are made of may write in place in its turn
    return _rewritten(found, tensors, read) if not functional or any(map(_writes, found.nodes)) else found


def _writes(node: Node) -> bool:
    return node.target._schema.is_mutable


def _is_result(x: Any) -> bool:
    return isinstance(x, Result)


def _rewritten(before: Trace, tensors: Sequence[Tensor], read: frozenset[str]) -> Trace:
    """A trace without the writes in place of another: its operators once more."""
    parts = tree_leaves([(n.args, n.kwargs) for n in before.nodes] + [before.result], is_leaf=_is_result)
    constants = list({id(x): x for x in parts if isinstance(x, Tensor)}.values())
    recorder = _Recorder(read)
    tensors = [x.detach().clone() for x in tensors]
    inputs = tuple(recorder.given(x) for x in tensors)

    def again(*given: Tensor) -> Any:
        known: dict[Node, Any] = dict(zip(before.inputs, ([x] for x in given), strict=False))
        wrapped = dict(zip(map(id, constants), given[len(before.inputs) :], strict=True))

        def value(x: Any) -> Any:
            return known[x.node][x.which] if isinstance(x, Result) else wrapped.get(id(x), x)

        def values(x: Any) -> Any:
            return tree_map(value, x, is_leaf=_is_result)

        for node in before.nodes:
            recorder.line, recorder.stopped = node.line, node.stopped
            out = node.target(*values(node.args), **values(node.kwargs))
            known[node] = list(out) if node.several else [out]
        return values(before.result)

    copies = [x.detach().clone() for x in constants]
    with recorder, torch.no_grad():
        out = torch.func.functionalize(again)(*tensors, *copies)
    if any(x._version for x in (*copies, *tensors)):
        raise Untraceable(_CHANGES, "")
    return Trace(inputs, tuple(recorder.nodes), tree_map(recorder.result_of, out), before.plain)


def trace(
    function: Callable[..., Any], tensors: Sequence[Tensor], read: frozenset[str], originals: frozenset[int] = frozenset()
) -> Trace:
    """The operators of ``function(*tensors)``, without writes in place; those named in ``read`` are not made of simpler ones.
    ``originals``: ids of tensors that no operator may be given.

    Raises:
        Untraceable: a value decides what is done (``if y[0] > 0``), or an operator cannot be traced.
    """
    tensors = [x.detach().clone() for x in tensors]
    try:
        found = _traced(function, tensors, read, True, originals)
        if any(x._version for x in tensors):
            raise Untraceable(_CHANGES, "")
        return found
    except Exception as error:
        if any(text in str(error) for text in _NOT_FUNCTIONAL):
            plain = _plain(function, tensors, read, originals)
            if plain is not None:
                return plain
        raise error if isinstance(error, Untraceable) else Untraceable(_reason(error), _line_of_error(error)) from error


_CHANGES = "it writes into a tensor that it is given, or has captured"
#: inner derivatives by torch.autograd, and some operators of many parts, are at odds with functionalize
_NOT_FUNCTIONAL = ("requires_grad", "does not require grad", "mutating a non-functional tensor", _CHANGES)


def _plain(function: Callable[..., Any], tensors: Sequence[Tensor], read: frozenset[str], originals: frozenset[int]) -> Trace | None:
    """A trace which is not made below functionalize, and is put through it later."""

    apply, here = torch.autograd.Function.__dict__["apply"], threading.get_ident()

    def refuse(cls: Any, *arguments: Any, **named: Any) -> Any:
        if threading.get_ident() != here:
            return apply.__get__(None, cls)(*arguments, **named)
        raise NotImplementedError("a derivative of its own, by torch.autograd.Function")

    # the operators of such a function do not tell its derivative; below functionalize it is refused by PyTorch
    tensors = [x.detach().clone() for x in tensors]
    try:
        torch.autograd.Function.apply = classmethod(refuse)
        return _traced(function, [x.requires_grad_() if x.is_floating_point() else x for x in tensors], read, False, originals)
    except Exception:  # what the first trace raised is what the user reads
        return None
    finally:
        torch.autograd.Function.apply = apply


#: how PyTorch says that a tracer met a number that it does not know; the last two in 2.6
_ASKED = ("data-dependent", "item()", "tensor.item", "dynamic control flow")


def asks_for_values(text: str) -> bool:
    """Whether an error of PyTorch's tracers says that code looks at the value of a tensor."""
    return any(words in text.lower() for words in _ASKED)


def _reason(error: Exception) -> str:
    text = str(error)
    if isinstance(error, _Depends) or asks_for_values(text) or "data pointer" in text:
        return VALUE
    if "mutating a non-functional tensor" in text:
        return _CHANGES
    return f"it cannot be traced: {type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
