"""A solve that was made before, with other numbers: compiled code is called at once, and one small node holds its way back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate import Status, stands
from ..native.at_once import AtOnce, EventBars, Kept, Target
from ..native.memory import as_given, bytes_of, put_together
from ..native.reading import Unreadable
from ..native.solve import COUNTS, Summary
from ..system.capture import Substitute
from ..system.origins import is_apart
from ..system.ownership import Owned
from ..system.system import StateSpec
from ..system.transforms import functorch_active, naming_writes
from ..torch_internals import Node, copy_by_copy, unviewed
from .standing import some_rest
from .undeclared import REJECTED

__all__ = ["Done", "Prepared", "PreparedNode", "Run", "at_once", "run_of"]

_COUNTED, _STATUS = ctypes.c_long * len(COUNTS), COUNTS.index("status")


@dataclass(eq=False)
class Prepared:
    """What solves of one right-hand side by one plan have in common, for states of one shape ``(B, n)``.

    ``places``: of every tensor that the program reads, its place among those of the `Fingerprint`. ``derivatives``: of the first order, by
    one plain way back, may be asked for. ``batched``: states are ``(B, n)`` for the user too. ``integrand``: the layout of an integral
    along the solution, which stands behind the state.
    """

    calls: AtOnce
    places: tuple[int, ...]
    derivatives: bool
    batched: bool
    integrand: StateSpec | None = None
    _ends: tuple[tuple[float, float], Tensor, Tensor] | None = None
    _samples: tuple[tuple[float, float], tuple[torch.dtype, bytes], Tensor] | None = None

    def ends(self, span: tuple[float, float]) -> tuple[Tensor, Tensor]:
        """Those of a span, (2,), and of each trajectory, (2, B), which nobody writes to: the same tensors while the span is the same."""
        # another thread may put those of another span in their place meanwhile
        known = self._ends
        if known is None or known[0] != span:
            ends = torch.tensor(span, dtype=torch.float64, device="cpu")
            known = self._ends = span, ends, ends.unsqueeze(-1).expand(2, self.calls.rows).contiguous()
        return known[1:]

    def samples(self, times: Tensor, span: tuple[float, float], checked: Callable[..., Tensor | None]) -> Tensor | None:
        """Sample times of each trajectory, (T, B), which nobody writes to, by those that were given, (T,), as they are ``checked`` for a
        span; None where they are not in order."""
        known, numbers = self._samples, (times.dtype, bytes_of(times))
        if known is None or known[0] != span or known[1] != numbers:
            found = checked(times, span)
            if found is None:
                return None
            known = self._samples = span, numbers, found.unsqueeze(-1).repeat(1, self.calls.rows)
        return known[2]

    def ending(self, kept: Kept) -> int:
        """Which of the events, by function, is the one that ended a solve."""
        last = [sum(kept.events[: k + 1]) - 1 for k, e in enumerate(self.calls.plan.events) if 0 < e.terminal == kept.events[k]]
        return last[-1]

    def start(self, y0: Tensor) -> Tensor:
        """The state at the start as the program takes it."""
        calls, y = self.calls, as_given(y0, self.calls.program.real)
        if self.integrand is None:
            return y
        y = y.reshape(calls.rows, -1)
        return torch.cat([y, torch.zeros((calls.rows, calls.width - y.shape[1]), dtype=y.dtype, device="cpu")], -1)

    def slopes(self, yp0: Tensor | None, start: Tensor) -> Tensor | None:
        """Guesses of the slopes at the start of implicit equations; None of others."""
        if self.calls.beginning is None:
            return None
        return torch.zeros_like(start) if yp0 is None else as_given(yp0, start.dtype)

    def shown(self, found: Tensor, y0: Tensor, sampled: bool) -> tuple[Tensor, Tensor | None]:
        """Of what a solve gives, or its cotangent, the states, and the integral (B, m) where there is one."""
        if self.integrand is None:
            return found, None
        n = self.calls.width - sum(self.integrand.sizes)
        states = found[: len(found) - sampled, :, :n]
        return states.reshape(-1, *y0.shape), found[-1, :, n:]

    def to_be_looked_at(self, rejected: int) -> bool:
        """Whether the general way is to look for jumps of ``fun`` in a solve with so many rejected steps, or for rates that are lost."""
        plan, program = self.calls.plan, self.calls.program
        if not plan.keep_states:
            return False
        lost = self.derivatives and plan.method.implicit and program.rates.coming()
        return lost or (rejected >= REJECTED and program.looks.coming())

    def rests(self, kept: Kept, summary: Summary) -> bool:
        """Whether something rests, so that the general way is to look whether steps bear derivatives."""
        calls, plan = self.calls, self.calls.plan
        if not self.derivatives:
            return False
        if calls.beginning is not None:
            return some_rest(plan, calls.sizes(kept), calls.states(kept))
        return bool(stands(calls.states(kept)).any()) if plan.method.multistep else summary.resting > 0


class Done(NamedTuple):
    """A solve: the states asked for (T, *state), with an integral (T, B, n) and the final one behind; what was counted, of one trajectory
    numbers and of many tensors (B,); what its way back needs; and what there is ``beside`` the states: of implicit equations the slopes,
    and times (E,) and states (E, *state) of events, where there are some."""

    y: Tensor
    counts: Sequence[int] | Sequence[Tensor]
    kept: Kept
    beside: tuple[Tensor, ...] = ()
    #: the event, by function, that ended it
    ending: int | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """What the way back of a solve needs beside what is saved of it. ``again`` solves once more by the general way, for all but plain first
    derivatives: with what the solve read, compiled or not."""

    prepared: Prepared
    anchors: Tensor
    t_eval: Tensor | None
    wanted: tuple[int, ...]
    again: Callable[[Sequence[Tensor], bool], Sequence[Tensor | None]]
    report: Callable[[int, int], None]
    #: of a solve that an event ended, which one
    ending: int | None = None

    def cotangents(
        self, kept: Kept, y0: Tensor, bar: Tensor | None, beside: Sequence[Tensor | None]
    ) -> tuple[Tensor, EventBars | None]:
        """Those of the states, and those of events where there are some."""
        calls = self.prepared.calls
        rows = 2 if self.t_eval is None else len(self.t_eval) + calls.ended
        if bar is None:
            bar = torch.zeros((rows, *y0.shape), dtype=y0.dtype, device="cpu")
        if not any(kept.events):
            return bar, None
        (of_times, of_states), count, real = beside[-2:], sum(kept.events), calls.program.real
        t = torch.zeros(count, dtype=torch.float64, device="cpu") if of_times is None else of_times
        shape = count, calls.width
        y = torch.zeros(shape, dtype=real, device="cpu") if of_states is None else as_given(of_states, real).reshape(shape)
        ended = self.ending is not None and self.t_eval is None
        if ended:
            # the last state is that of the event
            y = y.clone()
            y[self.ending] += as_given(bar[-1], real).reshape(-1)
        return bar, EventBars(t, y, ended)


def run_of(
    prepared: Prepared, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, tensors: Sequence[Tensor], yp0: Tensor | None = None
) -> Done | None:
    """The solve; None where the general way has to look: something failed, or rests.

    ``t_eval``: in the order of time; None: the two ends. ``tensors``: those of the fingerprint. ``yp0``: of implicit equations.
    """
    calls = prepared.calls
    program, rows = calls.program, calls.rows
    start = prepared.start(y0)
    y = torch.empty((2 if t_eval is None else len(t_eval) + calls.ended, *start.shape), dtype=program.real, device="cpu")
    if prepared.batched:
        counts = torch.empty((len(COUNTS), rows), dtype=torch.int64, device="cpu")
        at = counts.data_ptr()
    else:
        counts = _COUNTED()
        at = ctypes.addressof(counts)
    slopes = prepared.slopes(yp0, start)
    yp = None if slopes is None else torch.empty_like(y)
    made = calls.forward(anchors, t_eval, start, [tensors[k] for k in prepared.places], Target(y, yp, at), slopes)
    if made is None:
        return None
    kept, summary = made
    ended = calls.plan.events and counts[_STATUS] == Status.TERMINAL_EVENT
    if (summary.otherwise and not ended) or summary.unstable or prepared.to_be_looked_at(summary.rejected) or prepared.rests(kept, summary):
        return None
    beside, ending = () if yp is None else (yp,), None
    if any(kept.events):
        states, of_states = calls.event_states(kept)
        states, of_states = unviewed(states.view(-1, *y0.shape)), of_states.view(-1, *y0.shape)
        beside = *beside, calls.event_times(kept), states
        ending = prepared.ending(kept) if ended else None
        if ending is not None and t_eval is None:
            y[-1] = states[ending]
            if yp is not None:
                yp[-1] = of_states[ending]
    if y0.is_complex():
        y, *beside = (unviewed(torch.view_as_complex(x)) for x in (y, *beside))
    return Done(y, counts.unbind() if isinstance(counts, Tensor) else list(counts), kept, tuple(beside), ending)


class PreparedNode(Node):
    """``apply(run, done, y0, *inputs)`` is the result, with what there is beside it, as a function of the initial state and of those
    tensors that require grad. Where there is no transform, ``at_once`` is that, without looking whether there is one. ``run``: owned by
    the results, where these are not this node's own."""

    @staticmethod
    def forward(ctx: Any, run: Run | Owned[Run], done: Done, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        kept = done.kept
        ctx.run, ctx.layout, ctx.n_steps, ctx.events = run, kept.layout, kept.n_steps, kept.events
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept.memory, *inputs)
        return (done.y, *done.beside) if done.beside else done.y

    @staticmethod
    @copy_by_copy
    @naming_writes
    def backward(ctx: Any, bar: Tensor | None, *beside: Tensor | None) -> tuple[Tensor | None, ...]:
        run: Run = ctx.run() if isinstance(ctx.run, Owned) else ctx.run
        given = bar, *beside
        # also says so where the graph is gone, or one of the inputs was written to
        saved, pieces = ctx.saved_tensors, len(ctx.layout.sizes) + bool(ctx.events)
        inputs = saved[pieces:]
        needed = ctx.needs_input_grad[2:]
        if bar is None and all(x is None for x in beside):
            return (None, None, *([None] * len(needed)))
        prepared, calls = run.prepared, run.prepared.calls
        kept = Kept(saved[:pieces], ctx.layout, ctx.n_steps, ctx.events)
        slopes = beside[0] if calls.beginning is not None else None
        # at an event slopes move with its time
        if (slopes is not None and run.ending is not None) or torch.is_grad_enabled() or functorch_active():
            return (None, None, *_again(run, kept, inputs, given, needed))
        try:
            wanted = dict(zip((None, *run.wanted), needed, strict=True))
            bar, events = run.cotangents(kept, inputs[0], bar, beside)
            of_slopes = None if slopes is None else as_given(slopes, calls.program.real)
            found, finite = calls.backward(kept, run.anchors, run.t_eval, bar, wanted, events, of_slopes)
        except Unreadable:
            # the general way says why
            return (None, None, *_again(run, kept, inputs, given, needed))
        run.report(kept.n_steps * len(calls.plan.method.nodes), kept.n_steps)
        if not finite:
            # which of the user's functions it was, the general way finds out
            return (None, None, *_again(run, kept, inputs, given, needed))
        if prepared.integrand is not None and None in found:
            found[None] = found[None][:, : inputs[0].numel() // calls.rows]
        # in the order in which they were asked for
        results = [put_together(found[k], x) if need else None for k, x, need in zip((None, *run.wanted), inputs, needed, strict=True)]
        return (None, None, *results)


at_once: Callable[..., Any] = super(torch.autograd.Function, PreparedNode).apply


def _again(
    run: Run, kept: Kept, inputs: Sequence[Tensor], bars: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    prepared, (bar, *beside) = run.prepared, bars
    wanted, read = [x for x, need in zip(inputs, needed, strict=True) if need], prepared.calls.inputs(kept)
    with torch.enable_grad():
        if is_apart(wanted):
            outputs = run.again(read, True)
        else:
            # others in their places: what belongs to one of them is not to go on to another, or be heard, before it goes back to them all.
            # Graphs are not recognised where operators are given others
            places = [x.view_as(x) for x in wanted]
            outputs, wanted = Substitute(wanted, places).run(run.again, read, False), places
    bars = *((None, None) if bar is None else prepared.shown(bar, inputs[0], run.t_eval is not None)), *beside
    known = [(y, v) for y, v in zip(outputs, bars, strict=True) if y is not None and v is not None and y.requires_grad]
    made, given = zip(*known, strict=True)
    found = iter(torch.autograd.grad(made, wanted, given, create_graph=torch.is_grad_enabled(), allow_unused=True))
    return [next(found) if need else None for need in needed]
