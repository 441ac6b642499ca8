"""Steps that are small enough for derivatives of implicit equations, where components of the state rest.

Steps go by the error of the state. Where components do not move, nobody looks at what a displacement of them would do: modes that the
solution does not excite, in the extreme those of a state that rests altogether. Explicit equations have a displaced solution beside them
there (`integrate/companion.py`). One of implicit equations would have to satisfy the constraints; but what it would do is known from their
matrices ``E = F_y'`` and ``G = F_y``, where constraints are eigenvalues at infinity: along an eigenvector of ``lambda E v + G v = 0`` a
displacement goes like ``exp(lambda t)``, and the steps that were taken make of it the product of the method's stability functions
``R(h lambda)``. Where these differ by more than derivatives may be off, the solve is made once more, with steps as long as they may be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..integrate import Plan, Record
from ..integrate.companion import STANDING
from ..methods.collocation import CollocationTableau
from ..methods.family import TableauMethod
from ..methods.tableaux_rosenbrock import RosenbrockTableau
from ..system.capture import readable
from ..system.remarks import remark
from ..system.structure import dense_pencil
from ..system.system import System, VmappedSystem

__all__ = ["longest_step", "some_rest"]

#: the part of the span for which a component rests, from which on its modes are looked at
_PART = 0.01
#: steps in which they are, trajectories at once, and unknowns of which eigenvalues are computed; of more unknowns a state that rests
#: altogether is told of
_STEPS, _ROWS, _MOST = 6, 64, 200
#: how far a displacement may be off in units of the relative tolerance: from here on a solve is made anew, and then
_WRONG, _RIGHT = 100.0, 10.0
#: steps that are not too many
_AFFORDED = 20_000


def longest_step(system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor]) -> float | None:
    """How long the steps of a solve may be so that they bear derivatives in components that rest; None where those that were taken do, or
    where nothing can be said. Warns where that is too short. Who bounds steps by ``max_step`` has been told."""
    h = record.h
    found = _found_resting(plan, h, record.states)
    if found is None:
        return None
    resting, size, span, part = found
    if resting.shape[-1] != size.shape[-1]:
        return _told(plan, int(part.argmax()), h.shape[1])
    weight = (resting.any(-1) * h.abs())[:, part > _PART].sum(-1)
    bounds = []
    for k in weight.argsort(descending=True)[:_STEPS].tolist():
        for rows in resting[k].any(-1).nonzero()[:, 0].split(_ROWS):
            bounds += _bounds(system, plan, record, inputs, resting[k], size[k], k, rows)
    if not bounds:
        return None
    length, row = min(bounds)
    if length > 0 and float(span.max()) / length <= min(_AFFORDED, plan.max_steps / 2):
        return length
    return _told(plan, row, h.shape[1])


def some_rest(plan: Plan, h: Tensor, states: Tensor) -> bool:
    """Whether components rest for so long, in steps of these sizes (K, B) through ``states`` (K + 1, B, n), that `longest_step` has to look
    at them."""
    return _found_resting(plan, h, states) is not None


def _found_resting(plan: Plan, h: Tensor, states: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """What rests in which steps (K, B, n), of many unknowns whether all do (K, B, 1); what counts as nothing (K, B, n); lengths of spans
    (B,) and the part of them that is rest. None where that is too little."""
    if not len(h) or len(states) != len(h) + 1 or plan.max_step < float("inf") or not plan.method.adaptive or not readable(states):
        return None
    size = torch.maximum(states[1:].abs(), states[:-1].abs()) * plan.rtol + plan.atol
    # a trajectory that is through has steps of size zero
    still = ((states[1:] - states[:-1]).abs() <= STANDING * size) & (h != 0).unsqueeze(-1)
    span = h.abs().sum(0)
    resting = still.all(-1, keepdim=True) if states.shape[-1] > _MOST else still
    part = (resting * h.abs().unsqueeze(-1)).sum(0).amax(-1) / torch.where(span > 0, span, 1.0)
    return (resting, size, span, part) if bool((part > _PART).any()) else None


def _told(plan: Plan, row: int, rows: int) -> None:
    where = f" of trajectory {row}" if rows > 1 else ""
    advice = "give method='radau' (radau5), which takes longer ones, or bound" if plan.method.multistep else "bound"
    remark(
        f"components of the state{where} rest: steps go by what moves, and derivatives may be those of steps that are too long for them: "
        f"{advice} max_step= by what a small displacement would need, or let solve_ivp look after it, with the equations as y' = f(t, y)",
        RuntimeWarning,
    )


def _bounds(
    system: System | VmappedSystem,
    plan: Plan,
    record: Record,
    inputs: Sequence[Tensor],
    resting: Tensor,
    unit: Tensor,
    k: int,
    rows: Tensor,
) -> list[tuple[float, int]]:
    """The longest steps for those of the trajectories ``rows`` that need shorter ones than they took from the step ``k`` on, zero where no
    step is short enough; and which trajectories."""
    h = record.h[k:, rows]
    rates = _modes(system, record, inputs, resting, unit, k)[rows] * h[0].sign().unsqueeze(-1)
    factor, sizes = _stability(plan), h.abs().to(torch.float64).unsqueeze(-1)
    rtol = float(torch.as_tensor(plan.rtol).min())
    off = _off(factor(sizes * rates).cumprod(0), torch.exp(sizes.cumsum(0) * rates), sizes)
    bad = (off > min(_WRONG * rtol, 1e-2)).nonzero()[:, 0]
    return [(_halved(factor, rates[i], float(sizes[:, i].sum()), min(_RIGHT * rtol, 1e-2)), int(rows[i])) for i in bad.tolist()]


def _modes(system: System | VmappedSystem, record: Record, inputs: Sequence[Tensor], resting: Tensor, unit: Tensor, k: int) -> Tensor:
    """``(B, n)``: eigenvalues of the equations at the start of a step, of those eigenvectors that move what rests; zero for others."""
    size = record.h[k]
    t, y = record.t[k].to(unit.dtype), record.states[k]
    slope = (record.states[k + 1] - y) / torch.where(size == 0, 1.0, size).to(unit.dtype).unsqueeze(-1)
    E, G = dense_pencil(system, inputs, t, y, slope)
    # in units of the tolerance, in which no component is small beside others
    real = torch.float64
    E, G = (x.to(torch.promote_types(x.dtype, real)) * unit.to(real).unsqueeze(-2) for x in (E, G))
    length = torch.where(size == 0, 1.0, size.abs()).to(real).reshape(-1, 1, 1)
    iteration, wrong = torch.linalg.solve_ex(E + length * G, E)
    usable = (wrong == 0) & torch.isfinite(iteration).flatten(1).all(-1)
    values, vectors = torch.linalg.eig(torch.where(usable.reshape(-1, 1, 1), iteration, 0.0))
    seen = torch.where(resting.unsqueeze(-1), vectors.abs(), 0.0).amax(-2) > 1e-6 * vectors.abs().amax(-2)
    # what is left out are constraints, which a step satisfies whatever its size
    seen = seen & (values.abs() > 1e-5) & usable.unsqueeze(-1)
    return torch.where(seen, (values - 1) / (length.squeeze(-1) * torch.where(seen, values, 1.0)), 0.0)


def _off(made: Tensor, true: Tensor, sizes: Tensor) -> Tensor:
    """How far displacements ``made`` (K, ..., m) of steps of these ``sizes`` (K, ..., 1) are off the ``true`` ones, at the end or in the
    mean: the largest of all modes."""
    error = ((made - true).abs() / true.abs().clamp(min=1.0)).nan_to_num(1.0, 1.0, 1.0)
    mean = (error * sizes).sum(0) / sizes.sum(0)
    return torch.maximum(mean, error[-1]).amax(-1)


def _halved(factor: Callable[[Tensor], Tensor], rates: Tensor, span: float, allowed: float) -> float:
    """The longest of steps of equal size with which displacements are ``allowed`` to be that far off; zero where they would be too many."""
    count = 1
    while count <= 2 * _AFFORDED:
        number = torch.linspace(1, count, min(count, 64), dtype=rates.real.dtype, device=rates.device).round().unsqueeze(-1)
        size = span / count
        if float(_off(factor(size * rates) ** number, torch.exp(size * number * rates), torch.ones_like(number))) <= allowed:
            return size
        count = 2 * count if count < 16 else count + count // 4
    return 0.0


def _stability(plan: Plan) -> Callable[[Tensor], Tensor]:
    """``R(z)`` of the method; multistep methods stay at rest with their first order."""
    method = plan.method
    tableau: Any = method.tableau if isinstance(method, TableauMethod) else None
    if isinstance(tableau, RosenbrockTableau):
        a, coupling, gamma = _lower(tableau.a), _lower(tableau.coupling), tableau.gamma
        return lambda z: _sum(z, tableau.b, lambda at, one: one * (1 - gamma * at) - gamma * (at * a.to(at) + coupling.to(at)), gamma)
    if isinstance(tableau, CollocationTableau):
        matrix = torch.tensor(tableau.a, dtype=torch.float64)
        return lambda z: _sum(z, tableau.b, lambda at, one: one - at * matrix.to(at), 1.0)
    return lambda z: 1 / (1 - z)


def _sum(z: Tensor, b: Sequence[float], matrix: Callable[[Tensor, Tensor], Tensor], gamma: float) -> Tensor:
    """``1 + b^T u`` with ``matrix u = gamma z (1, ..., 1)``."""
    at = z.reshape(*z.shape, 1, 1)
    one = torch.eye(len(b), dtype=z.dtype, device=z.device)
    u = torch.linalg.solve_ex(matrix(at, one), (gamma * at).expand(*z.shape, len(b), 1))[0]
    return 1 + (u.squeeze(-1) * torch.tensor(b, dtype=z.dtype, device=z.device)).sum(-1)


def _lower(rows: Sequence[Sequence[float]]) -> Tensor:
    full = torch.zeros(len(rows), len(rows), dtype=torch.float64)
    for i, row in enumerate(rows):
        full[i, : len(row)] = torch.tensor(row, dtype=torch.float64)
    return full
