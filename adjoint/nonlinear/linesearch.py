"""Backtracking along a step, every row with its own length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InvalidInput
from .rows import Rows, clip, pick

__all__ = ["Backtracking", "Searched"]


@dataclass(frozen=True)
class Searched:
    """Accepted points. ``accepted`` (B,); the others are where they were. ``length`` (B,) is the part of the step taken."""

    accepted: Tensor
    length: Tensor
    x: Tensor
    residual: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Backtracking:
    """Armijo's rule on a merit that falls at the rate ``-merit`` along the step (|residual| or Deuflhard's natural level along Newton's).

    A length ``a`` is accepted where ``merit(a) <= (1 - decrease a) merit(0)``; else the square of the merit is interpolated, by a parabola
    and then by cubics, within [0.1, 0.5] of the last length (Dennis & Schnabel 1983, A6.3.1; Kelley 1995, section 8.3).
    """

    decrease: float = 1e-4
    min_length: float = 1e-10
    max_trials: int = 40

    def __post_init__(self) -> None:
        if not (0 < self.decrease < 1 and 0 < self.min_length < 1 and self.max_trials >= 1):
            raise InvalidInput(f"need 0 < decrease < 1, 0 < min_length < 1 and max_trials >= 1, got {self!r}")

    def search(
        self,
        rows: Rows,
        step: Tensor,
        longest: Tensor,
        merit: Callable[[Tensor, Tensor], Tensor],
        start: Tensor,
        free: Tensor,
        single: Tensor,
    ) -> Searched:
        """``merit(residual, norm)`` is compared with ``start``. Lengths begin at ``longest`` (B,). Rows of ``free`` accept any finite
        point: their steps are too small to judge. Rows of ``single`` are tried once only."""
        problem, running = rows.problem, rows.running
        searching, accepted = running, torch.zeros_like(running)
        length, x, residual, norm = longest, rows.x, rows.residual, rows.norm
        before, value_before = length, start.square()
        for trial in range(self.max_trials):
            point = clip(problem, rows.x + length.unsqueeze(-1) * step)
            r, r_norm = rows.evaluate(torch.where(searching.unsqueeze(-1), point, rows.x), searching)
            value = torch.where(torch.isfinite(r_norm), merit(r, r_norm), float("inf"))
            good = searching & torch.isfinite(value) & ((value <= (1 - self.decrease * length) * start) | free)
            x, residual, norm = pick(good, point, x), pick(good, r, residual), pick(good, r_norm, norm)
            accepted = accepted | good
            searching = searching & ~good & ~single & (length > self.min_length)
            if not bool(searching.any()):
                break
            shorter = _interpolate(start.square(), length, value.square(), before, value_before, trial == 0)
            before, value_before = torch.where(searching, length, before), torch.where(searching, value.square(), value_before)
            length = torch.where(searching, shorter, length)
        return Searched(accepted, length, x, residual, norm)


def _interpolate(f0: Tensor, a: Tensor, fa: Tensor, b: Tensor, fb: Tensor, first: bool) -> Tensor:
    """The minimiser of the parabola (or cubic) through ``f(0), f'(0) = -2 f(0), f(a)`` (and ``f(b)``), kept in [0.1, 0.5] a."""
    slope = -2 * f0
    guess = -slope * a * a / (2 * (fa - f0 - slope * a))
    if not first:
        ra, rb = (fa - f0 - slope * a) / a**2, (fb - f0 - slope * b) / b**2
        cubic, square = (ra - rb) / (a - b), (a * rb - b * ra) / (a - b)
        root = (-square + (square * square - 3 * cubic * slope).clamp(min=0).sqrt()) / (3 * cubic)
        guess = torch.where(torch.isfinite(root), root, guess)
    guess = torch.where(torch.isfinite(guess), guess, 0.1 * a)
    return torch.minimum(torch.maximum(guess, 0.1 * a), 0.5 * a)
