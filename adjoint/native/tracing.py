"""A function of tensors as a graph of ATen operators, with the line of the user's code at each of them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.overrides import TorchFunctionMode

__all__ = ["Trace", "Untraceable", "trace"]

_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep


class Untraceable(Exception):
    """A function cannot be traced; ``line`` is that of the user's code, or empty."""

    def __init__(self, reason: str, line: str) -> None:
        super().__init__(reason)
        self.reason, self.line = reason, line


@dataclass
class Trace:
    """Graph of a function; ``lines`` tells of its nodes where the user wrote them, and ``stopped`` which have no derivative."""

    module: GraphModule
    lines: dict[Node, str] = field(default_factory=dict)
    stopped: set[Node] = field(default_factory=set)


@functools.lru_cache(maxsize=4)
def _decompositions(read: frozenset[str]) -> dict[Any, Callable[..., Any]]:
    """Operators made of simpler ones, but for those that are read as they are."""
    from torch._decomp import core_aten_decompositions

    table = core_aten_decompositions()
    return {op: table[op] for op in table if _name(op) not in read}


def _name(op: Any) -> str:
    schema = getattr(op, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def _is_ours(path: str) -> bool:
    return path.startswith((_OURS, _TORCH)) or (path.startswith("<") and path != "<stdin>")


def _line_of_frame() -> str:
    """The innermost line that is neither ours nor PyTorch's."""
    frame = sys._getframe(1)
    while frame is not None:
        if not _is_ours(frame.f_code.co_filename):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _line_of_error(error: BaseException) -> str:
    line, step = "", error.__traceback__
    while step is not None:
        if not _is_ours(step.tb_frame.f_code.co_filename):
            line = f"{step.tb_frame.f_code.co_filename}:{step.tb_lineno}"
        step = step.tb_next
    return line


def _has_integer(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, Tensor) and i.dim() == 0 and i.dtype in (torch.int64, torch.int32) for i in parts)


class _Lines(TorchFunctionMode):
    """Writes down, for the operators that each call of the user's makes, its line and whether a derivative goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, str] = {}
        self.stopped: set[str] = set()
        self._last: Node | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # one number picked by a computed integer: indexing would ask for the value of the integer
        if func is Tensor.__getitem__ and _has_integer(args[1]):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            out = args[0][tuple(i.reshape(1) if _has_integer(i) else i for i in index)]
            first = next(n for n, i in enumerate(index) if _has_integer(i))
            out = _without_ones(out, index, first)
        else:
            out = func(*args, **(kwargs or {}))
        mode = get_proxy_mode()
        if mode is None:
            return out
        stops = func in _DETACHING or not torch.is_grad_enabled()
        line = ""
        for node in reversed(mode.tracer.graph.nodes):
            if node is self._last or node.name in self.lines:
                break
            line = line or _line_of_frame()
            self.lines[node.name] = line
            if stops:
                self.stopped.add(node.name)
        return out


def _without_ones(out: Tensor, index: tuple[Any, ...], first: int) -> Tensor:
    """What advanced indexing by vectors of one element gives, without their dimension."""
    if any(isinstance(i, Tensor) and i.dim() > 0 for i in index):
        return out  # broadcast against longer ones
    before = 0
    for i in index[:first]:
        if i is Ellipsis:
            raise NotImplementedError("an index by ... and a computed integer")
        before += not isinstance(i, int) or i is None
    return out.squeeze(before)


_DETACHING = {Tensor.detach, Tensor.detach_, torch.detach, torch.detach_, Tensor.data.__get__}


def _traced(function: Callable[..., Any], tensors: Sequence[Tensor], read: frozenset[str], functional: bool) -> Trace:
    lines = _Lines()

    def watched(*inputs: Tensor) -> Any:
        with torch.enable_grad(), lines:
            return function(*inputs)

    whole = torch.func.functionalize(watched) if functional else watched
    module = make_fx(whole, decomposition_table=_decompositions(read))(*tensors)
    nodes = {node.name: node for node in module.graph.nodes}
    return Trace(
        module,
        {nodes[name]: line for name, line in lines.lines.items() if name in nodes},
        {nodes[name] for name in lines.stopped if name in nodes},
    )


def _with_grad(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function whose inputs require gradients, as those of a solve may."""
    return lambda *inputs: function(*[x.requires_grad_() if x.is_floating_point() else x for x in inputs])


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def trace(function: Callable[..., Any], tensors: Sequence[Tensor], read: frozenset[str]) -> Trace:
    """The graph of ``function(*tensors)``, without writes in place; operators named in ``read`` are not made of simpler ones.

    Raises:
        Untraceable: a value decides what is done (``if y[0] > 0``), or an operator cannot be traced.
    """
    tensors = [x.detach() for x in tensors]
    try:
        return _traced(function, tensors, read, functional=True)
    except Exception as error:
        try:
            # inner derivatives by torch.autograd cannot be taken inside of functionalize
            plain = _traced(_with_grad(function), tensors, read, functional=False)
        except Exception:
            plain = None
        if plain is not None and not any(map(_writes, plain.module.graph.nodes)):
            return plain
        raise Untraceable(_reason(error), _line_of_error(error)) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "trying to get a value out of" in text or "item()" in text or "data-dependent" in text.lower():
        return "what is done depends on the value of a tensor (if, while, float(), .item()): use torch.where"
    return f"it cannot be traced: {type(error).__name__}: {text.splitlines()[0][:200] if text else ''}"
