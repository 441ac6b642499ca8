"""Differential-algebraic problems with values that this library did not compute, and small ones with closed forms."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROBERTSON_P = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)
ROBERTSON_Y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
ROBERTSON_YP0 = torch.tensor([-0.04, 0.04, 0.0], dtype=torch.float64)


def robertson(t: Tensor, y: Tensor, yp: Tensor, p: Tensor) -> Tensor:
    """Index 1; ``p`` is (3,) or (B, 3)."""
    y1, y2, y3 = y.unbind(-1)
    d1, d2, _ = yp.unbind(-1)
    p1, p2, p3 = p.unbind(-1)
    return torch.stack([d1 + p1 * y1 - p2 * y2 * y3, d2 - p1 * y1 + p2 * y2 * y3 + p3 * y2**2, y1 + y2 + y3 - 1], -1)


TRANSISTOR_Y0 = torch.tensor([0.0, 3, 3, 6, 3, 3, 6, 0], dtype=torch.float64)
TRANSISTOR_YP0 = torch.tensor(
    [51.338775, 51.338775, -166.6666, -24.9757667, -24.9757667, -83.3333, -10.00564453, -10.00564453], dtype=torch.float64
)
TRANSISTOR_END = torch.tensor(
    [
        -0.5562145012262709e-2, 0.3006522471903042e1, 0.2849958788608128e1, 0.2926422536206241e1,
        0.2704617865010554e1, 0.2761837778393145e1, 0.4770927631616772e1, 0.1236995868091548e1,
    ],
    dtype=torch.float64,
)  # fmt: skip


def transistor(t: Tensor, y: Tensor, yp: Tensor) -> Tensor:
    """Transistor amplifier: index 1 with a singular, non-diagonal matrix in front of the derivatives."""
    y1, y2, y3, y4, y5, y6, y7, y8 = y.unbind(-1)
    d = yp.unbind(-1)
    ub, uf, a, b, r0, r = 6.0, 0.026, 0.99, 1e-6, 1000.0, 9000.0
    c = [k * 1e-6 for k in range(1, 6)]
    ue = 0.1 * torch.sin(200 * math.pi * t)

    def g(x: Tensor) -> Tensor:
        return b * torch.expm1(x / uf)

    return torch.stack(
        [
            -ue / r0 + y1 / r0 + c[0] * (d[0] - d[1]),
            -ub / r + 2 * y2 / r - (a - 1) * g(y2 - y3) - c[0] * (d[0] - d[1]),
            -g(y2 - y3) + y3 / r + c[1] * d[2],
            -ub / r + y4 / r + a * g(y2 - y3) + c[2] * (d[3] - d[4]),
            -ub / r + 2 * y5 / r - (a - 1) * g(y5 - y6) - c[2] * (d[3] - d[4]),
            -g(y5 - y6) + y6 / r + c[3] * d[5],
            -ub / r + y7 / r + a * g(y5 - y6) + c[4] * (d[6] - d[7]),
            y8 / r - c[4] * (d[6] - d[7]),
        ],
        -1,
    )


AKZO_Y0 = torch.tensor([0.444, 0.00123, 0, 0.007, 0, 0.0], dtype=torch.float64)
AKZO_END = torch.tensor(
    [0.1150794920661702, 0.1203831471567715e-2, 0.1611562887407974, 0.3656156421249283e-3, 0.1708010885264404e-1, 0.4873531310307455e-2],
    dtype=torch.float64,
)


def akzo(t: Tensor, y: Tensor, yp: Tensor) -> Tensor:
    """Akzo Nobel chemical problem: index 1."""
    y1, y2, y3, y4, y5, y6 = y.unbind(-1)
    d = yp.unbind(-1)
    k1, k2, k3, k4 = 18.7, 0.58, 0.09, 0.42
    ratio, kla, ks, pressure, henry = 34.4, 3.3, 115.83, 0.9, 737.0
    r1, r2, r3 = k1 * y1**4 * y2.sqrt(), k2 * y3 * y4, k2 / ratio * y1 * y5
    r4, r5, inflow = k3 * y1 * y4**2, k4 * y6**2 * y2.sqrt(), kla * (pressure / henry - y2)
    return torch.stack(
        [
            d[0] + 2 * r1 - r2 + r3 + r4,
            d[1] + r1 / 2 + r4 + r5 / 2 - inflow,
            d[2] - r1 + r2 - r3,
            d[3] + r2 - r3 + 2 * r4,
            d[4] - r2 + r3 - r5,
            ks * y1 * y4 - y6,
        ],
        -1,
    )


PENDULUM_Y0 = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)
PENDULUM_END = torch.tensor(
    [-0.8115864461913029, -0.584232351345397, -0.6315291490650206, 0.8772887988410706, 1.7526970540361941], dtype=torch.float64
)
PENDULUM_END_BY_G = torch.tensor(
    [-3.1576457453251, 4.3864439942053, 6.7965612921435, 0.5585560047991, -11.4066348285799], dtype=torch.float64
)


def pendulum(index: int):
    """``fun(t, s, sp, g, L)`` for ``s = (x, y, u, v, z)``, with the constraint differentiated to the given index."""

    def fun(t: Tensor, s: Tensor, sp: Tensor, g: Tensor, length: Tensor) -> Tensor:
        x, y, u, v, z = s.unbind(-1)
        d = sp.unbind(-1)
        constraint = {3: x * x + y * y - length**2, 2: x * u + y * v, 1: u * u + v * v - z * (x * x + y * y) - y * g}[index]
        return torch.stack([d[0] - u, d[1] - v, d[2] + x * z, d[3] + y * z + g, constraint], -1)

    return fun


def linear(t: Tensor, y: Tensor, yp: Tensor, p: Tensor) -> Tensor:
    """``y1' = -p1 y1 + y2``, ``0 = y2 - p2 y1 - sin t``: index 1, fully implicit in form, solved by `linear_exact`."""
    rate = yp[..., 0] + p[..., 0] * y[..., 0] - y[..., 1]
    return torch.stack([rate + (y[..., 1] - p[..., 1] * y[..., 0] - torch.sin(t)), y[..., 1] - p[..., 1] * y[..., 0] - torch.sin(t)], -1)


def linear_exact(t: Tensor, start: Tensor, p: Tensor) -> Tensor:
    """``y`` at ``t`` for ``y1(0) = start``."""
    a = p[..., 0] - p[..., 1]
    # y1' = -a y1 + sin t
    steady = lambda s: (a * torch.sin(s) - torch.cos(s)) / (a * a + 1)  # noqa: E731
    y1 = (start - steady(torch.zeros_like(a))) * torch.exp(-a * t) + steady(t)
    return torch.stack([y1, p[..., 1] * y1 + torch.sin(t)], -1)
