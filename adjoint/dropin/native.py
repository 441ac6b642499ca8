"""The ``odeint`` family on our own loops and gradient strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from ..arguments import Times, positive
from ..capture import (
    Captured,
    elsewhere,
    find_captured,
    functorch_active,
    is_differentiable,
    leads_to,
    needs_derivatives,
    parameter_homes,
    vmap_active,
)
from ..errors import InvalidInput
from ..event_slope import signed
from ..event_times import event_records
from ..failures import raise_failure
from ..integrate import Event, PIDController, Plan, Record, shifted_times
from ..ivp import _flat_event, _interpolant, _Parts
from ..ivp import _transforming as transforming
from ..lending import copied
from ..methods import METHODS
from ..realification import suited_to_jacobians
from ..sensitivity import Gradient, Problem
from ..solution import BackwardStats
from ..stage_arguments import stage_algebra
from ..system import System
from .interpolants import check_interp, fixed_grid, fixed_method, step_size_of
from .request import Request

__all__ = ["Prepared", "combined_event", "prepare", "solve_dense", "solve_event", "solve_samples", "start_event", "transforming"]

#: an end that no solve reaches: until an event, there is none
_NEVER = 1e300


@dataclass(frozen=True)
class Prepared:
    """A right-hand side with the tensors it depends on."""

    system: System
    inputs: tuple[Tensor, ...]
    derivatives: bool


def prepare(request: Request, only: Sequence[Tensor] | None, event: Callable[..., Tensor] | None = None) -> Prepared:
    """Find what ``func`` (and the event function) captured.

    ``only``: the tensors to differentiate; others are held constant. None: all.
    """
    spec, y0 = request.spec, copied(request.y0)
    _, tree = tree_flatten(())
    used = Captured([])
    if torch.is_grad_enabled() or transforming():
        time = request.t[0].detach().to(spec.real_dtype)
        if request.options.get("perturb"):
            time = shifted_times([time], [0.0], True, False, request.sign)[0]
        last = request.t[-1].detach().to(spec.real_dtype, copy=True)
        calls: list[Callable[..., Any]] = [request.fun]
        owners = [request.func]
        if event is not None:
            calls.append(event)
            owners.append(event)
        known = [time, *tree_leaves(y0)]
        used = find_captured(calls, (time, y0), owners, (last, elsewhere(y0)))
        found = {id(x) for x in (*used.tensors, *known)}
        used.tensors.extend([p for p in only or () if id(p) not in found and is_differentiable(p)])
    homes = tuple(parameter_homes([request.fun], used.tensors))
    system = System(request.fun, spec, tree, (), tuple(used.tensors), homes=homes, **used.flags)
    inputs = system.inputs
    if only is not None:
        inputs = tuple(x if _kept(x, only) else x.detach() for x in inputs)
    return Prepared(system, inputs, needs_derivatives([request.t, *tree_leaves(y0), *inputs]))


def _kept(x: Tensor, wanted: Sequence[Tensor]) -> bool:
    """Whether ``x`` is to be differentiated: it is one of the wanted tensors, or was computed from one."""
    if functorch_active() and torch._C._functorch.is_functorch_wrapped_tensor(x):
        # what a transform wraps does not tell where it comes from: too many derivatives are better than one too few
        return True
    return leads_to(x, wanted)


def _plan(request: Request, derivatives: bool, dense: bool, events: tuple[Event, ...]) -> Plan:
    options = request.options
    shared: dict[str, Any] = {
        "real": request.spec.real_dtype,
        "rtol": request.rtol,
        "atol": request.atol,
        "norm": request.norm,
        "keep_states": derivatives or dense or bool(events),
        # the slopes of implicit stages are recorded: derivatives are taken at them
        "keep_stages": dense
        or (request.family == "implicit" and derivatives)
        or (bool(events) and (request.family == "implicit" or vmap_active())),
        "events": events,
        "monitor": request.monitor(),
    }
    if request.family in ("fixed", "implicit"):
        return Plan(
            method=fixed_method(request.method, check_interp(request)),
            controller=PIDController(),
            first_step=step_size_of(request) if events else None,
            max_steps=20_000 if events else 2**62,
            shift="all" if options.get("perturb") else "none",
            **shared,
        )
    first = options.get("first_step")
    low, high = float(options.get("dfactor", 0.2)), float(options.get("ifactor", 10.0))
    return Plan(
        method=METHODS[request.method],
        controller=PIDController(safety=float(options.get("safety", 0.9)), min_factor=low, max_factor=high),
        first_step=None if first is None else positive(first, "first_step"),
        max_step=positive(options.get("max_step", float("inf")), "max_step"),
        min_step=positive(options.get("min_step", 0.0), "min_step", zero=True),
        # torchdiffeq counts the steps of each output interval by themselves
        max_steps=int(options.get("max_num_steps", 2**31 - 1)) * request.n_intervals,
        accept_smallest=True,
        **shared,
    )


def _step_times(request: Request) -> list[Tensor]:
    """The options ``step_t`` and ``jump_t`` (an old name of it: ``grid_points``), 1-D float64."""
    out = []
    for name in ("step_t", "jump_t", "grid_points"):
        value = request.options.get(name)
        if value is not None:
            out.append(torch.as_tensor(value, device=request.spec.device).to(torch.float64).reshape(-1))
    if out:
        times = torch.cat(out)
        if times.unique().shape[0] != times.shape[0]:
            raise InvalidInput("`step_t` and `jump_t` must not have any repeated elements between them.")
    return out


def _anchors(request: Request, until_event: bool) -> Tensor:
    """``(A, 1)``: the grid of a fixed-step solve, or the start, the times where steps must end, and the end."""
    if request.family in ("fixed", "implicit") and not until_event:
        return fixed_grid(request).unsqueeze(-1)
    t, sign = request.t.to(torch.float64), request.sign
    end = torch.full_like(t[:1], sign * _NEVER) if until_event else t[-1:]
    if request.family == "fixed" and step_size_of(request) is None:
        raise InvalidInput("Event handling for fixed step solvers currently requires `step_size` to be provided in options.")
    inner = torch.cat([t.new_empty(0), *(_step_times(request) if request.family == "adaptive" else [])])
    inner = inner[(sign * (inner - t[0]) > 0) & (sign * (end - inner) > 0)]
    inner = inner.sort(descending=sign < 0).values
    return torch.cat([t[:1], inner, end]).unsqueeze(-1)


def _solve(request: Request, gradient: Gradient, only: Sequence[Tensor] | None, dense: bool, event: Callable[..., Tensor] | None) -> _Parts:
    """The shared part: everything that can be asked of the computed solution."""
    if request.family == "implicit" and request.spec.holds_complex:
        first = request.t[0].detach().to(request.spec.real_dtype)
        request = replace(request, spec=suited_to_jacobians(request.spec, lambda y: request.fun(first, y), request.y0))
    ready = prepare(request, only, event)
    spec, system = request.spec, ready.system
    anchors = _anchors(request, event is not None)
    # the first time needs no sampling: the solution there is y0
    samples = None if event is not None or dense else request.t[1:].to(torch.float64).unsqueeze(-1)
    events = () if event is None else (_flat_event(event, system, spec, False),)
    derivatives = ready.derivatives or needs_derivatives([anchors])
    plan = _plan(request, derivatives, dense, events)
    backward = BackwardStats()

    def report(record: Record) -> None:
        raise_failure(record, plan, system, system.inputs)

    def backward_report(n_fun: int, n_steps: int) -> None:
        backward.n_fun += n_fun
        backward.n_steps += n_steps

    algebra = None
    if request.family == "implicit":
        algebra = stage_algebra(system, system.inputs, spec, jac=None, jac_sparsity=None, linear_solver=None)
    problem = Problem(system, plan, False, report, backward_report, algebra=algebra)
    y_flat = spec.taken(request.y0)
    out = gradient.solve(problem, anchors, samples, y_flat, ready.inputs)
    listed = [] if event is None else [event]
    return _Parts(out, problem, Times(anchors, samples, None, False), spec, spec, None, y_flat, listed, (), backward, derivatives)


def solve_samples(request: Request, gradient: Gradient, only: Sequence[Tensor] | None = None) -> Any:
    """The states at ``request.t``, ``(T, *shape)`` each."""
    parts = _solve(request, gradient, only, False, None)
    return parts.state(torch.cat([parts.y0.unsqueeze(0), parts.out.samples]))


def solve_dense(request: Request, gradient: Gradient, only: Sequence[Tensor] | None = None) -> Callable[[Tensor], Any]:
    """The solution as a function of time."""
    return _interpolant(_solve(request, gradient, only, True, None))


def combined_event(event_fn: Callable[..., Tensor], t0: Tensor, y0: Any) -> tuple[Callable[..., Tensor], bool]:
    """One function for several events: positive at the start, zero where the first of them is; and whether it begins at zero."""
    with torch.no_grad():
        signs = torch.sign(signed(event_fn(t0, copied(y0))))

    def smallest(t: Tensor, y: Any) -> Tensor:
        return torch.min(signed(event_fn(t, y)) * signs)

    smallest.terminal = True  # type: ignore[attr-defined]
    at_start = not functorch_active() and bool((signs == 0).any())
    return smallest, at_start


def start_event(request: Request) -> tuple[Callable[..., Tensor], bool]:
    """The event function of a request; see `combined_event`."""
    assert request.event_fn is not None
    return combined_event(request.event_fn, request.t[0].detach().to(request.spec.real_dtype), request.y0)


def solve_event(request: Request, gradient: Gradient, only: Sequence[Tensor] | None = None) -> tuple[Tensor, Any]:
    """Time of the first event, 0-d, and the states at the start and there, ``(2, *shape)`` each; differentiable, the time included."""
    event, at_start = start_event(request)
    y_flat = request.spec.flatten(request.y0)
    if at_start:
        return request.t[0].clone(), request.spec.unflatten(torch.stack([y_flat, y_flat]))
    parts = _solve(request, gradient, only, False, event)
    _, when, flat, _ = event_records(parts, parts.out)
    assert when is not None and flat is not None
    return when[0].to(request.t.dtype), parts.state(torch.stack([y_flat, flat]))
