"""What a method is; sums of stages, and what those have in common that are defined by a tableau."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..torch_internals import is_functorch_wrapped_tensor

__all__ = [
    "Flat",
    "Linearize",
    "Method",
    "Pullback",
    "StepCotangents",
    "TableauMethod",
    "TakenStep",
    "added",
    "combine",
    "over",
    "powers",
    "row_dot",
    "update",
    "weighted_sum",
]

Flat = Callable[[Tensor, Tensor], Tensor]
#: ``linearize(t, y) -> (f(t, y), pullback)`` with ``pullback(v) -> (f_y* v, f_t* v or None)``
Pullback = Callable[[Tensor], tuple[Tensor, Tensor | None]]
Linearize = Callable[[Tensor, Tensor], tuple[Tensor, Pullback]]


def combine(y: Tensor, h: float | Tensor, weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """``y + h sum_j weights_j ks_j``; ``h`` is a number, or a tensor that broadcasts against ``y``."""
    if isinstance(h, float):
        for w, k in zip(weights, ks, strict=False):
            if w:
                y = torch.add(y, k, alpha=h * w)
        return y
    total = weighted_sum(weights, ks)
    return y if total is None else _plus(y, h, total)


def update(y: Tensor, h: float | Tensor, weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor:
    """As `combine`, but the state is rounded once and not once a stage: in single precision the difference adds up over many steps."""
    total = weighted_sum(weights, ks)
    if total is None:
        return y
    return torch.add(y, total, alpha=h) if isinstance(h, float) else _plus(y, h, total)


def _plus(y: Tensor, h: float | Tensor, total: Tensor) -> Tensor:
    """``y + h total``; where nothing broadcasts in one operator."""
    assert isinstance(h, Tensor)
    return torch.addcmul(y, h, total) if h.shape == y.shape and h.dtype == y.dtype else y + h * total


def weighted_sum(weights: Sequence[float], ks: Sequence[Tensor]) -> Tensor | None:
    """``sum_j weights_j ks_j``, or None when all weights are zero."""
    total: Tensor | None = None
    for w, k in zip(weights, ks, strict=False):
        if w:
            total = k * w if total is None else torch.add(total, k, alpha=w)
    return total


def powers(theta: Tensor, count: int, lowest: int = 1) -> Tensor:
    """``count`` powers of ``theta`` from the ``lowest`` (0 or 1) on, ``(*theta.shape, count)``, by products: powers of doubles are slow,
    and second derivatives of PyTorch's at zero are NaN."""
    found = [theta if lowest else torch.ones_like(theta)]
    for _ in range(count - 1):
        found.append(found[-1] * theta)
    return torch.stack(found, dim=-1)


class TakenStep(NamedTuple):
    """A step that is taken back, as ``step`` took it, and what comes back to it.

    ``end_bar``: the cotangent of the new state. ``k_bar``: those of the stages by way of the dense output, extra stages included, None for
    those without; stages behind the last one that matters are not computed. ``timed``: whether cotangents of ``t`` and ``h`` are wanted,
    which are row sums of shape ``(B,)``.
    """

    times: Sequence[Tensor]
    h: float | Tensor
    y: Tensor
    end_bar: Tensor
    k_bar: Sequence[Tensor | None]
    timed: bool


@dataclass(frozen=True)
class StepCotangents:
    """What the adjoint of a step gives back: cotangents of ``y``, of ``t`` and ``h`` per trajectory where asked for, and the stages.

    ``first``: of methods whose first stage is the last one of the step before, the cotangent of that slope, which is not part of ``y``.
    """

    y: Tensor
    t: Tensor | None
    h: Tensor | None
    stages: Sequence[Tensor]
    first: Tensor | None = None


def over(x: Tensor, hd: float | Tensor, at_none: Tensor) -> Tensor:
    """``x / hd``, and its limit ``at_none`` in rows whose steps have no length."""
    if not isinstance(hd, Tensor):
        return x / hd if hd else at_none
    none = hd == 0
    return torch.where(none, at_none, x / torch.where(none, 1.0, hd))


def row_dot(x: Tensor, y: Tensor) -> Tensor:
    """Real inner product of every row: ``(B, n), (B, n) -> (B,)``."""
    return (x.conj() * y).real.sum(-1) if x.is_complex() else (x * y).sum(-1)


def added(total: Tensor | None, x: Tensor) -> Tensor:
    """``total + x``, where there is a total already."""
    return x if total is None else total + x


