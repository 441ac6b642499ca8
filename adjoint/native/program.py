"""A right-hand side that was read, with an engine for a method: what is compiled, and how often for how many lanes."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..system.remarks import Seldom
from .build import NoCompiler, library, spending
from .calls import BACKWARD_CALL, CONTEXT, filled
from .device import LAUNCHERS, DeviceEngine, addressed, kernels_of
from .emit import Compiled, device_functions, device_prologue, engine_text, goes_along, is_residual, prologue
from .functions import UserFunctions, depends, inputs_of, user_functions
from .jointly import of_all_rows
from .memory import in_parts, plain
from .reading import Reading, Unreadable
from .tangents import matrix_with_tangents, with_displacement, with_slopes_apart, with_tangents
from .text import vector_library

__all__ = ["Engine", "Program", "program_of"]

#: bytes of a vector of trajectories, by how many values ``fun`` computes at most: where these are few, steps wait for each other's results,
#: and what goes on beside them is had for nothing; where they are many, registers run out
_VECTORS = ((40, 256), (80, 128))
_VECTOR = 64
#: fewest trajectories for which there are vectors, and for which there are wide ones
_FEWEST, _MANY = 16, 64
#: unknowns beyond which a matrix of vectors is too large for any cache
_LARGE = 250


_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Engine:
    """Compiled functions: of the solve, of the way back, and of the user's, as addresses."""

    #: None of equations of tangents, which go along recorded steps
    forward: Callable[..., int] | None
    seal: Callable[..., None] | None
    #: None of what is solved forward only
    backward: Callable[..., None] | None
    functions: dict[str, int]
    #: how many events were found, and what they are
    count_events: Callable[..., int] | None = None
    take_events: Callable[..., None] | None = None
    #: of implicit equations, see `NativeStart`
    consistent: Callable[..., None] | None = None


