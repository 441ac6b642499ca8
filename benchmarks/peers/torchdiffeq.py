"""torchdiffeq: one system with one step size for the whole batch, as its users run it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..workloads import Case
from . import Stats
from .torch_common import RhsModule, TorchRunner

PACKAGES = ("torchdiffeq",)


class _Counter(torch.nn.Module):
    """The right-hand side, counting its calls and the solver's decisions."""

    def __init__(self, func: RhsModule) -> None:
        super().__init__()
        self.func, self.calls, self.accepted, self.rejected = func, 0, 0, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.func(t, y)

    def callback_accept_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t0: Tensor, y0: Tensor, dt: Tensor) -> None:
        self.rejected += 1


class TorchdiffeqRunner(TorchRunner):
    """``odeint`` (backprop) or ``odeint_adjoint`` (continuous adjoint)."""

    def __init__(self, variant: str, case: Case, device: str, method: str = "dopri5", options: dict | None = None) -> None:
        super().__init__("torchdiffeq", variant, case, device)
        import torchdiffeq

        self.func = RhsModule(case, self.params)
        self.params = self.func.leaves
        self.odeint = torchdiffeq.odeint if variant == "backprop" else torchdiffeq.odeint_adjoint
        self.keywords = {"rtol": case.rtol, "atol": case.atol, "method": method, "options": options}

    def solve(self) -> Tensor:
        return self.odeint(self.func, self.y0, self.t_eval, **self.keywords)

    def stats(self) -> Stats:
        import torchdiffeq

        counter = _Counter(self.func)
        with torch.no_grad():
            torchdiffeq.odeint(counter, self.y0, self.t_eval, **self.keywords)
        counts = [np.array([n]) for n in (counter.accepted + counter.rejected, counter.accepted, counter.rejected, counter.calls)]
        return Stats(*counts)


def runners(case: Case, device: str) -> list[TorchRunner]:
    """Backprop through the solver, and the continuous adjoint."""
    return [TorchdiffeqRunner(variant, case, device) for variant in ("backprop", "adjoint")]
