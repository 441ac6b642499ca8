"""From the attempts of a loop in lock step to the record of its solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan, Record

__all__ = ["Ended", "Kept", "evaluations_of_attempt", "record_of"]


@dataclass(frozen=True)
class Kept:
    """One entry for each attempt: what it did; the state at its start and its stages, where they are wanted (else nothing).

    ``extra``: what a multistep method records beside, ``(E, B)``; ``idle`` (E,): that of no step.
    """

    attempts: list[Any]
    states: list[Tensor]
    stages: list[Tensor]
    extra: list[Tensor] = field(default_factory=list)
    idle: Tensor | None = None


class Ended(NamedTuple):
    """Where a loop came to: what `record_of` looks at of a `Carry`."""

    t: Tensor
    y: Tensor
    scaled: Tensor
    step: Tensor
    segment: Tensor
    attempts: Tensor
    n_accepted: Tensor
    status: Tensor
    running: Tensor


def evaluations_of_attempt(plan: Plan, dense: bool, jumps: bool) -> int:
    """Evaluations of ``fun`` in an attempt; ``dense``: with the stages of the dense output."""
    method = plan.method
    if method.implicit:
        # the slope at the end, and what the step evaluates beside its iterations, which count their own; so does the slope behind a jump
        # where it takes an iteration
        return (method.end_index is None) + method.evaluations + (jumps and not getattr(method, "residual", False))
    each = method.n_stages if method.end_index is None or method.end_index == method.n_stages else method.n_stages - 1
    return each + (method.extra_evaluations if dense else 0) + jumps


def record_of(
    plan: Plan,
    carry: Any,
    samples: tuple[Tensor, Tensor],
    kept: Kept,
    y0: Tensor,
    n_fun: Tensor,
    plain: bool,
    found: dict[str, Tensor],
) -> Record:
    """The record of a solve that ended with ``carry``; ``samples``: values and steps; ``found``: its events; ``plain``: see `_packed`."""
    return Record(
        final=torch.where((carry.status >= 0).unsqueeze(-1), carry.y, float("nan")),
        last=carry.y,
        scaled_error=carry.scaled,
        samples=samples[0],
        sample_step=samples[1],
        n_steps=carry.attempts,
        n_accepted=carry.n_accepted,
        n_rejected=carry.attempts - carry.n_accepted,
        n_fun=n_fun,
        status=carry.status,
        t_final=carry.t,
        next_step=carry.step,
        **found,
        **dict.fromkeys(("n_jac", "n_factorizations", "n_solves", "n_newton"), torch.zeros_like(carry.attempts)),
        **_packed(kept, carry, y0, len(plan.method.nodes), plain),
    )


def _packed(kept: Kept, carry: Any, y0: Tensor, n_all: int, plain: bool) -> dict[str, Tensor]:
    """Move the accepted steps of every trajectory to the front, padded with steps of size zero at its end.

    ``plain``: there is one segment, at whose end the last step lands.
    """
    rows, n = y0.shape
    attempts, states, stages = kept.attempts, kept.states, kept.stages
    extra = {}
    if kept.idle is not None:
        extra["extra"] = kept.idle.new_empty((0, len(kept.idle), rows))
    if not attempts:
        kind = {"dtype": torch.float64, "device": y0.device}
        return extra | {
            "states": y0.unsqueeze(0),
            "stages": y0.new_empty((0, n_all, rows, n)),
            "t": torch.empty((0, rows), **kind),
            "h": torch.empty((0, rows), **kind),
            "segment": carry.segment.new_empty((0, rows)),
            "lands": carry.running.new_empty((0, rows)),
        }
    accepted = torch.stack([a.accepted for a in attempts])
    most = int(carry.n_accepted.max()) if rows else 0
    # index[j, b]: which attempt was the j-th accepted one of trajectory b. Rejected ones write to a last row that is dropped; places
    # that no attempt writes to name the entry behind all attempts: a step of size zero at the final state
    place = torch.where(accepted, accepted.cumsum(0) - 1, most + 1)
    attempt = torch.arange(len(attempts), device=y0.device).unsqueeze(-1).expand_as(place)
    index = place.new_full((most + 2, rows), len(attempts)).scatter_(0, place, attempt)[: most + 1]

    of_rows = (index * rows + torch.arange(rows, device=index.device)).reshape(-1)

    def pick(values: Sequence[Tensor], behind: Tensor, count: int) -> Tensor:
        """``count`` rows of what each trajectory, their first dimension, had at its accepted attempts."""
        # one index for whole rows, which is quicker than one for each number
        every = torch.stack([*values, behind]).flatten(0, 1)
        place = of_rows[: count * rows]
        # pairs are copied quickest as complex numbers
        paired = every.dim() == 2 and every.shape[1] == 2 and every.dtype in (torch.float32, torch.float64)
        got = torch.view_as_real(torch.view_as_complex(every).index_select(0, place)) if paired else every.index_select(0, place)
        return got.unflatten(0, (count, rows))

    zero = torch.zeros_like(carry.t)
    if not states:
        all_states = y0.new_empty((0, rows, n))
    else:
        all_states = pick(states, carry.y, most + 1)
    if stages:
        # (I, S, B, n) with the trajectories in front of the stages, as `pick` wants them
        turned = [x.movedim(0, 1) for x in stages]
        all_stages = pick(turned, torch.zeros_like(turned[0]), most).movedim(2, 1)
    else:
        all_stages = y0.new_empty((0, n_all, rows, n))
    if plain:
        segment = index.new_zeros((most, rows))
        lands = (torch.arange(most, device=y0.device).unsqueeze(-1) == carry.n_accepted - 1) & ~carry.running & (carry.status >= 0)
    else:
        segment = pick([a.segment for a in attempts], torch.zeros_like(carry.segment), most)
        lands = pick([a.lands for a in attempts], torch.zeros_like(attempts[0].lands), most)
    if kept.idle is not None:
        extra["extra"] = pick([x.t() for x in kept.extra], kept.idle.expand(rows, -1), most).transpose(1, 2)
    return extra | {
        "states": all_states,
        "stages": all_stages,
        "t": pick([a.t for a in attempts], carry.t, most),
        "h": pick([a.h for a in attempts], zero, most),
        "segment": segment,
        "lands": lands,
    }
