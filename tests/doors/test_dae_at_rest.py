"""Implicit equations whose state rests: derivatives are told to be doubtful, and right where steps are bounded."""

from __future__ import annotations

import warnings

import pytest
import torch

from adjoint import solve_dae, solve_ivp

A = torch.tensor([[0.0, 1.0], [-1.0, -0.1]], dtype=torch.float64)
END = torch.linalg.matrix_exp(10.0 * A)


def residual(t, y, yp):
    return yp - y @ A.T


def with_constraint(t, y, yp):
    return torch.cat([yp[..., :2] - y[..., :2] @ A.T, y[..., 2:] - y[..., :1] - y[..., 1:2]], -1)


def jacobian(fun, y0, **options):
    y0 = torch.tensor(y0, dtype=torch.float64, requires_grad=True)
    sol = solve_dae(fun, (0.0, 10.0), y0, **options)
    return torch.stack([torch.autograd.grad(sol.y[-1, i], y0, retain_graph=True)[0][:2] for i in range(2)])


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.compile)])
@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_a_state_at_rest_is_told_of(method, compile):
    with pytest.warns(RuntimeWarning, match="rests at the start, for 10 of a span of 10"):
        jacobian(residual, [0.0, 0.0], method=method, compile=compile)
    with pytest.warns(RuntimeWarning, match="rests at the start"):
        jacobian(with_constraint, [0.0, 0.0, 0.0], method=method, compile=compile)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # at rest "bdf" stays with its first order
        found = jacobian(with_constraint, [0.0, 0.0, 0.0], method=method, compile=compile, max_step=0.1)
    torch.testing.assert_close(found, END, rtol=0, atol=0.25 if method == "bdf" else 1e-4)


def test_rows_and_mass_matrices_are_told_of():
    start = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="of trajectory 1 rests"):
        solve_dae(residual, (0.0, 10.0), start, batched=True)
    with pytest.warns(RuntimeWarning, match="rests at the start"):
        solve_ivp(lambda t, y: y @ A.T, (0.0, 10.0), start[1], method="rodas5p", mass_matrix=torch.eye(2, dtype=torch.float64))


def test_what_moves_and_what_nobody_differentiates_is_not_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jacobian(residual, [1.0, 0.0])
        solve_dae(residual, (0.0, 10.0), torch.zeros(2, dtype=torch.float64))
        # it settles in the end, and begins slowly
        p = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        solve_dae(lambda t, y, yp, p: yp + p * (y - t**2 / (1 + t**4)), (0.0, 50.0), torch.zeros(1, dtype=torch.float64), args=(p,))
