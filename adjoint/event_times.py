"""Times and states of events as differentiable functions of everything the solution and the event function depend on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sensitivity import Outputs
from .sensitivity.problem import step_times
from .sensitivity.sweep import tangent
from .solution import EventRecord

if TYPE_CHECKING:
    from .ivp import _Parts

__all__ = ["event_records"]


def event_records(parts: _Parts, out: Outputs) -> tuple[tuple[EventRecord, ...], Tensor | None, Tensor | None]:
    """One record for each event function; time and flat state of the terminal event, if there was one.

    The event time is a root of ``r(t, y(t), *args)`` on the dense output. Two Newton steps with differentiable slope, begun at the
    located root, have the root's first, second and third derivatives (each full Newton step doubles the order; one alone would
    give wrong second derivatives).
    """
    grid = step_times(out.t, out.h, out.segment, out.lands, parts.times.anchors)
    steps = sorted(set(out.event_step.tolist()))
    plan = parts.problem.plan
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in parts.events]
    last: tuple[Tensor, Tensor] | None = None
    ids = out.event_id.tolist()
    for i, (which, step) in enumerate(zip(ids, out.event_step.tolist(), strict=True)):
        stages = out.stages[step if plan.keep_stages else steps.index(step)]
        y_start, t_start, h = out.states[step], grid.t[step], grid.h[step]

        def state(t: Tensor, y: Tensor = y_start, ks: Tensor = stages, t0: Tensor = t_start, h: Tensor = h) -> Tensor:
            theta = (t - t0) / h
            weights = (plan.method.dense_weights(theta) * h).to(y.dtype)
            return y + torch.einsum("bs,sbn->bn", weights, ks)

        def residual(t: Tensor, which: int = which, state: Any = state) -> Tensor:
            flat = state(t.reshape(1))
            return parts.events[which](t.to(flat.dtype.to_real()), parts.state(flat), *parts.args).reshape(()).to(torch.float64)

        when = out.event_t[i]
        if parts.derivatives:
            for _ in range(2):
                slope = tangent(residual, (when,), (torch.ones_like(when),))
                when = when - residual(when) / slope
        last = (when, state(when.reshape(1)))
        found[which].append(last)
    records = []
    real = parts.spec.real_dtype
    for events in found:
        times = torch.stack([t for t, _ in events]) if events else out.t.new_empty(0)
        flat = torch.stack([y for _, y in events]) if events else parts.y0.new_empty((0, *parts.y0.shape))
        records.append(EventRecord(times.to(real), parts.state(flat)))
    stopped = not torch._C._functorch.is_functorch_wrapped_tensor(out.status) and int(out.status) == 1
    if last is None or not (stopped or _stopped_early(parts, ids)):
        return tuple(records), None, None
    return tuple(records), last[0], last[1]


def _stopped_early(parts: _Parts, ids: list[int]) -> bool:
    """Under a transform the status cannot be read; the last event is the terminal one if its function says so."""
    event = parts.problem.plan.events[ids[-1]]
    return bool(event.terminal) and ids.count(ids[-1]) >= event.terminal
