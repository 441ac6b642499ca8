"""One solve and its way back by compiled code, where that can be; where not, a remark says why."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..integrate.companion import rests
from ..integrate.plan import Grid, PIDController, Plan, Record, rms_norm
from ..methods import Method
from ..system.remarks import remark
from ..system.system import StateSpec, System, VmappedSystem
from ..torch_internals import is_saving_watched, unwatched
from .again import parts_forward
from .agreement import Point, agrees, points_of, same, with_tangents
from .back import Cotangents, sweep_native
from .build import NoCompiler, spent
from .companion import solved_again
from .consistent import NativeStart
from .device import LAUNCHERS
from .emit import DEVICE_METHODS, is_residual, takes
from .graphs import Heard
from .memory import plain, put_together
from .progress import watches_steps
from .reading import Unreadable
from .recognise import Recognised, compile_key, hear, recognise
from .second import Along, along, second
from .solve import run_native

__all__ = ["NativeSolve", "Sought", "in_parts_for", "own_algebra", "suits"]

_remarked: set[tuple[Hashable, str]] = set()


def suits(plan: Plan, system: System | VmappedSystem, y0: Tensor) -> str | None:
    """Why a solve cannot be one of compiled code, as far as its plan tells, and what to do about it; None where it can."""
    base = system
    while isinstance(base, VmappedSystem):
        base = base.base
    if not takes(plan.method):
        advice = "('tsit5'; 'rodas5p' for stiff equations)" if base.residual is None else "('radau')"
        return f"method={plan.method.name!r} has no native form: choose a one-step method {advice}"
    if any(e.function is None for e in plan.events):
        return "there are events of another solve"
    if plan.norm is not rms_norm or type(plan.control) is not PIDController:
        return f"{'norm' if plan.norm is not rms_norm else 'controller'}= is one of your own: leave one of the two out"
    if watches_steps(plan.monitor):
        return "each step is reported to a callback: leave callbacks out"
    if y0.is_complex():
        return "the state is complex: integrate real and imaginary parts"
    if y0.device.type in LAUNCHERS:
        reason = _not_on_a_device(plan, base)
        if reason is not None:
            return f"{reason}, which runs on CPUs only"
    elif y0.device.type != "cpu":
        return f"the state is on {y0.device.type}"
    if y0.dtype not in (torch.float32, torch.float64) or not y0.numel():
        return f"the state is of {y0.dtype}: take float32 or float64" if y0.numel() else "the state is empty"
    return None


def _not_on_a_device(plan: Plan, base: System) -> str | None:
    """What of a solve has no form for devices; None where there is nothing."""
    method = plan.method
    if plan.events:
        return "there are events"
    if base.residual is not None or base.mass is not None:
        return "equations are implicit" if base.residual is not None else "there is a mass matrix"
    return None if isinstance(method, DEVICE_METHODS) else f"there is method={method.name!r}"


def in_parts_for(method: Method, spec: StateSpec, others: Iterable[Any]) -> bool:
    """Whether a complex state is carried in real and imaginary parts, which compiled code is for; ``others``: options that it has no form
    for, where they are given."""
    return spec.holds_complex and all(map(takes, method.members)) and all(x is None for x in others)


def own_algebra(options: Iterable[str]) -> str:
    """Why a solve that is given these options for Jacobians and linear systems cannot be one of compiled code."""
    return f"native code takes and factorises Jacobians itself: leave {next(iter(options))}= or compile out"


#: what becomes of a solve whose steps, small enough for the state, are too long for derivatives, and which cannot be made natively again
_FOR_DERIVATIVES = (
    "somewhere it is at rest or moves along a slow manifold, where steps have to be shorter for derivatives than for the state (take out "
    "of the state what is constant, or take an implicit method such as 'kvaerno5'), and "
)


#: what becomes of code that was made wrongly
_DISAGREES = "compiled code gives other values or derivatives than fun (a fault of this library: please report it with fun)"


def _remark(key: Hashable, reason: str) -> None:
    """Say why a solve is not compiled, once for each right-hand side and reason, at the place of the user's call."""
    if (key, reason) in _remarked:
        return
    _remarked.add((key, reason))
    remark(f"compile=True: this solve runs uncompiled, because {reason}", RuntimeWarning)


