"""The continuous adjoint of implicit equations ``F(t, y, y') = 0``: the augmented system of Cao, Li, Petzold & Serban (2003).

Of index 1 and 2 (Hessenberg).

With ``E = F_y'`` and ``G = F_y`` along the solution, ``lb = E* l`` obeys ``lb' - G* l = 0``, ``lb - E* l = 0``: no derivative of ``E`` in
time is asked for, and the system is as stable as the equations themselves. It is solved backwards by a method for implicit equations,
with its own steps; ``dG/dp`` is the integral of ``-l* F_p`` by Gauss's formula. Where the loss looks at the
solution, ``l`` jumps (docs/theory.md, section 2): values of algebraic variables are functions of the differential ones there, which
carry their part of the cotangent over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..integrate import Plan, Record, ResidualSolver, integrate
from ..linalg import LinearSolver, Log, SparseMatrix
from ..linalg.pencil import Pencil, scaled_factors, split
from ..system.jacobians import JacobianStrategy
from ..system.structure import Structure, analyse
from ..system.system import Flat
from .asked import Linearizer, vjp
from .consistent import completion
from .problem import Problem
from .way_back import Products, Trajectory, along_step, check_way_back, copies, in_units_of

__all__ = ["ImplicitBack"]


@dataclass(frozen=True, eq=False)
class _Point:
    """The equations at a point of the solution."""

    t: Tensor
    y: Tensor
    yp: Tensor
    pencil: Pencil


class _Adjoint:
    """``lb' - G* l`` and ``lb - E* l`` as a flat residual of ``z = (lb, l)``, with its matrices."""

    def __init__(self, f: Flat, jacobian: JacobianStrategy, trajectory: Trajectory, linearize: Linearizer) -> None:
        self.f, self.jacobian, self.trajectory = f, jacobian, trajectory
        self.products = Products(f, trajectory, linearize, slopes=True)
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
        products = self.products(t, adjoint)
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


class ImplicitBack:
    """The way back: where it is, the adjoint there, and the parameters' cotangents so far (in ``linearize``)."""

    def __init__(self, problem: Problem, plan: Plan, f: Flat, trajectory: Trajectory, linearize: Linearizer, end: Tensor) -> None:
        assert problem.algebra is not None
        self.problem, self.plan, self.linearize = problem, plan, linearize
        self.f, self.trajectory = f, trajectory
        self.equations = equations = _Adjoint(f, problem.algebra.jacobian, trajectory, linearize)
        self.t = end.clone()
        self.point = equations.at(self.t)
        self.adjoint = torch.zeros_like(self.point.y)
        self.n_steps = 0

    def copied(self, size: int, t: Tensor) -> ImplicitBack:
        """See `WayBack.copied`."""
        problem, f, trajectory, linearize = copies(self.problem, self.trajectory, self.linearize, size)
        return ImplicitBack(problem, self.plan, f, trajectory, linearize, t)

    def boundary(self) -> tuple[Tensor, Tensor]:
        """``E* l`` and ``y'`` at the present time."""
        E = self.point.pencil.E
        if isinstance(E, SparseMatrix):
            return E.matvec(self.adjoint, transposed=True, conjugated=True), self.point.yp
        assert isinstance(E, Tensor)
        return (E.mH @ self.adjoint.unsqueeze(-1)).squeeze(-1), self.point.yp

    def restart(self, t: Tensor, adjoint: Tensor) -> None:
        """See `WayBack.restart`."""
        self.t, self.adjoint, self.point = t.clone(), adjoint, self.equations.at(t)

    def lose(self, rows: Tensor) -> None:
        """See `WayBack.lose`."""
        point = self.point
        _, pull = self.linearize(point.t, torch.cat([point.y, point.yp], -1))
        pull(torch.where(rows.unsqueeze(-1), float("nan"), torch.zeros_like(point.y)))
        self.adjoint = torch.where(rows.unsqueeze(-1), float("nan"), self.adjoint)

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
        plan = in_units_of(self.plan, self.adjoint, self.trajectory.copies)
        structure = algebra.structure
        open_rows = structure.suspects if structure is not None and structure.index > 1 else None
        solver = _AdjointSolver(self.equations, plan, algebra.linear_solver, rows, self.adjoint.device, open_rows)
        start = torch.cat([self.boundary()[0], self.adjoint], -1)
        with torch.no_grad():
            record = integrate(solver, plan, torch.stack([self.t, t]), None, start, True)
        check_way_back(record, plan, self.problem, len(self.trajectory.starts))
        self.n_steps += int(record.n_accepted.max())
        self._accumulate(record, n)
        self.adjoint = record.final[:, n:]

    def _accumulate(self, record: Record, n: int) -> None:
        """Add the integral of ``-l* F_p`` over the steps."""
        if not self.linearize.targets:
            return

        def add(time: Tensor, pair: Tensor, weight: Tensor) -> None:
            y, yp = self.trajectory(time)
            _, pull = self.linearize(time.to(y.dtype), torch.cat([y, yp], -1))
            pull(weight * pair[:, n:])

        for k in range(record.h.shape[0]):
            along_step(self.trajectory, record, k, self.plan.method, add)

    def slope(self) -> Tensor:
        """See `WayBack.slope`."""
        return self.point.yp

    def jump(self, bar: Tensor) -> None:
        """See `WayBack.jump`."""
        problem = self.problem
        structure = problem.algebra.structure if problem.algebra is not None else None
        if structure is not None and structure.plain:
            self._plain_jump(bar, structure)
        else:
            self._general_jump(bar)

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
