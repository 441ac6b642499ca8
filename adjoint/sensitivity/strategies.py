"""The gradient strategies of this room, as small objects that users choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..integrate import Monitor, Record, Recording, integrate
from ..integrate.plan import Grid
from ..native.entry import Sought
from ..system.transforms import differentiated_again, functorch_active
from ..torch_internals import dual_level
from .checkpoints import CheckpointNode
from .equations import equations
from .finite import guarded
from .multistep import multistep_outputs
from .node import LookNode, Looks, SolveNode
from .padding import shelter
from .problem import GradientTraits, Outputs, Problem
from .replay import replay
from .sweep import look_at_fun

__all__ = ["Backprop", "DiscreteAdjoint"]

#: results that are differentiable, but for stages
_OUT = ("final", "samples", "states")
#: default of `DiscreteAdjoint.keep_bytes`
KEEP_BYTES = 32 * 2**20


@dataclass(frozen=True)
class DiscreteAdjoint(GradientTraits):
    """The exact derivative of the computed solution, by the adjoint of each step (docs/theory.md, section 1; Hager 2000, Sandu 2006).

    Memory: one state per step (and the stages of implicit methods and of "abm", not of "bdf" for ODEs; one trajectory by implicit methods:
    and some MiB, as its steps are linearised many at a time), whatever ``fun`` allocates. A solve so small that all of its evaluations fit
    into ``keep_bytes`` (default 32 MiB) is recorded by autograd as it goes, which saves evaluating ``fun`` again (one trajectory, no
    derivatives in times, no events, no dense output); one that grows beyond, or looks after its first steps as if it would, drops that.
    Zero: never. Step sizes are held fixed. Every order of derivative and every ``torch.func`` transform is available; derivatives of
    derivatives record the backward sweep.

    With "bdf", derivatives in the ends of the span (not those in anything else) are exact only to the error of the solution: the table
    from which the step that lands there is taken is held fixed.

    ``checkpoints``: at most so many states are kept between the solve and its backward pass and during it (stages of implicit methods:
    those of one step), the initial one included; the steps between them are taken again with their recorded sizes, as often as the
    optimal schedule asks (Griewank & Walther 2000): with c states, C(c + r, c) steps are each taken again at most r times. The
    gradient is the same to the last bit (one trajectory by implicit methods, and with ``compile=True``: to rounding; stages that are
    iterated for: to the tolerance of that). Times and sizes of the steps are still kept, a few numbers each. Forward mode, ``torch.func``
    and derivatives of derivatives keep all states. Not with ``events=``, ``dense_output=True``, ``t_eval="steps"``, `solve_dae`, and the
    methods "bdf" and "abm", whose stages are kept (`UnsupportedCombination`).
    """

    keep_bytes: int | None = None
    checkpoints: int | None = None

    def __post_init__(self) -> None:
        if self.keep_bytes is not None and (not isinstance(self.keep_bytes, int) or self.keep_bytes < 0):
            raise InvalidInput(f"keep_bytes must be a number of bytes, zero or more, or None, got {self.keep_bytes!r}")
        count = self.checkpoints
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise InvalidInput(f"checkpoints must be a number of states, one or more, or None, got {count!r}")
        if count is not None and self.keep_bytes:
            raise InvalidInput("checkpoints= bounds the memory of a solve, keep_bytes= spends it: give one of the two")

    @property
    def takes_events(self) -> bool:
        """See `GradientTraits.takes_events`."""
        return self.checkpoints is None

    @property
    def goes_by_steps(self) -> bool:
        """See `GradientTraits.goes_by_steps`."""
        return True

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        plan = problem.plan
        if self.checkpoints is not None and plan.keep_states:
            if plan.results_of_steps:
                raise UnsupportedCombination(
                    "DiscreteAdjoint(checkpoints=...) does not keep the states and stages that events=, dense_output=True, "
                    "t_eval='steps' and solve_dae give back: leave checkpoints out"
                )
            if plan.method.multistep:
                raise UnsupportedCombination(
                    f"DiscreteAdjoint(checkpoints=...) takes steps again one by one, which {plan.method.name!r} cannot: choose a one-step "
                    f"method such as {'kvaerno5' if plan.method.implicit else 'dopri8'!r}, or leave checkpoints out"
                )
            if not functorch_active() and dual_level() < 0:
                return Outputs(*CheckpointNode.apply(problem, self.checkpoints, anchors, t_eval, y0, *inputs))
            return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))
        problem = _decided(problem, anchors, t_eval, y0, inputs)
        plan = problem.plan
        observed = type(plan.monitor).adjoint is not Monitor.adjoint
        budget = KEEP_BYTES if self.keep_bytes is None else self.keep_bytes
        small = budget > 0 and not plan.keep_stages and not plan.events and not observed and plan.compile is None
        if small and _recordable(problem, anchors, t_eval, y0, inputs):
            recording = Recording(budget, plan.method.evaluations, inputs)
            record = _recorded(problem, anchors, t_eval, y0, inputs, recording)
            if recording.on:
                problem.reported(record, inputs)
                return _watched(problem, Outputs.of(record), anchors, y0, inputs)
            problem = replace(problem, known=[record])
            del record
        return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))


@dataclass(frozen=True)
class Backprop(GradientTraits):
    """Plain automatic differentiation through the accepted steps (step sizes held fixed).

    Memory: everything that ``fun`` saves, for every stage of every step. For one trajectory and reverse mode the steps are recorded as
    they are taken. For batches, for derivatives in times, with ``compile=True`` and under transforms they are found by a first solve
    without derivatives, then taken again with them, so ``fun`` is evaluated about twice as often as in a plain solve.
    """

    @property
    def goes_by_steps(self) -> bool:
        """See `GradientTraits.goes_by_steps`."""
        return True

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        problem = _decided(problem, anchors, t_eval, y0, inputs)
        if problem.plan.compile is None and _recordable(problem, anchors, t_eval, y0, inputs):
            record = _recorded(problem, anchors, t_eval, y0, inputs)
            problem.reported(record, inputs)
            return _watched(problem, Outputs.of(record), anchors, y0, inputs)
        grid = Outputs(*SolveNode.apply(replace(problem, replayed=True), anchors, t_eval, y0, *inputs))
        if not problem.plan.keep_states or not problem.derivatives:
            return grid
        if problem.plan.method.multistep:
            return _watched(problem, multistep_outputs(problem, grid, anchors, t_eval, y0, inputs), anchors, y0, inputs)
        safe = shelter(problem, Grid.of(grid).mapped(Tensor.detach), t_eval, inputs)
        problem, inputs = safe.problem, safe.inputs
        f, y0 = guarded(problem, problem.system.bind(inputs), anchors, t_eval, y0, inputs)
        if problem.algebra is None:
            return _watched(problem, replay(lambda k: f, problem.plan, grid, anchors, t_eval, y0), anchors, y0, inputs)
        stages = safe.grid.stages
        found = replay(lambda k: equations(problem, inputs, stages[k]), problem.plan, grid, anchors, t_eval, y0)
        return _watched(problem, found, anchors, y0, inputs)


def _recorded(
    problem: Problem,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
    recording: Recording | None = None,
) -> Record:
    """The solve of one trajectory under autograd."""
    system, witness = problem.system, problem.witness
    f = system.bind(inputs)
    if recording is not None:
        # it may have to be evaluated again
        f = witness.watch(f, lambda: system.bind(inputs))
    f, y0 = guarded(problem, f, anchors, t_eval, y0, inputs)
    with torch.enable_grad():
        beside = problem.beside(inputs, y0.shape[0])
        record = integrate(f, problem.plan, anchors, t_eval, y0, False, inputs, system.natural_shape, recording, beside)
    witness.settle()
    return record



def _watched(problem: Problem, found: Outputs, anchors: Tensor, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
    """What autograd has recorded, looked at before derivatives of its derivatives are taken, and, with roots in it, on every way back."""
    system, t, smooth = problem.system, anchors[0].to(problem.plan.real), [i for i, x in enumerate(inputs) if x.requires_grad]
    # once, however many results and ways back there are
    look = None if system.residual is not None else cache(lambda: look_at_fun(system, t, y0, inputs, smooth))
    if functorch_active() or dual_level() >= 0:
        if look is not None and differentiated_again([y0, *inputs]):
            look()
        return found
    looks = Looks(look, problem.witness if problem.rooted else None)
    seen = {name: LookNode.apply(looks, x) for name in _OUT if (x := getattr(found, name)).requires_grad}
    return found._replace(**seen)


def _decided(problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Problem:
    """Where there will be no compiled code, and autograd may record the loop, the problem without ``compile=``: solved as without it."""
    plan = problem.plan
    if plan.compile is None or not _recordable(problem, anchors, t_eval, y0, inputs):
        return problem
    if problem.native.ready(Sought(plan, problem.system, problem.batched, inputs, y0, anchors)):
        return problem
    return replace(problem, plan=replace(plan, compile=None))


def _recordable(problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether plain autograd can record the loop itself: its times are floats, so they must not need derivatives."""
    times = [anchors] if t_eval is None else [anchors, t_eval]
    plain = not functorch_active() and dual_level() < 0 and torch.is_grad_enabled()
    wanted = any(x.requires_grad for x in (y0, *inputs)) and not any(x.requires_grad for x in times)
    one_step = problem.algebra is None and not problem.plan.method.multistep
    return plain and wanted and not problem.batched and one_step
