"""Steady-state problems with trusted values (found independently of this library)."""

from __future__ import annotations

import math

import torch


def source_and_diffusion(nx: int = 50, ny: int = 40):
    """Objective, residual, parameters. ``x`` is flat, x fastest; the values below are for 50 x 40."""
    n = nx * ny

    def second(u, dim):
        size = u.shape[dim]
        inner = u.narrow(dim, 0, size - 2) - 2 * u.narrow(dim, 1, size - 2) + u.narrow(dim, 2, size - 2)
        pad = [0, 0, 0, 0]
        pad[2 * (1 - dim)] = pad[2 * (1 - dim) + 1] = 1
        return torch.nn.functional.pad(inner, pad)

    source = torch.zeros(n)
    source[(20 - 1) * nx + 25 - 1] = 1.0

    def F(x, p):
        u = x.reshape(ny, nx)
        return (p[0] * second(u, 1) + p[1] * second(u, 0)).reshape(-1) + source * (p[2] - x) - p[3] * x / n

    def f(x, p):
        return (x - 1).square().sum() / 2 + p.log().square().sum() / 2

    return f, F, torch.tensor([1.0, 2.0, 3.0, 0.5])


SOURCE_VALUE = 856.2025592775868
SOURCE_GRADIENT = torch.tensor([2.439455957650615, 40.42206822259959, -42.37892046161092, 2.535624102165879], dtype=torch.float64)
SOURCE_HESSIAN = torch.tensor(
    [
        [33.7316358367307, -10.141880058809594, -0.941377178590671, -0.935642931694277],
        [-10.141880058809594, -20.785740799627323, 10.63829154127944, -2.376461874080495],
        [-0.941377178590671, 10.63829154127944, 3.688152977534026, 1.063244465314731],
        [-0.935642931694277, -2.376461874080495, 1.063244465314731, 6.5739697767286],
    ],
    dtype=torch.float64,
)


P0 = torch.tensor([math.log(0.05), 0.5, -0.3, math.log(2.0), math.log(0.3), math.log(20.0)], dtype=torch.float64)


def reaction_advection_diffusion(n: int):
    """Objective, residual and parameters on ``n x n`` interior points of the unit square; ``u`` is flat, y first."""
    h = 1 / (n + 1)
    axis = torch.arange(1, n + 1) * h
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bump = torch.exp(-((x - 0.35).square() + (y - 0.6).square()) / 0.02)
    target = torch.sin(torch.pi * x) * torch.sin(torch.pi * y) / 2

    def F(u, p):
        D, vx, vy, k, K, a = p[0].exp(), p[1], p[2], p[3].exp(), p[4].exp(), p[5].exp()
        u = u.reshape(n, n)
        w = torch.nn.functional.pad(u, (1, 1, 1, 1))
        west, east, south, north = w[1:-1, :-2], w[1:-1, 2:], w[:-2, 1:-1], w[2:, 1:-1]
        lap = (west + east + south + north - 4 * u) / h**2
        drift = vx * (east - west) / (2 * h) + vy * (north - south) / (2 * h)
        return (D * lap - drift + a * bump - k * u.square() / (K + u)).reshape(-1)

    def f(u, p):
        return (u.reshape(n, n) - target).square().mean() / 2 + 0.5e-3 * (p - P0.to(p)).square().sum()

    p = P0 + 0.05 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    return f, F, p


#: n: f, g1, H11, H12, H66
REACTION_VALUES = {
    16: (0.19624154641511393, -0.18933922335943268, 0.028858139130874816, 0.22473487751863094, 1.1175578743939507),
    32: (0.18235786682862143, -0.17541458362782214, 0.02525577008395513, 0.21131094227231367, 1.0422693577258078),
}
REACTION_OBJECTIVE = {64: 0.176230970147018, 128: 0.1733668685002106, 256: 0.17198437144028694}


def chandrasekhar(N: int = 100):
    """``H(mu) (1 - c/2 sum mu_i H_j / (mu_i + mu_j) / N) = 1`` by the midpoint rule."""
    mu = (torch.arange(N) + 0.5) / N
    kernel = mu.unsqueeze(-1) / (mu.unsqueeze(-1) + mu) / N

    def F(H, c):
        return H - 1 / (1 - c / 2 * (kernel @ H))

    return F


def bratu(n: int):
    """Fourth-order compact differences of ``u'' + l e^u = 0`` on ``n`` interior points."""
    h = 1 / (n + 1)

    def F(u, lam):
        w = torch.nn.functional.pad(u, (1, 1))
        g = lam * w.exp()
        return (w[:-2] - 2 * w[1:-1] + w[2:]) / h**2 + (g[:-2] + 10 * g[1:-1] + g[2:]) / 12

    return F
