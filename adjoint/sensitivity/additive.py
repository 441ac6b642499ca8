"""Implicit-explicit steps in derivatives: recorded stages and linearisations of a right-hand side in two parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..integrate.matrices import jacobian_at, shifted
from ..linalg import Factorization, Matrix, SparseMatrix
from ..methods.family import Pullback
from ..system.system import System, VmappedSystem
from .problem import Problem, StageAlgebra
from .stages import RecordedStages, StageLinearizer

__all__ = ["AdditiveLinearizer", "RecordedAdditive"]


class RecordedAdditive(RecordedStages):
    """`StageEquations` for one recorded step, whose implicit stages are differentiable roots to any order."""

    def __init__(self, system: System | VmappedSystem, inputs: Sequence[Tensor], stages: Tensor, algebra: StageAlgebra) -> None:
        explicit, implicit = system.parts
        super().__init__(implicit, inputs, stages, algebra)
        self.explicit = explicit.bind(inputs)

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """Nothing: the step asks for both parts of its first stage itself."""
        return torch.zeros_like(y)

    def both(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See `StageEquations.both`."""
        return self.explicit(t, y), self.f(t, y)


class AdditiveLinearizer(StageLinearizer):
    """See `StageLinearize`; a `StageLinearizer` of the implicit part."""

    def __init__(self, problem: Problem, stages: Tensor, inputs: Sequence[Tensor], wants: Sequence[bool], time: bool) -> None:
        explicit, implicit = problem.system.parts
        super().__init__(problem, stages, implicit.bind(inputs), inputs, wants, time)
        self._explicit = explicit.bind(inputs)
        self._check_explicit = False
        self._last: tuple[Matrix, Factorization] | None = None

    def begin_step(self, k: int, times: Sequence[Tensor], h: float | Tensor) -> None:
        """The next sweep is that of step ``k``; the first evaluation of each part in it is looked at."""
        super().begin_step(k, times, h)
        self._check_explicit = self.check_next

    def explicit(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        """The explicit part with its pullback."""
        kept = self.f, self.check_next
        self.f, self.check_next = self._explicit, self._check_explicit
        try:
            return super().__call__(t, y)
        finally:
            self._check_explicit = self.check_next
            self.f, self.check_next = kept

    def solve_adjoint(self, index: int, point: Tensor, w: Tensor) -> Tensor:
        """See `StageLinearizer.solve_adjoint`. An implicit part that is linear has one matrix in all stages: it is factorised once."""
        hd, time = self.h * self.diagonal[index], self.times[index]
        with torch.no_grad():
            matrix = shifted(jacobian_at(self.jacobian, self.f, time, point), hd)
            if self._last is None or not _same(self._last[0], matrix):
                self._last = matrix, self.algebra.linear_solver.factor(matrix, self.log)
            return self._last[1].solve(w, transposed=True, conjugated=True)


def _same(a: Matrix, b: Matrix) -> bool:
    """Whether two matrices are known to be equal."""
    if isinstance(a, SparseMatrix) and isinstance(b, SparseMatrix):
        return torch.equal(a.values, b.values) and torch.equal(a.indices, b.indices)
    return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
