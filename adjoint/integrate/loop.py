"""The loop over steps: one, for one trajectory and for many, for methods of one step and of many.

What a step is, is the affair of a `Stepper`; where it ends, what lies in it, who ends with it, and what is kept of it stands here: of one
trajectory as steps come, of many packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clock import Timeline, aim_step, why_stuck
from .events import EventWatch
from .numbers import Decision, Measure, absent, any_of, choose, lost, negated, unset
from .plan import Monitor, Plan, Record, Status
from .recording import Recording
from .sampling import Sampler
from .stepper import Attempt, Fate, Stepper, Trial
from .stiffness import SwitchWatch

__all__ = ["Ended", "LogOfMany", "LogOfOne", "Walk", "no_events", "record_of"]

class Ended(NamedTuple):
    """Where a loop came to; see `Record`. ``scaled``: None where there was no step."""

    t: Measure
    y: Tensor
    scaled: Tensor | None
    step: Measure
    segment: Any
    attempts: Any
    n_accepted: Any
    status: Any
    running: Decision


def record_of(plan: Plan, line: Timeline, ended: Ended, sampler: Any, log: Any, events: Any, n_fun: Any, plain: bool) -> Record:
    """The record of a solve; ``events``: None where none are looked for; ``plain``: see `LogOfMany.steps`."""
    device, flat = line.anchors.device, ended.y.shape if line.rows is not None else (1, ended.y.numel())

    def rows(x: Any, kind: torch.dtype = torch.int64) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor([x], dtype=kind, device=device)

    last = ended.y.reshape(flat)
    final = lost(ended.status < 0, last)
    at_end = (ended.status == 0) | ((ended.status == 1) & (ended.t == line.end))
    values, sample_step = sampler.finish(at_end, ended.n_accepted, final)
    scaled, nothing = ended.scaled, rows(ended.attempts * 0)
    return Record(
        final=final,
        last=last,
        scaled_error=torch.zeros_like(last, dtype=plan.real) if scaled is None else scaled.reshape(flat).abs(),
        samples=values.reshape(len(values), *last.shape),
        sample_step=sample_step,
        n_steps=rows(ended.attempts),
        n_accepted=rows(ended.n_accepted),
        n_rejected=rows(ended.attempts - ended.n_accepted),
        n_fun=rows(n_fun),
        status=rows(ended.status),
        t_final=rows(ended.t, torch.float64),
        next_step=rows(ended.step, torch.float64),
        **(no_events(last) if events is None else events.record()),
        **dict.fromkeys(("n_jac", "n_factorizations", "n_solves", "n_newton"), nothing),
        **log.steps(ended, plain),
    )


def no_events(like: Tensor) -> dict[str, Tensor]:
    """The fields of `Record` of a solve that looks for none."""
    nothing = torch.empty(0, dtype=torch.int64, device=like.device)
    return {"event_id": nothing, "event_row": nothing, "event_step": nothing, "event_t": nothing.double()}


class LogOfOne:
    """The accepted steps of one trajectory.

    ``idle``: what a stepper records beside, of no step; None: nothing. Stages are kept of the steps for which it is said, or of all.
    """

    def __init__(self, plan: Plan, y0: Tensor, idle: Tensor | None) -> None:
        self.plan, self._idle = plan, idle
        self._t: list[float] = []
        self._h: list[float] = []
        self._segment: list[int] = []
        self._lands: list[bool] = []
        self.states = [y0]
        self._stages: list[tuple[int, Tensor]] = []
        self._extra: list[Tensor] = []

    def add(self, step: Attempt, trial: Trial, accepted: bool, y: Tensor, stages: bool) -> None:
        """A step that was accepted."""
        if stages or self.plan.keep_stages:
            self._stages.append((len(self._t), torch.stack(list(trial.stages(accepted)))))
        self._t.append(step.t)
        self._h.append(step.h)
        self._segment.append(step.segment)
        self._lands.append(step.lands)
        if self.plan.keep_states:
            self.states.append(trial.y)
        if self._idle is not None and (self.plan.keep_states or self.plan.keep_grid):
            self._extra.append(trial.extra)

    def detach(self) -> None:
        """Let go of what autograd has recorded."""
        self.states = [x.detach() for x in self.states]

    def lose(self, step: int) -> float:
        """Forget this step and all later ones; where it began."""
        begun = self._t[step]
        self._stages = [x for x in self._stages if x[0] < step]
        del self.states[step + 1 :], self._t[step:], self._h[step:], self._segment[step:], self._lands[step:], self._extra[step:]
        return begun

    def steps(self, ended: Ended, plain: bool) -> dict[str, Tensor]:
        """The fields of `Record` about steps."""
        flat, y0, n_all = (1, ended.y.numel()), self.states[0], len(self.plan.method.nodes)

        def column(values: Sequence[float], kind: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=kind, device=y0.device).reshape(-1, 1)

        states, stages, extra = self.states, [x for _, x in self._stages], {}
        if self._idle is not None:
            kept = torch.stack(self._extra) if self._extra else self._idle.new_empty((0, len(self._idle)))
            extra["extra"] = kept.to(y0.device).unsqueeze(-1)
        return extra | {
            "states": torch.stack(states).reshape(len(states), *flat) if self.plan.keep_states else y0.new_empty((0, *flat)),
            "stages": torch.stack(stages).reshape(len(stages), len(stages[0]), *flat) if stages else y0.new_empty((0, n_all, *flat)),
            "t": column(self._t, torch.float64),
            "h": column(self._h, torch.float64),
            "segment": column(self._segment, torch.int64),
            "lands": column(self._lands, torch.bool),
        }


class LogOfMany:
    """What the attempts of many trajectories did; arguments as for `LogOfOne`."""

    def __init__(self, plan: Plan, y0: Tensor, idle: Tensor | None) -> None:
        self.plan, self._y0, self._idle = plan, y0, idle
        #: start, size, segment, whether it lands, whether it was accepted
        self._attempts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        self._states: list[Tensor] = []
        self._stages: list[Tensor] = []
        self._extra: list[Tensor] = []

    def add(self, step: Attempt, trial: Trial, accepted: Tensor, y: Tensor, stages: bool) -> None:
        """An attempt from ``y``, which some trajectories accepted."""
        plan = self.plan
        if plan.keep_states or plan.keep_grid:
            self._attempts.append((step.t, step.h, step.segment, step.lands, accepted))
            if self._idle is not None:
                self._extra.append(trial.extra)
        if plan.keep_states:
            self._states.append(y)
        if plan.keep_stages:
            self._stages.append(torch.stack(list(trial.stages(accepted))))

    def steps(self, ended: Ended, plain: bool) -> dict[str, Tensor]:
        """Move the accepted steps of every trajectory to the front, padded with steps of size zero at its end.

        ``plain``: there is one segment, at whose end the last step lands.
        """
        y0, idle, n_all = self._y0, self._idle, len(self.plan.method.nodes)
        rows, n = y0.shape
        attempts, states, stages = self._attempts, self._states, self._stages
        extra = {}
        if idle is not None:
            extra["extra"] = idle.new_empty((0, len(idle), rows))
        if not attempts:
            kind = {"dtype": torch.float64, "device": y0.device}
            return extra | {
                "states": y0.unsqueeze(0),
                "stages": y0.new_empty((0, n_all, rows, n)),
                "t": torch.empty((0, rows), **kind),
                "h": torch.empty((0, rows), **kind),
                "segment": ended.segment.new_empty((0, rows)),
                "lands": ended.running.new_empty((0, rows)),
            }
        t, h, segments, landings, taken = zip(*attempts, strict=True)
        accepted = torch.stack(taken)
        most = int(ended.n_accepted.max()) if rows else 0
        # index[j, b]: which attempt was the j-th accepted one of trajectory b. Rejected ones write to a last row that is dropped; places
        # that no attempt writes to name the entry behind all attempts: a step of size zero at the final state
        place = torch.where(accepted, accepted.cumsum(0) - 1, most + 1)
        attempt = torch.arange(len(attempts), device=y0.device).unsqueeze(-1).expand_as(place)
        index = place.new_full((most + 2, rows), len(attempts)).scatter_(0, place, attempt)[: most + 1]

        of_rows = (index * rows + torch.arange(rows, device=index.device)).reshape(-1)

        def pick(values: Sequence[Tensor], behind: Tensor, count: int) -> Tensor:
            """``count`` rows of what each trajectory, their first dimension, had at its accepted attempts."""
            # one index for whole rows, which is quicker than one for each number
            every = torch.stack([*values, behind]).flatten(0, 1)
            place = of_rows[: count * rows]
            # pairs are copied quickest as complex numbers
            paired = every.dim() == 2 and every.shape[1] == 2 and every.dtype in (torch.float32, torch.float64)
            got = torch.view_as_real(torch.view_as_complex(every).index_select(0, place)) if paired else every.index_select(0, place)
            return got.unflatten(0, (count, rows))

        if not states:
            all_states = y0.new_empty((0, rows, n))
        else:
            all_states = pick(states, ended.y, most + 1)
        if stages:
            # (I, S, B, n) with the trajectories in front of the stages, as `pick` wants them
            turned = [x.movedim(0, 1) for x in stages]
            all_stages = pick(turned, torch.zeros_like(turned[0]), most).movedim(2, 1)
        else:
            all_stages = y0.new_empty((0, n_all, rows, n))
        if plain:
            segment = index.new_zeros((most, rows))
            lands = (torch.arange(most, device=y0.device).unsqueeze(-1) == ended.n_accepted - 1) & ~ended.running & (ended.status >= 0)
        else:
            segment = pick(segments, torch.zeros_like(ended.segment), most)
            lands = pick(landings, torch.zeros_like(landings[0]), most)
        if idle is not None:
            extra["extra"] = pick([x.t() for x in self._extra], idle.expand(rows, -1), most).transpose(1, 2)
        return extra | {
            "states": all_states,
            "stages": all_stages,
            "t": pick(t, ended.t, most),
            "h": pick(h, torch.zeros_like(ended.t), most),
            "segment": segment,
            "lands": lands,
        }


_SILENT = Monitor()


class Walk:
    """A solve by steps: its parts, and where it came to.

    Parameters
    ----------
    t_eval : (T, B) float64 or None; sample times within the span, in any order
    y0 : (B, n), or for one trajectory a state as the stepper has it
    inputs : of the system, for its events
    idle : what a stepper records beside, of no step; None: nothing
    """

    def __init__(
        self, plan: Plan, line: Timeline, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor], idle: Tensor | None = None
    ) -> None:
        self.plan, self.line = plan, line
        alone = line.rows is None
        self.sampler = Sampler(plan, line, t_eval, y0)
        self.events = EventWatch(plan, inputs, line.start, y0) if plan.events else None
        self.watch = None if plan.switch is None else SwitchWatch(plan.switch, plan, 1 if alone else len(y0), y0.device)
        self.log: Any = (LogOfOne if alone else LogOfMany)(plan, y0, idle)

    def run(self, stepper: Stepper, recording: Recording | None = None) -> Ended:
        """Take steps to the end. ``recording``: what stops autograd's when it has grown too large."""
        plan, line, sampler, events, watch, log = self.plan, self.line, self.sampler, self.events, self.watch, self.log
        jumps, monitor = line.jumps, plan.monitor
        # what is told of single steps is told in numbers
        each = monitor if line.rows is None else _SILENT
        watched = type(monitor).advanced is not Monitor.advanced or recording is not None
        t, segment, behind = line.start, line.first, line.every
        attempts, n_accepted, status = line.count(), line.count(), line.count()
        step, running, bad = stepper.begin()
        while True:
            target, aiming = line.target(segment), None
            if events is not None and events.aim is not None:
                # a step that went over a terminal event is taken again, up to it
                aiming = negated(unset(events.aim))
                target = choose(aiming, events.aim, target)
            aimed = aim_step(plan, step, t, abs(target - t), attempts)
            stuck = running & aimed.stuck
            if not absent(stuck):
                status = choose(stuck, why_stuck(aimed, bad), status)
                running = running & negated(stuck)
            if not any_of(running):
                break
            cut = aimed.lands
            # the steps of finished trajectories have size zero: inert, and finite wherever the state is
            h = choose(running, choose(cut, target - t, line.sign * aimed.size), 0.0)
            end = choose(cut & running, target, t + h)
            lands = cut if aiming is None else cut & negated(aiming)
            before = (line.every or lands & line.inner(segment)) if jumps else False
            step = stepper.fit(step, h, running)
            attempts = attempts + running
            y, attempt = stepper.y, Attempt(t, h, end, segment, lands, running, aimed.size, cut, behind, before)
            each.step(t, y, h)
            trial = stepper.attempt(attempt)
            bad, accepted, hopeless = trial.bad, running & trial.passed, trial.hopeless
            again, found, over, upto = False, None, None, end
            if events is not None and not absent(accepted):
                found = events.after_step(attempt, trial, accepted, aiming, n_accepted, y)
                if found is not None:
                    stop, again = found
                    stopped, accepted = negated(unset(stop)), accepted & negated(again)
                    upto = choose(stopped, stop, end)
            if absent(accepted):
                each.rejected(t, y, h)
            else:
                each.accepted(t, y, h)
                if watch is not None:
                    staying = accepted & negated(lands) if found is None else accepted & negated(lands | stopped)
                    over = watch.after_step(stepper.f, staying, h, y, trial.stages(staying), stepper.rate)
                if sampler.wanted:
                    sampler.take(attempt, trial, accepted, upto, n_accepted, y)
                log.add(attempt, trial, accepted, y, events is not None and events.found_in(n_accepted))
            landed = accepted & lands
            segment, done = line.behind(segment, landed)
            t = choose(accepted, end, t)
            if not absent(hopeless):
                hopeless = running & hopeless
                done, status = done | hopeless, choose(hopeless, int(Status.NON_FINITE), status)
            if found is not None:
                t, done, status = choose(stopped, stop, t), done | stopped, choose(stopped, int(Status.TERMINAL_EVENT), status)
            if over is not None:
                done, status = done | over, choose(over, int(Status.SWITCHED), status)
            running = running & negated(done)
            if jumps:
                behind = choose(accepted, before, behind)
            if watched and not absent(accepted):
                fraction = line.fraction(t)
                monitor.advanced(fraction)
                if recording is not None and not status and recording.accepted(n_accepted, fraction):
                    # the graph goes, the values stay
                    for part in (trial, sampler, log):
                        part.detach()
            n_accepted = n_accepted + accepted
            fate = Fate(accepted, again, None if events is None else events.aim, running, landed)
            step = stepper.follow(attempt, trial, step, fate)
        return Ended(t, stepper.y, stepper.scaled, step, segment, attempts, n_accepted, status, running)

    def cut_back(self, ended: Ended) -> Ended:
        """Of one trajectory that went on with states that are no numbers: where it ceased to be finite."""
        states = self.log.states
        good = next((k for k, y in enumerate(states[1:]) if not bool(torch.isfinite(y).all())), len(states) - 1)
        for part in (self.sampler, self.events):
            if part is not None:
                part.lose(good)
        y = states[good]
        t = self.log.lose(good)
        return ended._replace(t=t, y=y, attempts=good + 1, n_accepted=good, status=int(Status.NON_FINITE))

    def solve(self, stepper: Stepper) -> Record:
        """Take steps to the end, and the record of them."""
        return self.record(stepper, self.run(stepper))

    def record(self, stepper: Stepper, ended: Ended) -> Record:
        """The record of the steps that ended so."""
        n_fun = stepper.evaluations(ended.attempts)
        plain = self.line.last == 0 and self.events is None and self.watch is None
        return record_of(self.plan, self.line, ended, self.sampler, self.log, self.events, n_fun, plain)
