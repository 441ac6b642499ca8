"""Rosenbrock methods: one step, its error and its dense output, as functions of flat tensors and of a solver of linear systems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .dirk import StageEquations
from .runge_kutta import combine, update, weighted_sum
from .tableaux_rosenbrock import RosenbrockTableau

__all__ = ["Rosenbrock"]


@dataclass(frozen=True, eq=False)
class Rosenbrock:
    """A Rosenbrock method, defined by its tableau; see `ExplicitRungeKutta` for the meaning of every function.

    A step takes one Jacobian, one matrix and a fixed number of linear solves: there is no iteration, so nothing that fails to converge
    and no tolerance but that of the step. The Jacobian is part of the formula (with another one the order is lost), and so it is
    differentiated with everything else.
    """

    tableau: RosenbrockTableau
    implicit: bool = field(default=True, init=False)
    _tensors: dict[tuple[torch.dtype, torch.device], Tensor] = field(init=False, repr=False, default_factory=dict)

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        return True

    @property
    def error_order(self) -> int:
        """Order that the controller works with."""
        return min(self.tableau.order, self.tableau.error_order)

    @property
    def nodes(self) -> tuple[float, ...]:
        return self.tableau.c

    @property
    def n_stages(self) -> int:
        return len(self.tableau.b)

    @property
    def end_index(self) -> None:
        """Stages are no slopes."""
        return

    @property
    def error_uses_end(self) -> bool:
        return False

    @property
    def evaluations(self) -> int:
        """Evaluations of ``fun`` in an attempted step whose first one is known; ``f_t`` counts as one."""
        return len(set(self.tableau.same_as))

    @property
    def extra_evaluations(self) -> int:
        return 0

    def step(self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """One step from ``y``, where ``f(t, y)`` is ``k1``: the new state and all stages, see `RosenbrockTableau`."""
        tab = self.tableau
        start = times[0]
        f.begin(start, y)
        slope = f.time_slope(start, y)
        values: list[Tensor] = []
        ks: list[Tensor] = []
        for i, (row, coupling) in enumerate(zip(tab.a, tab.coupling, strict=True)):
            same = tab.same_as[i]
            if i == 0:
                values.append(k1)
            else:
                values.append(values[same] if same < i else f(times[i], combine(y, h, row, ks)))
            side = weighted_sum([1.0, *coupling], [values[i], *ks])
            assert side is not None
            if tab.d[i]:
                side = side + slope * (h * tab.d[i])
            ks.append(f.solve(start, y, h * tab.gamma, side * tab.gamma))
        return update(y, h, tab.b, ks), ks

    def error(self, h: float | Tensor, ks: Sequence[Tensor]) -> Tensor:
        """The embedded error estimate ``h sum_i (b_i - b_hat_i) K_i``."""
        total = weighted_sum(self.tableau.error, ks)
        assert total is not None
        return total * h

    def dense_stages(
        self, f: StageEquations, times: Sequence[Tensor], h: float | Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor | None = None
    ) -> list[Tensor]:
        """All stages that the dense output weighs: those of the step."""
        return list(ks)

    def dense_weights(self, theta: Tensor) -> Tensor:
        """``b_i(theta)``: shape ``(*theta.shape, S)``."""
        matrix = self._dense(theta.dtype, theta.device)
        powers = theta.unsqueeze(-1) ** torch.arange(1, matrix.shape[1] + 1, device=theta.device, dtype=theta.dtype)
        return powers @ matrix.T

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """``db_i/dtheta``, shaped as `dense_weights`."""
        matrix = self._dense(theta.dtype, theta.device)
        exponent = torch.arange(matrix.shape[1], device=theta.device, dtype=theta.dtype)
        return (theta.unsqueeze(-1) ** exponent * (exponent + 1)) @ matrix.T

    def _dense(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (dtype, device)
        if key not in self._tensors:
            matrix = torch.tensor(self.tableau.dense, dtype=dtype, device=device)
            if torch._C._functorch.is_functorch_wrapped_tensor(matrix) or matrix.is_inference():
                # made inside of a transform, or in inference mode, it must not outlive it
                return matrix
            self._tensors[key] = matrix
        return self._tensors[key]
