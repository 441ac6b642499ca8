"""Methods of one step at work: of one trajectory, with states in any shape and numbers for decisions, and of many, with masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods import Method
from .clock import TimelineOfMany, TimelineOfOne, Verdict, initial_step, judge_step
from .companion import QUIET, Beside, companion_of
from .numbers import Decision, Measure, absent, any_of, choose, larger, negated, widened
from .plan import Plan, shifted_times
from .recording import Recording
from .residual import inner_error
from .stepper import Attempt, Equations, Fate

__all__ = ["OneStepOfMany", "OneStepOfOne"]

Flat = Callable[[Tensor, Tensor], Tensor]


class _Trial:
    """See `Trial`; stages of the dense output are computed when they are first asked for.

    ``slopes``: those of the step itself; ``end``: ``f(t + h, y1)``, where it is known; ``size``: that of the new state.
    """

    __slots__ = (
        *("_dense", "_f", "_method", "bad", "end", "extra", "h", "hopeless", "looked", "memory", "passed", "size"),
        *("slopes", "start", "step", "times", "y"),
    )

    def __init__(
        self, f: Flat, method: Method, times: Sequence[Tensor], h: float | Tensor, start: Tensor, y: Tensor, slopes: list[Tensor]
    ) -> None:
        self._f, self._method, self.times, self.h, self.start, self.y, self.slopes = f, method, times, h, start, y, slopes
        self.end: Any = None
        self._dense: list[Tensor] | None = None
        self.size, self.extra = y, None
        self.passed: Decision = True
        self.bad = self.hopeless = False
        #: who has looked at the stages of the dense output
        self.looked: Decision = False

    def judged(self, verdict: Verdict) -> None:
        """Take over what a verdict says."""
        self.passed, self.bad, self.hopeless, self.step, self.memory = verdict

    def stages(self, who: Decision) -> list[Tensor]:
        """See `Trial.stages`."""
        self.looked = self.looked | who
        if self._dense is None:
            method = self._method
            if self.end is None and method.end_index == method.n_stages:
                self.end = self._f(self.times[method.n_stages], self.y)
            self._dense = method.dense_stages(self._f, self.times, self.h, self.start, self.slopes, self.end)
        return self._dense

    def detach(self) -> None:
        """See `Trial.detach`."""
        self.y, self.slopes = self.y.detach(), [k.detach() for k in self.slopes]
        self.end = None if self.end is None else self.end.detach()


class _OneStep:
    """What both have in common: the state ``y``, the slope ``k1`` there, and what the controller remembers."""

    def __init__(self, f: Any, plan: Plan, y0: Tensor, beside: Beside | None, flat: Sequence[int] | None) -> None:
        self.f, self.plan, self.y = f, plan, y0
        self._equations = f if isinstance(f, Equations) else None
        self.scaled: Tensor | None = None
        self.companion = None if beside is None else companion_of(f, plan, beside, y0, flat)
        self._memory: tuple[Measure, Measure] = (1.0, 1.0)
        self._rejected: Decision = False
        self._n_fun: Any = 0
        method = plan.method
        # asked for in every step
        self._adaptive, self._implicit, self._nodes = method.adaptive, method.implicit, method.nodes
        self._cost, self._asks_end, self._n_stages = method.evaluations, method.error_uses_end, method.n_stages
        self._ends_stages = method.end_index == method.n_stages - 1
        # which take iterations to a slope, and count them
        self._residual = method.residual
        #: whether each step comes to know the slope at its end, or those do whose dense output is looked at; what that costs
        self._knows_end, shows_end = self._ends_stages or self._asks_end, method.end_index == method.n_stages and not self._asks_end
        self._shows_end, self._look = shows_end, method.extra_evaluations + shows_end

    def _followed(self, step: Attempt, trial: _Trial, fate: Fate) -> None:
        """Count what a step costs beside its own stages: a look at its dense output, and the slope where the next one starts, unless it is
        known. Behind a jump it is not."""
        looked = trial.looked
        if self._look and not absent(looked):
            self._n_fun = self._n_fun + self._look * looked
        if not self._knows_end:
            onward = fate.accepted & fate.going
            self._n_fun = self._n_fun + ((onward & (step.before | negated(looked))) if self._shows_end else onward)
        elif not (absent(step.before) or self._residual):
            self._n_fun = self._n_fun + (fate.accepted & fate.going & step.before)

    @property
    def rate(self) -> float | Tensor:
        """See `Stepper.rate`."""
        return 0.0 if self.companion is None else self.companion.rate

    def fit(self, step: Measure, h: Measure, running: Decision) -> Measure:
        """See `Stepper.fit`: every step stands for itself."""
        return step


class OneStepOfOne(_OneStep):
    """A `Stepper` for one trajectory.

    With gradients enabled the steps are recorded by autograd (their sizes as constants).

    Parameters
    ----------
    f : right-hand side on states in the shape of ``y0``, for implicit methods with their equations
    flat : ``(1, n)``
    beside : see `Companion`
    recording : watches what autograd saves
    """

    def __init__(
        self, f: Any, plan: Plan, line: TimelineOfOne, y0: Tensor, flat: Sequence[int], beside: Beside | None, recording: Recording | None
    ) -> None:
        super().__init__(f, plan, y0, beside, flat)
        self._line, self._flat, self._recording = line, flat, recording

    def begin(self) -> tuple[float, bool, bool]:
        """See `Stepper.begin`."""
        plan, line, y0, f = self.plan, self._line, self.y, self.f
        self._size = y0.detach().abs()
        time = self._time(line.start, line.every)
        self._k1: Tensor = f(time, y0) if self._recording is None else self._recording.first(f, time, y0)
        self._n_fun = 1
        if plan.first_step is not None:
            return float(plan.first_step), True, False
        if not self._adaptive:
            # a grid of anchors is the whole discretisation
            return math.inf, True, False
        toward = torch.full((1,), line.sign, dtype=torch.float64, device=y0.device)
        with torch.no_grad():
            g = lambda t, x: f(t, x.reshape(y0.shape)).reshape(self._flat)  # noqa: E731
            step = float(initial_step(g, plan, line.anchors.detach(), y0.reshape(self._flat), self._k1.reshape(self._flat), toward))
        self._n_fun += 1
        return max(step, plan.min_step), True, False

    def _time(self, t: float, jump: bool) -> Tensor:
        """The time at the start of a step, where not every method has a stage."""
        time = torch.tensor(t, dtype=self.plan.real, device=self.y.device)
        return shifted_times([time], [0.0], True, False, self._line.sign)[0] if jump else time

    def attempt(self, step: Attempt) -> _Trial:
        """See `Stepper.attempt`."""
        plan, f, y, k1, h = self.plan, self.f, self.y, self._k1, step.h
        method, t = plan.method, step.t
        times: Sequence[Tensor] = torch.tensor([t + c * h for c in self._nodes], dtype=plan.real, device=y.device).unbind()
        if step.behind or step.before:
            times = shifted_times(times, self._nodes, step.behind, step.before, self._line.sign)
        # recorded steps of implicit methods are taken again with tensors: to the same bits, or stiffness blows their difference up
        length = torch.full((), h, dtype=plan.real, device=y.device) if self._implicit else h
        y1, ks = method.step(f, times, length, y, k1)
        self._n_fun += self._cost
        trial = _Trial(f, method, times, h, y, y1, ks)
        recorded = torch.is_grad_enabled()
        trial.size = (y1.detach() if recorded else y1).abs()
        if not self._adaptive:
            # stages without a solution: no step that follows would have one
            if self._implicit and not bool(torch.isfinite(y1).all()):
                trial.passed, trial.hopeless = False, True
            return trial
        if self._asks_end:
            trial.end = f(times[self._n_stages], y1)
        parts = ks if trial.end is None else [*ks, trial.end]
        # a recorded solve holds step sizes fixed: their choice is not part of its graph
        estimate = method.error(length, [k.detach() for k in parts] if recorded else parts)
        scaled = self.scaled = plan.scaled(estimate, torch.maximum(self._size, trial.size)).reshape(self._flat)
        error = float(plan.norm(scaled))
        companion = self.companion
        if companion is not None and error <= 1.0:
            # of a step that was cut short a small error says nothing
            quiet = error <= QUIET and not (step.cut and abs(h) < 0.5 * step.size)
            if companion.due(quiet, abs(h)):
                error = max(error, companion.error_of_one(times, h, y, k1, y1, parts, scaled, quiet))
        stalled = None if self._equations is None else self._equations.stuck
        trial.judged(judge_step(plan, error, t, abs(h), step.size, step.cut, self._rejected, self._memory, stalled))
        return trial

    def follow(self, step: Attempt, trial: _Trial, size: float, fate: Fate) -> float:
        """See `Stepper.follow`."""
        accepted, again, aim, going, _ = fate
        self._followed(step, trial, fate)
        if again:
            assert aim is not None
            return max(size, abs(aim - step.t))
        if accepted:
            self.y, self._size = trial.y, trial.size
            if going and (step.before or (trial.end is None and not self._ends_stages)):
                self._k1 = self.f(self._time(step.end, bool(step.before)), trial.y)
            else:
                self._k1 = trial.slopes[-1] if trial.end is None else trial.end
        if not self._adaptive:
            return size
        self._rejected = not accepted
        if accepted:
            self._memory = trial.memory
        return trial.step

    def evaluations(self, attempts: int) -> int:
        """See `Stepper.evaluations`."""
        return self._n_fun + (0 if self.companion is None else self.companion.n_fun)


class OneStepOfMany(_OneStep):
    """A `Stepper` for many trajectories: no wait for the device, no branch on data.

    Parameters
    ----------
    f : flat right-hand side, for implicit methods with their equations
    y0 : (B, n)
    beside : see `Companion`
    """

    def __init__(self, f: Any, plan: Plan, line: TimelineOfMany, y0: Tensor, beside: Beside | None) -> None:
        super().__init__(f, plan, y0, beside, None)
        self._line = line
        self._width = 0 if plan.method.implicit else y0.shape[-1]
        self._constrained = self._equations is not None and self._equations.constrained
        self._span = (line.end - line.start).abs()
        self._fractions = line.start.new_tensor(plan.method.nodes).unsqueeze(-1)

    def _spread(self, x: Tensor) -> Tensor:
        return widened(x.unsqueeze(-1), self._width)

    def begin(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Stepper.begin`."""
        plan, line, y0, f = self.plan, self._line, self.y, self.f
        t0, stops, sign = line.start, line.anchors, line.sign
        time, equations = shifted_times([t0.to(plan.real)], [0.0], line.every, False, sign)[0], self._equations
        self._k1, begun = (f(time, y0), 1) if equations is None else equations.slope_at_start(stops, sign, time, y0)
        if plan.first_step is not None:
            step = torch.zeros_like(t0) + plan.first_step
        elif not plan.method.adaptive:
            step = torch.full_like(t0, float("inf"))
        else:
            found = None if equations is None else equations.first_step(stops, sign, y0)
            if found is None:
                found = initial_step(f, plan, stops, y0, self._k1, sign)
                begun += 1
            step = found.clamp(min=plan.min_step)
        self._n_fun = torch.full_like(t0, begun, dtype=torch.int64)
        level = torch.ones_like(t0, dtype=torch.float32)
        self._memory = level, level
        self._rejected = torch.zeros_like(t0, dtype=torch.bool)
        # of the state in the step before
        self._size = y0.abs()
        self.scaled = torch.zeros_like(y0, dtype=plan.real)
        # nothing goes on from a state that is not finite: a step of no size says so at once
        broken = ~torch.isfinite(y0).all(-1)
        return torch.where(broken, 0.0, step), ~self._rejected, broken

    def attempt(self, step: Attempt) -> _Trial:
        """See `Stepper.attempt`."""
        plan, f, y, k1 = self.plan, self.f, self.y, self._k1
        method, real, t, h = plan.method, plan.real, step.t, step.h
        hr = self._spread(h.to(real))
        times: Sequence[Tensor] = (t + h * self._fractions).to(real).unbind()
        if self._line.jumps:
            times = shifted_times(times, method.nodes, step.behind, step.before, self._line.sign)
        y1, ks = method.step(f, times, hr, y, k1)
        trial = _Trial(f, method, times, hr, y, y1, ks)
        if self._asks_end:
            trial.end = f(times[method.n_stages], y1)
        if method.adaptive:
            estimate = method.error(hr, [*ks, trial.end] if method.error_uses_end else ks)
            size = torch.maximum(y.abs(), y1.abs())
            scaled = plan.scaled(estimate, size).abs()
            if self._constrained:
                trial.size, wide = size, torch.maximum(size, self._size)
                scaled = torch.maximum(scaled, inner_error(f, plan, lambda c: (t + h * c).to(real), hr, self._span, y, wide, ks))
            error = plan.norm(scaled)
            # kept for the message of a failure, which is found when the next attempt would be made
            assert self.scaled is not None
            self.scaled = torch.where(self._spread(step.running), scaled, self.scaled)
            stalled = None if self._equations is None else self._equations.stuck
            judge = lambda error: judge_step(  # noqa: E731
                plan, error, t, h.abs(), step.size, step.cut, self._rejected, self._memory, stalled
            )
            verdict = judge(error)
            if self.companion is not None:
                error = self._accompanied(step, times, y1, error, verdict)
                verdict = verdict if error is None else judge(error)
            trial.judged(verdict)
        else:
            # without an error estimate the state itself says when it stops being finite
            trial.bad = trial.hopeless = ~torch.isfinite(y1).all(-1)
            trial.passed = ~trial.bad
        return trial

    def _accompanied(self, step: Attempt, times: Sequence[Tensor], y1: Tensor, error: Tensor, verdict: Verdict) -> Tensor | None:
        """The error of a step with that of the companion; None where this has nothing to say."""
        companion, plan, scaled, y = self.companion, self.plan, self.scaled, self.y
        assert companion is not None and scaled is not None
        size = step.h * self._line.sign
        small = error <= QUIET
        ahead, longest = torch.stack([torch.where(small, size, 0.0), size]).amax(-1).tolist()
        # of finished rows, whose steps have no size, and of a step that was cut short a small error says nothing
        quiet = small & step.running & ~(step.cut & (size < 0.5 * step.size)) if ahead > 0 else None
        if not companion.due(quiet is not None and any_of(quiet), longest):
            return None
        taken = step.running & verdict.passed
        quiet = torch.zeros_like(taken) if quiet is None else quiet & taken
        end = torch.where(self._spread(taken), y1, y)
        found = companion.error(times, step.h.to(plan.real).unsqueeze(-1), y, self._k1, scaled, taken, quiet, longest, end)
        if found is None:
            return None
        assert isinstance(found, Tensor)
        companion.moved(taken & (found <= 1.0))
        return torch.where(taken, torch.maximum(error, found.to(error.dtype)), error)

    def follow(self, step: Attempt, trial: _Trial, size: Tensor, fate: Fate) -> Tensor:
        """See `Stepper.follow`."""
        accepted, again, aim, going, _ = fate
        plan = self.plan
        self._followed(step, trial, fate)
        column = self._spread(accepted)
        self.y = y = torch.where(column, trial.y, self.y)
        slope = self._slope(step, trial, accepted, going, y)
        if slope is not None:
            self._k1 = torch.where(column, slope, self._k1)
        if not plan.method.adaptive:
            return self._once_more(step, size, size, again, aim)
        if self._constrained:
            self._size = torch.where(column, trial.size, self._size)
        rejected = step.running & ~trial.passed
        self._rejected = rejected if absent(again) else torch.where(again, self._rejected, rejected)
        if plan.control.remembers:
            before, now = self._memory, trial.memory
            self._memory = torch.where(accepted, now[0], before[0]), torch.where(accepted, now[1], before[1])
        return self._once_more(step, trial.step, size, again, aim)

    def _slope(self, step: Attempt, trial: _Trial, accepted: Tensor, going: Tensor, y: Tensor) -> Tensor | None:
        """The slope at the states ``y`` from which the next steps start, None where it is that of this one."""
        f, line = self.f, self._line
        known = trial.slopes[self._n_stages - 1] if self._ends_stages else trial.end
        # after a discontinuity the first stage is taken anew, from the far side of it
        jumped: Any = accepted & step.before if line.jumps else False
        if known is not None and absent(jumped):
            return known
        onward = accepted & going
        if not any_of(onward if known is None else onward & jumped):
            return known
        end = torch.where(accepted, step.end, step.t)
        # of a step that was refused it is the time it began at: equations remember what they were asked
        behind = torch.where(accepted, step.before, step.behind) if line.jumps else False
        time = shifted_times([end.to(self.plan.real)], [0.0], behind, False, line.sign)[0]
        if known is None:
            return f(time, y)
        if self._equations is None:
            return torch.where(self._spread(jumped), f(time, y), known)
        room = (line.target(line.behind(step.segment, accepted & step.lands)[0]) - end).abs()
        return self._equations.slope_behind(jumped, time, y, known, line.sign, torch.where(room > 0, room, self._span))

    @staticmethod
    def _once_more(step: Attempt, following: Tensor, size: Tensor, again: Decision, aim: Tensor | None) -> Tensor:
        return following if absent(again) or aim is None else choose(again, larger(size, (aim - step.t).abs()), following)

    def evaluations(self, attempts: Tensor) -> Tensor:
        """See `Stepper.evaluations`."""
        found = self._n_fun + self._cost * attempts
        return found if self.companion is None else found + self.companion.n_fun
