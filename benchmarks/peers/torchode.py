"""torchode: every batch row is a trajectory of its own, with its own step size."""

from __future__ import annotations

import torch
from torch import Tensor

from ..workloads import Case
from . import Stats
from .torch_common import RhsModule, TorchRunner

PACKAGES = ("torchode",)


class TorchodeRunner(TorchRunner):
    """``AutoDiffAdjoint`` (backprop, own step sizes) or ``JointBacksolveAdjoint`` (continuous adjoint, one step size)."""

    def __init__(self, variant: str, case: Case, device: str) -> None:
        super().__init__("torchode", variant, case, device)
        import torchode as to

        func = RhsModule(case, self.params)
        self.params = func.leaves
        term = to.ODETerm(func)
        controller = to.IntegralController(atol=case.atol, rtol=case.rtol, term=term)
        kind = to.AutoDiffAdjoint if variant == "autodiff" else to.JointBacksolveAdjoint
        method = to.Dopri5(term=term)
        self.solver = (kind(method, controller) if variant == "autodiff" else kind(term, method, controller)).to(device)
        times = self.t_eval.repeat(case.size, 1)
        self.problem = to.InitialValueProblem(y0=self.y0, t_eval=times)

    def solve(self) -> Tensor:
        return self.solver.solve(self.problem).ys.transpose(0, 1)

    def stats(self) -> Stats:
        with torch.no_grad():
            counts = {k: v.cpu().numpy() for k, v in self.solver.solve(self.problem).stats.items() if isinstance(v, Tensor)}
        steps, accepted = counts["n_steps"], counts["n_accepted"]
        return Stats(steps, accepted, steps - accepted, counts["n_f_evals"])


def runners(case: Case, device: str) -> list[TorchRunner]:
    """Backprop through the solver, and the joint continuous adjoint (its documented compilation compiles nothing: eager)."""
    return [TorchodeRunner(variant, case, device) for variant in ("autodiff", "joint backsolve")]
