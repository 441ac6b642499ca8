"""The discrete adjoint sweep for first derivatives: plain ``autograd.grad`` of ``fun`` at each stage, one state kept per step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..capture import unknown_leaves
from ..errors import CapturedTensorLost
from ..system import Flat, System
from .problem import Problem, stage_times, step_times

__all__ = ["eager_sweep"]


class _Linearizer:
    """``f`` with its pullback; adds ``f_p* v`` to the cotangents of the inputs (THEORY section 1)."""

    def __init__(self, f: Flat, inputs: Sequence[Tensor], wants: Sequence[bool], time: bool) -> None:
        self.f, self.time = f, time
        self.wanted = [i for i, want in enumerate(wants) if want]
        self.inputs = inputs
        self.targets = [inputs[i] for i in self.wanted]
        self.bars: list[Tensor | None] = [None] * len(inputs)
        self.owned = [False] * len(inputs)
        self.n_fun = 0
        self.check_next = False

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor | None]]]:
        self.n_fun += 1
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            if self.time:
                t = t.detach().requires_grad_(True)
            k = self.f(t, y)
        if self.check_next:
            self._check(t, y, k)
        targets = [y, *([t] if self.time else []), *self.targets]

        def pullback(v: Tensor) -> tuple[Tensor, Tensor | None]:
            if not k.requires_grad:
                return torch.zeros_like(y), torch.zeros_like(t) if self.time else None
            u, *rest = torch.autograd.grad(k, targets, v, allow_unused=True)
            time_bar = None
            if self.time:
                time_bar = rest.pop(0)
                time_bar = torch.zeros_like(t) if time_bar is None else time_bar
            for i, g in zip(self.wanted, rest, strict=True):
                if g is None:
                    continue
                total = self.bars[i]
                if total is None:
                    self.bars[i] = g
                elif self.owned[i]:
                    total.add_(g)
                else:
                    # the first cotangent may be somebody else's memory
                    self.bars[i] = total + g
                    self.owned[i] = True
            return torch.zeros_like(y) if u is None else u, time_bar

        return k.detach(), pullback

    def _check(self, t: Tensor, y: Tensor, k: Tensor) -> None:
        """Raise if ``fun`` at this point depends on a leaf that the solve does not know of."""
        self.check_next = False
        known = [*self.inputs, t, y]
        lost = unknown_leaves(k, known) if k.requires_grad else []
        if lost:
            shapes = ", ".join(str(tuple(x.shape)) for x in lost[:3])
            raise CapturedTensorLost(
                f"near t = {float(t.reshape(-1)[0]):.6g} fun uses {len(lost)} captured tensor(s) (shapes {shapes}) that it does not use at the "
                "start of the span, so their gradient would be missing. Pass them through args=, or make fun an nn.Module that owns them."
            )


class _Samples:
    """Cotangents of the samples, grouped by the step that they lie in."""

    def __init__(self, problem: Problem, grid: dict[str, Tensor], t_eval: Tensor | None, bar: Tensor | None, time_bars: bool) -> None:
        self.plan, self.grid, self.time_bars = problem.plan, grid, time_bars
        self.t_eval_bar = torch.zeros_like(t_eval) if t_eval is not None and time_bars else None
        n_steps = grid["t"].shape[0]
        self.inner: list[Tensor | None] = [None] * n_steps
        self.ends: list[Tensor | None] = [None] * n_steps
        if bar is None or t_eval is None:
            return
        self.bar = bar
        step = grid["sample_step"]
        index = step.clamp(min=0)
        h = grid["h"].gather(0, index)
        self.h = h
        self.theta = (t_eval - grid["t"].gather(0, index)) / torch.where(h == 0, 1.0, h)
        self.weights = problem.plan.method.dense_weights(self.theta).to(bar.dtype)
        flat = torch.where((self.theta == 1.0) & (not time_bars), step + n_steps, step).reshape(-1)
        order = flat.argsort()
        order = order[(flat[order] >= 0)]
        counts = torch.bincount(flat[order], minlength=2 * n_steps).tolist()
        groups = order.split(counts)
        self.inner = [g if c else None for g, c in zip(groups[:n_steps], counts[:n_steps], strict=True)]
        self.ends = [g if c else None for g, c in zip(groups[n_steps:], counts[n_steps:], strict=True)]

    def at_end(self, k: int, shape: torch.Size) -> Tensor | None:
        """Cotangent of the state at the end of step ``k``."""
        group = self.ends[k]
        return None if group is None else self._rows(group, shape, self.bar.reshape(-1, shape[-1])[group])

    def _rows(self, group: Tensor, shape: torch.Size, values: Tensor) -> Tensor:
        if shape[0] == 1:
            return values.sum(0, keepdim=True)
        return values.new_zeros(shape).index_add_(0, group % shape[0], values)

    def at_start(self, k: int, shape: torch.Size) -> Tensor | None:
        """Cotangent of the state at the start of step ``k``, by way of the dense output."""
        group = self.inner[k]
        return None if group is None else self._rows(group, shape, self.bar.reshape(-1, shape[-1])[group])

    def stages_bar(self, k: int, ks: Sequence[Tensor], times: list[Tensor]) -> Tensor | None:
        """Cotangents ``(S, B, n)`` of the stages of step ``k``; adds those of its start and size to ``times``."""
        group = self.inner[k]
        if group is None:
            return None
        rows, n = ks[0].shape
        row = group % rows
        bar = self.bar.reshape(-1, n)[group]
        h = self.h.reshape(-1)[group]
        weights = self.weights.reshape(-1, len(ks))[group]
        scaled = weights * h.unsqueeze(-1).to(weights.dtype)
        if rows == 1:
            out = (scaled.T @ bar).unsqueeze(1)
        else:
            out = bar.new_zeros(len(ks), rows, n).index_add_(1, row, scaled.T.unsqueeze(-1) * bar)
        if self.time_bars:
            theta = self.theta.reshape(-1)[group]
            products = torch.stack([_real_dot(k_i[row], bar) for k_i in ks], dim=-1).double()
            slope = (self.plan.method.dense_slopes(theta) * products).sum(-1)
            size = (weights.real.double() * products).sum(-1) - theta * slope
            assert self.t_eval_bar is not None
            self.t_eval_bar.view(-1)[group] = slope
            times[0].index_add_(0, row, -slope)
            times[1].index_add_(0, row, size)
        return out


def _real_dot(x: Tensor, y: Tensor) -> Tensor:
    return (x.conj() * y).real.sum(-1) if x.is_complex() else (x * y).sum(-1)


def eager_sweep(
    problem: Problem,
    grid: dict[str, Tensor],
    anchors: Tensor,
    t_eval: Tensor | None,
    inputs: Sequence[Tensor],
    bars: Sequence[Tensor | None],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Cotangents of ``(anchors, t_eval, y0, *inputs)`` from those of ``(final, samples, states, stages)``."""
    final_bar, samples_bar, states_bar, stages_bar = bars
    system, plan = problem.system, problem.plan
    states = grid["states"].detach()
    n_steps, rows = grid["t"].shape
    time_bars = bool(wants[0] or wants[1])
    # under plain autograd a captured tensor is its own input: no substitution
    inputs = system.inputs if isinstance(system, System) else inputs
    linearize = _Linearizer(system.bind(inputs), inputs, wants[3:], time_bars)
    samples = _Samples(problem, grid, t_eval, samples_bar, time_bars)
    times = step_times(grid["t"], grid["h"], grid["segment"], grid["lands"], anchors.detach())
    kept = _kept(problem, grid, n_steps, stages_bar)
    sizes = grid["h"][:, 0].tolist() if rows == 1 else None
    real = states.dtype.to_real()
    alive = grid["status"] >= 0

    bar = torch.zeros_like(states[0])
    if final_bar is not None:
        bar = bar + torch.where(alive.unsqueeze(-1), final_bar, 0.0)
    t_bars = torch.zeros_like(grid["t"])
    h_bars = torch.zeros_like(grid["t"])
    checked = isinstance(system, System)
    for k in reversed(range(n_steps)):
        if states_bar is not None:
            bar = bar + states_bar[k + 1]
        end = samples.at_end(k, bar.shape)
        if end is not None:
            bar = bar + end
        inner, kept_bar = samples.inner[k] is not None, kept.get(k)
        extra_times = [t_bars[k], h_bars[k]]

        def dense_bars(ks: list[Tensor], k: int = k, kept_bar: Tensor | None = kept_bar, extra: list[Tensor] = extra_times) -> Sequence[Tensor]:
            out = samples.stages_bar(k, ks, extra)
            if kept_bar is not None:
                out = kept_bar if out is None else out + kept_bar
            assert out is not None
            return out.unbind()

        stage_t = stage_times(plan, times, k, real)
        h = sizes[k] if sizes is not None else times.h[k].to(real).unsqueeze(-1)
        linearize.check_next = checked
        result = plan.method.adjoint_step(linearize, stage_t, h, states[k], bar, dense_bars if inner or kept_bar is not None else None, time_bars)
        start = samples.at_start(k, bar.shape)
        bar = result.y if start is None else result.y + start
        if result.t is not None:
            t_bars[k] += result.t
        if result.h is not None:
            h_bars[k] += result.h
    if states_bar is not None:
        bar = bar + states_bar[0]
    if n_steps == 0 and samples_bar is not None:
        bar = bar + samples_bar.sum(0)
    problem.backward_report(linearize.n_fun, n_steps)
    anchors_bar = _anchors_bar(anchors, grid, t_bars, h_bars) if wants[0] else None
    return (anchors_bar, samples.t_eval_bar if wants[1] else None, bar if wants[2] else None, *linearize.bars)


def _kept(problem: Problem, grid: dict[str, Tensor], n_steps: int, stages_bar: Tensor | None) -> dict[int, Tensor]:
    """Cotangents of the stages that were outputs, by step."""
    if stages_bar is None or stages_bar.shape[0] == 0:
        return {}
    steps = range(n_steps) if problem.plan.keep_stages else sorted(set(grid["event_step"].tolist()))
    return dict(zip(steps, stages_bar, strict=True))


def _anchors_bar(anchors: Tensor, grid: dict[str, Tensor], t_bars: Tensor, h_bars: Tensor) -> Tensor:
    """Cotangents of steps to those of the anchors: see `step_times`."""
    landed = torch.where(grid["lands"], h_bars, 0.0)
    out = torch.zeros_like(anchors)
    out.scatter_add_(0, grid["segment"], t_bars - landed)
    out.scatter_add_(0, (grid["segment"] + 1).clamp(max=anchors.shape[0] - 1), landed)
    return out
