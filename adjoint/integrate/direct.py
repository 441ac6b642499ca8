"""The linear systems of Rosenbrock methods as pure tensor code, for compiled steps and their adjoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.elimination import Elimination

__all__ = ["MOST", "DirectStages", "StartMatrix", "start_jacobian"]

Flat = Callable[[Tensor, Tensor], Tensor]

#: unknowns up to which elimination is written out, and up to which a dense Jacobian is taken at all
UNROLLED = 6
MOST = 512


def _unit(like: Tensor, i: int, axis: int) -> Tensor:
    """The ``i``-th unit vector for every row."""
    column = like.select(axis, 0)
    return torch.stack([torch.ones_like(column) if i == j else torch.zeros_like(column) for j in range(like.shape[axis])], axis)


def start_jacobian(f: Flat, t: Tensor, y: Tensor, axis: int) -> tuple[Tensor, list[Tensor] | Tensor]:
    """``f_t``, shaped as the state, and ``f_y``, as its rows if they are few, else ``(B, n, n)``; one pullback for each component."""
    out, pull, *_ = torch.func.vjp(f, t, y)
    n = y.shape[axis]
    if n <= UNROLLED:
        pairs = [pull(_unit(out, i, axis)) for i in range(n)]
        return torch.stack([time for time, _ in pairs], axis), [row for _, row in pairs]
    eye = torch.eye(n, dtype=out.dtype, device=out.device)
    times, rows = torch.vmap(lambda e: pull(e.unsqueeze(1 - axis).expand_as(out)))(eye)
    return (times, rows.movedim(-1, 0)) if axis == 0 else (times.t(), rows.movedim(1, 0))


class StartMatrix:
    """``I - hd J`` for ``hd`` of shape ``(B,)``, factorised; see `DirectStages` for ``axis``.

    ``rows`` are those of ``J`` if there are few of them, else ``J`` itself is given: ``(B, n, n)``.
    """

    def __init__(self, jacobian: list[Tensor] | Tensor, hd: Tensor, axis: int) -> None:
        self.axis = axis
        self.small: Elimination | None = None
        if isinstance(jacobian, Tensor):
            eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
            self.lu, self.pivots, info = torch.linalg.lu_factor_ex(eye - hd[:, None, None] * jacobian)
            self.singular = (info != 0)[:, None]
            return
        entries = [[(1.0 if i == j else 0.0) - hd * x for j, x in enumerate(row.unbind(axis))] for i, row in enumerate(jacobian)]
        self.small = Elimination(entries)

    def solve(self, b: Tensor, transposed: bool = False) -> Tensor:
        """For one side, shaped as the state."""
        if self.small is not None:
            parts = b.unbind(self.axis)
            return torch.stack(self.small.solve_transposed(parts) if transposed else self.small.solve(parts), self.axis)
        side = b.t() if self.axis == 0 else b
        x = torch.linalg.lu_solve(self.lu, self.pivots, side.unsqueeze(-1), adjoint=transposed).squeeze(-1)
        x = torch.where(self.singular, float("nan"), x)
        return x.t() if self.axis == 0 else x


class DirectStages:
    """`StageEquations` of one step whose stages are linear systems. Made inside of the code that is compiled.

    ``axis``: that of the components in states, 0 for ``(n, B)`` and 1 for ``(B, n)``.
    """

    def __init__(self, f: Flat, axis: int) -> None:
        self.f, self.axis = f, axis
        self._jacobian: list[Tensor] | Tensor = []
        self._slope: Tensor | None = None
        self._matrix: StartMatrix | None = None

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        return self.f(t, y)

    def begin(self, t: Tensor, y: Tensor) -> None:
        """Take the Jacobian in state and time."""
        self._slope, self._jacobian = start_jacobian(self.f, t, y, self.axis)

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """See `StageEquations.time_slope`."""
        assert self._slope is not None
        return self._slope

    def mass(self, v: Tensor) -> Tensor:
        """See `StageEquations.mass`: there is no matrix in front of the slopes here."""
        return v

    def solve(self, t: Tensor, y: Tensor, hd: Tensor, b: Tensor) -> Tensor:
        """See `StageEquations.solve`; ``hd`` is the same for all stages."""
        if self._matrix is None:
            self._matrix = StartMatrix(self._jacobian, hd if self.axis == 0 else hd.squeeze(-1), self.axis)
        return self._matrix.solve(b)
