"""Solves by compiled code against those of the eager engine: the same steps, values and first derivatives."""

from __future__ import annotations

import multiprocessing
import re
import warnings
from pathlib import Path

import pytest
import torch

import adjoint
from adjoint.methods import METHODS, SWITCHING_METHODS
from adjoint.native.build import NoCompiler, compiler
from adjoint.native.emit import takes
from adjoint.native.memory import in_large_pages
from adjoint.torch_internals import team_of_threads

try:
    compiler()
except NoCompiler:
    pytest.skip("there is no C++ compiler", allow_module_level=True)

NATIVE = sorted(name for name, method in (METHODS | SWITCHING_METHODS).items() if all(map(takes, method.members)))
QUICK = ("dopri5", "dopri8", "rk4", "rodas5p", "kvaerno5", "radau5", "bdf")


def swings(t, y, p):
    """Non-linear, depends on time, parameters by trajectory or shared."""
    a, b = p.unbind(-1)
    x, v = y.unbind(-1)
    return torch.stack([v, -a * x - b * v * x * x + 0.3 * torch.sin(t)], -1)


def solve(compile, method, *, rows=0, dtype=torch.float64, shared=False, fun=swings, **options):
    """Values and all first derivatives of one solve."""
    rows_ = max(rows, 1)
    y0 = torch.tensor([1.0, 0.2], dtype=dtype).repeat(rows_, 1) * torch.linspace(1, 1.3, rows_, dtype=dtype).unsqueeze(-1)
    p = torch.tensor([1.1, 0.4], dtype=dtype).repeat(rows_, 1) * torch.linspace(1, 1.2, rows_, dtype=dtype).unsqueeze(-1)
    y0, p = (y0, p[0] if shared else p) if rows else (y0[0], p[0])
    y0, p = y0.requires_grad_(), p.requires_grad_()
    times = {name: x.clone().requires_grad_() for name, x in options.items() if isinstance(x, torch.Tensor) and name.startswith("t_")}
    fixed = {} if method in SWITCHING_METHODS or METHODS[method].adaptive else {"first_step": 0.05}
    with warnings.catch_warnings():
        if compile:
            warnings.simplefilter("error", RuntimeWarning)
        given = {"t_span": (0.0, 2.0), "rtol": 1e-4, "atol": 1e-6, **options, **times, **fixed}
        sol = adjoint.solve_ivp(fun, y0=y0, args=(p,), method=method, batched=bool(rows), compile=compile, **given)
    values = sol.y.nan_to_num()
    weights = torch.cos(torch.arange(values.numel(), dtype=dtype)).reshape(values.shape)
    grads = torch.autograd.grad((values * weights).sum(), [y0, p, *times.values()])
    return sol, grads


def check(method, tolerance=1e-8, **options):
    native, eager = (solve(x, method, **options) for x in (True, False))
    if native[0].y.dtype == torch.float64:
        # where a solve fails it closes in on a point, by ever smaller differences
        counts = [torch.where(torch.as_tensor(x.status) >= 0, torch.as_tensor(x.stats.n_steps), -1) for x, _ in (native, eager)]
        assert torch.equal(*counts)
    torch.testing.assert_close(native[0].y, eager[0].y, rtol=tolerance, atol=tolerance, equal_nan=True)
    for mine, theirs in zip(native[1], eager[1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=10 * tolerance, atol=10 * tolerance * float(theirs.abs().max()) + 1e-300)
    return native[0], eager[0]


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in NATIVE])
@pytest.mark.slow_cases("bdf", "rodas5p")
def test_every_method(method):
    # the error of a first step of order 9 is nothing but rounding at the tolerance of the others, as if the state rested
    options = {"t_eval": torch.linspace(0, 2, 6, dtype=torch.float64)} | ({"rtol": 1e-6, "atol": 1e-8} if method == "verner9" else {})
    check(method, rows=0, **options)
    check(method, rows=3, **options)
    check(method, rows=18, shared=True, **options)


