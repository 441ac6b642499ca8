"""Right-hand sides with known solutions, and the settings that make any method take steps worth testing."""

from __future__ import annotations

import numpy as np
import torch

from adjoint.methods import METHODS

ADAPTIVE = sorted(name for name, m in METHODS.items() if m.adaptive)
FIXED = sorted(name for name, m in METHODS.items() if not m.adaptive)
ALL = [*ADAPTIVE, *FIXED]


def lotka_volterra(t, u, p):
    """Batches of parameters and states by their leading dimensions."""
    x, y = u.unbind(-1)
    a, b, c, d = p.unbind(-1)
    return torch.stack([a * x - b * x * y, -c * y + d * x * y], -1)


def driven(t, y, p):
    """Nonlinear, non-autonomous; ``t`` is 0-d or (B,)."""
    t = t.unsqueeze(-1) if t.dim() else t
    return torch.sin(p[..., :1] * y.flip(-1)) - p[..., 1:] * y * torch.cos(t)


def options(method: str, steps: int = 6, span: float = 1.0, **tolerances):
    """Solver options: a constant step for fixed methods, tolerances for adaptive ones."""
    if METHODS[method].adaptive:
        return {"method": method, **({"rtol": 1e-5, "atol": 1e-7} | tolerances)}
    return {"method": method, "first_step": span / steps}


def constant_steps(method: str, h: float):
    """Options that make every method take steps of size ``h``, error estimate or not."""
    if METHODS[method].adaptive:
        return {"method": method, "first_step": h, "max_step": h, "rtol": 1e30, "atol": 1e30}
    return {"method": method, "first_step": h}


def check_drawn_to_a_cosine(solve):
    """A stiff pytree in single precision, ``y' = -k (y - cos t)``, with its value and derivative in ``k`` at 1; the transient is gone."""
    rate = torch.tensor(100.0, dtype=torch.float32, requires_grad=True)

    def fun(t, y, rate):
        return {"a": -rate * (y["a"] - torch.cos(t)), "b": (y["a"].sum() - y["b"][0],)}

    y0 = {"a": torch.zeros(2, 2, dtype=torch.float32), "b": (torch.ones((), dtype=torch.float32),)}
    sol = solve(fun, (0.0, 1.0), y0, (rate,))
    assert sol.y["a"].dtype == torch.float32 and sol.y["a"].shape == (2, 2, 2)
    k, t = 100.0, 1.0
    truth = k * (k * np.cos(t) + np.sin(t)) / (k * k + 1) - k * k / (k * k + 1) * np.exp(-k * t)
    torch.testing.assert_close(sol.y["a"][-1], torch.full((2, 2), truth, dtype=torch.float32), rtol=2e-4, atol=1e-5)
    (found,) = torch.autograd.grad(sol.y["a"][-1, 0, 0], rate)
    # d/dk of k (k cos + sin) / (k^2 + 1)
    slope = ((2 * k * np.cos(t) + np.sin(t)) * (k * k + 1) - k * (k * np.cos(t) + np.sin(t)) * 2 * k) / (k * k + 1) ** 2
    torch.testing.assert_close(found, torch.tensor(slope, dtype=torch.float32), rtol=5e-2, atol=1e-6)


HEAT_POINTS = 100


def heat_with_source(t, u, c):
    """On `HEAT_POINTS` points, with both ends at zero."""
    left = torch.cat([torch.zeros_like(u[..., :1]), u[..., :-1]], -1)
    right = torch.cat([u[..., 1:], torch.zeros_like(u[..., :1])], -1)
    return c * HEAT_POINTS**2 * (left - 2 * u + right) + torch.exp(-u)


def heat_by_scipy(c):
    """The state at 0.3 from zero."""
    from scipy.integrate import solve_ivp

    side, start = torch.tensor(c, dtype=torch.float64), np.zeros(HEAT_POINTS)
    fun = lambda t, u: heat_with_source(t, torch.as_tensor(u), side).numpy()  # noqa: E731
    return solve_ivp(fun, (0.0, 0.3), start, method="LSODA", lband=1, uband=1, rtol=1e-10, atol=1e-12).y[:, -1]
