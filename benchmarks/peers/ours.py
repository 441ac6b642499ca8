"""`adjoint` itself. Ensembles of several trajectories run batched: each with its own step size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..workloads import Case
from . import Stats
from .torch_common import TorchRunner

PACKAGES = ("adjoint",)


class OursRunner(TorchRunner):
    """``adjoint.solve_ivp`` with one gradient strategy, eager or compiled."""

    def __init__(self, variant: str, case: Case, device: str, gradient: Any, compiled: bool) -> None:
        super().__init__("ours", variant, case, device)
        import adjoint

        self.solve_ivp = adjoint.solve_ivp
        self.span = (float(case.t_eval[0]), float(case.t_eval[-1]))
        self.keywords: dict[str, Any] = {
            "t_eval": self.t_eval,
            "method": "dopri5",
            "rtol": case.rtol,
            "atol": case.atol,
            "batched": case.ensemble and case.size > 1,
            "gradient": gradient,
            "compile": compiled,
        }

    def solution(self) -> Any:
        return self.solve_ivp(self.fun, self.span, self.y0, args=tuple(self.params), **self.keywords)

    def solve(self) -> Tensor:
        return self.solution().y

    def stats(self) -> Stats:
        with torch.no_grad():
            stats = self.solution().stats

        def count(name: str) -> np.ndarray:
            return np.atleast_1d(torch.as_tensor(getattr(stats, name)).cpu().numpy())

        return Stats(count("n_steps"), count("n_accepted"), count("n_rejected"), count("n_fun"))


def runners(case: Case, device: str) -> list[TorchRunner]:
    """The discrete adjoint, eager and compiled, and plain backprop."""
    import adjoint

    return [
        OursRunner("discrete", case, device, adjoint.DiscreteAdjoint(), False),
        OursRunner("backprop", case, device, adjoint.Backprop(), False),
        OursRunner("discrete compiled", case, device, adjoint.DiscreteAdjoint(), True),
    ]
