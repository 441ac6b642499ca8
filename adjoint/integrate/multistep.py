"""What the loop asks of multistep methods: variable order and step, of one trajectory by numbers and of many, in lock step, by masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clock import TimelineOfMany, TimelineOfOne
from .loop import Walk
from .numbers import Decision, Measure, any_of, choose, choose_states, lifted, negated
from .plan import Plan, Record, row_norm, shifted_times
from .stepper import Attempt, Equations, Fate

__all__ = ["MultistepSolver", "Outcome", "Predicted", "solve_multistep"]


class Predicted(NamedTuple):
    """An attempted step: state at its end and error estimate, in the shape of the state, and whether there are any; when they are asked
    for, its stages (S, ...) and what is recorded beside them (E,), of many (E, B); and what its solver wants to know of it later."""

    y: Tensor
    estimate: Tensor
    solved: Decision
    stages: Callable[[], Sequence[Tensor]]
    extra: Callable[[], Tensor]
    kept: Any


class Outcome(NamedTuple):
    """What became of a step: decisions, but for ``error``, a measure, and ``scale``, the size of the state in its shape.

    ``passed`` and ``failed`` (there was no estimate) and ``rejected`` exclude each other; ``restart`` begins anew from an anchor;
    ``running`` goes on.
    """

    running: Any
    passed: Any
    failed: Any
    rejected: Any
    restart: Any
    error: Any
    scale: Tensor


class _Trial:
    """See `Trial`; ``found``: what the solver says of the step."""

    __slots__ = ("bad", "error", "found", "hopeless", "passed", "scale", "y")

    def __init__(self, found: Predicted, error: Measure, scale: Tensor) -> None:
        self.found, self.error, self.scale, self.y = found, error, scale, found.y
        self.bad, self.passed, self.hopeless = negated(found.solved), found.solved & (error <= 1.0), False

    @property
    def extra(self) -> Tensor:
        """See `Trial`."""
        return self.found.extra()

    def stages(self, who: Decision) -> Sequence[Tensor]:
        """See `Trial.stages`."""
        return self.found.stages()

    def detach(self) -> None:
        """See `Trial.detach`: no solve is recorded."""


class MultistepSolver(Equations, ABC):
    """A multistep method at work: it holds the history of every trajectory, the first row of the table ``D`` (M, B, n) its state.

    Of one trajectory ``alone`` the table is (M, n); its state has the shape in which the loop carries it, its size, order and decisions are
    numbers.
    """

    f: Callable[[Tensor, Tensor], Tensor]
    plan: Plan
    D: Tensor
    alone: bool = False
    #: see `Stepper.rate`
    rate = 0.0

    @abstractmethod
    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """Begin at ``anchors[0]`` with ``y0`` (B, n); the sizes (positive) of the first steps (B,)."""

    @abstractmethod
    def resize(self, factor: Measure, which: Decision) -> None:
        """The next step of some trajectories is to be ``factor`` as long as was said last."""

    @abstractmethod
    def predict(self, when: Tensor, h: Measure, running: Decision) -> Predicted:
        """A step of the ``running`` trajectories by ``h`` to where ``fun`` sees the time ``when``."""

    @abstractmethod
    def accept(self, found: Predicted, passed: Decision, restart: Decision, step: Attempt) -> None:
        """Take over what has ``passed`` of a ``step``."""

    @abstractmethod
    def propose(self, found: Predicted, outcome: Outcome) -> Measure:
        """Choose the next orders; the factors of the next sizes."""

    @property
    @abstractmethod
    def idle(self) -> Tensor:
        """``extra`` (E,) of no step."""

    # ---- a `Stepper`

    def enter(self, line: Any, y0: Tensor) -> None:
        """What is to be solved, from ``y0``: (B, n), or of one alone a state in its shape."""
        self._line, self._shape = line, y0.shape
        self.norm = row_norm(self.plan) if self.alone else self.plan.norm
        flat, t0 = y0.reshape(1, -1) if self.alone else y0, line.anchors[0]
        #: of the last attempt, see `Stepper.scaled`
        self.scaled = None if self.alone else torch.zeros_like(y0, dtype=self.plan.real)
        first = self.start(line.anchors, lifted(line.sign, t0), flat)
        self._clock = torch.zeros((), dtype=self.plan.real, device=y0.device)
        if self.alone:
            self._begun: tuple[Measure, Decision, Decision] = first.item(), True, False
        else:
            # nothing goes on from a state that is not finite: a step of no size says so at once; nothing is done over a span of no length
            broken = ~torch.isfinite(y0).all(-1)
            self._begun = torch.where(broken, 0.0, first), line.start != line.end, broken

    @property
    def y(self) -> Tensor:
        """See `Stepper.y`."""
        return self.D[0]

    def begin(self) -> tuple[Measure, Decision, Decision]:
        """See `Stepper.begin`."""
        return self._begun

    def fit(self, step: Measure, h: Measure, running: Decision) -> Measure:
        """See `Stepper.fit`."""
        size = abs(h)
        differs = running & (size != step)
        if not any_of(differs):
            return step
        self.resize(size / step, differs)
        return choose(differs, size, step)

    def seen(self, t: Measure, node: float, jump: Decision) -> Tensor:
        """A time as ``fun`` sees it at the start of a step, ``node`` 0, or at its end, 1, where it may jump."""
        time, line = lifted(t, self._clock).to(self.plan.real), self._line
        return shifted_times([time], [node], jump, jump, line.sign)[0] if line.jumps else time

    def attempt(self, step: Attempt) -> _Trial:
        """See `Stepper.attempt`."""
        found = self.predict(self.seen(step.end, 1.0, step.before), step.h, step.running)
        scale = torch.maximum(found.y.abs(), self.y.abs())
        self.scaled = choose_states(step.running, self.plan.scaled(found.estimate, scale).abs(), self.scaled)
        return _Trial(found, self.norm(self.scaled), scale)

    def follow(self, step: Attempt, trial: _Trial, size: Measure, fate: Fate) -> Measure:
        """See `Stepper.follow`."""
        accepted, _, _, going, landed = fate
        found, restart = trial.found, landed & going
        self.accept(found, accepted, restart, step)
        failed, rejected = step.running & trial.bad, step.running & found.solved & negated(trial.passed)
        factor = self.propose(found, Outcome(going, accepted, failed, rejected, restart, trial.error, trial.scale))
        changed = (factor != 1.0) & (going | restart)
        if not any_of(changed):
            return size
        self.resize(factor, changed)
        return choose(changed, size * factor, size)

    def evaluations(self, attempts: Any) -> Any:
        """See `Stepper.evaluations`: they are all in `work`."""
        return attempts * 0


def solve_multistep(
    solver: MultistepSolver,
    plan: Plan,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor] = (),
    shape: Sequence[int] | None = None,
) -> Record:
    """Solve one trajectory, or B of them; arguments as for `integrate`."""
    line: Any = (TimelineOfOne if solver.alone else TimelineOfMany)(plan, anchors)
    start = y0.reshape(tuple(shape)) if solver.alone and shape is not None else y0
    solver.enter(line, start)
    return Walk(plan, line, t_eval, start, inputs, solver.idle).solve(solver)
