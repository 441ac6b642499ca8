"""What comes back from a root solve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg import Log
from ..nonlinear import RootStatus
from ..system.transforms import functorch_active
from .solution import Ended

__all__ = ["RootSolution", "RootStats"]

_MESSAGES = {
    RootStatus.SUCCESS: "the iteration converged",
    RootStatus.MAX_STEPS: "max_steps was reached before the iteration converged",
    RootStatus.STALLED: "no step made the residual smaller",
    RootStatus.NON_FINITE: "fun gave NaN or infinity",
    RootStatus.SINGULAR: "the Jacobian became singular",
    RootStatus.DIVERGED: "the iteration diverged",
    RootStatus.UNSOLVED: "the iterative linear solver did not converge",
}


@dataclass(frozen=True)
class RootStats:
    """Work of a root solve: integers, or one per system in a ``(B,)`` tensor when batched.

    The counts of ``log`` go on counting when derivatives are taken: one factorisation at the solution serves all of them.
    """

    n_steps: int | Tensor
    n_fun: int | Tensor
    n_jac: int | Tensor
    log: Log = field(default_factory=Log)

    @property
    def n_newton(self) -> int | Tensor:
        """Iterations: the same as ``n_steps``."""
        return self.n_steps

    @property
    def n_factorizations(self) -> int:
        """Matrices factorised so far, all systems together."""
        return self.log.n_factorizations + self.log.n_refactorizations

    @property
    def n_solves(self) -> int:
        """Right-hand sides solved for so far, all systems together."""
        return self.log.n_solves


@dataclass(frozen=True)
class RootSolution(Ended):
    """A root.

    Attributes
    ----------
    x : Tensor or pytree
        Like ``x0``; NaN where the solve failed.
    residual_norm : float or Tensor
        Root mean square of ``fun / f_scale`` at the last iterate; ``(B,)`` when batched.
    status : int or Tensor
        0 success, negative a failure (see `message`); ``(B,)`` when batched.
    stats : RootStats
        Work counters.
    note : str
        What "auto" chose, and anything else worth knowing.
    """

    x: Any
    residual_norm: float | Tensor
    status: int | Tensor
    stats: RootStats
    note: str = ""

    said: ClassVar[dict[Any, str]] = _MESSAGES

    def with_tensors(self, function: Callable[[Any], Any]) -> RootSolution:
        """The same with ``function`` of the root."""
        return replace(self, x=function(self.x))

    @property
    def nfev(self) -> int | Tensor:
        """SciPy's name of ``stats.n_fun``."""
        return self.stats.n_fun

    @property
    def njev(self) -> int | Tensor:
        """SciPy's name of ``stats.n_jac``."""
        return self.stats.n_jac

    def __repr__(self) -> str:
        def shape(x: Any) -> str:
            if isinstance(x, Tensor):
                return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
            return str(torch.utils._pytree.tree_map(lambda leaf: tuple(leaf.shape), x))

        lines = [f"  x: {shape(self.x)}"]
        if not functorch_active():
            if isinstance(self.status, int):
                lines.insert(0, f"  status: {self.status} ({self.message})")
                lines.append(f"  residual norm: {self.residual_norm:.2e}")
                lines.append(f"  iterations: {self.stats.n_steps}, {self.stats.n_fun} evaluations of fun, {self.stats.n_jac} Jacobians")
            else:
                failed = int((self.status < 0).sum())
                lines.insert(0, f"  status: {self.status.numel() - failed} systems succeeded, {failed} failed")
            lines.append(f"  linear algebra: {self.stats.n_factorizations} factorisations, {self.stats.n_solves} right-hand sides")
            if self.note:
                lines.append(f"  note: {self.note}")
        return "RootSolution(\n" + "\n".join(lines) + "\n)"
