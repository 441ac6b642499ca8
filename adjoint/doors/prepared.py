"""The way through the front door for solves like one before, by compiled code: with other numbers, nothing else is to be checked or made.

What is known of a call is its key: the fingerprint of ``fun`` and of what it is called with, shapes and dtypes, and the options. A call
whose key is new, or that has anything out of the ordinary about it, goes the general way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import isfinite
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ..errors import CapturedTensorLost, InvalidInput
from ..methods import DAE_METHODS, METHODS, Method
from ..native.at_once import AtOnce, Beginning
from ..native.build import NoCompiler
from ..native.fingerprint import Fingerprint, fingerprint
from ..native.memory import as_given, in_parts
from ..native.reading import Unreadable
from ..native.solve import frame_of
from ..sensitivity import DiscreteAdjoint, Problem
from ..sensitivity.consistent import Initial, rtol_of_search
from ..sensitivity.prepared import Done, Prepared, Run, at_once, run_of
from ..system.origins import attribute
from ..system.ownership import owned
from ..system.system import StateSpec, System
from ..torch_internals import (
    dual_level,
    is_functorch_wrapped_tensor,
    is_saving_watched,
    len_torch_dispatch_stack,
    len_torch_function_stack,
    peek_interpreter_stack,
)
from .arguments import listed_args, snapped
from .dae_initial import off_given
from .event_data import Event
from .parts import event_list, event_name, terminal_count
from .solution import BackwardStats, EventLog, EventRecord, Solution, Stats

__all__ = ["Asked", "asked_before", "forget"]

_MOST, _FEW = 512, 32
#: of implicit equations, beyond which their structure costs more to look at than Python does
_MOST_UNKNOWNS = 64
_known: dict[Hashable, Prepared | None] = {}
_REALS = (torch.float32, torch.float64)
_STATES = frozenset((*_REALS, torch.complex64, torch.complex128))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NUMBERS, _NOTHING = frozenset((int, float, type(None))), frozenset((type(None),))
_DISCRETE = DiscreteAdjoint()
#: arguments of front doors: those that go the general way if they are there, those that are numbers, and the others
_BESIDE = ("step_ts", "norm", "jac_sparsity", "linear_solver")
_numbers = itemgetter("rtol", "atol", "first_step", "max_step", "min_step", "max_steps")
_given = itemgetter("quadrature", "t_span", "y0", "args", "method", "controller", "t_eval", "gradient", "batched")
_CHANGED = (
    "fun is not the function any more that the solve went by (what it captures was replaced or changed), and derivatives of its "
    "derivatives evaluate it again: keep it as it is until they are taken"
)


@dataclass(frozen=True)
class _Door:
    """A front door: its methods, and those of its arguments that go the general way if they are there. ``implicit``: for implicit
    equations."""

    methods: Mapping[str, Method]
    beside: Callable[[dict[str, Any]], tuple[Any, ...]]
    implicit: bool


_IVP = _Door(METHODS, itemgetter(*_BESIDE, "mass_matrix", "jac"), False)
_DAE = _Door(DAE_METHODS, itemgetter(*_BESIDE, "differential", "y0_bounds"), True)


@dataclass(eq=False, slots=True)
class Asked:
    """A call that may have been made before, with its ``arguments``, and what is known of such calls. ``yp0``: of implicit equations, the
    slopes that were given; ``events``: their functions, and ``rules``: of each at which occurrence it ends the solve, and its direction."""

    key: Hashable
    prepared: Prepared | None
    arguments: dict[str, Any]
    args: tuple[Any, ...]
    found: Fingerprint
    y0: Tensor
    span: tuple[float, float]
    derivatives: bool
    yp0: Tensor | None = None
    events: tuple[Any, ...] = ()
    rules: tuple[Any, ...] = ()

    def solution(self, door: Callable[..., Solution]) -> Solution | None:
        """What compiled code gives; None where the general way is to be gone, through ``door``."""
        prepared = self.prepared
        if prepared is None:
            return None
        t_eval: Tensor | None = self.arguments["t_eval"]
        ends, anchors = prepared.ends(self.span)
        times = None if t_eval is None else prepared.samples(t_eval, self.span, _samples)
        if times is None and t_eval is not None:
            return None
        try:
            done = run_of(prepared, anchors, times, self.y0, self.found.tensors, self.yp0)
        except Unreadable:
            return None
        if done is None or (self.yp0 is not None and self._off(prepared, done)):
            return None
        backward, y, beside, y0 = BackwardStats(), done.y, done.beside, self.y0
        t = t_eval if t_eval is not None else ends.clone() if y0.dtype is ends.dtype else ends.to(y0.dtype.to_real(), copy=True)
        if self.derivatives:
            tensors = self.found.tensors
            # a guess, for which nobody looks whether it was written to
            self.yp0 = None if self.yp0 is None else self.yp0.detach().clone()
            wanted = tuple([i for i, k in enumerate(prepared.places) if tensors[k].requires_grad])
            again = partial(self._solved_again, door, prepared, times)
            run = Run(prepared, anchors, times, wanted, again, backward.add, done.ending)
            # with an integral results are parts of that of the node, which is alone on the states where there is nothing beside
            alone = prepared.integrand is None and not beside
            found = at_once(run if alone else owned(run), done, y0, *[tensors[prepared.places[i]] for i in wanted])
            y, *beside = (found,) if not beside else found
        y, integral = prepared.shown(y, y0, times is not None)
        quadrature = None if integral is None or prepared.integrand is None else prepared.integrand.unflatten(integral)
        n_steps, n_accepted, n_fun, status, _, *work = done.counts
        stats = Stats(n_steps, n_accepted, n_steps - n_accepted, n_fun, *work, backward=backward)
        yp, *of_events = beside if prepared.calls.beginning is not None else (None, *beside)
        sol = Solution(t, y, status, stats, quadrature=quadrature, yp=yp)
        return self._with_events(sol, of_events, done) if self.events else sol

    def _with_events(self, sol: Solution, beside: Sequence[Tensor], done: Done) -> Solution:
        """Times and states of events, function by function."""
        real, shape = self.y0.dtype, self.y0.shape
        times, states = beside or (torch.empty(0, dtype=real, device="cpu"), torch.empty((0, *shape), dtype=real, device="cpu"))
        times = times.to(real)
        total, records, first = len(times), [], 0
        for count in done.kept.events:
            records.append(EventRecord(*(x if count == total else x[first : first + count] for x in (times, states))))
            first += count
        log = EventLog.of(records, map(event_name, self.events))
        if done.ending is None or self.arguments["t_eval"] is not None:
            return replace(sol, events=log)
        return replace(sol, events=log, t=torch.cat([sol.t[:1], times[done.ending : done.ending + 1]]))

    def _off(self, prepared: Prepared, done: Done) -> bool:
        """Whether consistent values are not those that were given."""
        assert self.yp0 is not None
        if self.arguments["consistent"] == "solve":
            return False
        calls = prepared.calls
        y, yp = calls.begun(done.kept)
        given = Initial(as_given(self.y0, y.dtype).reshape(y.shape), as_given(self.yp0, y.dtype).reshape(y.shape))
        tolerances = {"rtol": calls.plan.rtol, "atol": calls.plan.atol}
        return bool(off_given("auto", calls.differential, given, Initial(y, yp), tolerances).any())

    def _solved_again(
        self, door: Callable[..., Solution], prepared: Prepared, times: Tensor | None, values: Sequence[Tensor], compiled: bool
    ) -> Sequence[Tensor | None]:
        """``times`` (T, B) and ``values``: what the solve read."""
        now = fingerprint(_functions(self.arguments, self.events), self.args)
        if now is None or now.key != self.found.key or any(x is not y for x, y in zip(now.tensors, self.found.tensors, strict=True)):
            raise CapturedTensorLost(_CHANGED)
        if _watched(self.events) != (self.events, self.rules):
            raise CapturedTensorLost(_CHANGED)
        held = prepared.calls.program.values([now.tensors[k] for k in prepared.places], False)
        if not all(torch.equal(x, y) or torch.allclose(x, y, 0.0, 0.0, equal_nan=True) for x, y in zip(held, values, strict=True)):
            raise CapturedTensorLost(_CHANGED)
        # times that are tensors go the general way
        span = tuple(torch.tensor(t, dtype=torch.float64) for t in self.span)
        t_eval = None if times is None else times[:, 0]
        more = {"t_span": span, "t_eval": t_eval, "args": self.args, "events": self.events or None}
        more |= ({} if self.yp0 is None else {"yp0": self.yp0}) | ({} if compiled else {"compile": False})
        sol = door(**{**self.arguments, **more})
        integral = None if prepared.integrand is None else prepared.integrand.taken(sol.quadrature)
        slopes = () if sol.yp is None else (sol.yp,)
        if not any(len(e.t) for e in sol.events):
            return sol.y, integral, *slopes
        return sol.y, integral, *slopes, torch.cat([e.t for e in sol.events]).double(), torch.cat([e.y for e in sol.events])

    def remember(self, problem: Problem, arguments: Sequence[Tensor], integrand: StateSpec | None) -> None:
        """Keep what the general way has made of a call, ``arguments`` being the tensors among its ``args``, ``integrand`` the layout of an
        integral along the solution."""
        native = problem.native.recognised
        if len(_known) >= _MOST:
            _known.clear()
        _known[self.key] = None
        if native is None or not native.program.lanes(1):
            return
        if integrand is not None and (self.y0.is_complex() or any(x is not self.y0.dtype for x in integrand.dtypes)):
            # of the state alone all is in one dtype
            return
        place = {id(x): k for k, x in enumerate(self.found.tensors)}
        assert isinstance(problem.system, System)
        theirs = [*arguments, *problem.system.captured]
        read = [x if k is None else theirs[k] for x, k in zip(native.tensors, native.slots, strict=True)]
        if not all(id(x) in place for x in read):
            return
        rows = self.y0.shape[0] if self.arguments["batched"] else 1
        width = in_parts(self.y0).numel() // rows + (0 if integrand is None else sum(integrand.sizes))
        like = torch.empty((rows, width), dtype=native.program.real, device="cpu")
        beginning = None
        if problem.system.residual is not None:
            beginning = None if integrand is not None or width > _MOST_UNKNOWNS else _beginning(problem)
            if beginning is None:
                return
        plan = problem.plan
        explicit = not plan.method.implicit
        if explicit and plan.method.multistep and self.derivatives:
            # the Jacobian is looked at, to see whether steps are short enough for derivatives
            return
        try:
            frame = frame_of(native.program, plan, like, self.derivatives and explicit)
        except NoCompiler:
            return
        if plan.events and self.derivatives and "events_vjp" not in native.program.functions.texts:
            return
        shapes = tuple(x.shape for x in native.program.values(read, False))
        calls = AtOnce(native.program, plan, frame, rows, width, shapes, self.derivatives, integrand is not None, beginning)
        _known[self.key] = Prepared(calls, tuple(place[id(x)] for x in read), self.derivatives, self.arguments["batched"], integrand)


def _beginning(problem: Problem) -> Beginning | None:
    """How implicit equations begin, where variables are differential or algebraic one by one."""
    algebra = problem.algebra
    structure = None if algebra is None else algebra.structure
    if structure is None or not structure.plain or algebra is None or algebra.skipped is not None:
        return None
    return Beginning(structure.differential.clone(), rtol_of_search(problem.plan.real))


def asked_before(arguments: dict[str, Any]) -> Asked | None:
    """A call of `solve_ivp` or `solve_dae` with these arguments, with ``compile=``, or None where it has more to it than numbers."""
    door = _DAE if "yp0" in arguments else _IVP
    if not _NOTHING.issuperset(map(type, door.beside(arguments))) or arguments["dense_output"] or arguments["progress"]:
        return None
    quadrature, t_span, y0, args, method, controller, t_eval, gradient, batched = _given(arguments)
    numbers = _numbers(arguments)
    if type(y0) not in _TENSORS or y0.dtype not in _STATES or not _NUMBERS.issuperset(map(type, numbers)):
        return None
    if not y0.numel() or type(batched) is not bool or (batched and not y0.dim()):
        return None
    if gradient is not None and gradient != _DISCRETE:
        return None
    name = method if type(method) is str else method.name if isinstance(method, Method) else ""
    if name not in door.methods or (name is not method and door.methods[name] is not method):
        return None
    yp0, begun = (arguments["yp0"], _begun(arguments, y0)) if door.implicit else (None, ())
    if begun is None:
        return None
    # what this way saves for backward is not what the general one does, which a checkpoint that was there before goes once more
    around = len_torch_function_stack() or len_torch_dispatch_stack() or dual_level() >= 0 or is_saving_watched()
    if around or peek_interpreter_stack() is not None or torch.is_inference_mode_enabled() or not _is_plain(y0):
        return None
    span = _span(t_span)
    if span is None or not (t_eval is None or _are_times(t_eval)):
        return None
    watched = _watched(arguments["events"])
    if watched is None or (watched[0] and (batched or quadrature is not None or y0.is_complex())):
        return None
    events, rules = watched
    args = listed_args(args)
    found = fingerprint(_functions(arguments, events), args)
    if found is None or any(map(is_functorch_wrapped_tensor, found.tensors)):
        return None
    derivatives = torch.is_grad_enabled() and (y0.requires_grad or any([x.requires_grad for x in found.tensors]))
    key = (found.key, y0.shape, y0.dtype, batched, derivatives, t_eval is None, name, controller, numbers, begun, rules)
    try:
        prepared = _known.get(key)
    except TypeError:
        return None
    return Asked(key, prepared, arguments, args, found, y0, span, derivatives, yp0, events, rules)


def _functions(arguments: dict[str, Any], events: Sequence[Any]) -> Any:
    """The functions of the user's."""
    fun, quadrature = arguments["fun"], arguments["quadrature"]
    return fun if quadrature is None and not events else (fun, quadrature, *[e.function if type(e) is Event else e for e in events])


