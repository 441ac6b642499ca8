"""What a solution is put together from, and how: the part that doors of initial value problems share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput
from ..integrate import Event
from ..sensitivity import DiscreteAdjoint, Gradient, Outputs, Problem
from ..sensitivity.problem import StepTimes, interpolate, step_times
from ..system.capture import readable
from ..system.origins import attribute
from ..system.ownership import WithTensors, lending
from ..system.system import StateSpec, System
from ..system.transforms import vmap_active
from ..torch_internals import is_functorch_wrapped_tensor
from .arguments import Times, snapped
from .event_slope import signed
from .rows import wholly_lost
from .solution import BackwardStats, EventLog, EventRecord, Solution, Stats

__all__ = [
    "NO_EVENTS",
    "Found",
    "Interpolant",
    "Parts",
    "event_list",
    "event_name",
    "flat_event",
    "seen_at_ends",
    "solution_of",
    "strategy_of",
    "terminal_count",
    "with_rules_of",
]


class Found(NamedTuple):
    """One record for each event function; ends ``(B,)``, flat states and slopes ``(B, n)`` there, if a terminal event stopped anything.

    Trajectories that no event stopped have the end of the span and their final state there; their slopes mean nothing.
    """

    records: tuple[EventRecord, ...]
    t: Tensor | None
    y: Tensor | None
    slope: Tensor | None


NO_EVENTS = Found((), None, None, None)


def strategy_of(gradient: Gradient | None) -> Gradient:
    """The strategy that was given, or the default one."""
    if gradient is None:
        return DiscreteAdjoint()
    if isinstance(gradient, type) or not isinstance(gradient, Gradient):
        raise InvalidInput(f"gradient must be a strategy object such as adjoint.DiscreteAdjoint(), got {gradient!r}")
    return gradient


@dataclass(frozen=True)
class Parts:
    """Everything that the solution is put together from."""

    out: Outputs
    problem: Problem
    times: Times
    user_spec: StateSpec
    spec: StateSpec
    integrand: StateSpec | None
    y0: Tensor
    events: list[Callable[..., Tensor]]
    args: tuple[Any, ...]
    backward: BackwardStats
    derivatives: bool
    dense_output: bool = False

    def state(self, flat: Tensor) -> Any:
        """``(*lead, B, n)`` as the user's state."""
        tree = self.spec.unflatten(flat)
        return tree if self.integrand is None else tree[0]

    def shown(self, flat: Tensor) -> Any:
        """The same as users see it: what is lost is NaN in both parts of complex numbers."""
        state = self.state(flat)
        return tree_map(wholly_lost, state) if self.spec.holds_complex else state


def solution_of(parts: Parts, found: Found) -> Solution:
    out, times, batched = parts.out, parts.times, parts.problem.batched
    records, stop_t, stop_y, _ = found
    final = out.final if stop_y is None else stop_y
    shown = times.shown
    if times.steps:
        shown, flat = _steps(parts, stop_t, stop_y)
    elif times.samples is None:
        flat = torch.stack([parts.y0, final])
        if stop_t is not None:
            assert shown is not None
            shown = torch.stack([shown[0].expand_as(stop_t), stop_t.to(shown.dtype)])
            shown = shown if batched else shown[:, 0]
    else:
        flat = out.samples
    assert shown is not None
    quadrature = None if parts.integrand is None else tree_map(wholly_lost, parts.spec.unflatten(final)[1])
    # the way back needs its own, whatever the user does to this one
    status: int | Tensor = out.status.clone()
    counts = [out.n_steps, out.n_accepted, out.n_rejected, out.n_fun, out.n_jac, out.n_factorizations, out.n_solves, out.n_newton]
    if not batched and not is_functorch_wrapped_tensor(out.status):
        status = int(out.status)
        counts = [int(c) for c in counts]  # type: ignore[misc]
    elif not batched:
        status = out.status.squeeze(0)
        counts = [c.squeeze(0) for c in counts]
    return Solution(
        t=shown,
        y=parts.shown(flat),
        status=status,
        stats=Stats(*counts, backward=parts.backward, compile_seconds=parts.problem.native.seconds),
        events=EventLog.of(records, map(event_name, parts.events)),
        quadrature=quadrature,
        interpolant=Interpolant.of(parts) if parts.dense_output else None,
    )


