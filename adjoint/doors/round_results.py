"""The rounds of a solve with resets, joined to one solution: samples, steps, dense output, events, integrals, work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import InvalidInput
from ..system.capture import readable
from ..system.ownership import WithTensors
from ..system.transforms import anywhere
from .arguments import Times
from .doses import DoseRule
from .round_rules import NEAR, Boundary, Rule
from .rows import chosen, gathered, no_number, wide
from .solution import BackwardStats, EventLog, EventRecord, Solution, Stats

__all__ = ["Piece", "Taken", "joined"]


@dataclass(frozen=True)
class Taken:
    """Which of the sample times a round was asked for, ``low`` to ``high``; of these those ``inside`` of it, ``(T, R)``. ``along``
    ``(R)``: whether they are in the order of the solve."""

    low: int
    high: int
    inside: Tensor
    along: Tensor


@dataclass(frozen=True)
class Piece:
    """A round: its solution, whose it was ``(R)``, from when to when ``(R)``, from which state, what there was at its end before and after
    the resets; of every rule to which trajectories it was applied, the record of the round, and the states that it gave.

    ``arrived``: what was after the resets, at the end of the solve where the round ended there. ``beyond``: states and slopes after the
    resets as functions of times, and where they are wanted. ``begun``: whose round had no length, in implicit equations; ``apart``: where
    doses have ways to their own times."""

    sol: Solution
    going: Tensor
    start: Tensor
    stop: Tensor
    y0: Any
    left: Boundary
    right: Boundary
    arrived: Boundary
    beyond: Callable[[Tensor, Tensor], tuple[Any, Any]]
    begun: Tensor
    hits: Sequence[Tensor]
    records: Sequence[EventRecord]
    states: Sequence[Any]
    apart: Tensor
    taken: Taken | None

    @cached_property
    def hit(self) -> Tensor:
        """Where ``(R)`` anything happened at its end."""
        return torch.stack([*self.hits, torch.zeros_like(self.going)]).any(0)


def joined(
    times: Times, rules: Sequence[Rule | DoseRule], pieces: Sequence[Piece], last: Boundary, status: Tensor, batched: bool
) -> Solution:
    """One solution. ``last``: where the trajectories ended, after all resets; ``status`` (R)."""
    first = pieces[0]
    ragged = batched or not readable(status)
    if times.steps:
        t, values = _steps(pieces, ragged)
    elif times.samples is None:
        assert times.shown is not None
        ends = first.start.to(times.shown.dtype), last.t.to(times.shown.dtype)
        own = times.shown.dim() == 2 or any(rule.terminal != 0 for rule in rules)
        t = torch.stack(ends) if own or not batched else times.shown
        begun = tree_map(lambda x: x[0], _values(first.sol))
        for piece in pieces:
            there = piece.going & piece.hit & (piece.stop == first.start).detach()
            if not anywhere(there):
                break
            begun = chosen(there, piece.beyond(first.start, there)[: len(begun)], begun)
        values = tree_map(lambda a, b: torch.stack([a, b]), begun, (last.y, last.yp)[: len(begun)])
    else:
        assert times.shown is not None
        t, values = times.shown, _samples(times, pieces, batched)
    whole = isinstance(first.sol.status, int)
    quadrature = None
    if first.sol.quadrature is not None:
        quadrature = first.sol.quadrature
        for piece in pieces[1:]:
            quadrature = tree_map(lambda a, b, on=piece.going: a + chosen(on, b, torch.zeros_like(b)), quadrature, piece.sol.quadrature)
        # of those that were given up between two rounds, too
        quadrature = chosen(status < 0, tree_map(lambda x: torch.full_like(x, no_number(x)), quadrature), quadrature)
    return Solution(
        t=t,
        y=values[0],
        yp=values[1] if len(values) > 1 else None,
        status=int(status) if whole else status,
        stats=_work(pieces),
        events=_events(rules, pieces, ragged),
        quadrature=quadrature,
        interpolant=_Joined(times, pieces, last, batched) if first.sol.interpolant is not None else None,
    )


def _values(sol: Solution) -> tuple[Any, ...]:
    """States, and of implicit equations slopes."""
    return (sol.y,) if sol.yp is None else (sol.y, sol.yp)


def _samples(times: Times, pieces: Sequence[Piece], batched: bool) -> Any:
    """The states at the sample times: at the time of a reset that after it."""
    every = times.samples
    assert every is not None
    every = every if batched else every[:, 0]
    end = times.anchors[-1] if batched else times.anchors[-1, 0]
    sign = torch.where(end >= (times.anchors[0] if batched else times.anchors[0, 0]), 1.0, -1.0)
    out: Any = None
    for k, piece in enumerate(pieces):
        taken = piece.taken
        assert taken is not None
        here = every[taken.low : taken.high]
        more = torch.zeros_like(piece.going) if k + 1 == len(pieces) else pieces[k + 1].going
        ahead = sign * (here - piece.stop).detach()
        at_end = ahead.abs() <= NEAR * torch.finfo(torch.float64).eps * here.detach().abs()
        # what is at the end of a round is that of the next one; of the last one, it has gone through its resets
        mine = taken.inside & ((ahead <= 0) | at_end) & ~(at_end & more)
        moved = mine & at_end & (piece.hit | piece.begun)
        values = tree_map(lambda x: x[1:-1], _values(piece.sol))
        if anywhere(moved):
            there = piece.beyond(here, moved)[: len(values)]
            values = tree_map(lambda x, y, on=moved: chosen(on, y.expand_as(x), x), values, there)
        if out is None:
            out = tree_map(lambda x: x.new_full((len(every), *x.shape[1:]), no_number(x)), values)
        out = tree_map(
            lambda old, new, on=mine, t=taken: torch.cat(
                [old[: t.low], torch.where(wide(on, new), new, old[t.low : t.high]), old[t.high :]]
            ),
            out,
            values,
        )
    return out


def _steps(pieces: Sequence[Piece], ragged: bool) -> tuple[Tensor, Any]:
    """The steps of all rounds; the time of a reset is there twice, with the states on both sides of it."""
    parts, gone = [], []
    for k, piece in enumerate(pieces):
        t, y = piece.sol.t, _values(piece.sol)
        more = torch.zeros_like(piece.going) if k + 1 == len(pieces) else pieces[k + 1].going
        end, states = piece.arrived.t.to(t.dtype), (piece.arrived.y, piece.arrived.yp)[: len(y)]
        resting = piece.begun & ~piece.hit
        if anywhere(resting):
            present = ~t.detach().isnan()
            there = present & (present.cumsum(0) == present.sum(0)) & resting
            t, y = torch.where(there, end, t), tree_map(lambda a, b, on=there: chosen(on, b.unsqueeze(0).expand_as(a), a), y, states)
        ends = piece.going & piece.hit & ~more
        if anywhere(ends):
            t = torch.cat([t, chosen(ends, end, torch.full_like(end, float("nan"))).unsqueeze(0)])
            y = tree_map(lambda a, b: torch.cat([a, b.unsqueeze(0)]), y, states)
        parts.append((t, y))
        gone.append(t.detach().isnan() | ~piece.going)
    t, y = gathered(parts, gone, ragged)
    return t, y


def _events(rules: Sequence[Rule | DoseRule], pieces: Sequence[Piece], ragged: bool) -> EventLog:
    """The records of every event, of all rounds."""
    records = []
    for i, rule in enumerate(rules):
        parts, gone = [], []
        for piece in pieces:
            record, state = piece.records[i], piece.states[i]
            tree = [record.t, record.y]
            if rule.resets:
                lines = record.t.shape[0] if state is not None else 0
                if lines and piece.right.yp is not None:
                    # of implicit equations the consistent one, after all that happened there
                    state, apart = piece.right.y, piece.hits[i] & piece.apart
                    if isinstance(rule, DoseRule) and anywhere(apart):
                        state = piece.beyond(record.t[0].to(piece.stop.dtype), apart)[0]
                tree.append(tree_map(lambda x, n=lines: x.unsqueeze(0)[:n], piece.right.y if state is None else state))
            parts.append(tuple(tree))
            gone.append(record.t.detach().isnan() | ~piece.going)
        records.append(EventRecord(*gathered(parts, gone, ragged)))
    return EventLog.of(records, (rule.name for rule in rules))


def _work(pieces: Sequence[Piece]) -> Stats:
    """The sums of all counts, of trajectories in the rounds that were theirs."""
    counts = {}
    for f in fields(Stats):
        if f.name != "backward":
            each = [(getattr(p.sol.stats, f.name), p.going) for p in pieces]
            counts[f.name] = sum(x if isinstance(x, (int, float)) else torch.where(on, x, 0) for x, on in each)
    return Stats(**counts, backward=BackwardStats([p.sol.stats.backward for p in pieces]))


@dataclass(frozen=True)
class _Joined(WithTensors):
    """``sol(t, side)``: that of the round which a time is in. ``let``: what is done with its results."""

    times: Times
    pieces: Sequence[Piece]
    last: Boundary
    batched: bool
    let: Callable[[Any], Any] | None = None

    def with_tensors(self, function: Callable[[Any], Any]) -> _Joined:
        """The same with ``function`` of the solutions of rounds, and of results, as resets are functions of the time too."""
        pieces = [replace(piece, sol=replace(piece.sol, interpolant=function(piece.sol.interpolant))) for piece in self.pieces]
        return replace(self, pieces=pieces, let=function)

    def __call__(self, t: Tensor, side: str = "right") -> Any:
        """The state at ``t``, as `Solution` says."""
        found = self._at(t, side)
        return found if self.let is None else self.let(found)

    def _at(self, t: Tensor, side: str) -> Any:
        pieces, last, batched = self.pieces, self.last, self.batched
        first, end = (self.times.anchors[i] if batched else self.times.anchors[i, 0] for i in (0, -1))
        sign = torch.where(end >= first, 1.0, -1.0)
        eps = max(torch.finfo(x.dtype).eps for x in tree_leaves(pieces[0].y0))
        full = t.to(device=first.device, dtype=torch.float64)
        lone = full.dim() == 0
        full = full.reshape(1) if lone else full
        if full.dim() > (2 if batched else 1) or (full.dim() == 2 and full.shape[1] != first.shape[0]):
            raise InvalidInput(f"sol(t) takes t of shape () or (T,){' or (T, B)' if batched else ''}, got {tuple(t.shape)}")
        full = full.unsqueeze(-1).expand(-1, first.shape[0]) if batched and full.dim() == 1 else full
        now = full.detach()
        slack = max(1e-14, 2 * eps if eps > 1e-10 else 0.0) * torch.maximum(first.abs(), end.abs()).detach()
        outside = (sign * (now - first) < -slack) | (sign * (now - last.t) > slack)
        if readable(outside) and bool(outside.any()):
            raise InvalidInput("sol(t): t lies outside of what was integrated")
        out: Any = None
        for k, piece in enumerate(pieces):
            after = sign * (now - piece.start)
            mine = piece.going & ((after > 0) if side == "left" and k else (after >= 0)) if k else torch.ones_like(now, dtype=torch.bool)
            if k and not anywhere(mine):
                continue
            start, stop = piece.start.detach(), piece.stop.detach()
            # the time of an event is known in the numbers of the state, which may lie a little beyond the end
            coarse = 2 * eps * stop.abs() if eps > 1e-10 else torch.zeros_like(stop)
            stop = torch.where((stop - start).abs() > coarse, stop - sign * coarse, start)
            low, high = torch.minimum(start, stop), torch.maximum(start, stop)
            # a time that is put back by rounding moves as it is
            within = torch.where(now < low, low, torch.where(now > high, high, now))
            value = piece.sol(torch.where(mine, within + (full - now), within))
            out = value if out is None else chosen(mine, value, out)
            # the last round of a trajectory, which has gone through its resets
            final = piece.going & (piece.hit | piece.begun) & (sign * (now - last.t) >= 0)
            final = final & ~pieces[k + 1].going if k + 1 < len(pieces) else final
            if side == "right" and anywhere(final):
                there = piece.beyond(full, final)[0]
                out = tree_map(lambda x, y, on=final: chosen(on, y.expand_as(x), x), out, there)
        return tree_map(lambda x: x[0], out) if lone else out
