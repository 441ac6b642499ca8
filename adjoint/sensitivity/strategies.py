"""The gradient strategies of this room, as small objects that users choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .node import SolveNode
from .problem import Outputs, Problem
from .replay import replay

__all__ = ["Backprop", "DiscreteAdjoint"]


@dataclass(frozen=True)
class DiscreteAdjoint:
    """The exact derivative of the computed solution, by the adjoint of each step (THEORY section 1; Hager 2000, Sandu 2006).

    Memory: one state per step, whatever ``fun`` allocates. Step sizes are held fixed. Every order of derivative and every
    ``torch.func`` transform is available; derivatives of derivatives record the backward sweep.
    """

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))


@dataclass(frozen=True)
class Backprop:
    """Plain automatic differentiation through the accepted steps (step sizes held fixed).

    Memory: everything that ``fun`` saves, for every stage of every step. The steps are found by a first solve without derivatives,
    then taken again with them, so ``fun`` is evaluated about twice as often as in a plain solve.
    """

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        grid = Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))
        return replay(problem.system.bind(inputs), problem.plan, grid, anchors, t_eval, y0)
