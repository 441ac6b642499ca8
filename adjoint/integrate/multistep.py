"""The loop of backward differentiation formulas: variable order and step for every trajectory, in lock step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import Factorization, LinearOperator, LinearSolver, Matrix, SparseMatrix
from ..methods.bdf import MAX_ORDER, coefficients, rescaling
from .batch_events import BatchEventWatch, no_events
from .batch_sampling import BatchSampler
from .batched import _skip_empty
from .initial_step import initial_step
from .pencil import Pencil, ScaledFactors, scaled_factors, split
from .plan import Monitor, Plan, Record, Status, shifted_times
from .residual import ResidualSolver
from .stages import LOOSEST, StageWork, _between, jacobian_at, shifted

__all__ = ["SIZE", "MultistepSolver", "integrate_multistep", "update_matrix"]

#: rows of the table of differences
SIZE = MAX_ORDER + 3
NEWTON, SMALLEST, LARGEST, SAFETY = 5, 0.2, 10.0, 0.9
_EPS = float(torch.finfo(torch.float64).eps)


def update_matrix(order: Tensor) -> tuple[Tensor, Tensor]:
    """``S`` (B, 8, 8) and ``s`` (B, 8): after a step the differences are ``S D + s d``, where ``d`` is the correction of the prediction."""
    place = torch.arange(SIZE, device=order.device)
    q = order.unsqueeze(-1)
    low = (place <= q).double()
    # D_j = sum_{i = j}^{q} D_i + d for j <= q, then d itself, then d - D_{q + 1}
    S = torch.triu(torch.ones(SIZE, SIZE, dtype=torch.float64, device=order.device)) * low.unsqueeze(-1) * low.unsqueeze(-2)
    after, next_ = (place == q + 2).double(), (place == q + 1).double()
    S = S - after.unsqueeze(-1) * next_.unsqueeze(-2)
    rest = (place > q + 2).double()
    S = S + torch.diag_embed(rest)
    return S, (place <= q + 2).double()


@dataclass
class MultistepSolver:
    """The equation of a step, ``F(t, y_p + d, (psi + d) / c) = 0`` for the correction ``d``, by Newton's iteration with old matrices.

    For an ODE ``F = y' - f``. A row's matrices are taken anew when its iteration is slow or its ``c`` has changed, so a trajectory does not
    depend on the others.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    plan: Plan
    jacobian: Callable[[Callable[[Tensor], Tensor], Tensor], Matrix]
    linear_solver: LinearSolver
    residual: bool
    work: StageWork
    starter: ResidualSolver | None
    skipped: Tensor | None = None

    def __post_init__(self) -> None:
        smallest = 4 * torch.finfo(self.plan.real).eps / 1e-3
        self.rtol, self.atol = _between(self.plan.rtol, smallest, LOOSEST[0]), _between(self.plan.atol, 0.0, LOOSEST[1])
        self.stuck = torch.zeros_like(self.work.n_fun, dtype=torch.bool)
        self._pencil: Pencil | Matrix | None = None
        self._factors: ScaledFactors | None = None
        self._plain: Factorization | None = None
        self._c: Tensor | None = None

    def equation(self, t: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        """``F(t, y, y')``."""
        return self.f(t, torch.cat([y, slope], -1)) if self.residual else slope - self.f(t, y)

    def _matrix(self, t: Tensor, y: Tensor, slope: Tensor, rows: Tensor) -> None:
        """Take the matrices of ``rows`` anew."""
        if self.residual:
            found = split(self.jacobian(lambda pair: self.f(t, pair), torch.cat([y, slope], -1)))
            old = self._pencil
            if isinstance(old, Pencil):
                found = Pencil(_mixed(rows, found.E, old.E), _mixed(rows, found.G, old.G))
            self._pencil = found
        else:
            new = jacobian_at(self.jacobian, self.f, t, y)
            self._pencil = new if self._pencil is None else _mixed(rows, new, self._pencil)  # type: ignore[arg-type]
        self._c = None
        self.work.n_jac += rows

    def _solve(self, c: Tensor, b: Tensor, running: Tensor) -> Tensor:
        """``(E + c G)^-1 b``."""
        if self._c is None or not torch.equal(self._c, c):
            changed = running if self._c is None else running & (c != self._c).squeeze(-1)
            # trajectories that are done have no step of their own
            safe = torch.where(running.unsqueeze(-1), c, 1.0)
            if isinstance(self._pencil, Pencil):
                self._factors = scaled_factors(self.linear_solver, self._pencil.at(safe), self.work.log, self._factors)
            else:
                assert self._pencil is not None
                matrix = shifted(self._pencil, safe)
                if self._plain is None or isinstance(matrix, LinearOperator):
                    self._plain = self.linear_solver.factor(matrix, self.work.log)
                else:
                    self._plain = self.linear_solver.refactor(self._plain, matrix)
            self._c = c
            self.work.n_factorizations += changed
        self.work.n_solves += running
        factors = self._factors if isinstance(self._pencil, Pencil) else self._plain
        assert factors is not None
        return factors.solve(b)

    def correct(self, t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor, running: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The correction, which rows have converged, and after how many iterations."""
        if self._pencil is None:
            self._matrix(t, predicted, psi / torch.where(running.unsqueeze(-1), c, 1.0), torch.ones_like(running))
            fresh = torch.ones_like(running)
        else:
            fresh = torch.zeros_like(running)
        size = predicted.abs() * self.rtol + self.atol
        d, converged, counts, finite = self._iterate(t, predicted, psi, c, running, size)
        again = running & ~converged & ~fresh
        if bool(again.any()):
            safe = torch.where(running.unsqueeze(-1), c, 1.0)
            self._matrix(t, predicted, psi / safe, again)
            d2, better, more, finite2 = self._iterate(t, predicted, psi, c, again, size)
            d = torch.where(again.unsqueeze(-1), d2, d)
            converged, finite = torch.where(again, better, converged), torch.where(again, finite2, finite)
            counts = torch.where(again, more, counts)
        self.stuck = torch.where(running, ~converged & finite, self.stuck)
        return d, converged, counts

    def _iterate(
        self, t: Tensor, predicted: Tensor, psi: Tensor, c: Tensor, running: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d = torch.zeros_like(predicted)
        safe = torch.where(running.unsqueeze(-1), c, 1.0)
        before = torch.full_like(safe.squeeze(-1), float("nan"))
        rate = torch.ones_like(before)
        active, converged = running, torch.zeros_like(running)
        counts, finite = torch.zeros_like(self.work.n_fun), torch.ones_like(running)
        for iteration in range(NEWTON):
            value = -safe * self.equation(t, predicted + d, (psi + d) / safe)
            wanted = safe if self._c is None else torch.where(active.unsqueeze(-1), c, self._c)
            change = self._solve(wanted, torch.where(active.unsqueeze(-1), value, 0.0), active)
            self.work.n_fun += active
            self.work.n_newton += active
            length = self.plan.norm(change / size)
            counts = counts + active
            if iteration:
                rate = torch.where(active, length / before, rate)
            good = torch.isfinite(length)
            finite = finite & (good | ~active)
            bad = active & (~good | ((rate >= 1.0) if iteration else False))
            moving = (active & ~bad).unsqueeze(-1)
            d = torch.where(moving, d + change, d)
            left = rate / (1 - rate).clamp(min=1e-3) * length if iteration else length
            done = active & ~bad & ((left <= 1e-3) | (length == 0)) & ((rate < 1) if iteration else True)
            converged = converged | done
            active = active & ~bad & ~done
            before = length
            if not bool(active.any()):
                break
        return d, converged, counts, finite


def _mixed(rows: Tensor, new: Matrix, old: Matrix) -> Matrix:
    """The matrices of ``new`` in these rows, those of ``old`` in the others."""
    if isinstance(new, Tensor) and isinstance(old, Tensor):
        return torch.where(rows.reshape(-1, 1, 1), new, old)
    if isinstance(new, SparseMatrix) and isinstance(old, SparseMatrix) and len(rows) > 1:
        # one pattern: that of a given Jacobian, which may change, is of one trajectory
        return SparseMatrix(new.indices, torch.where(rows.unsqueeze(-1), new.values, old.values), new.shape)
    return new


def integrate_multistep(
    solver: MultistepSolver, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor] = ()
) -> Record:
    """Solve B trajectories; arguments as for `integrate_batched`."""
    rows, n = y0.shape
    device, real = y0.device, plan.real
    gamma, alpha, constants = coefficients(torch.float64, device)
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).to(torch.float64)
    last_segment = anchors.shape[0] - 2
    t = anchors[0].clone()
    if solver.starter is not None:
        slope, step = solver.starter.start(anchors, sign, y0)
        n_fun = 0
    else:
        slope = solver.f(t.to(real), y0)
        step = initial_step(solver.f, plan, t, y0, slope, sign)
        n_fun = 2
    if plan.first_step is not None:
        step = torch.full_like(t, plan.first_step)
    step = step.clamp(min=plan.min_step, max=plan.max_step)
    D = y0.new_zeros(SIZE, rows, n)
    D[0], D[1] = y0, slope * (step * sign).to(real).unsqueeze(-1)
    T = torch.eye(SIZE, dtype=torch.float64, device=device).repeat(rows, 1, 1)
    order = torch.ones(rows, dtype=torch.int64, device=device)
    equal = torch.zeros_like(order)
    segment = _skip_empty(anchors, torch.zeros_like(order))
    attempts, accepted_count, status = torch.zeros_like(order), torch.zeros_like(order), torch.zeros_like(order)
    running = torch.ones(rows, dtype=torch.bool, device=device)
    bad_last, scaled = torch.zeros_like(running), torch.zeros_like(y0, dtype=real)
    sampler = BatchSampler(plan, t_eval, anchors, sign, y0, False)
    events = BatchEventWatch(plan, inputs, t, y0) if plan.events else None
    kept: list[tuple[Tensor, ...]] = []
    monitor, watched = plan.monitor, type(plan.monitor).advanced is not Monitor.advanced
    span = (anchors[-1] - anchors[0]).abs()

    def change(factor: Tensor, which: Tensor) -> None:
        """Bring the differences of some rows to another distance."""
        nonlocal D, T, equal
        matrix = rescaling(order, torch.where(which, factor, 1.0), SIZE)
        matrix = torch.where(which.reshape(-1, 1, 1), matrix, torch.eye(SIZE, dtype=matrix.dtype, device=device))
        D = torch.einsum("bij,jbn->ibn", matrix.to(D.dtype), D)
        T = matrix @ T
        equal = torch.where(which, 0, equal)

    while bool(running.any()):
        target = anchors.gather(0, segment.clamp(max=last_segment).unsqueeze(0) + 1).squeeze(0)
        remaining = (target - t).abs()
        capped = step.clamp(max=plan.max_step)
        lands = running & (capped * 1.01 >= remaining) & (remaining <= plan.max_step)
        size = torch.where(lands, remaining, capped)
        out_of_steps = attempts >= plan.max_steps
        tiny = (size <= 16 * _EPS * t.abs()) | ((size < plan.min_step) & ~lands)
        stop = running & (out_of_steps | (tiny & ~lands))
        why = torch.where(bad_last, int(Status.NON_FINITE), int(Status.STEP_TOO_SMALL))
        status = torch.where(stop, torch.where(out_of_steps, int(Status.MAX_STEPS), why), status)
        running = running & ~stop
        lands = lands & running
        if not bool(running.any()):
            break
        differs = running & (size != step)
        if bool(differs.any()):
            change(size / step, differs)
            step = torch.where(differs, size, step)
        attempts = attempts + running
        h = torch.where(running, sign * step, 0.0)
        end = torch.where(lands, target, t + h)
        inner = lands & (segment < last_segment)
        when = shifted_times([end.to(real)], [1.0], False, inner, sign)[0] if plan.shift != "none" and last_segment else end.to(real)
        place = torch.arange(SIZE, device=device)
        low = (place <= order.unsqueeze(-1)).to(real)
        predicted = torch.einsum("bi,ibn->bn", low, D)
        weights = torch.nn.functional.pad(gamma, (0, SIZE - gamma.shape[0])) * low / alpha[order].unsqueeze(-1)
        psi = torch.einsum("bi,ibn->bn", weights.to(D.dtype), D)
        c = (h / alpha[order]).to(real).unsqueeze(-1)
        d, converged, counts = solver.correct(when, predicted, psi, c, running)
        y1 = predicted + d
        scale = torch.maximum(y1.abs(), D[0].abs())
        errors = _shown(solver, constants[order].to(real).unsqueeze(-1) * d)
        scaled = torch.where(running.unsqueeze(-1), plan.scaled(errors, scale).abs(), scaled)
        error = plan.norm(scaled)
        failed = running & ~converged
        passed = running & converged & (error <= 1.0)
        rejected = running & converged & ~passed
        safety = SAFETY * (2 * NEWTON + 1) / (2 * NEWTON + counts.to(torch.float64))
        shrink = (safety * error.double().clamp(min=1e-30) ** (-1 / (order + 1))).clamp(min=SMALLEST, max=1.0)
        bad_last = torch.where(running, failed, bad_last)
        # ---- accepted rows
        S, s = update_matrix(order)
        new = torch.einsum("bij,jbn->ibn", S.to(D.dtype), D) + torch.einsum("bi,bn->ibn", s.to(D.dtype), d)
        keep = (torch.arange(1, MAX_ORDER + 1, device=device) <= order.unsqueeze(-1)).to(real)
        safe_h = torch.where(passed, h, 1.0).to(real)
        differences = torch.cat([new[1 : MAX_ORDER + 1] * keep.t().unsqueeze(-1), d.unsqueeze(0)])
        stages = differences / safe_h.reshape(1, -1, 1)
        stages = torch.where(passed.reshape(1, -1, 1), stages, 0.0)
        stop = None
        if events is not None:
            stop = events.after_step(passed, t, h, end, D[0], new[0], stages.unbind(), accepted_count)
        if sampler.wanted:
            upto = end if stop is None else torch.where(stop.isnan(), end, stop)
            sampler.take(_Attempt(t, upto, h, passed, list(stages.unbind())), D[0], accepted_count)
        if plan.keep_states or plan.keep_stages:
            extra = torch.cat([order.double().unsqueeze(0), T.permute(1, 2, 0).reshape(SIZE * SIZE, rows)])
            kept.append((passed, t, h, segment, lands, y1, stages, extra))
        D = torch.where(passed.reshape(1, -1, 1), new, D)
        T = torch.where(passed.reshape(-1, 1, 1), torch.eye(SIZE, dtype=T.dtype, device=device), T)
        t = torch.where(passed, end, t)
        accepted_count = accepted_count + passed
        landed = passed & lands
        equal = torch.where(passed, equal + 1, equal)
        finished = landed & (segment >= last_segment)
        restart = landed & ~finished
        segment = segment + landed
        running = running & ~finished
        if stop is not None:
            ends = ~stop.isnan()
            t, running = torch.where(ends, stop, t), running & ~ends
            status = torch.where(ends, int(Status.TERMINAL_EVENT), status)
        # ---- the next order and size
        ready = passed & running & (equal > order) & ~restart
        factor = torch.where(failed, 0.5, torch.where(rejected, shrink, 1.0))
        if bool(ready.any()):
            up, best = _next_order(solver, plan, D, order, error, constants, safety, scale)
            order = torch.where(ready, best, order)
            factor = torch.where(ready, up, factor)
        if bool(restart.any()):
            kill = torch.zeros(SIZE, dtype=torch.float64, device=device)
            kill[:2] = 1.0
            mask = torch.where(restart.unsqueeze(-1), kill, 1.0)
            D, T = D * mask.t().unsqueeze(-1).to(D.dtype), mask.unsqueeze(-1) * T
            order, equal = torch.where(restart, 1, order), torch.where(restart, 0, equal)
            factor = torch.where(restart, 0.1, factor)
        changed = (factor != 1.0) & (running | restart)
        if bool(changed.any()):
            change(factor, changed)
            step = torch.where(changed, step * factor, step)
        if watched:
            monitor.advanced(float(((t - anchors[0]).abs() / span).min()))
    last = D[0]
    final = torch.where((status >= 0).unsqueeze(-1), last, float("nan"))
    sampler.finish((status == 0) | ((status > 0) & (t == anchors[-1])), accepted_count, final)
    packed = _pack(kept, t, segment, accepted_count, y0)
    zero = torch.zeros_like(attempts)
    return Record(
        final=final, last=last, scaled_error=scaled, samples=sampler.out, sample_step=sampler.step,
        n_steps=attempts, n_accepted=accepted_count, n_rejected=attempts - accepted_count, n_fun=zero + n_fun, status=status, t_final=t,
        **(no_events(y0) if events is None else events.record()), n_jac=zero, n_factorizations=zero, n_solves=zero, n_newton=zero, **packed,
    )  # fmt: skip


@dataclass(frozen=True)
class _Attempt:
    t: Tensor
    end: Tensor
    h: Tensor
    accepted: Tensor
    stages: list[Tensor]


def _shown(solver: MultistepSolver, error: Tensor) -> Tensor:
    return error if solver.skipped is None else torch.where(solver.skipped, 0.0, error)


def _next_order(
    solver: MultistepSolver, plan: Plan, D: Tensor, order: Tensor, error: Tensor, constants: Tensor, safety: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Factor of the step and order for the rows that may change them: the estimates at the orders around."""
    rows = torch.arange(order.shape[0], device=order.device)

    def level(which: Tensor) -> Tensor:
        estimate = constants[(order + which).clamp(0, MAX_ORDER + 1)].to(D.dtype.to_real()).unsqueeze(-1) * D[order + which + 1, rows]
        return plan.norm(plan.scaled(_shown(solver, estimate), scale).abs()).double()

    below = torch.where(order > 1, level(torch.full_like(order, -1)), float("inf"))
    above = torch.where(order < MAX_ORDER, level(torch.ones_like(order)), float("inf"))
    norms = torch.stack([below, error.double(), above]).clamp(min=1e-30)
    powers = torch.stack([order, order + 1, order + 2]).double()
    factors = norms ** (-1 / powers)
    best = factors.argmax(0)
    factor = (safety * factors.amax(0)).clamp(max=LARGEST, min=SMALLEST)
    # small changes are not worth a new matrix
    factor = torch.where((factor > 0.95) & (factor < 1.2) & (best == 1), 1.0, factor)
    return factor, order + best - 1


def _pack(kept: list[tuple[Tensor, ...]], t: Tensor, segment: Tensor, counts: Tensor, y0: Tensor) -> dict[str, Tensor]:
    """Move the accepted steps of every trajectory to the front, padded with steps of size zero at its end."""
    rows, n = y0.shape
    most = int(counts.max()) if rows and kept else 0
    kind = {"dtype": torch.float64, "device": y0.device}
    E = 1 + SIZE * SIZE
    if not most:
        return {
            "states": y0.unsqueeze(0), "stages": y0.new_empty((0, MAX_ORDER + 1, rows, n)), "t": torch.empty((0, rows), **kind),
            "h": torch.empty((0, rows), **kind), "segment": segment.new_empty((0, rows)),
            "lands": torch.empty((0, rows), dtype=torch.bool, device=y0.device), "extra": torch.empty((0, E, rows), **kind),
        }  # fmt: skip
    accepted = torch.stack([k[0] for k in kept])
    place = torch.where(accepted, accepted.cumsum(0) - 1, most)
    attempt = torch.arange(len(kept), device=y0.device).unsqueeze(-1).expand_as(place)
    index = place.new_full((most + 1, rows), len(kept)).scatter_(0, place, attempt)[:most]

    def pick(values: list[Tensor], behind: Tensor, row_dim: int) -> Tensor:
        every = torch.stack([*values, behind]).movedim(row_dim + 1, 1)
        where = index.reshape(most, rows, *[1] * (every.dim() - 2))
        return every.gather(0, where.expand(most, *every.shape[1:])).movedim(1, row_dim + 1)

    columns = list(zip(*kept, strict=True))
    last = pick(list(columns[5]), torch.zeros_like(y0), 0)
    filled = torch.arange(most, device=y0.device).unsqueeze(-1) < counts
    # behind the last step the state stays
    end = torch.where(counts.unsqueeze(-1) > 0, last.gather(0, (counts - 1).clamp(min=0).reshape(1, -1, 1).expand(1, -1, n))[0], y0)
    states = torch.cat([y0.unsqueeze(0), torch.where(filled.unsqueeze(-1), last, end)])
    identity = torch.cat([torch.ones(1, **kind), torch.eye(SIZE, **kind).reshape(-1)]).unsqueeze(-1).expand(-1, rows)
    return {
        "states": states,
        "stages": pick(list(columns[6]), torch.zeros_like(columns[6][0]), 1),
        "t": pick(list(columns[1]), t, 0),
        "h": pick(list(columns[2]), torch.zeros_like(t), 0),
        "segment": pick(list(columns[3]), torch.zeros_like(segment), 0),
        "lands": pick(list(columns[4]), torch.zeros_like(columns[4][0]), 0),
        "extra": pick(list(columns[7]), identity, 1),
    }
