"""``method="scipy_solver"``: SciPy's integrators on the host, forwards only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import SolveError, UnsupportedCombination
from ..sensitivity.backsolve import Refuse
from ..system.capture import is_differentiable
from .request import Request

__all__ = ["scipy_samples"]

_NO_GRADIENT = (
    "method='scipy_solver' has no gradient in odeint: use odeint_adjoint, whose continuous adjoint can run on it, or another method"
)


def scipy_samples(request: Request) -> Any:
    """The states at ``request.t``, ``(T, *shape)`` each, by ``scipy.integrate.solve_ivp``.

    Raises
    ------
    UnsupportedCombination : with an event, for a complex state and an integrator that is real, or when the result is differentiated
    SolveError : the integrator gave up
    """
    import scipy.integrate

    spec = request.spec
    if request.event_fn is not None:
        raise UnsupportedCombination("method='scipy_solver' handles no event_fn: use one of the other methods")
    options = request.options
    name = options.get("solver", "LSODA")
    limits = {k: options[k] for k in ("min_step", "max_step") if options.get(k) not in (None, 0, float("inf"))}
    numpy_dtype = torch.empty(0, dtype=spec.dtype, device="cpu").numpy().dtype

    def fun(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.as_tensor(np.asarray(y, dtype=numpy_dtype), device=spec.device).reshape(1, -1)
        with torch.no_grad():
            rate = request.fun(torch.tensor(t, dtype=spec.real_dtype, device=spec.device), spec.unflatten(state))
        return spec.flatten(rate).reshape(-1).numpy(force=True)

    def tolerance(value: float | Tensor) -> Any:
        return value if isinstance(value, float) else value.reshape(-1).numpy(force=True)

    times = request.t.to(torch.float64).numpy(force=True)
    start = spec.flatten(request.y0).reshape(-1).numpy(force=True)
    found = scipy.integrate.solve_ivp(
        fun, (times[0], times[-1]), start, t_eval=times, method=name, rtol=tolerance(request.rtol), atol=tolerance(request.atol), **limits
    )
    if not found.success:
        raise SolveError(f"scipy's {name} stopped near t = {found.t[-1] if len(found.t) else times[0]:.8g}: {found.message}")
    flat = torch.as_tensor(np.ascontiguousarray(found.y.T), device=spec.device).to(spec.dtype).unsqueeze(1)
    return refuse_gradient(request, flat)


def refuse_gradient(request: Request, flat: Tensor) -> Any:
    """The result, which raises when its derivative is asked for instead of being silently constant."""
    spec = request.spec
    parameters: Sequence[Tensor] = list(request.func.parameters()) if isinstance(request.func, torch.nn.Module) else []
    deep = [x for x in (*tree_leaves(request.y0), request.t, *parameters) if is_differentiable(x)]
    if deep and torch.is_grad_enabled():
        (flat,) = Refuse.apply(_NO_GRADIENT, 1, flat, *deep)
    return spec.unflatten(flat)
