"""Derivatives that are lost to rounding beside fast exchange: the solve says so, or they are right."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import adjoint

WORD = "slower ones are lost to rounding"


def exchange(k):
    """``a <-> b`` with rates ``k``, and a decay of both by ``s``: the total is ``exp(-s t)``."""

    def fun(t, y, s):
        a, b = y[..., 0], y[..., 1]
        return torch.stack([-k * a + k * b - s * a, k * a - k * b - s * b], -1)

    return fun


def solved(k, form, method="kvaerno5"):
    """The relative error of the derivative of the total in ``s``, and whether there was a word."""
    s, fun, options = torch.tensor(0.5, requires_grad=True), exchange(k), {"rtol": 1e-5, "atol": 1e-8}
    y0 = torch.tensor([1.0, 0.0])
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if form == "dae":
            y0 = torch.tensor([0.5, 0.5])
            y = adjoint.solve_dae(lambda t, y, yp, s: yp - fun(t, y, s), (0.0, 1.0), y0, args=(s,), method=method, **options).y[-1]
        elif form == "batched":
            rates = torch.tensor([1.0, k])
            many = exchange(rates)
            y = adjoint.solve_ivp(many, (0.0, 1.0), y0.expand(2, 2), args=(s,), method=method, batched=True, **options).y[-1, 1]
        else:
            more = {
                "one": {},
                "compiled": {"compile": True},
                "mass": {"mass_matrix": torch.eye(2)},
                "checkpoints": {"gradient": adjoint.DiscreteAdjoint(checkpoints=4)},
                "forward": {"gradient": adjoint.ForwardSensitivity()},
                "continuous": {"gradient": adjoint.InterpolatingAdjoint()},
            }[form]
            y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, args=(s,), method=method, **options, **more).y[-1]
    slope = torch.autograd.grad(y.sum(), s)[0].item()
    return slope / -math.exp(-0.5) - 1, [str(x.message) for x in told if WORD in str(x.message)]


@pytest.mark.parametrize(
    ("form", "method"),
    [
        *(("one", method) for method in ("kvaerno5", "rodas5p", "radau5", "bdf")),
        ("batched", "rodas5p"), ("mass", "rodas5p"), ("dae", "radau"), ("dae", "bdf"),
        ("checkpoints", "kvaerno5"), ("forward", "kvaerno5"), ("continuous", "kvaerno5"),
        pytest.param("compiled", "kvaerno5", marks=pytest.mark.compile),
    ],
)  # fmt: skip
def test_a_slow_total_beside_fast_exchange_is_right_or_told_of(form, method):
    for k in (1e6, 1e13, 1e16):
        error, told = solved(k, form, method)
        assert told if k > 1e6 else not told
        assert told or abs(error) < 1e-3
        assert form != "batched" or "trajectory 1" in "".join(told) or k == 1e6


@pytest.mark.parametrize("k", [1e12, 1e16])
def test_rates_that_lose_nothing_are_not_told_of(k):
    s, options = torch.tensor(0.5, requires_grad=True), {"method": "kvaerno5", "rtol": 1e-5, "atol": 1e-8}
    # the total as a variable; one that is driven to where it belongs; one that another follows
    total = lambda t, y, s: torch.stack([k * (y[1] - 2 * y[0]) - s * y[0], -s * y[1]])  # noqa: E731
    driven = lambda t, y, s: torch.stack([-k * (y[0] - torch.cos(t)), -s * y[1] + 0 * y[0]])  # noqa: E731
    follows = lambda t, y, s: torch.stack([k * (y[1] - y[0]), -s * y[1]])  # noqa: E731
    for fun in (total, driven, follows):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=f".*{WORD}")
            y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.ones(2), args=(s,), **options).y[-1, 1]
        assert torch.autograd.grad(y, s)[0].item() == pytest.approx(-math.exp(-0.5), rel=1e-3)


def test_who_wants_no_derivatives_is_told_nothing():
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=f".*{WORD}")
        y = adjoint.solve_ivp(exchange(1e16), (0.0, 1.0), torch.tensor([1.0, 0.0]), args=(torch.tensor(0.5),), method="kvaerno5").y[-1]
    assert float(y.sum()) == pytest.approx(math.exp(-0.5), rel=1e-3)