def _steps(parts: Parts, stop_t: Tensor | None, stop_y: Tensor | None) -> tuple[Tensor, Tensor]:
    """Times and states of the solver's own steps."""
    out, anchors = parts.out, parts.times.anchors
    grid = step_times(out.t, out.h, out.segment, out.lands, anchors)
    end = anchors[-1] if stop_t is None else stop_t
    t = torch.cat([grid.t, out.t_final.unsqueeze(0) + (end - end.detach())])
    states = out.states
    place = torch.arange(t.shape[0], device=t.device).unsqueeze(-1)
    if stop_y is not None:
        states = torch.where((place == out.n_accepted).unsqueeze(-1), stop_y, states)
    real = parts.spec.real_dtype
    if not parts.problem.batched and not vmap_active():
        # the way back, and the dense output, need their own
        return parts.times.shown_as(t)[:, 0].to(real), states.clone() if states is out.states else states
    beyond = place > out.n_accepted
    t = parts.times.shown_as(torch.where(place == out.n_accepted, out.t_final + (end - end.detach()), t))
    t, states = torch.where(beyond, float("nan"), t).to(real), torch.where(beyond.unsqueeze(-1), float("nan"), states)
    return t if parts.problem.batched else t[:, 0], states


@dataclass(frozen=True)
class Interpolant(WithTensors):
    """The dense output, ``at(t, side)``: without resets there are no two sides."""

    parts: Parts
    grid: StepTimes

    @classmethod
    def of(cls, parts: Parts) -> Interpolant:
        """That of a solve."""
        out = parts.out
        return cls(parts, step_times(out.t, out.h, out.segment, out.lands, parts.times.anchors))

    def with_tensors(self, function: Callable[[Any], Any]) -> Interpolant:
        """The same with ``function`` of what it is made of: derivatives in ``t`` lead there past every result."""
        out, times = self.parts.out, self.parts.times
        out = out._replace(states=function(out.states), stages=function(out.stages))
        parts = replace(self.parts, out=out, times=replace(times, anchors=function(times.anchors)))
        return Interpolant(parts, self.grid._replace(t=function(self.grid.t), h=function(self.grid.h)))

    def __call__(self, t: Tensor, _: str = "right") -> Any:
        """The state at ``t``, as `Solution` says."""
        parts, grid = self.parts, self.grid
        out, times, plan, batched, rows = parts.out, parts.times, parts.problem.plan, parts.problem.batched, parts.spec.rows
        if t.dim() > (2 if batched else 1) or (t.dim() == 2 and t.shape[1] != rows):
            raise InvalidInput(f"sol(t) takes t of shape () or (T,){' or (T, B)' if batched else ''}, got {tuple(t.shape)}")
        given = t.to(device=out.t.device, dtype=torch.float64)
        full = given.reshape(-1, 1).expand(-1, rows) if given.dim() < 2 else given
        full = snapped(times.within(full), times.anchors[0], times.anchors[-1], t)
        start, reached = times.anchors[0].detach(), out.t_final
        last = torch.where(out.status < 0, times.anchors[-1].detach(), reached)
        # the located time of an event and its differentiable value, in the numbers of the state, are the same to rounding
        eps = torch.finfo(parts.spec.real_dtype).eps
        slack = torch.where(out.status > 0, max(1e-14, 2 * eps if eps > 1e-10 else 0.0) * torch.maximum(start.abs(), last.abs()), 0.0)
        within = (full >= torch.minimum(start, last) - slack) & (full <= torch.maximum(start, last) + slack)
        if readable(within) and not bool(within.all()):
            raise InvalidInput("sol(t): t lies outside of what was integrated")
        ahead = (grid.sign * (full.detach().unsqueeze(1) - out.t)) > 0  # (T, K, B)
        inside = torch.arange(out.t.shape[0], device=t.device).unsqueeze(-1) < out.n_accepted
        index = ((ahead & inside).sum(1) - 1).clamp(min=0)
        index = torch.where((out.status != 0) & (grid.sign * (full.detach() - reached) > slack), -1, index)
        flat = interpolate(plan, out.states, out.stages, grid.t, grid.h, full, index)
        return parts.shown(flat[0] if given.dim() == 0 else flat)


