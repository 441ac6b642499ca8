"""``M y' = f``: constant, varying, singular and batched matrices."""

from __future__ import annotations

import pytest
import torch

from adjoint import InvalidInput, UnsupportedCombination, solve_dae, solve_ivp

from ..helpers.dae_problems import ROBERTSON_P, ROBERTSON_Y0, robertson

F64 = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def robertson_right(t, y, p):
    """The right-hand sides of the semi-explicit form."""
    rates = -robertson(t, y, torch.zeros_like(y), p)
    return rates


def test_robertson_in_semi_explicit_form():
    mass, p = torch.diag(tensor(1, 1, 0)), ROBERTSON_P.clone().requires_grad_()
    options = dict(rtol=1e-6, atol=1e-10, quadrature=lambda t, y, p: y[2])
    sol = solve_ivp(robertson_right, (0.0, 50.0), ROBERTSON_Y0, args=(p,), method="radau5", mass_matrix=mass, **options)
    assert abs(float(sol.quadrature) - 10.94864848057496) < 1e-5
    (grad,) = torch.autograd.grad(sol.quadrature, p)
    torch.testing.assert_close(grad, tensor(1.73414089144977e02, -5.05919140558619e-04, 8.43234646542261e-08), rtol=1e-5, atol=0)


def test_a_regular_matrix_is_its_inverse():
    mass = torch.tensor([[2.0, 0.5], [0.1, 1.0]], dtype=F64, requires_grad=True)
    f = lambda t, y, k: torch.stack([y[1], -k * y[0]])  # noqa: E731
    k, y0 = tensor(3.0).squeeze(), tensor(1.0, 0.0)
    a = solve_ivp(f, (0.0, 1.0), y0, args=(k,), method="radau5", mass_matrix=mass, rtol=1e-9, atol=1e-11).y[-1, 0]
    b = solve_ivp(
        lambda t, y, k: torch.linalg.solve(mass, f(t, y, k)), (0.0, 1.0), y0, args=(k,), method="dopri8", rtol=1e-11, atol=1e-12
    ).y[-1, 0]
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(a, mass)[0], torch.autograd.grad(b, mass)[0], rtol=1e-6, atol=1e-8)


def test_a_matrix_that_varies_with_time_and_state():
    scale = tensor(0.7).requires_grad_()
    mass = lambda t, y, k: torch.diag(torch.stack([1 + t + scale[0] * y[0] ** 2, 2 + torch.sin(t)]))  # noqa: E731
    f = lambda t, y, k: torch.stack([y[1], -k * y[0]])  # noqa: E731
    k, y0 = tensor(3.0).squeeze(), tensor(1.0, 0.0)
    a = solve_ivp(f, (0.0, 1.0), y0, args=(k,), method="radau5", mass_matrix=mass, rtol=1e-9, atol=1e-11).y[-1, 0]
    explicit = lambda t, y, k: f(t, y, k) / mass(t, y, k).diagonal()  # noqa: E731
    b = solve_ivp(explicit, (0.0, 1.0), y0, args=(k,), method="dopri8", rtol=1e-11, atol=1e-12).y[-1, 0]
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(a, scale)[0], torch.autograd.grad(b, scale)[0], rtol=1e-6, atol=1e-8)


def test_batched_matrices_and_quadrature():
    mass = torch.stack([torch.diag(tensor(1.0, 0.0)), torch.diag(tensor(3.0, 0.0))]).requires_grad_()
    f = lambda t, y: torch.stack([-y[:, 1], y[:, 1] - 2 * y[:, 0]], -1)  # noqa: E731
    y0 = tensor(1.0, 0.0).repeat(2, 1)
    sol = solve_ivp(
        f, (0.0, 1.0), y0, method="radau5", mass_matrix=mass, batched=True, rtol=1e-9, atol=1e-11, quadrature=lambda t, y: y[:, 0]
    )
    rate = 2 / tensor(1.0, 3.0)
    torch.testing.assert_close(sol.y[-1, :, 0], torch.exp(-rate), rtol=1e-8, atol=0)
    torch.testing.assert_close(sol.quadrature, (1 - torch.exp(-rate)) / rate, rtol=1e-8, atol=0)
    (grad,) = torch.autograd.grad(sol.y[-1, 1, 0], mass)
    # d exp(-2 / m) / dm at m = 3
    assert float(grad[1, 0, 0]) == pytest.approx(float(torch.exp(-rate[1])) * 2 / 9, rel=1e-7) and not bool(grad[0].any())


