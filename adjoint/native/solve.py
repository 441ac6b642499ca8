"""A solve by compiled code: from a plan and its tensors to a `Record`."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..integrate.companion import drawn
from ..integrate.loop import no_events
from ..integrate.plan import PIDController, Plan, Record
from ..integrate.residual import power_of
from ..integrate.stages import TOLERANCE
from ..torch_internals import team_of_threads
from .calls import FORWARD_CALL, filled
from .device import DeviceEngine, addressed, trimmed
from .emit import recorded_stages, records_beside
from .memory import FEW_BYTES, in_large_pages, plain
from .program import Engine, Program
from .progress import tell, told
from .reading import Unreadable

__all__ = [
    "COUNTS",
    "LOST",
    "Frame",
    "Solved",
    "Summary",
    "block_of",
    "frame_of",
    "made",
    "make_room",
    "point_at_counts",
    "point_at_ends",
    "room_for",
    "run_native",
    "sample_order",
    "shift_of",
    "threads_for",
]

T = TypeVar("T")
#: steps for which there is room at first
_ROOM = 64
#: bytes of that room
_MOST_ROOM = 2**26
_FEW = 32
#: what is counted for every trajectory, the work of implicit methods last
COUNTS = ("n_steps", "n_accepted", "n_fun", "status", "unstable", "n_jac", "n_factorizations", "n_solves", "n_newton")
_FIRST_OF_WORK = 5
#: values of all rows together, in one evaluation of ``fun``, from which on there are threads
_WORTH = 4000
#: why a solve, or its way back, is not made by sparse factors
LOST = "a sparse matrix of its steps has pivots that are all but zero: its factors would need rows exchanged"
_SHIFTS = {"none": 0, "inner": 1, "all": 2}


def block_of(rows: int) -> int:
    """Rows that one thread takes at a time: sums over rows go by blocks, so these must not depend on the number of threads."""
    return max(64, -(-rows // 64))


def threads_for(program: Program, rows: int) -> tuple[int, int]:
    """Threads among which blocks are shared out, where there is work for them, and their team."""
    count = torch.get_num_threads() if rows > block_of(rows) and rows * program.values_of_fun >= _WORTH else 1
    return count, team_of_threads() if count > 1 else 0


def shift_of(plan: Plan, anchors: Tensor) -> int:
    """See `Plan.shift`: 0 where there are no jumps."""
    return _SHIFTS[plan.shift] if plan.shift == "all" or anchors.shape[0] > 2 else 0


def sample_order(t_eval: Tensor | None, anchors: Tensor) -> Tensor | None:
    """(T, B) int64: samples in the order of time; None where they are in it."""
    if t_eval is None or t_eval.shape[0] < 2:
        return None
    if t_eval.numel() <= _FEW and t_eval.shape[1] == 1:
        # a few numbers are looked at faster by Python
        (first, last), times = anchors[[0, -1], 0].tolist(), t_eval[:, 0].tolist()
        if all(x <= y for x, y in (pairwise(times) if last >= first else pairwise(times[::-1]))):
            return None
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0)
    ordered = t_eval * sign
    if bool((ordered[1:] >= ordered[:-1]).all()):
        return None
    return torch.sort(ordered, dim=0, stable=True).indices.contiguous()


def _tolerance(x: float | Tensor, y0: Tensor) -> tuple[Tensor, int, int]:
    """Its numbers, and the strides of rows and columns."""
    if not isinstance(x, Tensor):
        return torch.tensor([x], dtype=y0.dtype, device=y0.device), 0, 0
    return plain(x.expand(y0.shape), y0.dtype), y0.shape[1], 1


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _controller(plan: Plan) -> dict[str, Any]:
    c: PIDController = plan.control
    names = ("safety", "min_factor", "max_factor", "pcoeff", "icoeff", "dcoeff", "shrink_accepted", "predictive", "remembers")
    return {name: getattr(c, name) for name in names}


@dataclass(frozen=True)
class Frame:
    """What all solves of one program by one plan for so many trajectories share: their call, but for the tensors of each.

    ``kept``: what the call points to. ``few``: of one trajectory by explicit methods, the stages of steps with events are wanted.
    """

    engine: Engine | DeviceEngine
    call: Any
    kept: tuple[Any, ...]
    keep_grid: bool
    keep_states: bool
    keep_stages: bool
    few: bool
    #: bytes of one recorded step
    size: int
    #: what is not kept of steps, by name
    absent: dict[str, Tensor]


def frame_of(
    program: Program,
    plan: Plan,
    y0: Tensor,
    watched: bool,
    index: Tensor | None = None,
    skipped: Tensor | None = None,
    idle: Tensor | None = None,
) -> Frame:
    """``y0`` (B, n). ``watched``: whether derivatives are wanted, for which explicit steps must be stable whatever the error of the state
    is. ``index`` and ``skipped``: see `ResidualSolver`; ``idle`` (B,): see `Problem`."""
    rows, n = y0.shape
    engine = program.engine(program.lanes(rows))
    few = bool(plan.events) and not plan.keep_stages
    keep_stages = plan.keep_stages or few
    keep_grid = plan.keep_states or plan.keep_grid or keep_stages
    beside = records_beside(program.method)
    stages = recorded_stages(program.method)
    size = rows * (n * y0.element_size() * (1 + (stages if keep_stages else 0)) + 16 + 8 * beside)
    absent = {} if plan.keep_states else {"states": y0.new_empty((0, rows, n))}
    absent |= {} if keep_stages else {"stages": y0.new_empty((0, stages, rows, n))}
    rtol, atol = _tolerance(plan.rtol, y0), _tolerance(plan.atol, y0)
    first = plan.first_step
    first = None if first is None else plain(torch.as_tensor(first, dtype=torch.float64, device=y0.device).reshape(-1))
    power, skipped = power_of(index, y0.dtype), None if skipped is None else skipped.contiguous()
    directions = torch.tensor([e.direction for e in plan.events], dtype=torch.float64, device=y0.device)
    terminal = torch.tensor([e.terminal for e in plan.events], dtype=torch.int64, device=y0.device)
    counts = None if plan.event_counts is None else plan.event_counts.contiguous()
    begun, idle = drawn(y0.shape[1:]).to(y0.device) if plan.switch else None, None if idle is None else idle.contiguous()
    call = filled(
        FORWARD_CALL,
        **engine.functions,
        directions=directions.data_ptr(),
        terminal=terminal.data_ptr(),
        event_counts=_address(counts),
        interval=plan.switch.auto.interval if plan.switch else 0.0,
        drawn=_address(begun),
        idle=_address(idle),
        tables=program.table_addresses[0],
        rows=rows,
        block=block_of(rows),
        rtol=rtol[0].data_ptr(),
        rtol_row=rtol[1],
        rtol_column=rtol[2],
        atol=atol[0].data_ptr(),
        atol_row=atol[1],
        atol_column=atol[2],
        first_step=_address(first),
        first_step_row=0 if first is None or first.numel() == 1 else 1,
        max_step=plan.max_step,
        min_step=plan.min_step,
        max_steps=plan.max_steps,
        accept_smallest=plan.accept_smallest,
        adaptive=plan.method.adaptive,
        least_rtol=4 * torch.finfo(y0.dtype).eps / TOLERANCE,
        power=_address(power),
        skipped=_address(skipped),
        **_controller(plan),
        guesses=not plan.keep_grid,
        watched=watched,
        keep_grid=keep_grid,
        keep_states=plan.keep_states,
        keep_stages=keep_stages,
    )
    kept = (rtol[0], atol[0], first, power, skipped, directions, terminal, counts, begun, idle, program)
    return Frame(engine, call, kept, keep_grid, plan.keep_states, keep_stages, few, size, absent)


class Summary(NamedTuple):
    """Of all trajectories: most accepted and most rejected steps, how many ended by something else than their time, whose steps were not
    stable, and how many components are at their end where they began."""

    most: int
    rejected: int
    otherwise: int
    unstable: int
    resting: int

    @classmethod
    def of(cls, counts: Tensor, last: Tensor, y0: Tensor) -> Summary:
        """By tensors, those of `Solved`."""
        steps, accepted, _, status, unstable = counts[:_FIRST_OF_WORK]
        largest = [x.max() if len(x) else x.sum() for x in (accepted, steps - accepted)]
        return cls(*torch.stack([*largest, (status != 0).sum(), (unstable != 0).sum(), (last == y0).sum()]).tolist())


_SUMMARY = ctypes.c_long * len(Summary._fields)


class Solved(NamedTuple):
    """What the compiled code wrote. ``steps``: tensors of `Record` by name, with room for more steps; of one span without ``segment`` and
    ``lands``.

    ``counts`` (9, B) int64 in the order of `COUNTS`; ``times`` (2, B): where trajectories ended, and the step that would follow; ``ends``
    (3, B, n): the final state, the last one, the scaled error.
    """

    counts: Tensor
    times: Tensor
    ends: Tensor
    samples: Tensor
    sample_step: Tensor
    steps: dict[str, Tensor]
    events: dict[str, Tensor] | None
    summary: Summary


def _grid_of(program: Program, frame: Frame, y0: Tensor, anchors: int, steps: int, first: bool = True) -> dict[str, Tensor]:
    """Tensors for so many steps, and, with ``first``, for the state before them."""
    rows, n = y0.shape
    at, made = y0.device, dict(frame.absent)
    if frame.keep_states:
        made["states"] = y0.new_empty((steps + first, rows, n))
    if frame.keep_stages:
        made["stages"] = y0.new_empty((steps, recorded_stages(program.method), rows, n))
    made["t"] = torch.empty((steps, rows), dtype=torch.float64, device=at)
    made["h"] = torch.empty((steps, rows), dtype=torch.float64, device=at)
    if beside := records_beside(program.method):
        made["extra"] = torch.empty((steps, beside, rows), dtype=torch.float64, device=at)
    if anchors > 2:
        made["segment"] = torch.empty((steps, rows), dtype=torch.int64, device=at)
        made["lands"] = torch.empty((steps, rows), dtype=torch.bool, device=at)
    if steps * frame.size >= FEW_BYTES:
        for x in made.values():
            in_large_pages(x)
    return made


def _point(call: Any, steps: dict[str, Tensor], room: int) -> None:
    call.room = room
    for name, x in steps.items():
        setattr(call, name, x.data_ptr())


def room_for(program: Program, frame: Frame, plan: Plan, rows: int) -> int:
    """Steps for which there is memory at first."""
    if not frame.keep_grid:
        return 0
    return min(program.room.get(rows, max(1, min(_ROOM, _MOST_ROOM // max(frame.size, 1)))), plan.max_steps)


def make_room(program: Program, rows: int, most: int) -> None:
    """Remember that a solve took so many steps."""
    program.room[rows] = most + most // 4 + 8


def point_at_counts(call: Any, address: int, row: int) -> None:
    """`COUNTS` go to this address, ``row`` bytes each."""
    for k, name in enumerate(COUNTS[:_FIRST_OF_WORK]):
        setattr(call, name, address + k * row)
    call.work = address + _FIRST_OF_WORK * row


def point_at_ends(call: Any, times: int, row: int, ends: int, state: int) -> None:
    """Times of ends go to one address, ``row`` bytes each, and states there, of ``state`` bytes, to another one."""
    call.t_final, call.next_step = times, times + row
    call.final, call.last, call.scaled = ends, ends + state, ends + 2 * state


def made(
    engine: Engine, call: Any, plan: Plan, anchors: Tensor, more: Callable[[Any, int], None], take: Callable[[Engine, int], T]
) -> tuple[Summary, T | None]:
    """Make a call of compiled code: its summary, and its events as they are to be taken. ``more``: point a call at memory for so many
    steps, where there were more than there was ``room`` for. Raises `Unreadable` where a sparse matrix has no factors in the order of its
    pattern."""
    found, lost, seen = None, ctypes.c_long(), _SUMMARY()
    call.lost, call.summary = ctypes.addressof(lost), ctypes.addressof(seen)
    assert engine.forward is not None and engine.seal is not None
    with told(plan.monitor, call, anchors):
        tape = engine.forward(ctypes.byref(call))
    summary = Summary(*seen)
    if tape is not None:
        found, to = take(engine, tape) if plan.events else None, call
        most = summary.most if call.keep_grid else 0
        if most > call.room:
            to = FORWARD_CALL.from_buffer_copy(call)
            more(to, most)
        engine.seal(ctypes.c_void_p(tape), ctypes.byref(call), ctypes.byref(to), ctypes.c_long(most))
    if lost.value:
        raise Unreadable("", "", LOST)
    return summary, found


def solved(
    program: Program,
    frame: Frame,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
) -> Solved:
    """A solve; all tensors contiguous and without derivatives, ``inputs`` in the dtype of the state. Raises `Unreadable` where a sparse
    matrix has no factors in the order of its pattern."""
    rows, n = y0.shape
    n_anchors = anchors.shape[0]
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    order = sample_order(t_eval, anchors)
    room = room_for(program, frame, plan, rows)
    at = y0.device
    counts = torch.empty((len(COUNTS), rows), dtype=torch.int64, device=at)
    times = torch.empty((2, rows), dtype=torch.float64, device=at)
    ends = y0.new_empty((3, rows, n))
    samples, sample_step = y0.new_empty((n_samples, rows, n)), torch.empty((n_samples, rows), dtype=torch.int64, device=at)
    call = FORWARD_CALL.from_buffer_copy(frame.call)
    call.inputs, _inputs_at = addressed(inputs, at)
    call.threads, call.team = threads_for(program, rows)
    call.anchors, call.n_anchors, call.shift = anchors.data_ptr(), n_anchors, shift_of(plan, anchors)
    call.t_eval, call.n_samples, call.order = _address(t_eval), n_samples, _address(order)
    call.y0 = y0.data_ptr()
    point_at_counts(call, counts.data_ptr(), 8 * rows)
    point_at_ends(call, times.data_ptr(), 8 * rows, ends.data_ptr(), y0.nbytes)
    call.samples, call.sample_step = samples.data_ptr(), sample_step.data_ptr()
    engine, found = frame.engine, None
    if isinstance(engine, DeviceEngine):
        grid = partial(_grid_of, program, frame, y0, n_anchors)
        most, steps = engine.rounds(call, counts, grid, room, partial(tell, plan.monitor, anchors, times[0]))
        summary = Summary.of(counts, ends[1], y0)
    else:
        steps = first = _grid_of(program, frame, y0, n_anchors, room)
        _point(call, first, room)

        def more(to: Any, most: int) -> None:
            nonlocal steps
            steps = _grid_of(program, frame, y0, n_anchors, most)
            _point(to, steps, most)

        # `first` is read until it is sealed
        summary, found = made(engine, call, plan, anchors, more, _events)
        most = summary.most if frame.keep_grid else 0
        if frame.few:
            assert found is not None
            steps["stages"] = steps["stages"][torch.unique(found["event_step"])]
    if frame.keep_grid:
        make_room(program, rows, most)
    return Solved(counts, times, ends, samples, sample_step, steps, found, summary)


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
    idle: Tensor | None = None,
) -> tuple[Record, Tensor]:
    """Solve, and whose explicit steps (B,) were not stable, as far as they were ``watched``; the arguments are those of the eager loops.

    ``inputs``: contiguous, in the dtype of the state. ``watched``: see `frame_of`. ``index``, ``skipped`` and ``idle``: see
    `frame_of`.
    """
    anchors, y0, t_eval = plain(anchors), plain(y0), None if t_eval is None else plain(t_eval)
    frame = frame_of(program, plan, y0, watched, index, skipped, idle)
    found = solved(program, frame, plan, anchors, t_eval, y0, inputs)
    counts = dict(zip(COUNTS, found.counts.unbind(), strict=True))
    # what is written to one of the others is not written to this one, which the way back keeps
    counts["status"] = counts["status"].clone()
    unstable = counts.pop("unstable") != 0
    most = found.summary.most if frame.keep_grid else 0
    steps = trimmed(found.steps, most)
    if "segment" not in steps:
        steps["segment"] = torch.zeros((1, 1), dtype=torch.int64, device=y0.device).expand(most, y0.shape[0])
        # at its end the last step lands
        last = torch.where(counts["status"] == 0, counts["n_accepted"] - 1, -1)
        steps["lands"] = torch.arange(most, device=y0.device).unsqueeze(-1) == last
    final, last, scaled = found.ends.unbind()
    t_final, next_step = found.times.unbind()
    record = Record(
        final=final,
        last=last,
        scaled_error=scaled,
        samples=found.samples,
        sample_step=found.sample_step,
        t_final=t_final,
        next_step=next_step,
        n_rejected=counts["n_steps"] - counts["n_accepted"],
        **counts,
        **steps,
        **(no_events(y0) if found.events is None else found.events),
    )
    return record, unstable


def _events(engine: Engine, tape: int) -> dict[str, Tensor]:
    """The fields of a record about events, in the order of trajectories, and of time for each."""
    assert engine.count_events is not None and engine.take_events is not None
    count = engine.count_events(ctypes.c_void_p(tape))
    names = ("event_id", "event_row", "event_step")
    found = {name: torch.empty(count, dtype=torch.int64, device="cpu") for name in names}
    found["event_t"] = torch.empty(count, dtype=torch.float64, device="cpu")
    engine.take_events(ctypes.c_void_p(tape), *(ctypes.c_void_p(x.data_ptr()) for x in found.values()), None, None, None, None)
    order = torch.sort(found["event_row"], stable=True).indices
    return {name: x[order] for name, x in found.items()}
