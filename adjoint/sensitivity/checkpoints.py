"""The discrete adjoint in bounded memory: few states are kept, and the steps between them are taken again with their recorded sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import SolveError
from ..integrate import Monitor, StageSolver
from ..integrate.numbers import widened
from ..integrate.plan import Grid
from ..integrate.schedule import Schedule
from ..system.capture import alive
from ..system.ownership import continuing, owned
from ..system.system import System
from ..system.transforms import functorch_active, naming_writes
from ..system.witness import CHANGED, differs
from ..torch_internals import Node, copy_by_copy
from .asked import Asked
from .discrete import eager_sweep
from .finite import tell_not_finite
from .native_sweep import by_native
from .node import SolveNode
from .padding import padding, shelter
from .problem import Outputs, Problem, StepTimes, stage_times, step_times
from .products import vjp
from .replay import first_slope, hands_on

__all__ = ["CheckpointNode", "Recall"]

_GRID = ("t", "h", "segment", "lands", "sample_step", "status", "event_step")
_DIFFERENTIABLE = 2


class Recall:
    """The states at the starts of all steps, asked for from the last one to the first; at most ``slots`` of them exist at a time.

    Steps are taken again as the loop took them: same code, sizes, times and layout of states, so the values are the same to the last bit.

    Parameters
    ----------
    grid : what `shelter` makes of the recorded steps
    times : start, size and jumps of the steps
    y0 : (B, n)
    slots : how many states are kept, the first included
    """

    def __init__(self, problem: Problem, grid: Grid, times: StepTimes, inputs: Sequence[Tensor], y0: Tensor, slots: int) -> None:
        plan = self.plan = problem.plan
        self.times, self.flat, self.iterated = times, y0.shape, problem.algebra is not None
        self.alone = problem.alone
        shape = problem.system.natural_shape if self.alone else None
        if shape is not None and problem.algebra is not None and len(shape) != 1:
            shape = None
        # as in the first solve: the iterations of a step begin without what the steps before it left behind
        self.f = replace(problem, plan=replace(plan, keep_grid=True)).solver(inputs, y0.shape[0])
        if self.alone and problem.algebra is not None:
            # as the loop has them: see `OneStepOfOne`
            self.sizes: Any = grid.h[:, 0].to(plan.real).unbind()
        elif self.alone:
            self.sizes = grid.h[:, 0].tolist()
        else:
            self.sizes = grid.h.to(plan.real).unsqueeze(-1).unbind()
        self.padded = self.sizes if self.alone else grid.size.to(plan.real).unsqueeze(-1).unbind()
        #: of steps the state at their start and, of methods that hand their last slope on, that of the step before
        self.schedule: Schedule[tuple[Tensor, Tensor | None]] = Schedule((y0 if shape is None else y0.reshape(shape), None), slots)
        # where steps that do nothing are looked at: see `shelter`
        self.moved, pad = grid.moved, padding(grid)
        self.first = y0 if pad is None else pad.first(y0)
        self._chained = hands_on(plan)
        #: steps taken again
        self.n_steps = 0
        self.stages = _Slopes(self, (len(grid.t), len(plan.method.nodes), *self.flat), y0)

    moved: Tensor | None = None

    def __getitem__(self, k: int) -> Tensor:
        """The state at the start of step ``k``, as the steps carry it; ``k`` must not grow from call to call."""
        y = self.start(k)[0]
        return y if self.moved is None else torch.where(self.moved[k].unsqueeze(-1), self.first, y)

    def start(self, k: int) -> tuple[Tensor, Tensor | None]:
        """What step ``k`` is taken from: the state, of a trajectory that is done its end, and the slope that it was handed."""
        return self.schedule.start(k, self._advance)

    def _advance(self, start: tuple[Tensor, Tensor | None], k: int, stop: int) -> tuple[Tensor, Tensor | None]:
        y, slope = start
        for i in range(k, stop):
            y, ks, _ = self.take(i, y, slope)
            slope = ks[-1] if self._chained else None
        return y, slope

    def take(self, k: int, y: Tensor, slope: Tensor | None = None, padded: bool = False) -> tuple[Tensor, list[Tensor], Sequence[Tensor]]:
        """Step ``k`` from what `start` gives: the new state, the stages, and their times. ``padded``: with the steps that stand in for
        those of trajectories that are done or have failed."""
        self.n_steps += 1
        method, h = self.plan.method, self.size(k, y, padded)
        at = stage_times(self.plan, self.times.step(k), self.plan.real)[0]
        with torch.no_grad():
            if self.alone:
                # without an axis of trajectories, as in the loop
                at = [x.reshape(()) for x in at]
            anew = self.times.anew(k)
            if padded and self.moved is not None and slope is not None:
                # these begin elsewhere
                anew = self.moved[k] if anew is None else anew | self.moved[k]
            if self.alone and anew is not None:
                slope, anew = None if bool(anew) else slope, None
            y1, ks = method.step(self.f, at, h, y, first_slope(self.f, at[0], y, None if slope is None else (slope, anew)))
            if not self.alone:
                # steps of size zero belong to trajectories that are done
                y1 = torch.where(h == 0, y, y1)
        return y1, ks, at

    def size(self, k: int, y: Tensor, padded: bool = False) -> Any:
        """The size of step ``k`` as the loop had it."""
        h = self.padded[k] if padded else self.sizes[k]
        return h if self.alone or self.plan.method.implicit else widened(h, y.shape[-1])

    def check(self, final: Tensor, status: Tensor) -> None:
        """Raise if the last step does not lead to the end that was computed: `fun` is then no function of its arguments."""
        last = len(self.times.t) - 1
        if last < 0:
            return
        plan, found = self.plan, self.take(last, *self.start(last))[0].reshape(self.flat)
        off = plan.norm(plan.scaled((found - final).abs(), final.abs()))
        # a trajectory that ended elsewhere, or nowhere, is not compared
        wrong = (~(off <= 1.0) & (status >= 0)).any()
        if not self.iterated:
            # the very same numbers, but for kernels that add in another order
            wrong = wrong | differs(torch.where((status >= 0).unsqueeze(-1), found, final), final)
        if bool(wrong):
            raise SolveError(f"DiscreteAdjoint(checkpoints=...) takes steps again, and they did not lead to the same state: {CHANGED}")

    @property
    def n_fun(self) -> int:
        """Evaluations of ``fun`` for the steps taken again."""
        method = self.plan.method
        own = (1 + method.evaluations - method.error_uses_end) * self.n_steps
        iterated = torch.as_tensor(self.f.work.n_fun if isinstance(self.f, StageSolver) else 0)
        return own + (int(iterated.max()) if iterated.numel() else 0)


class _Slopes:
    """The recorded slopes of implicit stages, ``(K, S, B, n)``, of which those of one step exist at a time."""

    def __init__(self, recall: Recall, shape: tuple[int, ...], like: Tensor) -> None:
        self.recall, self.shape, self.dtype, self.device = recall, shape, like.dtype, like.device
        self._k, self._value = -1, like

    def __getitem__(self, k: int) -> Tensor:
        if k != self._k:
            recall = self.recall
            y, slope = recall[k], recall.start(k)[1]
            _, ks, at = recall.take(k, y, slope, padded=True)
            with torch.no_grad():
                stages: Any = recall.plan.method.dense_stages(recall.f, at, recall.size(k, y, padded=True), y, ks)
            self._k, self._value = k, torch.stack(stages).reshape(-1, *recall.flat)
        return self._value


class CheckpointNode(Node):
    """As `SolveNode`, with a grid of times and no states; ``apply(problem, slots, anchors, t_eval, y0, *inputs)``.

    For plain reverse mode. Derivatives of derivatives solve again with all states kept.
    """

    @staticmethod
    def forward(problem: Problem, slots: int, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        # where constraints are, the states tell whether the steps bear derivatives, and are dropped then
        plan = replace(problem.plan, keep_states=problem.constrained, keep_stages=False, keep_grid=True)
        with torch.autocast(y0.device.type, enabled=False):
            record = replace(problem, plan=plan).run(inputs, y0, anchors, t_eval)
        problem.reported(record, inputs, anchors if anchors.requires_grad else None)
        return tuple(Outputs.of(replace(record, states=record.states[:0])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, ctx.slots, anchors, t_eval, y0, *rest = inputs
        ctx.problem = owned(problem)
        system = problem.system
        ctx.has_samples = t_eval is not None
        # saved tensors come back as new objects: functions that captured the old ones need those
        ctx.own = isinstance(system, System) and all(x is y for x, y in zip(rest, system.inputs, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[_DIFFERENTIABLE:])
        out = Outputs(*output)
        grid = [getattr(out, name) for name in _GRID]
        # steps are taken again from the state of the solve, whatever is written into the user's
        ctx.save_for_backward(y0.detach().clone(), out.final, *grid, y0, anchors, *([t_eval] if t_eval is not None else []), *rest)

    @staticmethod
    @copy_by_copy
    @naming_writes
    @continuing("problem")
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem = ctx.problem()
        start, final, *saved = alive(ctx.saved_tensors)
        kept = dict(zip(_GRID, saved[: len(_GRID)], strict=True))
        y0, anchors, *rest = saved[len(_GRID) :]
        t_eval = rest.pop(0) if ctx.has_samples else None
        wants = ctx.needs_input_grad[2:]
        bars = cotangents[:_DIFFERENTIABLE]
        with torch.autocast(y0.device.type, enabled=False):
            if torch.is_grad_enabled() or functorch_active():
                return (None, None, *ctx.problem.let_out(_with_all_states(problem, (anchors, t_eval, y0, *rest), bars, wants)))
            inputs = problem.system.inputs if ctx.own else rest
            nothing = start.new_empty(0)
            grid = Grid(states=start.unsqueeze(0), stages=nothing, extra=nothing, **kept)
            asked = Asked(problem, grid, anchors, t_eval, inputs, (*bars, None, None), wants)
            native = problem.native.recognised is not None
            found = by_native(asked, ctx.slots) if native else None
            if found is None:
                safe = shelter(problem, grid, t_eval, inputs).grid
                times = step_times(safe.t, safe.h, safe.segment, safe.lands, anchors.detach(), problem.plan.shift)
                recall = Recall(problem, safe, times, inputs, start, ctx.slots)
                if not native:
                    recall.check(final.detach(), grid.status)
                found = eager_sweep(asked, recall)
                problem.backward_report(recall.n_fun, 0)
            if not asked.sound(found):
                tell_not_finite(problem, Grid.of(problem.run(inputs, start, anchors.detach(), t_eval)), inputs, found[2])
            return (None, None, *found)


def _with_all_states(
    problem: Problem, tensors: Sequence[Tensor | None], bars: Sequence[Tensor | None], wants: Sequence[bool]
) -> list[Tensor | None]:
    """Cotangents that can be differentiated again, by way of the solve with all states kept."""
    plan, native = replace(problem.plan, monitor=Monitor()), problem.native.part()
    full = replace(problem, plan=plan, native=native, report=lambda record: None)
    places = [i for i, want in enumerate(wants) if want]
    out: list[Tensor | None] = [None] * len(tensors)

    def solve(*some: Tensor) -> tuple[Tensor, ...]:
        everything: list[Any] = list(tensors)
        for i, x in zip(places, some, strict=True):
            everything[i] = x
        return tuple(SolveNode.apply(full, *everything)[:_DIFFERENTIABLE])

    wanted = [x for i in places if (x := tensors[i]) is not None]
    if functorch_active():
        values, pull = vjp(solve, *wanted)
        found: Sequence[Tensor | None] = pull(tuple(torch.zeros_like(v) if b is None else b for v, b in zip(values, bars, strict=True)))
    else:
        # views, because one of these tensors may be a function of another
        views = [x.view_as(x) for x in wanted]
        pairs = [(v, b) for v, b in zip(solve(*views), bars, strict=True) if b is not None]
        found = torch.autograd.grad([v for v, _ in pairs], views, [b for _, b in pairs], create_graph=True, allow_unused=True)
    for i, bar in zip(places, found, strict=True):
        out[i] = bar
    return out
