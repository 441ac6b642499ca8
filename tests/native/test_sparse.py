"""Implicit solves by sparse factors whose pattern is found once, against the eager engine."""

from __future__ import annotations

import random
import warnings

import numpy as np
import pytest
import torch

import adjoint
from adjoint.methods.collocation import RADAU5
from adjoint.methods.tableaux_dirk import KVAERNO5
from adjoint.native import entry, functions, matrices
from adjoint.native.build import NoCompiler, compiler
from adjoint.native.sparse import sparse_of, tables
from benchmarks.sparse import network

try:
    compiler()
except NoCompiler:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("error:compile=True")
METHODS = ["kvaerno5", pytest.param("trbdf2", marks=pytest.mark.slow), "rodas5p", "bdf", "radau5"]


@pytest.fixture(autouse=True)
def patterns(monkeypatch):
    """How many programs have been made by sparse factors."""
    found = []

    def watched(*arguments, **named):
        made = matrices.matrices_of(*arguments, **named)
        found.append(made.sparse)
        return made

    monkeypatch.setattr(functions, "matrices_of", watched)
    return found


def around(w):
    return torch.roll(w, 1, -1) + torch.roll(w, -1, -1) + torch.roll(w, 1, -2) + torch.roll(w, -1, -2) - 4 * w


def brusselator(m):
    """In two dimensions, m x m places around a torus."""

    def fun(t, y, p):
        u, v = y.unflatten(-1, (2, m, m)).unbind(-3)
        d = p[..., None, None]
        return torch.stack([1 + u * u * v - 4.4 * u + d * around(u), 3.4 * u - u * u * v + d * around(v)], -3).flatten(-3)

    x = 2 * torch.pi * torch.arange(m, dtype=torch.float64) / m
    u = 1 + 0.5 * torch.sin(x).unsqueeze(-1) * torch.cos(x)
    v = 3 + 0.2 * torch.cos(x).unsqueeze(-1) * torch.sin(2 * x)
    return fun, torch.stack([u, v]).flatten()


def arrow(n):
    """Everything depends on the first unknown, and that on everything; with a forcing, so that slopes in time are there."""

    def fun(t, y, p):
        hub, rest = y[..., :1], y[..., 1:]
        force = torch.as_tensor(t).unsqueeze(-1).cos()
        return torch.cat([-hub + rest.mean(-1, keepdim=True), 50 * p.unsqueeze(-1) * (hub - rest) - rest**3 + force], -1)

    return fun, torch.linspace(0.5, 1.5, n, dtype=torch.float64)


def fluxes(n):
    """Between places nearby and far away, through values that are kept, under a load that comes and goes."""

    def fun(t, y, p):
        flux = torch.tanh(p.unsqueeze(-1) * (y - y.roll(1, -1))) * (1 + y.roll(17, -1) ** 2)
        load = torch.sin(3 * torch.as_tensor(t)).unsqueeze(-1)
        return 20 * (flux.roll(-1, -1) - flux) + 5 * flux.roll(101, -1) * load - 3 * y

    return fun, torch.linspace(0, 1, n, dtype=torch.float64).sin() + 0.1 * torch.linspace(0, 50, n, dtype=torch.float64).cos()


def solved(problem, method, compile, rows=0, dtype=torch.float64, rtol=1e-4, span=1.0):
    fun, y0 = problem
    y0, p, end = y0.to(dtype), torch.tensor(0.7, dtype=dtype), span
    if rows:
        y0, p = y0 * torch.linspace(0.9, 1.1, rows, dtype=dtype).unsqueeze(-1), p * torch.linspace(0.8, 1.2, rows, dtype=dtype)
        end = torch.linspace(0.5, 1.0, rows, dtype=torch.float64) * span
    y0, p = y0.requires_grad_(), p.requires_grad_()
    times = torch.tensor([0.0, 0.002, 0.5], dtype=torch.float64) * span
    options = {"method": method, "rtol": rtol, "atol": 1e-3 * rtol, "batched": bool(rows), "compile": compile}
    sol = adjoint.solve_ivp(fun, (0.0, end), y0, (p,), t_eval=times, gradient=adjoint.DiscreteAdjoint(), **options)
    return sol, torch.autograd.grad(sol.y[1:].square().sum(), (y0, p))


