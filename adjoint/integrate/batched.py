"""The loop for many trajectories in lock step: every decision is a mask, and a step is a pure function of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_events import BatchEventWatch, ends_at, next_aim, no_events
from .batch_sampling import BatchSampler
from .clock import aim_step, judge_step, why_stuck
from .companion import QUIET, Beside, Companion, companion_of
from .controller import tamed
from .defect import inner_error
from .initial_step import initial_step
from .packing import Kept, evaluations_of_attempt, record_of
from .plan import Monitor, Plan, Record, Status, shifted_times
from .residual import ResidualSolver
from .spread import widened
from .stages import StageSolver
from .stiffness import SwitchWatch

__all__ = ["Attempt", "Carry", "advance", "integrate_batched", "start_carry"]


class Carry(NamedTuple):
    """The loop's state; all ``(B,)`` but ``y``, ``k1`` and ``scaled``, which are ``(B, n)``."""

    t: Tensor
    y: Tensor
    k1: Tensor
    scaled: Tensor
    step: Tensor
    error1: Tensor
    error2: Tensor
    segment: Tensor
    rejected_last: Tensor
    bad_last: Tensor
    jump: Tensor
    attempts: Tensor
    n_accepted: Tensor
    status: Tensor
    running: Tensor


class Attempt(NamedTuple):
    """What one step did: ``(B,)`` tensors, and its stages."""

    t: Tensor
    end: Tensor
    h: Tensor
    segment: Tensor
    lands: Tensor
    accepted: Tensor
    stages: list[Tensor]


