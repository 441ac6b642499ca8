"""The ten steps of `docs/add_a_method.md`, taken: a method of this file goes through the tests that every method goes through."""

from __future__ import annotations

import pytest
import torch

from adjoint import solve_ivp
from adjoint.errors import UnsupportedCombination
from adjoint.methods import METHODS, ExplicitRungeKutta, Tableau

from ..sensitivity import test_matrix as matrix
from . import test_order as order

NAME = "ssp33"
WEIGHTS = (1 / 6, 1 / 6, 2 / 3)


def hermite(b):
    """The cubic through both ends with both slopes; the last stage is the slope at the end of the step."""
    rows = []
    for i, weight in enumerate((*b, 0.0)):
        first, last = float(i == 0), float(i == len(b))
        rows.append((first, 3 * weight - 2 * first - last, -2 * weight + first + last))
    return tuple(rows)


SSP33 = Tableau(
    name=NAME,
    order=3,
    a=((), (1.0,), (0.25, 0.25)),
    b=WEIGHTS,
    c=(0.0, 1.0, 0.5),
    # less Heun's method of order 2
    error=(1 / 6 - 1 / 2, 1 / 6 - 1 / 2, 2 / 3),
    error_order=2,
    extra_a=(WEIGHTS,),
    extra_c=(1.0,),
    dense=hermite(WEIGHTS),
    dense_order=3,
    source="Shu & Osher (1988), Efficient implementation of essentially non-oscillatory shock-capturing schemes, J. Comput. Phys. 77",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    method = ExplicitRungeKutta(SSP33)
    monkeypatch.setitem(METHODS, NAME, method)
    monkeypatch.setitem(matrix.KNOWN, NAME, method)
    yield
    matrix.unrolled.cache_clear()


def test_it_is_known_by_its_name():
    sol = solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), method=NAME, rtol=1e-8, atol=1e-10)
    assert torch.allclose(sol.y[-1], torch.exp(torch.tensor(-1.0)).expand(2), rtol=1e-6)


def test_orders():
    order.test_order_of_the_steps(NAME)
    order.test_order_of_the_dense_output(NAME)
    order.test_error_follows_the_tolerance(NAME)


@pytest.mark.users_defaults
def test_steps_against_differences():
    matrix.test_unrolled_steps_against_differences(NAME)


@pytest.mark.users_defaults
@pytest.mark.parametrize("form", [f for f in matrix.FORMS if not f.startswith("compiled")])
def test_every_strategy(form):
    for strategy in matrix.DISCRETE:
        matrix.test_derivatives_of_the_computed_solution(matrix.Case(NAME, strategy, form))
    for strategy in matrix.CONTINUOUS:
        matrix.test_continuous_adjoints(matrix.Case(NAME, strategy, form))


def test_an_unknown_name_lists_those_that_are_known():
    with pytest.raises((ValueError, UnsupportedCombination), match=NAME):
        solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.ones(2), method="no such method")


def test_a_wrong_tableau_is_refused():
    with pytest.raises(ValueError, match="sums to"):
        Tableau(name="wrong", order=2, a=((), (0.4,)), b=(0.0, 1.0), c=(0.0, 0.5), dense=((1.0,), (0.0,)), dense_order=1, source="nowhere")
