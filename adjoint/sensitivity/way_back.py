"""What continuous adjoints share: the solution as a function of time, and the walk from loss to loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import SolveError, counted, positive
from ..integrate import Plan, Record, Status
from ..integrate.plan import Grid
from ..methods import Method
from ..system.capture import saved_bytes
from ..system.system import Flat, VmappedSystem
from .asked import Asked, Linearizer, vjp
from .problem import Problem
from .steps_as_rows import maps

__all__ = [
    "Products", "Trajectory", "WayBack", "along_step", "carried_step", "check_way_back", "check_way_back_numbers", "copies", "dense_state",
    "in_units_of", "walk",
]  # fmt: skip

#: losses that are followed back at once, and what they may take, in bytes; numbers that are recorded of a way back, for one of the state's
_MOST, _BUDGET, _KEPT = 512, 64 * 2**20, 1000
#: nodes and weights on (0, 1) of Gauss's formulas of order 6 and 8, above that of any dense output of methods up to order 5, and of others
_GAUSS = [
    [(0.5 * (float(x) + 1), 0.5 * float(w)) for x, w in zip(*np.polynomial.legendre.leggauss(count), strict=True)] for count in (3, 4)
]


class Trajectory:
    """The dense output of a record as a function of ``(B,)`` times: ``y`` and ``y'``; of ``(copies * B,)`` times where there are some of
    every trajectory.

    Stages of some methods lie beyond their step, and so before the start of the span: as far out as the first step is long its polynomial
    is taken, and farther out, where it would be anything, what it is there.
    """

    def __init__(self, plan: Plan, grid: Grid, sign: Tensor, copies: int = 1) -> None:
        self.plan, self.grid, self.sign, self.copies = plan, grid, sign, copies
        self.t, self.h, self.states, self.stages = grid.t, grid.h, grid.states.detach(), grid.stages.detach()
        # starts of steps, increasing in every row; padding lies at the end of the span
        self.starts = (self.t * sign).t().contiguous()
        self.rows = torch.arange(grid.t.shape[1], device=grid.t.device).repeat(copies)

    def state(self, t: Tensor) -> Tensor:
        """``y`` alone."""
        return self(t)[0]

    def _count(self, t: Tensor, right: bool) -> Tensor:
        """How many steps begin before ``t``, or (``right``) there at the latest."""
        ahead = (self.sign * t.unflatten(0, (self.copies, -1))).t().contiguous()
        return torch.searchsorted(self.starts, ahead, right=right).t().flatten()

    def _place(self, when: Tensor) -> tuple[Tensor, Tensor]:
        """The step in which these times lie, and its size."""
        # a time that is the start of a padding step lies at the end of the one before
        place = (self._count(when, False) - 1).clamp(min=0)
        return place, self.h[place, self.rows]

    def size(self, t: Tensor) -> Tensor:
        """Of the steps in which ``t`` lies."""
        return self._place(t.to(torch.float64))[1]

    def parts(self, t: Tensor, h: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Ends ``(B,)`` of parts, from 0 to 1, of steps of the way back from ``t`` with sizes ``h``: in each the dense output is one
        polynomial. Trajectories with fewer of them get ones of no length."""
        far = t + h
        first, last = self._count(far, True), self._count(t, False)
        count, length = (last - first).clamp(min=0), torch.where(h == 0, 1.0, h)
        low = torch.ones_like(t)
        for k in range(int(count.max()) + 1):
            inner = (self.t[(first + k).clamp(max=len(self.t) - 1), self.rows] - t) / length
            high = torch.where(k < count, inner, 0.0)
            yield low, high
            low = high

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, n)`` each."""
        rows, when = self.rows, t.to(torch.float64)
        place, h = self._place(when)
        theta = ((when - self.t[place, rows]) / torch.where(h == 0, 1.0, h)).clamp(min=-1.0)
        ks = self.stages[place, :, rows]
        method, kind = self.plan.method, ks.dtype
        weights = (method.dense_weights(theta) * h.unsqueeze(-1)).to(kind)
        y = self.states[place, rows] + torch.einsum("bs,bsn->bn", weights, ks)
        return y, torch.einsum("bs,bsn->bn", method.dense_slopes(theta).to(kind), ks)


class Products:
    """Products of the adjoint with the Jacobian of ``f`` along the solution.

    They are linear in the adjoint: all that are asked for at one time, as iterations for a stage do, are had of one evaluation.
    ``slopes``: ``f`` is of state and slope, side by side. ``linearize`` checks what ``f`` depends on.
    """

    def __init__(self, f: Flat, trajectory: Trajectory, linearize: Linearizer, slopes: bool = False) -> None:
        self.f, self.trajectory, self.linearize, self.slopes = f, trajectory, linearize, slopes
        self._known: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, t: Tensor, adjoint: Tensor) -> Tensor:
        """``f_y* l`` at times ``t`` (B,)."""
        if self._known is None or self._known[0] is not t:
            y, slope = self.trajectory(t)
            with torch.enable_grad():
                at = (torch.cat([y, slope], -1) if self.slopes else y).requires_grad_(True)
                value = self.f(t, at)
            self.linearize.check_often(value, t, at)
            self._known = t, at, value
        _, at, value = self._known
        (product,) = vjp((value,), (at,), (adjoint,), keep=True) if value.requires_grad else (None,)
        return torch.zeros_like(at) if product is None else product


class WayBack(Protocol):
    """The state of the way back: the time ``t`` (B,), the ``adjoint`` (B, n) there; the cotangents of the inputs so far are those of
    ``linearize``."""

    problem: Problem
    plan: Plan
    trajectory: Trajectory
    linearize: Linearizer
    n_steps: int
    t: Tensor
    adjoint: Tensor

    def copied(self, size: int, t: Tensor) -> WayBack:
        """So many ways back of every trajectory, from ``t`` (size * B,), where their adjoints are zero."""
        ...

    def to(self, t: Tensor) -> None:
        """Take the adjoint from the present time to ``t`` (B,)."""
        ...

    def jump(self, bar: Tensor) -> None:
        """Take in a cotangent of the state at the present time."""
        ...

    def slope(self) -> Tensor:
        """Of the solution at the present time."""
        ...

    def restart(self, t: Tensor, adjoint: Tensor) -> None:
        """Go on from ``t`` (B,) with this ``adjoint`` (B, n)."""
        ...

    def boundary(self) -> tuple[Tensor, Tensor]:
        """Cotangent of the state, and its slope, at the present time."""
        ...

    def lose(self, rows: Tensor) -> None:
        """The adjoint of these ``rows`` (B,) is NaN, and so is what has a part in them."""
        ...


def along_step(
    trajectory: Trajectory, record: Record, k: int, method: Method, add: Callable[[Tensor, Tensor, Tensor], None]
) -> None:
    """Gauss's formula on step ``k`` of the way back: ``add(time, state, weight)`` with the dense output of ``record`` at its nodes, and
    weights ``(B, 1)`` that carry the sign of the step.

    It is taken on every part in which the solution is one polynomial. A step of the adjoint may be as long as many of the solution's: where
    that has a layer, or is driven, the adjoint may well not see it, and what ``f`` depends on does.
    """
    h = record.h[k]
    for low, high in trajectory.parts(record.t[k], h):
        for x, w in _GAUSS[method.order > 5]:
            theta = low + (high - low) * x
            # from far to near: against the direction of the step
            weight = (w * (low - high) * h).to(record.states.dtype).unsqueeze(-1)
            add(record.t[k] + theta * h, dense_state(record, k, theta, method), weight)


def dense_state(record: Record, k: int, theta: Tensor, method: Method) -> Tensor:
    """The dense output at parts ``theta`` (B,) of step ``k``."""
    weights = (method.dense_weights(theta) * record.h[k].unsqueeze(-1)).to(record.states.dtype)
    return record.states[k] + torch.einsum("bs,sbn->bn", weights, record.stages[k])


def in_units_of(plan: Plan, adjoint: Tensor, copies: int = 1) -> Plan:
    """The plan with its absolute tolerance times the largest entry, of each of the ``copies``: an adjoint has the units of the loss."""
    if copies > 1 and adjoint.numel():
        scales = adjoint.abs().unflatten(0, (copies, -1)).flatten(1).amax(-1).clamp(min=1e-300)
        return replace(plan, atol=plan.atol * scales.repeat_interleave(len(adjoint) // copies).unsqueeze(-1))
    scale = float(adjoint.abs().amax().clamp(min=1e-300)) if adjoint.numel() else 1.0
    return replace(plan, atol=plan.atol * scale)


def copies(problem: Problem, trajectory: Trajectory, linearize: Linearizer, size: int) -> tuple[Problem, Flat, Trajectory, Linearizer]:
    """What `WayBack.copied` is made of."""
    system = VmappedSystem(problem.system, size, (None,) * len(linearize.inputs))
    f = system.bind(linearize.inputs)
    return replace(problem, system=system), f, Trajectory(trajectory.plan, trajectory.grid, trajectory.sign, size), linearize.anew(f)


def most_copies(back: WayBack) -> int:
    """How many losses are followed back at once; 1: one after the other.

    By explicit methods they are not: what they cost is the way, which copies would go again and again. By implicit ones it is the layer
    behind every loss, in which what is fast dies away, and the losses' layers are resolved in the same steps.
    """
    if not back.plan.method.implicit or back.problem.system.asks:
        return 1
    trajectory, (rows, n), linearize = back.trajectory, back.adjoint.shape, back.linearize
    y, slope = trajectory(back.t)
    at = y if back.problem.system.residual is None else torch.cat([y, slope], -1)
    t = back.t.to(y.dtype.to_real())
    with torch.enable_grad():
        # a copy: a view would count with all that it is a view of
        alone = linearize.f(t.clone(), at.clone().requires_grad_(True))
    _, f, *_ = copies(back.problem, trajectory, linearize, 2)
    if not maps(alone, lambda: f(t.repeat(2), at.repeat(2, 1))[:rows]):
        return 1
    each = saved_bytes(alone, linearize.inputs) + rows * n * (_KEPT + 3 * n) * y.element_size()
    return max(1, min(_MOST, _BUDGET // each))


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


def check_way_back(record: Record, plan: Plan, problem: Problem, rows: int = 1) -> None:
    """Raise `SolveError` where the adjoint could not be solved; ``rows``: of how many trajectories, however many copies."""
    bad = record.status < 0
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    many = f" of trajectory {row % rows}" if problem.batched else ""
    raise SolveError(
        f"the adjoint{many} could not be solved back from t = {float(record.t_final[row]):.6g} ({Status(int(record.status[row])).name}, "
        f"{plan.method.name}): give the gradient strategy a method for stiff problems or looser tolerances, or use DiscreteAdjoint()",
        t=float(record.t_final[row]),
        trajectory=row % rows if problem.batched else None,
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
        back.jump(bar)
        if asked.moving:
            end_bar = torch.where(lost, float("nan"), _dot(bar, back.slope()))
    if samples_bar is not None and t_eval is not None and t_eval_bar is not None and len(t_eval):
        order = (t_eval * sign).argsort(0, descending=True)
        times = t_eval.gather(0, order)
        ordered = samples_bar.gather(0, order.unsqueeze(-1).expand_as(samples_bar))
        ordered = torch.where(ok, ordered, 0.0)
        (wanted,) = (ordered != 0).flatten(1).any(-1).nonzero(as_tuple=True)
        if len(wanted):
            found, lost_too = _samples(back, times[wanted], ordered[wanted], anchors[0], asked.moving)
            lost = lost | lost_too
            t_eval_bar.scatter_(0, order[wanted], found)
    back.to(anchors[0])
    if bool(lost.any()):
        back.lose(lost)
    y0_bar, start = back.boundary()
    anchors_bar = torch.stack([-_dot(y0_bar, start), end_bar])
    problem.backward_report(back.linearize.n_fun, back.n_steps)
    return asked.answer(anchors_bar, t_eval_bar, y0_bar, back.linearize.bars)


def _samples(back: WayBack, t: Tensor, bars: Tensor, start: Tensor, moving: bool) -> tuple[Tensor, Tensor]:
    """Take in the cotangents ``bars`` (T, B, n) of samples at ``t`` (T, B), latest first, on the way to ``start`` (B,). Gives the
    cotangents of their times, zero unless these are ``moving``, and the rows in which some are not finite."""
    bars, bad = _finite(bars)
    most = most_copies(back) if len(t) > 1 else 1
    found = []
    if most == 1:
        for time, bar in zip(t, bars, strict=True):
            back.to(time)
            back.jump(bar)
            found.append(_dot(bar, back.slope()) if moving else torch.zeros_like(time))
    else:
        # as many at a time in all parts
        size = -(-len(t) // -(-len(t) // most))
        parts = list(zip(t.split(size), bars.split(size), strict=True))
        for place, (times, part) in enumerate(parts):
            until = parts[place + 1][0][0] if place + 1 < len(parts) else start
            found.extend(_together(back, times, part, until, moving))
    return torch.where(bad, float("nan"), torch.stack(found)), bad.any(0)


def _together(back: WayBack, t: Tensor, bars: Tensor, until: Tensor, moving: bool) -> Tensor:
    """Take in cotangents ``bars`` (R, B, n) at ``t`` (R, B), latest first, and go ``until`` (B,); gives those of ``t``, see `_samples`.

    The adjoint equation is linear: each of them, and the adjoint of what lies behind, goes back by itself, all of them side by side, and
    what they come to is summed. So every loss has the steps that it needs.
    """
    rows, carried = len(until), bool((back.adjoint != 0).any())
    if carried:
        t, bars = torch.cat([t, back.t.unsqueeze(0)]), torch.cat([bars, torch.zeros_like(bars[:1])])
    copied = back.copied(len(t), t.flatten())
    copied.jump(bars.flatten(0, 1))
    found = _dot(bars, copied.slope().unflatten(0, (-1, rows))) if moving else torch.zeros_like(t)
    if carried:
        copied.adjoint = torch.cat([copied.adjoint[:-rows], back.adjoint])
    copied.to(until.repeat(len(t)))
    back.linearize.take(copied.linearize)
    back.n_steps += copied.n_steps
    back.restart(until, copied.adjoint.unflatten(0, (-1, rows)).sum(0))
    return found[:-1] if carried else found


def _finite(bar: Tensor) -> tuple[Tensor, Tensor]:
    """Cotangents ``(..., B, n)`` with zeros in the rows where they are not finite, and these rows."""
    lost = ~torch.isfinite(bar).all(-1)
    return torch.where(lost.unsqueeze(-1), 0.0, bar), lost


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """``Re <x, y>`` of every row, ``(..., B)`` in float64."""
    return (x.conj() * y).sum(-1).real.double()


def check_way_back_numbers(rtol: float | None, atol: float | None, max_steps: int) -> None:
    """Raise `InvalidInput` where tolerances are neither None nor positive numbers, or ``max_steps`` is no positive integer."""
    for name, value in (("rtol", rtol), ("atol", atol)):
        if value is not None:
            positive(value, name, finite=True)
    counted(max_steps, "max_steps")
