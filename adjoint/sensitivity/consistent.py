"""Consistent initial values of implicit equations, as a differentiable root (docs/theory.md, section 2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InconsistentInitialCondition, UnsupportedCombination
from ..linalg import DenseLU, LinearSolver, Log, Matrix
from ..linalg.pencil import split
from ..native.consistent import NativeStart
from ..nonlinear import Newton, RootProblem, RootRecord, RootStatus
from ..system.jacobians import DenseJacobian
from ..system.structure import Structure
from ..system.system import Flat, System, VmappedSystem
from ..system.transforms import every_copy
from ..torch_internals import temporarily_clear_interpreter_stack
from .implicit import FixedRule, JacobianRule, RootNode, RootOutputs, RootTask, SystemConditions, known_root
from .problem import Problem, StageAlgebra
from .products import tangent

__all__ = [
    "Bounds",
    "Initial",
    "LostRows",
    "all_lost",
    "complete",
    "complete_values",
    "completion",
    "lost_rows",
    "residual_report",
    "rtol_of_search",
]


#: lower and upper bounds of the state, ``(B, n)`` each, or None
Bounds = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Initial:
    """Initial values ``y`` and slopes ``yp``, ``(B, n)``, differentiable."""

    y: Tensor
    yp: Tensor


@dataclass(frozen=True)
class LostRows:
    """Trajectories that have no initial values, as some are NaN or infinite: there is nothing to be found for them, and the solve says that
    they failed. ``lost`` (B,); ``y`` and ``yp`` (n,): values of one that has some, at which nothing goes wrong for the others."""

    lost: Tensor
    y: Tensor
    yp: Tensor

    def replaced(self, given: Initial) -> Initial:
        """Values with others in the place of those that are lost, which do not move."""
        column = self.lost.unsqueeze(-1)
        return Initial(torch.where(column, self.y, given.y), torch.where(column, self.yp, given.yp))

    def restored(self, found: Initial, given: Initial) -> Initial:
        """Consistent values, and those that are lost as they were given."""
        column = self.lost.unsqueeze(-1)
        return Initial(torch.where(column, given.y, found.y), torch.where(column, given.yp, found.yp))


def rtol_of_search(real: torch.dtype) -> float:
    """To which relative tolerance consistent values are found."""
    return 1e-6 if real.itemsize < 8 else 1e-12


def lost_rows(given: Initial) -> LostRows | None:
    """The trajectories (of all copies under ``torch.vmap``) whose initial values are not finite; None where none is, or all are."""
    (y, yp), fine = _fine_rows(given)
    if all(bool(x.all()) for x in fine) or not all(bool(x.any()) for x in fine):
        return None
    lost = ~(torch.isfinite(given.y) & torch.isfinite(given.yp)).all(-1)
    return LostRows(lost, *(x[int(ok.nonzero()[0, 0])] for x, ok in zip((y, yp), fine, strict=True)))


def all_lost(given: Initial) -> bool:
    """Whether no trajectory has initial values, so that there is no place to look at the equations."""
    return bool(given.y.shape[0]) and not all(bool(x.any()) for x in _fine_rows(given)[1])


def _fine_rows(given: Initial) -> tuple[tuple[Tensor, Tensor], list[Tensor]]:
    """Values and slopes of all copies, and which rows of either are finite."""
    y, yp = _every_row(given.y.detach()), _every_row(given.yp.detach())
    fine = [torch.isfinite(x).all(-1) for x in (y, yp)]
    return (y, yp), [fine[0] & fine[1]] * 2 if len(y) == len(yp) else fine


def _every_row(x: Tensor) -> Tensor:
    """``(rows, n)``: the values of all copies that transforms map over."""
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        return every_copy(x).flatten(0, -2)


@dataclass(frozen=True)
class _Completion(SystemConditions):
    """The equations for ``u = (rates of what is differentiated, values of what is not)`` in the basis of the structure.

    Inputs ``(t0, y0, *inputs of F)``. With ``V1`` and ``V2`` the two parts of the basis: ``F(t0, y0 + V2 (u2 - V2* y0), V1 u1) = 0``. Where
    there are hidden constraints (index 2), those combinations are replaced by their time derivatives along the solution.
    """

    basis: Tensor
    rank: int
    scale: Tensor
    hidden: Tensor
    rest: Tensor

    def values(self, y0: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and ``y'`` from the unknowns."""
        known, free = self.basis[..., : self.rank], self.basis[..., self.rank :]
        change = u[..., self.rank :] - _times(free.mH, y0)
        return y0 + _times(free, change), _times(known, u[..., : self.rank])

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``u``."""
        t0, y0, *rest = inputs
        f = self.system.bind(rest)

        def residual(_: Tensor, u: Tensor) -> Tensor:
            y, yp = self.values(y0, u)
            value = f(t0, torch.cat([y, yp], -1))
            if not self.hidden.shape[-1]:
                return value
            moving = tangent(lambda t, x: self.scale * f(t, torch.cat([x, yp], -1)), [t0, y], [torch.ones_like(t0), yp])
            return torch.cat([_times(self.rest.mH, self.scale * value), _times(self.hidden.mH, moving)], -1)

        return residual


@dataclass(frozen=True)
class _CompletionRule(JacobianRule):
    """The Jacobian of `_Completion` from a matrix of ``F``: sparse where that is, and the basis one of single variables."""

    system: System | VmappedSystem
    algebra: StageAlgebra
    structure: Structure

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        t0, y0, *rest = inputs
        f = self.system.bind(rest)
        order, rank = self.structure.order, self.structure.rank
        y = y0.index_copy(1, order[rank:], x[:, rank:])
        yp = torch.zeros_like(y).index_copy(1, order[:rank], x[:, :rank])
        pencil = split(self.algebra.jacobian(lambda pair: f(t0, pair), torch.cat([y, yp], -1)))
        return self.structure.chosen(pencil.E, pencil.G)

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """Dense: the inputs are those of one copy no more."""
        return FixedRule(DenseJacobian())


@dataclass(frozen=True)
class _Values(SystemConditions):
    """The equations for ``y`` at given slopes: ``F(t0, y, yp0) = 0``. Inputs ``(t0, yp0, *inputs of F)``."""

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``y``."""
        t0, yp0, *rest = inputs
        f = self.system.bind(rest)
        return lambda _, y: f(t0, torch.cat([y, yp0], -1))


