"""What the loop asks of multistep methods for many trajectories: variable order and step for each, in lock step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .clock import TimelineOfMany
from .loop import Walk
from .numbers import Decision
from .plan import Plan, Record, shifted_times
from .stepper import Attempt, Equations, Fate

__all__ = ["MultistepSolver", "Outcome", "Predicted", "solve_multistep"]


class Predicted(NamedTuple):
    """An attempted step: state at its end and error estimate (B, n), whether there are any (B,), stages (S, B, n), what is recorded
    beside them (E, B), and what its solver wants to know of it later."""

    y: Tensor
    estimate: Tensor
    solved: Tensor
    slopes: Tensor
    extra: Tensor
    kept: Any


class Outcome(NamedTuple):
    """What became of a step: masks (B,), but for ``error`` (B,), its norm, and ``scale`` (B, n), the size of the state.

    ``passed`` and ``failed`` (there was no estimate) and ``rejected`` exclude each other; ``restart`` begins anew from an anchor;
    ``running`` goes on.
    """

    running: Tensor
    passed: Tensor
    failed: Tensor
    rejected: Tensor
    restart: Tensor
    error: Tensor
    scale: Tensor


class _Trial:
    """See `Trial`; ``found``: what the solver says of the step."""

    __slots__ = ("bad", "error", "extra", "found", "hopeless", "passed", "scale", "y")

    def __init__(self, found: Predicted, error: Tensor, scale: Tensor) -> None:
        self.found, self.error, self.scale, self.y, self.extra = found, error, scale, found.y, found.extra
        self.bad, self.passed, self.hopeless = ~found.solved, found.solved & (error <= 1.0), False

    def stages(self, who: Decision) -> Sequence[Tensor]:
        """See `Trial.stages`."""
        return self.found.slopes.unbind()

    def detach(self) -> None:
        """See `Trial.detach`: no solve of many is recorded."""


class MultistepSolver(Equations, ABC):
    """A multistep method at work: it holds the history of every trajectory, the first row of the table ``D`` (M, B, n) its state."""

    f: Callable[[Tensor, Tensor], Tensor]
    plan: Plan
    D: Tensor
    #: see `Stepper.rate`
    rate = 0.0

    @abstractmethod
    def start(self, anchors: Tensor, sign: Tensor, y0: Tensor) -> Tensor:
        """Begin at ``anchors[0]``; the size (positive) of the first step."""

    @abstractmethod
    def resize(self, factor: Tensor, which: Tensor) -> None:
        """The next step of some rows is to be ``factor`` as long as was said last."""

    @abstractmethod
    def predict(self, when: Tensor, h: Tensor, running: Tensor) -> Predicted:
        """A step of the ``running`` rows by ``h`` to where ``fun`` sees the time ``when``."""

    @abstractmethod
    def accept(self, found: Predicted, passed: Tensor, restart: Tensor, after: Tensor) -> None:
        """Take over the ``passed`` rows; ``after``: the time that ``fun`` sees at the start of the next step."""

    @abstractmethod
    def propose(self, found: Predicted, outcome: Outcome) -> Tensor:
        """Choose the next orders; the factors (B,) of the next sizes."""

    @property
    @abstractmethod
    def idle(self) -> Tensor:
        """``extra`` (E,) of no step."""

    # ---- a `Stepper`

    def enter(self, line: TimelineOfMany, y0: Tensor) -> None:
        """What is to be solved, from ``y0`` (B, n)."""
        self._line, self._y0 = line, y0
        self.scaled = torch.zeros_like(y0, dtype=self.plan.real)
        self._first = self.start(line.anchors, line.sign, y0)

    @property
    def y(self) -> Tensor:
        """See `Stepper.y`."""
        return self.D[0]

    def begin(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Stepper.begin`: nothing is done over a span of no length."""
        # nothing goes on from a state that is not finite: a step of no size says so at once
        broken = ~torch.isfinite(self._y0).all(-1)
        return torch.where(broken, 0.0, self._first), self._line.start != self._line.end, broken

    def fit(self, step: Tensor, h: Tensor, running: Tensor) -> Tensor:
        """See `Stepper.fit`."""
        size = h.abs()
        differs = running & (size != step)
        if not bool(differs.any()):
            return step
        self.resize(size / step, differs)
        return torch.where(differs, size, step)

    def attempt(self, step: Attempt) -> _Trial:
        """See `Stepper.attempt`."""
        plan, before = self.plan, self._line.jumps
        end = step.end.to(plan.real)
        when = shifted_times([end], [1.0], False, step.before, self._line.sign)[0] if before else end
        y, found = self.D[0], self.predict(when, step.h, step.running)
        scale = torch.maximum(found.y.abs(), y.abs())
        self.scaled = torch.where(step.running.unsqueeze(-1), plan.scaled(found.estimate, scale).abs(), self.scaled)
        return _Trial(found, plan.norm(self.scaled), scale)

    def follow(self, step: Attempt, trial: _Trial, size: Tensor, fate: Fate) -> Tensor:
        """See `Stepper.follow`."""
        accepted, _, _, going, landed = fate
        end, line, restart = step.end.to(self.plan.real), self._line, landed & going
        after = shifted_times([end], [0.0], step.before, False, line.sign)[0] if line.jumps else end
        self.accept(trial.found, accepted, restart, after)
        solved = trial.found.solved
        failed, rejected = step.running & ~solved, step.running & solved & ~trial.passed
        outcome = Outcome(going, accepted, failed, rejected, restart, trial.error, trial.scale)
        factor = self.propose(trial.found, outcome)
        changed = (factor != 1.0) & (going | restart)
        if not bool(changed.any()):
            return size
        self.resize(factor, changed)
        return torch.where(changed, size * factor, size)

    def evaluations(self, attempts: Tensor) -> Tensor:
        """See `Stepper.evaluations`: they are all in `work`."""
        return torch.zeros_like(attempts)


def solve_multistep(
    solver: MultistepSolver, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor] = ()
) -> Record:
    """Solve B trajectories; arguments as for `integrate`."""
    line = TimelineOfMany(plan, anchors)
    solver.enter(line, y0)
    return Walk(plan, line, t_eval, y0, inputs, solver.idle).solve(solver)
