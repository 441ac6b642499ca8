"""Functions of a state (B, 6) that make use of one operator each, by name, in groups that are traced together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Case = Callable[[Tensor, Tensor], Tensor]  # of y (B, 6) and p (8,), to (B, ...)

TORCH = (
    "exp expm1 exp2 log log1p log2 log10 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh sqrt rsqrt abs sign floor ceil trunc "
    "round frac erf erfc erfinv lgamma digamma sigmoid reciprocal square neg relu isnan isinf isfinite isposinf isneginf signbit sgn sinc "
    "deg2rad rad2deg nan_to_num logit positive"
)
ACTIVATIONS = (
    "relu6 hardtanh hardswish hardsigmoid softshrink hardshrink tanhshrink softsign selu celu glu mish logsigmoid silu gelu elu leaky_relu "
    "softplus softmax log_softmax softmin"
)


def _by(module, name: str) -> Case:
    if name in ("softmax", "log_softmax", "softmin"):
        return lambda y, p: getattr(module, name)(y, -1)
    return lambda y, p: getattr(module, name)(y)


POINTWISE: dict[str, Case] = {
    **{name: _by(torch, name) for name in TORCH.split()},
    **{name: _by(F, name) for name in ACTIVATIONS.split()},
    **{name: _by(torch.special, name) for name in ["ndtr", "entr", "expit"]},
    "trigamma": lambda y, p: torch.polygamma(1, y),
    "round decimals": lambda y, p: y.round(decimals=2),
    "gelu tanh": lambda y, p: F.gelu(y, approximate="tanh"),
    "softplus beta": lambda y, p: F.softplus(y, beta=2.0, threshold=3.0),
    "elu alpha": lambda y, p: F.elu(y, 0.3),
    "threshold": lambda y, p: F.threshold(y, 0.5, 20.0),
    "prelu": lambda y, p: F.prelu(y, p[:1]),
    "clamp": lambda y, p: y.clamp(-1.0, 1.0),
    "clamp min": lambda y, p: y.clamp(min=0.0),
    "clamp max": lambda y, p: y.clamp_max(1.0),
    "clamp tensors": lambda y, p: torch.clamp(y, p[:6], p[1:7]),
    "logit eps": lambda y, p: torch.logit(y, 0.1),
}


def _of_neighbours(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    return lambda y, p: function(y, y.roll(1, -1))


def _power(exponent: float) -> Case:
    return lambda y, p: y**exponent


_PAIRS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "atan2": torch.atan2, "hypot": torch.hypot,
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin, "fmod": torch.fmod,
    "remainder": torch.remainder, "floor_divide": torch.floor_divide, "copysign": torch.copysign, "heaviside": torch.heaviside,
    "xlogy of more": lambda a, b: torch.xlogy(a, b.abs() + 0.5), "xlog1py of more": lambda a, b: torch.special.xlog1py(a, b.abs()),
    "xlogy": torch.xlogy, "xlog1py": torch.special.xlog1py, "logaddexp": torch.logaddexp, "logaddexp2": torch.logaddexp2,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne, "isclose": torch.isclose,
    "logical_and": lambda a, b: torch.logical_and(a > 0, b > 0), "logical_or": lambda a, b: (a > 0) | (b > 1),
    "logical_xor": lambda a, b: (a > 0) ^ (b > 1), "logical_not": lambda a, b: ~(a > b),
    "bool sum": lambda a, b: (a > 0) + (b > 1) * (a < 1),
    "div trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
    "where": lambda a, b: torch.where(a > b, a * b, a - b), "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "masked_fill": lambda a, b: a.masked_fill(b > 0, 7.0), "addcmul": lambda a, b: torch.addcmul(a, b, b, value=0.5),
    "addcdiv": lambda a, b: torch.addcdiv(a, b, a, value=0.5), "alpha": lambda a, b: torch.sub(torch.add(a, b, alpha=2), a, alpha=3),
    "rsub": lambda a, b: torch.rsub(a, b, alpha=2), "where mixed": lambda a, b: torch.where(a > 0, 1, b),
}  # fmt: skip
PAIRS: dict[str, Case] = {name: _of_neighbours(f) for name, f in _PAIRS.items()} | {
    **{f"pow {e}": _power(e) for e in (0, 1, 2, 3, 5, 0.5, -0.5, -1, -2, 1.5, 12, -3.3)},
    "pow of a number": lambda y, p: 2.0**y,
    "pow of zero": lambda y, p: 0.0**y,
    "by p": lambda y, p: p[:6] * y + p[1],
    "integers": lambda y, p: (y * 3).nan_to_num(0, 9, -9).long() % 3 + (y > 0).long() // 2,
    "to bool": lambda y, p: y.bool(),
}


def _written(y: Tensor) -> Tensor:
    out = torch.zeros(y.shape[0], 6, dtype=y.dtype)
    out[:, [1, 2]] = y[:, :2]
    out[:, 1:3] += 1
    out[..., 0] = 5
    out[:, 3::2] = y[:, 2:4] * 2
    out[:, 4].mul_(y[:, 0]).add_(y[:, 1])
    return out


def _masked(y: Tensor) -> Tensor:
    out = y.clone()
    out[out > 0.5] = 0
    return out


def _rows_by_number(y: Tensor) -> Tensor:
    out = y.clone()
    out[torch.arange(y.shape[0]), torch.tensor(2)] = y[:, 0] * 3
    return out


_I, _M = torch.tensor([3, 0, 0, -1]), torch.tensor([True, False, True, True, False, False])
VIEWS: dict[str, Case] = {
    "view": lambda y, p: y.view(-1, 2, 3).reshape(-1, 3, 2),
    "permute": lambda y, p: y.view(-1, 2, 3).permute(0, 2, 1),
    "transposed rows": lambda y, p: (y.T * 2).T,
    "expand": lambda y, p: y[:, None].expand(-1, 3, 6) + p[:6],
    "slice": lambda y, p: y[:, 1:5:2],
    "select": lambda y, p: y[:, -2],
    "split": lambda y, p: y.split([2, 4], 1)[1] + y.chunk(3, -1)[0].sum(-1, keepdim=True),
    "cat": lambda y, p: torch.cat([y, 2 * y, p.expand(y.shape[0], -1)], 1),
    "stack": lambda y, p: torch.stack(y.unbind(1)[::-1], 1),
    "flip": lambda y, p: y.flip(1),
    "roll": lambda y, p: y.roll((2, -1), (1, 1)) + y.view(-1, 2, 3).roll(1, 2).view(-1, 6),
    "roll flat": lambda y, p: y + torch.roll(p.view(2, 4), 3).view(-1)[:6],
    "pad": lambda y, p: F.pad(y, (1, 2), value=3.0),
    "pad circular": lambda y, p: F.pad(y[:, None], (1, 2), mode="circular"),
    "pad reflect": lambda y, p: F.pad(y[:, None], (1, 2), mode="reflect"),
    "pad replicate": lambda y, p: F.pad(y[:, None], (1, 2), mode="replicate"),
    "diagonal": lambda y, p: y.view(-1, 2, 3).diagonal(1, 1, 2),
    "diag_embed": lambda y, p: torch.diag_embed(y[:, :2], 1),
    "tril": lambda y, p: y.view(-1, 2, 3).tril() - y.view(-1, 2, 3).triu(1),
    "unfold": lambda y, p: y.unfold(1, 3, 2),
    "repeat": lambda y, p: y.repeat(1, 2),
    "repeat_interleave": lambda y, p: y.repeat_interleave(2, 1),
    "squeeze": lambda y, p: y[:, None, :, None].squeeze(-1).squeeze(1),
    "movedim": lambda y, p: y.view(-1, 2, 3).movedim(1, 2),
    "diff": lambda y, p: y.diff(dim=1),
    "gradient": lambda y, p: torch.gradient(y, dim=1)[0],
    "detach": lambda y, p: y * y.detach(),
    "full": lambda y, p: y + torch.full_like(y, 2.0) + y.new_zeros(6) + torch.ones_like(y) + torch.linspace(0, 1, 6, dtype=y.dtype),
    "written": lambda y, p: _written(y),
    "masked": lambda y, p: _masked(y),
    "rows by number": lambda y, p: _rows_by_number(y),
    "index": lambda y, p: y[:, _I],
    "index mask": lambda y, p: y[:, _M],
    "index two": lambda y, p: y.view(-1, 2, 3)[:, [1, 0], [2, 2]],
    "index apart": lambda y, p: y.view(-1, 2, 3)[:, [1], None, [2]],
    "gather": lambda y, p: y.gather(1, _I.abs().expand(y.shape[0], -1)),
    "take_along_dim": lambda y, p: y.take_along_dim(_I.abs()[None], 1),
    "index_select": lambda y, p: y.index_select(1, _I.abs()),
    "embedding": lambda y, p: F.embedding(_I.abs(), p.view(4, 2)).view(-1) * y[:, :1],
    "scatter": lambda y, p: y.scatter(1, torch.tensor([[0, 3]]).expand(y.shape[0], -1), y[:, 4:] * 2),
    "scatter value": lambda y, p: y.scatter(1, torch.tensor([[0, 3]]).expand(y.shape[0], -1), 2.5),
    "scatter_add": lambda y, p: y.scatter_add(1, torch.tensor([[0, 3, 3]]).expand(y.shape[0], -1), y[:, :3] * 2),
    "index_add": lambda y, p: y.index_add(1, _I.abs(), y[:, :4], alpha=2),
    "index_copy": lambda y, p: y.index_copy(1, torch.tensor([4, 0]), y[:, 1:3]),
    "index_fill": lambda y, p: y.index_fill(1, torch.tensor([4, 0]), 2.0),
    "index_put": lambda y, p: y.index_put((torch.arange(y.shape[0])[:, None], _I.abs()), y[:, :4], accumulate=True),
    "take": lambda y, p: y[:, :4] * p.take(_I.abs()),
    "bucketize": lambda y, p: p[torch.bucketize(y, torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0], dtype=y.dtype))],
    "searchsorted": lambda y, p: torch.searchsorted(p.cumsum(0), y, right=True) + torch.searchsorted(y.abs().cumsum(1).nan_to_num(9), y),
    "interpolated": lambda y, p: _interpolated(y, p),
    "picked": lambda y, p: torch.sin(y).gather(1, torch.searchsorted(p.cumsum(0), y).clamp(max=5)),
    "written where found": lambda y, p: y.scatter(
        1, torch.searchsorted(p.cumsum(0), y[:, :2] * 1).clamp(max=2) + torch.tensor([0, 3]), y[:, 2:4]
    ),
    "large table": lambda y, p: _LARGE.to(y.dtype)[y.nan_to_num(0, 1, 1).mul(100).long().clamp(0, 4999)] + _LARGE[:6],
}
_LARGE = torch.linspace(0, 1, 5000)


def _interpolated(y: Tensor, p: Tensor) -> Tensor:
    knots = torch.linspace(-1, 2, 8, dtype=y.dtype)
    i = (torch.searchsorted(knots, y.contiguous()) - 1).clamp(0, 6)
    return p[i] + (p[i + 1] - p[i]) * (y - knots[i]) / (knots[i + 1] - knots[i])


def _square(y: Tensor) -> Tensor:
    a = torch.stack([y, y.roll(1, -1), y.roll(2, -1), y.roll(3, -1), y.roll(4, -1), y.roll(5, -1)], 1)
    return torch.tanh(a.nan_to_num(0.3, 1.0, -1.0))


def _regular(y: Tensor, n: int) -> Tensor:
    return _square(y)[:, :n, :n] + torch.arange(1.0, n + 1, dtype=y.dtype).diag() * 3


#: of which the second pivot of what it is multiplied with is zero
_SECOND = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).diag()


def _definite(y: Tensor, n: int) -> Tensor:
    a = _regular(y, n)
    return a @ a.mT


REDUCTIONS: dict[str, Case] = {
    "sum": lambda y, p: y.sum(-1) + y.view(-1, 2, 3).sum((1, 2)) + (y > 0).sum(1),
    "mean": lambda y, p: y.mean(-1, keepdim=True),
    "prod": lambda y, p: y.prod(-1),
    "amax": lambda y, p: y.amax(-1),
    "amin": lambda y, p: y.amin(-1),
    "max": lambda y, p: y.max(-1)[0] + y.max(-1)[1],
    "min": lambda y, p: y.min(1)[0] + y.argmin(1),
    "argmax": lambda y, p: y.argmax(-1),
    "max of p": lambda y, p: y * p.max(),
    "var": lambda y, p: y.var(-1),
    "std": lambda y, p: y.std(-1, correction=0),
    "var_mean": lambda y, p: torch.stack(torch.var_mean(y, -1), -1),
    "norm": lambda y, p: y.norm(dim=-1),
    "norm 1": lambda y, p: torch.linalg.vector_norm(y, 1, dim=-1),
    "norm 0": lambda y, p: torch.linalg.vector_norm(y, 0, dim=-1),
    "norm 3": lambda y, p: torch.linalg.vector_norm(y, 3, dim=-1),
    "norm inf": lambda y, p: torch.linalg.vector_norm(y, torch.inf, dim=-1),
    "norm fro": lambda y, p: torch.linalg.matrix_norm(y.view(-1, 2, 3)),
    "normalize": lambda y, p: F.normalize(y, dim=-1),
    "cosine_similarity": lambda y, p: F.cosine_similarity(y, p[:6].expand(y.shape), dim=-1),
    "cdist": lambda y, p: torch.cdist(y.view(-1, 3, 2), p.view(4, 2)),
    "logsumexp": lambda y, p: y.logsumexp(-1),
    "cumsum": lambda y, p: y.cumsum(-1),
    "cumprod": lambda y, p: y.cumprod(-1),
    "any all": lambda y, p: (y > 1).any(-1).to(y.dtype) + (y > 0).all(-1),
    "count_nonzero": lambda y, p: y.count_nonzero(-1),
    "trapezoid": lambda y, p: torch.trapezoid(y, dim=-1),
    "nansum": lambda y, p: y.nansum(-1),
    "layer_norm": lambda y, p: F.layer_norm(y, (6,), p[:6]),
    "group_norm": lambda y, p: F.group_norm(y.view(-1, 2, 3), 2),
    "softmax inner": lambda y, p: y.view(-1, 2, 3).softmax(1),
}
PRODUCTS: dict[str, Case] = {
    "mm": lambda y, p: y[:, :4] @ p.view(4, 2),
    "linear": lambda y, p: F.linear(y[:, :4], p.view(2, 4), p[:2]),
    "bmm": lambda y, p: y.view(-1, 2, 3) @ y.view(-1, 3, 2),
    "baddbmm": lambda y, p: torch.baddbmm(p[:2], y.view(-1, 2, 3), y.view(-1, 3, 2), beta=0.5, alpha=2.0),
    "mv": lambda y, p: y * (p.view(2, 4) @ p[:4])[0] + torch.dot(p, p),
    "einsum": lambda y, p: torch.einsum("bij,jk,bk->bi", y.view(-1, 2, 3), p[:6].view(3, 2), y[:, 3:5]),
    "outer": lambda y, p: y * torch.outer(p[:2], p[:3]).reshape(-1),
    "cross": lambda y, p: torch.linalg.cross(y[:, :3], y[:, 3:]),
    "bilinear": lambda y, p: F.bilinear(y[:, :2], y[:, 2:4], p.view(2, 2, 2)),
    "kron": lambda y, p: y[:, :4] * torch.kron(p[:2], p[2:4]),
    "trace": lambda y, p: y.view(-1, 2, 3)[:, :, :2].diagonal(dim1=1, dim2=2).sum(-1),
    "attention causal": lambda y, p: F.scaled_dot_product_attention(*(y.view(-1, 1, 3, 2),) * 3, is_causal=True, scale=0.7),
    "attention": lambda y, p: F.scaled_dot_product_attention(*(y.view(-1, 3, 2),) * 3),
    "conv1d": lambda y, p: F.conv1d(y.view(-1, 2, 3), p[:4].view(2, 1, 2), p[:2], stride=1, padding=1, groups=2),
    "conv1d dilated": lambda y, p: F.conv1d(y.view(-1, 1, 6), p[:6].view(2, 1, 3), stride=2, padding=2, dilation=2),
    "conv2d": lambda y, p: F.conv2d(y.view(-1, 1, 2, 3), p.view(2, 1, 2, 2), padding="same"),
    "conv_transpose1d": lambda y, p: F.conv_transpose1d(y.view(-1, 2, 3), p.view(2, 2, 2), stride=2, padding=1, output_padding=1),
    "det": lambda y, p: torch.stack([torch.linalg.det(_regular(y, n)) for n in (1, 2, 3, 5)], -1),
    "slogdet": lambda y, p: torch.linalg.slogdet(_regular(y, 3))[1],
    "inv": lambda y, p: torch.linalg.inv(_regular(y, 3)),
    "inv_ex": lambda y, p: torch.stack([torch.linalg.inv_ex(_regular(y, 3) * m)[1] + y[:, 0] for m in (1.0, _SECOND.to(y))], -1),
    "solve": lambda y, p: torch.linalg.solve(_regular(y, 4), y[:, :4]),
    "solve many": lambda y, p: torch.linalg.solve(_regular(y, 2), y.view(-1, 2, 3)),
    "solve right": lambda y, p: torch.linalg.solve(_regular(y, 3), y.view(-1, 2, 3), left=False),
    "solve pivots": lambda y, p: torch.linalg.solve(_regular(y, 3).flip(1), y[:, :3]),
    "cholesky": lambda y, p: torch.linalg.cholesky(_definite(y, 3)),
    "cholesky_solve": lambda y, p: torch.cholesky_solve(y.view(-1, 3, 2), torch.linalg.cholesky(_definite(y, 3))),
    "solve_triangular": lambda y, p: torch.linalg.solve_triangular(_regular(y, 3).triu(), y.view(-1, 3, 2), upper=True),
    "matrix_power": lambda y, p: torch.linalg.matrix_power(_regular(y, 2), 3),
    "inner gradient": lambda y, p: torch.func.grad(lambda x: (x.sin() * x.roll(1, -1)).exp().sum())(y),
    "inner hessian": lambda y, p: torch.func.vmap(torch.func.hessian(lambda x: (x**3).sum() * x[0].tanh()))(y),
    "inner jvp": lambda y, p: torch.func.jvp(lambda x: x.tanh() * x.sum(-1, keepdim=True), (y,), (y * 2,))[1],
}


def _complex(y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.view_as_complex(y.view(-1, 3, 2)), torch.complex(y[:, 1:4], y[:, 3:])


def _of_complex(function: Callable[[Tensor, Tensor], Tensor]) -> Case:
    def case(y: Tensor, p: Tensor) -> Tensor:
        out = function(*_complex(y))
        return torch.view_as_real(out.resolve_conj()) if out.is_complex() else out

    return case


def _first(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, w: getattr(torch, name)(z)


_COMPLEX: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: _first(name) for name in ["exp", "sin", "cos", "abs", "angle", "sqrt", "reciprocal", "square"]},
    "add": lambda z, w: z + w * 2, "sub": lambda z, w: torch.sub(z, w, alpha=2) - 1j, "mul": torch.mul, "div": lambda z, w: z / (w + 3),
    "by real": lambda z, w: z * w.real - w.imag / z.real, "log": lambda z, w: torch.log(z + 0.1), "conj": lambda z, w: z * w.conj(),
    "pow": lambda z, w: z**3 + z**-2, "pow of pairs": lambda z, w: (z + 2) ** w, "polar": lambda z, w: torch.polar(w.abs(), w.imag),
    "sum": lambda z, w: z.sum(-1) + w.mean(-1), "stack": lambda z, w: torch.stack([z, w], 1), "index": lambda z, w: z[:, [2, 0]],
    "cat": lambda z, w: torch.cat([z.flip(1), w.roll(1, 1), w.real], 1), "views": lambda z, w: z[:, None, 1:].expand(-1, 2, 2).mT,
    "where": lambda z, w: torch.where(z.abs() > 1, z, w), "eq": lambda z, w: (z == w) | (z != z.conj()),
    "mm": lambda z, w: z @ torch.tensor([[1j, 2], [0, 1 - 1j], [1, 1]], dtype=z.dtype), "bmm": lambda z, w: z[:, :, None] @ w[:, None],
    "written": lambda z, w: _complex_written(z), "dot": lambda z, w: torch.linalg.vecdot(z, w),
}  # fmt: skip
COMPLEX = {f"complex {name}": _of_complex(f) for name, f in _COMPLEX.items()}


def _complex_written(z: Tensor) -> Tensor:
    out = torch.zeros_like(z)
    out[:, 1] = z[:, 0] * 1j
    out[:, 2] += 2
    return out


GROUPS = {"pointwise": POINTWISE, "pairs": PAIRS, "views": VIEWS, "reductions": REDUCTIONS, "products": PRODUCTS, "complex": COMPLEX}
