"""What PyTorch keeps private and this package cannot do without: all of it, by the names under which the rest asks for it.

Nothing else in the package names anything of PyTorch's that begins with an underscore (`torch.utils._pytree` apart, the only name of
pytrees). A new version of PyTorch that has moved one of these has to be answered here alone.

And what is made of it for all: what autograd asks of a node beside its derivative (many cotangents at once, as with
``is_grads_batched=True``, which ``torch.autograd.functional.jacobian(vectorize=True)`` asks for; forward mode within forward mode; views),
and leaves of pytrees, quickly where they are tensors and numbers in tuples and lists.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, wraps
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch import pyfunctorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map, tree_structure

__all__ = [
    "DisableFuncTorch",
    "Node",
    "OpOverload",
    "TorchDispatchMode",
    "TransformType",
    "add_batch_dim",
    "alive",
    "are_transforms_active",
    "ask_before_custom_functions",
    "below_jvp",
    "copy_by_copy",
    "core_decompositions",
    "current_function_modes",
    "custom_functions_may_hide",
    "decomposition_table",
    "differentiates_in_inference_mode",
    "dispatch_has_kernel_for_dispatch_key",
    "dual_level",
    "enter_dual_level",
    "exit_dual_level",
    "foreach_add_",
    "from_functional_tensor",
    "get_data_attr",
    "get_dynamic_layer_stack_depth",
    "get_inplace_requires_grad_allowed",
    "get_interpreter_stack",
    "get_sequence_nr",
    "get_unwrapped",
    "is_batchedtensor",
    "is_functional_tensor",
    "is_functorch_wrapped_tensor",
    "is_fwd_grad_enabled",
    "is_gradtrackingtensor",
    "is_legacy_batchedtensor",
    "is_saving_watched",
    "is_written_down",
    "leaves_of",
    "legacy_add_batch_dim",
    "legacy_remove_batch_dim",
    "len_torch_dispatch_stack",
    "len_torch_function_stack",
    "mapped",
    "maybe_current_level",
    "maybe_get_bdim",
    "maybe_get_level",
    "most_graphs",
    "peek_interpreter_stack",
    "pop_dynamic_layer_stack_and_undo_to_depth",
    "retrieve_current_functorch_interpreter",
    "saved_tensors_hooks_enable",
    "saved_tensors_hooks_is_enabled",
    "set_fwd_grad_enabled",
    "set_inplace_requires_grad_allowed",
    "skipped",
    "storage_use_count",
    "switch_fwd_grad",
    "sync",
    "team_of_threads",
    "temporarily_clear_interpreter_stack",
    "times_below",
    "unviewed",
    "unwatched",
    "unwrap_for_grad",
    "unwrap_if_dead",
    "vmapmode_decrement_nesting",
    "vmapmode_increment_nesting",
    "wrap_for_grad",
]

_C = cast(Any, torch._C)
_functorch = _C._functorch

# -- tensors that transforms of torch.func have wrapped, and the stack of transforms

TransformType = _functorch.TransformType
is_functorch_wrapped_tensor: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor
is_batchedtensor: Callable[[Tensor], bool] = _functorch.is_batchedtensor
is_gradtrackingtensor: Callable[[Tensor], bool] = _functorch.is_gradtrackingtensor
is_legacy_batchedtensor: Callable[[Tensor], bool] = _functorch.is_legacy_batchedtensor
get_unwrapped: Callable[[Tensor], Tensor] = _functorch.get_unwrapped
unwrap_if_dead: Callable[[Any], Any] = _functorch.unwrap_if_dead
maybe_get_bdim: Callable[[Tensor], int] = _functorch.maybe_get_bdim
maybe_get_level: Callable[[Tensor], int] = _functorch.maybe_get_level
maybe_current_level: Callable[[], int | None] = _functorch.maybe_current_level
add_batch_dim: Callable[[Tensor, int, int], Tensor] = _functorch._add_batch_dim
wrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._wrap_for_grad
unwrap_for_grad: Callable[[Tensor, int], Tensor] = _functorch._unwrap_for_grad
peek_interpreter_stack: Callable[[], Any] = _functorch.peek_interpreter_stack
get_interpreter_stack: Callable[[], Any] = _functorch.get_interpreter_stack
get_dynamic_layer_stack_depth: Callable[[], int] = _functorch.get_dynamic_layer_stack_depth
pop_dynamic_layer_stack_and_undo_to_depth: Callable[[int], None] = _functorch.pop_dynamic_layer_stack_and_undo_to_depth
get_inplace_requires_grad_allowed: Callable[[], bool] = _functorch.get_inplace_requires_grad_allowed
set_inplace_requires_grad_allowed: Callable[[bool], None] = _functorch.set_inplace_requires_grad_allowed
DisableFuncTorch = _C._DisableFuncTorch


class _Below(threading.local):
    depth = 0


_below = _Below()


def times_below() -> int:
    """How many times all transforms around have been put aside: their levels mean nothing there, and what lies on them is not seen."""
    return _below.depth


@contextmanager
def temporarily_clear_interpreter_stack() -> Iterator[None]:
    """Below all transforms: they are put aside, and begin to count anew."""
    above = peek_interpreter_stack() is not None
    _below.depth += above
    try:
        with pyfunctorch.temporarily_clear_interpreter_stack():
            yield
    finally:
        _below.depth -= above


@cache
def differentiates_in_inference_mode() -> bool:
    """Whether transforms of torch.func record in inference mode; where they do not (2.6) they give zeros there, without a word."""
    with temporarily_clear_interpreter_stack(), torch.inference_mode():
        return bool(torch.func.vjp(torch.square, torch.ones(()))[1](torch.ones(()))[0])


# -- the vmap from before torch.func, which autograd's many cotangents are

legacy_add_batch_dim: Callable[[Tensor, int, int], Tensor] = cast(Any, torch)._add_batch_dim
legacy_remove_batch_dim: Callable[[Tensor, int, int, int], Tensor] = cast(Any, torch)._remove_batch_dim
vmapmode_increment_nesting: Callable[[], int] = _C._vmapmode_increment_nesting
vmapmode_decrement_nesting: Callable[[], int] = _C._vmapmode_decrement_nesting

# -- forward mode

set_fwd_grad_enabled = forward_ad._set_fwd_grad_enabled
is_fwd_grad_enabled: Callable[[], bool] = _C._is_fwd_grad_enabled
enter_dual_level: Callable[[], int] = _C._enter_dual_level
exit_dual_level: Callable[..., None] = _C._exit_dual_level
#: as `set_fwd_grad_enabled`, without a context
switch_fwd_grad: Callable[[bool], None] = _C._set_fwd_grad_enabled


def dual_level() -> int:
    """The level of forward mode, below zero where there is none."""
    return forward_ad._current_level


# -- modes that see functions and operators

len_torch_function_stack: Callable[[], int] = _C._len_torch_function_stack
len_torch_dispatch_stack: Callable[[], int] = _C._len_torch_dispatch_stack
current_function_modes: Callable[[], list[Any]] = cast(Any, torch.overrides)._get_current_function_mode_stack
dispatch_has_kernel_for_dispatch_key: Callable[[str, str], bool] = _C._dispatch_has_kernel_for_dispatch_key


_mode_pre_dispatch: Callable[[Any], Any] = cast(Any, torch)._ops._get_dispatch_mode_pre_dispatch


def is_written_down() -> bool:
    """Whether a tracer of graphs sees every operator: make_fx, `torch.export` (above autograd), or `torch.jit.trace`."""
    proxy = _C._TorchDispatchModeKey.PROXY
    return _C._get_dispatch_mode(proxy) is not None or _mode_pre_dispatch(proxy) is not None or _C._get_tracing_state() is not None


are_transforms_active: Callable[[], bool] = _C._are_functorch_transforms_active
#: whether methods of custom functions may be about that ask nobody, see `_let_custom_functions_ask`
custom_functions_may_hide: bool = not isinstance(torch.autograd.Function.__dict__["apply"], classmethod)
#: see `ask_before_custom_functions`
_changes: list[Callable[[tuple[Any, ...]], tuple[Any, ...]]] = []


def ask_before_custom_functions(change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> None:
    """Where function modes are at work, and no transform is, custom functions (`torch.autograd.Function`) get what ``change`` makes of
    their arguments: ``apply`` is no operator that modes see."""
    _changes[:] = [change]


def _let_custom_functions_ask() -> None:
    """By what each ``apply`` calls before anything else, or, where that is written in C (2.14), by another ``apply``: one that was taken
    from its class before this asks nobody."""
    utils, functions = cast(Any, torch)._functorch.utils, cast(Any, torch.autograd.Function)

    def changed(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return _changes[0](args) if _changes and _C._len_torch_function_stack() else args

    in_c = functions.__dict__["apply"]
    if not custom_functions_may_hide:
        plain: Callable[[tuple[Any, ...]], tuple[Any, ...]] = utils.unwrap_dead_wrappers
        utils.unwrap_dead_wrappers = wraps(plain)(lambda args: changed(plain(args)))
        return

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        return in_c.__get__(None, cls)(*(args if are_transforms_active() else changed(args)), **kwargs)

    functions.apply = classmethod(apply)


_let_custom_functions_ask()


# -- autograd, memory, compilers

get_sequence_nr: Callable[[], int] = cast(Any, torch.autograd)._get_sequence_nr
saved_tensors_hooks_is_enabled: Callable[[], bool] = _C._autograd._saved_tensors_hooks_is_enabled
saved_tensors_hooks_enable: Callable[[], None] = _C._autograd._saved_tensors_hooks_enable
#: the innermost hooks on what is saved for backward, or None; where PyTorch does not tell, None always
_saving: Callable[[bool], Any] = getattr(_C._autograd, "_top_saved_tensors_default_hooks", lambda ignore_is_tracing: None)
#: reads ``x.data`` in graphs; "" where PyTorch has none
get_data_attr: Any = getattr(_C._autograd, "_get_data_attr", "")
#: how many tensors lie in a storage; None where PyTorch does not tell
storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
_regain: Callable[[Tensor], None] = getattr(Tensor, "_fix_weakref", lambda x: None)
foreach_add_: Callable[[Any, Any], None] = cast(Any, torch)._foreach_add_
is_functional_tensor: Callable[[Tensor], bool] = cast(Any, torch)._is_functional_tensor
from_functional_tensor: Callable[[Tensor], Tensor] = cast(Any, torch)._from_functional_tensor
sync: Callable[[Tensor], None] = cast(Any, torch)._sync


def is_saving_watched() -> bool:
    """Whether somebody, such as `torch.utils.checkpoint`, counts or moves what is saved for backward."""
    return _saving(True) is not None


@contextmanager
def unwatched() -> Iterator[None]:
    """For what is done once, and not in the same call made again: those who count what is saved for backward do not see it."""
    if not is_saving_watched():
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        yield


def alive(references: Iterable[weakref.ref[Tensor]]) -> list[Tensor]:
    """The tensors among weakly held ones that are still there. What PyTorch alone holds is its own until it is told otherwise: then its
    Python object could go while somebody uses it."""
    found = [x for x in (reference() for reference in references) if x is not None]
    for x in found:
        _regain(x)
    return found


class _Team:
    """PyTorch's threads. ``gone``: in a process that was forked, which has none of them."""

    gone = False

    @cached_property
    def entry(self) -> int:
        try:
            # the library of OpenMP that PyTorch was linked with, of several in a process
            return ctypes.cast(ctypes.CDLL(_C.__file__).GOMP_parallel, ctypes.c_void_p).value or 0
        except (AttributeError, OSError):
            return 0

    def leave(self) -> None:
        self.gone = True


