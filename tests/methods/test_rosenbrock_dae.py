"""Rosenbrock methods on ``M y' = f`` with a constant matrix, singular or not."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    HigherIndexDAE,
    InterpolatingAdjoint,
    SingularJacobian,
    SolveError,
    UnsupportedCombination,
    solve_dae,
    solve_ivp,
)

from ..helpers.dae_problems import AKZO_END, AKZO_Y0, ROBERTSON_P, ROBERTSON_Y0, akzo, robertson

F64 = torch.float64
NAMES = ("rodas3p", "rodas4", "rodas5p")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def diagonal(*values: float) -> torch.Tensor:
    return torch.diag(tensor(*values))


def robertson_right(t, y, p):
    return -robertson(t, y, torch.zeros_like(y), p)


def curve(t, y, p):
    """``y1' = y2 z``, ``y2' = -y1 z``, ``0 = z - p (1 + sin(t) / 2) (y1^2 + y2^2)``: an angle of ``p (t + (1 - cos t) / 2)``."""
    y1, y2, z = y.unbind(-1)
    return torch.stack([y2 * z, -y1 * z, p * (1 + torch.sin(t) / 2) * (y1**2 + y2**2) - z], -1)


def curve_exact(t: float, p: float) -> torch.Tensor:
    angle = p * (t + (1 - math.cos(t)) / 2)
    return tensor(math.sin(angle), math.cos(angle), p * (1 + math.sin(t) / 2))


@pytest.mark.parametrize("name, order, sizes", [("rodas3p", 3, (0.04, 0.02)), ("rodas4", 4, (0.1, 0.05)), ("rodas5p", 5, (0.1, 0.05))])
def test_order(name, order, sizes):
    errors = []
    for size in sizes:
        options = dict(first_step=size, max_step=size, rtol=1e3, atol=1e3)
        sol = solve_ivp(curve, (0.0, 2.0), tensor(0, 1, 0.5), args=(tensor(1.3)[0],), method=name, mass_matrix=diagonal(1, 1, 0), **options)
        errors.append((sol.y[-1] - curve_exact(2.0, 1.3)).abs())
        assert sol.stats.n_accepted == round(2 / size)
    rate = torch.log2(errors[0].amax() / errors[1].amax())
    algebraic = torch.log2(errors[0][2] / errors[1][2])
    assert float(rate) > order - 0.3 and float(algebraic) > order - 0.3


@pytest.mark.parametrize("name, tolerance", [("rodas3p", 1e-6), ("rodas4", 1e-8), ("rodas5p", 1e-9)])
@pytest.mark.slow_cases("rodas4-1e-08", "rodas5p-1e-09")
def test_robertson(name, tolerance):
    p = ROBERTSON_P.clone().requires_grad_()
    y0 = tensor(1, 0, 0.3).requires_grad_()
    options = dict(rtol=tolerance, atol=tolerance * 1e-4, mass_matrix=diagonal(1, 1, 0))
    sol = solve_ivp(robertson_right, (0.0, 50.0), y0, args=(p,), method=name, **options)
    by_p, by_y0 = torch.autograd.grad(sol.y[-1, 2], (p, y0))
    torch.testing.assert_close(by_p, tensor(4.47082, -1.48789e-5, 2.47985e-9), rtol=2e-4 if name == "rodas3p" else 5e-6, atol=0)
    assert float(by_y0[2]) == 0.0 and abs(float(sol.y[0, 2].detach())) < 1e-14


@pytest.mark.parametrize("name", ["rodas4", "rodas5p"])
def test_robertson_at_40(name):
    # the test set of Hairer & Wanner
    expected = tensor(0.7158270688, 0.9185534765e-5, 0.2841637457)
    with torch.no_grad():
        sol = solve_ivp(
            robertson_right,
            (0.0, 40.0),
            ROBERTSON_Y0,
            args=(ROBERTSON_P,),
            method=name,
            mass_matrix=diagonal(1, 1, 0),
            rtol=1e-8,
            atol=1e-12,
        )
    torch.testing.assert_close(sol.y[-1], expected, rtol=1e-6, atol=0)


def test_akzo():
    right = lambda t, y: -akzo(t, y, torch.zeros_like(y))  # noqa: E731
    mass = diagonal(1, 1, 1, 1, 1, 0)
    sol = solve_ivp(right, (0.0, 180.0), AKZO_Y0, method="rodas5p", mass_matrix=mass, rtol=1e-8, atol=1e-11)
    torch.testing.assert_close(sol.y[-1], AKZO_END, rtol=1e-6, atol=0)


def matrix(m: torch.Tensor) -> torch.Tensor:
    """Singular, neither diagonal nor symmetric."""
    zero = torch.zeros_like(m[0])
    return torch.stack([torch.stack([m[0], m[1], zero]), torch.stack([m[2], m[3], zero]), torch.stack([zero, zero, zero])])


def driven(t, y, p):
    y1, y2, z = y.unbind(-1)
    return torch.stack([-p[0] * y1 + z * y2, torch.sin(t) - y2 * z, z + 0.2 * z**3 - p[1] * y1 * torch.cos(t) - 0.1 * y2], -1)


M0, P0 = tensor(1.2, 0.3, -0.2, 0.8), tensor(0.7, 1.1)


def end(p, y0, m, t0, t1, gradient=None, name="rodas4"):
    span = (t0, t1)
    options = dict(rtol=1e-3, atol=1e-3, first_step=0.3, max_step=0.32, gradient=gradient or DiscreteAdjoint())
    sample = t0 + 0.4 * (t1 - t0)
    sol = solve_ivp(driven, span, y0, args=(p,), method=name, mass_matrix=matrix(m), t_eval=torch.stack([sample, t1]), **options)
    return sol.y


def all_inputs():
    values = (P0, tensor(0.9, 0.4, 0.3), M0, tensor(0.1)[0], tensor(1.0)[0])
    return tuple(x.clone().requires_grad_() for x in values)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(), Backprop(), ForwardSensitivity(), DiscreteAdjoint(checkpoints=2)])
@pytest.mark.slow_cases("gradient2")
def test_gradcheck(gradient):
    assert torch.autograd.gradcheck(lambda *xs: end(*xs, gradient=gradient), all_inputs(), rtol=1e-6, atol=1e-7, fast_mode=True)


def test_second_derivatives():
    p, y0, m, t0, _ = all_inputs()
    assert torch.autograd.gradgradcheck(
        lambda p, y0, m: end(p, y0, m, t0.detach(), t0.detach() + 0.6, name="rodas3p")[-1], (p, y0, m), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_is_backprop(name):
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        xs = all_inputs()
        found.append(torch.autograd.grad(end(*xs, gradient=gradient, name=name).square().sum(), xs))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_transforms():
    p, y0, m, t0, t1 = (x.detach() for x in all_inputs())
    last = lambda p, y0, m: end(p, y0, m, t0, t1)[-1]  # noqa: E731
    reverse = torch.func.jacrev(last, argnums=(0, 1, 2))(p, y0, m)
    forward = torch.func.jacfwd(last, argnums=(0, 1, 2))(p, y0, m)
    for a, b in zip(reverse, forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    ms = torch.stack([m, 1.1 * m])
    mapped = torch.vmap(last, in_dims=(None, None, 0))(p, y0, ms)
    torch.testing.assert_close(mapped, torch.stack([last(p, y0, x) for x in ms]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("many", [True, False])
def test_batched_is_one_by_one(many):
    p = torch.stack([ROBERTSON_P, ROBERTSON_P * tensor(2, 0.5, 1.5)]).requires_grad_()
    y0 = torch.stack([tensor(1, 0, 0.2), tensor(0.9, 0, 0)]).requires_grad_()
    one = torch.stack([diagonal(1, 1, 0), diagonal(2, 1, 0)]) if many else diagonal(1, 1, 0)
    mass = one.clone().requires_grad_()
    ends = tensor(20.0, 1.0)
    options = dict(method="rodas5p", rtol=1e-6, atol=1e-10)
    sol = solve_ivp(robertson_right, (torch.zeros(2, dtype=F64), ends), y0, args=(p,), mass_matrix=mass, batched=True, **options)
    single = torch.stack(
        [
            solve_ivp(robertson_right, (0.0, ends[i]), y0[i], args=(p[i],), mass_matrix=mass[i] if many else mass, **options).y[-1]
            for i in range(2)
        ]
    )
    torch.testing.assert_close(sol.y[-1], single, rtol=1e-12, atol=1e-15)
    got, expected = (torch.autograd.grad(x[:, 2].sum(), (p, y0, mass)) for x in (sol.y[-1], single))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert not bool(got[1][:, 2].any())


def test_batched_second_derivatives_with_different_ends():
    y0, p = torch.stack([tensor(0.9, 0.4, 0.3), tensor(0.5, 0.1, 0.2)]), P0.clone().requires_grad_()
    m, spans = M0.clone().requires_grad_(), (torch.zeros(2, dtype=F64), tensor(0.9, 0.3))
    found = []
    for gradient in (DiscreteAdjoint(), Backprop()):
        options = dict(method="rodas3p", rtol=1e-3, atol=1e-3, first_step=0.3, max_step=0.32, batched=True, gradient=gradient)
        last = solve_ivp(lambda t, y, p: driven(t, y, p), spans, y0, args=(p,), mass_matrix=matrix(m), **options).y[-1]
        first = torch.autograd.grad(last.square().sum(), (p, m), create_graph=True)
        second = torch.autograd.grad(sum(x.square().sum() for x in first), (p, m))
        found.append([last, *first, *second])
    for a, b in zip(*found, strict=True):
        assert bool(torch.isfinite(a).all())
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_regular_matrix_is_its_inverse():
    mass = torch.tensor([[2.0, 0.5], [0.1, 1.0]], dtype=F64, requires_grad=True)
    f = lambda t, y: torch.stack([y[1], -3 * y[0]])  # noqa: E731
    y0, options = tensor(1, 0), dict(method="rodas5p", rtol=1e-9, atol=1e-11)
    a = solve_ivp(f, (0.0, 1.0), y0, mass_matrix=mass, **options).y[-1, 0]
    b = solve_ivp(lambda t, y: torch.linalg.solve(mass, f(t, y)), (0.0, 1.0), y0, **options).y[-1, 0]
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(a, mass)[0], torch.autograd.grad(b, mass)[0], rtol=1e-6, atol=1e-8)


def test_quadrature_events_and_dense_output():
    def event(t, y, p):
        return y[1] - 0.2

    event.terminal = True
    p = tensor(1.3)[0].requires_grad_()
    options = dict(method="rodas5p", mass_matrix=diagonal(1, 1, 0), rtol=1e-9, atol=1e-11, dense_output=True)
    sol = solve_ivp(curve, (0.0, 3.0), tensor(0, 1, 0), args=(p,), events=event, quadrature=lambda t, y, p: y[2], **options)
    (by_p,) = torch.autograd.grad(sol.events[0].t.sum(), p, retain_graph=True)
    stop = float(sol.events[0].t)
    angle = 1.3 * (stop + (1 - math.cos(stop)) / 2)
    assert math.cos(angle) == pytest.approx(0.2, abs=1e-7)
    # p (t + (1 - cos t) / 2) stays what it is
    assert float(by_p) == pytest.approx(-angle / 1.3 / (1.3 * (1 + math.sin(stop) / 2)), rel=1e-6)
    assert sol.quadrature is not None
    torch.testing.assert_close(sol(torch.tensor(0.3, dtype=F64)).detach(), curve_exact(0.3, 1.3), rtol=1e-6, atol=1e-7)


def test_large_and_sparse():
    n = 80
    size = torch.linspace(0.5, 1.5, n, dtype=F64).requires_grad_()

    def chain(t, y, k):
        heat, flux = y[:n], y[n:]
        return torch.cat([torch.diff(flux, prepend=flux[:1] * 0), k * torch.diff(heat, append=heat[-1:] * 0) - flux])

    k, y0 = tensor(0.5)[0].requires_grad_(), torch.cat([torch.ones(n, dtype=F64), torch.zeros(n, dtype=F64)])
    mass = torch.block_diag(torch.diag(size) + 0.1 * torch.diag(torch.ones(n - 1, dtype=F64), 1), torch.zeros(n, n, dtype=F64))
    a, b = (
        solve_ivp(chain, (0.0, 1.0), y0, args=(k,), mass_matrix=mass, method=name, rtol=1e-7, atol=1e-9).y[-1]
        for name in ("rodas5p", "radau5")
    )
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    for x, y in zip(*(torch.autograd.grad(v[n - 2 :].sum(), (k, size), retain_graph=True) for v in (a, b)), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


class _Right(torch.nn.Module):
    """Of a state ``{"y": (1,), "z": (1,)}``: ``y' = -a z``, ``0 = z - y + z^3 / 10``."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(tensor(0.8))

    def forward(self, t, state):
        y, z = state["y"], state["z"]
        return {"y": -self.a * z, "z": z - y + 0.1 * z**3}


