"""Rounds whose strategy cannot stop at events: they are looked for first, and the solve that is differentiated ends there by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UnsupportedCombination
from ..sensitivity.problem import GradientTraits
from ..sensitivity.products import behind, tangent
from .arguments import RoundSpan
from .event_slope import once, refused, with_slope
from .round_rules import Boundary, Rule
from .rows import chosen, forward_fill, no_number, still, wide
from .solution import EventLog, EventRecord, Solution

__all__ = ["check_rules", "ended_before", "takes_events", "with_events"]

_TWICE = (
    "the time of an event was to be differentiated twice in equations that do not give the slope (solve_dae, mass_matrix=) by a strategy "
    "that does not take events: use gradient=DiscreteAdjoint()"
)
_SLOPE_THERE = (
    "the slope (yp) at an event that ends a step of t_eval='steps' was to be differentiated by a strategy that does not take events: use "
    "gradient=DiscreteAdjoint()"
)


def takes_events(gradient: Any) -> bool:
    """Whether the strategy differentiates solves with events."""
    return not isinstance(gradient, GradientTraits) or gradient.takes_events


def check_rules(rules: Sequence[Rule], gradient: Any) -> None:
    """Raise `UnsupportedCombination` for events that end no round."""
    for rule in rules:
        if not rule.ends:
            raise UnsupportedCombination(
                f"{rule.title} is only recorded, which {type(gradient).__name__} does not differentiate: give it a reset "
                "(lambda t, y, *args: y) or terminal=, or take gradient=DiscreteAdjoint()"
            )


def ended_before(first: Solution, span: RoundSpan) -> RoundSpan:
    """The span up to the events of a solve without derivatives."""
    end = span.end
    for record in first.events:
        if record.t.shape[0]:
            found = ~record.t[0].isnan()
            end = chosen(found, record.t[0].detach().to(end.dtype), end)
    return RoundSpan(span.start, end, span.idle)


def with_events(
    rules: Sequence[Rule],
    first: Solution,
    sol: Solution,
    end: Boundary,
    args: tuple[Any, ...],
    slope: Callable[[Tensor, Any], Any] | None,
    integrand: Callable[[Tensor, Any], Any] | None,
    real: torch.dtype,
    steps: bool,
) -> Solution:
    """``sol`` with the events of ``first`` at its ``end``; their times and states are differentiable, and the integrals of an
    ``integrand`` up to them; so are the ends of the last of the ``steps``, where these are what ``sol`` gives.

    The time of an event is a root of the event function on the solution continued beyond its end, to second order where the equations
    tell the slope, else to first: two of Newton's steps have its first and second derivatives (docs/theory.md, events).
    """
    ending = still(end.yp)
    integrals = sol.quadrature

    def one(rule: Rule, record: EventRecord) -> EventRecord:
        nonlocal integrals
        if not record.t.shape[0]:
            return record
        hit = ~record.t[0].detach().isnan()
        now, y = forward_fill(hit, (end.t, end.y))

        def moved(h: Tensor, rate: Any) -> Any:
            return tree_map(lambda a, k: a + wide(h, a).to(a.dtype) * k, y, rate)

        def along(t: Tensor, at: Any) -> Any:
            # of the others, which may be lost, there need not be any number
            return ending if slope is None else tree_map(lambda k: torch.where(wide(hit, k), k, 0.0), slope(t, at))

        def state(d: Tensor) -> Any:
            return moved(d, ending if slope is None else along(now + d / 2, moved(d / 2, along(now, y))))

        def residual(d: Tensor) -> Tensor:
            value = rule.value((now + d).to(real), state(d), *args).reshape(now.shape).to(torch.float64)
            return torch.where(hit, value, 0.0)

        d, sloping = behind(torch.zeros_like(now), now, *causes), hit
        for k in range(2):
            rate, value = tangent(residual, (d,), (torch.ones_like(d),)), residual(d)
            sloping = (torch.isfinite(rate) & (rate != 0)).detach() if k == 0 else sloping
            d = d - torch.where(sloping, value, 0.0) / torch.where(sloping, rate, 1.0)
        d = with_slope(d - d.detach(), sloping | ~hit, *causes)
        d = once(d, hit, _TWICE, *causes) if slope is None else d
        if integrand is not None:
            # of second order, as the state
            rate = integrand((now + d / 2).to(real), moved(d / 2, along(now, y)))
            rate = tree_map(lambda g: torch.where(wide(hit, g), g, 0.0), rate)
            integrals = tree_map(
                lambda q, g, total: torch.where(wide(hit, q), q + wide(d, g).to(g.dtype) * g, total), sol.quadrature, rate, integrals
            )
        t = torch.where(hit, now + d, float("nan")).to(record.t.dtype).unsqueeze(0)
        return EventRecord(t, tree_map(lambda x: torch.where(wide(hit, x), x, no_number(x)).unsqueeze(0), state(d)))

    causes = [x for x in tree_leaves((end.y, args)) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    # of several at one time the last one is where the round ends, as of solves that take events
    records = [one(rule, record) for rule, record in zip(rules, first.events, strict=True)]
    times, states, slopes = sol.t, sol.y, sol.yp
    for record in records if steps else ():
        if record.t.shape[0]:
            present = ~times.detach().isnan()
            ends = present & (present.cumsum(0) == present.sum(0)) & ~record.t[0].detach().isnan()
            times = torch.where(ends, record.t[0].to(times.dtype), times)
            states = tree_map(lambda a, b, on=ends: torch.where(wide(on, a), b[0], a), states, record.y)
            if slopes is not None:
                moving = (*causes, record.t)
                slopes = tree_map(lambda a, on=ends, of=moving: refused(a, wide(on, a).expand_as(a), _SLOPE_THERE, *of), slopes)
    events = EventLog.of(records, (rule.name for rule in rules))
    return replace(sol, t=times, y=states, yp=slopes, events=events, quadrature=integrals)
