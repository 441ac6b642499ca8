"""Where a function of the time within a step changes its sign: all roots, of many steps at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .numbers import Decision

__all__ = ["GRID", "chandrupatla", "crossings", "may_cross"]

_EPS = float(torch.finfo(torch.float64).eps)
#: bisection of an interval alone would take 52
_MOST = 200
#: where a function is looked at inside of a step, beside its ends
GRID = (1 / 3, 2 / 3)
#: how close to zero, in parts of its range, the cubic through four values must come for a closer look
_NEAR = 0.1
_TINY = 1e-300
#: of the search for a value on the other side of zero
_ROUNDS = 8

# from the values of a cubic at 0, 1/3, 2/3, 1 to its coefficients in powers and in Bernstein's basis, in whose hull it lies
_POWERS = ((1.0, 0.0, 0.0, 0.0), (-5.5, 9.0, -4.5, 1.0), (9.0, -22.5, 18.0, -4.5), (-4.5, 13.5, -13.5, 4.5))
_INNER = ((-5 / 6, 3.0, -1.5, 1 / 3), (1 / 3, -1.5, 3.0, -5 / 6))


def may_cross(values: Any) -> Decision:
    """Whether a function with these values at 0, 1/3, 2/3 and 1 (and beyond) may change its sign there: ``P`` numbers, or ``(P, ...)``."""
    if isinstance(values, Tensor):
        least, most = values.amin(0), values.amax(0)
        inner = torch.einsum("ip,p...->i...", torch.tensor(_INNER, dtype=values.dtype, device=values.device), values[:4])
        slack = _NEAR * (most - least)
        low, high = torch.minimum(least, inner.amin(0) - slack), torch.maximum(most, inner.amax(0) + slack)
    else:
        least, most = min(values), max(values)
        between = [sum(w * v for w, v in zip(row, values[:4], strict=True)) for row in _INNER]
        slack = _NEAR * (most - least)
        low, high = min(least, min(between) - slack), max(most, max(between) + slack)
    return (low <= 0) & (high >= 0)


def chandrupatla(
    f: Callable[[Tensor], Tensor],
    f0: Tensor,
    f1: Tensor,
    active: Tensor,
    start: Tensor | float = 0.0,
    end: Tensor | float = 1.0,
) -> Tensor:
    """Roots between ``start`` and ``end`` of the ``active`` rows of ``f``, whose values there, ``f0`` and ``f1``, differ in sign.

    Inverse quadratic interpolation where that is safe, else bisection (Chandrupatla 1997, Adv. Eng. Software 28:145), to four units of
    rounding of the interval. A function that is zero over a part of the interval has its root where that begins; other rows get ``end``.
    """
    start, end = (torch.as_tensor(x, dtype=f1.dtype, device=f1.device).expand_as(f1) for x in (start, end))
    beyond = -torch.sign(f0) * _TINY

    def value(x: Tensor) -> Tensor:
        # zero belongs to the far side
        fx = f(start + x * (end - start))
        return torch.where(fx == 0, beyond, fx)

    f1 = torch.where(f1 == 0, beyond, f1)
    a, fa, b, fb = torch.ones_like(f1), f1, torch.zeros_like(f1), f0
    c, fc = b, fb
    share = torch.full_like(f1, 0.5)
    best = a
    tolerance = 4 * _EPS
    for _ in range(_MOST):
        x = torch.where(active, a + share * (b - a), best)
        fx = value(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(active, torch.where(fa.abs() < fb.abs(), a, b), best)
        least = tolerance / (b - a).abs()
        active = active & ~((least > 0.5) | ~torch.isfinite(fx))
        if not bool(active.any()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & torch.isfinite(inverse)
        share = torch.minimum(torch.maximum(torch.where(smooth, inverse, 0.5), least), 1 - least)
    return torch.where(best >= 1 - 2 * tolerance, end, start + best * (end - start))


def crossings(f: Callable[[Tensor], Tensor], places: Tensor, values: Tensor, direction: float, wanted: Tensor) -> Tensor:
    """Where the ``wanted`` rows of ``f`` change their sign in the ``direction``: ``(R, B)``, increasing, infinity for none.

    ``places`` and ``values`` (P, B): the first four are at 0, 1/3, 2/3 and 1. Beside changes of sign from one of them to the next, two
    changes between neighbours are found where the cubic through the four comes close to zero: there the function itself is followed
    down to its extremum. A function that touches zero inside of the step and turns back has no root there.
    """
    places, values = _with_dips(f, places, values, wanted)
    out = []
    for k in range(len(places) - 1):
        a, b = values[k], values[k + 1]
        up, down = (a < 0) & (b >= 0), (a > 0) & (b <= 0)
        crossed = ((up & (direction >= 0)) | (down & (direction <= 0))) & wanted
        root = torch.full_like(a, float("inf"))
        if bool(crossed.any()):
            root = torch.where(crossed, chandrupatla(f, a, b, crossed, places[k], places[k + 1]), root)
        out.append(root)
    return torch.stack(out)


def _with_dips(f: Callable[[Tensor], Tensor], places: Tensor, values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The points with those added, in their order, at which the function is on the other side of zero than both its neighbours."""
    _, c1, c2, c3 = (torch.tensor(_POWERS, dtype=values.dtype, device=values.device) @ values[:4]).unbind()
    scale = values[:4].amax(0) - values[:4].amin(0)
    root = (c2**2 - 3 * c1 * c3).clamp(min=0).sqrt()
    # both extrema of the cubic, without cancellation
    q = -(c2 + torch.where(c2 < 0, -root, root))
    found_x, found_v = [], []
    for x in (q / (3 * c3), c1 / q):
        inside = torch.isfinite(x) & (x > 0) & (x < 1) & (root > 0) & wanted
        x = torch.where(inside, x, 0.5)
        k = (x * 3).long().clamp(max=2).unsqueeze(0)
        (left, f_left), (right, f_right) = ((places.gather(0, k + i)[0], values.gather(0, k + i)[0]) for i in (0, 1))
        side = torch.sign(f_left)
        predicted = values[0] + x * (c1 + x * (c2 + x * c3))
        bends = side * (2 * c2 + 6 * c3 * x) > 0
        active = inside & (side != 0) & (side == torch.sign(f_right)) & bends & (side * predicted <= _NEAR * scale)
        if not bool(active.any()):
            continue
        x, v = _lowest(lambda s: side * f(s), x, (left, side * f_left), (right, side * f_right), active)  # noqa: B023
        # beyond what rounding may make of values as large as those of this step
        other = active & (v < -_EPS * scale)
        found_x.append(torch.where(other, x, 1.0))
        found_v.append(torch.where(other, side * v, values[3]))
    # a zero between two values of one sign is no change of it
    middle, before, after = values[1:3], values[:2], values[2:4]
    touched = (middle == 0) & (before * after > 0)
    values = torch.cat([values[:1], torch.where(touched, torch.sign(before) * _TINY, middle), values[3:]])
    if not found_x:
        return places, values
    places, values = torch.cat([places, torch.stack(found_x)]), torch.cat([values, torch.stack(found_v)])
    order = places.argsort(dim=0, stable=True)
    return places.gather(0, order), values.gather(0, order)


