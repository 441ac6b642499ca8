"""`adjoint.reduce_index`: structure found, solutions of the reduced systems against trusted values and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from adjoint import Doses, Event, HigherIndexDAE, InvalidInput, UnsupportedCombination, reduce_index, solve_dae

from ..helpers.dae_problems import ROBERTSON_P, ROBERTSON_Y0, robertson

FINE = {"rtol": 1e-7, "atol": 1e-9}


def pendulum(t, y, yp, g):
    """Index 3: the constraint is on positions."""
    x, y_, u, w, z = y.unbind(-1)
    dx, dy, du, dw, _ = yp.unbind(-1)
    return torch.stack([dx - u, dy - w, du + x * z, dw + y_ * z + g, x**2 + y_**2 - 1], -1)


LOW = torch.tensor([0.6, -0.8, 0.0, 0.0, 0.8], dtype=torch.float64)


def test_structure_of_the_pendulum():
    reduced = reduce_index(pendulum, LOW, args=(torch.tensor(1.0),))
    assert reduced.structural_index == 3 and reduced.differentiated == (1, 1, 0, 0, 2)
    assert len(reduced.dummies) == 4 and int(reduced.differential.sum()) == 2
    with pytest.raises(HigherIndexDAE):
        solve_dae(pendulum, (0.0, 1.0), LOW, args=(torch.tensor(1.0),))


def test_pendulum_from_index_three():
    """Energy and both hidden constraints; value and derivative against the angle's equation."""
    from adjoint import solve_ivp

    g = torch.tensor(1.2, requires_grad=True)
    reduced = reduce_index(pendulum, LOW, args=(g,))
    sol = reduced.solve((0.0, 0.5), LOW, args=(g,), rtol=1e-6, atol=1e-8)
    swing = lambda t, y, g: torch.stack([y[1], -g * torch.sin(y[0])])  # noqa: E731
    tight = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12}
    a, w = solve_ivp(swing, (0.0, 0.5), torch.tensor([math.atan2(0.6, 0.8), 0.0]), (g,), **tight).y[-1]
    truth = torch.stack([a.sin(), -a.cos(), w * a.cos(), w * a.sin(), w**2 + g * a.cos()])
    assert torch.allclose(sol.y[-1], truth, atol=1e-5)
    weights = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3])
    mine, theirs = (torch.autograd.grad((x * weights).sum(), g)[0] for x in (sol.y[-1], truth))
    assert torch.allclose(mine, theirs, rtol=1e-4)
    x, y, u, v, _ = sol.y[-1].detach()
    assert abs(float(x**2 + y**2 - 1)) < 1e-11 and abs(float(x * u + y * v)) < 1e-10


def circuit(t, y, yp, c):
    """A voltage source across two capacitors in parallel with a current to find: index 2. ``v = sin t``, ``i = 2 c cos t``."""
    v, i = y.unbind(-1)
    return torch.stack([2 * c * yp[..., 0] - i, v - torch.sin(t)], -1)


def test_index_two_and_a_batch():
    c = torch.tensor([1.0, 3.0], requires_grad=True)
    y0 = torch.zeros(2, 2)
    reduced = reduce_index(circuit, y0, args=(c,), batched=True)
    assert reduced.structural_index == 2 and reduced.differentiated == (0, 1)
    times = torch.tensor([0.0, 0.5, 2.0])
    sol = reduced.solve((0.0, 2.0), y0, args=(c,), t_eval=times, batched=True, max_step=0.05, **FINE)
    assert torch.allclose(sol.y[..., 0], times.sin().unsqueeze(-1).expand(3, 2), atol=1e-8)
    assert torch.allclose(sol.y[..., 1], 2 * c * times.cos().unsqueeze(-1), atol=1e-6)
    (bars,) = torch.autograd.grad(sol.y[1, :, 1].sum(), c)
    assert torch.allclose(bars, torch.full((2,), 2 * math.cos(0.5)), atol=1e-6)


def test_index_one_stays_as_it_is():
    reduced = reduce_index(robertson, ROBERTSON_Y0, args=(ROBERTSON_P,))
    assert reduced.structural_index == 1 and sum(reduced.differentiated) == 0 and not reduced.dummies
    sol = reduced.solve((0.0, 40.0), ROBERTSON_Y0, args=(ROBERTSON_P,), **FINE)
    assert torch.allclose(sol.y[-1], solve_dae(robertson, (0.0, 40.0), ROBERTSON_Y0, args=(ROBERTSON_P,), **FINE).y[-1], rtol=1e-6)