_team = _Team()
if sys.platform != "win32":
    os.register_at_fork(after_in_child=_team.leave)


def team_of_threads() -> int:
    """The address of a C function ``(function, argument, threads, 0)`` that runs one in so many of the threads of PyTorch's operators; zero
    where there is none. For milliseconds after their last work these stand ready for more, and keep processors from other threads.
    """
    return 0 if _team.gone else _team.entry


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """How operators are made of others."""
    from torch._decomp import decomposition_table

    return decomposition_table


def core_decompositions(further: list[Any]) -> dict[Any, Callable[..., Any]]:
    """How operators are made of PyTorch's core ones, and the ``further`` ones of others."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    return {**core_aten_decompositions(), **get_decompositions(further)}


def most_graphs(n: int) -> Any:
    """A context in which the compiler keeps so many graphs of one function."""
    return cast(Any, torch)._dynamo.config.patch(cache_size_limit=n)


def skipped(function: Callable[..., Any]) -> None:
    """Let the compiler not look into the frame of a function."""
    cast(Any, torch)._dynamo.decorators.skip(function)


# ---- structures of pytrees


def _let_structures_be_keys() -> None:
    """Give structures of pytrees a hash where PyTorch has none for them (2.6): what is remembered of functions is found by them."""
    try:
        hash(tree_structure(0))
    except TypeError:
        cast(Any, TreeSpec).__hash__ = lambda tree: hash((tree.type, tree.num_leaves, tuple(tree.children_specs)))


_let_structures_be_keys()


# ---- nodes of autograd


class Node(torch.autograd.Function):
    """A custom function whose signature is made once: ``apply`` asks for that of ``forward`` at every call, which takes longer than a small
    operator."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        forward: Any = cls.forward
        forward.__signature__ = inspect.signature(forward)


