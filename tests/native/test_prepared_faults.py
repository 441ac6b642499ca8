"""Solves like one before, whose compiled code is called at once: where something fails, on a module, and while they are compiled."""

from __future__ import annotations

import gc
import math
import threading
import weakref

import pytest
import torch
from torch import nn

import adjoint
from adjoint.native.program import Program
from adjoint.sensitivity.prepared import PreparedNode

from ..helpers.prepared_solves import ALONE, F64, FORMS, lotka, p4, solve, start

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]


class TestFaults:
    @pytest.mark.parametrize("form", ALONE)
    def test_failures(self, form, counted):
        def fun(t, y):
            return y**2

        for _ in range(2):
            sol = solve(fun, torch.full((1,), 0.4, dtype=F64), form=form)
            assert sol.success
            with pytest.raises(adjoint.SolveError):
                solve(fun, torch.full((1,), 0.6, dtype=F64), form=form)
            bad = solve(fun, torch.full((1,), 0.6, dtype=F64), throw=False, form=form)
            assert bad.status < 0 and bool(bad.y[-1].isnan().all())
            with pytest.raises(adjoint.InvalidInput, match="finite"):
                solve(fun, torch.full((1,), math.nan, dtype=F64), form=form)

    @pytest.mark.parametrize("batched", [False, True])
    @pytest.mark.parametrize("form", FORMS)
    def test_gradients_that_are_not_finite(self, form, batched, counted):
        def fun(t, y, k):
            return -(1 + torch.sqrt(k)) * y

        y0 = torch.ones(*([3] if batched else []), 1, dtype=F64)
        for k in (1.0, 1.0, 0.0):
            k = torch.tensor(k, dtype=F64, requires_grad=True)
            y = solve(fun, y0, (k,), batched=batched, form=form).y[-1].sum()
            if float(k.detach()):
                y.backward()
            else:
                with pytest.warns(RuntimeWarning, match="not finite") if batched else pytest.raises(adjoint.NonFiniteDerivative):
                    y.backward()
        assert counted[-1] is not None

    @pytest.mark.parametrize("form", ALONE)
    def test_bad_times(self, form):
        y0 = torch.ones(1, dtype=F64)
        for times in ([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]):
            solve(lambda t, y: -y, y0, t_eval=torch.tensor(times, dtype=F64), form=form)
        for times in ([0.0, 3.0], [1.0, 0.5, 1.5], [0.0, math.nan]):
            with pytest.raises(adjoint.InvalidInput):
                solve(lambda t, y: -y, y0, t_eval=torch.tensor(times, dtype=F64), form=form)

    @pytest.mark.parametrize("form", ALONE)
    def test_negated_views(self, form, counted):
        z = torch.tensor([[1.0 + 2.0j]], dtype=torch.complex128)
        k = z.conj().imag.reshape(1)
        assert k.is_neg()
        ends = [float(solve(lambda t, y, k: k * y, torch.ones(1, dtype=F64), (k,), rtol=1e-9, form=form).y[-1]) for _ in range(2)]
        assert ends == pytest.approx([math.exp(-4.0)] * 2, rel=1e-6)

    @pytest.mark.parametrize("integrated", [False, True])
    def test_a_solution_on_its_module(self, integrated, counted):
        class Field(nn.Module):
            def __init__(self):
                super().__init__()
                self.k = nn.Parameter(torch.ones(2, dtype=F64))

            def forward(self, t, y):
                return -self.k * y

            def total(self, t, y):
                return (self.k * y).sum(-1)

        made = []
        for _ in range(2):
            field = Field()
            sol = solve(field, torch.ones(2, dtype=F64), quadrature=field.total if integrated else None)
            field.kept = sol.y, sol.quadrature
            gone = weakref.ref(field)
            # which holds results
            made += [x is not None for x in counted]
            counted.clear()
            del field, sol
            gc.collect()
            assert gone() is None
        assert made == [True]

    def test_node(self):
        # of a function that no other test solves with: looks for jumps are had every so many solves
        def fun(t, y, p):
            return lotka(t, y, p) * 1.0

        for _ in range(2):
            y = solve(fun, start(), (p4(),)).y
        assert isinstance(y.grad_fn, PreparedNode._backward_cls)


class TestBackground:
    @pytest.mark.parametrize("method", ["dopri5", "rodas5p"])
    def test_uncompiled_until_it_is_there(self, method, monkeypatch):
        gate, made = threading.Event(), Program._made
        monkeypatch.setattr(Program, "_made", lambda *a: gate.wait(60) and made(*a))
        w = torch.tensor([0.3, 0.7], dtype=F64, requires_grad=True)

        def fun(t, y):
            return -w * torch.sin(y + 0.125)

        def once(compile):
            sol = solve(fun, torch.ones(2, dtype=F64), method=method, compile=compile)
            return sol, torch.autograd.grad(sol.y[-1].sum(), w)[0]

        nodes = []
        for k in range(3):
            sol, slope = once("background")
            nodes.append((sol.y, slope, sol.stats.compile_seconds))
            if k == 0:
                gate.set()
                for thread in threading.enumerate():
                    if thread is not threading.current_thread() and thread.daemon and "_tried" in thread.name:
                        thread.join()
        (before, slope, none), *after = nodes
        eager, eager_slope = once(False)
        torch.testing.assert_close(slope, eager_slope, rtol=1e-10, atol=1e-12)
        assert torch.equal(before, eager.y) and none < 0.5
        for y, slope, _ in after:
            torch.testing.assert_close(y, before, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(slope, eager_slope, rtol=1e-8, atol=1e-10)
        assert isinstance(after[-1][0].grad_fn, PreparedNode._backward_cls)

    def test_seconds(self):
        def fun(t, y):
            return -y * torch.cos(y * 0.0625)

        first, second = (solve(fun, torch.ones(2, dtype=F64)).stats.compile_seconds for _ in range(2))
        assert first > 0 and second == 0

    @pytest.mark.parametrize("value", ["yes", 1.5, None, 2])
    def test_other_values(self, value):
        with pytest.raises(adjoint.InvalidInput, match="compile must be"):
            solve(lambda t, y: -y, torch.ones(1, dtype=F64), compile=value)
        with pytest.raises(adjoint.InvalidInput, match="compile must be"):
            adjoint.solve_dae(lambda t, y, yp: yp + y, (0.0, 1.0), torch.ones(1, dtype=F64), compile=value)


@pytest.mark.parametrize("method", ["dopri5", "kvaerno5"])
@pytest.mark.parametrize("compile", [False, True])
def test_another_default_device(method, compile):
    """Tensors that are made for the compiled code are where it looks for them."""
    y0, p = start(), p4()

    def event(t, y, p):
        return y[0] - 1.0

    def found(**options):
        sol = solve(lotka, y0, (p,), method=method, compile=compile, **options)
        return [sol.y.detach(), *torch.autograd.grad(sol.y[-1].sum(), [y0, p]), *(e.t.detach() for e in sol.events)]

    here = [found() for _ in range(2)][-1] + [found(events=event) for _ in range(2)][-1]
    torch.set_default_device("meta")
    try:
        there = [found() for _ in range(2)][-1] + [found(events=event) for _ in range(2)][-1]
    finally:
        torch.set_default_device(None)
    for a, b in zip(here, there, strict=True):
        assert b.device.type == "cpu"
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
