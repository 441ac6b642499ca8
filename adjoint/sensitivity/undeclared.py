"""Jumps of ``fun`` that nobody declared: found by the steps that were cut short before them, and proved by bisection.

Error control brings steps over a jump by rejecting them until they are short enough. Values are right then, but derivatives lack that
the jump moves (docs/theory.md, section 2). All is looked for in the record of a solve, of whatever engine, and changes nothing in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate import Plan, Record
from ..system.origins import readable
from ..system.remarks import Seldom, remark
from ..system.structure import Structure
from ..system.system import System, VmappedSystem

__all__ = ["REJECTED", "once", "tell_of_jumps", "tell_of_jumps_at_ends", "whole"]

#: rejections from which a trajectory is looked at, and how many of those with most of them
REJECTED, _ROWS = 3, 64
#: the part by which a step is shorter than one of so many before it where they pile up, and how many such places are looked at
_CUT, _BEFORE, _PLACES = 0.75, 15, 3
#: so many steps on either side of the shortest one may be that over the jump; how much faster the slope of the solution changes there
#: than so many steps away; and how many steps beside the one where it changes fastest are searched
_AROUND, _SHARPER, _AWAY, _BESIDE = 20, 8.0, 3, 2
#: a change of the slope that is less than this part of it is not looked at
_LEAST = 1e-6
#: after so many halvings of the interval a smooth function differs by less than this part of its first difference
_HALVINGS, _LEFT = 4, 0.25
#: how much wider the gap between the sides is than what a side varies by
_WIDER = 10.0
#: of residuals, whose numbers have no tolerance: a jump is more than this part of them
_PART = 1e-4

Flat = Callable[[Tensor, Tensor], Tensor]


class Told:
    """What solves that are parts of one have told of, and how often they are looked at for ``rates``."""

    jumps = ends = lost = False

    def __init__(self) -> None:
        self.rates = Seldom()


_told: ContextVar[Told | None] = ContextVar("told", default=None)


@contextmanager
def once() -> Iterator[None]:
    """One warning of a kind at most for all solves within."""
    if _told.get() is not None:
        yield
        return
    token = _told.set(Told())
    try:
        yield
    finally:
        _told.reset(token)


def whole() -> Told | None:
    """Of the solve that the present one is a part of."""
    return _told.get()


def tell_of_jumps(
    system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor], structure: Structure | None = None
) -> None:
    """Warn of a jump of ``fun`` within a step, where steps of a solve that were `REJECTED` over and over were so because of it.
    ``structure``: of implicit equations."""
    told = whole()
    if told is not None and told.jumps:
        return
    with torch.no_grad():
        found = _found(system, plan, record, inputs, structure)
    if found is None:
        return
    if told is not None:
        told.jumps = True
    remark(_text(found, system, len(record.status)), UserWarning)


def tell_of_jumps_at_ends(system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor], anchors: Tensor) -> None:
    """Warn where ``fun`` at an end of the span (of the ``anchors`` (A, B)), whose time is differentiated, is beyond a jump: it is the slope
    with which the solution moves along."""
    told = whole()
    if not len(record.h) or not record.last.numel() or not readable(anchors) or (told is not None and told.ends) or plan.shift == "all":
        return
    f, first, final = system.bind(inputs), anchors[0].detach(), anchors[-1].detach()
    reached = (record.status >= 0) & (record.t_final == final) & (first != final)
    step = torch.finfo(plan.real).eps * 4 * torch.maximum(first.abs(), final.abs()) * (first - final).sign()
    with torch.no_grad():
        for at, inward, y, k in ((final, step, record.final, -1), (first, -step, record.states[0] if len(record.states) else None, 0)):
            if y is None:
                continue
            if system.residual is not None:
                slope = record.stages[k, -1] if len(record.stages) else torch.zeros_like(y)
                y = torch.cat([y, slope], -1)
            there, within = (f((at + n * inward).to(plan.real), y) for n in (0, 1))
            gap = (there - within).abs()
            wide = (gap > _LEAST * torch.maximum(_size(there), _size(within)).to(gap.dtype).unsqueeze(-1)) & reached.unsqueeze(-1)
            if not bool(wide.any()):
                continue
            further, again = (f((at + n * inward).to(plan.real), y) for n in (3, 0))
            wide = wide & (gap > _WIDER * (within - further).abs()) & (there == again)
            if bool(wide.any()):
                row, component = (int(i) for i in wide.nonzero()[0])
                found = _Jump(float(at[row]), row, component, within[row, component].item(), there[row, component].item(), True, 1)
                break
        else:
            return
    if told is not None:
        told.ends = True
    remark(
        f"fun jumps {_where(found, system, len(record.status))}. That is an end of the span, whose time is differentiated: fun has its "
        "value beyond the jump there, and derivatives in this time are those of going on behind it. Name it in step_ts= as well (jump_t of "
        "odeint), or make the table an adjoint.Forcing, and it is seen from within (docs/hybrid.md)",
        UserWarning,
    )


class _Jump(NamedTuple):
    """When, in which trajectory and number of its state, from what to what, whether it comes with the time; and in how many it is the
    first."""

    t: float
    row: int
    component: int
    before: float | complex
    behind: float | complex
    timed: bool
    count: int


def _found(
    system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor], structure: Structure | None
) -> _Jump | None:
    """The first jump of those that are found, one for each trajectory."""
    row = torch.zeros_like(record.n_rejected)
    if len(row) > 1:
        rejected, row = record.n_rejected.topk(min(_ROWS, len(row)))
        row = row[rejected >= REJECTED]
    path = _Steps.of(record, row).path(record, system.residual is not None)
    if path is None:
        return None
    f, found = system.bind(inputs), None
    if structure is not None:
        # algebraic variables jump along, and may make up for the jump that they follow
        still = path._replace(y=torch.where(structure.differential, path.y, path.y[0]))
        found = _Bisection(f, still).run(plan, record)
    return _Bisection(f, path).run(plan, record) if found is None else found


class _Path(NamedTuple):
    """A way through some steps: times ``(N, B)`` and states ``(N, B, n)``, of the ``wanted`` (B,) trajectories; ``step``: the size of
    the steps before they were cut. Of implicit equations the slope goes with the state."""

    t: Tensor
    y: Tensor
    wanted: Tensor
    step: Tensor
    implicit: bool

    def at(self, t: Tensor) -> Tensor:
        """What the function is called with at ``t`` (B,), beside the time."""
        k = (((self.t[1:-1] - t) * (self.t[-1] - self.t[0]).sign()) <= 0).sum(0).unsqueeze(0)
        t0, t1 = self.t.gather(0, k)[0], self.t.gather(0, k + 1)[0]
        every = k.unsqueeze(-1).expand(1, *self.y.shape[1:])
        y0, y1 = self.y.gather(0, every)[0], self.y.gather(0, every + 1)[0]
        y = y0 + ((t - t0) / torch.where(t1 == t0, 1.0, t1 - t0)).to(y0.dtype).unsqueeze(-1) * (y1 - y0)
        return torch.cat([y, self.slope], -1) if self.implicit else y

    @property
    def slope(self) -> Tensor:
        """In the middle, ``(B, n)``: one for all, so that nothing but the function itself jumps."""
        k = len(self.t) // 2
        length = self.t[k] - self.t[k - 1]
        return (self.y[k] - self.y[k - 1]) / torch.where(length == 0, 1.0, length).to(self.y.dtype).unsqueeze(-1)


class _Steps(NamedTuple):
    """The steps of some trajectories, ``row`` (R,): sizes ``h`` (K, R), whether they are ``free`` to end anywhere, states ``(K + 1, B, n)``
    of all."""

    row: Tensor
    h: Tensor
    free: Tensor
    states: Tensor

    @classmethod
    def of(cls, record: Record, row: Tensor) -> _Steps:
        h = record.h.detach()[:, row].abs()
        last = (record.n_accepted - (record.status > 0).long())[row]
        free = (torch.arange(len(h), device=h.device).unsqueeze(-1) < last) & ~record.lands[:, row] & (h > 0)
        # fun may jump where a step is told to end, and at the start
        free[1:] &= ~record.lands[:-1, row]
        free[:1] = False
        return cls(row, h, free, record.states.detach())

    def places(self) -> Tensor:
        """The steps ``(P, R)`` that are shortest beside those shortly before, -1 for none; of each trajectory several, apart."""
        # the longest of the steps before: of one, of two, of four, ... of sixteen
        longest = torch.cat([torch.zeros_like(self.h[:1]), self.h[:-1]])
        reach = 1
        while reach < _BEFORE and reach < len(longest):
            longest = torch.cat([longest[:reach], torch.maximum(longest[reach:], longest[:-reach])])
            reach *= 2
        share = torch.where(self.free, self.h, torch.inf) / longest
        steps, out = torch.arange(len(share), device=share.device).unsqueeze(-1), []
        for k in range(_PLACES):
            if k:
                share = torch.where((steps - out[-1]).abs() <= _AROUND, torch.inf, share)
            depth, place = share.min(0)
            out.append(torch.where(depth < _CUT, place, -1))
        return torch.stack(out)

    def path(self, record: Record, implicit: bool) -> _Path | None:
        """Around the step, of those near the `places`, in which the slope of the solution changes fastest, where it does so faster than a
        few steps away; None where there is none."""
        places = self.places()
        window = torch.arange(-_AROUND - 1, _AROUND + 2, device=places.device).unsqueeze(-1) + places.reshape(-1)
        inside = (window >= 0) & (window < len(self.h)) & (places.reshape(-1) >= 0)
        window, each = window.clamp(0, len(self.h) - 1), torch.arange(len(self.row), device=places.device).repeat(len(places))
        h, free = self.h[window, each], self.free[window, each] & inside
        row = self.row[each]
        slope = (self.states[window + 1, row] - self.states[window, row]) / h.to(self.states.dtype).unsqueeze(-1)
        change = torch.linalg.vector_norm(slope[2:] - slope[:-2], dim=-1).to(torch.float64)
        rate = torch.where(free[1:-1] & free[2:] & free[:-2], change / (h[1:-1] + (h[2:] + h[:-2]) / 2), 0.0).nan_to_num(0.0, 0.0)
        most, which = rate.max(0)
        away = torch.stack([which - _AWAY, which + _AWAY]).clamp(0, len(rate) - 1)
        size = torch.where(free, torch.linalg.vector_norm(slope, dim=-1).to(torch.float64), 0.0).amax(0)
        sharp = (most > _SHARPER * rate.gather(0, away).amin(0)) & (change.gather(0, which.unsqueeze(0))[0] > _LEAST * size)
        most, best = torch.where(sharp, most, 0.0).reshape(places.shape).max(0)
        sharp = most > 0
        if not bool(sharp.any()):
            return None
        chosen = best * len(self.row) + torch.arange(len(self.row), device=best.device)
        k, longest = window[which[chosen] + 1, chosen], h[:, chosen].amax(0)
        # the others are asked at their start, where fun is known to be defined
        n_steps, rows = record.t.shape
        middle = torch.ones(rows, dtype=torch.int64, device=k.device).index_copy(0, self.row, torch.where(sharp, k, 1))
        wanted = torch.zeros(rows, dtype=torch.bool, device=k.device).index_copy(0, self.row, sharp)
        step = torch.zeros(rows, dtype=torch.float64, device=k.device).index_copy(0, self.row, longest)
        near = torch.arange(-_BESIDE, _BESIDE + 2, device=k.device).unsqueeze(-1) + middle
        # not as far as a time at which fun may jump
        steps, bound = torch.arange(len(self.h), device=k.device).unsqueeze(-1), ~self.free
        first = torch.where(bound & (steps < k), steps, -1).amax(0) + 1
        last = torch.where(bound & (steps > k), steps, n_steps).amin(0)
        low, high = (torch.zeros_like(middle).index_copy(0, self.row, x) for x in (first, last))
        nodes = torch.where(wanted, torch.minimum(torch.maximum(near, low), high), 0)
        every, t = torch.arange(rows, device=k.device), record.t.detach()
        ends = torch.cat([t, (t[-1] + record.h.detach()[-1]).unsqueeze(0)])
        return _Path(ends[nodes, every], self.states[nodes, every], wanted, step, implicit)


class _Bisection:
    """Follows the larger difference of ``f`` along a path down to where it is a gap between two sides, or vanishes."""

    def __init__(self, f: Flat, path: _Path) -> None:
        self.path, self._f = path, f

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        return self._f(t.to(y.dtype.to_real()), y).detach()

    def run(self, plan: Plan, record: Record) -> _Jump | None:
        """What is found; None for nothing."""
        path, eps = self.path, torch.finfo(plan.real).eps
        # the step whose ends differ most for its length
        nodes = torch.stack([self.f(t, path.at(t)) for t in path.t])
        apart = torch.stack([_size(x) for x in nodes.diff(dim=0)])
        k = (apart / torch.where(path.t.diff(dim=0) == 0, torch.inf, path.t.diff(dim=0).abs())).argmax(0)
        each = torch.arange(len(k), device=k.device)
        (a, fa), (b, fb) = ((path.t[i, each], nodes[i, each]) for i in (k, k + 1))
        first, whole = _size(fb - fa), (b - a).abs()
        least = whole * eps ** (1 / 3) + 64 * eps * torch.maximum(a.abs(), b.abs())
        wanted = path.wanted & torch.isfinite(first) & (first > 0)
        for k in range(64):
            wide = wanted & ((b - a).abs() > least / 2)
            if not bool(wide.any()):
                break
            if k == _HALVINGS:
                wanted = wanted & (_size(fb - fa) > _LEFT * first)
            middle = a + (b - a) / 2
            fm = self.f(middle, path.at(middle))
            left = _size(fm - fa) > _size(fb - fm)
            a, fa = torch.where(wide & ~left, middle, a), torch.where((wide & ~left).unsqueeze(-1), fm, fa)
            b, fb = torch.where(wide & left, middle, b), torch.where((wide & left).unsqueeze(-1), fm, fb)
        wanted = wanted & (_size(fb - fa) > _LEFT * first)
        if not bool(wanted.any()):
            return None
        return self._judged(wanted, (a, b), (fa, fb), plan, record)

    def _judged(
        self, wanted: Tensor, ends: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor], plan: Plan, record: Record
    ) -> _Jump | None:
        """Whether the gap between ``ends`` is one: wider than what the sides vary by over a longer distance, more than the error control
        lets pass, and the same when asked again."""
        path, (a, b), (fa, fb) = self.path, ends, values
        way = 2 * (b - a)
        before, behind = self.f(a - way, path.at(a - way)), self.f(b + way, path.at(b + way))
        gap = (fb - fa).abs()
        wide = gap > _WIDER * ((fa - before).abs() + (behind - fb).abs())
        if path.implicit:
            wide = wide & (gap > _PART * torch.maximum(fa.abs(), fb.abs()))
        else:
            y = torch.maximum(path.y[0].abs(), path.y[-1].abs())
            wide = wide & (plan.scaled(gap * path.step.to(gap.dtype).unsqueeze(-1), y) > 1)
        wanted = wanted & wide.any(-1)
        if not bool(wanted.any()):
            return None
        again = self.f(a, path.at(a))
        wanted = wanted & (again == fa).all(-1)
        for row, when in zip(record.event_row, record.event_t, strict=True):
            # who looks for an event there knows of it, and derivatives behind it are refused
            near = (when - a[row]).abs() <= 8 * way[row].abs()
            wanted[row] &= ~near
        if not bool(wanted.any()):
            return None
        rows = wanted.nonzero()[:, 0]
        row = int(rows[a[rows].argmin()])
        other = self.f(b, path.at(a))
        timed = bool(_size(other - fb)[row] <= 0.1 * _size(fb - fa)[row])
        component = int(torch.where(wide[row], gap[row], 0.0).argmax())
        value = lambda x: x[row, component].item()  # noqa: E731
        return _Jump(float((a + (b - a) / 2)[row]), row, component, value(fa), value(fb), timed, len(rows))


def _size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, float("inf"), dim=-1).to(torch.float64) if x.shape[-1] else x.new_zeros(x.shape[:-1])


def _where(jump: _Jump, system: System | VmappedSystem, rows: int) -> str:
    layout = system.spec if system.residual is None else system.residual
    row = f" in trajectory {jump.row}" if rows > 1 else ""
    more = "" if jump.count == 1 else f" (the first of {jump.count} in which it was found)"
    what = f"component {layout.component(jump.component)} of {'its result' if system.residual is None else 'the residual'}"
    return f"at t = {jump.t:.10g}{row}{more}: {what} from {jump.before:.6g} to {jump.behind:.6g}"


def _text(jump: _Jump, system: System | VmappedSystem, rows: int) -> str:
    if jump.timed:
        how, cure = "time", "name its times in step_ts=, or make it an adjoint.Schedule or adjoint.Doses, whose times are differentiated"
    else:
        how, cure = "state", "make it an adjoint.Event, with mode= for the branch of fun that holds"
    return (
        f"fun jumps {_where(jump, system, rows)}. It switches by the {how}, and steps were "
        "rejected over and over until they were short enough. Values are right to the tolerance, but derivatives lack what the motion of "
        f"the switch adds: {cure} (docs/hybrid.md)"
    )
