"""Steps that are small enough for derivatives too, where the state itself asks for none.

Step sizes go by the error of the state. Where that is at rest, is constant or moves along a slow manifold, it says nothing about what a
small displacement would do: steps of an explicit method grow past its stability, and the derivatives of these steps, exact as they are,
are those of unstable steps. So from time to time such solves are asked whether they rest (`Companion.due`), and where they do, a displaced
solution is carried along, whose distance from the solution, a tangent by finite differences, is put under error control as well. The
distance never falls below half of what the error test sees, so that it also finds, as by power iteration with the steps themselves, modes
that have died away long ago and would be unstable in longer steps.

The test of every so many steps is a step of power iteration for the size of the Jacobian, as in Sommeijer, Shampine & Verwer (1997), RKC.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import Plan, Record

__all__ = ["QUIET", "Companion", "companion_of", "displaced", "rests"]

Flat = Callable[[Tensor, Tensor], Tensor]
#: by row, ``(B,)``; of one trajectory Python's own, which cost no tensor operators
_Mask = Tensor | bool
_Number = Tensor | float

#: errors, in units of the tolerance, of a state and of a component that are at rest
QUIET, _STILL = 1e-8, 1e-10
#: part of the interval of stability from which on steps are looked after
_EDGE = 0.8
#: steps without need for it after which the companion is left, for how many, and how much longer steps may become meanwhile
_CALM, _NAP, _LONGEST_NAP, _STRETCH = 4, 16, 256, 1.25
#: a look is had at the first attempt, then after so many, and where steps have become so much longer
_LOOKS, _LONGER = (0, 8, 24), 2.0
#: refusals in a row after which a distance is taken for rounding
_FUTILE = 25
#: times of the fastest mode after which it has died away, if it does
_SETTLED = 20.0
#: bounds of the displacement beside its part above rounding, relative and absolute
_WIDEST = 1e-3
#: drawn numbers by shape, so many of so many at the most
_PATTERNS: dict[torch.Size, Tensor] = {}
_MANY, _SMALL = 64, 4096


def companion_of(
    f: Flat, plan: Plan, beside: Callable[[], Flat] | None, like: Tensor, flat: Sequence[int] | None = None
) -> Companion | None:
    """The companion of a solve, for explicit methods with error control whose derivatives are wanted. ``like``: a state as ``f`` takes it;
    ``flat``: its shape ``(B, n)``, where that is another."""
    method = plan.method
    if beside is None or method.implicit or not method.adaptive or not like.numel():
        return None
    if flat is None or like.shape == torch.Size(flat):
        return Companion(f, plan, beside, like)
    shape, size = like.shape, torch.Size(flat)

    def flattened(g: Flat) -> Flat:
        return lambda t, y: g(t, y.reshape(shape)).reshape(size)

    return Companion(flattened(f), plan, lambda: flattened(beside()), like.reshape(size))


class Companion:
    """A solution beside the solution.

    Parameters
    ----------
    f : right-hand side for states ``(B, n)``
    beside : gives it with all that it depends on displaced by a little; for the companion of states at rest
    like : (B, n)
    """

    def __init__(self, f: Flat, plan: Plan, beside: Callable[[], Flat], like: Tensor) -> None:
        self.f, self.plan, self._beside = f, plan, beside
        eps = torch.finfo(plan.real).eps
        self._shift = eps**0.4
        rtol = plan.rtol if isinstance(plan.rtol, float) else float(plan.rtol.detach().max())
        self._tol = max(rtol, eps**0.45)
        tiny = torch.finfo(plan.real).tiny
        #: tolerances of the usual size: `_unit` is linear in the size of the state, and never zero
        self._plain = isinstance(plan.rtol, float) and isinstance(plan.atol, float) and rtol <= _WIDEST and tiny < plan.atol <= _WIDEST
        self.on = False
        #: what the companion cost, ``(B,)`` or a number
        self.n_fun = 0
        self._displaced: Flat = f
        #: displacement in units of `_unit`, and that behind the step that was asked for
        self._distance: _Number = 0.0
        self._proposed: _Number = 0.0
        #: whose displacement is known, and who is followed
        self._known: _Mask = False
        self._with: _Mask = False
        self._pattern: Tensor | None = None
        #: direction of power iteration, and its size
        self._probe: Tensor | None = None
        self._probed: _Number = 1.0
        self._refused: Tensor | int = 0
        self._calm, self._nap = 0, _NAP
        self._index, self._look, self._reach = 0, 0, 0.0
        self._elapsed, self._first = 0.0, True

    def due(self, quiet: bool, h: float) -> bool:
        """Whether there is something to be done in this attempt; ``quiet``: its error is next to nothing."""
        index = self._index
        self._index += 1
        self._elapsed += h
        return self.on or quiet or index >= self._look or h > self._reach

    def error(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        scaled: Tensor,
        taken: _Mask,
        quiet: _Mask,
        longest: float,
        step: tuple[Tensor, Sequence[Tensor]] | None = None,
    ) -> _Number | None:
        """The error of the companion's step, in units of the tolerance, or None: ``(B,)``, or a number where ``taken`` and ``quiet`` are.

        ``h``: a number, or (B, 1); ``scaled`` (B, n): the error of the state; ``taken`` (B,): who takes a step that would be accepted;
        ``quiet`` (B,): and whose error is next to nothing; ``longest``: ``|h|`` of all; ``step``: the new state, and the slopes that its
        error weighs, where they are known.
        """
        with torch.no_grad():
            y, k1 = _constant(y, scaled), _constant(k1, scaled)
            unit = self._unit(y)
            if not self.on:
                self._with = False
            if not self.on or _any(quiet & _not(self._with)):
                self._consider(times, h, y, k1, unit, scaled, taken, quiet, longest)
                if not self.on:
                    return None
            found = self._step(times, h, y, k1, unit, taken & self._with, step)
            calm = not _any(quiet | (found > 0.1))
            self._calm = self._calm + 1 if calm else 0
            self._reach = max(self._reach, _STRETCH * longest)
            if self._calm >= _CALM:
                self.on, self._calm = False, 0
                self._look, self._nap = self._index + self._nap, min(2 * self._nap, _LONGEST_NAP)
            return found

    def error_of_one(
        self, times: Sequence[Tensor], h: float, y: Tensor, y1: Tensor, slopes: Sequence[Tensor], scaled: Tensor, quiet: bool
    ) -> float:
        """`error` of one trajectory, whose states may have any shape, and the decision on it. ``slopes``: of the step from ``y`` to
        ``y1``, those that its error weighs."""
        found = self.error(times, h, y, slopes[0], scaled, True, quiet, abs(h), (y1, slopes))
        if found is None:
            return 0.0
        value = float(found)
        self.moved(value <= 1.0)
        return value

    def moved(self, accepted: _Mask) -> None:
        """The step that was asked for was accepted, or refused for the companion's sake, by row."""
        self._distance = _where(_column(accepted), self._proposed, self._distance)

    def _unit(self, y: Tensor) -> Tensor:
        """The displacement of every component: well within the tolerance, and well above rounding."""
        size = y.abs()
        if self._plain:
            return size * (self.plan.rtol + self._shift) + self.plan.atol
        unit = size * self._shift + torch.minimum(size * self.plan.rtol + self.plan.atol, (size + 1.0) * _WIDEST)
        # without an absolute tolerance a component that is zero has no size of its own
        whole = size.amax(-1, keepdim=True) * self._shift
        unit = torch.where(unit > 0, unit, whole)
        return torch.where(unit > 0, unit, self._shift)

    def _random(self, y: Tensor) -> Tensor:
        """Numbers of size one, away from zero: what must not be negative stays so."""
        if self._pattern is None:
            self._pattern = _drawn(y.shape).to(device=y.device, dtype=self.plan.real)
        # minus zero counts as zero
        return torch.copysign(self._pattern, y.real + 0.0)

    def _consider(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        unit: Tensor,
        scaled: Tensor,
        taken: _Mask,
        quiet: _Mask,
        longest: float,
    ) -> None:
        """Whether the companion is needed."""
        first, self._first = self._first, False
        if self._probe is None:
            self._probe = self._random(y)
            assert self._pattern is not None
            self._probed = _numbers(quiet, self._pattern.amax(-1))[0]
        # the size of the Jacobian in a direction that comes nearer and nearer to that of its largest eigenvalue
        self.n_fun += 1
        change = (self.f(times[0], torch.addcmul(y, self._probe, unit)) - k1) / unit
        size, least, most = _numbers(quiet, change.abs().amax(-1), *scaled.abs().aminmax(dim=-1))
        usable = (size > 0) & (size < math.inf)
        rate = _where(usable, size / self._probed, 0.0)
        length = rate * longest_of(h)
        limit = (length > _EDGE * self.plan.method.interval) & taken  # type: ignore[attr-defined]
        # steps that are short enough for any mode are so for the next one, if not for the one behind it
        still, short = (quiet | (least <= _STILL * most)) & taken, self._tol ** (1.0 / (self.plan.method.error_order + 1))
        early, still = still & (length < short), still & (length >= short)
        resting, stiff, soon, lost = _any_of(still, limit, early, _not(usable))
        self._probe = change / _column(_where(usable, size, 1.0))
        self._probed = 1.0
        if lost:
            self._probe = _where(_column(usable), self._probe, self._random(y))
            assert self._pattern is not None
            self._probed = _where(usable, 1.0, _numbers(quiet, self._pattern.amax(-1))[0])
        late = [k for k in _LOOKS if k >= self._index]
        self._look = self._index if soon else late[0] if late else self._index + _LOOKS[-1]
        self._reach = _LONGER * longest
        self._first = first and soon
        if not resting and not stiff:
            return
        self.on, self._calm, self._with = True, 0, self._with | still | limit
        # of modes that were resolved before only their stability is at stake
        anew = ((still & quiet) | (limit & (rate * self._elapsed < _SETTLED)) | (still & first)) & _not(self._known)
        if _any(anew):
            self._displaced = self._beside()
            self._known = self._known | anew
            self._distance = _where(_column(anew), self._random(y).to(y.dtype), self._distance)

    def _step(
        self,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        k1: Tensor,
        unit: Tensor,
        which: _Mask,
        step: tuple[Tensor, Sequence[Tensor]] | None,
    ) -> _Number:
        """Take the companion along; the error of its distance."""
        method = self.plan.method
        if step is None:
            y1, error = self._attempt(self.f, times, h, y, k1)
        else:
            y1, error = _constant(step[0], y), method.error(h, [_constant(k, y) for k in step[1]])
        floor = 0.5 * self._tol * self._random(y)
        before = (self._distance + floor) * unit
        there = y + before
        other, error_there = self._attempt(self._displaced, times, h, there, self._displaced(times[0], there))
        self.n_fun += (1 if step is not None else 2) * method.evaluations + 1
        after = other - y1
        size = torch.maximum(unit, torch.maximum(before.abs(), after.abs()))
        # less what may be rounding
        difference = (error_there - error).abs() - 8 * torch.finfo(self.plan.real).eps * torch.maximum(y.abs(), y1.abs())
        after = after / unit
        found, largest = _numbers(which, (difference.clamp(min=0.0) / (self._tol * size)).amax(-1), after.abs().amax(-1))
        # where it cannot be followed it says nothing
        usable = (found < math.inf) & (largest < math.inf)
        after = after / _column(_where(largest > 1e3, largest, 1.0))
        self._proposed = _where(_column(usable), after, 0.0)
        found = _where(usable & which, found, 0.0)
        self._refused = _where(which, _where(found > 1.0, self._refused + 1, 0), self._refused)
        return _where(self._refused <= _FUTILE, found, 0.0)

    def _attempt(self, f: Flat, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, Tensor]:
        method = self.plan.method
        y1, ks = method.step(f, times, h, y, k1)
        if method.error_uses_end:
            ks = [*ks, f(times[method.n_stages], y1)]
        return y1, method.error(h, ks)


