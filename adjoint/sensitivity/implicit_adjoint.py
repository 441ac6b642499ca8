"""The continuous adjoint of implicit equations ``F(t, y, y') = 0``: the augmented system of Cao, Li, Petzold & Serban (2003).

Of index 1 and 2 (Hessenberg).

With ``E = F_y'`` and ``G = F_y`` along the solution, ``lb = E* l`` obeys ``lb' - G* l = 0``, ``lb - E* l = 0``: no derivative of ``E`` in
time is asked for, and the system is as stable as the equations themselves. It is solved backwards by a method for implicit equations,
with its own steps; ``dG/dp`` is the integral of ``-l* F_p`` by the quadrature formula of these steps. Where the loss looks at the
solution, ``l`` jumps (docs/theory.md, section 2): values of algebraic variables are functions of the differential ones there, which
carry their part of the cotangent over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..capture import cut_apart, functorch_active
from ..errors import UnsupportedCombination
from ..integrate import Plan, ResidualSolver, Status, integrate
from ..integrate.pencil import Pencil, scaled_factors, split
from ..linalg import LinearSolver, Log, Matrix, SparseMatrix
from ..structure import Structure, analyse
from ..system import Flat
from .consistent import completion
from .linearize import Linearizer, vjp
from .node import SolveNode, unpack
from .problem import Problem

__all__ = ["ImplicitAdjointNode", "Trajectory", "implicit_adjoint"]


class Trajectory:
    """The dense output of a record as a function of ``(B,)`` times: ``y`` and ``y'``."""

    def __init__(self, plan: Plan, grid: dict[str, Tensor], sign: Tensor) -> None:
        self.plan, self.sign = plan, sign
        self.t, self.h, self.states, self.stages = grid["t"], grid["h"], grid["states"].detach(), grid["stages"].detach()
        # starts of steps, increasing in every row; padding lies at the end of the span
        self.starts = (self.t * sign).t().contiguous()

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


@dataclass(frozen=True, eq=False)
class _Point:
    """The equations at a point of the solution."""

    t: Tensor
    y: Tensor
    yp: Tensor
    pencil: Pencil


class _Adjoint:
    """``lb' - G* l`` and ``lb - E* l`` as a flat residual of ``z = (lb, l)``, with its matrices."""

    def __init__(self, f: Flat, jacobian: Callable[..., Matrix], trajectory: Trajectory) -> None:
        self.f, self.jacobian, self.trajectory = f, jacobian, trajectory
        self._indices: tuple[Tensor, Tensor] | None = None

    def at(self, t: Tensor) -> _Point:
        """The matrices at ``t`` (B,)."""
        y, yp = self.trajectory(t)
        time = t.to(y.dtype.to_real())
        with torch.no_grad():
            found = self.jacobian(lambda pair: self.f(time, pair), torch.cat([y, yp], -1))
        return _Point(time, y, yp, split(found))

    def __call__(self, t: Tensor, pair: Tensor) -> Tensor:
        """The residual for ``z`` and ``z'`` side by side, ``(B, 4 n) -> (B, 2 n)``."""
        n = pair.shape[-1] // 4
        lb, adjoint, rate = pair[:, :n], pair[:, n : 2 * n], pair[:, 2 * n : 3 * n]
        y, yp = self.trajectory(t)
        with torch.enable_grad():
            at = torch.cat([y, yp], -1).requires_grad_(True)
            value = self.f(t, at)
        (products,) = vjp((value,), (at,), (adjoint,)) if value.requires_grad else (None,)
        if products is None:
            products = torch.zeros_like(at)
        return torch.cat([rate - products[:, :n], lb - products[:, n:]], -1)

    def pencil(self, t: Tensor) -> Pencil:
        """``dr/dz'`` and ``dr/dz``."""
        point = self.at(t)
        E, G = point.pencil.E, point.pencil.G
        if isinstance(E, Tensor) and isinstance(G, Tensor):
            eye = torch.eye(E.shape[-1], dtype=E.dtype, device=E.device).expand_as(E)
            none = torch.zeros_like(E)
            rates = torch.cat([torch.cat([eye, none], -1), torch.cat([none, none], -1)], -2)
            values = torch.cat([torch.cat([none, -G.mH], -1), torch.cat([eye, -E.mH], -1)], -2)
            return Pencil(rates, values)
        assert isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix)
        return self._sparse(E, G)

    def _sparse(self, E: SparseMatrix, G: SparseMatrix) -> Pencil:
        n = E.shape[0]
        columns, rows = E.indices
        own = torch.arange(n, device=rows.device)
        if self._indices is None or self._indices[0].shape[1] != 2 * n + 2 * rows.shape[0]:
            blocks = [(own, own), (rows, n + columns), (n + own, own), (n + rows, n + columns)]
            indices = torch.stack([torch.cat(part) for part in zip(*blocks, strict=True)])
            order = (indices[0] * (2 * n) + indices[1]).argsort()
            self._indices = (indices[:, order], order)
        indices, order = self._indices
        values = E.values if E.values.dim() == 2 else E.values.unsqueeze(0)
        one, zero, nothing = values.new_ones(values.shape[0], n), values.new_zeros(values.shape[0], n), torch.zeros_like(values)
        rates = torch.cat([one, nothing, zero, nothing], -1)[:, order]
        state = torch.cat([zero, -G.values.conj().expand_as(values), one, -E.values.conj().expand_as(values)], -1)[:, order]
        return Pencil(SparseMatrix(indices, rates, (2 * n, 2 * n)), SparseMatrix(indices, state, (2 * n, 2 * n)))


