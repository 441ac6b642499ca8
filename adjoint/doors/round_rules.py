"""What ends a round of a solve with resets, and what is done then: the user's events as the rounds see them."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from ..errors import InvalidInput
from ..sensitivity.products import tangent, vjp
from ..system.normalizing import composing
from ..system.origins import attribute
from ..system.system import StateSpec, in_order
from ..system.transforms import anywhere
from .event_data import Event
from .event_slope import signed
from .parts import event_list, event_name, terminal_count
from .rows import chosen, forward_fill, no_number, still, wide

__all__ = ["NEAR", "Boundary", "Rule", "Scale", "asked", "like_mode", "listed", "off_zero", "rearmed", "rule_of", "shifted"]

#: times that differ by less, in units of rounding of the times of the solve, are one
NEAR = 64.0
#: what a reset that leaves an event function at zero may make of what it was off, times that
_TIMES = 8.0
#: how many tolerances implicit equations may be off by, of what they keep at zero
_LOOSE = 10.0


@dataclass(frozen=True)
class Boundary:
    """Where rounds meet: time ``(R)``, state and mode of every trajectory, before or after the resets; of implicit equations the slopes.
    ``integral``: what is added to the integrals up to there, if anything."""

    t: Tensor
    y: Any
    mode: tuple[Any, ...]
    yp: Any = None
    integral: Any = None

    def still(self) -> Boundary:
        return Boundary(still(self.t), still(self.y), still(self.mode), None if self.yp is None else still(self.yp))


_asked: ContextVar[Tensor | None] = ContextVar("where the reset that runs is asked for", default=None)


def asked(flags: Tensor) -> Tensor:
    """Of ``flags`` (..., c) that a reset raises, those of trajectories for which it is asked: what others give is not looked at."""
    on = _asked.get()
    return flags if on is None else flags & on.unsqueeze(-1)


@dataclass(frozen=True)
class Rule:
    """An event of the user. ``terminal``: see `terminal_count`."""

    function: Callable[..., Tensor]
    direction: float
    terminal: int
    reset: Callable[..., Any] | None
    name: str | None
    title: str

    @property
    def resets(self) -> bool:
        """Whether it changes the state."""
        return self.reset is not None

    @property
    def ends(self) -> bool:
        """Whether it ends rounds; else it is recorded only."""
        return self.reset is not None or self.terminal > 0

    def value(self, *args: Any) -> Tensor:
        """The event function, as real numbers."""
        return signed(composing(self.function)(*args))

    def applied(self, on: Tensor, at: Boundary, args: tuple[Any, ...], spec: StateSpec) -> tuple[Boundary, Any]:
        """The boundary after the reset of the trajectories that are ``on``, and the states that it gave."""
        if self.reset is None:
            return at, None
        given, mode = self._given(on, at, args, spec)
        finite = torch.isfinite(spec.flatten(still(given))).all(-1).reshape(on.shape)
        if on.dim() and anywhere(on & ~finite):
            # of trajectories that are lost by it nothing is differentiated: it would be so in what they share with the others, too
            alive, lost = on & finite, tree_map(lambda x: torch.full_like(x.detach(), no_number(x)), given)
            left = self._given(alive, at, args, spec) if anywhere(alive) else still((given, mode))
            given, mode = chosen(finite, left[0], lost), left[1]
        return replace(at, y=chosen(on, given, at.y), mode=chosen(on, mode, at.mode) if at.mode else ()), given

    def _given(self, on: Tensor, at: Boundary, args: tuple[Any, ...], spec: StateSpec) -> tuple[Any, tuple[Any, ...]]:
        """States and modes that the reset gives, of which those of trajectories that are ``on`` are looked at."""
        assert self.reset is not None
        t, y, mode = forward_fill(on, (at.t.to(spec.real_dtype), at.y, at.mode))
        token = _asked.set(on)
        try:
            given = composing(self.reset)(t, y, *mode, *args)
        finally:
            _asked.reset(token)
        if at.mode:
            if not isinstance(given, tuple) or len(given) != 2:
                raise InvalidInput(f"the reset of {self.title} must return (y, mode), as there is mode=; got {_shown(given)}")
            given, new = given
            mode = (like_mode(new, at.mode[0], f"the mode that the reset of {self.title} returned"),)
        return spec.check(given, f"what the reset of {self.title} returned"), mode


def like_mode(new: Any, old: Any, what: str) -> Any:
    """A new mode as tensors of the shapes and dtypes of the old one, with its dicts in the order that they have there; numbers stand for
    all trajectories."""
    new = in_order(old, new)
    tree = tree_flatten(new)[1]
    if tree != tree_flatten(old)[1]:
        raise InvalidInput(f"{what} has the structure {tree}, but mode has {tree_flatten(old)[1]}")

    def one(x: Any, y: Tensor) -> Tensor:
        x = torch.as_tensor(x, device=y.device)
        lossy = not torch.can_cast(x.dtype, y.dtype) or x.dim() > y.dim()
        if lossy or any(a not in (1, b) for a, b in zip(reversed(x.shape), reversed(y.shape), strict=False)):
            raise InvalidInput(f"{what} is {tuple(x.shape)} {x.dtype}, but mode is {tuple(y.shape)} {y.dtype}")
        return x.to(y.dtype).expand_as(y)

    return tree_map(one, new, old)


def _shown(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def listed(events: Any) -> list[Any]:
    """The entries of ``events=``."""
    return [] if events is None else list(events) if isinstance(events, (tuple, list)) else [events]


def rule_of(event: Any, i: int) -> Rule:
    """An event of the user, the ``i``-th; raises `InvalidInput` for what is none."""
    event_list(event)
    name = event_name(event)
    title = f"event {name!r}" if name and name != "<lambda>" else f"events[{i}]"
    own = event.function if isinstance(event, Event) else event
    direction = float(attribute(event, "direction", 0.0))
    return Rule(own, direction, terminal_count(event), attribute(event, "reset"), name, title)


def shifted(rule: Rule, shift: Tensor, extra: int) -> Callable[..., Tensor]:
    """The event function of one round. ``shift`` (R) is added, which after a reset makes up for rounding: see `rearmed`. ``extra``: how
    many of the last arguments are not the user's."""

    def watched(t: Tensor, y: Any, *args: Any) -> Tensor:
        value = rule.function(t, y, *args[: len(args) - extra])
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() != shift.numel():
            return value
        return value + shift.reshape(value.shape)

    watched.terminal, watched.direction = rule.ends, rule.direction  # type: ignore[attr-defined]
    return watched


