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

__all__ = ["NONSTIFF", "STIFF", "Rule", "Switch", "SwitchWatch", "least_weight", "scaled_norm"]


@dataclass(frozen=True)
class Rule:
    """The part of the interval of stability at which a step speaks for the other method, how many of them it takes, and how many others in
    a row make them forgotten."""

    level: float
    patience: int
    forget: int


#: steps that are limited by stability, and steps that are well inside of the interval
STIFF, NONSTIFF = Rule(0.5, 15, 6), Rule(0.4, 5, 1)


def least_weight(real: torch.dtype) -> float:
    """A tolerance of zero means zero where the state is: there no component counts more than the others."""
    return torch.finfo(real).tiny ** 0.5


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
            weights = (y.abs() * plan.rtol + plan.atol).clamp(min=least_weight(plan.real))
            if self.switch.stiff:
                rho = auto.jacobian_size(h.to(plan.real).unsqueeze(-1), y, [k.detach() for k in stages], weights).clamp(min=rate)
            else:
                rho = scaled_norm(f.matrix, weights)
            level = rho * h.abs() / auto.interval
        rule = STIFF if self.switch.stiff else NONSTIFF
        hit = accepted & ((level > rule.level) if self.switch.stiff else (level < rule.level))
        miss = accepted & ~hit
        self.hits = self.hits + hit
        self.misses = torch.where(hit, 0, self.misses + miss)
        self.hits = torch.where(self.misses >= rule.forget, 0, self.hits)
        out = accepted & (self.hits >= rule.patience)
        return out if bool(out.any()) else None
