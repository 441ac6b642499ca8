"""The loop of backward differentiation formulas for one trajectory: as `multistep`, but times, sizes, orders and decisions are numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..linalg import Factorization, LinearOperator, Matrix
from ..linalg.dense import factor_one
from ..methods.bdf import MAX_ORDER, coefficients, rescaling_alone
from .alone import row_norm, solved
from .bdf import BOUND, LARGEST, NEWTON, SAFETY, SIZE, SMALLEST, BdfSolver, update_matrix
from .clock import aim_step, why_stuck
from .events import EventWatch
from .initial_step import initial_step
from .matrices import jacobian_at, shifted
from .newton import iterate
from .plan import Plan, Record, Status, shifted_times
from .sampling import Sampler
from .work import StageWork

__all__ = ["integrate_multistep_alone"]

#: a new state, its distance from the prediction, and that plus ``psi``
_Three = tuple[Tensor, Tensor, Tensor]




class _Formulas:
    """Numbers of every order, and the matrices that act on the table of differences (8, n), made when they are first asked for."""

    def __init__(self, like: Tensor) -> None:
        self.gamma, self.alpha, self.constants = (x.tolist() for x in coefficients(torch.float64, torch.device("cpu")))
        self._like = like
        self._found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __getitem__(self, order: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the prediction and of ``psi``; ``S`` and ``s`` of `update_matrix`."""
        if order not in self._found:
            low = [float(i <= order) for i in range(SIZE)]
            psi = [x / self.alpha[order] if i <= order else 0.0 for i, x in enumerate(self.gamma)]
            both = self._like.new_tensor([low, psi + [0.0] * (SIZE - len(psi))])
            S, s = update_matrix(torch.tensor([order], device=self._like.device))
            self._found[order] = both, S[0].to(self._like.dtype), s[0].to(self._like.dtype)
        return self._found[order]


class _Newton:
    """The iteration of `BdfSolver` for one ODE."""

    def __init__(self, solver: BdfSolver, device: torch.device) -> None:
        self.solver, self.device, self.norm = solver, device, row_norm(solver.plan)
        self.n_fun = self.n_jac = self.n_factorizations = self.n_newton = 0
        self.stuck = False
        self._matrix: Matrix | None = None
        self._factors: Factorization | None = None
        self._c = math.nan

    def finish(self) -> None:
        """Tell the solver what was counted."""
        counts = (self.n_fun, self.n_jac, self.n_factorizations, self.n_newton, self.n_newton)
        self.solver.work = StageWork(*(torch.tensor([x], dtype=torch.int64, device=self.device) for x in counts), log=self.solver.work.log)
        self.solver.stuck = torch.tensor([self.stuck], device=self.device)

    def _take(self, t: Tensor, y: Tensor) -> None:
        self._matrix = jacobian_at(self.solver.jacobian, self.solver.f, t.reshape(1), y.reshape(1, -1))
        self._c = math.nan
        self.n_jac += 1

    def _factor(self, c: float) -> Factorization:
        if c != self._c or self._factors is None:
            assert self._matrix is not None
            matrix = shifted(self._matrix, torch.tensor([[c]], dtype=self.solver.plan.real, device=self.device))
            linear, log = self.solver.linear_solver, self.solver.work.log
            self._factors = factor_one(linear, matrix, log, None if isinstance(matrix, LinearOperator) else self._factors)
            self._c = c
            self.n_factorizations += 1
        return self._factors

    def correct(self, t: Tensor, predicted: Tensor, psi: Tensor, c: float) -> tuple[Tensor, Tensor, bool, int]:
        """The new state, its distance from the prediction, whether the iteration converged, and after how many rounds."""
        fresh = self._matrix is None
        if fresh:
            self._take(t, predicted)
        weight = 1 / (predicted.abs() * self.solver.rtol + self.solver.atol)
        y, d, failed, self.stuck, count = self._iterate(t, predicted, psi, c, weight)
        if failed and not fresh:
            self._take(t, predicted)
            y, d, failed, self.stuck, count = self._iterate(t, predicted, psi, c, weight)
        return y, d, not failed, count

    def _iterate(self, t: Tensor, predicted: Tensor, psi: Tensor, c: float, weight: Tensor) -> tuple[Tensor, Tensor, bool, bool, int]:
        """The new state, its distance from the prediction, whether the iteration failed, though all was finite, after how many rounds."""
        f, factors, rounds = self.solver.f, self._factor(c), self.n_newton

        def change(x: _Three, _: bool) -> tuple[Tensor, float]:
            # c F(t, y, (psi + d) / c) = psi + d - c f
            found = solved(factors, torch.sub(x[2], f(t, x[0]), alpha=c))
            self.n_fun += 1
            self.n_newton += 1
            return found, self.norm(found * weight)

        def moved(x: _Three, found: Tensor, on: bool) -> _Three:
            return (x[0] - found, x[1] - found, x[2] - found) if on else x

        start = (predicted, torch.zeros_like(predicted), psi)
        (y, d, _), failed, stalled = iterate(start, change, moved, True, BOUND, NEWTON, worst=1.0)
        return y, d, failed, stalled, self.n_newton - rounds


