"""Backward differentiation formulas of orders 1 to 5 with variable steps: coefficients and small matrices.

The history of a trajectory is its state and backward differences at equal distances ``h``, ``D = (y_n, d y_n, d^2 y_n, ...)``, as in the
quasi-constant step form of Shampine & Reichelt (The MATLAB ODE suite, 1997, section 2), which modified differences bring to another ``h``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from .family import Traits

__all__ = ["BDF", "MAX_ORDER", "Bdf", "coefficients", "rescaling", "rescaling_alone", "rescaling_slopes"]

MAX_ORDER = 5
#: of the numerical differentiation formulas (Klopfenstein 1971; Shampine & Reichelt, table 1). At order 1 it is zero here: backward Euler
#: does not depend on the slope at which it starts, so neither does any derivative
_KAPPA = (0.0, 0.0, -1 / 9, -0.0823, -0.0415, 0.0)


def coefficients(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma_j = sum_{i <= j} 1/i``, ``alpha_q = (1 - kappa_q) gamma_q`` and the error constants ``kappa_q gamma_q + 1/(q + 1)``, from
    order 0 on: ``(6,)``, ``(6,)`` and ``(7,)``, the last of them for an estimate at order 6."""
    gamma = [0.0]
    for j in range(1, MAX_ORDER + 1):
        gamma.append(gamma[-1] + 1 / j)
    alpha = [(1 - k) * g for k, g in zip(_KAPPA, gamma, strict=True)]
    error = [k * g + 1 / (q + 1) for q, (k, g) in enumerate(zip(_KAPPA, gamma, strict=True))] + [1 / (MAX_ORDER + 2)]
    return tuple(torch.tensor(x, dtype=dtype, device=device) for x in (gamma, alpha, error))  # type: ignore[return-value]


def rescaling(order: Tensor, factor: Tensor, size: int, differentiable: bool = False) -> Tensor:
    """``(B, size, size)``: the matrix that takes differences at distance ``h`` to those at ``factor h`` of the same polynomial.

    Of the first ``order + 1`` differences; others are left alone (Shampine & Reichelt 1997, section 2.2; Byrne & Hindmarsh 1975).
    ``differentiable``: in ``factor``, to any order and in every mode. (Forward mode twice through PyTorch's cumulative product is wrong
    where a factor of it is zero, as it is here.)
    """
    i = torch.arange(1, size, dtype=factor.dtype, device=factor.device).unsqueeze(-1)
    j = torch.arange(1, size, dtype=factor.dtype, device=factor.device)

    def triangle(f: Tensor) -> Tensor:
        inner = (i - 1 - f.reshape(-1, 1, 1) * j) / i
        full = torch.nn.functional.pad(inner, (1, 0, 1, 0))
        full[:, 0, :] = 1.0
        return torch.stack(list(accumulate(full.unbind(1), torch.mul)), 1) if differentiable else full.cumprod(1)

    place = torch.arange(size, device=factor.device)
    inside = place <= order.unsqueeze(-1)
    R, U = triangle(factor), triangle(torch.ones_like(factor))
    both = (R * inside.unsqueeze(1)) @ U
    block = inside.unsqueeze(-1) & inside.unsqueeze(-2)
    eye = torch.eye(size, dtype=factor.dtype, device=factor.device)
    return torch.where(block, both, eye).transpose(1, 2)


def rescaling_alone(order: int, factor: float, size: int) -> np.ndarray:
    """`rescaling` of one trajectory, ``(size, size)``."""
    i = np.arange(1, order + 1)[:, None]
    j = np.arange(1, order + 1)

    def triangle(f: float) -> np.ndarray:
        full = np.zeros((order + 1, order + 1))
        full[0] = 1.0
        full[1:, 1:] = (i - 1 - f * j) / i
        return full.cumprod(0)

    out = np.eye(size)
    out[: order + 1, : order + 1] = (triangle(factor) @ triangle(1.0)).T
    return out


def rescaling_slopes(size: int) -> np.ndarray:
    """``(6, size, size)``: the derivative of `rescaling` by the factor, where that is one, from order 0 on."""
    i, j = np.arange(1, MAX_ORDER + 1)[:, None], np.arange(1, MAX_ORDER + 1)
    parts, moved = (i - 1 - j) / i, -j / i
    one, slope = np.zeros((MAX_ORDER + 1, MAX_ORDER + 1)), np.zeros((MAX_ORDER + 1, MAX_ORDER + 1))
    one[0] = 1.0
    one[1:, 1:] = parts.cumprod(0)
    for k in range(1, MAX_ORDER + 1):
        # of a product of k factors
        slope[k, 1:] = slope[k - 1, 1:] * parts[k - 1] + one[k - 1, 1:] * moved[k - 1]
    out = np.zeros((MAX_ORDER + 1, size, size))
    for q in range(1, MAX_ORDER + 1):
        out[q, : q + 1, : q + 1] = (slope[: q + 1, : q + 1] @ one[: q + 1, : q + 1]).T
    return out


