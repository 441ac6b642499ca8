"""Finding events: changes of sign over a step, located on its dense output, for all trajectories at once.

A watch looks at every step and says where solves end, which steps are to be taken again, and, with ``aim``, where those that follow are to
end, just before a terminal event: None for anywhere. What changes of sign mean is decided in one place (`Locator`); at the steps of one
trajectory `EventWatch` looks by numbers, and asks no more until there may be an event.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .event_roots import GRID, any_may_cross, crossings, may_cross
from .plan import Event, Plan
from .stepper import Attempt, Trial

__all__ = ["BatchEventWatch", "EventWatch"]

_EPS = float(torch.finfo(torch.float64).eps)
#: how far before a terminal event all that its step looks at is to be, in parts of the step, and by how much more with every attempt
_MARGIN, _WIDER = 1e-2, 4.0
_WIDEST = 0.6
#: the part of the way to a terminal event that is left to the last step: the shorter it is, the better its polynomial
_LAST = 0.125


class Located(NamedTuple):
    """What a step with a change of sign gave.

    ``stop`` (B,): when trajectories end, NaN for those that go on; ``again`` (B,): whether the step is to be taken again; ``aim`` (B,):
    where the next one is to end, NaN for anywhere. ``kind``, ``when`` (R, B): events in the order of time; those that are recorded are
    ``hit``.
    """

    stop: Tensor
    again: Tensor
    aim: Tensor
    kind: Tensor
    when: Tensor
    hit: Tensor


class Locator:
    """Decides what the changes of sign in a step mean, for as many trajectories as there are.

    A step over a terminal event is not accepted: two are taken in its place, a long and a short one, which ends just before the event, so
    that ``fun`` is seen on the near side of it only. The event is then a root of that step's dense output just beyond its end, and state
    and slope there, with their derivatives, are those of a step on the near side. Methods of constant steps take one step only.
    """

    def __init__(self, events: Sequence[Event], counts: Tensor, plan: Plan) -> None:
        device = counts.device
        self.directions = [e.direction for e in events]
        self.terminal = torch.tensor([e.terminal for e in events], device=device)
        self.counts, self.adaptive = counts, plan.method.adaptive
        self.eps = torch.finfo(plan.real).eps
        #: some methods evaluate beyond the end of the step
        self.farthest = max(1.0, *plan.method.nodes)
        rows = counts.shape[1]
        self.margin = torch.full((rows,), _MARGIN, dtype=torch.float64, device=device)
        #: the end of a step right at which a root was
        self.hint = torch.full_like(self.margin, float("nan"))
        #: where the short step is to end, of trajectories whose next step is the long one
        self.final = self.hint.clone()

    def reach(self, aimed: Tensor) -> Tensor:
        """How far beyond its end, in units of the step, the dense output of the ``aimed`` steps is searched."""
        return torch.where(aimed, self.farthest * (1 + 4 * self.margin / (1 - self.margin)), 1.0)

    def locate(
        self,
        value: Callable[[int, Tensor], Tensor],
        accepted: Tensor,
        aimed: Tensor,
        first: Tensor,
        when: tuple[Tensor, Tensor, Tensor],
        places: Tensor,
        values: Tensor,
    ) -> Located:
        """The events of the ``accepted`` steps; ``aimed``: those that end where they were told to; ``first``: those from the very start.

        ``value(i, theta)`` (B,): event function ``i`` along the step; ``values`` (E, P, B) are its values at ``places`` (P, B), see
        `crossings`; ``when``: start, size and end of the steps.
        """
        t, h, end = when
        found, kinds = [], []
        for i, direction in enumerate(self.directions):
            roots = crossings(lambda x, i=i: value(i, x), places, values[i], direction, accepted)
            found += [_at_start(values[i], direction, accepted & first).unsqueeze(0), roots]
            kinds += [i] * (1 + len(roots))
        theta, order = torch.cat(found).sort(dim=0, stable=True)
        kind = torch.tensor(kinds, device=t.device)[order]
        last = self._last(theta, kind)
        # a step once cut short that was still too long is cut more
        margin = torch.where(aimed & (last <= 1), self.margin * _WIDER, self.margin)
        short = (1 - margin) / self.farthest
        aim = t + last * short * h
        resolution = 64 * self.eps * t.abs()
        hopeless = (margin > _WIDEST) | ((aim - t).abs() <= resolution)
        ending = torch.isfinite(last) & ((aimed & (last > 1)) | hopeless)
        again = torch.isfinite(last) & ~ending
        self.margin = torch.where(again, margin, self.margin)
        nan = torch.full_like(t, float("nan"))
        long = again & ~aimed & (_LAST * (aim - t).abs() > resolution) & self.adaptive
        share = (1 - _LAST) / self.farthest
        following = torch.where(again, torch.where(long, t + last * share * h, aim), torch.where(aimed & ~ending, self.final, nan))
        self.final = torch.where(long, t + last * (share + (1 - share) * short) * h, torch.where(aimed | again, nan, self.final))

        def time(theta: Tensor) -> Tensor:
            time = torch.where(theta == 1.0, end, t + torch.where(torch.isfinite(theta), theta, 0.0) * h)
            near = (time - self.hint).abs() <= 8 * _EPS * torch.maximum(time.abs(), h.abs())
            return torch.where(near, self.hint, time)

        # events at one time, to rounding, are all recorded
        together = 8 * _EPS * torch.maximum(t.abs(), h.abs()) / torch.where(h == 0, 1.0, h.abs())
        hit = theta <= torch.where(again, -1.0, torch.where(ending, last + together, 1.0))
        self.counts.scatter_add_(0, kind, hit.long())
        out = Located(torch.where(ending, time(last), nan), again, following, kind, time(theta), hit)
        self.hint = torch.where(again & (last == 1.0), end, self.hint)
        return out

    def _last(self, theta: Tensor, kind: Tensor) -> Tensor:
        """Where the first terminal event is (B,), infinity for none."""
        counts = self.counts.clone()
        last = torch.full_like(theta[0], float("inf"))
        for place, which in zip(theta, kind, strict=True):
            hit = torch.isfinite(place)
            counts.scatter_add_(0, which.unsqueeze(0), hit.long().unsqueeze(0))
            most = self.terminal[which]
            final = hit & (most > 0) & (counts.gather(0, which.unsqueeze(0))[0] >= most)
            last = torch.where(final, torch.minimum(last, place), last)
        return last


def _at_start(values: Tensor, direction: float, wanted: Tensor) -> Tensor:
    """0 for rows whose function is zero at the start of the solve, an event as SciPy has it, and infinity for others."""
    # where it goes from there: the sign of the first value that is not zero
    sign = torch.zeros_like(values[0])
    for v in values[1:4]:
        sign = torch.where(sign == 0, torch.sign(v), sign)
    right = (sign == 0) | (sign * direction >= 0)
    return torch.where((values[0] == 0) & right & wanted, 0.0, float("inf"))


class BatchEventWatch:
    """Looks for events of many trajectories: what one finds does not depend on the others."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: Tensor, y0: Tensor) -> None:
        self.plan = plan
        self.functions = [event.bind(inputs) for event in plan.events]
        self.values = torch.stack([self._value(i, t0, y0) for i in range(len(plan.events))])
        counts = torch.zeros_like(self.values, dtype=torch.int64) if plan.event_counts is None else plan.event_counts.clone()
        self.locator = Locator(plan.events, counts, plan)
        weights = plan.method.dense_weights(torch.tensor(GRID, dtype=torch.float64, device=y0.device))
        self.weights = weights.to(y0.dtype)
        #: event, trajectory, its step, and time of each, in the order of time for each trajectory
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        #: (B,), NaN for anywhere
        self.aim: Tensor | None = None

    def found_in(self, index: Tensor) -> bool:
        """Stages of many are kept of all steps or of none."""
        return False

    def _value(self, i: int, t: Tensor, y: Tensor) -> Tensor:
        return self.functions[i](t.to(self.plan.real), y).detach().reshape(-1).double()

    def after_step(
        self, step: Attempt, trial: Trial, accepted: Tensor, aiming: Tensor | None, index: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Register the events of the accepted steps, which began at ``y`` and are the ``index``-th of their trajectories.

        ``aiming``: those that were told where to end. Returned is when solves end, NaN for those that go on, and which steps are to be
        taken again; None if all simply go on.
        """
        aimed = None if aiming is None else aiming & accepted & step.cut
        found = self._located(step, trial, accepted, aimed, index, y)
        if found is None:
            return None
        self.aim = _next_aim(self.aim, found, aimed)
        return found.stop, found.again

    def _located(self, step: Attempt, trial: Trial, accepted: Tensor, aimed: Tensor | None, index: Tensor, y: Tensor) -> Located | None:
        t, h, end, y1, stages = step.t, step.h, step.end, trial.y, trial.stages()
        size = h.to(y.dtype.to_real()).unsqueeze(-1)

        def state(theta: Tensor) -> Tensor:
            weights = self.plan.method.dense_weights(theta).to(y.dtype)
            inside = y + size * sum(weights[:, i : i + 1] * k for i, k in enumerate(stages))
            return torch.where((theta == 0).unsqueeze(-1), y, torch.where((theta == 1).unsqueeze(-1), y1, inside))

        def value(i: int, theta: Tensor) -> Tensor:
            return self._value(i, torch.where(theta == 1, end, t + theta * h), state(theta))

        ks = torch.stack(list(stages))
        inside = y + size * (self.weights @ ks.reshape(len(ks), -1)).reshape(len(GRID), *y.shape)
        points = [*((t + c * h, x) for c, x in zip(GRID, inside, strict=True)), (end, y1)]
        places = [torch.full_like(t, c) for c in (0.0, *GRID, 1.0)]
        values = [self.values, *(torch.stack([self._value(i, *point) for i in range(len(self.functions))]) for point in points)]
        if aimed is not None:
            places.append(self.locator.reach(aimed))
            values.append(torch.stack([value(i, places[-1]) for i in range(len(self.functions))]))
        all_values = torch.stack(values)
        possible = any_may_cross(all_values).any(0)
        possible = (possible if aimed is None else possible | aimed) & accepted
        self.values = torch.where(accepted, values[3], self.values)
        if not bool(possible.any()):
            return None
        first = (index == 0) & (self.plan.event_counts is None)
        ended = torch.zeros_like(accepted) if aimed is None else aimed & accepted
        found = self.locator.locate(value, possible, ended, first, (t, h, end), torch.stack(places), all_values.movedim(1, 0))
        self.values = torch.where(found.again, values[0], self.values)
        line, rows = found.hit.nonzero(as_tuple=True)
        if len(rows):
            self.found.append((found.kind[line, rows], rows, index[rows], found.when[line, rows]))
        return found if bool((~found.aim.isnan() | ~found.stop.isnan()).any()) or aimed is not None else None

    def record(self) -> dict[str, Tensor]:
        """The fields of `Record` about events."""
        names = ("event_id", "event_row", "event_step", "event_t")
        if not self.found:
            nothing = self.locator.counts.new_empty(0)
            return dict(zip(names, (nothing, nothing, nothing, nothing.double()), strict=True))
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*self.found, strict=True), strict=True)}


class EventWatch:
    """As `BatchEventWatch`, but times and values are numbers until there may be an event."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: float, y0: Tensor) -> None:
        self.plan = plan
        self.functions = [event.bind(inputs) for event in plan.events]
        self.found: list[tuple[int, int, float]] = []
        #: where the step that is being taken is to end, just before a terminal event
        self.aim: float | None = None
        device = y0.device
        before = plan.event_counts
        counts = torch.zeros(len(plan.events), 1, dtype=torch.int64, device=device) if before is None else before.clone()
        self.locator = Locator(plan.events, counts, plan)
        weights = plan.method.dense_weights(torch.tensor(GRID, dtype=torch.float64, device=device))
        self.weights = weights.to(y0.dtype)
        self.values = [self._value(i, t0, y0) for i in range(len(plan.events))]

    def _value(self, i: int, t: float, y: Tensor) -> float:
        return float(self.functions[i](torch.tensor(t, dtype=y.dtype.to_real(), device=y.device), y.reshape(1, -1)).detach())

    def found_in(self, index: int) -> bool:
        """Whether there was one in this step."""
        return bool(self.found) and self.found[-1][1] == index

    def after_step(
        self, step: Attempt, trial: Trial, accepted: bool, aiming: bool | None, index: int, y: Tensor
    ) -> tuple[float, bool] | None:
        """See `BatchEventWatch.after_step`."""
        t, h, end, y1 = step.t, step.h, step.end, trial.y
        aimed, self.aim = end == self.aim, None if end == self.aim else self.aim
        every = trial.stages()
        ks = torch.stack([k.detach() for k in every]).reshape(len(every), -1)
        flat, flat1 = y.detach().reshape(1, -1), y1.detach().reshape(1, -1)
        inside = torch.addmm(flat, self.weights, ks, alpha=h).unbind()
        points = [(t + c * h, x) for c, x in zip(GRID, inside, strict=True)]
        points.append((end, flat1))
        values = [[v, *(self._value(i, *point) for point in points)] for i, v in enumerate(self.values)]
        before, self.values = self.values, [v[-1] for v in values]
        if not aimed and not any(may_cross(v) for v in values):
            return None

        def value(i: int, theta: Tensor) -> Tensor:
            x = float(theta)
            if x in (0.0, 1.0):
                return theta.new_tensor([self._value(i, *((t, flat) if x == 0.0 else (end, flat1)))])
            weights = self.plan.method.dense_weights(theta).to(y.dtype)
            return theta.new_tensor([self._value(i, t + x * h, torch.addmm(flat, weights, ks, alpha=h))])

        places = [0.0, *GRID, 1.0]
        one = self.locator.margin
        flags = torch.ones_like(one, dtype=torch.bool)
        if aimed:
            far = self.locator.reach(flags)
            places.append(float(far))
            values = [[*v, float(value(i, far))] for i, v in enumerate(values)]
        first = flags & (index == 0 and self.plan.event_counts is None)
        when = (torch.full_like(one, t), torch.full_like(one, h), torch.full_like(one, end))
        table, at = one.new_tensor(values).unsqueeze(-1), one.new_tensor(places).unsqueeze(-1)
        located = self.locator.locate(value, flags, flags & aimed, first, when, at, table)
        aim, stop = float(located.aim), float(located.stop)
        self.aim = aim if aim == aim else self.aim
        if bool(located.again):
            self.values = before
            return math.nan, True
        for line in located.hit[:, 0].nonzero()[:, 0].tolist():
            self.found.append((int(located.kind[line, 0]), index, float(located.when[line, 0])))
        return stop, False

    def lose(self, index: int) -> None:
        """Forget the events in this step and all later ones."""
        self.found = [e for e in self.found if e[1] < index]

    def record(self) -> dict[str, Tensor]:
        """The fields of `Record` about events."""
        whole, device = torch.int64, self.locator.counts.device
        return {
            "event_id": torch.tensor([e[0] for e in self.found], dtype=whole, device=device),
            "event_row": torch.zeros(len(self.found), dtype=whole, device=device),
            "event_step": torch.tensor([e[1] for e in self.found], dtype=whole, device=device),
            "event_t": torch.tensor([e[2] for e in self.found], dtype=torch.float64, device=device),
        }


def _next_aim(aim: Tensor | None, found: Located, aimed: Tensor | None) -> Tensor | None:
    """Where the next steps are to end, after what was ``found`` in those that are done; ``aimed``: they ended where they were told to."""
    if aim is None or aimed is None:
        return found.aim
    aim = torch.where(found.again | aimed, found.aim, aim)
    return None if bool(aim.isnan().all()) else aim
