"""The way back through the steps of a record by compiled code."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Plan
from .calls import BACKWARD, filled
from .program import Program
from .solve import block_of, pointers, sample_order, shift_of, threads_for

__all__ = ["Cotangents", "sweep_native"]


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
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    timed: bool,
) -> Cotangents:
    """Cotangents from those of ``(final, samples, states, stages)``, each of them a tensor or None; ``timed``: those of times as well."""
    states = grid["states"].detach()
    n_steps, rows = grid["t"].shape
    engine = program.engine(program.lanes(rows))
    names = ("t", "h", "status", "sample_step", *(("segment", "lands") if anchors.shape[0] > 2 else ()))
    keep = {name: grid[name].detach().contiguous() for name in names}
    keep |= {"states": states.contiguous(), "anchors": anchors.detach().contiguous()}
    if program.method.implicit:
        keep["stages"] = grid["stages"].detach().contiguous()
    n_samples = 0
    if t_eval is not None and bars[1] is not None:
        keep["t_eval"] = t_eval.detach().contiguous()
        order = sample_order(keep["t_eval"], keep["anchors"])
        keep |= {} if order is None else {"order": order}
        n_samples = t_eval.shape[0]
    names = ("final_bar", "samples_bar", "states_bar", "stages_bar")
    keep |= {name: bar.detach().contiguous() for name, bar in zip(names, bars, strict=True) if bar is not None and bar.numel()}
    t_bar = torch.zeros((n_steps, rows) if timed else (0, rows), dtype=torch.float64)
    out = {"y0_bar": states.new_empty(states.shape[1:]), "t_bar": t_bar, "h_bar": torch.zeros_like(t_bar)}
    out["t_eval_bar"] = torch.zeros((n_samples, rows) if timed else (0, rows), dtype=torch.float64)
    found = [torch.zeros_like(x) for x in inputs]
    input_pointers, table_pointers, bar_pointers = pointers(inputs), pointers(program.tables), pointers(found)
    call = filled(
        BACKWARD,
        **engine.functions,
        inputs=ctypes.addressof(input_pointers),
        tables=ctypes.addressof(table_pointers),
        input_bars=ctypes.addressof(bar_pointers),
        rows=rows,
        block=block_of(rows),
        threads=threads_for(rows),
        n_anchors=anchors.shape[0],
        n_steps=n_steps,
        n_samples=n_samples,
        jumps=shift_of(plan, anchors),
        timed=timed,
        **{name: x.data_ptr() for name, x in (keep | out).items()},
    )
    engine.backward(ctypes.byref(call))
    return Cotangents(out["y0_bar"], found, out["t_bar"], out["h_bar"], out["t_eval_bar"])
