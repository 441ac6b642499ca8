"""Implicit solves whose Jacobians are banded in some order of the unknowns, against the eager engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import adjoint
from adjoint.native.bands import bands_of
from adjoint.native.build import NoCompiler, compiler

try:
    compiler()
except NoCompiler:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("error:compile=True")


def neighbours(w):
    return torch.roll(w, 1, -1) + torch.roll(w, -1, -1) - 2 * w


def brusselator(t, y, p):
    """On a ring, all of one species before all of the other: entries are half the width away from the diagonal."""
    u, v = y.chunk(2, -1)
    d = p.unsqueeze(-1)
    return torch.cat([1 + u * u * v - 4 * u + d * neighbours(u), 3 * u - u * u * v + d * neighbours(v)], -1)


def turning(t, y, p):
    """A chain, damped and turned around three times as fast: with long steps the largest entries of I - h J stand beside its diagonal."""
    before, behind = torch.nn.functional.pad(y[..., :-1], (1, 0)), torch.nn.functional.pad(y[..., 1:], (0, 1))
    return 300 * (3 * (behind - before) - y + p.unsqueeze(-1)) - y**3


def solved(fun, n, method, compile, rows=0, dtype=torch.float64, rtol=1e-4):
    x = torch.linspace(0, 1, n, dtype=dtype)
    y0, p = 1 + 0.5 * torch.sin(6.28 * x), torch.tensor(0.3, dtype=dtype)
    if rows:
        y0, p = y0 * torch.linspace(0.9, 1.1, rows, dtype=dtype).unsqueeze(-1), p * torch.linspace(0.8, 1.2, rows, dtype=dtype)
    y0, p = y0.requires_grad_(), p.requires_grad_()
    # before the start is forgotten, and after
    times = torch.tensor([0.0, 0.002, 1.0], dtype=torch.float64)
    options = {"method": method, "rtol": rtol, "atol": 1e-3 * rtol, "batched": bool(rows), "compile": compile}
    sol = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (p,), t_eval=times, **options)
    return sol, torch.autograd.grad(sol.y[1:].square().sum(), (y0, p))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "bdf", "radau5"])
@pytest.mark.parametrize("fun, rows", [(brusselator, 0), slow(brusselator, 20), slow(turning, 0), (turning, 20)])
@pytest.mark.slow_cases("turning-20-radau5", "turning-20-kvaerno5", "brusselator-0-rodas5p", "brusselator-0-bdf")
def test_as_without_compile(method, fun, rows):
    (native, mine), (eager, theirs) = (solved(fun, 48, method, x, rows) for x in (True, False))
    assert torch.equal(torch.as_tensor(native.stats.n_steps), torch.as_tensor(eager.stats.n_steps))
    torch.testing.assert_close(native.y, eager.y, rtol=1e-7, atol=1e-8)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def test_single_precision():
    (native, mine), (eager, theirs) = (solved(brusselator, 48, "kvaerno5", x, dtype=torch.float32, rtol=1e-3) for x in (True, False))
    torch.testing.assert_close(native.y, eager.y, rtol=1e-4, atol=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3 * float(b.abs().max()))


@pytest.mark.parametrize("method, n", [("kvaerno5", 600), ("bdf", 600), ("radau5", 200)])
def test_more_unknowns_than_full_matrices_are_for(method, n):
    (native, mine), (eager, theirs) = (solved(brusselator, n, method, x) for x in (True, False))
    assert native.stats.n_steps == eager.stats.n_steps
    torch.testing.assert_close(native.y, eager.y, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["radau", "bdf"])
def test_implicit_equations(method):
    """Diffusion on a ring between two species whose sum is prescribed at every place: index 1, matrices of values and of slopes."""
    n = 30

    def residual(t, y, slope, p):
        u, v = y[:n], y[n:]
        return torch.cat([slope[:n] - p * neighbours(u) + u * v, u + v - 1 - 0.1 * u * torch.roll(v, 1)])

    def solve(compile):
        u = 0.5 + 0.3 * torch.sin(torch.linspace(0, 6, n, dtype=torch.float64))
        p = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        y0 = torch.cat([u, 1 - u])
        sol = adjoint.solve_dae(residual, (0.0, 1.0), y0, args=(p,), method=method, rtol=1e-6, atol=1e-8, compile=compile)
        return sol, torch.autograd.grad(sol.y[-1].square().sum(), p)[0]

    (native, mine), (eager, theirs) = (solve(x) for x in (True, False))
    torch.testing.assert_close(native.y[-1], eager.y[-1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_too_many_unknowns_that_all_depend_on_each_other_run_uncompiled():
    weight = torch.linspace(0, 1e-3, 410 * 410, dtype=torch.float64).reshape(410, 410).sin()
    y0 = torch.ones(410, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="uncompiled, because .*(unknowns|values|operations)"):
        adjoint.solve_ivp(lambda t, y: torch.tanh(weight @ y) - y, (0.0, 0.1), y0, method="kvaerno5", compile=True)


class TestOrder:
    def test_of_a_shuffled_chain(self):
        mixed = np.random.default_rng(0).permutation(100)
        entries = {(int(mixed[i]), int(mixed[j])) for i in range(100) for j in (i - 1, i, i + 1) if 0 <= j < 100}
        found = bands_of(100, entries)
        assert (found.below, found.above) == (1, 1)
        place = {unknown: k for k, unknown in enumerate(found.order)}
        assert all(abs(place[i] - place[j]) <= 1 for i, j in entries) and sorted(found.order) == list(range(100))

    def test_that_is_there_is_kept_where_it_is_as_good(self):
        found = bands_of(50, {(i, j) for i in range(50) for j in (i - 1, i, i + 1) if 0 <= j < 50})
        assert found == (None, 1, 1)

    def test_of_full_and_of_small_matrices(self):
        assert bands_of(30, {(i, j) for i in range(30) for j in range(30)}) == (None, 29, 29)
        assert bands_of(8, {(i, i) for i in range(8)}) == (None, 7, 7)

    def test_of_an_arrow(self):
        """Everything depends on one unknown, and it on everything: no order makes that a band."""
        entries = {(0, j) for j in range(40)} | {(i, 0) for i in range(40)} | {(i, i) for i in range(40)}
        assert bands_of(40, entries).part(40) == 1.0

    def test_of_no_entries(self):
        assert bands_of(20, ()) == (None, 0, 0)
