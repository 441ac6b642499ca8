"""Solves by compiled code beside those of the eager engine."""

from __future__ import annotations

import torch

import adjoint

COUNTS = ("n_steps", "n_accepted", "n_rejected", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton")


def pair(fun, span, y0, args, **options):
    """Solutions with their gradients in ``y0`` and ``args``, natively and not."""
    found = []
    for compile in (True, False):
        y, p = y0.clone().requires_grad_(), tuple(x.clone().requires_grad_() for x in args)
        given = {"method": "bdf", "rtol": 1e-5, "atol": 1e-8} | options
        sol = adjoint.solve_ivp(fun, span, y, p, compile=compile, **given)
        values = sol.y.nan_to_num()
        weights = torch.cos(torch.arange(values.numel(), dtype=y0.dtype)).reshape(values.shape)
        found.append((sol, torch.autograd.grad((values * weights).sum(), (y, *p))))
    return found


def same(found, tolerance, counts=COUNTS):
    """Whether the ``counts`` are equal, and values and gradients so but for rounding."""
    (mine, of_mine), (theirs, of_theirs) = found
    for name in counts:
        assert torch.equal(torch.as_tensor(getattr(mine.stats, name)), torch.as_tensor(getattr(theirs.stats, name))), name
    largest = float(theirs.y.detach().nan_to_num().abs().max())
    torch.testing.assert_close(mine.y, theirs.y, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
    for a, b in zip(of_mine, of_theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance * float(b.abs().max()))
