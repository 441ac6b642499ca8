"""What a loop is told (`Plan`), with the controller of its steps, and what it gives back (`Record`), as derivatives take it (`Grid`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..methods import Method
from .stiffness import Switch

__all__ = [
    "RECORDED",
    "Event",
    "Grid",
    "IController",
    "Monitor",
    "PIController",
    "PIDController",
    "Plan",
    "Record",
    "Status",
    "default_controller",
    "rms_norm",
    "row_norm",
    "tamed",
]

#: a float for one trajectory, a ``(B,)`` tensor for many
Number = Any

_TINY, _HUGE = 1e-10, 1e30
#: an error below this, by luck or by an anchor, does not count as the beginning of a rise
_LEAST = 1e-2


def _clip(x: Number, low: float, high: float) -> Number:
    if type(x) is float:
        return high if x > high else low if x < low else x
    return x.clamp(low, high)


@dataclass(frozen=True)
class PIDController:
    """Proportional-integral-derivative step size control (Soderlind 2003, Digital filters in adaptive time-stepping).

    With error norms ``e_n`` (1 is on tolerance) and ``q`` the order of the error estimate plus one, the step changes by
    ``safety * e_n**(-b1/q) * e_{n-1}**(-b2/q) * e_{n-2}**(-b3/q)``, where ``b1 = pcoeff + icoeff + dcoeff``,
    ``b2 = -(pcoeff + 2 dcoeff)`` and ``b3 = dcoeff``, clipped to ``[min_factor, max_factor]``. An accepted step is never
    followed by a shorter one unless ``shrink_accepted``; a rejected one is always followed by a shorter one.

    ``predictive``: the factor is at most that times ``h_n / h_{n-1} (e_{n-1} / e_n)**(1/q)``, by which the error's growth goes on as it did
    (Gustafsson 1994; Hairer & Wanner, Solving ordinary differential equations II, equation IV.8.25): the coming step is made shorter before
    one fails.
    """

    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    safety: float = 0.9
    min_factor: float = 0.2
    max_factor: float = 10.0
    shrink_accepted: bool = False
    predictive: bool = False

    def __post_init__(self) -> None:
        for name in ("pcoeff", "icoeff", "dcoeff", "safety", "min_factor", "max_factor"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise InvalidInput(f"{name} must be a number, got {value!r}")
        if self.predictive and (self.pcoeff or self.dcoeff):
            raise InvalidInput("predictive=True is for integral control: pcoeff and dcoeff must be zero")
        if not 0 < self.safety <= 1 or not 0 < self.min_factor < 1 < self.max_factor:
            raise InvalidInput("a controller needs 0 < safety <= 1 and 0 < min_factor < 1 < max_factor")

    @cached_property
    def stuck_factor(self) -> float:
        """Factor after a step in which the iteration for the stages did not converge: it says less than an error does (Hairer & Wanner,
        Solving ordinary differential equations II, section IV.8)."""
        return max(self.min_factor, 0.5)

    @cached_property
    def remembers(self) -> bool:
        """Whether earlier steps count."""
        return bool(self.pcoeff or self.dcoeff or self.predictive)

    def remember(self, error: Number, length: Number, previous: tuple[Number, Number]) -> tuple[Number, Number]:
        """What counts of an accepted step and of those before, ``previous``: the last two errors; if ``predictive``, error and length (with
        a minus). At the beginning it is ``(1, 1)``."""
        if not self.predictive:
            return error, previous[0]
        return (error.clamp(min=_LEAST), -tamed(length)) if isinstance(error, Tensor) else (max(error, _LEAST), -length)

    def accepted(self, order: int, error: Number, previous: tuple[Number, Number], length: Number) -> Number:
        """Factor after an accepted step of this length; errors (present, and those that were remembered) come as `tamed`."""
        factor = self.safety * error ** (-(self.pcoeff + self.icoeff + self.dcoeff) / order)
        if self.predictive:
            factor = self._predicted(order, error, previous, length, factor)
        if self.pcoeff or self.dcoeff:
            factor = factor * previous[0] ** ((self.pcoeff + 2 * self.dcoeff) / order)
        if self.dcoeff:
            factor = factor * previous[1] ** (-self.dcoeff / order)
        return _clip(factor, self.min_factor if self.shrink_accepted else 1.0, self.max_factor)

    @staticmethod
    def _predicted(order: int, error: Number, previous: tuple[Number, Number], length: Number, factor: Number) -> Number:
        # lengths are kept with a minus, which tells them from the one of the beginning
        error1, length1 = previous
        growth = (error1 / error) ** (1.0 / order)
        if not isinstance(error, Tensor):
            return factor if length1 > 0 else factor * min(1.0, length / -length1 * growth)
        ratio = torch.where(length1 > 0, 1e30, -tamed(length) / length1)
        return factor * (ratio * growth).clamp(max=1.0)

    def rejected(self, order: int, error: Number) -> Number:
        """Factor after a rejected step; only the present error counts."""
        return _clip(self.safety * error ** (-1.0 / order), self.min_factor, self.safety)

    def both(self, order: int, error: Number, previous: tuple[Number, Number], length: Number) -> tuple[Number, Number]:
        """`accepted` and `rejected`, which without a memory share their power."""
        if self.remembers or self.icoeff != 1.0:
            return self.accepted(order, error, previous, length), self.rejected(order, error)
        factor = self.safety * error ** (-1.0 / order)
        low = self.min_factor if self.shrink_accepted else 1.0
        return _clip(factor, low, self.max_factor), _clip(factor, self.min_factor, self.safety)


def tamed(error: Number) -> Number:
    """An error norm kept away from zero and infinity; in single precision for tensors, where powers of doubles are slow."""
    return _clip(error if type(error) is float else error.float(), _TINY, _HUGE)


def IController(**options: Any) -> PIDController:
    """Integral control, the textbook controller: ``safety * e**(-1/q)``."""
    return PIDController(0.0, 1.0, 0.0, **options)


def PIController(**options: Any) -> PIDController:
    """Proportional-integral control with Gustafsson's coefficients (0.4, 0.3), as in Hairer, Norsett & Wanner, section IV.2."""
    return PIDController(0.4, 0.3, 0.0, shrink_accepted=True, **options)


