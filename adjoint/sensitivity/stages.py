"""Implicit stages in derivatives: as differentiable roots for recorded code, one by one or coupled ones all together, and their adjoint
solves for the eager sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..integrate.newton import jacobian_at, mass_product, shifted
from ..linalg import Factorization, LinearOperator, Log, Matrix, SparseMatrix
from ..linalg.pencil import Pencil, regular_size, scaled_factors, split
from ..linalg.solve import shared_solve
from ..methods.collocation import CollocationTableau
from ..methods.family import Pullback, row_dot
from ..nonlinear import RootRecord
from ..system.stage_jacobian import StageJacobian
from ..system.system import Flat, System, VmappedSystem
from .asked import Linearizer, vjp
from .implicit import FixedRule, JacobianRule, RootNode, RootOutputs, RootTask, SystemConditions, known_root, linear
from .problem import Problem, StageAlgebra
from .products import tangent

__all__ = ["RecordedStages", "StageLinearizer", "coupled_matrix", "coupled_pencils", "coupled_root"]

Rows = Sequence[Sequence[float]]

#: unknowns up to which the stages of a linear method share one Jacobian with a graph: it has as many products as there are unknowns, all at
#: once, in the place of two for each stage, one by one; and entries of it up to which it may have more than these: beyond, they cost time
#: and memory
_SHARED_UP_TO, _ENTRIES_UP_TO = 64, 2**13


def coupled_root(
    system: System | VmappedSystem,
    inputs: Sequence[Tensor],
    recorded: Tensor,
    algebra: StageAlgebra,
    find: Callable[..., RootRecord],
    a: Rows,
    times: Sequence[Tensor],
    h: float | Tensor,
    y: Tensor,
) -> list[Tensor]:
    """The slopes ``k_i = f(times[i], y + h sum_j a_ij k_j)``, differentiable to any order in times, ``h``, ``y`` and inputs. Of a system
    with a residual those that solve ``F(times[i], y + h sum_j a_ij k_j, k_i) = 0``.

    ``recorded`` (s, B, n) are their values, which ``find`` takes as they are.
    """
    step = h if isinstance(h, Tensor) else y.new_full((y.shape[0], 1), h, dtype=y.dtype.to_real())
    conditions = _CoupledConditions(system, a)
    task = RootTask(conditions, conditions, find, _CoupledRule(system, a, algebra), algebra.linear_solver, Log(), lambda record: None)
    known = recorded.detach().movedim(0, 1).flatten(1)
    found = RootOutputs(*RootNode.apply(task, known, *times, step, y, *inputs)).raw
    return list(found.unflatten(1, (len(a), -1)).unbind(1))


@dataclass(frozen=True)
class _CoupledConditions(SystemConditions):
    """``k_i - f(t_i, y + h sum_j a_ij k_j) = 0``, or ``F(t_i, y + h sum_j a_ij k_j, k_i) = 0``, for ``k`` of shape ``(B, s n)``, with
    inputs ``(t_1, .., t_s, h, y, *inputs of f)``."""

    a: Rows

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``k``."""
        times, h, y, rest = _split(inputs, len(self.a))
        f = self.system.bind(rest)

        def implicit(_: Tensor, k: Tensor) -> Tensor:
            values, slopes = _values(self.a, h, y, k), k.unflatten(-1, (len(self.a), -1)).unbind(-2)
            return torch.cat([f(t, torch.cat([v, s], -1)) for t, v, s in zip(times, values, slopes, strict=True)], -1)

        def residual(_: Tensor, k: Tensor) -> Tensor:
            values = _values(self.a, h, y, k)
            return k - torch.cat([f(t, value) for t, value in zip(times, values, strict=True)], -1)

        return residual if self.system.residual is None else implicit


