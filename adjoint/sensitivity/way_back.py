"""What continuous adjoints share: the solution as a function of time, and the walk from loss to loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SolveError
from ..integrate import Plan, Record, Status
from ..integrate.grid import Grid
from .asked import Asked
from .linearize import Linearizer
from .problem import Problem

__all__ = ["Trajectory", "WayBack", "carried_step", "check_way_back", "in_units_of", "walk"]


class Trajectory:
    """The dense output of a record as a function of ``(B,)`` times: ``y`` and ``y'``."""

    def __init__(self, plan: Plan, grid: Grid, sign: Tensor) -> None:
        self.plan, self.sign = plan, sign
        self.t, self.h, self.states, self.stages = grid.t, grid.h, grid.states.detach(), grid.stages.detach()
        # starts of steps, increasing in every row; padding lies at the end of the span
        self.starts = (self.t * sign).t().contiguous()

    def state(self, t: Tensor) -> Tensor:
        """``y`` alone."""
        return self(t)[0]

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, n)`` each."""
        rows = torch.arange(t.shape[0], device=t.device)
        when = t.to(torch.float64)
        place = (torch.searchsorted(self.starts, (self.sign * when).unsqueeze(-1)) - 1).clamp(min=0).squeeze(-1)
        # a time that is the start of a padding step lies at the end of the one before
        h = self.h[place, rows]
        theta = (when - self.t[place, rows]) / torch.where(h == 0, 1.0, h)
        ks = self.stages[place, :, rows]
        method, kind = self.plan.method, ks.dtype
        weights = (method.dense_weights(theta) * h.unsqueeze(-1)).to(kind)
        y = self.states[place, rows] + torch.einsum("bs,bsn->bn", weights, ks)
        return y, torch.einsum("bs,bsn->bn", method.dense_slopes(theta).to(kind), ks)


class WayBack(Protocol):
    """The state of the way back; the cotangents of the inputs so far are those of ``linearize``."""

    linearize: Linearizer
    n_steps: int

    def to(self, t: Tensor) -> None:
        """Take the adjoint from the present time to ``t`` (B,)."""
        ...

    def jump(self, bar: Tensor) -> Tensor:
        """Take in a cotangent of the state at the present time; gives the slope there."""
        ...

    def boundary(self) -> tuple[Tensor, Tensor]:
        """Cotangent of the state, and its slope, at the present time."""
        ...

    def lose(self, rows: Tensor) -> None:
        """The adjoint of these ``rows`` (B,) is NaN, and so is what has a part in them."""
        ...


def in_units_of(plan: Plan, adjoint: Tensor) -> Plan:
    """The plan with its absolute tolerance times the largest entry: an adjoint has the units of the loss."""
    scale = float(adjoint.abs().amax().clamp(min=1e-300)) if adjoint.numel() else 1.0
    return replace(plan, atol=plan.atol * scale)


def carried_step(record: Record, plan: Plan) -> Tensor | None:
    """The first step ``(B,)`` behind the loss at which ``record`` ended; None where it is to be found anew.

    The jump there may make it too large, which the error test sees. On stiff problems every jump begins a layer that has to be resolved, so
    that implicit methods gain nothing.
    """
    step = record.next_step
    if plan.method.implicit or not step.numel():
        return None
    # a trajectory for which there was no way to go knows of no step
    return torch.where(torch.isfinite(step) & (step > 0), step, float("inf"))


def check_way_back(record: Record, plan: Plan, problem: Problem) -> None:
    """Raise `SolveError` where the adjoint could not be solved."""
    bad = record.status < 0
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    many = f" of trajectory {row}" if problem.batched else ""
    raise SolveError(
        f"the adjoint{many} could not be solved back from t = {float(record.t_final[row]):.6g} ({Status(int(record.status[row])).name}, "
        f"{plan.method.name}): give the gradient strategy a method for stiff problems or looser tolerances, or use DiscreteAdjoint()",
        t=float(record.t_final[row]),
        trajectory=row if problem.batched else None,
    )


def walk(back: WayBack, asked: Asked) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples)``; ``back`` starts at the end.

    A trajectory with a cotangent that is not finite is not followed with it, where its error would be everybody's: what it has a part in
    is NaN at the end.
    """
    problem, grid, anchors, t_eval, _, bars, _ = asked
    final_bar, samples_bar = asked.final_bar, bars[1]
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0)
    ok = (grid.status >= 0).unsqueeze(-1)
    t_eval_bar = None if t_eval is None else torch.zeros_like(t_eval)
    end_bar = torch.zeros_like(anchors[0])
    lost = torch.zeros_like(grid.status, dtype=torch.bool)
    if final_bar is not None:
        bar, lost = _finite(final_bar)
        end_bar = torch.where(lost, float("nan"), _dot(bar, back.jump(bar)))
    if samples_bar is not None and t_eval is not None and t_eval_bar is not None:
        order = (t_eval * sign).argsort(0, descending=True)
        for place in order.unbind():
            index = place.unsqueeze(0)
            bar = samples_bar.gather(0, index.unsqueeze(-1).expand(1, *samples_bar.shape[1:]))[0]
            bar = torch.where(ok, bar, 0.0)
            if not bool((bar != 0).any()):
                continue
            bar, bad = _finite(bar)
            lost = lost | bad
            back.to(t_eval.gather(0, index)[0])
            t_eval_bar.scatter_(0, index, torch.where(bad, float("nan"), _dot(bar, back.jump(bar))).unsqueeze(0))
    back.to(anchors[0])
    if bool(lost.any()):
        back.lose(lost)
    y0_bar, start = back.boundary()
    anchors_bar = torch.stack([-_dot(y0_bar, start), end_bar])
    problem.backward_report(back.linearize.n_fun, back.n_steps)
    return asked.answer(anchors_bar, t_eval_bar, y0_bar, back.linearize.bars)


def _finite(bar: Tensor) -> tuple[Tensor, Tensor]:
    """A cotangent ``(B, n)`` with zeros in the rows where it is not finite, and these rows."""
    lost = ~torch.isfinite(bar).all(-1)
    return torch.where(lost.unsqueeze(-1), 0.0, bar), lost


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """``Re <x, y>`` of every row, ``(B,)`` in float64."""
    return (x.conj() * y).sum(-1).real.double()
