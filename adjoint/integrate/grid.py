"""The recorded steps of a solve, as derivatives are made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

__all__ = ["RECORDED", "Grid"]

#: the tensors of a `Record` that a `Grid` has, in its order
RECORDED = ("states", "t", "h", "segment", "lands", "sample_step", "status", "event_step", "stages", "extra")


@dataclass(frozen=True, eq=False)
class Grid:
    """Tensors of a `Record`, of the same names and shapes; what a sweep does not look at may be empty.

    ``sizes`` (K, B): those of the steps with those that stand in for padding, whose own are zero; None where nothing is padded.
    ``moved`` (K, B): the steps that are put elsewhere, or None (see `adjoint.sensitivity.padding`).
    """

    states: Tensor
    t: Tensor
    h: Tensor
    segment: Tensor
    lands: Tensor
    sample_step: Tensor
    status: Tensor
    event_step: Tensor
    stages: Tensor
    extra: Tensor
    sizes: Tensor | None = None
    moved: Tensor | None = None

    @classmethod
    def of(cls, record: Any) -> Grid:
        """That of a `Record`, or of `Outputs`."""
        return cls(*(getattr(record, name) for name in RECORDED))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those of the record, in the order of `RECORDED`."""
        return [getattr(self, name) for name in RECORDED]

    @property
    def size(self) -> Tensor:
        """Sizes of steps (K, B), of which none is zero only because it is padding."""
        return self.h if self.sizes is None else self.sizes

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Grid:
        """The same with ``function`` of every tensor of the record."""
        return replace(self, **{name: function(getattr(self, name)) for name in RECORDED})