@dataclass(frozen=True)
class _CoupledRule(JacobianRule):
    """The Jacobian of `_CoupledConditions`, from one of ``f`` (n columns) at every stage and not by differentiating ``s n`` columns.

    ``levels``: the sizes and mapped inputs of the ``torch.vmap`` around, the outermost first.
    """

    system: System | VmappedSystem
    a: Rows
    algebra: StageAlgebra
    levels: tuple[tuple[int, tuple[int | None, ...]], ...] = ()

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        s = len(self.a)
        times, h, y, rest = _split(inputs, s)
        own = [self._rows(i, value) for i, value in enumerate((*times, h, y))]
        times, h, y = own[:s], own[s], own[s + 1]
        f = self.system.bind(rest)
        values = _values(self.a, h, y, x)
        if self.system.residual is not None:
            pairs = [torch.cat([v, k], -1) for v, k in zip(values, x.unflatten(-1, (s, -1)).unbind(-2), strict=True)]
            found = [split(self.algebra.jacobian(lambda v, t=t: f(t, v), pair)) for t, pair in zip(times, pairs, strict=True)]
            return coupled_pencils(self.a, h, found)
        blocks = [self.algebra.jacobian(lambda v, t=t: f(t, v), value) for t, value in zip(times, values, strict=True)]
        return coupled_matrix(self.a, h, blocks)

    def _rows(self, index: int, x: Tensor) -> Tensor:
        """An input of each copy as one of all rows."""
        for place, (size, dims) in enumerate(self.levels):
            if dims[index] is None:
                x = x.unsqueeze(place).expand(*x.shape[:place], size, *x.shape[place:])
        return x.flatten(0, len(self.levels))

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> _CoupledRule:
        """The rule for ``size`` copies: the rows of all."""
        system = VmappedSystem(self.system, size, in_dims[len(self.a) + 2 :])
        return replace(self, system=system, levels=((size, in_dims), *self.levels))


