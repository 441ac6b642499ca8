"""Traced sparsity patterns against dense Jacobians: never too small, and exact where it is said to be."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from adjoint.errors import InvalidInput
from adjoint.linalg import tracing
from adjoint.linalg.sparsity import PatternTooDense, SparsityPattern, detect_pattern

from ..helpers.sparsity_functions import EXACT, GRID, LOOSE, N, banded, constant, in_place_views, mask_of, put, truth


@pytest.mark.parametrize("name", EXACT)
def test_traced_pattern_is_exact(name):
    f, x = EXACT[name], constant(N)
    found = mask_of(detect_pattern(f, x, method="trace"))
    expected = truth(f, x)
    assert found.shape == expected.shape
    assert not (expected & ~found).any(), "too sparse"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", [*EXACT, *LOOSE])
def test_inference_mode_gives_no_smaller_patterns(name):
    f, x = {**EXACT, **LOOSE}[name], constant(N)
    if name == "autograd inside":
        pytest.skip("autograd does not run in inference mode")
    outside = f(x).detach()
    with torch.inference_mode():
        if not torch.allclose(f(x), outside):
            pytest.skip("this PyTorch takes no derivatives in inference mode")
        inner = detect_pattern(f, x, method="trace")
    assert inner.contains(detect_pattern(f, x, method="trace"))


@pytest.mark.parametrize("name", LOOSE)
def test_traced_pattern_is_never_too_small(name):
    f, x = LOOSE[name], constant(N)
    found, expected = mask_of(detect_pattern(f, x, method="trace")), truth(f, x)
    assert found.shape == expected.shape
    assert not (expected & ~found).any()


@pytest.mark.parametrize("name", ["pointwise", "views", "sum", "mm constant", "zeros and writes", "conv2d", "where"])
def test_values_do_not_matter(name):
    f = EXACT[name]
    at_zero = detect_pattern(f, torch.zeros(N), method="trace")
    assert torch.equal(at_zero.indices, detect_pattern(f, constant(N), method="trace").indices)


def test_products_at_zero_count_both_factors():
    pattern = detect_pattern(lambda x: x[:1] * x[1:2], torch.zeros(2), method="trace")
    assert pattern.indices.tolist() == [[0, 0], [0, 1]]


def test_zeros_of_a_parameter_are_accidents():
    weight = torch.zeros(3, 3, requires_grad=True)
    assert detect_pattern(lambda x: weight @ x, torch.ones(3), method="trace").nnz == 9
    assert detect_pattern(lambda x: F.linear(x, weight.T.clone()), torch.ones(1, 3), method="trace").nnz == 9
    assert detect_pattern(lambda x: weight.detach().clone() @ x, torch.ones(3), method="trace").nnz in (0, 9)
    assert detect_pattern(lambda x: torch.zeros(3, 3) @ x, torch.ones(3), method="trace").nnz == 0


def test_zeros_of_named_parameters_are_accidents():
    p, fixed = torch.zeros(3, 3), torch.zeros(3, 3)
    f = lambda x: (p.T * 2) @ x + fixed @ x  # noqa: E731
    assert detect_pattern(f, torch.ones(3), method="trace").nnz == 0
    assert detect_pattern(f, torch.ones(3), method="trace", parameters=[p]).nnz == 9


@pytest.mark.parametrize("method", ["trace", "numeric"])
def test_functions_that_hold_tensors_of_all_rows(method):
    p = torch.rand(4, 5)
    for f in (lambda x: p * x + x.roll(1, -1), lambda x: torch.stack([p[b] * x[b] + x[b].roll(1) for b in range(4)])):
        found = mask_of(detect_pattern(f, torch.rand(4, 5), method=method))
        assert torch.equal(found, torch.eye(5, dtype=torch.bool) | torch.eye(5, dtype=torch.bool).roll(1, 0))


def stencils(n):
    def padded(x):
        u = F.pad(x.reshape(*x.shape[:-1], n, n), (1, 1, 1, 1))
        c = u[..., 1:-1, 1:-1]
        lap = u[..., 2:, 1:-1] + u[..., :-2, 1:-1] + u[..., 1:-1, 2:] + u[..., 1:-1, :-2] - 4 * c
        wind = 0.5 * (u[..., 1:-1, 2:] - u[..., 1:-1, :-2]) - 0.3 * (u[..., 2:, 1:-1] - u[..., :-2, 1:-1])
        return (0.05 * lap * (n + 1) ** 2 - wind * (n + 1) / 2 - 2 * c**2 / (0.3 + c)).reshape(x.shape)

    def rolled(x):
        u = x.reshape(*x.shape[:-1], n, n)
        return (sum(torch.roll(u, s, d) for s in (1, -1) for d in (-1, -2)) - 4 * u - u**3).reshape(x.shape)

    def convolved(x):
        kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
        return (F.conv2d(x.reshape(-1, 1, n, n), kernel, padding=1) - x.reshape(-1, 1, n, n) ** 2).reshape(x.shape)

    second = sp.diags_array([np.ones(n - 1), -2 * np.ones(n), np.ones(n - 1)], offsets=[-1, 0, 1])
    laplacian = sp.csr_array(sp.kron(sp.eye_array(n), second) + sp.kron(second, sp.eye_array(n)))
    coo = laplacian.tocoo()
    matrix = torch.sparse_coo_tensor(np.stack([coo.row, coo.col]), coo.data, coo.shape)

    def multiplied(x):
        return torch.sparse.mm(matrix, x.reshape(-1, n * n).T).T.reshape(x.shape) - x**2

    dirichlet = (laplacian != 0).toarray()
    periodic = np.zeros((n, n, n, n), bool)
    for i in range(n):
        for j in range(n):
            for di, dj in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
                periodic[i, j, (i + di) % n, (j + dj) % n] = True
    return {
        "padded": (padded, dirichlet),
        "rolled": (rolled, periodic.reshape(n * n, n * n)),
        "convolved": (convolved, dirichlet),
        "multiplied": (multiplied, dirichlet),
    }


@pytest.mark.parametrize("kind", ["padded", "rolled", "convolved", "multiplied"])
@pytest.mark.parametrize("rows", [None, 3])
def test_five_point_stencils(kind, rows):
    f, expected = stencils(6)[kind]
    x = torch.rand(36) if rows is None else torch.rand(rows, 36)
    assert np.array_equal(detect_pattern(f, x, method="trace").to_scipy().toarray(), expected)


def source_and_diffusion(nx=10, ny=8):
    """Second differences with zero rows at the two borders of their direction, a source at one point, and a decay."""

    def one(k):
        d = np.zeros((k, k))
        for i in range(1, k - 1):
            d[i, i - 1 : i + 2] = 1, -2, 1
        return d

    lx, ly = np.kron(np.eye(ny), one(nx)), np.kron(one(ny), np.eye(nx))
    source = torch.zeros(nx * ny)
    source[nx * (ny // 2) + nx // 2] = 1
    tx, ty = torch.from_numpy(lx).to_sparse(), torch.from_numpy(ly).to_sparse()
    p = (1.0, 2.0, 3.0, 0.5)

    def f(x):
        return p[0] * (tx @ x.T).T + p[1] * (ty @ x.T).T + source * (p[2] - x) - p[3] * x / (nx * ny)

    return f, (lx != 0) | (ly != 0) | np.eye(nx * ny, dtype=bool)


def test_source_and_diffusion():
    f, expected = source_and_diffusion()
    assert np.array_equal(detect_pattern(f, torch.rand(1, 80), method="trace").to_scipy().toarray(), expected)


# --- compositions

BLOCKS = [
    lambda x: x.sin(),
    lambda x: x * x.roll(1, -1),
    lambda x: F.pad(x[1:], (0, 1)) + x,
    lambda x: x.reshape(GRID).T.reshape(-1),
    lambda x: x.flip(0) ** 2,
    lambda x: x.index_add(0, torch.tensor([0, 5]), x[7:9]),
    lambda x: torch.where(x > 0.1, x, x.reshape(GRID).flip(1).reshape(-1)),
    lambda x: (banded(3) @ x.reshape(GRID)).reshape(-1),
    lambda x: F.conv1d(x.reshape(1, 1, N), torch.tensor([[[1.0, 0, 2.0]]]), padding=1).reshape(-1),
    lambda x: torch.cat([x[6:], x[:6].clamp(max=0.3)]),
    put,
    in_place_views,
    lambda x: x + x.reshape(GRID).sum(1, keepdim=True).expand(GRID).reshape(-1),
    lambda x: x.reshape(GRID).cumsum(0).reshape(-1),
    lambda x: torch.zeros(N).scatter_add(0, torch.arange(N) // 2, x.tanh()) + x.new_ones(N),
    lambda x: torch.func.grad(lambda u: (u**2 * u.roll(1)).sum())(x),
    lambda x: x[torch.arange(N).flip(0)].unsqueeze(0).expand(2, N)[1],
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=4), st.integers(0, 10))
def test_compositions_are_never_too_sparse(chosen, seed):
    def f(x):
        for k in chosen:
            x = BLOCKS[k](x)
        return x

    x = constant(N, seed=seed)
    found = mask_of(detect_pattern(f, x, method="trace"))
    assert not (truth(f, x, points=2) & ~found).any()


# --- what cannot be traced


def branch(x):
    return x**2 if x.sum() > 0 else x.flip(0)


@pytest.mark.parametrize(
    "f", [branch, lambda x: x * x.max().item(), lambda x: x[x > 0].sum() * x, lambda x: x[: int(x.abs().argmax()) + 1].sum() * x]
)
def test_control_flow_on_values_falls_back_with_a_warning(f):
    x = constant(N)
    with pytest.raises(InvalidInput, match="cannot be traced"):
        detect_pattern(f, x, method="trace")
    with pytest.warns(UserWarning, match="random points"):
        pattern = detect_pattern(f, x)
    assert not (truth(f, x, points=1) & ~mask_of(pattern)).any()


def test_numeric_detection_agrees():
    f, expected = stencils(5)["padded"]
    assert np.array_equal(detect_pattern(f, torch.rand(2, 25), method="numeric").to_scipy().toarray(), expected)


def test_a_pattern_too_dense_is_refused(monkeypatch):
    monkeypatch.setattr(tracing, "MAX_ENTRIES", 100)
    with pytest.raises(PatternTooDense, match="entries"):
        detect_pattern(lambda x: x + x.sum(), torch.ones(20))


def test_wrong_arguments_are_named():
    with pytest.raises(InvalidInput, match="method='guess'"):
        detect_pattern(torch.sin, torch.ones(2), method="guess")
    with pytest.raises(InvalidInput, match="n_rows=3"):
        detect_pattern(torch.sin, torch.ones(2), n_rows=3)
    with pytest.raises(InvalidInput, match="shape"):
        detect_pattern(torch.sin, torch.ones(2, 2, 2))


def test_unknown_operators_count_as_dense():
    pattern = detect_pattern(lambda x: torch.linalg.eigvalsh(torch.diag(x[:3])), torch.arange(5.0), method="trace")
    assert pattern.nnz == 9


# --- inside of transforms, on closures


def test_closures_over_wrapped_tensors():
    x = constant(N)
    seen = []

    def loss(p):
        def f(u):
            return p * u + u.roll(1)

        seen.append(detect_pattern(f, x, method="trace"))
        return f(x).sum()

    torch.func.grad(loss)(torch.ones(()))
    torch.vmap(loss)(torch.ones(3))
    torch.func.jvp(loss, (torch.ones(N),), (torch.ones(N),))
    torch.func.hessian(loss)(torch.ones(N))
    expected = torch.eye(N, dtype=torch.bool) | torch.eye(N, dtype=torch.bool).roll(1, 0)
    assert len(seen) == 4 and all(torch.equal(mask_of(s), expected) for s in seen)


def test_modules_and_no_grad():
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4)).double()
    torch.nn.init.zeros_(net[2].weight)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert detect_pattern(net, torch.ones(2, 4)).nnz == 16


# --- the container


def test_containers_agree():
    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    expected = [[0, 1, 1], [1, 0, 2]]
    for given_ in (
        dense,
        dense != 0,
        dense.numpy(),
        dense.tolist(),
        dense.to_sparse(),
        dense.to_sparse_csr(),
        dense.to_sparse_csc(),
        sp.csr_matrix(dense.numpy()),
        sp.csc_array(dense.numpy()),
        sp.coo_array((np.ones(4), ([1, 0, 1, 0], [2, 1, 0, 1])), shape=(2, 3)),
    ):
        pattern = SparsityPattern.from_any(given_)
        assert pattern.indices.tolist() == expected and pattern.shape == (2, 3)
        assert SparsityPattern.from_any(pattern) is pattern
    assert pattern.density == 0.5 and pattern.nnz == 3
    assert pattern.transpose().indices.tolist() == [[0, 1, 2], [1, 0, 1]] and pattern.transpose().shape == (3, 2)
    assert np.array_equal(pattern.to_scipy().toarray(), dense.numpy() != 0)
    with pytest.raises(InvalidInput, match="shape"):
        SparsityPattern.from_any(dense, (3, 3))
    with pytest.raises(InvalidInput, match="str"):
        SparsityPattern.from_any("tridiagonal")
    with pytest.raises(InvalidInput, match="matrix"):
        SparsityPattern.from_any(torch.ones(3))


def test_detection_of_65536_unknowns_is_quick():
    n = 256

    def large(x):
        u = F.pad(x.reshape(n, n), (1, 1, 1, 1))
        return (u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] + u[1:-1, :-2] - u[1:-1, 1:-1] ** 2).reshape(-1)

    start = time.perf_counter()
    pattern = detect_pattern(large, torch.zeros(n * n))
    assert pattern.nnz == 5 * n * n - 4 * n
    assert time.perf_counter() - start < 5.0
