"""What the PyTorch peers share: tensors from a case, synchronisation, timing targets, memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..measure import torch_peak_bytes
from ..workloads import Case, loss
from . import Stats

__all__ = ["RhsModule", "TorchOps", "TorchRunner"]


class TorchOps:
    """`Ops` of PyTorch."""

    columns = staticmethod(lambda x: x.unbind(-1))
    stack = staticmethod(lambda xs: torch.stack(xs, -1))
    linear = staticmethod(F.linear)
    tanh = staticmethod(torch.tanh)
    softplus = staticmethod(F.softplus)


class RhsModule(nn.Module):
    """``f(t, y)`` with the case's parameters as module parameters, for peers that find them only there."""

    def __init__(self, case: Case, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.rhs = case.rhs
        self.params = nn.ParameterList(p.detach().clone() for p in params)
        self.leaves = tuple(self.params)  # ParameterList is slow to iterate: look it up once

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rhs(TorchOps, t, y, *self.leaves)


class TorchRunner(ABC):
    """A runner whose ``solve`` returns a tensor (T, *y0.shape) attached to ``self.params``."""

    def __init__(self, peer: str, variant: str, case: Case, device: str) -> None:
        self.peer, self.name, self.case, self.device = peer, f"{peer} {variant}", case, device
        self.y0 = torch.tensor(case.y0, device=device)
        self.t_eval = torch.tensor(case.t_eval, device=device)
        self.params: Sequence[Tensor] = [torch.tensor(p, device=device, requires_grad=True) for p in case.params]
        self.target = None if case.target is None else torch.tensor(case.target, device=device)

    @abstractmethod
    def solve(self) -> Tensor: ...

    def fun(self, t: Tensor, y: Tensor, *params: Tensor) -> Tensor:
        return self.case.rhs(TorchOps, t, y, *params)

    def _sync(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def forward(self) -> Tensor:
        with torch.no_grad():
            ys = self.solve()
        self._sync()
        return ys

    def gradient(self) -> Sequence[Tensor]:
        grads = torch.autograd.grad(loss(self.solve(), self.target), list(self.params))
        self._sync()
        return grads

    def values(self) -> np.ndarray:
        return self.forward().cpu().numpy()

    def gradients(self) -> list[np.ndarray]:
        return [g.cpu().numpy() for g in self.gradient()]

    def stats(self) -> Stats:
        return Stats()

    def memory(self, what: str) -> tuple[float, str] | None:
        return torch_peak_bytes(self.gradient if what == "gradient" else self.forward, self.device)
