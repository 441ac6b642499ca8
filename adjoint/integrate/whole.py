"""Many attempts in one compiled call: `torch.while_loop` over `advance`, for solves so small that calls cost more than arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..methods.runge_kutta import powers
from .batch_events import no_events
from .batched import Attempt, Carry, advance, start_carry
from .columns import takes_columns
from .compiled import compiled_loop
from .packing import Kept, evaluations_of_attempt, record_of
from .plan import Monitor, Plan, Record

__all__ = ["MOST_BYTES", "ROOM", "handed_on", "integrate_whole", "takes_whole"]

Flat = Callable[[Tensor, Tensor], Tensor]

#: attempts in one call, and what their record may take: the loop may copy it at each of them
ROOM = 64
MOST_BYTES = 2**20


def takes_whole(plan: Plan, rows: int, width: int, n_samples: int) -> bool:
    """Whether a compiled solve of ``rows`` trajectories of ``width`` numbers runs as one loop, and not call by call."""
    if plan.compile is None or plan.events or plan.switch is not None or type(plan.monitor) is not Monitor:
        return False
    # the code of Rosenbrock steps is long: as a loop it takes twice as long to compile, which pays where calls are all that counts
    if plan.method.implicit and not (plan.direct and rows == 1):
        return False
    state = rows * width * plan.real.itemsize
    each = state * (1 + (len(plan.method.nodes) if plan.keep_stages else 0))
    return 0 < each * ROOM <= MOST_BYTES and 4 * state * n_samples <= MOST_BYTES and not takes_columns(True, rows, width)


def handed_on(out: Sequence[Tensor], given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What the body of a loop gives back: it may not hand on the very tensors that it was given."""
    return tuple(x.clone() if any(x is y for y in given) else x for x in out)


def _rounds(
    f: Flat,
    plan: Plan,
    matrix: Tensor,
    stops: Tensor,
    sign: Tensor,
    times: Tensor,
    carry: Carry,
    samples: tuple[Tensor, Tensor],
) -> tuple[Tensor, Carry, tuple[Tensor, Tensor], list[Tensor]]:
    """Attempts until all trajectories have ended or the log is full: their number, and a log of what they did.

    The log, if there is to be one, has ``(ROOM, B, ...)`` of the fields of `Attempt`, the state at its start and, where they are
    wanted, its stages.

    ``matrix`` (S, D): coefficients of the dense output. ``times`` (T, B): of the samples. ``samples``: their values (T, B, n), and the
    steps that they lie in (T, B).
    """
    sampled, kept, recorded = times.shape[0] > 0, plan.keep_stages, _recorded(plan)
    inside = (times != stops[0]) & (times != stops[-1])

    def logged(attempt: Attempt, y: Tensor) -> list[Tensor]:
        values = [attempt.t, attempt.h, attempt.segment, attempt.lands, attempt.accepted, y] if recorded else []
        return [*values, torch.stack(attempt.stages)] if kept else values

    like = [carry.t, carry.t, carry.segment, carry.running, carry.running, carry.y] if recorded else []
    log = [x.new_zeros((ROOM, *x.shape)) for x in like]
    if kept:
        log.append(carry.y.new_zeros((ROOM, len(plan.method.nodes), *carry.y.shape)))
    sizes = (1, len(carry), 2 * sampled, len(log))

    def parts(flat: tuple[Tensor, ...]) -> tuple[Tensor, Carry, tuple[Tensor, ...], tuple[Tensor, ...]]:
        a, b, c = sizes[0], sizes[0] + sizes[1], sum(sizes[:3])
        return flat[0], Carry(*flat[a:b]), flat[b:c], flat[c:]

    def going(*flat: Tensor) -> Tensor:
        i, carry, *_ = parts(flat)
        return (i < ROOM) & carry.running.any()

    def body(*flat: Tensor) -> tuple[Tensor, ...]:
        i, carry, samples, log = parts(flat)
        new, attempt = advance(f, plan, stops, sign, carry, sampled or kept)
        if sampled:
            samples = _sampled(matrix, times, inside, sign, carry, attempt, samples)
        place = (i.unsqueeze(0),)
        log = [torch.index_put(into, place, x.unsqueeze(0)) for into, x in zip(log, logged(attempt, carry.y), strict=True)]
        out = (i + 1, *new, *samples, *log)
        return handed_on(out, flat)

    start = (torch.zeros((), dtype=torch.int64, device=carry.t.device), *carry, *(samples if sampled else ()), *log)
    i, carry, taken, log = parts(torch.while_loop(going, body, start))
    return i, carry, (taken[0], taken[1]) if sampled else samples, list(log)


