"""Complex states of functions that are not complex-differentiable: in real and imaginary parts wherever a Jacobian is solved with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg.sparsity import SparsityPattern
from ..torch_internals import get_unwrapped, is_batchedtensor, is_functorch_wrapped_tensor, temporarily_clear_interpreter_stack
from .jacobians import complex_differentiable
from .system import StateSpec

__all__ = ["given_pattern", "refuse_parts", "suited_to_jacobians", "totals_in_parts", "unwrapped", "weights_in_parts"]


def suited_to_jacobians(spec: StateSpec, fun: Callable[..., Any], *states: Any) -> StateSpec:
    """The layout in which ``fun(*states)``, of one or two states of this layout, has a Jacobian.

    That of the complex entries where ``fun`` is complex-differentiable (holomorphic), as one direction near the states shows; else, or
    where real leaves stand beside complex ones, that of real and imaginary parts.
    """
    if not spec.holds_complex or spec.split:
        return spec
    if not all(d.is_complex for d in spec.dtypes):
        return spec.in_parts()

    def flat(x: Tensor) -> Tensor:
        out = fun(*(spec.unflatten(part) for part in x.chunk(len(states), -1)))
        return torch.cat([leaf.reshape(spec.rows, -1) for leaf in tree_leaves(out)], -1)

    with torch.no_grad():
        return spec if complex_differentiable(flat, torch.cat([spec.flatten(s) for s in states], -1)) else spec.in_parts()


def refuse_parts(what: str, spec: StateSpec) -> None:
    """Raise `UnsupportedCombination` for an option that speaks of the Jacobian of complex entries where there is none."""
    if spec.split:
        raise UnsupportedCombination(
            f"{what} of a complex state, whose function is not complex-differentiable (it uses conj, abs, real or imag), or which holds "
            "real tensors too, has no meaning: leave it out, or write fun on real and imaginary parts (torch.view_as_real)"
        )


def unwrapped(x: Any) -> Any:
    """A tensor that was made inside of a transform, as it is outside; anything else as it is."""
    while isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        if is_batchedtensor(x):
            raise InvalidInput("a pattern, and the weights of conserved=, must be the same for all copies of a torch.vmap")
        x = get_unwrapped(x)
    return x


def given_pattern(jac_sparsity: Any, spec: StateSpec) -> SparsityPattern:
    """``jac_sparsity`` of the user as the pattern of flat states; that of complex entries may be given for a state in parts."""
    with temporarily_clear_interpreter_stack():
        return _given_pattern(jac_sparsity, spec)


def _given_pattern(jac_sparsity: Any, spec: StateSpec) -> SparsityPattern:
    n = sum(spec.sizes)
    pattern = SparsityPattern.from_any(unwrapped(jac_sparsity))
    entries = sum(size // (2 if d.is_complex else 1) for d, size in zip(spec.dtypes, spec.sizes, strict=True))
    if spec.split and pattern.shape == (entries, entries):
        import scipy.sparse as sp

        wide = [d.is_complex for d, size in zip(spec.dtypes, spec.sizes, strict=True) for _ in range(size // (2 if d.is_complex else 1))]
        place = torch.arange(entries, device="cpu").repeat_interleave(torch.tensor(wide, device="cpu").to(torch.int64) + 1).numpy()
        whole = pattern.to_scipy()[place][:, place]
        pattern = SparsityPattern.from_scipy(sp.csr_array(whole))
    if pattern.shape != (n, n):
        raise InvalidInput(f"jac_sparsity has shape {pattern.shape}, but the Jacobian has shape {(n, n)}")
    return pattern


def weights_in_parts(weights: Tensor, spec: StateSpec) -> Tensor:
    """Rows of weights (k, n) on complex entries as rows (2 k, 2 n) on real and imaginary parts."""
    if weights.shape[-1] == sum(spec.sizes):
        return weights.real if weights.is_complex() else weights
    w = weights.to(weights.dtype.to_complex())
    rows = [torch.stack([w.real, -w.imag], -1).flatten(1), torch.stack([w.imag, w.real], -1).flatten(1)]
    return torch.stack(rows, 1).flatten(0, 1)


def totals_in_parts(totals: Tensor | None, spec: StateSpec) -> Tensor | None:
    """Totals (..., k) of complex entries as (..., 2 k)."""
    if totals is None or not all(d.is_complex for d in spec.dtypes):
        return totals if totals is None or not totals.is_complex() else totals.real
    return torch.stack([totals.real, totals.imag], -1).flatten(-2)
