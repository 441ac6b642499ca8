"""States within a step, by its dense output.

They are made in two ways: those of one trajectory by products with small matrices, without writing into a tensor, so that autograd may
record them; those of many row by row, wherever in their steps they lie.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Method
from .stepper import Attempt, Trial

__all__ = ["WithinMany", "WithinOne", "within"]

#: up to how many states of one trajectory are weighed by numbers
_FEW = 8


def within(method: Method, step: Attempt, trial: Trial, y: Tensor) -> WithinOne | WithinMany:
    """The states in a step that began at ``y``."""
    return (WithinMany if isinstance(step.h, Tensor) else WithinOne)(method, step, trial, y)


class WithinOne:
    """Of one trajectory, whose states have any shape."""

    def __init__(self, method: Method, step: Attempt, trial: Trial, y: Tensor) -> None:
        self._method, self._step, self._y, self._trial, self.end = method, step, y, trial, trial.y
        self._flat: tuple[Tensor, Tensor] | None = None

    def on_grid(self, weights: Tensor) -> Sequence[Tensor]:
        """States ``(n,)`` at places of which these are the weights ``(P, S)``."""
        if self._flat is None:
            ks = torch.stack([k.detach() for k in self._trial.stages()])
            self._flat = self._y.detach().reshape(1, -1), ks.reshape(len(ks), -1)
        return torch.addmm(self._flat[0], weights, self._flat[1], alpha=self._step.h).unbind()

    def at(self, theta: Tensor) -> Tensor:
        """The state ``(1, n)`` at a part ``(1,)`` of the step, which may be beyond its end."""
        x = float(theta)
        if x in (0.0, 1.0):
            return (self._y if x == 0.0 else self.end).detach().reshape(1, -1)
        return self.on_grid(self._method.dense_weights(theta).to(self._y.dtype))[0].unsqueeze(0)

    def samples(self, times: Sequence[float], rows: Sequence[int]) -> Tensor:
        """States ``(N, *state)`` at increasing times in it."""
        y, h = self._y, self._step.h
        thetas = [(t - self._step.t) / h for t in times if t != self._step.end]
        pieces, n_ends = [], len(times) - len(thetas)
        if thetas:
            weights = self._weights(thetas, h)
            known = torch.stack([y, *self._trial.stages()]).reshape(weights.shape[1], -1)
            pieces.append(torch.mm(weights, known).reshape(len(thetas), *y.shape))
        if n_ends:
            pieces.append(self.end.expand(n_ends, *self.end.shape))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def _weights(self, thetas: list[float], h: float) -> Tensor:
        """``(len(thetas), 1 + S)``: of the state at the start and of every stage."""
        method, like = self._method, self._y
        if len(thetas) <= _FEW:
            # for the few samples of a step tensor operators on so few elements would cost more than all the rest
            rows = [[1.0, *(h * w for w in method.dense_numbers(theta))] for theta in thetas]
            return torch.tensor(rows, dtype=like.dtype, device=like.device)
        weights = method.dense_weights(torch.tensor(thetas, dtype=torch.float64, device=like.device)) * h
        return torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1).to(like.dtype)


class WithinMany:
    """Of many, with states ``(B, n)``."""

    def __init__(self, method: Method, step: Attempt, trial: Trial, y: Tensor) -> None:
        self._method, self._step, self._y, self.end = method, step, y, trial.y
        self._stages = trial.stages()

    @property
    def _size(self) -> Tensor:
        return self._step.h.to(self._y.dtype.to_real()).unsqueeze(-1)

    def on_grid(self, weights: Tensor) -> Sequence[Tensor]:
        """States ``(B, n)`` at places, the same for all, of which these are the weights ``(P, S)``."""
        y, ks = self._y, torch.stack(list(self._stages))
        inside = y + self._size * (weights @ ks.reshape(len(ks), -1)).reshape(len(weights), *y.shape)
        return inside.unbind()

    def at(self, theta: Tensor) -> Tensor:
        """States ``(B, n)``, each at its own part ``(B,)`` of the step, which may be beyond its end."""
        y = self._y
        weights = self._method.dense_weights(theta).to(y.dtype)
        inside = y + self._size * sum(weights[:, i : i + 1] * k for i, k in enumerate(self._stages))
        return torch.where((theta == 0).unsqueeze(-1), y, torch.where((theta == 1).unsqueeze(-1), self.end, inside))

    def samples(self, times: Tensor, rows: Tensor) -> Tensor:
        """States ``(N, n)`` of trajectories at times in their steps ``(N,)``, in any order and with repetitions."""
        h = self._step.h[rows]
        theta = (times - self._step.t[rows]) / h
        weights = (self._method.dense_weights(theta) * h.unsqueeze(-1)).to(self._y.dtype)
        value = self._y.index_select(0, rows)
        for i, k in enumerate(self._stages):
            value = torch.addcmul(value, weights[:, i : i + 1], k.index_select(0, rows))
        return value
