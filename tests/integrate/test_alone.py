"""One trajectory by implicit methods: its own loops and its sweep over all steps at once, against those for batches and step by step."""

from __future__ import annotations

import pytest
import torch

from adjoint import DiscreteAdjoint, solve_ivp
from adjoint.linalg import DenseLU, Log
from adjoint.linalg.dense import SmallFactors, factor_one

F64 = torch.float64
METHODS = ["kvaerno5", "trbdf2", "radau5", "rodas5p", "bdf"]
P = torch.tensor([0.04, 1e2, 3e3], dtype=F64)
Y0 = torch.tensor([1.0, 0.1, 0.0], dtype=F64)


def rates(t, y, p):
    a, b, c = y.unbind(-1)
    first, second, third = p[..., 0] * a * (1 + 0.1 * torch.sin(t)), p[..., 1] * b * c, p[..., 2] * b * b
    return torch.stack([second - first, first - second - third, third], -1)


def one_by_one(t, y, p):
    """Cannot be mapped over points: it looks at a value."""
    return rates(t, y, p) * (1.0 if y[0].item() > -1e3 else 2.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_cases("trbdf2")
def test_gradients_with_steps_as_rows_and_one_after_the_other(method):
    times = torch.tensor([0.3, 1.1, 2.0], dtype=F64)
    found = []
    for fun in (rates, one_by_one):
        p, y0, end, ts = (x.clone().requires_grad_() for x in (P, Y0, torch.tensor(2.0, dtype=F64), times))
        options = dict(args=(p,), method=method, rtol=1e-5, atol=1e-8, gradient=DiscreteAdjoint())
        a = solve_ivp(fun, (0.0, end), y0, **options).y[-1].square().sum()
        b = solve_ivp(fun, (0.0, 2.0), y0, t_eval=ts, **options).y.square().sum()
        steps = solve_ivp(fun, (0.0, 2.0), y0, t_eval="steps", **options)
        c = (steps.y[:, 1] * torch.linspace(1, 2, len(steps.t), dtype=F64)).sum()
        found.append([*torch.autograd.grad(a, (p, y0, end)), *torch.autograd.grad(b, (p, y0, ts)), *torch.autograd.grad(c, (p, y0))])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_one_takes_the_same_steps(method):
    options = dict(method=method, rtol=1e-6, atol=1e-9, t_eval=[0.5, 3.0])
    batch = solve_ivp(rates, (0.0, 3.0), Y0.unsqueeze(0), args=(P.unsqueeze(0),), batched=True, **options)
    alone = solve_ivp(rates, (0.0, 3.0), Y0, args=(P,), **options)
    torch.testing.assert_close(alone.y, batch.y[:, 0], rtol=1e-7, atol=1e-10)
    for count in ("n_steps", "n_accepted", "n_jac", "n_factorizations", "n_newton", "n_solves"):
        assert getattr(alone.stats, count) == int(getattr(batch.stats, count)[0]), count


def test_small_factors_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    for kind in (F64, torch.float32, torch.complex128):
        matrix, b = (torch.randn(*shape, generator=generator, dtype=kind) for shape in ((1, 5, 5), (1, 5, 2)))
        one, two = factor_one(DenseLU(), matrix, Log()), DenseLU().factor(matrix.expand(2, -1, -1).contiguous())
        assert isinstance(one, SmallFactors)
        for how in ({}, {"transposed": True}, {"conjugated": True}, {"transposed": True, "conjugated": True}):
            want = two.solve(b.expand(2, -1, -1).contiguous(), **how)[:1]
            tolerance = 1e-4 if kind == torch.float32 else 1e-11
            torch.testing.assert_close(one.solve(b, **how), want, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(one.solve(b[..., 0], **how), want[..., 0], rtol=tolerance, atol=tolerance)
    singular = factor_one(DenseLU(), torch.ones(1, 2, 2, dtype=F64), Log())
    assert bool(singular.singular()) and bool(singular.solve(torch.ones(1, 2, dtype=F64)).isnan().all())