#: ``slope(t, y, mode)``
Slope = Callable[[Tensor, Any, tuple[Any, ...]], Any]


@dataclass(frozen=True)
class Scale:
    """Direction of time, largest time ``(R)``, precision of the state's numbers, and the largest tolerances of the solve."""

    sign: Tensor
    reach: Tensor
    eps: float
    rtol: float
    atol: float


def off_zero(rule: Rule, hit: Tensor, left: Boundary, args: tuple[Any, ...]) -> Tensor:
    """By how much ``(R)`` an event function is not zero where its event ended a round, ``left``: more than by rounding where another solve
    found the event than the one that comes to it."""
    if not anywhere(hit):
        return torch.zeros_like(hit, dtype=left.t.dtype)
    with torch.inference_mode(False), torch.no_grad():
        at = left.still()
        return torch.where(hit, _value(rule, forward_fill(hit, (at.t, at.y, at.mode)), still(args)).abs(), 0.0)


def rearmed(
    rule: Rule,
    hit: Tensor,
    off: Tensor,
    begun: Boundary,
    shift: Tensor,
    after: Boundary,
    args: tuple[Any, ...],
    slope: Slope | None,
    scale: Scale,
) -> Tensor:
    """What is added ``(R)`` to the event function in the round after its own event, where it was ``off`` zero: see `off_zero`.

    ``begun``: where the round that ended so began, with the ``shift`` that was added there; ``after``: where the next one does. ``slope``:
    the right-hand side, None where there are slopes ``after.yp``.

    Where a reset leaves the function at zero, rounding decides its sign, and with it whether the event is found again at once. There it
    counts as being on the side of zero to which it moves, however little: a ball that leaves the ground is above it, and what goes on
    through a switching surface is beyond it. Zero is what lies within `NEAR` units of rounding of the time or of the terms of the function,
    or within some times of what it was ``off`` before.
    A function that does not move at first order, but for rounding, moves where it is bent to; if that is on across, its event is found
    again, and in the end `EventsAccumulate` says that nothing turns it back. One that does not move at all is where it came from.
    Of implicit equations one that does not, but for the tolerances, may be what they keep at zero from then on, to these tolerances (the
    voltage that a charger holds): it is where it came from while it is not further from zero.
    """
    zero = torch.zeros_like(hit, dtype=scale.reach.dtype)
    if not anywhere(hit):
        return zero
    # slopes are taken here whatever the caller wants, in his inference mode too
    with torch.inference_mode(False), torch.no_grad():
        hit, shift, off, args = still((hit, shift, off, args))
        begun, after = begun.still(), after.still()
        at = forward_fill(hit, (after.t, after.y, after.mode))
        with torch.enable_grad():
            # which the right-hand side may want for derivatives of its own
            rates = still(forward_fill(hit, after.yp) if slope is None else slope(*at))
        terms, moving, free = _terms(rule, at, rates, args)
        value, rate, bend = _along(rule, at, NEAR * scale.eps * moving, None if slope is not None else rates, args, slope)
        near = hit & (value.abs() <= NEAR * scale.eps * (scale.reach * rate.abs() + terms) + _TIMES * off)
        if rule.direction:
            crossed = torch.full_like(rate, rule.direction).sign()
        else:
            crossed = -(_value(rule, forward_fill(hit, (begun.t, begun.y, begun.mode)), args) + shift).sign()
        resting = (rate.abs() <= _LOOSE * scale.rtol * moving) & (slope is None)
        rate = torch.where(resting, 0.0, scale.sign * rate)
        held = torch.where((bend != 0) & (bend.sign() != crossed), bend.sign(), -crossed)
        side = torch.where(rate != 0, rate.sign(), held)
        # more than what the same terms may differ by when they are computed in another order
        least = torch.clamp(8 * scale.eps * terms, min=16 * torch.finfo(torch.float32 if scale.eps > 1e-10 else torch.float64).tiny)
        least = torch.where(resting, torch.maximum(least, _LOOSE * (scale.rtol * terms + scale.atol * free)), least)
        return torch.where(near, side * least - value, 0.0)


