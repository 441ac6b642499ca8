"""Solves with resets: rounds, each an ordinary solve from one event to the next, with whatever happens there between them.

Every round is differentiated like any other solve, in its start and end too, and a reset is a function of tensors: derivatives of all
orders, by every strategy, are those of the parts, and nothing is special about many trajectories, native code or implicit equations. In a
batch every trajectory has its own ends of rounds; those that are done have rounds of no length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import EventsAccumulate, NonFiniteState, SolveError, counted
from ..integrate import Monitor, Status
from ..sensitivity.undeclared import once
from ..system.capture import readable
from ..system.transforms import anywhere, unwrapped
from .arguments import RoundSpan
from .dose_ties import given_apart, reset_apart, ties
from .progress import in_parts
from .round_course import Course, slopes
from .round_ends import check_rules, ended_before, takes_events, with_events
from .round_results import Piece, Taken, joined
from .round_rules import NEAR, Boundary, Rule, off_zero, rearmed, shifted
from .round_task import Progress, Task, needs_rounds, task_of
from .rows import chosen, no_number, still, usable, wide
from .solution import EventRecord, Solution

__all__ = ["in_rounds"]

P = ParamSpec("P")

#: rounds of no length in a row after which no more are tried
_STALLED = 8
#: a value of an event function that is far from zero
_FAR = 1e30
_ZENO = (
    "{} follow each other within rounding of t = {:.8g}: they accumulate there (Zeno behaviour), or a reset leaves the event function "
    "where it is found again at once. Switch to another mode (mode=: a ball at rest, a contact that lasts), make the event terminal, or "
    "stop before this time"
)


def in_rounds(implicit: Callable[..., Solution] | None = None) -> Callable[[Callable[P, Solution]], Callable[P, Solution]]:
    """Makes a front door go on after events with resets, with ``mode=`` for what they switch. ``implicit``: that for implicit equations,
    if it is another one."""

    def with_rounds(door: Callable[P, Solution]) -> Callable[P, Solution]:
        signature = inspect.signature(door)

        @wraps(door)
        def call(*given: P.args, **named: P.kwargs) -> Solution:
            events = named.get("events")
            if "max_events" in named:
                counted(named["max_events"], "max_events")
            if named.get("mode") is None and (events is None or not needs_rounds(events)):
                return door(*given, **named)
            bound = signature.bind(*given, **named)
            bound.apply_defaults()
            with once():
                return _solve(door, implicit, bound.arguments)

        return call

    return with_rounds


def _solve(door: Callable[..., Solution], implicit: Callable[..., Solution] | None, arguments: dict[str, Any]) -> Solution:
    """All rounds, joined."""
    with in_parts(arguments["progress"]) as bar:
        task, run = task_of(door, implicit, arguments | {"progress": bar})
        while True:
            _round(task, run)
            if not anywhere(run.going):
                return joined(task.times, task.rules, run.pieces, run.at, run.status, task.batched)
            if isinstance(bar, Monitor):
                bar.parted()


def _round(task: Task, run: Progress) -> None:
    """One round, and the resets at its ends."""
    going, resting = run.going, run.at.still()
    if run.rest is not None and task.implicit is None:
        # the derivative of fun may be infinite where a trajectory ended, and consistent values are known there alone
        resting = run.rest
        run.at = replace(run.at, mode=chosen(going, run.at.mode, resting.mode))
    at, end = run.at, task.end
    for rule, given in zip(task.doses, run.given, strict=True):
        following = rule.following(given)
        end = chosen((following < end).detach(), following, end)
    # trajectories that failed are NaN, which a round of no length would take for one more failure
    lost, origin = run.status < 0, still(run.pieces[0].y0) if run.pieces else at.y
    rest = chosen(lost, task.start.detach(), resting.t)
    t, end, y = chosen(going, at.t, rest), chosen(going, end, rest), chosen(going, at.y, chosen(lost, origin, resting.y))
    # implicit equations tell no slope in a span of no length: doses there move by themselves, and what is there follows behind them
    begun = going & (end == t).detach() if task.implicit is not None else torch.zeros_like(going)
    end = chosen(begun, t, end)
    span = RoundSpan(t, end, ~going | begun)
    sol, taken, last = _solved(task, run, span, y)
    hits = [_occurred(rule, record.t, going) for rule, record in zip(task.watched, sol.events, strict=True)]
    status = torch.as_tensor(sol.status, device=t.device)
    # the last ones of events that accumulate are too close for a step
    status = torch.where((status == int(Status.STEP_TOO_SMALL)) & (run.stalled > 0), int(Status.EVENTS_ACCUMULATE), status)
    failed = going & (status < 0)
    slope = _last(task, sol.yp, sol, taken)
    if anywhere(begun):
        last = chosen(begun, tree_map(lambda x: x[0], sol.y), last)
        slope = None if slope is None else chosen(begun, tree_map(lambda x: x[0], sol.yp), slope)
    left = _left(task, sol, hits, Boundary(end, last, at.mode, slope))
    on, piece = _resets(task, run, sol, hits, left, going & ~failed, begun)
    happened = torch.stack([torch.zeros_like(going), *(hit for rule, hit in zip(task.rules, piece[0], strict=True) if rule.ends)]).any(0)
    bad = _bad(task, on, going & ~failed, piece[0])
    status, failed = torch.where(bad, int(Status.NON_FINITE), status), failed | bad
    on = _given_up(task.settled(on, task.infused(run.given), happened, lost | failed, origin), failed)
    counts = [count + hit for count, hit in zip(run.counts, hits, strict=True)]
    none = torch.zeros_like(going)
    ended = torch.stack([none, *(hit for rule, hit in zip(task.watched, hits, strict=True) if rule.ends)]).any(0)
    reached = [
        ((count >= rule.terminal) & hit, record.t)
        for rule, count, hit, record in zip(task.watched, counts, hits, sol.events, strict=True)
        if rule.terminal
    ]
    stop = torch.stack([none, *(hit for hit, _ in reached)]).any(0)
    # a time that a trajectory is at already is its end
    final = going & ~stop & ~failed & (on.t == task.end).detach()
    # and so is that of a terminal event, whatever else is there
    last_time, stopping = task.end, stop & piece[-1] & ~failed
    for hit, times in reversed(reached):
        last_time = chosen(hit & stopping, times[0].to(last_time.dtype), last_time) if times.shape[0] else last_time
    course, arriving = Course(task, on, task.infused(run.given), ~going | failed), (final & (happened | begun)) | stopping
    arrived = course.by(torch.where(arriving, last_time - on.t, 0.0)) if anywhere(arriving) else on
    if arrived is not on:
        arrived = task.settled(arrived, course.infused, arriving, ~arriving, origin)
    if arrived.integral is not None:
        sol = replace(sol, quadrature=tree_map(torch.add, sol.quadrature, arrived.integral))
    run.rest = Boundary(t, y, at.mode).still()
    run.pieces.append(Piece(sol, going, t, on.t, y, left, on, arrived, course.to, begun, *piece, taken))
    run.status = torch.where(going, torch.where(failed, status, torch.where(stop, int(Status.TERMINAL_EVENT), 0)), run.status)
    mode, last = chosen(going, on.mode, at.mode) if at.mode else (), arrived
    yp = chosen(going, last.yp, at.yp) if last.yp is not None and at.yp is not None else last.yp
    run.at = Boundary(chosen(going, last.t, at.t), chosen(going, last.y, at.y), mode, yp)
    run.going = going & ~stop & ~failed & ~final
    run.counts, run.happened = counts, run.happened + ended
    short = (on.t - t).detach().abs() <= task.resolution
    run.stalled = torch.where(short & ended, run.stalled + 1, 0)
    _check_progress(task, run, piece[0])
    away = [off_zero(rule, hit, left, task.args) for rule, hit in zip(task.watched, hits, strict=True)]
    run.off = [torch.where(short & ~hit, was, now) for hit, was, now in zip(hits, run.off, away, strict=True)]
    run.fired = [(now | (short & was)) & run.going for now, was in zip(_at_end(task, hits, sol, on.t, going), run.fired, strict=True)]
    infused = task.infused(run.given)
    begun, arguments = Boundary(t, y, at.mode), (task.args, task.slope(infused), task.scale)
    moving = task.moving(on, infused, torch.stack([none, *run.fired]).any(0))
    run.shifts = [
        rearmed(rule, fired, off, begun, shift, moving, *arguments)
        for rule, fired, off, shift in zip(task.watched, run.fired, run.off, run.shifts, strict=True)
    ]


def _resets(
    task: Task, run: Progress, sol: Solution, hits: list[Tensor], left: Boundary, alive: Tensor, begun: Tensor
) -> tuple[Boundary, tuple[list[Tensor], list[EventRecord], list[Any], Tensor]]:
    """What follows after all that happens at the ends of a round, in the order of the user; and of each rule where it does, the record of
    the round, and the states that it gave. Notes which doses are given."""
    on, states = left, []
    every, records = [], []
    due = [
        alive & ~given & ((rule.stops - left.t).detach() <= task.resolution) for rule, given in zip(task.doses, run.given, strict=True)
    ]
    came = Course(task, left, task.infused(run.given), ~alive)
    tied = ties(task, due, hits, sol.events, begun & alive, left.t)
    watched, doses = iter(zip(hits, sol.events, strict=True)), iter(range(len(task.doses)))
    for rule in task.rules:
        if isinstance(rule, Rule):
            hit, record = next(watched)
            every.append(hit)
            # what one reset has lost is nothing for the next one
            on_it = hit & alive
            if rule.resets and anywhere(on_it & tied):
                on, given = reset_apart(task, run, rule, on_it, record.t[0].to(on.t.dtype), on, tied, ~alive)
            else:
                on, given = rule.applied(on_it, on, task.args, task.spec) if rule.ends and anywhere(on_it) else (on, None)
            if rule.resets and anywhere(hit):
                given, alive = on.y if given is None else given, alive & ~task.no_number(on.y)
        else:
            k = next(doses)
            hit, t, y = due[k].any(0), left.t, left.y
            every.append(hit)
            if anywhere(hit & tied):
                on, given, way = given_apart(task, run, k, due[k], on, tied, ~alive)
                before = came.by(way)
                t, y = before.t, before.y
            else:
                on, given = rule.applied(due[k], on)
                run.given[k] = run.given[k] | due[k]
            lines = int(anywhere(hit))
            nan = torch.where(hit, t, float("nan"))
            record = EventRecord(nan.unsqueeze(0)[:lines], tree_map(lambda x, n=lines: x.unsqueeze(0)[:n], y))
        records.append(record)
        states.append(given)
    return on, (every, records, states, tied)


def _bad(task: Task, on: Boundary, alive: Tensor, hits: list[Tensor]) -> Tensor:
    """Where ``(R)`` what happened, by ``hits`` of all rules, left a state that is no number; raises `NonFiniteState` if that is wanted."""
    bad = alive & task.no_number(on.y)
    if task.options["throw"] and anywhere(bad):
        row, t, named, where = _first(task, bad, on, hits)
        text = f"the state became non-finite by {named or 'an event'} {where}: look at what the reset returns, or the amounts of doses"
        raise NonFiniteState(text, t=t, trajectory=row)
    return bad


def _given_up(at: Boundary, wrong: Tensor) -> Boundary:
    """Of trajectories that are ``wrong`` nothing goes on: what the way back says of that is nothing for the rounds before, nor for
    parameters shared in them."""
    if not anywhere(wrong):
        return at
    state = (at.y,) if at.yp is None else (at.y, at.yp)
    state = chosen(wrong, tree_map(lambda x: torch.full_like(x.detach(), no_number(x)), state), state)
    return replace(at, y=state[0], yp=None if at.yp is None else state[1])


def _first(task: Task, wrong: Tensor, at: Boundary, hits: list[Tensor]) -> tuple[int | None, float, str, str]:
    """The first trajectory that is ``wrong``, if there are many, its time, what happened to it, and where that is in words."""
    flags, times = unwrapped(wrong).reshape(-1), unwrapped(at.t.detach())
    row = int(flags.to(torch.int64).argmax())
    named = [rule.title for rule, hit in zip(task.rules, hits, strict=True) if readable(hit) and bool(hit.reshape(-1)[row])]
    t = float(times.reshape(-1)[row if times.numel() > 1 else 0])
    many = flags.numel() > 1
    return row if many else None, t, ", ".join(named), f"at t = {t:.8g}" + (f" in trajectory {row}" if many else "")


def _solved(task: Task, run: Progress, span: RoundSpan, y: Any) -> tuple[Solution, Taken | None, Any]:
    """The solve of one round, which of the sample times it was asked for, and the states at its ends if there are no events."""
    options, mode = dict(task.options), run.at.mode
    if run.at.yp is not None and "yp0" in options:
        # of later rounds all values are consistent
        options |= {"yp0": run.at.yp, "consistent": "trust", "y0_bounds": None}
    infused = task.infused(run.given)
    args = (*mode, *task.args, *infused)
    real = task.spec.real_dtype
    # trajectories that are done have no events, though they may lie on one
    shifts = [torch.where(span.idle, _FAR, shift).to(real) for shift in run.shifts]
    events = [shifted(rule, shift, len(infused)) for rule, shift in zip(task.watched, shifts, strict=True)]

    def solve(span: RoundSpan, y: Any, args: tuple[Any, ...], **others: Any) -> Solution:
        try:
            return task.door(task.fun, span, y, args=args, **(options | others))
        except SolveError as error:
            row = error.trajectory or 0
            stalled = run.stalled.reshape(-1)
            if not readable(stalled) or row >= len(stalled) or not stalled[row]:
                raise
            raise EventsAccumulate(_ZENO.format("events", error.t), t=error.t, trajectory=error.trajectory) from error

    if not events or takes_events(options["gradient"]):
        samples, taken = _samples(task, run.going, span.start, span.end)
        sol = solve(span, y, args, events=events or None, t_eval="steps" if task.times.steps else samples)
        return sol, taken, _last(task, sol.y, sol, taken)
    check_rules(task.watched, options["gradient"])
    known = RoundSpan(span.start.detach(), span.end.detach(), span.idle)
    with torch.no_grad():
        first = solve(known, still(y), still(args), events=events, t_eval=None, gradient=None, quadrature=None, dense_output=False)
    span = ended_before(first, span)
    samples, taken = _samples(task, run.going, span.start, span.end)
    # the bar, if any, has shown this part
    sol = solve(span, y, args, events=None, t_eval="steps" if task.times.steps else samples, progress=False)
    last, slope = _last(task, sol.y, sol, taken), task.slope(infused)
    bound = None if slope is None else lambda t, y: slope(t, y, mode)
    quadrature = options["quadrature"]
    integrand = None if quadrature is None else lambda t, y: quadrature(t, y, *usable(args))
    end = Boundary(span.end, last, mode, _last(task, sol.yp, sol, taken))
    if slope is None and end.yp is None:
        # methods with the mass matrix in their steps have no slopes
        with torch.no_grad():
            lost = ~torch.isfinite(task.spec.flatten(last)).all(-1).reshape(span.idle.shape)
            end = replace(end, yp=still(slopes(task, end.still(), still(infused), lost)[0]))
    return with_events(task.watched, first, sol, end, (*mode, *task.args), bound, integrand, real, task.times.steps), taken, last


def _samples(task: Task, going: Tensor, t: Tensor, end: Tensor) -> tuple[Tensor | None, Taken | None]:
    """Sample times of a round, with its end on both sides, and which of the user's they are; None for the two ends.

    Those that are not within the round are moved to its ends.
    """
    every = task.times.samples
    if every is None:
        return None, None
    every = every if task.batched else every[:, 0]
    sign = task.sign
    with torch.no_grad():
        # what is at the time of an event but for rounding is at it
        slack = NEAR * torch.finfo(torch.float64).eps * torch.maximum(every.abs(), t.abs())
        ahead = going & (sign * (every - t) >= -slack)
        inside = ahead & (sign * (every - end) <= 0)
        along = sign * (every[-1] - every[0]) >= 0
    low, high = 0, len(every)
    if readable(ahead):
        wanted = ahead.reshape(len(every), -1).any(1).nonzero()[:, 0]
        low, high = (int(wanted[0]), int(wanted[-1]) + 1) if len(wanted) else (0, 0)
    start, stop = t.detach(), end.detach()
    every, inside, ahead = every[low:high], inside[low:high], ahead[low:high]
    low_end, high_end = torch.minimum(start, stop), torch.maximum(start, stop)
    own = every + (torch.minimum(torch.maximum(every, low_end), high_end) - every).detach()
    kept = torch.where(inside, own, torch.where(ahead, stop, start))
    first, last = torch.where(along, t, end), torch.where(along, end, t)
    return torch.cat([first.unsqueeze(0), kept, last.unsqueeze(0)]), Taken(low, high, inside, along)


def _occurred(rule: Rule, t: Tensor, going: Tensor) -> Tensor:
    """Whether the round of a trajectory ended by this event, ``(R)``."""
    if not rule.ends or t.shape[0] == 0:
        return torch.zeros_like(going)
    return going & ~t[0].detach().isnan()


def _last(task: Task, values: Any, sol: Solution, taken: Taken | None) -> Any:
    """Of ``values`` at ``sol.t`` those at the ends of a round in which there is no event."""
    if values is None:
        return None
    if task.times.steps:
        place = (~sol.t.detach().isnan()).sum(0, keepdim=True) - 1
        return tree_map(lambda x: x.take_along_dim(wide(place, x), 0)[0], values)
    if taken is None:
        return tree_map(lambda x: x[-1], values)
    return tree_map(lambda x: chosen(taken.along, x[-1], x[0]), values)


def _left(task: Task, sol: Solution, hits: list[Tensor], end: Boundary) -> Boundary:
    """Time and state at the ends of the round, before the resets: of several events at one time the last one ends the solve, whose slopes
    and integrals are those at its own time."""
    at = end
    for rule, hit, record in zip(task.watched, hits, sol.events, strict=True):
        if rule.ends and record.t.shape[0]:
            state = tree_map(lambda x: x[0], record.y)
            at = Boundary(chosen(hit, record.t[0].to(at.t.dtype), at.t), chosen(hit, state, at.y), at.mode, at.yp)
    return at


def _at_end(task: Task, hits: list[Tensor], sol: Solution, t: Tensor, going: Tensor) -> list[Tensor]:
    """As ``hits``, with events that are recorded only and were at the end of the round too."""
    out = []
    for rule, hit, record in zip(task.watched, hits, sol.events, strict=True):
        if not rule.ends and record.t.shape[0]:
            close = (record.t - t).detach().abs() <= task.resolution
            hit = going & close.any(0)
        out.append(hit)
    return out


def _check_progress(task: Task, run: Progress, hits: list[Tensor]) -> None:
    """Raise `EventsAccumulate`, or give trajectories up, where there are too many events or where they lead nowhere."""
    zeno, many = run.going & (run.stalled >= _STALLED), run.going & (run.happened >= task.max_events)
    wrong = zeno | many
    if not anywhere(wrong):
        return
    if task.options["throw"]:
        row, t, named, where = _first(task, wrong, run.at, hits)
        what = "occurrences of " + (named or "events")
        if anywhere(zeno):
            text = _ZENO.format(what, t)
        else:
            text = (
                f"there were max_events = {task.max_events} events with resets, the last ones {what}, {where}. If they are meant, give a "
                "larger max_events; if they come ever faster (Zeno behaviour), switch to another mode (mode=) or make the event terminal"
            )
        raise EventsAccumulate(text, t=t, trajectory=row)
    run.at = _given_up(run.at, wrong)
    run.status = torch.where(wrong, int(Status.EVENTS_ACCUMULATE), run.status)
    run.going = run.going & ~wrong
