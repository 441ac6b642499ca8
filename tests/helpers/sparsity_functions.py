"""Functions whose sparsity patterns are traced: `EXACT`, where nothing is lost, and `LOOSE`, where entries may be added."""

from __future__ import annotations

import torch
import torch.nn.functional as F

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
