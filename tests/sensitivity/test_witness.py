"""A right-hand side that is another function on the way back than in the solve: an error, never another function's gradient."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from adjoint import (
    Backprop,
    BacksolveAdjoint,
    DiscreteAdjoint,
    ForwardSensitivity,
    GaussAdjoint,
    InterpolatingAdjoint,
    QuadratureAdjoint,
    odeint,
    odeint_adjoint,
    solve_dae,
    solve_ivp,
)
from adjoint.errors import SolveError
from adjoint.system.witness import Witness, differs

SPAN = (0.0, 1.0)
SWEEP = DiscreteAdjoint(keep_bytes=0)
AGAIN = [SWEEP, DiscreteAdjoint(checkpoints=3), InterpolatingAdjoint(), GaussAdjoint(), QuadratureAdjoint(), BacksolveAdjoint()]


class _Controlled(torch.nn.Module):
    """``y' = a u y`` with a control ``u`` that is a number, a buffer, or comes from a submodule."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(-0.7))
        self.u = 1.0
        self.register_buffer("gain", torch.ones(()))
        self.drop = torch.nn.Dropout(0.5).eval()

    def forward(self, t, y, *slope):
        rate = self.a * self.u * self.gain * self.drop(y)
        return slope[0] - rate if slope else rate


def _attribute(f):
    f.u = 2.0


def _buffer_replaced(f):
    f.gain = torch.full((), 2.0)


def _buffer_in_place(f):
    f.gain.mul_(2.0)


def _mode(f):
    f.train()


CHANGES = [_attribute, _buffer_replaced, _buffer_in_place, _mode]


def _solve(f, gradient=SWEEP, **options):
    return solve_ivp(f, SPAN, torch.ones(4), gradient=gradient, rtol=1e-6, **options).y[-1].sum()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("gradient", AGAIN, ids=lambda g: f"{type(g).__name__}{getattr(g, 'checkpoints', None) or ''}")
def test_what_changed_in_between(change, gradient):
    f = _Controlled()
    out = _solve(f, gradient)
    change(f)
    with pytest.raises(SolveError, match="same value"):
        out.backward()


@pytest.mark.parametrize("method", ["rk4", "kvaerno5", "radau5", "rodas5p", "bdf", "abm", "auto"])
def test_whatever_the_method(method):
    f = _Controlled()
    out = _solve(f, method=method, **({"first_step": 0.1} if method == "rk4" else {}))
    _attribute(f)
    with pytest.raises(SolveError, match="same value"):
        out.backward()


def test_batches_daes_and_the_drop_in():
    y0, t = torch.ones(3, 2), torch.linspace(0.0, 1.0, 5)
    solves = [
        lambda f: solve_ivp(f, SPAN, y0, batched=True).y[-1],
        lambda f: torch.vmap(lambda y: solve_ivp(f, SPAN, y).y[-1])(y0),
        lambda f: solve_dae(f, SPAN, y0[0]).y[-1],
        lambda f: odeint(f, torch.ones(100_000), t)[-1],
        lambda f: odeint_adjoint(f, y0, t, adjoint_rtol=1e-6)[-1],
        lambda f: odeint(f, y0, t, method="explicit_adams")[-1],
    ]
    for solve in solves:
        f = _Controlled()
        out = solve(f).sum()
        _attribute(f)
        with pytest.raises(SolveError, match="same value"):
            out.backward()


def _weights(f):
    f.a.data.mul_(2.0)


@pytest.mark.compile
@pytest.mark.parametrize("change", [_attribute, _buffer_replaced, _weights])
@pytest.mark.parametrize("gradient", [InterpolatingAdjoint(), QuadratureAdjoint(), SWEEP])
def test_compiled_solves_whose_way_back_evaluates_again(gradient, change):
    """Continuous adjoints always do, the discrete one where derivatives in times are differentiated."""
    end = torch.tensor(SPAN[1], requires_grad=True)

    def solved(f):
        if gradient is SWEEP:
            return solve_ivp(f, (SPAN[0], end), torch.ones(2), method="kvaerno3", compile=True).y[-1].sum()
        return _solve(f, gradient, compile=True, method="kvaerno3")

    f = _Controlled()
    out = solved(f)
    if gradient is SWEEP:
        (out,) = torch.autograd.grad(out, f.a, create_graph=True)
    change(f)
    with pytest.raises(SolveError, match="same value"):
        out.backward()
    f = _Controlled()
    out = solved(f)
    change(f)
    with pytest.raises(SolveError, match="same value"):
        torch.autograd.grad(out, f.a, create_graph=True)