def advance(
    f: Callable[[Tensor, Tensor], Tensor], plan: Plan, stops: Tensor, sign: Tensor, carry: Carry, dense: bool
) -> tuple[Carry, Attempt]:
    """Attempt one step of every running trajectory. Pure: no host synchronisation, no branch on data.

    ``stops`` (A, B): the anchors in the direction of integration; ``sign`` (B,): that direction. ``dense``: also compute the stages
    that only the dense output needs.
    """
    method = plan.method
    width = 0 if method.implicit else carry.y.shape[-1]

    def spread(x: Tensor) -> Tensor:
        return widened(x.unsqueeze(-1), width)

    t, y, k1, running = carry.t, carry.y, carry.k1, carry.running
    real = plan.real
    last = stops.shape[0] - 2
    target = stops[1] if last == 0 else stops.gather(0, carry.segment.clamp(max=last).unsqueeze(0) + 1).squeeze(0)
    aimed = aim_step(plan, carry.step, t, (target - t).abs(), carry.attempts)
    lands = aimed.lands
    alive = running & ~aimed.stuck
    failed = torch.where(running & aimed.stuck, why_stuck(aimed, carry.bad_last), 0)
    # the steps of finished trajectories have size zero: inert, and finite wherever the state is
    h = torch.where(alive, torch.where(lands, target - t, sign * aimed.size), 0.0)
    end = torch.where(lands & alive, target, t + h)
    hr = spread(h.to(real))
    at = {c: (t + h * c).to(real) for c in method.nodes}
    times = [at[c] for c in method.nodes]
    jumps = plan.shift == "all" or (plan.shift == "inner" and last > 0)
    jump_end = lands
    if jumps:
        jump_end = lands if plan.shift == "all" else lands & (carry.segment < last)
        times = shifted_times(times, method.nodes, carry.jump, jump_end, sign)
    y1, ks = method.step(f, times, hr, y, k1)
    k_end: Tensor | None = ks[method.end_index] if method.end_index is not None and method.end_index < method.n_stages else None
    if k_end is None:
        time = times[method.n_stages] if method.end_index is not None else (t + h).to(real)
        k_end = f(time, y1)
    if method.adaptive:
        estimate = method.error(hr, [*ks, k_end] if method.error_uses_end else ks)
        size = torch.maximum(y.abs(), y1.abs())
        scaled = plan.scaled(estimate, size).abs()
        if getattr(f, "constrained", False):
            span = (stops[-1] - stops[0]).abs()
            scaled = torch.maximum(scaled, inner_error(f, plan, lambda c: (t + h * c).to(real), hr, span, y, size, ks))  # type: ignore[arg-type]
        error = plan.norm(scaled)
        # kept for the message of a failure, which is found when the next attempt would be made
        scaled = torch.where(spread(alive), scaled, carry.scaled)
        memory = (carry.error1, carry.error2)
        verdict = judge_step(plan, error, t, h.abs(), aimed.size, lands, carry.rejected_last, memory, getattr(f, "stuck", None))
        bad, accepted, rejected = verdict.bad, alive & verdict.passed, alive & ~verdict.passed
        hopeless = alive & verdict.hopeless
        # of trajectories that are done nobody asks for another step
        step = verdict.step
        error1, error2 = memory
        if plan.control.remembers:
            error1, error2 = torch.where(accepted, verdict.memory[0], error1), torch.where(accepted, verdict.memory[1], error2)
    else:
        # without an error estimate the state itself says when it stops being finite
        bad = ~torch.isfinite(y1).all(-1)
        accepted, rejected = alive & ~bad, alive & bad
        hopeless = rejected
        step, error1, error2, scaled = carry.step, carry.error1, carry.error2, carry.scaled
    stages = method.dense_stages(f, times, hr, y, ks, k_end) if dense else []
    column = spread(accepted)
    landed = accepted & lands
    segment, done = carry.segment, landed
    if last:
        segment = segment + landed
        done = landed & (segment > last)
    y_next = torch.where(column, y1, y)
    if jumps:
        # after a discontinuity the first stage is taken anew, from the far side of it
        jumped = accepted & jump_end
        t_next = torch.where(accepted, end, t)
        time = shifted_times([t_next.to(real)], [0.0], jumped, False, sign)[0]
        if isinstance(f, ResidualSolver):
            room = (stops.gather(0, segment.clamp(max=last).unsqueeze(0) + 1).squeeze(0) - t_next).abs()
            room = torch.where(room > 0, room, (stops[-1] - stops[0]).abs())
            k_end = f.behind_jumps(jumped, time, y_next, k_end, sign, room)
        else:
            k_end = torch.where(spread(jumped), f(time, y_next), k_end)
        # a step that is tried again still begins behind the jump
        jump = torch.where(accepted, jumped, carry.jump)
    else:
        jump = carry.jump
    new = Carry(
        t=torch.where(accepted, end, t),
        y=y_next,
        k1=torch.where(column, k_end, k1),
        scaled=scaled,
        step=step,
        error1=error1,
        error2=error2,
        segment=segment,
        rejected_last=rejected,
        bad_last=bad,
        jump=jump,
        attempts=carry.attempts + alive,
        n_accepted=carry.n_accepted + accepted,
        status=carry.status + torch.where(hopeless, int(Status.NON_FINITE), failed),
        running=alive & ~done & ~hopeless,
    )
    return new, Attempt(t, end, h, carry.segment, lands, accepted, stages)


def start_carry(f: Callable[[Tensor, Tensor], Tensor], plan: Plan, stops: Tensor, sign: Tensor, y0: Tensor) -> tuple[Carry, int]:
    """The loop's first state from ``y0`` (B, n), and how often ``fun`` was evaluated for it."""
    t0 = stops[0]
    proposed = None
    if isinstance(f, ResidualSolver):
        k1, proposed = f.start(stops, sign, y0)
        n_fun = 0
    else:
        k1 = f(shifted_times([t0.to(plan.real)], [0.0], plan.shift == "all", False, sign)[0], y0)
        n_fun = 1
    if plan.first_step is not None:
        step = torch.zeros_like(t0) + plan.first_step
    elif plan.method.adaptive and proposed is not None:
        step = proposed.clamp(min=plan.min_step)
    elif plan.method.adaptive and isinstance(f, StageSolver) and f.mass_matrix is not None:
        step = f.first_step(stops, sign, y0).clamp(min=plan.min_step)
    elif plan.method.adaptive:
        step = initial_step(f, plan, stops, y0, k1, sign).clamp(min=plan.min_step)
        n_fun += 1
    else:
        step = torch.full_like(t0, float("inf"))
    # nothing goes on from a state that is not finite: a step of no size says so at once
    broken = ~torch.isfinite(y0).all(-1)
    step = torch.where(broken, 0.0, step)
    level = torch.ones_like(t0, dtype=torch.float32)
    zero = torch.zeros_like(t0, dtype=torch.int64)
    no = torch.zeros_like(t0, dtype=torch.bool)
    carry = Carry(
        t=t0,
        y=y0,
        k1=k1,
        scaled=torch.zeros_like(y0, dtype=plan.real),
        step=step,
        error1=level,
        error2=level,
        segment=first_segment(stops, zero),
        rejected_last=no,
        bad_last=broken,
        jump=no,
        attempts=zero,
        n_accepted=zero,
        status=zero,
        running=~no,
    )
    return carry, n_fun


