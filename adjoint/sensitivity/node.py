"""The autograd node of a solve: its forward pass is the loop, its derivatives are those of the recorded steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..integrate import rms_norm
from ..integrate.plan import RECORDED, Grid
from ..system.capture import alive, below_jvp, is_differentiable
from ..system.ownership import continuing, owned, under_transform
from ..system.system import System, VmappedSystem
from ..system.transforms import below_vmap, functorch_active, jvp_active, naming_writes
from ..system.witness import Witness
from ..torch_internals import Node, copy_by_copy, dual_level, unviewed
from .asked import Asked, check_known
from .discrete import eager_sweep
from .finite import tell_not_finite
from .late import check_strangers, naming_strangers
from .native_sweep import native_sweep, takes_second, tangents_by_native
from .problem import Outputs, Problem
from .sweep import functional_sweep, tangents
from .sweep_node import differentiated, swept

__all__ = ["LookNode", "Looks", "SolveNode", "checked", "unpack"]

_DIFFERENTIABLE = 4


@dataclass(frozen=True, eq=False)
class Looks:
    """Of what autograd has recorded: ``look()`` raises where the record would not do for derivatives of derivatives, ``witness`` where it
    is not to be gone back through any more, as that evaluates ``fun`` again. Either may be None."""

    look: Callable[[], None] | None
    witness: Witness | None


class LookNode(Node):
    """``apply(looks, x)`` gives ``x``, whose derivatives autograd has recorded."""

    @staticmethod
    def forward(looks: Looks, x: Tensor) -> Tensor:
        return unviewed(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.looks = owned(inputs[0])
        ctx.set_materialize_grads(False)

    @staticmethod
    @copy_by_copy
    def backward(ctx: Any, bar: Tensor | None) -> tuple[None, Tensor | None]:
        looks: Looks = ctx.looks()
        if bar is not None and looks.witness is not None:
            looks.witness.check()
        if bar is not None and looks.look is not None and torch.is_grad_enabled():
            looks.look()
        return None, bar


def checked(problem: Problem, found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Tensors whose derivatives autograd has recorded. Going back through implicit stages evaluates ``fun`` again, which has to be what it
    was."""
    if not problem.rooted or functorch_active() or dual_level() >= 0:
        return list(found)
    looks = Looks(None, problem.witness)
    return [LookNode.apply(looks, x) if x is not None and x.requires_grad else x for x in found]


