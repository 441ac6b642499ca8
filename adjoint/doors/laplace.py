"""The Gaussian approximation of a posterior at its mode, and what it says of predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput

__all__ = ["Laplace"]


@dataclass(frozen=True)
class Laplace:
    """Covariance of parameters, ``(m, m)`` in flat order, and of predictions.

    ``covariance`` is the inverse of the Hessian of the negative log posterior at its minimum (Laplace's approximation).
    """

    covariance: Tensor
    _observe: Callable[[Callable[..., Tensor]], tuple[Tensor, Tensor]]

    @classmethod
    def of(cls, hessian: Tensor, dispersion: float, observe: Callable[[Callable[..., Tensor]], tuple[Tensor, Tensor]]) -> Laplace:
        """From a Hessian, ``(m, m)``; raises `InvalidInput` unless it is positive definite."""
        factor, info = torch.linalg.cholesky_ex(hessian)
        if int(info) != 0:
            lowest = float(torch.linalg.eigvalsh(hessian)[0])
            raise InvalidInput(
                f"the Hessian is not positive definite (smallest eigenvalue {lowest:.3g}): p is no minimum, or the data leave a "
                "combination of parameters undetermined"
            )
        return cls(dispersion * torch.cholesky_inverse(factor), observe)

    @property
    def standard_errors(self) -> Tensor:
        """Standard deviations of the parameters, ``(m,)``."""
        return self.covariance.diagonal().sqrt()

    @property
    def correlation(self) -> Tensor:
        """``(m, m)``."""
        d = self.standard_errors
        return self.covariance / d / d.unsqueeze(-1)

    def predict(self, g: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """``g(x, p)`` at the mode, flat, and its covariance ``G C G*`` with ``G = g_x S + g_p``."""
        value, G = self._observe(g)
        return value, G @ self.covariance @ G.T

    def predict_std(self, g: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """``g(x, p)`` at the mode, flat, and its standard deviations, without the whole covariance."""
        value, G = self._observe(g)
        return value, ((G @ self.covariance) * G).sum(-1).clamp(min=0).sqrt()

    def sample(self, mode: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
        """``(n, m)`` draws around ``mode``, ``(m,)``."""
        noise = torch.randn(n, mode.numel(), dtype=mode.dtype, device=mode.device, generator=generator)
        return mode.reshape(-1) + noise @ torch.linalg.cholesky(self.covariance).T