@dataclass
class _Kept:
    """What is recorded of accepted steps."""

    t: list[float] = field(default_factory=list)
    h: list[float] = field(default_factory=list)
    segment: list[int] = field(default_factory=list)
    lands: list[bool] = field(default_factory=list)
    states: list[Tensor] = field(default_factory=list)
    stages: list[Tensor] = field(default_factory=list)
    extra: list[np.ndarray] = field(default_factory=list)


def _stages(new: Tensor, d: Tensor, order: int, h: float) -> Tensor:
    """(6, n): the differences behind the state up to the order, and the correction, over ``h``."""
    out = new.new_zeros(MAX_ORDER + 1, *d.shape)
    out[:order] = new[1 : order + 1]
    out[MAX_ORDER] = d
    return out / h


def integrate_multistep_alone(
    solver: BdfSolver,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
) -> Record:
    """Solve one ODE; arguments as for `integrate_single`."""
    flat, device, real, monitor = y0.shape, y0.device, plan.real, plan.monitor
    newton, formulas = _Newton(solver, device), _Formulas(y0)
    norm = newton.norm
    stops = anchors[:, 0].tolist()
    t, last_segment, segment = stops[0], len(stops) - 2, 0
    sign = 1.0 if stops[-1] >= t else -1.0
    while segment < last_segment and stops[segment + 1] == t:
        segment += 1
    slope = solver.f(anchors[0].to(real), y0)
    n_fun = 1
    if plan.first_step is None:
        step = float(initial_step(solver.f, plan, anchors, y0, slope, torch.full_like(anchors[0], sign)))
        n_fun += 1
    else:
        step = plan.first_step
    step = min(max(step, plan.min_step), plan.max_step)
    y0 = y0 if shape is None else y0.reshape(tuple(shape))
    # the table of differences, one row each
    D = y0.new_zeros(SIZE, y0.numel())
    D[0], D[1] = y0.reshape(-1), slope.reshape(-1) * (step * sign)
    T, eye = np.eye(SIZE), np.eye(SIZE)
    order, equal, attempts, n_accepted = 1, 0, 0, 0
    status, bad_last, scaled = Status.SUCCESS, False, None
    y, size_y = y0, y0.abs()
    sampler = Sampler(plan, [] if t_eval is None else t_eval[:, 0].tolist(), y0, sign)
    # samples at the start are those of a step of no length
    early = sampler.due(t)
    if early:
        sampler.fill(early, 0, t, 1.0, t, y0, y0, list)
    events = EventWatch(plan, inputs, t, y0)
    kept = _Kept()
    record = plan.keep_states or plan.keep_stages

    def change(factor: float) -> None:
        """Bring the differences to another distance."""
        nonlocal D, T, equal
        matrix = rescaling_alone(order, factor, SIZE)
        D = torch.mm(torch.from_numpy(matrix).to(D), D)
        T = matrix @ T
        equal = 0

    while True:
        # a step that went over a terminal event is taken again, up to it
        aiming = events.aim is not None
        target = stops[segment + 1] if events.aim is None else events.aim
        remaining = abs(target - t)
        aimed = aim_step(plan, step, t, remaining, attempts)
        if aimed.stuck:
            status = Status(why_stuck(aimed, bad_last))
            break
        lands = aimed.lands
        size = remaining if lands else aimed.size
        if size != step:
            change(size / step)
            step = size
        attempts += 1
        h = sign * step
        monitor.step(t, y, h)
        end = target if lands else t + h
        lands = lands and not aiming
        when = torch.full((), end, dtype=real, device=device)
        if lands and segment < last_segment and plan.shift != "none":
            when = shifted_times([when], [1.0], False, True, sign)[0]
        both, S, s = formulas[order]
        predicted, psi = (x.reshape(y0.shape) for x in torch.mm(both, D).unbind())
        y1, minus, converged, count = newton.correct(when, predicted, psi, h / formulas.alpha[order])
        d = minus.reshape(-1)
        size1 = y1.abs()
        scale = torch.maximum(size1, size_y)
        scaled = plan.scaled(d.reshape(y0.shape) * formulas.constants[order], scale)
        error = norm(scaled)
        bad_last = not converged
        safety = SAFETY * (2 * NEWTON + 1) / (2 * NEWTON + count)
        if not (converged and error <= 1.0):
            monitor.rejected(t, y, h)
            factor = 0.5
            if converged:
                factor = min(max(safety * max(error, 1e-30) ** (-1 / (order + 1)), SMALLEST), 1.0) if math.isfinite(error) else SMALLEST
            if factor != 1.0:
                change(factor)
                step *= factor
            continue
        before, D = D, torch.addr(torch.mm(S, D), s, d)
        stages = _Lazy(D, d, order, h, y0.shape)
        index = n_accepted
        stop_at, again = events.after_step(index, t, h, end, y, y1, stages)
        if again:
            monitor.rejected(t, y, h)
            D = before
            continue
        monitor.accepted(t, y, h)
        upto = sampler.due(end if stop_at is None else stop_at)
        if upto > sampler.next:
            sampler.fill(upto, index, t, h, end, y, y1, stages)
        if record:
            kept.t.append(t)
            kept.h.append(h)
            kept.segment.append(segment)
            kept.lands.append(lands)
            kept.states.append(y1)
            if plan.keep_stages:
                kept.stages.append(stages.all())
            kept.extra.append(np.concatenate([[order], T.ravel()]))
        n_accepted += 1
        y, size_y, t, T = y1, size1, end, eye
        equal += 1
        if stop_at is not None:
            t, status = stop_at, Status.TERMINAL_EVENT
            break
        monitor.advanced(abs(t - stops[0]) / max(abs(stops[-1] - stops[0]), 1e-300))
        if lands and segment >= last_segment:
            break
        factor = 1.0
        if lands:
            segment += 1
            # behind a discontinuity the differences say nothing
            D[2:], T = 0.0, np.diag([1.0, 1.0] + [0.0] * (SIZE - 2))
            order, equal, factor = 1, 0, 0.1
        elif equal > order:
            factor, order = _next_order(norm, plan, formulas, D, order, error, safety, scale)
        if factor != 1.0:
            change(factor)
            step *= factor
    newton.finish()
    last = y.reshape(flat)
    final = last if status >= 0 else torch.full_like(last, math.nan)
    real_kind = {"dtype": torch.float64, "device": device}

    def column(values: Sequence[float], kind: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=device).reshape(-1, 1)

    def one(value: float, kind: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor([value], dtype=kind, device=device)

    no_stages = y0.new_empty((0, MAX_ORDER + 1, *flat))
    extra = (
        torch.from_numpy(np.stack(kept.extra)).to(device).unsqueeze(-1) if kept.extra else torch.empty((0, 1 + SIZE * SIZE, 1), **real_kind)
    )
    return Record(
        final=final,
        last=last,
        scaled_error=torch.zeros(flat, dtype=real, device=device) if scaled is None else scaled.abs().reshape(flat),
        states=torch.stack([y0, *kept.states]).reshape(1 + len(kept.states), *flat) if plan.keep_states else y0.new_empty((0, *flat)),
        samples=sampler.result().reshape(len(sampler.order), *flat),
        stages=torch.stack(kept.stages).reshape(len(kept.stages), MAX_ORDER + 1, *flat) if kept.stages else no_stages,
        t=column(kept.t, torch.float64),
        h=column(kept.h, torch.float64),
        segment=column(kept.segment, torch.int64),
        lands=column(kept.lands, torch.bool),
        sample_step=column(sampler.step, torch.int64),
        n_steps=one(attempts),
        n_accepted=one(n_accepted),
        n_rejected=one(attempts - n_accepted),
        n_fun=one(n_fun),
        status=one(int(status)),
        t_final=one(t, torch.float64),
        event_id=torch.tensor([e[0] for e in events.found], dtype=torch.int64, device=device),
        event_row=torch.zeros(len(events.found), dtype=torch.int64, device=device),
        event_step=torch.tensor([e[1] for e in events.found], dtype=torch.int64, device=device),
        event_t=torch.tensor([e[2] for e in events.found], **real_kind),
        **{name: one(0) for name in ("n_jac", "n_factorizations", "n_solves", "n_newton")},
        extra=extra,
    )


@dataclass
class _Lazy:
    """The stages of an accepted step, made when they are first asked for."""

    D: Tensor
    d: Tensor
    order: int
    h: float
    shape: torch.Size
    found: Tensor | None = None

    def all(self) -> Tensor:
        """(6, \\*shape)"""
        if self.found is None:
            self.found = _stages(self.D, self.d, self.order, self.h).reshape(MAX_ORDER + 1, *self.shape)
        return self.found

    def __call__(self) -> list[Tensor]:
        return list(self.all().unbind())


def _next_order(
    norm: object, plan: Plan, formulas: _Formulas, D: Tensor, order: int, error: float, safety: float, scale: Tensor
) -> tuple[float, int]:
    """See `multistep._next_order`."""

    def level(q: int) -> float:
        return norm(plan.scaled(D[q + 1].reshape(scale.shape) * formulas.constants[q], scale))  # type: ignore[operator]

    norms = [level(order - 1) if order > 1 else math.inf, error, level(order + 1) if order < MAX_ORDER else math.inf]
    factors = [max(x, 1e-30) ** (-1 / (order + i)) if x == x else math.nan for i, x in enumerate(norms)]
    best = int(np.argmax(factors))
    factor = min(max(safety * factors[best], SMALLEST), LARGEST)
    # small changes are not worth a new matrix
    if 0.95 < factor < 1.2 and best == 1:
        factor = 1.0
    return factor, order + best - 1
