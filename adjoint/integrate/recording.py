"""A bound on what autograd may record of a solve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Recording"]


#: where not even so many steps would fit, recording is not begun
_FEWEST_STEPS = 12


class Recording:
    """Counts what autograd saves for a solve of one trajectory, and switches it off for good when that comes to exceed ``budget`` bytes.

    What one evaluation of ``f`` saves is measured at the first. States count twice: they are gathered into one tensor at the end.
    """

    def __init__(self, budget: int, evaluations: int, inputs: Sequence[Tensor]) -> None:
        self.budget, self.evaluations = budget, evaluations
        self.on = True
        self._inputs = inputs
        self._step = self._states = 0

    def first(self, f: Callable[[Tensor, Tensor], Tensor], t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``, watched for what it saves."""
        seen: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            if x.layout == torch.strided:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            k = f(t, y)
        for x in self._inputs:
            if x.layout == torch.strided:
                seen.pop(x.untyped_storage().data_ptr(), None)
        # of every stage its argument and its value too
        self._step = self.evaluations * (sum(seen.values()) + 2 * y.nbytes)
        self._states = 2 * y.nbytes
        if self._step * _FEWEST_STEPS > self.budget:
            self._stop()
            return k.detach()
        return k

    def accepted(self, index: int) -> bool:
        """Whether recording ends with this step, because another one would not fit."""
        if self.on and (index + 2) * (self._step + self._states) > self.budget:
            self._stop()
            return True
        return False

    def _stop(self) -> None:
        self.on = False
        torch.set_grad_enabled(False)
