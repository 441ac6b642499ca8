"""Mechanisms with contacts: impacts are events with resets, contacts that last are modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import EventsAccumulate, InvalidInput, UnsupportedCombination
from ..system.capture import moves, readable
from ..system.system import StateSpec
from ..system.transforms import anywhere, every_copy, naming_faults
from .contacts import Contacts
from .dae import solve_dae
from .doses import Doses
from .event_data import Event
from .holonomic import bend, jacobian, rate, saddle, solved
from .impacts import complementary, compliance, pressed
from .mechanism import Mechanism, check_options
from .round_rules import NEAR, Rule, asked, listed, rule_of
from .round_task import mode_of
from .solution import Solution

__all__ = ["ContactMechanics", "ContactState"]

#: the exponent of rounding: parts that overlap by less than this, beside the terms of the gap, touch each other
_OVERLAP = 0.4


class ContactState(NamedTuple):
    """Coordinates ``q`` and velocities ``v`` (..., n), forces ``lam`` in the constraints and the stabilising ``mu`` (..., m), zero in exact
    arithmetic, and forces ``push`` (..., c) in the contacts, zero in those that are open."""

    q: Tensor
    v: Tensor
    lam: Tensor
    mu: Tensor
    push: Tensor


class _Site(NamedTuple):
    """A position: mass, Jacobians of constraints ``G`` and gaps ``N``, their slopes in time, the gaps, and what they are uncertain by."""

    M: Tensor
    G: Tensor
    N: Tensor
    drift: Tensor
    opening: Tensor
    gap: Tensor
    noise: Tensor

    def nearest(self, v: Tensor, active: Tensor, opening: Tensor) -> Tensor:
        """The velocities nearest to ``v``, in the metric of ``M``, with which the ``active`` contacts (..., c) move as their gaps open at
        ``opening - self.opening`` and the constraints are kept."""
        momentum = (self.M @ v.unsqueeze(-1)).squeeze(-1)
        matrix = pressed(self.M, self.G, self.N, active)
        return solved(matrix, momentum, -self.drift, torch.where(active, opening - self.opening, 0.0))[..., : v.shape[-1]]

    def speed(self, v: Tensor, opening: Tensor | None = None) -> Tensor:
        """``N v + opening`` (..., c), by default the rates of the gaps."""
        return (self.N @ v.unsqueeze(-1)).squeeze(-1) + (self.opening if opening is None else opening)

    def unsure(self, t: Tensor, speed: Tensor) -> Tensor:
        """What gaps that open at a ``speed`` (..., c) are uncertain by: they are those of a time that is known but for rounding."""
        return (torch.finfo(speed.dtype).eps * t.unsqueeze(-1).abs() * speed.abs() + self.noise).detach()

    def doubt(self, v: Tensor, opening: Tensor | None = None) -> Tensor:
        """What rounding makes of `speed`, at most, in any contact."""
        terms = (self.N * v.unsqueeze(-2)).abs().sum(-1) + (self.opening if opening is None else opening).abs()
        return (NEAR * torch.finfo(v.dtype).eps * terms.amax(-1, keepdim=True).expand_as(terms)).detach()


class ContactMechanics(Mechanism):
    """See `mechanics`. A mode ``(..., c)`` says which contacts rest."""

    def __init__(self, mass: Any, force: Callable[..., Tensor], constraint: Callable[..., Tensor] | None, contacts: Any) -> None:
        super().__init__(mass, force, constraint)
        self.contacts = Contacts(contacts)

    def residual(self, t: Tensor, y: ContactState, yp: ContactState, mode: tuple[Any, ...], *args: Any) -> ContactState:
        """Those of `mechanics` with the forces in the contacts: ``M v' = f - G^T lam + N^T push``. In those that rest, ``push`` keeps the
        second derivative of the gap at zero. The first entry of ``mode`` says which these are, others are the user's."""
        inner = (*mode[1:], *args)
        rates, balance, g, drift = self.stabilised(t, y[:4], (yp.q, yp.v), inner)
        N = jacobian(self.contacts.gaps(inner), t, y.q)
        lift = (y.push.unsqueeze(-2) @ N).squeeze(-2)
        return ContactState(rates, balance - lift, g, drift, y.push - self.forces(t, y.q, y.v, N, mode[0], inner))

    def forces(self, t: Tensor, q: Tensor, v: Tensor, N: Tensor, resting: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Of the contacts, whose gaps have the Jacobian ``N``, those that rest: ``(..., c)``, zero for others."""
        return self._accelerations(t, q, v, N, resting, args)[..., -resting.shape[-1] :]

    def _accelerations(self, t: Tensor, q: Tensor, v: Tensor, N: Tensor, resting: Tensor, args: tuple[Any, ...]) -> Tensor:
        """Accelerations, forces in constraints and in contacts, one behind the other."""
        G, curve = self.curved(t, q, v, args)
        matrix = pressed(self.mass_matrix(q, args), G, N, resting)
        return solved(matrix, self.forced(t, q, v, args), -curve, torch.where(resting, -bend(self.contacts.gaps(args), t, q, v), 0.0))

    def _site(self, t: Tensor, q: Tensor, args: tuple[Any, ...]) -> _Site:
        gaps = self.contacts.gaps(args)
        gap, opening = rate(gaps, t, q, torch.zeros_like(q))
        (G, drift), N = self.sloped(t, q, args), jacobian(gaps, t, q)
        terms = (N * q.unsqueeze(-2)).abs().sum(-1) + (opening * t.unsqueeze(-1)).abs()
        return _Site(self.mass_matrix(q, args), G, N, drift, opening, gap, torch.finfo(q.dtype).eps * terms.detach())

    def _meet(
        self, t: Tensor, q: Tensor, v: Tensor, site: _Site, closed: Tensor, given: Tensor, loose: Tensor, args: tuple[Any, ...], throw: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What follows where contacts are ``closed`` (..., c): coordinates and velocities, NaN where these are not determined, which
        contacts rest, and which have an impulse.

        ``given``: rates of the gaps that count as zero; ``loose``: contacts that are not to rest.

        Newton's law for all that are closed at once (Moreau 1988, CISM Courses and Lectures 302:1): of an impulse ``p >= 0`` and of
        ``s+ + e s- >= 0`` one is zero. Contacts that are closed and slow stay, if accelerations ask for a force that pushes.
        """
        speed = site.speed(v) - given
        e = self.contacts.restitution(speed, args)
        slow = (-e * speed.clamp(max=0.0) <= self.contacts.rest_speed(speed)).detach()
        rebound = torch.where(slow, 0.0, e) * speed.clamp(max=0.0)
        with torch.no_grad():
            W, noise = compliance(site.M, site.G, site.N), site.doubt(v)
        active, impulse, known = complementary(W, speed + rebound, closed, noise, self.contacts.names, throw)
        struck = active & (impulse * W.diagonal(dim1=-2, dim2=-1) > noise)
        v = site.nearest(v, active, -rebound)
        resting, determined = self._lasting(t, q, v, site, active & slow & ~loose, args, throw)
        known = known & determined
        q = torch.where(known, self._apart(q, site, closed & known, resting), float("nan"))
        return q, torch.where(known, v, float("nan")), resting, struck

    @torch.no_grad()
    def _lasting(
        self, t: Tensor, q: Tensor, v: Tensor, site: _Site, able: Tensor, args: tuple[Any, ...], throw: bool
    ) -> tuple[Tensor, Tensor]:
        """Those of the contacts that are ``able`` to rest which push then: of a force and an acceleration, both at least zero, one is zero.
        And whether (..., 1) that is determined.

        One without force or acceleration is not held, so that it may open at any time.
        """
        free = solved(saddle(site.M, site.G), self.forced(t, q, v, args), -self.curved(t, q, v, args)[1])[..., : q.shape[-1]]
        curve = bend(self.contacts.gaps(args), t, q, v)
        noise, W = site.doubt(free, curve), compliance(site.M, site.G, site.N)
        resting, push, known = complementary(W, site.speed(free, curve), able, noise, self.contacts.names, throw)
        return resting & (push * W.diagonal(dim1=-2, dim2=-1) > noise), known

    def _apart(self, q: Tensor, site: _Site, touching: Tensor, resting: Tensor) -> Tensor:
        """Coordinates with which gaps are zero where contacts rest, and open, by no more than rounding, where they only touch."""
        none, n = (torch.zeros_like(q), torch.zeros_like(site.drift)), q.shape[-1]
        onto = solved(pressed(site.M, site.G, site.N, resting), *none, torch.where(resting, -site.gap, 0.0))[..., :n]
        with torch.no_grad():
            # which is no part of the motion: what only touches is free to move
            least = (8 * site.noise).clamp(min=16 * torch.finfo(q.dtype).tiny)
            away = torch.where(touching & ~resting, least - site.gap - site.speed(onto, torch.zeros_like(least)), 0.0)
            off = solved(pressed(site.M, site.G, site.N, touching | resting), *none, away)[..., :n]
        return q + onto + off

    def _touching(self, t: Tensor, site: _Site, speed: Tensor) -> Tensor:
        """Contacts whose gap is zero but for rounding, or less."""
        return (site.gap <= NEAR * site.unsure(t, speed)).detach()

    @naming_faults
    def initial(
        self, q0: Tensor, v0: Tensor, *args: Any, t0: Any = 0.0, throw: bool = True
    ) -> tuple[ContactState, ContactState, Tensor]:
        """Consistent state and slope at ``t0`` near the given coordinates and velocities, and which contacts rest; see `Mechanics.initial`.

        Contacts that are closed and do not open rest if they push. Raises `InvalidInput` where parts overlap.
        """
        q, v, a, lam, push, resting = self.started(self._start, t0, q0, v0, args, throw)
        zero, resting = torch.zeros_like(lam), (resting > 0).detach()
        return ContactState(q, v, lam, zero, push), ContactState(v, a, zero, zero, torch.zeros_like(push)), resting

    def _start(self, t: Tensor, q0: Tensor, v0: Tensor, args: tuple[Any, ...], throw: bool) -> tuple[Tensor, ...]:
        """Coordinates, velocities, accelerations, forces in constraints and in contacts, and which of these rest."""
        q, v = self.placed(t, q0, v0, args, throw)
        site = self._site(t, q, args)
        speed = site.speed(v)
        none = torch.zeros_like(speed, dtype=torch.bool)
        bad = self._overlaps(site, site.unsure(t, speed), none, "at the start: give other coordinates q0", throw)
        near = self._touching(t, site, speed)
        # those that close are left to their event
        resting, known = self._lasting(t, q, v, site, near & (speed.abs() <= site.doubt(v)).detach(), args, throw)
        v = site.nearest(v, resting, torch.zeros_like(speed))
        q = torch.where(bad.any(-1, keepdim=True) | ~known, float("nan"), self._apart(q, site, near & known, resting))
        every = self._accelerations(t, q, v, jacobian(self.contacts.gaps(args), t, q), resting, args)
        n, m = q.shape[-1], site.G.shape[-2]
        return q, v, every[..., :n], every[..., n : n + m], every[..., n + m :], resting.to(q.dtype)

    def _overlaps(self, site: _Site, unsure: Tensor, known: Tensor, where: str, throw: bool = True) -> Tensor:
        """Gaps (..., c) that are negative by more than they are ``unsure``, but those that are ``known``: raises for them."""
        overlap = site.gap.detach()
        allowed = torch.finfo(overlap.dtype).eps ** (_OVERLAP - 1) * unsure
        bad = (overlap < -allowed) & ~known
        wrong = asked(bad)
        if throw and readable(wrong) and bool(wrong.any()):
            row, i = divmod(int(wrong.reshape(-1).to(torch.int64).argmax()), bad.shape[-1])
            many = f" in trajectory {row}" if bad.dim() == 2 else ""
            size = float(overlap.reshape(-1, bad.shape[-1])[row, i])
            raise InvalidInput(f"the gap of {self.contacts.names[i]!r} is {size:.3g}{many} {where}, so that no gap is negative")
        return bad

    def _impact(self, i: int, throw: bool) -> Callable[..., Any]:
        """The reset of a contact that closes."""
        return lambda t, y, mode, *args: self._changed(t, y, mode, args, self._only(i, mode[0]), self._only(None, mode[0]), i, throw)

    def _release(self, i: int, throw: bool) -> Callable[..., Any]:
        """The reset of one that ceases to push."""
        return lambda t, y, mode, *args: self._changed(t, y, mode, args, self._only(i, mode[0]), self._only(i, mode[0]), i, throw)

    @staticmethod
    def _only(i: int | None, resting: Tensor) -> Tensor:
        place = torch.arange(resting.shape[-1], device=resting.device)
        return (place == (-1 if i is None else i)).expand_as(resting)

    def _changed(
        self, t: Tensor, y: ContactState, mode: Any, args: Any, own: Tensor, loose: Tensor, i: int, throw: bool
    ) -> tuple[ContactState, Any]:
        site = self._site(t, y.q, (*mode[1:], *args))
        # what those that rest are off by is no speed
        given = torch.where(mode[0], site.speed(y.v), 0.0)
        y, mode, struck = self._followed(t, y, mode, args, site, own | mode[0], given, loose, throw)
        if moves(site.gap):
            self._tied(t, struck, f"the contact {self.contacts.names[i]!r}")
        return y, mode

    def _followed(
        self, t: Tensor, y: ContactState, mode: Any, args: Any, site: _Site, closed: Tensor, given: Tensor, loose: Tensor, throw: bool
    ) -> tuple[ContactState, Any, Tensor]:
        """State and mode behind `_meet`, of the contacts ``closed`` and those that touch; and which of the latter have an impulse."""
        every = closed | self._touching(t, site, site.speed(y.v))
        q, v, resting, struck = self._meet(t, y.q, y.v, site, every, given.detach(), loose, (*mode[1:], *args), throw)
        return y._replace(q=q, v=v), (resting, *mode[1:]), struck & ~closed

    def _tied(self, t: Tensor, struck: Tensor, what: str) -> None:
        """Raise where contacts were ``struck`` (..., c) at the time of something else, ``what``: by a time of their own, and what their
        order does to an impact is no small change."""
        struck = asked(struck)
        if not anywhere(struck):
            return
        flags = every_copy(struck).reshape(-1, struck.shape[-1])
        row = int(flags.any(-1).to(torch.int64).argmax())
        names = ", ".join(repr(name) for name, on in zip(self.contacts.names, flags[row].tolist(), strict=True) if on)
        when = float(every_copy(t.expand(struck.shape[:-1])).expand(every_copy(struck).shape[:-1]).reshape(-1)[row])
        raise UnsupportedCombination(
            f"{what} and the impact of {names} are at one time, t = {when:.8g}: the values are those of all at once, but there are no "
            "derivatives, which would ask what each does before and behind the other. Give a start or parameters with which they are at "
            "different times, or take the values alone, under torch.no_grad()"
        )

    def _events(self, throw: bool) -> list[Event]:
        """Of every contact where it closes, and where it ceases to push."""
        out = []
        for i, name in enumerate(self.contacts.names):

            def closing(t: Tensor, y: ContactState, mode: Any, *args: Any, i: int = i) -> Tensor:
                gap = self.contacts.gap(i, t, y.q, (*mode[1:], *args))
                return torch.where(mode[0][..., i], torch.ones_like(gap), gap)

            def pushing(t: Tensor, y: ContactState, mode: Any, *args: Any, i: int = i) -> Tensor:
                inner = (*mode[1:], *args)
                N = jacobian(self.contacts.gaps(inner), t, y.q)
                push = self.forces(t, y.q, y.v, N, mode[0], inner)[..., i]
                return torch.where(mode[0][..., i], push, torch.ones_like(push))

            out += [
                Event(closing, -1, reset=self._impact(i, throw), name=name),
                Event(pushing, -1, reset=self._release(i, throw), name=f"{name} released"),
            ]
        return out

    def _own(self, rule: Rule, owned: bool, throw: bool) -> Event:
        """An event of the user; what its reset gives may open and close contacts."""

        def function(t: Tensor, y: ContactState, mode: Any, *args: Any) -> Tensor:
            return rule.function(t, y, *mode[1:], *args)

        def reset(t: Tensor, y: ContactState, mode: Any, *args: Any) -> tuple[ContactState, Any]:
            assert rule.reset is not None
            inner, resting, own = (*mode[1:], *args), mode[0], mode[1:]
            given = rule.reset(t, y, *inner)
            if owned:
                if not isinstance(given, tuple) or isinstance(given, ContactState) or len(given) != 2:
                    raise InvalidInput(f"the reset of {rule.title} must return (y, mode), as there is mode=")
                given, own = given[0], (given[1],)
            if not isinstance(given, ContactState):
                raise InvalidInput(
                    f"the reset of {rule.title} must return a ContactState (y._replace(v=...)), got a {type(given).__name__}"
                )
            return self._after(t, y, given, (resting, *own), args, rule.title, throw)

        return Event(function, rule.direction, rule.terminal, None if rule.reset is None else reset, rule.name)

    def _after(
        self, t: Tensor, before: ContactState, y: ContactState, mode: Any, args: Any, title: str, throw: bool
    ) -> tuple[ContactState, Any]:
        """What follows where the user's reset gave ``y``."""
        inner, resting = (*mode[1:], *args), mode[0]
        gaps = self.contacts.gaps(inner)
        gap, given = rate(gaps, t, before.q, before.v)
        site = self._site(t, y.q, inner)
        # a contact that rests goes on where neither its gap nor the rate of it was changed
        resting = resting & (site.gap - gap <= NEAR * site.noise).detach()
        # a gap that was negative before is no deed of the reset, but rounding, or what a contact that rests is off by
        known = (((gap < 0) | resting) & (site.gap - gap >= -NEAR * site.noise)).detach()
        where = f"behind the reset of {title}: give a state there"
        bad = self._overlaps(site, site.unsure(t, given), known, where, throw).any(-1, keepdim=True)
        none = torch.zeros_like(resting)
        y, mode, struck = self._followed(t, y, mode, args, site, resting, torch.where(resting, given, 0.0), none, throw)
        if moves(gap) and anywhere(struck):
            # a contact that the reset closes does so when it does
            came = self._site(t, before.q, inner)
            speed = came.speed(before.v)
            self._tied(t, struck & self._touching(t, came, speed) & (speed < -came.doubt(before.v)).detach(), title)
        return y._replace(q=torch.where(bad, float("nan"), y.q)), mode

    @naming_faults
    def solve(
        self,
        t_span: Any,
        q0: Tensor,
        v0: Tensor,
        args: Any = (),
        *,
        mode: Any = None,
        events: Any = None,
        quadrature: Any = None,
        **options: Any,
    ) -> Solution:
        """`solve_dae` from consistent values near ``q0``, ``v0``; ``sol.y`` is a `ContactState` of tensors with time first.

        Two dimensions of ``q0`` are a batch: give ``batched=True`` too. ``options`` are those of `solve_dae`. ``sol.events`` has the user's
        events first, then two of every contact (`Contact`). With ``mode=`` mass, force, constraint and gaps get it before ``args``. A reset
        of the user that changes coordinates or velocities opens and closes contacts.

        Raises `EventsAccumulate` where bounces do not end (see ``rest_speed`` of `Contact`).
        """
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        check_options(q0, options)
        ends = [torch.as_tensor(x, dtype=torch.float64) for x in t_span]
        if anywhere((ends[-1] < ends[0]).detach()):
            raise InvalidInput("contacts go forward in time, but t_span ends before it starts: an impact cannot be undone")
        if any(isinstance(event, Doses) for event in listed(events)):
            raise UnsupportedCombination("Doses change the state, which contacts= does by resets: give an Event of the time with a reset")
        modes = () if mode is None else (mode_of(mode, StateSpec.of(q0, q0.dim() == 2)),)
        y0, yp0, resting = self.initial(q0, v0, *modes, *args, t0=t_span[0], throw=options.get("throw", True))
        throw = bool(options.get("throw", True))
        every = [self._own(rule_of(event, i), bool(modes), throw) for i, event in enumerate(listed(events))] + self._events(throw)
        integrand = quadrature
        if callable(quadrature):
            integrand = lambda t, y, mode, *args: quadrature(t, y, *mode[1:], *args)  # noqa: E731
        try:
            return solve_dae(
                self.residual,
                t_span,
                y0,
                yp0,
                args=args,
                mode=(resting, *modes),
                events=every,
                quadrature=integrand,
                consistent="trust",
                **options,
            )
        except EventsAccumulate as error:
            text = f"{error}. Of contacts: give Contact(..., rest_speed=), below which one that bounces stays closed"
            raise EventsAccumulate(text, t=error.t, trajectory=error.trajectory) from error