def first_segment(stops: Tensor, segment: Tensor) -> Tensor:
    """Anchors before the start of a trajectory were clamped to it: begin behind them."""
    empty = (stops[1:-1] == stops[0]).long().cumprod(0).sum(0) if stops.shape[0] > 2 else 0
    return segment + empty


def integrate_batched(
    f: Callable[[Tensor, Tensor], Tensor],
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor] = (),
    beside: Beside | None = None,
) -> Record:
    """Solve B trajectories, each with its own steps.

    Parameters
    ----------
    f : flat right-hand side
    anchors : (A, B) float64; equal anchors are segments of no length, which are skipped
    t_eval : (T, B) float64 or None; in any order
    y0 : (B, n)
    inputs : of the system, for its events
    beside : see `Companion`
    """
    monitor = plan.monitor
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).to(torch.float64)
    carry, n_fun = start_carry(f, plan, anchors, sign, y0)
    sampler = BatchSampler(plan, t_eval, anchors, sign, y0)
    events = BatchEventWatch(plan, inputs, anchors[0], y0) if plan.events else None
    watch = None if plan.switch is None else SwitchWatch(plan.switch, plan, len(y0), y0.device)
    dense = plan.keep_stages or sampler.wanted or events is not None or watch is not None
    attempts: list[Attempt] = []
    states: list[Tensor] = []
    stages: list[Tensor] = []
    span = (anchors[-1] - anchors[0]).abs()
    watched = type(monitor).advanced is not Monitor.advanced
    companion = companion_of(f, plan, beside, y0)
    #: (B,) where the next step is to end, just before a terminal event, NaN for anywhere; None: none is near
    aim: Tensor | None = None
    while bool(carry.running.any()):
        stops = anchors if aim is None else ends_at(aim, anchors, carry.segment)
        new, attempt = advance(f, plan, stops, sign, carry, dense)
        if companion is not None:
            new, attempt = _accompanied(companion, plan, stops, sign, carry, new, attempt)
        seen = attempt
        if events is not None:
            aimed = None
            if aim is not None:
                aiming = ~aim.isnan()
                aimed = aiming & attempt.accepted & attempt.lands
                attempt = attempt._replace(lands=torch.where(aiming, torch.zeros_like(attempt.lands), attempt.lands))
                new = _on_the_way(carry, new, aimed, plan.shift)
            found = events.after_step(
                attempt.accepted, attempt.t, attempt.h, attempt.end, carry.y, new.y, attempt.stages, carry.n_accepted, aimed
            )
            if found is not None:
                aim = next_aim(aim, found, aimed)
                attempt = attempt._replace(accepted=attempt.accepted & ~found.again)
                step_again = torch.maximum(carry.step, (found.aim - carry.t).abs())
                new = _stopped(_once_more(carry, new, found.again, step_again), found.stop)
            seen = attempt
            if found is not None:
                seen = attempt._replace(end=torch.where(found.stop.isnan(), attempt.end, found.stop))
        if watch is not None:
            rate = 0.0 if companion is None else companion.rate
            over = watch.after_step(f, attempt.accepted & ~attempt.lands & (new.status == 0), attempt.h, carry.y, attempt.stages, rate)
            if over is not None:
                status = torch.where(over, int(Status.SWITCHED), new.status)
                new = new._replace(status=status, running=torch.where(over, torch.zeros_like(new.running), new.running))
        if sampler.wanted:
            sampler.take(seen, carry.y, carry.n_accepted)
        if plan.keep_states or plan.keep_grid:
            attempts.append(attempt._replace(stages=[]))
        if plan.keep_states:
            states.append(carry.y)
        if plan.keep_stages:
            stages.append(torch.stack(attempt.stages))
        carry = new
        if watched:
            monitor.advanced(float(((carry.t - anchors[0]).abs() / span).min()))
    final = torch.where((carry.status >= 0).unsqueeze(-1), carry.y, float("nan"))
    sampler.finish((carry.status == 0) | ((carry.status == 1) & (carry.t == anchors[-1])), carry.n_accepted, final)
    found = no_events(y0) if events is None else events.record()
    plain = anchors.shape[0] == 2 and events is None and watch is None
    kept = Kept(attempts, states, stages)
    counts = n_fun + evaluations_of_attempt(plan, dense, anchors.shape[0] > 2) * carry.attempts
    if companion is not None:
        counts = counts + companion.n_fun
    return record_of(plan, carry, (sampler.out, sampler.step), kept, y0, counts, plain, found)


