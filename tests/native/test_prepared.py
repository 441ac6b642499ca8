"""Solves like one before, whose compiled code is called at once: what they give, and what makes them go the general way again."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import nn

import adjoint

from ..helpers.prepared_solves import ALONE, F64, FORMS, lotka, p4, solve, start

pytestmark = [pytest.mark.compile, pytest.mark.users_defaults]
RATE = 1.0


def at_rate(t, y):
    return -RATE * y


class TestTheSame:
    @pytest.mark.parametrize("method", ["dopri5", "tsit5", "rodas5p", "kvaerno5", "radau5"])
    @pytest.mark.parametrize("rows", [0, 3, 20])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_as_the_general_way(self, method, rows, sampled, counted):
        results = []
        for _ in range(3):
            y0, p = start(*([rows] if rows else [])), p4()
            times = torch.linspace(0, 2, 7, dtype=F64) if sampled else None
            sol = solve(lotka, y0, (p,), method=method, batched=rows > 0, t_eval=times)
            weights = torch.cos(torch.arange(sol.y.numel(), dtype=F64)).reshape(sol.y.shape)
            grads = torch.autograd.grad((sol.y * weights).sum(), [y0, p])
            results.append((sol, grads))
        assert len(counted) == 2 and all(x is not None for x in counted)
        (first, slopes), *others = results
        for sol, grads in others:
            assert torch.equal(sol.y, first.y) and torch.equal(sol.t, first.t) and sol.t.dtype == first.t.dtype
            for name in ("n_steps", "n_accepted", "n_rejected", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton"):
                assert torch.equal(torch.as_tensor(getattr(sol.stats, name)), torch.as_tensor(getattr(first.stats, name))), name
            assert vars(sol.stats.backward) == vars(first.stats.backward) and repr(sol) == repr(first) and sol.message == first.message
            assert all(torch.equal(a, b) for a, b in zip(grads, slopes, strict=True))

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_without_derivatives(self, dtype, counted):
        y0, p = start(5).detach().to(dtype), p4().detach().to(dtype)
        first, second = (solve(lotka, y0, (p,), batched=True, rtol=1e-4) for _ in range(2))
        with torch.no_grad():
            third, fourth = (solve(lotka, y0.requires_grad_(), (p,), batched=True, rtol=1e-4) for _ in range(2))
        assert len(counted) == 3 and not second.y.requires_grad and not fourth.y.requires_grad
        assert all(torch.equal(x.y, first.y) for x in (second, third, fourth))

    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    def test_sample_times(self, dtype, counted):
        """Single precision, and ends that are those of the span but for rounding."""
        y0 = start().to(dtype)
        for span in ((0.0, 1.0), (0.1, 0.7)):
            times = torch.linspace(*span, 5, dtype=dtype)
            results = [solve(lotka, y0, (p4().detach().to(dtype),), span, t_eval=times, rtol=1e-5) for _ in range(2)]
            assert torch.equal(results[0].y, results[1].y) and all(torch.equal(r.t, times) and r.t.dtype == dtype for r in results)
        assert len(counted) == 3

    @pytest.mark.parametrize("form", ALONE)
    def test_other_numbers(self, form, counted):
        for scale in (1.0, 1.3, 0.7):
            y0, p = start().detach() * scale, p4().detach() / scale
            mine, theirs = (solve(lotka, y0, (p,), (0.0, scale), compile=x, form=form) for x in (True, False))
            torch.testing.assert_close(mine.y, theirs.y, rtol=1e-10, atol=1e-12)
        assert len(counted) == 2

    def test_one_tensor_in_many_places(self, counted):
        w = torch.tensor([0.3, 0.8], dtype=F64, requires_grad=True)

        def fun(t, y, a, b):
            return -w * y + a * torch.sin(t) - b * y

        grads = [torch.autograd.grad(solve(fun, w, (w, w), compile=x).y[-1].sum(), w)[0] for x in (True, True, False)]
        assert len(counted) == 1 and torch.equal(grads[0], grads[1])
        torch.testing.assert_close(grads[1], grads[2], rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.slow_cases("implicit")
    def test_a_module(self, form, counted):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()

        class Field(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.scale = net, 0.5

            def cubed(self, y):
                return self.scale * y**3

            def forward(self, t, y):
                return self.net(self.cubed(y))

        field = Field()

        def grads(compile):
            field.zero_grad()
            solve(field, start(4), batched=True, compile=compile, form=form).y[-1].square().sum().backward()
            return [p.grad.clone() for p in field.parameters()]

        found = [grads(True), grads(True), grads(False)]
        assert len(counted) == 1
        for a, b, c in zip(*found, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(b, c, rtol=1e-8, atol=1e-11)
        field.scale = 1.5
        torch.testing.assert_close(grads(True)[0], grads(False)[0], rtol=1e-8, atol=1e-11)
        Field.cubed = lambda self, y: y
        torch.testing.assert_close(grads(True)[0], grads(False)[0], rtol=1e-8, atol=1e-11)
        with torch.no_grad():
            net[0].weight.mul_(2)
        torch.testing.assert_close(grads(True)[0], grads(False)[0], rtol=1e-8, atol=1e-11)
        net[0].weight = nn.Parameter(torch.ones(8, 2, dtype=F64))
        torch.testing.assert_close(grads(True)[0], grads(False)[0], rtol=1e-8, atol=1e-11)


class TestWhatChanges:
    """Everything that ``fun`` reads is looked at in every call."""

    @pytest.mark.parametrize("form", ALONE)
    def test_a_global_number(self, form, monkeypatch, counted):
        for rate in (1.0, 1.0, 2.0, 0.5):
            monkeypatch.setitem(globals(), "RATE", rate)
            end = solve(at_rate, torch.ones(1, dtype=F64), method="dopri5", rtol=1e-9, form=form).y[-1]
            torch.testing.assert_close(end, torch.exp(torch.tensor([-2.0 * rate], dtype=F64)), rtol=1e-7, atol=0)
        assert len(counted) == 1

    @pytest.mark.parametrize("form", ALONE)
    def test_a_closure_a_default_a_partial_and_an_argument(self, form):
        from functools import partial

        def made(k):
            return lambda t, y: -k * y

        def fun(t, y, k):
            return -k * y

        for k in (1.0, 1.0, 3, 2.0):
            for f, args in ((made(k), ()), (lambda t, y, k=k: -k * y, ()), (partial(fun, k=k), ()), (fun, (k,))):
                end = solve(f, torch.ones(1, dtype=F64), args, rtol=1e-9, form=form).y[-1]
                torch.testing.assert_close(end, torch.exp(torch.tensor([-2.0 * k], dtype=F64)), rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("form", ALONE)
    def test_a_list_of_tensors(self, form, counted):
        weights = [torch.tensor(1.0, dtype=F64), torch.tensor(0.5, dtype=F64)]

        def fun(t, y):
            total = 0.0
            for w in weights:
                total = total + w
            return -total * y

        ends = []
        for _ in range(2):
            ends.append(float(solve(fun, torch.ones(1, dtype=F64), rtol=1e-9, form=form).y[-1]))
        weights.append(torch.tensor(0.5, dtype=F64))
        ends.append(float(solve(fun, torch.ones(1, dtype=F64), rtol=1e-9, form=form).y[-1]))
        weights[0].fill_(0.0)
        ends.append(float(solve(fun, torch.ones(1, dtype=F64), rtol=1e-9, form=form).y[-1]))
        assert ends == pytest.approx([math.exp(-3), math.exp(-3), math.exp(-4), math.exp(-2)], rel=1e-7)
        assert len(counted) == 2

    @pytest.mark.parametrize("form", ALONE)
    def test_training(self, form):
        class Field(nn.Module):
            def forward(self, t, y):
                return -y if self.training else -2 * y

        field = Field()
        for mode, k in ((True, 1), (True, 1), (False, 2), (True, 1)):
            field.train(mode)
            assert float(solve(field, torch.ones(1, dtype=F64), rtol=1e-9, form=form).y[-1]) == pytest.approx(math.exp(-2 * k), rel=1e-7)


class TestDerivatives:
    @pytest.mark.parametrize("form", ALONE)
    @pytest.mark.parametrize("which", ["computed", "the same", "heard"])
    @pytest.mark.slow_cases("computed-watched", "the same-implicit", "the same-watched", "heard-watched")
    def test_inputs_that_are_not_apart(self, which, form, counted):
        """A start that is computed from what fun captures, or is that itself; a hook on what it captures."""

        def decay(q):
            return lambda t, y: -q * y

        def twice(value, q):
            first = torch.autograd.grad(value, q, create_graph=True)[0]
            return torch.stack([first, torch.autograd.grad(first.sum(), q)[0]])

        begin = {"computed": lambda q: q.flip(0), "the same": lambda q: q, "heard": lambda q: torch.ones(2, dtype=F64)}[which]
        for _ in range(3):
            q = torch.tensor([0.7, 0.4], dtype=F64, requires_grad=True)
            if which == "heard":
                q.register_hook(lambda g: 2 * g)
            sol = solve(decay(q), begin(q), rtol=1e-9, atol=1e-12, form=form)
            found, wanted = twice(sol.y[-1].sum(), q), twice((begin(q) * torch.exp(-2 * q)).sum(), q)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
        assert len(counted) == 2 and counted[-1] is not None

    @pytest.mark.parametrize("form", ALONE)
    @pytest.mark.slow_cases("explicit", "implicit")
    def test_second_order(self, form, counted):
        # derivatives of implicit steps, one by one, take their time
        rtol = 1e-5 if form == "implicit" else 1e-9

        def end(y0, p, compile):
            return (solve(lotka, y0, (p,), compile=compile, rtol=rtol, form=form).y[-1] ** 2).sum()

        found = []
        for compile in (True, True, False):
            y0, p = start(), p4()
            (slope,) = torch.autograd.grad(end(y0, p, compile), p, create_graph=True)
            found.append((slope.detach(), *torch.autograd.grad((slope**2).sum(), [y0, p])))
        assert len(counted) >= 1
        for a, b, c in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(b, c, rtol=1e-6, atol=1e-7)
        y0, p = start().detach(), p4().detach()
        hessians = [torch.autograd.functional.hessian(lambda q, c=c: end(y0, q, c), p) for c in (True, True, False)]
        torch.testing.assert_close(hessians[1], hessians[2], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_many_at_once(self, form):
        for _ in range(2):
            y0, p = start(), p4()
            y = solve(lotka, y0, (p,), form=form).y[-1]
            rows = [torch.autograd.grad(y[k], p, retain_graph=True)[0] for k in range(2)]
            (found,) = torch.autograd.grad(y, p, torch.eye(2, dtype=F64), is_grads_batched=True)
            torch.testing.assert_close(found, torch.stack(rows), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("form", ALONE)
    @pytest.mark.slow_cases("implicit")
    def test_transforms_go_the_general_way(self, form, counted):
        y0, p = start().detach(), p4().detach()
        f = lambda p: solve(lotka, y0, (p,), form=form).y[-1]  # noqa: E731
        f(p), f(p)
        assert len(counted) == 1
        forward, backward = torch.func.jacfwd(f)(p), torch.func.jacrev(f)(p)
        torch.testing.assert_close(forward, backward, rtol=1e-9, atol=1e-12)
        assert len(counted) == 1

    @pytest.mark.parametrize("form", ALONE)
    def test_some_of_them(self, form):
        for _ in range(2):
            y0, p = start(), p4()
            y = solve(lotka, y0.detach(), (p,), form=form).y
            assert torch.autograd.grad(y[0].sum(), y0, allow_unused=True) == (None,)
            y = solve(lotka, y0, (p.detach(),), form=form).y
            (bar,) = torch.autograd.grad(y[0, 0], y0)
            assert torch.equal(bar, torch.tensor([1.0, 0.0], dtype=F64))

    @pytest.mark.parametrize("form", ALONE)
    def test_once_only(self, form):
        for _ in range(2):
            total = solve(lotka, start(), (p4(),), form=form).y.sum()
            total.backward()
            with pytest.raises(RuntimeError, match="second time"):
                total.backward()

    @pytest.mark.parametrize("form", FORMS)
    def test_memory_is_given_back(self, form):
        """After its way back a result holds no states."""

        class Box:
            def __init__(self, x):
                self.x = x
                boxes.add(self)

        boxes = weakref.WeakSet()
        for _ in range(2):
            with torch.autograd.graph.saved_tensors_hooks(Box, lambda box: box.x):
                y = solve(lotka, start(20), (p4(),), batched=True, form=form).y
            assert sum(box.x.nbytes for box in boxes) > 20 * y.nbytes // 2
            y.sum().backward()
            assert not len(boxes)

    @pytest.mark.parametrize("form", FORMS)
    def test_counts_are_the_users_own(self, form):
        for _ in range(2):
            sol = solve(lotka, start(3), (p4(),), batched=True, form=form)
            sol.status.fill_(7)
            sol.stats.n_steps.zero_()
            sol.y.sum().backward()

    @pytest.mark.parametrize("form", ALONE)
    def test_inputs_written_to(self, form):
        for _ in range(2):
            p = p4()
            total = solve(lotka, start(), (p,), form=form).y.sum()
            with torch.no_grad():
                p.mul_(2)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                total.backward()

    @pytest.mark.parametrize("form", ALONE)
    @pytest.mark.slow_cases("implicit")
    def test_sample_times_written_to(self, form):
        """The way back goes by the times of the solve."""
        found = []
        for written in (False, False, True):
            p, times = p4(), torch.linspace(0, 2, 5, dtype=F64)
            total = solve(lotka, start().detach(), (p,), t_eval=times, form=form).y.square().sum()
            if written:
                times[1:4] = 0.3
            found.append(torch.autograd.grad(total, p, retain_graph=True)[0])
            torch.testing.assert_close(torch.autograd.grad(total, p, create_graph=True)[0], found[0], rtol=1e-9, atol=1e-12)
        assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])

    @pytest.mark.parametrize("form", FORMS)
    def test_saved_elsewhere(self, form):
        found = []
        for elsewhere in (False, False, True):
            y0, p = start(3), p4()
            with torch.autograd.graph.saved_tensors_hooks(*((lambda x: x.clone(),) * 2 if elsewhere else (lambda x: x,) * 2)):
                y = solve(lotka, y0, (p,), batched=True, form=form).y
            found.append(torch.autograd.grad(y.square().sum(), [y0, p]))
        assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found, strict=True))

    @pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "bdf"])
    def test_more_steps_and_fewer(self, method):
        """Than there was room for, and so many fewer that room is given back."""
        y0, p = start(200), p4().detach()
        known = {}
        for end in (0.5, 0.5, 10.0, 0.5, 10.0):
            y = solve(lotka, y0, (p,), (0.0, end), batched=True, method=method).y
            (bar,) = torch.autograd.grad(y[-1].square().sum(), y0)
            before = known.setdefault(end, (y, bar))
            assert torch.equal(y, before[0]) and torch.equal(bar, before[1])

    @pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p"])
    def test_captured_numbers_written_to(self, method):
        """Of tensors that do not require grad: first derivatives are those of the solve, second ones evaluate ``fun`` again and say so."""
        a, b = torch.tensor(-0.7, dtype=F64, requires_grad=True), torch.ones((), dtype=F64)

        def fun(t, y):
            return a * y * b

        ends = []
        for u in (1.0, 2.0, 3.0):
            b.fill_(u)
            ends.append(solve(fun, torch.ones(3, dtype=F64), method=method, span=(0.0, 1.0)).y[-1].mean())
        b.data.fill_(7.0)
        for u, end in zip((1.0, 2.0, 3.0), ends, strict=True):
            (found,) = torch.autograd.grad(end, a, retain_graph=True)
            assert float(found) == pytest.approx(u * float(end.detach()), rel=1e-5)
        with pytest.raises(adjoint.CapturedTensorLost, match="not the function any more"):
            torch.autograd.grad(ends[1], a, create_graph=True)
        b.data.fill_(2.0)
        (slope,) = torch.autograd.grad(ends[1], a, create_graph=True)
        assert float(torch.autograd.grad(slope, a)[0]) == pytest.approx(4.0 * float(ends[1].detach()), rel=1e-5)

    @pytest.mark.parametrize("form", ALONE)
    def test_a_function_that_has_changed(self, form):
        w = [p4()]

        def fun(t, y):
            return lotka(t, y, w[0])

        y0 = start()
        for _ in range(2):
            y = solve(fun, y0, form=form).y[-1].sum()
        w[0] = p4()
        with pytest.raises(adjoint.CapturedTensorLost, match="not the function any more"):
            torch.autograd.grad(y, y0, create_graph=True)
        torch.autograd.grad(y, y0)


class TestIntegrals:
    @staticmethod
    def weighed(t, y, p):
        return {"one": y[..., 0] * p[0], "two": torch.stack([y[..., 1] ** 2, t * y[..., 0]], -1)}

    @pytest.mark.parametrize("method", ["tsit5", "kvaerno5"])
    @pytest.mark.parametrize("rows", [0, 3, 20])
    @pytest.mark.parametrize("sampled", [False, True])
    def test_as_the_general_way(self, method, rows, sampled, counted):
        found = []
        for compile in (True, True, True, False):
            y0, p = start(*([rows] if rows else [])), p4()
            options = {"t_eval": torch.linspace(0.25, 1.5, 4, dtype=F64)} if sampled else {}
            sol = solve(lotka, y0, (p,), quadrature=self.weighed, compile=compile, batched=rows > 0, method=method, **options)
            value = (sol.quadrature["one"] + sol.quadrature["two"].sum(-1)).sum() + (sol.y[1:] ** 2).sum()
            found.append((sol.y, *sol.quadrature.values(), *torch.autograd.grad(value, [y0, p])))
        assert len(counted) == 2 and all(x is not None for x in counted)
        for a, b, c, d in zip(*found, strict=True):
            assert a.shape == b.shape == d.shape and torch.equal(a, b) and torch.equal(a, c)
            torch.testing.assert_close(b, d, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("sampled", [False, True])
    @pytest.mark.slow_cases("False")
    def test_second_order(self, sampled, counted):
        times = torch.linspace(0.25, 1.5, 4, dtype=F64) if sampled else None

        def value(p, compile):
            sol = solve(lotka, start().detach(), (p,), quadrature=lambda t, y, p: y.prod(-1), t_eval=times, compile=compile)
            return sol.quadrature**2 + sol.y[-1].sum()

        found = [torch.autograd.functional.hessian(lambda p, c=c: value(p, c), p4().detach()) for c in (True, True, False)]
        assert counted
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found[1], found[2], rtol=1e-6, atol=1e-6)

    def test_another_integrand(self):
        ends = []
        for k in (1.0, 1.0, 2.0):
            sol = solve(at_rate, torch.ones(1, dtype=F64), quadrature=lambda t, y, k=k: k * y[0], rtol=1e-9)
            ends.append(float(sol.quadrature))
        assert ends == pytest.approx([(1 - math.exp(-2)) * k for k in (1, 1, 2)], rel=1e-8)
