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

N = 12
GRID = (3, 4)


def constant(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def truth(f, x, points=4):
    """Union of dense Jacobians at a few points, by reverse mode: NaN counts as an entry."""
    total = None
    for k in range(points):
        y = x + 0.3 * k * constant(*x.shape, seed=k).to(x.dtype)
        found = torch.autograd.functional.jacobian(f, y) != 0
        total = found if total is None else total | found
    return total


def mask_of(pattern):
    return torch.from_numpy(pattern.to_scipy().toarray())


def banded(n=N):
    return torch.diag(torch.ones(n)) + torch.diag(2 * torch.ones(n - 1), 1) + torch.diag(3 * torch.ones(n - 2), -2)


def put(x):
    out = torch.zeros_like(x)
    out[1:5] = x[3:7] ** 2
    out[5:] += x[:7].sin()
    out[0].copy_(x[11])
    return out


def in_place_views(x):
    u = x.clone().reshape(GRID)
    u[:, 0] *= u[:, 3].clone()
    u[2].zero_()
    u[1, 1:3].fill_(x[7])
    u.T[3].add_(x[:3])
    return u.reshape(-1)


def index_put_both(x):
    index = torch.tensor([0, 3, 3, 5])
    return x.new_zeros(N).index_put((index,), x[4:8], accumulate=True) + x.clone().index_put((index[:2],), x[8:10] ** 2)


def energy_gradient(x):
    return torch.func.grad(lambda u: ((u[1:] - u[:-1]) ** 4).sum() + u[0] ** 3)(x)


def autograd_gradient(x):
    with torch.enable_grad():
        u = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(((u[2:] * u[:-2]) ** 2).sum(), u, create_graph=True)[0]


def lstm_like(x):
    w = constant(3, 3, seed=3)
    u = x.reshape(4, 3)
    return (torch.sigmoid(u @ w) * torch.tanh(u)).reshape(-1)


GRU = torch.nn.GRUCell(4, 4).double()
INDEX = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
SCATTER = torch.tensor([[0, 1, 2, 0], [2, 0, 0, 1]])

EXACT = {
    "pointwise": lambda x: x.exp() * x.sin() + 3,
    "product of neighbours": lambda x: x[1:] * x[:-1],
    "where": lambda x: torch.where(x > 0, x**2, 3 * x.flip(0)) + torch.where(x > 0, x.flip(0), x),
    "clamp": lambda x: x.clamp(-5.0, 5.0) + F.softplus(x) + F.gelu(x),
    "maximum": lambda x: torch.maximum(x, x.roll(1)) + torch.minimum(x, x.roll(1)),
    "broadcast": lambda x: (x[:3, None] * x[None, 3:7]).reshape(-1),
    "views": lambda x: x.reshape(GRID).T.unsqueeze(0).expand(2, 4, 3).permute(2, 0, 1).reshape(-1)[::2],
    "unfold": lambda x: x.unfold(0, 3, 2).sum(-1),
    "diagonal": lambda x: torch.diagonal(x[:9].reshape(3, 3)) * 2,
    "diag_embed": lambda x: torch.diag_embed(x[:3]).reshape(-1),
    "cat and stack": lambda x: torch.cat([x[5:], torch.stack([x[:3], x[1:4] ** 2]).reshape(-1), torch.ones(2)]),
    "chunk": lambda x: x.chunk(3)[1] * x.split(4)[0] + x.unbind()[2],
    "index": lambda x: x[INDEX] ** 2,
    "index two": lambda x: x.reshape(GRID)[torch.tensor([0, 2]), torch.tensor([1, 3])],
    "mask index": lambda x: x[torch.arange(N) % 3 == 0].sin(),
    "masked_select": lambda x: torch.masked_select(x, torch.arange(N) % 3 == 0),
    "index_select": lambda x: x.index_select(0, INDEX),
    "gather": lambda x: x.reshape(GRID).gather(1, SCATTER).reshape(-1),
    "take_along_dim": lambda x: torch.take_along_dim(x.reshape(GRID)[:2], SCATTER, 1).reshape(-1),
    "take": lambda x: torch.take(x, INDEX),
    "scatter": lambda x: torch.zeros(2, 4).scatter(0, SCATTER[:1] % 2, x[:4].reshape(1, 4)).reshape(-1),
    "scatter_add": lambda x: x.reshape(GRID).scatter_add(0, SCATTER, x[:8].reshape(2, 4) ** 2).reshape(-1),
    "index_add": lambda x: torch.zeros(10).index_add(0, INDEX, x[:8] ** 2),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([1, 2]), x[5:7] * 2),
    "index_put": index_put_both,
    "index_fill": lambda x: x.index_fill(0, torch.tensor([1, 2]), 7.5) ** 2,
    "masked_fill": lambda x: x.masked_fill(torch.arange(N) < 3, 7.5) ** 2,
    "pad": lambda x: F.pad(x, (2, 1), value=3.5) ** 2,
    "reflect and replicate": lambda x: (
        F.pad(x.reshape(1, *GRID), (2, 1), mode="reflect") + F.pad(x.reshape(1, *GRID), (2, 1), mode="replicate")
    ).reshape(-1),
    "circular": lambda x: F.pad(x.reshape(1, 1, N), (2, 1), mode="circular").reshape(-1),
    "roll, flip, diff": lambda x: torch.roll(x, 2) * x.flip(0) + F.pad(x.diff(), (0, 1)),
    "repeat": lambda x: x[:3].repeat(2, 2).reshape(-1) + x.repeat_interleave(1),
    "tril": lambda x: (torch.tril(x.reshape(GRID)) + torch.triu(x.reshape(GRID), 1) ** 2).reshape(-1),
    "sum": lambda x: x.reshape(GRID).sum(1) + x[:3],
    "mean": lambda x: x.reshape(GRID).mean(0, keepdim=True).expand(2, 4).reshape(-1),
    "prod": lambda x: x.reshape(GRID).prod(1),
    "norms": lambda x: torch.linalg.vector_norm(x.reshape(GRID), dim=1) + x.reshape(GRID).var(1) + x.reshape(GRID).std(1),
    "logsumexp": lambda x: torch.logsumexp(x.reshape(GRID), 1),
    "softmax": lambda x: torch.softmax(x.reshape(GRID), 1).reshape(-1) + torch.log_softmax(x.reshape(GRID), 1).reshape(-1),
    "cumsum": lambda x: x.reshape(GRID).cumsum(1).reshape(-1) + x.reshape(GRID).cumsum(1).reshape(-1) ** 2,
    "cumprod": lambda x: x.reshape(GRID).cumprod(0).reshape(-1),
    "mm constant": lambda x: (banded(4) @ x.reshape(4, 3)).reshape(-1),
    "mm right constant": lambda x: (x.reshape(3, 4) @ banded(4)).reshape(-1),
    "mv": lambda x: banded() @ x,
    "vm": lambda x: x @ banded(),
    "dense mv": lambda x: constant(5, 4) @ x[:4],
    "mm both": lambda x: (x[:6].reshape(2, 3) @ x[6:].reshape(3, 2)).reshape(-1),
    "bmm": lambda x: torch.bmm(x.reshape(2, 2, 3), banded(3).expand(2, 3, 3)).reshape(-1),
    "bmm both": lambda x: torch.bmm(x.reshape(2, 2, 3), x.flip(0).reshape(2, 3, 2)).reshape(-1),
    "addmm": lambda x: torch.addmm(x[:3], x.reshape(4, 3), banded(3)).reshape(-1),
    "addmv": lambda x: torch.addmv(x.flip(0), banded(), x),
    "baddbmm": lambda x: torch.baddbmm(x.reshape(1, *GRID), banded(3)[None], x.reshape(1, *GRID)).reshape(-1),
    "linear": lambda x: F.linear(x.reshape(*GRID), banded(4), x[:4]).reshape(-1),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x.reshape(GRID), banded(4)).reshape(-1),
    "dot": lambda x: torch.dot(x[:4], x[4:8]).reshape(1),
    "outer": lambda x: torch.outer(x[:3], x[5:8]).reshape(-1),
    "kron": lambda x: torch.kron(x[:2], x[4:6]),
    "sparse COO mm": lambda x: torch.sparse.mm(banded().to_sparse(), x.reshape(N, 1)).reshape(-1),
    "sparse COO mv": lambda x: banded().to_sparse() @ x,
    "sparse CSR mv": lambda x: banded().to_sparse_csr() @ x,
    "conv1d": lambda x: F.conv1d(x.reshape(1, 1, N), torch.tensor([[[1.0, 0.0, -2.0]]]), padding=1).reshape(-1),
    "conv1d stride": lambda x: F.conv1d(x.reshape(1, 2, 6), constant(4, 1, 3), stride=2, dilation=2, padding=2, groups=2).reshape(-1),
    "conv2d": lambda x: F.conv2d(x.reshape(1, 1, *GRID), torch.tensor([[[[0, 1.0, 0], [1, -4, 1], [0, 1, 0]]]]), padding=1).reshape(-1),
    "conv2d channels": lambda x: F.conv2d(x.reshape(1, 2, 2, 3), constant(3, 2, 2, 2), bias=constant(3), padding=(0, 1)).reshape(-1),
    "conv transposed": lambda x: F.conv_transpose1d(x.reshape(1, 2, 6), constant(2, 3, 3), stride=2, output_padding=1).reshape(-1),
    "conv3d": lambda x: F.conv3d(x.reshape(1, 1, 2, 2, 3), constant(1, 1, 2, 1, 2)).reshape(-1),
    "zeros and writes": put,
    "in-place views": in_place_views,
    "gradient of an energy": energy_gradient,
    "autograd inside": autograd_gradient,
    "vmap inside": lambda x: torch.vmap(lambda r: r.cumsum(0) * r[0])(x.reshape(GRID)).reshape(-1),
    "layer": lstm_like,
    "pixel_shuffle": lambda x: F.pixel_shuffle(x.reshape(1, 4, 3, 1), 2).reshape(-1),
    "meshgrid": lambda x: torch.meshgrid(x[:2], x[2:4], indexing="ij")[0].reshape(-1),
    "constant": lambda x: torch.ones_like(x) + x.clone().zero_(),
    "gradient of a convolution": lambda x: torch.func.grad(
        lambda u: F.conv1d(u.reshape(1, 2, 6), constant(2, 2, 3), stride=2, padding=1).pow(3).sum()
    )(x),
    "fft along one dim": lambda x: torch.fft.fft(x.reshape(GRID), dim=1).abs().reshape(-1),
    "trace": lambda x: torch.trace(x[:9].reshape(3, 3)).reshape(1) ** 2,
    "attention": lambda x: F.scaled_dot_product_attention(*3 * [x.reshape(1, *GRID)]).reshape(-1),
    "hvp": lambda x: torch.func.jvp(torch.func.grad(lambda u: (u[1:] * u[:-1]).square().sum()), (x,), (torch.ones(N),))[1],
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(lambda u: u.sin() * u.roll(1), x, use_reentrant=False),
    "cat with integers": lambda x: torch.cat([x, torch.arange(3)]) ** 2,
    "scatter_reduce": lambda x: torch.zeros(4).scatter_reduce(0, torch.arange(N) % 4, x, "sum") ** 2,
    "index_fill by x": lambda x: x.index_fill(0, torch.arange(4), x[5]),
    "masked_fill by x": lambda x: x.masked_fill(torch.arange(N) < 3, x[5]),
    "masked_scatter": lambda x: x.masked_scatter(torch.arange(N) < 3, x[5:]),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:4] ** 2, 0, 2, 6) + torch.select_scatter(x.reshape(GRID), x[:4], 0, 1).reshape(-1),
    "group_norm": lambda x: F.group_norm(x.reshape(1, 4, 3), 2).reshape(-1),
    "gru": lambda x: torch.func.functional_call(GRU, dict(GRU.named_parameters()), (x.reshape(GRID), x.reshape(GRID) ** 2)).reshape(-1),
    "lerp": lambda x: torch.lerp(x, x.roll(1), 0.3) + torch.addcmul(x, x, x),
    "layer_norm": lambda x: F.layer_norm(x.reshape(GRID), (4,)).reshape(-1),
    "cdist-like": lambda x: (x[:3, None] - x[None, :3]).square().sum(1),
    "cross": lambda x: torch.linalg.cross(x[:3], x[3:6]),
    "complex parts": lambda x: torch.view_as_real(torch.complex(x[:6], x[6:]) ** 2).reshape(-1),
    "split complex": lambda x: torch.view_as_complex(x.reshape(6, 2)).real * torch.view_as_complex(x.reshape(6, 2)).conj().imag,
}
#: accidental truth: at every single point the Jacobian is thinner than the pattern that must be found
LOOSE = {
    "amax": lambda x: x.reshape(GRID).amax(1),
    "max": lambda x: x.reshape(GRID).max(1).values,
    "sort": lambda x: x.reshape(GRID).sort(1).values.reshape(-1),
    "topk": lambda x: x.reshape(GRID).topk(2, 1).values.reshape(-1),
    "median": lambda x: x.reshape(GRID).median(1).values,
    "cummax": lambda x: x.reshape(GRID).cummax(1).values.reshape(-1),
    "relu": lambda x: F.relu(x),
    "cancel": lambda x: x - x,
    "solve": lambda x: torch.linalg.solve(torch.eye(3) + x[:9].reshape(3, 3) ** 2, x[9:]),
    "fft": lambda x: torch.fft.rfft(x).real,
    "avg_pool": lambda x: F.avg_pool1d(x.reshape(1, 1, N), 3).reshape(-1),
    "max_pool": lambda x: F.max_pool1d(x.reshape(1, 1, N), 3).reshape(-1),
    "upsample": lambda x: F.interpolate(x.reshape(1, 1, N), scale_factor=2.0, mode="linear").reshape(-1),
    "index by argmax": lambda x: x[:4] * x[x.argmax().reshape(1)],
    "index_select by argmax": lambda x: x[:4] * x.index_select(0, x.argmax().reshape(1)),
    "gather by argsort": lambda x: x.gather(0, x.argsort()),
    "masked_fill by x": lambda x: x.roll(1).masked_fill(x > 0, 0.0),
    "det": lambda x: torch.linalg.det(x[:9].reshape(3, 3)).reshape(1),
    "searchsorted": lambda x: x[:3] * torch.searchsorted(torch.linspace(-1, 1, 5), x[3:6]),
    "scatter at computed places": lambda x: torch.zeros(N).scatter(0, x.argsort(), x),
    "several at once": lambda x: torch.cat(torch._foreach_mul(list(x.split(4)), 2.0)),
    "batch_norm": lambda x: F.batch_norm(x.reshape(GRID), torch.zeros(4), torch.ones(4), training=True).reshape(-1),
    "cholesky": lambda x: torch.linalg.cholesky(torch.eye(3) * 9 + x[:3].outer(x[:3])).reshape(-1),
    "grid_sample": lambda x: F.grid_sample(x.reshape(1, 1, *GRID), constant(1, 2, 2, 2), align_corners=True).reshape(-1),
    "put": lambda x: x.put(torch.tensor([1, 2]), x[5:7], accumulate=True),
    "fft2": lambda x: torch.fft.ifft2(torch.fft.fft2(x.reshape(GRID)) * constant(*GRID)).real.reshape(-1),
    "repeat_interleave": lambda x: x[:3].repeat_interleave(torch.tensor([1, 3, 2])),
    "trapezoid": lambda x: torch.trapezoid(x.reshape(GRID), dim=1),
    "matrix_exp": lambda x: torch.matrix_exp(x[:4].reshape(2, 2)).reshape(-1),
    "interp by bucketize": lambda x: constant(6)[torch.bucketize(x, torch.linspace(-1, 1, 5))] * x,
}


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
