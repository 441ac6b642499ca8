"""The adjoint of ``y' = f``: ``l' = -f_y* l`` along the solution, and the integral of ``l* f_p``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..integrate import Plan, Record, StageSolver, integrate
from ..integrate.newton import shifted
from ..linalg import DenseLU, LinearOperator, LinearSolver, Log, Matrix, SparseMatrix
from ..system.jacobians import DenseJacobian, JacobianStrategy
from ..system.system import Flat
from .asked import Linearizer, vjp
from .problem import Problem
from .way_back import Products, Trajectory, along_step, carried_step, check_way_back, copies, dense_state, in_units_of

__all__ = ["OdeBack"]

#: Kronrod's extension of Gauss's formula with 3 nodes (Piessens et al. 1983): nodes in [0, 1), weights, weights of Gauss's formula
_KRONROD_X = (0.960491268708020283423507092629080, 0.774596669241483377035853079956480, 0.434243749346802558002071502844628, 0.0)
_KRONROD_W = (0.104656226026467265193823857192073, 0.268488089868333440728569280666710, 0.401397414775962222905051818618432,
              0.450916538658474142345110087045571)  # fmt: skip
_KRONROD_G = (0.0, 5 / 9, 0.0, 8 / 9)
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


class OdeBack:
    """See `WayBack`. ``adaptive``: the integral is made to the tolerance."""

    def __init__(
        self, problem: Problem, plan: Plan, f: Flat, trajectory: Trajectory, linearize: Linearizer, end: Tensor, adaptive: bool
    ) -> None:
        self.problem, self.plan, self.f, self.trajectory, self.linearize = problem, plan, f, trajectory, linearize
        self.t = end.clone()
        self.adjoint = trajectory.states.new_zeros(len(end), trajectory.states.shape[-1])
        self.n_steps = 0
        self._first_step: Tensor | None = None
        self.adaptive = adaptive

    def copied(self, size: int, t: Tensor) -> OdeBack:
        """See `WayBack.copied`."""
        problem, f, trajectory, linearize = copies(self.problem, self.trajectory, self.linearize, size)
        return OdeBack(problem, self.plan, f, trajectory, linearize, t, self.adaptive)

    def boundary(self) -> tuple[Tensor, Tensor]:
        """See `WayBack.boundary`."""
        return self.adjoint, self._fun(self.trajectory.state(self.t))

    def _fun(self, y: Tensor) -> Tensor:
        with torch.no_grad():
            return self.f(self.t.to(y.dtype.to_real()), y)

    def jump(self, bar: Tensor) -> None:
        """See `WayBack.jump`."""
        self.adjoint = self.adjoint + bar

    def slope(self) -> Tensor:
        """See `WayBack.slope`.

        ``f`` magnifies the error of a state by its Jacobian, which has no bound where the solve was by an implicit method. The slope of the
        dense output ``s`` does not, but is less exact where nothing is stiff: ``s + (I - h J / 10)^-1 (f - s)`` is like the better one.
        """
        trajectory, t = self.trajectory, self.t
        y, own = trajectory(t)
        value = self._fun(y)
        if not trajectory.plan.method.implicit:
            return value
        time = t.to(y.dtype.to_real())
        with torch.no_grad():
            matrix = self._jacobian()(lambda x: self.f(time, x), y)
            part = (0.1 * trajectory.size(t)).to(time.dtype).unsqueeze(-1)
            return own + self._linear_solver().factor(shifted(matrix, part), Log()).solve(value - own)

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
        rhs = _Rhs(self.f, self.trajectory, self.linearize)
        solver: Callable[..., Tensor] = rhs
        if plan.method.implicit:
            solver = StageSolver(rhs, plan, self._matrix_of(rhs), self._linear_solver(), rows, self.adjoint.device)
        record = integrate(solver, plan, anchors, None, self.adjoint, True)
        check_way_back(record, plan, problem, len(self.trajectory.starts))
        if self.linearize.targets:
            self._accumulate(record, plan)
        self.adjoint = record.final
        self._first_step = carried_step(record, plan)
        self.n_steps += int(record.n_accepted.max())
        self.linearize.n_fun += int(record.n_fun.max())

    def _linear_solver(self) -> LinearSolver:
        return self.problem.algebra.linear_solver if self.problem.algebra is not None else DenseLU()

    def _jacobian(self) -> JacobianStrategy:
        return self.problem.algebra.jacobian if self.problem.algebra is not None else DenseJacobian()

    def _matrix_of(self, rhs: _Rhs) -> JacobianStrategy:
        """The Jacobian ``-f_y*`` of the adjoint equation; its time is that of a call of ``r``."""
        jacobian = self._jacobian()

        def matrix(r: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
            r(x)
            t = rhs.seen
            assert t is not None
            found = jacobian(lambda y: self.f(t, y), self.trajectory.state(t))
            return _minus_transposed(found)

        return matrix

    def _accumulate(self, record: Record, plan: Plan) -> None:
        """Add the integral of ``l* f_p`` over the steps."""

        def add(time: Tensor, adjoint: Tensor, weight: Tensor) -> None:
            y = self.trajectory.state(time)
            _, pull = self.linearize(time.to(y.dtype.to_real()), y)
            # back in time the sizes of steps carry the sign
            pull(-weight * adjoint)

        for k in range(record.h.shape[0]):
            if self.adaptive:
                self._adaptive(record, k, plan)
            else:
                along_step(self.trajectory, record, k, plan.method, add)

    def _adaptive(self, record: Record, k: int, plan: Plan) -> None:
        """Gauss-Kronrod on step ``k``, halved until both formulas agree."""
        # of several losses the sum counts, and so the largest
        atol = float(torch.as_tensor(plan.atol).amax())
        todo = [(high, low, 0) for low, high in self.trajectory.parts(record.t[k], record.h[k])]
        while todo:
            low, high, depth = todo.pop()
            fine, coarse = self._kronrod(record, k, low, high, plan)
            error = torch.stack([torch.linalg.vector_norm(a - b) for a, b in zip(fine, coarse, strict=True)]).amax()
            size = torch.stack([torch.linalg.vector_norm(a) for a in (*fine, *(b for b in self.linearize.bars if b is not None))]).amax()
            allowed = plan.rtol * size + atol * float((high - low).amax())
            if depth < _DEEPEST and bool(error > allowed):
                middle = 0.5 * (low + high)
                todo += [(low, middle, depth + 1), (middle, high, depth + 1)]
            else:
                self.linearize.accumulate(fine)

    def _kronrod(self, record: Record, k: int, low: Tensor, high: Tensor, plan: Plan) -> tuple[list[Tensor], list[Tensor]]:
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
                adjoint = dense_state(record, k, theta, plan.method) * (-half * h).to(y.dtype).unsqueeze(-1)
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
