"""The sweep back through the recorded steps as a node of its own, for forward mode through gradients (``jvp(grad(...))``), and for second
derivatives by compiled code.

Below all transforms it runs on plain tensors, by compiled code where the solve was by it; so then are its derivatives, all at once.
Elsewhere its tangent is a second reverse sweep, not forward mode through the operators of the first: PyTorch takes a millisecond there for
every sum or product of a tensor that moves and one that does not, as it asks Python for the shape of their zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..integrate.plan import RECORDED, Grid
from ..system.capture import alive
from ..system.ownership import continuing, owned
from ..system.transforms import only_maps
from ..torch_internals import Node, below_jvp, by_copies, copy_by_copy
from .asked import Asked, both
from .discrete import eager_sweep
from .native_sweep import Second, native_sweep, second_by_native
from .problem import Problem
from .products import exchanged, smooth_places, vjp
from .replay import hands_on
from .sweep import functional_sweep

__all__ = ["differentiated", "swept"]

#: cotangents that a sweep is given: of `Outputs`' final, samples, states and stages
_BARS = 4
_STATES = RECORDED.index("states")


class _Layout:
    """Which tensors a sweep has, in the order of the arguments of the node: record, anchors, sample times, inputs, cotangents."""

    def __init__(self, asked: Asked) -> None:
        self.sampled, self.wants = asked.t_eval is not None, tuple(asked.wants)
        self.given = [i for i, bar in enumerate(asked.bars) if bar is not None]

    def total(self, tensors: Sequence[Tensor], second: Second) -> list[Tensor | None]:
        """Cotangents of all tensors, with those of the record as what comes to the first state."""
        found: list[Tensor | None] = [None] * len(RECORDED)
        found[_STATES] = torch.cat([second.y0.unsqueeze(0), torch.zeros_like(tensors[_STATES][1:])])
        return [*found, None, *([None] * self.sampled), *second.inputs, *(second.bars[i] for i in self.given)]

    @staticmethod
    def flat(asked: Asked) -> list[Tensor]:
        """The tensors one after another."""
        samples = [] if asked.t_eval is None else [asked.t_eval]
        return [*asked.grid.tensors, asked.anchors, *samples, *asked.inputs, *(x for x in asked.bars if x is not None)]

    def asked(self, problem: Problem, tensors: Sequence[Tensor]) -> Asked:
        """The reverse of `flat`."""
        grid = Grid(*tensors[: len(RECORDED)])
        anchors, *rest = tensors[len(RECORDED) :]
        t_eval = rest.pop(0) if self.sampled else None
        count = len(rest) - len(self.given)
        bars: list[Tensor | None] = [None] * _BARS
        for i, bar in zip(self.given, rest[count:], strict=True):
            bars[i] = bar
        return Asked(problem, grid, anchors, t_eval, rest[:count], bars, self.wants)

    def sweep_places(self, tensors: Sequence[Tensor]) -> list[int | None]:
        """Where what a sweep gives is among the tensors: cotangents of anchors, sample times, first state (None: it is none of them) and
        inputs."""
        first = len(RECORDED)
        rest = first + 1 + self.sampled
        return [first, first + 1 if self.sampled else None, None, *range(rest, len(tensors) - len(self.given))]


class _SweepNode(Node):
    """``apply(problem, layout, *tensors)``: zeros in the place of what is not wanted."""

    @staticmethod
    def forward(problem: Problem, layout: _Layout, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_full(layout, tensors, _plain(layout.asked(problem, tensors))))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        problem, ctx.layout, *tensors = inputs
        ctx.problem = owned(problem)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    @copy_by_copy
    @continuing("problem")
    def backward(ctx: Any, *bars: Tensor | None) -> tuple[Any, ...]:
        problem, layout, tensors = ctx.problem(), ctx.layout, list(alive(ctx.saved_tensors))
        if not differentiated([*tensors, *bars]):
            asked = layout.asked(problem, tensors)
            second = second_by_native(asked, bars[2], bars[3:], True)
            if second is not None:
                return (None, None, *layout.total(tensors, second))
        # integers, which are not differentiated, are among the inputs too
        smooth, kept = smooth_places(tensors), smooth_places(_like(layout, tensors))

        def sweep(*some: Tensor) -> tuple[Tensor, ...]:
            merged = exchanged(tensors, smooth, some)
            full = _full(layout, merged, functional_sweep(layout.asked(problem, merged)))
            return tuple(full[i] for i in kept)

        value, pull = vjp(sweep, *(tensors[i] for i in smooth))
        weights = tuple(torch.zeros_like(x) if bars[i] is None else bars[i] for x, i in zip(value, kept, strict=True))
        found: list[Tensor | None] = [None] * len(tensors)
        for i, bar in zip(smooth, pull(weights), strict=True):
            found[i] = bar
        return (None, None, *found)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: Problem, layout: _Layout, *tensors: Tensor) -> Any:
        return by_copies(partial(_SweepNode.apply, problem, layout), tensors, in_dims[2:], info.batch_size)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *dots: Tensor | None) -> tuple[Tensor | None, ...]:
        problem, layout = ctx.problem(), ctx.layout
        with below_jvp() as (lower, raise_):
            tensors = [lower(x) for x in alive(ctx.saved_tensors)]
            found = _moved(problem, layout, tensors, [None if d is None else lower(d) for d in dots])
        # integers, which are not differentiated, are among the inputs too
        return tuple(raise_(x) if x.is_floating_point() or x.is_complex() else None for x in found)


def differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether what is computed of these is differentiated."""
    return not only_maps() or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors))


