"""The adjoint of ``y' = f``: ``l' = -f_y* l`` along the solution, and the integral of ``l* f_p``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..integrate import Plan, Record, StageSolver, integrate
from ..linalg import DenseLU, LinearOperator, LinearSolver, Matrix, SparseMatrix
from ..system.jacobians import DenseJacobian
from ..system.system import Flat
from .asked import Linearizer, vjp
from .problem import Problem
from .way_back import Products, Trajectory, carried_step, check_way_back, copies, in_units_of

__all__ = ["OdeBack"]

#: nodes and weights on (0, 1) of Gauss's formula: order 8, above that of any dense output
_GAUSS = [(0.5 * (float(x) + 1), 0.5 * float(w)) for x, w in zip(*np.polynomial.legendre.leggauss(4), strict=True)]
#: Kronrod's extension of Gauss's formula with 7 nodes (Piessens et al. 1983): nodes in (0, 1), weights, weights of Gauss's formula
_KRONROD_X = (0.991455371120812639206854697526329, 0.949107912342758524526189684047851, 0.864864423359769072789712788640926,
              0.741531185599394439863864773280788, 0.586087235467691130294144691693013, 0.405845151377397166906606412076961,
              0.207784955007898467600689403773245, 0.0)  # fmt: skip
_KRONROD_W = (0.022935322010529224963732008058970, 0.063092092629978553290700663189204, 0.104790010322250183839876322541518,
              0.140653259715525918745189590510238, 0.169004726639267902826583426598550, 0.190350578064785409913256402421014,
              0.204432940075298892414161999234649, 0.209482141084727828012999174891714)  # fmt: skip
_KRONROD_G = (0.0, 0.129484966168869693270611432679082, 0.0, 0.279705391489276667901467771423780, 0.0, 0.381830050505118944950369775488975,
              0.0, 0.417959183673469387755102040816327)  # fmt: skip
#: halvings of an interval before its integral is taken as it is
_DEEPEST = 12


class _Rhs:
    """``-f_y* l`` at interpolated states, ``(B, n)``."""

    def __init__(self, f: Flat, trajectory: Trajectory, linearize: Linearizer) -> None:
        self.products = Products(f, trajectory, linearize)
        self.seen: Tensor | None = None

    def __call__(self, t: Tensor, adjoint: Tensor) -> Tensor:
        self.seen = t
        return -self.products(t, adjoint)


class _WithIntegral:
    """The state extended by cotangents of the inputs, for one trajectory: ``(1, n + m)``. ``linearize`` checks what ``f`` depends on."""

    def __init__(self, f: Flat, trajectory: Trajectory, linearize: Linearizer) -> None:
        self.f, self.trajectory, self.linearize, self.targets = f, trajectory, linearize, linearize.targets

    def __call__(self, t: Tensor, state: Tensor) -> Tensor:
        y = self.trajectory.state(t.reshape(1))
        n = y.shape[-1]
        with torch.enable_grad():
            at = y.requires_grad_(True)
            value = self.f(t.reshape(1), at)
        self.linearize.check_often(value, t, at)
        wanted = (at, *self.targets)
        found = vjp((value,), wanted, (state[:, :n],)) if value.requires_grad else (None,) * len(wanted)
        parts = [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]
        return -torch.cat([g.reshape(1, -1).to(state.dtype) for g in parts], -1)


class OdeBack:
    """See `WayBack`. ``integral``: "state", "gauss" or "kronrod".

    By implicit methods the first two are the formula of the method on its own stages. Their dense output weighs slopes, which in the layer
    behind a loss, where what is fast dies away within a step, are large beside what the adjoint is: it is far off there.
    """

    def __init__(
        self, problem: Problem, plan: Plan, f: Flat, trajectory: Trajectory, linearize: Linearizer, end: Tensor, integral: str
    ) -> None:
        self.problem, self.plan, self.f, self.trajectory, self.linearize = problem, plan, f, trajectory, linearize
        self.t = end.clone()
        self.adjoint = trajectory.states.new_zeros(len(end), trajectory.states.shape[-1])
        self.n_steps = 0
        self._first_step: Tensor | None = None
        alone = self.adjoint.shape[0] == 1 and not plan.method.implicit
        if integral != "kronrod" and not (integral == "state" and alone):
            integral = "stages" if plan.method.implicit else "gauss"
        self.integral = integral

    def copied(self, size: int, t: Tensor) -> OdeBack:
        """See `WayBack.copied`."""
        problem, f, trajectory, linearize = copies(self.problem, self.trajectory, self.linearize, size)
        return OdeBack(problem, self.plan, f, trajectory, linearize, t, self.integral)

    def boundary(self) -> tuple[Tensor, Tensor]:
        """See `WayBack.boundary`."""
        return self.adjoint, self._fun(self.trajectory.state(self.t))

    def _fun(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.f(self.t.to(y.dtype.to_real()), y)

    def _slope(self) -> Tensor:
        """Of the solution at the present time. ``f`` magnifies the error of a state by its Jacobian, which has no bound where the solve was
        by an implicit method: the slope of the dense output is that of `DiscreteAdjoint` too. Of others ``f`` is the better one."""
        y, slope = self.trajectory(self.t)
        return slope if self.trajectory.plan.method.implicit else self._fun(y)

    def jump(self, bar: Tensor) -> Tensor:
        """See `WayBack.jump`."""
        self.adjoint = self.adjoint + bar
        return self._slope()

    def restart(self, t: Tensor, adjoint: Tensor) -> None:
        """See `WayBack.restart`."""
        self.t, self.adjoint = t.clone(), adjoint

    def lose(self, rows: Tensor) -> None:
        """See `WayBack.lose`."""
        y = self.trajectory.state(self.t)
        _, pull = self.linearize(self.t.to(y.dtype.to_real()), y)
        pull(torch.where(rows.unsqueeze(-1), float("nan"), torch.zeros_like(y)))
        self.adjoint = torch.where(rows.unsqueeze(-1), float("nan"), self.adjoint)

    def to(self, t: Tensor) -> None:
        """See `WayBack.to`."""
        if bool((t == self.t).all()):
            return
        if bool((self.adjoint != 0).any()):
            with torch.no_grad():
                self._integrate(t)
        self.t = t.clone()

    def _integrate(self, t: Tensor) -> None:
        problem, plan = self.problem, replace(in_units_of(self.plan, self.adjoint, self.trajectory.copies), first_step=self._first_step)
        anchors, rows = torch.stack([self.t, t]), self.adjoint.shape[0]
        targets = self.linearize.targets
        if self.integral == "state" and targets:
            with_integral = _WithIntegral(self.f, self.trajectory, self.linearize)
            sizes = [x.numel() for x in targets]
            start = torch.cat([self.adjoint, self.adjoint.new_zeros(1, sum(sizes))], -1)
            record = integrate(with_integral, plan, anchors, None, start, False)
            check_way_back(record, plan, problem, len(self.trajectory.starts))
            self.adjoint, *found = record.final.split([self.adjoint.shape[-1], *sizes], -1)
            self.linearize.accumulate([g.reshape(x.shape).to(x.dtype) for g, x in zip(found, targets, strict=True)])
        else:
            rhs = _Rhs(self.f, self.trajectory, self.linearize)
            solver: Callable[..., Tensor] = rhs
            if plan.method.implicit:
                solver = StageSolver(rhs, plan, self._matrix_of(rhs), self._linear_solver(), rows, self.adjoint.device)
            record = integrate(solver, plan, anchors, None, self.adjoint, True)
            check_way_back(record, plan, problem, len(self.trajectory.starts))
            if targets:
                self._accumulate(record, plan)
            self.adjoint = record.final
        self._first_step = carried_step(record, plan)
        self.n_steps += int(record.n_accepted.max())
        self.linearize.n_fun += int(record.n_fun.max())

    def _linear_solver(self) -> LinearSolver:
        return self.problem.algebra.linear_solver if self.problem.algebra is not None else DenseLU()

    def _matrix_of(self, rhs: _Rhs) -> Callable[..., Matrix]:
        """The Jacobian ``-f_y*`` of the adjoint equation; its time is that of a call of ``r``."""
        jacobian = self.problem.algebra.jacobian if self.problem.algebra is not None else DenseJacobian()

        def matrix(r: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
            r(x)
            t = rhs.seen
            assert t is not None
            found = jacobian(lambda y: self.f(t, y), self.trajectory.state(t))
            return _minus_transposed(found)

        return matrix

    def _adjoint_at(self, record: Record, k: int, theta: float, plan: Plan) -> Tensor:
        """The dense output of the adjoint in step ``k``."""
        h = record.h[k]
        weights = plan.method.dense_weights(torch.full_like(h, theta)) * h.unsqueeze(-1)
        return record.states[k] + torch.einsum("bs,sbn->bn", weights.to(record.states.dtype), record.stages[k])

    def _pull(self, record: Record, k: int, theta: float, weight: float, plan: Plan) -> None:
        """Add ``-weight h l* f_p`` at a point of step ``k``; back in time ``h`` carries the sign."""
        h = record.h[k]
        time = record.t[k] + theta * h
        y = self.trajectory.state(time)
        adjoint = self._adjoint_at(record, k, theta, plan) * (-weight * h).to(y.dtype).unsqueeze(-1)
        _, pull = self.linearize(time.to(y.dtype.to_real()), y)
        pull(adjoint)

    def _accumulate(self, record: Record, plan: Plan) -> None:
        for k in range(record.h.shape[0]):
            if self.integral == "kronrod":
                self._adaptive(record, k, plan)
            elif self.integral == "stages":
                self._by_stages(record, k, plan)
            else:
                for theta, weight in _GAUSS:
                    self._pull(record, k, theta, weight, plan)

    def _by_stages(self, record: Record, k: int, plan: Plan) -> None:
        """Add ``-h l* f_p`` on step ``k``, by the formula of the method on its own stages."""
        tableau: Any = plan.method.tableau  # type: ignore[attr-defined]
        h, start, slopes = record.h[k], record.states[k], record.stages[k]
        column = h.to(start.dtype).unsqueeze(-1)
        for c, b, row in zip(tableau.c, tableau.b, tableau.a, strict=True):
            if b:
                time = record.t[k] + c * h
                y = self.trajectory.state(time)
                adjoint = start + column * torch.einsum("s,sbn->bn", start.new_tensor(row), slopes[: len(row)])
                _, pull = self.linearize(time.to(y.dtype.to_real()), y)
                pull(-b * column * adjoint)

    def _adaptive(self, record: Record, k: int, plan: Plan) -> None:
        """Gauss-Kronrod on step ``k``, halved until both formulas agree."""
        # of several losses the sum counts, and so the largest
        atol = float(torch.as_tensor(plan.atol).amax())
        todo = [(0.0, 1.0, 0)]
        while todo:
            low, high, depth = todo.pop()
            fine, coarse = self._kronrod(record, k, low, high, plan)
            error = torch.stack([torch.linalg.vector_norm(a - b) for a, b in zip(fine, coarse, strict=True)]).amax()
            size = torch.stack([torch.linalg.vector_norm(a) for a in (*fine, *(b for b in self.linearize.bars if b is not None))]).amax()
            allowed = plan.rtol * size + atol * (high - low)
            if depth < _DEEPEST and bool(error > allowed):
                middle = 0.5 * (low + high)
                todo += [(low, middle, depth + 1), (middle, high, depth + 1)]
            else:
                self.linearize.accumulate(fine)

    def _kronrod(self, record: Record, k: int, low: float, high: float, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
        probe = self.linearize.anew(self.f)
        fine = [torch.zeros_like(x) for x in probe.targets]
        coarse = [torch.zeros_like(x) for x in probe.targets]
        half = 0.5 * (high - low)
        h = record.h[k]
        for x, w, g in zip(_KRONROD_X, _KRONROD_W, _KRONROD_G, strict=True):
            for side in (1.0, -1.0) if x else (1.0,):
                theta = low + half * (1 + side * x)
                time = record.t[k] + theta * h
                y = self.trajectory.state(time)
                with torch.enable_grad():
                    value = self.f(time.to(y.dtype.to_real()), y)
                adjoint = self._adjoint_at(record, k, theta, plan) * (-half * h).to(y.dtype).unsqueeze(-1)
                self.linearize.n_fun += 1
                found = vjp((value,), probe.targets, (adjoint,)) if value.requires_grad else (None,) * len(fine)
                for i, part in enumerate(found):
                    if part is not None:
                        fine[i] += w * part
                        coarse[i] += g * part
        return fine, coarse


def _minus_transposed(matrix: Matrix) -> Matrix:
    if isinstance(matrix, Tensor):
        return -matrix.mH
    if isinstance(matrix, SparseMatrix):
        rows, columns = matrix.indices
        order = (columns * matrix.shape[0] + rows).argsort()
        return SparseMatrix(torch.stack([columns, rows])[:, order], -matrix.values.conj()[..., order], matrix.shape)
    product, transposed = matrix.matvec, matrix.rmatvec
    assert transposed is not None
    return LinearOperator(matrix.n, matrix.rows, matrix.dtype, matrix.device, lambda v: -transposed(v), lambda v: -product(v))
