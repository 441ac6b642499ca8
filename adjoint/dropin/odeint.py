"""``odeint``, ``odeint_adjoint``, ``odeint_dense`` and ``odeint_event``: torchdiffeq's functions, to which a change of the import migrates.

What is different on purpose:

- Gradients reach everything that ``func`` depends on (tensors captured by a closure included), and are exact for the computed solution.
- `odeint_adjoint` without any ``adjoint_rtol``, ``adjoint_atol``, ``adjoint_method`` or ``adjoint_options`` takes the discrete adjoint:
  one stored state per step, exact gradients. Giving one of these asks for torchdiffeq's continuous adjoint, which solves the state
  backwards again, is wrong on stiff and contracting problems (`BacksolveDiverged`, but no sign of it with fixed steps), and has no second
  derivatives.
  ``adjoint.torchdiffeq`` has the same functions with the continuous adjoint as the default.
- `odeint`, too, keeps one state per step where what its evaluations would keep is more than 512 MiB, and evaluates ``func`` again on the
  way back.
- Event times are differentiable also in `odeint` itself, and in parameters of the event function.
- Under autocast a solve keeps the precision of its state (half precision becomes single), and autocast is off in ``func``, which may
  switch it on for itself.
- The adaptive solvers land on the last time, and a solve that cannot go on raises a named error that says where and why.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InvalidInput, UnsupportedCombination
from ..sensitivity import DiscreteAdjoint, strategies
from ..system.capture import is_differentiable
from ..system.ownership import full_precision
from .continuous import adjoint_parameters, continuous_adjoint
from .event_gradient import through_event
from .multistep import adams_event, adams_samples
from .native import combined_event, jump_times, solve_dense, solve_event, solve_samples
from .request import Request, make_request
from .scipy_solver import scipy_samples

__all__ = ["moves_event", "odeint", "odeint_adjoint", "odeint_dense", "odeint_event"]

#: `odeint` may record so many times what other solves may (512 MiB): torchdiffeq's records all that it evaluates, whatever it takes
_TIMES_AS_MUCH = 16
_LEAN = DiscreteAdjoint()

_moving: list[Callable[..., Any]] = []


def moves_event(interface: Callable[..., Any]) -> None:
    """Tell `odeint_event` that the event times of this function come with their derivatives."""
    _moving.append(interface)



@full_precision
def odeint(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Callable[..., Tensor] | None = None,
) -> Any:
    """Solve ``y' = func(t, y)``, ``y(t[0]) = y0``.

    Parameters
    ----------
    func : callable
        ``func(t, y) -> dy/dt``. Attributes ``callback_step``, ``callback_accept_step`` and ``callback_reject_step`` are called with
        ``(t0, y0, dt)`` before and after every step.
    y0 : Tensor, or tuple of tensors
        Any shape, float or complex.
    t : Tensor
        ``(T,)``, strictly increasing or decreasing; may require grad.
    rtol, atol : number, tensor, or for a tuple state one for each element
    method : str
        Adaptive: "dopri5" (default), "tsit5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun". On a fixed grid: "euler", "midpoint",
        "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams" (also called "fixed_adams"), and, implicit, "implicit_euler",
        "implicit_midpoint", "trapezoid", "radauIIA3", "radauIIA5", "gl4", "gl6", "sdirk2", "trbdf2". And "scipy_solver", without gradient.
    options : dict
        Adaptive: ``first_step, min_step, max_step, step_t, jump_t, norm, safety, ifactor, dfactor, max_num_steps``; ``dtype`` is
        ignored, since times are always float64. Fixed grid: ``step_size`` or ``grid_constructor(func, y0, t)`` (default: ``t`` itself),
        ``interp`` ("linear" or "cubic"), ``perturb``. Adams: also ``max_order`` (up to 12; default 4 for "explicit_adams" and 8 for
        "implicit_adams", above which rounding errors and instability grow fast), ``max_iters``. SciPy: ``solver, min_step, max_step``.
        Others warn.
    event_fn : callable
        ``event_fn(t, y) -> Tensor``: the solve ends where its first entry changes sign; ``t`` has two entries, of which the second only
        gives the direction.

    Returns
    -------
    Tensor or tuple of tensors
        ``(T, *y0.shape)``. With ``event_fn``: the event time, 0-d, and the states at the start and at the event, ``(2, *y0.shape)``.

    Raises
    ------
    InvalidInput (a ValueError and an AssertionError), UnsupportedCombination, and the errors of a failed solve, which are
    AssertionErrors: StepSizeTooSmall ("underflow in dt"), NonFiniteState, MaxStepsReached
    """
    request = make_request(func, y0, t, rtol, atol, method, options, event_fn)
    return _solve(request, None, DiscreteAdjoint(keep_bytes=_TIMES_AS_MUCH * strategies.KEEP_BYTES))


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
    """`odeint` whose gradient needs memory for the states only, whatever ``func`` allocates.

    Parameters
    ----------
    func, y0, t, rtol, atol, method, options, event_fn
        As in `odeint`. ``func`` may also have the attributes ``callback_step_adjoint`` and so on, for the steps of the way back.
    adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options
        Any of these asks for the continuous adjoint, solved with this method, tolerances and options (each by default that of the
        forward solve); ``adjoint_options["norm"]`` may be "seminorm", or a function of the tuple ``(t, y, adj_y, *adj_params)``.
        Without them the gradient is the exact one of the discrete adjoint. ``method="scipy_solver"`` has no other than the continuous
        one.
    adjoint_params : iterable of tensors
        What to differentiate beside ``y0`` and ``t``; each gets a gradient, zero if need be. Default: all parameters of ``func``, and
        all it captured.

    Returns
    -------
    As `odeint`.

    Raises
    ------
    As `odeint`. Second derivatives of the continuous adjoint raise UnsupportedCombination.
    """
    return solve_with_adjoint(
        False,
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


@full_precision
def odeint_dense(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    t1: Any,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[[Tensor], Any]:
    """The solution between ``t0`` and ``t1`` as a function of time, differentiable in everything, time included.

    The function takes ``t`` of shape ``()`` or ``(T,)`` within the span, and gives ``(*t.shape, *y0.shape)``. Methods and options: as
    in `odeint`, the Adams methods and "scipy_solver" excluded.
    """
    leaf = tree_leaves(y0)[0]
    ends = [torch.as_tensor(x, dtype=None if isinstance(x, Tensor) else torch.float64, device=leaf.device) for x in (t0, t1)]
    request = make_request(func, y0, torch.stack([x.reshape(()) for x in ends]), rtol, atol, method, options, None)
    if request.family not in ("adaptive", "fixed", "implicit"):
        raise UnsupportedCombination(f"odeint_dense cannot use method={request.method!r}: choose an adaptive method such as 'dopri5'")
    return solve_dense(request, DiscreteAdjoint())


@full_precision
def odeint_event(
    func: Callable[..., Any],
    y0: Any,
    t0: Any,
    *,
    event_fn: Callable[..., Tensor],
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve from ``t0`` until ``event_fn(t, y)`` changes sign; its time and the states are differentiable.

    Parameters
    ----------
    t0 : 0-d tensor (or number), the initial time; may require grad
    reverse_time : bool
        Solve towards smaller times.
    odeint_interface : callable
        `odeint`, `odeint_adjoint`, or any function of the same signature; one that holds the event time fixed in its derivative is
        completed.
    kwargs : arguments of ``odeint_interface``

    Returns
    -------
    The event time, 0-d, and the states at ``t0`` and at the event, ``(2, *y0.shape)`` each.
    """
    leaf = tree_leaves(y0)[0]
    real = leaf.dtype.to_real()
    start = (t0 if isinstance(t0, Tensor) else torch.as_tensor(t0, dtype=real, device=leaf.device)).reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    when, states = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    interface = odeint_interface
    while isinstance(interface, functools.partial):
        interface = interface.func
    if interface in _moving:
        return when, states
    first = start[0].detach().to(real)
    event, at_start = combined_event(event_fn, first, y0)
    if at_start or not torch.is_grad_enabled():
        return when, states
    request = make_request(func, y0, t, 0.0, 0.0, None, None, None)
    last = tree_map(lambda x: x[-1], states)
    when, moved = through_event(request.fun, event, when, last, real)
    return when, tree_map(lambda x, end: torch.cat([x[:-1], end.unsqueeze(0)]), states, moved)