def compare(problem, method, value=1e-7, gradient=1e-6, **options):
    (native, mine), (eager, theirs) = (solved(problem, method, x, **options) for x in (True, False))
    assert torch.equal(torch.as_tensor(native.stats.n_steps), torch.as_tensor(eager.stats.n_steps))
    torch.testing.assert_close(native.y, eager.y, rtol=value, atol=value)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=gradient, atol=gradient * float(b.abs().max()))


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow_cases("radau5-20", "rodas5p-0", "bdf-20", "kvaerno5-20")
def test_an_arrow(method, rows, patterns):
    compare(arrow(60), method, rows=rows)
    assert patterns[0] is not None


@pytest.mark.parametrize("method, rows", [("kvaerno5", 0), ("rodas5p", 0), ("bdf", 20), ("radau5", 3)])
@pytest.mark.slow_cases("rodas5p-0", "kvaerno5-0", "radau5-3")
def test_a_network_of_reactions(method, rows, patterns):
    fun, y0, _ = network(60)
    compare((fun, y0), method, rows=rows, span=0.1)
    assert patterns[0] is not None


def tangle(n):
    """Sums unlike each other, of rates that several share, with a clock; some outputs are a rate, another one's sum, or a number."""
    draw = random.Random(1)
    ends = [draw.sample(range(n), 3) for _ in range(2 * n)]

    def fun(t, y, p):
        x, clock = y.unbind(-1), torch.sin(5 * torch.as_tensor(t))
        slope = [clock - p * v if i % 3 else -(p * v - clock * v) for i, v in enumerate(x)]
        for k, (a, b, c) in enumerate(ends):
            rate = torch.exp(-p * x[a] ** 2) * torch.sin(x[b]) * (1 + 0.1 * k) if k % 4 else 2 * torch.tanh(x[a] * x[b] - clock)
            slope[a], slope[c] = slope[a] - (rate - p * x[c]), rate + slope[c]
        slope[1], slope[2], slope[3] = 2 * torch.tanh(x[0] * x[5] - clock), slope[4], 0 * x[0] + 0.3
        return torch.stack(slope, -1)

    return fun, torch.linspace(0.3, 0.7, n, dtype=torch.float64)


@pytest.mark.parametrize("method, rows", [("dopri5", 20), ("kvaerno5", 0), ("rodas5p", 0), ("rodas5p", 20), ("bdf", 0), ("radau5", 3)])
@pytest.mark.slow_cases("rodas5p-20", "kvaerno5-0", "dopri5-20", "radau5-3")
def test_outputs_unlike_each_other_in_loops_over_their_terms(method, rows, patterns, monkeypatch):
    """Where they would be too long written out."""
    by_terms, real = [], functions.rolled

    def watched(*arguments, **named):
        by_terms.append(named["summed"])
        return real(*arguments, **named)

    monkeypatch.setattr(functions, "MOST_VALUES", 400)
    monkeypatch.setattr(functions, "rolled", watched)
    compare(tangle(40 + rows), method, rows=rows, span=0.2)
    assert by_terms == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rodas5p", "kvaerno5", "radau5"])
def test_a_large_network_of_reactions(method, patterns):
    fun, y0, _ = network(160)
    compare((fun, y0), method, span=0.1)
    assert patterns[0] is not None


@pytest.mark.parametrize("method", ["kvaerno5", "rodas5p", "bdf", "radau5"])
@pytest.mark.slow_cases("rodas5p", "radau5")
def test_two_dimensions(method, patterns):
    compare(brusselator(16), method)
    assert patterns[0] is not None


@pytest.mark.parametrize("method", ["kvaerno5", "bdf"])
@pytest.mark.slow_cases("kvaerno5")
def test_two_dimensions_side_by_side(method, patterns):
    compare(brusselator(8), method, rows=20)
    assert patterns[0] is not None


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.slow_cases("3")
def test_rosenbrock_methods_through_kept_values(rows, patterns):
    compare(fluxes(450), "rodas5p", rows=rows, span=0.1)
    assert patterns[0] is not None


