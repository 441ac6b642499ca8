"""Which inputs can each output element depend on? Answered by running a function once while every operator is watched.

Beside each storage that depends on ``x`` stands a boolean CSR matrix with one row for each element of the storage and one column for each
element of ``x`` (index-set propagation; Griewank and Walther, Evaluating Derivatives, 2008, chapter 7). Keeping it with the storage, not
with the tensor, makes views free and in-place operators exact. Operators without a rule count as dense, never as sparse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from ..errors import UnsupportedCombination
from ..torch_internals import (
    OpOverload,
    TorchDispatchMode,
    decomposition_table,
    dispatch_has_kernel_for_dispatch_key,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)

__all__ = ["Call", "DependencyMode", "PatternTooDense", "Rows", "Untraceable", "unwrapped"]

#: boolean ``scipy.sparse.csr_array``, for which there are no useful types
Rows: TypeAlias = Any

#: more entries than this are not kept: such a Jacobian is for dense code or for products only
MAX_ENTRIES = 50_000_000


class Untraceable(Exception):
    """The operators that run depend on the values of ``x``, or leave what can be watched."""


class PatternTooDense(UnsupportedCombination):
    """The pattern has more entries than are worth keeping. Use a dense Jacobian or `jacobian_operator`."""


def check_size(entries: int) -> None:
    if entries > MAX_ENTRIES:
        raise PatternTooDense(
            f"the sparsity pattern (or one on the way to it) has {entries} entries, more than {MAX_ENTRIES}: "
            "use a dense Jacobian or products with it"
        )


def take(rows: Rows, index: np.ndarray) -> Rows:
    """Rows of a CSR matrix, repeated and reordered as ``index`` says."""
    check_size(int(np.diff(rows.indptr)[index].sum()))
    return rows[index]


def unite(a: Rows | None, b: Rows | None) -> Rows | None:
    if a is None or b is None or a is b:
        return a if b is None else b
    check_size(a.nnz + b.nnz)
    return a + b


def gather_union(targets: np.ndarray, sources: np.ndarray, n_out: int, rows: Rows) -> Rows:
    """Row ``t`` of the result is the union of the rows ``s`` of all pairs ``(t, s)``."""
    import scipy.sparse as sp

    check_size(int(np.diff(rows.indptr)[sources].sum()))
    pick = sp.csr_array((np.ones(len(targets), bool), (targets, sources)), shape=(n_out, rows.shape[0]))
    out = sp.csr_array(pick @ rows)
    out.sort_indices()
    return out


@dataclass
class _Cell:
    """What is known of one storage: ``unit`` bytes an element; ``value``: its values depend on ``x`` (perhaps with derivative zero);
    ``free``: its zeros may be accidents (a trainable parameter)."""

    ref: StorageWeakRef
    unit: int
    rows: Rows | None = None
    value: bool = False
    free: bool = False


@dataclass
class Call:
    """One operator call as the rules see it."""

    mode: DependencyMode
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def bound(self) -> dict[str, Any]:
        """Arguments by their names in the schema."""
        names = {}
        for i, spec in enumerate(self.func._schema.arguments):
            names[spec.name] = self.args[i] if i < len(self.args) else self.kwargs.get(spec.name, spec.default_value)
        return names

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def rows(self, t: Any) -> Rows | None:
        return self.mode.read(t) if isinstance(t, Tensor) else None

    @cached_property
    def targets(self) -> list[Tensor]:
        """All tensors that the call returns or writes into, each once."""
        named = self.bound()
        written = [named[a.name] for a in self.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        found: list[Tensor] = []
        for t in tree_leaves((self.out, written)):
            if isinstance(t, Tensor) and not any(_same_place(t, other) for other in found):
                found.append(t)
        return found


Rule = Callable[[Call], "Rows | list[Rows | None] | None"]

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class DependencyMode(TorchDispatchMode):
    """Watches operators; see the top of the module."""

    def __init__(self, n: int, rules: dict[str, Rule], pointwise: Rule, dense: Rule, cleared: Rule) -> None:
        super().__init__()
        self.n, self.rules, self.pointwise, self.dense, self.cleared = n, rules, pointwise, dense, cleared
        self.cells: dict[int, _Cell] = {}
        self.unknown: set[str] = set()
        self._count = 0

    # --- what is known of a tensor

    def cell(self, t: Tensor) -> _Cell | None:
        if t.layout != torch.strided:
            return None
        return self.cells.get(t.untyped_storage()._cdata)

    def read(self, t: Tensor) -> Rows | None:
        """``(t.numel(), n)``, or None where nothing depends on ``x``."""
        cell = self.cell(t)
        if cell is None or cell.rows is None:
            return None
        size = t.element_size()
        if _fills_storage(t) and size == cell.unit:
            return cell.rows
        positions = _positions(t)
        if size <= cell.unit:
            return take(cell.rows, positions * size // cell.unit)
        parts = size // cell.unit
        out = None
        for k in range(parts):
            out = unite(out, take(cell.rows, positions * parts + k))
        return out

    def write(self, t: Tensor, rows: Rows | None, value: bool = True, free: bool = False) -> None:
        import scipy.sparse as sp

        if t.layout != torch.strided:
            if rows is not None or value:
                raise Untraceable("a sparse tensor is made of values that depend on x")
            return
        key, size = t.untyped_storage()._cdata, t.element_size()
        old = self.cells.get(key)
        if _fills_storage(t) or (old is None and rows is None):
            self.cells[key] = _Cell(StorageWeakRef(t.untyped_storage()), size, rows, value, free)
            return
        if old is None:
            old = _Cell(StorageWeakRef(t.untyped_storage()), size)
        unit = min(size, old.unit)
        total = t.untyped_storage().nbytes() // unit
        whole = sp.csr_array((total, self.n), dtype=bool) if old.rows is None else old.rows
        if old.unit > unit and old.rows is not None:
            whole = take(whole, np.arange(total) * unit // old.unit)
        positions = _positions(t)
        parts = size // unit
        places = (positions[:, None] * parts + np.arange(parts)).reshape(-1)
        new = sp.csr_array((t.numel(), self.n), dtype=bool) if rows is None else rows
        source = np.arange(total)
        source[places] = total + np.repeat(np.arange(t.numel()), parts)
        merged = take(sp.csr_array(sp.vstack([whole, new], format="csr")), source)
        self.cells[key] = _Cell(old.ref, unit, merged, old.value or value, old.free or free)

    def is_free(self, t: Tensor) -> bool:
        """Whether zeros of this constant may be accidents of its value."""
        cell = self.cell(t)
        return t.requires_grad or (cell is not None and cell.free)

    # --- the watch

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            raise Untraceable(f"{func} is not an operator that can be watched")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        cells = [self.cell(t) for t in tensors]
        depends = any(c is not None and (c.rows is not None or c.value) for c in cells)
        free = any(t.requires_grad for t in tensors) or any(c is not None and c.free for c in cells)
        if (not depends and not free) or any(t.device.type == "meta" for t in tensors):
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if depends and _BY_VALUE & set(func.tags) and self._value_matters(name, args, tensors):
            raise Untraceable(f"{name} uses the values of a tensor that depends on x (a branch, .item(), a mask or an index made from x)")
        if _is_composite(func):  # reaches us in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        has_rows = any(c is not None and c.rows is not None for c in cells)
        rule = self._rule(name, func) if has_rows else None
        if has_rows and rule is None:
            table = decomposition_table()
            if func in table and not func._schema.is_mutable:
                with self:
                    return table[func](*args, **kwargs)
            self.unknown.add(str(func))
            rule = self.dense
        out = func(*args, **kwargs)
        call = Call(self, func, args, kwargs, out)
        if any(t.device.type == "meta" for t in call.targets):  # shapes without values
            return out
        self._record(call, rule, depends, free, tensors)
        self._purge()
        return out

    def _value_matters(self, name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        if name in ("index", "masked_select", "_unsafe_index"):  # moving x about is no use of its values
            return any(self.depends(t) and t.dtype == torch.bool for t in tree_leaves(args[1:]) if isinstance(t, Tensor))
        return any(self.depends(t) for t in tensors)

    def depends(self, t: Tensor) -> bool:
        cell = self.cell(t)
        return cell is not None and (cell.rows is not None or cell.value)

    def _rule(self, name: str, func: Any) -> Rule | None:
        for key in (name, name.rstrip("_"), name.removesuffix("_copy")):
            if key in self.rules:
                return self.rules[key]
        if torch.Tag.pointwise in func.tags:
            return self.pointwise
        return self.rules["view"] if func.is_view else None

    def _record(self, call: Call, rule: Rule | None, depends: bool, free: bool, tensors: list[Tensor]) -> None:
        targets = call.targets
        if not call.func._schema.is_mutable:
            known = {t.untyped_storage()._cdata for t in tensors if t.layout == torch.strided}
            if all(t.layout == torch.strided and t.untyped_storage()._cdata in known for t in targets):
                for t in targets if free else ():  # views: the cell of the storage serves them
                    self.mark_free(t)
                return
        depends, free = depends and rule is not self.cleared, free and rule is not self.cleared
        results = self._results(call, rule)
        for t, rows in zip(targets, results, strict=True):
            smooth = t.is_floating_point() or t.is_complex()
            self.write(t, rows if smooth else None, depends, free)

    def _results(self, call: Call, rule: Rule | None) -> list[Rows | None]:
        found = rule(call) if rule is not None else None
        results = found if isinstance(found, list) else [found] * len(call.targets)
        shapes = [t.numel() for t in call.targets]
        if len(results) == len(shapes) and all(r is None or r.shape[0] == s for r, s in zip(results, shapes, strict=True)):
            return results
        self.unknown.add(str(call.func))  # an overload for which the rule is not meant
        dense = self.dense(call)
        assert isinstance(dense, list)
        return dense

    def mark_free(self, t: Tensor) -> None:
        if t.layout == torch.strided:
            key = t.untyped_storage()._cdata
            cell = self.cells.setdefault(key, _Cell(StorageWeakRef(t.untyped_storage()), t.element_size()))
            cell.free = True

    def _purge(self) -> None:
        """Forget storages that no tensor uses any more."""
        self._count += 1
        if self._count % 16 == 0:
            self.cells = {key: cell for key, cell in self.cells.items() if not cell.ref.expired()}


def _is_composite(func: Any) -> bool:
    return dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")



def _same_place(a: Tensor, b: Tensor) -> bool:
    if a is b or a.layout != torch.strided or b.layout != torch.strided:
        return a is b
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and a.shape == b.shape and a.stride() == b.stride() and a.storage_offset() == b.storage_offset() and a.dtype == b.dtype


def _fills_storage(t: Tensor) -> bool:
    return t.storage_offset() == 0 and t.is_contiguous() and t.numel() * t.element_size() == t.untyped_storage().nbytes()


def _positions(t: Tensor) -> np.ndarray:
    """Where in its storage each element of ``t`` lies, in elements of its own size."""
    count = t.untyped_storage().nbytes() // t.element_size()
    return torch.arange(count, device="cpu").as_strided(t.shape, t.stride(), t.storage_offset()).reshape(-1).numpy()


def unwrapped(t: Any) -> tuple[int, Any]:
    """The tensor below the wrappers of outer ``torch.func`` transforms, lanes of vmap first, and how many lanes there are."""
    lanes = 1
    while isinstance(t, Tensor) and is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            place = maybe_get_bdim(t)
            inner = get_unwrapped(t)
            t = inner.movedim(place, 0)
            lanes *= t.shape[0]
        else:
            t = get_unwrapped(t)
    return lanes, t
