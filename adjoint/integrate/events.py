"""Finding events: changes of sign over a step, located on its dense output, for all trajectories at once.

A watch looks at every step and says where solves end, which steps are to be taken again, and, with ``aim``, where those that follow are to
end, just before a terminal event. What changes of sign mean is decided by its `Locator`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .event_roots import GRID, crossings, may_cross
from .numbers import Decision, Measure, absent, any_of, choose, lifted, lowered, negated, unset
from .plan import Event, Plan
from .sampling import WithinMany, WithinOne, within
from .stepper import Attempt, Trial

__all__ = ["EventWatch"]

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


class EventWatch:
    """Looks for events: what one trajectory finds does not depend on the others. Of one, times and values are numbers until there may be an
    event.

    Parameters
    ----------
    t0 : the start; y0 : the state there
    inputs : of the system
    """

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: Measure, y0: Tensor) -> None:
        self.plan, self._alone = plan, not isinstance(t0, Tensor)
        self.functions = [event.bind(inputs) for event in plan.events]
        #: of every function at the start of the step: a number, or ``(B,)``
        self.values = self._values(t0, y0)
        shape = (len(plan.events), 1 if self._alone else len(y0))
        counts = torch.zeros(shape, dtype=torch.int64, device=y0.device) if plan.event_counts is None else plan.event_counts.clone()
        self.locator = Locator(plan.events, counts, plan)
        weights = plan.method.dense_weights(torch.tensor(GRID, dtype=torch.float64, device=y0.device))
        self.weights = weights.to(y0.dtype)
        #: event, trajectory, its step, and time of each, in the order of time for each trajectory
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._latest: int | None = None
        #: where the steps that are being taken are to end, just before a terminal event: NaN, or None for all, for anywhere
        self.aim: Measure | None = None

    def found_in(self, index: Any) -> bool:
        """Whether there was one in this step, of one trajectory: stages of many are kept of all steps or of none."""
        return self._alone and self._latest == index

    def _point(self, t: Measure, y: Tensor) -> tuple[Tensor, Tensor]:
        """Time and state as the functions want them."""
        if self._alone:
            return torch.as_tensor(t, dtype=self.plan.real, device=y.device).reshape(()), y.detach().reshape(1, -1)
        return t.to(self.plan.real), y

    def _value(self, i: int, t: Tensor, y: Tensor) -> Tensor:
        """``(B,)``"""
        return self.functions[i](*self._point(t, y)).detach().reshape(-1).double()

    def _values(self, t: Measure, y: Tensor) -> Any:
        point = self._point(t, y)
        if self._alone:
            return [f(*point).item() for f in self.functions]
        return torch.stack([f(*point).detach().reshape(-1).double() for f in self.functions])

    def after_step(
        self, step: Attempt, trial: Trial, accepted: Decision, aiming: Decision | None, index: Any, y: Tensor
    ) -> tuple[Measure, Decision] | None:
        """Register the events of the accepted steps, which began at ``y`` and are the ``index``-th of their trajectories.

        ``aiming``: those that were told where to end. Returned is when solves end, NaN for those that go on, and which steps are to be
        taken again; None if all simply go on.
        """
        aimed = False if aiming is None else aiming & accepted & step.cut
        inside = within(self.plan.method, step, trial, y)
        points = [*((step.t + c * step.h, x) for c, x in zip(GRID, inside.on_grid(self.weights), strict=True)), (step.end, trial.y)]
        values = [self.values, *(self._values(*point) for point in points)]
        before, self.values = self.values, choose(accepted, values[-1], self.values)
        crossing = any(map(may_cross, zip(*values, strict=True))) if self._alone else may_cross(torch.stack(values)).any(0)
        possible = accepted & (crossing | aimed)
        if not any_of(possible):
            return None
        found = self._located(step, inside, possible, aimed, index, values)
        stop, again, aim = (lowered(accepted, x) for x in (found.stop, found.again, found.aim))
        self.values = choose(again, before, self.values)
        aim = aim if self.aim is None else choose(again | aimed, aim, self.aim)
        self.aim = aim if any_of(negated(unset(aim))) else None
        simply = absent(aimed) and self.aim is None and not any_of(negated(unset(stop)))
        return None if simply else (stop, again)

    def _located(
        self, step: Attempt, inside: WithinOne | WithinMany, possible: Decision, aimed: Decision, index: Any, values: list[Any]
    ) -> Located:
        """The events of steps in which there may be some, with the ``values`` of the functions at their starts, at the `GRID`, and ends."""
        locator = self.locator
        t, h, end = (lifted(x, locator.margin) for x in (step.t, step.h, step.end))

        def value(i: int, theta: Tensor) -> Tensor:
            return self._value(i, torch.where(theta == 1, end, t + theta * h), inside.at(theta))

        places = [torch.full_like(t, c) for c in (0.0, *GRID, 1.0)]
        tables = [t.new_tensor(x).unsqueeze(-1) if self._alone else x for x in values]
        none = torch.zeros_like(t, dtype=torch.bool)
        possible, ended = lifted(possible, none), lifted(aimed, none)
        if not absent(aimed):
            places.append(locator.reach(ended))
            tables.append(torch.stack([value(i, places[-1]) for i in range(len(self.functions))]))
        number = lifted(index, locator.counts[0])
        first = (number == 0) & (self.plan.event_counts is None)
        found = locator.locate(value, possible, ended, first, (t, h, end), torch.stack(places), torch.stack(tables).movedim(1, 0))
        line, rows = found.hit.nonzero(as_tuple=True)
        if len(rows):
            self.found.append((found.kind[line, rows], rows, number[rows], found.when[line, rows]))
            self._latest = index
        return found

    def lose(self, index: int) -> None:
        """Forget the events of one trajectory in this step and all later ones."""
        self.found = [part for part in self.found if int(part[2][0]) < index]

    def record(self) -> dict[str, Tensor]:
        """The fields of `Record` about events."""
        names = ("event_id", "event_row", "event_step", "event_t")
        if not self.found:
            nothing = self.locator.counts.new_empty(0)
            return dict(zip(names, (nothing, nothing, nothing, nothing.double()), strict=True))
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*self.found, strict=True), strict=True)}
