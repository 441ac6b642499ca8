"""torchdiffeq's functions with torchdiffeq's default gradient: ``import adjoint.torchdiffeq as torchdiffeq`` is the whole migration.

.. warning::
    Here `odeint_adjoint` integrates the state BACKWARDS in time for its gradient (the continuous adjoint), as torchdiffeq does. That
    gradient carries the error of a second solve and has no second derivatives. On stiff and contracting problems it is wrong: adaptive
    methods raise `BacksolveDiverged` where the state does not come back to its start, methods of fixed steps say nothing.
    ``from adjoint import odeint_adjoint`` is the same function with the exact gradient of the computed solution as its default: prefer
    it unless results must be those of torchdiffeq, or memory must not grow with the number of steps.

`odeint`, `odeint_dense` and `odeint_event` are those of ``adjoint``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from .dropin.odeint import moves_event, odeint, odeint_dense, odeint_event, solve_with_adjoint
from .system.ownership import full_precision

__all__ = ["odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]


@full_precision
def odeint_adjoint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """`odeint` with the continuous adjoint, always: the state is integrated backwards in time again. NOT exact; see the module.

    Arguments and shapes are those of `adjoint.odeint_adjoint`, for the exact gradient use that one. Method, tolerances and options of
    the way back are by default those of the forward solve (``options["norm"]`` excepted). They are visible, and may be changed before
    the way back, as ``adjoint_options`` of the result's ``grad_fn`` (of the node before its slice and view, for a tuple state).

    Raises
    ------
    As `adjoint.odeint`. Second derivatives and ``torch.func`` transforms raise UnsupportedCombination.
    """
    return solve_with_adjoint(
        True,
        func,
        y0,
        t,
        rtol,
        atol,
        method,
        options,
        event_fn,
        adjoint_rtol,
        adjoint_atol,
        adjoint_method,
        adjoint_options,
        adjoint_params,
    )


moves_event(odeint_adjoint)
