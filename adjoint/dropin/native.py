"""The ``odeint`` family on our own loops and gradient strategies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..doors.arguments import Times, as_times, from_within
from ..doors.event_slope import signed
from ..doors.event_times import event_records
from ..doors.failures import raise_failure
from ..doors.given import Given, reporting
from ..doors.parts import Interpolant, Parts, flat_event
from ..doors.solution import BackwardStats
from ..doors.stage_arguments import stage_algebra
from ..errors import InvalidInput, UnsupportedCombination, counted, positive
from ..integrate import Event, PIDController, Plan, shifted_times
from ..methods import METHODS
from ..sensitivity import DiscreteAdjoint, Gradient, Problem
from ..sensitivity.evaluation import Evaluation
from ..sensitivity.linearity import refuse_altered
from ..system.capture import Captured, is_differentiable, leads_to, listed, needs_derivatives, stand_ins
from ..system.ownership import copied
from ..system.realification import suited_to_jacobians
from ..system.system import System
from ..system.transforms import functorch_active, transforming, vmap_active
from ..torch_internals import is_functorch_wrapped_tensor
from .interpolants import check_interp, fixed_grid, fixed_method, hermite, on_lines, parabola, step_size_of
from .request import Request

__all__ = [
    "Prepared",
    "combined_event",
    "evaluated",
    "given_of",
    "jump_times",
    "prepare",
    "solve_dense",
    "solve_event",
    "solve_samples",
    "start_event",
]

#: options of the step control, and what they are where they are not given
_FACTORS = (("safety", 0.9), ("dfactor", 0.2), ("ifactor", 10.0))
#: an end that no solve reaches: until an event, there is none
_NEVER = 1e300


@dataclass(frozen=True)
class Prepared:
    """A right-hand side with the tensors it depends on."""

    system: System
    inputs: tuple[Tensor, ...]
    derivatives: bool


def given_of(request: Request, events: Sequence[Callable[..., Tensor]] = ()) -> Given:
    """The call as all doors have it; ``events``: functions of time and state."""
    time = request.t[0]
    if request.options.get("perturb"):
        time = shifted_times([time.detach().to(request.spec.real_dtype)], [0.0], True, False, request.sign)[0]
    return Given(request.fun, (request.func,), request.spec, (request.y0,), (), (time, request.t[-1]), events)


def prepare(request: Request, only: Sequence[Tensor] | None, event: Callable[..., Tensor] | None = None) -> Prepared:
    """Find what ``func`` (and the event function) captured.

    ``only``: the tensors to differentiate; others are held constant. None: all.
    """
    given = given_of(request, () if event is None else (event,))
    used = Captured([])
    if torch.is_grad_enabled() or transforming():
        used, _ = given.probed()
        found = {id(x) for x in used.tensors}
        used.tensors.extend([p for p in only or () if id(p) not in found and is_differentiable(p)])
    system = given.system(used)
    inputs = stand_ins(system.inputs)
    if only is not None:
        inputs = tuple(x if _kept(x, only) else x.detach() for x in inputs)
    return Prepared(system, inputs, needs_derivatives([request.t, *tree_leaves(request.y0), *inputs]))


def evaluated(ready: Prepared, gradient: Gradient) -> Callable[[Tensor, Tensor], Tensor]:
    """``f(t, y)`` for compositions of differentiable steps: with `DiscreteAdjoint` every evaluation keeps its arguments only."""
    if ready.derivatives and isinstance(gradient, DiscreteAdjoint) and not transforming():
        return lambda t, y: Evaluation.apply(ready.system, t, y, *ready.inputs)  # pyright: ignore[reportReturnType]
    return ready.system.bind(ready.inputs)


def _kept(x: Tensor, wanted: Sequence[Tensor]) -> bool:
    """Whether ``x`` is to be differentiated: it is one of the wanted tensors, or was computed from one."""
    if functorch_active() and is_functorch_wrapped_tensor(x):
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
            # the end of the last step is all that events ask for: see `solve_event`
            method=fixed_method(request.method, "event" if events else check_interp(request)),
            controller=PIDController(),
            first_step=step_size_of(request) if events else None,
            max_steps=20_000 if events else 2**62,
            shift="all" if options.get("perturb") else "none",
            **shared,
        )
    first = options.get("first_step")
    safety, low, high = (positive(options.get(name, usual), name) for name, usual in _FACTORS)
    return Plan(
        method=METHODS[request.method],
        controller=PIDController(safety=safety, min_factor=low, max_factor=high),
        first_step=None if first is None else positive(first, "first_step", finite=True),
        max_step=positive(options.get("max_step", float("inf")), "max_step"),
        min_step=positive(options.get("min_step", 0.0), "min_step", zero=True, finite=True),
        # torchdiffeq counts the steps of each output interval by themselves
        max_steps=_most_steps(options.get("max_num_steps", 2**31 - 1)) * request.n_intervals,
        accept_smallest=True,
        **shared,
    )


def _most_steps(value: Any) -> int:
    """``max_num_steps``, which may be a float without a fraction."""
    return counted(int(value) if isinstance(value, float) and value.is_integer() else value, "max_num_steps")


def jump_times(request: Request) -> list[Tensor]:
    """The options ``step_t`` and ``jump_t`` (an old name of it: ``grid_points``) of adaptive methods, 1-D float64."""
    out = []
    for name in ("step_t", "jump_t", "grid_points") if request.family == "adaptive" else ():
        value = request.options.get(name)
        if value is not None:
            out.append(as_times(value, name, request.spec.device).to(torch.float64).reshape(-1))
    if out:
        times = torch.cat(out)
        if times.unique().shape[0] != times.shape[0]:
            raise InvalidInput("`step_t` and `jump_t` must not have any repeated elements between them.")
    return out


def _ends(request: Request, end: Tensor) -> tuple[Tensor, Tensor]:
    """The first time and the ``end``, ``(1,)`` in double precision, moved into the span by rounding where ``func`` jumps there."""
    start, jumps = request.t[:1].to(torch.float64), jump_times(request)
    return from_within(start, end, torch.cat(jumps).unsqueeze(-1), request.spec.real_dtype)[:2] if jumps else (start, end)


def _anchors(request: Request, until_event: bool) -> Tensor:
    """``(A, 1)``: the grid of a fixed-step solve, or the start, the times where steps must end, and the end."""
    if request.family in ("fixed", "implicit") and not until_event:
        return fixed_grid(request).unsqueeze(-1)
    t, sign = request.t.to(torch.float64), request.sign
    end = torch.full_like(t[:1], sign * _NEVER) if until_event else t[-1:]
    if request.family in ("fixed", "implicit") and step_size_of(request) is None:
        raise InvalidInput("Event handling for fixed step solvers currently requires `step_size` to be provided in options.")
    start, end = _ends(request, end)
    inner = torch.cat([t.new_empty(0), *jump_times(request)])
    inner = inner[(sign * (inner - start) > 0) & (sign * (end - inner) > 0)]
    inner = inner.sort(descending=sign < 0).values
    return torch.cat([start, inner, end]).unsqueeze(-1)


def _realified(request: Request) -> Request:
    """Implicit methods carry complex states in a form that has Jacobians."""
    if request.family != "implicit" or not request.spec.holds_complex:
        return request
    first = request.t[0].detach().to(request.spec.real_dtype)
    return request.laid_out(suited_to_jacobians(request.spec, lambda y: request.fun(first, y), request.y0))


def _solve(
    request: Request,
    gradient: Gradient,
    ready: Prepared,
    anchors: Tensor,
    samples: Tensor | None,
    dense: bool = False,
    event: Callable[..., Tensor] | None = None,
) -> Parts:
    """The shared part: everything that can be asked of the computed solution. ``samples`` (T, 1), without the first time."""
    spec, system = request.spec, ready.system
    events = () if event is None else (flat_event(event, system, spec, False),)
    derivatives = ready.derivatives or needs_derivatives([anchors])
    plan = _plan(request, derivatives, dense, events)
    backward = BackwardStats()

    algebra = None
    if request.family == "implicit":
        algebra = stage_algebra(system, system.inputs, spec)
    report = reporting(plan, raise_failure, system, system.inputs)
    problem = Problem(system, plan, False, report, backward.add, algebra=algebra, derivatives=derivatives)
    y_flat = spec.taken(request.y0)
    refuse_altered(problem, gradient, anchors[0], y_flat, ready.inputs)
    out = gradient.solve(problem, anchors, samples, y_flat, ready.inputs)
    listed = [] if event is None else [event]
    return Parts(out, problem, Times(anchors, samples, None, False), spec, spec, None, y_flat, listed, (), backward, derivatives)


def solve_samples(request: Request, gradient: Gradient, only: Sequence[Tensor] | None = None) -> Any:
    """The states at ``request.t``, ``(T, *shape)`` each."""
    request = _realified(request)
    ready, anchors = prepare(request, only), _anchors(request, False)
    # the first time needs no sampling: the solution there is y0
    samples = request.t[1:].to(torch.float64)
    samples = torch.cat([samples[:-1], _ends(request, samples[-1:])[1]]).unsqueeze(-1)
    if request.family == "implicit" and check_interp(request) == "cubic":
        return _between(request, gradient, ready, anchors, samples)
    if request.family in ("fixed", "implicit"):
        samples = on_lines(request, samples[:, 0], anchors[:, 0]).unsqueeze(-1)
    parts = _solve(request, gradient, ready, anchors, samples)
    return parts.state(torch.cat([parts.y0.unsqueeze(0), parts.out.samples]))


def _between(request: Request, gradient: Gradient, ready: Prepared, anchors: Tensor, samples: Tensor) -> Any:
    """As `solve_samples`, by the cubics through the states at the grid points around each time, with the slopes of ``func`` there."""
    grid, times = anchors[:, 0], samples[:, 0]
    place = torch.searchsorted(request.sign * grid.detach(), request.sign * times.detach()).clamp(min=1)
    parts = _solve(request, gradient, ready, anchors, torch.cat([grid[place - 1], grid[place]]).unsqueeze(-1))
    before, after = parts.out.samples.chunk(2)
    cubic = _steps(request, evaluated(ready, gradient), hermite)
    # at a grid point nothing is between
    exact = listed(times.detach() == grid.detach()[place])
    out = [parts.y0]
    for k, (t, i) in enumerate(zip(times, listed(place), strict=True)):
        if exact[k] and not needs_derivatives([t]):
            out.append(after[k])
            continue
        start, h = grid[i - 1 : i], grid[i : i + 1] - grid[i - 1 : i]
        out.append(cubic(start, h, before[k], after[k])(t))
    return parts.state(torch.stack(out))


def solve_dense(request: Request, gradient: Gradient, only: Sequence[Tensor] | None = None) -> Callable[[Tensor], Any]:
    """The solution as a function of time."""
    if request.family == "implicit" and check_interp(request) == "cubic":
        raise UnsupportedCombination(
            f"odeint_dense with interp='cubic' and method={request.method!r} is not supported: leave interp out (linear), give an explicit "
            "method such as 'rk4', or use odeint with the times wanted"
        )
    request = _realified(request)
    return Interpolant.of(_solve(request, gradient, prepare(request, only), _anchors(request, False), None, dense=True))


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
    """Time of the first event, 0-d, and the states at the start and there, ``(2, *shape)`` each; differentiable, the time included.

    On a fixed grid the last step is a short one that ends at the event, just beyond which the cubic through its ends is taken (of
    methods of first order a parabola), whatever ``interp`` is: along a straight line the time would have derivatives that are off by the
    order of a step, and no second ones.
    """
    event, at_start = start_event(request)
    if at_start:
        y_flat = request.spec.flatten(request.y0)
        return request.t[0].clone(), request.spec.unflatten(torch.stack([y_flat, y_flat]))
    if request.family != "adaptive":
        check_interp(request)
    request = _realified(request)
    ready = prepare(request, only, event)
    parts = _solve(request, gradient, ready, _anchors(request, True), None, event=event)
    curve = parabola if parts.problem.plan.method.order == 1 else hermite
    between = _steps(request, evaluated(ready, gradient), curve) if request.family == "implicit" else None
    _, when, flat, _ = event_records(parts, parts.out, between)
    assert when is not None and flat is not None
    return when[0].to(request.t.dtype), parts.state(torch.stack([parts.y0, flat]))


def _steps(
    request: Request, f: Callable[[Tensor, Tensor], Tensor], curve: Callable[..., Tensor]
) -> Callable[..., Callable[[Tensor], Tensor]]:
    """For `event_records`: the ``curve`` through the ends of one trajectory's step, with the slopes of ``func`` there."""
    real, perturb = request.spec.real_dtype, bool(request.options.get("perturb"))

    def between(t0: Tensor, h: Tensor, y0: Tensor, y1: Tensor) -> Callable[[Tensor], Tensor]:
        start, size = t0[0], h[0]
        times = [start.to(real), (start + size).to(real)]
        times = shifted_times(times, [0.0, 1.0], perturb, perturb, request.sign) if perturb else times
        slopes = [size.to(real) * f(when, y) for when, y in zip(times, (y0, y1), strict=True)]
        return lambda t: curve(((t - t0) / h).to(real).unsqueeze(-1), y0, y1, *slopes)

    return between
