"""The neural ODE layer: a module whose output is the solution of an ODE that another module defines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..doors.ivp import solve_ivp
from ..doors.solution import Solution
from ..errors import InvalidInput
from ..system.ownership import as_part, owning, untraced

__all__ = ["NeuralODE"]


class NeuralODE(torch.nn.Module):
    """``y' = module(t, y)``, or ``y' = module(y)`` (Chen et al. 2018, Neural ordinary differential equations).

    Parameters
    ----------
    module : nn.Module or callable
        The right-hand side; its output has the shape of its input.
    t_span : pair of floats
        Start and end of the integration.
    t_eval : times or None
        Where the solution is wanted; None gives the end state only.
    time_dependent : bool
        Whether the module is called as ``module(t, y)``.
    **options
        Handed to `adjoint.solve_ivp`: ``method``, ``rtol``, ``atol``, ``gradient``, ``batched``, ``compile``, ...

    Attributes
    ----------
    solution : Solution or None
        The last forward pass, without its graph: ``solution.stats`` counts the work.
    """

    def __init__(
        self,
        module: Callable[..., Any],
        *,
        t_span: tuple[float, float] = (0.0, 1.0),
        t_eval: Any = None,
        time_dependent: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise InvalidInput(f"module must be callable, got a {type(module).__name__}")
        fixed = {"fun", "y0", "args", "quadrature", "events", "dense_output"} & set(options)
        if fixed:
            raise InvalidInput(f"NeuralODE takes no {', '.join(sorted(fixed))}: call adjoint.solve_ivp instead")
        self.module: Any = module
        self.t_span, self.t_eval, self.time_dependent, self.options = t_span, t_eval, time_dependent, options
        self.solution: Solution | None = None

    def _rate(self, t: torch.Tensor, y: Any) -> Any:
        return self.module(t, y) if self.time_dependent else self.module(y)

    @untraced
    @owning
    def forward(self, y0: Any, t_eval: Any = None, t_span: Any = None) -> Any:
        """The state at the end, ``y0``'s shape; or at ``t_eval``, ``(T, *y0.shape)``. Arguments given here override those of the layer."""
        times = self.t_eval if t_eval is None else t_eval
        # a bound method: the solve finds this layer's parameters through it
        solution = as_part(solve_ivp, self._rate, self.t_span if t_span is None else t_span, y0, t_eval=times, **self.options)
        self.solution = Solution(solution.t.detach(), None, solution.status, solution.stats)
        if times is not None:
            return solution.y
        return torch.utils._pytree.tree_map(lambda y: y[-1], solution.y)

    @property
    def stats(self) -> Any:
        """Counts of the last forward pass, None before it."""
        return None if self.solution is None else self.solution.stats

    def extra_repr(self) -> str:
        """Span, times and solver options."""
        parts = [f"t_span={self.t_span}"]
        if self.t_eval is not None:
            parts.append(f"t_eval={len(self.t_eval)} times" if not isinstance(self.t_eval, str) else f"t_eval={self.t_eval!r}")
        return ", ".join(parts + [f"{k}={v!r}" for k, v in self.options.items()])
