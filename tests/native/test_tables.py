"""Numbers picked from a table by an integer that is computed from the time: compiled as uncompiled."""

from __future__ import annotations

import warnings

import pytest
import torch

from adjoint import solve_ivp
from adjoint.native.tracing import PickedByNumbers

KNOTS = torch.linspace(0, 1, 6, dtype=torch.float64)
TABLE = torch.tensor([[0.2, 1.0], [0.5, 2.0], [0.9, 1.0], [0.4, 0.5], [0.3, 0.1], [0.7, 0.2]], dtype=torch.float64)


def linear(t, y, table):
    i = torch.searchsorted(KNOTS, t).clamp(1, 5)
    w = (t - KNOTS[i - 1]) / (KNOTS[i] - KNOTS[i - 1])
    return -y * (table[i - 1] + w * (table[i] - table[i - 1]))


def steps(t, y, table):
    return -y * table[torch.bucketize(t, KNOTS[1:-1]), 1] * TABLE[torch.bucketize(t, KNOTS[1:-1])][0]


def columns(t, y, table):
    # what this gives still broadcasts where the index leaves a dimension behind
    return -y * (table.T[..., torch.bucketize(t, KNOTS[1:-1])] * y).sum()


@pytest.mark.compile
@pytest.mark.parametrize("function", [linear, steps, columns])
def test_interpolation_in_time(function):
    found = []
    for compiled in (False, True):
        y0, table = torch.tensor([1.0, 0.5], requires_grad=True), TABLE.clone().requires_grad_()
        for _ in range(1 + compiled):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                # those of steps are told of
                warnings.filterwarnings("ignore", message="fun jumps")
                y = solve_ivp(function, (0.0, 1.0), y0, (table,), rtol=1e-6, atol=1e-6, compile=compiled).y[-1]
        found.append([y.detach(), *torch.autograd.grad(y.sum(), (y0, table))])
    for mine, truth in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(mine, truth)


ONE, LESS, FEW = torch.tensor(1), torch.tensor(-1, dtype=torch.int8), torch.tensor([2, 0])
MASK = torch.tensor([True, False, True, True])
INDICES = [
    (..., ONE), (..., ONE, slice(None)), (ONE, ..., 0), (None, ..., LESS), (ONE, FEW), (ONE, slice(None), FEW), (slice(None), ONE, FEW),
    (ONE, ..., LESS), (ONE, MASK), (MASK, ONE), (ONE, [0, 2]), (..., ONE, None), (ONE, torch.tensor(True)), (2, ONE), ONE, (ONE, ONE, LESS),
]  # fmt: skip


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_the_other_parts_of_an_index(index):
    x = torch.arange(4 * 4 * 3).reshape(4, 4, 3)
    with PickedByNumbers():
        found = x[index]
    torch.testing.assert_close(found, x[index])
