"""Multistep solves whose steps are small enough for derivatives too, see `companion`: solved once more, with a displaced solution beside.

The history of a multistep method cannot be begun in the middle. So it is looked at the steps of a solve that has ended whether the state
rested or steps were longer than the Jacobian allows; where they were, everything is solved again with twice the rows. The steps of a row
and those of its displaced one are the same: their errors go together in norms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..linalg import DenseLU
from ..system.jacobians import DenseJacobian
from .adams import AdamsSolver
from .bdf import BdfSolver
from .companion import Beside, drawn, unit_of
from .multistep import MultistepSolver, Predicted, solve_multistep
from .plan import Plan, Record
from .stepper import Attempt, StageWork

__all__ = ["integrate_paired", "stands", "too_long"]

Flat = Callable[[Tensor, Tensor], Tensor]

#: steps at which it is looked whether the state rests, and one in so many at which the Jacobian is looked at
_FIRST, _EVERY = 8, 24
#: lengths of the intervals of stability of predict-evaluate-correct-evaluate on the negative axis, by the order of the prediction from 1 on
_INTERVALS = (2.0, 2.39, 1.93, 1.4, 1.04, 0.77, 0.58, 0.44, 0.33, 0.26, 0.21, 0.06)
#: the part of these intervals from which on one step in four is too long
_NEARLY = 0.7
#: how much faster modes are that say nothing about the solution: steps of all solves go beyond these intervals now and then
_FASTER = 4.0
#: products of whose growth the size of the Jacobian is the mean
_MEAN = 4
#: dimension up to which Jacobians of the second solve are dense ones
_LARGEST = 512


@dataclass(frozen=True)
class _PairedPlan(Plan):
    """A plan for rows ``(2 B, n)``, whose second half is displaced: of these the error is that of the distance, in units of ``tangent``
    times the distance; what is measured of a row and its displaced one is the larger of both."""

    tangent: float = 1e-6

    @property
    def shift_size(self) -> float:
        return torch.finfo(self.real).eps ** 0.4

    def halves(self, x: Any, rows: int) -> Any:
        """What is given by row, of the first half."""
        return x[:rows] if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] == 2 * rows else x

    def unit(self, size: Tensor) -> Tensor:
        """The displacement (B, n) of states of this size."""
        rtol, atol = (self.halves(x, len(size)) for x in (self.rtol, self.atol))
        return unit_of(size, rtol, atol, self.shift_size)

    def scaled(self, error: Tensor, size: Tensor) -> Tensor:
        """See `Plan.scaled`."""
        rows = len(error) // 2
        rtol, atol = (self.halves(x, rows) for x in (self.rtol, self.atol))
        own, distance = size[:rows], torch.maximum(self.unit(size[:rows]), (size[rows:] - size[:rows]).abs())
        between = (error[rows:] - error[:rows]).abs() - 8 * torch.finfo(self.real).eps * own
        return torch.cat([error[:rows].abs() / (own * rtol + atol), between.clamp(min=0.0) / (self.tangent * distance)])


def _together(norm: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def both(x: Tensor) -> Tensor:
        rows = len(x) // 2
        larger = torch.maximum(norm(x[:rows]), x[rows:].abs().amax(-1))
        return torch.cat([larger, larger])

    return both


class _PairedAdams(AdamsSolver):
    """Displaced rows never come nearer than the error test sees: so they find modes that have died away and would grow in longer steps."""

    def accept(self, found: Predicted, passed: Tensor, restart: Tensor, step: Attempt) -> None:
        """See `MultistepSolver.accept`."""
        super().accept(found, passed, restart, step)
        rows, plan = len(passed) // 2, self.plan
        assert isinstance(plan, _PairedPlan)
        y = self.D[0, :rows]
        floor = 0.5 * plan.tangent * plan.unit(y.abs()) * _pattern(y, plan)
        moved = torch.where(passed[:rows].unsqueeze(-1), floor, 0.0)
        self.D = torch.cat([torch.cat([self.D[:1, :rows], self.D[:1, rows:] + moved], 1), self.D[1:]])


def _pattern(y: Tensor, plan: Plan) -> Tensor:
    return torch.copysign(drawn(y.shape[-1:]).to(device=y.device, dtype=plan.real), y.real + 0.0)


def _tangent(plan: Plan) -> float:
    rtol = plan.rtol if isinstance(plan.rtol, float) else float(plan.rtol.detach().max())
    return max(rtol, torch.finfo(plan.real).eps ** 0.45)


def stands(states: Tensor) -> Tensor:
    """Which components ``(B, n)`` of ``states`` (K + 1, B, n) rest in all of the first steps."""
    begun = states[: _FIRST + 1]
    return ((begun[1:] - begun[:-1]).abs() <= 8 * torch.finfo(states.dtype).eps * begun[:-1].abs()).all(0)


def _longest_rest(states: Tensor, h: Tensor, still: Tensor) -> Tensor:
    """``(B, n)``: the longest of the steps in which components that are ``still`` at the start went on resting; zero for others."""
    rows, places = still.nonzero(as_tuple=True)
    own, size = states[:, rows, places], h.abs()[:, rows]
    rests = ((own[1:] - own[:-1]).abs() <= 8 * torch.finfo(own.dtype).eps * own[:-1].abs()).cumprod(0)
    found = torch.zeros(still.shape, dtype=size.dtype, device=size.device)
    found[rows, places] = (size.amax(0) if len(rests) != len(size) else (rests * size).amax(0)) * rests[0]
    return found


def too_long(f: Flat, plan: Plan, record: Record, y0: Tensor) -> tuple[Tensor, Tensor]:
    """Whose steps ``(B,)`` were too long for derivatives, and how often ``f`` was evaluated for each to see it."""
    states = record.states if len(record.states) else torch.stack([y0, record.last])
    found, count = torch.zeros_like(record.status, dtype=torch.bool), torch.zeros_like(record.status)
    if len(states) < 2 or not y0.numel():
        return found, count
    still, explicit, pair = stands(states), not plan.method.implicit, _paired(plan)
    taken = record.n_accepted
    looked = (record.status >= 0) & (taken > 0)
    looked = looked if explicit else looked & still.any(-1)
    if not bool(looked.any()):
        return found, count
    every = torch.arange(len(y0), device=y0.device)
    level, places = torch.zeros_like(record.h), [(0, torch.zeros_like(every))]
    if explicit and record.extra.numel():
        bounds = torch.tensor(_INTERVALS, dtype=torch.float64, device=y0.device)
        level = record.h.abs() / bounds[record.extra[:, 0].long().clamp(1, len(_INTERVALS)) - 1]
        if len(record.states):
            places += [(k, k + _late(x, taken - k)) for k, x in zip(range(0, len(level), _EVERY), level.split(_EVERY), strict=True)]
    probe, grown = _pattern(y0, plan), []
    for begin, k in places:
        asked = looked & ~found & (taken > begin)
        if not bool(asked.any()):
            continue
        y, t = states[k, every], record.t[k, every].to(plan.real)
        unit, slope = pair.unit(y.abs()), f(t, y)
        # components that pass through zero would count a thousand times as much as the others
        unit = torch.maximum(unit, 1e-2 * unit.amax(-1, keepdim=True))
        count = count + asked
        # in units of the tolerance a single product may be anything, several in a row are the size of an eigenvalue
        for _ in range(_MEAN if explicit and not grown else 1):
            change = (f(t, y + probe * unit) - slope) / unit
            count = count + (asked & ~found)
            if not grown:
                reach = change.abs() / probe.abs().amax(-1, keepdim=True) * _longest_rest(states, record.h, still)
                found = found | (asked & (reach >= _tangent(plan) ** 0.5).any(-1))
            size = change.abs().amax(-1)
            usable = torch.isfinite(size) & (size > 0)
            grown = [*grown, torch.where(usable, size / probe.abs().amax(-1), 0.0)][-_MEAN:]
            probe = torch.where(usable.unsqueeze(-1), change / torch.where(usable, size, 1.0).unsqueeze(-1), _pattern(y, plan))
        if explicit and len(record.states) > 2:
            rate = torch.stack(grown).log().mean(0).exp()
            slow = rate > _FASTER * _pace(record, torch.minimum(k.clamp(min=1), (taken - 1).clamp(min=1)), every, unit)
            found = found | (asked & (taken > 1) & (rate * level[k, every] > _NEARLY) & slow)
    return found, count


def _late(level: Tensor, count: Tensor) -> Tensor:
    """Of every window ``(W, B)``, the first ``count`` of whose steps were taken, a long step, but not the longest: single ones are far
    beyond in solves of all kinds."""
    count = count.clamp(1, len(level))
    place = torch.arange(len(level), device=level.device).unsqueeze(-1)
    order = torch.where(place < count, level, torch.inf).sort(dim=0, stable=True).indices
    return order.gather(0, ((3 * count + 3) // 4 - 1).unsqueeze(0))[0]


def _pace(record: Record, k: Tensor, every: Tensor, unit: Tensor) -> Tensor:
    """How fast the solution itself changes its direction in steps ``k`` (B,): ``|y''| / |y'|``."""
    y, h = record.states, record.h
    before, after = ((y[i + 1, every] - y[i, every]) / h[i, every].to(unit.dtype).unsqueeze(-1) / unit for i in (k - 1, k))
    pace = 2 * (after - before).abs().amax(-1) / (h[k, every] + h[k - 1, every]).abs() / torch.maximum(before.abs(), after.abs()).amax(-1)
    return torch.where(pace.isnan(), 0.0, pace)


