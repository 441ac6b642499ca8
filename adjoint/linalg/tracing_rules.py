"""Rules of dependency tracing, by operator name: how the rows of the results follow from those of the arguments."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .tracing import Call, Rows, Rule, check_size, gather_union, take, unite

__all__ = ["RULES", "cleared", "dense", "pointwise"]


def _numbers(shape: Any) -> Tensor:
    return torch.arange(prod(shape), device="cpu").reshape(shape)


def _expand(rows: Rows | None, shape: Any, target: Any) -> Rows | None:
    """Rows of a tensor of ``shape`` broadcast to ``target``."""
    if rows is None or tuple(shape) == tuple(target):
        return rows
    return take(rows, _numbers(shape).expand(target).reshape(-1).numpy())


def _is_smooth(t: Any) -> bool:
    return isinstance(t, Tensor) and t.layout == torch.strided and (t.is_floating_point() or t.is_complex())


def pointwise(call: Call) -> Rows | None:
    """Each element depends on the elements at its place in all (broadcast) arguments."""
    shape = call.targets[0].shape
    out = None
    for t in call.tensors():
        out = unite(out, _expand(call.rows(t), t.shape, shape))
    return out


def dense(call: Call) -> list[Rows | None]:
    """Every element of every result depends on all that any argument depends on."""
    total = None
    for t in call.tensors():
        rows = call.rows(t)
        if rows is not None:
            total = unite(total, gather_union(np.zeros(rows.shape[0], int), np.arange(rows.shape[0]), 1, rows))
    if total is None:
        return [None] * len(call.targets)
    return [take(total, np.zeros(t.numel(), int)) for t in call.targets]


def cleared(call: Call) -> None:
    """Neither derivatives nor values depend on the arguments."""
    return None


def _copied(call: Call) -> Rows | None:
    """``copy_`` and ``fill_``: the old content does not count."""
    named = call.bound()
    source = named.get("src", named.get("value"))
    return _expand(call.rows(source), source.shape, named["self"].shape) if isinstance(source, Tensor) else None


def _scattered(call: Call) -> Rows | list[Rows | None] | None:
    """``scatter``: moves, unless it has a ``reduce``."""
    return _scatter_added(call) if call.bound().get("reduce") is not None else _moved(call)


def _moved(call: Call) -> Rows | list[Rows | None] | None:
    """Operators that only move elements about: let them move element numbers (0 stands for a constant)."""
    import scipy.sparse as sp

    if any(call.mode.depends(t) for t in call.tensors() if not _is_smooth(t)):
        return dense(call)  # where elements go depends on x
    parts: list[Rows] = [sp.csr_array((1, call.mode.n), dtype=bool)]
    count = 1

    def number(leaf: Any) -> Any:
        nonlocal count
        if not isinstance(leaf, Tensor):
            return leaf
        rows = call.rows(leaf)
        if rows is None:
            return torch.zeros(leaf.shape, dtype=torch.float64, device=leaf.device)
        parts.append(rows)
        count += leaf.numel()
        return torch.arange(count - leaf.numel(), count, dtype=torch.float64, device=leaf.device).reshape(leaf.shape)

    def prepared(name: str, arg: Any) -> Any:
        if name in ("index", "indices", "mask"):
            return arg
        # a fill value is a constant: number 0
        return 0.0 if name == "value" and not isinstance(arg, Tensor) else tree_map(number, arg)

    names = [a.name for a in call.func._schema.arguments]
    args = tuple(prepared(name, a) for name, a in zip(names, call.args, strict=False))
    kwargs = {name: prepared(name, a) for name, a in call.kwargs.items()}
    moved = [t for t in tree_leaves(call.func(*args, **kwargs)) if isinstance(t, Tensor)]
    table = sp.csr_array(sp.vstack(parts, format="csr"))
    return [take(table, t.reshape(-1).to("cpu", torch.int64).numpy()) for t in moved]


def _masked_fill(call: Call) -> Rows | list[Rows | None] | None:
    return pointwise(call) if call.mode.depends(call.args[1]) else _moved(call)


def _dims(dim: Any, ndim: int) -> list[int]:
    if dim is None or dim == []:
        return list(range(ndim))
    return [d % max(ndim, 1) for d in ([dim] if isinstance(dim, int) else dim)] if ndim else []


def _over(rows: Rows | None, shape: Any, dims: list[int]) -> tuple[Rows | None, list[int]]:
    """Union over ``dims``, which are kept with length 1."""
    kept = [1 if d in dims else s for d, s in enumerate(shape)]
    if rows is None:
        return None, kept
    targets = _numbers(kept).expand(tuple(shape)).reshape(-1).numpy()
    return gather_union(targets, np.arange(rows.shape[0]), prod(kept), rows), kept


def _reduced(call: Call) -> Rows | None:
    named = call.bound()
    t = named["self"] if "self" in named else call.args[0]
    return _over(call.rows(t), t.shape, _dims(named.get("dim"), t.dim()))[0]


def _traced(call: Call) -> Rows | None:
    t, rows = call.args[0], call.rows(call.args[0])
    on = _numbers(t.shape).diagonal().numpy()
    return None if rows is None else gather_union(np.zeros(len(on), int), on, 1, rows)


def _reduced_twice(call: Call) -> list[Rows | None]:
    """Two results over the same dims (``var_mean``, ``max.dim``, ...)."""
    return [_reduced(call)] * len(call.targets)


def _along(call: Call) -> list[Rows | None]:
    """Each result depends on a whole line along ``dim`` (softmax, sort, topk, Fourier transforms, ...)."""
    named, out = call.bound(), call.targets[0]
    total = None
    for t in call.tensors():
        if _is_smooth(t):
            rows, kept = _over(call.rows(t), t.shape, _dims(named["dim"], t.dim()))
            total = unite(total, _expand(rows, kept, out.shape))
    return [total] * len(call.targets)


def _scanned(call: Call) -> list[Rows | None]:
    """Each result depends on what comes before it along ``dim``."""
    named = call.bound()
    t, rows = named["self"], call.rows(named["self"])
    if rows is None or t.dim() == 0:
        return [rows] * len(call.targets)
    length = t.shape[named["dim"]]
    check_size(t.numel() * (length + 1) // 2)
    lines = _numbers(t.shape).movedim(named["dim"], 0).reshape(length, -1).numpy()
    i, j = np.tril_indices(length)
    return [gather_union(lines[i].reshape(-1), lines[j].reshape(-1), t.numel(), rows)] * len(call.targets)


def _scatter_added(call: Call) -> Rows | list[Rows | None] | None:
    """``index_add``, ``scatter_add``, ``scatter_reduce``, accumulating ``index_put``: sums at computed places."""
    named = call.bound()
    name = call.func._schema.name
    if "index_put" in name and not named.get("accumulate"):
        return _moved(call)
    if any(call.mode.depends(t) for t in call.tensors() if not _is_smooth(t)):
        return dense(call)
    t = named["self"]
    places = torch.arange(t.numel(), device=t.device).reshape(t.shape)
    if "index_put" in name:
        source, places = named["values"], torch.ops.aten.index.Tensor(places, named["indices"])
        rows = _expand(call.rows(source), source.shape, places.shape)
    else:
        source = named.get("source", named.get("src"))
        if not isinstance(source, Tensor):  # a number
            return call.rows(t)
        if "index_add" in name or "index_reduce" in name:
            places, rows = places.index_select(named["dim"], named["index"]), call.rows(source)
        else:
            places, rows = places.gather(named["dim"], named["index"]), call.rows(source)
            part = _numbers(source.shape)[tuple(slice(0, s) for s in named["index"].shape)]
            rows = None if rows is None else take(rows, part.reshape(-1).numpy())
    if rows is None:
        return call.rows(t)
    added = gather_union(places.reshape(-1).cpu().numpy(), np.arange(rows.shape[0]), t.numel(), rows)
    return unite(call.rows(t), added)


# --- products of matrices: (b, i, k) with (b, k, j)


def _nonzero(t: Tensor) -> np.ndarray:
    """Places of a constant that are not zero, ``(dim, nnz)``."""
    if t.layout != torch.strided:
        return t.to_sparse_coo().coalesce().indices().cpu().numpy()
    return (t != 0).nonzero().T.cpu().numpy()


def _zeros_count(call: Call, t: Tensor) -> bool:
    return call.rows(t) is None and not call.mode.depends(t) and not call.mode.is_free(t)


def _product(call: Call, a: Tensor, b: Tensor) -> Rows | None:
    shape_a = (1, *a.shape)[-3:] if a.dim() > 1 else (1, 1, *a.shape)
    shape_b = (1, *b.shape)[-3:] if b.dim() > 1 else (1, *b.shape, 1)
    batch, i, k, j = shape_a[0], shape_a[1], shape_a[2], shape_b[2]
    return unite(_one_side(call, a, b, batch, i, k, j, False), _one_side(call, b, a, batch, j, k, i, True))


def _one_side(call: Call, const: Tensor, var: Tensor, batch: int, i: int, k: int, j: int, right: bool) -> Rows | None:
    """What the product gets from ``var`` (b, k, j), multiplied from the left by ``const`` (b, i, k); all transposed if ``right``."""
    rows = call.rows(var)
    if rows is None:
        return None
    sources, targets = (torch.arange(batch * size * j, device="cpu") for size in (k, i))
    sources = sources.reshape(batch, j, k).mT if right else sources.reshape(batch, k, j)
    targets = targets.reshape(batch, j, i).mT if right else targets.reshape(batch, i, j)
    if _zeros_count(call, const):
        places = _nonzero(const)
        if const.dim() < 3:
            zero = np.zeros((1, places.shape[1]), places.dtype)
            places = np.vstack([zero, places] if const.dim() == 2 else ([zero, places, zero] if right else [zero, zero, places]))
        b_, i_, k_ = (places[0], places[2], places[1]) if right else places
        if len(b_) < batch * i * k:
            check_size(len(b_) * j)
            return gather_union(targets.numpy()[b_, i_].reshape(-1), sources.numpy()[b_, k_].reshape(-1), batch * i * j, rows)
    if rows.shape[0] and k:
        kept = torch.arange(batch * j, device="cpu").reshape(batch, 1, j)
        columns = torch.empty(batch * k * j, dtype=torch.int64, device="cpu")
        columns[sources.reshape(-1)] = kept.expand(batch, k, j).reshape(-1)
        united = gather_union(columns.numpy(), np.arange(rows.shape[0]), batch * j, rows)
        chosen = torch.empty(batch * i * j, dtype=torch.int64, device="cpu")
        chosen[targets.reshape(-1)] = kept.expand(batch, i, j).reshape(-1)
        return take(united, chosen.numpy())
    return None


def _multiplied(call: Call) -> Rows | None:
    a, b = [t for t in call.args if isinstance(t, Tensor)][:2]
    return _product(call, a, b)


def _multiplied_added(call: Call) -> Rows | None:
    """``addmm`` and its kind: the first argument is added to the product of the two others."""
    c, a, b = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)][:3]
    return unite(_expand(call.rows(c), c.shape, call.targets[0].shape), _product(call, a, b))


def _convolved(call: Call) -> Rows | list[Rows | None] | None:
    named = call.bound()
    rows = call.rows(named["input"])
    if rows is None or any(isinstance(named[k], Tensor) and call.rows(named[k]) is not None for k in ("weight", "bias")):
        return dense(call)
    out, x = _window_pairs(call, named["input"].shape, call.targets[0].numel(), named)
    return gather_union(out, x, call.targets[0].numel(), rows)


def _convolved_back(call: Call) -> Rows | list[Rows | None] | None:
    """The gradient of a convolution in its argument: the same pairs, turned round."""
    named = call.bound()
    rows = call.rows(named["grad_output"])
    if rows is None or list(named["output_mask"]) != [True, False, False] or call.rows(named["weight"]) is not None:
        return dense(call)
    out, x = _window_pairs(call, named["input"].shape, named["grad_output"].numel(), named)
    return gather_union(x, out, named["input"].numel(), rows)


def _window_pairs(call: Call, shape: Any, n_out: int, named: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Which elements of the result of a convolution of an argument of this shape use which elements of the argument."""
    weight, groups = named["weight"], named["groups"]
    lead, c_in = (1, shape[0]) if len(shape) == weight.dim() - 1 else shape[:2]
    numbers = torch.arange(1, prod(shape) + 1, dtype=torch.float64, device="cpu").reshape(lead * c_in, 1, *shape[-(weight.dim() - 2) :])
    # (groups, out channels of a group, in channels of a group, *kernel)
    per_group = weight.unflatten(0, (groups, -1))
    per_group = per_group.transpose(1, 2) if named["transposed"] else per_group
    used = ((per_group != 0) if _zeros_count(call, weight) else torch.ones_like(per_group, dtype=torch.bool)).cpu()
    places = torch.arange(n_out, device="cpu").reshape(lead, used.shape[0] * used.shape[1], -1)
    settings = [named[key] for key in ("stride", "padding", "dilation", "transposed", "output_padding")]
    targets, sources = [], []
    for k in product(*(range(s) for s in weight.shape[2:])):
        probe = torch.zeros(1, 1, *weight.shape[2:], dtype=torch.float64, device="cpu")
        probe[(0, 0, *k)] = 1.0  # a kernel of a single one moves element numbers
        moved = torch.ops.aten.convolution(numbers, probe, None, *settings, 1).round().to(torch.int64).reshape(lead, c_in, -1)
        g, o, i = used[(slice(None), slice(None), slice(None), *k)].nonzero().T
        src = moved[:, g * used.shape[2] + i].reshape(-1)
        dst = places[:, g * used.shape[1] + o].reshape(-1)
        inside = src > 0
        targets.append(dst[inside])
        sources.append(src[inside] - 1)
    return torch.cat(targets).numpy(), torch.cat(sources).numpy()


