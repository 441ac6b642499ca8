"""Rows whose span has no length, beside others, in implicit equations with doses or resets: derivatives in the times of the span."""

import pytest
import torch

import adjoint
from adjoint import Doses, Event

D = {"dtype": torch.float64}
X = [0.3, 0.3, 0.7, 0.9]
FAR = Doses([0.75], 0.2, 0)
LATE = Event(lambda t, y, *args: y[..., 0] - 50.0, reset=lambda t, y, *args: y)


def equations(t, y, yp, k):
    return torch.stack([yp[..., 0] + k * y[..., 0] - y[..., 1], y[..., 1] - k * torch.sin(t) - y[..., 0] ** 2], -1)


def right(t, y, k):
    # with a mass matrix of 2
    return 2 * (-k * y + torch.sin(t).unsqueeze(-1))


def solved(x, door, **options):
    start, end, k, first = x
    lengths = torch.tensor([1.0, 0.0, 0.7], **D)
    t0 = start.expand(3)
    t1 = X[0] + lengths + (end - end.detach())
    options = {"batched": True, "rtol": 1e-6, "atol": 1e-8, "quadrature": lambda t, y, *args: y[..., 0]} | options
    if door == "dae":
        y0 = torch.stack([first.expand(3), k * torch.sin(t0) + first**2], -1)
        return adjoint.solve_dae(equations, (t0, t1), y0, None, (k,), **options)
    two = torch.tensor([[2.0]], **D)
    return adjoint.solve_ivp(right, (t0, t1), first.expand(3, 1), (k,), mass_matrix=two, **options)


def truth(x, door):
    """Time, state and integral at the end, by the Taylor series of the solution about the start, to second order."""
    start, end, k, first = x
    way = end - start
    if door == "dae":
        z = k * torch.sin(start) + first**2
        one = -k * first + z
        two = -k * one + k * torch.cos(start) + 2 * first * one
    else:
        one = -k * first + torch.sin(start)
        two = -k * one + torch.cos(start)
    y = first + way * one + way**2 / 2 * two
    state = [y, k * torch.sin(end) + y**2] if door == "dae" else [y]
    return torch.stack([end, *state, way * first + way**2 / 2 * one])


def seen(sol):
    present = ~sol.t.detach().isnan()
    last = int(present[:, 1].sum()) - 1
    return torch.stack([sol.t[last, 1], *sol.y[last, 1], sol.quadrature[1]])


@pytest.mark.parametrize("t_eval", [None, "steps"])
@pytest.mark.parametrize("events", [FAR, LATE], ids=["dose", "reset"])
@pytest.mark.parametrize("door, method", [("dae", "radau"), ("dae", "bdf"), ("mass", "rodas5p")])
def test_a_row_of_no_length_has_derivatives_in_its_times(door, method, events, t_eval):
    x = torch.tensor(X, **D)
    weights = torch.sin(1 + torch.arange(4.0, **D))

    def value(x):
        found = seen(solved(x, door, method=method, events=[events], t_eval=t_eval))
        return (found * weights[: len(found)]).sum()

    def right(x):
        found = truth(x, door)
        return (found * weights[: len(found)]).sum()

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(value, x), jacobian(right, x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("gradient", [adjoint.ForwardSensitivity(), adjoint.InterpolatingAdjoint()])
def test_by_other_strategies_and_in_samples(gradient):
    x = torch.tensor(X, **D)

    def samples(x):
        t = x[0].expand(2, 3) + torch.tensor([[0.5], [1.0]], **D) * ((x[1] - x[1].detach()) - (x[0] - x[0].detach()))
        t = t + torch.tensor([0.0, 0.0, 0.7], **D)
        y = solved(x, "dae", method="radau", gradient=gradient, events=[LATE], t_eval=t).y
        return torch.cat([y[0, 1], y[1, 1]])

    def right(x):
        half = torch.cat([x[:1], (x[:1] + x[1:2]) / 2, x[2:]])
        return torch.cat([truth(half, "dae")[1:3], truth(x, "dae")[1:3]])

    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(samples, x), jacobian(right, x), rtol=1e-6, atol=1e-7)


def test_an_ode_that_begins_with_no_dose_shows_its_first_state():
    end = torch.tensor(0.3, **D, requires_grad=True)
    sol = adjoint.solve_ivp(lambda t, y: -y, (0.3, end), torch.ones(1, **D), events=[Doses([0.75], 0.2, 0)])
    first, last = (torch.autograd.grad(y.sum(), end, retain_graph=True, materialize_grads=True)[0] for y in sol.y)
    assert float(first) == 0.0 and float(last) == pytest.approx(-1.0)


def test_no_matrix_of_a_round_step_stands_in_for_one_of_no_length():
    # F_y' + F_y is singular here
    fun = lambda t, y, yp: yp - torch.stack([y[..., 1] - 0.8 * y[..., 0], 1.8 * y[..., 0]], -1)  # noqa: E731
    y0 = torch.tensor([0.9, 1.0], **D)
    torch.testing.assert_close(adjoint.solve_dae(fun, (0.3, 0.3), y0).y[-1], y0, rtol=0, atol=0)
