"""Solves like one before, by calls that are filled but for addresses: what they write and their ways back read is one piece of memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.plan import Plan
from .back import swept
from .calls import BACKWARD_CALL, CONSISTENT_CALL, FORWARD_CALL, filled
from .consistent import LEAST, MOST
from .emit import recorded_stages, records_beside
from .memory import FEW_BYTES, as_given, in_large_pages, plain
from .program import Engine, Program
from .solve import Frame, Summary, block_of, made, make_room, point_at_counts, point_at_ends, room_for, shift_of, threads_for

__all__ = ["AtOnce", "Beginning", "EventBars", "Kept", "Target"]

#: of a part of the memory: it begins at a line of the cache
_LINE = 64
#: bytes of memory that is not used, from which on it is given back
_LARGE = 2**20
#: rows that one thread takes
_FEW = block_of(1)
#: anchors, start and end
_ENDS = torch.empty(2, 1, device="cpu")


#: condition up to which matrices leave no doubt which variables are differential, and in single precision
_CLEAR, _CLEAR_SINGLE = 1e7, 1e4


@dataclass(frozen=True, eq=False)
class Beginning:
    """How implicit equations begin: which variables are ``differential`` (n,), and to which relative tolerance the others, and slopes, are
    found."""

    differential: Tensor
    rtol: float


class Target(NamedTuple):
    """Where results of a solve go: ``y`` the samples (T, B, n), or without sample times (2, B, n) both ends; of implicit equations ``yp``
    the slopes there; ``counts``: the address of `COUNTS`."""

    y: Tensor
    yp: Tensor | None
    counts: int


@dataclass(frozen=True, eq=False)
class Layout:
    """Where parts of the memory begin, in bytes, for ``room`` steps. ``sizes``: of its pieces. ``steps``: by name the piece and place of
    those that grow with it; what does not comes before, in the first piece up to ``first``."""

    room: int
    sizes: tuple[int, ...]
    first: int
    steps: tuple[tuple[str, int, int], ...]
    inputs: tuple[int, ...]
    sample_step: int
    times: int
    ends: int
    #: consistent values and slopes
    begun: int


@dataclass(frozen=True, eq=False)
class Kept:
    """The memory of one solve, for its way back: ``n_steps`` are recorded. ``events``: how many of each function there are, in the last
    piece of the memory."""

    memory: Sequence[Tensor]
    layout: Layout
    n_steps: int
    events: tuple[int, ...] = ()


class Table(NamedTuple):
    """Where events are in their piece of memory, in bytes: numbers of each, and states and slopes behind them."""

    id: int
    row: int
    step: int
    t: int
    value: int
    y: int
    slope: int
    size: int

    @classmethod
    def of(cls, count: int, state: int) -> Table:
        """Of so many, with states of so many bytes."""
        begin, states = 8 * count, state * count
        return cls(0, begin, 2 * begin, 3 * begin, 4 * begin, 5 * begin, 5 * begin + states, 5 * begin + 2 * states)


class EventBars(NamedTuple):
    """Cotangents of times (E,), in double precision, and states (E, n) of events; ``ended``: one of them ended the solve, whose last state
    is its own."""

    t: Tensor
    y: Tensor
    ended: bool


@dataclass(eq=False)
class AtOnce:
    """The calls of one program by one plan, for ``rows`` states of ``width`` numbers.

    ``shapes``: of the inputs as the program takes them. ``kept``: there may be a way back, which reads what the solve read, whatever is
    written to tensors later. ``ended``: the final state is wanted behind samples. ``beginning``: of implicit equations.
    """

    program: Program
    plan: Plan
    frame: Frame
    rows: int
    width: int
    shapes: tuple[torch.Size, ...]
    kept: bool
    ended: bool
    beginning: Beginning | None = None
    _layouts: dict[tuple[int, int], Layout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        real = self.program.real
        self._bytes = tuple(prod(shape) * real.itemsize for shape in self.shapes)
        self._state = self.rows * self.width * real.itemsize
        method, frame = self.plan.method, self.frame
        stages = frame.keep_stages and not frame.few
        recorded = {"t": 8 * self.rows, "h": 8 * self.rows} if frame.keep_grid else {}
        recorded |= {"states": self._state} if frame.keep_states else {}
        recorded |= {"stages": self._state * recorded_stages(self.program.method)} if stages else {}
        recorded |= {"extra": 8 * self.rows * records_beside(self.program.method)} if frame.keep_grid and method.multistep else {}
        self._recorded = recorded
        assert isinstance(frame.engine, Engine)
        self._engine = frame.engine
        self._addresses = ctypes.c_void_p * max(len(self.shapes), 1)
        self._forward = FORWARD_CALL.from_buffer_copy(frame.call)
        self._backward = BACKWARD_CALL.from_buffer_copy(self.program.backward_call(frame.engine))
        for call in (self._forward, self._backward):
            call.rows, call.block, call.threads, call.n_anchors = self.rows, block_of(self.rows), 1, len(_ENDS)
        self._forward.shift = self._backward.jumps = shift_of(self.plan, _ENDS)
        self._forward.noting = 0 if not self.plan.events else 2 if self.kept else 1
        # states and slopes at events are noted
        self._forward.keep_stages = "stages" in self._recorded
        self._consistent: Any = None
        if self.beginning is not None:
            functions, tables, rtol = frame.engine.functions, self.program.table_addresses[0], self.beginning.rtol
            clear = _CLEAR if real.itemsize > 4 else _CLEAR_SINGLE
            self._consistent = filled(CONSISTENT_CALL, **functions, tables=tables, rtol=rtol, least=LEAST, most=MOST, condition=clear)
            self._consistent.rows, self._consistent.differential = self.rows, self.beginning.differential.data_ptr()
            self._flags = ctypes.c_ubyte * self.rows

    def _layout(self, room: int, samples: int) -> Layout:
        found = self._layouts.get((room, samples))
        if found is None:
            if len(self._layouts) > 64:
                self._layouts.clear()
            at = 0

            def place(size: int) -> int:
                nonlocal at
                begin, at = at, at + -(-size // _LINE) * _LINE
                return begin

            inputs = tuple(place(n) for n in self._bytes) if self.kept else ()
            others = place(8 * samples * self.rows), place(16 * self.rows), place(3 * self._state)
            begun = place(2 * self._state if self.beginning is not None else 0)
            first = at
            lengths = {name: n * (room + (name == "states")) for name, n in self._recorded.items()}
            # what is large is a piece by itself: allocators keep those of some size for the next solve, but not larger ones
            large = [name for name, n in lengths.items() if n >= FEW_BYTES]
            steps = tuple((name, 1 + large.index(name), 0) if name in large else (name, 0, place(n)) for name, n in lengths.items())
            sizes = at, *(lengths[name] for name in large)
            found = self._layouts[room, samples] = Layout(room, sizes, first, steps, inputs, *others, begun)
        return found

    def forward(
        self, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, tensors: Sequence[Tensor], to: Target, yp0: Tensor | None = None
    ) -> tuple[Kept, Summary] | None:
        """A solve of one span, with ``anchors`` (2, B) and samples at ``t_eval`` (T, B), in the order of time. ``y0`` and ``yp0``: as the
        program takes them; ``tensors``: of its inputs. None where the general way has to look for how implicit equations begin. Raises
        `Unreadable`."""
        program, plan, frame, rows = self.program, self.plan, self.frame, self.rows
        samples = 0 if t_eval is None else len(t_eval)
        layout = self._layout(room_for(program, frame, plan, rows), samples)
        memory = _memory(layout)
        call, at = FORWARD_CALL.from_buffer_copy(self._forward), memory[0].data_ptr()
        read = self._read(tensors)
        if self.kept:
            addresses = self._addresses(*[at + k for k in layout.inputs])
            for k, x, size in zip(layout.inputs, read, self._bytes, strict=True):
                ctypes.memmove(at + k, x.data_ptr(), size)
        else:
            addresses = self._addresses(*[x.data_ptr() for x in read])
        call.inputs, call.y0, call.anchors = ctypes.addressof(addresses), y0.data_ptr(), anchors.data_ptr()
        if self._consistent is not None:
            assert yp0 is not None and to.yp is not None
            call.y0 = at + layout.begun
            call.first_slope = call.y0 + self._state
            if not self._begin(call, anchors, y0, yp0):
                return None
        if rows > _FEW:
            call.threads, call.team = threads_for(program, rows)
        point_at_counts(call, to.counts, 8 * rows)
        point_at_ends(call, at + layout.times, 8 * rows, at + layout.ends, self._state)
        call.samples = to.y.data_ptr()
        if t_eval is None:
            call.initial, call.final = call.samples, call.samples + self._state
            if to.yp is not None:
                ctypes.memmove(to.yp.data_ptr(), call.first_slope, self._state)
                call.final_slope = to.yp.data_ptr() + self._state
        else:
            call.slopes = None if to.yp is None else to.yp.data_ptr()
            call.t_eval, call.n_samples, call.sample_step = t_eval.data_ptr(), samples, at + layout.sample_step
            if self.ended:
                call.final = call.samples + samples * self._state
        _point(call, memory, layout)
        kept = memory, layout

        def more(further: Any, most: int) -> None:
            nonlocal kept
            kept = self._moved(memory, layout, self._layout(most, samples), 0)
            _point(further, *kept)

        summary, events = made(self._engine, call, plan, anchors, more, self._taken)
        most = summary.most if frame.keep_grid else 0
        if frame.keep_grid:
            make_room(program, rows, most)
            if 2 * most < layout.room and sum(layout.sizes) > _LARGE:
                # what is not used is given back
                kept = self._moved(memory, layout, self._layout(most, samples), most)
        if events is None:
            return Kept(*kept, most), summary
        jumps, table, each = events
        return None if jumps else (Kept((*kept[0], table), kept[1], most, each), summary)

    def _taken(self, engine: Engine, tape: int) -> tuple[bool, Tensor, tuple[int, ...]]:
        """The events of a solve: whether ``fun`` jumps at some, their table, and how many there are of each function."""
        assert engine.count_events is not None and engine.take_events is not None
        count, jumps = engine.count_events(ctypes.c_void_p(tape)), ctypes.c_long()
        table = Table.of(count, self._state)
        memory = torch.empty(max(table.size, 1), dtype=torch.uint8, device="cpu")
        at = memory.data_ptr()
        places = [ctypes.c_void_p(at + k) for k in table[:-1]]
        engine.take_events(ctypes.c_void_p(tape), *places, ctypes.byref(jumps))
        ids = (ctypes.c_long * count).from_address(at)[:] if count else []
        return bool(jumps.value), memory, tuple([ids.count(k) for k in range(len(self.plan.events))])

    def event_times(self, kept: Kept) -> Tensor:
        """(E,), in double precision, function by function."""
        count = sum(kept.events)
        return _part(kept.memory[-1], Table.of(count, self._state).t, 8 * count, torch.float64).clone()

    def event_states(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """States (E, n) at `event_times`, and slopes, which nobody writes to."""
        count = sum(kept.events)
        begin = Table.of(count, self._state).y
        y, slope = _part(kept.memory[-1], begin, 2 * self._state * count, self.program.real).view(2, count, self.width)
        return y.clone(), slope

    def backward(
        self,
        kept: Kept,
        anchors: Tensor,
        t_eval: Tensor | None,
        bar: Tensor,
        wanted: Mapping[int | None, bool],
        events: EventBars | None = None,
        yp_bar: Tensor | None = None,
    ) -> tuple[dict[int | None, Tensor], bool]:
        """Cotangents from that of what `forward` has written, and whether all there are are finite, and there: those of the initial state
        (None) and of the inputs (by their place) that are ``wanted``. ``yp_bar``: of slopes, of a solve that no event ended. Raises
        `Unreadable`."""
        program, layout = self.program, kept.layout
        call, at = BACKWARD_CALL.from_buffer_copy(self._backward), kept.memory[0].data_ptr()
        bar = as_given(bar, program.real)
        if t_eval is None:
            call.initial_bar = bar.data_ptr()
            call.final_bar = call.initial_bar + self._state
        else:
            call.samples_bar, call.sample_step = bar.data_ptr(), at + layout.sample_step
            call.t_eval, call.n_samples = t_eval.data_ptr(), len(t_eval)
            if self.ended:
                call.final_bar = call.samples_bar + len(t_eval) * self._state
        flat = ctypes.c_long()
        if events is not None:
            call.flat = ctypes.addressof(flat)
            _held = self._with_events(call, kept, t_eval, bar, events)
        if self.rows > _FEW:
            call.threads, call.team = threads_for(program, self.rows)
        found: dict[int | None, Tensor] = {}
        # those that nobody wants are written too
        unwanted = []

        def written(key: int | None, shape: Sequence[int], size: int) -> int:
            if wanted.get(key):
                x = found[key] = torch.empty(shape, dtype=program.real, device="cpu")
                return x.data_ptr()
            unwanted.append(ctypes.create_string_buffer(size))
            return ctypes.addressof(unwanted[-1])

        call.y0_bar = written(None, (self.rows, self.width), self._state)
        bars = self._addresses(*[written(k, shape, size) for k, (shape, size) in enumerate(zip(self.shapes, self._bytes, strict=True))])
        addresses = self._addresses(*[at + k for k in layout.inputs])
        call.inputs, call.input_bars = ctypes.addressof(addresses), ctypes.addressof(bars)
        call.anchors, call.n_steps = anchors.data_ptr(), kept.n_steps
        _point(call, kept.memory, layout)
        of_stages, of_first = (None, None) if yp_bar is None else self._slopes_back(kept, anchors, t_eval, plain(yp_bar, program.real))
        call.stages_bar = None if of_stages is None else of_stages.data_ptr()
        finite = swept(self._engine, call, True) and not flat.value
        return found, finite if self._consistent is None else self._begun_back(call, at + layout.begun, anchors, of_first)

    def _slopes_back(self, kept: Kept, anchors: Tensor, t_eval: Tensor | None, bar: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents of stages (K, S, B, n), and of the slopes at the start (B, n), from those of slopes where the states are."""
        bar, h, rows = bar.reshape(-1, self.rows, self.width), self.sizes(kept), torch.arange(self.rows, device="cpu")
        if t_eval is None:
            # each trajectory has steps of size zero behind its last one
            first, bar, step = bar[0], bar[1:], (h != 0).sum(0, keepdim=True) - 1
            share = torch.ones(step.shape, dtype=torch.float64, device="cpu")
        else:
            found = _part(kept.memory[0], kept.layout.sample_step, t_eval.nbytes, torch.int64).view(t_eval.shape)
            begun, step = (t_eval == anchors[0]).unsqueeze(-1), found.clamp(min=0)
            first = torch.where(begun, bar, 0.0).sum(0)
            bar = torch.where(begun | (found < 0).unsqueeze(-1), 0.0, bar)
            t = self._steps(kept, "t", 8 * self.rows, 0, torch.float64).view(-1, self.rows)
            share = (t_eval - t.gather(0, step)) / h.gather(0, step)
        parts = torch.einsum("tbs,tbn->tsbn", self.plan.method.dense_slopes(share).to(bar.dtype), bar)
        out = torch.zeros((kept.n_steps, *parts.shape[1:]), dtype=bar.dtype, device="cpu")
        stage = torch.arange(parts.shape[1], device="cpu").unsqueeze(-1)
        return out.index_put_((step.unsqueeze(1), stage, rows), parts, accumulate=True), first.contiguous()

    def _with_events(self, call: Any, kept: Kept, t_eval: Tensor | None, bar: Tensor, events: EventBars) -> Sequence[Tensor]:
        """Fill the ``call`` of a way back with cotangents of events, whose states are samples at fixed times beside those of ``t_eval``:
        what has to be held while it is made."""
        count, real, samples = sum(kept.events), self.program.real, 0 if t_eval is None else len(t_eval)
        at, table = kept.memory[-1].data_ptr(), Table.of(count, self._state)
        bars, places = torch.empty(samples + count, self.width, dtype=real, device="cpu"), torch.empty(0, dtype=torch.int64, device="cpu")
        t_bar, y_bar = plain(events.t, torch.float64), plain(events.y, real)
        times, steps = (_part(kept.memory[-1], k, 8 * count, kind) for k, kind in ((table.t, torch.float64), (table.step, torch.int64)))
        if t_eval is None:
            call.final_bar = None if events.ended else call.final_bar
        else:
            bars[:samples] = bar[:samples].reshape(samples, self.width)
            of_samples = _part(kept.memory[0], kept.layout.sample_step, 8 * samples, torch.int64)
            times, steps = torch.cat([t_eval[:, 0], times]), torch.cat([of_samples, steps])
        if samples + count > 1:
            # by time, in the order of steps; samples behind the end of a solve are in none
            by_time = times.argsort(stable=True)
            late = torch.where(steps < 0, kept.n_steps, steps)[by_time]
            places = by_time[late.argsort(stable=True)]
            call.order = places.data_ptr()
        call.samples_bar, call.sample_step, call.t_eval, call.n_samples = bars.data_ptr(), steps.data_ptr(), times.data_ptr(), len(times)
        call.n_events, call.event_bar = count, call.samples_bar + samples * self._state
        for name in ("id", "row", "step", "t", "value", "y", "slope"):
            setattr(call, f"event_{name}", at + getattr(table, name))
        call.event_t_bar, call.event_y_bar = t_bar.data_ptr(), y_bar.data_ptr()
        return bars, places, times, steps, t_bar, y_bar

    def _begin(self, call: Any, anchors: Tensor, y0: Tensor, yp0: Tensor) -> bool:
        """Find consistent values, which go where a ``call`` reads them. Whether they are beyond doubt."""
        found, sound, time = self._flags(), self._flags(), self._start(anchors)
        begin = CONSISTENT_CALL.from_buffer_copy(self._consistent)
        begin.inputs, begin.t, begin.y, begin.yp = call.inputs, time.data_ptr(), y0.data_ptr(), yp0.data_ptr()
        begin.y_found, begin.yp_found = call.y0, call.first_slope
        begin.found, begin.sound = ctypes.addressof(found), ctypes.addressof(sound)
        assert self._engine.consistent is not None
        self._engine.consistent(ctypes.byref(begin))
        return all(found) and all(sound)

    def _begun_back(self, call: Any, begun: int, anchors: Tensor, yp_bar: Tensor | None) -> bool:
        """From the cotangent of consistent values, written by the ``call`` of a way back, to that of what they were found from, and to
        those of inputs. Whether all are finite."""
        infinite, time = ctypes.c_long(), self._start(anchors)
        begin = CONSISTENT_CALL.from_buffer_copy(self._consistent)
        begin.inputs, begin.t, begin.y, begin.yp = call.inputs, time.data_ptr(), begun, begun + self._state
        begin.y_bar, begin.y0_bar, begin.input_bars = call.y0_bar, call.y0_bar, call.input_bars
        begin.infinite, begin.yp_bar = ctypes.addressof(infinite), None if yp_bar is None else yp_bar.data_ptr()
        assert self._engine.consistent is not None
        self._engine.consistent(ctypes.byref(begin))
        return not infinite.value

    def _start(self, anchors: Tensor) -> Tensor:
        """Where trajectories start, (B,), in the dtype of the state."""
        return anchors[0].to(self.program.real)

    def inputs(self, kept: Kept) -> list[Tensor]:
        """What the solve read."""
        return [
            _part(kept.memory[0], k, size, self.program.real).view(shape)
            for k, size, shape in zip(kept.layout.inputs, self._bytes, self.shapes, strict=True)
        ]

    @property
    def differential(self) -> Tensor:
        """Which variables of implicit equations are, (n,)."""
        assert self.beginning is not None
        return self.beginning.differential

    def begun(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Consistent values and slopes (B, n), of implicit equations."""
        y, yp = _part(kept.memory[0], kept.layout.begun, 2 * self._state, self.program.real).view(2, self.rows, self.width)
        return y, yp

    def states(self, kept: Kept) -> Tensor:
        """(K + 1, B, n), where they are recorded."""
        return self._steps(kept, "states", self._state, 1, self.program.real).view(-1, self.rows, self.width)

    def sizes(self, kept: Kept) -> Tensor:
        """Of steps, (K, B)."""
        return self._steps(kept, "h", 8 * self.rows, 0, torch.float64).view(-1, self.rows)

    @staticmethod
    def _steps(kept: Kept, wanted: str, size: int, more: int, dtype: torch.dtype) -> Tensor:
        piece, begin = next((piece, k) for name, piece, k in kept.layout.steps if name == wanted)
        return _part(kept.memory[piece], begin, size * (kept.n_steps + more), dtype)

    def _read(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the program takes of its inputs."""
        real = self.program.real
        if all(x.dtype is real and x.is_contiguous() and not x.is_neg() for x in tensors):
            return list(tensors)
        return self.program.values(tensors, False)

    def _moved(self, memory: Sequence[Tensor], old: Layout, new: Layout, steps: int) -> tuple[Sequence[Tensor], Layout]:
        """A copy of the memory in another layout, with so many steps."""
        to = _memory(new)
        ctypes.memmove(to[0].data_ptr(), memory[0].data_ptr(), old.first)
        for (name, piece, k), (_, other, j) in zip(old.steps, new.steps, strict=True):
            if steps:
                length = self._recorded[name] * (steps + (name == "states"))
                ctypes.memmove(to[other].data_ptr() + j, memory[piece].data_ptr() + k, length)
        return to, new


def _memory(layout: Layout) -> Sequence[Tensor]:
    made = [torch.empty(size, dtype=torch.uint8, device="cpu") for size in layout.sizes]
    for x in made[1:]:
        in_large_pages(x)
    return made


def _point(call: Any, memory: Sequence[Tensor], layout: Layout) -> None:
    """Steps are at their places in this memory."""
    at = [x.data_ptr() for x in memory]
    call.room = layout.room
    for name, piece, k in layout.steps:
        setattr(call, name, at[piece] + k)


def _part(memory: Tensor, begin: int, size: int, dtype: torch.dtype) -> Tensor:
    return memory[begin : begin + size].view(dtype)
