"""Telling from the steps of a solve whether it is stiff."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linalg import Matrix, SparseMatrix
from ..methods.auto import AutoSwitch
from .numbers import Decision, Measure

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["Switch", "SwitchWatch", "scaled_norm"]

#: parts of the interval of stability at which steps count as limited by it, and as well inside
_EDGE, _INSIDE = 0.5, 0.4
#: steps that must say so; those that must say the opposite in a row to forget it
_PATIENCE_STIFF, _PATIENCE_NONSTIFF, _FORGET = 15, 5, 6


@dataclass(frozen=True)
class Switch:
    """Hand trajectories over to the other method: with ``stiff`` those that have become stiff, else those that are so no longer."""

    auto: AutoSwitch
    stiff: bool


def scaled_norm(matrix: Matrix, weights: Tensor) -> Tensor:
    """Largest row sum (B,) of ``D^-1 A D`` with ``D = diag(weights)``, a bound of the spectral radius; infinite for operators."""
    if isinstance(matrix, SparseMatrix):
        rows, columns = matrix.indices
        values = matrix.values.abs() * weights[:, columns]
        return (weights.new_zeros(weights.shape).index_add(1, rows, values.expand(weights.shape[0], -1)) / weights).amax(1)
    if isinstance(matrix, Tensor):
        return ((matrix.abs() @ weights.unsqueeze(-1)).squeeze(-1) / weights).amax(1)
    return torch.full_like(weights[:, 0], float("inf"))


class SwitchWatch:
    """Counts, for every trajectory, the steps that speak for the other method."""

    def __init__(self, switch: Switch, plan: Plan, rows: int, device: torch.device) -> None:
        self.switch, self.plan = switch, plan
        self.hits = torch.zeros(rows, dtype=torch.int64, device=device)
        self.misses = torch.zeros_like(self.hits)

    def after_step(
        self, f: Any, accepted: Decision, h: Measure, y: Tensor, stages: Sequence[Tensor], rate: float | Tensor = 0.0
    ) -> Decision | None:
        """Rows ``(B,)``, or whether the one, to be handed over after this step, None if there are none. ``accepted``: those that may be;
        ``rate``: what is known of the size of the Jacobian besides, see `Companion`."""
        if isinstance(accepted, Tensor):
            return self._after_step(f, accepted, h, y, stages, rate)
        if not accepted:
            return None
        every, size, flat = torch.ones_like(self.hits, dtype=torch.bool), torch.full_like(self.hits, h, dtype=torch.float64), (1, -1)
        return self._after_step(f, every, size, y.reshape(flat), [k.reshape(flat) for k in stages], rate) is not None or None

    def _after_step(
        self, f: Any, accepted: Tensor, h: Tensor, y: Tensor, stages: Sequence[Tensor], rate: float | Tensor
    ) -> Tensor | None:
        plan, auto = self.plan, self.switch.auto
        with torch.no_grad():
            y = y.detach()
            # a tolerance of zero means zero where the state is: there no component counts more than the others
            weights = (y.abs() * plan.rtol + plan.atol).clamp(min=torch.finfo(plan.real).tiny ** 0.5)
            if self.switch.stiff:
                rho = auto.jacobian_size(h.to(plan.real).unsqueeze(-1), y, [k.detach() for k in stages], weights).clamp(min=rate)
            else:
                rho = scaled_norm(f.matrix, weights)
            level = rho * h.abs() / auto.interval
        hit = accepted & ((level > _EDGE) if self.switch.stiff else (level < _INSIDE))
        miss = accepted & ~hit
        self.hits = self.hits + hit
        self.misses = torch.where(hit, 0, self.misses + miss)
        forget, patience = (_FORGET, _PATIENCE_STIFF) if self.switch.stiff else (1, _PATIENCE_NONSTIFF)
        self.hits = torch.where(self.misses >= forget, 0, self.hits)
        out = accepted & (self.hits >= patience)
        return out if bool(out.any()) else None
