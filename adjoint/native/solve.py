"""A solve by compiled code: from a plan and its tensors to a `Record`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrate.controller import PIDController
from ..integrate.events import no_events
from ..integrate.plan import Plan, Record
from ..integrate.residual import power_of
from ..integrate.stages import TOLERANCE
from .calls import FORWARD, filled
from .program import Engine, Program

__all__ = ["block_of", "pointers", "run_native", "sample_order", "shift_of", "threads_for"]

#: steps for which there is room at first, and bytes of a record whose room is cut to what was needed
_ROOM, _LARGE = 64, 2**20
#: bytes of that room
_MOST_ROOM = 2**26
_WORK = ("n_jac", "n_factorizations", "n_solves", "n_newton")
_SHIFTS = {"none": 0, "inner": 1, "all": 2}


def pointers(tensors: Sequence[Tensor | None]) -> Any:
    """An array of addresses."""
    return (ctypes.c_void_p * max(len(tensors), 1))(*[None if x is None else x.data_ptr() for x in tensors])


def block_of(rows: int) -> int:
    """Rows that one thread takes at a time: sums over rows go by blocks, so these must not depend on the number of threads."""
    return max(64, -(-rows // 32))


def threads_for(rows: int) -> int:
    """How many of them one block is not."""
    return torch.get_num_threads() if rows > block_of(rows) else 1


def shift_of(plan: Plan, anchors: Tensor) -> int:
    """See `Plan.shift`: 0 where there are no jumps."""
    return _SHIFTS[plan.shift] if plan.shift == "all" or anchors.shape[0] > 2 else 0


def sample_order(t_eval: Tensor | None, anchors: Tensor) -> Tensor | None:
    """(T, B) int64: samples in the order of time; None where they are in it."""
    if t_eval is None or t_eval.shape[0] < 2:
        return None
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0)
    ordered = t_eval * sign
    if bool((ordered[1:] >= ordered[:-1]).all()):
        return None
    return torch.sort(ordered, dim=0, stable=True).indices.contiguous()


def _tolerance(x: float | Tensor, y0: Tensor) -> tuple[Tensor, int, int]:
    """Its numbers, and the strides of rows and columns."""
    if not isinstance(x, Tensor):
        return torch.tensor([x], dtype=y0.dtype), 0, 0
    return x.detach().to(y0.dtype).expand(y0.shape).contiguous(), y0.shape[1], 1


def _controller(plan: Plan) -> dict[str, Any]:
    c: PIDController = plan.control
    names = ("safety", "min_factor", "max_factor", "pcoeff", "icoeff", "dcoeff", "shrink_accepted", "predictive", "remembers")
    return {name: getattr(c, name) for name in names}


def run_native(
    program: Program,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
    watched: bool,
    index: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Record | None:
    """Solve; the arguments are those of the eager loops.

    ``inputs``: contiguous, in the dtype of the state. ``watched``: whether derivatives are wanted, for which explicit steps must be stable
    whatever the error of the state is; None where they are not. ``index`` and ``skipped``: see `ResidualSolver`.
    """
    rows, n = y0.shape
    everything = len(program.method.tableau.dense)
    engine = program.engine(program.lanes(rows))
    anchors, y0 = anchors.detach().contiguous(), y0.detach().contiguous()
    t_eval = None if t_eval is None else t_eval.detach().contiguous()
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    order = sample_order(t_eval, anchors)
    power, skipped = power_of(index, y0.dtype), None if skipped is None else skipped.contiguous()
    # of one trajectory by explicit methods, the stages of steps with events
    few = bool(plan.events) and not plan.keep_stages
    keep_stages = plan.keep_stages or few
    keep_grid = plan.keep_states or plan.keep_grid or keep_stages
    step = rows * (n * y0.element_size() * (1 + (everything if keep_stages else 0)) + 16)
    room = program.room.get(rows, max(1, min(_ROOM, _MOST_ROOM // max(step, 1)))) if keep_grid else 0
    room = min(room, plan.max_steps)
    several = anchors.shape[0] > 2

    def whole(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    def double(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64)

    def grid(steps: int) -> dict[str, Tensor]:
        return {
            "states": y0.new_empty((steps + 1, rows, n) if plan.keep_states else (0, rows, n)),
            "stages": y0.new_empty((steps, everything, rows, n) if keep_stages else (0, everything, rows, n)),
            "t": double(steps, rows),
            "h": double(steps, rows),
            # of one segment there is nothing to tell
            "segment": whole(steps if several else 0, rows),
            "lands": torch.empty((steps if several else 0, rows), dtype=torch.bool),
        }

    out = {name: y0.new_empty(y0.shape) for name in ("final", "last", "scaled")}
    out |= {name: whole(rows) for name in ("n_steps", "n_accepted", "n_fun", "status")}
    out["unstable"] = whole(rows)
    out["work"] = whole(len(_WORK), rows)
    out |= {
        "t_final": double(rows),
        "next_step": double(rows),
        "samples": y0.new_empty(n_samples, rows, n),
        "sample_step": whole(n_samples, rows),
    }
    rtol, atol = _tolerance(plan.rtol, y0), _tolerance(plan.atol, y0)
    first = None if plan.first_step is None else torch.as_tensor(plan.first_step, dtype=torch.float64).reshape(-1).contiguous()

    def call(steps: dict[str, Tensor], room: int) -> Any:
        return filled(
            FORWARD,
            **engine.functions,
            directions=directions.data_ptr(),
            terminal=terminal.data_ptr(),
            inputs=ctypes.addressof(input_pointers),
            tables=ctypes.addressof(table_pointers),
            rows=rows,
            block=block_of(rows),
            threads=threads_for(rows),
            anchors=anchors.data_ptr(),
            n_anchors=anchors.shape[0],
            t_eval=None if t_eval is None else t_eval.data_ptr(),
            order=None if order is None else order.data_ptr(),
            n_samples=n_samples,
            y0=y0.data_ptr(),
            rtol=rtol[0].data_ptr(),
            rtol_row=rtol[1],
            rtol_column=rtol[2],
            atol=atol[0].data_ptr(),
            atol_row=atol[1],
            atol_column=atol[2],
            first_step=None if first is None else first.data_ptr(),
            first_step_row=0 if first is None or first.numel() == 1 else 1,
            max_step=plan.max_step,
            min_step=plan.min_step,
            max_steps=plan.max_steps,
            accept_smallest=plan.accept_smallest,
            adaptive=plan.method.adaptive,
            least_rtol=4 * torch.finfo(y0.dtype).eps / TOLERANCE,
            power=None if power is None else power.data_ptr(),
            skipped=None if skipped is None else skipped.data_ptr(),
            **_controller(plan),
            shift=shift_of(plan, anchors),
            guesses=not plan.keep_grid,
            watched=watched,
            keep_grid=keep_grid,
            keep_states=plan.keep_states,
            keep_stages=keep_stages,
            room=room,
            **{name: x.data_ptr() for name, x in steps.items()},
            **{name: x.data_ptr() for name, x in out.items()},
        )

    directions = torch.tensor([e.direction for e in plan.events], dtype=torch.float64)
    terminal = torch.tensor([e.terminal for e in plan.events], dtype=torch.int64)
    input_pointers, table_pointers = pointers(inputs), pointers(program.tables)
    made = steps = grid(room)
    asked = call(made, room)
    tape = engine.forward(ctypes.byref(asked))
    found = _events(engine, tape) if plan.events else no_events(y0)
    most = int(out["n_accepted"].max()) if rows and keep_grid else 0
    to = asked
    if most > room:
        steps = grid(most)
        to = call(steps, most)
    engine.seal(ctypes.c_void_p(tape), ctypes.byref(asked), ctypes.byref(to), ctypes.c_long(most))
    if keep_grid:
        program.room[rows] = most + most // 4 + 8
    if most < room:
        steps = {name: x[: most + (name == "states")] if x.shape[0] else x for name, x in steps.items()}
        if 2 * most < room and sum(x.nbytes for x in steps.values()) > _LARGE:
            steps = {name: x.clone() for name, x in steps.items()}
    if few:
        steps["stages"] = steps["stages"][torch.unique(found["event_step"])]
    if not several:
        steps["segment"] = torch.zeros((1, 1), dtype=torch.int64).expand(most, rows)
        # at its end the last step lands
        ends = torch.where(out["status"] == 0, out["n_accepted"] - 1, -1)
        steps["lands"] = torch.arange(most).unsqueeze(-1) == ends
    work = out.pop("work")
    if bool(out.pop("unstable").any()):
        return None
    return Record(
        scaled_error=out.pop("scaled"),
        **out,
        **steps,
        n_rejected=out["n_steps"] - out["n_accepted"],
        **found,
        **dict(zip(_WORK, work.unbind(), strict=True)),
    )


def _events(engine: Engine, tape: int) -> dict[str, Tensor]:
    """The fields of a record about events, in the order of trajectories, and of time for each."""
    assert engine.count_events is not None and engine.take_events is not None
    count = engine.count_events(ctypes.c_void_p(tape))
    names = ("event_id", "event_row", "event_step")
    found = {name: torch.empty(count, dtype=torch.int64) for name in names} | {"event_t": torch.empty(count, dtype=torch.float64)}
    engine.take_events(ctypes.c_void_p(tape), *(ctypes.c_void_p(x.data_ptr()) for x in found.values()))
    order = torch.sort(found["event_row"], stable=True).indices
    return {name: x[order] for name, x in found.items()}
