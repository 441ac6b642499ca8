"""Finding events: changes of sign over a step, located on its dense output, for all trajectories at once.

A watch looks at every step and says where solves end, which steps are to be taken again, and, with ``aim``, where those that follow are to
end, just before a terminal event. What changes of sign mean is decided by its `Locator`. All roots of a function of the time within a
step, of many steps at once, are found by `crossings`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .numbers import Decision, Measure, absent, any_of, choose, lifted, lowered, negated, unset
from .plan import Event, Plan
from .sampling import WithinMany, WithinOne, within
from .stepper import Attempt, Trial

__all__ = ["GRID", "EventWatch", "chandrupatla", "crossings", "may_cross"]

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
        inside = within(self.plan.method, step, trial, y, accepted)
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


#: bisection of an interval alone would take 52
_MOST = 200
#: where a function is looked at inside of a step, beside its ends
GRID = (1 / 3, 2 / 3)
#: how close to zero, in parts of its range, the cubic through four values must come for a closer look
_NEAR = 0.1
_TINY = 1e-300
#: of the search for a value on the other side of zero
_ROUNDS = 8

# from the values of a cubic at 0, 1/3, 2/3, 1 to its coefficients in powers and in Bernstein's basis, in whose hull it lies
_POWERS = ((1.0, 0.0, 0.0, 0.0), (-5.5, 9.0, -4.5, 1.0), (9.0, -22.5, 18.0, -4.5), (-4.5, 13.5, -13.5, 4.5))
_INNER = ((-5 / 6, 3.0, -1.5, 1 / 3), (1 / 3, -1.5, 3.0, -5 / 6))


def may_cross(values: Any) -> Decision:
    """Whether a function with these values at 0, 1/3, 2/3 and 1 (and beyond) may change its sign there: ``P`` numbers, or ``(P, ...)``."""
    if isinstance(values, Tensor):
        least, most = values.amin(0), values.amax(0)
        inner = torch.einsum("ip,p...->i...", torch.tensor(_INNER, dtype=values.dtype, device=values.device), values[:4])
        slack = _NEAR * (most - least)
        low, high = torch.minimum(least, inner.amin(0) - slack), torch.maximum(most, inner.amax(0) + slack)
    else:
        least, most = min(values), max(values)
        between = [sum(w * v for w, v in zip(row, values[:4], strict=True)) for row in _INNER]
        slack = _NEAR * (most - least)
        low, high = min(least, min(between) - slack), max(most, max(between) + slack)
    return (low <= 0) & (high >= 0)


def chandrupatla(
    f: Callable[[Tensor], Tensor],
    f0: Tensor,
    f1: Tensor,
    active: Tensor,
    start: Tensor | float = 0.0,
    end: Tensor | float = 1.0,
) -> Tensor:
    """Roots between ``start`` and ``end`` of the ``active`` rows of ``f``, whose values there, ``f0`` and ``f1``, differ in sign.

    Inverse quadratic interpolation where that is safe, else bisection (Chandrupatla 1997, Adv. Eng. Software 28:145), to four units of
    rounding of the interval. A function that is zero over a part of the interval has its root where that begins; other rows get ``end``.
    """
    start, end = (torch.as_tensor(x, dtype=f1.dtype, device=f1.device).expand_as(f1) for x in (start, end))
    beyond = -torch.sign(f0) * _TINY

    def value(x: Tensor) -> Tensor:
        # zero belongs to the far side
        fx = f(start + x * (end - start))
        return torch.where(fx == 0, beyond, fx)

    f1 = torch.where(f1 == 0, beyond, f1)
    a, fa, b, fb = torch.ones_like(f1), f1, torch.zeros_like(f1), f0
    c, fc = b, fb
    share = torch.full_like(f1, 0.5)
    best = a
    tolerance = 4 * _EPS
    for _ in range(_MOST):
        x = torch.where(active, a + share * (b - a), best)
        fx = value(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(active, torch.where(fa.abs() < fb.abs(), a, b), best)
        least = tolerance / (b - a).abs()
        active = active & ~((least > 0.5) | ~torch.isfinite(fx))
        if not bool(active.any()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & torch.isfinite(inverse)
        share = torch.minimum(torch.maximum(torch.where(smooth, inverse, 0.5), least), 1 - least)
    return torch.where(best >= 1 - 2 * tolerance, end, start + best * (end - start))


def crossings(f: Callable[[Tensor], Tensor], places: Tensor, values: Tensor, direction: float, wanted: Tensor) -> Tensor:
    """Where the ``wanted`` rows of ``f`` change their sign in the ``direction``: ``(R, B)``, increasing, infinity for none.

    ``places`` and ``values`` (P, B): the first four are at 0, 1/3, 2/3 and 1. Beside changes of sign from one of them to the next, two
    changes between neighbours are found where the cubic through the four comes close to zero: there the function itself is followed
    down to its extremum. A function that touches zero inside of the step and turns back has no root there.
    """
    places, values = _with_dips(f, places, values, wanted)
    out = []
    for k in range(len(places) - 1):
        a, b = values[k], values[k + 1]
        up, down = (a < 0) & (b >= 0), (a > 0) & (b <= 0)
        crossed = ((up & (direction >= 0)) | (down & (direction <= 0))) & wanted
        root = torch.full_like(a, float("inf"))
        if bool(crossed.any()):
            root = torch.where(crossed, chandrupatla(f, a, b, crossed, places[k], places[k + 1]), root)
        out.append(root)
    return torch.stack(out)


def _with_dips(f: Callable[[Tensor], Tensor], places: Tensor, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The points with those added, in their order, at which the function is on the other side of zero than both its neighbours."""
    _, c1, c2, c3 = (torch.tensor(_POWERS, dtype=values.dtype, device=values.device) @ values[:4]).unbind()
    scale = values[:4].amax(0) - values[:4].amin(0)
    root = (c2**2 - 3 * c1 * c3).clamp(min=0).sqrt()
    # both extrema of the cubic, without cancellation
    q = -(c2 + torch.where(c2 < 0, -root, root))
    found_x, found_v = [], []
    for x in (q / (3 * c3), c1 / q):
        inside = torch.isfinite(x) & (x > 0) & (x < 1) & (root > 0) & wanted
        x = torch.where(inside, x, 0.5)
        k = (x * 3).long().clamp(max=2).unsqueeze(0)
        (left, f_left), (right, f_right) = ((places.gather(0, k + i)[0], values.gather(0, k + i)[0]) for i in (0, 1))
        side = torch.sign(f_left)
        predicted = values[0] + x * (c1 + x * (c2 + x * c3))
        bends = side * (2 * c2 + 6 * c3 * x) > 0
        active = inside & (side != 0) & (side == torch.sign(f_right)) & bends & (side * predicted <= _NEAR * scale)
        if not bool(active.any()):
            continue
        x, v = _lowest(lambda s: side * f(s), x, (left, side * f_left), (right, side * f_right), active)  # noqa: B023
        # beyond what rounding may make of values as large as those of this step
        other = active & (v < -_EPS * scale)
        found_x.append(torch.where(other, x, 1.0))
        found_v.append(torch.where(other, side * v, values[3]))
    # a zero between two values of one sign is no change of it
    middle, before, after = values[1:3], values[:2], values[2:4]
    touched = (middle == 0) & (before * after > 0)
    values = torch.cat([values[:1], torch.where(touched, torch.sign(before) * _TINY, middle), values[3:]])
    if not found_x:
        return places, values
    places, values = torch.cat([places, torch.stack(found_x)]), torch.cat([values, torch.stack(found_v)])
    order = places.argsort(dim=0, stable=True)
    return places.gather(0, order), values.gather(0, order)


