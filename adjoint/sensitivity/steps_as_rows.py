"""The discrete adjoint of one trajectory by implicit steps, with many steps linearised at once, and the sweep back through them.

On the way back every stage of every step is known. So ``fun`` is run once on all stages of many steps (``torch.vmap``), which gives their
Jacobians together; the adjoint of a step is linear in the cotangent of its end, so the formula of the method (`adjoint_step`), with steps
in the place of trajectories and the unit vectors as cotangents, gives the matrix of each step. What is left for one step after the other
is the product with that matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.variable import Variable

from ..integrate import Monitor, Plan
from ..methods.family import Pullback, StepCotangents, TakenStep, combine, row_dot
from ..system.capture import cut_apart, saved_bytes
from ..system.system import Flat, System, VmappedSystem
from .asked import Asked, Linearizer, Losses, vjp
from .replay import hands_on

__all__ = ["LoneSweep", "Rows", "StepRows", "adjoint_apply", "maps", "most_rows", "rows_of"]

#: what is recorded of ``fun`` at a time, in bytes, with the matrices; unknowns up to which matrices of all steps are made
_BUDGET, _MOST = 8 * 2**20, 64
#: a product with the derivative of a Jacobian records so many times what one evaluation does
_BENT = 6
#: how far ``fun`` on many rows may be from ``fun`` on one of them
_AGREES = 1e-6


def rows_of(f: Flat) -> Flat:
    """``f`` on ``(P,)`` times and ``(P, n)`` states of one trajectory."""
    return torch.vmap(lambda t, y: f(t, y.unsqueeze(0)).squeeze(0), randomness="different")


def most_rows(
    system: System | VmappedSystem, f: Flat, t: Tensor, y: Tensor, inputs: Sequence[Tensor], points: int, bent: int = 0
) -> int | None:
    """How many steps of ``points`` evaluations each are linearised at a time; None if that is not to be done: for too many unknowns, where
    ``f`` cannot be mapped over rows (or has other derivatives then, see `System.asks`), or where too few steps would fit. ``t`` (1,),
    ``y`` (1, n): some point of the solution."""
    n = y.shape[-1]
    if n > _MOST or system.asks:
        return None
    with torch.enable_grad():
        # a copy: a view would count with all that it is a view of
        alone = f(t.clone(), y.detach().clone().requires_grad_(True))
    saved = saved_bytes(alone, inputs)
    if not maps(alone, lambda: rows_of(f)(t.expand(2), y.expand(2, -1))[:1]):
        return None
    each = points * (saved + 3 * n * n * y.element_size()) + bent * _BENT * saved
    count = _BUDGET // max(each, 1)
    return count if count >= 8 else None


def maps(alone: Tensor, mapped: Callable[[], Tensor]) -> bool:
    """Whether a function that was mapped over rows gives what it gives ``alone``, in one of them."""
    try:
        with torch.no_grad():
            found = mapped()
    except Exception:  # a fault of the function shows again in the way that is taken instead
        return False
    return torch.allclose(found, alone, rtol=_AGREES, atol=_AGREES * float(alone.abs().amax()), equal_nan=False)


def _grads(out: Tensor, targets: tuple[Tensor, ...], weights: Tensor) -> Sequence[Tensor | None]:
    """`vjp` that keeps the graph."""
    engine = Variable._execution_engine
    return engine.run_backward((out,), (weights,), True, False, targets, allow_unreachable=True, accumulate_grad=False)


class Rows:
    """``f`` at ``P`` points, recorded, with the adjoints of its Jacobians: ``matrix`` (P, n, n), ``slope`` (P, n) or None."""

    def __init__(self, out: Tensor, y: Tensor, t: Tensor | None) -> None:
        self.out = out
        targets = (y,) if t is None else (y, t)
        columns, slopes = [], []
        for j in range(out.shape[1] if out.requires_grad else 0):
            unit = torch.zeros_like(out)
            unit[:, j] = 1.0
            column, *rest = _grads(out, targets, unit)
            columns.append(torch.zeros_like(y) if column is None else column)
            if t is not None:
                slopes.append(torch.zeros_like(t) if rest[0] is None else rest[0])
        # the j-th column of the adjoint is the pullback of the j-th unit vector
        self.matrix = torch.stack(columns, -1) if columns else y.new_zeros(*y.shape, out.shape[1])
        self.slope = None if t is None else torch.stack(slopes, -1) if slopes else torch.zeros_like(out, requires_grad=False)

    @classmethod
    def at(cls, mapped: Flat, t: Tensor, y: Tensor, time: bool) -> tuple[Rows, Tensor, Tensor]:
        """Of the function of `rows_of`; and the leaves of its graph."""
        with torch.enable_grad():
            leaf, when = y.detach().requires_grad_(True), t.detach().requires_grad_(time)
            out = mapped(when, leaf)
        return cls(out, leaf, when if time else None), when, leaf


def adjoint_apply(matrix: Tensor, v: Tensor) -> Tensor:
    """Products with ``(K, n, n)`` matrices of ``v``, ``(K, n)`` or, in many directions, ``(D, K, n)``."""
    if v.dim() == 3:
        return (matrix @ v.permute(1, 2, 0)).permute(2, 0, 1)
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


class _Solver:
    """Factors of ``(K, n, n)`` matrices for sides as in `adjoint_apply`."""

    def __init__(self, matrix: Tensor) -> None:
        self.lu, self.pivots, self.info = torch.linalg.lu_factor_ex(matrix)

    def __call__(self, v: Tensor) -> Tensor:
        side = v.permute(1, 2, 0) if v.dim() == 3 else v.unsqueeze(-1)
        found = torch.linalg.lu_solve(self.lu, self.pivots, side)
        found = torch.where((self.info != 0)[:, None, None], float("nan"), found)
        return found.permute(2, 0, 1) if v.dim() == 3 else found.squeeze(-1)


class StepRows:
    """`StageLinearize` for ``K`` steps of one trajectory as rows.

    Parameters
    ----------
    mapped : that of `rows_of`
    linearize : has the inputs and takes their cotangents
    times : those of the nodes, ``(K,)`` each
    h : (K, 1); y : (K, n); ks : (K, n) each
    """

    def __init__(
        self, plan: Plan, mapped: Flat, linearize: Linearizer, times: Sequence[Tensor], h: Tensor, y: Tensor, ks: Sequence[Tensor]
    ) -> None:
        self.method: Any = plan.method
        self.linearize, self.times, self.h, self.ks, self.y = linearize, times, h, list(ks), y
        self.time = linearize.time
        tab = self.method.tableau
        same = self.method.same_as
        # a first stage that was handed on is not evaluated
        begin = int(hands_on(plan))
        self.places = [i for i in range(begin, len(ks)) if same is None or same[i] == i]
        own = times[len(times) - len(ks) :]
        points = [combine(y, h, tab.a[i], self.ks) for i in self.places]
        at = [own[i] for i in self.places]
        self.rows, self.when, self.leaf = Rows.at(mapped, torch.cat(at), torch.cat(points), self.time)
        linearize.n_fun += len(self.leaf)
        linearize.check_next = True
        linearize.check(self.rows.out, self.when, self.leaf)
        self.matrices = self.rows.matrix.unflatten(0, (len(self.places), -1))
        self.slopes = None if self.rows.slope is None else self.rows.slope.unflatten(0, (len(self.places), -1))
        #: where a stage is among those that were evaluated, by the identity of its time
        self._place = {id(own[i]): p for p, i in enumerate(self.places)}
        self._solvers: dict[int, _Solver] = {}
        self._taken: list[Tensor | None] | None = None
        self._bent: _Bent | None = None
        self._mapped = mapped

    def take(self) -> None:
        """The next adjoint is the real one: what goes to the inputs is kept for `finish`."""
        self._taken = [None] * len(self.places)

    def finish(self) -> None:
        """Add what the stages give to the cotangents of the inputs."""
        targets = self.linearize.targets
        if not targets or self._taken is None:
            return
        if self.rows.out.requires_grad:
            bars = [torch.zeros_like(self.y) if v is None else v for v in self._taken]
            self.linearize.accumulate(vjp((self.rows.out,), targets, (torch.cat(bars),)))
        if self._bent is not None:
            self._bent.finish(self.linearize)

    def stages(self) -> list[Tensor]:
        """The recorded slopes."""
        return self.ks

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        return y, self._pullback(self._place[id(t)])

    def _pullback(self, place: int) -> Pullback:
        def pullback(v: Tensor) -> tuple[Tensor, Tensor | None]:
            if self._taken is not None:
                known = self._taken[place]
                self._taken[place] = v if known is None else known + v
            time_bar = None if self.slopes is None else row_dot(self.slopes[place], v)
            return adjoint_apply(self.matrices[place], v), time_bar

        return pullback

    def _solver(self, place: int, hd: Tensor) -> _Solver:
        if place not in self._solvers:
            matrix = self.matrices[place]
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
            self._solvers[place] = _Solver(eye - hd.unsqueeze(-1) * matrix)
        return self._solvers[place]

    def solve_adjoint(self, index: int, point: Tensor, w: Tensor) -> Tensor:
        """See `StageLinearize`."""
        return self._solver(self.places.index(index), self.h * self.method.diagonal[index])(w)

    def solve_start(self, t: Tensor, y: Tensor, hd: Tensor | float, w: Tensor) -> Tensor:
        """See `StageLinearize`."""
        return self._solver(0, self.h * self.method.tableau.gamma)(w)

    def coupled_adjoint(
        self, a: Sequence[Sequence[float]], times: Sequence[Tensor], points: Sequence[Tensor], w: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Pullback]]:
        """See `StageLinearize`: ``v_i - h sum_j a_ji J_j* v_j = w_i``."""
        s, n = len(a), self.y.shape[-1]
        if 0 not in self._solvers:
            weights = torch.tensor(a, dtype=self.h.dtype, device=self.h.device).T
            # (K, s, n, s, n) with the block's row i and column j in the places 1 and 3
            coupling = self.matrices.permute(1, 2, 0, 3).unsqueeze(1) * weights[:, None, :, None]
            eye = torch.eye(s * n, dtype=self.y.dtype, device=self.y.device)
            self._solvers[0] = _Solver(eye - self.h.unsqueeze(-1) * coupling.reshape(-1, s * n, s * n))
        v = self._solvers[0](torch.cat(list(w), -1))
        return list(v.unflatten(-1, (s, n)).unbind(-2)), [self._pullback(i) for i in range(s)]

    def mass_adjoint(self, v: Tensor) -> Tensor:
        """See `StageLinearize`: there is no matrix here."""
        return v

    def bend_mass(self, x: Callable[[], Sequence[Tensor]], v: Sequence[Tensor]) -> None:
        """See `StageLinearize`."""

    def bend(
        self, t: Tensor, y: Tensor, k: Sequence[Tensor], d: Sequence[float], v: Sequence[Tensor], scale: float | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `StageLinearize`."""
        if self._bent is None:
            self._bent = _Bent(self._mapped, t, y, k, d, self.time)
            self.linearize.n_fun += len(t)
        assert isinstance(scale, Tensor)
        return self._bent(v, scale, self._taken is not None)


