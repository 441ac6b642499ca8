"""Functions with Jacobians in closed form."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from adjoint.linalg.sparsity import SparsityPattern

B, N = 3, 6
#: of `wave`
PATTERN = SparsityPattern.from_dense(np.eye(N) + np.roll(np.eye(N), 1, axis=1))


def wave(x):
    """f_i = sin(x_i) x_{i+1}, periodic; in closed form below."""
    return x.sin() * x.roll(-1, -1)


def wave_jacobian(x):
    x = x.numpy()
    out = np.zeros((*x.shape, x.shape[-1]), x.dtype)
    for i in range(x.shape[-1]):
        j = (i + 1) % x.shape[-1]
        out[..., i, i] += np.cos(x[..., i]) * x[..., j]
        out[..., i, j] += np.sin(x[..., i])
    return torch.from_numpy(out)


def points(b=B, n=N):
    return torch.randn(b, n, generator=torch.Generator().manual_seed(1))


RAD = (np.log(0.05), 0.5, -0.3, np.log(2), np.log(0.3))  # log of diffusion, wind, log of rate and saturation


def rad(n):
    """Reaction, advection, diffusion on a grid with border 0."""

    def f(x, log_p=RAD):
        d, vx, vy, k, c = (p if isinstance(p, torch.Tensor) else torch.tensor(p) for p in log_p)
        u = F.pad(x.reshape(*x.shape[:-1], n, n), (1, 1, 1, 1))
        mid, h = u[..., 1:-1, 1:-1], 1 / (n + 1)
        lap = (u[..., 2:, 1:-1] + u[..., :-2, 1:-1] + u[..., 1:-1, 2:] + u[..., 1:-1, :-2] - 4 * mid) / h**2
        wind = vx * (u[..., 1:-1, 2:] - u[..., 1:-1, :-2]) + vy * (u[..., 2:, 1:-1] - u[..., :-2, 1:-1])
        return (d.exp() * lap - wind / (2 * h) - k.exp() * mid**2 / (c.exp() + mid)).reshape(x.shape)

    return f


def rad_jacobian(x, n):
    """By SciPy's Kronecker products."""
    h = 1 / (n + 1)
    second = sp.diags([1.0, -2.0, 1.0], [-1, 0, 1], shape=(n, n)) / h**2
    first = sp.diags([-1.0, 1.0], [-1, 1], shape=(n, n)) / (2 * h)
    eye = sp.identity(n)
    linear = 0.05 * (sp.kron(eye, second) + sp.kron(second, eye)) - 0.5 * sp.kron(eye, first) + 0.3 * sp.kron(first, eye)
    u = x.numpy()
    return torch.from_numpy(linear.toarray() + np.diag(-2 * (2 * u * (0.3 + u) - u**2) / (0.3 + u) ** 2))
