"""Function transforms in a traced function: its graph enters them one by one, and counts their levels from none around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

from ..torch_internals import (
    dual_level,
    enter_dual_level,
    exit_dual_level,
    get_dynamic_layer_stack_depth,
    get_inplace_requires_grad_allowed,
    is_fwd_grad_enabled,
    maybe_current_level,
    pop_dynamic_layer_stack_and_undo_to_depth,
    saved_tensors_hooks_enable,
    saved_tensors_hooks_is_enabled,
    set_inplace_requires_grad_allowed,
    switch_fwd_grad,
)

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
    depth, dual, forward = get_dynamic_layer_stack_depth(), dual_level() >= 0, is_fwd_grad_enabled()
    hooks, in_place = saved_tensors_hooks_is_enabled(), get_inplace_requires_grad_allowed()
    before, _here.below = _here.below, maybe_current_level() or 0
    try:
        yield
    except BaseException:
        if not dual:
            _leave_dual_level()
        pop_dynamic_layer_stack_and_undo_to_depth(depth)
        switch_fwd_grad(forward)
        set_inplace_requires_grad_allowed(in_place)
        if hooks and not saved_tensors_hooks_is_enabled():
            saved_tensors_hooks_enable()
        raise
    finally:
        _here.below = before


def _leave_dual_level() -> None:
    """Graphs enter the level of forward mode beneath Python, which does not know of it: one that cannot be entered is open."""
    try:
        level = enter_dual_level()
    except RuntimeError:
        level = 0
    exit_dual_level(level=level)
