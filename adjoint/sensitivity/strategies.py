"""The gradient strategies of this room, as small objects that users choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..capture import functorch_active
from ..integrate import integrate
from .node import SolveNode
from .problem import Outputs, Problem
from .replay import replay

__all__ = ["Backprop", "DiscreteAdjoint"]


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact derivative of the computed solution, by the adjoint of each step (docs/theory.md, section 1; Hager 2000, Sandu 2006).

    Memory: one state per step, whatever ``fun`` allocates. Step sizes are held fixed. Every order of derivative and every
    ``torch.func`` transform is available; derivatives of derivatives record the backward sweep.
    """

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))


@dataclass(frozen=True)
class Backprop:
    """Plain automatic differentiation through the accepted steps (step sizes held fixed).

    Memory: everything that ``fun`` saves, for every stage of every step. For one trajectory and reverse mode the steps are recorded as
    they are taken. For batches, for derivatives in times and under transforms they are found by a first solve without derivatives, then
    taken again with them, so ``fun`` is evaluated about twice as often as in a plain solve.
    """

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        if _recordable(problem, anchors, t_eval, y0, inputs):
            system = problem.system
            with torch.enable_grad():
                record = integrate(system.bind(inputs), problem.plan, anchors, t_eval, y0, False, inputs, system.natural_shape)
            problem.report(record)
            return Outputs(*(getattr(record, name) for name in Outputs._fields))
        grid = Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))
        return replay(problem.system.bind(inputs), problem.plan, grid, anchors, t_eval, y0)


def _recordable(problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether plain autograd can record the loop itself: its times are floats, so they must not need derivatives."""
    times = [anchors] if t_eval is None else [anchors, t_eval]
    plain = not functorch_active() and forward_ad._current_level < 0 and torch.is_grad_enabled()
    wanted = any(x.requires_grad for x in (y0, *inputs)) and not any(x.requires_grad for x in times)
    return plain and wanted and not problem.batched and problem.plan.compile is None
