"""Real parameters for positive, bounded and free quantities, with priors: what optimisers and Hessians like best.

The maps and densities are those of `torch.distributions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, Distribution, Normal
from torch.distributions.transforms import AffineTransform, ExpTransform, SigmoidTransform, Transform, identity_transform

from ..errors import InvalidInput

__all__ = ["Parameter", "ParameterSpace"]


def _map_of(lower: float | None, upper: float | None) -> Transform:
    """From the real line to the interval: exponential for one finite end, logistic for two."""
    if lower is None and upper is None:
        return identity_transform
    if lower is not None and upper is not None:
        return ComposeTransform([SigmoidTransform(), AffineTransform(lower, upper - lower)])
    if upper is None:
        return ExpTransform() if lower == 0 else ComposeTransform([ExpTransform(), AffineTransform(lower, 1.0)])  # pyright: ignore[reportArgumentType]
    return ComposeTransform([ExpTransform(), AffineTransform(upper, -1.0)])


@dataclass(frozen=True)
class Parameter:
    """One named quantity.

    Parameters
    ----------
    initial : number or tensor
        A value within the bounds; its shape is that of the quantity.
    lower, upper : number or None
        Open bounds: ``lower=0`` alone is optimised as a logarithm, both as a (scaled) logit.
    prior : Distribution or None
        Density of the quantity itself, or with ``prior_on="real"`` of its real image (so ``Normal`` there is a log-normal or
        logit-normal prior). The density on the quantity is taken as it stands: its mode, not that of the image, is the estimate.
    """

    initial: float | Tensor
    lower: float | None = None
    upper: float | None = None
    prior: Distribution | None = None
    prior_on: str = "quantity"

    def __post_init__(self) -> None:
        value = torch.as_tensor(self.initial)
        below = self.lower is not None and bool((value <= self.lower).any())
        above = self.upper is not None and bool((value >= self.upper).any())
        if self.lower is not None and self.upper is not None and not self.lower < self.upper:
            raise InvalidInput(f"lower must be less than upper, got {self.lower!r} and {self.upper!r}")
        if below or above or not bool(torch.isfinite(value).all()):
            raise InvalidInput(f"initial must lie strictly between {self.lower} and {self.upper}, got {self.initial!r}")
        if self.prior is not None and not isinstance(self.prior, Distribution):
            raise InvalidInput(f"prior must be a torch.distributions.Distribution, got a {type(self.prior).__name__}")
        if self.prior_on not in ("quantity", "real"):
            raise InvalidInput(f'prior_on must be "quantity" or "real", got {self.prior_on!r}')

    @property
    def transform(self) -> Transform:
        """From the real line to the quantity."""
        return _map_of(self.lower, self.upper)

    @classmethod
    def lognormal(cls, mean: float, relative_error: float) -> Parameter:
        """A positive quantity with a prior that is normal in its logarithm: ``relative_error`` is the standard deviation there."""
        center = torch.log(torch.tensor(float(mean)))
        return cls(mean, lower=0.0, prior=Normal(center, float(relative_error)), prior_on="real")


class ParameterSpace:
    """Named parameters as one real vector ``q``.

    >>> space = ParameterSpace({"D": Parameter(0.05, lower=0.0), "K": Parameter(0.3, lower=0.0, upper=1.0)})
    >>> q0 = space.initial()                  # (m,) real
    >>> space.quantities(q0)["D"]             # differentiable in q
    >>> f, F = space.wrap(f), space.wrap(F)   # f(x, {"D": ..., "K": ...}) becomes f(x, q)
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        for name, parameter in parameters.items():
            if not isinstance(parameter, Parameter):
                raise InvalidInput(f"{name} must be a Parameter, got a {type(parameter).__name__}")
        self.parameters = dict(parameters)
        self.shapes = {name: torch.as_tensor(p.initial).shape for name, p in self.parameters.items()}

    @property
    def size(self) -> int:
        """Number of real parameters."""
        return sum(shape.numel() for shape in self.shapes.values())

    def initial(self, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
        """The initial values on the real line, ``(m,)``."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return self.real({name: torch.as_tensor(p.initial, dtype=dtype, device=device) for name, p in self.parameters.items()})

    def real(self, quantities: Mapping[str, Tensor]) -> Tensor:
        """Quantities to the real vector, ``(m,)``."""
        if set(quantities) != set(self.parameters):
            raise InvalidInput(f"expected the quantities {sorted(self.parameters)}, got {sorted(quantities)}")
        return torch.cat([p.transform.inv(quantities[name]).reshape(-1) for name, p in self.parameters.items()])  # pyright: ignore[reportOptionalMemberAccess]

    def quantities(self, q: Tensor) -> dict[str, Tensor]:
        """The real vector to named quantities; differentiable."""
        if q.shape != (self.size,):
            raise InvalidInput(f"q must have shape ({self.size},), got {tuple(q.shape)}")
        pieces = q.split([shape.numel() for shape in self.shapes.values()])
        return {  # pyright: ignore[reportReturnType]
            name: p.transform(piece.reshape(self.shapes[name])) for (name, p), piece in zip(self.parameters.items(), pieces, strict=True)
        }

    def negative_log_prior(self, q: Tensor) -> Tensor:
        """Minus the sum of the log densities of the priors, 0-d; differentiable. Zero where there are none."""
        values = self.quantities(q)
        total = q.new_zeros(())
        at = 0
        for name, p in self.parameters.items():
            count = self.shapes[name].numel()
            if p.prior is not None:
                where = values[name] if p.prior_on == "quantity" else q[at : at + count].reshape(self.shapes[name])
                total = total - p.prior.log_prob(where).sum()
            at += count
        return total

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(x, quantities)`` as a function of ``(x, q)``."""
        return lambda x, q: function(x, self.quantities(q))

    def natural_covariance(self, q: Tensor, covariance: Tensor) -> Tensor:
        """Covariance of the flat quantities from that of ``q``, to first order."""
        J = torch.func.jacrev(lambda r: torch.cat([v.reshape(-1) for v in self.quantities(r).values()]))(q)
        return J @ covariance @ J.T
