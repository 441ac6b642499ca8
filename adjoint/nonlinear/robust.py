"""One method after another, until every row has a root, and a note of what was done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..linalg import LinearOperator
from .diagnose import right_null_vectors
from .fixed_point import Anderson, Broyden
from .newton import Newton, merge
from .protocol import RootMethod, RootProblem, RootRecord, RootStatus, RootTraits, ill_determined, pick
from .pseudo_transient import PseudoTransient
from .trust_region import Dogleg, LevenbergMarquardt

__all__ = ["Auto"]

#: the method that finds roots with a singular Jacobian, and unknowns up to which it is tried: its matrices are dense
_DAMPED, _DENSE = "Levenberg-Marquardt", 500


@dataclass(frozen=True)
class Auto(RootTraits):
    """Newton with a line search, then Powell's dogleg, Levenberg-Marquardt's method, pseudo-transient continuation, ``integrate``.

    Each starts again at ``x0``, has ``max_steps`` of its own, and is kept only for the rows that have no root yet. The dogleg is left out
    for operators without transposed products, pseudo-transient continuation with ``flow=False``: it takes the residual for the tendency of
    a stable flow. ``integrate(x) -> x`` (B, n) carries ``x`` towards a steady state, and Newton polishes it. Without a Jacobian there is
    Broyden's method, then Anderson's.

    Roots need not be unique: `RootRecord.note` says which rows had theirs from which method, and that it may be another one than the
    root nearest to ``x0``; roots that are one of many (the Jacobian is singular) are refused, multiple ones are not. A row without any
    root has the status and the iterate of the first method.
    """

    flow: bool = True
    integrate: Callable[[Tensor], Tensor] | None = None

    def with_flow(self, integrate: Callable[[Tensor], Tensor]) -> Any:
        """See `RootTraits.with_flow`."""
        return self if self.integrate is not None else replace(self, integrate=integrate)

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`."""
        first: RootMethod = Newton() if problem.jacobian is not None else Broyden()
        best = first.solve(problem, x0)
        notes = [best.note]
        if bool((best.status == int(RootStatus.SUCCESS)).all()):
            return best
        for name, method in self._fallbacks(problem, x0):
            failed = best.status != int(RootStatus.SUCCESS)
            # a residual that is not finite at the guess is a fault of the guess: no method can start there
            hopeless = failed & (best.status == int(RootStatus.NON_FINITE)) & (best.n_steps == 0)
            if not bool((failed & ~hopeless).any()):
                break
            notes.append(f"{name} for {_rows(failed & ~hopeless)} after {_statuses(best.status[failed & ~hopeless])}")
            again = method(failed)
            found = failed & (again.status == int(RootStatus.SUCCESS))
            many = _not_isolated(problem, again, found)
            if name == _DAMPED:
                # it ends at roots with a singular Jacobian too, which may be multiple
                found = found | (failed & (again.status == int(RootStatus.SINGULAR)))
                many = _one_of_many(problem, again, found & (many | (again.status != int(RootStatus.SUCCESS))))
                again = replace(again, status=pick(found, torch.zeros_like(again.status), again.status))
            saved = found & ~many
            if bool((found & ~saved).any()):
                notes.append(f"{name} found a root of {_rows(found & ~saved)} that is one of many: the Jacobian is singular there")
            if bool(saved.any()):
                notes.append(f"{name} found the root of {_rows(saved)}, perhaps another than the one nearest to the guess")
            best = _combine(best, again, failed, saved)
        note = "; ".join(notes)
        return replace(best, note=note)

    def _fallbacks(self, problem: RootProblem, x0: Tensor) -> list[tuple[str, Callable[[Tensor], RootRecord]]]:
        def start(method: RootMethod) -> Callable[[Tensor], RootRecord]:
            return lambda rows: method.solve(problem, x0)

        out: list[tuple[str, Callable[[Tensor], RootRecord]]] = []
        if problem.jacobian is None:
            return [("Anderson's method", start(Anderson()))]
        matrix = problem.jacobian(x0)
        if not (isinstance(matrix, LinearOperator) and matrix.rmatvec is None):
            out.append(("dogleg", start(Dogleg())))
        if not isinstance(matrix, LinearOperator) and x0.shape[1] <= _DENSE:
            out.append((_DAMPED, start(LevenbergMarquardt())))
        if self.flow:
            out.append(("pseudo-transient continuation", start(PseudoTransient())))
        if self.integrate is not None:
            out.append(("time integration", self._integrated(problem, x0)))
        return out

    def _integrated(self, problem: RootProblem, x0: Tensor) -> Callable[[Tensor], RootRecord]:
        assert self.integrate is not None
        integrate = self.integrate

        def run(rows: Tensor) -> RootRecord:
            return Newton().solve(problem, pick(rows, integrate(x0), x0))

        return run


def _one_of_many(problem: RootProblem, record: RootRecord, rows: Tensor) -> Tensor:
    """Which of the rows are on a set of roots, not at a multiple one: the iteration is begun again a little aside, along a direction that
    the Jacobian does not know of. To an isolated root it comes back."""
    if problem.jacobian is None or not bool(rows.any()):
        return torch.zeros_like(rows)
    matrix = problem.jacobian(record.x)
    aside, many = record.x.clone(), rows.clone()
    for row in rows.nonzero()[:, 0].tolist():
        null = right_null_vectors(matrix, row, rtol=1e-9)
        if null is not None and null.shape[0]:
            k = torch.arange(null.shape[0], device=null.device, dtype=null.dtype.to_real()) + 1
            v = (torch.cos(k * k).to(null.dtype).unsqueeze(-1) * null / torch.linalg.vector_norm(null, dim=1, keepdim=True)).sum(0)
            size = record.x[row].abs().amax()
            aside[row] += v * (1e-2 * torch.where(size > 0, size, 1.0) / torch.linalg.vector_norm(v))
        else:
            many[row] = False  # regular in its own units
    back = LevenbergMarquardt().solve(problem, aside)
    moved = torch.linalg.vector_norm(aside - record.x, dim=-1)
    return many & ~(torch.linalg.vector_norm(back.x - record.x, dim=-1) <= 0.1 * moved)


def _not_isolated(problem: RootProblem, record: RootRecord, found: Tensor) -> Tensor:
    if problem.jacobian is None or not bool(found.any()):
        return torch.zeros_like(found)
    matrix = merge(found, problem.jacobian(record.x), None)
    return ill_determined(matrix, problem.linear_solver.factor(matrix, problem.log))


def _combine(old: RootRecord, new: RootRecord, tried: Tensor, saved: Tensor) -> RootRecord:
    def counts(a: Tensor, b: Tensor) -> Tensor:
        return a + torch.where(tried, b, 0)

    return RootRecord(
        x=pick(saved, new.x, old.x),
        residual=pick(saved, new.residual, old.residual),
        residual_norm=pick(saved, new.residual_norm, old.residual_norm),
        status=pick(saved, new.status, old.status),
        n_steps=counts(old.n_steps, new.n_steps),
        n_fun=counts(old.n_fun, new.n_fun),
        n_jac=counts(old.n_jac, new.n_jac),
    )


def _rows(mask: Tensor) -> str:
    if mask.numel() == 1:
        return "the system"
    rows = mask.nonzero()[:, 0].tolist()
    return f"rows {', '.join(map(str, rows[:5]))}{f' and {len(rows) - 5} more' if len(rows) > 5 else ''}"


def _statuses(status: Tensor) -> str:
    return " and ".join(sorted({RootStatus(int(s)).name for s in status.tolist()}))