def _names(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_names(
        _moved,
        "view cat stack index_select gather index _unsafe_index take repeat roll flip constant_pad_nd reflection_pad1d reflection_pad2d"
        " reflection_pad3d replication_pad1d replication_pad2d replication_pad3d tril triu im2col slice_scatter select_scatter"
        " diagonal_scatter as_strided_scatter index_copy index_fill masked_select masked_scatter diag_embed pixel_shuffle"
        " pixel_unshuffle channel_shuffle slice_backward select_backward diagonal_backward rot90 permute expand unsqueeze squeeze"
        " transpose t unbind split split_with_sizes slice select diagonal unfold as_strided _unsafe_view _reshape_alias block_diag",
    ),
    **_names(_masked_fill, "masked_fill"),
    **_names(_scattered, "scatter"),
    **_names(pointwise, "clone to _to_copy contiguous lift_fresh alias detach _conj_physical polar complex where"),
    **_names(
        cleared,
        "zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones new_full new_empty"
        " new_empty_strided zero zero_ normal_ uniform_ bernoulli_ exponential_",
    ),
    **_names(_copied, "copy_ copy fill_ fill"),
    **_names(
        _reduced,
        "sum mean prod amax amin logsumexp norm linalg_vector_norm var std nansum median nanmedian max min aminmax trace",
    ),
    **_names(_traced, "trace"),
    **_names(_reduced_twice, "var_mean std_mean mode kthvalue"),
    **_names(_along, "_softmax _log_softmax _softmax_backward_data _log_softmax_backward_data sort topk _fft_c2c _fft_r2c _fft_c2r"),
    **_names(_scanned, "cumsum cumprod logcumsumexp cummax cummin"),
    **_names(_scatter_added, "index_add scatter_add scatter_reduce index_put _unsafe_index_put _index_put_impl_ index_reduce"),
    **_names(_multiplied, "mm bmm mv dot vdot _sparse_mm"),
    **_names(_multiplied_added, "addmm addmv baddbmm _sparse_addmm"),
    **_names(_convolved, "convolution"),
    **_names(_convolved_back, "convolution_backward"),
}