@dataclass(frozen=True)
class _ValuesRule(JacobianRule):
    """``F_y`` from a matrix of ``F``: sparse where that is."""

    system: System | VmappedSystem
    algebra: StageAlgebra

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        t0, yp0, *rest = inputs
        f = self.system.bind(rest)
        return split(self.algebra.jacobian(lambda pair: f(t0, pair), torch.cat([x, yp0], -1))).G

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """Dense: the inputs are those of one copy no more."""
        return FixedRule(DenseJacobian())


def _times(matrix: Tensor, v: Tensor) -> Tensor:
    return (matrix @ v.unsqueeze(-1)).squeeze(-1)


def complete(
    system: System,
    algebra: StageAlgebra,
    structure: Structure,
    t0: Tensor,
    y0: Tensor,
    yp0: Tensor,
    inputs: Sequence[Tensor],
    rtol: float,
    bounds: Bounds = (None, None),
    native: NativeStart | None = None,
    throw: bool = True,
) -> Initial:
    """Values of algebraic variables and slopes of differential ones, from those of differential variables (IDA's ``YA_YDP``; Brown,
    Hindmarsh & Petzold 1998), by Newton's method with a line search.

    ``t0`` (B,), ``y0`` and the guess ``yp0`` (B, n). Algebraic entries of ``y0`` are guesses: nothing depends on them but the choice
    between several solutions. Of index 2 the hidden constraints are solved too; that of ``y0`` itself must hold. ``bounds`` hold for the
    algebraic variables; where these are no single entries of the state, bounds raise `UnsupportedCombination`. ``native``: finds the values
    where Newton's method goes straight to them.

    Raises `InconsistentInitialCondition` if there is no solution to be found; without ``throw`` such trajectories are NaN.
    """
    plain = structure.plain
    conditions = _conditions(system, structure)
    rule: Any = _CompletionRule(system, algebra, structure) if plain else FixedRule(DenseJacobian())

    linear_solver = algebra.linear_solver if plain else DenseLU()
    find = _finder(rtol, linear_solver, _bounds_of_unknowns(structure, bounds))
    if native is not None and plain and not structure.hidden.shape[-1] and bounds == (None, None):
        find = _native_finder(native, structure, rtol, find)
    advice = "Give a better guess of the algebraic variables in y0 (and of the slopes in yp0), or check the equations"
    report = _reporter(system, structure, advice, bounds) if throw else _silent
    task = RootTask(conditions, conditions, find, rule, linear_solver, Log(), report)
    known, free = structure.basis[..., : structure.rank], structure.basis[..., structure.rank :]
    with torch.no_grad():
        guess = torch.cat([_times(known.mH, yp0.detach()), _times(free.mH, y0.detach())], -1)
    u = RootOutputs(*RootNode.apply(task, guess, t0, y0, *inputs)).x
    y, yp = conditions.values(y0, u)
    # slopes of algebraic variables enter nothing: what was given of them is handed on
    yp = yp + _times(free, _times(free.mH, yp0.detach()))
    if plain:
        # entries that are kept are kept to the last bit, and those that were found do not go by their guesses
        y = y0.index_copy(1, structure.order[structure.rank :], u[..., structure.rank :])
    return Initial(y, yp)


