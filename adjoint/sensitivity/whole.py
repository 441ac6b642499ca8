"""The adjoint sweep of many steps in one compiled call: `torch.while_loop` over the adjoint of a step, see `integrate.whole`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..integrate.compiled import compiled_loop
from ..integrate.plan import Monitor, Plan
from ..integrate.whole import MOST_BYTES, ROOM, handed_on, takes_whole
from ..methods.runge_kutta import powers
from ..system.system import Flat, System
from .compiled import named
from .direct import DirectLinearizer
from .linearize import Linearizer
from .problem import Problem

__all__ = ["sweeps_whole", "whole_sweep"]


def sweeps_whole(problem: Problem, y0: Tensor, t_eval: Tensor | None, inputs: Sequence[Tensor]) -> bool:
    """Whether derivatives of a solve are taken in one compiled loop too: the loop carries cotangents of all inputs, so they must be few."""
    plan = problem.plan
    if problem.sweep is not None or type(plan.monitor).adjoint is not Monitor.adjoint or not named(problem.system):
        return False
    carried = sum(x.nbytes for x in inputs)
    # as for a forward loop that keeps all stages: here their cotangents are laid out
    n_samples = 0 if t_eval is None else t_eval.shape[0]
    return carried <= MOST_BYTES // 4 and takes_whole(plan, y0.shape[0], y0.shape[1], n_samples)


def _dense_weights(matrix: Tensor, theta: Tensor) -> Tensor:
    """``dense_weights`` of a method, of its ``dense_matrix``."""
    found = powers(theta, matrix.shape[1])
    # as compiled code a product with a 1 x 1 matrix, which Euler's is, crashes
    return found @ matrix.T if matrix.shape[1] > 1 else found * matrix[:, 0]


def _rounds_back(
    system: System,
    plan: Plan,
    wanted: tuple[int, ...],
    hands_over: bool,
    matrix: Tensor,
    inputs: tuple[Tensor, ...],
    count: Tensor,
    t: Tensor,
    h: Tensor,
    states: Tensor,
    stages: Tensor,
    t_eval: Tensor,
    step: Tensor,
    samples_bar: Tensor,
    states_bar: Tensor,
    bar: Tensor,
    totals: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``count`` steps taken back, from ``bar``, the cotangent of the last state: that of the first, and ``totals`` with those of inputs.

    Of ``t``, ``h`` and ``states`` the entry behind the last step is the end of it, a step of size zero. ``step`` (T, B): which of these
    steps a sample lies in, other numbers for those elsewhere. ``states_bar``: cotangents of the states by themselves.
    """
    room, rows, n = states.shape
    sampled = t_eval.shape[0] > 0
    stage_bars = states.new_empty(0)
    if sampled:
        here = (step >= 0) & (step < room - 1)
        index = torch.where(here, step, 0)
        size = h.gather(0, index)
        theta = (t_eval - t.gather(0, index)) / torch.where(size == 0, 1.0, size)
        # a sample at the end of a step is the state there
        ends = theta == 1.0
        values = torch.where(here.unsqueeze(-1), samples_bar, 0.0)
        states_bar = states_bar.scatter_add(0, (index + ends).unsqueeze(-1).expand_as(values), values)
        weights = torch.where((here & ~ends).unsqueeze(-1), _dense_weights(matrix, theta) * size.unsqueeze(-1), 0.0).to(values.dtype)
        spread = weights.transpose(1, 2).unsqueeze(-1) * values.unsqueeze(1)
        stage_bars = values.new_zeros(room, spread.shape[1], rows, n)
        stage_bars = stage_bars.scatter_add(0, index[:, None, :, None].expand_as(spread), spread)
        if hands_over:
            # the last stage of a step is the first of the next: one evaluation less
            first = stage_bars[:, :1] + pad(stage_bars[:-1, -1:], (0, 0, 0, 0, 0, 0, 1, 0))
            stage_bars = torch.cat([first, stage_bars[:, 1:-1]], dim=1)

    def bind(values: Sequence[Tensor]) -> Flat:
        merged = list(inputs)
        for i, value in zip(wanted, values, strict=True):
            merged[i] = value
        return system.bind_module(merged)

    def going(k: Tensor, *_: Tensor) -> Tensor:
        return k >= 0

    def body(k: Tensor, bar: Tensor, *totals: Tensor) -> tuple[Tensor, ...]:
        place = k.reshape(1)

        def at(x: Tensor) -> Tensor:
            return x.index_select(0, place).squeeze(0)

        start, size = at(t), at(h)
        linearize = DirectLinearizer(bind, [inputs[i] for i in wanted], totals, list(at(stages).unbind()) if plan.direct else [], False)
        times = [(start + size * c).to(plan.real) for c in plan.method.nodes]
        bars = list(at(stage_bars).unbind()) if sampled else []
        found = plan.method.adjoint_step(linearize, times, size.to(plan.real).unsqueeze(-1), at(states), bar, bars, False)
        return handed_on((k - 1, found.y + at(states_bar), *linearize.totals), (k, bar, *totals))

    if not (hands_over and sampled):
        bar = bar + states_bar.index_select(0, count.reshape(1)).squeeze(0)
        count = count - 1
    _, bar, *found = torch.while_loop(going, body, (count, bar, *totals))
    return bar, tuple(found)


