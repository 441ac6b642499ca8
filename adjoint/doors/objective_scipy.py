"""Adapters to `scipy.optimize`, which works on NumPy vectors on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import InvalidInput, RootError
from .layout import Layout

if TYPE_CHECKING:
    from .objective import SteadyStateObjective

__all__ = ["ScipyAdapter", "least_squares", "minimize"]

_TAKES_HESSIAN = {"trust-exact", "dogleg", "trust-constr"}
_TAKES_PRODUCTS = {"trust-ncg", "trust-krylov", "newton-cg"}
_GRADIENT_ONLY = {"cg", "bfgs", "l-bfgs-b", "tnc", "slsqp"}


class ScipyAdapter:
    """``fun``, ``jac``, ``hess``, ``hessp``, ``residual``, ``residual_jacobian`` of flat NumPy vectors.

    Where no steady state is found the objective is infinite, so that trust-region methods and line searches step back.
    """

    def __init__(self, objective: SteadyStateObjective, like: Any) -> None:
        self.objective = objective
        self.layout = Layout.of(like, "p0")
        flat = self.layout.flatten(like, "p0").detach()
        self.start = flat.cpu().double().numpy()
        self._dtype, self._device = flat.dtype, flat.device
        #: number of points at which no steady state was found
        self.failures = 0

    def structured(self, x: np.ndarray) -> Any:
        """A NumPy vector as the user's parameters."""
        return self.layout.unflatten(torch.as_tensor(np.array(x), dtype=self._dtype, device=self._device))

    @staticmethod
    def _numpy(x: torch.Tensor) -> np.ndarray:
        return x.detach().cpu().double().numpy()

    def fun(self, x: np.ndarray) -> float:
        """The objective, infinite where there is no steady state."""
        try:
            with torch.no_grad():
                return float(self.objective.value(self.structured(x)))
        except RootError:
            self.failures += 1
            return float("inf")

    def jac(self, x: np.ndarray) -> np.ndarray:
        """The gradient, NaN where there is no steady state."""
        try:
            return self._numpy(self.layout.flatten(self.objective.gradient(self.structured(x)), "gradient"))
        except RootError:
            return np.full(len(x), np.nan)

    def hess(self, x: np.ndarray) -> np.ndarray:
        """The Hessian, ``(m, m)``."""
        try:
            return self._numpy(self.objective.hessian(self.structured(x))).reshape(len(x), len(x))
        except RootError:
            # SciPy sets up its model of a point before it rejects the point for its infinite value, and wants a finite matrix for that
            return np.eye(len(x))

    def hessp(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """The product of the Hessian with ``v``."""
        return self._numpy(self.layout.flatten(self.objective.hvp(self.structured(x), self.structured(v)), "product"))

    def residual(self, x: np.ndarray) -> np.ndarray:
        """The residuals."""
        return self._numpy(self.objective.residual(self.structured(x)))

    def residual_jacobian(self, x: np.ndarray) -> np.ndarray:
        """Their Jacobian."""
        return self._numpy(self.objective.residual_jacobian(self.structured(x)))


def minimize(objective: SteadyStateObjective, p0: Any, method: str, **options: Any) -> Any:
    """See `SteadyStateObjective.minimize`."""
    from scipy import optimize

    taken = sorted({"fun", "x0", "jac", "hess", "hessp"} & set(options))
    if taken:
        raise InvalidInput(f"minimize sets {', '.join(taken)} itself")
    name = method.lower()
    adapter = ScipyAdapter(objective, p0)
    second: dict[str, Any] = {}
    if name in _TAKES_PRODUCTS:
        second["hessp"] = adapter.hessp
    elif name in _TAKES_HESSIAN:
        second["hess"] = adapter.hess
    elif name not in _GRADIENT_ONLY:
        choices = sorted(_TAKES_HESSIAN | _TAKES_PRODUCTS | _GRADIENT_ONLY)
        raise InvalidInput(f"method must be one of {', '.join(choices)}, got {method!r}")
    result = optimize.minimize(adapter.fun, adapter.start, method=method, jac=adapter.jac, **second, **options)
    result["p"] = adapter.structured(result.x)
    result["failed_states"] = adapter.failures
    return result


def least_squares(objective: SteadyStateObjective, p0: Any, **options: Any) -> Any:
    """See `SteadyStateObjective.least_squares`."""
    from scipy import optimize

    adapter = ScipyAdapter(objective, p0)
    result = optimize.least_squares(adapter.residual, adapter.start, jac=adapter.residual_jacobian, **options)  # type: ignore[arg-type]
    result["p"] = adapter.structured(result.x)
    return result