def complete_values(
    system: System,
    algebra: StageAlgebra,
    structure: Structure,
    t0: Tensor,
    y0: Tensor,
    yp0: Tensor,
    inputs: Sequence[Tensor],
    rtol: float,
    bounds: Bounds = (None, None),
    throw: bool = True,
) -> Initial:
    """All of ``y`` from the slopes ``yp0`` (IDA's ``Y``: Brown, Hindmarsh & Petzold 1998), by Newton's method with ``F_y``.

    ``t0`` (B,), the guess ``y0`` and ``yp0`` (B, n). The result is differentiable in ``yp0``, and does not depend on ``y0``.

    Raises `InconsistentInitialCondition` if there is no solution to be found, as where ``F_y`` is singular; without ``throw`` such
    trajectories are NaN.
    """
    advice = "F_y must be regular for this: give a better guess y0, or keep differential variables with consistent='solve'"
    find = _finder(rtol, algebra.linear_solver, bounds)
    report = _reporter(system, structure, advice, bounds) if throw else _silent
    task = RootTask(_Values(system), _Values(system), find, _ValuesRule(system, algebra), algebra.linear_solver, Log(), report)
    return Initial(RootOutputs(*RootNode.apply(task, y0.detach(), t0, yp0, *inputs)).x, yp0)


def _finder(rtol: float, linear_solver: LinearSolver, bounds: Bounds) -> Callable[..., RootRecord]:
    """Newton's method with a line search, to ``rtol`` of the unknowns or as near as rounding lets one come."""

    def find(r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], jacobian: JacobianRule) -> RootRecord:
        def problem(rtol: float) -> RootProblem:
            return RootProblem(
                residual=r,
                jacobian=lambda at: jacobian(r, at, inputs),
                tol=float("inf"),
                x_rtol=rtol,
                x_atol=rtol * 1e-3,
                max_steps=50,
                lower=bounds[0],
                upper=bounds[1],
                linear_solver=linear_solver,
            )

        record = Newton().solve(problem(rtol), x)
        for factor in (1e3, 1e6):
            # rounding in entries of y that are not solved for may be all that is left: as near to the root as it lets one come
            stalled = record.status == int(RootStatus.STALLED)
            if not bool(stalled.any()):
                break
            again = Newton().solve(problem(factor * rtol), torch.where(torch.isfinite(record.x), record.x, x))
            record = again if bool((again.status >= 0).all()) else _mixed(stalled & (again.status >= 0), again, record)
        return record

    return find


def _mixed(chosen: Tensor, new: RootRecord, old: RootRecord) -> RootRecord:
    """``new`` in the rows that are ``chosen`` (B,), and ``old`` elsewhere."""
    names = ("x", "residual", "residual_norm", "status", "n_steps", "n_fun", "n_jac")
    pairs = {name: (getattr(new, name), getattr(old, name)) for name in names}
    mixed = {name: torch.where(chosen.unsqueeze(-1) if a.dim() == 2 else chosen, a, b) for name, (a, b) in pairs.items()}
    return replace(old, **mixed, factors=None)