_PLAIN, _PREDICTIVE = IController(), PIDController(shrink_accepted=True, predictive=True)


def default_controller(implicit: bool) -> PIDController:
    """`IController` for explicit methods. Implicit ones, whose steps change size by orders of magnitude, also go by how the error rose over
    the last two steps."""
    return _PREDICTIVE if implicit else _PLAIN


class Status(IntEnum):
    """How a trajectory ended; SciPy's convention: 0 reached the end, 1 a terminal event, negative a failure."""

    SUCCESS = 0
    TERMINAL_EVENT = 1
    #: handed over to another method; never seen outside
    SWITCHED = 2
    MAX_STEPS = -1
    STEP_TOO_SMALL = -2
    NON_FINITE = -3
    NEWTON_FAILED = -4
    #: of solves with resets alone
    EVENTS_ACCUMULATE = -5


def rms_norm(x: Tensor) -> Tensor:
    """Root mean square of every row: ``(B, n) -> (B,)``."""
    if x.shape[-1] == 1:
        return x.abs().squeeze(-1)
    return torch.linalg.vector_norm(x, dim=-1) * (max(x.shape[-1], 1) ** -0.5)


class Monitor:
    """Is told about every attempted step; the base class ignores it all. Times are floats, states flat ``(B, n)`` tensors."""

    def step(self, t: float, y: Tensor, h: float) -> None:
        """Before a step is attempted."""

    def accepted(self, t: float, y: Tensor, h: float) -> None:
        """After acceptance; ``t``, ``y`` are those at the start of the step."""

    def rejected(self, t: float, y: Tensor, h: float) -> None:
        """After rejection."""

    def adjoint(self, t: float, y: Tensor, h: float, bar: Tensor) -> None:
        """Before a step is taken back; ``bar`` is the cotangent of the state at its end."""

    def advanced(self, fraction: float) -> None:
        """After each loop: the part of the span that the slowest trajectory has covered; behind `parted`, of what was left then."""

    def parted(self) -> None:
        """Before a solve of what is left of the span, as phases and rounds are."""

    def close(self) -> None:
        """After the solve."""


