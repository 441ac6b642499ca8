"""Backward differentiation formulas of orders 1 to 5 with variable steps: coefficients and small matrices.

The history of a trajectory is its state and backward differences at equal distances ``h``, ``D = (y_n, d y_n, d^2 y_n, ...)``, as in the
quasi-constant step form of Shampine & Reichelt (The MATLAB ODE suite, 1997, section 2), which modified differences bring to another ``h``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .family import Method

__all__ = ["BDF", "MAX_ORDER", "SIZE", "Bdf", "Formulas", "coefficients", "rescaling_slopes"]

MAX_ORDER = 5
#: rows of the table of differences
SIZE = MAX_ORDER + 3
#: of the numerical differentiation formulas (Klopfenstein 1971; Shampine & Reichelt, table 1). At order 1 it is zero here: backward Euler
#: does not depend on the slope at which it starts, so neither does any derivative
_KAPPA = (0.0, 0.0, -1 / 9, -0.0823, -0.0415, 0.0)


def _coefficients() -> tuple[list[float], ...]:
    gamma = [0.0]
    for j in range(1, MAX_ORDER + 1):
        gamma.append(gamma[-1] + 1 / j)
    alpha = [(1 - k) * g for k, g in zip(_KAPPA, gamma, strict=True)]
    error = [k * g + 1 / (q + 1) for q, (k, g) in enumerate(zip(_KAPPA, gamma, strict=True))] + [1 / (MAX_ORDER + 2)]
    return gamma, alpha, error


def coefficients(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``gamma_j = sum_{i <= j} 1/i``, ``alpha_q = (1 - kappa_q) gamma_q`` and the error constants ``kappa_q gamma_q + 1/(q + 1)``, from
    order 0 on: ``(6,)``, ``(6,)`` and ``(7,)``, the last of them for an estimate at order 6."""
    return tuple(torch.tensor(x, dtype=dtype, device=device) for x in _coefficients())  # type: ignore[return-value]


@cache
def _numbers() -> dict[str, np.ndarray]:
    """Of every order what `Formulas` has, and of the rescaling: the triangle of a factor is the product down the rows of ``(begin - factor
    slope) / count``, ``one`` that of the factor 1 up to the order, and ``block`` says where the result is no part of the identity."""
    gamma, alpha, _ = (np.array(x) for x in _coefficients())
    q, i, j = np.arange(MAX_ORDER + 1)[:, None], np.arange(SIZE)[:, None], np.arange(SIZE)
    low = j <= q
    block = low[:, :, None] & low[:, None, :]
    begin, slope, count = np.where((i > 0) & (j > 0), i - 1, i == 0), np.where(i > 0, j, 0), np.maximum(i, 1)
    psi = np.pad(gamma, (0, SIZE - len(gamma))) * low / np.where(alpha > 0, alpha, 1.0)[:, None]
    # D_j = sum_{i = j}^{q} D_i + d for j <= q, then d itself, then d - D_{q + 1}
    S = np.triu(np.ones((SIZE, SIZE))) * block - (j == q + 2)[:, :, None] * (j == q + 1)[:, None, :]
    S = S + np.eye(SIZE) * (j > q + 2)[:, None, :]
    parts = {"reading": np.stack([low, psi], 1), "S": S, "s": j <= q + 2}
    parts["shown"] = np.concatenate([np.eye(SIZE)[1 : MAX_ORDER + 1] * low[:, None, :], (j == q + 1)[:, None, :]], 1)
    one = ((begin - slope) / count).cumprod(0) * low[:, :, None]
    return parts | {"begin": begin, "slope": slope, "count": count, "one": one, "block": block}


class Formulas:
    """What a step takes from its order: looked up by the order of one trajectory, or by those ``(B,)`` of many.

    alpha : ``alpha_q``
    constants : of the error, ``(B, 1)`` for many
    reading : (2, 8); rows that make the prediction and ``psi`` of the differences
    S, s : (8, 8), (8,); after a step the differences are ``S D + s d``, where ``d`` is the correction of the prediction
    shown : (6, 8); rows that make the stages, times the size of the step, of the table behind it: the differences up to the order, and
        ``d``, which stands in the table too
    """

    def __init__(self, kind: torch.dtype, device: torch.device, alone: bool = False) -> None:
        numbers = _numbers()

        def tables(*names: str, of: torch.dtype = kind) -> list[Any]:
            found = [torch.tensor(numbers[name], dtype=of, device=device) for name in names]
            return [x.unbind() for x in found] if alone else found

        _, alpha, constants = coefficients(torch.float64, device)
        self.alpha: Any = alpha.tolist() if alone else alpha
        self.constants: Any = constants.tolist() if alone else constants.to(kind.to_real()).unsqueeze(-1)
        self.reading, self.S, self.s, self.shown = tables("reading", "S", "s", "shown")
        (self._block,), (self._one,) = tables("block", of=torch.bool), tables("one", of=torch.float64)
        self._parts = [torch.tensor(numbers[name], dtype=torch.float64, device=device) for name in ("begin", "slope", "count")]
        self.eye = torch.eye(SIZE, dtype=torch.float64, device=device)

    def rescaling(self, order: Any, factor: Any, differentiable: bool = False) -> Tensor:
        """The matrix, ``(8, 8)`` for numbers and ``(B, 8, 8)`` for tensors ``(B,)``, that takes differences at distance ``h`` to those at
        ``factor h`` of the same polynomial.

        Of the first ``order + 1`` differences; others are left alone (Shampine & Reichelt 1997, section 2.2; Byrne & Hindmarsh 1975).
        ``differentiable``: in ``factor``, to any order and in every mode. (Forward mode twice through PyTorch's cumulative product is wrong
        where a factor of it is zero, as it is here.)
        """
        begin, slope, count = self._parts
        parts = (begin - (factor.reshape(-1, 1, 1) if isinstance(factor, Tensor) else factor) * slope) / count
        triangle = torch.stack(list(accumulate(parts.unbind(-2), torch.mul)), -2) if differentiable else parts.cumprod(-2)
        return torch.where(self._block[order], triangle @ self._one[order], self.eye).mT


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
class Bdf(Method):
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


BDF = Bdf()
