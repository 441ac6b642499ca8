"""Steps under ``torch.compile``, kept for later solves of the same functions and shapes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch.fx import Graph

from .columns import NARROW, column_pass
from .gathered import gathering_pass

__all__ = ["compile_key", "compiled", "compiled_loop", "pass_options"]

_log = logging.getLogger(__name__)

_warned: set[tuple[Hashable, str]] = set()


def compile_key(fun: Callable[..., Any]) -> Hashable:
    """What makes two right-hand sides share compiled code: their Python code, or for other callables their type."""
    code = getattr(fun, "__code__", None) or getattr(getattr(fun, "__func__", None), "__code__", None)
    return code if code is not None else type(fun)


@lru_cache(maxsize=512)
def compiled(function: FunctionType, key: Hashable, columns: bool = False) -> Callable[..., Any]:
    """``function`` compiled whole, for static shapes; where that fails, itself, after one warning that says why.

    One compiled copy for each ``key``: the compiler counts recompilations by code object, and many right-hand sides must not
    use up one limit. Within a key its guards tell shapes, options and captured objects apart. ``columns``: with the pass that takes
    narrow matrices apart.
    """
    options = (pass_options(column_pass) if columns else {}) | _guards()
    whole = torch.compile(_copied(function), dynamic=False, fullgraph=True, options=options)

    def call(*args: Any) -> Any:
        try:
            return whole(*args)
        except _failures() as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            if (key, reason) not in _warned:  # once for each right-hand side
                _warned.add((key, reason))
                warnings.warn(f"compile=True: {function.__name__} runs uncompiled, because: {reason}", RuntimeWarning, stacklevel=2)
        return function(*args)

    return call


def _failures() -> tuple[type[Exception], ...]:
    """What the compilers of this PyTorch raise for what they cannot compile."""
    from torch._inductor import exc

    return tuple({torch._dynamo.exc.TorchDynamoException, getattr(exc, "InductorError", torch._dynamo.exc.TorchDynamoException)})


def pass_options(rewrite: FunctionType) -> dict[str, Any]:
    """Options of ``torch.compile`` that run a pass over graphs of ATen operators; none where this PyTorch has no place for it."""
    try:
        from torch._inductor import config
        from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
    except ImportError:
        return {}
    if not hasattr(config, "post_grad_custom_pre_pass"):
        return {}
    # the compiler keeps its results by this: passes call each other, whatever file they stand in
    sources = tuple(f.__code__.co_filename for f in (column_pass, gathering_pass, narrow_loop_pass))

    class Pass(CustomGraphPass):
        def __call__(self, graph: Graph) -> None:
            rewrite(graph)

        def uuid(self) -> Any:
            return get_hash_for_files(sources, rewrite.__name__)

    return {"post_grad_custom_pre_pass": Pass()}


def narrow_loop_pass(graph: Graph) -> None:
    """For loops over states of few numbers: a ``stack`` costs more there than what it holds, whatever the number of rows."""
    gathering_pass(graph)
    column_pass(graph, fewest=1)


def _guards() -> dict[str, Any]:
    """The option that leaves out checks of what cannot change: the method, which is part of the key, and modules of ours and PyTorch's."""
    if not hasattr(torch._dynamo.hooks.Hooks, "guard_filter_fn"):
        return {}
    fixed = ("__import_adjoint", "__import_torch", "__import__('torch')", "plan.method", "['plan'].method", "unnamed_scope")
    return {"guard_filter_fn": lambda guards: [not any(name in g.name for name in fixed) for g in guards]}


def _copied(function: FunctionType) -> FunctionType:
    return FunctionType(
        function.__code__.replace(co_name=function.__name__),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the compiler's remark, once for each operator, that LAPACK's are called the long way."""
    logger = logging.getLogger("torch._inductor.ir")

    def heard(record: logging.LogRecord) -> bool:
        return "missing a c-shim" not in record.getMessage()

    logger.addFilter(heard)
    try:
        yield
    finally:
        logger.removeFilter(heard)


@lru_cache(maxsize=512)
def compiled_loop(function: FunctionType, key: Hashable, device: str, width: int) -> Callable[..., Any]:
    """As `compiled`, for a ``function`` that is a loop over states of ``width`` numbers: if it cannot be compiled the answer is None.

    On a CPU calls of kernels are compiled too: a loop makes many short ones.
    """
    options = (
        ({"cpp_wrapper": True} if device == "cpu" else {})
        | pass_options(narrow_loop_pass if width <= NARROW else gathering_pass)
        | _guards()
    )
    # the second form is for versions whose plan of what memory to use again fails on loops
    forms = [options, options | {"allow_buffer_reuse": False}]
    whole = [torch.compile(_copied(function), dynamic=False, fullgraph=True, options=form) for form in forms]

    def call(*args: Any) -> Any:
        while whole:
            try:
                with _quiet():
                    return whole[0](*args)
            except Exception as error:  # whatever compilers of many versions raise: step by step says what is wrong, if anything is
                del whole[0]
                if not whole:
                    _log.info("%s is not compiled as a loop, but step by step, because: %s", function.__name__, error)
        return None

    return call