@dataclass(frozen=True)
class Event:
    """A flat event function ``bind(inputs)(t, y)``, with SciPy's ``direction`` (0 both, > 0 rising, < 0 falling) and ``terminal``.

    ``terminal`` 0 never stops the solve, m does so at the m-th time. ``function``: the user's, of time, state and arguments.
    """

    bind: Callable[[Sequence[Tensor]], Callable[[Tensor, Tensor], Tensor]]
    direction: float = 0.0
    terminal: int = 0
    function: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Plan:
    """Everything about a solve but its tensors-to-differentiate.

    ``rtol`` and ``atol`` are numbers or tensors that broadcast to ``(B, n)``; ``norm`` maps scaled errors ``(B, n)`` to ``(B,)``.
    ``controller``: None for that of the method. ``real`` is the real dtype of the state.
    ``compile``: None for eager steps, else what compiled code of ``fun`` is kept under.
    ``keep_states``: whether the states of all steps are wanted; ``keep_stages``: also all stages, for the dense output.
    ``keep_grid``: starts and sizes of all steps are wanted even where their states are not. ``results_of_steps``: states or stages of the
    steps are themselves part of what the user gets.
    ``first_step``: of all trajectories, or (B,) float64; None: from the slope at the start.
    ``shift``: which anchors ``fun`` sees only from within a step: the "inner" ones, "all" of them, or "none".
    ``event_counts`` (E, B): how often events occurred before. ``switch``: when to hand over to another method.
    ``accept_smallest``: no step is smaller than ``min_step``, and one of that size is accepted whatever its error.
    """

    method: Method
    controller: PIDController | None
    real: torch.dtype
    rtol: float | Tensor
    atol: float | Tensor
    norm: Callable[[Tensor], Tensor] = rms_norm
    first_step: Any = None
    max_step: float = float("inf")
    min_step: float = 0.0
    max_steps: int = 100_000
    keep_states: bool = True
    keep_stages: bool = False
    keep_grid: bool = False
    results_of_steps: bool = False
    events: tuple[Event, ...] = ()
    event_counts: Tensor | None = None
    switch: Switch | None = None
    monitor: Monitor = field(default_factory=Monitor)
    compile: Hashable | None = None
    shift: str = "inner"
    accept_smallest: bool = False

    def __post_init__(self) -> None:
        if not self.method.adaptive:
            return
        nothing: bool | Tensor = (self.rtol == 0) & (self.atol == 0)
        if bool(nothing.any() if isinstance(nothing, Tensor) else nothing):
            raise InvalidInput("rtol and atol are both zero: no error of a step is as small. Give one of them a positive value")

    @cached_property
    def control(self) -> PIDController:
        """The controller; where none was given, that for methods like this one."""
        return self.controller if self.controller is not None else default_controller(self.method.implicit)

    def scaled(self, error: Tensor, size: Tensor) -> Tensor:
        """Error in units of the tolerance; ``size`` is ``max(|y0|, |y1|)``. Both may have the shape of the user's state."""
        return error / (size * _shaped(self.rtol, error) + _shaped(self.atol, error))


def row_norm(plan: Plan) -> Callable[[Tensor], float]:
    """The norm of the plan for one state of any shape, as a number."""
    if plan.norm is rms_norm:
        norm = torch.linalg.vector_norm
        return lambda x: norm(x).item() * max(x.numel(), 1) ** -0.5
    return lambda x: float(plan.norm(x.reshape(1, -1)))


def _shaped(tolerance: float | Tensor, error: Tensor) -> float | Tensor:
    """One for every number of a state of one trajectory, in the shape of the state."""
    return tolerance.reshape(error.shape) if isinstance(tolerance, Tensor) and tolerance.numel() == error.numel() else tolerance