class Method:
    """What the loops and the strategies ask of a method on flat ``(B, n)`` states: what it is, where whatever it does not say is not so,
    and its functions, of which `ExplicitRungeKutta` says what they mean. Those of several steps, and pairs, have no single step."""

    name: str
    order: int
    #: whether there is an error estimate to choose steps by, and the order that the controller works with
    adaptive: bool
    error_order: int
    #: of all stages, those of the dense output included, which the step itself does not take; which one is the slope at its end
    nodes: tuple[float, ...]
    n_stages: int
    end_index: int | None
    #: whether the error estimate weighs ``f(t + h, y1)`` though the step itself does not compute it
    error_uses_end: bool
    #: explicit evaluations in an attempted step whose first stage is known (those of iterations are counted where they are made), and
    #: further ones for the dense output, when ``f(t + h, y1)`` is known
    evaluations: int
    extra_evaluations: int
    #: whether stages are equations to be solved
    implicit: bool = False
    #: the history of a trajectory is more than its state: see `adjoint.integrate.multistep`
    multistep: bool = False
    #: trajectories are handed over between two methods: there is no single step
    switching: bool = False
    #: the right-hand side must come in two parts
    additive: bool = False
    #: for equations ``F(t, y, y') = 0``
    residual: bool = False
    #: the formula holds ``f_t``
    needs_time_slope: bool = False
    #: steps of ``M y' = f(t, y)`` are the method's own
    takes_mass: bool = False
    #: whether the last stage is the first of the next step: as the slope of its equation, not as ``f`` at its value
    hands_on: bool = False
    #: whether derivatives of steps of ODEs, but for those in times, are taken without their stages
    spares_stages: bool = False
    #: factors of ``h`` in the matrices of stages that are solved for one after another
    diagonal: tuple[float, ...] = ()
    #: whether the dense output is the polynomial that satisfies the equation at the nodes of the stages
    collocates: bool = False
    #: which stage each one shares its evaluation of ``fun`` with, if some do
    same_as: tuple[int, ...] | None = None
    #: length of the interval of stability on the negative axis, where steps are held within it
    interval: float = 1e300
    #: ``adjoint_step(linearize, step: TakenStep) -> StepCotangents``; None: by automatic differentiation through ``step``
    adjoint_step: Any = None

    @property
    def members(self) -> tuple[Any, ...]:
        """The methods whose steps are taken: itself, or those that it changes between."""
        return (self,)

    def step(self, f: Any, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state at the end of a step, and its stages."""
        raise NotImplementedError(f"{self.name} takes no single steps")

    def error(self, h: float | Tensor, ks: Sequence[Tensor]) -> Tensor:
        """The error estimate of a step."""
        raise NotImplementedError

    def dense_stages(
        self, f: Any, times: Sequence[Tensor], h: float | Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor | None = None
    ) -> list[Tensor]:
        """All stages that the dense output weighs; ``end`` is ``f(t + h, y1)`` where it is known already."""
        return list(ks)

    def dense_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Coefficients of ``b_i(theta)``, ``(S, D)``: of ``theta, theta**2, ...``."""
        raise NotImplementedError

    def dense_weights(self, theta: Tensor) -> Tensor:
        """``b_i(theta)``: shape ``(*theta.shape, S)`` with ``S`` the number of stages, extra ones included."""
        raise NotImplementedError

    def dense_numbers(self, theta: float) -> list[float]:
        """``b_i(theta)`` of every stage, for one theta."""
        raise NotImplementedError

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """``db_i/dtheta``, shaped as `dense_weights`."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class TableauMethod(Method):
    """A method whose stages, error estimate and dense output are sums by the rows of a tableau.

    ``end_index``: which of the stages (extra ones included) is the slope at the end of the step and the first stage of the next one; None
    if no one is.
    """

    tableau: Any
    _tensors: dict[tuple[torch.dtype, torch.device], Tensor] = field(init=False, repr=False, default_factory=dict)
    error_uses_end: ClassVar[bool] = False
    end_index: ClassVar[int | None] = None
    evaluations: ClassVar[int] = 0
    extra_evaluations: ClassVar[int] = 0

    @property
    def name(self) -> str:
        return self.tableau.name

    @property
    def order(self) -> int:
        return self.tableau.order

    @property
    def adaptive(self) -> bool:
        """Whether there is an error estimate to choose steps by."""
        return self.tableau.error is not None

    @cached_property
    def error_order(self) -> int:
        """Order that the controller works with: the error of a step shrinks like ``h**(error_order + 1)``."""
        return self.tableau.order if self.tableau.error_order is None else min(self.tableau.order, self.tableau.error_order)

    @property
    def nodes(self) -> tuple[float, ...]:
        """Of all stages, extra ones included."""
        return self.tableau.c

    @property
    def n_stages(self) -> int:
        """Stages of the step itself, those of the dense output not counted."""
        return len(self.tableau.b)

    def error(self, h: float | Tensor, ks: Sequence[Tensor]) -> Tensor:
        """The embedded error estimate ``h sum_i (b_i - b_hat_i) k_i``."""
        assert self.tableau.error is not None
        total = weighted_sum(self.tableau.error, ks)
        assert total is not None
        return total * h

    def dense_weights(self, theta: Tensor) -> Tensor:
        """See `Method.dense_weights`."""
        matrix = self.dense_matrix(theta.dtype, theta.device)
        return powers(theta, matrix.shape[1]) @ matrix.T

    def dense_numbers(self, theta: float) -> list[float]:
        """See `Method.dense_numbers`."""
        return [sum(w * theta ** (m + 1) for m, w in enumerate(row)) for row in self.tableau.dense]

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """See `Method.dense_slopes`."""
        matrix = self.dense_matrix(theta.dtype, theta.device)
        exponent = torch.arange(matrix.shape[1], device=theta.device, dtype=theta.dtype)
        return (powers(theta, matrix.shape[1], 0) * (exponent + 1)) @ matrix.T

    @property
    def dense(self) -> Sequence[Sequence[float]]:
        """Coefficients of ``b_i(theta)``, of ``theta, theta**2, ...``."""
        return self.tableau.dense

    def dense_matrix(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """See `Method.dense_matrix`."""
        key = (dtype, device)
        if key not in self._tensors:
            matrix = torch.tensor(self.tableau.dense, dtype=dtype, device=device)
            if is_functorch_wrapped_tensor(matrix) or matrix.is_inference():
                # made inside of a transform, or in inference mode, it must not outlive it
                return matrix
            self._tensors[key] = matrix
        return self._tensors[key]
