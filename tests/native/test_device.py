"""Solves by the kernels of devices, run by the processor (`emulated`): the Python around them and their text are those of a GPU, the
launcher is not. They are held against the solves of CPUs: the same steps, and values and gradients to rounding."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import adjoint
from adjoint.doors import prepared
from adjoint.methods import METHODS
from adjoint.native import device
from adjoint.native.emit import DEVICE_METHODS

from .emulated import Emulator

pytestmark = pytest.mark.compile

ALL = sorted(name for name, method in METHODS.items() if isinstance(method, DEVICE_METHODS))
QUICK = ("dopri5", "rodas5p", "kvaerno5")
COUNTS = ("n_steps", "n_accepted", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton")


def swings(t, y, p, q):
    a, b = p.unbind(-1)
    x, v = y.unbind(-1)
    return torch.stack([v, -a * x - b * v * x * x + 0.3 * q[0] * torch.sin(q[1] * t)], -1)


@pytest.fixture
def emulator(monkeypatch):
    """Switches to kernels, and back."""

    class Switched(Emulator):
        def on(self, on: bool) -> None:
            # solves like one before would go by its code, on or off
            prepared.forget()
            if on:
                monkeypatch.setitem(device.LAUNCHERS, "cpu", self)
            else:
                monkeypatch.delitem(device.LAUNCHERS, "cpu", raising=False)

    Emulator.launched.clear()
    Emulator.texts.clear()
    monkeypatch.setattr(Emulator, "block", 32)
    return Switched()


def solve(fun, method, rows=12, dtype=torch.float64, times=(), **options):
    """A solve of ``rows`` unlike each other, and all first derivatives."""
    spread = torch.linspace(0.5, 1.5, max(rows, 1), dtype=dtype).unsqueeze(-1)
    y0, p = torch.tensor([1.0, 0.2], dtype=dtype) * spread, torch.tensor([1.1, 0.4], dtype=dtype) * spread.square() * 8
    q = torch.tensor([1.0, 1.3], dtype=dtype, requires_grad=True)
    y0, p = ((y0, p) if rows else (y0[0], p[0])) if rows != 1 else (y0, p)
    y0, p = y0.requires_grad_(), p.requires_grad_()
    moving = {name: options[name].clone().requires_grad_() for name in times}
    fixed = {} if METHODS[method].adaptive else {"first_step": 0.05}
    given = {"t_span": (0.0, 6.0), "rtol": 1e-6, "atol": 1e-8, **fixed, **options, **moving}
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        sol = adjoint.solve_ivp(fun, y0=y0, args=(p, q), method=method, batched=bool(rows), compile=True, **given)
    values = sol.y.nan_to_num()
    weights = torch.cos(torch.arange(values.numel(), dtype=dtype)).reshape(values.shape)
    return sol, torch.autograd.grad((values * weights).sum(), [y0, p, q, *moving.values()])


def check(emulator, method, tolerance=1e-11, counts=COUNTS, **options):
    """The same solve by kernels and without: ``counts`` equal, all else to rounding."""
    emulator.on(True)
    kernels, of_kernels = solve(swings, method, **options)
    assert emulator.launched, "no kernel ran"
    emulator.on(False)
    before = len(emulator.launched)
    other, of_other = solve(swings, method, **options)
    assert len(emulator.launched) == before
    for name in counts:
        mine, theirs = (torch.as_tensor(getattr(x.stats, name)) for x in (kernels, other))
        assert torch.equal(mine, theirs), name
    assert torch.equal(torch.as_tensor(kernels.status), torch.as_tensor(other.status))
    torch.testing.assert_close(kernels.y, other.y, rtol=tolerance, atol=tolerance, equal_nan=True)
    for mine, theirs in zip(of_kernels, of_other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=10 * tolerance * float(theirs.abs().max()) + 1e-300)
    return kernels, of_kernels


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in ALL])
def test_every_method(emulator, method):
    check(emulator, method)
    check(emulator, method, t_eval=torch.linspace(0, 6, 5, dtype=torch.float64))


@pytest.mark.parametrize("method", QUICK)
class TestForms:
    def test_single_precision(self, emulator, method):
        check(emulator, method, dtype=torch.float32, rtol=1e-4, atol=1e-6, tolerance=1e-3, counts=())

    def test_one_trajectory(self, emulator, method):
        check(emulator, method, rows=0)
        check(emulator, method, rows=1)

    def test_steps_as_samples(self, emulator, method):
        check(emulator, method, t_eval="steps")

    def test_many(self, emulator, method):
        # lanes that go side by side are looked after together, which is counted
        counts = [name for name in COUNTS if name != "n_fun"]
        check(emulator, method, rows=150, tolerance=1e-8, counts=counts)
        assert ("sweep", 150) in emulator.launched

    def test_backwards_and_ragged(self, emulator, method):
        ends = torch.linspace(0.2, 1.0, 12, dtype=torch.float64)
        check(emulator, method, t_span=(torch.ones_like(ends), ends))

    def test_derivatives_in_times(self, emulator, method):
        check(emulator, method, times=("t_eval",), t_eval=torch.tensor([0.3, 1.1, 5.9], dtype=torch.float64))

    def test_jumps(self, emulator, method):
        check(emulator, method, step_ts=torch.tensor([1.0, 2.5], dtype=torch.float64))

    def test_tolerances_by_row(self, emulator, method):
        check(emulator, method, rtol=torch.logspace(-3, -7, 12, dtype=torch.float64).unsqueeze(-1).expand(12, 2))


class TestRounds:
    def test_go_on_where_they_ended(self, emulator):
        # more steps than the first round has room for, by some of the rows
        check(emulator, "dopri5", t_span=(0.0, 40.0), rtol=1e-8)
        solves = [threads for name, threads in emulator.launched if name == "solve"]
        assert solves[0] == 12
        assert len(solves) > 2
        assert 0 < solves[-1] < 12

    def test_of_any_size_give_the_same_bits(self, emulator, monkeypatch):
        found = []
        emulator.on(True)
        for room in (1, 7, 1000):
            for method in QUICK:
                monkeypatch.setattr("adjoint.native.solve._ROOM", room)
                sol, gradients = solve(swings, method, t_eval=[0.5, 3.0, 6.0])
                found.append((sol.y, *gradients, sol.stats.n_steps, sol.stats.n_fun))
        for k, method in enumerate(QUICK):
            for other in found[k + 3 :: 3]:
                assert all(torch.equal(a, b) for a, b in zip(found[k], other, strict=True)), method

    def test_nothing_kept_is_one_round(self, emulator):
        emulator.on(True)
        y0, p, q = torch.ones(5, 2), torch.ones(5, 2), torch.ones(2)
        with torch.no_grad():
            adjoint.solve_ivp(swings, (0.0, 60.0), y0, (p, q), method="dopri5", rtol=1e-8, batched=True, compile=True)
        assert [name for name, _ in emulator.launched if name != "measure"] == ["solve"]


def test_sums_are_the_same_whatever_the_blocks(emulator):
    emulator.on(True)
    found = []
    for block in (1, 32, 256):
        Emulator.block = block
        found.append(solve(swings, "tsit5", rows=150)[1])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_sums_in_waves(emulator, monkeypatch):
    monkeypatch.setattr(device, "_MOST_TOTALS", 2 * 8 * 40)
    check(emulator, "dopri5", rows=150, tolerance=1e-8, counts=())
    assert [threads for name, threads in emulator.launched if name == "sweep"] == [40, 40, 40, 30]


def test_two_methods_that_hand_over(emulator):
    def fun(t, y, mu):
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    found = []
    for on in (True, False):
        emulator.on(on)
        y0, mu = torch.tensor([[2.0, 0.0]]).repeat(6, 1).requires_grad_(), torch.linspace(1, 300, 6).requires_grad_()
        sol = adjoint.solve_ivp(fun, (0.0, 100.0), y0, (mu,), method="auto", batched=True, compile=True, rtol=1e-6, atol=1e-8)
        found.append((sol.stats.n_steps, sol.y, *torch.autograd.grad(sol.y[-1].square().sum(), (y0, mu))))
    assert emulator.launched
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(*(x[1:] for x in found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * float(b.detach().abs().max()))


def test_failing_rows(emulator):
    def fun(t, y, p):
        return torch.where((p > 0.5) & (t.unsqueeze(-1) > 1.0), math.nan, -p * y)

    found = []
    for on in (True, False):
        emulator.on(on)
        y0, p = torch.ones(4, 1, requires_grad=True), torch.tensor([[0.1], [0.9], [0.3], [0.7]], requires_grad=True)
        sol = adjoint.solve_ivp(fun, (0.0, 2.0), y0, (p,), method="dopri5", batched=True, compile=True, throw=False)
        found.append((sol.y, sol.status, torch.autograd.grad(sol.y[-1].nan_to_num().sum(), (y0, p))))
    assert emulator.launched
    assert torch.equal(found[0][1], found[1][1])
    assert int((found[0][1] < 0).sum()) == 2
    torch.testing.assert_close(found[0][0], found[1][0], equal_nan=True)
    torch.testing.assert_close(found[0][2], found[1][2])


def test_many_shared_numbers_and_a_table(emulator):
    knots, table = torch.linspace(0, 3, 5), torch.tensor([0.2, 0.5, 0.1, 0.7, 0.6])
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def fun(t, y):
        i = torch.searchsorted(knots, t).clamp(1, 4)
        u = table[i - 1] + (t - knots[i - 1]) / (knots[i] - knots[i - 1]) * (table[i] - table[i - 1])
        return net(torch.cat([y, u.unsqueeze(-1)], -1))

    found = []
    for on in (True, False):
        emulator.on(on)
        y0 = torch.linspace(-1, 1, 24).reshape(12, 2).requires_grad_()
        y = adjoint.solve_ivp(fun, (0.0, 3.0), y0, method="tsit5", batched=True, compile=True, rtol=1e-7).y[-1]
        found.append((y, *torch.autograd.grad(y.square().sum(), (y0, *net.parameters()))))
    assert emulator.launched
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_at_rest_and_second_derivatives(emulator):
    """Solves that are made again with a displacement beside are, too; second derivatives go on from the record."""
    def fun(t, y, p):
        return -p * y * (1 + y)

    found = []
    for on in (True, False):
        emulator.on(on)
        y0, p = torch.tensor([[0.0, 0.0], [1.0, 0.5]]).requires_grad_(), torch.tensor([[1.0], [2.0]]).requires_grad_()
        y = adjoint.solve_ivp(fun, (0.0, 2.0), y0, (p,), method="tsit5", batched=True, compile=True, rtol=1e-6, atol=1e-9).y[-1]
        first = torch.autograd.grad(y.square().sum() + y.sum(), (y0, p), create_graph=True)
        found.append((y, *first, *torch.autograd.grad(sum(x.square().sum() for x in first), (y0, p))))
    assert len([text for text in emulator.texts if "DISPLACED 1" in text]) == 1
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class TestUncompiled:
    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"method": "bdf"}, "method='bdf'"),
            ({"method": "radau5"}, "method='radau5'"),
            ({"mass_matrix": torch.eye(2, dtype=torch.float64) * 2, "method": "rodas5p"}, "mass matrix"),
            ({"events": [lambda t, y, p, q: y[..., 0] - 0.5]}, "events"),
        ],
        ids=["bdf", "radau5", "mass", "events"],
    )
    def test_says_why(self, emulator, options, reason):
        emulator.on(True)
        y0, p, q = torch.ones(3, 2), torch.ones(3, 2), torch.ones(2)
        with pytest.warns(RuntimeWarning, match=f"runs uncompiled, because .*{reason}"):
            adjoint.solve_ivp(swings, (0.0, 1.0), y0, (p, q), batched=True, compile=True, **options)
        assert not emulator.launched

    def test_a_state_of_many_rows(self, emulator):
        emulator.on(True)
        with pytest.warns(RuntimeWarning, match=r"its 32 rows are one state.*batched=True"):
            adjoint.solve_ivp(lambda t, y: -y * (1 + y), (0.0, 1.0), torch.ones(32, 2), compile=True)
