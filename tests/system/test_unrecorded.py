"""Operators whose backward is right but not recorded, sparse tensors, and hooks: what is asked of them beside first derivatives."""

from __future__ import annotations

import math

import pytest
import torch

import adjoint

pytestmark = pytest.mark.users_defaults
F64 = torch.float64


class ByNumpy(torch.autograd.Function):
    """``p sin y``, whose derivatives are computed outside of PyTorch."""

    @staticmethod
    def forward(p, y):
        return p * torch.sin(y)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, bar):
        p, y = ctx.saved_tensors
        with torch.no_grad():
            return (bar * torch.sin(y)).sum_to_size(p.shape), bar * p * torch.cos(y)

    @staticmethod
    def vmap(info, in_dims, p, y):
        p, y = (x if d is None else x.movedim(d, 0) for x, d in zip((p, y), in_dims, strict=True))
        if p.dim() and p.dim() < y.dim():
            p = p.unsqueeze(-1)
        return ByNumpy.apply(p, y), 0


def by_values(p, y):
    """The same by a sparse matrix that is made of its value."""
    matrix = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), p.reshape(1), (1, 1), check_invariants=False)
    return torch.sparse.mm(matrix, torch.sin(y).reshape(1, -1)).reshape(y.shape)


def partly(p, y):
    """Half of it is recorded."""
    return 0.5 * p * torch.sin(y) + ByNumpy.apply(0.5 * p, y)


def ivp(**options):
    return lambda op, p: adjoint.solve_ivp(
        lambda t, y, p: -op(p, y), (0.0, 1.0), torch.tensor([0.7], dtype=F64), (p,), rtol=1e-8, atol=1e-10, **options
    ).y[-1].sum()  # fmt: skip


def root(op, p):
    return adjoint.solve_root(lambda x, p: x + 0.5 * op(p, x) - 1, torch.ones(1, dtype=F64), (p,)).x.sum()


def dae(op, p):
    def residual(t, y, yp, p):
        return torch.cat([yp[:1] + y[1:], y[1:] - op(p, y[:1])])

    return adjoint.solve_dae(residual, (0.0, 1.0), torch.tensor([0.7, 0.0], dtype=F64), args=(p,), rtol=1e-7).y[-1, 0]


DOORS = {
    "recorded": ivp(),
    "discrete": ivp(gradient=adjoint.DiscreteAdjoint(keep_bytes=0)),
    "backprop": ivp(gradient=adjoint.Backprop()),
    "interpolating": ivp(gradient=adjoint.InterpolatingAdjoint()),
    "esdirk": ivp(method="kvaerno5"),
    "rosenbrock": ivp(method="rodas5p"),
    "bdf": ivp(method="bdf"),
    "root": root,
    "dae": dae,
}
OPERATORS = {"by NumPy": ByNumpy.apply, "by values": by_values, "partly": partly}


def first(door, op):
    p = torch.tensor(0.8, dtype=F64, requires_grad=True)
    return torch.autograd.grad(door(op, p), p)[0]


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("door", DOORS)
def test_first_derivatives_and_no_others(door, op):
    second, door, op = door == "rosenbrock", DOORS[door], OPERATORS[op]
    if not second:
        # whose adjoint goes by the derivative of the Jacobian
        expected = first(door, lambda p, y: p * torch.sin(y))
        torch.testing.assert_close(first(door, op), expected, rtol=1e-6, atol=1e-8)
    p = torch.tensor(0.8, dtype=F64, requires_grad=True)
    with pytest.raises(adjoint.UnsupportedCombination, match="autograd records nothing"):
        # PyTorch would leave out a part of the second derivative
        torch.autograd.grad(door(op, p), p, create_graph=not second)