class _AdjointSolver(ResidualSolver):
    """A `ResidualSolver` that is told the matrices."""

    def __init__(
        self, equations: _Adjoint, plan: Plan, linear_solver: LinearSolver, rows: int, device: torch.device, open_rows: Tensor | None
    ) -> None:
        index = skipped = None
        if open_rows is not None:
            # multipliers of constraints on differential variables: of index 2 here too, and what they are at the start nobody asks
            skipped = torch.cat([torch.zeros_like(open_rows), open_rows])
            index = skipped.to(torch.int64) * 2
        super().__init__(equations, plan, lambda r, x: x, linear_solver, rows, device, index, skipped)
        self.equations = equations

    def _take(self, t: Tensor, y: Tensor, slope: Tensor) -> Pencil:
        return self.equations.pencil(t)


def implicit_adjoint(
    problem: Problem,
    plan: Plan,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples, states, stages)``.

    ``plan``: method and tolerances of the way back. Raises `UnsupportedCombination` where something else than ``final`` and ``samples`` has
    a cotangent, and for interior anchors and complex states.
    """
    final_bar, samples_bar, states_bar, stages_bar = bars
    if any(bar is not None and bool((bar != 0).any()) for bar in (states_bar, stages_bar)):
        raise UnsupportedCombination(
            "the continuous adjoint of implicit equations takes losses on y at the end or at t_eval; for losses on yp, sol(t) or "
            "t_eval='steps' use gradient=DiscreteAdjoint()"
        )
    if anchors.shape[0] > 2:
        raise UnsupportedCombination("step_ts= with the continuous adjoint is not supported: use gradient=DiscreteAdjoint()")
    if grid["states"].is_complex():
        raise UnsupportedCombination("the continuous adjoint of implicit equations is for real states: use gradient=DiscreteAdjoint()")
    assert problem.algebra is not None
    anchors, sign = anchors.detach(), torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).detach()
    f = problem.system.bind(inputs)
    ok = (grid["status"] >= 0).unsqueeze(-1)
    equations = _Adjoint(f, problem.algebra.jacobian, Trajectory(problem.plan, grid, sign))
    back = _Back(problem, plan, equations, Linearizer(f, inputs, wants[3:], False), anchors[-1])
    t_eval_bar = None if t_eval is None else torch.zeros_like(t_eval)
    end_bar = torch.zeros_like(anchors[0])
    if final_bar is not None:
        bar = torch.where(ok, final_bar, 0.0)
        end_bar = (bar * back.jump(bar)).sum(-1).double()
    if samples_bar is not None and t_eval is not None and t_eval_bar is not None:
        times = t_eval.detach()
        order = (times * sign).argsort(0, descending=True)
        for place in order.unbind():
            index = place.unsqueeze(0)
            back.to(times.gather(0, index)[0])
            bar = samples_bar.gather(0, index.unsqueeze(-1).expand(1, *samples_bar.shape[1:]))[0]
            bar = torch.where(ok & torch.isfinite(bar), bar, 0.0)
            if not bool(bar.any()):
                continue
            slope = (bar * back.jump(bar)).sum(-1).double()
            t_eval_bar.scatter_(0, index, slope.unsqueeze(0))
    back.to(anchors[0])
    y0_bar, start = back.boundary()
    anchors_bar = torch.stack([-(y0_bar * start).sum(-1).double(), end_bar])
    problem.backward_report(back.linearize.n_fun, back.n_steps)
    return (
        anchors_bar if wants[0] else None,
        t_eval_bar if wants[1] else None,
        y0_bar if wants[2] else None,
        *back.linearize.bars,
    )


class _Back:
    """The way back: where it is, the adjoint there, and the parameters' cotangents so far (in ``linearize``)."""

    def __init__(self, problem: Problem, plan: Plan, equations: _Adjoint, linearize: Linearizer, end: Tensor) -> None:
        self.problem, self.plan, self.equations, self.linearize = problem, plan, equations, linearize
        self.t = end.clone()
        self.point = equations.at(self.t)
        self.adjoint = torch.zeros_like(self.point.y)
        self.n_steps = 0

    def boundary(self) -> tuple[Tensor, Tensor]:
        """``E* l`` and ``y'`` at the present time."""
        E = self.point.pencil.E
        if isinstance(E, SparseMatrix):
            return E.matvec(self.adjoint, transposed=True, conjugated=True), self.point.yp
        assert isinstance(E, Tensor)
        return (E.mH @ self.adjoint.unsqueeze(-1)).squeeze(-1), self.point.yp

    def to(self, t: Tensor) -> None:
        """Integrate the adjoint from the present time to ``t`` (B,)."""
        if bool((t == self.t).all()):
            return
        if bool(self.adjoint.any()):
            self._integrate(t)
        self.t, self.point = t.clone(), self.equations.at(t)

    def _integrate(self, t: Tensor) -> None:
        algebra = self.problem.algebra
        assert algebra is not None
        rows, n = self.adjoint.shape
        scale = self.adjoint.abs().amax().clamp(min=1e-300)
        plan = self.plan
        # the adjoint has the units of the loss: its tolerance is told in those
        plan = replace(plan, atol=plan.atol * float(scale) if isinstance(plan.atol, float) else plan.atol)
        structure = algebra.structure
        open_rows = structure.suspects if structure is not None and structure.index > 1 else None
        solver = _AdjointSolver(self.equations, plan, algebra.linear_solver, rows, self.adjoint.device, open_rows)
        start = torch.cat([self.boundary()[0], self.adjoint], -1)
        with torch.no_grad():
            record = integrate(solver, plan, torch.stack([self.t, t]), None, start, True)
        bad = record.status < 0
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            self.problem.report(replace(record, status=torch.where(bad, int(Status.STEP_TOO_SMALL), record.status)))
            raise RuntimeError(f"the adjoint of trajectory {row} could not be solved backwards from t = {float(self.t[row]):.6g}")
        self.n_steps += int(record.n_accepted.max())
        self._accumulate(record.t, record.h, record.states, record.stages, n)
        self.adjoint = record.final[:, n:]

    def _accumulate(self, t: Tensor, h: Tensor, states: Tensor, stages: Tensor, n: int) -> None:
        """Add the integral of ``-l* F_p`` over the steps, by the formula of the method on its own stages."""
        if not self.linearize.targets:
            return
        tableau = self.plan.method.tableau  # type: ignore[attr-defined]
        trajectory = self.equations.trajectory
        for k in range(t.shape[0]):
            step = h[k].to(states.dtype).unsqueeze(-1)
            for c, b, row in zip(tableau.c, tableau.b, tableau.a, strict=True):
                slope = torch.einsum("s,sbn->bn", states.new_tensor(row), stages[k])
                adjoint = (states[k] + step * slope)[:, n:]
                time = t[k] + c * h[k]
                y, yp = trajectory(time)
                _, pull = self.linearize(time.to(y.dtype), torch.cat([y, yp], -1))
                # back in time: the sizes of these steps carry the sign
                pull(b * step * adjoint)

    def jump(self, bar: Tensor) -> Tensor:
        """Take in a cotangent of the solution at the present time; the slope there."""
        point, problem = self.point, self.problem
        structure = problem.algebra.structure if problem.algebra is not None else None
        if structure is not None and structure.plain:
            self._plain_jump(bar, structure)
        else:
            self._general_jump(bar)
        return point.yp

    def _plain_jump(self, bar: Tensor, structure: Structure) -> None:
        """Of index 1 with differential and algebraic variables: ``M* nu = (0; psi_a*)``, ``M* mu = (psi_d* - F_yd* nu; 0)``."""
        algebra = self.problem.algebra
        assert algebra is not None
        order, rank, point = structure.order, structure.rank, self.point
        matrix = structure.chosen(point.pencil.E, point.pencil.G)
        factors = scaled_factors(algebra.linear_solver, matrix, Log())
        own = bar[:, order]
        if rank < own.shape[-1] and bool(own[:, rank:].any()):
            nu = factors.solve_adjoint(torch.cat([torch.zeros_like(own[:, :rank]), own[:, rank:]], -1))
            _, pull = self.linearize(point.t, torch.cat([point.y, point.yp], -1))
            moved, _ = pull(-nu)
            own = own + moved[:, : bar.shape[-1]][:, order]
        kept = torch.cat([own[:, :rank], torch.zeros_like(own[:, rank:])], -1)
        self.adjoint = self.adjoint + factors.solve_adjoint(kept)

    def _general_jump(self, bar: Tensor) -> None:
        """Through the equations that determine algebraic variables, and for index 2 along the constraints on differential ones."""
        point, linearize = self.point, self.linearize
        E, G = point.pencil.E, point.pencil.G
        if isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix):
            E, G = E.dense(), G.dense()
        assert isinstance(E, Tensor) and isinstance(G, Tensor)
        structure = analyse(E, G)
        n, rank, count = E.shape[-1], structure.rank, structure.hidden.shape[-1]
        with torch.enable_grad():
            y = point.y.detach().requires_grad_(True)
            whole = completion(self.problem, structure, point.t, y, point.yp, linearize.inputs)
        y_bar, *rest = vjp((whole,), (y, *linearize.targets), (bar,))
        linearize.accumulate(rest)
        eta = torch.zeros_like(bar) if y_bar is None else y_bar
        known, free = structure.basis[..., :rank], structure.basis[..., rank:]
        raw = structure.row_scale.unsqueeze(-1) * structure.hidden
        constraint = raw.mH @ G
        across = torch.cat([(constraint @ known).mH, E.new_zeros(E.shape[0], n - rank, count)], -2)
        top = torch.cat([torch.cat([E @ known, G @ free], -1).mH, across], -1)
        bottom = torch.cat([raw.mH, E.new_zeros(E.shape[0], count, count)], -1)
        side = torch.cat([(known.mH @ eta.unsqueeze(-1)).squeeze(-1), eta.new_zeros(eta.shape[0], n - rank + count)], -1)
        found = torch.linalg.solve(torch.cat([top, bottom], -2), side)
        self.adjoint = self.adjoint + found[:, :n]
        if count:
            # what of the cotangent lies across the constraints is theirs
            _, pull = linearize(point.t, torch.cat([point.y, point.yp], -1))
            pull(-(raw @ found[:, n:].unsqueeze(-1)).squeeze(-1))


class ImplicitAdjointNode(torch.autograd.Function):
    """``apply(problem, plan, anchors, t_eval, y0, *inputs)``: as `SolveNode`, with `implicit_adjoint` as its way back."""

    @staticmethod
    def forward(problem: Problem, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return SolveNode.forward(problem, anchors, t_eval, y0, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, ctx.plan, *rest = inputs
        SolveNode.setup_context(ctx, (problem, *rest), output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or functorch_active():
            raise UnsupportedCombination(
                "the continuous adjoint of implicit equations has first derivatives by backward() only: for create_graph=True and "
                "torch.func transforms use gradient=DiscreteAdjoint()"
            )
        grid, anchors, t_eval, inputs = unpack(ctx)
        inputs = cut_apart(ctx.problem.system.inputs if ctx.own else inputs)
        return (
            None,
            None,
            *implicit_adjoint(ctx.problem, ctx.plan, grid, anchors, t_eval, inputs, cotangents[:4], ctx.needs_input_grad[2:]),
        )
