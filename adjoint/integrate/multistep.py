"""The loop of multistep methods: variable order and step for every trajectory, in lock step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch_events import BatchEventWatch, ends_at, next_aim, no_events
from .batch_sampling import BatchSampler
from .batched import Attempt, first_segment
from .clock import aim_step, why_stuck
from .packing import Ended, Kept, record_of
from .plan import Monitor, Plan, Record, Status, shifted_times
from .work import StageWork

__all__ = ["Decision", "MultistepSolver", "Trial", "integrate_multistep"]


class Trial(NamedTuple):
    """An attempted step: state at its end and error estimate (B, n), whether there are any (B,), stages (S, B, n), what is recorded
    beside them (E, B), and what its solver wants to know of it later."""

    y: Tensor
    estimate: Tensor
    solved: Tensor
    stages: Tensor
    extra: Tensor
    kept: Any


class Decision(NamedTuple):
    """What became of a `Trial`: masks (B,), but for ``error`` (B,), its norm, and ``scale`` (B, n), the size of the state.

    ``passed`` and ``failed`` (there was no estimate) and ``rejected`` exclude each other; ``landed`` has reached its anchor, ``restart``
    begins anew from there; ``running`` goes on.
    """

    running: Tensor
    passed: Tensor
    failed: Tensor
    rejected: Tensor
    restart: Tensor
    error: Tensor
    scale: Tensor


class MultistepSolver(ABC):
    """A multistep method at work: it holds the history of every trajectory, the first row of the table ``D`` (M, B, n) its state."""

    D: Tensor
    work: StageWork
    stuck: Tensor

    @abstractmethod
    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """Begin at ``anchors[0]``; the size (positive) of the first step."""

    @abstractmethod
    def resize(self, factor: Tensor, which: Tensor) -> None:
        """The next step of some rows is to be ``factor`` as long as was said last."""

    @abstractmethod
    def attempt(self, when: Tensor, h: Tensor, running: Tensor) -> Trial:
        """A step of the ``running`` rows by ``h`` to where ``fun`` sees the time ``when``."""

    @abstractmethod
    def accept(self, trial: Trial, passed: Tensor, restart: Tensor, after: Tensor) -> None:
        """Take over the ``passed`` rows; ``after``: the time that ``fun`` sees at the start of the next step."""

    @abstractmethod
    def propose(self, trial: Trial, decision: Decision) -> Tensor:
        """Choose the next orders; the factors (B,) of the next sizes."""

    @property
    @abstractmethod
    def idle(self) -> Tensor:
        """``extra`` (E,) of no step."""


def integrate_multistep(
    solver: MultistepSolver, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor] = ()
) -> Record:
    """Solve B trajectories; arguments as for `integrate_batched`."""
    rows = y0.shape[0]
    device, real = y0.device, plan.real
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).to(torch.float64)
    last_segment = anchors.shape[0] - 2
    t = anchors[0].clone()
    step = solver.start(anchors, sign, y0)
    segment = first_segment(anchors, torch.zeros(rows, dtype=torch.int64, device=device))
    attempts, accepted_count, status = (torch.zeros_like(segment) for _ in range(3))
    # nothing is done over a span of no length
    running = anchors[-1] != anchors[0]
    # nothing goes on from a state that is not finite: a step of no size says so at once
    bad_last, scaled = ~torch.isfinite(y0).all(-1), torch.zeros_like(y0, dtype=real)
    step = torch.where(bad_last, 0.0, step)
    sampler = BatchSampler(plan, t_eval, anchors, sign, y0)
    events = BatchEventWatch(plan, inputs, t, y0) if plan.events else None
    kept = Kept([], [], [], extra=[], idle=solver.idle)
    monitor, watched = plan.monitor, type(plan.monitor).advanced is not Monitor.advanced
    span = (anchors[-1] - anchors[0]).abs()
    shifts = plan.shift != "none" and last_segment > 0
    aim: Tensor | None = None
    while bool(running.any()):
        stops = anchors if aim is None else ends_at(aim, anchors, segment)
        target = stops.gather(0, segment.clamp(max=last_segment).unsqueeze(0) + 1).squeeze(0)
        remaining = (target - t).abs()
        aimed_at = aim_step(plan, step, t, remaining, attempts)
        status = torch.where(running & aimed_at.stuck, why_stuck(aimed_at, bad_last), status)
        running = running & ~aimed_at.stuck
        lands = running & aimed_at.lands
        size = torch.where(lands, remaining, aimed_at.size)
        if not bool(running.any()):
            break
        differs = running & (size != step)
        if bool(differs.any()):
            solver.resize(size / step, differs)
            step = torch.where(differs, size, step)
        attempts = attempts + running
        h = torch.where(running, sign * step, 0.0)
        end = torch.where(lands, target, t + h)
        aimed = None if aim is None else lands & ~aim.isnan()
        lands = lands if aim is None else lands & aim.isnan()
        inner = lands & (segment < last_segment)
        when = shifted_times([end.to(real)], [1.0], False, inner, sign)[0] if shifts else end.to(real)
        y, trial = solver.D[0], solver.attempt(when, h, running)
        scale = torch.maximum(trial.y.abs(), y.abs())
        scaled = torch.where(running.unsqueeze(-1), plan.scaled(trial.estimate, scale).abs(), scaled)
        error = plan.norm(scaled)
        failed = running & ~trial.solved
        passed = running & trial.solved & (error <= 1.0)
        rejected = running & trial.solved & ~passed
        bad_last = torch.where(running, failed, bad_last)
        # ---- accepted rows
        stages = torch.where(passed.reshape(1, -1, 1), trial.stages, 0.0)
        stop = None
        if events is not None:
            aimed = None if aimed is None else aimed & passed
            found = events.after_step(passed, t, h, end, y, trial.y, stages.unbind(), accepted_count, aimed)
            if found is not None:
                aim, stop = next_aim(aim, found, aimed), found.stop
                # a step over a terminal event is taken again, to end before it
                passed = passed & ~found.again
        if sampler.wanted:
            upto = end if stop is None else torch.where(stop.isnan(), end, stop)
            sampler.take(Attempt(t, upto, h, segment, lands, passed, list(stages.unbind())), y, accepted_count)
        if plan.keep_states or plan.keep_stages:
            kept.attempts.append(Attempt(t, end, h, segment, lands, passed, []))
            kept.states.append(y)
            kept.stages.append(stages)
            kept.extra.append(trial.extra)
        landed = passed & lands
        finished = landed & (segment >= last_segment)
        restart = landed & ~finished
        after = shifted_times([end.to(real)], [0.0], inner, False, sign)[0] if shifts else end.to(real)
        solver.accept(trial, passed, restart, after)
        t = torch.where(passed, end, t)
        accepted_count = accepted_count + passed
        segment = segment + landed
        running = running & ~finished
        if stop is not None:
            ends = ~stop.isnan()
            t, running = torch.where(ends, stop, t), running & ~ends
            status = torch.where(ends, int(Status.TERMINAL_EVENT), status)
        factor = solver.propose(trial, Decision(running, passed, failed, rejected, restart, error, scale))
        changed = (factor != 1.0) & (running | restart)
        if bool(changed.any()):
            solver.resize(factor, changed)
            step = torch.where(changed, step * factor, step)
        if watched:
            monitor.advanced(float(((t - anchors[0]).abs() / span).min()))
    last = solver.D[0]
    final = torch.where((status >= 0).unsqueeze(-1), last, float("nan"))
    sampler.finish((status == 0) | ((status > 0) & (t == anchors[-1])), accepted_count, final)
    ended = Ended(t, last, scaled, step, segment, attempts, accepted_count, status, running)
    found = no_events(y0) if events is None else events.record()
    return record_of(plan, ended, (sampler.out, sampler.step), kept, y0, torch.zeros_like(attempts), False, found)
