"""The adjoint of a step under ``torch.compile``, called once per step of the sweep.

Where the inputs of ``fun`` are all known by name (arguments, parameters of a module) the step and its pullback are one graph. Where a
closure captured tensors, the step is compiled with autograd's own backward, which finds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..integrate import Plan
from ..integrate.compiled import compiled
from ..methods.runge_kutta import StepCotangents
from ..system.system import Flat, System, VmappedSystem
from .direct import DirectLinearizer
from .linearize import Linearizer, vjp
from .problem import Problem
from .replay import replay_step

__all__ = ["CompiledAdjoint", "named"]


def _timed_step(f: Flat, plan: Plan, t: Tensor, h: Tensor, y: Tensor, dense: bool, columns: bool) -> tuple[Tensor, Tensor]:
    """A step as a function of its start and size, float64, ``(B,)`` or 0-d for a single trajectory."""
    times = [(t + h * c).to(plan.real) for c in plan.method.nodes]
    return replay_step(f, plan, times, h, y, dense, columns)


def _step_pullback(
    system: System,
    plan: Plan,
    wanted: tuple[int, ...],
    timed: bool,
    columns: bool,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    inputs: tuple[Tensor, ...],
    end_bar: Tensor,
    k_bar: Tensor | None,
    totals: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]]:
    """Cotangents of ``y``, behind those of ``(t, h)`` if ``timed``; the stages; and ``totals`` with the cotangents of wanted inputs added.

    ``k_bar``: cotangents of the first stages.
    """
    dense = timed or k_bar is not None

    def step(*x: Tensor) -> tuple[Tensor, Tensor]:
        start, size, rest = (x[0], x[1], x[2:]) if timed else (t, h, x)
        merged = list(inputs)
        for i, value in zip(wanted, rest[1:], strict=True):
            merged[i] = value
        y1, ks = _timed_step(system.bind_module(merged), plan, start, size, rest[0], dense, columns)
        return y1, ks if timed or k_bar is None else ks[: k_bar.shape[0]]

    primals = (*((t, h) if timed else ()), y, *(inputs[i] for i in wanted))
    (_, ks), pullback, *_ = torch.func.vjp(step, *primals)
    if k_bar is None:
        ks_bar = torch.zeros_like(ks)
    elif timed:
        ks_bar = torch.cat([k_bar, torch.zeros_like(ks[k_bar.shape[0] :])])
    else:
        ks_bar = k_bar
    found = pullback((end_bar, ks_bar))
    n = len(found) - len(wanted)
    return found[:n], ks, tuple(total + bar for total, bar in zip(totals, found[n:], strict=True))


def _direct_pullback(
    system: System,
    plan: Plan,
    wanted: tuple[int, ...],
    timed: bool,
    columns: bool,
    t: Tensor,
    h: Tensor,
    y: Tensor,
    ks: Tensor,
    inputs: tuple[Tensor, ...],
    end_bar: Tensor,
    k_bar: Tensor | None,
    totals: tuple[Tensor, ...],
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """As `_step_pullback` for a step whose stages ``ks`` are recorded: cotangents by the method's own adjoint, and ``totals``."""

    def bind(values: Sequence[Tensor]) -> Flat:
        merged = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            merged[i] = value
        return system.bind_module(merged)

    def turned(x: Tensor) -> Tensor:
        return x.t() if columns else x

    linearize = DirectLinearizer(bind, [inputs[i] for i in wanted], totals, [turned(k) for k in ks.unbind()], timed)
    times = [(t + h * c).to(plan.real) for c in plan.method.nodes]
    bars = [] if k_bar is None else [turned(k) for k in k_bar.unbind()]
    found = plan.method.adjoint_step(linearize, times, h.to(plan.real).unsqueeze(-1), turned(y), turned(end_bar), bars, timed)
    y_bar = turned(found.y).contiguous()
    if not timed:
        return (y_bar,), linearize.totals
    assert found.t is not None and found.h is not None
    return (found.t, found.h, y_bar), linearize.totals


def named(system: System | VmappedSystem) -> bool:
    """Whether all inputs of ``fun`` are known by name, so that a compiler can put others in their places."""
    return isinstance(system, System) and (not system.captured or system.parameter_names is not None)