def test_thousands_of_unknowns(patterns):
    compare(brusselator(32), "kvaerno5")
    assert patterns[0] is not None


def test_single_precision(patterns):
    compare(arrow(60), "kvaerno5", value=1e-4, gradient=2e-3, dtype=torch.float32, rtol=1e-3)
    assert patterns[0] is not None


def test_a_row_that_fails_does_so_alone(patterns):
    fun, y0 = arrow(60)
    start = y0 * torch.linspace(0.9, 1.1, 20, dtype=torch.float64).unsqueeze(-1)

    def failing(t, y, p):
        return fun(t, y, p) + torch.sqrt(p - t).unsqueeze(-1)

    def solve(compile):
        p = torch.linspace(0.8, 1.2, 20, dtype=torch.float64)
        return adjoint.solve_ivp(failing, (0.0, 1.0), start, (p,), method="kvaerno5", batched=True, compile=compile, throw=False)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        native, eager = solve(True), solve(False)
    assert patterns[0] is not None
    assert torch.equal(native.status, eager.status) and 0 < int((native.status < 0).sum()) < 20
    torch.testing.assert_close(native.y, eager.y, rtol=1e-7, atol=1e-8, equal_nan=True)


def neighbours(w):
    return torch.roll(w, 1, -1) + torch.roll(w, -1, -1) - 2 * w


def index_one(m, vanishing=False):
    """Diffusion beside constraints for other unknowns than their own, or pairs of constraints whose own entries are zero."""
    mixed, far = list(range(m)), list(range(m))
    random.Random(1).shuffle(mixed), random.Random(2).shuffle(far)
    partner = [k ^ 1 for k in range(m)]

    def residual(t, y, slope, p):
        u, z = y[..., :m], y[..., m:]
        first = slope[..., :m] - p.unsqueeze(-1) * neighbours(u) + z * u[..., far]
        if vanishing:
            nothing, force = (p - p.abs()).unsqueeze(-1), torch.cos(torch.as_tensor(t)).unsqueeze(-1)
            return torch.cat([first, z * nothing + z[..., partner] * (2 + 0.1 * torch.sin(z[..., partner])) - force], -1)
        return torch.cat([first, z[..., mixed] * (1 + 0.1 * u) - u[..., far] - 0.1 * torch.sin(z)[..., mixed]], -1)

    u = torch.ones(m, dtype=torch.float64) if vanishing else 1 + 0.3 * torch.sin(torch.linspace(0, 6, m, dtype=torch.float64))
    return residual, torch.cat([u, u])


def index_two(m):
    """Velocities held equal by forces, which do not stand in the constraints."""
    far = list(range(m))
    random.Random(2).shuffle(far)

    def residual(t, y, slope, p):
        v, force = y[..., :m], y[..., m:]
        pull = torch.nn.functional.pad(force, (0, 1)) - torch.nn.functional.pad(force, (1, 0))
        drive = (p * torch.cos(torch.as_tensor(t))).unsqueeze(-1) * torch.sin(v[..., far])
        return torch.cat([slope[..., :m] - neighbours(v) + pull - drive, v[..., :-1] - v[..., 1:]], -1)

    return residual, torch.cat([torch.full((m,), 0.5, dtype=torch.float64), torch.zeros(m - 1, dtype=torch.float64)])


def solved_dae(problem, method, compile, rows):
    residual, y0 = problem
    p = torch.tensor(0.3, dtype=torch.float64)
    if rows:
        y0, p = y0.expand(rows, -1), p * torch.linspace(0.8, 1.2, rows, dtype=torch.float64)
    p = p.requires_grad_()
    sol = adjoint.solve_dae(residual, (0.0, 1.0), y0, args=(p,), method=method, rtol=1e-6, atol=1e-8, compile=compile, batched=bool(rows))
    return sol, torch.autograd.grad(sol.y[-1].square().sum(), p)[0]