def _sampled(
    matrix: Tensor,
    times: Tensor,
    inside: Tensor,
    sign: Tensor,
    carry: Carry,
    attempt: Attempt,
    samples: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """The samples with those that lie in this attempt, if it was accepted."""
    y, step = samples
    # by the end as it was computed: t + h rounds, and no sample may fall between two steps
    here = inside & attempt.accepted & (times * sign > attempt.t * sign) & (times * sign <= attempt.end * sign)
    theta = torch.where(here, (times - attempt.t) / torch.where(attempt.h == 0, 1.0, attempt.h), 0.0)
    # products, not sums of few terms: what is elementwise would be computed anew for every number of every sample
    flat = torch.stack(attempt.stages).flatten(1)
    # as compiled code a product with a 1 x 1 matrix, which Euler's is, crashes
    terms = matrix.T @ flat if matrix.shape[1] > 1 else (matrix * flat).sum(0, keepdim=True)
    terms = terms.unflatten(1, carry.y.shape)
    value = carry.y + torch.einsum("tbd,dbn->tbn", (powers(theta, matrix.shape[1]) * attempt.h.unsqueeze(-1)).to(y.dtype), terms)
    return torch.where(here.unsqueeze(-1), value, y), torch.where(here, carry.n_accepted, step)


def _start(f: Flat, plan: Plan, stops: Tensor, times: Tensor, y0: Tensor) -> tuple[Tensor, Carry, tuple[Tensor, Tensor]]:
    """The direction of time, and the loop's first state and samples."""
    sign = torch.where(stops[-1] >= stops[0], 1.0, -1.0).to(torch.float64)
    carry, _ = start_carry(f, plan, stops, sign, y0, False)
    at_start = times == stops[0]
    return sign, carry, (torch.where(at_start.unsqueeze(-1), y0, float("nan")), torch.where(at_start, 0, -1))


def _begun(
    f: Flat, plan: Plan, matrix: Tensor, stops: Tensor, times: Tensor, y0: Tensor
) -> tuple[Tensor, tuple[Tensor, Carry, tuple[Tensor, Tensor], list[Tensor]]]:
    """The first round, with what comes before it; the direction of time first."""
    sign, carry, samples = _start(f, plan, stops, times, y0)
    return sign, _rounds(f, plan, matrix, stops, sign, times, carry, samples)


def _recorded(plan: Plan) -> bool:
    """Whether it is asked afterwards what the attempts were."""
    return plan.keep_states or plan.keep_stages or plan.keep_grid


def _kept(logs: Sequence[Sequence[Tensor]], counts: Sequence[int], plan: Plan) -> Kept:
    """The attempts of all calls, as `integrate_batched` keeps them."""
    if not _recorded(plan):
        return Kept([], [], [])
    columns = [[row for log, n in zip(logs, counts, strict=True) for row in log[j][:n].unbind()] for j in range(len(logs[0]))]
    t, h, segment, lands, accepted, y, *stages = columns
    attempts = [Attempt(a, a, b, c, d, e, []) for a, b, c, d, e in zip(t, h, segment, lands, accepted, strict=True)]
    return Kept(attempts, y if plan.keep_states else [], stages[0] if stages else [])


def integrate_whole(f: Flat, plan: Plan, anchors: Tensor, t_eval: Tensor | None, y0: Tensor) -> Record | None:
    """As `integrate_batched`; None where the loop cannot be compiled."""
    begin, go_on = (compiled_loop(x, plan.compile, y0.device.type, y0.shape[1]) for x in (_begun, _rounds))
    times = anchors[:0] if t_eval is None else t_eval
    matrix = plan.method.dense_matrix(torch.float64, y0.device).to(y0.dtype)
    if plan.direct:
        # code so long is compiled once, and not for the first round and all others
        sign, carry, samples = _start(f, plan, anchors, times, y0)
        found = go_on(f, plan, matrix, anchors, sign, times, carry, samples)
    else:
        sign, found = begin(f, plan, matrix, anchors, times, y0) or (anchors[0], None)
    if found is None:
        return None
    count, carry, samples, log = found
    logs = [log]
    counts = [int(count)]
    while counts[-1] == ROOM and bool(carry.running.any()):
        found = go_on(f, plan, matrix, anchors, sign, times, carry, samples)
        if found is None:
            return None
        count, carry, samples, log = found
        logs.append(log)
        counts.append(int(count))
    final = torch.where((carry.status >= 0).unsqueeze(-1), carry.y, float("nan"))
    reached = (times == anchors[-1]) & (carry.status == 0)
    values = torch.where(reached.unsqueeze(-1), final, samples[0])
    steps = torch.where(reached, carry.n_accepted - 1, samples[1])
    kept = _kept(logs, counts, plan)
    jumps = anchors.shape[0] > 2
    each = evaluations_of_attempt(plan, plan.keep_stages or times.shape[0] > 0, jumps)
    n_fun = (2 if plan.method.adaptive and plan.first_step is None else 1) + each * carry.attempts
    return record_of(plan, carry, (values, steps), kept, y0, n_fun, not jumps, no_events(y0))
