"""The way back through the steps of a record by compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, Plan
from .again import Part, parts_back
from .calls import BACKWARD_CALL
from .device import DeviceEngine, addressed
from .memory import plain
from .program import Engine, Program
from .reading import Unreadable
from .solve import LOST, block_of, sample_order, shift_of, threads_for

__all__ = ["Cotangents", "sweep_native", "swept"]


_BARS = ("final_bar", "samples_bar", "states_bar", "stages_bar")


#: of times that nobody asked for
_NONE = torch.empty(0, 0, dtype=torch.float64, device="cpu")


class Cotangents(NamedTuple):
    """Of the initial state (B, n), of every input of the program, and where they were asked for of starts and sizes of the steps (K, B) and
    of the sample times (T, B)."""

    y0: Tensor
    inputs: list[Tensor]
    t: Tensor
    h: Tensor
    t_eval: Tensor


def sweep_native(
    program: Program,
    plan: Plan,
    grid: Grid,
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    timed: bool,
    slots: int | None = None,
) -> Cotangents:
    """Cotangents from those of ``(final, samples, states, stages)``, each of them a tensor or None; ``timed``: those of times as well.
    ``slots``: the grid has only the first state, and as many of the others as that exist at a time.
    Raises `Unreadable` as `made` does."""
    n_steps, rows = grid.t.shape
    engine = program.engine(program.lanes(rows))
    call = BACKWARD_CALL.from_buffer_copy(program.backward_call(engine))
    keep = {"t": grid.t, "h": grid.h, "status": grid.status, "sample_step": grid.sample_step, "states": grid.states, "anchors": anchors}
    if anchors.shape[0] > 2:
        keep |= {"segment": grid.segment, "lands": grid.lands}
    if slots is None and (program.method.implicit or program.method.multistep):
        keep["stages"] = grid.stages
    if program.method.multistep:
        keep["extra"] = grid.extra
    n_samples = 0
    if t_eval is not None and bars[1] is not None:
        keep["t_eval"] = t_eval
        order = sample_order(t_eval.detach(), anchors.detach())
        if order is not None:
            keep["order"] = order
        n_samples = t_eval.shape[0]
    for name, bar in zip(_BARS, bars, strict=True):
        if bar is not None:
            keep[name] = bar
    # what is read stays until it has been
    keep = {name: plain(x) for name, x in keep.items() if x.numel()}
    for name, x in keep.items():
        setattr(call, name, x.data_ptr())
    at = grid.states.device
    y0_bar = grid.states.new_empty((rows, program.width))
    call.y0_bar = y0_bar.data_ptr()
    t_bar = h_bar = t_eval_bar = _NONE
    if timed:
        t_bar, h_bar, t_eval_bar = (torch.zeros((k, rows), dtype=torch.float64, device=at) for k in (n_steps, n_steps, n_samples))
        call.t_bar, call.h_bar, call.t_eval_bar = t_bar.data_ptr(), h_bar.data_ptr(), t_eval_bar.data_ptr()
    found = [torch.zeros_like(x) for x in inputs]
    call.inputs, _inputs_at = addressed(inputs, at)
    call.input_bars, _bars_at = addressed(found, at)
    call.rows, call.block = rows, block_of(rows)
    call.threads, call.team = threads_for(program, rows)
    call.n_anchors, call.n_steps, call.n_samples = anchors.shape[0], n_steps, n_samples
    call.jumps, call.timed = shift_of(plan, anchors), timed
    if slots is not None and n_steps:
        parts = parts_back(program, plan, grid, anchors, plain(grid.states[0]), inputs, slots)
        _swept_in_parts(engine, call, program, parts, y0_bar, found)
    elif isinstance(engine, DeviceEngine):
        sizes = [n if not own else 0 for n, own in zip(program.numbers, program.own, strict=True)]
        for x, bar in zip(found, engine.sweep(call, grid.states).split(sizes), strict=True):
            if len(bar):
                x.copy_(bar.reshape(x.shape))
    else:
        swept(engine, call)
    return Cotangents(y0_bar, found, t_bar, h_bar, t_eval_bar)


def _swept_in_parts(
    engine: Engine | DeviceEngine, call: Any, program: Program, parts: Iterator[Part], y0_bar: Tensor, found: Sequence[Tensor]
) -> None:
    """Make a call of a way back for one part of the steps after another; cotangents of inputs are added to ``found``."""
    one = [torch.empty_like(x) for x in found]
    call.input_bars, _one_at = addressed(one, y0_bar.device)
    handed = torch.zeros_like(y0_bar) if program.method.hands_on else None
    call.handed_bar = None if handed is None else handed.data_ptr()
    for k, part in enumerate(parts):
        # steps are numbered as in the record, wherever they are
        call.states = part.states.data_ptr() - part.first * part.states[0].nbytes
        call.stages = part.stages.data_ptr() - part.first * part.stages[0].nbytes if len(part.stages) else None
        call.first, call.n_steps = part.first, part.stop
        # of no device: see `parts_back`
        assert isinstance(engine, Engine)
        swept(engine, call)
        for x, bar in zip(found, one, strict=True):
            x += bar
        if k == 0:
            # from here on what comes back at the end of a part is what its first state has; of failed trajectories too, for their samples
            call.final_bar, call.status = y0_bar.data_ptr(), None


def swept(engine: Engine, call: Any, watched: bool = False) -> bool:
    """Make a call of a way back. Where that is ``watched``: whether all cotangents of the initial state and of the inputs are finite.
    Raises `Unreadable` as `made` does."""
    assert engine.backward is not None
    lost, infinite = ctypes.c_long(), ctypes.c_long()
    call.lost, call.infinite = ctypes.addressof(lost), ctypes.addressof(infinite) if watched else None
    engine.backward(ctypes.byref(call))
    if lost.value:
        raise Unreadable("", "", LOST)
    return not infinite.value
