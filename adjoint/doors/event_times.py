"""Times and states of events as differentiable functions of everything the solution and the event function depend on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..methods import Bdf, Method
from ..sensitivity import Outputs
from ..sensitivity.problem import StepTimes, step_times
from ..sensitivity.products import behind, tangent
from ..system.capture import listed, moves
from ..system.normalizing import composing
from ..system.transforms import functorch_active
from ..torch_internals import dual_level
from .event_slope import once, signed, with_slope
from .parts import Found, Parts
from .solution import EventRecord

__all__ = ["ended_once", "event_records", "sampled_once", "step_around"]


_STRAIGHT = (
    "the time of an event was to be differentiated twice, but in the step where it is the dense output of {0!r} is a straight line, which "
    "has first derivatives only. Use another method: 'midpoint', 'heun2' or 'rk4' for 'euler', 'trapezoid' or 'sdirk2' for "
    "'implicit_euler', 'gl4' for 'implicit_midpoint'; 'bdf' is of first order in its first steps, which a smaller rtol or first_step moves "
    "away from the event"
)

_STRAIGHT_SAMPLE = (
    "the time of a sample was to be differentiated twice, but where it lies the dense output of {0!r} is a straight line, which has first "
    "derivatives only. Detach the time, or use another method: 'midpoint', 'heun2' or 'rk4' for 'euler', 'trapezoid' or 'sdirk2' for "
    "'implicit_euler', 'gl4' for 'implicit_midpoint', 'radau5' or 'kvaerno5' for 'bdf', which is of first order in its first steps"
)

_FIRST_ORDER = (
    "a time at which a step ends (an end of t_span, or one of step_ts) was to be differentiated twice, but a step of {0!r}, which is of "
    "first order, has first derivatives in its size only. Detach the time, or use another method: 'midpoint', 'heun2' or 'rk4' for "
    "'euler', 'trapezoid' or 'sdirk2' for 'implicit_euler'"
)
#: the sum of the weights of a second derivative from which they amplify rounding errors too much
_TURNS = 1000.0
#: places before an event, in parts of the way to it in its step, and weights that extrapolate from them
_BACK, _WEIGHTS = 0.08, (4.0, -6.0, 4.0, -1.0)

#: ``between(t0, h, y0, y1)`` is the state as a function of the time, ``(B,)``, in the steps from ``t0, y0``
Between = Callable[[Tensor, Tensor, Tensor, Tensor], Callable[[Tensor], Tensor]]


def event_records(parts: Parts, out: Outputs, between: Between | None = None) -> Found:
    """The events of a solve; ``between``: to be taken in place of the dense output, from which it differs by little.

    The event time is a root of ``r(t, y(t), *args)`` on the dense output. Two Newton steps with differentiable slope, begun at the
    located root, have the root's first, second and third derivatives (each full Newton step doubles the order; one alone would
    give wrong second derivatives). Its value is the located one whether or not anything is differentiated. Where the event function has
    no slope there are no derivatives: see `with_slope`.
    """
    plan, batched = parts.problem.plan, parts.problem.batched
    anchors = parts.times.anchors
    grid = step_times(out.t, out.h, out.segment, out.lands, anchors, plan.shift)
    rows, real = out.t.shape[1], parts.spec.real_dtype
    ends, states_there, slopes_there = anchors[-1], out.final, out.final
    any_stop = False
    records = []
    kinds = listed(out.event_id)
    for which, event in enumerate(plan.events):
        times, states = [], []
        for k, line in enumerate(i for i, kind in enumerate(kinds) if kind == which):
            found = out.event_step[line] >= 0
            t, y, slope = _located(parts, out, grid, which, line, found, between)
            t = parts.times.shown_as(t)
            if event.terminal == k + 1:
                any_stop = True
                ends = torch.where(found, t, ends)
                states_there = torch.where(found.unsqueeze(-1), y, states_there)
                slopes_there = torch.where(found.unsqueeze(-1), slope, slopes_there)
            times.append(torch.where(found, t, float("nan")))
            states.append(torch.where(found.unsqueeze(-1), y, float("nan")))
        t_all = torch.stack(times) if times else out.t.new_empty((0, rows))
        flat = torch.stack(states) if states else parts.y0.new_empty((0, *parts.y0.shape))
        records.append(EventRecord((t_all if batched else t_all[:, 0]).to(real), parts.shown(flat)))
    if not any_stop:
        return Found(tuple(records), None, None, None)
    return Found(tuple(records), ends, states_there, slopes_there)


class Around(NamedTuple):
    """The steps ``(B,)`` in which trajectories have an event: start, size, state ``(B, n)`` at the start, stages ``(S, B, n)``."""

    t: Tensor
    h: Tensor
    y: Tensor
    stages: Tensor
    method: Method

    def state(self, t: Tensor) -> Tensor:
        """The dense output ``(B, n)`` at ``t`` (B,)."""
        weights = (self.method.dense_weights((t - self.t) / self.h) * self.h.unsqueeze(-1)).to(self.y.dtype)
        return self.y + torch.einsum("bs,sbn->bn", weights, self.stages)

    def slope(self, t: Tensor) -> Tensor:
        """Its derivative."""
        weights = self.method.dense_slopes((t - self.t) / self.h).to(self.y.dtype)
        return torch.einsum("bs,sbn->bn", weights, self.stages)

    def straight(self) -> Tensor:
        """The rows ``(B,)`` whose dense output is a straight line by the method, and not because the solution is one."""
        curving = _curving(self.method).to(self.t.device)
        if not isinstance(self.method, Bdf):
            return (~curving).all().expand_as(self.t)
        # of order one: it corrects what it predicted, but keeps no more than one difference
        moved = (self.stages.detach() != 0).any(-1)
        return moved[-1] & ~(moved & curving.unsqueeze(-1)).any(0)


def _curving(method: Method) -> Tensor:
    """Which of the stages ``(S,)`` bend the dense output."""
    start, end = method.dense_slopes(torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu"))
    return start != end


def sampled_once(samples: Tensor | None, start: Tensor, method: Method) -> Tensor | None:
    """Times ``(T, B)`` of samples, as they are; where the dense output is a line they have no second derivatives, which is said to
    whoever takes them. That of "bdf" is one at the start."""
    if samples is None or not moves(samples):
        return samples
    lines = any(not bool(_curving(m).any()) for m in method.members)
    straight = (samples == start).detach() if isinstance(method, Bdf) else torch.full_like(samples, lines)
    return once(samples, straight.to(torch.bool), _STRAIGHT_SAMPLE.format(method.name), samples)


def ended_once(anchors: Tensor, method: Method) -> Tensor:
    """Times ``(A, B)`` at which steps end, as they are; the state at the end of a step of first order has no second derivative in its size
    that is one of the solution, which is said to whoever takes it."""
    if method.multistep or method.switching or method.order > 1 or not moves(anchors):
        return anchors
    return once(anchors, torch.ones_like(anchors, dtype=torch.bool), _FIRST_ORDER.format(method.name), anchors)


def step_around(parts: Parts, out: Outputs, grid: StepTimes, line: int, found: Tensor) -> Around:
    """The steps with the events of one line of the table, in the rows that have it (``found``)."""
    n = parts.y0.shape[-1]
    step = out.event_step[line].clamp(min=0).unsqueeze(0)
    y0 = out.states.gather(0, step.unsqueeze(-1).expand(1, -1, n))[0]
    t0, h = grid.t.gather(0, step)[0], grid.h.gather(0, step)[0]
    # a trajectory that took no step has no event either
    h = torch.where(found, h, 1.0)
    kept = step
    if not parts.problem.plan.keep_stages:
        # of one trajectory, which has all lines of the table
        kept = torch.searchsorted(torch.unique(out.event_step), step)
    ks = out.stages.gather(0, kept.reshape(1, 1, -1, 1).expand(1, out.stages.shape[1], -1, n))[0]
    # others are looked at where one that has the event is: whatever they are is summed with the rest, and zero times NaN is NaN
    other = y0.detach().gather(0, found.to(torch.int64).argmax().expand(1, n)).nan_to_num(1.0, 1.0, 1.0)
    y0, ks = torch.where(found.unsqueeze(-1), y0, other), torch.where(found.unsqueeze(-1), ks, 0.0)
    return Around(t0, h, y0, ks, parts.problem.plan.method)


def _located(
    parts: Parts, out: Outputs, grid: StepTimes, which: int, line: int, found: Tensor, between: Between | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Times ``(B,)``, states and slopes ``(B, n)`` of one line of the table in the rows that have it."""
    batched = parts.problem.batched
    around = step_around(parts, out, grid, line, found)
    t0, h, y0, ks, state = around.t, around.h, around.y, around.stages, around.state
    event = composing(parts.events[which])

    def residual(t: Tensor) -> Tensor:
        flat = state(t)
        time = t.to(flat.dtype.to_real())
        value = event(time if batched else time.reshape(()), parts.state(flat), *parts.args)
        return signed(value).reshape(-1).to(torch.float64)

    t = at = torch.where(found, out.event_t[line], t0.detach())
    bend = None
    if between is not None:
        step = out.event_step[line].clamp(min=0)
        y1 = out.states.gather(0, (step + 1).reshape(1, -1, 1).expand(1, -1, y0.shape[-1]))[0]
        state = between(t0, h, y0, y1)
        for _ in range(3):
            # what is differentiated below has its root there, where there is a slope to find it by
            with torch.no_grad():
                move = residual(at) / tangent(residual, (at,), (torch.ones_like(at),))
            at = torch.where(found & (move.abs() <= 0.1 * h.abs()), at - move, at).detach()
        t = at
    if parts.derivatives and between is None:
        bend = _bend(parts, around, at, found)
        if bend is not None:
            state = _taylor(around, at, bend)
    if parts.derivatives:
        sloping = torch.ones_like(found)
        t = behind(t, t0, h, y0, ks, *parts.problem.system.inputs)
        for k in range(2):
            rate, value = tangent(residual, (t,), (torch.ones_like(t),)), residual(t)
            if k == 0:
                # at a jump there is a slope perhaps, but no root
                close = (value / rate).abs() <= 1e-3 * h.abs() + torch.finfo(parts.spec.real_dtype).eps ** 0.5 * t.abs()
                sloping = (~found | (torch.isfinite(rate) & (rate != 0) & close)).detach()
            usable = found & sloping
            t = torch.where(usable, t - torch.where(usable, value, 0.0) / torch.where(usable, rate, 1.0), t)
        # the value stays what it is without derivatives
        causes = [x for x in (t0, y0, ks, *parts.problem.system.inputs) if x.is_floating_point() or x.is_complex()]
        moving = t.requires_grad or functorch_active() or dual_level() >= 0
        t = with_slope(at + (t - t.detach()), sloping, *causes)
        if between is None and moving:
            t = once(t, found & around.straight(), _STRAIGHT.format(around.method.name), *causes)
    return t, state(t), around.slope(t)