def by_copies(apply: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor | None], dims: Sequence[int | None], size: int) -> Any:
    """For a node's ``vmap``: what ``apply`` gives for one copy of the tensors after the other, and where copies are in it."""
    copies = [[x if x is None or d is None else x.select(d, k) for x, d in zip(tensors, dims, strict=True)] for k in range(size)]
    return tuple(map(torch.stack, zip(*(apply(*xs) for xs in copies), strict=True))), 0


_Backward = Callable[..., tuple[Tensor | None, ...]]


def _is_mapped(x: Any) -> bool:
    return isinstance(x, Tensor) and is_legacy_batchedtensor(x)


def copy_by_copy(backward: _Backward) -> _Backward:
    """The ``backward`` of a node, called for one cotangent after the other: autograd maps it by a vmap of its own from before torch.func,
    which has rules for few operators, and none for compiled code. Derivatives of derivatives are left to that.
    """

    @wraps(backward)
    def call(ctx: Any, *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or not any(map(_is_mapped, bars)):
            return backward(ctx, *bars)
        vmapmode_increment_nesting()
        level = vmapmode_decrement_nesting()
        whole = [legacy_remove_batch_dim(x, level, 1, 0) if x is not None and _is_mapped(x) else x for x in bars]
        size = next(len(x) for x, bar in zip(whole, bars, strict=True) if x is not None and _is_mapped(bar))
        found = [
            backward(ctx, *(x[k] if _is_mapped(bar) else x for x, bar in zip(whole, bars, strict=True)))  # type: ignore[index]
            for k in range(size)
        ]
        return tuple(_as_mapped(xs, level) for xs in zip(*found, strict=True))

    return call


def _as_mapped(copies: tuple[Tensor | None, ...], level: int) -> Tensor | None:
    if all(x is None for x in copies):
        return None
    like = next(x for x in copies if x is not None)
    stacked = torch.stack([torch.zeros_like(like) if x is None else x for x in copies])
    return cast(Tensor, legacy_add_batch_dim(stacked, 0, level))


@contextmanager
def below_jvp() -> Iterator[tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]]:
    """For the body of a node's ``jvp``: run it one transform further out, and give the functions that carry
    tensors down (inside) and back up (after the context has ended).

    PyTorch runs this body with forward mode off, at the level of the ``torch.func.jvp`` that asked. An outer forward-mode transform
    would then see no tangents, and nested forward mode would silently lose terms.
    """
    top = peek_interpreter_stack()
    if top is None or top.key() != TransformType.Jvp:
        yield _same, _same
        return
    interpreter = retrieve_current_functorch_interpreter()
    level = interpreter.level()
    with interpreter.lower(), torch.enable_grad(), set_fwd_grad_enabled(True):
        yield lambda x: unwrap_for_grad(x, level), lambda x: wrap_for_grad(x, level)