_Point = tuple[Tensor, Any, tuple[Any, ...]]


def _value(rule: Rule, at: _Point, args: tuple[Any, ...]) -> Tensor:
    """The event function ``(R)``."""
    t, y, mode = at
    return rule.value(t, y, *mode, *args).reshape(t.shape).to(t.dtype)


def _terms(rule: Rule, at: _Point, rates: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The sizes ``(R)`` of what the event function is made from, each variable times the derivative in it; of what its slope is made
    from, each derivative times the rate of the variable; and of the derivatives in the state."""
    t, y, mode = at
    leaves, tree = tree_flatten(y)

    def value(t: Tensor, *leaves: Tensor) -> Tensor:
        return _value(rule, (t, tree_unflatten(list(leaves), tree), mode), args)

    with torch.enable_grad():
        out, pull = vjp(value, t, *leaves)
        bars = pull(torch.ones_like(out))

    def size(factors: tuple[Any, ...]) -> Tensor:
        each = [(bar * x).detach().abs().to(t.dtype) for bar, x in zip(bars, factors, strict=True)]
        return torch.stack([x.reshape(*t.shape, -1).sum(-1) for x in each]).sum(0)

    none, ones = torch.zeros_like(t), [torch.ones_like(x) for x in leaves]
    return size((t, *leaves)), size((torch.ones_like(t), *tree_leaves(rates))), size((none, *ones))


def _along(
    rule: Rule, at: _Point, least: Tensor, known: Any, args: tuple[Any, ...], slope: Slope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The event function ``(R)``, and its first two derivatives along the solution: a first one below ``least`` is zero, the second one is
    taken for zero where there is no right-hand side, but ``known`` rates."""
    t, y, mode = at

    def moved(tau: Tensor, rate: Any) -> Any:
        return tree_map(lambda a, b: a + wide(tau, a).to(a.dtype) * b, y, rate)

    def value(tau: Tensor) -> Tensor:
        # of second order: the derivatives of the midpoint rule are those of the solution
        rate = known if slope is None else slope(t + tau / 2, moved(tau / 2, slope(t, y, mode)), mode)
        return _value(rule, (t + tau, moved(tau, rate), mode), args)

    def first(tau: Tensor) -> Tensor:
        out: Tensor = tangent(value, (tau,), (torch.ones_like(tau),))
        return out

    start = torch.zeros_like(t)
    with torch.enable_grad():
        now, rate = value(start).detach(), first(start).detach()
        rate = torch.where(rate.abs() <= least, 0.0, rate)
        bend = start
        if slope is not None and anywhere(rate == 0):
            bend = tangent(first, (start,), (torch.ones_like(start),)).detach()
    return now, rate, bend
