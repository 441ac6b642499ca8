"""Solves by compiled code, small ones."""

from __future__ import annotations

from dataclasses import replace

import torch

import adjoint

F64 = torch.float64
#: of solves that are made at once
FORMS = ("explicit", "implicit")
#: with those of one trajectory alone
ALONE = (*FORMS, "watched")


def lotka(t, y, p):
    a, b, c, d = p
    u, v = y[..., 0], y[..., 1]
    return torch.stack([a * u - b * u * v, -c * v + d * u * v], -1)


def p4():
    return torch.tensor([1.5, 1.0, 3.0, 1.0], dtype=F64, requires_grad=True)


def start(*shape):
    return (1 + torch.rand(*shape, 2, generator=torch.Generator().manual_seed(3), dtype=F64)).requires_grad_()


def at_one(t, y, *args):
    return t - 1.0


def never(t, y, *args):
    return (y**2).sum() + 1.0


never.terminal = True


def solve(fun, y0, args=(), span=(0.0, 2.0), form="explicit", **options):
    """By one of the `FORMS`: as implicit equations, with an algebraic variable beside that is the sum of the others; watched by functions
    of events, of which none ends the solve."""
    options = {"method": "dopri5", "rtol": 1e-7, "compile": True} | options
    if form == "explicit":
        return adjoint.solve_ivp(fun, span, y0, args, **options)

    if form == "watched":
        return adjoint.solve_ivp(fun, span, y0, args, events=[at_one, never], **options)

    def residual(t, z, zp, *args):
        y = z[..., :-1]
        return torch.cat([zp[..., :-1] - fun(t, y, *args), z[..., -1:] - y.sum(-1, keepdim=True)], -1)

    state = torch.cat([y0, torch.zeros_like(y0[..., :1])], -1)
    sol = adjoint.solve_dae(residual, span, state, None, args, **(options | {"method": "radau"}))
    return replace(sol, y=sol.y[..., :-1])
