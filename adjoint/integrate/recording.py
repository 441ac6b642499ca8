"""A bound on what autograd may record of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..system.capture import saved_bytes

__all__ = ["Recording"]


#: where not even so many steps would fit, recording is not begun
_FEWEST_STEPS = 12
#: from this part of the budget on, a solve that would need so many times the whole of it with steps like those so far is given up
_LOOK_FROM, _HOPELESS = 0.125, 2.0


class Recording:
    """Counts what autograd saves for a solve of one trajectory, and switches it off for good when that comes to exceed ``budget`` bytes.

    What one evaluation of ``f`` saves is measured at the first. States count twice: they are gathered into one tensor at the end. A long
    solve does not spend the whole budget for nothing: it is known early by how little of the span its steps cover.
    """

    def __init__(self, budget: int, evaluations: int, inputs: Sequence[Tensor]) -> None:
        self.budget, self.evaluations = budget, evaluations
        self.on = True
        self._inputs = inputs
        self._step = self._states = 0
        self._fraction = 0.0

    def first(self, f: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``, watched for what it saves."""
        k = f(t, y)
        # of every stage its argument and its value too
        self._step = self.evaluations * (saved_bytes(k, self._inputs, y) + 2 * y.nbytes)
        self._states = 2 * y.nbytes
        if self._step * _FEWEST_STEPS > self.budget:
            self._stop()
            return k.detach()
        return k

    def accepted(self, index: int, fraction: float) -> bool:
        """Whether recording ends with this step, at whose end ``fraction`` of the span is done: another one, or the rest, would not fit."""
        each = self._step + self._states
        used = (index + 1) * each
        # steps grow at first, and one that was cut short to land somewhere says little
        stride = max(fraction - self._fraction, fraction / (index + 1), 1e-300)
        self._fraction = fraction
        ahead = each * (1.0 - fraction) / stride
        hopeless = used > _LOOK_FROM * self.budget and used + ahead > _HOPELESS * self.budget
        if self.on and (used + each > self.budget or hopeless):
            self._stop()
            return True
        return False

    def _stop(self) -> None:
        self.on = False
        torch.set_grad_enabled(False)
