"""Solves by compiled code, small ones."""

from __future__ import annotations

import torch

import adjoint

F64 = torch.float64


def lotka(t, y, p):
    a, b, c, d = p
    u, v = y[..., 0], y[..., 1]
    return torch.stack([a * u - b * u * v, -c * v + d * u * v], -1)


def p4():
    return torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=F64, requires_grad=True)


def start(*shape):
    return (1 + torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3), dtype=F64)).requires_grad_()


def solve(fun, y0, args=(), span=(0.0, 2.0), **options):
    return adjoint.solve_ivp(fun, span, y0, args, **({"method": "dopri5", "rtol": 1e-7, "compile": True} | options))