def _lowest(
    f: Callable[[Tensor], Tensor], x: Tensor, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], active: Tensor
) -> tuple[Tensor, Tensor]:
    """Towards the minimum of ``f`` between two points, begun at ``x`` and ended where it is negative: by parabolas."""
    (a, fa), (b, fb) = left, right
    v = f(x)
    for _ in range(_ROUNDS):
        # a positive value below both others, or there is nothing to follow
        active = active & (v >= 0) & (v <= fa) & (v <= fb)
        if not bool(active.any()):
            break
        p, q = (x - a) ** 2 * (v - fb), (x - b) ** 2 * (v - fa)
        vertex = x - 0.5 * (p - q) / ((x - a) * (v - fb) - (x - b) * (v - fa))
        # not there again: a step into the longer side
        aside = x + 0.1 * torch.where(b - x > x - a, b - x, a - x)
        usable = torch.isfinite(vertex) & (vertex > a) & (vertex < b) & ((vertex - x).abs() > 1e-3 * (b - a))
        at = torch.where(active, torch.where(usable, vertex, aside), x)
        w = f(at)
        better, below = w < v, at < x
        # the better one is the new middle, the other one (or the old middle) a new end
        a, fa = _choose(active & (below != better), (torch.where(better, x, at), torch.where(better, v, w)), (a, fa))
        b, fb = _choose(active & (below == better), (torch.where(better, x, at), torch.where(better, v, w)), (b, fb))
        x, v = _choose(active & better, (at, w), (x, v))
    return x, v


def _choose(on: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.where(on, new[0], old[0]), torch.where(on, new[1], old[1])
