"""The continuous adjoint of ``odeint_adjoint``, where it is asked for by name."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import adjoint
from adjoint import odeint, odeint_adjoint
from adjoint.torchdiffeq import odeint_adjoint as backsolved


class Field(nn.Module):
    """A small nonlinear, non-autonomous field on any state whose last dimension is two."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(2, 5), nn.Linear(5, 2)
        self.count = 0

    def forward(self, t, y):
        self.count += 1
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class PairField(Field):
    def forward(self, t, state):
        x, s = state
        return super().forward(t, x) * s, -s * x.sum()


def gradients(y, inputs):
    leaves = y if isinstance(y, tuple) else (y,)
    return torch.autograd.grad(sum((leaf**2).sum() for leaf in leaves), inputs)


ASKED = [
    {"adjoint_method": "dopri5"},
    {"adjoint_rtol": 1e-9, "adjoint_atol": 1e-9},
    {"adjoint_options": {}},
    {"adjoint_options": {"norm": "seminorm"}},
]


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("backwards", [False, True])
def test_agrees_with_the_exact_gradient_on_a_mild_problem(asked, backwards):
    f = Field()
    y0 = torch.randn(3, 2, requires_grad=True)
    t = torch.tensor([0.0, 0.3, 0.9])
    t = (t.flip(0) if backwards else t).requires_grad_(True)
    inputs = (y0, t, *f.parameters())
    exact = gradients(odeint(f, y0, t, rtol=1e-10, atol=1e-10), inputs)
    for a, b in zip(gradients(odeint_adjoint(f, y0, t, rtol=1e-9, atol=1e-9, **asked), inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("asked", ASKED)
def test_tuple_states(asked):
    f = PairField()
    y0 = (torch.randn(3, 2, requires_grad=True), torch.tensor(0.7, requires_grad=True))
    t = torch.tensor([0.0, 0.3, 0.9], requires_grad=True)
    inputs = (*y0, t, *f.parameters())
    exact = gradients(odeint(f, y0, t, rtol=1e-10, atol=1e-10), inputs)
    tolerances = {"rtol": (1e-9, 1e-10), "atol": (1e-9, 1e-10)}
    for a, b in zip(gradients(odeint_adjoint(f, y0, t, **tolerances, **asked), inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_complex_states():
    rate = torch.tensor(0.3 + 1.0j, requires_grad=True)
    z0 = torch.tensor([1 + 1j, 0.5 - 0.2j], requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.complex128)

    def f(t, z):
        return rate * z * t

    results = []
    for entry, options in ((odeint, {}), (odeint_adjoint, {"adjoint_params": (rate,), "adjoint_method": "dopri5"})):
        y = entry(f, z0, t, rtol=1e-10, atol=1e-10, **options)
        results.append(torch.autograd.grad(y, (z0, t, rate), weight))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", ["rk4", "midpoint", "implicit_adams", "bosh3"])
def test_other_methods_for_the_way_back(method):
    f = Field()
    y0, t = torch.randn(2, requires_grad=True), torch.tensor([0.0, 1.0])
    inputs = (y0, *f.parameters())
    options = {} if method == "bosh3" else {"step_size": 0.02}
    exact = gradients(odeint(f, y0, t), inputs)
    y = odeint_adjoint(f, y0, t, options={"first_step": 0.1}, adjoint_method=method, adjoint_options=options)
    for a, b in zip(gradients(y, inputs), exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_norms_see_the_augmented_state():
    f = Field()
    y0, t = torch.randn(3, 2, requires_grad=True), torch.tensor([0.0, 1.0])
    shapes = [tuple(p.shape) for p in f.parameters()]
    seen = []

    def norm(augmented):
        seen.append([tuple(x.shape) for x in augmented])
        return torch.stack([x.abs().max() for x in augmented]).max()

    odeint_adjoint(f, y0, t, adjoint_options={"norm": norm}).sum().backward()
    assert seen and all(shape == [(), (3, 2), (3, 2), *shapes] for shape in seen)
    seen.clear()
    pair = PairField()
    x, _ = odeint_adjoint(pair, (y0, torch.ones(())), t, adjoint_options={"norm": norm})
    x.sum().backward()
    assert seen and all(shape == [(), (3, 2), (), (3, 2), (), *shapes] for shape in seen)
    with pytest.raises(ValueError, match="seminorm"):
        odeint_adjoint(f, y0, t, adjoint_options={"norm": "maximum"})


def test_a_seminorm_saves_evaluations():
    torch.manual_seed(3)
    f = Field()
    y0, t = torch.randn(4, 2, requires_grad=True), torch.tensor([0.0, 3.0])
    counts = []
    for options in ({}, {"norm": "seminorm"}):
        y = odeint_adjoint(f, y0, t, rtol=1e-6, atol=1e-8, adjoint_options=options)
        f.count = 0
        (100 * y[-1]).sum().backward()
        counts.append(f.count)
    assert 0 < counts[1] <= counts[0]


def test_params_are_those_given_and_zero_where_unused():
    a, b, unused = (torch.tensor(x, requires_grad=True) for x in (0.5, 0.2, 1.0))
    y = odeint_adjoint(
        lambda t, y: -a * y + b, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_params=(a, unused), adjoint_method="dopri5"
    )
    y[-1].sum().backward()
    assert b.grad is None and float(unused.grad) == 0.0 and float(a.grad) != 0.0
    # without adjoint_params, what a closure captured is found
    y = odeint_adjoint(lambda t, y: -a * y + b, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_method="dopri5")
    (g,) = torch.autograd.grad(y[-1].sum(), b)
    torch.testing.assert_close(g, (1 - torch.exp(-a.detach())) / a.detach(), rtol=1e-5, atol=0)
    with pytest.warns(UserWarning, match="without requiring gradient"):
        odeint_adjoint(
            lambda t, y: -a * y, torch.ones(1), torch.tensor([0.0, 1.0]), adjoint_params=(a, torch.ones(2)),
            adjoint_options={"norm": lambda s: s[1].abs().max()},
        )  # fmt: skip


def test_callbacks_of_the_way_back():
    f = Field()
    steps = {"step": 0, "accept": 0, "reject": 0}
    f.callback_step_adjoint = lambda t, y, dt: steps.update(step=steps["step"] + 1)
    f.callback_accept_step_adjoint = lambda t, y, dt: steps.update(accept=steps["accept"] + 1)
    f.callback_reject_step_adjoint = lambda t, y, dt: steps.update(reject=steps["reject"] + 1)
    y0 = torch.randn(2, requires_grad=True)
    y = odeint_adjoint(f, y0, torch.tensor([0.0, 1.0]), adjoint_method="dopri5")
    assert steps["step"] == 0
    y.sum().backward()
    assert steps["step"] == steps["accept"] + steps["reject"] > 0


def test_options_of_the_forward_solve_carry_over_without_its_norm():
    f = Field()
    sizes = []
    f.callback_step_adjoint = lambda t, y, dt: sizes.append(float(dt))

    def norm(y):
        assert isinstance(y, torch.Tensor)
        return y.abs().max()

    y0 = torch.randn(2, requires_grad=True)
    y = odeint_adjoint(f, y0, torch.tensor([0.0, 1.0]), options={"max_step": 0.1, "norm": norm}, adjoint_rtol=1e-6)
    y.sum().backward()
    assert max(sizes) <= 0.1 + 1e-12


def test_second_derivatives_are_refused_not_wrong():
    f = Field()
    y0, t = torch.randn(2, requires_grad=True), torch.tensor([0.0, 1.0])
    (g,) = torch.autograd.grad(odeint_adjoint(f, y0, t, adjoint_method="dopri5")[-1].sum(), y0, create_graph=True)
    (h,) = torch.autograd.grad(odeint(f, y0, t)[-1].sum(), y0)
    torch.testing.assert_close(g.detach(), h, rtol=1e-5, atol=1e-6)
    with pytest.raises(adjoint.UnsupportedCombination, match="second derivatives"):
        g.sum().backward()
    with pytest.raises(adjoint.UnsupportedCombination, match="second derivatives"):
        torch.func.grad(lambda y: odeint_adjoint(f, y, t, adjoint_method="dopri5")[-1].sum())(y0.detach())


def test_memory_of_the_node_does_not_grow_with_the_steps():
    f = Field()
    y0 = torch.randn(2, requires_grad=True)
    y = odeint_adjoint(f, y0, torch.tensor([0.0, 5.0]), options={"max_step": 0.01}, adjoint_method="dopri5")
    saved = sum(x.numel() for x in y.grad_fn.saved_tensors)
    assert saved == 2 + 2 * 2 + sum(p.numel() for p in f.parameters())


def test_agrees_with_torchdiffeq_where_it_is_installed():
    peer = pytest.importorskip("torchdiffeq")
    f = PairField()
    y0 = (torch.randn(3, 2, requires_grad=True), torch.tensor(0.7, requires_grad=True))
    t = torch.tensor([0.0, 0.3, 0.9], requires_grad=True)
    for options in ASKED:
        solved = [library.odeint_adjoint(f, y0, t, rtol=1e-8, atol=1e-8, **options) for library in (adjoint, peer)]
        results = [gradients(y, (*y0, t, *f.parameters())) for y in solved]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual", "grad"])
def test_transforms_are_refused_by_name(transform):
    """In the state and in what ``func`` captured; the exact gradient is named."""

    def total(k):
        return odeint_adjoint(lambda t, y: -k * y, torch.ones(2), torch.linspace(0, 1, 3), **ASKED[0]).sum()

    def dual(k):
        with torch.autograd.forward_ad.dual_level():
            return total(torch.autograd.forward_ad.make_dual(k, torch.ones_like(k)))

    k = torch.tensor(1.3)
    ways = {
        "vmap": lambda: torch.vmap(total)(k.expand(3)),
        "jvp": lambda: torch.func.jvp(total, (k,), (k,)),
        "dual": lambda: dual(k),
        "grad": lambda: torch.func.grad(total)(k),
    }
    with pytest.raises(adjoint.UnsupportedCombination, match=r"continuous adjoint.*adjoint_method"):
        ways[transform]()


def test_tuple_states_with_an_empty_leaf():
    k = torch.tensor(0.7, requires_grad=True)
    y, empty = odeint_adjoint(lambda t, s: (-k * s[0], s[1]), (torch.ones(1), torch.ones(0)), torch.tensor([0.0, 1.0]), **ASKED[0])
    assert empty.shape == (2, 0)
    (slope,) = torch.autograd.grad(y[-1].sum(), k)
    assert slope.item() == pytest.approx(-torch.exp(-k).item(), rel=1e-5)


@pytest.mark.parametrize("rate", [-1.0, -20.0])
def test_implicit_euler_goes_back_with_the_jacobian_of_the_augmented_system(rate):
    """On y' = p y every step back divides y by 1 + h p and its adjoint by 1 - h p, and adds h times their product to the gradient."""
    p = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
    y0, h = torch.ones(1, dtype=torch.float64), 0.1
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    y = backsolved(lambda t, y: p * y, y0, times, method="implicit_euler", options={"step_size": h}, adjoint_params=(p,))[-1]
    end = (1 - h * rate) ** -10
    back = ((1 + h * rate) * (1 - h * rate)) ** -1
    torch.testing.assert_close(y.item(), end, rtol=1e-10, atol=0.0)
    found = torch.autograd.grad(y.sum(), p)[0].item()
    torch.testing.assert_close(found, h * end * sum(back**k for k in range(1, 11)), rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("method", ["sdirk2", "implicit_midpoint", "trapezoid", "trbdf2", "radauIIA3", "gl4", "gl6"])
def test_implicit_steps_back_are_those_of_the_state(method):
    """On y' = p y the adjoint's steps back are those of the state there: the gradient in y0 is the solution. The steps are too long for
    an iteration without a Jacobian."""
    n = 40
    p = torch.nn.Parameter(torch.linspace(-12.0, -1.0, n, dtype=torch.float64))
    times = torch.tensor([0.0, 0.4], dtype=torch.float64)
    y0 = torch.ones(n, dtype=torch.float64, requires_grad=True)
    y = backsolved(lambda t, y: p * y, y0, times, method=method, options={"step_size": 0.2}, adjoint_params=(p,))[-1]
    y0_bar, p_bar = torch.autograd.grad(y.sum(), (y0, p))
    torch.testing.assert_close(y0_bar, y.detach(), rtol=1e-6, atol=1e-9)
    assert p_bar.isfinite().all()


def test_an_initial_state_that_func_captured_too():
    u = torch.tensor([1.0, 2.0], requires_grad=True)
    # y' = u - 0.7 y
    want = math.exp(-0.7) + (1 - math.exp(-0.7)) / 0.7
    for func in (lambda t, y: u - 0.7 * y, lambda t, y: torch.stack([u[0], u.unbind()[1]]) - 0.7 * y):
        end = odeint_adjoint(func, u, torch.tensor([0.0, 1.0]), rtol=1e-8, atol=1e-8, adjoint_rtol=1e-8)[-1].sum()
        torch.testing.assert_close(torch.autograd.grad(end, u)[0], torch.full((2,), want), rtol=1e-5, atol=0)


@pytest.mark.parametrize("method, options", [("dopri5", {}), ("rk4", {"step_size": 0.01}), ("implicit_midpoint", {"step_size": 0.01})])
def test_a_force_by_autograd_grad_where_times_are_differentiated(method, options):
    """Half of ``y' = -2 k y`` is the slope of an energy."""
    k, y0 = torch.tensor(1.3, requires_grad=True), torch.tensor([1.0, 0.5], requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.0], requires_grad=True)

    def fun(t, y):
        with torch.enable_grad():
            x = y if y.requires_grad else y.detach().requires_grad_()
            return -torch.autograd.grad((0.5 * k * x**2).sum(), x, create_graph=True)[0] - k * y

    y = backsolved(fun, y0, t, method=method, options=options)
    found = torch.autograd.grad(y[1:].sum(), (k, y0, t))
    decay = torch.exp(-2 * k * t).detach()
    rate = -2 * 1.3 * 1.5 * decay[1:]
    want = ((-2 * t * decay).sum() * 1.5, decay[1:].sum().expand(2), torch.cat([-rate.sum().reshape(1), rate]))
    torch.testing.assert_close(found, tuple(x.detach() for x in want), rtol=2e-4, atol=1e-6)