def solve_with_adjoint(
    continuous: bool,
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
    adjoint_rtol: Any,
    adjoint_atol: Any,
    adjoint_method: str | None,
    adjoint_options: dict[str, Any] | None,
    adjoint_params: Iterable[Tensor] | None,
) -> Any:
    """`odeint_adjoint`; ``continuous``: the continuous adjoint also where no argument asks for it."""
    params = None if adjoint_params is None else list(adjoint_params)
    request = make_request(func, y0, t, rtol, atol, method, options, event_fn)
    if adjoint_method is not None and adjoint_method != request.method and options is not None and adjoint_options is None:
        raise InvalidInput(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as `options` has been passed then "
            "`adjoint_options` must be passed as well."
        )
    own_solver = any(x is not None for x in (adjoint_rtol, adjoint_atol, adjoint_method, adjoint_options))
    if not (continuous or own_solver or request.family == "scipy"):
        return _with_zeros(_solve(request, params), params if params is not None else _parameters(func))

    if torch.is_grad_enabled() and any(map(is_differentiable, jump_times(request))):
        raise UnsupportedCombination(
            "the continuous adjoint has no derivative in the times of `step_t` and `jump_t`, which require grad: take "
            "adjoint.odeint_adjoint without adjoint_ arguments, which has, or give them detached"
        )
    wanted = params if params is not None else adjoint_parameters(request)
    listed = [p for p in wanted if is_differentiable(p)]
    if adjoint_options is None:
        adjoint_options = {k: v for k, v in request.options.items() if k != "norm"}
    if len(listed) != len(wanted) and callable(adjoint_options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the adjoint pass, and "
            "will not appear as a tensor in the adjoint norm.",
            stacklevel=4,
        )
    return continuous_adjoint(
        request,
        lambda state, times, fun: _solve(replace(request, y0=state, t=times, fun=fun), None),
        odeint,
        listed,
        rtol if adjoint_rtol is None else adjoint_rtol,
        atol if adjoint_atol is None else adjoint_atol,
        request.method if adjoint_method is None else adjoint_method,
        adjoint_options,
    )


