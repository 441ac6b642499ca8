"""The adjoint of a Rosenbrock step as pure tensor code, at its recorded stages, for the compiler."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..integrate.direct import StartMatrix, start_jacobian
from ..methods.runge_kutta import row_dot
from ..system.system import Flat

__all__ = ["DirectLinearizer"]

_AXIS = 1


class DirectLinearizer:
    """What `Rosenbrock.adjoint_step` asks for, without state but that of one step. States are ``(B, n)`` and real.

    Parameters
    ----------
    bind : the flat function of given values of the wanted inputs
    values : of the wanted inputs; ``totals`` are their cotangents so far
    ks : the recorded stages
    timed : whether cotangents of times are wanted
    """

    def __init__(
        self,
        bind: Callable[[Sequence[Tensor]], Flat],
        values: Sequence[Tensor],
        totals: Sequence[Tensor],
        ks: Sequence[Tensor],
        timed: bool,
    ) -> None:
        self.bind, self.values, self.totals, self.ks, self.timed = bind, tuple(values), tuple(totals), ks, timed
        self._matrix: StartMatrix | None = None

    def _accumulate(self, bars: Sequence[Tensor]) -> None:
        self.totals = tuple(total + bar for total, bar in zip(self.totals, bars, strict=True))

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor | None]]]:
        """See `Linearizer`."""
        out, pull, *_ = torch.func.vjp(lambda t, y, *values: self.bind(values)(t, y), t, y, *self.values)

        def pullback(v: Tensor) -> tuple[Tensor, Tensor | None]:
            time_bar, y_bar, *rest = pull(v)
            self._accumulate(rest)
            return y_bar, time_bar if self.timed else None

        return out, pullback

    def stages(self) -> list[Tensor]:
        """The recorded stages of the step."""
        return list(self.ks)

    def solve_start(self, t: Tensor, y: Tensor, hd: Tensor, w: Tensor) -> Tensor:
        """See `StartLinearize.solve_start`."""
        if self._matrix is None:
            self._matrix = StartMatrix(start_jacobian(self.bind(self.values), t, y, _AXIS)[1], hd.squeeze(-1), _AXIS)
        return self._matrix.solve(w, transposed=True)

    def mass_adjoint(self, v: Tensor) -> Tensor:
        """See `StartLinearize.mass_adjoint`: there is no matrix here."""
        return v

    def bend_mass(self, x: Callable[[], Sequence[Tensor]], v: Sequence[Tensor]) -> None:
        """See `StartLinearize.bend_mass`."""

    def bend(
        self, t: Tensor, y: Tensor, k: Sequence[Tensor], d: Sequence[float], v: Sequence[Tensor], scale: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """See `StartLinearize.bend`."""
        # phi = <J, sum_i v_i k_i^T> + <f_t, sum_i d_i v_i>
        n = y.shape[_AXIS]

        def phi(t: Tensor, y: Tensor, *values: Tensor) -> Tensor:
            slope, rows = start_jacobian(self.bind(values), t, y, _AXIS)
            along = sum((v_i * d_i for v_i, d_i in zip(v, d, strict=True) if d_i), torch.zeros_like(y))
            total = row_dot(slope, along)
            if isinstance(rows, Tensor):
                return total + (rows * torch.einsum("sbi,sbj->bij", torch.stack(list(v)), torch.stack(list(k)))).sum((-1, -2))
            for j in range(n):
                weights = sum((v_i[:, j : j + 1] * k_i for v_i, k_i in zip(v[1:], k[1:], strict=True)), v[0][:, j : j + 1] * k[0])
                total = total + row_dot(rows[j], weights)
            return total

        value, pull, *_ = torch.func.vjp(phi, t, y, *self.values)
        t_bar, y_bar, *rest = pull(scale.squeeze(-1))
        self._accumulate(rest)
        return y_bar, t_bar if self.timed else None, value if self.timed else None
