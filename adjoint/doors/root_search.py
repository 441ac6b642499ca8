"""The search for a root, or a minimum, by the method that was chosen: what it is given, and what is said of what it found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..linalg import Log
from ..nonlinear import RootProblem, RootRecord, RootStatus, explain
from ..nonlinear.protocol import RootTraits
from ..sensitivity.implicit import JacobianRule
from ..system.finite import WAVERS, wavers
from .relaxation import relax
from .root_arguments import RootChoice
from .root_systems import ConservedSystem, check_really_conserved

__all__ = ["RootSearch"]


@dataclass(frozen=True)
class RootSearch:
    """``find`` of a `RootTask`. ``settings``: those fields of `RootProblem` that may have an entry for each row; ``tol``: see there;
    ``throw``: failures are to be explained."""

    system: Any
    choice: RootChoice
    settings: dict[str, Any]
    tol: float
    max_steps: int
    least_squares: bool
    throw: bool
    log: Log
    callback: Callable[[int, Tensor, Tensor], None] | None

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], jacobian: JacobianRule) -> RootRecord:
        """From the guess ``x`` (B, n) to a zero of ``r``."""
        system, choice = self.system, self.choice
        # that of the residuals, not of the conditions of a minimum
        jacobian = choice.jacobian if self.least_squares else jacobian
        conserved = isinstance(system, ConservedSystem) and x.shape[0] == system.rows
        if conserved:
            check_really_conserved(system, x, inputs, "the guess")
        problem = self._problem(r, x, inputs, jacobian)
        method, counted = choice.method, [0]
        # a flow has as many tendencies as unknowns, and needs a Jacobian for its stiffness
        flows = not (self.least_squares or isinstance(system, ConservedSystem))
        if flows and isinstance(method, RootTraits):
            method = method.with_flow(lambda start: self._relaxed(problem, start, counted))
        record = method.solve(problem, x)
        record = replace(record, n_fun=record.n_fun + counted[0])
        if conserved:
            check_really_conserved(system, torch.where((record.status == 0).unsqueeze(-1), record.x, x), inputs, "the solution")
        if self.least_squares and bool(problem.bound(record.x).any()):
            choice.no_derivatives = (
                "the minimum lies at a bound, and derivatives of the minimiser there are not supported: leave bounds out, or minimise over "
                "the free unknowns alone with the others held at their bounds (args=)"
            )
        return self._explained(record, r, inputs, jacobian) if self.throw else record

    def _problem(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], jacobian: JacobianRule) -> RootProblem:
        def spread(value: Any) -> Any:
            # settings of every row, for every copy under vmap
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[0] != x.shape[0]:
                return value.repeat(x.shape[0] // value.shape[0], 1)
            return value

        return RootProblem(
            residual=r,
            jacobian=lambda at: jacobian(r, at, inputs),
            jvp=lambda at, v: torch.func.jvp(r, (at,), (v,))[1],
            vjp=lambda at, w: torch.func.vjp(r, at)[1](w)[0],
            tol=float(self.tol),
            max_steps=self.max_steps,
            least_squares=self.least_squares,
            linear_solver=self.choice.linear_solver,
            log=self.log,
            callback=self.callback,
            **{name: spread(value) for name, value in self.settings.items()},
        )

    def _relaxed(self, problem: RootProblem, start: Tensor, counted: list[int]) -> Tensor:
        """Where the flow of the residual leads to."""

        def tendency(at: Tensor) -> Tensor:
            counted[0] += 1
            return problem.residual(at)

        found, reached = relax(tendency, problem.jacobian, self.choice.linear_solver, start)  # type: ignore[arg-type]
        self.choice.notes.append(f"time integration to t = {float(reached.max()):.2g} took {counted[0]} evaluations of fun")
        return found

    @staticmethod
    def _explained(record: RootRecord, r: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], jacobian: JacobianRule) -> RootRecord:
        """With a note on what may be behind a failure."""
        if bool((record.status < 0).any()) and wavers(lambda: r(torch.nan_to_num(record.x))):
            record = replace(record, note="; ".join(part for part in (f"The cause: {WAVERS}", record.note) if part))
        singular = record.status == int(RootStatus.SINGULAR)
        if bool(singular.any()):
            row = int(singular.nonzero()[0, 0])
            why = explain(record, jacobian(r, torch.nan_to_num(record.x), inputs), row)
            record = replace(record, note="; ".join(part for part in (record.note, why) if part))
        return record
