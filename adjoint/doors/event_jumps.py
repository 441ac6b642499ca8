"""Events that are only recorded and at which ``fun`` jumps: derivatives behind them are refused.

A step over such an event is one step with a kink in it. Its value is right to the tolerances, but the derivative of what follows lacks that
the jump moves with the event, ``(f_before - f_behind) dt/dp``: it would be wrong by any amount. Steps end just before a terminal event,
so there is nothing of it there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sensitivity.problem import kept_steps, step_times
from ..sensitivity.products import vjp
from ..system.capture import is_differentiable, listed
from .event_slope import refused
from .event_times import step_around

if TYPE_CHECKING:
    from .parts import Parts

__all__ = ["jumps_refused"]

#: how much wider the gap between the sides is than what a side varies by
_WIDER = 10.0
#: by which part entries of a state are displaced to see how large the terms are that ``fun`` adds up
_PART = 2.0**-10
_WHY = (
    "a derivative was to be taken of a state at or behind a recorded event at which fun jumps, and the time of that event moves with the "
    "state or the parameters: the step over it does not know that, so that the derivative would be wrong. Make the event terminal "
    "(event.terminal = True) and solve on from sol.t[-1] and sol.y[-1], with the branch of fun that holds there, or detach what is behind"
)


def jumps_refused(parts: Parts) -> Parts:
    """``parts`` whose outputs from such an event on raise InvalidInput when they are differentiated."""
    out, plan = parts.out, parts.problem.plan
    if not parts.derivatives:
        return parts
    far = torch.iinfo(torch.int64).max
    first = torch.full_like(out.n_accepted, far)
    count: dict[int, int] = {}
    for line, which in enumerate(listed(out.event_id)):
        count[which] = count.get(which, 0) + 1
        if plan.events[which].terminal != count[which]:
            step = out.event_step[line]
            first = torch.where(_jumps(parts, which, line), torch.minimum(first, step.to(first.dtype)), first)
    inputs = [x for x in parts.problem.system.inputs if x.is_floating_point() or x.is_complex()]
    causes = [parts.times.anchors, parts.y0, *inputs]
    index = torch.arange(out.states.shape[0], device=first.device).unsqueeze(-1)
    kept = torch.tensor(kept_steps(plan, out.event_step, out.t.shape[0]), dtype=torch.int64, device=first.device)
    behind = {
        "final": (first < far).unsqueeze(-1),
        "samples": (out.sample_step >= first).unsqueeze(-1),
        "states": (index > first).unsqueeze(-1),
        "stages": (kept.unsqueeze(-1) >= first)[:, None, :, None],
    }
    guarded = {}
    for name, wrong in behind.items():
        x: Tensor = getattr(out, name)
        guarded[name] = refused(x, wrong.expand_as(x), _WHY, *causes) if x.numel() else x
    return replace(parts, out=out._replace(**guarded))


@torch.no_grad()
def _jumps(parts: Parts, which: int, line: int) -> Tensor:
    """``(B,)``: whether ``fun`` jumps at this event, whose time is not fixed.

    On either side it is evaluated at two distances: a gap between the sides that is much wider than what a side varies by is a jump,
    whatever the slopes, the stiffness or the rounding errors of ``fun`` are. Rounding errors are those of the terms that ``fun`` adds up.
    """
    out, plan, system = parts.out, parts.problem.plan, parts.problem.system
    found = out.event_step[line] >= 0
    anchors = parts.times.anchors.detach()
    grid = step_times(out.t, out.h, out.segment, out.lands, anchors, plan.shift)
    around = step_around(parts, out, grid, line, found)
    eps = torch.finfo(plan.real).eps
    t = torch.where(found, out.event_t[line], around.t.detach())
    distance = around.h.detach() * eps ** (1 / 3) + torch.sign(around.h.detach()) * 64 * eps * t.abs()
    f, slope = system.bind(system.inputs), around.slope(t)

    def at(share: float, part: float = 0.0) -> Tensor:
        when = t + share * distance
        y = around.state(when)
        point = y if system.residual is None else torch.cat([y, slope], -1)
        value = f(when.to(plan.real), point.detach() * (1 + part * _weights(point))).detach()
        return torch.view_as_real(value).flatten(-2) if value.is_complex() else value

    low, lower, upper, high = (at(share) for share in (-1.0, -0.25, 0.25, 1.0))
    # residuals are zero, and so are rates that balance: what they vary by are the rounding errors of their terms
    terms = ((at(-0.25, _PART) - lower).abs() / _PART).nan_to_num(0.0, 0.0, 0.0)
    size = torch.maximum(torch.maximum(lower.abs(), upper.abs()), terms)
    gap = (upper - lower).abs()
    wide = (gap > _WIDER * ((lower - low).abs() + (high - upper).abs())) & (gap > eps**0.5 * size)
    # a step that ends at a named time ends there whatever it is differentiated by; and what is behind the last event is not there
    ends = torch.cat([anchors, torch.where(out.status > 0, out.t_final, float("nan")).unsqueeze(0)])
    ended = ((t - ends).abs() <= 64 * torch.finfo(torch.float64).eps * torch.maximum(t.abs(), around.h.abs())).any(0)
    return found & wide.any(-1) & ~ended & _moves(parts, which, t, around.state(t - distance), around.state(t + distance))


def _weights(point: Tensor) -> Tensor:
    """A weight for each entry, no two alike and between a half and three halves, so that terms which cancel no longer do."""
    k = torch.arange(1, point.shape[-1] + 1, dtype=point.real.dtype, device=point.device)
    return 0.5 + (k * 0.6180339887498949) % 1.0


def _moves(parts: Parts, which: int, t: Tensor, before: Tensor, behind: Tensor) -> Tensor:
    """``(B,)``: whether an event function depends on more than the time."""
    system, real = parts.problem.system, parts.problem.plan.real
    event, when = parts.problem.plan.events[which], t.to(real)
    one, other = (event.bind(system.inputs)(when, y.detach()).detach() for y in (before, behind))
    by_state = one != other
    places = [i for i, x in enumerate(system.inputs) if is_differentiable(x)]
    if not places:
        return by_state

    def value(*moved: Tensor) -> Tensor:
        inputs = list(system.inputs)
        for i, x in zip(places, moved, strict=True):
            inputs[i] = x
        return event.bind(inputs)(when, behind.detach())

    with torch.enable_grad():
        out, pull = vjp(value, *(system.inputs[i].detach() for i in places))
        bars = pull(torch.ones_like(out))
    return by_state | torch.stack([(x != 0).any() for x in bars if x is not None]).any()
