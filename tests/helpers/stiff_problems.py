"""Stiff problems with trusted values (from the standard test set, or two independent high-accuracy solves)."""

from __future__ import annotations

import torch

ROBER_P = torch.tensor([0.04, 1e4, 3e7], dtype=torch.float64)
#: y1, y2 at t = 40, and their derivatives in the three parameters
ROBER_40 = torch.tensor([0.7158270687194055, 9.185534764557783e-06], dtype=torch.float64)
ROBER_40_JACOBIAN = torch.tensor(
    [
        [-4.2475587717057239, 1.3730807973446243e-05, -2.2883550889056715e-09],
        [4.591196249253923e-05, -2.3571921138463359e-10, -1.1380595093501321e-13],
    ],
    dtype=torch.float64,
)
ROBER_1E11 = torch.tensor([0.2083340149701255e-7, 0.8333360770334713e-13, 0.9999999791665050], dtype=torch.float64)


def rober(t, y, p):
    a, b, c = y.unbind(-1)
    p1, p2, p3 = p.unbind(-1)
    return torch.stack([-p1 * a + p2 * b * c, p1 * a - p2 * b * c - p3 * b * b, p3 * b * b], -1)


HIRES_Y0 = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0.0057], dtype=torch.float64)
HIRES_END = 321.8122
HIRES = torch.tensor(
    [
        0.7371312573325668e-3,
        0.1442485726316185e-3,
        0.5888729740967575e-4,
        0.1175651343283149e-2,
        0.2386356198831331e-2,
        0.6238968252742796e-2,
        0.2849998395185769e-2,
        0.2850001604814231e-2,
    ],
    dtype=torch.float64,
)


def hires(t, y):
    a, b, c, d, e, f, g, h = y.unbind(-1)
    return torch.stack(
        [
            -1.71 * a + 0.43 * b + 8.32 * c + 0.0007,
            1.71 * a - 8.75 * b,
            -10.03 * c + 0.43 * d + 0.035 * e,
            8.32 * b + 1.71 * c - 1.12 * d,
            -1.745 * e + 0.43 * f + 0.43 * g,
            -280 * f * h + 0.69 * d + 1.71 * e - 0.43 * f + 0.69 * g,
            280 * f * h - 1.81 * g,
            -280 * f * h + 1.81 * g,
        ],
        -1,
    )


OREGO_Y0 = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
OREGO = torch.tensor([0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3], dtype=torch.float64)


def orego(t, y):
    a, b, c = y.unbind(-1)
    s, w, q = 77.27, 0.161, 8.375e-6
    return torch.stack([s * (b + a * (1 - q * a - b)), (c - (1 + a) * b) / s, w * (a - c)], -1)


VDPOL_Y0 = torch.tensor([2.0, 0.0], dtype=torch.float64)
VDPOL = torch.tensor([0.1706167732170483e1, -0.8928097010247975], dtype=torch.float64)


def vdpol(t, y):
    x, v = y.unbind(-1)
    return torch.stack([v, ((1 - x * x) * v - x) / 1e-6], -1)


def van_der_pol(t, y, mu):
    """Mildly stiff, driven, so that it depends on time."""
    x, v = y.unbind(-1)
    return torch.stack([v, mu * (1 - x * x) * v - x + 0.1 * torch.sin(t)], -1)