def _paired(plan: Plan) -> _PairedPlan:
    """The plan for twice the rows."""

    def twice(x: Any) -> Any:
        return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() > 1 and x.shape[0] > 1 else x

    given = {x.name: getattr(plan, x.name) for x in fields(Plan)}
    return _PairedPlan(**given | {"rtol": twice(plan.rtol), "atol": twice(plan.atol), "norm": _together(plan.norm)}, tangent=_tangent(plan))


def integrate_paired(
    solver: MultistepSolver, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, beside: Beside, record: Record, which: Tensor
) -> Record:
    """The solve of ``record`` with steps that are small enough in the rows ``which`` (B,); ``beside``: see `Companion`."""
    rows, pair = len(y0), _paired(plan)
    if plan.events or y0.shape[-1] > _LARGEST:
        _warn(plan, "with events" if plan.events else f"of more than {_LARGEST} numbers")
        return record
    f, g = beside(False), beside(True)

    def both(t: Tensor, y: Tensor) -> Tensor:
        t = t.expand(2 * rows)
        return torch.cat([f(t[:rows], y[:rows]), g(t[rows:], y[rows:])])

    begin = torch.cat([y0, y0 + pair.unit(y0.abs()) * _pattern(y0, plan)])
    work = StageWork.zero(2 * rows, y0.device)
    if isinstance(solver, BdfSolver):
        dense = {"jacobian": DenseJacobian(), "linear_solver": DenseLU()}
        twice: MultistepSolver = replace(solver, f=both, plan=pair, work=work, alone=False, **dense)
    else:
        twice = _PairedAdams(both, pair, 2 * rows, y0.device)
    times = None if t_eval is None else torch.cat([t_eval, t_eval], 1)
    # the others have nothing to do
    ends = torch.where(which, anchors, anchors[:1])
    found = solve_multistep(twice, pair, torch.cat([ends, ends], 1), times, begin)
    failed = which & (found.status[:rows] < 0)
    if bool(failed.any()):
        _warn(plan, "that are short enough were not found, and those that were taken")
    counts = {name: getattr(record, name) + which * getattr(found, name)[:rows] for name in ("n_steps", "n_rejected")}
    for name in ("n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton"):
        done = getattr(twice.work, name)
        counts[name] = getattr(record, name) + which * (done[:rows] + done[rows:])
    return replace(_merged(record, found, which & ~failed, twice.idle), **counts)


