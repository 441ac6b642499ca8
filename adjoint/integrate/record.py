"""From the steps of a loop to the record of its solve: of one trajectory as they come, of many packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numbers import Decision, Measure, lost
from .plan import Plan, Record
from .stepper import Attempt, Trial
from .timeline import Timeline

__all__ = ["Ended", "LogOfMany", "LogOfOne", "evaluations_of_attempt", "no_events", "record_of"]


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
            self._stages.append((len(self._t), torch.stack(list(trial.stages()))))
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
            self._stages.append(torch.stack(list(trial.stages())))

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


def evaluations_of_attempt(plan: Plan, dense: bool, jumps: bool) -> int:
    """Evaluations of ``fun`` in an attempt; ``dense``: with the stages of the dense output."""
    method = plan.method
    if method.implicit:
        # the slope at the end, and what the step evaluates beside its iterations, which count their own; so does the slope behind a jump
        # where it takes an iteration
        return (method.end_index is None) + method.evaluations + (jumps and not method.residual)
    each = method.n_stages if method.end_index is None or method.end_index == method.n_stages else method.n_stages - 1
    return each + (method.extra_evaluations if dense else 0) + jumps
