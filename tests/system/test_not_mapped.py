"""What ``torch.vmap`` cannot map over is named by every door."""

from __future__ import annotations

import pytest
import torch

import adjoint


def branches(t, y, p):
    return -p * y if y.sum() > 0 else y


def asks(t, y, p):
    return -p * y * (1 + 0 * float(y.detach().sum()))


def writes(t, y, p):
    out = torch.zeros(2)
    out[0] -= p * y[0]
    return out


DOORS = {
    "solve_ivp": lambda f, p: adjoint.solve_ivp(f, (0.0, 1.0), torch.ones(2), (p,)).y,
    "kvaerno5": lambda f, p: adjoint.solve_ivp(f, (0.0, 1.0), torch.ones(2), (p,), method="kvaerno5").y,
    "solve_dae": lambda f, p: adjoint.solve_dae(lambda t, y, yp, p: yp - f(t, y, p), (0.0, 1.0), torch.ones(2), args=(p,)).y,
    "solve_root": lambda f, p: adjoint.solve_root(lambda x, p: f(0.0, x, p) + 1, torch.ones(2), (p,)).x,
    "odeint": lambda f, p: adjoint.odeint(lambda t, y: f(t, y, p), torch.ones(2), torch.tensor([0.0, 1.0])),
}


@pytest.mark.parametrize("fun", [branches, asks, writes])
@pytest.mark.parametrize("door", DOORS)
def test_is_named(door, fun):
    with pytest.raises(adjoint.UnsupportedCombination, match="in the place of"):
        torch.vmap(lambda p: DOORS[door](fun, p))(torch.rand(3) + 0.5)
