"""Forward sensitivities: the tangents of the computed steps in every direction at once, taken beside the solve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CapturedTensorLost, InvalidInput, UnsupportedCombination
from ..integrate import Record
from ..integrate.plan import Grid
from ..system.transforms import functorch_active
from .asked import LOST, Asked
from .discrete import eager_sweep
from .node import SolveNode
from .problem import Outputs, Problem
from .sweep import tangents

__all__ = ["ForwardSensitivity"]


@dataclass(frozen=True)
class ForwardSensitivity:
    """Sensitivities of the solution in all parameters, propagated forwards (staggered direct; Caracotsios & Stewart 1985): each step takes
    the tangents along with its own matrices, and ``backward()`` is a product with them.

    For few parameters and many outputs or many backward passes: the cost grows with the number of entries of everything that requires grad
    (one direction each, ``y0`` of a batch counted once for all trajectories), that of a backward pass does not depend on the solve. The
    derivatives are those of the computed solution, equal to `DiscreteAdjoint`'s to rounding, which also serves derivatives of derivatives,
    ``torch.func`` transforms, and losses on ``sol(t)``, ``yp`` and events.

    Parameters
    ----------
    rowwise : bool
        With ``batched=True``: every tensor that ``fun`` depends on and requires grad has the batch as its leading dimension, and a
        trajectory sees its own part only. Then one direction serves all trajectories. Checked by a random direction; `InvalidInput` if not.
    max_directions : int
        More than that raise `UnsupportedCombination` (default 10,000).
    chunk_size : int or None
        Directions that are taken at a time; default all.
    """

    rowwise: bool = False
    max_directions: int = 10_000
    chunk_size: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_directions", "chunk_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InvalidInput(f"{name} must be a positive integer, got {value!r}")

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        tensors = (anchors, t_eval, y0, *inputs)
        wanted = [i for i, x in enumerate(tensors) if x is not None and x.requires_grad]
        if not problem.plan.keep_states or not wanted or functorch_active() or not torch.is_grad_enabled():
            return Outputs(*SolveNode.apply(problem, *tensors))
        if problem.plan.compile is not None:
            raise UnsupportedCombination(
                "compile=True with ForwardSensitivity is not supported: leave compile out, or use DiscreteAdjoint()"
            )
        if self.rowwise and not problem.batched:
            raise InvalidInput("ForwardSensitivity(rowwise=True) is for batched=True")
        plan = replace(problem.plan, keep_stages=problem.plan.keep_stages or problem.algebra is not None)
        mine = replace(problem, plan=plan)
        record = _solve(mine, anchors, t_eval, y0, inputs)
        directions = self._directions(mine, tensors, wanted)
        grid = Grid.of(record).mapped(Tensor.detach)
        mine.witness.check("ForwardSensitivity evaluates fun again, and it is another function than in the solve")
        found = self._propagate(mine, grid, tensors, directions)
        if self.rowwise:
            _check_rows(mine, grid, tensors, directions, found)
        return Outputs(*SolveNode.apply(replace(mine, known=[record], sweep=partial(_contract, directions, found)), *tensors))

    def _directions(self, problem: Problem, tensors: Sequence[Tensor | None], wanted: Sequence[int]) -> list[_Direction]:
        """Which input each direction is of, and where it is one."""
        rows = problem.system.rows
        out: list[_Direction] = []
        for i in wanted:
            x = tensors[i]
            assert x is not None
            if i == 1:
                # a sample moves with its own time only
                out.append(_Direction(i, None))
            elif i == 0:
                out += [_Direction(i, k, True) for k in range(x.shape[0])]
            elif i == 2 or self.rowwise:
                if x.shape[:1] != (rows,):
                    raise InvalidInput(
                        f"ForwardSensitivity(rowwise=True): a tensor of shape {tuple(x.shape)} does not have the batch ({rows}) as its "
                        "leading dimension: expand it, or leave rowwise out"
                    )
                out += [_Direction(i, k, True, unit) for unit in _units(x) for k in range(x[0].numel() if rows else 0)]
            else:
                out += [_Direction(i, k, False, unit) for unit in _units(x) for k in range(x.numel())]
        if len(out) > self.max_directions:
            raise UnsupportedCombination(
                f"ForwardSensitivity would take {len(out)} directions (max_directions = {self.max_directions}): use DiscreteAdjoint(), "
                "whose cost does not depend on the number of parameters"
            )
        return out

    def _propagate(
        self, problem: Problem, grid: Grid, tensors: Sequence[Tensor | None], directions: Sequence[_Direction]
    ) -> tuple[Tensor, Tensor]:
        """Tangents of ``final`` (P, B, n) and ``samples`` (P, T, B, n)."""
        chunk = self.chunk_size or len(directions)
        finals, samples = [], []
        for begin in range(0, len(directions), chunk):
            part = directions[begin : begin + chunk]
            final, sample = _tangents(problem, grid, tensors, _seeds(tensors, part), len(part))
            finals.append(final)
            samples.append(sample)
        return torch.cat(finals), torch.cat(samples)


@dataclass(frozen=True)
class _Direction:
    """Entry ``place`` of input ``index``: of its flattened self, or, with ``rows``, of each row. Of ``t_eval`` (1): all entries at once;
    of the anchors (0): that anchor of all trajectories. ``unit``: along the real axis or the imaginary one."""

    index: int
    place: int | None
    rows: bool = False
    unit: complex = 1.0


def _units(x: Tensor) -> tuple[complex, ...]:
    """The axes along which entries move: what ``fun`` makes of complex ones need not be differentiable in them as such."""
    return (1.0, 1.0j) if x.is_complex() else (1.0,)


def _solve(problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Record:
    with torch.no_grad():
        return problem.run(inputs, y0, anchors, t_eval)


def _seeds(tensors: Sequence[Tensor | None], directions: Sequence[_Direction]) -> list[Tensor | None]:
    """``(P, *x.shape)`` for every input that some direction moves."""
    out: list[Tensor | None] = [None] * len(tensors)
    for k, direction in enumerate(directions):
        x = tensors[direction.index]
        assert x is not None
        seed = out[direction.index]
        if seed is None:
            seed = out[direction.index] = x.detach().new_zeros(len(directions), *x.shape)
        if direction.place is None:
            seed[k] = 1.0
        elif direction.index == 0:
            seed[k, direction.place] = 1.0
        elif direction.rows:
            seed[k].reshape(x.shape[0], -1)[:, direction.place].fill_(direction.unit)
        else:
            seed[k].reshape(-1)[direction.place].fill_(direction.unit)
    return out


def _tangents(
    problem: Problem, grid: Grid, tensors: Sequence[Tensor | None], seeds: Sequence[Tensor | None], count: int
) -> tuple[Tensor, Tensor]:
    anchors, t_eval, _, *inputs = (None if x is None else x.detach() for x in tensors)
    moved = [i for i, seed in enumerate(seeds) if seed is not None]

    def along(*some: Tensor) -> tuple[Tensor, Tensor]:
        dots: list[Any] = [None] * len(seeds)
        for i, dot in zip(moved, some, strict=True):
            dots[i] = dot
        final, samples, *_ = tangents(problem, grid, anchors, t_eval, inputs, dots)  # type: ignore[arg-type]
        return final, samples

    # nothing that is known here requires grad: a result that does depends on a tensor which the solve does not know of
    with torch.enable_grad():
        final, samples = torch.vmap(along, randomness="same")(*(seeds[i] for i in moved))  # pyright: ignore[reportArgumentType]
    if final.requires_grad or samples.requires_grad:
        raise CapturedTensorLost("within the span " + LOST)
    return final, samples


def _check_rows(
    problem: Problem,
    grid: Grid,
    tensors: Sequence[Tensor | None],
    directions: Sequence[_Direction],
    found: tuple[Tensor, Tensor],
) -> None:
    """A direction that is random in every row must move each row as its own part says."""
    generator = torch.Generator().manual_seed(0)
    rows = problem.system.rows
    weights = torch.randn(len(directions), rows, generator=generator, dtype=torch.float64).to(found[0].real)
    seeds: list[Tensor | None] = [None] * len(tensors)
    for k, direction in enumerate(directions):
        x = tensors[direction.index]
        if x is None or direction.index < 2:
            continue
        seed = seeds[direction.index]
        if seed is None:
            seed = seeds[direction.index] = x.detach().new_zeros(1, *x.shape)
        seed[0].reshape(rows, -1)[:, direction.place] += direction.unit * weights[k].to(x.dtype)
    if all(seed is None for seed in seeds):
        return
    final, _ = _tangents(problem, grid, tensors, seeds, 1)
    mine = [k for k, d in enumerate(directions) if d.index >= 2]
    want = torch.einsum("pb,pbn->bn", weights[mine].to(found[0]), found[0][mine])
    size = want.abs().amax().clamp(min=1e-300)
    if bool(((final[0] - want).abs() > 1e-5 * size).any()):
        raise InvalidInput(
            "ForwardSensitivity(rowwise=True): trajectories depend on other rows than their own of what requires grad: leave rowwise out"
        )


def _contract(
    directions: Sequence[_Direction], found: tuple[Tensor, Tensor], asked: Asked
) -> tuple[Tensor | None, ...]:
    """Cotangents of the inputs."""
    problem, grid, _, _, _, bars, wants = asked
    _, samples_bar, states_bar, stages_bar = bars
    if any(bar is not None and bool((bar != 0).any()) for bar in (states_bar, stages_bar)):
        return eager_sweep(asked)
    final_bar = asked.final_bar
    finals, samples = found
    rows = torch.zeros(finals.shape[:2], dtype=finals.real.dtype, device=finals.device)
    times = None
    if final_bar is not None:
        rows = rows + (finals.conj() * final_bar).sum(-1).real
    if samples_bar is not None and samples.shape[1]:
        # failed trajectories are NaN from there on, and nothing is asked of them
        known = (grid.sample_step >= 0).unsqueeze(-1)
        products = (torch.where(known, samples, 0.0).conj() * torch.where(known, samples_bar, 0.0)).sum(-1).real
        rows = rows + products.sum(1)
        for k, direction in enumerate(directions):
            if direction.index == 1:
                times = products[k].double()
    everything = asked.point
    out: list[Tensor | None] = [None] * len(everything)
    for index in {d.index for d in directions}:
        x = everything[index]
        if not wants[index] or x is None:
            continue
        mine = [k for k, d in enumerate(directions) if d.index == index]
        if index == 1:
            out[index] = times
        elif index == 0:
            out[index] = rows[mine].double()
        else:
            along = [rows[[k for k in mine if directions[k].unit == unit]] for unit in _units(x)]
            parts = [part.t() if directions[mine[0]].rows else part.sum(-1) for part in along]
            out[index] = (torch.complex(*parts) if x.is_complex() else parts[0]).to(x.dtype).reshape(x.shape)
    problem.backward_report(0, 0)
    return tuple(out)
