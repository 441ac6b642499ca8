"""What a loop is told (`Plan`) and what it gives back (`Record`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..methods import Method
from .controller import PIDController, default_controller
from .stiffness import Switch

__all__ = ["Event", "Monitor", "Plan", "Record", "Status", "rms_norm"]


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

    @cached_property
    def control(self) -> PIDController:
        """The controller; where none was given, that for methods like this one."""
        return self.controller if self.controller is not None else default_controller(self.method.implicit)

    def scaled(self, error: Tensor, size: Tensor) -> Tensor:
        """Error in units of the tolerance; ``size`` is ``max(|y0|, |y1|)``. Both may have the shape of the user's state."""
        return error / (size * _shaped(self.rtol, error) + _shaped(self.atol, error))


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