class CompiledAdjoint:
    """A stand-in for the method's ``adjoint_step``, with start and size of the step in the place of stage times."""

    def __init__(self, problem: Problem, f: Flat, linearize: Linearizer, y: Tensor) -> None:
        plan, system = problem.plan.of_steps, problem.system
        self.plan, self.system, self.f, self.linearize = plan, system, f, linearize
        self.columns = problem.columns(y)
        self.step = compiled(_timed_step, plan.compile, self.columns)
        self.pull = compiled(_direct_pullback if plan.direct else _step_pullback, plan.compile, self.columns)
        self.inputs = tuple(x.detach() for x in problem.laid_out(linearize.inputs, y)) if named(system) else None
        self.totals = tuple(torch.zeros_like(self.inputs[i]) for i in linearize.wanted) if self.inputs is not None else ()

    def __call__(
        self,
        t: Tensor,
        h: Tensor,
        y: Tensor,
        end_bar: Tensor,
        k_bar: Sequence[Tensor | None],
        time_bars: bool,
        recorded: Tensor | None = None,
    ) -> StepCotangents:
        """See `ExplicitRungeKutta.adjoint_step`; ``y``, cotangents of states and ``recorded`` stages are ``(n, B)`` where the steps are."""
        self.linearize.n_fun += self.plan.method.n_stages
        stacked = None
        if any(bar is not None for bar in k_bar):
            zero = torch.zeros_like(end_bar)
            stacked = torch.stack([zero if bar is None else bar for bar in k_bar])
        if self.plan.direct:
            assert recorded is not None
            found, ks = self._at_stages(t, h, y, end_bar, stacked, time_bars, recorded)
        else:
            run = self._by_autograd if self.inputs is None else self._by_name
            found, ks = run(t, h, y, end_bar, stacked, time_bars)
        t_bar, h_bar, y_bar = found if time_bars else (None, None, *found)
        stages = list(ks.unbind()) if time_bars else []
        return StepCotangents(torch.zeros_like(y) if y_bar is None else y_bar, t_bar, h_bar, stages)

    def _by_name(
        self, t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Tensor | None, timed: bool
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        wanted = self._looked(t, y)
        found, ks, self.totals = self.pull(
            self.system, self.plan, wanted, timed, self.columns, t, h, y, self.inputs, end_bar, k_bar, self.totals
        )
        return found, ks

    def _looked(self, t: Tensor, y: Tensor) -> tuple[int, ...]:
        """The wanted inputs; one graph for a step and its pullback hides what ``fun`` reaches, so it is called here where that is asked."""
        if self.linearize.check_next:
            self.linearize(t.to(self.plan.real), y.t() if self.columns else y)
        return tuple(self.linearize.wanted)

    def _at_stages(
        self, t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Tensor | None, timed: bool, ks: Tensor
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        wanted = self._looked(t, y)
        found, self.totals = self.pull(
            self.system, self.plan, wanted, timed, self.columns, t, h, y, ks, self.inputs, end_bar, k_bar, self.totals
        )
        return found, ks

    def _by_autograd(
        self, t: Tensor, h: Tensor, y: Tensor, end_bar: Tensor, k_bar: Tensor | None, timed: bool
    ) -> tuple[Sequence[Tensor | None], Tensor]:
        linearize = self.linearize
        with torch.enable_grad():
            y = y.detach().requires_grad_(True)
            if timed:
                t, h = t.detach().requires_grad_(True), h.detach().requires_grad_(True)
            y1, ks = self.step(self.f, self.plan, t, h, y, timed or k_bar is not None, self.columns)
            linearize.check(y1, t, y, h)
            outputs, cotangents = [y1], [end_bar]
            if k_bar is not None:
                outputs.append(ks[: k_bar.shape[0]])
                cotangents.append(k_bar)
        targets = (*((t, h) if timed else ()), y, *linearize.targets)
        found = vjp(tuple(outputs), targets, tuple(cotangents))
        n = len(targets) - len(linearize.targets)
        linearize.accumulate(found[n:])
        return found[:n], ks.detach()

    def finish(self) -> None:
        """Hand the cotangents of the inputs over."""
        if self.inputs is not None:
            self.linearize.accumulate(self.totals)