@pytest.mark.parametrize("method", ["dopri5", "kvaerno5", "bdf"])
class TestForms:
    def test_repeated_samples_and_backwards(self, method):
        times = torch.tensor([0.0, 0.4, 0.4, 1.1, 1.7, 2.0, 2.0], dtype=torch.float64)
        check(method, rows=18, t_eval=times)
        check(method, rows=0, t_eval=2 - times, t_span=(2.0, 0.0))
        check(method, rows=18, t_eval=2 - times)

    def test_derivatives_in_times(self, method):
        times = torch.tensor([0.3, 1.1, 1.9], dtype=torch.float64)
        span = torch.tensor([0.1, 2.1], dtype=torch.float64)
        check(method, rows=0, t_eval=times, t_span=span)
        check(method, rows=18, t_eval=times, t_span=span)

    def test_a_span_for_each_trajectory(self, method):
        ends = torch.linspace(0.5, 2, 18, dtype=torch.float64)
        check(method, rows=18, t_span=torch.stack([torch.zeros_like(ends), ends]))

    def test_jumps(self, method):
        def kicked(t, y, p):
            push = 1 - 3 * (t > 0.7).to(t.dtype) + 3 * (t > 1.3).to(t.dtype)
            return swings(t, y, p) + torch.stack([torch.zeros_like(push), push], -1)

        times = torch.tensor([0.5, 0.7, 1.0, 2.0], dtype=torch.float64)
        for rows in (0, 18):
            check(method, rows=rows, fun=kicked, t_eval=times, step_ts=[0.7, 1.3])

    def test_all_steps_and_dense_output(self, method):
        for rows in (0, 18):
            check(method, 1e-5, rows=rows, t_eval="steps")
            mine, theirs = (solve(x, method, rows=rows, dense_output=True)[0] for x in (True, False))
            torch.testing.assert_close(mine(1.234), theirs(1.234), rtol=1e-9, atol=1e-9)

    def test_single_precision(self, method):
        check(method, 5e-3, rows=18, dtype=torch.float32, rtol=1e-3, atol=1e-4)

    def test_limits_of_steps(self, method):
        check(method, rows=18, max_step=0.05)
        check(method, rows=0, first_step=0.01)

    def test_failures(self, method):
        def ends(t, y, p):
            fine = 1 - ((t > 1) & (p[..., 0] > 1.25)).to(y.dtype).unsqueeze(-1)
            return swings(t, y, p) / fine + 0 / fine

        mine, theirs = check(method, rows=18, fun=ends, throw=False)
        assert torch.equal(mine.status, theirs.status) and bool((mine.status < 0).any()) and bool((mine.status == 0).any())
        few = {"max_steps": 9 if method == "dopri5" else 6, "rtol": 1e-5, "atol": 1e-7}
        mine, theirs = (solve(x, method, rows=18, throw=False, **few)[0] for x in (True, False))
        assert torch.equal(mine.status, theirs.status) and bool((mine.status == -1).any())


def crosses(t, y, p):
    return y[..., 0] - 0.1 * p[..., 1]


def third(t, y, p):
    return y[..., 1] + 0.01 * torch.sin(t)


third.terminal = 3


def rises(t, y, p):
    return y[..., 0] - 0.3


rises.direction = 1


