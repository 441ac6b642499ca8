"""What the loops and the strategies ask of a method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .runge_kutta import Flat, Linearize, StepCotangents

__all__ = ["Method"]


class Method(Protocol):
    """A one-step method on flat ``(B, n)`` states; see `ExplicitRungeKutta` for the meaning of every function."""

    @property
    def name(self) -> str: ...
    @property
    def order(self) -> int: ...
    @property
    def implicit(self) -> bool: ...
    @property
    def adaptive(self) -> bool: ...
    @property
    def error_order(self) -> int: ...
    @property
    def nodes(self) -> tuple[float, ...]: ...
    @property
    def n_stages(self) -> int: ...
    @property
    def end_index(self) -> int | None: ...
    @property
    def error_uses_end(self) -> bool: ...
    @property
    def evaluations(self) -> int: ...
    @property
    def extra_evaluations(self) -> int: ...

    def step(self, f: Flat, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor) -> tuple[Tensor, list[Tensor]]: ...
    def error(self, h: float | Tensor, ks: Sequence[Tensor]) -> Tensor: ...
    def dense_stages(
        self, f: Flat, times: Sequence[Tensor], h: float | Tensor, y: Tensor, ks: Sequence[Tensor], end: Tensor | None = None
    ) -> list[Tensor]: ...
    def dense_weights(self, theta: Tensor) -> Tensor: ...
    def dense_slopes(self, theta: Tensor) -> Tensor: ...
    def adjoint_step(
        self,
        linearize: Linearize,
        times: Sequence[Tensor],
        h: float | Tensor,
        y: Tensor,
        end_bar: Tensor,
        k_bar: Sequence[Tensor | None],
        time_bars: bool,
    ) -> StepCotangents: ...