def _warn(plan: Plan, what: str) -> None:
    warnings.warn(
        f"the state rests, or moves slowly beside what is fast: steps of {plan.method.name!r} {what} go by the state alone there, and "
        "derivatives may be those of unstable steps: choose a one-step method such as 'tsit5' or 'kvaerno5', or bound max_step",
        RuntimeWarning,
        stacklevel=2,
    )


def _merged(record: Record, other: Record, which: Tensor, idle: Tensor) -> Record:
    """``record``, in the rows ``which`` the first half of ``other``; what has fewer steps goes on with steps of size zero."""
    rows = len(which)
    out: dict[str, Tensor] = {}
    for name in ("final", "last", "scaled_error"):
        out[name] = torch.where(which.unsqueeze(-1), getattr(other, name)[:rows], getattr(record, name))
    for name in ("n_accepted", "status", "t_final"):
        out[name] = torch.where(which, getattr(other, name)[:rows], getattr(record, name))
    out["samples"] = torch.where(which.unsqueeze(-1), other.samples[:, :rows], record.samples)
    out["sample_step"] = torch.where(which, other.sample_step[:, :rows], record.sample_step)
    most = max(len(record.h), len(other.h))
    kinds = {
        "t": lambda x: x.t_final,
        "h": lambda x: torch.zeros_like(x.t_final),
        "segment": lambda x: torch.zeros_like(x.status),
        "lands": lambda x: torch.zeros_like(x.status, dtype=torch.bool),
        "states": lambda x: x.last,
        "stages": lambda x: x.stages.new_zeros(x.stages.shape[1:]),
        "extra": lambda x: idle.unsqueeze(-1).expand(-1, len(x.status)),
    }
    for name, behind in kinds.items():
        one, two = (_padded(getattr(x, name), behind(x), most + (name == "states")) for x in (record, other))
        two = two.narrow(2 if name in ("stages", "extra") else 1, 0, rows)
        mask = which.unsqueeze(-1) if name in ("states", "stages") else which
        out[name] = torch.where(mask, two, one) if len(one) else one
    return replace(record, **out)


def _padded(x: Tensor, behind: Tensor, count: int) -> Tensor:
    """``count`` entries, or none where there were none; those behind are all the same."""
    if not len(x) or len(x) == count:
        return x
    return torch.cat([x, behind.unsqueeze(0).expand(count - len(x), *behind.shape)])
