"""Which outputs of a function depend on which inputs, by tracing it once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .tracing import DependencyMode, PatternTooDense, Rows, Untraceable, gather_union, unwrapped
from .tracing_rules import RULES, cleared, dense, pointwise

__all__ = ["trace_dependencies"]


def trace_dependencies(f: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor] = ()) -> tuple[Rows, set[str]]:
    """``(f(x).numel(), x.numel())`` boolean CSR, and the operators that counted as dense for want of a rule.

    Zeros of ``parameters`` are taken for accidents. Raises `Untraceable` and `PatternTooDense`.
    """
    import scipy.sparse as sp

    lanes, values = unwrapped(x)
    values = values[0] if lanes > 1 else values
    x = unwrapped(values.detach().clone(memory_format=torch.contiguous_format))[1]
    n = x.numel()
    mode = DependencyMode(n, RULES, pointwise, dense, cleared)
    mode.write(x, sp.csr_array((np.ones(n, bool), (np.arange(n), np.arange(n))), shape=(n, n)))
    for p in parameters:
        mode.mark_free(unwrapped(p)[1])
    try:
        with mode:
            out = f(x)
            batched, plain = unwrapped(out)
    except (Untraceable, PatternTooDense):
        raise
    except NotImplementedError as error:  # if f is at fault, it will say so again without the watch
        raise Untraceable(str(error)) from error
    if not isinstance(plain, Tensor):
        raise Untraceable(f"f returned {type(out).__name__}, not a tensor")
    rows = mode.read(plain)
    count = out.numel()
    if rows is None:
        rows = sp.csr_array((plain.numel(), n), dtype=bool)
    if batched > 1:  # an outer vmap: what depends in any of its lanes
        rows = gather_union(np.tile(np.arange(count), batched), np.arange(batched * count), count, rows)
    return rows, mode.unknown
