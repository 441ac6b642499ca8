"""Whether the compiled functions of the user are ``fun`` and its derivative: they are called by themselves, and compared.

Compared is beside the states of a solve and inside its steps: along a slow manifold slopes are differences of terms that nearly cancel, and
at knots of tables a rounding decides for one of two values.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, Record
from ..system.witness import beside, differs
from ..torch_internals import temporarily_clear_interpreter_stack, unwatched
from .memory import plain
from .program import Engine, Program
from .tangents import apart, together

__all__ = ["Point", "agrees", "points_of", "same", "with_tangents"]

#: how far beside the state, of its size; a difference counts where it is there by the second one as well
_BESIDE = (0.01, 0.023)
#: where inside a step
_INSIDE = 0.38

#: a function of time (B,) and state (B, n)
Bound = Callable[[Tensor, Tensor], Tensor]


class _Context(ctypes.Structure):
    """``Ctx`` of what is emitted."""

    _fields_ = [(name, ctypes.c_void_p) for name in "uakb"]


class Point(NamedTuple):
    """Where functions are compared: inside of a step of all trajectories, that starts at ``t`` (B,) and has the size ``h`` (B,), beside
    states ``y`` (B, n); of implicit equations with slopes, (B, n)."""

    t: Tensor
    h: Tensor
    y: Tensor
    slope: Tensor | None

    def moved(self, part: float) -> tuple[Tensor, Tensor]:
        """Arguments of functions, the state by `beside`."""
        y = self.y if self.slope is None else torch.cat([self.y, self.slope], -1)
        return (self.t + _INSIDE * self.h).to(y.dtype), beside(y, part)


def points_of(record: Record | Grid, anchors: Tensor, y0: Tensor, residual: bool, steps: Sequence[int]) -> list[Point]:
    """Points at these steps of a record, at both ends where it kept none. ``residual``: of implicit equations."""

    def point(t: Tensor, h: Tensor, y: Tensor, k: int) -> Point:
        slope = None if not residual else record.stages[k, -1].clone() if k < len(record.stages) else torch.zeros_like(y)
        return Point(t, h, y.clone(), slope)

    if len(record.states) > 1:
        return [point(record.t[k], record.h[k], record.states[k], k) for k in steps]
    assert isinstance(record, Record)
    (start, *_, end), last = anchors.detach(), record.t_final
    return [point(start, end - start, y0, 0), point(last, start - last, record.last, 0)]


class _Calls:
    """Calls of the functions of one engine for all trajectories, W of which go side by side; behind the last one it stands again."""

    def __init__(self, program: Program, inputs: Sequence[Tensor], rows: int) -> None:
        self.program, self.inputs, self.rows = program, inputs, rows
        self.lanes = program.lanes(rows)
        engine = program.engine(self.lanes)
        assert isinstance(engine, Engine)
        self.functions, self.groups = engine.functions, -(-rows // self.lanes)
        self.own = [self.together(x.reshape(rows, n)) if n else None for x, n in zip(inputs, program.own, strict=True)]

    def together(self, x: Tensor) -> Tensor:
        """(groups, m, W) of (B, m)."""
        which = torch.arange(self.groups * self.lanes, device=x.device).clamp(max=self.rows - 1)
        return plain(x)[which].view(self.groups, self.lanes, -1).transpose(1, 2).contiguous()

    def apart(self, x: Tensor) -> Tensor:
        """The other way round."""
        return x.transpose(1, 2).reshape(self.groups * self.lanes, -1)[: self.rows]

    def make(self, name: str, arguments: Sequence[Tensor], bars: Sequence[Tensor] = ()) -> None:
        """Call this function, whose ``arguments`` and ``bars`` are those of `together`."""
        call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (1 + len(arguments)))(self.functions[name])
        for g in range(self.groups):
            places = (
                [x.data_ptr() for x in self.inputs],
                [0 if x is None else x[g].data_ptr() for x in self.own],
                [x[g].data_ptr() for x in bars],
            )
            arrays = [(ctypes.c_void_p * max(len(at), 1))(*at) for at in places]
            u, own, b = map(ctypes.addressof, arrays)
            context = _Context(u, own, self.program.table_addresses[0], b)
            call(ctypes.byref(context), *[x[g].data_ptr() for x in arguments])


    def values(self, name: str, size: int, t: Tensor, y: Tensor) -> Tensor:
        """What the function gives, (B, size)."""
        when, at = self.together(t.unsqueeze(-1)), self.together(y)
        out = at.new_zeros(self.groups, size, self.lanes)
        self.make(name, (when, at, out))
        return self.apart(out)

    def pulled_back(self, t: Tensor, y: Tensor, v: Tensor) -> list[Tensor]:
        """From ``v`` (B, n) the cotangents of the state and of every input."""
        when, at, bar = self.together(t.unsqueeze(-1)), self.together(y), self.together(v)
        # those that stand twice count once
        bar[-1, :, self.lanes - (self.groups * self.lanes - self.rows) :] = 0
        own = self.program.own
        bars = [at.new_zeros(self.groups, k or max(n, 1), self.lanes) for k, n in zip(own, self.program.numbers, strict=True)]
        y_bar = torch.zeros_like(at)
        self.make("vjp", (when, at, bar, y_bar, torch.zeros_like(when)), bars)
        # tensors without entries have room for one
        inputs = zip(bars, own, self.program.numbers, strict=True)
        return [self.apart(y_bar), *(self.apart(x) if k else x.sum((0, 2))[:n] for x, k, n in inputs)]


def same(program: Program, inputs: Sequence[Tensor], point: Point, f: Bound) -> bool:
    """Whether ``f(t, y)`` gives what compiled code gives."""
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        calls, moved = _Calls(program, inputs, len(point.y)), map(point.moved, _BESIDE)
        return any(not bool(differs(calls.values("fun", program.width, t, y), f(t, y))) for t, y in moved)


def agrees(
    program: Program,
    values: Sequence[Tensor],
    point: Point,
    bound: Callable[[Sequence[Tensor]], Bound],
    events: Sequence[Bound],
    inputs: Sequence[Tensor],
    slots: Sequence[int | None],
) -> bool:
    """Whether compiled functions give what ``fun``, its derivatives by autograd and functions of ``events`` give.

    ``values``: inputs as the program takes them; ``bound``: ``fun`` as a function of these ``inputs`` of the system, whose places those
    have as ``slots``.
    """
    calls = _Calls(program, values, len(point.y))

    def at(t: Tensor, y: Tensor) -> bool:
        return _is_fun(calls, t, y, bound, inputs, slots) and _are_events(calls, t, y[:, : program.width], events)

    with temporarily_clear_interpreter_stack(), unwatched(), torch.inference_mode(False):
        return any(at(*point.moved(part)) for part in _BESIDE)


def with_tangents(bound: Callable[[Sequence[Tensor]], Bound], blocks: int, residual: bool) -> Callable[[Sequence[Tensor]], Bound]:
    """``fun`` with its tangent beside, of a state with one and inputs behind which theirs stand: see `tangents.with_tangents`.
    ``blocks``: see `together`; ``residual``: values and slopes stand side by side, each with its tangent."""

    def bind(both: Sequence[Tensor]) -> Bound:
        count = len(both) // 2
        # complex ones have a tangent too
        inputs, dots = [x.detach().requires_grad_() if x.is_complex() else x for x in both[:count]], both[count:]
        moving = [i for i, x in enumerate(inputs) if x.requires_grad]

        def f(t: Tensor, y: Tensor) -> Tensor:
            pairs = [apart(x, blocks) for x in (y.chunk(2, -1) if residual else (y,))]
            y, dot = (torch.cat(xs, -1) for xs in zip(*pairs, strict=True))
            out = bound(inputs)(t, y)
            if not out.requires_grad:
                return together(out, torch.zeros_like(out), blocks)
            weights = torch.zeros_like(out).requires_grad_()
            pulled = torch.autograd.grad(out, [y, *(inputs[i] for i in moving)], weights, create_graph=True, allow_unused=True)
            live = [(g, d) for g, d in zip(pulled, [dot, *(dots[i] for i in moving)], strict=True) if g is not None and g.requires_grad]
            (tangent,) = torch.autograd.grad([g for g, _ in live], weights, [d for _, d in live], create_graph=True)
            return together(out, tangent, blocks)

        return f

    return bind


def _are_events(calls: _Calls, t: Tensor, y: Tensor, events: Sequence[Bound]) -> bool:
    if not events:
        return True
    with torch.no_grad():
        known = torch.stack([f(t, y).reshape(-1).expand(len(y)) for f in events], -1)
    found = calls.values("events", len(events), t, y)
    return not any(bool(differs(a, b)) for a, b in zip(found.T, known.T, strict=True))


def _usual(x: Tensor) -> Tensor:
    """Without derivatives, and none of inference mode, which cannot have any."""
    return x.detach().clone() if x.is_inference() else x.detach()


def _is_fun(
    calls: _Calls,
    t: Tensor,
    y: Tensor,
    bound: Callable[[Sequence[Tensor]], Bound],
    inputs: Sequence[Tensor],
    slots: Sequence[int | None],
) -> bool:
    # a tensor that is handed over twice is one input of the program
    once: dict[Any, Tensor] = {}
    leaves = [once.setdefault((x.data_ptr(), x.dtype, x.shape, x.stride()), _usual(x)) for x in inputs]
    at = _usual(y)
    for x in (*leaves, at):
        x.requires_grad_(x.is_floating_point())
    with torch.enable_grad():
        k = bound(leaves)(t, at)
    if bool(differs(calls.values("fun", calls.program.width, t, y), k.detach())):
        return False
    if calls.program.displaced or not k.requires_grad:
        return True
    v = beside(torch.ones_like(k.detach()), 0.3)
    numbered = [(i, leaves[slot]) for i, slot in enumerate(slots) if slot is not None and leaves[slot].requires_grad]
    known = torch.autograd.grad(k, [at, *(x for _, x in numbered)], v, allow_unused=True)
    bars = calls.pulled_back(t, y, v)
    found = [bars[0], *(bars[1 + i].view_as(x) for i, x in numbered)]
    # what fun keeps of an earlier call does not depend on these leaves
    return not any(b is not None and bool(differs(a, b)) for a, b in zip(found, known, strict=True))
