"""Coupled stages in derivatives: all slopes of a fully implicit step as one differentiable root."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg import LinearOperator, Log, Matrix, SparseMatrix
from ..linalg.pencil import Pencil, regular_size, split
from ..nonlinear import RootRecord
from ..system.system import Flat, System, VmappedSystem
from .implicit import JacobianRule, RootNode, RootOutputs, RootTask, SystemConditions
from .problem import StageAlgebra

__all__ = ["coupled_matrix", "coupled_pencils", "coupled_root"]

Rows = Sequence[Sequence[float]]


def coupled_root(
    system: System | VmappedSystem,
    inputs: Sequence[Tensor],
    recorded: Tensor,
    algebra: StageAlgebra,
    find: Callable[..., RootRecord],
    a: Rows,
    times: Sequence[Tensor],
    h: float | Tensor,
    y: Tensor,
) -> list[Tensor]:
    """The slopes ``k_i = f(times[i], y + h sum_j a_ij k_j)``, differentiable to any order in times, ``h``, ``y`` and inputs. Of a system
    with a residual those that solve ``F(times[i], y + h sum_j a_ij k_j, k_i) = 0``.

    ``recorded`` (s, B, n) are their values, which ``find`` takes as they are.
    """
    step = h if isinstance(h, Tensor) else y.new_full((y.shape[0], 1), h, dtype=y.dtype.to_real())
    conditions = _CoupledConditions(system, a)
    task = RootTask(conditions, conditions, find, _CoupledRule(system, a, algebra), algebra.linear_solver, Log(), lambda record: None)
    known = recorded.detach().movedim(0, 1).flatten(1)
    found = RootOutputs(*RootNode.apply(task, known, *times, step, y, *inputs)).raw
    return list(found.unflatten(1, (len(a), -1)).unbind(1))


@dataclass(frozen=True)
class _CoupledConditions(SystemConditions):
    """``k_i - f(t_i, y + h sum_j a_ij k_j) = 0``, or ``F(t_i, y + h sum_j a_ij k_j, k_i) = 0``, for ``k`` of shape ``(B, s n)``, with
    inputs ``(t_1, .., t_s, h, y, *inputs of f)``."""

    a: Rows

    def bind(self, inputs: Sequence[Tensor]) -> Flat:
        """The flat function of ``k``."""
        times, h, y, rest = _split(inputs, len(self.a))
        f = self.system.bind(rest)

        def implicit(_: Tensor, k: Tensor) -> Tensor:
            values, slopes = _values(self.a, h, y, k), k.unflatten(-1, (len(self.a), -1)).unbind(-2)
            return torch.cat([f(t, torch.cat([v, s], -1)) for t, v, s in zip(times, values, slopes, strict=True)], -1)

        def residual(_: Tensor, k: Tensor) -> Tensor:
            values = _values(self.a, h, y, k)
            return k - torch.cat([f(t, value) for t, value in zip(times, values, strict=True)], -1)

        return residual if self.system.residual is None else implicit


@dataclass(frozen=True)
class _CoupledRule(JacobianRule):
    """The Jacobian of `_CoupledConditions`, from one of ``f`` (n columns) at every stage and not by differentiating ``s n`` columns.

    ``levels``: the sizes and mapped inputs of the ``torch.vmap`` around, the outermost first.
    """

    system: System | VmappedSystem
    a: Rows
    algebra: StageAlgebra
    levels: tuple[tuple[int, tuple[int | None, ...]], ...] = ()

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        s = len(self.a)
        times, h, y, rest = _split(inputs, s)
        own = [self._rows(i, value) for i, value in enumerate((*times, h, y))]
        times, h, y = own[:s], own[s], own[s + 1]
        f = self.system.bind(rest)
        values = _values(self.a, h, y, x)
        if self.system.residual is not None:
            pairs = [torch.cat([v, k], -1) for v, k in zip(values, x.unflatten(-1, (s, -1)).unbind(-2), strict=True)]
            found = [split(self.algebra.jacobian(lambda v, t=t: f(t, v), pair)) for t, pair in zip(times, pairs, strict=True)]
            return coupled_pencils(self.a, h, found)
        blocks = [self.algebra.jacobian(lambda v, t=t: f(t, v), value) for t, value in zip(times, values, strict=True)]
        return coupled_matrix(self.a, h, blocks)

    def _rows(self, index: int, x: Tensor) -> Tensor:
        """An input of each copy as one of all rows."""
        for place, (size, dims) in enumerate(self.levels):
            if dims[index] is None:
                x = x.unsqueeze(place).expand(*x.shape[:place], size, *x.shape[place:])
        return x.flatten(0, len(self.levels))

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> _CoupledRule:
        """The rule for ``size`` copies: the rows of all."""
        system = VmappedSystem(self.system, size, in_dims[len(self.a) + 2 :])
        return replace(self, system=system, levels=((size, in_dims), *self.levels))


def _split(inputs: Sequence[Tensor], s: int) -> tuple[Sequence[Tensor], Tensor, Tensor, Sequence[Tensor]]:
    return inputs[:s], inputs[s], inputs[s + 1], inputs[s + 2 :]


def _values(a: Rows, h: Tensor, y: Tensor, k: Tensor) -> list[Tensor]:
    """``Y_i = y + h sum_j a_ij k_j`` from ``k`` (B, s n)."""
    ks = k.unflatten(-1, (len(a), -1)).unbind(-2)
    return [y + h * _mixed(row, ks) for row in a]


def _mixed(weights: Sequence[float], xs: Sequence[Tensor]) -> Tensor:
    parts = [x * w for w, x in zip(weights, xs, strict=True)]
    return sum(parts[1:], parts[0])


def coupled_matrix(a: Rows, h: Tensor, blocks: Sequence[Matrix]) -> Matrix:
    """The ``s n x s n`` matrices with blocks ``delta_ij I - h a_ij J_i``, of the kind of the ``J_i``; ``h`` is (B, 1).

    Sparse ``J_i`` must share a pattern that has the diagonal.
    """
    s, first = len(a), blocks[0]
    dense = [block for block in blocks if isinstance(block, Tensor)]
    sparse = [block for block in blocks if isinstance(block, SparseMatrix)]
    operators = [block for block in blocks if isinstance(block, LinearOperator)]
    if len(dense) == s:
        n = dense[0].shape[-1]
        weights = h.reshape(-1, 1, 1, 1) * torch.tensor(a, dtype=h.dtype, device=h.device)
        eye = torch.eye(s * n, dtype=dense[0].dtype, device=h.device)
        # (B, s, n, s, n) with the block's row i and column j in the places 1 and 3
        coupling = torch.stack(dense, 1).unsqueeze(3) * weights.squeeze(1)[:, :, None, :, None]
        return eye - coupling.flatten(3).flatten(1, 2)
    if len(sparse) == s:
        return _coupled_sparse(a, h, sparse)
    if len(operators) == s:
        return _coupled_operator(a, h, operators)
    raise TypeError(f"the Jacobians of the stages are of several kinds: {type(first).__name__} and others")


def coupled_pencils(a: Rows, h: Tensor, pencils: Sequence[Pencil]) -> Matrix:
    """The ``s n x s n`` matrices with blocks ``delta_ij E_i + h a_ij G_i``; ``h`` is (B, 1).

    Where it is zero, in steps that do nothing, that of a small step: the slopes are finite then, and times zero.
    """
    s, first = len(a), pencils[0].G
    h = regular_size(h, pencils[0])
    if isinstance(first, Tensor):
        n = first.shape[-1]
        weights = h.reshape(-1, 1, 1, 1, 1) * torch.tensor(a, dtype=h.dtype, device=h.device)[:, None, :, None]
        # (B, s, n, s, n) with the block's row i and column j in the places 1 and 3
        coupling = torch.stack([p.G for p in pencils], 1).unsqueeze(3) * weights  # type: ignore[list-item]
        eye = torch.eye(s, dtype=first.dtype, device=h.device)[:, None, :, None]
        masses = torch.stack([p.E for p in pencils], 1).unsqueeze(3) * eye  # type: ignore[list-item]
        return (coupling + masses).reshape(-1, s * n, s * n)
    assert isinstance(first, SparseMatrix)
    (n, _), (rows, columns) = first.shape, first.indices
    indices, values = [], []
    for i, row in enumerate(a):
        for j, weight in enumerate(row):
            indices.append(torch.stack([rows + i * n, columns + j * n]))
            E, G = pencils[i].E, pencils[i].G
            assert isinstance(E, SparseMatrix) and isinstance(G, SparseMatrix)
            values.append(E.values + h * weight * G.values if i == j else h * weight * G.values)
    places, entries = torch.cat(indices, 1), torch.cat(values, -1)
    order = (places[0] * (s * n) + places[1]).argsort()
    return SparseMatrix(places[:, order], entries[..., order], (s * n, s * n))


def _coupled_sparse(a: Rows, h: Tensor, blocks: Sequence[SparseMatrix]) -> SparseMatrix:
    s, (n, _) = len(a), blocks[0].shape
    rows, columns = blocks[0].indices
    on = (rows == columns).to(blocks[0].dtype)
    indices, values = [], []
    for i, row in enumerate(a):
        for j, weight in enumerate(row):
            indices.append(torch.stack([rows + i * n, columns + j * n]))
            part = -(h * weight) * blocks[i].values
            values.append(part + on if i == j else part)
    places, entries = torch.cat(indices, 1), torch.cat(values, -1)
    order = (places[0] * (s * n) + places[1]).argsort()
    return SparseMatrix(places[:, order], entries[..., order], (s * n, s * n))


def _coupled_operator(a: Rows, h: Tensor, blocks: Sequence[LinearOperator]) -> LinearOperator:
    s, one = len(a), blocks[0]

    def matvec(v: Tensor) -> Tensor:
        parts = v.unflatten(-1, (s, -1)).unbind(-2)
        sums = [_mixed(row, parts) for row in a]
        return v - h * torch.cat([block.matvec(x) for block, x in zip(blocks, sums, strict=True)], -1)

    def rmatvec(v: Tensor) -> Tensor:
        parts = v.unflatten(-1, (s, -1)).unbind(-2)
        pulled = []
        for block, part in zip(blocks, parts, strict=True):
            assert block.rmatvec is not None
            pulled.append(block.rmatvec(part))
        sums = [_mixed(column, pulled) for column in zip(*a, strict=True)]
        return v - h * torch.cat(sums, -1)

    back = rmatvec if all(block.rmatvec is not None for block in blocks) else None
    return LinearOperator(s * one.n, one.rows, one.dtype, one.device, matvec, back)
