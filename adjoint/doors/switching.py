"""Solves that change between an explicit and an implicit method: phases, each a solve of its own, put together to one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..integrate import Status
from ..integrate.stiffness import Switch
from ..methods.auto import AutoSwitch, Polynomial
from ..sensitivity import Gradient, Outputs, Problem
from ..sensitivity.undeclared import once
from ..system.capture import listed, readable
from ..system.transforms import unwrapped

__all__ = ["solve_switching"]

#: phases after which the implicit method has the rest
_MOST = 200
_COUNTS = ("n_steps", "n_accepted", "n_rejected", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton")


@dataclass(frozen=True)
class _Phase:
    """One phase: its outputs, the trajectories that take part in it (None: all), and its sample times beyond its start."""

    out: Outputs
    stiff: bool
    active: Tensor | None
    beyond: Tensor | None


@once()
def solve_switching(
    strategy: Gradient,
    problem: Problem,
    anchors: Tensor,
    t_eval: Tensor | None,
    y0: Tensor,
    inputs: Sequence[Tensor],
    dense: bool,
) -> tuple[Outputs, Problem]:
    """Solve with an `AutoSwitch`: every phase is differentiated by itself, and the times between them are constants.

    Returns the outputs of one long solve, whose stages (with ``dense``) are the coefficients of polynomials, and the problem that they
    are of. Under ``torch.vmap``, where statuses cannot be read, trajectories go over to the implicit method once.
    """
    auto = problem.plan.method
    assert isinstance(auto, AutoSwitch)
    phases: list[_Phase] = []
    stops, times, y, active, beyond = anchors, t_eval, y0, None, None
    counts: Tensor | None = None
    while True:
        stiff = len(phases) % 2 == 1
        final = stiff and (len(phases) >= _MOST or not readable(phases[0].out.status))
        part = _phase_problem(problem, auto, stiff, final, active, dense=dense, counts=counts)
        out = strategy.solve(part, stops, times, y, inputs)
        problem.native.seconds += part.native.seconds
        phases.append(_Phase(out, stiff, active, beyond))
        going = out.status == int(Status.SWITCHED)
        if final or (readable(going) and not bool(going.any())):
            break
        problem.plan.monitor.parted()
        y = torch.where(going.unsqueeze(-1), out.final, y)
        stops = _remaining(stops, out, going)
        active = going
        if t_eval is not None:
            sign = torch.where(anchors[-1] >= anchors[0], 1.0, -1.0)
            beyond = (sign * (t_eval - stops[0]) > 0).detach() & going
            times = torch.where(beyond, t_eval, stops[0].detach())
        counts = _event_counts(problem, out, counts)
    return _merged(problem, auto, phases, dense)


def _phase_problem(
    problem: Problem, auto: AutoSwitch, stiff: bool, final: bool, active: Tensor | None, *, dense: bool, counts: Tensor | None
) -> Problem:
    plan, idle = problem.plan, problem.idle
    if active is not None:
        idle = unwrapped(~active) if readable(active) else None
    plan = replace(
        plan,
        method=auto.stiff if stiff else auto.nonstiff,  # type: ignore[arg-type]
        first_step=plan.first_step if active is None else None,
        keep_stages=dense or (stiff and plan.keep_states),
        switch=None if final else Switch(auto, not stiff),
        event_counts=counts,
    )
    return replace(problem, plan=plan, algebra=problem.algebra if stiff else None, idle=idle, native=problem.native.part())


def _remaining(stops: Tensor, out: Outputs, going: Tensor) -> Tensor:
    """The anchors of the next phase: its start in the place of those that are behind it; no span for trajectories that are done."""
    last = (out.n_accepted - 1).clamp(min=0).unsqueeze(0)
    at = out.t_final
    if out.segment.shape[0]:
        # a step moves with the anchor that it was counted from; of solves without derivatives no steps may be recorded
        at = at + (stops - stops.detach()).gather(0, out.segment.gather(0, last))[0]
    sign = torch.where(stops[-1] >= stops[0], 1.0, -1.0)
    ahead = torch.where((sign * (stops - at) > 0).detach(), stops, at)
    ahead = torch.cat([at.unsqueeze(0), ahead[1:]])
    return torch.where(going, ahead, stops[0].detach())


def _event_counts(problem: Problem, out: Outputs, before: Tensor | None) -> Tensor | None:
    if not problem.plan.events:
        return None
    found = torch.zeros_like(out.n_accepted).expand(len(problem.plan.events), -1)
    found = found.index_add(0, out.event_id, (out.event_step >= 0).to(found.dtype))
    return found if before is None else before + found


def _merged(problem: Problem, auto: AutoSwitch, phases: Sequence[_Phase], dense: bool) -> tuple[Outputs, Problem]:
    first = phases[0].out
    outs = [p.out for p in phases]
    keep = problem.plan.results_of_steps
    accepted = [p.out.n_accepted if p.active is None else torch.where(p.active, p.out.n_accepted, 0) for p in phases]
    before = torch.stack([torch.zeros_like(accepted[0]), *accepted]).cumsum(0)

    def latest(name: str) -> Tensor:
        value = getattr(first, name)
        for p in phases[1:]:
            assert p.active is not None
            own = getattr(p.out, name)
            value = torch.where(p.active.reshape(-1, *[1] * (own.dim() - 1)), own, value)
        return value

    totals = {}
    for name in _COUNTS:
        each = [getattr(p.out, name) for p in phases]
        totals[name] = sum((torch.where(p.active, x, 0) for p, x in zip(phases[1:], each[1:], strict=True)), each[0])  # type: ignore[arg-type]
    samples, sample_step = first.samples, first.sample_step
    for k, p in enumerate(phases[1:], 1):
        if p.beyond is not None:
            samples = torch.where(p.beyond.unsqueeze(-1), p.out.samples, samples)
            later = torch.where(p.out.sample_step >= 0, p.out.sample_step + before[k], -1)
            sample_step = torch.where(p.beyond, later, sample_step)
    index = _places(outs, before) if keep or dense else before
    t_final = latest("t_final")
    zero = torch.zeros_like(t_final)
    steps = {name: getattr(first, name) for name in ("t", "h", "segment", "lands")}
    if keep:
        behind = {"t": t_final, "h": zero, "segment": zero.long(), "lands": zero.bool()}
        steps = {name: _picked([getattr(o, name) for o in outs], x, index[:-1]) for name, x in behind.items()}
    states = first.states
    if keep:
        reached = _reached(phases, accepted)
        states = _picked([o.states[:-1] for o in outs], reached, index)
    degree = max(len(m.tableau.dense[0]) for m in (auto.nonstiff, auto.stiff))  # type: ignore[attr-defined]
    stages = first.stages.new_empty((0, degree, *first.final.shape))
    if dense:
        stages = _picked([_coefficients(p, auto, degree) for p in phases], stages.new_zeros(stages.shape[1:]), index[:-1], 1)
    out = Outputs(
        final=latest("final"),
        samples=samples,
        states=states,
        stages=stages,
        sample_step=sample_step,
        status=latest("status"),
        t_final=t_final,
        extra=first.extra,
        **totals,
        **steps,
        **_events(outs, before),
    )
    plan = replace(problem.plan, method=Polynomial(degree, auto.name), keep_stages=dense)  # type: ignore[arg-type]
    return out, replace(problem, plan=plan)


def _events(outs: Sequence[Outputs], before: Tensor) -> dict[str, Tensor]:
    """The tables of all phases as one, in which each trajectory has its events of a kind in the first lines of that kind."""
    ids = torch.cat([o.event_id for o in outs])
    step = torch.cat([torch.where(o.event_step >= 0, o.event_step + before[k], -1) for k, o in enumerate(outs)])
    t = torch.cat([o.event_t for o in outs])
    kinds = sorted(set(listed(ids)))
    lines = {"event_id": [ids[:0]], "event_step": [step[:0]], "event_t": [t[:0]]}
    for kind in kinds:
        mine = (ids == kind).nonzero()[:, 0]
        found = step[mine] >= 0
        most = int(found.sum(0).max()) if readable(found) else len(mine)
        order = torch.argsort((~found).to(torch.uint8), dim=0, stable=True)[:most]
        for name, every in (("event_id", ids), ("event_step", step), ("event_t", t)):
            lines[name].append(every[mine[:most]] if name == "event_id" else every[mine].gather(0, order))
    return {name: torch.cat(parts) for name, parts in lines.items()}


def _places(outs: Sequence[Outputs], before: Tensor) -> Tensor:
    """Where in all phases, one behind the other, the steps of each trajectory are, ``(count + 1, B)`` for ``count`` steps at most; behind
    the last one the number of all."""
    total = sum(o.t.shape[0] for o in outs)
    count = int(before[-1].max()) if readable(before) and before.shape[1] else total
    place = torch.arange(count + 1, device=before.device).unsqueeze(-1)
    index = torch.full((count + 1, before.shape[1]), total, device=before.device)
    offset = 0
    for k, o in enumerate(outs):
        mine = (place >= before[k]) & (place < before[k + 1])
        index = torch.where(mine, place - before[k] + offset, index)
        offset += o.t.shape[0]
    return index


def _picked(parts: Sequence[Tensor], behind: Tensor, index: Tensor, row_dim: int = 0) -> Tensor:
    """Entries ``index`` (K, B) of ``parts`` (each (K_i, ..., B, ...), trajectories in dimension ``row_dim + 1``) and ``behind``."""
    every = torch.cat([*parts, behind.unsqueeze(0)]).movedim(row_dim + 1, 1)
    where = index.reshape(*index.shape, *[1] * (every.dim() - 2)).expand(*index.shape, *every.shape[2:])
    return every.gather(0, where).movedim(1, row_dim + 1)


def _reached(phases: Sequence[_Phase], accepted: Sequence[Tensor]) -> Tensor:
    """The last states ``(B, n)``, of failed trajectories too."""
    value = phases[0].out.states[0]
    for p, count in zip(phases, accepted, strict=True):
        states = p.out.states
        own = states.gather(0, count.reshape(1, -1, 1).expand(1, *states.shape[1:]))[0]
        value = own if p.active is None else torch.where(p.active.unsqueeze(-1), own, value)
    return value


def _coefficients(phase: _Phase, auto: AutoSwitch, degree: int) -> Tensor:
    """The stages of a phase as coefficients of the powers of theta, ``(K, degree, B, n)``."""
    method = auto.stiff if phase.stiff else auto.nonstiff
    stages = phase.out.stages
    matrix = torch.tensor(method.tableau.dense, dtype=torch.float64, device=stages.device).to(stages.dtype)  # type: ignore[attr-defined]
    matrix = torch.nn.functional.pad(matrix, (0, degree - matrix.shape[1]))
    if stages.shape[0] == 0:
        return stages.new_empty((0, degree, *stages.shape[2:]))
    return torch.einsum("sp,ksbn->kpbn", matrix, stages)
