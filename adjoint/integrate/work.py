"""Counts of the work in implicit stages."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..linalg import Log

__all__ = ["StageWork"]


@dataclass
class StageWork:
    """Counts for each trajectory, ``(B,)``."""

    n_fun: Tensor
    n_jac: Tensor
    n_factorizations: Tensor
    n_solves: Tensor
    n_newton: Tensor
    log: Log = field(default_factory=Log)

    @classmethod
    def zero(cls, rows: int, device: torch.device) -> StageWork:
        """Nothing done yet."""
        fun, jac, factorizations, solves, newton = (torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(5))
        return cls(fun, jac, factorizations, solves, newton)
