"""Parts of a state that are known by keys: whatever order these have in what ``fun`` and others give."""

from __future__ import annotations

import pytest
import torch

from adjoint import Event, InvalidInput, odeint, solve_dae, solve_ivp, solve_root

TIGHT = {"rtol": {"b": 1e-8, "a": 1e-8}, "atol": {"b": 1e-10, "a": 1e-10}}


def number(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def rates(k):
    return lambda t, y: {"b": y["a"] - 2 * y["b"], "a": -k * y["a"]}


def implicit(k):
    def residual(t, y, yp):
        rate = rates(k)(t, y)
        return {"b": yp["b"] - rate["b"], "a": yp["a"] - rate["a"]}

    return residual


def same(t, y):
    return {"b": y["b"], "a": 1.0 * y["a"]}


MASS = torch.eye(2, dtype=torch.float64)
DOORS = {
    "plain": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, **TIGHT).y,
    "integral": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, quadrature=lambda t, y: y["a"], **TIGHT).y,
    "rodas5p": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, method="rodas5p", mass_matrix=MASS, **TIGHT).y,
    "radau5": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, method="radau5", mass_matrix=MASS, **TIGHT).y,
    "compiled": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, compile=True, **TIGHT).y,
    "reset": lambda f, y0, k: solve_ivp(f, (0.0, 1.0), y0, events=Event(lambda t, y: y["a"] - 0.7, reset=same), **TIGHT).y,
    "dae": lambda f, y0, k: solve_dae(
        implicit(k), (0.0, 1.0), y0, {"b": y0["a"] - 2 * y0["b"], "a": -k * y0["a"]}, differential={"b": True, "a": True}, **TIGHT
    ).y,
    "odeint": lambda f, y0, k: odeint(lambda t, y: (f(t, y[0]),), (y0,), torch.tensor([0.0, 1.0]).double(), rtol=1e-8, atol=1e-10)[0],
}


@pytest.mark.compile
@pytest.mark.parametrize("door", DOORS)
def test_keys_in_another_order(door):
    k, a, b = number(0.7), number(1.0), number(0.5)
    y = DOORS[door](rates(k), {"a": a, "b": b}, k)
    fast, slow = torch.tensor(-2.0).double().exp(), torch.exp(-k)
    want = [a * slow, b * fast + a * (slow - fast) / (2 - k)]
    for got, truth in zip((y["a"][-1], y["b"][-1]), want, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-6, atol=0)
        slopes = [torch.autograd.grad(x, [k, a, b], retain_graph=True, materialize_grads=True) for x in (got, truth)]
        torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-9)


def test_modes():
    k = number(0.7)
    fun = lambda t, y, mode: -k * mode["u"] * y  # noqa: E731
    change = lambda t, y, mode: (y, {"v": mode["v"] + 1, "u": 2 * mode["u"]})  # noqa: E731
    event = Event(lambda t, y, mode: y[0] - 0.7, reset=change)
    y = solve_ivp(fun, (0.0, 1.0), torch.ones(1).double(), mode={"u": 1.0, "v": 0}, events=event, rtol=1e-9, atol=1e-12).y[-1, 0]
    # from log(1 / 0.7) / k on twice as fast
    truth = 0.7 * torch.exp(-2 * (k - torch.log(torch.tensor(1 / 0.7).double())))
    torch.testing.assert_close(y, truth, rtol=1e-7, atol=0)
    torch.testing.assert_close(torch.autograd.grad(y, k), torch.autograd.grad(truth, k), rtol=1e-6, atol=0)


def test_roots_and_bounds():
    p = number(3.0)
    x0 = {"a": torch.tensor(1.0).double(), "b": torch.tensor(1.0).double()}
    f = lambda x: {"b": x["b"] ** 2 - p, "a": x["a"] - 2 - x["b"]}  # noqa: E731
    x = solve_root(f, x0, bounds=({"b": 0.0, "a": -9.0}, {"b": 5.0, "a": 9.0})).x
    torch.testing.assert_close([float(x["a"]), float(x["b"])], [2 + 3**0.5, 3**0.5])
    assert float(torch.autograd.grad(x["b"], p)[0]) == pytest.approx(0.5 / 3**0.5)


@pytest.mark.parametrize("keys", ["a", "abc"])
def test_missing_and_other_keys(keys):
    y0 = {"a": torch.ones(2), "b": torch.ones(2)}
    with pytest.raises(InvalidInput, match="what fun returned has the structure"):
        solve_ivp(lambda t, y: {key: y["a"] for key in keys}, (0.0, 1.0), y0)
