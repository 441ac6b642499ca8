"""Arguments of the ``odeint`` family, checked and brought into one form."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..doors.arguments import check_precision, flat_tolerance
from ..errors import InvalidInput
from ..integrate import Monitor, rms_norm
from ..methods.adams import ADAMS_NAMES
from ..system.origins import attribute
from ..system.ownership import changed
from ..system.system import StateSpec

__all__ = ["ADAMS", "ADAPTIVE", "FIXED", "IMPLICIT", "CallbackMonitor", "InvalidType", "Request", "make_request"]

ADAPTIVE = ("dopri8", "dopri5", "tsit5", "bosh3", "fehlberg2", "adaptive_heun")
FIXED = ("euler", "midpoint", "heun2", "heun3", "rk4")
ADAMS = ADAMS_NAMES
#: implicit methods on a fixed grid, with their names in `METHODS` where those differ
IMPLICIT = {
    **{name: name for name in ("implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "gl4", "gl6", "sdirk2", "trbdf2")},
    "radauIIA5": "radau5",
}
_ALL = (*ADAPTIVE, *FIXED, *IMPLICIT, *ADAMS, "scipy_solver")

_STEP_OPTIONS = {"min_step", "max_step", "first_step", "step_t", "jump_t", "grid_points", "eps", "safety", "ifactor", "dfactor"}
_KNOWN = {
    "adaptive": _STEP_OPTIONS | {"max_num_steps", "dtype", "norm"},
    "fixed": {"step_size", "grid_constructor", "interp", "perturb", "norm"},
    "implicit": {"step_size", "grid_constructor", "interp", "perturb", "norm"},
    "adams": {"step_size", "grid_constructor", "interp", "perturb", "norm", "max_order", "max_iters"},
    "scipy": {"min_step", "max_step", "solver", "norm", "grid_points", "eps"},
}
_CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
_FIXED_CALLBACKS = {"callback_step"}
_VALID_CALLBACKS: dict[str, set[str]] = {
    "adaptive": set(_CALLBACKS),
    "fixed": _FIXED_CALLBACKS,
    "implicit": _FIXED_CALLBACKS,
    "adams": _FIXED_CALLBACKS,
    "scipy": set(),
}


class InvalidType(InvalidInput, TypeError):
    """An argument of the wrong type, where torchdiffeq raises a TypeError."""


@dataclass(frozen=True)
class Request:
    """One call: the user's own objects, and what they were read as.

    ``fun`` is ``func`` made to return the structure and dtypes of the state. ``norm`` takes scaled errors ``(B, n)`` to ``(B,)``.
    """

    func: Callable[..., Any]
    fun: Callable[..., Any]
    y0: Any
    t: Tensor
    method: str
    options: dict[str, Any]
    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor]
    spec: StateSpec
    event_fn: Callable[..., Tensor] | None

    @property
    def family(self) -> str:
        """Which kind of solver: "adaptive", "fixed", "adams" or "scipy"."""
        return family_of(self.method)

    @property
    def sign(self) -> float:
        """The direction of time."""
        return -1.0 if self.t.shape[0] > 1 and bool(self.t[0] > self.t[1]) else 1.0

    def laid_out(self, spec: StateSpec) -> Request:
        """The request for states in another layout: that of ``spec``, which may hold real and imaginary parts side by side."""
        if spec is self.spec:
            return self
        norm = _norm(self.options.get("norm"), self.y0, spec)
        rtol, atol = (_laid_out(x, self.spec, spec) for x in (self.rtol, self.atol))
        return replace(self, spec=spec, norm=norm, rtol=rtol, atol=atol)

    @property
    def n_intervals(self) -> int:
        """How many intervals the times make."""
        return max(1, self.t.shape[0] - 1)

    def monitor(self) -> Monitor:
        """The user's callbacks."""
        found = {name: _callback(self.func, name) for name in _CALLBACKS if name in _VALID_CALLBACKS[self.family]}
        back = {name: _callback(self.func, f"{name}_adjoint") for name in _CALLBACKS}
        given = {k: v for k, v in found.items() if v is not None}
        given |= {f"{k}_adjoint": v for k, v in back.items() if v is not None}
        if not given:
            return Monitor()
        kind = SweepMonitor if any(name.endswith("_adjoint") for name in given) else CallbackMonitor
        return kind(self.spec, given)


def family_of(method: str) -> str:
    """The family of a method name."""
    families = {"adaptive": ADAPTIVE, "fixed": FIXED, "implicit": IMPLICIT, "adams": ADAMS}
    return next((name for name, members in families.items() if method in members), "scipy")


