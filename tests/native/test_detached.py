"""What has no derivative, or one of its own, has the same derivative compiled as it has uncompiled."""

from __future__ import annotations

import pytest
import torch

from adjoint import solve_ivp


def without_gradients(t, y, p):
    with torch.no_grad():
        rate = y.sin() + p
    return -p * rate * y


@torch.no_grad()
def decorated(y):
    return y.cos()


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, bar):
        return bar * ctx.saved_tensors[0] * 7


FUNCTIONS = {
    "no_grad": without_gradients,
    "decorated": lambda t, y, p: -p * decorated(y) * y,
    "detach": lambda t, y, p: -p * y.detach() * y,
    "data": lambda t, y, p: -p * y.data * y,
    "own": lambda t, y, p: -p * _Own.apply(y),
}


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:compile=True")
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_derivatives_are_those_of_eager_mode(name):
    found = []
    for compiled in (False, True):
        y0, p = torch.tensor([1.0, 0.5], requires_grad=True), torch.tensor(0.7, requires_grad=True)
        y = solve_ivp(FUNCTIONS[name], (0.0, 1.0), y0, (p,), rtol=1e-6, atol=1e-6, compile=compiled).y[-1]
        found.append([y.detach(), *torch.autograd.grad(y.sum(), (y0, p))])
    for mine, truth in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, truth)
