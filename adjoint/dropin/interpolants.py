"""Fixed-step methods with torchdiffeq's choice of interpolation between grid points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from ..doors.event_slope import once
from ..errors import InvalidInput, positive
from ..methods import METHODS, DiagonallyImplicitRungeKutta, ExplicitRungeKutta, FullyImplicitRungeKutta, Method, Tableau
from ..system.capture import moves
from .request import IMPLICIT, Request

__all__ = ["fixed_grid", "fixed_method", "hermite", "on_lines", "parabola"]


_LINE = (
    "the time of a sample was to be differentiated twice, but between the points of the grid samples lie on straight lines, which have "
    "first derivatives only: give options={'interp': 'cubic'}, leave step_size and grid_constructor out, or detach the times"
)


@cache
def fixed_method(name: str, interp: str) -> Method:
    """The method ``name`` without error estimate, its dense output replaced: "linear", "cubic" (Hermite), or "event".

    The last is the cubic, but for methods of first order a parabola with the change of slope of the step: the ends of their steps are off
    by as much as a second derivative moves them, so that the cubic through these has second derivatives of order one everywhere.

    Implicit methods have no stages at both ends of a step, so with "cubic" they keep the polynomial of their own: it serves events, which
    are at the end of a step; samples are `between` grid points.
    """
    method = METHODS[IMPLICIT.get(name, name)]
    if name in IMPLICIT:
        return _implicit(method, interp == "linear")
    if not isinstance(method, ExplicitRungeKutta):
        raise InvalidInput(f"{name!r} has no tableau")
    base = replace(method.tableau, error=None, error_order=None)
    if interp == "event" and base.order == 1:
        return ExplicitRungeKutta(_parabolic(base))  # pyright: ignore[reportReturnType]
    return ExplicitRungeKutta(_linear(base) if interp == "linear" else _cubic(base))  # pyright: ignore[reportReturnType]


def _implicit(method: Method, linear: bool) -> Method:
    if isinstance(method, DiagonallyImplicitRungeKutta):
        tab = method.tableau
        line = {"dense": tuple((b,) for b in tab.b), "dense_order": 1} if linear else {}
        return DiagonallyImplicitRungeKutta(replace(tab, error=None, error_order=None, **line))  # pyright: ignore[reportReturnType]
    assert isinstance(method, FullyImplicitRungeKutta)
    # without gamma there is no error estimate
    plain = replace(method.tableau, gamma=None)
    if linear:
        object.__setattr__(plain, "dense", tuple((b,) for b in plain.b))
    return FullyImplicitRungeKutta(plain)  # pyright: ignore[reportReturnType]


def _linear(base: Tableau) -> Tableau:
    return replace(base, extra_a=(), extra_c=(), dense=tuple((b,) for b in base.b), dense_order=1)


def _cubic(base: Tableau) -> Tableau:
    """``y + h01 (y1 - y) + h (h10 f(t, y) + h11 f(t + h, y1))`` in powers of theta."""
    fsal = len(base.b) > 1 and base.c[-1] == 1.0 and base.b[-1] == 0.0 and base.a[-1] == base.b[:-1]
    extra = 0 if fsal else 1
    rows = [[0.0, 3 * b, -2 * b] for b in (*base.b, *([0.0] * extra))]
    for place, powers in ((0, (1.0, -2.0, 1.0)), (-1, (0.0, -1.0, 1.0))):
        rows[place] = [x + p for x, p in zip(rows[place], powers, strict=True)]
    return replace(
        base,
        extra_a=(base.b,) * extra,
        extra_c=(1.0,) * extra,
        dense=tuple(tuple(row) for row in rows),
        dense_order=min(3, base.order),
    )


def _parabolic(base: Tableau) -> Tableau:
    """`parabola` in powers of theta, of a method whose only stage is ``f(t, y)``."""
    return replace(base, extra_a=(base.b,), extra_c=(1.0,), dense=((1.5, -0.5), (-0.5, 0.5)), dense_order=1)


def check_interp(request: Request) -> str:
    """The ``interp`` option."""
    interp = request.options.get("interp", "linear")
    if interp not in ("linear", "cubic"):
        raise InvalidInput(f'Unknown interpolation method {interp!r}: choose "linear" or "cubic"')
    return interp


def step_size_of(request: Request) -> float | None:
    """The ``step_size`` option as a float."""
    size = request.options.get("step_size")
    return None if size is None else positive(size, "step_size", finite=True)


def fixed_grid(request: Request) -> Tensor:
    """The grid of a fixed-step solve, ``(A,)`` float64: ``t`` itself, or as ``step_size`` or ``grid_constructor`` say."""
    t, size = request.t, step_size_of(request)
    fixed = t.detach()
    construct: Callable[..., Tensor] | None = request.options.get("grid_constructor")
    if size is None:
        grid = t if construct is None else torch.as_tensor(construct(request.func, request.y0, t), device=t.device)
    elif construct is not None:
        raise InvalidInput("step_size and grid_constructor are mutually exclusive arguments.")
    else:
        times = t.to(torch.float64)
        ratio = float((fixed[-1] - fixed[0]).abs()) / size
        # a ratio that is an integer but for rounding must not add a step of no length
        steps = max(1, -int(-(ratio * (1 - 1e-7)) // 1))
        inner = times[0] + request.sign * size * torch.arange(steps, dtype=torch.float64, device=t.device)
        return torch.cat([inner, times[-1:]])
    if grid.dim() != 1 or not bool((grid[0] == t[0]) & (grid[-1] == t[-1])):
        raise InvalidInput("grid_constructor must return a one dimensional grid that begins at t[0] and ends at t[-1]")
    grid = grid.to(torch.float64)
    if not bool((request.sign * grid.diff() > 0).all()):
        raise InvalidInput("grid_constructor must return a strictly monotonic grid, in the direction of t")
    return grid


def on_lines(request: Request, times: Tensor, grid: Tensor) -> Tensor:
    """Times ``(T,)`` of samples, as they are; those on lines between points of the ``grid`` (A,) have no second derivatives, which is said
    to whoever takes them. A point that moves with its sample is none of these: all, where nothing else makes the grid."""
    own = step_size_of(request) is None
    if check_interp(request) != "linear" or not moves(times) or (own and request.options.get("grid_constructor") is None):
        return times
    tied = (times.unsqueeze(-1) == (grid if own else grid[-1:])).any(-1).detach()
    return once(times, ~tied, _LINE, times)


def hermite(theta: Tensor, y0: Tensor, y1: Tensor, hf0: Tensor, hf1: Tensor) -> Tensor:
    """The cubic through ``y0, y1`` with slopes ``hf0, hf1`` at ``theta`` in [0, 1]."""
    blend = theta * theta * (3 - 2 * theta)
    return y0 + blend * (y1 - y0) + theta * (1 - theta) ** 2 * hf0 + theta * theta * (theta - 1) * hf1


def parabola(theta: Tensor, y0: Tensor, y1: Tensor, hf0: Tensor, hf1: Tensor) -> Tensor:
    """That through ``y0, y1`` whose slope changes from one to the other by ``hf1 - hf0``."""
    return y0 + theta * (y1 - y0) - 0.5 * theta * (1 - theta) * (hf1 - hf0)