def _watched(events: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]] | None:
    """Event functions with their rules, nothing of each where there are none; None where there is something wrong with one."""
    if events is None:
        return (), ()
    try:
        listed = event_list(events)
        return tuple(listed), tuple([(terminal_count(e), float(attribute(e, "direction", 0.0))) for e in listed])
    except (InvalidInput, TypeError, ValueError):
        return None


def _begun(arguments: dict[str, Any], y0: Tensor) -> tuple[Any, ...] | None:
    """How implicit equations are told to begin; None where not by a search for what follows from the differential part of ``y0``."""
    yp0, consistent, suppress = (arguments[name] for name in ("yp0", "consistent", "suppress_algebraic"))
    if type(consistent) is not str or consistent not in ("auto", "solve") or type(suppress) is not bool:
        return None
    if yp0 is not None and (type(yp0) not in _TENSORS or yp0.shape != y0.shape or yp0.dtype is not y0.dtype or not _is_plain(yp0)):
        return None
    return "implicit", consistent, suppress, yp0 is None


def _span(given: Any) -> tuple[float, float] | None:
    """Its two numbers, the first one being smaller."""
    if type(given) not in (tuple, list) or len(given) != 2:
        return None
    a, b = given
    if type(a) not in (float, int) or type(b) not in (float, int):
        return None
    a, b = float(a), float(b)
    return (a, b) if isfinite(a) and isfinite(b) and a < b else None