def whole_sweep(
    problem: Problem,
    grid: dict[str, Tensor],
    t_eval: Tensor | None,
    linearize: Linearizer,
    bars: Sequence[Tensor | None],
) -> Tensor | None:
    """The cotangent of the initial state, with those of inputs added to ``linearize``; None where the loop cannot be compiled.

    ``bars``: as in `discrete.eager_sweep`.
    """
    plan, method = problem.plan.of_steps, problem.plan.method
    final_bar, samples_bar, states_bar, _ = bars
    states = grid["states"].detach()
    n_steps, (rows, n) = grid["t"].shape[0], states.shape[1:]
    inputs = tuple(x.detach() for x in linearize.inputs)
    sampled = samples_bar is not None and t_eval is not None
    hands_over = method.end_index == len(method.nodes) - 1 and not plan.direct
    pull = compiled_loop(_rounds_back, plan.compile, states.device.type, n)

    end = grid["t"][-1:] + grid["h"][-1:]
    t, h = torch.cat([grid["t"], end]), torch.cat([grid["h"], torch.zeros_like(end)])
    stages = grid["stages"].detach() if plan.direct else states.new_empty(0)
    bar = states.new_zeros(rows, n)
    if final_bar is not None:
        bar = torch.where((grid["status"] >= 0).unsqueeze(-1), final_bar, 0.0)
    totals = tuple(torch.zeros_like(inputs[i]) for i in linearize.wanted)
    no_times, no_samples = grid["t"][:0], states[:0]
    # a graph for a whole step hides what fun reaches: an evaluation of its own looks
    linearize.check_next = True
    linearize(end[0].to(plan.real), states[-1])
    for base in reversed(range(0, n_steps, ROOM)):
        count = min(ROOM, n_steps - base)

        def window(x: Tensor, size: int = ROOM + 1, base: int = base) -> Tensor:
            part = x[base : base + size]
            return pad(part, (*([0, 0] * (x.dim() - 1)), 0, size - part.shape[0]))

        sizes = window(h)
        if base + count < n_steps:
            sizes[-1] = 0.0
        more = states.new_zeros(ROOM + 1, rows, n) if states_bar is None else window(states_bar)
        if states_bar is not None and base + count < n_steps:
            more[-1] = 0.0
        found = pull(
            problem.system,
            plan,
            tuple(linearize.wanted),
            hands_over,
            method.dense_matrix(torch.float64, states.device),
            inputs,
            torch.full((), count, device=states.device),
            window(t),
            sizes,
            window(states),
            window(stages, ROOM) if plan.direct else stages,
            t_eval if sampled else no_times,
            grid["sample_step"] - base if sampled else no_times.long(),
            samples_bar if sampled else no_samples,
            more,
            bar,
            totals,
        )
        if found is None:
            return None
        bar, totals = found
    linearize.n_fun += n_steps * method.n_stages
    linearize.accumulate(totals)
    return bar