@dataclass(eq=False)
class Program:
    """A right-hand side as scalar expressions, for one method, dtype and width.

    ``own``: how many numbers of each input belong to one trajectory, 0 where all share it; ``numbers``: how many cotangents the shared ones
    have. ``room``: steps that the last solve of so many rows took, and some more.
    """

    reading: Reading
    method: Compiled
    real: torch.dtype
    width: int
    own: tuple[int, ...]
    numbers: tuple[int, ...]
    timed: bool
    tables: tuple[Tensor, ...]
    #: functions of events
    events: tuple[Reading, ...] = ()
    #: the matrix in front of the slopes, row by row
    mass: Reading | None = None
    #: of one state of many rows: how many, and what `own` would be if each were a trajectory
    joint: int = 0
    own_of_row: tuple[int, ...] = ()
    #: inputs of whole numbers
    whole: frozenset[int] = frozenset()
    #: whether the second half of the state is a displacement of the first one; such solves have no way back
    displaced: bool = False
    #: whether it is a tangent: steps are those of the record of a solve without it
    along: bool = False
    device: torch.device = _CPU
    room: dict[int, int] = field(default_factory=dict)
    #: how often its solves are looked at for jumps
    looks: Seldom = field(default_factory=Seldom)
    #: for rates that their derivatives lose, and for jumps at ends that are differentiated
    rates: Seldom = field(default_factory=Seldom)
    ends: Seldom = field(default_factory=Seldom)
    #: by the number of lanes; what could not be made is not tried again
    _engines: dict[int, Engine | DeviceEngine | NoCompiler | Unreadable] = field(default_factory=dict)
    #: lanes of the code that was compared with the function
    _compared: set[int] = field(default_factory=set)
    _agains: dict[int, Callable[..., Any]] = field(default_factory=dict)
    #: engines that are being made by other threads
    _waiting: set[int] = field(default_factory=set)
    _lock: threading.RLock = field(default_factory=threading.RLock)
    _functions: UserFunctions | Unreadable | None = None
    _companion: Program | Unreadable | None = None
    _tangential: Program | Unreadable | None = None
    _calls: dict[int, Any] = field(default_factory=dict)

    @property
    def functions(self) -> UserFunctions:
        """The user's function and its derivatives as text. Raises `Unreadable` where that would be too long."""
        if self._functions is None:
            try:
                width, own = (self.width // self.joint, self.own_of_row) if self.joint else (self.width, self.own)
                readings = self.reading, self.events, self.mass
                self._functions = user_functions(*readings, width, own, self.timed, self.method, not self.displaced)
            except Unreadable as error:
                self._functions = error
        if isinstance(self._functions, Unreadable):
            raise self._functions
        return self._functions

    def companion(self) -> Program:
        """The same equations with a displacement beside (`with_displacement`). Raises `Unreadable`."""
        with self._lock:
            if self._companion is None:
                self._companion = _derived(self._with_displacement)
        if isinstance(self._companion, Unreadable):
            raise self._companion
        return self._companion

    def _with_displacement(self) -> Program:
        if self.joint:
            raise Unreadable("", "", "a component of one state of many rows is at rest, for whose derivatives steps have to be shorter")
        reading, nothing = with_displacement(self.reading, self.whole, self.real), (0,) * len(self.numbers)
        sizes = self.real, 2 * self.width, self.own, nothing, self.timed, self.tables, self.events
        return Program(reading, self.method, *sizes, displaced=True, device=self.device)

    @property
    def has_tangents(self) -> bool:
        """Whether there may be a `tangential` program, as far as is known."""
        known = isinstance(self._tangential, Unreadable) or self.device.type in LAUNCHERS
        # of a state of many rows tangents stand behind each, which steps that solve for stages do not know of
        return not known and goes_along(self.method) and not (self.joint and self.method.implicit)

    def tangential(self) -> Program:
        """The same equations with tangents beside (`with_tangents`). Raises `Unreadable`."""
        with self._lock:
            if self._tangential is None:
                self._tangential = _derived(self._with_tangents)
        if isinstance(self._tangential, Unreadable):
            raise self._tangential
        return self._tangential

    def _with_tangents(self) -> Program:
        sizes = self.real, 2 * self.width, self.own * 2, self.numbers * 2, self.timed, self.tables
        reading = with_slopes_apart(self.reading) if is_residual(self.method) else self.reading
        mass = None if self.mass is None else matrix_with_tangents(self.mass, self.whole)
        joint = {"joint": self.joint, "own_of_row": self.own_of_row * 2}
        whole = self.whole | {k + len(self.own) for k in self.whole}
        more = {"mass": mass, "whole": whole, "along": True, "device": self.device}
        return Program(with_tangents(reading, self.whole), self.method, *sizes, **joint, **more)

    def lanes(self, rows: int) -> int:
        """How many trajectories go side by side; 0: a thread of a device takes each."""
        if self.device.type in LAUNCHERS:
            return 0
        if rows < _FEWEST or (self.method.implicit and self.width > _LARGE):
            return 1
        return (self._widest if rows >= _MANY else _VECTOR) // self.real.itemsize

    @cached_property
    def values_of_fun(self) -> int:
        """How many values ``fun`` computes for one trajectory."""
        graph = self.reading.graph
        return len(graph.cone(self.reading.outputs, graph.parts))

    @cached_property
    def _widest(self) -> int:
        """Bytes of a vector of many trajectories."""
        return next((size for most, size in _VECTORS if self.values_of_fun <= most), _VECTOR)

    def values(self, tensors: Sequence[Tensor], kept: bool) -> list[Tensor]:
        """Its inputs as it takes them: contiguous, in the dtype of the state. Raises `Unreadable` for whole numbers beyond that.

        ``kept``: for a way back, which is that of the solve whatever is written to ``tensors`` later.
        """
        found = []
        for x in map(in_parts, tensors):
            value = plain(x, self.real)
            if not x.is_floating_point() and not torch.equal(value.to(x.dtype), x):
                raise Unreadable("", "", f"it uses whole numbers that {self.real} has not")
            found.append(value.clone() if kept and value.data_ptr() == x.data_ptr() else value)
        return found

    @cached_property
    def table_addresses(self) -> tuple[int, Any]:
        """See `addressed`."""
        return addressed(self.tables, self.device)

    def backward_call(self, engine: Engine | DeviceEngine) -> Any:
        """The call of a way back, but for all that differs by solve."""
        found = self._calls.get(id(engine))
        if found is None:
            found = self._calls[id(engine)] = filled(BACKWARD_CALL, **engine.functions, tables=self.table_addresses[0])
        return found

    def engine(self, lanes: int) -> Engine | DeviceEngine:
        """The compiled code, made when it is first asked for. Raises `NoCompiler`."""
        with self._lock:
            if lanes not in self._engines:
                try:
                    with spending():
                        self._engines[lanes] = self._made(lanes) if lanes else self._kernels()
                except (NoCompiler, Unreadable) as error:
                    self._engines[lanes] = error
        found = self._engines[lanes]
        if isinstance(found, Exception):
            raise found
        return found

    def compared_first(self, rows: int) -> bool:
        """Whether the code for so many trajectories is to be compared with the function now, which is once; code for devices has no
        functions that could be called by themselves."""
        lanes = self.lanes(rows)
        if not lanes or lanes in self._compared:
            return False
        self._compared.add(lanes)
        return True

    def disowned(self, rows: int, reason: str) -> Unreadable:
        """There is no such code any more, for this reason."""
        error = self._engines[self.lanes(rows)] = Unreadable("", "", reason)
        return error

    def again(self, lanes: int) -> Callable[..., None]:
        """Compiled code that takes recorded steps again, made when it is first asked for, see `Again`. Raises `NoCompiler`."""
        if self.along:
            self.engine(lanes)
        with self._lock:
            found = self._agains.get(lanes)
            if found is None:
                with spending():
                    made = library("\n".join([prologue(self.real, lanes), self._engine_text(again=True)]), True, links(lanes))
                found = self._agains[lanes] = made.again
                found.restype = None
        return found

    def engine_later(self, lanes: int) -> bool:
        """Whether the compiled code is there, or cannot be made; else it is made by another thread."""
        if lanes in self._engines:
            return True
        if lanes not in self._waiting:
            self._waiting.add(lanes)
            threading.Thread(target=self._tried, args=(lanes,), daemon=True).start()
        return False

    def _tried(self, lanes: int) -> None:
        with suppress(NoCompiler, Unreadable):
            self.engine(lanes)

    def _users(self, start: str, theirs: UserFunctions, lanes: int) -> ctypes.CDLL:
        if not self.joint:
            return library("\n".join([start, CONTEXT, theirs.tables, *theirs.texts.values()]), False, links(lanes))
        wide = _VECTOR // self.real.itemsize
        text = of_all_rows(theirs.texts, self.joint, self.width // self.joint, self.own_of_row, self.numbers)
        return library("\n".join([prologue(self.real, wide), CONTEXT, theirs.tables, text]), True, links(wide))

    def _engine_text(self, device: bool = False, again: bool = False) -> str:
        sizes = self.width, self.timed, self.own, self.numbers, self.functions.matrices, len(self.events), self.mass is not None
        return engine_text(self.method, self.real, *sizes, self.displaced, device, again, self.along)

    def kernel_text(self) -> str:
        """All of the text for a device. Raises `Unreadable`."""
        theirs = self.functions
        if self.joint:
            alone = f"on {self.device.type} a trajectory is that of one thread (batched=True)"
            raise Unreadable("", "", f"its {self.joint} rows are one state, and {alone}")
        if theirs.matrices is not None and theirs.matrices.sparse is not None:
            raise Unreadable("", "", "of its matrices only some entries are kept, which is done on CPUs only")
        return "\n".join([device_prologue(self.real), theirs.tables, device_functions(theirs.texts), self._engine_text(device=True)])

    def _kernels(self) -> DeviceEngine:
        shared = sum(n for n, own in zip(self.numbers, self.own, strict=True) if not own)
        return kernels_of(self.kernel_text(), self.device, shared)

    def _made(self, lanes: int) -> Engine:
        start, theirs = prologue(self.real, lanes), self.functions
        users, engine = self._users(start, theirs, lanes), self._engine_text()
        loop = library("\n".join([start, engine]), True, links(lanes))
        addresses = {name: _address(users, name) for name in theirs.texts}
        more, back = {}, None
        if self.along:
            self._agains[lanes], back = loop.again, loop.backward
            loop.again.restype = back.restype = None
            return Engine(None, None, back, addresses)
        loop.forward.restype = ctypes.c_void_p
        loop.seal.restype = None
        if not self.displaced:
            back = loop.backward
            back.restype = None
        if self.events:
            loop.count_events.restype, loop.take_events.restype = ctypes.c_long, None
            more |= {"count_events": loop.count_events, "take_events": loop.take_events}
        if is_residual(self.method):
            loop.consistent.restype = None
            more["consistent"] = loop.consistent
        return Engine(loop.forward, loop.seal, back, addresses, **more)


def _derived(make: Callable[[], Program]) -> Program | Unreadable:
    """A program made of derivatives, or why there is none."""
    try:
        return make()
    except Unreadable as error:
        return error
    except NotImplementedError as error:
        return Unreadable("", "", f"{error} is not known as a formula")


def links(lanes: int) -> tuple[str, ...]:
    """Flags that vectors need."""
    return vector_library() if lanes > 1 else ()


def _address(loaded: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
    assert address is not None
    return address


def program_of(
    readings: Sequence[Reading], method: Compiled, y0: Tensor, inputs: Sequence[Tensor], mass: bool = False, joint: int = 0
) -> Program:
    """The program of a right-hand side, behind which functions of events may stand, and with ``mass`` the matrix in front of the slopes as
    the last one, for states like ``y0`` (B, n) and inputs like these. ``joint``: readings are of one of so many rows of a state.

    Raises `Unreadable` where one of them shares an input among trajectories that another one does not.
    """
    used = [inputs_of(reading) for reading in readings]
    steps: list[int] = []
    for k in range(len(inputs)):
        found = {reading.strides[k] for reading, of in zip(readings, used, strict=True) if k in of}
        if len(found) > 1:
            raise Unreadable("", "", "an event and fun use one argument in different ways")
        steps.append(found.pop() if found else 0)
    own = tuple(steps)
    shared = tuple(x.numel() if (joint or not step) and x.is_floating_point() else 0 for step, x in zip(steps, inputs, strict=True))
    timed = any(depends(reading, "t") for reading in readings)
    tables = tuple(plain(x, y0.dtype).to(y0) for reading in readings for x in reading.tables)
    events, matrix = (readings[1:-1], readings[-1]) if mass else (readings[1:], None)
    of_one = (0,) * len(own) if joint else own
    whole = frozenset(k for k, x in enumerate(inputs) if not x.is_floating_point())
    sizes = y0.dtype, y0.shape[1], of_one, shared, timed, tables, tuple(events), matrix, joint, own, whole
    return Program(readings[0], method, *sizes, device=y0.device)
