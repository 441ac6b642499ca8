"""Function transforms in a traced function: its graph enters them one by one, and counts their levels from none around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.fx import GraphModule

__all__ = ["above", "relative"]

#: operators that name the level of a transform, and which of their arguments that is
_LEVELS = {"_wrap_for_grad": 1, "_unwrap_for_grad": 1, "_add_batch_dim": 2, "_remove_batch_dim": 1}


class _Here(threading.local):
    #: the level around the graph that runs
    below = 0


_here = _Here()


def relative(module: GraphModule) -> None:
    """Let levels in a graph count from those around it, as `above` finds them."""
    for node in module.graph.nodes:
        place = _LEVELS.get(getattr(node.target, "__name__", ""))
        if place is not None and node.op == "call_function":
            node.target = _counted(node.target, place)


def _counted(operator: Callable[..., Any], place: int) -> Callable[..., Any]:
    def counted(*arguments: Any, **named: Any) -> Any:
        moved = [x + _here.below if i == place else x for i, x in enumerate(arguments)]
        return operator(*moved, **named)

    return counted


@contextmanager
def above() -> Iterator[None]:
    """Where the graph is run: on an error the transforms that it entered are left again, and what they switch is as it was."""
    functorch, autograd = torch._C._functorch, torch._C._autograd
    depth, dual, forward = functorch.get_dynamic_layer_stack_depth(), forward_ad._current_level >= 0, torch._C._is_fwd_grad_enabled()
    hooks, in_place = autograd._saved_tensors_hooks_is_enabled(), functorch.get_inplace_requires_grad_allowed()
    before, _here.below = _here.below, functorch.maybe_current_level() or 0
    try:
        yield
    except BaseException:
        if not dual:
            _leave_dual_level()
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        torch._C._set_fwd_grad_enabled(forward)
        functorch.set_inplace_requires_grad_allowed(in_place)
        if hooks and not autograd._saved_tensors_hooks_is_enabled():
            autograd._saved_tensors_hooks_enable()
        raise
    finally:
        _here.below = before


def _leave_dual_level() -> None:
    """Graphs enter the level of forward mode beneath Python, which does not know of it: one that cannot be entered is open."""
    try:
        level = torch._C._enter_dual_level()
    except RuntimeError:
        level = 0
    torch._C._exit_dual_level(level=level)