@dataclass(frozen=True)
class Record:
    """The computed solution: what derivatives, samples and statistics are made from.

    Shapes: K accepted steps (the most of any trajectory), B trajectories, T samples, S stages with those of the dense output, M kept
    steps, E events. Trajectories with fewer steps are padded with steps of size zero at their end.

    Attributes
    ----------
    final : (B, n); NaN for a failed trajectory
    last : (B, n); the last state reached, also by a failed one
    scaled_error : (B, n); the last error estimate, in units of the tolerance
    states : (K + 1, B, n), or (0, B, n) where they were not wanted
    samples : (T, B, n)
    stages : (M, S, B, n); M = K with ``keep_stages``, else the steps in which events were found
    t, h : (K, B), float64; start and size of every step
    segment : (K, B), int64; the anchor interval that the step lies in
    lands : (K, B), bool; whether the step ends on the next anchor
    sample_step : (T, B), int64; the step that a sample lies in, -1 where the solve did not get so far
    n_steps, n_accepted, n_rejected, n_fun, n_jac, n_factorizations, n_solves, n_newton : (B,), int64
    status : (B,), int64
    t_final : (B,), float64; where the trajectory ended
    event_id, event_row, event_step : (E,), int64; event_t : (E,), float64
    """

    final: Tensor
    last: Tensor
    scaled_error: Tensor
    states: Tensor
    samples: Tensor
    stages: Tensor
    t: Tensor
    h: Tensor
    segment: Tensor
    lands: Tensor
    sample_step: Tensor
    n_steps: Tensor
    n_accepted: Tensor
    n_rejected: Tensor
    n_fun: Tensor
    status: Tensor
    t_final: Tensor
    event_id: Tensor
    event_row: Tensor
    event_step: Tensor
    event_t: Tensor
    n_jac: Tensor
    n_factorizations: Tensor
    n_solves: Tensor
    n_newton: Tensor
    #: (K, E, B): what a multistep method records beside
    extra: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0))
    #: (B,) float64: the step that would follow, not cut by the end of the span; multistep methods give none
    next_step: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))


def shifted_times(
    times: Sequence[Tensor], nodes: Sequence[float], start: Tensor | bool, end: Tensor | bool, sign: Tensor | float
) -> list[Tensor]:
    """Stage times kept strictly inside a step at its flagged ends, so that a discontinuous ``fun`` is seen from within.

    ``start`` and ``end`` are flags, or ``(B,)`` masks; ``sign`` is the direction of time.
    """
    out = []
    for time, node in zip(times, nodes, strict=True):
        flag = start if node == 0.0 else end if node == 1.0 else False
        if flag is not False:
            toward = torch.as_tensor(sign, dtype=time.dtype, device=time.device) * (float("inf") if node == 0.0 else -float("inf"))
            inner = torch.nextafter(time.detach(), toward.expand_as(time)) - time.detach()
            time = time + (inner if flag is True else inner * flag)
        out.append(time)
    return out


#: the tensors of a `Record` that a `Grid` has, in its order
RECORDED = ("states", "t", "h", "segment", "lands", "sample_step", "status", "event_step", "stages", "extra")


@dataclass(frozen=True, eq=False)
class Grid:
    """Tensors of a `Record`, of the same names and shapes; what a sweep does not look at may be empty.

    ``sizes`` (K, B): those of the steps with those that stand in for padding, whose own are zero; None where nothing is padded.
    ``moved`` (K, B): the steps that are put elsewhere, or None (see `adjoint.sensitivity.padding`).
    """

    states: Tensor
    t: Tensor
    h: Tensor
    segment: Tensor
    lands: Tensor
    sample_step: Tensor
    status: Tensor
    event_step: Tensor
    stages: Tensor
    extra: Tensor
    sizes: Tensor | None = None
    moved: Tensor | None = None

    @classmethod
    def of(cls, record: Any) -> Grid:
        """That of a `Record`, or of `Outputs`."""
        return cls(*(getattr(record, name) for name in RECORDED))

    @property
    def tensors(self) -> Sequence[Tensor]:
        """Those of the record, in the order of `RECORDED`."""
        return [getattr(self, name) for name in RECORDED]

    @property
    def size(self) -> Tensor:
        """Sizes of steps (K, B), of which none is zero only because it is padding."""
        return self.h if self.sizes is None else self.sizes

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Grid:
        """The same with ``function`` of every tensor of the record."""
        return replace(self, **{name: function(getattr(self, name)) for name in RECORDED})