class Sought(NamedTuple):
    """A solve that may be one of compiled code."""

    plan: Plan
    system: System | VmappedSystem
    batched: bool
    inputs: Sequence[Tensor]
    y0: Tensor
    anchors: Tensor


@dataclass
class NativeSolve:
    """What a solve by compiled code leaves for its way back: the program, with the tensors that it read.

    ``refused``: why it cannot be one, where that is known already; ``background``: whether code is made beside, and solves run without it
    until it is there; ``heard``: which graph ``fun`` is, where that is.
    """

    refused: str | None = None
    background: bool = False
    heard: Heard | None = None
    recognised: Recognised | None = None
    #: what the tensors held: gradients are those of the solve, whatever happens to them later
    values: tuple[Tensor, ...] = ()
    #: spent on making code for this solve
    seconds: float = 0.0
    #: of the next solve, where it is known already
    _found: Recognised | None = None

    def again(self) -> NativeSolve:
        """For another solve of the same right-hand side."""
        return NativeSolve(self.refused, self.background)

    def part(self) -> NativeSolve:
        """For a part of the solve, of the same system."""
        return NativeSolve(self.refused, self.background, self.heard)

    def hear(self, system: System, method: Method, anchors: Tensor, y0: Tensor) -> Heard | None:
        """Ask ``fun`` which graph it is, before what it captures is known; None where there will be no native code."""
        if self.refused is None and all(map(takes, method.members)):
            try:
                self.heard = hear(compile_key(system.fun), system, anchors[0].detach().to(y0.dtype), y0.detach(), system.inputs)
            except Unreadable as error:
                self.refused = str(error)
        return self.heard

    def start(self, sought: Sought) -> NativeStart | None:
        """What finds initial values of implicit equations; None where there will be no native code, which the solve says."""
        if self._unsuited(sought) is not None:
            return None
        try:
            found = self._program(sought)
            return None if found is None else NativeStart(found.program, tuple(found.values(False)))
        except (Unreadable, NoCompiler):
            return None

    def _unsuited(self, sought: Sought) -> str | None:
        return self.refused or suits(sought.plan, sought.system, sought.y0)

    def _program(self, sought: Sought) -> Recognised | None:
        """The program of a solve, with its code, made now; None where that is being made beside. Raises `Unreadable`, `NoCompiler`."""
        plan, system, batched, inputs, y0, anchors = sought
        assert takes(plan.method)
        events = [e.function for e in plan.events if e.function is not None]
        time = anchors[0].detach().to(plan.real)
        with unwatched():
            found = recognise(plan.compile, system, plan.method, time, y0.detach(), inputs, batched, self.heard, events)
        lanes = found.program.lanes(len(y0))
        if self.background and not is_saving_watched() and not found.program.engine_later(lanes):
            return None
        found.program.engine(lanes)
        return found

    def ready(self, sought: Sought) -> bool:
        """Whether this solve will be one of compiled code, which is made; if not, the reason has been said."""
        self._found = self._recognised(sought)
        return self._found is not None

    def _recognised(self, sought: Sought) -> Recognised | None:
        """The program of this solve, whose code is there; None where there is none, which is said."""
        key, reason = sought.plan.compile, self._unsuited(sought)
        if reason is not None:
            return _remark(key, reason)
        before = spent.seconds
        try:
            return self._program(sought)
        except (Unreadable, NoCompiler) as error:
            return _remark(key, str(error))
        finally:
            self.seconds += spent.seconds - before

    def forward(
        self,
        sought: Sought,
        t_eval: Tensor | None,
        derivatives: bool,
        index: Tensor | None = None,
        skipped: Tensor | None = None,
        idle: Tensor | None = None,
    ) -> tuple[Record, Tensor] | None:
        """The solve, with a mask (B,) of trajectories whose explicit steps do not bear derivatives, or None where the eager engine is to
        make it. ``derivatives``: a way back may follow. ``index`` and ``skipped``, (n,): those of variables of implicit equations, see
        `ResidualSolver`; ``idle`` (B,): see `Problem`."""
        plan, key = sought.plan, sought.plan.compile
        known, self._found, self.recognised = self._found, None, None
        found = known or self._recognised(sought)
        if found is None:
            return None
        if derivatives and any(slot is None and x.requires_grad for slot, x in zip(found.slots, found.tensors, strict=True)):
            # the solve does not know of it: the eager engine says so by name
            return None
        before = spent.seconds
        try:
            values = found.values(derivatives)
            # of multistep methods the steps are looked at when they are all taken
            watched = derivatives and not plan.method.implicit and not plan.method.multistep
            solved = run_native(found.program, plan, sought.anchors, t_eval, sought.y0, values, watched, index, skipped, idle)
            self._compared(found, values, sought, solved[0])
        except (Unreadable, NoCompiler) as error:
            return _remark(key, str(error))
        finally:
            self.seconds += spent.seconds - before
        self.recognised, self.values = found, tuple(values)
        return solved

    def _compared(self, found: Recognised, values: Sequence[Tensor], sought: Sought, record: Record) -> None:
        """Compare code with ``fun`` where it is used for the first time. Raises `Unreadable` where they differ, as all solves with that
        code do from then on."""
        program, rows = found.program, len(sought.y0)
        if not program.compared_first(rows):
            return
        steps = len(record.states) - 1
        which = sorted({0, steps // 2, steps - 1})
        points = points_of(record, sought.anchors, plain(sought.y0), is_residual(program.method), which)
        bind, inputs = sought.system.bind, sought.inputs
        events = [e.bind(inputs) for e in sought.plan.events]
        if not all(agrees(program, values, p, bind, events, inputs, found.slots) for p in points):
            raise program.disowned(rows, _DISAGREES)

    def witnessed(self, sought: Sought, record: Record, steps: Sequence[int]) -> list[Callable[[], bool]] | None:
        """What tells later on whether ``fun`` still is what the solve that was made went by; None where compiled functions cannot be called
        by themselves."""
        found, values, system, inputs = self.recognised, self.values, sought.system, sought.inputs
        if found is None or not found.program.lanes(len(sought.y0)):
            return None
        program, y0 = found.program, plain(sought.y0)

        def asked(point: Point) -> bool:
            return same(program, values, point, system.bind(inputs))

        return [partial(asked, p) for p in points_of(record, sought.anchors, y0, is_residual(program.method), steps)]

    def resting(self, sought: Sought, record: Record) -> Tensor | None:
        """See `rests`, of the solve that was made, whose states are had again where it kept none; None where the eager engine is to make
        the solve."""
        assert self.recognised is not None
        program, y0 = self.recognised.program, plain(sought.y0)

        def states() -> Iterable[Tensor]:
            if len(record.states):
                return [record.states]
            return (part.states for part in parts_forward(program, sought.plan, Grid.of(record), sought.anchors, y0, self.values))

        try:
            return rests(record, y0, states)
        except (Unreadable, NoCompiler) as error:
            self.recognised = None
            return _remark(sought.plan.compile, str(error))

    def for_derivatives(self, sought: Sought, t_eval: Tensor | None, record: Record, which: Tensor) -> Record | None:
        """``record``, of the solve that was made, with steps that bear derivatives of the trajectories ``which`` (B,); None where the
        eager engine is to choose them."""
        assert self.recognised is not None
        program, before, reason = self.recognised.program, spent.seconds, "a displacement beside it could not be followed"
        try:
            found = solved_again(program, sought.plan, sought.anchors, t_eval, sought.y0, self.values, record, which)
            if found is not None:
                return found
        except (Unreadable, NoCompiler) as error:
            reason = str(error)
        finally:
            self.seconds += spent.seconds - before
        self.recognised = None
        return _remark(sought.plan.compile, _FOR_DERIVATIVES + reason)

    def backward(
        self,
        plan: Plan,
        grid: Grid,
        anchors: Tensor,
        t_eval: Tensor | None,
        n_inputs: int,
        bars: Sequence[Tensor | None],
        timed: bool,
        slots: int | None = None,
    ) -> tuple[Cotangents, list[Tensor | None]] | None:
        """Cotangents, and those of the inputs of the system in their order, after a solve by compiled code; None where the eager engine is
        to make them. ``slots``: see `sweep_native`."""
        found = self.recognised
        assert found is not None
        try:
            cotangents = sweep_native(found.program, plan, grid, anchors, t_eval, self.values, bars, timed, slots)
        except (Unreadable, NoCompiler) as error:
            return _remark(plan.compile, str(error))
        return cotangents, self._of_system(cotangents.inputs, n_inputs)

    def beside(self, sought: Sought, grid: Grid, y0_dot: Tensor, inputs_dot: Sequence[Tensor | None]) -> Along | None:
        """The solve with tangents, those of the inputs of the system in their order; None where compiled code has none."""
        found = self.recognised
        assert found is not None
        try:
            dots = [None if slot is None else inputs_dot[slot] for slot in found.slots]
            beside = along(found.program, sought.plan, grid, sought.anchors, self.values, y0_dot, dots)
            self._compared_beside(found, beside, sought, inputs_dot)
        except (Unreadable, NoCompiler):
            return None
        return beside

    def _compared_beside(self, found: Recognised, beside: Along, sought: Sought, inputs_dot: Sequence[Tensor | None]) -> None:
        """As `_compared`, of code for tangents."""
        program, (steps, rows) = found.program.tangential(), beside.grid.h.shape
        if not steps or not program.compared_first(rows):
            return
        inputs, count = sought.inputs, len(sought.inputs)
        both = [*inputs, *(torch.zeros_like(x) if dot is None else dot for x, dot in zip(inputs, inputs_dot, strict=True))]
        slots = [*found.slots, *(None if slot is None else slot + count for slot in found.slots)]
        residual = is_residual(program.method)
        points = points_of(beside.grid, sought.anchors, beside.grid.states[0], residual, sorted({0, steps // 2, steps - 1}))
        bind = with_tangents(sought.system.bind, program.joint or 1, residual)
        try:
            fine = all(agrees(program, beside.inputs, p, bind, (), both, slots) for p in points)
        except RuntimeError:
            # without derivatives of derivatives by autograd: whoever takes them says so
            fine = False
        if not fine:
            raise program.disowned(rows, _DISAGREES)

    def second(
        self, beside: Along, anchors: Tensor, t_eval: Tensor | None, n_inputs: int, bars: Sequence[Tensor | None]
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """See `second`, of the inputs of the system in their order; None where compiled code has none."""
        assert self.recognised is not None
        try:
            y0, of_inputs = second(self.recognised.program, beside, anchors, t_eval, bars)
        except (Unreadable, NoCompiler):
            return None
        return y0, self._of_system(of_inputs, n_inputs)

    def _of_system(self, bars: Sequence[Tensor], n_inputs: int) -> list[Tensor | None]:
        """Cotangents of the inputs of the system, from those of the program's."""
        assert self.recognised is not None
        of_inputs: list[Tensor | None] = [None] * n_inputs
        for slot, x, bar in zip(self.recognised.slots, self.recognised.tensors, bars, strict=True):
            if slot is not None and (x.is_floating_point() or x.is_complex()):
                of_inputs[slot] = put_together(bar, x)
        return of_inputs
