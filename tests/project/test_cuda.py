"""The same results on a CUDA device as on the CPU, with nothing left behind on the CPU."""

from __future__ import annotations

import pytest
import torch

from adjoint import Backprop, DiscreteAdjoint, solve_ivp

from ..helpers.problems import ALL, lotka_volterra, options

pytestmark = pytest.mark.cuda


def _solve(device, method, batched, gradient, compile=False):
    p = (torch.tensor([1.5, 1.0, 3.0, 1.0], device=device) * torch.linspace(0.9, 1.1, 4, device=device).unsqueeze(-1)).requires_grad_()
    u = torch.ones(4, 2, device=device, requires_grad=True)
    p_, u_ = (p, u) if batched else (p[0], u[0])
    ends = torch.tensor([0.0, 2.0], device=device, requires_grad=True)
    sol = solve_ivp(
        lotka_volterra,
        tuple(ends.unbind()),
        u_,
        (p_,),
        t_eval=[0.5, 1.1, 2.0],
        batched=batched,
        gradient=gradient,
        compile=compile,
        quadrature=(lambda t, u, p: u.square().sum(-1)),
        **options(method, steps=12, span=2.0),
    )
    assert sol.y.device.type == device
    total = sol.y.square().sum() + sol.quadrature.sum()
    return [sol.y.detach(), *torch.autograd.grad(total, (p, u, ends))]


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop()], ids=["discrete", "backprop"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("method", ALL)
def test_equals_cpu(method, batched, gradient):
    for cpu, cuda in zip(_solve("cpu", method, batched, gradient), _solve("cuda", method, batched, gradient), strict=True):
        assert torch.allclose(cpu, cuda.cpu(), rtol=1e-6, atol=1e-9)


@pytest.mark.compile
@pytest.mark.parametrize("batched", [False, True])
def test_compiled_equals_cpu(batched):
    cpu, cuda = _solve("cpu", "tsit5", batched, None), _solve("cuda", "tsit5", batched, None, compile=True)
    for a, b in zip(cpu, cuda, strict=True):
        assert torch.allclose(a, b.cpu(), rtol=1e-6, atol=1e-9)


def test_transforms():
    def loss(p):
        return solve_ivp(lotka_volterra, (0.0, 1.0), torch.ones(2, device=p.device), (p,), rtol=1e-8).y[-1].square().sum()

    p = torch.tensor([1.5, 1.0, 3.0, 1.0])
    assert torch.allclose(torch.func.hessian(loss)(p), torch.func.hessian(loss)(p.cuda()).cpu(), rtol=1e-6, atol=1e-8)
    batch = p * torch.linspace(0.9, 1.1, 3).unsqueeze(-1)
    assert torch.allclose(
        torch.vmap(torch.func.grad(loss))(batch), torch.vmap(torch.func.grad(loss))(batch.cuda()).cpu(), rtol=1e-6, atol=1e-8
    )


def test_events():
    def ground(t, y, g):
        return y[0]

    ground.terminal = True

    def fall(g):
        y0 = torch.tensor([1.0, 0.0], device=g.device)
        return solve_ivp(lambda t, y, g: torch.stack([y[1], -g]), (0.0, 5.0), y0, (g,), events=ground, rtol=1e-9).events[0].t[0]

    g = torch.tensor(9.81, device="cuda", requires_grad=True)
    t = fall(g)
    assert torch.allclose(t, (2 / g).sqrt())
    assert torch.allclose(torch.autograd.grad(t, g)[0], -0.5 * (2 / g**3).sqrt())