def rests(record: Record) -> bool:
    """Whether a component of a trajectory was the same after all of its steps."""
    states = record.states
    return bool((states[1:] == states[:1]).all(0).any())


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


def _drawn(shape: torch.Size) -> Tensor:
    """Numbers between a half and three halves, the same for every solve."""
    known = _PATTERNS.get(shape)
    if known is not None:
        return known
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu") + 0.5
    # made inside of a transform, or in inference mode, it must not outlive it
    passing = type(drawn) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(drawn) or drawn.is_inference()
    if drawn.numel() <= _SMALL and len(_PATTERNS) < _MANY and not passing:
        _PATTERNS[shape] = drawn
    return drawn


def _constant(x: Tensor, like: Tensor) -> Tensor:
    """Without its derivatives, in the shape of ``like``."""
    x = x.detach()
    return x if x.shape == like.shape else x.reshape(like.shape)


# The rules are written once, for masks and numbers of either kind.


def _numbers(kind: _Mask, *values: Any) -> Any:
    """Tensors ``(B,)`` as they are, or as numbers where ``kind`` is one, all read at once."""
    if isinstance(kind, Tensor):
        return values
    return torch.cat(values).tolist()


def _not(mask: _Mask) -> _Mask:
    return ~mask if isinstance(mask, Tensor) else not mask


def _any(mask: _Mask) -> bool:
    return bool(mask.any()) if isinstance(mask, Tensor) else mask


def _any_of(*masks: _Mask) -> list[bool]:
    """`_any` of each, read at once."""
    tensors = [m.any() for m in masks if isinstance(m, Tensor)]
    return torch.stack(tensors).tolist() if len(tensors) == len(masks) else [_any(m) for m in masks]


def _where(mask: _Mask, yes: Any, no: Any) -> Any:
    if isinstance(mask, Tensor):
        return torch.where(mask, yes, no)
    return yes if mask else no


def _column(x: _Number) -> Any:
    """``(B, 1)`` of ``(B,)``."""
    return x.unsqueeze(-1) if isinstance(x, Tensor) else x
