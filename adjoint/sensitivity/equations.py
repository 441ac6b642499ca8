"""The equations of a recorded step, by the kind of its method, those in two parts among them; and its adjoint by plain autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrate.newton import jacobian_at, shifted
from ..linalg import Factorization, Matrix, SparseMatrix
from ..methods.family import Pullback, StepCotangents
from ..system.system import System, VmappedSystem
from .asked import vjp
from .problem import Problem, StageAlgebra
from .stages import RecordedStages, StageLinearizer

__all__ = ["AdditiveLinearizer", "RecordedAdditive", "equations", "recorded_adjoint"]

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


def equations(problem: Problem, inputs: Sequence[Tensor], stages: Tensor | None) -> Any:
    """The right-hand side for one recorded step, whose implicit stages (``stages``: their slopes) are differentiable roots."""
    if problem.algebra is None:
        return problem.system.bind(inputs)
    assert stages is not None
    if problem.plan.method.additive:
        return RecordedAdditive(problem.system, inputs, stages, problem.algebra)
    return RecordedStages(problem.system, inputs, stages, problem.algebra)


def recorded_adjoint(
    problem: Problem,
    linearize: StageLinearizer,
    times: Sequence[Tensor],
    h: float | Tensor,
    y: Tensor,
    end_bar: Tensor,
    k_bar: Sequence[Tensor | None],
    time_bars: bool,
) -> StepCotangents:
    """The adjoint of a step by plain autograd through the step itself, for methods that bring none of their own."""
    method = problem.plan.method
    rows = y.shape[0]
    size = h if isinstance(h, Tensor) else torch.full((rows, 1), h, dtype=y.dtype.to_real(), device=y.device)
    with torch.enable_grad():
        start, length = y.detach().requires_grad_(True), size.detach().requires_grad_(time_bars)
        begin = [t.detach() for t in times]
        moved = torch.zeros(rows, dtype=size.dtype, device=y.device, requires_grad=time_bars)
        if time_bars:
            begin = [t + moved + c * (length - length.detach()).squeeze(-1) for t, c in zip(begin, method.nodes, strict=True)]
        f = equations(problem, linearize.inputs, linearize.recorded[linearize.k])
        y1, ks = method.step(f, begin, length, start, f(begin[0], start))
    outputs, bars = [y1], [end_bar]
    for k, bar in zip(ks, k_bar, strict=False):
        if bar is not None:
            outputs.append(k)
            bars.append(bar)
    times_too = (length, moved) if time_bars else ()
    found = vjp(tuple(outputs), (start, *times_too, *linearize.targets), tuple(bars))
    y_bar, *rest = found
    h_bar = t_bar = None
    if time_bars:
        h_bar, t_bar, *rest = rest
        h_bar = None if h_bar is None else h_bar.sum(-1)
    linearize.accumulate(rest)
    linearize.n_fun += len(ks)
    return StepCotangents(torch.zeros_like(y) if y_bar is None else y_bar, t_bar, h_bar, [k.detach() for k in ks])
