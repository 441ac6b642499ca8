"""The way through the front door for solves like one before, by compiled code: with other numbers, nothing else is to be checked or made.

What is known of a call is its key: the fingerprint of ``fun`` and of what it is called with, shapes and dtypes, and the options. A call
whose key is new, or that has anything out of the ordinary about it, goes the general way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from ..errors import CapturedTensorLost
from ..integrate import PIDController
from ..methods import METHODS, Traits
from ..native.build import NoCompiler
from ..native.fingerprint import Fingerprint, fingerprint
from ..native.memory import in_parts, plain
from ..native.reading import Unreadable
from ..native.solve import frame_of
from ..sensitivity import DiscreteAdjoint, Problem
from ..sensitivity.prepared import Prepared, PreparedNode, Run, run_of
from ..system.system import System
from ..torch_internals import dual_level, len_torch_dispatch_stack, len_torch_function_stack, peek_interpreter_stack
from .arguments import listed_args, snapped
from .solution import BackwardStats, Solution, Stats

__all__ = ["Asked", "asked", "asked_before", "forget"]

_MOST, _FEW = 512, 32
_known: dict[Hashable, Prepared | None] = {}
_NUMBERS = (int, float, type(None))
_REALS = (torch.float32, torch.float64)
_STATES = (*_REALS, torch.complex64, torch.complex128)
#: arguments of `solve_ivp`: those that go the general way if they are there, those that are numbers, and those of `asked`
_BESIDE = ("events", "quadrature", "step_ts", "mass_matrix", "norm", "jac", "jac_sparsity", "linear_solver")
_AS_NUMBERS = ("rtol", "atol", "first_step", "max_step", "min_step", "max_steps")
_GIVEN = ("fun", "t_span", "y0", "args", "method", "controller", "t_eval", "gradient", "batched")
_CHANGED = (
    "fun is not the function any more that the solve went by (what it captures was replaced or changed), and derivatives of its "
    "derivatives evaluate it again: keep it as it is until they are taken"
)


@dataclass(eq=False)
class Asked:
    """A call that may have been made before, with its arguments; ``options`` are all those by name."""

    key: Hashable
    fun: Callable[..., Any]
    args: Sequence[Any]
    options: dict[str, Any]
    found: Fingerprint
    y0: Tensor
    span: tuple[float, float]
    samples: Tensor | None
    derivatives: bool

    def solution(self, door: Callable[..., Solution]) -> Solution | None:
        """What compiled code gives; None where the general way is to be gone, through ``door``."""
        prepared = _known.get(self.key)
        if prepared is None:
            return None
        rows = prepared.rows
        t_eval: Tensor | None = self.options["t_eval"]
        ends, anchors = prepared.ends(self.span)
        times = None if self.samples is None else plain(self.samples.unsqueeze(1).expand(-1, rows))
        try:
            made = run_of(prepared, anchors, times, self.y0, self.found.tensors)
        except Unreadable:
            return None
        if made is None:
            return None
        found, y, values = made
        backward, y0 = BackwardStats(), self.y0
        t = t_eval if t_eval is not None else ends.clone() if y0.dtype is ends.dtype else ends.to(y0.dtype.to_real(), copy=True)
        if self.derivatives:
            tensors = self.found.tensors
            wanted = [(i, tensors[k]) for i, k in enumerate(prepared.places) if tensors[k].requires_grad]
            again = partial(self._solved_again, door, prepared, values)
            run = Run(prepared, found, anchors, times, values, tuple(i for i, _ in wanted), again, backward.add, y)
            y = PreparedNode.apply(run, y0, *(x for _, x in wanted))
        if self.options["batched"]:
            n_steps, n_accepted, n_fun, status, _, *work = found.counts.unbind()
        else:
            n_steps, n_accepted, n_fun, status, _, *work = found.counts[:, 0].tolist()
        return Solution(t, y, status, Stats(n_steps, n_accepted, n_steps - n_accepted, n_fun, *work, backward=backward))

    def _solved_again(self, door: Callable[..., Solution], prepared: Prepared, values: Sequence[Tensor]) -> Tensor:
        """``values``: what the solve read."""
        now = fingerprint(self.fun, self.args)
        if now is None or now.key != self.found.key or any(x is not y for x, y in zip(now.tensors, self.found.tensors, strict=True)):
            raise CapturedTensorLost(_CHANGED)
        held = prepared.program.values([now.tensors[k] for k in prepared.places], False)
        if not all(torch.equal(x, y) or torch.allclose(x, y, 0.0, 0.0, equal_nan=True) for x, y in zip(held, values, strict=True)):
            raise CapturedTensorLost(_CHANGED)
        # times that are tensors go the general way
        span = tuple(torch.tensor(t, dtype=torch.float64) for t in self.span)
        return door(self.fun, span, self.y0, self.args, **self.options, compile=True).y

    def remember(self, problem: Problem, arguments: Sequence[Tensor]) -> None:
        """Keep what the general way has made of a call, ``arguments`` being the tensors among its ``args``."""
        native = problem.native.recognised
        if len(_known) >= _MOST:
            _known.clear()
        _known[self.key] = None
        if native is None or not native.program.lanes(1):
            return
        place = {id(x): k for k, x in enumerate(self.found.tensors)}
        assert isinstance(problem.system, System)
        theirs = [*arguments, *problem.system.captured]
        read = [x if k is None else theirs[k] for x, k in zip(native.tensors, native.slots, strict=True)]
        if not all(id(x) in place for x in read):
            return
        rows = self.y0.shape[0] if self.options["batched"] else 1
        like = in_parts(self.y0.detach()).reshape(rows, -1)
        width = like.shape[1]
        plan = problem.plan
        explicit = not plan.method.implicit
        if explicit and plan.method.multistep and self.derivatives:
            # the Jacobian is looked at, to see whether steps are short enough for derivatives
            return
        try:
            frame = frame_of(native.program, plan, like, self.derivatives and explicit)
        except NoCompiler:
            return
        places = tuple(place[id(x)] for x in read)
        _known[self.key] = Prepared(native.program, plan, frame, places, rows, width, self.derivatives)


def asked_before(arguments: dict[str, Any]) -> Asked | None:
    """A call of `solve_ivp` with these arguments, with ``compile=``, or None where it has more to it than numbers."""
    if any(arguments[name] is not None for name in _BESIDE):
        return None
    if arguments["dense_output"] or arguments["progress"]:
        return None
    numbers = {name: arguments[name] for name in _AS_NUMBERS}
    given = {name: arguments[name] for name in _GIVEN}
    return asked(**{**given, "args": listed_args(given["args"])}, numbers=numbers)


def asked(
    fun: Callable[..., Any],
    t_span: Any,
    y0: Any,
    args: Sequence[Any],
    method: Any,
    controller: PIDController | None,
    t_eval: Any,
    gradient: Any,
    batched: bool,
    numbers: dict[str, Any],
) -> Asked | None:
    """A call by its arguments, or None where it has more to it than numbers. ``numbers``: options that may be tensors."""
    if type(y0) not in (Tensor, torch.nn.Parameter) or y0.dtype not in _STATES or y0.device.type != "cpu":
        return None
    if not y0.numel() or (batched and not y0.dim()) or any(type(x) not in _NUMBERS for x in numbers.values()):
        return None
    if (gradient is not None and gradient != DiscreteAdjoint()) or type(batched) is not bool:
        return None
    name = method if type(method) is str else method.name if isinstance(method, Traits) else ""
    if name not in METHODS or (name is not method and METHODS[name] is not method):
        return None
    around = len_torch_function_stack() or len_torch_dispatch_stack() or dual_level() >= 0
    if around or peek_interpreter_stack() is not None or torch.is_inference_mode_enabled() or y0.is_inference():
        return None
    span = _span(t_span)
    samples = None if span is None or t_eval is None else _samples(t_eval, span)
    if span is None or (samples is None and t_eval is not None):
        return None
    found = fingerprint(fun, args)
    if found is None:
        return None
    derivatives = torch.is_grad_enabled() and (y0.requires_grad or any(x.requires_grad for x in found.tensors))
    key = (found.key, y0.shape, y0.dtype, batched, derivatives, t_eval is None, name, controller, *numbers.values())
    try:
        hash(key)
    except TypeError:
        return None
    options = {"t_eval": t_eval, "gradient": gradient, "batched": batched, "method": method, "controller": controller, **numbers}
    return Asked(key, fun, args, options, found, y0, span, samples, derivatives)


def _span(given: Any) -> tuple[float, float] | None:
    """Its two numbers, the first one being smaller."""
    if type(given) not in (tuple, list) or len(given) != 2:
        return None
    a, b = given
    if type(a) not in (float, int) or type(b) not in (float, int):
        return None
    a, b = float(a), float(b)
    return (a, b) if isfinite(a) and isfinite(b) and a < b else None


def _samples(times: Any, span: tuple[float, float]) -> Tensor | None:
    """Sample times in double precision, those that are an end of the span but for rounding being that; None where they are anything but
    increasing numbers within it."""
    if type(times) is not Tensor or times.dtype not in _REALS or times.dim() != 1 or times.requires_grad or times.device.type != "cpu":
        return None
    if not times.numel() or times.is_inference():
        return None
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
