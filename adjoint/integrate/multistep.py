"""The loop of multistep methods: variable order and step for every trajectory, in lock step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch_events import BatchEventWatch, ends_at, next_aim, no_events
from .batch_sampling import BatchSampler
from .batched import first_segment
from .clock import aim_step, why_stuck
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
    sampler = BatchSampler(plan, t_eval, anchors, sign, y0, False)
    events = BatchEventWatch(plan, inputs, t, y0) if plan.events else None
    kept: list[tuple[Tensor, ...]] = []
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
            sampler.take(_Attempt(t, upto, h, passed, list(stages.unbind())), y, accepted_count)
        if plan.keep_states or plan.keep_stages:
            kept.append((passed, t, h, segment, lands, trial.y, stages, trial.extra))
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
    packed = _pack(kept, t, segment, accepted_count, y0, plan.method.n_stages, solver.idle)
    zero = torch.zeros_like(attempts)
    return Record(
        final=final, last=last, scaled_error=scaled, samples=sampler.out, sample_step=sampler.step,
        n_steps=attempts, n_accepted=accepted_count, n_rejected=attempts - accepted_count, n_fun=zero, status=status, t_final=t,
        **(no_events(y0) if events is None else events.record()), n_jac=zero, n_factorizations=zero, n_solves=zero, n_newton=zero, **packed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Attempt:
    t: Tensor
    end: Tensor
    h: Tensor
    accepted: Tensor
    stages: list[Tensor]


def _pack(
    kept: list[tuple[Tensor, ...]], t: Tensor, segment: Tensor, counts: Tensor, y0: Tensor, n_stages: int, idle: Tensor
) -> dict[str, Tensor]:
    """Move the accepted steps of every trajectory to the front, padded with steps of size zero at its end."""
    rows, n = y0.shape
    most = int(counts.max()) if rows and kept else 0
    kind = {"dtype": torch.float64, "device": y0.device}
    if not most:
        return {
            "states": y0.unsqueeze(0), "stages": y0.new_empty((0, n_stages, rows, n)), "t": torch.empty((0, rows), **kind),
            "h": torch.empty((0, rows), **kind), "segment": segment.new_empty((0, rows)),
            "lands": torch.empty((0, rows), dtype=torch.bool, device=y0.device), "extra": torch.empty((0, len(idle), rows), **kind),
        }  # fmt: skip
    accepted = torch.stack([k[0] for k in kept])
    place = torch.where(accepted, accepted.cumsum(0) - 1, most)
    attempt = torch.arange(len(kept), device=y0.device).unsqueeze(-1).expand_as(place)
    index = place.new_full((most + 1, rows), len(kept)).scatter_(0, place, attempt)[:most]

    def pick(values: list[Tensor], behind: Tensor, row_dim: int) -> Tensor:
        every = torch.stack([*values, behind]).movedim(row_dim + 1, 1)
        where = index.reshape(most, rows, *[1] * (every.dim() - 2))
        return every.gather(0, where.expand(most, *every.shape[1:])).movedim(1, row_dim + 1)

    columns = list(zip(*kept, strict=True))
    last = pick(list(columns[5]), torch.zeros_like(y0), 0)
    filled = torch.arange(most, device=y0.device).unsqueeze(-1) < counts
    # behind the last step the state stays
    end = torch.where(counts.unsqueeze(-1) > 0, last.gather(0, (counts - 1).clamp(min=0).reshape(1, -1, 1).expand(1, -1, n))[0], y0)
    states = torch.cat([y0.unsqueeze(0), torch.where(filled.unsqueeze(-1), last, end)])
    return {
        "states": states,
        "stages": pick(list(columns[6]), torch.zeros_like(columns[6][0]), 1),
        "t": pick(list(columns[1]), t, 0),
        "h": pick(list(columns[2]), torch.zeros_like(t), 0),
        "segment": pick(list(columns[3]), torch.zeros_like(segment), 0),
        "lands": pick(list(columns[4]), torch.zeros_like(columns[4][0]), 0),
        "extra": pick(list(columns[7]), idle.unsqueeze(-1).expand(-1, rows), 1),
    }