class _Bent:
    """``g_i = f_y k_i + d_i f_t`` at the starts of all steps, recorded, with the adjoints of their Jacobians."""

    def __init__(self, mapped: Flat, t: Tensor, y: Tensor, k: Sequence[Tensor], d: Sequence[float], time: bool) -> None:
        s = self.s = len(k)
        with torch.enable_grad():
            leaf = y.detach().repeat(s, 1).requires_grad_(True)
            when = t.detach().repeat(s).requires_grad_(True)
            out = mapped(when, leaf)
            probe = torch.zeros_like(out, requires_grad=True)
            g = probe.detach()
            if out.requires_grad:
                along = (torch.cat(list(k)), when.new_tensor(d).repeat_interleave(len(t)))
                turned = torch.autograd.grad(out, (leaf, when), probe, create_graph=True, materialize_grads=True)
                total = (turned[0] * along[0]).sum() + (turned[1] * along[1]).sum()
                if total.requires_grad:
                    g = torch.autograd.grad(total, probe, create_graph=True, materialize_grads=True)[0]
        self.value = g.detach().unflatten(0, (s, -1))
        self.rows = Rows(g, leaf, when if time else None)
        self.matrices = self.rows.matrix.unflatten(0, (s, -1))
        self.bars: Tensor | None = None

    def __call__(self, v: Sequence[Tensor], scale: Tensor, taken: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
        y_bar = sum(adjoint_apply(m, x) for m, x in zip(self.matrices, v, strict=True)) * scale
        if taken:
            self.bars = torch.cat([x * scale for x in v])
        if self.rows.slope is None:
            return y_bar, None, None
        slopes = self.rows.slope.unflatten(0, (self.s, -1))
        t_bar = sum(row_dot(m, x) for m, x in zip(slopes, v, strict=True)) * scale.squeeze(-1)
        phi = sum(row_dot(g, x) for g, x in zip(self.value, v, strict=True))
        return y_bar, t_bar, phi  # type: ignore[return-value]

    def finish(self, linearize: Linearizer) -> None:
        """Add the cotangents of the inputs."""
        if self.bars is not None and self.rows.out.requires_grad:
            linearize.accumulate(vjp((self.rows.out,), linearize.targets, (self.bars,)))


def _joined(found: StepCotangents) -> Tensor:
    """Cotangents ``(..., n)`` of the state, or ``(..., 2 n)`` with those of the slope that was handed on."""
    return found.y if found.first is None else torch.cat([found.y, found.first], -1)


def _padded(x: Tensor, n: int) -> Tensor:
    return x if len(x) == n else torch.cat([x, x.new_zeros(n - len(x))])


class LoneSweep:
    """A `Way` for steps of one trajectory by an implicit method, which linearises ``size`` of them at once."""

    def __init__(self, asked: Asked, losses: Losses, f: Flat, linearize: Linearizer, size: int) -> None:
        grid = asked.grid
        self.states, self.stages, self.t, self.h = grid.states.detach().squeeze(1), grid.stages.detach().squeeze(2), grid.t, grid.h
        self.plan, self.linearize, self.mapped, self.size, self._losses = asked.problem.plan, linearize, rows_of(f), size, losses

    @classmethod
    def make(cls, asked: Asked, losses: Losses) -> LoneSweep | None:
        """None where it cannot be done (see `most_rows`), or does not pay."""
        problem, grid, time = asked.problem, asked.grid, asked.moving
        plan, method = problem.plan, problem.plan.method
        watched = type(plan.monitor).adjoint is not Monitor.adjoint
        if watched or method.adjoint_step is None or asked.n_steps <= 4 or asked.times(asked.anchors.detach()).jump_end is not None:
            return None
        bent = method.n_stages if method.needs_time_slope else 0
        if (time or bent) and grid.states.is_complex():
            return None
        inputs = cut_apart(asked.inputs, asked.wants[3:])
        f = problem.system.bind(inputs)
        size = most_rows(problem.system, f, grid.t[0].to(plan.real), grid.states[0].detach(), inputs, method.n_stages, bent)
        return None if size is None else cls(asked, losses, f, Linearizer(f, inputs, asked.wants[3:], time), size)

    def start(self, final_bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Way.start`; what is carried: cotangents ``(n,)`` of the state, and of the last slope by way of the step behind it."""
        bar = torch.zeros_like(self.states[0])
        return bar if final_bar is None else bar + final_bar.squeeze(0), None

    def begin(self, carried: tuple[Tensor, Tensor | None]) -> tuple[Tensor, None]:
        """See `Way.begin`."""
        return carried[0].unsqueeze(0), None

    def back(self, part: range, carried: tuple[Tensor, Tensor | None], t_bars: Tensor, h_bars: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Way.back`."""
        bar, handed = carried
        method: Any = self.plan.method
        rows = slice(part.start, part.stop)
        y, ks = self.states[rows], list(self.stages[rows].unbind(1))
        real = y.dtype.to_real()
        h = self.h[rows].to(real)
        times = (self.t[rows] + self.h[rows] * self.h.new_tensor(method.nodes)).to(real).unbind(1)
        lin = StepRows(self.plan, self.mapped, self.linearize, times, h, y, ks)
        n, chained = y.shape[-1], hands_on(self.plan)
        # of methods that hand their last slope on its cotangent goes along with that of the state
        both = 2 * n if chained else n
        units = torch.eye(both, dtype=y.dtype, device=y.device).unsqueeze(1).expand(-1, len(part), -1)
        last = [*([None] * (len(ks) - 1)), units[..., n:]] if chained else []
        joined = _joined(method.adjoint_step(lin, TakenStep(times, h, y, units[..., :n], last, False)))
        matrices = joined.permute(1, 2, 0).contiguous().unbind()
        k_bar, moved = self._stage_bars(part, y, len(ks)), None
        if k_bar:
            moved = _joined(method.adjoint_step(lin, TakenStep(times, h, y, torch.zeros_like(y), k_bar, False)))
        ends: list[Tensor] = [bar] * len(part)
        if chained:
            bar = torch.cat([bar, torch.zeros_like(bar) if handed is None else handed])
        for k in reversed(part):
            place = k - part.start
            for end in self._losses.at_end(k):
                bar = bar + _padded(end.squeeze(0), both)
            ends[place] = bar
            bar = torch.mv(matrices[place], bar)
            if moved is not None:
                bar = bar + moved[place]
            start = self._losses.at_start(k)
            if start is not None:
                bar = bar + _padded(start.squeeze(0), both)
        lin.take()
        every = torch.stack(ends)
        if chained:
            k_bar = k_bar or [torch.zeros_like(y)] * len(ks)
            k_bar = [*k_bar[:-1], k_bar[-1] + every[:, n:]]
        result = method.adjoint_step(lin, TakenStep(times, h, y, every[:, :n], k_bar, self.linearize.time))
        lin.finish()
        bar, handed = bar[:n], bar[n:] if chained else None
        first = None
        if handed is not None and part.start == 0:
            # the slope that the first step began with was asked for
            u, first = self.linearize(self.t[0].to(self.plan.real), self.states[:1])[1](handed.unsqueeze(0))
            bar = bar + u.squeeze(0)
        if self.linearize.time:
            for total, found in ((t_bars, result.t), (h_bars, result.h)):
                if found is not None:
                    total[rows, 0] += found
            if first is not None:
                t_bars[0] += first
            for k in part:
                self._losses.add_time_bars(k, list(self.stages[k].unsqueeze(1).unbind()), t_bars[k], h_bars[k])
        return bar, handed

    def _stage_bars(self, part: range, y: Tensor, count: int) -> list[Tensor]:
        found = [self._losses.at_stages(k) for k in part]
        if all(x is None for x in found):
            return []
        none = y.new_zeros(count, y.shape[-1])
        return list(torch.stack([none if x is None else x.squeeze(1) for x in found], 1).unbind())
