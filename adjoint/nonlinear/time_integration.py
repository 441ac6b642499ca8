"""Roots as the end of a flow: an integrator brings the state near, Newton's method does the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from .newton import Newton
from .protocol import RootProblem, RootRecord, RootTraits

__all__ = ["TimeIntegration"]


@dataclass(frozen=True)
class TimeIntegration(RootTraits):
    """Integrate ``x' = residual(x)`` until ``x`` moves no more, then Newton's method.

    The residual must be the tendency of a flow whose steady state is stable. ``integrate(x) -> x`` on ``(B, n)`` is given by the front
    door; it lies above root finding.
    """

    integrate: Callable[[Tensor], Tensor] | None = None

    def with_flow(self, integrate: Callable[[Tensor], Tensor]) -> Any:
        """See `RootTraits.with_flow`."""
        return self if self.integrate is not None else replace(self, integrate=integrate)

    @torch.no_grad()
    def solve(self, problem: RootProblem, x0: Tensor) -> RootRecord:
        """See `RootMethod.solve`."""
        if self.integrate is None:
            raise InvalidInput("TimeIntegration needs integrate=: solve_root(..., method='time_integration') gives it")
        record = Newton().solve(problem, self.integrate(x0))
        notes = ("time integration, then Newton's method", record.note)
        return replace(record, note="; ".join(part for part in notes if part))
