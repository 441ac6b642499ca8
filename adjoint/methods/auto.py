"""A pair of methods, for where the problem is not stiff and for where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..errors import InvalidInput
from .family import Method, TableauMethod, combine, powers

__all__ = ["AutoSwitch", "Polynomial", "stages_at_end"]


@dataclass(frozen=True)
class AutoSwitch(Method):
    """Two methods, between which each trajectory is switched as it becomes stiff and ceases to be (Petzold 1983; Hairer & Wanner,
    Solving ordinary differential equations II, section IV.2).

    While the explicit one is at work, its last two stages at the end of the step give the size ``rho`` of the Jacobian in the direction of
    the error for nothing; where ``h rho`` stays at the edge of the interval of stability, stability and not accuracy limits the steps.
    While the implicit one is at work, a norm of its Jacobian bounds ``rho``: where explicit steps of the same size would be well inside
    of the interval, they are cheaper.

    Parameters
    ----------
    nonstiff : explicit Runge-Kutta method with two stages at the end of the step
    stiff : one-step implicit method
    """

    nonstiff: object
    stiff: object

    implicit = True
    adaptive = True
    switching = True

    def __post_init__(self) -> None:
        if self.pair is None or not self.nonstiff.adaptive:  # type: ignore[attr-defined]
            raise InvalidInput(
                f"AutoSwitch: nonstiff must be an adaptive explicit Runge-Kutta method with two stages at the end of its steps, such as "
                f"'tsit5' or 'dopri5', got {_shown(self.nonstiff)!r}"
            )
        if not (isinstance(self.stiff, TableauMethod) and self.stiff.implicit and self.stiff.adaptive):
            raise InvalidInput(
                f"AutoSwitch: stiff must be an adaptive implicit one-step method, such as 'kvaerno5' or 'rodas5p', got "
                f"{_shown(self.stiff)!r}"
            )

    @property
    def name(self) -> str:
        return "auto"

    @property
    def needs_time_slope(self) -> bool:
        return isinstance(self.stiff, Method) and self.stiff.needs_time_slope

    @property
    def members(self) -> tuple[object, ...]:
        """See `Method.members`."""
        return (self.nonstiff, self.stiff)

    @cached_property
    def pair(self) -> tuple[int, int] | None:
        """See `stages_at_end`."""
        return stages_at_end(self.nonstiff)

    @property
    def interval(self) -> float:
        """Length of the interval of stability of the explicit method on the negative axis."""
        return self.nonstiff.interval  # type: ignore[attr-defined]

    def jacobian_size(self, h: Tensor, y: Tensor, stages: Sequence[Tensor], weights: Tensor) -> Tensor:
        """``rho`` (B,) from the stages of an explicit step of size ``h`` (B, 1), ``weights`` (B, n) those of the error norm."""
        assert self.pair is not None
        i, j = self.pair
        a = self.nonstiff.tableau.a  # type: ignore[attr-defined]
        change = combine(y, h, a[j], stages[: len(a[j])]) - combine(y, h, a[i], stages[: len(a[i])])
        size = torch.linalg.vector_norm(change / weights, dim=-1)
        slope = torch.linalg.vector_norm((stages[j] - stages[i]) / weights, dim=-1)
        return torch.where(size > 0, slope / size, 0.0)

    def step(self, *args: object) -> None:
        """There is none: see `adjoint.doors.switching`."""
        raise NotImplementedError("a switched solve is taken by its two methods")

    def dense_weights(self, *args: object) -> None:
        """There are none: see `Polynomial`."""
        raise NotImplementedError("a switched solve is interpolated by its two methods")


def stages_at_end(method: object) -> tuple[int, int] | None:
    """Two stages of an explicit method with the time of the end of the step, the last of them that of the new state where there is one."""
    if not isinstance(method, TableauMethod) or method.implicit:
        return None
    ends = [i for i, c in enumerate(method.tableau.c) if c == 1.0]
    return (ends[-2], ends[-1]) if len(ends) > 1 else None


def _shown(given: object) -> object:
    return given.name if isinstance(given, Method) else given


@dataclass(frozen=True)
class Polynomial(Method):
    """Dense output ``y + h sum_j theta^j c_j`` of steps whose "stages" are the coefficients: what all one-step methods have in common."""

    degree: int
    name: str
    #: it takes no steps
    adaptive: bool = field(default=False, init=False)

    def dense_weights(self, theta: Tensor) -> Tensor:
        """``theta^j``, j = 1 ... degree."""
        return powers(theta, self.degree)

    def dense_slopes(self, theta: Tensor) -> Tensor:
        """``j theta^(j - 1)``."""
        exponent = torch.arange(self.degree, device=theta.device, dtype=theta.dtype)
        return powers(theta, self.degree, 0) * (exponent + 1)