def _callback(func: Any, name: str) -> Callable[..., Any] | None:
    value = attribute(func, name)
    return value if callable(value) else None


class CallbackMonitor(Monitor):
    """Calls ``callback(t0, y0, dt)`` with 0-d tensors and the user's state; ``dt`` is positive in either direction of time."""

    def __init__(self, spec: StateSpec, callbacks: dict[str, Callable[..., Any]]) -> None:
        self.spec, self.callbacks = spec, callbacks

    def _call(self, name: str, t: float, y: Any, h: float) -> None:
        callback = self.callbacks.get(name)
        if callback is not None:
            time, size = (torch.tensor(x, dtype=torch.float64, device=self.spec.device) for x in (t, abs(h)))
            lent = [x for x in tree_leaves(y) if not x.is_inference()]
            versions = [x._version for x in lent]
            callback(time, y, size)
            if versions != [x._version for x in lent]:
                changed(name, "the state")

    def _state(self, y: Tensor) -> Any:
        return self.spec.unflatten(y.detach().reshape(self.spec.rows, -1))

    def step(self, t: float, y: Tensor, h: float) -> None:
        """See `Monitor.step`."""
        if "callback_step" in self.callbacks:
            self._call("callback_step", t, self._state(y), h)

    def accepted(self, t: float, y: Tensor, h: float) -> None:
        """See `Monitor.accepted`."""
        if "callback_accept_step" in self.callbacks:
            self._call("callback_accept_step", t, self._state(y), h)

    def rejected(self, t: float, y: Tensor, h: float) -> None:
        """See `Monitor.rejected`."""
        if "callback_reject_step" in self.callbacks:
            self._call("callback_reject_step", t, self._state(y), h)


class SweepMonitor(CallbackMonitor):
    """Also calls the ``*_adjoint`` callbacks for the steps of a discrete backward sweep, which are all accepted.

    They get ``(y, adj_y)`` where those of a continuous adjoint get its whole augmented state.
    """

    def adjoint(self, t: float, y: Tensor, h: float, bar: Tensor) -> None:
        """See `Monitor.adjoint`."""
        state = (self._state(y), self._state(bar))
        self._call("callback_step_adjoint", t, state, h)
        self._call("callback_accept_step_adjoint", t, state, h)


