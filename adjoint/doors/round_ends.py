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
from .event_slope import once, with_slope
from .round_rules import Rule
from .rows import chosen, forward_fill, wide
from .solution import EventLog, EventRecord, Solution

__all__ = ["check_rules", "ended_before", "takes_events", "with_events"]

_TWICE = (
    "the time of an event was to be differentiated twice in equations that do not give the slope (solve_dae, mass_matrix=) by a strategy "
    "that does not take events: use gradient=DiscreteAdjoint()"
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
    last: Any,
    span: RoundSpan,
    args: tuple[Any, ...],
    slope: Callable[[Tensor, Any], Any] | None,
    integrand: Callable[[Tensor, Any], Any] | None,
    real: torch.dtype,
) -> Solution:
    """``sol`` with the events of ``first`` at its end, where the state is ``last``; their times and states are differentiable, and the
    integrals of an ``integrand`` up to them.

    ``span`` is that of ``sol``. The time of an event is a root of the event function on the solution continued beyond its end, to
    second order where the equations tell the slope, else to first: two of Newton's steps have its first and second derivatives
    (docs/theory.md, events).
    """
    ending = None if sol.yp is None else tree_map(lambda x: x[-1].detach(), sol.yp)

    integrals = sol.quadrature

    def one(rule: Rule, record: EventRecord) -> EventRecord:
        nonlocal integrals
        if not record.t.shape[0]:
            return record
        hit = ~record.t[0].detach().isnan()
        end, y = forward_fill(hit, (span.end, last))

        def moved(h: Tensor, rate: Any) -> Any:
            return tree_map(lambda a, k: a + wide(h, a).to(a.dtype) * k, y, rate)

        def state(d: Tensor) -> Any:
            return moved(d, ending if slope is None else slope(end + d / 2, moved(d / 2, slope(end, y))))

        def residual(d: Tensor) -> Tensor:
            return rule.value((end + d).to(real), state(d), *args).reshape(end.shape).to(torch.float64)

        d, sloping = behind(torch.zeros_like(end), end, *causes), hit
        for k in range(2):
            rate, value = tangent(residual, (d,), (torch.ones_like(d),)), residual(d)
            sloping = (torch.isfinite(rate) & (rate != 0)).detach() if k == 0 else sloping
            d = d - torch.where(sloping, value, 0.0) / torch.where(sloping, rate, 1.0)
        d = with_slope(d - d.detach(), sloping | ~hit, *causes)
        d = once(d, hit, _TWICE, *causes) if slope is None else d
        if integrand is not None:
            # of second order, as the state
            rate = integrand((end + d / 2).to(real), moved(d / 2, ending if slope is None else slope(end, y)))
            integrals = tree_map(
                lambda q, g, total: torch.where(wide(hit, q), q + wide(d, g).to(g.dtype) * g, total), sol.quadrature, rate, integrals
            )
        t = torch.where(hit, end + d, float("nan")).to(record.t.dtype).unsqueeze(0)
        return EventRecord(t, tree_map(lambda x: torch.where(wide(hit, x), x, float("nan")).unsqueeze(0), state(d)))

    causes = [x for x in tree_leaves((last, args)) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]
    # of several at one time the first one is where the round ends
    records = [one(rule, record) for rule, record in reversed(list(zip(rules, first.events, strict=True)))]
    return replace(sol, events=EventLog.of(records[::-1], (rule.name for rule in rules)), quadrature=integrals)
