"""Jacobian strategies against closed forms, finite arithmetic done by NumPy, and plain autograd."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from adjoint.errors import InvalidInput, UnsupportedCombination
from adjoint.linalg import LinearOperator, SparseMatrix
from adjoint.linalg.coloring import Coloring, color_columns, color_rows
from adjoint.linalg.sparsity import SparsityPattern, detect_pattern
from adjoint.system.jacobians import DenseJacobian, forward_products, jacobian_operator, jvp, reverse_products, vjp
from adjoint.system.jacobians_sparse import GivenJacobian, SparseJacobian, choose_jacobian

from ..helpers.jacobian_functions import PATTERN, RAD, B, N, points, rad, rad_jacobian, wave, wave_jacobian

MODES = [DenseJacobian(m) for m in ("auto", "forward", "reverse", "rows")] + [DenseJacobian("forward", 2), DenseJacobian("reverse", 4)]


# --- dense


@pytest.mark.parametrize("strategy", MODES, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_dense_is_the_closed_form(strategy, grad):
    x = points()
    with torch.set_grad_enabled(grad):
        found = strategy(wave, x)
    torch.testing.assert_close(found, wave_jacobian(x), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse"])
@pytest.mark.parametrize("shape", [(7, 2), (2, 7)])
@pytest.mark.parametrize("grad", [True, False])
def test_dense_of_other_shapes(mode, shape, grad):
    a = torch.randn(*shape)
    x = torch.randn(B, shape[1])
    with torch.set_grad_enabled(grad):
        found = DenseJacobian(mode)(lambda x: (x @ a.T) ** 2, x)
    torch.testing.assert_close(found, 2 * (x @ a.T)[:, :, None] * a)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse", "rows"])
def test_dense_float32_and_complex(mode):
    x = points().float()
    assert DenseJacobian(mode)(wave, x).dtype == torch.float32
    z = torch.complex(points(), points().flip(1))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(DenseJacobian(mode)(wave, z), wave_jacobian(z))


def test_real_to_complex_goes_forward():
    x = points()
    turn = torch.complex(torch.tensor(2.0), torch.tensor(1.0))
    expected = torch.diag_embed(2 * x * turn)
    torch.testing.assert_close(DenseJacobian()(lambda x: turn * x**2, x), expected)
    with pytest.raises(InvalidInput, match="reverse mode"):
        DenseJacobian("reverse")(lambda x: turn * x**2, x)
    with pytest.raises(InvalidInput, match="holomorphic"):
        DenseJacobian()(lambda z: z.abs(), x + 0j)


@pytest.mark.parametrize("mode", ["auto", "forward", "reverse", "rows"])
@pytest.mark.parametrize("grad", [True, False])
def test_a_constant_function_has_no_entries(mode, grad):
    with torch.set_grad_enabled(grad):
        assert torch.equal(DenseJacobian(mode)(lambda x: torch.ones_like(x), points()), torch.zeros(B, N, N))


def test_no_graph_where_none_is_wanted():
    p = torch.tensor(2.0, requires_grad=True)
    for strategy in MODES:
        with torch.no_grad():
            assert not strategy(lambda x: wave(x) * p, points()).requires_grad
        assert strategy(lambda x: wave(x) * p, points()).requires_grad
    for mode in ("auto", "forward", "reverse", "rows"):
        assert not DenseJacobian(mode, differentiable=False)(lambda x: wave(x) * p, points()).requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_functions_that_vmap_cannot_map(grad):
    def f(x):
        out = torch.zeros_like(x)
        out[:, 1:] = x[:, :-1] ** 2
        out[:, 0] += x[:, 0]
        return out

    x = points()
    expected = torch.diag_embed(2 * x[:, :-1], offset=-1)
    expected[:, 0, 0] = 1
    with torch.set_grad_enabled(grad):
        for mode in ("forward", "reverse"):
            torch.testing.assert_close(DenseJacobian(mode)(f, x), expected)
        torch.testing.assert_close(SparseJacobian(detect_pattern(f, x))(f, x).dense(), expected)


class Cube(torch.autograd.Function):
    """Without forward mode and without a vmap rule."""

    @staticmethod
    def forward(x):
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, w):
        return 3 * ctx.saved_tensors[0] ** 2 * w


class CubeOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, w):
        return 3 * ctx.saved_tensors[0] ** 2 * w


@pytest.mark.parametrize("grad", [True, False])
def test_custom_functions_without_forward_mode(grad):
    x, v = points(), torch.randn(B, N)
    expected = torch.diag_embed(3 * x**2)
    with torch.set_grad_enabled(grad):
        for mode in ("auto", "forward", "reverse"):
            torch.testing.assert_close(DenseJacobian(mode)(Cube.apply, x), expected)
        torch.testing.assert_close(jvp(Cube.apply, x, v), 3 * x**2 * v)
        torch.testing.assert_close(SparseJacobian(detect_pattern(Cube.apply, x))(Cube.apply, x).dense(), expected)
        torch.testing.assert_close(jacobian_operator(Cube.apply, x).matvec(v), 3 * x**2 * v)


def test_old_custom_functions_in_the_quick_path():
    x, v = points(), torch.randn(B, N)
    with torch.no_grad():
        torch.testing.assert_close(DenseJacobian()(CubeOnce.apply, x), torch.diag_embed(3 * x**2))
    torch.testing.assert_close(jacobian_operator(CubeOnce.apply, x).rmatvec(v), 3 * x**2 * v)


def test_dense_wrong_arguments():
    with pytest.raises(InvalidInput, match="mode='sideways'"):
        DenseJacobian("sideways")
    with pytest.raises(UnsupportedCombination, match="chunk_size=2"):
        DenseJacobian("rows", 2)
    with pytest.raises(InvalidInput, match="square"):
        DenseJacobian("rows")(lambda x: x[:, :2], points())
    for mode in ("auto", "forward"):
        with pytest.raises(InvalidInput, match=r"\(B, n\)"):
            DenseJacobian(mode)(lambda x: x.sum(), points())


# --- sparse


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("grad", [True, False])
def test_compressed_is_the_dense_one(by_rows, chunk, grad):
    n = 7
    f, x = rad(n), torch.rand(2, n * n)
    pattern = detect_pattern(f, x)
    coloring = (color_rows if by_rows else color_columns)(pattern)
    strategy = SparseJacobian(pattern, coloring, chunk_size=chunk)
    with torch.set_grad_enabled(grad):
        found = strategy(f, x)
    assert found.values.shape == (2, pattern.nnz)
    truth = torch.stack([rad_jacobian(row, n) for row in x])
    torch.testing.assert_close(found.dense(), truth, rtol=1e-13, atol=1e-11)
    assert strategy.check(f, x)
    again = strategy(f, 0.5 * x)  # kept pattern and colouring
    torch.testing.assert_close(again.dense()[1], rad_jacobian(0.5 * x[1], n), rtol=1e-13, atol=1e-11)


def test_sparse_of_other_shapes_and_types():
    def f(x):
        return torch.cat([x[:, 1:] * x[:, :-1], x[:, :2] ** 2, x.sum(1, keepdim=True)], 1)

    for dtype in (torch.float32, torch.float64, torch.complex128):
        x = points().to(dtype)
        x = x + 1j * points().flip(0) if dtype.is_complex else x
        pattern = detect_pattern(f, x)
        assert pattern.shape == (N + 2, N)
        for color in (color_columns, color_rows):
            found = SparseJacobian(pattern, color(pattern))(f, x)
            expected = torch.zeros(B, N + 2, N, dtype=dtype)
            for i in range(N - 1):
                expected[:, i, i], expected[:, i, i + 1] = x[:, i + 1], x[:, i]
            expected[:, N - 1, 0], expected[:, N, 1], expected[:, N + 1] = 2 * x[:, 0], 2 * x[:, 1], 1
            assert found.dtype == dtype and found.shape == (N + 2, N)
            torch.testing.assert_close(found.dense(), expected)


def test_a_pattern_that_lacks_entries_is_noticed():
    x = points()
    full = detect_pattern(wave, x)
    thin = SparsityPattern(full.indices[:, 1:], full.shape)
    assert SparseJacobian(full).check(wave, x)
    assert not SparseJacobian(thin).check(wave, x)
    with pytest.raises(InvalidInput, match="lacks entries"):
        choose_jacobian(wave, x, jac_sparsity=thin)


def test_sparse_wrong_arguments():
    pattern = detect_pattern(wave, points())
    with pytest.raises(InvalidInput, match="two lines"):
        SparseJacobian(pattern, Coloring(torch.zeros(N, dtype=torch.int64), 1))
    with pytest.raises(InvalidInput, match="colours for"):
        SparseJacobian(pattern, Coloring(torch.zeros(2, dtype=torch.int64), 1))
    with pytest.raises(InvalidInput, match=r"x has shape \(3, 7\)"):
        SparseJacobian(pattern)(wave, points(n=7))
    with pytest.raises(InvalidInput, match="f maps"):
        SparseJacobian(pattern)(lambda x: x[:, :2], points())


# --- derivatives through the entries

STRATEGIES = {
    "forward": lambda x: DenseJacobian("forward"),
    "reverse": lambda x: DenseJacobian("reverse"),
    "rows": lambda x: DenseJacobian("rows"),
    "columns": lambda x: SparseJacobian(PATTERN, color_columns(PATTERN)),
    "colored rows": lambda x: SparseJacobian(PATTERN, color_rows(PATTERN)),
}


def entries(strategy, f, x):
    found = strategy(f, x)
    return found.dense() if isinstance(found, SparseMatrix) else found


@pytest.mark.parametrize("kind", STRATEGIES)
def test_derivatives_of_the_entries(kind):
    """``s = sum_b w . J(x, p)`` with ``J = p cos(x_i) x_{i+1}, p sin(x_i)``: gradients in closed form, by every kind of derivative."""
    strategy, x, p = STRATEGIES[kind](None), points(), torch.tensor(1.5)

    def s(x, p):
        return entries(strategy, lambda u: p * wave(u), x).sum()

    ds_dx = p * (-x.sin() * x.roll(-1, 1) + x.roll(1, 1).cos() + x.cos())
    ds_dp = (x.cos() * x.roll(-1, 1) + x.sin()).sum()
    leaf_x, leaf_p = x.clone().requires_grad_(), p.clone().requires_grad_()
    gx, gp = torch.autograd.grad(s(leaf_x, leaf_p), (leaf_x, leaf_p), create_graph=True)
    torch.testing.assert_close(gx, ds_dx)
    torch.testing.assert_close(gp, ds_dp)
    (cross,) = torch.autograd.grad(gp, leaf_x)
    torch.testing.assert_close(cross, ds_dx / p)
    torch.testing.assert_close(torch.func.grad(s, 1)(x, p), ds_dp)
    torch.testing.assert_close(torch.func.jvp(s, (x, p), (torch.zeros_like(x), torch.ones(())))[1], ds_dp)
    torch.testing.assert_close(torch.func.jacfwd(torch.func.grad(s, 0), 1)(x, p), ds_dx / p)
    torch.testing.assert_close(torch.vmap(lambda q: s(x, q))(torch.arange(3.0)), torch.arange(3.0) * ds_dp)
    torch.testing.assert_close(torch.vmap(torch.func.grad(s, 1), (0, None))(torch.stack([x, 0 * x]), p)[0], ds_dp)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p, torch.ones(()))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(s(x, dual)).tangent, ds_dp)
    hessian = torch.func.hessian(s)(x, p).reshape(B * N, B * N)
    plain = torch.autograd.functional.hessian(lambda u: (p * (u.cos() * u.roll(-1, 1) + u.sin())).sum(), x)
    torch.testing.assert_close(hessian, plain.reshape(B * N, B * N))


@pytest.mark.parametrize("operator", ["det", "solve"])
@pytest.mark.parametrize("kind", STRATEGIES)
def test_operators_whose_forward_mode_cannot_be_differentiated(kind, operator):
    """PyTorch gives ``torch.func.grad`` of ``torch.func.jvp`` of these without an error, and wrong."""

    def f(u, p):
        beside = u.roll(-1, 1)
        matrix = torch.stack([torch.stack([u.exp(), p * beside], -1), torch.stack([-beside, 2 + u * p], -1)], -2)
        return torch.linalg.det(matrix) if operator == "det" else torch.linalg.solve(matrix, torch.stack([u, beside], -1))[..., 0]

    strategy, x, p = STRATEGIES[kind](None), points(), torch.tensor(1.5, requires_grad=True)
    weights = torch.rand(B, N, N)
    assert torch.autograd.gradcheck(lambda x, p: (entries(strategy, lambda u: f(u, p), x) * weights).sum(), (x.requires_grad_(), p))


def test_derivative_by_parameters_of_a_large_pattern():
    n = 6
    f, x = rad(n), torch.rand(1, n * n)
    strategy = SparseJacobian(detect_pattern(f, x))
    p = torch.tensor(RAD, requires_grad=True)
    v = torch.randn(1, n * n)
    (mine,) = torch.autograd.grad(strategy(lambda u: f(u, tuple(p)), x).matvec(v).square().sum(), p)
    (truth,) = torch.autograd.grad(
        (torch.autograd.functional.jacobian(lambda u: f(u, tuple(p)), x, create_graph=True)[0, :, 0] @ v[0]).square().sum(), p
    )
    torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-8)


# --- products and operators


@pytest.mark.parametrize("grad", [True, False])
def test_products(grad):
    with torch.set_grad_enabled(grad):
        _products()


def _products():
    x, v = points(), torch.randn(B, N)
    jac = wave_jacobian(x)
    torch.testing.assert_close(jvp(wave, x, v), torch.einsum("bij,bj->bi", jac, v))
    torch.testing.assert_close(vjp(wave, x, v), torch.einsum("bij,bi->bj", jac, v))
    seeds = torch.randn(4, N)
    for differentiable in (True, False, None):
        torch.testing.assert_close(forward_products(wave, x, seeds, 3, differentiable), torch.einsum("bij,kj->kbi", jac, seeds))
        torch.testing.assert_close(reverse_products(wave, x, seeds, 3, differentiable), torch.einsum("bij,ki->kbj", jac, seeds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_operator(dtype):
    x = points().to(dtype) * (1 + 0.5j if dtype.is_complex else 1)
    v = torch.randn(B, N, dtype=dtype)
    jac = wave_jacobian(x)
    operator = jacobian_operator(wave, x)
    assert isinstance(operator, LinearOperator) and (operator.n, operator.rows, operator.dtype) == (N, B, dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                torch.testing.assert_close(operator.matvec(v), torch.einsum("bij,bj->bi", jac, v))
                torch.testing.assert_close(operator.rmatvec(v), torch.einsum("bij,bi->bj", jac, v))
                assert not operator.matvec(v).requires_grad


def test_operator_calls_f_once():
    calls = []

    def f(x):
        calls.append(1)
        return wave(x)

    operator = jacobian_operator(f, points())
    for _ in range(3):
        operator.matvec(points())
        operator.rmatvec(points())
    assert len(calls) == 1


def test_operator_of_linear_and_constant_functions():
    a, v = torch.randn(N, N), torch.randn(B, N)
    operator = jacobian_operator(lambda x: x @ a.T, points())
    torch.testing.assert_close(operator.matvec(v), v @ a.T)
    torch.testing.assert_close(operator.rmatvec(v), v @ a)
    constant = jacobian_operator(lambda x: torch.ones_like(x), points())
    assert torch.equal(constant.matvec(v), 0 * v) and torch.equal(constant.rmatvec(v), 0 * v)
    with pytest.raises(InvalidInput, match="square"):
        jacobian_operator(lambda x: x[:, 1:], points())


def test_operator_inside_of_transforms():
    x, v = points(), torch.randn(B, N)

    def s(p):
        operator = jacobian_operator(lambda u: p * wave(u), x)
        return (operator.matvec(v) + operator.rmatvec(v)).sum()

    jac = wave_jacobian(x)
    expected = (torch.einsum("bij,bj->bi", jac, v) + torch.einsum("bij,bi->bj", jac, v)).sum()
    torch.testing.assert_close(torch.func.grad(s)(torch.tensor(2.0)), expected)
    torch.testing.assert_close(torch.vmap(s)(torch.arange(3.0)), torch.arange(3.0) * expected)


# --- given Jacobians


def test_given_in_all_forms():
    x = points()
    jac = wave_jacobian(x)
    torch.testing.assert_close(GivenJacobian(wave_jacobian)(wave, x), jac)
    one = x[:1]
    torch.testing.assert_close(GivenJacobian(lambda u: wave_jacobian(u)[0])(wave, one), jac[:1])
    for convert in (torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_sparse_csc):
        found = GivenJacobian(lambda u, c=convert: c(wave_jacobian(u)[0]))(wave, one)
        assert isinstance(found, SparseMatrix)
        torch.testing.assert_close(found.dense(), jac[:1])
        key = found.indices[0] * N + found.indices[1]
        assert (key.diff() > 0).all()
    rows, columns = PATTERN.indices
    for given in (lambda u: wave_jacobian(u)[:, rows, columns], wave_jacobian):
        found = GivenJacobian(given, PATTERN)(wave, x)
        assert isinstance(found, SparseMatrix)
        torch.testing.assert_close(found.dense(), jac)
    found = GivenJacobian(lambda u: SparseMatrix(PATTERN.indices, wave_jacobian(u)[:, rows, columns], (N, N)))(wave, x)
    torch.testing.assert_close(found.dense(), jac)
    constant = torch.randn(N, N)
    torch.testing.assert_close(GivenJacobian(constant)(wave, x), constant.expand(B, N, N))
    shared = GivenJacobian(constant.to_sparse())(wave, x)
    assert isinstance(shared, SparseMatrix) and shared.values.shape == (N * N,)
    torch.testing.assert_close(shared.matvec(x), x @ constant.T)


@pytest.mark.parametrize("layout", ["dense", "coo", "values"])
def test_derivatives_through_given_entries(layout):
    x, p = points(1), torch.tensor(1.5, requires_grad=True)
    rows, columns = PATTERN.indices

    def jac(u):
        values = p * torch.where(rows == columns, u[:, rows].cos() * u[:, (rows + 1) % N], u[:, rows].sin())
        if layout == "values":
            return values
        if layout == "coo":
            return torch.sparse_coo_tensor(PATTERN.indices, values[0], (N, N))
        return torch.zeros(1, N * N).index_add(1, rows * N + columns, values).reshape(1, N, N)

    strategy = GivenJacobian(jac, PATTERN if layout == "values" else None)
    v = torch.randn(1, N)
    found = strategy(wave, x)
    product = found.matvec(v) if isinstance(found, SparseMatrix) else torch.einsum("bij,bj->bi", found, v)
    (gradient,) = torch.autograd.grad(product.sum(), p)
    torch.testing.assert_close(gradient, torch.einsum("bij,bj->bi", wave_jacobian(x), v).sum())


def test_a_wrong_given_jacobian_is_noticed():
    with pytest.warns(UserWarning, match="not the Jacobian of f"):
        choose_jacobian(wave, points(), jac=lambda x: 1.01 * wave_jacobian(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_jacobian(
            lambda x: torch.cat([x**2, x], 1), points(), jac=lambda x: torch.cat([torch.diag_embed(2 * x), torch.eye(N).expand(B, N, N)], 1)
        )


def test_given_wrong_results_are_named():
    x = points()
    with pytest.raises(InvalidInput, match=r"\(3, 6, 5\)"):
        GivenJacobian(lambda u: torch.zeros(B, N, N - 1))(wave, x)
    with pytest.raises(InvalidInput, match=r"\(6, 6\)"):
        GivenJacobian(lambda u: torch.zeros(N, N))(wave, x)
    with pytest.raises(InvalidInput, match="float32"):
        GivenJacobian(lambda u: torch.zeros(B, N, N, dtype=torch.float32))(wave, x)
    with pytest.raises(InvalidInput, match="ndarray"):
        GivenJacobian(lambda u: np.zeros((B, N, N)))(wave, x)
    with pytest.raises(InvalidInput, match="pattern"):
        GivenJacobian(lambda u: torch.eye(N).to_sparse())(wave, x)
    with pytest.raises(InvalidInput, match="outside"):
        GivenJacobian(lambda u: torch.ones(B, N, N), PATTERN)(wave, x)
    with pytest.raises(InvalidInput, match="values"):
        GivenJacobian(lambda u: torch.ones(B, 5), PATTERN)(wave, x)
    with pytest.raises(InvalidInput, match="function or a tensor"):
        GivenJacobian("2-point")


# --- the choice
