"""Systems that stand in for the user's: with totals that are kept, and the stationarity conditions of least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..system.realification import totals_in_parts, unwrapped, weights_in_parts
from ..system.system import Flat, StateSpec, System
from ..system.witness import beside
from ..torch_internals import temporarily_clear_interpreter_stack

__all__ = ["ConservedSystem", "StationarySystem", "check_conserved"]


@dataclass(frozen=True)
class _Derived:
    """A system made of another one, with its states."""

    base: Any

    @property
    def spec(self) -> StateSpec:
        return self.base.spec

    @property
    def rows(self) -> int:
        return self.base.rows


@dataclass(frozen=True)
class ConservedSystem(_Derived):
    """``base`` with some equations replaced by ``weights x = totals``.

    Where ``weights fun = 0`` identically, the equations at ``pivots`` follow from the others and may be left out. ``totals`` (B, k) is one
    more differentiable input, the last.
    """

    weights: Tensor
    pivots: Tensor
    totals: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Those of the base, then the totals."""
        return (*self.base.inputs, self.totals)

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function for given inputs."""
        *rest, totals = inputs
        f = self.base.bind(rest)
        weights = self.weights

        def g(t: Tensor, x: Tensor) -> Tensor:
            return f(t, x).index_copy(1, self.pivots, x @ weights.T - totals)

        return g


@dataclass(frozen=True)
class StationarySystem(_Derived):
    """``J* r = 0``, the condition of a minimum of ``|r|^2``, for a base that gives ``r``."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Those of the base."""
        return self.base.inputs

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function for given inputs."""
        f = self.base.bind(inputs)

        def g(t: Tensor, x: Tensor) -> Tensor:
            residual, pull, *_ = torch.func.vjp(lambda at: f(t, at), x)
            return pull(residual)[0]

        return g


def check_conserved(conserved: Any, system: System, x0: Tensor, least_squares: bool) -> ConservedSystem:
    """Parse ``conserved=W`` or ``(W, totals)`` and choose the equations that the totals replace."""
    if least_squares:
        raise UnsupportedCombination("conserved= with least_squares=True is not supported: add the totals to the residuals of fun")
    given = None
    weights = conserved
    if isinstance(conserved, (tuple, list)) and not _rows_of_numbers(conserved):
        if len(conserved) != 2:
            raise InvalidInput(f"conserved must be W or (W, totals), got {len(conserved)} items")
        weights, given = conserved
    n, rows = x0.shape[1], system.rows
    spec = system.spec
    like = reduce(torch.promote_types, spec.dtypes)
    given = None if given is None else torch.as_tensor(given, dtype=like, device=x0.device)
    if spec.split:
        given = totals_in_parts(given, spec)
    with temporarily_clear_interpreter_stack():
        weights = torch.atleast_2d(torch.as_tensor(unwrapped(weights), dtype=like, device=x0.device)).detach()
        weights = weights_in_parts(weights, spec) if spec.split else weights
        pivots = _pivots(weights, n)
    k = weights.shape[0]
    totals = x0 @ weights.T if given is None else given
    try:
        totals = totals.broadcast_to(rows, k)
    except RuntimeError as error:
        raise InvalidInput(f"the totals of conserved must have shape ({k},) or (B, {k}), got {tuple(totals.shape)}") from error
    return ConservedSystem(system, weights, pivots, totals)


def _pivots(weights: Tensor, n: int) -> Tensor:
    """The equations that totals with these weights (k, n) replace."""
    import numpy as np
    import scipy.linalg

    if weights.shape[-1] != n or weights.dim() != 2:
        raise InvalidInput(f"conserved must have shape (k, {n}), rows of weights on the flat state, got {tuple(weights.shape)}")
    k = weights.shape[0]
    # pivoted QR: the k columns that make the weights best conditioned name the equations to leave out
    found: Any = scipy.linalg.qr(weights.cpu().numpy(), mode="economic", pivoting=True)
    _, r, order = found
    diagonal = np.abs(np.diag(r))
    if k > n or diagonal.min() <= 1e-10 * diagonal.max():
        raise InvalidInput("the rows of conserved are linearly dependent: leave the superfluous ones out")
    return torch.as_tensor(order[:k].copy(), dtype=torch.int64, device=weights.device)


def _rows_of_numbers(value: Any) -> bool:
    """Whether nested lists are the weights themselves, ``[[1.0, 1.0]]``, and no pair."""
    rows = [row for row in value if isinstance(row, (list, tuple))]
    if not rows:  # numbers: one row of weights; anything else: a pair
        return all(isinstance(x, (int, float, complex)) for x in value)
    return (
        len(rows) == len(value)
        and len({len(row) for row in rows}) == 1
        and all(isinstance(x, (int, float, complex)) for row in rows for x in row)
    )


def check_really_conserved(system: ConservedSystem, x: Tensor, inputs: Sequence[Tensor], where: str) -> None:
    """Raise `InvalidInput` where ``weights fun`` is not zero at ``x``, or beside it: replacing an equation would then change the problem.

    Beside it, because at a root nothing but rounding is left of ``fun``, and because a sum may vanish at one point by chance.
    """
    *rest, _ = inputs
    eps = torch.finfo(x.dtype).eps
    found = [system.base.bind(rest)(x.new_zeros(x.shape[0], dtype=x.dtype.to_real()), at) for at in (x, beside(x, eps**0.25))]
    residual = torch.stack(found if where == "the guess" else found[1:])
    residual = torch.where(torch.isfinite(residual).all(-1, keepdim=True), residual, 0.0)  # outside of the domain nothing can be said
    change = (residual @ system.weights.T).abs()
    size = residual.abs() @ system.weights.T.abs()
    worst = (change > max(1e-6, 1e4 * eps) * size + 1e-300).flatten(0, 1)
    change = change.flatten(0, 1)
    if bool(worst.any()):
        row = int(worst.any(0).nonzero()[0, 0])
        raise InvalidInput(
            f"row {row} of conserved is not conserved by fun: W fun is {float(change[:, row].max()):.3g} near {where}, not zero"
        )
