"""Checks and conversions of the arguments that the front doors share. Bad input ends here, with an error that quotes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..errors import InvalidInput, UnsupportedCombination, positive
from ..integrate import PIDController, rms_norm
from ..methods import IMEX_METHODS, METHODS, SWITCHING_METHODS, Method
from ..methods.adams import ADAMS_NAMES
from ..system.capture import moves
from ..system.system import StateSpec
from ..system.transforms import anywhere, unwrapped
from ..torch_internals import DisableFuncTorch, is_functorch_wrapped_tensor, leaves_of

__all__ = [
    "RoundSpan",
    "Times",
    "as_times",
    "beside_integral",
    "check_callable",
    "check_compile",
    "check_controller",
    "check_finite",
    "check_method",
    "check_not_half",
    "check_precision",
    "check_times",
    "flat_norm",
    "flat_tolerance",
    "from_within",
    "listed_args",
    "method_for",
    "snapped",
    "spread_leaves",
    "usual_tolerances",
]


def check_method(method: str | Method) -> Method:
    """A method by its name, or a method object as it is.

    Raises
    ------
    UnsupportedCombination : an Adams method of fixed steps, which only ``odeint`` has
    InvalidInput : any other unknown method
    """
    if isinstance(method, str):
        if method in ADAMS_NAMES:
            raise UnsupportedCombination(
                f"method={method!r} takes given steps of one size or grid: use "
                f"adjoint.odeint(fun, y0, t, method={method!r}, options={{'step_size': ...}}), or here method='abm', "
                "Adams-Bashforth-Moulton formulas with error control"
            )
        known = METHODS | IMEX_METHODS | SWITCHING_METHODS
        if method not in known:
            raise InvalidInput(f"there is no method {method!r}; choose one of {', '.join(sorted(known))}")
        return known[method]
    if not isinstance(method, Method):
        raise InvalidInput(
            f"method must be a name or a method object (of a class that derives from adjoint.methods.Method), got a {type(method).__name__}"
        )
    return method


def check_compile(value: Any) -> bool:
    """Whether native code is asked for. Raises `InvalidInput` for other values than True, False and "background"."""
    if value is not True and value is not False and value != "background":
        raise InvalidInput(f'compile must be True, False or "background", got {value!r}')
    return bool(value)


def check_controller(method: Method, controller: PIDController | None) -> None:
    """Raise `UnsupportedCombination` for a controller that the method would not ask, `InvalidInput` for what is none."""
    if controller is not None and not isinstance(controller, PIDController):
        raise InvalidInput(f"controller must be an adjoint.PIDController() (or PIController(), IController()), got {controller!r}")
    if controller is not None and method.multistep:
        raise UnsupportedCombination(
            f"controller= with {method.name!r}, which chooses its order and steps together, is not supported: leave it out"
        )


def spread_leaves(leaves: Sequence[Any], spec: StateSpec, otherwise: str) -> list[Tensor]:
    """Numbers or tensors in the shapes of the leaves of a state; raises `InvalidInput` that says ``otherwise``."""
    try:
        return [
            torch.broadcast_to(torch.as_tensor(leaf, dtype=spec.real_dtype, device=spec.device), shape)
            for leaf, shape in zip(leaves, spec.shapes, strict=True)
        ]
    except (RuntimeError, TypeError, ValueError) as error:
        raise InvalidInput(f"{otherwise}: {error}") from error


def flat_tolerance(value: Any, name: str, spec: StateSpec, default: float) -> float | Tensor:
    """A tolerance as a float, or as ``(B, n)`` for one that is shaped like the state."""
    if value is None:
        return default
    value = spec.matched(value)
    leaves, tree = tree_flatten(value)
    if len(leaves) == 1 and tree.is_leaf() and (not isinstance(value, Tensor) or value.dim() == 0):
        return positive(value, name, zero=True)
    if tree.is_leaf():
        leaves = leaves * len(spec.shapes)
    elif tree != spec.tree:
        raise InvalidInput(f"{name} has the structure {tree}, expected a number, a tensor, or the structure of y0, {spec.tree}")
    kinds = [x.dtype if isinstance(x, Tensor) else type(x) for x in leaves]
    odd = next((x for x, kind in zip(leaves, kinds, strict=True) if kind in (bool, str, torch.bool) or "complex" in str(kind)), None)
    if odd is not None:
        raise InvalidInput(f"{name} must be numbers, got {odd!r}")
    full = spread_leaves(leaves, spec, f"{name} does not broadcast to the shape of y0")
    flat = spec.spread(full).detach()
    if not bool((flat >= 0).all()):
        raise InvalidInput(f"{name} has negative or NaN entries")
    return flat


def usual_tolerances(spec: StateSpec) -> dict[str, float]:
    """What ``rtol`` and ``atol`` are where none are given."""
    return {"rtol": 1e-4, "atol": 1e-6} if spec.real_dtype.itemsize < 8 else {"rtol": 1e-6, "atol": 1e-9}


def beside_integral(value: Any, spec: StateSpec, seen: StateSpec, default: float) -> Any:
    """A tolerance that is shaped like the state ``seen`` for that and an integral, ``spec``, which has the ``default``."""
    value = seen.matched(value)
    leaves, tree = tree_flatten(value)
    if tree.is_leaf() and isinstance(value, Tensor) and value.dim():
        leaves = leaves * len(seen.shapes)
    elif tree.is_leaf() or tree != seen.tree:
        return value
    return tree_unflatten([*leaves, *[default] * (len(spec.shapes) - len(seen.shapes))], spec.tree)


def check_not_half(spec: StateSpec, name: str) -> None:
    """Raise `InvalidInput` for a state with a leaf of half precision."""
    coarse = next((kind for kind in spec.dtypes if kind.to_real().itemsize < 4), None)
    if coarse is not None:
        what = name if len(spec.dtypes) == 1 else f"a tensor of {name}"
        raise InvalidInput(
            f"{what} has dtype {coarse}, whose numbers are too coarse for error control and gradients: give {name}.float(), and convert "
            "inside of fun where that shall compute in half precision (or use torch.autocast there)"
        )


def check_precision(spec: StateSpec, rtol: Any) -> None:
    """Raise `InvalidInput` for states whose numbers are too coarse for error control, and for an ``rtol`` below what rounding leaves."""
    kind, eps = spec.real_dtype, torch.finfo(spec.real_dtype).eps
    check_not_half(spec, "y0")
    # numbers that are large enough at sight need no second look
    given = [x for x in leaves_of(rtol) if (_readable(x) if isinstance(x, Tensor) else isinstance(x, (int, float)) and x < eps)]
    # a tenth: some defaults in use are just below the spacing of single precision
    tensors = [g if isinstance(g, Tensor) else torch.tensor(g, device="cpu") for g in given]
    small = [float(x[x > 0].min()) for x in tensors if bool((x > 0).any())]
    if small and min(small) < 0.1 * eps:
        raise InvalidInput(
            f"rtol = {min(small):.3g} is below the resolution of {kind}, {eps:.1e}: the error of a step would be rounding. Solve in double "
            "precision (y0.double(), parameters too), or give a larger rtol"
        )


def flat_norm(norm: Any, spec: StateSpec) -> Callable[[Tensor], Tensor]:
    """The error norm on ``(B, n)``: "rms", "max", or a function of a state pytree of scaled errors (0-d, or ``(B,)`` when batched)."""
    if norm is None or norm == "rms":
        return rms_norm
    if norm == "max":
        return lambda x: x.abs().amax(-1) if x.shape[-1] else x.abs().sum(-1)
    if not callable(norm):
        raise InvalidInput(f'norm must be "rms", "max" or a function of the scaled error, got {norm!r}')

    def custom(x: Tensor) -> Tensor:
        value = norm(spec.unflatten(x.to(spec.dtype)))
        want = () if spec.batch is None else (spec.batch,)
        if not isinstance(value, Tensor) or value.shape != want:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(f"norm must return a tensor of shape {want}, got {got}")
        return value.reshape(spec.rows).abs()

    return custom


class RoundSpan(NamedTuple):
    """A ``t_span`` in which the ``idle`` trajectories ``(R)`` have no length, whatever their times depend on."""

    start: Tensor
    end: Tensor
    idle: Tensor


@dataclass(frozen=True)
class Times:
    """The times of a solve as float64 tensors, differentiable in what the user gave.

    ``anchors`` (A, B): start, times to land on, end. ``samples`` (T, B) or None. ``shown``: ``sol.t`` for given or default times.
    ``idle`` (B): trajectories that take no part, or None. ``named`` (2, B): the ends of the span, where some of them are among the times to
    land on: such anchors lie within the span by rounding, so that what jumps there is seen from within. None where none is.
    """

    anchors: Tensor
    samples: Tensor | None
    shown: Tensor | None
    steps: bool
    idle: Tensor | None = None
    named: Tensor | None = None

    def within(self, times: Tensor) -> Tensor:
        """``times`` (..., B), of which those that are ends of the span are the anchors there."""
        if self.named is None:
            return times
        ends, at = torch.stack([self.anchors[0], self.anchors[-1]]).detach(), times.detach()
        inner = torch.where(at == self.named[0], ends[0], torch.where(at == self.named[1], ends[1], at))
        return times + (inner - at)

    def shown_as(self, times: Tensor) -> Tensor:
        """`within` undone."""
        if self.named is None:
            return times
        at = times.detach()
        outer = torch.where(at == self.anchors[0].detach(), self.named[0], torch.where(at == self.anchors[-1].detach(), self.named[1], at))
        return times + (outer - at)

    @property
    def readable_idle(self) -> Tensor | None:
        """``idle`` for use in nodes, which run below all transforms: where none is around."""
        return self.idle if self.idle is not None and _concrete(self.idle) else None


def _readable(x: Tensor) -> bool:
    """Whether these are numbers that can be compared; `flat_tolerance` says what others are."""
    return _concrete(x) and not x.is_complex()


def _concrete(x: Tensor) -> bool:
    return not is_functorch_wrapped_tensor(x)


def as_times(value: Any, name: str, device: torch.device | None = None) -> Tensor:
    """Times as one tensor: a tensor as it is, anything else in float64. Sequences of tensors, however deep, keep their derivatives."""
    if isinstance(value, Tensor):
        return value
    try:
        if any(isinstance(leaf, Tensor) for leaf in leaves_of(value)):
            return torch.stack([as_times(v, name, device).to(device=device, dtype=torch.float64) for v in value])
        return torch.as_tensor(value, dtype=torch.float64, device=device)
    except InvalidInput:
        raise
    except Exception as error:
        raise InvalidInput(f"{name} must be numbers or tensors, got {value!r}") from error


def snapped(times: Tensor, first: Tensor, last: Tensor, *given: Any) -> Tensor:
    """Times that are the ends ``first`` or ``last`` but for the rounding of the numbers ``given`` are these ends; derivatives stay."""
    kinds = [x.dtype for x in leaves_of(given) if hasattr(x, "dtype")]
    floats = [k if isinstance(k, torch.dtype) else getattr(torch, str(k), torch.float64) for k in kinds]
    eps = max((torch.finfo(k).eps for k in floats if k.is_floating_point), default=torch.finfo(torch.float64).eps)
    first, last, at = first.detach(), last.detach(), times.detach()
    slack = torch.minimum(2 * eps * torch.maximum(first.abs(), last.abs()), 1e-3 * (last - first).abs())
    end = torch.where((at - first).abs() <= slack, first, torch.where((at - last).abs() <= slack, last, at))
    return times + (end - at)


def _time(value: Any, name: str, spec: StateSpec, ndim: tuple[int, ...]) -> Tensor:
    value = as_times(value, name, spec.device)
    if value.is_complex() or value.dtype == torch.bool:
        raise InvalidInput(f"{name} must be real, got dtype {value.dtype}")
    value = value.to(device=spec.device, dtype=torch.float64)
    if value.dim() not in ndim:
        raise InvalidInput(f"{name} has {value.dim()} dimensions, expected {' or '.join(map(str, ndim))}")
    if _concrete(value) and not bool(torch.isfinite(value).all()):
        until = ""
        if name == "t_span's end" and not bool(value.isnan().any()):
            until = ": for a solve until a terminal event give an end that is never reached, such as 1e30; steady states are for solve_root"
        raise InvalidInput(f"{name} has non-finite entries{until}")
    if value.dim() == 2 and value.shape[1] != spec.rows:
        raise InvalidInput(f"{name} has {value.shape[1]} columns for {spec.rows} trajectories")
    return value


def listed_args(args: Any) -> tuple[Any, ...]:
    """``args=`` as a tuple: anything but a tuple or list is one argument."""
    return tuple(args) if isinstance(args, (tuple, list)) else (args,)


def check_finite(state: Any, spec: StateSpec, message: str) -> None:
    """Raise `InvalidInput` for infinite or NaN entries; ``message`` has a place for the path to the leaf."""
    for leaf, path in zip(leaves_of(state), spec.paths, strict=True):
        if not is_functorch_wrapped_tensor(leaf) and not bool(torch.isfinite(leaf).all()):
            raise InvalidInput(message.format(path))


def check_callable(value: Any, name: str) -> None:
    """Raise `InvalidInput` for what is no function."""
    if not callable(value):
        raise InvalidInput(f"{name} must be callable, got a {type(value).__name__}")


def check_times(t_span: Any, t_eval: Any, step_ts: Any, spec: StateSpec) -> Times:
    """Parse the time arguments of an initial value problem."""
    batched = spec.batch is not None
    idle = None
    if isinstance(t_span, RoundSpan):
        t_span, idle = t_span[:2], t_span.idle.reshape(-1)
    try:
        start, end = t_span
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"t_span must be a pair (start, end), got {t_span!r}") from error
    each = (0, 1) if batched else (0,)
    ends = []
    for name, value in (("start", start), ("end", end)):
        value = _time(value, f"t_span's {name}", spec, each)
        if value.dim() == 1 and value.shape[0] != spec.rows:
            raise InvalidInput(f"t_span's {name} has {value.shape[0]} entries for {spec.rows} trajectories")
        ends.append(value)
    own = any(x.dim() == 1 for x in ends)
    first, last = (x.expand(spec.rows) for x in ends)
    concrete = _concrete(first) and _concrete(last)
    named, ends_given = None, (first, last)
    rows = [first.unsqueeze(0), last.unsqueeze(0)]
    if step_ts is not None:
        inner = _time(step_ts, "step_ts", spec, (1, 2) if batched else (1,))
        inner = inner.unsqueeze(-1).expand(-1, spec.rows) if inner.dim() == 1 else inner
        inner = snapped(inner, first, last, step_ts, start, end)
        first, last, named = from_within(first, last, inner, spec.real_dtype)
        rows = [first.unsqueeze(0), last.unsqueeze(0)]
        backwards = first > last
        inner = torch.where(backwards, inner.sort(0, descending=True).values, inner.sort(0).values)
        # what is beyond an end, or there, is that end, with all of its derivatives: no step is taken in between
        # where the ends are one each has its own derivatives: the step of no length is the last one, and goes from the one to the other
        low, high = torch.where(backwards, last, first), torch.where(backwards, first, last)
        inner = torch.where((inner <= low) | (low == high), low, torch.where(inner >= high, high, inner))
        if not batched and _concrete(inner) and concrete:
            inside = ((inner != first) & (inner != last))[:, 0]
            inner = inner[inside]
            inner = inner[torch.cat([inner.new_ones(min(1, inner.shape[0])), (inner[1:] != inner[:-1])[:, 0]]).bool()]
        rows.insert(1, inner)
    anchors = torch.cat(rows)
    steps = isinstance(t_eval, str)
    if steps:
        if t_eval != "steps":
            raise InvalidInput(f't_eval must be None, "steps" or times, got {t_eval!r}')
        return Times(anchors, None, None, True, idle, named)
    if t_eval is None:
        shown = torch.stack(ends_given) if own else torch.stack(ends)
        return Times(anchors, None, _as_given(shown, t_span, spec), False, idle, named)
    times = _time(t_eval, "t_eval", spec, (1, 2) if batched else (1,))
    if times.shape[0] == 0:
        raise InvalidInput('t_eval is empty; leave it out for the two ends, or give "steps"')
    full = times.unsqueeze(-1).expand(-1, spec.rows) if times.dim() == 1 else times
    full = snapped(full, *ends_given, t_eval, start, end)
    if concrete and _concrete(full):
        low, high = torch.minimum(*ends_given), torch.maximum(*ends_given)
        outside = (full < low) | (full > high)
        if bool(outside.any()):
            raise InvalidInput(f"t_eval has times outside of t_span, for example {float(full[outside][0]):.10g}")
        change = full.diff(dim=0)
        if not bool(((change >= 0).all(0) | (change <= 0).all(0)).all()):
            raise InvalidInput("t_eval is not monotonic: sort it (repeated times are allowed)")
    found = Times(anchors, full, _as_given(times, (t_eval,), spec), False, idle, named)
    return found if named is None else replace(found, samples=found.within(full))


def from_within(first: Tensor, last: Tensor, named: Tensor, real: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """The ends of a span (B,), moved into it by the rounding of times where they are among those that are ``named`` (K, B), with all of
    their derivatives; and the ends (2, B) as they were, None where none is."""
    start, end = first.detach(), last.detach()
    long = (end - start).abs() > 8 * torch.finfo(real).eps * torch.maximum(start.abs(), end.abs())
    hit = [(named.detach() == x).any(0) & long for x in (start, end)]
    if not anywhere(hit[0] | hit[1]):
        return first, last, None
    near = [torch.nextafter(x.to(real), y.to(real)).to(torch.float64) for x, y in ((start, end), (end, start))]
    ways = [torch.where(on, y - x, 0.0) for on, x, y in zip(hit, (start, end), near, strict=True)]
    return first + ways[0], last + ways[1], torch.stack([start, end])


def method_for(times: Times, chosen: Method, one_step: Method, explicit: bool = True) -> Method:
    """The method, or ``one_step`` in the place of a multistep one over a span of no length: that takes the step of no length that gives
    the derivatives in the times. ``explicit``: whether ``fun`` is the slope, which is known then though no step is taken."""
    multistep = chosen.multistep
    moving = any(moves(x) for x in (times.anchors, times.samples) if x is not None)
    if not (multistep or (moving and not explicit)):
        return chosen
    same = times.anchors[0].detach() == times.anchors[-1].detach()
    empty = unwrapped(same if times.idle is None else same & ~times.idle)
    with DisableFuncTorch():
        some, every = bool(empty.any()), bool(empty.all())
    if moving and some and not explicit:
        raise UnsupportedCombination(
            "derivatives in the ends or sample times of a span of no length are not supported by solve_dae and with mass_matrix=: no step "
            "is taken there that tells the slope. Give the span some length, or detach its times"
        )
    if multistep and every:
        return one_step
    if moving and some:
        raise UnsupportedCombination(
            "derivatives in the ends or sample times of spans of which some have no length are not supported with "
            f"{chosen.name!r}: choose a one-step method such as {one_step.name!r}"
        )
    return chosen


def _as_given(shown: Tensor, given: Sequence[Any], spec: StateSpec) -> Tensor:
    """In the dtype of the user's tensors, else in that of the state's times."""
    dtypes = [x.dtype for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    return shown.to(dtypes[0] if dtypes else spec.real_dtype)
