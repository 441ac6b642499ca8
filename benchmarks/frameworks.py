"""What equations that are written once need from a framework: PyTorch, JAX, NumPy, or CasADi's symbols.

An equation is ``f(ops, t, y, p)`` in one of two forms. In components: ``y`` and ``p`` are sequences of scalars (or batches of them), and a
list comes back. As a vector: ``y`` is an array whose last axis holds the components, taken apart by ``ops.part`` and put together by
``ops.cat``; ``p`` is a sequence all the same.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Ops", "casadi_ops", "jax_function", "jax_ops", "laplacian_matrix", "numpy_function", "torch_function", "torch_ops"]


@dataclass(frozen=True)
class Ops:
    """One framework's functions.

    ``part(y, i, j)``: components ``i`` to ``j - 1``. ``laplacian(u, n)``: the periodic five-point sum ``east + west + north + south - 4 u``
    on ``n x n`` points.
    """

    stack: Callable[[Sequence[Any]], Any]
    cat: Callable[[Sequence[Any]], Any]
    part: Callable[[Any, int, int], Any]
    exp: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    sin: Callable[[Any], Any]
    laplacian: Callable[[Any, int], Any]


@functools.cache
def laplacian_matrix(n: int) -> Any:
    """The same sum as a sparse matrix."""
    import scipy.sparse as sp

    ring = sp.diags([1.0, 1.0, 1.0, 1.0], [1 - n, -1, 1, n - 1], shape=(n, n))
    one = sp.identity(n)
    return (sp.kron(one, ring) + sp.kron(ring, one) - 4 * sp.identity(n * n)).tocsr()


def _rolled(roll: Callable[[Any, int, int], Any]) -> Callable[[Any, int], Any]:
    def laplacian(u: Any, n: int) -> Any:
        w = u.reshape(*u.shape[:-1], n, n)
        out = roll(w, 1, -1) + roll(w, -1, -1) + roll(w, 1, -2) + roll(w, -1, -2) - 4 * w
        return out.reshape(u.shape)

    return laplacian


def _last(y: Any, i: int, j: int) -> Any:
    return y[..., i:j]


@functools.cache
def torch_ops() -> Ops:
    """For tensors."""
    import torch

    return Ops(
        lambda xs: torch.stack(list(xs), -1),
        lambda xs: torch.cat(list(xs), -1),
        _last,
        torch.exp,
        torch.sqrt,
        torch.sin,
        _rolled(torch.roll),
    )


@functools.cache
def jax_ops() -> Ops:
    """For JAX arrays in double precision."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp

    return Ops(
        lambda xs: jnp.stack(list(xs), -1),
        lambda xs: jnp.concatenate(list(xs), -1),
        _last,
        jnp.exp,
        jnp.sqrt,
        jnp.sin,
        _rolled(jnp.roll),
    )


@functools.cache
def casadi_ops() -> Ops:
    """For columns of symbols."""
    import casadi as ca

    def laplacian(u: Any, n: int) -> Any:
        matrix = laplacian_matrix(n).tocsc()
        pattern = ca.Sparsity(n * n, n * n, matrix.indptr.tolist(), matrix.indices.tolist())
        return ca.mtimes(ca.DM(pattern, matrix.data), u)

    join = lambda xs: ca.vertcat(*xs)  # noqa: E731
    return Ops(join, join, lambda y, i, j: y[i:j], ca.exp, ca.sqrt, ca.sin, laplacian)


#: components as Python's floats, which are quicker than NumPy's; vectors as arrays
_SCALARS = Ops(np.array, np.concatenate, _last, math.exp, math.sqrt, math.sin, lambda u, n: laplacian_matrix(n) @ u)
_ARRAYS = Ops(np.stack, np.concatenate, _last, np.exp, np.sqrt, np.sin, lambda u, n: laplacian_matrix(n) @ u)


def numpy_function(f: Callable[..., Any], vector: bool, p: np.ndarray) -> Callable[..., np.ndarray]:
    """``(t, *arrays) -> array``, for one trajectory."""
    q = p.tolist()
    if vector:
        return lambda t, *ys: f(_ARRAYS, t, *ys, q)
    return lambda t, *ys: np.array(f(_SCALARS, t, *(y.tolist() for y in ys), q))


def torch_function(f: Callable[..., Any], vector: bool) -> Callable[..., Any]:
    """``(t, *tensors, p) -> tensor``, for one trajectory or a batch: components on the last axis."""
    ops = torch_ops()
    if vector:
        return lambda t, *rest: f(ops, t, *rest[:-1], [x.unsqueeze(-1) for x in rest[-1].unbind(-1)])
    return lambda t, *rest: ops.stack(f(ops, t, *(x.unbind(-1) for x in rest)))


def jax_function(f: Callable[..., Any], vector: bool) -> Callable[..., Any]:
    """The same for JAX, for one trajectory."""
    ops = jax_ops()
    if vector:
        return lambda t, *rest: f(ops, t, *rest)
    return lambda t, *rest: ops.stack(f(ops, t, *rest))
