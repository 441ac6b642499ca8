"""What is counted of a trajectory does not depend on those beside it, nor on whether the steps are compiled."""

import pytest
import torch

from adjoint import SplitFunction, solve_dae, solve_ivp

ENDS = (1.0, 2.0, 1.6)
STARTS = torch.tensor([[2.0, 0.3], [1.0, -0.5], [-2.0, 1.0]], dtype=torch.float64)
P = torch.tensor(3.0, dtype=torch.float64)


def oscillator(t, y, p):
    return torch.stack([y[..., 1], p * (1 - y[..., 0] ** 2) * y[..., 1] - y[..., 0] + torch.sin(3 * t)], -1)


def part(t, y, p):
    return torch.stack([y[..., 1], torch.sin(3 * t) - y[..., 0]], -1)


def rest(t, y, p):
    return torch.stack([0 * y[..., 1], p * (1 - y[..., 0] ** 2) * y[..., 1]], -1)


def constrained(t, y, yp, p):
    return torch.stack([yp[..., 0] - y[..., 1] * y[..., 0] + p * torch.sin(t), y[..., 1] + y[..., 0] ** 2 - 2], -1)


def height(t, y, p):
    return y[..., 0] - 0.5


def last(t, y, p):
    return y[..., 0] - 0.6


last.terminal = 2

AROUND = {
    "t_eval": {"t_eval": [0.0, 0.1, 0.15, 0.8], "rtol": 1e-5},
    "step_ts": {"step_ts": [0.4, 0.9], "rtol": 1e-5},
    "events": {"events": [height, last], "step_ts": [0.4, 0.9], "dense_output": True, "rtol": 1e-5},
}


def counts(solve, fun, y0, **how):
    """Of each trajectory alone, and of all together: evaluations and steps."""
    alone = [solve(fun, (0.0, end), y, args=(P,), throw=False, **how).stats for y, end in zip(y0, ENDS, strict=True)]
    ends = torch.tensor(ENDS, dtype=torch.float64)
    many = solve(fun, (torch.zeros_like(ends), ends), y0, args=(P,), batched=True, throw=False, **how).stats
    return [[(s.n_fun, s.n_steps) for s in alone], list(zip(many.n_fun.tolist(), many.n_steps.tolist(), strict=True))]


METHODS = ("tsit5", "dopri8", "verner7", "kvaerno5", "rodas5p", "radau5", "bdf", "abm")


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("method", METHODS)
def test_one_and_many(method, around):
    one, many = counts(solve_ivp, oscillator, STARTS, method=method, **AROUND[around])
    assert one == many


@pytest.mark.parametrize("around", ["t_eval", "events"])
@pytest.mark.parametrize("method", ["verner7", "rodas5p"])
def test_compiled(method, around):
    known = counts(solve_ivp, oscillator, STARTS, method=method, **AROUND[around])
    assert counts(solve_ivp, oscillator, STARTS, method=method, compile=True, **AROUND[around]) == known


@pytest.mark.parametrize("around", AROUND)
def test_in_two_parts(around):
    one, many = counts(solve_ivp, SplitFunction(part, rest), STARTS, method="kencarp4", **AROUND[around])
    assert one == many


@pytest.mark.parametrize("around", AROUND)
def test_with_constraints(around):
    y0 = torch.stack([STARTS[:, 0], 2 - STARTS[:, 0] ** 2], -1)
    one, many = counts(solve_dae, constrained, y0, method="radau", **AROUND[around])
    assert one == many