def _lowest(
    f: Callable[[Tensor], Tensor], x: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], active: Tensor
) -> tuple[Tensor, Tensor]:
    """Towards the minimum of ``f`` between two points, begun at ``x`` and ended where it is negative: by parabolas."""
    (a, fa), (b, fb) = left, right
    v = f(x)
    for _ in range(_ROUNDS):
        # a positive value below both others, or there is nothing to follow
        active = active & (v >= 0) & (v <= fa) & (v <= fb)
        if not bool(active.any()):
            break
        p, q = (x - a) ** 2 * (v - fb), (x - b) ** 2 * (v - fa)
        vertex = x - 0.5 * (p - q) / ((x - a) * (v - fb) - (x - b) * (v - fa))
        # not there again: a step into the longer side
        aside = x + 0.1 * torch.where(b - x > x - a, b - x, a - x)
        usable = torch.isfinite(vertex) & (vertex > a) & (vertex < b) & ((vertex - x).abs() > 1e-3 * (b - a))
        at = torch.where(active, torch.where(usable, vertex, aside), x)
        w = f(at)
        better, below = w < v, at < x
        # the better one is the new middle, the other one (or the old middle) a new end
        a, fa = _choose(active & (below != better), (torch.where(better, x, at), torch.where(better, v, w)), (a, fa))
        b, fb = _choose(active & (below == better), (torch.where(better, x, at), torch.where(better, v, w)), (b, fb))
        x, v = _choose(active & better, (at, w), (x, v))
    return x, v


def _choose(on: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.where(on, new[0], old[0]), torch.where(on, new[1], old[1])
