"""Steps that are small enough for derivatives too, where the state itself asks for none.

Step sizes go by the error of the state. Where that is at rest, is constant or moves along a slow manifold, it says nothing about what a
small displacement would do: steps of an explicit method grow past its stability, and the derivatives of these steps, exact as they are,
are those of unstable steps. So from time to time such solves are asked whether they rest (`Companion.due`), and where they do, a displaced
solution is carried along, whose distance from the solution, a tangent by finite differences, is put under error control as well. The
distance never falls below half of what the error test sees, so that it also finds, as by power iteration with the steps themselves, modes
that have died away long ago and would be unstable in longer steps.

Implicit steps stay stable, but at rest are as long as the span: there the companion is wanted where nothing moves, and its displaced
solution has stage equations of its own. Of additive methods the explicit part is looked after as well.

The test of every so many steps is a step of power iteration for the size of the Jacobian, as in Sommeijer, Shampine & Verwer (1997), RKC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import is_functorch_wrapped_tensor
from .numbers import Decision, Measure, any_of, any_of_each, choose, column, negated, read
from .plan import Plan, Record

__all__ = [
    "NEAR", "PRODUCTS", "QUIET", "STANDING", "WIDEST", "Beside", "Companion",
    "companion_of", "displaced", "drawn", "rests", "unit_of",
]  # fmt: skip

Flat = Callable[[Tensor, Tensor], Tensor]
#: a right-hand side, for implicit methods with its equations; displaced or not
Beside = Callable[[bool], Any]

#: errors, in units of the tolerance, of a state and of a component that are at rest
QUIET, _STILL = 1e-8, 1e-10
#: rounding, beside the largest error of a state, from which on it makes errors next to nothing by chance
_CHANCE = 1e-7
#: movement in a step, in units of the tolerance, of a state at rest, where stability is of no concern
STANDING = 1e-6
#: how many steps of how many times of the fastest mode take what is fast out of a displacement
_ROUNDS, _PASSED = 4, 30.0
#: by how much displacements fall, and from which growth on, with each fall, a derivative has no bound
_FALL, _GROWS = 1e-2, 1.2
#: products with the Jacobian that make an estimate of its size, and the part of the interval of stability from which on they are made
PRODUCTS, NEAR = 4, 0.3
#: part of the interval of stability from which on steps are looked after
_EDGE = 0.8
#: steps without need for it after which the companion is left, for how many, and how much longer steps may become meanwhile
_CALM, _NAP, _LONGEST_NAP, _STRETCH = 4, 16, 256, 1.25
#: a look is had at the first attempt, then after so many, and where steps have become so much longer
_LOOKS, _LONGER = (0, 8, 24), 2.0
#: refusals in a row after which a distance is taken for rounding
_FUTILE = 25
#: steps, in units of the rounding of the time, in which the displaced solution alone jumps: what moves when `fun` switches is displaced too
_JUMPING = 1e5
#: an error that is refused in any case; times of the fastest mode after which it has died away, if it does
_HUGE, _SETTLED = 1e30, 20.0
#: bounds of the displacement beside its part above rounding, relative and absolute
WIDEST = 1e-3
#: drawn numbers by shape, so many of so many at the most
_PATTERNS: dict[torch.Size, Tensor] = {}
_MANY, _SMALL = 64, 4096


def companion_of(f: Any, plan: Plan, beside: Beside, like: Tensor, flat: Sequence[int] | None = None) -> Companion | None:
    """The companion of a solve by a one-step method with error control whose derivatives are wanted. ``like``: a state as ``f`` takes it;
    ``flat``: its shape ``(B, n)``, where that is another."""
    if not plan.method.adaptive or not like.numel():
        return None
    return Companion(f, plan, beside, like, like.shape if flat is None else torch.Size(flat))


class Companion:
    """A solution beside the solution.

    Parameters
    ----------
    f : right-hand side of the solve, for implicit methods with their equations
    beside : gives another one, with all that it depends on displaced by a little if asked; for the companion of states at rest
    like : a state as ``f`` takes it
    flat : ``(B, n)``, the shape of states here
    """

    def __init__(self, f: Any, plan: Plan, beside: Beside, like: Tensor, flat: torch.Size) -> None:
        self.f, self.plan, self._beside, self._shape, self._flat = f, plan, beside, like.shape, flat
        method = plan.method
        #: the explicit part, which must not be stiff, and the implicit one
        self._split: tuple[Flat, Flat] | None = (f.explicit, f.f) if method.additive else None
        self._interval: float = math.inf if method.implicit and self._split is None else method.interval  # type: ignore[attr-defined]
        eps = torch.finfo(plan.real).eps
        self._shift = eps**0.4
        rtol = plan.rtol if isinstance(plan.rtol, float) else float(plan.rtol.detach().max())
        self._tol = max(rtol, eps**0.45)
        tiny = torch.finfo(plan.real).tiny
        #: tolerances of the usual size: `_unit` is linear in the size of the state, and never zero
        self._plain = isinstance(plan.rtol, float) and isinstance(plan.atol, float) and rtol <= WIDEST and tiny < plan.atol <= WIDEST
        self.on = False
        self._n_fun = 0
        self._displaced, self._base = f, f
        #: whether steps of an explicit method may be handed over to another one
        self._switching = plan.switch is not None and not method.implicit
        #: size of the Jacobian, by power iteration, the largest of all rows, and what of it speaks for the other method
        self._rate: Measure = 0.0
        self._fastest = 0.0
        self.rate: float | Tensor = 0.0
        #: displacement in units of `_unit`, and that behind the step that was asked for
        self._distance: Measure = 0.0
        self._proposed: Measure = 0.0
        #: whose displacement is known, and who is followed
        self._known: Decision = False
        self._with: Decision = False
        self._pattern: Tensor | None = None
        #: direction of power iteration, and its size
        self._probe: Tensor | None = None
        self._probed: Measure = 1.0
        self._refused: Tensor | int = 0
        self._calm, self._nap = 0, _NAP
        self._index, self._reach = 0, 0.0
        self._look: float = 0
        self._elapsed, self._first = 0.0, True

    @property
    def n_fun(self) -> Any:
        """The evaluations that the companion cost, ``(B,)`` or a number."""
        if not self.plan.method.implicit or self._base is self.f:
            return self._n_fun
        return self._n_fun + sum(part.work.n_fun for part in (self._base, self._displaced))

    def due(self, quiet: bool, h: float) -> bool:
        """Whether there is something to be done in this attempt; ``quiet``: its error is next to nothing."""
        index = self._index
        self._index += 1
        self._elapsed += h
        if self._switching:
            return self.on or quiet or index >= self._look or h * self._fastest > NEAR * self._interval
        return self.on or quiet or index >= self._look or h > self._reach

    def error(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        scaled: Tensor,
        taken: Decision,
        quiet: Decision,
        longest: float,
        end: Tensor,
        slopes: Sequence[Tensor] | None = None,
    ) -> Measure | None:
        """The error of the companion's step, in units of the tolerance, or None: ``(B,)``, or a number where ``taken`` and ``quiet`` are.

        ``h``: a number, or (B, 1); ``scaled`` (B, n): the error of the state; ``taken`` (B,): who takes a step that would be accepted;
        ``quiet`` (B,): and whose error is next to nothing; ``longest``: ``|h|`` of all; ``end``: the new state; ``slopes``: those that
        its error weighs, where they are known.
        """
        with torch.no_grad():
            y, k1 = self._constant(y), self._constant(k1)
            unit = self._unit(y)
            resting = None
            if self.plan.method.implicit:
                # steps that are stable are too long for derivatives only where nothing moves
                moved, size, end = (self._constant(end) - y).abs(), y.abs(), self._constant(end)
                still = (moved <= STANDING * (size * self.plan.rtol + self.plan.atol)).all(-1)
                resting = moved <= 8 * torch.finfo(self.plan.real).eps * size
                still, some = (taken & (x > 0) for x in read(quiet, still, resting.any(-1)))
                quiet = quiet & still
                if self._split is None and not self.on and not any_of(some):
                    self._look_later(longest)
                    return None
            bound = self._bound(times, h, y, k1, unit, taken) if self._switching else 0.0
            if not self.on:
                self._with = False
            if not self.on or any_of(quiet & negated(self._with)):
                self._consider(times, h, y, k1, unit, scaled, taken, quiet, longest, resting)
                if not self.on:
                    return bound if self._switching else None
            found = self._step(times, h, y, k1, unit, taken & self._with, end, slopes)
            calm = not any_of(quiet | (found > 0.1))
            self._calm = self._calm + 1 if calm else 0
            self._reach = max(self._reach, _STRETCH * longest)
            if self._calm >= _CALM:
                self.on, self._calm = False, 0
                self._look, self._nap = self._index + self._nap, min(2 * self._nap, _LONGEST_NAP)
            if self._switching:
                self.rate = choose(taken & self._with, self._rate, self.rate)
                found = choose(found > bound, found, bound)
            return found

    def error_of_one(
        self, times: Sequence[Tensor], h: float, y: Tensor, k1: Tensor, y1: Tensor, slopes: Sequence[Tensor], scaled: Tensor, quiet: bool
    ) -> float:
        """`error` of one trajectory, whose states may have any shape, and the decision on it. ``slopes``: of the step from ``y`` to
        ``y1``, those that its error weighs."""
        found = self.error(times, h, y, k1, scaled, True, quiet, abs(h), y1, slopes)
        if found is None:
            return 0.0
        value = float(found)
        self.moved(value <= 1.0)
        return value

    def moved(self, accepted: Decision) -> None:
        """The step that was asked for was accepted, or refused for the companion's sake, by row."""
        self._distance = choose(column(accepted), self._proposed, self._distance)

    def _unit(self, y: Tensor) -> Tensor:
        """The displacement of every component: well within the tolerance, and well above rounding."""
        size = y.abs()
        if self._plain:
            return size * (self.plan.rtol + self._shift) + self.plan.atol
        return unit_of(size, self.plan.rtol, self.plan.atol, self._shift)

    def _random(self, y: Tensor) -> Tensor:
        """Numbers of size one, away from zero: what must not be negative stays so."""
        if self._pattern is None:
            # the same for every row, whoever else is there
            self._pattern = drawn(y.shape[-1:]).to(device=y.device, dtype=self.plan.real).expand(y.shape)
        # minus zero counts as zero
        return torch.copysign(self._pattern, y.real + 0.0)

    def _look_later(self, longest: float, soon: bool = False) -> None:
        late = [k for k in _LOOKS if k >= self._index]
        self._look = self._index if soon else math.inf if self._switching else late[0] if late else self._index + _LOOKS[-1]
        self._reach = _LONGER * longest

    def _consider(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        unit: Tensor,
        scaled: Tensor,
        taken: Decision,
        quiet: Decision,
        longest: float,
        resting: Tensor | None,
    ) -> None:
        """Whether the companion is needed."""
        first, self._first = self._first, False
        if self._probe is None:
            self._probe_anew(y, quiet)
        assert self._probe is not None
        # the size of the Jacobian in a direction that comes nearer and nearer to that of its largest eigenvalue
        self._n_fun += 1
        point = torch.addcmul(y, self._probe, unit)
        explicit, at = self.f, k1
        if self._split is None:
            change = whole = (self._slope(explicit, times[0], point) - at) / unit
        else:
            # of both parts where stillness is in question, of the explicit one where stability is
            explicit = self._split[0]
            at, there = (self._slope(explicit, times[0], x) for x in (y, point))
            change, whole = (there - at) / unit, (there + self._slope(self._split[1], times[0], point) - k1) / unit
        if resting is None:
            # of what moves an error may be next to nothing by rounding alone
            rounding = self.plan.scaled(k1 * h, y.abs()).abs() * (torch.finfo(self.plan.real).eps * _STILL / _CHANCE)
            error = scaled.abs()
            resting = error + rounding <= _STILL * error.amax(-1, keepdim=True)
        # what nothing moves may rest
        some = (resting & (whole != 0)).any(-1)
        largest = change.abs().amax(-1)
        size, moved, some = read(quiet, largest, largest if whole is change else whole.abs().amax(-1), some)
        usable = (size > 0) & (size < math.inf)
        rate = choose(usable, size / self._probed, 0.0)
        if not self._switching:
            self._rate = rate
        far = (rate * longest_of(h) > _EDGE * self._interval) & taken & (not self._switching)
        limit = far
        if any_of(far):
            # the mean of two rounds: with complex eigenvalues one alone goes up and down; and not of the first one alone, in which
            # components of other sizes may be moved by what is much to them and nothing to the whole
            fastest, turned = rate, change / column(choose(usable, size, 1.0))
            for _ in range(2):
                again = self._change(explicit, times[0], y, at, turned, unit)
                further = read(quiet, again.abs().amax(-1))[0]
                limit = limit & ((fastest * further) ** 0.5 * longest_of(h) > _EDGE * self._interval)
                if not any_of(limit):
                    break
                fastest, turned = further, again / column(choose((further > 0) & (further < math.inf), further, 1.0))
        length = choose(moved < math.inf, moved / self._probed, 0.0) * longest_of(h)
        # steps that are short enough for any mode are so for the next one, if not for the one behind it
        still, short = (quiet | (some > 0)) & taken, self._tol ** (1.0 / (self.plan.method.error_order + 1))
        early, still = still & (length < short), still & (length >= short)
        rests, stiff, soon, lost = any_of_each(still, limit, early, negated(usable))
        self._turn_probe(y, change, size, usable, lost)
        self._look_later(longest, soon)
        self._first = first and soon
        if not rests and not stiff:
            return
        new = (still | limit) & negated(self._with)
        if any_of(new):
            # no step is short enough for a derivative that is infinite, and the way back says so
            bounded = negated(self._endless(times[0], y, k1, unit, new))
            still, limit = still & bounded, limit & bounded
        self._with = self._with | still | limit
        self.on, self._calm = any_of(self._with), 0
        # of modes that were resolved before only their stability is at stake
        implicit = self.plan.method.implicit
        anew = ((still & (quiet | first | implicit)) | (limit & (rate * self._elapsed < _SETTLED))) & negated(self._known)
        begun = any_of(anew)
        if begun or (self.on and implicit and self._base is self.f):
            self._displaced = self._beside(True)
            if implicit:
                self._base = self._beside(False)
        if begun:
            self._known = self._known | anew
            distance = self._random(y).to(y.dtype)
            if implicit and self.plan.switch is not None:
                distance = self._slowed(times, h, y, k1, unit, distance)
            self._distance = choose(column(anew), distance, self._distance)

    def _slowed(self, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, unit: Tensor, distance: Tensor) -> Tensor:
        """The distance without what is fast, by long steps of a stable method: that was damped before the other method handed over."""
        sizes = _PASSED / torch.as_tensor(self._rate, dtype=self.plan.real, device=y.device).reshape(-1, 1)
        size = torch.as_tensor(h, dtype=self.plan.real, device=y.device).reshape(-1, 1)
        size = torch.copysign(torch.maximum(torch.where(sizes.isfinite(), sizes, 0.0), size.abs()), size)
        size = size if isinstance(h, Tensor) else size.reshape(())
        base = self._attempt(self._base, times, size, y, k1)[0]
        for _ in range(_ROUNDS):
            there = y + distance * unit
            slope = self._slope(self._displaced, times[0], there)
            distance = (self._attempt(self._displaced, times, size, there, slope)[0] - base) / unit
        return torch.where(distance.isfinite(), distance, 0.0)

    def _step(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        unit: Tensor,
        which: Decision,
        end: Tensor,
        slopes: Sequence[Tensor] | None,
    ) -> Measure:
        """Take the companion along; the error of its distance."""
        method = self.plan.method
        if slopes is None or method.implicit:
            # iterations of both ends where these differ by next to nothing
            y1, error = self._attempt(self._base, times, h, y, k1)
        else:
            y1, error = self._constant(end), method.error(h, [self._constant(k) for k in slopes])
        # stable steps need no search for modes that grow
        floor = 0.5 * self._tol * self._random(y) if self._interval < math.inf else 0.0
        before = (self._distance + floor) * unit
        there = y + before
        slope = self._slope(self._displaced, times[0], there)
        other, error_there = self._attempt(self._displaced, times, h, there, slope)
        if not method.implicit:
            self._n_fun += (1 if slopes is not None else 2) * method.evaluations
        self._n_fun += 1
        after = other - y1
        size = torch.maximum(unit, torch.maximum(before.abs(), after.abs()))
        # less what may be rounding
        difference = (error_there - error).abs() - 8 * torch.finfo(self.plan.real).eps * torch.maximum(y.abs(), y1.abs())
        after = after / unit
        found, largest = read(which, (difference.clamp(min=0.0) / (self._tol * size)).amax(-1), after.abs().amax(-1))
        # where it cannot be followed it says nothing, but for steps out of all proportion
        usable, wild = (found < math.inf) & (largest < math.inf), self._rate * longest_of(h) > self._interval
        after = after / column(choose(largest > 1e3, largest, 1.0))
        self._proposed = choose(column(usable), after, 0.0)
        found = choose(usable & which, found, choose(which & wild, _HUGE, 0.0))
        self._refused = choose(which, choose(found > 1.0, self._refused + 1, 0), self._refused)
        tiny = longest_of(h) <= _JUMPING * torch.finfo(self.plan.real).eps * times[0].abs()
        futile = tiny if isinstance(h, Tensor) else bool(tiny)
        return choose((self._refused > _FUTILE) | futile, 0.0, found)

    def _attempt(self, f: Any, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        method, shape = self.plan.method, self._shape
        if method.implicit and not isinstance(h, Tensor):
            h = torch.full((), h, dtype=self.plan.real, device=y.device)
        y1, ks = method.step(f, times, h, y.reshape(shape), k1.reshape(shape))
        if method.error_uses_end:
            ks = [*ks, f(times[method.n_stages], y1)]
        return y1.reshape(self._flat), method.error(h, ks).reshape(self._flat)

    def _probe_anew(self, y: Tensor, kind: Decision) -> None:
        self._probe = self._random(y)
        assert self._pattern is not None
        self._probed = read(kind, self._pattern.amax(-1))[0]

    def _turn_probe(self, y: Tensor, change: Tensor, size: Measure, usable: Decision, lost: bool) -> None:
        """Go on from ``change``, of this ``size``; ``lost``: somewhere it is not ``usable``."""
        probe = change / column(choose(usable, size, 1.0))
        if lost:
            self._probe_anew(y, usable)
            self._probe, self._probed = choose(column(usable), probe, self._probe), choose(usable, 1.0, self._probed)
        else:
            self._probe, self._probed = probe, 1.0

    def _bound(self, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, unit: Tensor, taken: Decision) -> Measure:
        """An error of steps beyond the stability of an explicit method that could hand over, by row: such steps are no better than none,
        and short ones speak for the other method. The size of the Jacobian is that at the start, and anew wherever it would be a bound."""
        first, length = self._probe is None, longest_of(h)
        near = taken & (self._rate * length > NEAR * self._interval)
        if first:
            self._probe_anew(y, taken)
            rate = 1.0
            for _ in range(PRODUCTS):
                rate = rate * self._product(times[0], y, k1, unit, taken, True) ** (1 / PRODUCTS)
            self._rate = rate
        elif any_of(near):
            # in units of the tolerance a single product may be anything, several in a row are the size of an eigenvalue
            size = self._product(times[0], y, k1, unit, taken, near)
            part = 1 / PRODUCTS
            self._rate = choose(near, self._rate ** (1 - part) * size**part, self._rate)
        self._fastest = float(torch.as_tensor(self._rate).max())
        level = self._rate * length / self._interval
        bound = taken & (level > 1.0)
        self.rate = choose(bound, self._rate, self.rate)
        return choose(bound, level ** (self.plan.method.error_order + 1), 0.0)

    def _product(self, t: Tensor, y: Tensor, k1: Tensor, unit: Tensor, kind: Decision, which: Decision) -> Measure:
        """A step of power iteration for the rows of ``which``: by how much the probe grew."""
        assert self._probe is not None
        probe, probed = self._probe, self._probed
        change = self._change(self.f, t, y, k1, probe, unit)
        (size,) = read(kind, change.abs().amax(-1))
        usable = (size > 0) & (size < math.inf)
        grown = choose(usable, size / probed, 0.0)
        self._turn_probe(y, change, size, usable, any_of(negated(usable)))
        self._probe, self._probed = choose(column(which), self._probe, probe), choose(which, self._probed, probed)
        return grown

    def _change(self, f: Flat, t: Tensor, y: Tensor, at: Tensor, probe: Tensor, unit: Tensor) -> Tensor:
        """The product of the Jacobian of ``f``, whose value is ``at``, with a direction, both in units of the displacement."""
        self._n_fun += 1
        return (self._slope(f, t, torch.addcmul(y, probe, unit)) - at) / unit

    def _endless(self, t: Tensor, y: Tensor, k1: Tensor, unit: Tensor, kind: Decision) -> Decision:
        """Whose derivative grows by one and the same factor whenever the displacement falls, as of a power below one at zero. A jump, or
        rounding, grows as displacements fall, and is left to the companion."""
        probe = self._random(y).to(y.dtype)
        sizes = [self._change(self.f, t, y, k1, probe, unit * part).abs() for part in (1.0, _FALL, _FALL**2)]
        once, twice = sizes[1] / sizes[0], sizes[2] / sizes[1]
        (found,) = read(kind, ((once > _GROWS) & (twice > 0.9 * once) & (twice < 1.1 * once) & (twice < 0.9 / _FALL)).any(-1))
        return found > 0

    def _slope(self, f: Flat, t: Tensor, y: Tensor) -> Tensor:
        return f(t, y.reshape(self._shape)).reshape(self._flat)

    def _constant(self, x: Tensor) -> Tensor:
        """Without its derivatives, ``(B, n)``."""
        x = x.detach()
        return x if x.shape == self._flat else x.reshape(self._flat)


def rests(record: Record, y0: Tensor, states: Callable[[], Iterable[Tensor]]) -> Tensor:
    """Of which trajectories (B,) a component was the same after all of the steps, if there were any. ``states``: those of the steps,
    (M, B, n), part by part."""
    # few are where they began after the last one
    returned = (record.last == y0) & (record.h != 0).any(0).unsqueeze(-1)
    if bool(returned.any()):
        for some in states():
            returned = returned & (some == y0).all(0)
    return returned.any(-1)


def displaced(x: Tensor) -> Tensor:
    """What ``fun`` depends on, a little larger everywhere; what is zero by what is small beside the rest of it, or beside one."""
    if not (x.is_floating_point() or x.is_complex()) or not x.numel():
        return x
    x = x.detach()
    shift = torch.finfo(x.dtype).eps ** 0.4
    largest = x.abs().amax()
    size = torch.maximum(x.abs(), torch.where(largest > 0, largest, 1.0) * 1e-3)
    return torch.where(x.real < 0, x - shift * size, x + shift * size)


def longest_of(h: float | Tensor) -> float | Tensor:
    """``|h|``, a number or ``(B,)``."""
    return h.abs().squeeze(-1) if isinstance(h, Tensor) else abs(h)


def unit_of(size: Tensor, rtol: float | Tensor, atol: float | Tensor, shift: float) -> Tensor:
    """The displacement of components of this ``size`` ``(B, n)``: within the tolerance, however wide that is, and ``shift`` of it more."""
    unit = size * shift + torch.minimum(size * rtol + atol, (size + 1.0) * WIDEST)
    # without an absolute tolerance a component that is zero has no size of its own
    whole = size.amax(-1, keepdim=True) * shift
    unit = torch.where(unit > 0, unit, whole)
    return torch.where(unit > 0, unit, shift)


def drawn(shape: torch.Size) -> Tensor:
    """Numbers between a half and three halves, the same for every solve."""
    known = _PATTERNS.get(shape)
    if known is not None:
        return known
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") + 0.5
    # made inside of a transform, or in inference mode, it must not outlive it
    passing = type(drawn) is not Tensor or is_functorch_wrapped_tensor(drawn) or drawn.is_inference()
    if drawn.numel() <= _SMALL and len(_PATTERNS) < _MANY and not passing:
        _PATTERNS[shape] = drawn
    return drawn