def test_modules_pytrees_and_backward_time():
    model, start = _Right(), {"y": tensor(0.5), "z": tensor(0.4)}
    found = []
    for method in ("rodas5p", "radau5"):
        sol = solve_ivp(model, (1.0, -0.5), start, method=method, mass_matrix=diagonal(1, 0), rtol=1e-9, atol=1e-11)
        found.append((sol.y["z"][-1], *torch.autograd.grad(sol.y["z"][-1].sum(), model.a)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_single_precision_and_complex_states():
    for kind, factor in ((torch.float32, -1.0), (torch.complex128, -1.0 + 2.0j)):
        right = lambda t, y, c=factor: torch.stack([c * y[1], y[1] - 2 * y[0]])  # noqa: E731
        y0, mass = torch.tensor([1.0, 0.0], dtype=kind, requires_grad=True), torch.diag(torch.tensor([1.0, 0.0])).to(kind)
        last = solve_ivp(right, (0.0, 1.0), y0, method="rodas5p", mass_matrix=mass).y[-1, 0]
        exact = torch.exp(torch.tensor(2 * factor, dtype=kind))
        torch.testing.assert_close(last, exact, rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(last.real if last.is_complex() else last, y0)
        torch.testing.assert_close(grad[0], exact.conj(), rtol=1e-4, atol=1e-5)
        assert complex(grad[1]) == 0


def test_a_constraint_that_loses_its_hold():
    right = lambda t, y: torch.stack([y[1] * 0 - 1, y[0] - y[1] ** 2])  # noqa: E731
    with pytest.raises((SolveError, SingularJacobian), match=r"at t = (0\.99|1)"):
        solve_ivp(right, (0.0, 2.0), tensor(1, 1), method="rodas4", mass_matrix=diagonal(1, 0), max_steps=2000)


def test_refusals():
    y0, right = tensor(1, 0), lambda t, y: torch.stack([-y[1], y[1] - 2 * y[0]])
    with pytest.raises(UnsupportedCombination, match=r"constant.*radau5.*bdf"):
        solve_ivp(right, (0.0, 1.0), y0, method="rodas4", mass_matrix=lambda t, y: diagonal(1, 0))
    for gradient in (InterpolatingAdjoint(), BacksolveAdjoint()):
        with pytest.raises(UnsupportedCombination, match="mass_matrix="):
            solve_ivp(right, (0.0, 1.0), y0.requires_grad_(), method="rodas4", mass_matrix=diagonal(1, 0), gradient=gradient)
    with pytest.raises(UnsupportedCombination, match="jac="):
        solve_ivp(right, (0.0, 1.0), y0, method="rodas4", mass_matrix=diagonal(1, 0), jac=lambda t, y: torch.eye(2))
    with pytest.raises(UnsupportedCombination, match="mass_matrix=M"):
        solve_dae(robertson, (0.0, 1.0), ROBERTSON_Y0, args=(ROBERTSON_P,), method="rodas4")
    hidden = lambda t, y: torch.stack([y[1], y[0] - torch.sin(t)])  # noqa: E731
    with pytest.raises(HigherIndexDAE, match="radau5"):
        solve_ivp(hidden, (0.0, 1.0), tensor(0, 1), method="rodas5p", mass_matrix=diagonal(1, 0))