def _split(inputs: Sequence[Tensor], s: int) -> tuple[Sequence[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    return inputs[:s], inputs[s], inputs[s + 1], inputs[s + 2 :]


def _values(a: Rows, h: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """``Y_i = y + h sum_j a_ij k_j`` from ``k`` (B, s n)."""
    ks = k.unflatten(-1, (len(a), -1)).unbind(-2)
    return [y + h * _mixed(row, ks) for row in a]


def _mixed(weights: Sequence[float], xs: Sequence[Tensor]) -> Tensor:
    parts = [x * w for w, x in zip(weights, xs, strict=True)]
    return sum(parts[1:], parts[0])


def coupled_matrix(a: Rows, h: Tensor, blocks: Sequence[Matrix]) -> Matrix:
    """The ``s n x s n`` matrices with blocks ``delta_ij I - h a_ij J_i``, of the kind of the ``J_i``; ``h`` is (B, 1).

    Sparse ``J_i`` must share a pattern that has the diagonal.
    """
    s, first = len(a), blocks[0]
    dense = [block for block in blocks if isinstance(block, Tensor)]
    sparse = [block for block in blocks if isinstance(block, SparseMatrix)]
    operators = [block for block in blocks if isinstance(block, LinearOperator)]
    if len(dense) == s:
        n = dense[0].shape[-1]
        weights = h.reshape(-1, 1, 1, 1) * torch.tensor(a, dtype=h.dtype, device=h.device)
        eye = torch.eye(s * n, dtype=dense[0].dtype, device=h.device)
        # (B, s, n, s, n) with the block's row i and column j in the places 1 and 3
        coupling = torch.stack(dense, 1).unsqueeze(3) * weights.squeeze(1)[:, :, None, :, None]
        return eye - coupling.flatten(3).flatten(1, 2)
    if len(sparse) == s:
        return _coupled_sparse(a, h, sparse)
    if len(operators) == s:
        return _coupled_operator(a, h, operators)
    raise TypeError(f"the Jacobians of the stages are of several kinds: {type(first).__name__} and others")


def coupled_pencils(a: Rows, h: Tensor, pencils: Sequence[Pencil]) -> Matrix:
    """The ``s n x s n`` matrices with blocks ``delta_ij E_i + h a_ij G_i``; ``h`` is (B, 1).

    Where it is zero, in steps that do nothing, that of a small step: the slopes are finite then, and times zero.
    """
    s, first = len(a), pencils[0].G
    h = regular_size(h, pencils[0])
    if isinstance(first, Tensor):
        n = first.shape[-1]
        weights = h.reshape(-1, 1, 1, 1, 1) * torch.tensor(a, dtype=h.dtype, device=h.device)[:, None, :, None]
        # (B, s, n, s, n) with the block's row i and column j in the places 1 and 3
        coupling = torch.stack([p.G for p in pencils], 1).unsqueeze(3) * weights  # type: ignore[list-item]
        eye = torch.eye(s, dtype=first.dtype, device=h.device)[:, None, :, None]
        masses = torch.stack([p.E for p in pencils], 1).unsqueeze(3) * eye  # type: ignore[list-item]
        return (coupling + masses).reshape(-1, s * n, s * n)
    assert isinstance(first, SparseMatrix)
    (n, _), (rows, columns) = first.shape, first.indices
    indices, values = [], []
    for i, row in enumerate(a):
        for j, weight in enumerate(row):
            indices.append(torch.stack([rows + i * n, columns + j * n]))
            E, G = pencils[i].E, pencils[i].G
            assert isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix)
            values.append(E.values + h * weight * G.values if i == j else h * weight * G.values)
    places, entries = torch.cat(indices, 1), torch.cat(values, -1)
    order = (places[0] * (s * n) + places[1]).argsort()
    return SparseMatrix(places[:, order], entries[..., order], (s * n, s * n))


def _coupled_sparse(a: Rows, h: Tensor, blocks: Sequence[SparseMatrix]) -> SparseMatrix:
    s, (n, _) = len(a), blocks[0].shape
    rows, columns = blocks[0].indices
    on = (rows == columns).to(blocks[0].dtype)
    indices, values = [], []
    for i, row in enumerate(a):
        for j, weight in enumerate(row):
            indices.append(torch.stack([rows + i * n, columns + j * n]))
            part = -(h * weight) * blocks[i].values
            values.append(part + on if i == j else part)
    places, entries = torch.cat(indices, 1), torch.cat(values, -1)
    order = (places[0] * (s * n) + places[1]).argsort()
    return SparseMatrix(places[:, order], entries[..., order], (s * n, s * n))


def _coupled_operator(a: Rows, h: Tensor, blocks: Sequence[LinearOperator]) -> LinearOperator:
    s, one = len(a), blocks[0]

    def matvec(v: Tensor) -> Tensor:
        parts = v.unflatten(-1, (s, -1)).unbind(-2)
        sums = [_mixed(row, parts) for row in a]
        return v - h * torch.cat([block.matvec(x) for block, x in zip(blocks, sums, strict=True)], -1)

    def rmatvec(v: Tensor) -> Tensor:
        parts = v.unflatten(-1, (s, -1)).unbind(-2)
        pulled = []
        for block, part in zip(blocks, parts, strict=True):
            assert block.rmatvec is not None
            pulled.append(block.rmatvec(part))
        sums = [_mixed(column, pulled) for column in zip(*a, strict=True)]
        return v - h * torch.cat(sums, -1)

    back = rmatvec if all(block.rmatvec is not None for block in blocks) else None
    return LinearOperator(s * one.n, one.rows, one.dtype, one.device, matvec, back)


@dataclass(frozen=True)
class _StageConditions(SystemConditions):
    """``k - f(t, base + hd k) = 0`` with inputs ``(t, base, hd, *inputs of f)``."""

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``k``."""
        t, base, hd, *rest = inputs
        f = self.system.bind(rest)
        return lambda _, k: k - f(t, base + hd * k)


@dataclass(frozen=True)
class _ShiftedConditions(SystemConditions):
    """``y - hd f(t, y)`` (``M y - hd f(t, y)``), whose Jacobian in ``y`` is the matrix of `RecordedStages.solve`; inputs ``(t, hd, *inputs
    of f)``."""

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``y``."""
        t, hd, *rest = inputs
        f, mass = self.system.bind(rest), self.system.mass_matrix(rest)
        return lambda _, y: mass_product(mass, y, hd) - hd * f(t, y)


class RecordedStages:
    """`StageEquations` for one recorded step, whose stages are differentiable roots to any order.

    ``stages``: the recorded slopes, ``(S, B, n)``.
    """

    def __init__(self, system: System | VmappedSystem, inputs: Sequence[Tensor], stages: Tensor, algebra: StageAlgebra) -> None:
        self.system, self.inputs, self.recorded, self.algebra = system, inputs, stages, algebra
        self.f = system.bind(inputs)
        self.mass_matrix = system.mass_matrix(inputs)
        self._shifted: RootTask | None = None
        self._solve: Callable[[Tensor], Tensor] | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``; of implicit equations no slope is asked for that would not be a stage."""
        return torch.zeros_like(y) if self.system.residual is not None else self.f(t, y)

    def begin(self, t: Tensor, y: Tensor) -> None:
        """The matrix of the step before is none of this one."""
        self._solve = None

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`; differentiable in everything, the Jacobian included.

        A small dense Jacobian is taken once, as a function that is differentiated, and serves all stages of the step: each else takes the
        products with it, and with its derivatives, that it needs.
        """
        step = hd if isinstance(hd, Tensor) else b.new_full((b.shape[0], 1), hd, dtype=b.dtype.to_real())
        if self._solve is not None:
            return self._solve(b)
        strategy, solver = self.algebra.jacobian, self.algebra.linear_solver
        n = y.shape[1]
        few = n <= 2 * len(self.recorded) or (n <= _SHARED_UP_TO and y.numel() * n <= _ENTRIES_UP_TO)
        if few and isinstance(strategy, StageJacobian) and strategy.takes_dense(y):
            matrix = shifted(strategy(lambda x: self.f(t, x), y), step, self.mass_matrix)
            assert isinstance(matrix, Tensor)
            self._solve = shared_solve(matrix, solver)
            return self._solve(b)
        if self._shifted is None:
            conditions = _ShiftedConditions(self.system)
            self._shifted = RootTask(conditions, conditions, known_root, FixedRule(strategy), solver, Log(), lambda record: None)
        return linear(self._shifted, b, y, (t, step, *self.inputs), adjoint=False)

    def linear_stages(
        self, tableau: Any, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, slope: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """See `StageEquations.linear_stages`: stage by stage, as roots that are differentiated."""
        return None

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """See `StageEquations.time_slope`."""
        return tangent(lambda s: self.f(s, y), [t], [torch.ones_like(t)])

    def mass(self, v: Tensor) -> Tensor:
        """See `StageEquations.mass`."""
        return mass_product(self.mass_matrix, v)

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """See `StageEquations.implicit`."""
        step = hd if isinstance(hd, Tensor) else base.new_full((base.shape[0], 1), hd, dtype=base.dtype.to_real())
        conditions = _StageConditions(self.system)
        task = RootTask(
            conditions, conditions, known_root, FixedRule(self.algebra.jacobian), self.algebra.linear_solver, Log(), lambda record: None
        )
        return RootOutputs(*RootNode.apply(task, self.recorded[index].detach(), t, base, step, *self.inputs)).raw

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], None]:
        """See `StageEquations.coupled`."""
        return coupled_root(self.system, self.inputs, self.recorded, self.algebra, known_root, tableau.a, times, h, y), None


class StageLinearizer(Linearizer):
    """A `Linearizer` that also solves with the adjoints of ``I - h a_ii f_y(Y_i)`` for the stages of one step."""

    def __init__(self, problem: Problem, stages: Tensor, f: Flat, inputs: Sequence[Tensor], wants: Sequence[bool], time: bool) -> None:
        super().__init__(f, inputs, wants, time)
        assert problem.algebra is not None
        self.jacobian = problem.jacobian(inputs)
        self.algebra, self.diagonal, self.recorded = problem.algebra, problem.plan.method.diagonal, stages
        self.log = Log()
        self.residual = problem.system.residual is not None
        self.system = problem.system
        with torch.no_grad():
            self.mass_matrix = self.system.mass_matrix(inputs)
        self.k = 0
        self.h: Tensor = torch.empty(0, device=stages.device)
        self.times: Sequence[Tensor] = ()
        self._start: Factorization | None = None

    def begin_step(self, k: int, times: Sequence[Tensor], h: float | Tensor) -> None:
        """The next sweep is that of step ``k``."""
        rows = self.recorded.shape[2]
        self.k, self.times, self._start = k, times, None
        self.h = h if isinstance(h, Tensor) else torch.full((rows, 1), h, dtype=self.recorded.dtype.to_real(), device=self.recorded.device)

    def stages(self) -> list[Tensor]:
        """The recorded slopes of the step."""
        return list(self.recorded[self.k].unbind())

    def solve_adjoint(self, index: int, point: Tensor, w: Tensor) -> Tensor:
        """``(I - h a_ii f_y)*^-1 w`` at the value ``point`` of stage ``index``."""
        hd, time = self.h * self.diagonal[index], self.times[index]
        with torch.no_grad():
            matrix = shifted(jacobian_at(self.jacobian, self.f, time, point), hd)
            factors = self.algebra.linear_solver.factor(matrix, self.log)
            return factors.solve(w, transposed=True, conjugated=True)

    def coupled_adjoint(
        self, a: Sequence[Sequence[float]], times: Sequence[Tensor], points: Sequence[Tensor], w: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Pullback]]:
        """See `StageLinearize.coupled_adjoint`."""
        ks, implicit = self.stages(), self.residual
        xs = [torch.cat([x, k], -1) for x, k in zip(points, ks, strict=True)] if implicit else list(points)
        pulls = [self(t, x)[1] for t, x in zip(times, xs, strict=True)]
        with torch.no_grad():
            found = [jacobian_at(self.jacobian, self.f, t, x) for t, x in zip(times, xs, strict=True)]
            matrix = coupled_pencils(a, self.h, [split(m) for m in found]) if implicit else coupled_matrix(a, self.h, found)
            side = torch.cat(list(w), -1)
            if implicit:
                v = scaled_factors(self.algebra.linear_solver, matrix, self.log).solve_adjoint(side)
            else:
                v = self.algebra.linear_solver.factor(matrix, self.log).solve(side, transposed=True, conjugated=True)
            # finished trajectories have steps of size zero, at which the equations need not have a solution
            v = torch.where((side == 0).all(-1, keepdim=True), 0.0, v)
        n = points[0].shape[-1]
        if implicit:
            # the slope is one of F = 0: its derivative has the other sign, and only the part of y goes on
            pulls = [lambda x, pull=pull: (lambda u, time: (u[..., :n], time))(*pull(-x)) for pull in pulls]
        return list(v.unflatten(-1, (len(times), n)).unbind(-2)), pulls

    def solve_start(self, t: Tensor, y: Tensor, hd: Tensor | float, w: Tensor) -> Tensor:
        """``(I - hd f_y(t, y))*^-1 w`` with ``(t, y)`` and ``hd`` the same in every call of a step: one factorisation."""
        with torch.no_grad():
            if self._start is None:
                size = hd if isinstance(hd, Tensor) else torch.full_like(self.h, hd)
                matrix = shifted(jacobian_at(self.jacobian, self.f, t, y), size, self.mass_matrix)
                self._start = self.algebra.linear_solver.factor(matrix, self.log)
            return self._start.solve(w, transposed=True, conjugated=True)

    def mass_adjoint(self, v: Tensor) -> Tensor:
        """See `StageLinearize`."""
        return mass_product(None if self.mass_matrix is None else self.mass_matrix.mH, v)

    def bend_mass(self, x: Callable[[], Sequence[Tensor]], v: Sequence[Tensor]) -> None:
        """See `StageLinearize`."""
        if self.mass_matrix is None or not self.targets:
            return
        with torch.enable_grad():
            product = mass_product(self.system.mass_matrix(self.inputs), torch.stack(list(x())))
        if product.requires_grad:
            self.accumulate(vjp((product,), self.targets, (torch.stack(list(v)),)))

    def bend(
        self, t: Tensor, y: Tensor, k: Sequence[Tensor], d: Sequence[float], v: Sequence[Tensor], scale: float | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Cotangents by way of the slopes of ``f`` at ``(t, y)`` along the directions ``(d_i, k_i)``.

        With ``phi = sum_i Re <v_i, f_y k_i + d_i f_t>``, ``(B,)``: the gradient of ``scale phi`` in ``y`` and, where derivatives in times
        are wanted, that in ``t`` and ``phi`` itself; adds that in the inputs to their cotangents.
        """
        self.n_fun += 1
        with torch.enable_grad():
            time, at = t.detach().requires_grad_(True), y.detach().requires_grad_(True)
            f = self.f(time, at)
            if not f.requires_grad:
                nothing = torch.zeros_like(t) if self.time else None
                return torch.zeros_like(y), nothing, nothing
            weights = torch.stack(list(v))
            found = torch.autograd.grad(f, (at, time), weights, create_graph=True, is_grads_batched=True, materialize_grads=True)
            rows = row_dot(torch.stack(list(k)), found[0]) + found[1] * found[1].new_tensor(d).unsqueeze(-1)
            phi = rows.sum(0)
            total = (phi * (scale.squeeze(-1) if isinstance(scale, Tensor) else scale)).sum()
        times = (time,) if self.time else ()
        if not total.requires_grad:
            bars: list[Tensor | None] = [None] * (1 + len(times) + len(self.targets))
        else:
            bars = list(vjp((total,), (at, *times, *self.targets), (torch.ones_like(total),)))
        y_bar, *rest = bars
        t_bar = None
        if self.time:
            t_bar, *rest = rest
            t_bar = torch.zeros_like(t) if t_bar is None else t_bar
        self.accumulate(rest)
        return torch.zeros_like(y) if y_bar is None else y_bar, t_bar, phi.detach() if self.time else None
