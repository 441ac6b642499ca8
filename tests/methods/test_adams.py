"""The Adams methods: coefficients, order of convergence on even and uneven grids, derivatives, memory."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from adjoint import UnsupportedCombination, odeint, odeint_adjoint, solve_ivp
from adjoint.methods.adams import adams_weights, differentiable_weights, exact_weights, starter


def test_coefficients_from_the_literature():
    """Hairer, Norsett & Wanner, section III.1, formulas (1.5) and (1.9)."""
    bashforth = {2: "3/2 -1/2", 3: "23/12 -16/12 5/12", 4: "55/24 -59/24 37/24 -9/24"}
    moulton = {2: "1/2 1/2", 3: "5/12 8/12 -1/12", 4: "9/24 19/24 -5/24 1/24", 5: "251/720 646/720 -264/720 106/720 -19/720"}
    for table, first in ((bashforth, 0), (moulton, 1)):
        for order, row in table.items():
            expected = [float(Fraction(x)) for x in row.split()]
            assert exact_weights(tuple(range(first, first - order, -1))) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("size", range(1, 13))
def test_weights_integrate_polynomials_exactly(size):
    torch.manual_seed(size)
    places = [0.0, *(-(torch.arange(1.0, size) + 0.4 * torch.rand(size - 1))).tolist()]
    for weights in (adams_weights(places), differentiable_weights(torch.tensor(places)).tolist()):
        for power in range(size):
            terms = [w * c**power for w, c in zip(weights, places, strict=True)]
            assert sum(terms) == pytest.approx(1 / (power + 1), abs=1e-12 * sum(map(abs, terms)) + 1e-14)
    even = tuple(range(0, -size, -1))
    assert differentiable_weights(torch.tensor(even, dtype=torch.float64)).tolist() == pytest.approx(exact_weights(even), rel=1e-9)


def wave(t, y):
    return torch.stack([y[1], -y[0]]) + 0.1 * torch.cos(3 * t)


@pytest.fixture(scope="module")
def truth():
    start, times = (torch.tensor(x, dtype=torch.float64) for x in ([1.0, 0.5], [0.0, 2.0]))
    return odeint(wave, start, times, rtol=1e-13, atol=1e-14)[-1]


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("even", [True, False])
def test_order_of_convergence(method, order, even, truth):
    if order == 1 and method == "implicit_adams":
        pytest.skip("the corrector is at least of order 2")
    errors = []
    for n in (40, 80):
        s = torch.linspace(0.0, 1.0, n + 1)
        grid = 2 * s if even else 2 * (s + 0.3 * s * (1 - s) * torch.cos(5 * s))
        options = {"max_order": order, "max_iters": 20}
        y = odeint(wave, torch.tensor([1.0, 0.5]), grid, method=method, rtol=1e-14, atol=1e-14, options=options)
        errors.append(float((y[-1] - truth).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.3


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams"])
def test_defaults_converge_as_steps_shrink(method, truth):
    errors = []
    for n in (10, 40, 160, 640):
        options = {"step_size": 2.0 / n} | ({"max_iters": 20} if method == "implicit_adams" else {})
        y = odeint(wave, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 2.0]), method=method, options=options)
        errors.append(float((y[-1] - truth).abs().max()))
    assert all(b < a or b < 1e-11 for a, b in pairwise(errors))


def test_starters_keep_the_order():
    orders = {"rk4": 4, "dopri5": 5, "dopri8": 8}
    for order in range(1, 13):
        name, slopes = starter(order)
        assert orders[name] >= min(order, 9) - 1 and slopes <= order


def test_gradients_keep_one_state_per_evaluation():
    """With the discrete adjoint the graph holds no intermediate result of ``fun``; only the first looks at it make some."""
    sizes = []

    def pack(x):
        sizes.append(x.numel())
        return x

    weight = torch.randn(2, 500, requires_grad=True)

    def f(t, y):
        return torch.tanh(y @ weight) @ weight.T / 500

    y0 = torch.ones(3, 2, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = odeint(f, y0, torch.linspace(0.0, 1.0, 21), method="explicit_adams")
    assert sum(size == 1500 for size in sizes) <= 6
    (exact,) = torch.autograd.grad(odeint(f, y0, torch.linspace(0.0, 1.0, 21))[-1].sum(), weight)
    (g,) = torch.autograd.grad(y[-1].sum(), weight)
    torch.testing.assert_close(g, exact, rtol=1e-3, atol=1e-6)


def test_corrector_that_does_not_converge_warns():
    with pytest.warns(UserWarning, match="did not converge"):
        odeint(lambda t, y: -30 * y, torch.ones(1), torch.linspace(0.0, 1.0, 12), method="implicit_adams", options={"max_order": 4})
    with pytest.raises(ValueError, match="max_order"):
        odeint(wave, torch.ones(2), torch.linspace(0.0, 1.0, 12), method="implicit_adams", options={"max_order": 13})


def test_callbacks_there_and_back():
    there, back = [], []

    class Wave(torch.nn.Module):
        def forward(self, t, y):
            return wave(t, y)

        def callback_step(self, t0, y0, dt):
            there.append((float(t0), tuple(y0.shape)))

        def callback_step_adjoint(self, t0, state, dt):
            back.append(float(t0))

    y0 = torch.tensor([1.0, 0.5], requires_grad=True)
    odeint_adjoint(Wave(), y0, torch.tensor([0.0, 1.0]), method="explicit_adams", options={"step_size": 0.1})[-1].sum().backward()
    assert len(there) == len(back) == 10 and there[0] == (0.0, (2,)) and back == sorted(back, reverse=True)


@pytest.mark.parametrize("method", ["explicit_adams", "implicit_adams", "fixed_adams"])
def test_solve_ivp_says_where_they_are(method):
    with pytest.raises(UnsupportedCombination, match=r"adjoint\.odeint.*method='abm'"):
        solve_ivp(wave, (0.0, 1.0), torch.ones(2), method=method, first_step=0.1)
