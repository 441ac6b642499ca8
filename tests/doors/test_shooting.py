"""Roots over solves, boundary values by shooting: what a solve differentiates inside of ``fun`` is not the doing of ``fun``."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import UnsupportedCombination, solve_dae, solve_ivp, solve_root

FINE = {"rtol": 1e-6, "atol": 1e-8, "first_step": 0.1}
#: until when
T = 0.25
MASS = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))


def implicit(t, y, yp, k):
    return torch.stack([yp[0] + k * y[0], y[1] - y[0] ** 2])


def explicit(t, y, k):
    return torch.stack([-k * y[0], y[1] - y[0] ** 2])


def end(x, k, method):
    start = torch.stack([x[0], x[0] ** 2])
    if method == "dae":
        return solve_dae(implicit, (0.0, T), start, args=(k,), **FINE).y[-1, 1]
    if method == "kvaerno5":
        return solve_ivp(lambda t, y, k: -k * y, (0.0, T), start[:1], args=(k,), method=method, **FINE).y[-1, 0] ** 2
    return solve_ivp(explicit, (0.0, T), start, args=(k,), method=method, mass_matrix=MASS, **FINE).y[-1, 1]


def start(p, k, method):
    """From where the square of what decays at the rate ``k`` comes to ``p``: ``sqrt(p) exp(k T)``."""
    return solve_root(lambda x, p, k: (end(x, k, method) - p).reshape(1), torch.ones(1, dtype=torch.float64), args=(p, k)).x[0]


def true(p, k):
    return p.sqrt() * (k * T).exp()


P, K = torch.tensor([0.5, 0.6], dtype=torch.float64), torch.tensor([0.3, 0.2], dtype=torch.float64)


@pytest.mark.parametrize("method", ["dae", "kvaerno5", "rodas5p"])
@pytest.mark.slow_cases("rodas5p", "dae")
def test_boundary_values_and_their_derivatives(method):
    shoot = lambda p, k: start(p, k, method)  # noqa: E731
    both = torch.func.grad(shoot, argnums=(0, 1))
    torch.testing.assert_close(torch.vmap(shoot)(P, K), true(P, K), rtol=1e-5, atol=0)
    for found in (torch.vmap(both)(P, K), torch.vmap(torch.func.jacfwd(shoot, argnums=(0, 1)))(P, K)):
        torch.testing.assert_close(found, (0.5 * true(P, K) / P, T * true(P, K)), rtol=1e-5, atol=0)
    forward, second = torch.func.jacfwd(shoot)(P[0], K[0]), torch.func.hessian(shoot)(P[0], K[0])
    torch.testing.assert_close(forward, 0.5 * true(P, K)[0] / P[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(second, -0.25 * true(P, K)[0] / P[0] ** 2, rtol=1e-5, atol=0)


def test_what_fun_differentiates_itself_is_seen_beside_a_solve():
    def energy(x, k):
        return (x**2).sum() * end(x, k, "dae")

    def slope(x, k):
        at = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(energy(at, k), at, create_graph=True)[0] - 1.0

    # 4 x^3 exp(-2 k T) = 1
    k = K[0].clone().requires_grad_()
    x = solve_root(slope, torch.ones(1, dtype=torch.float64), args=(k,)).x[0]
    torch.testing.assert_close(x.detach(), (torch.exp(2 * T * K[0]) / 4) ** (1 / 3), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(x, k)[0], 2 * T / 3 * x.detach(), rtol=1e-5, atol=0)
    with pytest.raises(UnsupportedCombination, match=r"torch\.vmap cannot see through torch\.autograd\.grad, which fun calls"):
        torch.vmap(lambda k: solve_root(slope, torch.ones(1, dtype=torch.float64), args=(k,)).x)(K)


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "radau5", "rodas5p", "bdf", "abm", "solve_dae"])
@pytest.mark.slow_cases("kvaerno5", "bdf", "solve_dae")
def test_backward_through_backward(method):
    """``x exp(p) = 2``: a node of the solve is met again on the way back of the root's own way back, when its solution is long gone."""
    tight = {"rtol": 1e-9, "atol": 1e-11} if method in ("kvaerno5", "bdf", "abm") else {"rtol": 1e-7, "atol": 1e-9}

    def end(x, p):
        if method == "solve_dae":
            fun = lambda t, y, yp, p: torch.stack([yp[0] - p * y[1], y[1] - y[0]])  # noqa: E731
            return solve_dae(fun, (0.0, 1.0), torch.cat([x, x]), args=(p,), **tight).y[-1, :1]
        return solve_ivp(lambda t, y, p: p * y, (0.0, 1.0), x, args=(p,), method=method, **tight).y[-1]

    p = torch.tensor(0.5, requires_grad=True)
    found = [solve_root(lambda x, p: end(x, p) - 2.0, torch.ones(1), args=(p,)).x[0]]
    for _ in range(2):
        found += torch.autograd.grad(found[-1], p, create_graph=True)
    x = 2 * math.exp(-0.5)
    assert [float(value.detach()) for value in found] == pytest.approx([x, -x, x], rel=1e-6)