@pytest.mark.parametrize("method", [*QUICK[:2], "rodas5p", "kvaerno5", "bdf"])
@pytest.mark.parametrize("rows", [0, 18])
@pytest.mark.slow_cases("0-rodas5p", "0-kvaerno5", "18-bdf", "18-dopri5", "18-kvaerno5", "18-rodas5p")
def test_events(method, rows):
    """Times, states and their derivatives, of events that are recorded and of one that ends the solve, with samples before and after it."""
    found = []
    for compile in (True, False):
        options = {"events": [crosses, third, rises], "t_span": (0.0, 12.0), "t_eval": torch.linspace(0, 12, 7, dtype=torch.float64)}
        sol, _ = solve(compile, method, rows=rows, **options)
        again = events_and_slopes(compile, method, rows, options)
        found.append((sol, *again))
    mine, theirs = found
    assert torch.equal(torch.as_tensor(mine[0].status), torch.as_tensor(theirs[0].status))
    assert [x.shape for x in mine[1]] == [x.shape for x in theirs[1]] and sum(x.numel() for x in mine[1]) >= 5
    torch.testing.assert_close(mine[0].y, theirs[0].y, rtol=1e-7, atol=1e-7, equal_nan=True)
    for a, b in zip((*mine[1], *mine[2]), (*theirs[1], *theirs[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-6, equal_nan=True)


def events_and_slopes(compile, method, rows, options):
    """Times and states of events, and the derivatives of their sum."""
    scale = torch.linspace(1, 1.2, max(rows, 1), dtype=torch.float64).unsqueeze(-1)
    y0, p = (torch.tensor(x, dtype=torch.float64) * scale for x in ([1.0, 0.2], [1.1, 0.1]))
    y0, p = (x.requires_grad_() for x in ((y0, p) if rows else (y0[0], p[0])))
    sol = adjoint.solve_ivp(swings, y0=y0, args=(p,), method=method, batched=bool(rows), compile=compile, rtol=1e-7, atol=1e-9, **options)
    found = [*sol.t_events, *sol.y_events]
    total = sum(x.nan_to_num().sum() for x in found)
    return [x.detach() for x in found], torch.autograd.grad(total, (y0, p))


def test_second_derivatives_and_forward_mode_go_on_from_the_record():
    y0, p = torch.tensor([1.0, 0.2], dtype=torch.float64), torch.tensor([1.1, 0.4], dtype=torch.float64)

    def end(p, compile):
        return adjoint.solve_ivp(swings, (0.0, 2.0), y0, args=(p,), method="dopri5", rtol=1e-5, compile=compile).y[-1].square().sum()

    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(f), lambda f: torch.func.jacrev(f)):
        mine, theirs = (transform(lambda p, x=x: end(p, x))(p) for x in (True, False))
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("rtol", [1e-3, 1e-6])
def test_chaos_is_not_taken_for_instability(monkeypatch, rtol):
    """Components pass through zero, where one product with the Jacobian in units of the tolerance is many times its largest eigenvalue."""

    def lorenz(t, y, p):
        a, b, c = y.unbind(-1)
        return torch.stack([p[0] * (b - a), a * (p[1] - c) - b, a * b - p[2] * c], -1)

    def refuses(*args, **options):
        raise AssertionError("this solve was taken again, uncompiled")

    p = torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64)
    y0 = (torch.rand(500, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4 - 2).requires_grad_()
    monkeypatch.setattr("adjoint.sensitivity.problem.integrate", refuses)
    sol = adjoint.solve_ivp(lorenz, (0.0, 20.0), y0, args=(p,), method="dopri5", rtol=rtol, atol=rtol, batched=True, compile=True)
    assert (sol.status >= 0).all()


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("method", ["dopri5", "rodas5p", "kvaerno5"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.slow_cases("single-rodas5p", "double-kvaerno5", "single-kvaerno5", "single-dopri5")
def test_many_trajectories_of_a_small_function_are_those_of_few(method, dtype):
    """Registers side by side, with a trajectory that fails (its parameter is no number) and one that ends at once, against one by one."""

    def by(rows):
        y0 = torch.tensor([1.0, 0.2], dtype=dtype) * torch.linspace(1, 1.3, 150, dtype=dtype).unsqueeze(-1)
        p = torch.tensor([1.1, 0.4], dtype=dtype) * torch.linspace(1, 1.2, 150, dtype=dtype).unsqueeze(-1)
        ends = torch.linspace(0.5, 2.5, 150, dtype=torch.float64)
        p[37, 0], ends[52] = float("nan"), 0.0
        y0, p = y0[rows].requires_grad_(), p[rows].requires_grad_()
        span = torch.zeros_like(ends[rows]), ends[rows].requires_grad_()
        sol = adjoint.solve_ivp(swings, span, y0, args=(p,), method=method, rtol=1e-4, atol=1e-6, batched=True, compile=True, throw=False)
        return sol, torch.autograd.grad(sol.y[-1].nan_to_num().square().sum(), [y0, p, span[1]])

    many, grads = by(slice(None))
    assert many.status[37] < 0 and many.status[52] >= 0 and (many.status < 0).sum() == 1
    rounding = 1e-10 if dtype == torch.float64 else 1e-3
    for rows in (slice(36, 54), slice(140, 143), slice(52, 53)):
        few, theirs = by(rows)
        torch.testing.assert_close(few.y, many.y[:, rows], rtol=rounding, atol=rounding, equal_nan=True)
        for a, b in zip(theirs, grads, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=rounding, atol=rounding, equal_nan=True)
    others = torch.arange(150) != 37
    assert all(x[others].isfinite().all() for x in grads)


def negated_lazily(x):
    """A tensor of these numbers, in whose memory are others: PyTorch negates them where they are read."""
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg() and found.is_contiguous()
    return found


@pytest.mark.filterwarnings("error:compile=True")
@pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
@pytest.mark.parametrize("negated", ["y0", "p", "captured", "t_eval", "rtol", "cotangent"])
def test_lazily_negated_tensors(negated, method):
    """Everything that compiled code reads by its address; the first solve is prepared for the others. The truth is y0 exp(-p b t)."""

    def number(name, value):
        x = torch.tensor([value], dtype=torch.float64)
        return negated_lazily(x) if name == negated else x

    b = number("captured", 1.1)

    def fun(t, y, p):
        return -p * b * y

    for _ in range(3):
        y0, p, times = number("y0", 1.3).requires_grad_(), number("p", 0.7).requires_grad_(), number("t_eval", 0.8)
        rtol = number("rtol", 1e-9) if negated == "rtol" else 1e-9
        y = adjoint.solve_ivp(fun, (0.0, 1.0), y0, (p,), t_eval=times, method=method, rtol=rtol, atol=1e-12, compile=True).y
        true = 1.3 * torch.exp(torch.tensor([-0.7 * 1.1 * 0.8], dtype=torch.float64))
        torch.testing.assert_close(y[0], true, rtol=1e-7, atol=0)
        of_y0, of_p = torch.autograd.grad(y[0], [y0, p], number("cotangent", 0.4))
        torch.testing.assert_close(of_y0, 0.4 * true / 1.3, rtol=1e-6, atol=0)
        torch.testing.assert_close(of_p, -0.4 * 1.1 * 0.8 * true, rtol=1e-6, atol=0)


def by_threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    found = solve(True, "dopri5", rows=700, shared=True)[1]
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("team", [True, False])
def test_bits_do_not_depend_on_the_number_of_threads(team, monkeypatch):
    if not team:
        monkeypatch.setattr("adjoint.native.solve.team_of_threads", lambda: 0)
    elif not team_of_threads():
        pytest.skip("PyTorch has no team of threads here")
    first, *others = map(by_threads, (1, 2, 3))
    assert all(torch.equal(a, b) for found in others for a, b in zip(found, first, strict=True))


def _in_a_fork(results, y0, p):
    torch.set_num_threads(2)
    y = adjoint.solve_ivp(swings, (0.0, 2.0), y0, (p,), batched=True, compile=True).y
    results.put((team_of_threads(), y[-1].tolist()))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_a_forked_process_has_threads_of_its_own():
    """None of PyTorch's team are in it: a solve that waited for them would not end."""
    y0, p = torch.linspace(0.5, 1.5, 1400, dtype=torch.float64).reshape(700, 2), torch.tensor([1.1, 0.4], dtype=torch.float64)
    by_threads(2)
    found = adjoint.solve_ivp(swings, (0.0, 2.0), y0, (p,), batched=True, compile=True).y
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    child = context.Process(target=_in_a_fork, args=(results, y0, p), daemon=True)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert results.get() == (0, found[-1].tolist())


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no large pages")
def test_large_records_are_in_large_pages():
    """As the system's own list of what lies where has it: ``hg`` among the flags."""
    x = torch.empty(2**23, dtype=torch.float64)
    in_large_pages(x)
    inside, flags = False, []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            low, high = (int(part, 16) for part in line.split()[0].split("-"))
            inside = low <= x.data_ptr() + x.nbytes // 2 < high
        elif inside and line.startswith("VmFlags:"):
            flags = line.split()
    assert "hg" in flags