def _taylor(around: Around, at: Tensor, bend: Tensor) -> Callable[[Tensor], Tensor]:
    """The dense output around ``at`` to third order, whose second derivative has the value ``bend`` (B, n) there; with its derivatives."""
    share, one = ((at - around.t) / around.h).detach(), torch.ones_like(at)
    slopes = around.method.dense_slopes
    turning = lambda x: tangent(slopes, (x,), (one,))  # noqa: E731
    weights = [around.method.dense_weights(share), slopes(share), turning(share), tangent(turning, (share,), (one,))]
    size = around.h.unsqueeze(-1)
    parts = [
        torch.einsum("bs,sbn->bn", (w.detach() * size ** (1 - k)).to(around.y.dtype), around.stages) for k, w in enumerate(weights)
    ]
    start, slope, bent, third = around.y + parts[0], parts[1], parts[2], parts[3]
    # in place of a sum whose terms cancel, but with its derivatives
    bent = bent - bent.detach() + bend

    def state(t: Tensor) -> Tensor:
        way = t - (around.t + share * around.h)
        # of value zero where it is the time of the event: what rounding makes of it is nothing
        way = (way - way.detach() + (t - at).detach()).to(bend.dtype).unsqueeze(-1)
        return start + way * (slope + way * (bent / 2 + way * third / 6))

    return state


