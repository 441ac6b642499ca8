"""Right-hand sides with known solutions, and the settings that make any method take steps worth testing."""

from __future__ import annotations

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
