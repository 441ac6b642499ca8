"""Trajectories whose steps, small enough for the state, are too long for derivatives: solved again with a displacement beside.

The equations are those of `with_displacement`, and the error of the displacement, in units of itself and of the smallest one that the error
test sees, goes with that of the state. What `integrate.companion.Companion` does, by compiled code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from ..integrate.companion import drawn, unit_of
from ..integrate.plan import Plan, Record
from .program import Program
from .reading import Unreadable
from .solve import run_native

__all__ = ["solved_again"]

#: of the fields of a record, where trajectories are
_SECOND = ("states", "samples", "t", "h", "segment", "lands", "sample_step")
_THIRD = ("stages", "extra")
_OF_EVENTS = ("event_id", "event_row", "event_step", "event_t")
#: those that count what both solves took
_WORK = ("n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton")


def solved_again(
    program: Program,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
    record: Record,
    which: Tensor,
) -> Record | None:
    """``record`` with the trajectories ``which`` (B,) from another solve, the other arguments being those of `run_native`; None where one
    of them then fails for another reason than the number of its steps.

    Raises `Unreadable`, `NoCompiler`.
    """
    if plan.switch is not None:
        raise Unreadable("", "", "method='auto' chooses between two methods by the state alone: name one of them")
    if plan.method.multistep and not plan.method.implicit:
        raise Unreadable("", "", f"the history of {plan.method.name!r} has none of a displacement: take a one-step method such as 'dopri8'")
    twice, rows = program.companion(), which.nonzero().squeeze(-1)
    y, of_rows = y0.detach()[rows], lambda x: x.detach().index_select(1, rows)
    beside, displacement = _beside(plan, y0.detach(), rows)
    given = [_of(x, own, rows) for x, own in zip(inputs, program.own, strict=True)]
    times = of_rows(anchors), None if t_eval is None else of_rows(t_eval)
    part, _ = run_native(twice, beside, *times, torch.cat([y, displacement], -1), given, False)
    if bool(((part.status < -1) & (record.status[rows] >= 0)).any()):
        return None
    # one evaluation with a displacement is as two
    work = {name: 2 * getattr(part, name) + getattr(record, name)[rows] for name in _WORK}
    halves = {name: getattr(part, name)[..., : y0.shape[-1]] for name in ("final", "last", "scaled_error", "states", "samples", "stages")}
    return _with_rows(record, which, rows, replace(part, **work, **halves))


def _of(x: Tensor, own: int, rows: Tensor) -> Tensor:
    """An input of these trajectories, of which each has ``own`` numbers, 0 where all share it."""
    return x.reshape(-1, own)[rows] if own else x


def _beside(plan: Plan, y0: Tensor, rows: Tensor) -> tuple[Plan, Tensor]:
    """The plan of states with a displacement, and the displacement at the start."""
    eps = torch.finfo(y0.dtype).eps
    rtol, atol = (torch.as_tensor(x, dtype=y0.dtype, device=y0.device).expand(y0.shape)[rows] for x in (plan.rtol, plan.atol))
    y, tangent = y0[rows], rtol.amax(-1, keepdim=True).clamp(min=eps**0.45).expand(rtol.shape)
    unit = unit_of(y.abs(), rtol, atol, eps**0.4)
    # the norm of both is as the two norms, and not their mean
    share = 0.5**0.5
    both = {"rtol": share * torch.cat([rtol, tangent], -1), "atol": share * torch.cat([atol, tangent * unit], -1)}
    first = plan.first_step
    if isinstance(first, Tensor) and first.numel() > 1:
        first = first.reshape(-1)[rows]
    pattern = drawn(y.shape[-1:]).to(device=y.device, dtype=y.dtype)
    return replace(plan, **both, first_step=first), torch.copysign(pattern * unit, y + 0.0)


def _with_rows(record: Record, which: Tensor, rows: Tensor, part: Record) -> Record:
    """``record`` with ``rows`` (R,), those of ``which`` (B,), from the one of these alone."""
    others = ~which[record.event_row]
    joined = [torch.cat([getattr(record, x)[others], rows[part.event_row] if x == "event_row" else getattr(part, x)]) for x in _OF_EVENTS]
    order = torch.sort(joined[1], stable=True).indices
    events = dict(zip(_OF_EVENTS, (x[order] for x in joined), strict=True))
    if len(record.stages) != len(record.t) or len(part.stages) != len(part.t):
        # of steps with events alone
        kept = torch.unique(events["event_step"])
        record, part = (replace(x, stages=_of_steps(x, kept)) for x in (record, part))
        stages = record.stages.index_copy(2, rows, part.stages)
        record, part = (replace(x, stages=x.stages[:0]) for x in (record, part))
    else:
        stages = None
    steps = max(len(record.t), len(part.t))
    longer, part = _padded(record, steps), _padded(part, steps)
    found = {}
    for field in fields(Record):
        old, new = getattr(longer, field.name), getattr(part, field.name)
        dim = 1 if field.name in _SECOND else 2 if field.name in _THIRD else 0
        if field.name not in _OF_EVENTS and old.numel():
            found[field.name] = old.index_copy(dim, rows, new)
    return replace(longer, **found, **events, **({} if stages is None else {"stages": stages}))


def _of_steps(record: Record, steps: Tensor) -> Tensor:
    """Stages of these steps, zero where they were not kept."""
    there, nothing = torch.unique(record.event_step), record.stages.new_zeros(len(steps), *record.stages.shape[1:])
    wanted = torch.isin(there, steps)
    return nothing.index_copy(0, torch.searchsorted(steps, there[wanted]), record.stages[wanted])


def _padded(record: Record, steps: int) -> Record:
    """With steps of size zero at the ends of trajectories, so that there are so many."""
    more = steps - len(record.t)
    if not more:
        return record

    def further(x: Tensor, value: Tensor | float) -> Tensor:
        if not x.numel() and len(x) == 0:
            return x
        return torch.cat([x, torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(more, *x.shape[1:])])

    filled = {"states": record.last, "stages": 0.0, "t": record.t_final, "h": 0.0, "segment": 0, "lands": False, "extra": 1.0}
    return replace(record, **{name: further(getattr(record, name), value) for name, value in filled.items()})