def _plain(asked: Asked) -> tuple[Tensor | None, ...]:
    return _eager(asked) if asked.problem.native.recognised is None else native_sweep(asked)


def _eager(asked: Asked) -> tuple[Tensor | None, ...]:
    inputs = [x.detach().requires_grad_(True) if want else x for x, want in zip(asked.inputs, asked.wants[3:], strict=True)]
    return eager_sweep(asked._replace(inputs=inputs))


def _like(layout: _Layout, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What the cotangents that a sweep gives are of."""
    _, grid, anchors, t_eval, inputs, _, _ = layout.asked(None, tensors)  # type: ignore[arg-type]
    return [anchors, anchors if t_eval is None else t_eval, grid.states[0], *inputs]


def _full(layout: _Layout, tensors: Sequence[Tensor], found: Sequence[Tensor | None]) -> list[Tensor]:
    return [torch.zeros_like(x) if g is None else g for x, g in zip(_like(layout, tensors), found, strict=True)]


def _moved(problem: Problem, layout: _Layout, tensors: list[Tensor], dots: list[Tensor | None]) -> list[Tensor]:
    """The tangent of what a sweep gives.

    That is the gradient ``g`` of a sum of outputs, weighed by the cotangents, in times, first state and inputs ``z``; second derivatives
    are symmetric, so its tangent along ``z'`` is the gradient of ``<g, z'>``, and what the sweep gives for the cotangents' own tangents.
    The first gradient takes the recorded states as independent, and the slopes that steps hand on: what it gives for them goes back
    through the steps, with the latter.
    """
    asked = layout.asked(problem, tensors)
    # whether somebody differentiates once more: what is recorded on the way holds leaves of its own, which say nothing
    again = differentiated([*tensors, *dots])
    _, grid_dot, anchors_dot, t_eval_dot, inputs_dot, bars_dot, _ = layout.asked(problem, dots)  # type: ignore[arg-type]
    states_dot: Tensor | None = grid_dot.states
    along = [anchors_dot, t_eval_dot, None if states_dot is None else states_dot[0], *inputs_dot]
    if not again and anchors_dot is None and t_eval_dot is None:
        second = second_by_native(asked, along[2], inputs_dot, False)
        if second is not None:
            nothing = [None] * len(along)
            through = swept(asked._replace(bars=bars_dot)) if any(x is not None for x in bars_dot) else nothing
            direct = [None, None, second.y0 if layout.wants[2] else None, *second.inputs]
            return _full(layout, tensors, [both(a, b) for a, b in zip(direct, through, strict=True)])
    wants = [want or dot is not None for want, dot in zip(layout.wants, along, strict=True)]

    links = [RECORDED.index(name) for name in (("states", "stages") if hands_on(problem.plan) else ("states",))]

    def sweep(*some: Tensor) -> tuple[Tensor, ...]:
        merged = exchanged(tensors, [*links, *places], some)
        found = functional_sweep(layout.asked(problem, merged)._replace(wants=wants))
        return tuple(g for g, d in zip(_full(layout, merged, found), along, strict=True) if d is not None)

    where = layout.sweep_places(tensors)
    smooth = [i for i, (place, want) in enumerate(zip(where, layout.wants, strict=True)) if place is not None and want]
    places = [place for i in smooth if (place := where[i]) is not None]
    direct: list[Tensor | None] = [None] * len(where)
    moved = list(bars_dot)
    if any(d is not None for d in along):
        _, pull = vjp(sweep, *(tensors[i] for i in (*links, *places)))
        with torch.set_grad_enabled(again):
            found = pull(tuple(d for d in along if d is not None))
        for i, g in zip(smooth, found[len(links) :], strict=True):
            direct[i] = g
        moved[2] = found[0] if moved[2] is None else moved[2] + found[0]
        if len(links) > 1:
            handed = _handed(found[1])
            moved[3] = handed if moved[3] is None else moved[3] + handed
    if again:
        through = functional_sweep(asked._replace(bars=moved))
    else:
        with torch.no_grad():
            through = _eager(asked._replace(bars=moved))
    through = _full(layout, tensors, through)
    return [b if a is None else a + b for a, b in zip(direct, through, strict=True)]


def _handed(bars: Tensor) -> Tensor:
    """Cotangents ``(K, S, B, n)`` of the slopes with which steps begin as those of the last slopes of the steps before."""
    last = torch.cat([bars[1:, :1], torch.zeros_like(bars[:1, :1])])
    return torch.cat([torch.zeros_like(bars[:, :-1]), last], 1)


def swept(asked: Asked) -> tuple[Tensor | None, ...]:
    """As `sweep.functional_sweep`."""
    layout = _Layout(asked)
    found = _SweepNode.apply(asked.problem, layout, *layout.flat(asked))
    return tuple(g if want else None for g, want in zip(found, asked.wants, strict=True))
