"""What methods with implicit stages ask of the equations of a step, and their adjoints of what is linearised there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .family import Pullback

if TYPE_CHECKING:
    from .collocation import CollocationTableau
    from .tableaux_rosenbrock import RosenbrockTableau

__all__ = ["StageEquations", "StageLinearize"]


class StageEquations(Protocol):
    """A right-hand side that also solves the equations of implicit stages. Which way is the caller's business: by Newton's iteration
    while the solution is computed, as a differentiable root when it is differentiated. Of what stands here a method asks what its kind
    of stages takes: one after the other, all at once, linear ones, or of a right-hand side in two parts."""

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """``f(t, y)``."""
        ...

    def begin(self, t: Tensor, y: Tensor) -> None:
        """A step is attempted from here."""
        ...

    def implicit(self, index: int, t: Tensor, base: Tensor, hd: float | Tensor, guess: Tensor) -> Tensor:
        """``k = f(t, base + hd k)`` for stage ``index`` (of two parts, by the implicit one); ``guess`` is one of ``k``. NaN in rows where
        there is no solution to be found."""
        ...

    def coupled(
        self, tableau: CollocationTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor
    ) -> tuple[list[Tensor], Tensor | None]:
        """The slopes ``k_i = f(times[i], y + h sum_j a_ij k_j)``, NaN in rows where no solution is found; and the error estimate of the
        step, or None where nobody needs it (it is not differentiated). ``k1`` is ``f(t, y)``."""
        ...

    def solve(self, t: Tensor, y: Tensor, hd: float | Tensor, b: Tensor) -> Tensor:
        """``(I - hd f_y(t, y))^-1 b``, with ``(t, y)`` where the step began."""
        ...

    def time_slope(self, t: Tensor, y: Tensor) -> Tensor:
        """``f_t(t, y)``."""
        ...

    def mass(self, v: Tensor) -> Tensor:
        """``M v`` for equations ``M y' = f(t, y)`` (in `solve`, ``M`` is in the place of ``I``); else ``v``."""
        ...

    def linear_stages(
        self, tableau: RosenbrockTableau, times: Sequence[Tensor], h: float | Tensor, y: Tensor, k1: Tensor, slope: Tensor
    ) -> tuple[Tensor, list[Tensor]] | None:
        """The whole step of `Rosenbrock.step`, which begins with ``k1`` and ``f_t`` = ``slope``, where that is cheaper than stage by
        stage; else None."""
        ...

    def explicit(self, t: Tensor, y: Tensor) -> Tensor:
        """The explicit part at ``(t, y)``."""
        ...

    def both(self, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The explicit and the implicit part at ``(t, y)``."""
        ...


class StageLinearize(Protocol):
    """What the adjoint of a step with implicit stages asks for, each method as its stages take it; see `StageEquations`."""

    def __call__(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        """``f(t, y)`` (of two parts, the implicit one) with its pullback, as for explicit methods."""
        ...

    def explicit(self, t: Tensor, y: Tensor) -> tuple[Tensor, Pullback]:
        """The same for the explicit part."""
        ...

    def stages(self) -> list[Tensor]:
        """The recorded slopes of the step."""
        ...

    def solve_adjoint(self, index: int, point: Tensor, w: Tensor) -> Tensor:
        """``(I - h a_ii f_y(Y_i))*^-1 w`` for stage ``index``, whose value ``Y_i`` is ``point``."""
        ...

    def coupled_adjoint(
        self, a: Sequence[Sequence[float]], times: Sequence[Tensor], points: Sequence[Tensor], w: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Pullback]]:
        """The solution ``v_i`` of ``E_i* v_i + h sum_j a_ji G_j* v_j = w_i`` at the values ``points`` of the stages; and for every stage
        the pullback ``v -> (-G_i* v, -F_t* v)``, which adds ``-F_p* v`` to the cotangents of the inputs."""
        ...

    def solve_start(self, t: Tensor, y: Tensor, hd: float | Tensor, w: Tensor) -> Tensor:
        """``(I - hd f_y(t, y))*^-1 w``, with ``(t, y)`` where the step began."""
        ...

    def mass_adjoint(self, v: Tensor) -> Tensor:
        """``M* v``; ``v`` where there is no ``M``."""
        ...

    def bend_mass(self, x: Callable[[], Sequence[Tensor]], v: Sequence[Tensor]) -> None:
        """Add the gradient of ``sum_i Re <v_i, M x_i>`` in the inputs to their cotangents; ``x`` is not called where there is no ``M``."""
        ...

    def bend(
        self, t: Tensor, y: Tensor, k: Sequence[Tensor], d: Sequence[float], v: Sequence[Tensor], scale: float | Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Of ``phi = sum_i Re <v_i, f_y k_i + d_i f_t>``: the gradients of ``scale phi`` in ``y`` and ``t``, and ``phi``."""
        ...
