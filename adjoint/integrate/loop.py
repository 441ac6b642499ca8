"""The loop over steps: one, for one trajectory and for many, for methods of one step and of many.

What a step is, is the affair of a `Stepper`; where it ends, what lies in it, who ends with it, and what is kept of it stands here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .clock import aim_step, why_stuck
from .events import EventWatch
from .numbers import absent, any_of, choose, negated, unset
from .plan import Monitor, Plan, Record, Status
from .record import Ended, LogOfMany, LogOfOne, record_of
from .recording import Recording
from .sampling import Sampler
from .stepper import Attempt, Fate, Stepper
from .stiffness import SwitchWatch
from .timeline import Timeline

__all__ = ["Walk"]

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
        #: whether somebody looks at the stages of every step
        self.dense = plan.keep_stages or self.sampler.wanted or self.events is not None or self.watch is not None

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
                    over = watch.after_step(stepper.f, staying, h, y, trial.stages(), stepper.rate)
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
