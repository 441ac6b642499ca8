"""Step size controllers: from the error norms of the last steps to the factor by which the step changes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["IController", "PIController", "PIDController", "default_controller", "tamed"]

#: a float for one trajectory, a ``(B,)`` tensor for many
Number = Any

_TINY, _HUGE = 1e-10, 1e30
#: an error below this, by luck or by an anchor, does not count as the beginning of a rise
_LEAST = 1e-2


def _clip(x: Number, low: float, high: float) -> Number:
    if type(x) is float:
        return high if x > high else low if x < low else x
    return x.clamp(low, high)


@dataclass(frozen=True)
class PIDController:
    """Proportional-integral-derivative step size control (Soderlind 2003, Digital filters in adaptive time-stepping).

    With error norms ``e_n`` (1 is on tolerance) and ``q`` the order of the error estimate plus one, the step changes by
    ``safety * e_n**(-b1/q) * e_{n-1}**(-b2/q) * e_{n-2}**(-b3/q)``, where ``b1 = pcoeff + icoeff + dcoeff``,
    ``b2 = -(pcoeff + 2 dcoeff)`` and ``b3 = dcoeff``, clipped to ``[min_factor, max_factor]``. An accepted step is never
    followed by a shorter one unless ``shrink_accepted``; a rejected one is always followed by a shorter one.

    ``predictive``: the factor is at most that times ``h_n / h_{n-1} (e_{n-1} / e_n)**(1/q)``, by which the error's growth goes on as it did
    (Gustafsson 1994; Hairer & Wanner, Solving ordinary differential equations II, equation IV.8.25): the coming step is made shorter before
    one fails.
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    shrink_accepted: bool = False
    predictive: bool = False

    def __post_init__(self) -> None:
        if self.predictive and (self.pcoeff or self.dcoeff):
            raise ValueError("predictive=True is for integral control: pcoeff and dcoeff must be zero")
        if not 0 < self.safety <= 1 or not 0 < self.min_factor < 1 < self.max_factor:
            raise ValueError("a controller needs 0 < safety <= 1 and 0 < min_factor < 1 < max_factor")

    @cached_property
    def stuck_factor(self) -> float:
        """Factor after a step in which the iteration for the stages did not converge: it says less than an error does (Hairer & Wanner,
        Solving ordinary differential equations II, section IV.8)."""
        return max(self.min_factor, 0.5)

    @cached_property
    def remembers(self) -> bool:
        """Whether earlier steps count."""
        return bool(self.pcoeff or self.dcoeff or self.predictive)

    def remember(self, error: Number, length: Number, previous: tuple[Number, Number]) -> tuple[Number, Number]:
        """What counts of an accepted step and of those before, ``previous``: the last two errors; if ``predictive``, error and length (with
        a minus). At the beginning it is ``(1, 1)``."""
        if not self.predictive:
            return error, previous[0]
        return (error.clamp(min=_LEAST), -tamed(length)) if isinstance(error, Tensor) else (max(error, _LEAST), -length)

    def accepted(self, order: int, error: Number, previous: tuple[Number, Number], length: Number) -> Number:
        """Factor after an accepted step of this length; errors (present, and those that were remembered) come as `tamed`."""
        factor = self.safety * error ** (-(self.pcoeff + self.icoeff + self.dcoeff) / order)
        if self.predictive:
            factor = self._predicted(order, error, previous, length, factor)
        if self.pcoeff or self.dcoeff:
            factor = factor * previous[0] ** ((self.pcoeff + 2 * self.dcoeff) / order)
        if self.dcoeff:
            factor = factor * previous[1] ** (-self.dcoeff / order)
        return _clip(factor, self.min_factor if self.shrink_accepted else 1.0, self.max_factor)

    @staticmethod
    def _predicted(order: int, error: Number, previous: tuple[Number, Number], length: Number, factor: Number) -> Number:
        # lengths are kept with a minus, which tells them from the one of the beginning
        error1, length1 = previous
        growth = (error1 / error) ** (1.0 / order)
        if not isinstance(error, Tensor):
            return factor if length1 > 0 else factor * min(1.0, length / -length1 * growth)
        ratio = torch.where(length1 > 0, 1e30, -tamed(length) / length1)
        return factor * (ratio * growth).clamp(max=1.0)

    def rejected(self, order: int, error: Number) -> Number:
        """Factor after a rejected step; only the present error counts."""
        return _clip(self.safety * error ** (-1.0 / order), self.min_factor, self.safety)

    def both(self, order: int, error: Number, previous: tuple[Number, Number], length: Number) -> tuple[Number, Number]:
        """`accepted` and `rejected`, which without a memory share their power."""
        if self.remembers or self.icoeff != 1.0:
            return self.accepted(order, error, previous, length), self.rejected(order, error)
        factor = self.safety * error ** (-1.0 / order)
        low = self.min_factor if self.shrink_accepted else 1.0
        return _clip(factor, low, self.max_factor), _clip(factor, self.min_factor, self.safety)


def tamed(error: Number) -> Number:
    """An error norm kept away from zero and infinity; in single precision for tensors, where powers of doubles are slow."""
    return _clip(error if type(error) is float else error.float(), _TINY, _HUGE)


def IController(**options: Any) -> PIDController:
    """Integral control, the textbook controller: ``safety * e**(-1/q)``."""
    return PIDController(0.0, 1.0, 0.0, **options)


def PIController(**options: Any) -> PIDController:
    """Proportional-integral control with Gustafsson's coefficients (0.4, 0.3), as in Hairer, Norsett & Wanner, section IV.2."""
    return PIDController(0.4, 0.3, 0.0, shrink_accepted=True, **options)


_PLAIN, _PREDICTIVE = IController(), PIDController(shrink_accepted=True, predictive=True)


def default_controller(implicit: bool) -> PIDController:
    """`IController` for explicit methods. Implicit ones, whose steps change size by orders of magnitude, also go by how the error rose over
    the last two steps."""
    return _PREDICTIVE if implicit else _PLAIN