def _solve(request: Request, only: Sequence[Tensor] | None, gradient: DiscreteAdjoint = _LEAN) -> Any:
    """The native solve of a request, differentiated by the discrete adjoint with respect to ``only`` (None: everything)."""
    if request.t.shape[0] == 1:
        return tree_map(lambda x: x.unsqueeze(0), request.y0)
    if request.family == "scipy":
        return scipy_samples(request)
    if request.family == "adams":
        # as in all other solves, lower precision of the surroundings is not imposed on this one
        with torch.autocast(request.spec.device.type, enabled=False):
            return (adams_samples if request.event_fn is None else adams_event)(request, gradient, only)
    return (solve_samples if request.event_fn is None else solve_event)(request, gradient, only)


def _parameters(func: Any) -> list[Tensor]:
    return list(func.parameters()) if isinstance(func, torch.nn.Module) else []


def _with_zeros(result: Any, params: Sequence[Tensor]) -> Any:
    """The result, with the derivative zero, not none, in parameters that took no part: DDP and users of torchdiffeq count on it."""
    wanted = [p for p in params if is_differentiable(p)]
    if not wanted or not torch.is_grad_enabled():
        return result
    device = tree_leaves(result)[0].device
    total = torch.stack([(p.real if p.is_complex() else p).sum().to(device, torch.float64) for p in wanted]).sum()

    def tie(x: Tensor) -> Tensor:
        never = torch.zeros((), dtype=torch.bool, device=x.device)
        return torch.where(never, total.to(x.dtype), x)

    return tree_map(tie, result)


moves_event(odeint)
moves_event(odeint_adjoint)