def test_the_same_as_the_residual():
    mass = torch.diag(tensor(1, 1, 0))
    one = solve_ivp(
        robertson_right, (0.0, 5.0), ROBERTSON_Y0, args=(ROBERTSON_P,), method="radau5", mass_matrix=mass, rtol=1e-6, atol=1e-10
    )
    two = solve_dae(robertson, (0.0, 5.0), ROBERTSON_Y0, args=(ROBERTSON_P,), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(one.y, two.y, rtol=1e-9, atol=1e-14)


@pytest.mark.compile
@pytest.mark.parametrize("method", ["rodas3p", "rodas4", "radau5"])
def test_variables_without_a_slope_pass_through_zero(method):
    # what a step leaves in a constraint no later step makes smaller, by whatever size: it is measured where it is left
    def f(t, y):
        return torch.stack([-y[0], y[1] ** 3 + y[1] - 10 * torch.sin(3 * t) * y[0]])

    options = dict(method=method, mass_matrix=torch.diag(tensor(1, 0)), rtol=1e-3, atol=1e-6, t_eval="steps")
    sol = solve_ivp(f, (0.0, 6.0), tensor(1, 0), **options)
    assert sol.stats.n_rejected < sol.stats.n_accepted / 2
    right = 10 * torch.sin(3 * sol.t) * torch.exp(-sol.t)
    # the real root of z^3 + z = right
    half, width = right / 2, (right**2 / 4 + 1 / 27).sqrt()
    z = (half + width).abs() ** (1 / 3) - (width - half).abs() ** (1 / 3)
    size = torch.maximum(z.abs(), torch.cat([z[:1], z[:-1]]).abs())
    assert bool(((sol.y[:, 1] - z).abs() <= 3 * (1e-3 * size + 1e-6)).all())
    native = solve_ivp(f, (0.0, 6.0), tensor(1, 0), compile=True, **options)
    assert (native.stats.n_accepted, native.stats.n_rejected) == (sol.stats.n_accepted, sol.stats.n_rejected)


class Below:
    """An event with its rules in the class."""

    terminal = True

    def __call__(self, t, y):
        return y[0] - 0.5


class BelowInSlots(Below):
    __slots__ = ("direction",)

    def __init__(self):
        self.direction = -1


@pytest.mark.parametrize("event", [Below, BelowInSlots])
@pytest.mark.parametrize("method", ["radau5", "rodas5p"])
def test_events_keep_their_rules_wherever_they_are(method, event):
    sol = solve_ivp(lambda t, y: -y, (0.0, 2.0), tensor(1.0), method=method, mass_matrix=tensor(2.0).diag(), events=event())
    assert sol.status == 1 and float(sol.t[-1]) == pytest.approx(2 * torch.tensor(2.0, dtype=F64).log().item(), rel=1e-3)


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"method": "tsit5"}, UnsupportedCombination, "radau5"),
        ({"jac": lambda t, y: y}, UnsupportedCombination, "jac="),
        ({"mass_matrix": torch.eye(2, dtype=F64)}, InvalidInput, r"\(2, 2\).*\(3, 3\)"),
        ({"mass_matrix": torch.eye(3)}, InvalidInput, "float32"),
        ({"mass_matrix": 1.0}, InvalidInput, "float"),
    ],
)
def test_bad_matrices(options, error, match):
    options = {"method": "radau5", "mass_matrix": torch.eye(3, dtype=F64)} | options
    with pytest.raises(error, match=match):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(3, dtype=F64), **options)
