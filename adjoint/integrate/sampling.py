"""Samples of one trajectory at given times, made as its steps go by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["Sampler"]


#: up to how many samples are weighed by numbers
_FEW = 8


class Sampler:
    """Collects samples at given times, in any order and with repetitions.

    They are made in the order of the steps and put into that of the times at the end, without writing into a tensor, so that a solve that
    autograd records can use it too.
    """

    def __init__(self, plan: Plan, t_eval: list[float], y0: Tensor, sign: float) -> None:
        self.plan, self.sign, self.like = plan, sign, y0
        self.order = sorted(range(len(t_eval)), key=lambda i: sign * t_eval[i])
        self.times = [t_eval[i] for i in self.order]
        #: by place in ``t_eval``: the step that a sample lies in, -1 for none
        self.step = [-1] * len(t_eval)
        self.pieces: list[Tensor] = []
        self.next = 0

    def due(self, t: float) -> int:
        """How many samples lie at or before ``t``."""
        i = self.next
        while i < len(self.times) and self.sign * (self.times[i] - t) <= 0:
            i += 1
        return i

    def fill(
        self, upto: int, index: int, t: float, h: float, end: float, y: Tensor, y1: Tensor, stages: Callable[[], list[Tensor]]
    ) -> None:
        """Make the samples before the ``upto``-th, which lie in step ``index`` from ``t`` to ``end``."""
        thetas, n_ends = [], 0
        for i in range(self.next, upto):
            self.step[self.order[i]] = index
            if self.times[i] == end:
                n_ends += 1
            else:
                thetas.append((self.times[i] - t) / h)
        self.next = upto
        if thetas:
            weights = self._weights(thetas, h, y)
            known = torch.stack([y, *stages()]).reshape(weights.shape[1], -1)
            self.pieces.append(torch.mm(weights, known).reshape(len(thetas), *y.shape))
        if n_ends:
            self.pieces.append(y1.expand(n_ends, *y1.shape))

    def _weights(self, thetas: list[float], h: float, like: Tensor) -> Tensor:
        """``(len(thetas), 1 + S)``: of the state at the start and of every stage."""
        method = self.plan.method
        if len(thetas) <= _FEW:
            # for the few samples of a step tensor operators on so few elements would cost more than all the rest
            rows = [[1.0, *(h * w for w in method.dense_numbers(theta))] for theta in thetas]
            return torch.tensor(rows, dtype=like.dtype, device=like.device)
        weights = method.dense_weights(torch.tensor(thetas, dtype=torch.float64, device=like.device)) * h
        return torch.cat([torch.ones_like(weights[:, :1]), weights], dim=1).to(like.dtype)

    def lose(self, step: int) -> None:
        """Forget the samples in this step and all later ones."""
        good = sum(0 <= s < step for s in self.step)
        self.step = [s if s < step else -1 for s in self.step]
        self.pieces = [torch.cat(self.pieces)[:good]] if self.pieces else []

    def result(self) -> Tensor:
        """``(T, *state)``, NaN where the solve did not get to."""
        total = len(self.times)
        done = sum(len(piece) for piece in self.pieces)
        if done < total:
            self.pieces.append(self.like.new_full((total - done, *self.like.shape), float("nan")))
        if not self.pieces:
            return self.like.new_empty((0, *self.like.shape))
        out = torch.cat(self.pieces)
        if self.order == list(range(total)):
            return out
        inverse = [0] * total
        for place, i in enumerate(self.order):
            inverse[i] = place
        return out[torch.tensor(inverse, device=out.device)]