def _silent(record: RootRecord) -> None:
    """Says nothing of rows that failed."""


def _native_finder(native: NativeStart, structure: Structure, rtol: float, find: Callable[..., RootRecord]) -> Callable[..., RootRecord]:
    """Newton's method by compiled code, and ``find`` where that finds nothing."""
    rates, values = structure.order[: structure.rank], structure.order[structure.rank :]

    def natively(r: Callable[[Tensor], Tensor], u: Tensor, inputs: Sequence[Tensor], jacobian: JacobianRule) -> RootRecord:
        t, y = inputs[0].detach(), inputs[1].detach()
        at, slope = y.index_copy(1, values, u[:, structure.rank :]), torch.zeros_like(y).index_copy(1, rates, u[:, : structure.rank])
        found = native.complete(t, at, slope, structure.differential, rtol)
        if found is None:
            return find(r, u, inputs, jacobian)
        count = torch.ones_like(u[:, 0], dtype=torch.int64)
        x = torch.cat([found[1].index_select(1, rates), found[0].index_select(1, values)], -1)
        return RootRecord(x, torch.zeros_like(x), x.new_zeros(len(x)), torch.zeros_like(count), count, count, count)

    return natively


def _reporter(system: System, structure: Structure, advice: str, bounds: Bounds) -> Callable[[RootRecord], None]:
    """Raises `InconsistentInitialCondition` for the first row that has no consistent values."""
    bounded = "" if bounds == (None, None) else " within the bounds"

    def report(record: RootRecord) -> None:
        bad = record.status < 0
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            status = RootStatus(int(record.status[row])).name.lower().replace("_", " ")
            raise InconsistentInitialCondition(
                f"no consistent initial values were found{bounded}{_trajectory(row, system)}: Newton's method ended with '{status}', and "
                f"{residual_report(record.residual[row], structure.row_scale[row % len(structure.row_scale)])}. {advice}"
            )

    return report


def _bounds_of_unknowns(structure: Structure, bounds: Bounds) -> Bounds:
    """Bounds of the state as those of the unknowns of `_Completion`: rates are free."""
    if bounds == (None, None):
        return bounds
    if not structure.plain:
        raise UnsupportedCombination(
            "bounds on consistent initial values need algebraic variables that are single entries of the state; here they are "
            "combinations of entries: leave y0_bounds out, or give such variables names of their own"
        )
    order, rank = structure.order, structure.rank
    lower, upper = (
        None if bound is None else torch.cat([torch.full_like(bound[:, :rank], end), bound[:, order[rank:]]], -1)
        for bound, end in zip(bounds, (-float("inf"), float("inf")), strict=True)
    )
    return lower, upper


def _conditions(system: System | VmappedSystem, structure: Structure) -> _Completion:
    return _Completion(system, structure.basis, structure.rank, structure.row_scale, structure.hidden, structure.rest)


def completion(problem: Problem, structure: Structure, t: Tensor, y: Tensor, yp: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """A state ``y`` (B, n) that satisfies the equations with slopes ``yp``, as a function of its differential part and of the inputs."""
    assert problem.algebra is not None
    conditions = _conditions(problem.system, structure)
    solver = DenseLU()

    task = RootTask(conditions, conditions, known_root, FixedRule(DenseJacobian()), solver, Log(), lambda record: None)
    known, free = structure.basis[..., : structure.rank], structure.basis[..., structure.rank :]
    with torch.no_grad():
        u = torch.cat([_times(known.mH, yp), _times(free.mH, y.detach())], -1)
    return conditions.values(y, RootOutputs(*RootNode.apply(task, u, t, y, *inputs)).raw)[0]


def _trajectory(row: int, system: System) -> str:
    return f" for trajectory {row}" if system.spec.batch is not None else ""


def residual_report(residual: Tensor, scale: Tensor, most: int = 8) -> str:
    """The rows that fail most, in words: ``residual`` and ``scale`` are ``(n,)``."""
    weighed = torch.nan_to_num((residual * scale).abs(), nan=float("inf"))
    order = weighed.argsort(descending=True)[:most]
    return "row(s) " + ", ".join(f"{int(i)} (residual {float(residual[i].real):.3g})" for i in order if float(weighed[i]) > 0)
