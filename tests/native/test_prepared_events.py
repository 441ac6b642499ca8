"""Solves with events like one before: their times and states, and what makes them go the general way."""

from __future__ import annotations

import math
import warnings
from itertools import product

import pytest
import torch
from torch import nn

import adjoint

from ..helpers.prepared_solves import F64

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]


def ball(t, y, g):
    return torch.stack([y[1], -g * torch.ones_like(y[0])])


def ground(t, y, g):
    return y[0]


def top(t, y, g):
    return y[1] / g


def beside(t, y, g):
    return torch.sin(4 * t) + 0.1 * y[0] * g


ground.terminal, ground.direction = True, -1


def values(**more):
    found = {"y0": torch.tensor([1.0, 2.0], dtype=F64), "g": torch.tensor(9.81, dtype=F64)} | more
    return [x.requires_grad_() for x in found.values()]


def solve(y0, g, events, span=(0.0, 3.0), **options):
    return adjoint.solve_ivp(ball, span, y0, (g,), events=events, **({"rtol": 1e-8, "atol": 1e-10, "compile": True} | options))


class TestTheSame:
    @pytest.mark.parametrize(
        ("method", "events", "times"),
        [
            *product(["tsit5"], [[ground, top], [lambda t, y, g: y[0] + 100], [beside, ground, top]], [None, 0.5, 3.0]),
            *product(["rodas5p", "radau5"], [[beside, ground, top]], [None, 3.0]),
        ],
    )
    def test_as_the_general_way(self, method, events, times, counted):
        found = []
        for compile in (True, True, False):
            y0, g = values()
            samples = None if times is None else torch.linspace(0, times, 5, dtype=F64)
            sol = solve(y0, g, events, method=method, t_eval=samples, compile=compile)
            shown = [sol.t, sol.y, *(x for e in sol.events for x in (e.t, e.y))]
            total = sum((torch.cos(x.nan_to_num(0.0)) * (k + 1)).sum() for k, x in enumerate(shown))
            found.append((sol, shown, torch.autograd.grad(total, [y0, g])))
        assert len(counted) == 1 and counted[0] is not None
        (first, shown, slopes), (second, again, same), (_, _, eager) = found
        for a, b in zip(again, shown, strict=True):
            assert a.shape == b.shape and a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)
        for name in ("n_steps", "n_accepted", "n_fun", "n_jac", "n_solves"):
            assert getattr(first.stats, name) == getattr(second.stats, name)
        assert first.status == second.status and second.events.names == first.events.names
        torch.testing.assert_close(same, slopes, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(same, eager, rtol=1e-10, atol=1e-11)

    def test_closed_forms(self, counted):
        """Times and states, and their derivatives of both orders."""

        def fall(y0, g):
            (height, speed) = y0
            return (speed + torch.sqrt(speed**2 + 2 * g * height)) / g

        y0, g = values()
        expected = torch.stack([fall(y0, g), y0[1] / g])
        for _ in range(2):
            sol = solve(y0, g, [ground, top])
            found = torch.cat([sol.t[-1:], sol.events["top"].t])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            for k in range(2):
                mine, theirs = (torch.autograd.grad(x[k], [y0, g], create_graph=True) for x in (found, expected))
                torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
                # without `create_graph` too
                torch.testing.assert_close(torch.autograd.grad(found[k], [y0, g], retain_graph=True), theirs, rtol=1e-9, atol=1e-11)
                second = [torch.autograd.grad(sum(x.sum() for x in s), [y0, g], retain_graph=True) for s in (mine, theirs)]
                torch.testing.assert_close(*second, rtol=1e-6, atol=1e-7)
        assert counted[0] is not None

    def test_single_precision(self, counted):
        for _ in range(2):
            y0, g = (x.detach().float().requires_grad_() for x in values())
            sol = solve(y0, g, [ground, top], rtol=1e-5, atol=1e-6)
            assert sol.t.dtype == sol.events[1].t.dtype == sol.events[1].y.dtype == torch.float32
            (of_g,) = torch.autograd.grad(sol.events[1].t.sum(), g)
            assert float(of_g) == pytest.approx(-2 / 9.81**2, rel=1e-4)
        assert counted[0] is not None

    def test_the_second_time(self, counted):
        """That an event ends the solve the second time it occurs."""

        def crossing(t, y, k):
            return y[0] - 0.5

        crossing.terminal = 2
        for _ in range(2):
            k = torch.tensor(2.0, dtype=F64, requires_grad=True)
            sol = adjoint.solve_ivp(
                lambda t, y, k: torch.stack([y[1], -(k**2) * y[0]]), (0.0, 9.0), torch.tensor([0.0, 2.0], dtype=F64), (k,),
                events=crossing, rtol=1e-9, atol=1e-11, compile=True,
            )  # fmt: skip
            # y = 2 / k sin(k t)
            angles = torch.tensor([math.asin(0.5), math.pi - math.asin(0.5)], dtype=F64)
            torch.testing.assert_close(sol.events[0].t, angles / 2, rtol=1e-8, atol=0)
            assert float(sol.t[-1].detach()) == float(sol.events[0].t[-1].detach()) and sol.status == 1
            # sin(k t) = k / 4
            (slope,) = torch.autograd.grad(sol.t[-1], k)
            expected = (1 / (4 * math.cos(float(angles[1]))) - float(angles[1]) / 2) / 2
            assert float(slope) == pytest.approx(expected, rel=1e-6)
        assert counted[0] is not None


class TestWhatChanges:
    def test_rules(self, counted):
        def crossing(t, y, g):
            return y[0] - crossing.level

        crossing.level = 1.1
        y0, g = (x.detach() for x in values())
        for change, count, status in (
            ({}, 2, 0), ({}, 2, 0), ({"direction": 1}, 1, 0), ({"direction": -1, "terminal": True}, 1, 1), ({"level": 100.0}, 0, 0),
        ):  # fmt: skip
            for name, value in change.items():
                setattr(crossing, name, value)
            sol = solve(y0, g, crossing, span=(0.0, 0.6))
            assert len(sol.events[0].t) == count and sol.status == status, change
        # rules are known with the call
        assert len(counted) == 1

    def test_rules_before_second_derivatives(self, counted):
        """They are those of the solve, or are missed by name."""

        def crossing(t, y, g):
            return y[0] - 1.1

        events = [crossing]
        for _ in range(2):
            y0, g = values()
            t = solve(y0, g, events, span=(0.0, 0.6)).events[0].t
        events.append(top)
        (first,) = torch.autograd.grad(t.sum(), g, retain_graph=True)
        (again,) = torch.autograd.grad(t.sum(), g, create_graph=True)
        torch.testing.assert_close(again, first, rtol=1e-9, atol=1e-11)
        crossing.direction = 1
        with pytest.raises(adjoint.CapturedTensorLost, match="not the function any more"):
            torch.autograd.grad(t.sum(), g, create_graph=True)
        assert counted[0] is not None

    @pytest.mark.parametrize("how", ["written to", "on a module", "as Event"])
    def test_what_an_event_reads(self, how, counted):
        class Level(nn.Module):
            def __init__(self):
                super().__init__()
                self.level = nn.Parameter(torch.tensor(0.5, dtype=F64))

            def forward(self, t, y, g):
                return y[0] - self.level

        module = Level()
        plain = lambda t, y, g: y[0] - module.level  # noqa: E731
        event = module if how == "on a module" else adjoint.Event(plain, terminal=True, name="it") if how == "as Event" else plain
        for level in (0.5, 0.5, 0.5, 0.2):
            with torch.no_grad():
                module.level.copy_(torch.tensor(level))
            y0, g = (x.detach() for x in values())
            t = solve(y0, g, [event], span=(0.0, 0.7)).events[0].t
            (slope,) = torch.autograd.grad(t.sum(), module.level)
            assert float(t.detach()) == pytest.approx((2 + math.sqrt(4 + 2 * 9.81 * (1 - level))) / 9.81, rel=1e-10)
            assert float(slope) == pytest.approx(-1 / math.sqrt(4 + 2 * 9.81 * (1 - level)), rel=1e-8)
        # tracers, who are asked of what is no function, may leave something on a tensor that makes it another one
        assert len(counted) >= 2 and all(x is not None for x in counted)
        t = solve(y0, g, [event], span=(0.0, 0.7)).events[0].t
        with torch.no_grad():
            module.level.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            t.sum().backward()

    def test_a_number_that_an_event_reads(self, counted):
        """First derivatives are those of the solve, second ones ask the event anew and say so."""
        level = torch.tensor(0.5, dtype=F64)
        for _ in range(2):
            y0, g = values()
            t = solve(y0, g, lambda t, y, g: (y[0] - level) * g, span=(0.0, 0.6)).events[0].t
        level.fill_(0.7)
        (of_g,) = torch.autograd.grad(t.sum(), g, retain_graph=True)
        root = math.sqrt(4 + 9.81)
        assert float(of_g) == pytest.approx(1 * 0.5 / (root * 9.81) - (2 + root) / 9.81**2, rel=1e-8)
        with pytest.raises(adjoint.CapturedTensorLost, match="not the function any more"):
            torch.autograd.grad(t.sum(), g, create_graph=True)
        assert counted[0] is not None


class TestRefused:
    def test_no_slope(self, counted):
        for _ in range(2):
            y0, g = values()
            sol = solve(y0, g, [lambda t, y, g: torch.sign(y[1])])
            torch.autograd.grad(sol.y[-1].sum(), g, retain_graph=True)
            with pytest.raises(adjoint.InvalidInput, match="no slope"):
                torch.autograd.grad(sol.events[0].t.sum(), g)
        assert counted[0] is not None

    def test_jumps(self, counted):
        """Derivatives behind a recorded event at which ``fun`` jumps; a terminal one is another thing."""

        def fun(t, y, g):
            return torch.where(y > 0.5, -g, -2 * g) * torch.ones_like(y)

        def half(t, y, g):
            return y[0] - 0.5

        for terminal in (False, True):
            half.terminal = terminal
            for _ in range(4):
                g = torch.tensor(1.0, dtype=F64, requires_grad=True)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    sol = adjoint.solve_ivp(fun, (0.0, 0.7), torch.ones(1, dtype=F64), (g,), events=half, rtol=1e-6, compile=True)
                if terminal:
                    assert float(torch.autograd.grad(sol.t[-1], g)[0]) == pytest.approx(-0.5, rel=1e-6)
                else:
                    with pytest.raises(adjoint.InvalidInput, match="jumps"):
                        torch.autograd.grad(sol.y[-1].sum(), g)
        # the terminal one, but for looks at why steps were rejected, which are had every so many solves
        assert any(x is not None for x in counted[3:])

    def test_what_goes_the_general_way(self, counted):
        y0, g = values()
        for _ in range(2):
            many = adjoint.solve_ivp(
                lambda t, y, g: torch.stack([y[:, 1], -g * torch.ones_like(y[:, 0])], -1), (0.0, 1.0), y0.repeat(3, 1), (g,),
                events=lambda t, y, g: y[:, 1], batched=True, compile=True,
            )  # fmt: skip
            assert many.events[0].t.shape == (1, 3)
            assert float(solve(y0, g, top, quadrature=lambda t, y, g: y[1]).quadrature) == pytest.approx(6 - 4.5 * 9.81, rel=1e-6)
        assert not counted
