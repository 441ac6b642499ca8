"""Simplified Newton iterations for the stages of a step: one rule, for one trajectory and for many, whatever the equations are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from .numbers import Decision, Measure, any_of, at_least, at_most, choose, finite, negated

__all__ = ["iterate"]

X = TypeVar("X")
D = TypeVar("D")


def iterate(
    x: X,
    change: Callable[[X, Decision], tuple[D, Measure]],
    moved: Callable[[X, D, Decision], X],
    running: Decision,
    bound: float,
    most: int,
    worst: float = 2.0,
    early: bool = False,
) -> tuple[X, Decision, Decision]:
    """Repeat ``x = moved(x, change(x))`` until its error, by the geometric series of its changes, is at most ``bound``.

    Hairer & Wanner, Solving ordinary differential equations II, section IV.8: with the rate ``r`` at which changes become smaller, the
    error after the present one of size ``d`` is ``r / (1 - r) d``; in the first round nothing is known of the rate, and ``d`` counts.
    An iteration fails where a change is not finite or grows by ``worst``, after ``most`` rounds, and if ``early`` as soon as it will not
    be done by then.

    Parameters
    ----------
    change : from ``x`` and who still ``running`` is, the change and its size
    moved : from ``x``, a change and whose, the next ``x``

    Returns
    -------
    The last ``x``, what has failed, and what of that was finite all the way.
    """
    before: Measure = math.nan
    rate: Measure = 1.0
    failed = stalled = torch.zeros_like(running) if isinstance(running, Tensor) else False
    for k in range(most):
        delta, length = change(x, running)
        fine = finite(length)
        bad = negated(fine)
        if k:
            rate = choose(running, length / before, rate)
            bad = bad | (rate >= worst)
            if early:
                bad = bad | _hopeless(rate, length / bound, most - 1 - k)
        bad = running & bad
        failed, stalled = failed | bad, stalled | (bad & fine)
        x = moved(x, delta, running & negated(bad))
        small = (rate / at_least(1 - rate, 1e-3) * length <= bound) & (rate < 1) if k else length <= bound
        running = running & negated(bad) & negated(small) & (length > 0)
        before = length
        if not any_of(running):
            break
    return x, failed | running, stalled | running


def _hopeless(rate: Measure, length: Measure, left: int) -> Decision:
    """Whether the iteration, at this rate, will not be on a bound of one after ``left`` more of its rounds (Hairer & Wanner II, equation
    IV.8.11): a step that may be repeated is then given up at once."""
    # a power of what is larger may be beyond all numbers
    slow = at_most(rate, 1.0)
    return (rate >= 1.0) | (slow ** (left + 1) / at_least(1 - slow, 1e-3) * length > 1.0)
