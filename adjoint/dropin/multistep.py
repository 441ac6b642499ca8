"""Adams-Bashforth and Adams-Bashforth-Moulton on a fixed grid.

The formulas carry slopes from step to step, which the one-step protocol of ``methods`` has no place for. So the solve is a plain
composition of differentiable steps: every derivative and every transform works, the adjoint is exact, and with `DiscreteAdjoint` each
evaluation of ``fun`` keeps only its arguments. Slopes of past steps are shared, so a step costs one evaluation
(and one per corrector iteration).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..doors.event_slope import with_slope
from ..errors import InvalidInput, NonFiniteState
from ..integrate import Monitor, shifted_times
from ..methods import METHODS
from ..methods.adams import MAX_ORDER, adams_weights, differentiable_weights, starter
from ..sensitivity import Gradient
from ..sensitivity.sweep import tangent
from ..system.capture import listed, needs_derivatives
from ..system.transforms import functorch_active
from .interpolants import check_interp, fixed_grid, hermite, on_lines, parabola, step_size_of
from .native import evaluated, prepare, start_event
from .request import Request

__all__ = ["adams_event", "adams_samples"]

_MAX_EVENT_STEPS = 20_000
#: part of a step by which one of the start ends before the event
_SHORT = 1e-3


@dataclass
class _Step:
    """A step that was taken: ``t, h`` 0-d float64, states and slope ``(1, n)``."""

    t: Tensor
    h: Tensor
    y: Tensor
    y1: Tensor
    slope: Tensor


class _Adams:
    """Takes the steps of one solve, one after the other."""

    def __init__(self, request: Request, gradient: Gradient, only: Any, event: Callable[..., Tensor] | None = None) -> None:
        options = request.options
        self.request = request
        self.implicit = request.method != "explicit_adams"
        self.order = int(options.get("max_order", 8 if self.implicit else 4))
        if not 1 <= self.order <= MAX_ORDER:
            raise InvalidInput(f"max_order must be between 1 and {MAX_ORDER}, got {self.order}")
        self.max_iters = int(options.get("max_iters", 4))
        self.perturb = bool(options.get("perturb"))
        self.real = request.spec.real_dtype
        ready = prepare(request, only, event)
        self.derivatives = ready.derivatives
        self.f = evaluated(ready, gradient)
        self.monitor = request.monitor()
        self.watch_back = type(self.monitor).adjoint is not Monitor.adjoint
        name, self.start_slopes = starter(self.order)
        self.starter: Any = METHODS[name]
        self.times: list[Tensor] = []
        self.slopes: list[Tensor] = []

    def _time(self, t: Tensor, node: float) -> Tensor:
        time = t.to(self.real)
        return shifted_times([time], [node], self.perturb, self.perturb, self.request.sign)[0]

    def step(self, t: Tensor, t1: Tensor, y: Tensor) -> _Step:
        """From ``t`` to ``t1`` (0-d float64)."""
        self.monitor.step(float(t.detach()), y, float((t1 - t).detach()))
        slope = self.f(self._time(t, 0.0), y)
        self.times.insert(0, t)
        self.slopes.insert(0, slope)
        del self.times[self.order :], self.slopes[self.order :]
        y1 = self.end(t, t1, y)
        if self.watch_back and y1.requires_grad:
            where, state, size = float(t.detach()), y.detach(), float((t1 - t).detach())
            y1.register_hook(lambda bar: self.monitor.adjoint(where, state, size, bar))
        return _Step(t, t1 - t, y, y1, slope)

    def end(self, t: Tensor, t1: Tensor, y: Tensor) -> Tensor:
        """The state at ``t1`` of a step from ``t``, whose slope is the latest one."""
        h = t1 - t
        # the corrector's formula counts the slope at the end as well
        past = min(len(self.slopes), self.order - 1 if self.implicit and self.order > 1 else self.order)
        needed = self.start_slopes - 1 if self.implicit and self.order > 1 else self.start_slopes
        return self._started(t, h, y, self.slopes[0]) if past < needed else self._adams(t1, h, y, past)

    def begun(self) -> bool:
        """Whether there are slopes enough for the formula, and for one whose second derivative in the time is not zero."""
        return self.order > 1 and self.start_slopes <= len(self.slopes)

    def along(self, t: Tensor, y: Tensor, t1: Tensor) -> Callable[[Tensor], Tensor]:
        """The solution from ``t``, whose slope is the latest one, to ``t1`` and a little beyond, with no evaluation from ``t1`` on."""
        if self.begun():
            # the predictor of a corrector too, of the order of the whole
            return lambda time: self._predicted(time - t, y, len(self.slopes))
        short = t + (1 - _SHORT) * (t1 - t)
        y1 = self.end(t, short, y)
        h = (short - t).to(self.real)
        slopes = h * self.slopes[0], h * self.f(self._time(short, 1.0), y1)
        curve = parabola if self.order == 1 else hermite
        return lambda time: curve(((time - t) / (short - t)).to(self.real), y, y1, *slopes)

    def _started(self, t: Tensor, h: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        times = [self._time(t + c * h, c) for c in self.starter.nodes]
        return self.starter.step(self.f, times, h.to(self.real), y, slope)[0]

    def _adams(self, t1: Tensor, h: Tensor, y: Tensor, past: int) -> Tensor:
        slopes, y1 = self.slopes[:past], self._predicted(h, y, past)
        if not self.implicit:
            return y1
        end, *rest = self._weights(h, past, True)
        known = y + h.to(self.real) * _weighed(rest, slopes)
        time = self._time(t1, 1.0)
        for _ in range(self.max_iters):
            before, y1 = y1, known + (h.to(self.real) * end) * self.f(time, y1)
            # the number of iterations cannot depend on data that a transform hides
            if not functorch_active() and self._converged(before, y1):
                return y1
        if not functorch_active():
            warnings.warn("Functional iteration did not converge. Solution may be incorrect.", stacklevel=2)
        return y1

    def _predicted(self, h: Tensor, y: Tensor, past: int) -> Tensor:
        return y + h.to(self.real) * _weighed(self._weights(h, past, False), self.slopes[:past])

    def _converged(self, y0: Tensor, y1: Tensor) -> bool:
        with torch.no_grad():
            tolerance = self.request.atol + self.request.rtol * torch.maximum(y0.abs(), y1.abs())
            return bool(((y1 - y0).abs() <= tolerance).all())

    def _weights(self, h: Tensor, past: int, implicit: bool) -> Any:
        """Weights of (the end and) the present and past slopes."""
        times = torch.stack(self.times[:past])
        places = (times - times[0]) / h
        if implicit:
            places = torch.cat([torch.ones_like(places[:1]), places])
        if needs_derivatives([places]) or functorch_active():
            return differentiable_weights(places).to(self.real).unbind()
        return adams_weights(places.tolist())


def _weighed(weights: Any, slopes: list[Tensor]) -> Tensor:
    total = weights[0] * slopes[0]
    for w, k in zip(weights[1:], slopes[1:], strict=True):
        total = total + w * k
    return total


def adams_samples(request: Request, gradient: Gradient, only: Any = None) -> Any:
    """The states at ``request.t``, ``(T, *shape)`` each."""
    interp = check_interp(request)
    solver = _Adams(request, gradient, only)
    grid = fixed_grid(request)
    y = request.spec.taken(request.y0)
    steps: list[_Step] = []
    for t, t1 in pairwise(grid):
        steps.append(solver.step(t, t1, y))
        y = steps[-1].y1
    _check_finite(steps)
    out = [steps[0].y]
    places = listed(torch.searchsorted(request.sign * grid.detach(), request.sign * request.t.detach().to(torch.float64)))
    for t, place in zip(on_lines(request, request.t[1:].to(torch.float64), grid), places[1:], strict=True):
        step = steps[place - 1]
        if bool(t.detach() == grid[place].detach()) and not needs_derivatives([t]):
            out.append(step.y1)
            continue
        following = steps[place].slope if place < len(steps) else None
        out.append(_between(solver, interp, step, t, following))
    return request.spec.unflatten(torch.stack(out))


def _between(solver: _Adams, interp: str, step: _Step, t: Tensor, following: Tensor | None) -> Tensor:
    theta = ((t - step.t) / step.h).to(solver.real)
    if interp == "linear":
        return step.y + theta * (step.y1 - step.y)
    h = step.h.to(solver.real)
    end_slope = solver.f(solver._time(step.t + step.h, 1.0), step.y1) if following is None else following
    curve = parabola if interp == "parabola" else hermite
    return curve(theta, step.y, step.y1, h * step.slope, h * end_slope)


def _check_finite(steps: list[_Step]) -> None:
    if functorch_active() or not steps or bool(torch.isfinite(steps[-1].y1).all()):
        return
    first = next(s for s in steps if not bool(torch.isfinite(s.y1).all()))
    t = float(first.t)
    raise NonFiniteState(f"the state became non-finite in the step from t = {t:.8g}: try smaller steps, or a lower max_order", t=t)


def adams_event(request: Request, gradient: Gradient, only: Any = None) -> tuple[Tensor, Any]:
    """Time of the first event, and the states at the start and there; see `native.solve_event`.

    The last step is one that ends at the event, from the slopes before it alone: ``func`` may change where the event is."""
    from scipy.optimize import brentq

    # as with all methods on a grid; see `native.solve_event`
    check_interp(request)
    size = step_size_of(request)
    event, at_start = start_event(request)
    spec = request.spec
    y = start = spec.taken(request.y0)
    if at_start:
        return request.t[0].clone(), spec.unflatten(torch.stack([start, start]))
    if size is None:
        raise InvalidInput("Event handling for fixed step solvers currently requires `step_size` to be provided in options.")
    solver = _Adams(request, gradient, only, event)
    t = request.t[0].to(torch.float64)

    def value(t: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(event(t.to(spec.real_dtype), spec.unflatten(y)))

    for _ in range(_MAX_EVENT_STEPS):
        step = solver.step(t, t + request.sign * size, y)
        t, y = t + request.sign * size, step.y1
        if value(t, y) <= 0:
            break
    else:
        raise InvalidInput(f"no event in {_MAX_EVENT_STEPS} steps of size {size}")
    _check_finite([step])
    predicted = solver.along(step.t, step.y, t) if solver.begun() else lambda when: solver.end(step.t, when, step.y)

    def left(theta: float) -> float:
        with torch.no_grad():
            when = step.t + theta * step.h
            return value(when, predicted(when) if theta else step.y)

    # the formula of a step and that of its last part differ by its error
    theta = float(brentq(left, 0.0, 1.0, xtol=1e-15)) if left(1.0) < 0.0 else 1.0  # type: ignore[arg-type]
    when = step.t + theta * step.h
    state = solver.along(step.t, step.y, when)

    def residual(t: Tensor) -> Tensor:
        return event(t.to(spec.real_dtype), spec.unflatten(state(t))).reshape(()).to(torch.float64)

    def rate(t: Tensor) -> Tensor:
        return tangent(residual, (t,), (torch.ones_like(t),))

    flat = state(when)
    if solver.derivatives:
        slope = rate(when).detach()
        sloping = torch.isfinite(slope) & (slope != 0)
        if bool(sloping):
            # two Newton steps with differentiable slopes, begun at the root, have all its derivatives up to the third
            for _ in range(2):
                when = when - residual(when) / rate(when)
            flat = state(when)
        else:
            when, flat = with_slope(when, sloping, flat), with_slope(flat, sloping)
    return when.to(request.t.dtype), spec.unflatten(torch.stack([start, flat]))
