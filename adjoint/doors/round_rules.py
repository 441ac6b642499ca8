"""What ends a round of a solve with resets, and what is done then: the user's events as the rounds see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..errors import InvalidInput
from ..sensitivity.products import tangent, vjp
from ..system.system import StateSpec
from .event_data import Event
from .event_slope import signed
from .parts import event_list, event_name, terminal_count
from .rows import anywhere, chosen, forward_fill, still, wide

__all__ = ["NEAR", "Boundary", "Rule", "like_mode", "listed", "rearmed", "rule_of", "shifted"]

#: times that differ by less, in units of rounding of the times of the solve, are one
NEAR = 64.0


@dataclass(frozen=True)
class Boundary:
    """Where rounds meet: time ``(R)``, state and mode of every trajectory, before or after the resets."""

    t: Tensor
    y: Any
    mode: tuple[Any, ...]

    def still(self) -> Boundary:
        return Boundary(self.t.detach(), still(self.y), still(self.mode))


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

    def applied(self, on: Tensor, at: Boundary, args: tuple[Any, ...], spec: StateSpec) -> tuple[Boundary, Any]:
        """The boundary after the reset of the trajectories that are ``on``, and the states that it gave."""
        if self.reset is None:
            return at, None
        t, y, mode = forward_fill(on, (at.t.to(spec.real_dtype), at.y, at.mode))
        given = self.reset(t, y, *mode, *args)
        if at.mode:
            if not isinstance(given, tuple) or len(given) != 2:
                raise InvalidInput(f"the reset of {self.title} must return (y, mode), as there is mode=; got {_shown(given)}")
            given, new = given
            mode = (like_mode(new, at.mode[0], f"the mode that the reset of {self.title} returned"),)
        spec.check(given, f"what the reset of {self.title} returned")
        return Boundary(at.t, chosen(on, given, at.y), chosen(on, mode, at.mode) if at.mode else ()), given


def like_mode(new: Any, old: Any, what: str) -> Any:
    """A new mode as tensors of the shapes and dtypes of the old one; numbers stand for all trajectories."""
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
    direction = float(getattr(event, "direction", 0.0))
    return Rule(own, direction, terminal_count(event), getattr(event, "reset", None), name, title)


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


Slope = Callable[[Tensor, Any, tuple[Any, ...]], Any]


@torch.no_grad()
def rearmed(
    rule: Rule,
    hit: Tensor,
    before: Boundary,
    after: Boundary,
    args: tuple[Any, ...],
    slope: Slope | None,
    sign: Tensor,
    reach: Tensor,
    eps: float,
) -> Tensor:
    """What is added ``(R)`` to the event function in the round after its own event.

    Where a reset leaves the function at zero, rounding decides its sign, and with it whether the event is found again at once. There it
    counts as being on the side of zero to which it moves, however little: a ball that leaves the ground is above it, and what goes on
    through a switching surface is beyond it. Zero is what lies within `NEAR` units of rounding of the time (``reach``: the largest time,
    ``eps``: of the state's numbers; ``sign``: the direction of time) or of the terms of the function, or was taken for zero at the event
    itself. A function that does not move at first order moves where it is bent to; if that is on across, its event is found again, and in
    the end `EventsAccumulate` says that nothing turns it back. One that does not move at all is where it came from.
    """
    zero = torch.zeros_like(hit, dtype=reach.dtype)
    if not anywhere(hit):
        return zero
    before, after, args = before.still(), after.still(), still(args)
    sides = [forward_fill(hit, (side.t, side.y, side.mode)) for side in (before, after)]
    (left, left_slope, left_bend), (value, rate, bend) = (_along(rule, side, args, slope) for side in sides)
    left_slope, rate, terms = sign * left_slope, sign * rate, _terms(rule, sides[1], args)
    bound = 4 * left.abs() + NEAR * eps * (reach * torch.maximum(left_slope.abs(), rate.abs()) + terms)
    near = hit & (value.abs() <= bound)
    moved = torch.where(left_slope != 0, left_slope, left_bend)
    crossed = torch.full_like(rate, rule.direction).sign() if rule.direction else moved.sign()
    held = torch.where((bend != 0) & (bend.sign() != crossed), bend.sign(), -crossed)
    side = torch.where(rate != 0, rate.sign(), held)
    # more than what the same terms may differ by when they are computed in another order
    least = torch.clamp(8 * eps * terms, min=16 * torch.finfo(torch.float32 if eps > 1e-10 else torch.float64).tiny)
    return torch.where(near, side * least - value, zero)


def _terms(rule: Rule, at: tuple[Tensor, Any, tuple[Any, ...]], args: tuple[Any, ...]) -> Tensor:
    """The size ``(R)`` of what the event function is made from: each variable times the derivative in it."""
    t, y, mode = at
    leaves, tree = tree_flatten(y)

    def value(t: Tensor, *leaves: Tensor) -> Tensor:
        return signed(rule.function(t, tree_unflatten(list(leaves), tree), *mode, *args)).reshape(t.shape).to(t.dtype)

    with torch.enable_grad():
        out, pull = vjp(value, t, *leaves)
        bars = pull(torch.ones_like(out))
    each = [(bar * x).detach().abs().to(t.dtype) for bar, x in zip(bars, (t, *leaves), strict=True)]
    return torch.stack([x.reshape(*t.shape, -1).sum(-1) for x in each]).sum(0)


def _along(
    rule: Rule, at: tuple[Tensor, Any, tuple[Any, ...]], args: tuple[Any, ...], slope: Slope | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The event function ``(R)``, and its first two derivatives along the solution; zero where the slope of the state is not known."""
    t, y, mode = at

    def value(tau: Tensor) -> Tensor:
        if slope is None:
            moved = y
        else:
            half = tree_map(lambda a, b: a + wide(tau / 2, a).to(a.dtype) * b, y, slope(t, y, mode))
            # of second order: the derivatives of the midpoint rule are those of the solution
            rate = slope(t + tau / 2, half, mode)
            moved = tree_map(lambda a, b: a + wide(tau, a).to(a.dtype) * b, y, rate)
        return signed(rule.function(t + tau, moved, *mode, *args)).reshape(t.shape).to(t.dtype)

    def first(tau: Tensor) -> Tensor:
        out: Tensor = tangent(value, (tau,), (torch.ones_like(tau),))
        return out

    start = torch.zeros_like(t)
    if slope is None:
        return value(start), start, start
    with torch.enable_grad():
        now, rate = value(start).detach(), first(start).detach()
        bend = tangent(first, (start,), (torch.ones_like(start),)).detach() if anywhere(rate == 0) else start
    return now, rate, bend