class SolveNode(Node):
    """``apply(problem, anchors, t_eval, y0, *inputs)`` gives the tensors of `Outputs`, of which the first four are differentiable."""

    @staticmethod
    def forward(problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        late = under_transform()
        with torch.autocast(y0.device.type, enabled=False), naming_strangers() if late else nullcontext():
            record = problem.known.pop() if problem.known else problem.run(inputs, y0, anchors, t_eval)
        moving = late or any(x is not None and is_differentiable(x) for x in (anchors, t_eval))
        problem.reported(record, inputs, anchors if moving else None)
        if late and not problem.replayed:
            check_strangers(problem.system, record, inputs)
        out = tuple(Outputs.of(record))
        return *map(unviewed, out[:_DIFFERENTIABLE]), *out[_DIFFERENTIABLE:]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        problem, anchors, t_eval, _, *rest = inputs
        ctx.problem = owned(problem)
        ctx.has_samples = t_eval is not None
        # whether fun, called as it is, sees the very tensors that are this node's inputs
        system = problem.system
        ctx.own = isinstance(system, System) and all(x is y for x, y in zip(rest, system.inputs, strict=True))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[_DIFFERENTIABLE:])
        if not problem.plan.keep_states:
            return
        out = Outputs(*output)
        # the slopes of implicit stages are what their derivatives are taken at; explicit ones are computed again
        kept = problem.algebra is not None or problem.sweep is not None or problem.plan.method.multistep
        stages = out.stages if kept else out.status
        saved = [anchors, *([t_eval] if t_eval is not None else []), *rest]
        grid = Grid.of(out._replace(stages=stages)).tensors
        ctx.save_for_backward(*grid, *saved)
        ctx.save_for_forward(*grid, *saved)

    @staticmethod
    @copy_by_copy
    @naming_writes
    @continuing("problem")
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        problem = ctx.problem()
        grid, anchors, t_eval, inputs = unpack(ctx)
        bars = cotangents[:_DIFFERENTIABLE]
        wants = ctx.needs_input_grad[1:]
        differentiable = torch.is_grad_enabled() or functorch_active()
        known = [bar for bar in bars if bar is not None and bar.numel()]
        if known and not differentiable and not any(bool((bar != 0).any()) for bar in known):
            # of a solve behind the event whose time is differentiated, say
            given = anchors, t_eval, grid.states[0], *inputs
            nothing = [torch.zeros_like(x) if x is not None and want else None for x, want in zip(given, wants, strict=True)]
            return (None, *ctx.problem.let_out(nothing))
        if not differentiable and ctx.own:
            # saved tensors come back as new objects: the functions that captured the old ones need those
            inputs = problem.system.inputs
        first = eager_sweep if problem.native.recognised is None else native_sweep
        asked = Asked(problem, grid, anchors, t_eval, inputs, bars, wants)
        # of what compiled code solves all that it depends on is known
        by_native = differentiable and takes_second(asked)
        again = swept if by_native or jvp_active() else functional_sweep
        sweep = again if differentiable else problem.sweep or first
        with torch.autocast(grid.states.device.type, enabled=False):
            if differentiable and not by_native:
                check_known(problem.system, grid, inputs)
            found = sweep(asked)
            if differentiable and not by_native:
                found = checked(problem, found)
            if not asked.sound(found):
                tell_not_finite(problem, grid, inputs, found[2])
        return (None, *ctx.problem.let_out(found))

    @staticmethod
    def jvp(ctx: Any, _: None, anchors_dot: Tensor | None, t_eval_dot: Tensor | None, y0_dot: Tensor | None, *inputs_dot: Any) -> Any:
        problem = ctx.problem()
        grid, anchors, t_eval, inputs = unpack(ctx)
        dots = (anchors_dot, t_eval_dot, y0_dot, *inputs_dot)
        with torch.autocast(grid.states.device.type, enabled=False), below_jvp() as (lower, raise_):
            grid, inputs = grid.mapped(lower), [lower(x) for x in inputs]
            given = lower(anchors), None if t_eval is None else lower(t_eval), inputs, [None if d is None else lower(d) for d in dots]
            out = None if differentiated([*grid.tensors, *inputs, *given[-1]]) else tangents_by_native(problem, grid, *given)
            if out is None:
                check_known(problem.system, grid, inputs)
                out = tangents(problem, grid, *given)
            out = _marked(grid, *out)
        # back at the level on which this body was called
        return (*(raise_(x) for x in out), *([None] * (len(Outputs._fields) - _DIFFERENTIABLE)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, *inputs: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
        size, rows = info.batch_size, problem.system.rows
        _, anchors_dim, t_eval_dim, y0_dim, *input_dims = in_dims

        def columns(x: Tensor, dim: int | None) -> Tensor:
            """(A, B) per copy to (A, size * B)."""
            x = x.unsqueeze(1).expand(-1, size, -1) if dim is None else x.movedim(dim, 1)
            return x.reshape(x.shape[0], size * rows)

        y0 = y0.expand(size, -1, -1) if y0_dim is None else y0.movedim(y0_dim, 0)
        inputs = tuple(x if d is None else x.movedim(d, 0) for x, d in zip(inputs, input_dims, strict=True))
        system = VmappedSystem(problem.system, size, tuple(None if d is None else 0 for d in input_dims))
        plan = problem.plan

        def spread(tolerance: float | Tensor) -> float | Tensor:
            if isinstance(tolerance, float):
                return tolerance
            return tolerance.expand(rows, -1).repeat(size, 1)

        norm = plan.norm
        counts = None if plan.event_counts is None else below_vmap(plan.event_counts, size)
        plan = replace(
            plan,
            rtol=spread(plan.rtol),
            atol=spread(plan.atol),
            # that of rows is the same for any number of them
            norm=norm if norm is rms_norm else lambda x: torch.vmap(norm)(x.reshape(size, rows, -1)).reshape(-1),
            events=tuple(replace(event, bind=partial(system.mapped, event.bind)) for event in plan.events),
            event_counts=None if counts is None else columns(counts, 0),
        )
        mapped = replace(problem, system=system, plan=plan, batched=True, native=problem.native.again())
        out = SolveNode.apply(
            mapped,
            columns(anchors, anchors_dim),
            None if t_eval is None else columns(t_eval, t_eval_dim),
            y0.reshape(size * rows, -1),
            *inputs,
        )
        split, dims = [], []
        for name, x in zip(Outputs._fields, out, strict=True):
            # which event function a line of the table is of is the same for all copies
            if name == "event_id" or (name == "extra" and not x.numel()):
                split.append(x)
                dims.append(None)
                continue
            where = _ROW_DIM[name]
            split.append(x.unflatten(where, (size, rows)))
            dims.append(where)
        return tuple(split), tuple(dims)


def _marked(grid: Grid, final: Tensor, samples: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Tangents with NaN where a trajectory that failed has no value. (Cotangents of what all trajectories share go without it: there
    it would take the others along.)"""
    dead = grid.status < 0
    final = torch.where(dead.unsqueeze(-1), float("nan"), final)
    if samples.shape[0]:
        samples = torch.where((dead & (grid.sample_step < 0)).unsqueeze(-1), float("nan"), samples)
    return (final, samples, *rest)


_WORK = ("n_jac", "n_factorizations", "n_solves", "n_newton")
_ROW_DIM = {
    **{name: 0 for name in ("final", "n_steps", "n_accepted", "n_rejected", "n_fun", "status", "t_final", *_WORK)},
    **{name: 1 for name in ("samples", "states", "t", "h", "segment", "lands", "sample_step", "event_step", "event_t")},
    "stages": 2,
    "extra": 2,
}


def unpack(ctx: Any) -> tuple[Grid, Tensor, Tensor | None, Sequence[Tensor]]:
    """The record's grid, anchors, sample times and inputs, as `SolveNode` saved them."""
    if not ctx.problem().plan.keep_states:
        raise RuntimeError("this solve was made without keeping what its derivatives need")
    saved = alive(ctx.saved_tensors)
    grid, rest = Grid(*saved[: len(RECORDED)]), saved[len(RECORDED) :]
    anchors = rest.pop(0)
    t_eval = rest.pop(0) if ctx.has_samples else None
    return grid, anchors, t_eval, rest