@pytest.mark.parametrize("op", ["by values", "partly"])
def test_forward_sensitivity(op):
    """The first derivative itself goes by the derivative of a backward."""
    # older versions of PyTorch take no sparse tensors under transforms at all
    with pytest.raises(adjoint.UnsupportedCombination, match=r"records nothing|sparse tensors where PyTorch takes none"):
        first(ivp(gradient=adjoint.ForwardSensitivity()), OPERATORS[op])


def test_transforms():
    """One that takes first derivatives does; one in another does not."""
    value = lambda p: ivp()(ByNumpy.apply, p)  # noqa: E731
    p = torch.tensor(0.8, dtype=F64)
    torch.testing.assert_close(torch.func.grad(value)(p), first(ivp(), lambda p, y: p * torch.sin(y)), rtol=1e-6, atol=1e-8)
    with pytest.raises(adjoint.UnsupportedCombination, match="autograd records nothing"):
        torch.func.grad(torch.func.grad(value))(p)
    with pytest.raises(adjoint.UnsupportedCombination, match="forward mode"):
        torch.func.jvp(value, (p,), (torch.ones_like(p),))


@pytest.mark.parametrize("op", OPERATORS)
def test_objectives(op):
    op, p = OPERATORS[op], torch.tensor([0.8, 0.3], dtype=F64)

    def objective(op):
        return adjoint.SteadyStateObjective(
            lambda x, p: x.square().sum() + p.prod(), lambda x, p: x + 0.5 * op(p[0], x) + p[1] * x**2 - 1, torch.ones(1, dtype=F64)
        )

    found, expected = objective(op), objective(lambda p, y: p * torch.sin(y))
    torch.testing.assert_close(found.gradient(p), expected.gradient(p), rtol=1e-9, atol=1e-12)
    for ask in (lambda o: o.hessian(p), lambda o: o.state_jacobian(p), lambda o: o.hvp(p, p)):
        assert bool(torch.isfinite(torch.as_tensor(ask(expected))).all())
        with pytest.raises(adjoint.UnsupportedCombination, match="autograd records nothing"):
            ask(objective(op))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_lower_precision_inside(kind):
    """Its rounding is not taken for something that is missing."""
    weight = torch.linspace(-1, 1, 16, dtype=F64).reshape(4, 4).requires_grad_()

    def fun(t, y):
        return torch.tanh((weight.to(kind) @ y.to(kind).unsqueeze(-1)).squeeze(-1)).to(y.dtype) - y

    for options in ({}, {"gradient": adjoint.DiscreteAdjoint(keep_bytes=0)}, {"gradient": adjoint.ForwardSensitivity()}):
        y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.linspace(0.3, 1, 4, dtype=F64), rtol=1e-2, atol=1e-2, max_steps=30, **options).y[-1]
        (slope,) = torch.autograd.grad(y.sum(), weight, create_graph=True)
        assert bool(torch.isfinite(torch.autograd.grad(slope.square().sum(), weight)[0]).all())


def test_derivatives_that_cancel():
    """At the middle of a logistic curve."""
    for method in ("tsit5", "rodas5p"):
        y0 = torch.tensor([0.5], dtype=F64, requires_grad=True)
        y = adjoint.solve_ivp(lambda t, y: y * (1 - y), (0.0, 1.0), y0, method=method, rtol=1e-8, atol=1e-10).y[-1].sum()
        (slope,) = torch.autograd.grad(y, y0, create_graph=True)
        # y = y0 e / (1 + y0 (e - 1)) at t = 1
        e, s = math.e, 1 + 0.5 * (math.e - 1)
        assert float(slope) == pytest.approx(e / s**2, rel=1e-6)
        assert float(torch.autograd.grad(slope.sum(), y0)[0]) == pytest.approx(-2 * e * (e - 1) / s**3, rel=1e-5)


# ---- sparse tensors


def rotation(layout):
    dense = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=F64)
    return {"coo": dense.to_sparse_coo, "csr": dense.to_sparse_csr}[layout]()


