"""Narrow matrices taken apart into columns: the rewritten graph computes the same, and compiled ensembles agree with eager ones."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from adjoint import solve_ivp
from adjoint.integrate.columns import NARROW, column_major, column_pass, takes_columns
from adjoint.integrate.compiled import pass_options

from .problems import lotka_volterra

ROWS = 16 * NARROW + 2
aten = torch.ops.aten


def _unbound(y, p):
    a, b = y.unbind(-1)
    return torch.stack([a * p[:, 0] - b, a * b / (1 + p[:, 1].exp())], -1)


def _indexed(y, p):
    return torch.stack([y[:, 1].sin(), y[..., 0] * p[:, 1]], dim=1) + y.square()


def _whole(y, p):
    """A matrix product and a softmax need the matrix, not its columns."""
    return torch.stack([y[:, 0], y[:, 1] * 2], -1) @ torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=y.dtype) + torch.softmax(y * p, 1)


def _reduced(y, p):
    z = torch.stack([y[:, 0] * p[:, 0], -y[:, 1]], -1)
    return torch.stack([torch.linalg.vector_norm(z, dim=-1), z.sum(1)], 1) + z.mean(dim=1, keepdim=True) + z.amax(1, keepdim=True)


def _broadcast(y, p):
    z = torch.stack([y[:, 0], y[:, 1]], -1)
    return z * torch.tensor([2.0, 3.0], dtype=y.dtype) + y[:, :1] * p[:, 1:] + torch.where(z > 0, z, 0.5 * y)


def _turned(y, p):
    z = torch.stack([y.t()[1], y.t()[0]])
    return (z * p.t() + torch.cat([y, p], 1)[:, 1:3].t()).t()


def _slices(y, p):
    return torch.cat([y[:, 1:] * p[:, :1], y[:, :1] - p[:, 1:].tanh()], dim=-1).clone().reshape(-1, 2)


CASES = [_unbound, _indexed, _whole, _reduced, _broadcast, _turned, _slices]


def _rewritten(function, *examples):
    graph = make_fx(function, tracing_mode="fake")(*examples)
    column_pass(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__[1:])
def test_same_values_and_pullbacks(function):
    y, p, bar = torch.randn(ROWS, 2), torch.randn(ROWS, 2), torch.randn(ROWS, 2)

    def pullback(y, p, bar):
        value, pull = torch.func.vjp(function, y, p)
        return value, *pull(bar)

    for got, want in zip(_rewritten(pullback, y, p, bar)(y, p, bar), pullback(y, p, bar), strict=True):
        assert torch.allclose(got, want, rtol=1e-13, atol=1e-13)


def test_a_step_has_no_matrix_but_its_results():
    """Between the columns of the arguments and the results nothing is put together."""

    def two_stages(y, p):
        k = _unbound(y, p)
        return y + 0.1 * _unbound(y + 0.05 * k, p)

    y, p = torch.randn(ROWS, 2), torch.randn(ROWS, 2)
    nodes = list(_rewritten(two_stages, y, p).graph.nodes)
    assert sum(n.target is aten.cat.default for n in nodes) == 1
    assert not any(n.target in (aten.stack.default, aten.unbind.int) for n in nodes)


def test_wide_and_short_matrices_are_left_alone():
    for shape in ((ROWS, NARROW + 1), (4, 2), (ROWS, 2, 2)):
        y = torch.randn(shape)
        graph = make_fx(lambda y: (y * 2).sin() + torch.cat([y[:, :1], y[:, 1:]], 1), tracing_mode="fake")(y)
        before = str(graph.graph)
        column_pass(graph.graph)
        assert str(graph.graph) == before


def test_what_is_carried_by_columns():
    assert takes_columns(True, ROWS, 2) and takes_columns(True, ROWS, NARROW)
    assert not takes_columns(False, ROWS, 2) and not takes_columns(True, ROWS, 1)
    assert not takes_columns(True, ROWS, NARROW + 1) and not takes_columns(True, 10, 2)
    x = torch.randn(ROWS, 3)
    turned = column_major(x, ROWS)
    assert torch.equal(turned, x) and turned.stride() == (1, ROWS)
    assert column_major(x, ROWS + 1) is x
    assert "post_grad_custom_pre_pass" in pass_options(column_pass)


@pytest.mark.compile
@pytest.mark.parametrize("method", [pytest.param("dopri5", marks=pytest.mark.slow), "rk4"])
def test_compiled_ensembles(method):
    """Samples, own spans and tolerances, values and gradients in everything, against the eager loop."""
    p = (torch.tensor([1.5, 1.0, 3.0, 1.0]) * (1 + 0.1 * torch.rand(ROWS, 4))).requires_grad_()
    u = torch.ones(ROWS, 2, requires_grad=True)
    options = {"first_step": 0.1} if method == "rk4" else {"rtol": torch.tensor([1e-6, 1e-8]), "atol": 1e-9}
    results, walked = [], []
    for compiled in (False, True):
        end = torch.linspace(1.0, 2.0, ROWS, requires_grad=True)
        sol = solve_ivp(
            lotka_volterra, (0.0, end), u, (p,), t_eval=[0.0, 0.4, 0.41, 0.9], batched=True, compile=compiled, method=method, **options
        )
        loss = sol.y.square().sum() + sol.y[-1].prod(-1).sum()
        results.append((sol.y.detach(), *torch.autograd.grad(loss, (p, u))))
        steps = solve_ivp(lotka_volterra, (0.0, end), u, (p,), t_eval="steps", batched=True, compile=compiled, method=method, **options)
        walked.append((steps.t.detach(), steps.y.detach(), *torch.autograd.grad(steps.y.nan_to_num().square().sum(), (p, u, end))))
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-8, atol=1e-10)
    # powers in single precision: sizes of adaptive steps agree to so much only, and with them the places of the states
    for eager, compiled in zip(*walked, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-8 if method == "rk4" else 1e-3, atol=1e-10, equal_nan=True)


@pytest.mark.compile
def test_compiled_ensemble_of_a_closure():
    """What a closure captured gets its gradient by way of autograd's own backward."""

    def solve(compiled):
        w = torch.linspace(0.1, 1.0, ROWS).requires_grad_()

        def fun(t, y):
            return torch.stack([y[:, 1], -w * y[:, 0]], -1)

        y = solve_ivp(fun, (0.0, 2.0), torch.ones(ROWS, 2), batched=True, compile=compiled).y[-1]
        return y.detach(), *torch.autograd.grad(y.square().sum(), w)

    for eager, compiled in zip(solve(False), solve(True), strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-8, atol=1e-10)


def test_many_samples_in_a_step():
    """More samples than steps, repeated ones and both ends among them: each lies on the solution."""
    t = torch.cat([torch.zeros(2), torch.linspace(0.0, 3.0, 200), torch.full((2,), 3.0)])
    rate = torch.rand(5, 1) + 0.5
    for first, last in ((0.0, 3.0), (3.0, 0.0)):
        times = t if last > first else t.flip(0)
        sol = solve_ivp(lambda s, y: -rate * y, (first, last), torch.ones(5, 1), t_eval=times, batched=True, rtol=1e-9, atol=1e-12)
        exact = torch.exp(-rate * (times[:, None, None] - first))
        assert sol.stats.n_steps.max() < 150
        assert torch.allclose(sol.y, exact, rtol=1e-6)