def _turn(method: Method) -> float:
    """The sum of the weights of a second derivative of the dense output of a step of length one, a little beyond its end."""
    low, high = method.dense_slopes(torch.tensor([1.1 - 1e-4, 1.1], dtype=torch.float64, device="cpu")).unbind()
    return float((high - low).abs().sum()) * 1e4


def _bend(parts: Parts, around: Around, at: Tensor, found: Tensor) -> Tensor | None:
    """The second derivative of the solution at ``at``, ``(B, n)``; None where that of the dense output is good enough.

    That of a polynomial of high degree is made of slopes with weights that are large and cancel: rounding errors come out by them. The
    derivative of ``fun`` along the solution, at some places before the event, is on its near side whatever ``fun`` does there.
    """
    system, real = parts.problem.system, parts.problem.plan.real
    if system.residual is not None or system.mass is not None or _turn(around.method) < _TURNS:
        return None
    one = torch.ones_like(at)
    f = system.bind(system.inputs)
    share = torch.where(found, (at - around.t) / around.h, 1.0).detach()
    total = torch.zeros_like(around.y)
    for k, weight in enumerate(_WEIGHTS, 1):
        when = (around.t + share * (1 - _BACK * k) * around.h).detach()
        y = around.state(when).detach()
        rate = f(when.to(real), y).detach()

        def along(d: Tensor, when: Tensor = when, y: Tensor = y, rate: Tensor = rate) -> Tensor:
            return f((when + d).to(real), y + d.to(y.dtype).unsqueeze(-1) * rate)

        total = total + weight * tangent(along, (torch.zeros_like(when),), (one,)).detach()
    own = tangent(around.slope, (at,), (one,)).detach()
    return torch.where(found.unsqueeze(-1) & torch.isfinite(total), total, own)
