"""Derivatives of backward differentiation formulas: the recorded steps as differentiable code, each new state a root.

A step is linear in the table of differences but for the one equation that it solves, so the record of a step is its order and the matrix
that brought the table to its distance. Orders and step sizes are held fixed. Sample times and ends of the span enter through the
polynomial that is the dense output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrate.multistep import SIZE, update_matrix
from ..integrate.pencil import split
from ..integrate.plan import shifted_times
from ..jacobians import DenseJacobian
from ..linalg import Log, Matrix
from ..methods.bdf import MAX_ORDER, coefficients
from ..nonlinear import RootRecord
from ..system import Flat, System, VmappedSystem
from .implicit import JacobianRule, RootNode, RootOutputs, RootTask
from .problem import Outputs, Problem, StageAlgebra, interpolate, step_times
from .products import tangent, vjp

__all__ = ["multistep_functional", "multistep_outputs", "multistep_tangents"]


@dataclass(frozen=True)
class _StepConditions:
    """``c F(t, y, (base + y) / c) = 0``, for an ODE ``base + y - c f(t, y) = 0``; inputs ``(t, base, c, *inputs of f)``."""

    system: System | VmappedSystem

    @property
    def rows(self) -> int:
        return self.system.rows

    @property
    def spec(self) -> Any:
        return self.system.spec

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``y``."""
        t, base, c, *rest = inputs
        f = self.system.bind(rest)
        if self.system.residual is not None:
            return lambda _, y: c * f(t, torch.cat([y, (base + y) / c], -1))
        return lambda _, y: base + y - c * f(t, y)


@dataclass(frozen=True)
class _Rule:
    """``E + c G``: for an ODE the strategy is told the whole function; copies under vmap take a dense one."""

    system: System | VmappedSystem
    algebra: StageAlgebra

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        if self.system.residual is None:
            return self.algebra.jacobian(r, x)
        t, base, c, *rest = inputs
        f = self.system.bind(rest)
        return split(self.algebra.jacobian(lambda pair: f(t, pair), torch.cat([x, (base + x) / c], -1))).at(c)

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """See the class."""
        return self if self.system.residual is None else _DenseRule()


@dataclass(frozen=True)
class _DenseRule:
    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        return DenseJacobian()(r, x)

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """The same: rows are independent."""
        return self


def _known(r: Any, x: Tensor, inputs: Any, jacobian: Any) -> RootRecord:
    count = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    return RootRecord(x, torch.zeros_like(x), x.new_zeros(x.shape[0], dtype=x.dtype.to_real()), count, count, count, count)


