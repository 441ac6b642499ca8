"""The solution beside a boundary of rounds, to second order.

Where two times are one, and are differentiated, each of them moves alone: a dose at the end of the span, or beside another one, a sample
where there is a dose, a row whose span has no length. The way from the one to the other has the value zero, and derivatives: the solution
is followed along it. Solves of no length do so by themselves where the equations tell the slope; of implicit equations, of which no step
tells it there, it is that of consistent values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..sensitivity.consistent import Initial
from ..sensitivity.products import tangent
from ..system.capture import moves
from ..system.transforms import anywhere
from .dae_start import second_order
from .round_rules import Boundary
from .round_task import Task
from .rows import chosen, forward_fill, still, usable, wide

__all__ = ["Course", "slopes"]


@dataclass(frozen=True)
class Course:
    """The solution through the boundary ``at``, with what is ``infused``. Trajectories that are ``lost`` (R) have none."""

    task: Task
    at: Boundary
    infused: tuple[Any, ...]
    lost: Tensor

    @cached_property
    def slopes(self) -> tuple[Any, Any]:
        return slopes(self.task, self.at, self.infused, self.lost)

    def to(self, t: Tensor, on: Tensor) -> tuple[Any, Any]:
        """States, and of implicit equations slopes, at times ``(R)`` or ``(T, R)`` which are, where ``on``, that of the boundary but for
        rounding; those of the boundary where no derivative may be asked."""
        way = torch.where(on & ~self.lost, t - self.at.t, 0.0)
        way, at = way - way.detach(), (self.at.y, self.at.yp)
        if not moves(way):
            return at
        if self.at.yp is None or way.dim() == self.at.t.dim():
            return self._consistent(way, on)
        lines = [self._consistent(w, o) if anywhere(o) else at for w, o in zip(way, on, strict=True)]
        found: tuple[Any, Any] = tree_map(lambda *xs: torch.stack(xs), *lines)
        return found

    def by(self, way: Tensor) -> Boundary:
        """What is there a way ``(R)`` of value zero behind the boundary, with the integrals over it; slopes stay."""
        if not moves(way):
            return self.at
        way = torch.where(self.lost, 0.0, way)
        return replace(self.at, t=self.at.t + way, y=self._along(way), integral=self._integral(way))

    def _consistent(self, way: Tensor, on: Tensor) -> tuple[Any, Any]:
        y = self._along(way)
        if self.at.yp is None:
            return y, None
        found = self.task.settled(replace(self.at, t=self.at.t + way, y=y), self.infused, on, ~on, self.at.y)
        return found.y, found.yp

    def _along(self, way: Tensor) -> Any:
        y, rate, bend = self.at.y, *self.slopes
        if way.dim() > self.at.t.dim():
            # one line for all times
            y, rate, bend = tree_map(lambda x: x.unsqueeze(0), (y, rate, bend))

        def moved(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            step = wide(way, a).to(a.dtype)
            return a + step * (b + step / 2 * c)

        return tree_map(moved, y, rate, bend)

    def _integral(self, way: Tensor) -> Any:
        """What the integral of ``at`` is then, by the midpoint rule: of second order, as the state."""
        integrand = self.task.options["quadrature"]
        if integrand is None:
            return None
        # trajectories that are not asked for meet no state that the integrand is not made for
        t, y, rate, mode = forward_fill(~self.lost, (self.at.t, self.at.y, self.slopes[0], self.at.mode))
        y = tree_map(lambda a, b: a + wide(way, a).to(a.dtype) / 2 * b, y, rate)
        value = integrand((t + way / 2).to(self.task.spec.real_dtype), y, *usable((*mode, *self.task.args, *self.infused)))
        added = tree_map(lambda g: torch.where(wide(self.lost, g), 0.0, wide(way, g).to(g.dtype) * g), value)
        return added if self.at.integral is None else tree_map(torch.add, self.at.integral, added)


def slopes(task: Task, at: Boundary, infused: tuple[Any, ...], lost: Tensor) -> tuple[Any, Any]:
    """``y'``, which is differentiable, and ``y''`` of the solution through a boundary; none of ``lost`` trajectories, which are NaN."""
    spec, told = task.spec, task.slope(infused)
    if told is not None:
        t, y, mode = forward_fill(~lost, (at.t, at.y, at.mode))

        def rate_at(t: Tensor, y: Tensor) -> Tensor:
            rate = spec.flatten(told(t.reshape(at.t.shape), spec.unflatten(y), mode))
            return torch.where(lost.reshape(-1, 1), 0.0, rate)

        t, y = t.reshape(-1), spec.flatten(y)
        first = rate_at(t, y)
        second = tangent(rate_at, [t, y], [torch.ones_like(t), first]).detach()
        return spec.unflatten(first), spec.unflatten(second)
    every = torch.ones_like(lost)
    y = chosen(lost, tree_map(torch.zeros_like, still(at.y)), at.y)

    def consistent(t: Tensor, at_t: Initial) -> Initial:
        found = task.settled(Boundary(t if task.batched else t[0], spec.unflatten(at_t.y), at.mode), infused, every, lost, y)
        return Initial(spec.flatten(found.y), spec.flatten(found.yp))

    flat = spec.flatten(y)
    found = second_order(consistent, at.t.reshape(-1), Initial(flat, torch.zeros_like(flat)))
    rate, bend = (spec.unflatten(x) for x in found)
    return rate, bend
