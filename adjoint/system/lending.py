"""What passes between a solve and a user's function: tensors that the solve lends come back unchanged, and those it is given are its own.

A solve keeps the slopes of its stages, states, residuals and Jacobians for a while. A function that writes its value into a tensor of its
own and returns that, call after call, would change them afterwards; one that changes its argument in place would change the state itself.
"""

from __future__ import annotations

from collections.abc import Callable
from sys import getrefcount
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..torch_internals import leaves_of, mapped, storage_use_count

__all__ = ["aliased", "changed", "check_unchanged", "copied", "lending", "own", "remembering"]

Flat = Callable[[Tensor, Tensor], Tensor]


def aliased(args: Any) -> Any:
    """A pytree with aliases in the place of its tensors: one that is both an argument and captured is then seen in both roles."""
    return mapped(lambda x: x.view_as(x) if isinstance(x, Tensor) else x, args)


def copied(state: Any) -> Any:
    """A pytree with tensors of its own in the place of its tensors."""
    # a copy of a tensor of inference mode counts as changed once, its alias does not
    copy = lambda x: x.clone().data if x.is_inference() else x.clone()  # noqa: E731
    return mapped(lambda x: copy(x) if isinstance(x, Tensor) else x, state)


def remembering(function: Callable[..., Any], found: list[Any]) -> Callable[..., Any]:
    """``function``, whose results are added to ``found``, without the graphs that made them."""

    def call(*args: Any) -> Any:
        out = function(*args)
        found.append(mapped(lambda x: x.detach() if isinstance(x, Tensor) else x, out))
        return out

    return call


def check_unchanged(lent: Any, what: str) -> None:
    """Raise `InvalidInput` where a function has changed what `copied` made for it."""
    if any(isinstance(x, Tensor) and not x.is_inference() and x._version for x in leaves_of(lent)):
        changed(what, "the state")


def _counts(make: Callable[[], Tensor]) -> tuple[int, int, int]:
    """References to a tensor, to its memory, and to what it is a view of, as `own` sees them."""
    x = make()
    references = getrefcount(x)
    base = x._base
    uses = 0 if storage_use_count is None else storage_use_count(x.untyped_storage()._cdata)
    return references, uses, 0 if base is None else getrefcount(base)


# those of a tensor that nobody else knows, counted here, because versions of Python and PyTorch differ in what they count along
_REFERENCES, _USES, _ = _counts(lambda: torch.empty(1))
_, _USES_OF_VIEW, _REFERENCES_OF_BASE = _counts(lambda: torch.empty(1).view(1))


def own(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)``, or a copy of it where somebody else may write into its memory later on: it is held elsewhere too, is a view of such
    a tensor, or lies in memory that is not PyTorch's.

    ``f`` is called here because references are counted: of a result that were handed in, the caller's frame would hold one or not, as
    Python happens to make the call. A graph that autograd records holds results too, and never writes into them: there only objects
    count.
    """
    x = f(*args)
    references = getrefcount(x)
    return _owned(x, references)


def _owned(x: Any, references: int) -> Any:
    """See `own`; ``references``: as counted in the frame that called for ``x``."""
    if storage_use_count is None:
        return x.clone() if isinstance(x, Tensor) else x
    if references > _REFERENCES or type(x) is not Tensor:
        return x.clone() if isinstance(x, Tensor) else x
    try:
        storage = x.untyped_storage()
    except NotImplementedError:
        # sparse tensors, and those that a transform of torch.func has wrapped
        return x
    if not storage.resizable():
        return x.clone()
    uses = storage_use_count(storage._cdata)
    if uses <= _USES:
        return x
    if x._is_view():
        base = x._base
        if getrefcount(base) > _REFERENCES_OF_BASE or not (uses <= _USES_OF_VIEW or x.requires_grad):
            return x.clone()
        return x
    return x if x.requires_grad else x.clone()


def lending(f: Flat, what: str = "fun") -> Flat:
    """A flat function of time and state that changes neither, and whose results are `own`.

    Raises `InvalidInput` where ``f`` changes its arguments in place; where that cannot be seen (inference mode) it gets copies. It stands
    around every evaluation of a solve: a microsecond here is 2 % of a small network.
    """

    def call(t: Tensor, y: Tensor) -> Tensor:
        try:
            state, time = y._version, t._version
        except RuntimeError:
            # tensors of inference mode have no versions
            return own(f, t.clone(), y.clone())
        # as `own` does, without its star
        x = f(t, y)
        references = getrefcount(x)
        if y._version != state or t._version != time:
            changed(what, "the state" if y._version != state else "time")
        return _owned(x, references)

    return call


def changed(what: str, name: str) -> NoReturn:
    """Raise the error of a function that changes its argument in place."""
    raise InvalidInput(
        f"{what} changes its argument ({name}) in place, and the solve goes on with that tensor: make a new one instead, as by "
        "y = y.clamp(min=0) for y.clamp_(min=0), or begin with y = y.clone()"
    )