@pytest.mark.compile
@pytest.mark.parametrize("change", [_attribute, _buffer_replaced, _weights])
def test_second_derivatives_by_compiled_code_are_those_of_the_solve(change):
    def product(*changes):
        f = _Controlled()
        out = _solve(f, SWEEP, compile=True, method="kvaerno3")
        changes[0](f)
        (first,) = torch.autograd.grad(out, f.a, create_graph=True)
        changes[1](f)
        return torch.autograd.grad(first, f.a)[0]

    def no_change(f):
        pass

    known = product(no_change, no_change)
    torch.testing.assert_close(product(change, no_change), known, rtol=1e-12, atol=0)
    torch.testing.assert_close(product(no_change, change), known, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["kvaerno3", "rodas5p", "radau5", "bdf", "radau", "abm"])
def test_what_autograd_has_recorded(method):
    """Roots of implicit stages evaluate again; what does not goes back by the values of the solve."""

    def solved():
        f, y0 = _Controlled(), torch.ones(2)
        solve = solve_dae if method == "radau" else solve_ivp
        sol = solve(f, SPAN, y0, method=method, gradient=Backprop())
        return f, sol.y[-1].sum()

    f, out = solved()
    (known,) = torch.autograd.grad(out, f.a)
    f, out = solved()
    _attribute(f)
    if method in ("rodas5p", "abm"):
        torch.testing.assert_close(torch.autograd.grad(out, f.a)[0], known)
        return
    with pytest.raises(SolveError, match="same value"):
        out.backward()


@pytest.mark.compile
def test_compiled_solves_do_not_mind():
    """They go back with the code and the values of the solve."""
    f, total = _Controlled(), 0.0
    for u in (1.0, 2.0):
        f.u = u
        total = total + solve_ivp(f, SPAN, torch.ones(4), compile=True).y[-1].sum()
    total.backward()
    want = 4 * sum(u * math.exp(-0.7 * u) for u in (1.0, 2.0))
    assert f.a.grad.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("gradient", [DiscreteAdjoint(keep_bytes=2**22), ForwardSensitivity(), Backprop()])
def test_what_needs_no_second_evaluation_does_not_mind(gradient):
    f, total = _Controlled(), 0.0
    for u in (1.0, 2.0):
        f.u = u
        total = total + _solve(f, gradient)
    total.backward()
    want = 4 * sum(u * math.exp(-0.7 * u) for u in (1.0, 2.0))
    assert f.a.grad.item() == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("gradient", [SWEEP, ForwardSensitivity()])
def test_derivatives_of_derivatives_and_transforms(gradient):
    f, a = _Controlled(), torch.tensor(-0.7, requires_grad=True)

    def value(a):
        return solve_ivp(lambda t, y, a: a * f.u * y, SPAN, torch.ones(1), (a,), gradient=gradient, rtol=1e-8).y[-1].sum()

    (first,) = torch.autograd.grad(value(a), a, create_graph=True)
    assert torch.autograd.grad(first, a, retain_graph=True)[0].item() == pytest.approx(math.exp(-0.7), rel=1e-5)
    # second derivatives go through the states, and so once more through the steps
    f.u = 3.0
    with pytest.raises(SolveError, match="same value"):
        torch.autograd.grad(first, a)
    f.u = 1.0
    out = value(a)
    _, pull = torch.func.vjp(value, a.detach())
    f.u = 3.0
    with pytest.raises(SolveError, match="same value"):
        torch.autograd.grad(out, a, create_graph=True)
    with pytest.raises(SolveError, match="same value"):
        pull(torch.ones(()))
    f.u = 1.0
    assert torch.vmap(torch.func.grad(value))(a.detach().expand(2))[1].item() == pytest.approx(math.exp(-0.7), rel=1e-5)


