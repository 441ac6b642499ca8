"""The way back through the steps of a record by compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Grid, Plan
from .calls import BACKWARD_CALL
from .device import DeviceEngine, addressed
from .program import Program
from .reading import Unreadable
from .solve import LOST, block_of, sample_order, shift_of, threads_for

__all__ = ["Cotangents", "sweep_native"]


_BARS = ("final_bar", "samples_bar", "states_bar", "stages_bar")


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
    ordered: bool = False,
) -> Cotangents:
    """Cotangents from those of ``(final, samples, states, stages)``, each of them a tensor or None; ``timed``: those of times as well;
    ``ordered``: samples are in the order of time, which else is looked at. Raises `Unreadable` as `solved` does."""
    states = grid.states.detach().contiguous()
    n_steps, rows = grid.t.shape
    engine = program.engine(program.lanes(rows))
    call = BACKWARD_CALL.from_buffer_copy(program.backward_call(engine))
    names = ("t", "h", "status", "sample_step", *(("segment", "lands") if anchors.shape[0] > 2 else ()))
    keep = {name: getattr(grid, name).detach().contiguous() for name in names}
    keep["states"], keep["anchors"] = states, anchors.detach().contiguous()
    if program.method.implicit or program.method.multistep:
        keep["stages"] = grid.stages.detach().contiguous()
    if program.method.multistep:
        keep["extra"] = grid.extra.detach().contiguous()
    n_samples = 0
    if t_eval is not None and bars[1] is not None:
        keep["t_eval"] = t_eval.detach().contiguous()
        order = None if ordered else sample_order(keep["t_eval"], keep["anchors"])
        if order is not None:
            keep["order"] = order
        n_samples = t_eval.shape[0]
    for name, bar in zip(_BARS, bars, strict=True):
        if bar is not None and bar.numel():
            keep[name] = bar.detach().contiguous()
    keep["y0_bar"] = y0_bar = torch.empty_like(states[0])
    none = torch.zeros(0, rows, dtype=torch.float64, device=states.device)
    times = [none] * 3
    if timed:
        times = [torch.zeros((k, rows), dtype=torch.float64, device=states.device) for k in (n_steps, n_steps, n_samples)]
        keep |= dict(zip(("t_bar", "h_bar", "t_eval_bar"), times, strict=True))
    found = [torch.zeros_like(x) for x in inputs]
    call.inputs, _inputs_at = addressed(inputs, states.device)
    call.input_bars, _bars_at = addressed(found, states.device)
    call.rows, call.block = rows, block_of(rows)
    call.threads, call.team = threads_for(program, rows)
    call.n_anchors, call.n_steps, call.n_samples = anchors.shape[0], n_steps, n_samples
    call.jumps, call.timed = shift_of(plan, anchors), timed
    for name, x in keep.items():
        setattr(call, name, x.data_ptr())
    if isinstance(engine, DeviceEngine):
        sizes = [n if not own else 0 for n, own in zip(program.numbers, program.own, strict=True)]
        for x, bar in zip(found, engine.sweep(call, states).split(sizes), strict=True):
            if len(bar):
                x.copy_(bar.reshape(x.shape))
        return Cotangents(y0_bar, found, *times)
    assert engine.backward is not None
    lost = ctypes.c_long()
    call.lost = ctypes.addressof(lost)
    engine.backward(ctypes.byref(call))
    if lost.value:
        raise Unreadable("", "", LOST)
    return Cotangents(y0_bar, found, *times)
