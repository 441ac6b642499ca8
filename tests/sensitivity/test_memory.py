"""What a solve keeps for its backward pass: one state per step with the discrete adjoint, whatever fun allocates."""

from __future__ import annotations

import torch

from adjoint import Backprop, DiscreteAdjoint, solve_ivp


class _Wide(torch.nn.Module):
    """A state of 8 numbers a row, and a hidden layer that is 64 times as wide."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Tanh(), torch.nn.Linear(512, 8))

    def forward(self, t, y):
        return self.net(y)


def _saved_bytes(gradient, steps):
    """Distinct bytes that autograd keeps alive between forward and backward, parameters and inputs left out."""
    fun, y0 = _Wide(), torch.randn(32, 8)
    own = {x.untyped_storage().data_ptr() for x in [*fun.parameters(), y0]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sol = solve_ivp(fun, (0.0, 1.0), y0, method="rk4", first_step=1.0 / steps, gradient=gradient)
    total = sum(s.nbytes() for s in kept.values())
    sol.y.sum().backward()
    return total


def test_one_state_per_step():
    state = 32 * 8 * 8
    few, many = (_saved_bytes(DiscreteAdjoint(), n) for n in (10, 50))
    per_step = (many - few) / 40
    assert state <= per_step <= 1.25 * state


def test_backprop_keeps_what_fun_keeps():
    few, many = (_saved_bytes(Backprop(), n) for n in (10, 50))
    assert (many - few) / 40 > 4 * 32 * 512 * 8
    # of which the looks at fun before the solve are the most
    assert many > 50 * _saved_bytes(DiscreteAdjoint(), 50)


def test_nothing_is_kept_without_derivatives():
    fun, y0 = _Wide(), torch.randn(4, 8)
    with torch.no_grad():
        sol = solve_ivp(fun, (0.0, 1.0), y0, method="rk4", first_step=0.1)
    assert sol.y.grad_fn is None