@pytest.mark.parametrize("options", [{}, {"gradient": adjoint.DiscreteAdjoint(keep_bytes=0)}, {"method": "kvaerno5"}, {"compile": True}])
@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_constants(layout, options):
    """Native code does not know them."""
    A, k = rotation(layout), torch.tensor(0.5, dtype=F64, requires_grad=True)

    def fun(t, y, k):
        return k * (A @ y.unsqueeze(-1)).squeeze(-1)

    y = adjoint.solve_ivp(fun, (0.0, 1.0), torch.tensor([1.0, 0.0], dtype=F64), (k,), rtol=1e-8, atol=1e-10, **options).y[-1]
    assert y.tolist() == pytest.approx([math.cos(0.5), math.sin(0.5)], abs=1e-6)
    assert float(torch.autograd.grad(y[0], k)[0]) == pytest.approx(-math.sin(0.5), abs=1e-6)


def test_sparse_gradients():
    table = torch.nn.Embedding(4, 2, sparse=True, dtype=F64)
    where = torch.tensor([1, 3])
    expected = None
    for sparse in (False, True):
        table.sparse = sparse
        y0 = torch.zeros(2, 2, dtype=F64)
        sol = adjoint.solve_ivp(lambda t, y: table(where) - y, (0.0, 1.0), y0, gradient=adjoint.DiscreteAdjoint(keep_bytes=0))
        (found,) = torch.autograd.grad(sol.y[-1].square().sum(), table.weight)
        assert found.is_sparse == sparse
        expected = found if expected is None else expected
        torch.testing.assert_close(found.to_dense() if sparse else found, expected)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda A: adjoint.solve_ivp(lambda t, y, A: (A @ y.unsqueeze(-1)).squeeze(-1), (0.0, 1.0), torch.ones(2), (A,)), "capture it"),
        (lambda A: adjoint.solve_ivp(lambda t, y: (A.requires_grad_() @ y.unsqueeze(-1))[:, 0], (0.0, 1.0), torch.ones(2)), "its values"),
        (lambda A: adjoint.solve_root(lambda x, A: (A @ x.unsqueeze(-1)).squeeze(-1) - 1, torch.ones(2), (A,)), "capture it"),
    ],
)
def test_inputs(call, word):
    with pytest.raises(adjoint.UnsupportedCombination, match=word):
        call(torch.eye(2).to_sparse())


def test_states():
    with pytest.raises(adjoint.InvalidInput, match="a state is dense"):
        adjoint.solve_ivp(lambda t, y: -y, (0.0, 1.0), torch.eye(2).to_sparse())
    with pytest.raises(adjoint.UnsupportedCombination, match="a dense tensor"):
        adjoint.solve_ivp(lambda t, y: (-y).to_sparse(), (0.0, 1.0), torch.eye(2))


# ---- hooks


@pytest.mark.parametrize("method", ["tsit5", "kvaerno5", "rodas5p", "radau5", "bdf"])
@pytest.mark.parametrize("hook", ["tensor", "module"])
def test_hooks_that_change_gradients(hook, method):
    """A hook on what ``fun`` returns: the adjoint is that of ``l' = -2 l f_y``, by all methods."""

    class Decay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.k = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=F64))

        def forward(self, t, y):
            out = -self.k * y
            if hook == "tensor" and out.requires_grad:
                out.register_hook(lambda bar: 2 * bar)
            return out

    fun = Decay()
    if hook == "module":
        fun.register_full_backward_pre_hook(lambda module, bars: tuple(2 * bar for bar in bars))
    k, T = fun.k.detach(), 0.7
    y = adjoint.solve_ivp(fun, (0.0, T), torch.ones(2, dtype=F64), method=method, rtol=1e-6, atol=1e-8).y[-1]
    (found,) = torch.autograd.grad(y.sum(), fun.k)
    # the integral of 2 l (-y) with l = exp(-2 k (T - t)), y = exp(-k t)
    expected = -2 * (torch.exp(-k * T) - torch.exp(-2 * k * T)) / k
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
