"""What a front door was given, and the steps from there to a solution, which all doors take alike.

A door checks its arguments (``arguments.py`` and its like), makes a `Given` of them, asks it for the flat `System` of the user's function,
makes a `Plan` of what it has to keep, and a `Problem`; a strategy solves that, and `finished` puts the solution together.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..errors import UnsupportedCombination, positive
from ..integrate import Monitor, Plan, Record, Status
from ..methods import Method
from ..native.entry import NativeSolve, in_parts_for
from ..native.graphs import Heard
from ..system.capture import Captured, find_captured
from ..system.origins import parameter_homes
from ..system.ownership import aliased, check_unchanged, copied, remembering
from ..system.realification import refuse_parts, suited_to_jacobians
from ..system.system import StateSpec, System
from ..system.transforms import transforming, unwrapped, vmap_active
from ..torch_internals import leaves_of, mapped, unwatched
from .arguments import beside_integral, flat_norm, flat_tolerance, usual_tolerances
from .event_jumps import jumps_refused
from .event_times import event_records
from .parts import NO_EVENTS, Found, Parts, flat_event
from .progress import progress_monitor

__all__ = ["Given", "finished", "reporting"]

#: the arguments of front doors that say how steps are chosen
_STEERING = ("rtol", "atol", "controller", "norm", "first_step", "max_step", "min_step", "max_steps", "progress")


@dataclass(frozen=True)
class Given:
    """The user's functions, and what a solve calls them with.

    Parameters
    ----------
    fun : what is solved, with a running integral if there is one: ``fun(t, *states, *args)``, without a time ``fun(*states, *args)``
    pieces : the functions of the user that it is made of
    spec : the layout of a state
    states : what stands between time and arguments: the state, of implicit equations the slope too
    ends : start and end, ``(B,)`` or 0-d float64 each; None without a time
    events, quadrature : further functions of the user, of the state that has no running integral
    """

    fun: Callable[..., Any]
    pieces: tuple[Callable[..., Any], ...]
    spec: StateSpec
    states: tuple[Any, ...]
    args: tuple[Any, ...]
    ends: tuple[Tensor, Tensor] | None = None
    events: Sequence[Callable[..., Tensor]] = ()
    quadrature: Callable[..., Any] | None = None

    def laid_out(self, method: Method, compiled: bool, options: Iterable[Any], in_step: bool = False) -> Given:
        """With complex states in real and imaginary parts for native code, and as suits Jacobians where ``method`` needs them.

        ``options``: those for which there is no native code, where they are given; ``in_step``: a mass matrix is part of the steps.
        """
        if compiled and in_parts_for(method, self.spec, options):
            return replace(self, spec=self.spec.in_parts())
        if not (method.implicit and self.spec.holds_complex):
            return self
        (start,), _ = self.times()
        spec = suited_to_jacobians(self.spec, lambda *states: self.fun(start, *states, *self.args), *self.states)
        if in_step:
            refuse_parts(f"mass_matrix= with {method.name!r}", spec)
        return replace(self, spec=spec)

    def times(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Start and end as functions of the user are given them, of tensors that are nobody else's; nothing of each without a time."""
        if self.ends is None:
            return (), ()
        real, batched = self.spec.real_dtype, self.spec.batch is not None
        start, end = (x.detach().to(real, copy=True) for x in self.ends)
        return ((start,), (end,)) if batched else ((start.reshape(()),), (end.reshape(()),))

    def plan(
        self, system: System, method: Method, seen: StateSpec, integral: bool, arguments: dict[str, Any], key: Hashable, **kept: bool
    ) -> Plan:
        """How the solve is made. ``seen``: the state that events see, which has no running ``integral``; ``key``: of code, see
        `compile_key`; ``kept``: what a `Plan` keeps."""
        events = tuple(flat_event(e, system, seen, integral) for e in self.events)
        return Plan(method=method, events=events, compile=key, **kept, **_steering(self.spec, seen if integral else None, arguments))

    def state(self, k: int = 0) -> Tensor:
        """The ``k``-th of the states, flat: ``(B, n)``."""
        return self.spec.taken(self.states[k])

    def probed(self, below: bool = False) -> tuple[Captured, Any]:
        """What the user's functions captured, and what ``fun`` returned at the start. ``below``: beneath transforms that take derivatives,
        where operators of tangents take a hundred times as long."""
        _refuse_sparse(leaves_of(self.args), "args holds", "let fun capture it instead (a closure, or a buffer of a module)")
        states, args, found = tuple(copied(x) for x in self.states), aliased(self.args), []
        start, end = self.times()
        calls = [remembering(self.fun, found), *map(self._of_all, self.events)]
        beyond = tuple(_elsewhere(x) for x in self.states)
        if below and transforming() and not vmap_active():
            plain = lambda x: unwrapped(x) if isinstance(x, Tensor) else x  # noqa: E731
            start, end, states, args, beyond = (mapped(plain, x) for x in (start, end, states, args, beyond))
        used = find_captured(calls, (*start, *states, *args), [*self.pieces, *self.events], (*end, *beyond, *args))
        check_unchanged(states, "fun")
        _refuse_sparse(used.tensors, "fun depends on", "make it in fun from its values, which may, or make it dense")
        return used, found[0]

    def _of_all(self, event: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """An event function with the arguments of ``fun``."""
        many, integrated = len(self.states), self.quadrature is not None
        return lambda t, y, *rest: event(t, y[0] if integrated else y, *rest[many - 1 :])

    def looked_into(self, native: NativeSolve, method: Method, compiled: bool) -> tuple[Captured, Any]:
        """As `probed`, with no call of ``fun`` where it is compiled and was heard of before."""
        with unwatched():
            heard = self._heard(native, method) if compiled else None
            if heard is not None and heard.captured is not None:
                return heard.captured, heard.result
            used, result = self.probed(below=True)
        if heard is not None:
            heard.remember(used)
        return used, result

    def _heard(self, native: NativeSolve, method: Method) -> Heard | None:
        """Which graph ``fun`` is: what it captured is known then after its first solve."""
        flat = self.state()
        if self.ends is None or self.events or self.quadrature is not None or transforming() or flat.is_complex():
            return None
        # the layout of a residual is not known yet, and does not matter here
        residual = self.spec if len(self.states) > 1 else None
        return native.hear(self.system(residual=residual), method, self.ends[0].unsqueeze(0), flat)

    def system(self, used: Captured | None = None, **more: Any) -> System:
        """The flat system, with the tensors that the user's functions captured; ``more``: further fields of it."""
        leaves, tree = tree_flatten(self.args)
        fun = more.pop("fun", self.fun)
        if used is None:
            return System(fun, self.spec, tree, tuple(leaves), **more)
        integrands = [] if self.quadrature is None else [self.quadrature]
        homes = tuple(parameter_homes([*self.pieces, *self.events, *integrands], used.tensors))
        return System(fun, self.spec, tree, tuple(leaves), tuple(used.tensors), homes=homes, **used.flags, **more)


def _steering(spec: StateSpec, seen: StateSpec | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `Plan` that say how steps are chosen, from those arguments of a front door. ``seen``: the state that the user gave,
    where ``spec`` is that and an integral."""
    rtol, atol, controller, norm, first_step, max_step, min_step, max_steps, progress = (arguments[name] for name in _STEERING)
    usual = usual_tolerances(spec)

    def tolerance(value: Any, name: str) -> float | Tensor:
        default = usual[name]
        return flat_tolerance(value if seen is None else beside_integral(value, spec, seen, default), name, spec, default)

    return {
        "real": spec.real_dtype,
        "rtol": tolerance(rtol, "rtol"),
        "atol": tolerance(atol, "atol"),
        "controller": controller,
        "norm": flat_norm(norm, spec),
        "first_step": None if first_step is None else positive(first_step, "first_step", finite=True),
        "max_step": positive(max_step, "max_step"),
        "min_step": positive(min_step, "min_step", zero=True, finite=True),
        "max_steps": int(max_steps),
        "monitor": progress_monitor(progress) if progress else Monitor(),
    }


def reporting(plan: Plan, fail: Callable[..., None] | None, system: System, inputs: Sequence[Tensor]) -> Callable[[Record], None]:
    """What is done with the record of a solve; ``fail(record, plan, system, inputs)`` raises an error where some
    trajectory failed; None: nobody does."""

    def report(record: Record) -> None:
        if type(plan.monitor) is not Monitor and not bool((record.status == int(Status.SWITCHED)).any()):
            plan.monitor.close()
        if fail is not None and bool((record.status < 0).any()):
            fail(record, plan, system, inputs)

    return report


def finished(parts: Parts) -> tuple[Parts, Found]:
    """The parts of a solution, with the records of its events."""
    if not parts.events:
        return parts, NO_EVENTS
    parts = jumps_refused(parts)
    return parts, event_records(parts, parts.out)


def _refuse_sparse(tensors: Iterable[Any], what: str, way: str) -> None:
    """Raise for what is to be an input of derivatives."""
    for x in tensors:
        if isinstance(x, Tensor) and x.layout is not torch.strided:
            raise UnsupportedCombination(
                f"{what} a sparse tensor ({x.layout}, {tuple(x.shape)}), which can be no input of derivatives, though fun may use sparse "
                f"tensors that do not require grad: {way}"
            )


def _elsewhere(state: Any) -> Any:
    """A state that is another one than the given one, in every entry, and not far from it."""
    return mapped(lambda x: 1.0009765625 * x + 0.0009765625 if isinstance(x, Tensor) else x, state)
