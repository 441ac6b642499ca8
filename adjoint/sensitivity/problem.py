"""What a strategy is given (`Problem`) and what it gives back (`Outputs`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..integrate import (
    AdamsSolver,
    AdditiveStageSolver,
    BdfSolver,
    Plan,
    Record,
    ResidualSolver,
    StageSolver,
    integrate,
    shifted_times,
    too_long,
)
from ..integrate.companion import Beside, displaced
from ..integrate.stages import TOLERANCE
from ..integrate.stepper import StageWork
from ..linalg import DenseLU, LinearSolver
from ..native.entry import NativeSolve, Sought
from ..system.capture import is_differentiable, listed
from ..system.jacobians import DenseJacobian, JacobianStrategy
from ..system.stage_jacobian import StageJacobian
from ..system.structure import Structure
from ..system.system import System, VmappedSystem
from ..system.transforms import anywhere
from ..system.witness import Witness
from .lost_rates import tell_of_lost_rates
from .standing import longest_step
from .undeclared import REJECTED, tell_of_jumps, tell_of_jumps_at_ends

__all__ = [
    "Gradient",
    "Outputs",
    "Problem",
    "StageAlgebra",
    "StepTimes",
    "interpolate",
    "interpolate_slopes",
    "kept_steps",
    "stage_times",
    "step_times",
]


#: of the iterations of companions, whose differences are looked at
_FINE = 1e-6


@dataclass(frozen=True)
class StageAlgebra:
    """How matrices of implicit stages are made, and what factorises them."""

    jacobian: JacobianStrategy = field(default_factory=DenseJacobian)
    linear_solver: LinearSolver = field(default_factory=DenseLU)
    #: for implicit equations: the index of every variable, and those that the error test leaves out; see `ResidualSolver`
    index: Tensor | None = None
    skipped: Tensor | None = None
    structure: Structure | None = None


@dataclass(frozen=True)
class Problem:
    """A solve without its differentiable tensors.

    ``batched``: whether rows are trajectories with their own steps. ``report`` sees the record of every forward solve
    (it raises the named errors), and the numbers of function evaluations of every backward sweep through ``backward_report``.
    ``known``: the solution, where it is there already; taken out by its first user. ``algebra``: for implicit methods, how their
    matrices are made and factorised. ``sweep``: how first derivatives are taken, with the arguments of `discrete.eager_sweep`, which is
    the default; whatever differentiates derivatives or is under a transform goes through the recorded steps. ``witness``: remembers some
    evaluations, to be compared on the way back. ``replayed``: whether the node gives
    the steps alone, and derivatives are those of the same steps taken once more outside of it.
    """

    system: System | VmappedSystem
    plan: Plan
    batched: bool
    report: Callable[[Record], None]
    backward_report: Callable[[int, int], None]
    known: list[Record] | None = None
    algebra: StageAlgebra | None = None
    sweep: Callable[..., tuple[Tensor | None, ...]] | None = None
    witness: Witness = field(default_factory=Witness)
    #: whether somebody may differentiate; states may be kept for other reasons
    derivatives: bool = True
    #: the solve by compiled code, and what its way back needs
    native: NativeSolve = field(default_factory=NativeSolve)
    replayed: bool = False
    #: (B,): trajectories that take no part, whose spans have no length and whose times are constants
    idle: Tensor | None = None

    def run(self, inputs: Sequence[Tensor], y0: Tensor, anchors: Tensor, t_eval: Tensor | None) -> Record:
        """The solve itself, some of whose evaluations the witness remembers."""
        seen = self.plan.keep_states or self.witness.wanted
        record = self.solved(inputs, y0, anchors, t_eval, seen)
        if self.constrained and self.derivatives:
            longest = longest_step(self.system, self.plan, record, inputs)
            if longest is not None:
                record = replace(self, plan=replace(self.plan, max_step=longest)).solved(inputs, y0, anchors, t_eval, seen)
        return record

    def solved(self, inputs: Sequence[Tensor], y0: Tensor, anchors: Tensor, t_eval: Tensor | None, seen: bool = False) -> Record:
        """The solve alone, by compiled code where that can be; ``seen``: by the witness."""
        plan = self.plan
        if plan.compile is not None:
            sought = Sought(plan, self.system, self.batched, inputs, y0, anchors)
            record = self._by_native(sought, t_eval)
            if record is not None:
                self._note(record, sought)
                return record
        f = self.solver(inputs, y0.shape[0], seen)
        shape = self.system.natural_shape
        record = integrate(f, plan, anchors, t_eval, y0, self.batched, inputs, shape, beside=self.beside(inputs, y0.shape[0]))
        if seen:
            self.witness.settle()
        return record

    def reported(self, record: Record, inputs: Sequence[Tensor], moving: Tensor | None = None) -> None:
        """A word on jumps that were met and on rates that are lost to derivatives, and the named error of a solve that failed. ``moving``:
        the anchors, where times are differentiated."""
        native = self.native.recognised
        algebra = self.algebra if self.derivatives and (self.plan.keep_states or self.plan.keep_grid) else None
        if algebra is not None and (native is None or native.program.rates.due()):
            tell_of_lost_rates(self.system, self.plan, record, inputs, self.jacobian(inputs), algebra.linear_solver)
        if moving is not None and (native is None or native.program.ends.due()):
            tell_of_jumps_at_ends(self.system, self.plan, record, inputs, moving)
        doubtful = len(record.states) > 3 and int(record.n_rejected.max()) >= REJECTED
        if doubtful and (native is None or native.program.looks.due()):
            tell_of_jumps(self.system, self.plan, record, inputs, None if self.algebra is None else self.algebra.structure)
        self.report(record)

    def _by_native(self, sought: Sought, t_eval: Tensor | None) -> Record | None:
        """The solve by compiled code, None where it cannot be. Of trajectories whose steps do not bear derivatives it is another one."""
        derivatives = self.derivatives and (self.plan.keep_states or self.plan.keep_grid)
        index, skipped = (None, None) if self.algebra is None else (self.algebra.index, self.algebra.skipped)
        inputs, y0 = sought.inputs, sought.y0
        idle = self.idle if self.idle is not None and len(self.idle) == len(y0) else None
        solved = self.native.forward(sought, t_eval, derivatives, index, skipped, idle)
        made = self.beside(inputs, y0.shape[0]) if derivatives else None
        if solved is None or made is None:
            return None if solved is None else solved[0]
        record, doubtful = solved
        if self.plan.method.multistep:
            doubtful, count = too_long(made(False), self.plan, record, y0)
            record = replace(record, n_fun=record.n_fun + count)
        else:
            resting = self.native.resting(sought, record)
            if resting is None:
                return None
            doubtful = doubtful | resting
        return self.native.for_derivatives(sought, t_eval, record, doubtful) if bool(doubtful.any()) else record

    def _note(self, record: Record, sought: Sought) -> None:
        """Let the witness know ``fun`` at a step of a solve by compiled code, at a few where the way back will not be by that."""
        steps = len(record.states) - 1
        if not self.derivatives or steps < 1:
            return
        which = sorted({steps // 2} if self.sweep is None else {0, steps // 2, steps - 1})
        asked = self.native.witnessed(sought, record, which)
        if asked is not None:
            return self.witness.add(asked)
        f = self._watched(self.system, sought.inputs)
        with torch.no_grad():
            for k in which:
                f(record.t[k].to(self.plan.real), record.states[k])
                self.witness.settle()

    @property
    def constrained(self) -> bool:
        """Whether not every state near that of the solve has a slope."""
        return self.system.residual is not None or self.system.mass is not None

    def beside(self, inputs: Sequence[Tensor], rows: int) -> Beside | None:
        """See `Companion`: where derivatives are wanted, and every state near that of the solve has a slope."""
        plan = self.plan
        if not self.derivatives or not (plan.keep_states or plan.keep_grid) or self.constrained:
            return None

        def made(moved: bool) -> Any:
            given = [displaced(x) for x in inputs] if moved else inputs
            f = self.system.bind(given)
            multistep = plan.method.multistep
            return f if self.algebra is None or multistep else self._equations(f, given, rows, lambda system, x: system.bind(x), _FINE)

        return made

    def solver(self, inputs: Sequence[Tensor], rows: int, seen: bool = False) -> Any:
        """The right-hand side for the loop, which solves the equations of implicit stages by iteration; ``seen``: by the witness."""
        bound = self._watched if seen else lambda system, given: system.bind(given)
        f = bound(self.system, inputs)
        if self.algebra is None and self.plan.method.multistep:
            return AdamsSolver(f, self.plan, rows, self.system.spec.device)
        if self.algebra is None:
            return f
        a, device = self.algebra, self.system.spec.device
        implicit = self.system.residual is not None
        if not implicit and not self.plan.method.multistep:
            return self._equations(f, inputs, rows, bound)
        jacobian = self.jacobian(inputs, forward=True)
        if self.plan.method.multistep:
            alone = not (implicit or self.batched)
            work = StageWork.zero(None if alone else rows, device)
            starter = ResidualSolver(f, self.plan, jacobian, a.linear_solver, rows, device, a.index, a.skipped) if implicit else None
            if starter is not None:
                starter.work = work
            return BdfSolver(f, self.plan, jacobian, a.linear_solver, implicit, work, starter, a.skipped, alone)
        return ResidualSolver(f, self.plan, jacobian, a.linear_solver, rows, device, a.index, a.skipped)

    def _equations(self, f: Any, inputs: Sequence[Tensor], rows: int, bound: Callable[..., Any], tolerance: float = TOLERANCE) -> Any:
        """Those of the stages of an implicit one-step method; ``bound``: how systems are bound to inputs."""
        assert self.algebra is not None
        device = self.system.spec.device
        given = self.plan, self.jacobian(inputs, forward=True), self.algebra.linear_solver
        if self.plan.method.additive:
            explicit, implicit = (bound(part, inputs) for part in self.system.parts)
            return AdditiveStageSolver(explicit, implicit, *given, rows, device, tolerance)
        return StageSolver(f, *given, None if self.alone else rows, device, tolerance, mass_matrix=self.system.mass_matrix(inputs))

    def _watched(self, system: System | VmappedSystem, inputs: Sequence[Tensor]) -> Any:
        return self.witness.watch(system.bind(inputs), lambda: system.bind(inputs))

    @property
    def rooted(self) -> bool:
        """Whether what autograd records of the steps holds roots, which evaluate ``fun`` again when they are gone back through."""
        return self.algebra is not None and not self.plan.method.needs_time_slope

    @property
    def alone(self) -> bool:
        """Whether the steps are those of the loop for one trajectory, whose sizes are numbers."""
        if self.algebra is None or not self.for_one:
            return self.for_one
        method = self.plan.method
        special = method.multistep or method.additive
        return not special and self.system.mass is None

    @property
    def for_one(self) -> bool:
        """Whether there is one trajectory, of an explicit equation."""
        return not self.batched and isinstance(self.system, System) and self.system.residual is None

    def jacobian(self, inputs: Sequence[Tensor], forward: bool = False) -> JacobianStrategy:
        """How Jacobians of stages are made, for these inputs; ``forward``: in the steps, not in derivatives."""
        assert self.algebra is not None
        strategy = self.algebra.jacobian
        return strategy.bound(self.system, inputs, forward) if isinstance(strategy, StageJacobian) else strategy


class Outputs(NamedTuple):
    """The record's tensors; the first four are differentiable. Shapes as in `Record`, but for the events.

    Those stand in a table, one line for the first, second ... time that an event function is zero, as many as the trajectory with most
    of them needs, so that shapes do not depend on where each trajectory has its own: ``event_id`` (L,) says which function a line is
    of, ``event_step`` (L, B) in which step, -1 for none, and ``event_t`` (L, B) when, NaN for none.
    """

    final: Tensor
    samples: Tensor
    states: Tensor
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
    event_step: Tensor
    event_t: Tensor
    n_jac: Tensor
    n_factorizations: Tensor
    n_solves: Tensor
    n_newton: Tensor
    extra: Tensor

    @classmethod
    def of(cls, record: Record) -> Outputs:
        """The outputs of a solve."""
        table = event_table(record)
        return cls(*(table[name] if name in table else getattr(record, name) for name in cls._fields))


def event_table(record: Record) -> dict[str, Tensor]:
    """The fields of `Outputs` about events."""
    kind, row, rows = record.event_id, record.event_row, record.t.shape[1]
    if not kind.numel():
        return {"event_id": kind, "event_step": kind.new_empty((0, rows)), "event_t": record.event_t.new_empty((0, rows))}
    # events of a trajectory are recorded in the order of time: the k-th of its kind is the k-th in a stable order by kind and trajectory
    key = kind * rows + row
    ordered, order = torch.sort(key, stable=True)
    rank = torch.empty_like(key)
    rank[order] = torch.arange(key.numel(), device=key.device) - torch.searchsorted(ordered, ordered)
    most = torch.zeros(int(kind.max()) + 1, dtype=kind.dtype, device=kind.device).scatter_reduce(0, kind, rank + 1, "amax")
    event_id = torch.repeat_interleave(torch.arange(most.numel(), device=kind.device), most)
    line = (most.cumsum(0) - most)[kind] + rank
    step = record.event_step.new_full((event_id.numel(), rows), -1)
    t = record.event_t.new_full((event_id.numel(), rows), float("nan"))
    step[line, row], t[line, row] = record.event_step, record.event_t
    return {"event_id": event_id, "event_step": step, "event_t": t}


@runtime_checkable
class Gradient(Protocol):
    """A gradient strategy: how a solve is made differentiable. What more it says of itself stands in `GradientTraits`."""

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """Solve with outputs that are differentiable in ``anchors`` (A, B), ``t_eval`` (T, B), ``y0`` (B, n) and ``inputs``."""
        ...


class GradientTraits:
    """What a strategy may say of itself beside `Gradient.solve`, by deriving from this."""

    @property
    def takes_events(self) -> bool:
        """Whether it differentiates solves with ``events=``."""
        return True

    @property
    def goes_by_steps(self) -> bool:
        """Whether derivatives are those that autograd takes through explicit steps, by one cotangent of each evaluation of ``fun``."""
        return False


class StepTimes(NamedTuple):
    """The discretisation as functions of the anchors: ``(K, B)`` starts and sizes, and the jump flags of each step or None."""

    t: Tensor
    h: Tensor
    jump_start: Tensor | None
    jump_end: Tensor | None
    sign: Tensor

    def step(self, k: int, count: int = 1) -> StepTimes:
        """Those of one step, or of so many from it on."""
        part = slice(k, k + count)
        jumps = [None if x is None else x[part] for x in (self.jump_start, self.jump_end)]
        return StepTimes(self.t[part], self.h[part], jumps[0], jumps[1], self.sign)

    def anew(self, k: int) -> Tensor | None:
        """The rows ``(B,)`` in which step ``k`` begins behind a jump; None where there are no jumps."""
        return None if self.jump_start is None else self.jump_start[k]


def step_times(t: Tensor, h: Tensor, segment: Tensor, lands: Tensor, anchors: Tensor, shift: str = "inner") -> StepTimes:
    """Starts and sizes of the steps, with their derivatives in the anchors.

    Step sizes are held fixed: a step starts at its anchor plus a constant, and only a step that lands on the next anchor changes its
    size with it. ``shift`` is that of the `Plan`.
    """
    if is_differentiable(anchors):
        moved = anchors - anchors.detach()
        at = moved.gather(0, segment)
        then = moved.gather(0, (segment + 1).clamp(max=anchors.shape[0] - 1))
        t = t + at
        h = h + torch.where(lands, then - at, 0.0)
    sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0).detach()
    if shift == "all":
        every = torch.ones_like(lands)
        return StepTimes(t, h, every, every, sign)
    if anchors.shape[0] == 2 or shift == "none":
        return StepTimes(t, h, None, None, sign)
    first = torch.cat([torch.zeros_like(segment[:1]), segment[:-1]])
    jump_start = segment > first
    return StepTimes(t, h, jump_start, lands & (segment < anchors.shape[0] - 2), sign)


def stage_times(plan: Plan, grid: StepTimes, real: torch.dtype) -> list[list[Tensor]]:
    """Times of all stages of all steps, ``(B,)`` each."""
    nodes = plan.method.nodes
    t, h = grid.t.unsqueeze(1), grid.h.unsqueeze(1)
    times = (t + h * h.new_tensor(nodes).unsqueeze(-1)).to(real)
    rows = [list(row.unbind()) for row in times.unbind()]
    if grid.jump_start is None or grid.jump_end is None:
        return rows
    return [shifted_times(row, nodes, grid.jump_start[k], grid.jump_end[k], grid.sign) for k, row in enumerate(rows)]


def kept_steps(plan: Plan, event_step: Tensor, n_steps: int) -> list[int]:
    """Steps whose stages are among the outputs, in order."""
    if plan.keep_stages:
        return list(range(n_steps))
    return sorted({step for step in listed(event_step.reshape(-1)) if step >= 0}) if plan.events else []


def interpolate(plan: Plan, states: Tensor, stages: Tensor, t: Tensor, h: Tensor, t_eval: Tensor, sample_step: Tensor) -> Tensor:
    """Dense output at ``t_eval`` (T, B), as plain differentiable tensor code; NaN where ``sample_step`` is negative."""
    index = sample_step.clamp(min=0)
    n_samples, rows = sample_step.shape
    n, n_stages = states.shape[-1], stages.shape[1]
    if not h.shape[0]:
        # over a span of no length that takes no step there is the first state
        return torch.where((sample_step >= 0).unsqueeze(-1), states[:1].expand(n_samples, rows, n), float("nan"))
    h_k = h.gather(0, index)
    empty = h_k == 0
    h_k = torch.where(empty, 1.0, h_k)
    theta = (t_eval - t.gather(0, index)) / h_k
    y = states.gather(0, index.unsqueeze(-1).expand(-1, -1, n))
    ks = stages.gather(0, index[:, None, :, None].expand(n_samples, n_stages, rows, n))
    weights = plan.method.dense_weights(theta) * h_k.unsqueeze(-1)
    if anywhere(empty):
        # over a span of no length it goes on by the slope of the whole step: an end that moves has its second derivative
        weights = torch.where(empty.unsqueeze(-1), theta.unsqueeze(-1) * plan.method.dense_weights(torch.ones_like(theta)), weights)
    weights = weights.to(states.dtype)
    value = y + torch.einsum("tbs,tsbn->tbn", weights, ks)
    return torch.where((sample_step >= 0).unsqueeze(-1), value, float("nan"))


def interpolate_slopes(plan: Plan, stages: Tensor, t: Tensor, h: Tensor, t_eval: Tensor, sample_step: Tensor) -> Tensor:
    """The derivative of the dense output at ``t_eval`` (T, B); NaN where ``sample_step`` is negative."""
    index = sample_step.clamp(min=0)
    n_samples, rows = sample_step.shape
    n_stages, n = stages.shape[1], stages.shape[-1]
    h_k = h.gather(0, index)
    theta = (t_eval - t.gather(0, index)) / torch.where(h_k == 0, 1.0, h_k)
    ks = stages.gather(0, index[:, None, :, None].expand(n_samples, n_stages, rows, n))
    value = torch.einsum("tbs,tsbn->tbn", plan.method.dense_slopes(theta).to(stages.dtype), ks)
    return torch.where((sample_step >= 0).unsqueeze(-1), value, float("nan"))
