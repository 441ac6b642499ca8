"""Finding events of many trajectories: sign changes over a step, located on its dense output for all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .plan import Plan

__all__ = ["BatchEventWatch", "chandrupatla", "no_events"]

_EPS = float(torch.finfo(torch.float64).eps)
#: bisection of [0, 1] alone would take 52
_MOST = 200


def chandrupatla(f: Callable[[Tensor], Tensor], f0: Tensor, f1: Tensor, active: Tensor) -> Tensor:
    """Roots in [0, 1] of the ``active`` rows of ``f``, whose values at the ends, ``f0`` and ``f1``, differ in sign; one for the others.

    Inverse quadratic interpolation where that is safe, else bisection (Chandrupatla 1997, Adv. Eng. Software 28:145), to four units of
    rounding of the interval.
    """
    a, fa, b, fb = torch.ones_like(f1), f1, torch.zeros_like(f1), f0
    c, fc = b, fb
    share = torch.full_like(f1, 0.5)
    best = a
    active = active & (f1 != 0)
    tolerance = 4 * _EPS
    for _ in range(_MOST):
        x = torch.where(active, a + share * (b - a), best)
        fx = f(x)
        same = torch.sign(fx) == torch.sign(fa)
        c, fc = torch.where(same, a, b), torch.where(same, fa, fb)
        b, fb = torch.where(same, b, a), torch.where(same, fb, fa)
        a, fa = x, fx
        best = torch.where(active, torch.where(fa.abs() < fb.abs(), a, b), best)
        least = tolerance / (b - a).abs()
        active = active & ~((least > 0.5) | (torch.where(fa.abs() < fb.abs(), fa, fb) == 0) | ~torch.isfinite(fx))
        if not bool(active.any()):
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        smooth = (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi) & torch.isfinite(inverse)
        share = torch.minimum(torch.maximum(torch.where(smooth, inverse, 0.5), least), 1 - least)
    return best


class BatchEventWatch:
    """As `EventWatch`, for many trajectories: what one finds does not depend on the others."""

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], t0: Tensor, y0: Tensor) -> None:
        self.plan = plan
        self.functions = [event.bind(inputs) for event in plan.events]
        self.direction = torch.tensor([[e.direction] for e in plan.events], device=y0.device)
        self.terminal = torch.tensor([e.terminal for e in plan.events], device=y0.device)
        self.values = torch.stack([self._value(i, t0, y0) for i in range(len(plan.events))])
        self.counts = torch.zeros_like(self.values, dtype=torch.int64) if plan.event_counts is None else plan.event_counts.clone()
        #: event, trajectory, its step, and time of each, in the order of time for each trajectory
        self.found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def _value(self, i: int, t: Tensor, y: Tensor) -> Tensor:
        return self.functions[i](t.to(self.plan.real), y).detach().reshape(-1)

    def after_step(
        self, accepted: Tensor, t: Tensor, h: Tensor, end: Tensor, y: Tensor, y1: Tensor, stages: Sequence[Tensor], index: Tensor
    ) -> Tensor | None:
        """Register the events of the accepted steps, which are the ``index``-th of their trajectories.

        Returns the times (B,) at which trajectories end, NaN for those that go on; None if all do.
        """
        new = torch.stack([self._value(i, end, y1) for i in range(len(self.functions))])
        # direction is that along the integration, as SciPy has it
        up, down = (self.values < 0) & (new >= 0), (self.values > 0) & (new <= 0)
        crossed = ((up & (self.direction >= 0)) | (down & (self.direction <= 0))) & accepted
        old, self.values = self.values, torch.where(accepted, new, self.values)
        if not bool(crossed.any()):
            return None
        size = h.to(y.dtype.to_real()).unsqueeze(-1)

        def state(theta: Tensor) -> Tensor:
            weights = self.plan.method.dense_weights(theta).to(y.dtype)
            inside = y + size * sum(weights[:, i : i + 1] * k for i, k in enumerate(stages))
            return torch.where((theta == 0).unsqueeze(-1), y, torch.where((theta == 1).unsqueeze(-1), y1, inside))

        theta = torch.full(crossed.shape, float("inf"), dtype=torch.float64, device=y.device)
        for i in crossed.any(1).nonzero()[:, 0].tolist():
            at = chandrupatla(lambda x, i=i: self._value(i, t + x * h, state(x)).double(), old[i].double(), new[i].double(), crossed[i])
            theta[i] = torch.where(crossed[i], at, theta[i])
        stop = torch.full_like(t, float("nan"))
        for which in theta.argsort(0).unbind():
            place = theta.gather(0, which.unsqueeze(0))[0]
            hit = torch.isfinite(place) & torch.isnan(stop)
            self.counts.scatter_add_(0, which.unsqueeze(0), hit.long().unsqueeze(0))
            when = torch.where(place == 1.0, end, t + torch.where(hit, place, 0.0) * h)
            rows = hit.nonzero()[:, 0]
            self.found.append((which[rows], rows, index[rows], when[rows]))
            most = self.terminal[which]
            last = hit & (most > 0) & (self.counts.gather(0, which.unsqueeze(0))[0] >= most)
            stop = torch.where(last, when, stop)
        return stop

    def record(self) -> dict[str, Tensor]:
        """The fields of `Record` about events."""
        names = ("event_id", "event_row", "event_step", "event_t")
        if not self.found:
            nothing = self.counts.new_empty(0)
            return dict(zip(names, (nothing, nothing, nothing, nothing.double()), strict=True))
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*self.found, strict=True), strict=True)}


def no_events(like: Tensor) -> dict[str, Tensor]:
    """The fields of `Record` of a solve that looks for none."""
    nothing = torch.empty(0, dtype=torch.int64, device=like.device)
    return {"event_id": nothing, "event_row": nothing, "event_step": nothing, "event_t": nothing.double()}
