"""The automatic first step: what it evaluates lies within the span and within ``max_step``."""

from __future__ import annotations

import pytest
import torch

from adjoint import odeint, solve_ivp
from adjoint.methods import METHODS

METHOD = pytest.mark.parametrize("method", ["tsit5", "dopri8", "rodas5p", "radau5", "bdf", "abm"])


def times_seen(solve, batched=False):
    """Times at which a slowly changing function is called: its first step would be far longer than the span."""
    seen = []

    def slow(t, y):
        seen.extend(t.reshape(-1).tolist())
        return 1e-3 + 0 * y

    with torch.no_grad():
        solve(slow, torch.ones(2, 1) if batched else torch.ones(1))
    return min(seen), max(seen)


@METHOD
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("end", [0.7, -0.7])
def test_within_the_span(method, batched, end):
    assert METHODS[method].adaptive
    found = times_seen(lambda f, y: solve_ivp(f, (0.1, 0.1 + end), y, method=method, batched=batched, rtol=1e-3, atol=1e-3), batched)
    assert min(0.1, 0.1 + end) <= found[0] and found[1] <= max(0.1, 0.1 + end)


def test_each_row_within_its_own_span():
    ends = torch.tensor([0.5, 3.0])
    seen = []

    def slow(t, y):
        seen.append(t.clone())
        return 1e-3 + 0 * y

    solve_ivp(slow, (0.0, ends), torch.ones(2, 1), batched=True, rtol=1e-3, atol=1e-3)
    assert bool((torch.stack(seen) <= ends).all())


@METHOD
def test_within_the_longest_step(method):
    """Of the first two calls, at the start and at the end of the trial step."""
    seen = []

    def slow(t, y):
        seen.append(t.item())
        return 1e-3 + 0 * y

    with torch.no_grad():
        solve_ivp(slow, (0.0, 1.0), torch.ones(1), method=method, max_step=0.1)
    assert all(b - a <= 0.1 + 1e-12 for a, b in zip([0.0, *sorted(seen)], sorted(seen), strict=False))


def test_odeint_within_the_span():
    found = times_seen(lambda f, y: odeint(f, y, torch.tensor([1.0, 0.0]), rtol=1e-3, atol=1e-3))
    assert found == (0.0, 1.0)
