"""What PyTorch keeps private and this package cannot do without: all of it, by the names under which the rest asks for it.

Nothing else in the package names anything of PyTorch's that begins with an underscore (`torch.utils._pytree` apart, the only name of
pytrees). A new version of PyTorch that has moved one of these has to be answered here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter, temporarily_clear_interpreter_stack
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "DisableFuncTorch",
    "OpOverload",
    "TorchDispatchMode",
    "TransformType",
    "add_batch_dim",
    "core_decompositions",
    "current_function_modes",
    "decomposition_table",
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
    "is_written_down",
    "legacy_add_batch_dim",
    "legacy_remove_batch_dim",
    "len_torch_dispatch_stack",
    "len_torch_function_stack",
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
    "temporarily_clear_interpreter_stack",
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


def is_written_down() -> bool:
    """Whether a tracer of graphs sees every operator."""
    return _C._get_dispatch_mode(_C._TorchDispatchModeKey.PROXY) is not None


# -- autograd, memory, compilers

get_sequence_nr: Callable[[], int] = cast(Any, torch.autograd)._get_sequence_nr
saved_tensors_hooks_is_enabled: Callable[[], bool] = _C._autograd._saved_tensors_hooks_is_enabled
saved_tensors_hooks_enable: Callable[[], None] = _C._autograd._saved_tensors_hooks_enable
#: reads ``x.data`` in graphs; "" where PyTorch has none
get_data_attr: Any = getattr(_C._autograd, "_get_data_attr", "")
#: how many tensors lie in a storage; None where PyTorch does not tell
storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)
foreach_add_: Callable[[Any, Any], None] = cast(Any, torch)._foreach_add_
is_functional_tensor: Callable[[Tensor], bool] = cast(Any, torch)._is_functional_tensor
from_functional_tensor: Callable[[Tensor], Tensor] = cast(Any, torch)._from_functional_tensor
sync: Callable[[Tensor], None] = cast(Any, torch)._sync


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
