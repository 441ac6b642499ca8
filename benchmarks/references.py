"""Tight references, computed by peers and never by `adjoint`: what the error columns compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from .workloads import Case

__all__ = ["Reference", "reference"]

SAMPLED = 100  # trajectories of an ensemble that are checked
RTOL, ATOL = 1e-12, 1e-13

_numpy_ops: Any = SimpleNamespace(columns=lambda x: [x[..., i] for i in range(x.shape[-1])], stack=lambda xs: np.stack(xs, -1))


@dataclass(frozen=True)
class Reference:
    """Solution and gradients of the trajectories ``rows`` (None: of the whole); None where nothing could compute them."""

    rows: np.ndarray | None
    values: np.ndarray | None
    gradients: list[np.ndarray] | None
    how: str

    def value_error(self, ys: np.ndarray) -> float | None:
        """Largest error of any component after the start, relative to the largest component."""
        if self.values is None:
            return None
        ys = ys if self.rows is None else ys[:, self.rows]
        return float(np.abs(ys[1:] - self.values[1:]).max() / np.abs(self.values[1:]).max())

    def gradient_error(self, grads: Sequence[np.ndarray]) -> float | None:
        """Euclidean norm of the error over that of the gradient, all parameters together."""
        if self.gradients is None:
            return None
        flat = np.concatenate([(g if self.rows is None else g[self.rows]).ravel() for g in grads]).astype(np.float64)
        exact = np.concatenate([g.ravel() for g in self.gradients])
        return float(np.linalg.norm(flat - exact) / np.linalg.norm(exact))


def _scipy_values(case: Case) -> np.ndarray | None:
    """DOP853 on the sampled trajectories as one system."""
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        return None

    def fun(t: float, flat: np.ndarray) -> np.ndarray:
        return case.rhs(_numpy_ops, t, flat.reshape(case.y0.shape), *case.params).ravel()

    t = case.t_eval
    sol = solve_ivp(fun, (t[0], t[-1]), case.y0.ravel(), method="DOP853", t_eval=t, rtol=RTOL, atol=ATOL)
    return sol.y.T.reshape(len(t), *case.y0.shape)


def _torchdiffeq(case: Case) -> tuple[np.ndarray, list[np.ndarray]] | None:
    """dopri8 with a step ending at every save point (its interpolant is of low order), and backprop through it."""
    try:
        import torch

        from .peers.torchdiffeq import TorchdiffeqRunner
        from .workloads import loss

        tight = TorchdiffeqRunner("backprop", case, "cpu", method="dopri8", options={"step_t": torch.tensor(case.t_eval)})
    except ImportError:
        return None
    tight.keywords |= {"rtol": RTOL, "atol": ATOL}
    ys = tight.solve()
    grads = torch.autograd.grad(loss(ys, tight.target), list(tight.params))
    return ys.detach().numpy(), [g.numpy() for g in grads]


def reference(case: Case) -> Reference:
    """The reference of a case, in float64; ensembles are sampled evenly."""
    rows = np.unique(np.linspace(0, case.size - 1, min(case.size, SAMPLED)).astype(int)) if case.ensemble else None
    exact = case.cast(np.float64, rows)
    both = _torchdiffeq(exact)
    values, how = (None if both is None else both[0]), "torchdiffeq dopri8"
    if case.ensemble and (scipy_values := _scipy_values(exact)) is not None:
        values, how = scipy_values, "SciPy DOP853"
    how = f"values {how}, gradients backprop through torchdiffeq dopri8; rtol {RTOL:g}, float64"
    if values is None or both is None:
        how += " (not all packages are installed)"
    if rows is not None and len(rows) < case.size:
        how += f"; {len(rows)} of {case.size} trajectories"
    return Reference(rows, values, None if both is None else both[1], how)
