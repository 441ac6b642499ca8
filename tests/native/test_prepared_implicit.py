"""Solves of implicit equations like one before: consistent initial values, slopes, and what makes them go the general way."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint

from ..helpers.prepared_solves import F64

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]


def residual(t, y, yp, p):
    """The second variable is algebraic, and follows from the first."""
    u, v = y[..., 0], y[..., 1]
    return torch.stack([yp[..., 0] + p[0] * u - p[1] * v, v - p[2] * u**2 - torch.sin(t + 1)], -1)


def p3():
    return torch.tensor([1.0, 0.5, 0.7], dtype=F64, requires_grad=True)


def start(rows=0):
    y0 = torch.tensor([1.0, 0.3], dtype=F64)
    return (y0 if not rows else y0 * (1 + torch.arange(rows, dtype=F64).unsqueeze(-1) / 10)).requires_grad_()


def solve(fun, y0, args=(), yp0=None, **options):
    return adjoint.solve_dae(fun, (0.0, 2.0), y0, yp0, args, **({"rtol": 1e-7, "compile": True} | options))


class TestTheSame:
    @pytest.mark.parametrize("method", ["radau", "bdf"])
    @pytest.mark.parametrize("rows", [0, 20])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_as_the_general_way(self, method, rows, sampled, counted):
        found = []
        for _ in range(3):
            y0, p = start(rows), p3()
            times = torch.linspace(0, 2, 7, dtype=F64) if sampled else None
            sol = solve(residual, y0, (p,), method=method, batched=rows > 0, t_eval=times)
            weights = torch.cos(torch.arange(sol.y.numel(), dtype=F64)).reshape(sol.y.shape)
            slopes = torch.autograd.grad((sol.y * weights).sum(), [y0, p], retain_graph=True)
            found.append((sol, (*slopes, *torch.autograd.grad((sol.yp * weights).sum(), [y0, p]))))
        assert len(counted) == 2 and all(x is not None for x in counted)
        (first, slopes), *others = found
        for sol, grads in others:
            assert torch.equal(sol.y, first.y) and torch.equal(sol.t, first.t)
            torch.testing.assert_close(sol.yp, first.yp, rtol=1e-13, atol=1e-14)
            for name in ("n_steps", "n_accepted", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton"):
                assert torch.equal(torch.as_tensor(getattr(sol.stats, name)), torch.as_tensor(getattr(first.stats, name))), name
            assert vars(sol.stats.backward) == vars(first.stats.backward)
            torch.testing.assert_close(grads, slopes, rtol=1e-12, atol=1e-13)
            # a guess
            assert bool((grads[0][..., 1] == 0).all())

    @pytest.mark.parametrize("sampled", [False, True])
    @pytest.mark.slow_cases("True")
    def test_slopes_and_second_order(self, sampled, counted):
        times = torch.linspace(0, 2, 5, dtype=F64) if sampled else None

        def value(y0, p, compile):
            sol = solve(residual, y0, (p,), t_eval=times, compile=compile, rtol=1e-9)
            return (sol.yp * sol.y).sum() + sol.y[0].sum()

        found = []
        for compile in (True, True, False):
            y0, p = start(), p3()
            slopes = torch.autograd.grad(value(y0, p, compile), [y0, p], create_graph=True)
            found.append([*(x.detach() for x in slopes), *torch.autograd.grad(sum((x**2).sum() for x in slopes), [y0, p])])
        assert counted
        torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize("times", [None, 2.0])
    def test_events(self, times, counted):
        """One that is recorded, of the algebraic variable, and one that ends the solve."""

        def level(t, y, p):
            return y[1] - p[2] * 1.2

        def low(t, y, p):
            return y[0] - 0.7 * p[0]

        low.terminal = True
        found = []
        for compile in (True, True, False):
            y0, p = start(), p3()
            samples = None if times is None else torch.linspace(0, times, 5, dtype=F64)
            sol = solve(residual, y0, (p,), events=[level, low], t_eval=samples, compile=compile)
            shown = [sol.t, sol.y, *(x for e in sol.events for x in (e.t, e.y))]
            total = sum((torch.cos(x.nan_to_num(0.0)) * (k + 1)).sum() for k, x in enumerate(shown))
            slopes = torch.autograd.grad(total, [y0, p], retain_graph=True)
            second = torch.autograd.grad(total + (sol.yp.nan_to_num(0.0) ** 2).sum(), [y0, p])
            found.append(([*shown, sol.yp], [*slopes, *second]))
            assert sol.status == 1 and len(sol.events[0].t) == 1
        assert len(counted) == 1 and counted[0] is not None
        (first, slopes), (again, same), (eager, others) = found
        for a, b, c in zip(again, first, eager, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13, equal_nan=True)
            torch.testing.assert_close(a, c, rtol=1e-8, atol=1e-9, equal_nan=True)
        torch.testing.assert_close(same, slopes, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(same, others, rtol=1e-7, atol=1e-8)

    def test_values_at_the_start(self, counted):
        """With their derivatives: closed forms."""
        for _ in range(2):
            y0, p = start(), p3()
            y, yp = (x[0] for x in (lambda sol: (sol.y, sol.yp))(solve(residual, y0, (p,))))
            assert y.tolist() == pytest.approx([1.0, 0.7 + math.sin(1)], rel=1e-13)
            assert float(yp[0].detach()) == pytest.approx(-1 + 0.5 * (0.7 + math.sin(1)), rel=1e-13)
            of_y0, of_p = torch.autograd.grad(y[1], [y0, p])
            assert of_y0.tolist() == pytest.approx([1.4, 0.0]) and of_p.tolist() == pytest.approx([0.0, 0.0, 1.0])
        assert counted == [counted[0]] and counted[0] is not None


class TestStructure:
    """Which variables are differential is asked in every solve."""

    def test_that_changes(self, counted):
        def fun(t, y, yp, c):
            return torch.stack([c[0] * yp[0] + y[0] - c[1] * y[1], y[1] - 0.5 * y[0] - c[2] * (1 - y[0])])

        def ends(c):
            c = torch.tensor(c, dtype=F64, requires_grad=True)
            both = [solve(fun, torch.ones(2, dtype=F64), (c,), compile=x).y for x in (True, False)]
            return [*both, *(torch.autograd.grad(y[-1, 0], c)[0] for y in both)]

        for c in ([1.0, 1.0, 0.0], [2.0, 1.0, 0.0]):
            y, eager, slope, other = ends(c)
            torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(slope, other, rtol=1e-7, atol=1e-9)
        assert len(counted) == 1 and counted[0] is not None
        # no variable is differential any more
        y, eager, *_ = ends([0.0, 1.0, 1.0])
        assert counted[-1] is None
        torch.testing.assert_close(y, eager, rtol=1e-9, atol=1e-11)
        # which is what is known now, until there is a derivative again
        y, eager, *_ = ends([1e-3, 1.0, 0.0])
        torch.testing.assert_close(y, eager, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("rate", [1.0, 1e9])
    def test_that_is_mixed(self, rate, counted):
        """Every equation holds a derivative; where there are fast rates besides, it is Python that looks."""

        def fun(t, y, yp, k):
            first, second = yp[0] + k * (y[0] - torch.cos(t)), y[1] - y[0]
            return torch.stack([first + second, first - 2 * second])

        for k in (1.0, 1.0, rate):
            y = [solve(fun, torch.ones(2, dtype=F64), (torch.tensor(k, dtype=F64),), compile=x, rtol=1e-8).y for x in (True, False)]
            torch.testing.assert_close(*y, rtol=1e-8, atol=1e-10)
        assert [x is not None for x in counted] == [True, rate == 1.0]

    @pytest.mark.parametrize("k", [1e-3, 1e-6, 1e-10])
    def test_that_is_in_doubt(self, k, counted):
        """A constraint that says little in the units of the derivatives."""

        def fun(t, y, yp, k):
            return torch.stack([yp[0] + y[0] - y[1], (y[1] * k - k * y[0] / 2)])

        for value in (1.0, 1.0, k):
            y = solve(fun, torch.ones(2, dtype=F64), (torch.tensor(value, dtype=F64),), rtol=1e-9).y[-1]
            assert y.tolist() == pytest.approx([math.exp(-1), math.exp(-1) / 2], rel=1e-7)
        assert counted[0] is not None

    def test_higher_index(self, counted):
        """Where the constraint loses the algebraic variable there are none of index one."""

        def fun(t, y, yp, c):
            return torch.stack([yp[0] + y[0] - y[1], yp[1] - y[2], c * y[2] + y[0] - 1])

        for c in (1.0, 1.0):
            solve(fun, torch.ones(3, dtype=F64), (torch.tensor(c, dtype=F64),))
        with pytest.raises(adjoint.HigherIndexDAE):
            solve(fun, torch.ones(3, dtype=F64), (torch.tensor(0.0, dtype=F64),))
        assert counted[0] is not None and counted[-1] is None


class TestWhatIsGiven:
    @pytest.mark.parametrize("consistent", ["auto", "solve"])
    def test_slopes(self, consistent, counted):
        p, v = p3().detach(), 0.7 + math.sin(1)
        good = torch.tensor([1.0, v], dtype=F64), torch.tensor([-1 + 0.5 * v, 3.0], dtype=F64)
        for _ in range(2):
            sol = solve(residual, good[0], (p,), good[1], consistent=consistent)
            # that of an algebraic variable is handed on
            assert sol.yp[0].tolist() == pytest.approx(good[1].tolist(), rel=1e-12)
        assert len(counted) == 1 and counted[0] is not None
        bad = torch.tensor([1.0, 0.1], dtype=F64)
        if consistent == "auto":
            with pytest.raises(adjoint.InconsistentInitialCondition, match="do not satisfy"):
                solve(residual, bad, (p,), good[1])
        else:
            assert torch.equal(solve(residual, bad, (p,), good[1], consistent="solve").y[0], sol.y[0])

    @pytest.mark.parametrize(
        "options", [{"consistent": "trust"}, {"consistent": "check"}, {"suppress_algebraic": True}, {"differential": [True, False]}]
    )
    def test_other_ways_to_begin(self, options, counted):
        p, v = p3().detach(), 0.7 + math.sin(1)
        y0, yp0 = torch.tensor([1.0, v], dtype=F64), torch.tensor([-1 + 0.5 * v, 0.0], dtype=F64)
        for _ in range(2):
            mine, theirs = (solve(residual, y0, (p,), yp0, compile=x, **options).y for x in (True, False))
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
        assert not any(x is not None for x in counted)

    def test_what_rests(self, counted):
        """Steps go by the state, and derivatives of what does not move need shorter ones."""

        def fun(t, y, yp, k):
            return torch.stack([yp[0] + k * (y[0] - y[1]), y[1] - 1 + 0 * y[0]])

        for _ in range(2):
            y0 = torch.ones(2, dtype=F64, requires_grad=True)
            (slope,) = torch.autograd.grad(solve(fun, y0, (torch.tensor(3.0, dtype=F64),)).y[-1, 0], y0)
            assert slope.tolist() == pytest.approx([math.exp(-6), 0.0], rel=1e-4)
        assert counted == [None]