def test_states_of_any_structure_events_and_dense_output():
    """A chain of integrators driven through its end: ``x = sin t`` prescribed, the force ``f = x''' = -cos t`` found (index 4)."""

    def chain(t, y, yp):
        return {
            "x": yp["x"] - y["v"],
            "v": yp["v"] - y["a"],
            "a": yp["a"] - y["f"],
            "f": y["x"] - torch.sin(t),
        }

    y0 = {"x": torch.tensor(0.0), "v": torch.tensor(1.0), "a": torch.tensor(0.0), "f": torch.tensor(-1.0)}
    reduced = reduce_index(chain, y0)
    assert reduced.structural_index == 4

    class Stop:
        terminal = True

        def __call__(self, t, y):
            return y["f"]

    sol = reduced.solve((0.0, 3.0), y0, events=Stop(), dense_output=True, quadrature=lambda t, y: y["v"], max_step=0.2, **FINE)
    assert float(sol.t[-1]) == pytest.approx(math.pi / 2, abs=1e-8) and abs(float(sol.events[0].y["f"][0])) < 1e-8
    assert float(sol(torch.tensor(1.0))["a"]) == pytest.approx(-math.sin(1.0), abs=1e-6)
    assert float(sol.quadrature) == pytest.approx(1.0, abs=1e-7)


@pytest.mark.parametrize(
    "event", [Event(lambda t, y: y[0] - 0.5, reset=lambda t, y: -y), Doses(torch.tensor([0.5]), torch.tensor([1.0]), 0)]
)
def test_resets_and_doses_are_refused_by_name(event):
    f = lambda t, y, yp: torch.stack([yp[0] + y[0], y[1] - y[0]])  # noqa: E731
    with pytest.raises(UnsupportedCombination, match="reset"):
        reduce_index(f, torch.ones(2)).solve((0.0, 1.0), torch.ones(2), events=event)


def test_structurally_singular():
    f = lambda t, y, yp: torch.stack([yp[0] - y[1], y[0] - torch.sin(t), y[0] - 2 * torch.sin(t)])  # noqa: E731
    with pytest.raises(HigherIndexDAE, match="no solution"):
        reduce_index(f, torch.zeros(3))


def test_numerically_singular():
    """Two constraints that say the same in different words."""
    f = lambda t, y, yp: torch.stack([yp[0] - y[1], yp[1] - y[2] - y[3], y[0] - torch.sin(t), 2 * y[0] + 0 * y[1] - 2 * torch.sin(t)])  # noqa: E731
    with pytest.raises(HigherIndexDAE):
        reduce_index(f, torch.zeros(4))


def test_what_is_refused():
    with pytest.raises(InvalidInput, match="callable"):
        reduce_index(3.0, LOW)
    with pytest.raises(InvalidInput, match="as many equations"):
        reduce_index(lambda t, y, yp: y[:1], LOW)
    reduced = reduce_index(pendulum, LOW, args=(torch.tensor(1.0),))
    with pytest.raises(InvalidInput, match="batched"):
        reduced.solve((0.0, 1.0), LOW, args=(torch.tensor(1.0),), batched=True)
    with pytest.raises(InvalidInput, match="consistent"):
        reduced.solve((0.0, 1.0), LOW, args=(torch.tensor(1.0),), consistent="trust")


def circle(t, y, yp, w):
    """Round the unit circle at the speed ``w``, the multiplier is zero: index 2, and no choice of a dummy lasts for half of it."""
    x, y_, z = y.unbind(-1)
    return torch.stack([yp[0] + w * y_ - z * x, yp[1] - w * x - z * y_, x**2 + y_**2 - 1], -1)


ON_CIRCLE = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)


def test_the_choice_of_dummies_changes_before_it_wears_out():
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.3, 0.8, 1.0], dtype=torch.float64)
    reduced = reduce_index(circle, ON_CIRCLE, args=(w,))
    options = {"args": (w,), "rtol": 1e-4, "atol": 1e-6}
    sol = reduced.solve((0.0, 1.0), ON_CIRCLE, t_eval=times, **options)
    truth = torch.stack([torch.cos(2 * times), torch.sin(2 * times), 0 * times], -1)
    torch.testing.assert_close(sol.y.detach(), truth, rtol=0, atol=1e-3)
    slopes = torch.autograd.grad(sol.y[1:, 0].sum(), w)[0]
    torch.testing.assert_close(slopes, -(times * torch.sin(2 * times))[1:].sum(), rtol=1e-2, atol=0)
    with pytest.raises(UnsupportedCombination, match=r"cease to be a good choice at t = 0\.68"):
        reduced.solve((0.0, 1.0), ON_CIRCLE, dense_output=True, **options)


@pytest.mark.slow
def test_pendulum_released_at_one_radian():
    from adjoint import solve_ivp

    g = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    start = torch.tensor([math.sin(1), -math.cos(1), 0, 0, math.cos(1)], dtype=torch.float64)
    sol = reduce_index(pendulum, start, args=(g,)).solve((0.0, 2.0), start, args=(g,), rtol=1e-5, atol=1e-7)
    swing = lambda t, y, g: torch.stack([y[1], -g * torch.sin(y[0])])  # noqa: E731
    tight = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12}
    a, w = solve_ivp(swing, (0.0, 2.0), torch.tensor([1.0, 0.0], dtype=torch.float64), (g,), **tight).y[-1]
    truth = torch.stack([a.sin(), -a.cos(), w * a.cos(), w * a.sin(), w**2 + g * a.cos()])
    torch.testing.assert_close(sol.y[-1], truth, rtol=0, atol=1e-4)
    mine, theirs = (torch.autograd.grad(x.sum(), g)[0] for x in (sol.y[-1], truth))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=0)