@dataclass(frozen=True, eq=False)
class Bdf(Traits):
    """The method as loops and strategies see it. Its dense output is the polynomial through the last ``q + 1`` points:
    ``y(t) = y + h sum_j b_j(theta) k_j`` with the differences ``k_j = D_j / h`` at the end of the step, up to order ``q``. Behind them
    comes the correction of the prediction over ``h``, which weighs nothing."""

    name: str = "bdf"
    order: int = MAX_ORDER
    #: for equations ``F(t, y, y') = 0``
    residual: bool = False
    implicit: bool = field(default=True, init=False)
    multistep: bool = field(default=True, init=False)
    adaptive: bool = field(default=True, init=False)
    spares_stages: bool = field(default=True, init=False)
    error_order: int = field(default=1, init=False)
    nodes: tuple[float, ...] = field(default=(0.0,) * (MAX_ORDER + 1), init=False)
    n_stages: int = field(default=MAX_ORDER + 1, init=False)
    end_index: None = field(default=None, init=False)
    error_uses_end: bool = field(default=False, init=False)
    evaluations: int = field(default=0, init=False)
    extra_evaluations: int = field(default=0, init=False)
    stability: str = "A-stable at orders 1 and 2, else A(alpha)-stable; L-stable in the limit"
    source: str = "Shampine & Reichelt, The MATLAB ODE suite (1997)"

    @property
    def dense(self) -> tuple[tuple[float, ...], ...]:
        """Coefficients of ``b_j(theta)``, of ``theta, theta**2, ...``: those of `dense_weights`, multiplied out."""
        rows, product = [(1.0,)], np.array([-1.0, 1.0])
        for m in range(1, MAX_ORDER):
            product = np.convolve(product, [(m - 1) / (m + 1), 1 / (m + 1)])
            rows.append(tuple(product[1:].tolist()))
        return (*((*x, *[0.0] * (MAX_ORDER - len(x))) for x in rows), (0.0,) * MAX_ORDER)

    def dense_weights(self, theta: Tensor) -> Tensor:
        """``b_j(theta)``, shape ``(*theta.shape, 6)``: theta, then ``prod_{m < j} (theta - 1 + m) / (m + 1)``."""
        x = theta - 1
        parts, product = [theta], x
        for m in range(1, MAX_ORDER):
            product = product * (x + m) / (m + 1)
            parts.append(product)
        return torch.stack([*parts, torch.zeros_like(theta)], -1)

    def dense_numbers(self, theta: float) -> list[float]:
        """`dense_weights` of one number."""
        parts, product = [theta], theta - 1
        for m in range(1, MAX_ORDER):
            product *= (theta - 1 + m) / (m + 1)
            parts.append(product)
        return [*parts, 0.0]

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """``db_j/dtheta``, shaped as `dense_weights`."""
        x = theta - 1
        parts, product, slope = [torch.ones_like(theta)], x, torch.ones_like(theta)
        for m in range(1, MAX_ORDER):
            slope = (slope * (x + m) + product) / (m + 1)
            product = product * (x + m) / (m + 1)
            parts.append(slope)
        return torch.stack([*parts, torch.zeros_like(theta)], -1)

    def formula_slope(self, order: Tensor, stages: Tensor) -> Tensor:
        """The ``y'`` of the formula, ``sum_j k_j / j - kappa_q gamma_q k_6``, from the stages ``(6, B, n)`` of a step."""
        gamma, _, _ = coefficients(stages.dtype.to_real(), stages.device)
        parts = [stages[j - 1] / j for j in range(1, MAX_ORDER + 1)]
        weight = gamma.new_tensor(_KAPPA)[order] * gamma[order]
        return torch.stack(parts).sum(0) - weight.unsqueeze(-1) * stages[MAX_ORDER]

    def step(self, *args: object) -> None:
        """There is none that knows one state only."""
        raise NotImplementedError("bdf is a multistep method: see integrate.bdf")


BDF = Bdf()