def make_request(
    func: Callable[..., Any],
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: dict[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> Request:
    """Check the arguments of an ``odeint`` call.

    Raises
    ------
    InvalidInput (a ValueError and an AssertionError), InvalidType (a TypeError too)
    """
    method = _check_method(method)
    if not callable(func):
        raise InvalidInput(f"func must be callable, got a {type(func).__name__}")
    if not isinstance(y0, Tensor):
        if not isinstance(y0, tuple):
            raise InvalidInput(f"y0 must be either a torch.Tensor or a tuple, got a {type(y0).__name__}")
        y0 = tuple(y0)
    spec = StateSpec.of(y0, False)
    check_precision(spec, rtol)
    t = _check_times(t)
    if t.device != spec.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=4)
        t = t.to(spec.device)
    if event_fn is not None and t.shape[0] != 2:
        raise InvalidInput(f"We require len(t) == 2 when in event handling mode, but got len(t)={t.shape[0]}.")
    options = dict(options or {})
    family = family_of(method)
    unknown = {name: options.pop(name) for name in list(options) if name not in _KNOWN[family]}
    if unknown:
        warnings.warn(f"{method}: Unexpected arguments {unknown}", stacklevel=4)
    wrong = {name for name in _CALLBACKS if _callback(func, name) is not None} - _VALID_CALLBACKS[family]
    if wrong:
        warnings.warn(f"Solver '{method}' does not support callbacks {wrong}", stacklevel=4)
    return Request(
        func=func,
        fun=spec.keyed(_conforming(func, isinstance(y0, tuple))),
        y0=y0,
        t=t,
        method=method,
        options=options,
        rtol=_tolerance(rtol, "rtol", y0, spec),
        atol=_tolerance(atol, "atol", y0, spec),
        norm=_norm(options.get("norm"), y0, spec),
        spec=spec,
        event_fn=event_fn,
    )


def _check_method(method: str | None) -> str:
    method = "dopri5" if method is None else method
    if method not in _ALL:
        raise InvalidInput(f"Invalid method {method!r}. Must be one of {', '.join(_ALL)}.")
    return method


def _check_times(t: Any) -> Tensor:
    if not isinstance(t, Tensor):
        raise InvalidInput(f"t must be a torch.Tensor, got a {type(t).__name__}")
    if not t.is_floating_point():
        raise InvalidType(f"t must be a floating point tensor but has dtype {t.dtype}")
    if t.dim() != 1:
        raise InvalidInput(f"t must be one dimensional, got shape {tuple(t.shape)}")
    if t.shape[0] == 0:
        raise InvalidInput("t is empty: it must hold the initial time")
    later = t[1:] > t[:-1]
    if not bool(torch.isfinite(t).all()):
        raise InvalidInput("t has non-finite entries")
    if not bool(later.all() | (t[1:] < t[:-1]).all()):
        raise InvalidInput("t must be strictly increasing or decreasing")
    return t


def _conforming(func: Callable[..., Any], is_tuple: bool) -> Callable[..., Any]:
    """``func`` with what it returns brought to the shapes and dtypes of the state, as torchdiffeq tolerates them."""
    if is_tuple:
        return lambda t, y: tuple(_like(k, x) for k, x in zip(_as_sequence(func(t, y), len(y)), y, strict=True))
    return lambda t, y: _like(func(t, y), y)


def _as_sequence(value: Any, length: int) -> Sequence[Any]:
    if isinstance(value, Tensor) or not isinstance(value, (tuple, list)) or len(value) != length:
        got = f"{len(value)} values" if isinstance(value, (tuple, list)) else f"a {type(value).__name__}"
        raise InvalidInput(f"func must return a tuple of {length} tensors like y0, got {got}")
    return value


def _like(value: Any, y: Any) -> Any:
    if not isinstance(value, Tensor) or not isinstance(y, Tensor):
        return value
    if value.dtype != y.dtype and (y.is_complex() or not value.is_complex()):
        value = value.to(y.dtype)
    if value.shape != y.shape:
        if value.numel() == y.numel():
            value = value.reshape(y.shape)
        elif value.dim() <= y.dim() and all(a in (1, b) for a, b in zip(value.shape[::-1], y.shape[::-1], strict=False)):
            if value.dim():
                warnings.warn(
                    f"func returned shape {tuple(value.shape)} for a state of shape {tuple(y.shape)}: it is broadcast, as in torchdiffeq",
                    stacklevel=2,
                )
            value = value.expand(y.shape)
    return value


def _tolerance(value: Any, name: str, y0: Any, spec: StateSpec) -> float | Tensor:
    if isinstance(value, Tensor) and value.requires_grad:
        raise InvalidInput(f"{name} cannot require gradient")
    if isinstance(y0, tuple):
        each = value.unbind() if isinstance(value, Tensor) and value.dim() > 0 else value
        if isinstance(each, (tuple, list)):
            if len(each) != len(y0):
                raise InvalidInput(f"If using tupled {name} it must have the same length as the tuple y0: {len(each)} for {len(y0)}")
            value = tuple(torch.as_tensor(x, device=spec.device) for x in each)
    elif isinstance(value, (tuple, list)):
        value = torch.as_tensor(value)
    return flat_tolerance(value, name, spec, 0.0)


def _laid_out(tolerance: float | Tensor, old: StateSpec, new: StateSpec) -> float | Tensor:
    """A tolerance of every entry for its parts."""
    if not isinstance(tolerance, Tensor) or tolerance.shape[-1:] != (sum(old.sizes),):
        return tolerance
    parts = [after // before for before, after in zip(old.sizes, new.sizes, strict=True) for _ in range(before)]
    return tolerance.repeat_interleave(torch.tensor(parts, device=tolerance.device), -1)


def _norm(norm: Any, y0: Any, spec: StateSpec) -> Callable[[Tensor], Tensor]:
    """The norm on flat scaled errors. By default the root mean square; of a tuple, the largest one of its elements."""
    if norm is not None and not callable(norm):
        raise InvalidInput(f"norm must be a function of the state, got {norm!r}")

    if norm is None and len(spec.shapes) == 1:
        return rms_norm

    def flat(x: Tensor) -> Tensor:
        state = spec.unflatten(x.to(spec.dtype))
        value = norm(state) if norm is not None else mixed_norm(tree_leaves(state))
        return torch.as_tensor(value, device=x.device).abs().reshape(1)

    return flat


def rms(x: Tensor) -> Tensor:
    """Root mean square of all entries, 0-d."""
    return torch.linalg.vector_norm(x) * (max(x.numel(), 1) ** -0.5)


def mixed_norm(tensors: Sequence[Tensor]) -> Tensor | float:
    """The largest root mean square of several tensors (0 for none)."""
    values = [rms(x) for x in tensors]
    if len(values) < 2:
        return values[0] if values else 0.0
    return torch.stack([v.to(values[0]) for v in values]).amax()