def compare_dae(problem, method, rows):
    (native, mine), (eager, theirs) = (solved_dae(problem, method, x, rows) for x in (True, False))
    assert torch.equal(torch.as_tensor(native.stats.n_steps), torch.as_tensor(eager.stats.n_steps))
    torch.testing.assert_close(native.y[-1], eager.y[-1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.parametrize("method", ["radau", "bdf"])
@pytest.mark.slow_cases("radau-0", "radau-20")
def test_implicit_equations(method, rows, patterns):
    compare_dae(index_one(40), method, rows)
    assert patterns[0] is not None


@pytest.mark.parametrize("rows", [0, 20])
@pytest.mark.slow_cases("20")
def test_diagonals_that_are_zero(rows, patterns):
    compare_dae(index_two(30), "radau", rows)
    assert patterns[0] is not None and patterns[0].equations != patterns[0].unknowns


class TestPivotsThatVanish:
    @pytest.mark.parametrize("rows", [0, 20])
    @pytest.mark.slow_cases("20")
    def test_of_implicit_equations(self, rows, patterns, monkeypatch):
        monkeypatch.setattr(entry, "_remarked", set())
        with pytest.warns(RuntimeWarning, match="uncompiled, because a sparse matrix .* rows exchanged"):
            native, mine = solved_dae(index_one(40, vanishing=True), "bdf", True, rows)
        eager, theirs = solved_dae(index_one(40, vanishing=True), "bdf", False, rows)
        assert patterns[0] is not None
        assert torch.equal(native.y, eager.y) and torch.equal(mine, theirs)

    @staticmethod
    def spiral(t, y, p):
        """Pairs that turn and grow, by a rate for which 1 - h gamma times it is zero in the first step, and a hub that all depend on."""
        hub, a, b = y[..., :1], y[..., 1:31], y[..., 31:]
        rate, turn = p, 2 * p
        return torch.cat([-hub + 1e-9 * a.sum(-1, keepdim=True), rate * a - turn * b + 0.01 * hub, turn * a + rate * b + 0.01 * hub], -1)

    def solve(self, compile, **options):
        rate = 1 / (1e-3 * KVAERNO5.a[-1][-1])
        p = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        y0 = 1e-9 * torch.ones(61, dtype=torch.float64)
        sol = adjoint.solve_ivp(self.spiral, (0.0, 1e-3), y0, (p,), method="kvaerno5", compile=compile, first_step=1e-3, **options)
        return sol, torch.autograd.grad(sol.y[-1].square().sum(), p)[0]

    def test_of_steps(self, patterns):
        loose = {"rtol": 1e-2, "atol": 1.0}
        with pytest.warns(RuntimeWarning, match="uncompiled, because a sparse matrix .* rows exchanged"):
            native, mine = self.solve(True, **loose)
        eager, theirs = self.solve(False, **loose)
        assert patterns[0] is not None
        assert torch.equal(native.y, eager.y) and torch.equal(mine, theirs)


class TestPivotsThatAreSmall:
    """The diagonal entries of cells are some 1e-6 in the matrix of the first step, and two equations are stiff: what rounding makes of
    multipliers that have grown by as much is mended. (Gradients were wrong by 2.5e-6.)"""

    H = 1e-3

    def cells(self, t, y, p):
        rate = (1 - 3e-6) / (self.H * float(RADAU5.gamma)) * p
        hub, a, b = y[..., :1], y[..., 1:31], y[..., 31:]
        return torch.cat([1e6 * (a.mean(-1, keepdim=True) - hub) - 0.3 * hub, rate * (a - 3 * b) + 1e6 * hub, rate * (3 * a + b)], -1)

    @pytest.mark.parametrize("rows", [0, 20])
    @pytest.mark.slow_cases("20")
    def test_gradients(self, rows, patterns):
        found = []
        for compile in (True, False):
            p, y0 = torch.ones((), dtype=torch.float64), torch.linspace(0.5, 1.5, 61, dtype=torch.float64)
            if rows:
                p, y0 = p * torch.linspace(1.0, 1.2, rows, dtype=torch.float64).unsqueeze(-1), y0.expand(rows, -1)
            p = p.requires_grad_()
            given = {"rtol": 1e-2, "atol": 1e25, "first_step": self.H, "batched": rows > 0, "compile": compile}
            sol = adjoint.solve_ivp(self.cells, (0.0, self.H), y0, (p,), method="radau5", **given)
            weights = torch.cos(torch.arange(61, dtype=torch.float64))
            found.append((sol.y[-1].detach(), *torch.autograd.grad((sol.y[-1] * weights).sum(), p)))
        assert patterns[0] is not None
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def dense_of(entries, n, seed=0):
    matrix = np.zeros((n, n))
    draw = np.random.default_rng(seed)
    for i, j in entries:
        matrix[i, j] = draw.uniform(0.5, 1.5)
    return matrix


class TestPattern:
    @staticmethod
    def check(n, entries, found):
        """Elimination of numbers without exchanges meets no place that is not of the pattern, which the tables lead to once each."""
        matrix = dense_of(found.entries, n)[found.equations][:, found.unknowns] + 10 * n * np.eye(n)
        for k in range(n):
            below = k + 1 + np.flatnonzero(matrix[k + 1 :, k])
            matrix[below, k] /= matrix[k, k]
            matrix[np.ix_(below, range(k + 1, n))] -= np.outer(matrix[below, k], matrix[k, k + 1 :])
        for r, row in enumerate(found.rows):
            assert set(np.flatnonzero(matrix[r])) <= {*row.below, r, *row.above}
        known = tables(found)
        assert len(set(known["PLACE"])) == len(found.entries) >= len(entries)
        for r, row in enumerate(found.rows):
            pieces = known["PIECES"][2 * known["PIECE"][r] : 2 * known["PIECE"][r + 1]]
            assert [k for a, b in zip(pieces[::2], pieces[1::2], strict=True) for k in range(a, b + 1)] == row.below
            group = known["GROUP"][r]
            runs = known["RUNS"][2 * known["RUN"][group] : 2 * known["RUN"][group + 1]]
            beyond = [c for first, many in zip(runs[::2], runs[1::2], strict=True) for c in range(first, first + many)]
            assert [*range(r + 1, known["LAST"][group] + 1), *beyond] == row.above

    def test_of_random_entries(self):
        draw = random.Random(0)
        for n in (1, 2, 7, 40):
            entries = {(draw.randrange(n), draw.randrange(n)) for _ in range(2 * n)}
            self.check(n, entries, sparse_of(n, entries))

    def test_of_an_arrow_is_not_filled(self):
        entries = {(0, j) for j in range(40)} | {(i, 0) for i in range(40)} | {(i, i) for i in range(40)}
        found = sparse_of(40, entries)
        self.check(40, entries, found)
        assert found.factors == len(entries) and found.unknowns[-1] == 0

    def test_of_pairs_by_cost(self):
        """A cyclic permutation is the only full pairing."""
        entries = {(i, (i + 1) % 20): 3.0 for i in range(20)} | {(i, i): 1.0 for i in range(0, 19)} | {(i, 5): 1.0 for i in range(20)}
        del entries[5, 5]
        found = sparse_of(20, entries, {**entries, (19, 0): 3.0})
        assert all((i, j) in entries for i, j in zip(found.equations, found.unknowns, strict=True))

    def test_without_a_pairing(self):
        assert sparse_of(3, {(0, 0), (1, 0), (2, 2)}, {(0, 0): 1.0, (1, 0): 1.0, (2, 2): 1.0}) is None

    @pytest.mark.parametrize("n, width, sparse", [(20, 1, False), (100, 1, False), (100, 40, True)])
    def test_the_cheapest_is_taken(self, n, width, sparse):
        """A chain is a band; with a few far links it is none any more."""
        entries = {(i, j) for i in range(n) for j in (i - 1, i, i + 1) if 0 <= j < n}
        if width > 1:
            draw = random.Random(3)
            entries |= {(draw.randrange(n), draw.randrange(n)) for _ in range(width)}
        assert (matrices.matrices_of(n, entries).sparse is not None) == sparse