def _same(x: Tensor) -> Tensor:
    return x


def unviewed(x: Tensor) -> Tensor:
    """An output of a node's ``forward`` without what it is a view of: PyTorch asks that tangents of views are laid out as these are, and
    fails an internal assertion where they are not."""
    return x.data if x._is_view() else x


# ---- leaves of pytrees: PyTorch's own walk takes as long as several operators, and a solve makes a dozen of them

_PLAIN = frozenset({Tensor, torch.nn.Parameter, float, int, bool, NoneType, str, torch.dtype, torch.device})


def leaves_of(tree: Any) -> list[Any]:
    """``tree_leaves(tree)``."""
    kind = type(tree)
    if kind in _PLAIN:
        return [tree]
    if kind is tuple or kind is list:
        return [leaf for part in tree for leaf in leaves_of(part)]
    return tree_leaves(tree) if kind is not dict or tree else []


def mapped(function: Callable[[Any], Any], tree: Any) -> Any:
    """``tree_map(function, tree)``."""
    kind = type(tree)
    if kind in _PLAIN:
        return function(tree)
    if kind is tuple or kind is list:
        return kind([mapped(function, part) for part in tree])
    if kind is dict:
        return {key: mapped(function, part) for key, part in tree.items()}
    return tree_map(function, tree)
