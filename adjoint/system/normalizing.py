"""Normalizations, determinants and inverses by Cholesky factors, by formulas whose derivatives of every order are right.

PyTorch's layer, batch, instance and group norms keep mean and deviation for their first derivatives. Those of forward mode take what is
kept for constants where they are differentiated once more, and so do batched cotangents where state and weights both are differentiated: no
error, and numbers of the right size. Third derivatives of determinants, which are second ones of Rosenbrock methods, are wrong or NaN by
`torch.func`, and so are second ones of `torch.cholesky_inverse` by forward mode over another one. Jacobians of ``fun``, which implicit
methods differentiate, and all second derivatives go through these.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["NORMALIZATIONS", "composing"]


def _scaled(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - mean) * torch.rsqrt(var + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = x if weight is None else x * weight
    return out if bias is None else out + bias


def _centred(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, with the dimensions that they are taken over."""
    mean = x.mean(dims, keepdim=True)
    return mean, (x - mean).square().mean(dims, keepdim=True)


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    return _affine(_scaled(input, *_centred(input, tuple(range(-count, 0))), eps), weight, bias)


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    parts = input.reshape(input.shape[0], num_groups, -1)
    shape = (1, -1, *(1 for _ in range(input.dim() - 2)))
    weight, bias = (None if p is None else p.reshape(shape) for p in (weight, bias))
    return _affine(_scaled(parts, *_centred(parts, (-1,)), eps).reshape(input.shape), weight, bias)


def _by_channel(
    own: Callable[..., Tensor],
    x: Tensor,
    running: tuple[Tensor | None, Tensor | None],
    weight: Tensor | None,
    bias: Tensor | None,
    dims: tuple[int, ...] | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """``dims``: those that mean and variance are taken over, or None: the ``running`` ones are used. These are kept by PyTorch's ``own``
    function, which writes into them without counting that as a change of what others have saved."""
    shape = (1, -1, *(1 for _ in range(x.dim() - 2)))
    weight, bias, *kept = (None if p is None else p.reshape(shape) for p in (weight, bias, *running))
    if dims is None:
        mean, var = kept
        assert mean is not None and var is not None
        return _affine(_scaled(x, mean, var, eps), weight, bias)
    if running[0] is not None:
        with torch.no_grad():
            own(x, None, None, *running, True, momentum, eps, False)
    return _affine(_scaled(x, *_centred(x, dims), eps), weight, bias)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = (0, *range(2, input.dim())) if training else None
    return _by_channel(torch.batch_norm, input, (running_mean, running_var), weight, bias, dims, momentum, eps)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    dims = tuple(range(2, input.dim())) if use_input_stats else None
    return _by_channel(torch.instance_norm, input, (running_mean, running_var), weight, bias, dims, momentum, eps)


def _weights_first(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As the functions of ``torch`` itself order their arguments."""

    def call(
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        by_input: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool = True,
    ) -> Tensor:
        return function(input, running_mean, running_var, weight, bias, by_input, momentum, eps)

    return call


def _minors(a: Tensor) -> Tensor:
    """Determinants of matrices up to `_MINORS`, without a division."""
    n = a.shape[-1]
    if n == 1:
        return a[..., 0, 0]
    if n == 2:
        return a[..., 0, 0] * a[..., 1, 1] - a[..., 0, 1] * a[..., 1, 0]
    terms = [a[..., 0, j] * _minors(torch.cat([a[..., 1:, :j], a[..., 1:, j + 1 :]], -1)) for j in range(n)]
    return sum(terms[2::2], terms[0]) - sum(terms[3::2], terms[1])


def _without(a: Tensor, place: Tensor, dim: int) -> Tensor:
    """``a`` without the row or column at ``place``, which is its own for each matrix."""
    keep = torch.arange(a.shape[dim] - 1, device=a.device).unsqueeze(1 if dim == -2 else 0)
    return torch.take_along_dim(a, keep + (keep >= place).long(), dim)


def _eliminated(a: Tensor) -> Tensor:
    """A determinant by elimination, whose pivots are the largest entries that are left, and minors of the last rows.

    That a matrix is singular shows in these last rows, and nothing is divided by them: all derivatives are there. Where more rows
    depend on others, derivatives up to the fourth are zero, as they are by a pivot of zero in the product.
    """
    factors = []
    while (n := a.shape[-1]) > _MINORS:
        largest = a.detach().abs().flatten(-2).argmax(-1)[..., None, None]
        i, j = largest // n, largest % n
        row, column = torch.take_along_dim(a, i, -2), torch.take_along_dim(a, j, -1)
        pivot = torch.take_along_dim(row, j, -1)
        a = a - column / torch.where(pivot == 0, 1, pivot) * row
        a = _without(_without(a, i, -2), j, -1)
        factors.append((pivot * (1 - 2 * ((i + j) % 2)))[..., 0, 0])
    return prod(factors, start=_minors(a))


def _determinant(own: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any, **named: Any) -> Tensor:
        a = args[0] if args else named.get("A", named.get("input"))
        if not isinstance(a, Tensor) or a.dim() < 2 or named.get("out") is not None:
            return own(*args, **named)
        if a.shape[-1] != a.shape[-2] or not a.numel():
            return own(*args, **named)
        return _eliminated(a)

    return call


def _cholesky_inverse(input: Tensor, upper: bool = False, *, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return torch.cholesky_inverse(input, upper, out=out)
    return torch.cholesky_solve(torch.eye(input.shape[-1], dtype=input.dtype, device=input.device).expand_as(input), input, upper)


#: rows of determinants by minors alone, whose terms are as many as there are orders of these
_MINORS = 4

#: what stands in the place of PyTorch's functions
NORMALIZATIONS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    functional.layer_norm: _layer_norm,
    functional.batch_norm: _batch_norm,
    functional.instance_norm: _instance_norm,
    functional.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    torch.layer_norm: _layer_norm,
    torch.batch_norm: _weights_first(_batch_norm),
    torch.instance_norm: _weights_first(_instance_norm),
    **{own: _determinant(own) for own in (torch.linalg.det, torch.det, Tensor.det)},
    torch.cholesky_inverse: _cholesky_inverse,
    Tensor.cholesky_inverse: _cholesky_inverse,
}


class _Composed(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return NORMALIZATIONS.get(func, func)(*args, **(kwargs or {}))


def composing(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call`` with the normalizations in it by formulas."""

    def run(*args: Any) -> Any:
        with _Composed():
            return call(*args)

    return run