def _on_the_way(before: Carry, new: Carry, aimed: Tensor, shift: str) -> Carry:
    """The ends of these rows' steps are no anchors."""
    values = {name: torch.where(aimed, getattr(before, name), getattr(new, name)) for name in ("segment", "running")}
    if shift != "all":
        values["jump"] = torch.where(aimed, torch.zeros_like(new.jump), new.jump)
    return new._replace(**values)


def _accompanied(
    companion: Companion, plan: Plan, stops: Tensor, sign: Tensor, carry: Carry, new: Carry, attempt: Attempt
) -> tuple[Carry, Attempt]:
    """The attempt with steps that are too long for the companion refused, and those that follow bounded by its error."""
    controller, size = plan.control, attempt.h * sign
    # as far as the controller lets it grow: the error was next to nothing
    grown = torch.sub(new.step, size, alpha=0.99 * controller.max_factor)
    ahead, longest = torch.stack([grown, size]).amax(-1).tolist()
    if not companion.due(ahead >= 0, longest):
        return new, attempt
    taken = attempt.accepted
    times = [(attempt.t + attempt.h * c).to(plan.real) for c in plan.method.nodes]
    if plan.shift == "all" or (plan.shift == "inner" and stops.shape[0] > 2):
        end = attempt.lands if plan.shift == "all" else attempt.lands & (carry.segment < stops.shape[0] - 2)
        times = shifted_times(times, plan.method.nodes, carry.jump, end, sign)
    h, scaled = attempt.h.to(plan.real).unsqueeze(-1), new.scaled
    # of a step that was cut short a small error says nothing
    quiet = taken & (plan.norm(scaled) <= QUIET) & ~(attempt.lands & (size < 0.5 * carry.step))
    found = companion.error(times, h, carry.y, carry.k1, scaled, taken, quiet, longest, new.y)
    if found is None:
        return new, attempt
    assert isinstance(found, Tensor)
    passed = taken & (found <= 1.0)
    companion.moved(passed)
    up, down = controller.both(plan.method.error_order + 1, tamed(found), (carry.error1, carry.error2), size)
    new = new._replace(step=torch.where(passed, torch.minimum(new.step, size * up), new.step))
    refused = taken & ~passed
    back = _once_more(carry, new, refused, size * down)
    back = back._replace(rejected_last=torch.where(refused, torch.ones_like(new.rejected_last), new.rejected_last))
    return back, attempt._replace(accepted=passed)


def _once_more(before: Carry, new: Carry, again: Tensor, step: Tensor) -> Carry:
    """The rows ``again`` are where they were, and are to take a step of this size."""

    def kept(old: Tensor, x: Tensor) -> Tensor:
        return torch.where(again if x.dim() == 1 else again.unsqueeze(-1), old, x)

    back = Carry(*(kept(old, x) for old, x in zip(before, new, strict=True)))
    return back._replace(attempts=new.attempts, step=torch.where(again, step, new.step))


def _stopped(carry: Carry, stop: Tensor) -> Carry:
    """Rows whose time in ``stop`` is a number end there."""
    ends = ~stop.isnan()
    return carry._replace(
        t=torch.where(ends, stop, carry.t),
        status=torch.where(ends, int(Status.TERMINAL_EVENT), carry.status),
        running=torch.where(ends, torch.zeros_like(carry.running), carry.running),
    )
