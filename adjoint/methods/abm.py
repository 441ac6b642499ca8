"""Adams-Bashforth-Moulton predictor and corrector with variable orders and steps: the coefficients of one step.

The history of a trajectory is its state and the modified divided differences of its slopes at the times that were really stepped on,
``Phi_j(n) = prod_{i < j} (t_n - t_{n - 1 - i}) f[t_n, ..., t_{n - j}]`` (Krogh 1969; Shampine & Gordon, Computer Solution of Ordinary
Differential Equations, 1975; Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section III.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import InvalidInput
from .family import Method

__all__ = ["Adams", "Weights", "projection", "step_weights", "stretching", "uniform_errors"]

#: beyond this the formulas have next to no stability, and their differences are rounding errors
_MOST = 12


@cache
def uniform_errors(most: int) -> tuple[float, ...]:
    """``|gamma*_j|``, j = 0 ... most + 1: the error constants on an even grid (Hairer, Norsett & Wanner I, section III.1)."""
    out = [1.0]
    for j in range(1, most + 2):
        out.append(-sum(g / (j + 1 - i) for i, g in enumerate(out)))
    return tuple(abs(g) for g in out)


@cache
def projection(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Gauss's nodes on [0, 1] and the matrix from values there to coefficients in Legendre polynomials, exact below degree ``size``."""
    x, w = np.polynomial.legendre.leggauss(size)
    values = np.polynomial.legendre.legvander(x, size - 1)
    return (x + 1) / 2, (values * w[:, None] * (np.arange(size) + 0.5)).T


@cache
def stretching(size: int) -> np.ndarray:
    """``theta d/dtheta`` for coefficients in Legendre polynomials on [0, 1]: a matrix."""
    legendre, out = np.polynomial.legendre, np.zeros((size, size))
    for j, row in enumerate(np.eye(size)):
        slope = legendre.legder(row)
        column = legendre.legadd(legendre.legmulx(slope), slope)
        out[: len(column), j] = column
    return out


class Weights(NamedTuple):
    """What the step sizes make of a step. ``Q`` is the highest order; masks are by order, differences come first: ``(Q + 1, B, 1)``.

    growth : ``beta_j``, by which ``Phi_j`` changes as the next time takes the place of the present one
    below, at : ``j < q`` and ``j = q``, as numbers
    basis : (B, Q + 1, Q + 1); column j: ``prod_{i < j} (s - c_i) / (1 - c_i)`` in Legendre polynomials on [0, 1]
    uniform : ``j! / prod_{i < j} (1 - c_i)``: takes ``Phi_j`` to the difference of the same polynomial on an even grid
    """

    growth: Tensor
    below: Tensor
    at: Tensor
    basis: Tensor
    uniform: Tensor

    @property
    def integrals(self) -> Tensor:
        """``g_j``, the integrals over the step of the polynomials of `basis`: ``(Q + 1, B, 1)``."""
        return self.basis[:, 0].t().unsqueeze(-1)


def step_weights(nodes: Tensor, order: Tensor) -> Weights:
    """The weights of a step of ``order`` (B,), whose present and past times lie at ``nodes`` (B, Q + 1) in steps from the present one.

    All but the first, zero, are negative.
    """
    size = nodes.shape[-1]
    points, matrix = (torch.as_tensor(x, dtype=nodes.dtype, device=nodes.device) for x in projection(size))
    place = torch.arange(size, device=nodes.device)
    ahead = 1 - nodes[:, :-1]
    one = torch.ones_like(nodes[:, :1])
    q = order.unsqueeze(-1)
    # what lies behind the history in use is no number to rely on
    growth = torch.where(place <= q, torch.cat([one, (ahead / -nodes[:, 1:]).cumprod(-1)], -1), 0.0)
    values = (points.unsqueeze(-1) - nodes[:, None, :-1]) / ahead.unsqueeze(1)
    values = torch.cat([torch.ones_like(values[..., :1]), values.cumprod(-1)], -1)
    uniform = torch.cat([one, (torch.arange(1, size, device=nodes.device) / ahead).cumprod(-1)], -1)
    below, at = ((place < q).to(nodes.dtype), (place == q).to(nodes.dtype))
    growth, below, at, uniform = (x.t().unsqueeze(-1) for x in (growth, below, at, uniform))
    return Weights(growth, below, at, matrix @ values, uniform)


@dataclass(frozen=True, eq=False)
class Adams(Method):
    """Adams-Bashforth-Moulton methods of orders 1 to ``max_order``, in the form "predict, evaluate, correct, evaluate".

    The prediction has the order ``q`` of the step, the correction ``q + 1``. The dense output is the polynomial of the correction:
    ``y(t) = y + h sum_j b_j(theta) k_j`` with the coefficients ``k_j`` of its slope in Legendre polynomials, of order ``q + 1`` too. Behind
    them comes the correction of the slope, which weighs nothing.

    Parameters
    ----------
    max_order : int
        Highest order of the prediction, 1 to 12.

    Raises
    ------
    InvalidInput : for any other ``max_order``
    """

    max_order: int = _MOST
    name: str = "abm"
    implicit: bool = field(default=False, init=False)
    multistep: bool = field(default=True, init=False)
    adaptive: bool = field(default=True, init=False)
    error_order: int = field(default=1, init=False)
    end_index: None = field(default=None, init=False)
    error_uses_end: bool = field(default=False, init=False)
    evaluations: int = field(default=2, init=False)
    extra_evaluations: int = field(default=0, init=False)
    source: str = "Shampine & Gordon, Computer Solution of Ordinary Differential Equations (1975)"

    def __post_init__(self) -> None:
        if not isinstance(self.max_order, int) or isinstance(self.max_order, bool) or not 1 <= self.max_order <= _MOST:
            raise InvalidInput(f"max_order must be an integer between 1 and {_MOST}, got {self.max_order!r}")

    @property
    def order(self) -> int:
        """That of the solution at the highest order of the prediction."""
        return self.max_order + 1

    @property
    def n_stages(self) -> int:
        return self.max_order + 2

    @property
    def nodes(self) -> tuple[float, ...]:
        """Of no meaning here: one for each stage."""
        return (0.0,) * self.n_stages

    def dense_weights(self, theta: Tensor) -> Tensor:
        """``b_j(theta)``, the integrals of Legendre's polynomials from 0: ``(*theta.shape, max_order + 2)``."""
        values = _legendre(2 * theta - 1, self.max_order + 2)
        parts = [theta]
        parts += [(values[j + 1] - values[j - 1]) / (2 * (2 * j + 1)) for j in range(1, self.max_order + 1)]
        return torch.stack([*parts, torch.zeros_like(theta)], -1)

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """``db_j/dtheta``, shaped as `dense_weights`."""
        return torch.stack([*_legendre(2 * theta - 1, self.max_order + 1), torch.zeros_like(theta)], -1)


def _legendre(x: Tensor, count: int) -> list[Tensor]:
    """The first ``count`` Legendre polynomials, two at least, by their recurrence."""
    out = [torch.ones_like(x), x]
    for j in range(1, count - 1):
        out.append(((2 * j + 1) * x * out[j] - j * out[j - 1]) / (j + 1))
    return out