def _replay(
    problem: Problem, grid: dict[str, Tensor], anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(final, samples, states, stages)`` as differentiable functions of anchors, sample times, ``y0`` and inputs."""
    plan, algebra = problem.plan, problem.algebra
    assert algebra is not None
    states, real = grid["states"], grid["states"].dtype.to_real()
    n_steps, rows = grid["t"].shape
    extra, h = grid["extra"], grid["h"]
    device = states.device
    gamma, alpha, _ = coefficients(torch.float64, device)
    # a step keeps its size: it moves with the anchor before it
    times = step_times(grid["t"], h, grid["segment"], torch.zeros_like(grid["lands"]), anchors, "none")
    begin, sign = times.t, times.sign
    moved = anchors - anchors.detach()
    following = (grid["segment"] + 1).clamp(max=anchors.shape[0] - 1)
    late = torch.where(grid["lands"], moved.gather(0, following) - moved.gather(0, grid["segment"]), 0.0)
    inner = grid["lands"] & (grid["segment"] < anchors.shape[0] - 2)
    place = torch.arange(SIZE, device=device)
    D = torch.cat([y0.unsqueeze(0), y0.new_zeros(SIZE - 1, rows, y0.shape[-1])])
    task = RootTask(
        _StepConditions(problem.system), _StepConditions(problem.system), _known, _Rule(problem.system, algebra), algebra.linear_solver,
        Log(), lambda record: None,
    )  # fmt: skip
    all_states, all_stages = [y0], []
    for k in range(n_steps):
        order, T = extra[k, 0].long(), extra[k, 1:].reshape(SIZE, SIZE, rows).permute(2, 0, 1)
        valid = (h[k] != 0).unsqueeze(-1)
        near = torch.einsum("bij,jbn->ibn", T.to(D.dtype), D)
        low = (place <= order.unsqueeze(-1)).to(real)
        predicted = torch.einsum("bi,ibn->bn", low, near)
        weights = torch.nn.functional.pad(gamma, (0, SIZE - gamma.shape[0])) * low / alpha[order].unsqueeze(-1)
        psi = torch.einsum("bi,ibn->bn", weights.to(D.dtype), near)
        c = torch.where(valid.squeeze(-1), h[k] / alpha[order], 1.0).to(real).unsqueeze(-1)
        end = (begin[k] + h[k]).to(real)
        if plan.shift != "none" and anchors.shape[0] > 2:
            end = shifted_times([end], [1.0], False, inner[k], sign)[0]
        own = RootTask(task.system, task.conditions, task.find, task.jacobian, task.linear_solver, task.log, task.report)
        y = RootOutputs(*RootNode.apply(own, states[k + 1].detach(), end, psi - predicted, c, *inputs)).raw
        S, s = update_matrix(order)
        new = torch.einsum("bij,jbn->ibn", S.to(D.dtype), near) + torch.einsum("bi,bn->ibn", s.to(D.dtype), y - predicted)
        keep = (torch.arange(1, MAX_ORDER + 1, device=device) <= order.unsqueeze(-1)).to(real)
        size = torch.where(h[k] == 0, 1.0, h[k])
        differences = torch.cat([new[1 : MAX_ORDER + 1] * keep.t().unsqueeze(-1), (y - predicted).unsqueeze(0)])
        stages = differences / size.to(real).reshape(1, -1, 1)
        stages = torch.where(valid.unsqueeze(0), stages, 0.0)
        all_stages.append(stages)
        # a step that ends on an anchor is read off where that is now
        shift = _beyond(plan, stages, h[k], late[k] / size)
        D = torch.where(valid.unsqueeze(0), torch.cat([(new[0] + shift).unsqueeze(0), new[1:]]), D)
        all_states.append(D[0])
    final = torch.where((grid["status"] >= 0).unsqueeze(-1), all_states[-1], float("nan"))
    whole = torch.stack(all_states)
    kept = torch.stack(all_stages) if all_stages else grid["stages"]
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    if n_samples and n_steps:
        assert t_eval is not None
        samples = interpolate(plan, whole, kept, begin, h, t_eval, grid["sample_step"])
    else:
        samples = y0.new_zeros(n_samples, *y0.shape) + y0
    return final, samples, whole, kept if plan.keep_stages else grid["stages"]


def _beyond(plan: Any, stages: Tensor, h: Tensor, late: Tensor) -> Tensor:
    """What the dense output adds to the end of a step at ``theta = 1 + late``, whose value is zero."""
    ahead = (plan.method.dense_weights(1.0 + late) * h.unsqueeze(-1)).to(stages.dtype)
    now = (plan.method.dense_weights(torch.ones_like(h)) * h.unsqueeze(-1)).to(stages.dtype)
    return torch.einsum("bs,sbn->bn", ahead - now, stages)


def multistep_outputs(
    problem: Problem, grid: Outputs, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]
) -> Outputs:
    """The computed solution, recorded by autograd."""
    names = ("states", "t", "h", "segment", "lands", "sample_step", "status", "stages", "extra")
    found = _replay(problem, {name: getattr(grid, name).detach() for name in names}, anchors, t_eval, y0, inputs)
    return grid._replace(**dict(zip(("final", "samples", "states", "stages"), found, strict=True)))


def _filled(bars: Sequence[Tensor | None], outs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(torch.zeros_like(out) if bar is None else bar for bar, out in zip(bars, outs, strict=True))


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def multistep_functional(
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """As `sweep.functional_sweep`: differentiable to any order."""
    given = [anchors, t_eval, grid["states"][0], *inputs]
    where = [i for i, (x, want) in enumerate(zip(given, wants, strict=True)) if want and x is not None]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        full = list(given)
        for i, x in zip(where, some, strict=True):
            full[i] = x
        return _replay(problem, grid, full[0], full[1], full[2], full[3:])  # type: ignore[arg-type]

    outs, pull = vjp(function, *(given[i] for i in where))
    found = pull(_filled(bars, outs))
    out: list[Tensor | None] = [None] * len(given)
    for i, bar in zip(where, found, strict=True):
        out[i] = bar
    problem.backward_report(grid["t"].shape[0], grid["t"].shape[0])
    return tuple(out)


def multistep_tangents(
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    dots: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """As `sweep.tangents`."""
    given = [anchors, t_eval, grid["states"][0], *inputs]
    where = [i for i, x in enumerate(given) if x is not None and _smooth(x) and dots[i] is not None]

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        full = list(given)
        for i, x in zip(where, some, strict=True):
            full[i] = x
        return _replay(problem, grid, full[0], full[1], full[2], full[3:])  # type: ignore[arg-type]

    primals, moved = [given[i] for i in where], [dots[i] for i in where]
    if not where:
        return tuple(torch.zeros_like(x) for x in function())
    return tangent(function, primals, moved)  # type: ignore[arg-type]