def event_list(events: Any) -> list[Callable[..., Tensor]]:
    listed = [] if events is None else list(events) if isinstance(events, (tuple, list)) else [events]
    for event in listed:
        if not callable(event):
            raise InvalidInput(f"events must be callables, got a {type(event).__name__}")
    return listed


def flat_event(event: Callable[..., Tensor], system: System, user_spec: StateSpec, has_quadrature: bool) -> Event:
    """The event as a function of flat states, for any inputs."""
    spec = system.spec

    def bind(inputs: Sequence[Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        args, whole = system.arguments(inputs), system.substituted(event, inputs)

        def call(t: Tensor, y: Tensor) -> Tensor:
            state = spec.unflatten(y)
            state = state[0] if has_quadrature else state
            time = t if spec.batch is not None else t.reshape(())
            return whole(time, state, *args)

        lent = lending(call, "an event function")

        def value(t: Tensor, y: Tensor) -> Tensor:
            out = lent(t, y)
            rows = 1 if spec.batch is None else spec.batch
            if not isinstance(out, Tensor) or out.numel() != rows:
                got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
                each = "one element" if spec.batch is None else f"one element for each of {rows} trajectories"
                raise InvalidInput(f"an event function must return a tensor with {each}, got {got}")
            return signed(out).reshape(rows)

        return value

    alone = (lambda t, y, *args: event(t, y[0], *args)) if has_quadrature else event
    return Event(bind, float(attribute(event, "direction", 0.0)), terminal_count(event), alone)


def seen_at_ends(events: Sequence[Callable[..., Tensor]], times: Times) -> list[Callable[..., Tensor]]:
    """The event functions, which are given the ends of the span as they are, and not from within it."""
    if times.named is None:
        return list(events)
    ends = torch.stack([times.anchors[0], times.anchors[-1]]).detach()
    ways = times.named - ends

    def one(event: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(t: Tensor, y: Any, *args: Any) -> Tensor:
            at, back = (x.to(t.dtype).reshape(2, *t.shape) for x in (ends, ways))
            return event(t + torch.where(t == at[0], back[0], torch.where(t == at[1], back[1], 0.0)), y, *args)

        call.__wrapped__ = event  # type: ignore[attr-defined]
        return with_rules_of(event, call)

    return [one(event) for event in events]


def with_rules_of(event: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` in the place of an event function, of which it has what is said of it, be that in itself, in its class or in a slot."""
    for name in ("direction", "terminal", "reset", "name", "__name__"):
        value = attribute(event, name)
        if value is not None:
            setattr(function, name, value)
    return function


def event_name(event: Any) -> str | None:
    """The name of an event, of a plain function its own."""
    return attribute(event, "name") or attribute(event, "__name__")


def terminal_count(event: Any) -> int:
    """At which of its occurrences an event ends the solve, 0 for never; raises `InvalidInput` for what is no count."""
    terminal = attribute(event, "terminal") or 0
    if not isinstance(terminal, Real) or terminal % 1 != 0 or terminal < 0:
        raise InvalidInput(f"The `terminal` attribute of each event must be a boolean or positive integer, got {terminal!r}")
    return int(float(terminal))
