"""Steps of a solve that kept no states, taken again by compiled code with their recorded sizes."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, Plan
from ..integrate.schedule import Schedule
from .device import DeviceEngine, addressed
from .emit import needs_stages, recorded_stages
from .memory import plain
from .program import Program
from .reading import Unreadable
from .solve import frame_of, shift_of, threads_for

__all__ = ["Part", "parts_back", "parts_forward", "taken_along"]

#: steps whose states exist at once, on the way forward
_FEW = 64


class _Start(NamedTuple):
    """What a step starts from: the state (B, n) and, of methods that hand their last slope on, that of the step before."""

    y: Tensor
    slope: Tensor | None = None


class Part(NamedTuple):
    """Steps from ``first`` up to ``stop``: the states around them, (M + 1, B, n), and recorded stages, (M, S, B, n)."""

    first: int
    stop: int
    states: Tensor
    stages: Tensor


class _Again:
    """The steps of a record; the arguments are those of `parts_back`. Raises `Unreadable`, `NoCompiler`."""

    def __init__(self, program: Program, plan: Plan, grid: Grid, anchors: Tensor, y0: Tensor, inputs: Sequence[Tensor]) -> None:
        method, rows = program.method, y0.shape[0]
        lanes = program.lanes(rows)
        if isinstance(program.engine(lanes), DeviceEngine):
            raise Unreadable("", "", f"its steps would be taken again (checkpoints=), which compiled code does not on {y0.device.type}")
        self._take = program.again(lanes)
        self._frame = frame_of(program, plan, y0, False)
        # of tangents all are, which are no function of the state
        self._keeps, self._n_stages, self._chained = method.implicit or program.along, recorded_stages(method), method.hands_on
        times = {"anchors": anchors, "t": grid.t, "h": grid.h}
        if anchors.shape[0] > 2:
            times |= {"segment": grid.segment, "lands": grid.lands}
        if program.along and method.implicit and len(grid.stages) == len(grid.t):
            times["known"] = grid.stages
        elif program.along and needs_stages(method):
            raise Unreadable("", "", "its stages were not kept")
        if program.along and method.multistep:
            times |= {"extra": grid.extra, "known_states": grid.states}
        times = {name: plain(x) for name, x in times.items()}
        self._inputs_at = addressed(inputs, y0.device)
        # what is read stays
        self._kept = times, inputs
        call = self._call = type(self._frame.call).from_buffer_copy(self._frame.call)
        for name, x in times.items():
            setattr(call, name, x.data_ptr())
        call.inputs, call.n_anchors, call.shift = self._inputs_at[0], anchors.shape[0], shift_of(plan, anchors)
        call.threads, call.team = threads_for(program, rows)
        # as in the solve, iterations begin without what the steps before left
        call.keep_states = call.keep_stages = call.guesses = False

    def per_step(self) -> int:
        """How many states are as large as what is kept of a step."""
        return 1 + self._n_stages * self._keeps

    def take(self, start: _Start, k: int, stop: int) -> _Start:
        """From the start of step ``k`` to that of step ``stop``."""
        call, y, slope = self._call, start.y, start.slope
        end = _Start(torch.empty_like(y), torch.empty_like(y) if self._chained else None)
        call.y0, call.first_slope = y.data_ptr(), None if slope is None else slope.data_ptr()
        call.final, call.final_slope = end.y.data_ptr(), None if end.slope is None else end.slope.data_ptr()
        call.first, call.until = k, stop
        self._take(ctypes.byref(call))
        return end

    def part(self, start: _Start, k: int, stop: int) -> tuple[Part, _Start]:
        """The steps from ``k`` up to ``stop``, and what the one behind them starts from."""
        call, y, count = self._call, start.y, stop - k
        states = y.new_empty((count + 1, *y.shape))
        states[0] = y
        stages = y.new_empty((count if self._keeps else 0, self._n_stages, *y.shape))
        # steps are numbered as in the record, wherever they are
        call.states = states.data_ptr() - k * y.nbytes
        call.stages = stages.data_ptr() - k * self._n_stages * y.nbytes if self._keeps else None
        call.keep_states, call.keep_stages = True, self._keeps
        end = self.take(start, k, stop)
        call.keep_states = call.keep_stages = False
        return Part(k, stop, states, stages), end


def parts_back(
    program: Program, plan: Plan, grid: Grid, anchors: Tensor, y0: Tensor, inputs: Sequence[Tensor], slots: int
) -> Iterator[Part]:
    """All steps of ``grid``, which has no states, from the last part to the first, with no more than ``slots`` states at a time, or those
    of one step; ``y0`` (B, n) is the first of them."""
    again = _Again(program, plan, grid, anchors, y0, inputs)
    n_steps, size = len(grid.t), max(1, slots // 2 // again.per_step())
    free = slots if size == 1 else max(1, slots - size * again.per_step())
    schedule = Schedule(_Start(y0), free)

    def advance(start: _Start, k: int, stop: int) -> _Start:
        return again.take(start, k * size, stop * size)

    for k in reversed(range(-(-n_steps // size))):
        yield again.part(schedule.start(k, advance), k * size, min((k + 1) * size, n_steps))[0]


def parts_forward(program: Program, plan: Plan, grid: Grid, anchors: Tensor, y0: Tensor, inputs: Sequence[Tensor]) -> Iterator[Part]:
    """As `parts_back`, from the first to the last, a few steps at a time."""
    again, start = _Again(program, plan, grid, anchors, y0, inputs), _Start(y0)
    for k in range(0, len(grid.t), _FEW):
        part, start = again.part(start, k, min(k + _FEW, len(grid.t)))
        yield part


def taken_along(
    program: Program, plan: Plan, grid: Grid, anchors: Tensor, start: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """States (K + 1, B, 2 n), stages (K, S, B, 2 n) and the last states (B, 2 n) of a program with tangents, ``start`` being the first of
    them, along the steps of ``grid``, a record without."""
    part, end = _Again(program, plan, grid, anchors, start, inputs).part(_Start(start), 0, len(grid.t))
    return part.states, part.stages, end.y