@pytest.mark.parametrize("gradient", [SWEEP, ForwardSensitivity(), DiscreteAdjoint(checkpoints=2)])
@pytest.mark.parametrize("seed", [None, 0])
def test_random_numbers(gradient, seed):
    """Dropout: every evaluation is of another function, whatever the seed; where autograd records the solve the gradient is right."""

    def run(gradient, a=-0.7):
        f = _Controlled()
        f.drop.train()
        f.a.data.fill_(a)
        if seed is not None:
            torch.manual_seed(seed)
        sol = solve_ivp(f, SPAN, torch.ones(4), method="rk4", first_step=0.1, gradient=gradient)
        if seed is not None:
            torch.manual_seed(seed)
        value = sol.y[-1].sum()
        value.backward()
        return float(value), float(f.a.grad)

    with pytest.raises(SolveError, match="dropout"):
        run(gradient)
    recorded = DiscreteAdjoint(keep_bytes=2**22)
    if seed is not None:
        slope = (run(recorded, -0.7 + 1e-5)[0] - run(recorded, -0.7 - 1e-5)[0]) / 2e-5
        assert run(recorded)[1] == pytest.approx(slope, rel=1e-6)


def test_late_binding_and_changes_of_a_part_of_the_span():
    a, outs = torch.tensor(-0.7, requires_grad=True), []
    for u in (1.0, 2.0):
        outs.append(solve_ivp(lambda t, y: a * u * y, SPAN, torch.ones(1), gradient=SWEEP).y[-1].sum())  # noqa: B023
    with pytest.raises(SolveError, match="same value"):
        sum(outs).backward()
    for max_step, part in ((0.01, slice(4, 7)), (0.05, slice(2, 4))):
        table = torch.ones(10)
        f = lambda t, y: a * table[int(t.clamp(max=0.999) * 10)] * y  # noqa: B023, E731
        out = solve_ivp(f, SPAN, torch.ones(1), gradient=SWEEP, max_step=max_step).y[-1].sum()
        table[part] = 2.0
        with pytest.raises(SolveError, match="same value"):
            out.backward()


def test_counters_and_statistics_that_change_no_value_are_no_matter():
    class Counting(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, t, y):
            self.calls += 1
            return self.norm(self.net(y))

    f = Counting()
    sol = solve_ivp(f, SPAN, torch.randn(6, 3), gradient=SWEEP)
    again = solve_ivp(f, SPAN, torch.randn(6, 3), gradient=SWEEP)
    (sol.y[-1] + again.y[-1]).sum().backward(retain_graph=True)
    sol.y[-1].sum().backward()
    assert torch.isfinite(f.net.weight.grad).all()


def test_few_evaluations_are_kept_of_many():
    witness = Witness()
    f = witness.watch(lambda t, y: t * y)
    for k in range(5000):
        f(torch.tensor(float(k)), torch.ones(3))
    witness.settle()
    times = [float(note[1]) for note in witness._notes]
    assert times[0] == 0 and times[-1] == 4999 and len(times) <= 10 and max(b - a for a, b in pairwise(times)) <= 1500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_no_difference(dtype):
    known = torch.randn(2000, dtype=dtype)
    eps = torch.finfo(dtype).eps
    assert not differs(known * (1 + 100 * eps * torch.randn(2000, dtype=dtype)), known)
    near = known.clone()
    near[7] = 0.0
    assert not differs(near + 10 * eps, near)
    assert differs(known * 1.01, known) and differs(near + 0.01, near)
    wild = torch.tensor([float("inf"), 1.0], dtype=dtype)
    assert not differs(torch.tensor([0.0, 1.0], dtype=dtype), wild) and differs(torch.tensor([0.0, 2.0], dtype=dtype), wild)
