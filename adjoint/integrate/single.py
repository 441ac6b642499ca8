"""The loop for one trajectory: times and decisions are Python floats, states are tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..methods import Method
from .clock import aim_step, judge_step, why_stuck
from .companion import QUIET, Beside, Companion, companion_of
from .events import EventWatch
from .initial_step import initial_step
from .plan import Plan, Record, Status, shifted_times
from .recording import Recording
from .sampling import Sampler
from .stiffness import SwitchWatch

__all__ = ["integrate_single"]



def _times(plan: Plan, t: float, h: float, like: Tensor, jump: tuple[bool, bool], sign: float) -> Sequence[Tensor]:
    times = torch.tensor([t + c * h for c in plan.method.nodes], dtype=like.dtype.to_real(), device=like.device).unbind()
    return shifted_times(times, plan.method.nodes, jump[0], jump[1], sign) if any(jump) else times


def _start_time(t: float, like: Tensor, jump: bool, sign: float) -> Tensor:
    """The time at the start of a step, where not every method has a stage."""
    time = torch.tensor(t, dtype=like.dtype.to_real(), device=like.device)
    return shifted_times([time], [0.0], True, False, sign)[0] if jump else time


#: new state, stages, ``f(t + h, y1)`` if the error needs it, size of the new state, scaled error ``(1, n)`` and its norm ``(1,)``
_Attempted = tuple[Tensor, list[Tensor], Tensor | None, Tensor, Tensor | None, Tensor | None]


def _attempt(
    f: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    times: Sequence[Tensor],
    h: float | Tensor,
    y: Tensor,
    k1: Tensor,
    size: Tensor,
    flat: Sequence[int],
) -> _Attempted:
    """One attempted step."""
    method = plan.method
    y1, ks = method.step(f, times, h, y, k1)
    recorded = torch.is_grad_enabled()
    size1, k_end, scaled, error = (y1.detach() if recorded else y1).abs(), None, None, None
    if method.adaptive:
        if method.error_uses_end:
            k_end = f(times[method.n_stages], y1)
        # a recorded solve holds step sizes fixed: their choice is not part of its graph
        parts = ks if k_end is None else [*ks, k_end]
        estimate = method.error(h, [k.detach() for k in parts] if recorded else parts)
        scaled = plan.scaled(estimate, torch.maximum(size, size1)).reshape(flat)
        error = plan.norm(scaled)
    return y1, ks, k_end, size1, scaled, error


def _accompanied(
    companion: Companion,
    error: float,
    times: Sequence[Tensor],
    h: float,
    y: Tensor,
    k1: Tensor,
    y1: Tensor,
    ks: list[Tensor],
    k_end: Tensor | None,
    scaled: Tensor | None,
    cut: bool,
) -> float:
    """The error of an attempt and of its companion. Of a step that was ``cut`` short a small error says nothing."""
    quiet = error <= QUIET and not cut
    if not companion.due(quiet, abs(h)):
        return error
    assert scaled is not None
    return max(error, companion.error_of_one(times, h, y, k1, y1, ks if k_end is None else [*ks, k_end], scaled, quiet))


def integrate_single(
    f: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
    recording: Recording | None = None,
    beside: Beside | None = None,
) -> Record:
    """Solve one trajectory.

    With gradients enabled the steps are recorded by autograd (their sizes as constants).

    Parameters
    ----------
    f : flat right-hand side
    anchors : (A, 1) float64; start, times where a step must end, end; in the direction of integration
    t_eval : (T, 1) float64 or None; sample times within the span, in any order
    y0 : (1, n)
    shape : the shape in which ``f`` takes and gives states, ``(1, n)`` by default
    recording : stops autograd's recording when it has grown too large
    beside : see `Companion`
    """
    flat = y0.shape
    y0 = y0 if shape is None else y0.reshape(shape)
    method, monitor = plan.method, plan.monitor
    stops = anchors[:, 0].tolist()
    t, t_end = stops[0], stops[-1]
    sign = 1.0 if t_end >= t else -1.0
    device = y0.device
    sampler = Sampler(plan, [] if t_eval is None else t_eval[:, 0].tolist(), y0, sign)

    n_fun = n_rejected = 0
    states, starts, sizes, segments, landings = [y0], [], [], [], []
    kept_stages: list[Tensor] = []
    events = EventWatch(plan, inputs, t, y0)
    watch = None if plan.switch is None else SwitchWatch(plan.switch, plan, 1, device)
    segment: int = 0
    jump_start: bool = False
    y: Tensor = y0
    size: Tensor = y0.detach().abs()
    start_time = _start_time(t, y, plan.shift == "all", sign)
    k1: Tensor = f(start_time, y) if recording is None else recording.first(f, start_time, y)
    n_fun += 1
    if plan.first_step is not None:
        step: float = float(plan.first_step)
    elif method.adaptive:
        toward = torch.full((1,), sign, dtype=torch.float64, device=device)
        with torch.no_grad():
            g = lambda t, x: f(t, x.reshape(y0.shape)).reshape(flat)  # noqa: E731
            step = float(initial_step(g, plan, anchors.detach(), y.reshape(flat), k1.reshape(flat), toward))
        step = max(step, plan.min_step)
        n_fun += 1
    else:
        # a grid of anchors is the whole discretisation
        step = math.inf
    # types of what goes round in the loop are said here: found by inference they take a checker minutes
    previous: tuple[float, float] = (1.0, 1.0)
    status = Status.SUCCESS
    attempts = 0
    just_rejected: bool = False
    bad: bool = False
    scaled: Tensor | None = None

    companion = companion_of(f, plan, beside, y0, flat)
    while segment < len(stops) - 1:
        target = stops[segment + 1]
        # a span of no length is one step of no length, whose derivatives in the times are those of any step
        if sign * (target - t) <= 0 and (starts or segment < len(stops) - 2):
            segment += 1
            continue
        # a step that went over a terminal event is taken again, up to it
        aiming = events.aim is not None
        target = events.aim if events.aim is not None else target
        aimed = aim_step(plan, step, t, abs(target - t), attempts)
        if aimed.stuck:
            status = Status(why_stuck(aimed, bad))
            break
        lands: bool = aimed.lands
        h: float = (target - t) if lands else sign * aimed.size
        end: float = target if lands else t + h
        attempts += 1
        monitor.step(t, y, h)
        lands = lands and not aiming
        inner = plan.shift == "inner" and lands and segment < len(stops) - 2
        jump = (True, True) if plan.shift == "all" else (jump_start, inner)
        times = _times(plan, t, h, y, jump, sign)
        # recorded steps of implicit methods are taken again with tensors: to the same bits, or stiffness blows their difference up
        length = torch.full((), h, dtype=plan.real, device=device) if method.implicit else h
        y1, ks, k_end, size1, scaled, norm = _attempt(f, plan, times, length, y, k1, size, flat)
        n_fun += method.evaluations
        if norm is not None:
            error: float = float(norm)
            if companion is not None and error <= 1.0:
                error = _accompanied(companion, error, times, h, y, k1, y1, ks, k_end, scaled, lands and abs(h) < 0.5 * aimed.size)
            verdict = judge_step(plan, error, t, abs(h), aimed.size, lands, just_rejected, previous, getattr(f, "stuck", None))
            bad, step = verdict.bad, verdict.step
            just_rejected = not verdict.passed
            if just_rejected:
                monitor.rejected(t, y, h)
                n_rejected += 1
                if verdict.hopeless:
                    status = Status.NON_FINITE
                    break
                continue
            previous = verdict.memory
        elif method.implicit and not bool(torch.isfinite(y1).all()):
            # stages without a solution: no step that follows would have one
            n_rejected += 1
            status = Status.NON_FINITE
            break
        index = len(starts)
        stages = _Stages(f, plan.method, times, h, y, y1, ks, k_end)
        stop_at, again = events.after_step(index, t, h, end, y, y1, stages)
        if again:
            monitor.rejected(t, y, h)
            n_rejected += 1
            n_fun += stages.n_fun
            assert events.aim is not None
            step = max(step, abs(events.aim - t))
            continue
        monitor.accepted(t, y, h)
        upto = sampler.due(end)
        last = lands and segment == len(stops) - 2
        starts.append(t)
        sizes.append(h)
        segments.append(segment)
        landings.append(lands)
        if plan.keep_stages or events.found_in(index):
            kept_stages.append(torch.stack(stages()))
        if stop_at is not None:
            upto = sampler.due(stop_at)
        over = False
        if watch is not None and stop_at is None and not lands:
            parts = [k.reshape(flat) for k in stages()]
            size_h = torch.full((1,), h, dtype=torch.float64, device=device)
            rate = 0.0 if companion is None else companion.rate
            every = torch.ones_like(watch.hits, dtype=torch.bool)
            over = watch.after_step(f, every, size_h, y.reshape(flat), parts, rate) is not None
        if upto > sampler.next:
            sampler.fill(upto, index, t, h, end, y, y1, stages)
        n_fun += stages.n_fun
        k_end = stages.end
        if plan.keep_states:
            states.append(y1)
        y, size = y1, size1
        if stop_at is not None:
            t, status = stop_at, Status.TERMINAL_EVENT
            break
        t = end
        if over:
            status = Status.SWITCHED
            break
        fraction = abs(t - stops[0]) / max(abs(t_end - stops[0]), 1e-300)
        monitor.advanced(fraction)
        if lands:
            segment += 1
        if recording is not None and recording.accepted(index, fraction):
            # the graph goes, the values stay
            states = [x.detach() for x in states]
            sampler.pieces = [x.detach() for x in sampler.pieces]
            y, ks, k_end = states[-1], [k.detach() for k in ks], None if k_end is None else k_end.detach()
        if last:
            break
        jump_start = jump[1]
        fsal = method.end_index == method.n_stages - 1
        if jump_start or (k_end is None and not fsal):
            k1 = f(_start_time(t, y, jump_start, sign), y)
            n_fun += 1
        else:
            k1 = k_end if k_end is not None else ks[-1]

    if status >= 0 and not method.adaptive and not bool(torch.isfinite(y).all()):
        if not plan.keep_states:
            # once more, to see where
            record = integrate_single(f, replace(plan, keep_states=True), anchors, t_eval, y0.reshape(flat), inputs, shape)
            return replace(record, states=y0.new_empty((0, *flat)))
        status = Status.NON_FINITE
        good = next((k for k, state in enumerate(states[1:]) if not bool(torch.isfinite(state).all())), len(starts))
        kept = range(len(starts)) if plan.keep_stages else sorted({e[1] for e in events.found})
        kept_stages = [x for k, x in zip(kept, kept_stages, strict=True) if k < good]
        events.found = [e for e in events.found if e[1] < good]
        sampler.lose(good)
        t, y, attempts, n_rejected = starts[good], states[good], good + 1, 1
        del states[good + 1 :], starts[good:], sizes[good:], segments[good:], landings[good:]
    reached = y
    if status < 0:
        y = torch.full_like(y, float("nan"))

    def column(values: Sequence[float | int | bool], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device).reshape(-1, 1)

    def one_row(value: int | float, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([value], dtype=kind, device=device)

    n_all = len(method.nodes)
    n_kept = len(kept_stages[0]) if kept_stages else n_all
    return Record(
        final=y.reshape(flat),
        last=reached.reshape(flat),
        scaled_error=torch.zeros(flat, dtype=plan.real, device=device) if scaled is None else scaled.abs(),
        states=torch.stack(states).reshape(len(states), *flat) if plan.keep_states else y0.new_empty((0, *flat)),
        samples=sampler.result().reshape(len(sampler.order), *flat),
        stages=torch.stack(kept_stages).reshape(len(kept_stages), n_kept, *flat) if kept_stages else y0.new_empty((0, n_all, *flat)),
        t=column(starts, torch.float64),
        h=column(sizes, torch.float64),
        segment=column(segments, torch.int64),
        lands=column(landings, torch.bool),
        sample_step=column(sampler.step, torch.int64),
        n_steps=one_row(attempts),
        n_accepted=one_row(len(starts)),
        n_rejected=one_row(n_rejected),
        n_fun=one_row(n_fun + (0 if companion is None else companion.n_fun)),
        status=one_row(int(status)),
        t_final=one_row(t, torch.float64),
        next_step=one_row(step, torch.float64),
        event_id=torch.tensor([e[0] for e in events.found], dtype=torch.int64, device=device),
        event_row=torch.zeros(len(events.found), dtype=torch.int64, device=device),
        event_step=torch.tensor([e[1] for e in events.found], dtype=torch.int64, device=device),
        event_t=torch.tensor([e[2] for e in events.found], dtype=torch.float64, device=device),
        **{name: one_row(0) for name in ("n_jac", "n_factorizations", "n_solves", "n_newton")},
    )


@dataclass
class _Stages:
    """The stages of an accepted step with those of its dense output, computed when they are first asked for."""

    f: Callable[[Tensor, Tensor], Tensor]
    method: Method
    times: Sequence[Tensor]
    h: float
    y: Tensor
    y1: Tensor
    ks: list[Tensor]
    end: Tensor | None
    dense: list[Tensor] | None = None
    n_fun: int = 0

    def __call__(self) -> list[Tensor]:
        method = self.method
        if self.dense is None:
            if self.end is None and method.end_index == method.n_stages:
                self.end = self.f(self.times[method.n_stages], self.y1)
                self.n_fun += 1
            self.dense = method.dense_stages(self.f, self.times, self.h, self.y, self.ks, self.end)
            self.n_fun += method.extra_evaluations
        return self.dense