def _is_plain(x: Tensor) -> bool:
    """Whether the numbers of a tensor are found by its address: it lies in the memory of CPUs, is no tensor of inference mode, and nothing
    that a transform has wrapped, which may be over."""
    return x.is_cpu and not x.is_inference() and not is_functorch_wrapped_tensor(x)


def _are_times(x: Any) -> bool:
    """Whether sample times are a plain tensor of numbers."""
    return type(x) is Tensor and x.dtype in _REALS and x.dim() == 1 and not x.requires_grad and x.numel() > 0 and _is_plain(x)


def _samples(times: Tensor, span: tuple[float, float]) -> Tensor | None:
    """Sample times in double precision, those that are an end of the span but for rounding being that; None where they are anything but
    increasing numbers within it."""
    first, last = span
    slack = min(2 * torch.finfo(times.dtype).eps * max(abs(first), abs(last)), 1e-3 * (last - first))
    found = times.double()
    if len(found) <= _FEW:
        # few numbers are looked at faster by Python
        given = found.tolist()
        low, high, increasing = given[0], given[-1], all(x <= y for x, y in pairwise(given))
    else:
        low, high, increasing = float(found[0]), float(found[-1]), bool((found[1:] >= found[:-1]).all())
    if not increasing:
        return None
    if not ((low == first or low > first + slack) and (high == last or high < last - slack)):
        found = snapped(found, *torch.tensor(span, dtype=torch.float64), times)
        low, high = float(found[0]), float(found[-1])
    return found if first <= low and high <= last else None


def forget() -> None:
    """Go the general way with every call once more."""
    _known.clear()
