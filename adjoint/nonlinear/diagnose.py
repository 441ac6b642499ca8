"""Why a Jacobian is singular, in words."""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg import LinearOperator, Matrix, SparseMatrix
from .protocol import RootRecord, RootStatus

__all__ = ["explain", "left_null_vectors", "right_null_vectors"]

_DENSE = 500


def left_null_vectors(matrix: Matrix, row: int = 0, rtol: float | None = None) -> Tensor | None:
    """``(k, n)``: unit vectors ``w`` with ``w A = 0`` to rounding; None where it cannot be told (operators, non-finite entries).

    By singular values up to 500 unknowns, else by block inverse iteration with the shifted sparse factors of SciPy. Rows and columns are
    equilibrated first, so that badly scaled equations are not mistaken for dependent ones.
    """
    if isinstance(matrix, LinearOperator):
        return None
    if isinstance(matrix, SparseMatrix):
        values = matrix.values if matrix.values.dim() == 1 else matrix.values[row]
        one: Matrix = SparseMatrix(matrix.indices, values.unsqueeze(0), matrix.shape)
        if max(matrix.shape) > _DENSE:
            return _by_iteration(matrix.indices, values, matrix.shape, rtol) if bool(torch.isfinite(values).all()) else None
        dense = one.dense()[0]
    else:
        dense = matrix[row if matrix.shape[0] > 1 else 0]
    if not bool(torch.isfinite(dense).all()):
        return None
    by_row, by_column = _equilibrate(dense.abs())
    U, S, _ = torch.linalg.svd(by_row.unsqueeze(-1) * dense * by_column)
    limit = (rtol or 10 * max(dense.shape) * torch.finfo(S.dtype).eps) * S[0] if S.numel() else 0.0
    found = U[:, (limit >= S).nonzero()[:, 0]].mH * by_row
    return _tidy(found)


def right_null_vectors(matrix: Matrix, row: int = 0, rtol: float | None = None) -> Tensor | None:
    """``(k, n)``: unit vectors ``v`` with ``A v = 0``, as `left_null_vectors`."""
    if isinstance(matrix, Tensor):
        return left_null_vectors(matrix.mT, row, rtol)
    if isinstance(matrix, LinearOperator):
        return None
    order = torch.argsort(matrix.indices[1] * matrix.shape[0] + matrix.indices[0])
    flipped = SparseMatrix(matrix.indices.flip(0)[:, order], matrix.values[..., order], (matrix.shape[1], matrix.shape[0]))
    return left_null_vectors(flipped, row, rtol)


def explain(record: RootRecord, matrix: Matrix, row: int = 0, names: list[str] | None = None) -> str:
    """Sentences on what makes the Jacobian at ``record.x`` singular in one row, or "" if nothing was found. ``names`` of components."""
    left = left_null_vectors(matrix, row)
    if left is None or not left.shape[0]:
        return ""
    n = left.shape[1]
    label = [str(i) for i in range(n)] if names is None else names
    said = [_say(w, label) for w in left[:5]]
    if left.shape[0] > 5:
        said.append(f"and {left.shape[0] - 5} more")
    right = right_null_vectors(matrix, row)
    unused = [] if right is None else [_places(v, label) for v in right if int(_involved(v).numel()) == 1]
    if unused:
        said.append(f"no equation depends on component {', '.join(unused[:5])} here")
    if record.status.numel() and int(record.status[row]) == RootStatus.SUCCESS:
        said.append("the root is not isolated, or a fold")
    return "; ".join(said) + ". If these hold for every x, name the totals with `conserved=`; if only here, the root is at a fold."


def _say(w: Tensor, label: list[str]) -> str:
    places = _involved(w)
    chosen = w[places].real if w.is_complex() else w[places]
    if places.numel() == 1:
        return f"equation {_places(w, label)} does not depend on any unknown (so component {_places(w, label)} is conserved)"
    if bool((chosen - 1).abs().max() < 1e-6):
        return f"the sum of components {_places(w, label)} is conserved"
    if places.numel() > 12:
        return f"a combination of {places.numel()} components is conserved, among them {_places(w, label)}"
    terms = " + ".join(f"{float(c):.4g} x[{label[int(i)]}]" for c, i in zip(chosen, places, strict=True))
    return f"the combination {terms} is conserved".replace("+ -", "- ")


def _involved(w: Tensor) -> Tensor:
    return (w.abs() > 1e-6 * w.abs().max()).nonzero()[:, 0]


def _places(w: Tensor, label: list[str]) -> str:
    names = [label[int(i)] for i in _involved(w)[:12]]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _equilibrate(size: Tensor) -> tuple[Tensor, Tensor]:
    by_row = 1 / torch.where(size.amax(1) > 0, size.amax(1), 1.0)
    columns = (by_row.unsqueeze(-1) * size).amax(0)
    return by_row, 1 / torch.where(columns > 0, columns, 1.0)


def _tidy(vectors: Tensor) -> Tensor:
    """The reduced echelon form of the span: simple vectors, with a largest entry of one."""
    out = vectors.clone()
    for i in range(out.shape[0]):
        out[i:] = out[i:] / out[i:].abs().amax(1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny)
        flat = int(out[i:].abs().argmax())
        j, pivot = i + flat // out.shape[1], flat % out.shape[1]
        out[[i, j]] = out[[j, i]]
        out[i] = out[i] / out[i, pivot].clone()
        others = [r for r in range(out.shape[0]) if r != i]
        out[others] = out[others] - out[others, pivot].unsqueeze(-1) * out[i]
    out = torch.where(out.abs() > 1e-10, out, 0.0)
    return out / out.abs().amax(1, keepdim=True).clamp(min=torch.finfo(out.dtype).tiny) if out.shape[0] else out


def _by_iteration(indices: Tensor, values: Tensor, shape: tuple[int, int], rtol: float | None, block: int = 8) -> Tensor | None:
    """Null vectors of ``A*`` by inverse iteration on ``A* + shift``, a block at once."""
    import numpy as np
    import scipy.sparse as sp
    import scipy.sparse.linalg as spl

    if shape[0] != shape[1]:
        return None
    n = shape[0]
    A = sp.csc_matrix((values.cpu().numpy(), tuple(indices.cpu().numpy())), shape=shape)
    rows = np.asarray(abs(A).max(axis=1).todense()).ravel()
    by_row = 1 / np.where(rows > 0, rows, 1.0)
    scaled = sp.diags(by_row) @ A
    eps = np.finfo(scaled.dtype).eps
    adjoint = scaled.conj().T.tocsc()
    # the inverse of the augmented matrix amplifies singular vectors of small singular values, even where A is defective
    lu = spl.splu(sp.bmat([[1e-3 * np.sqrt(eps) * sp.identity(n), adjoint], [scaled, -1e-3 * np.sqrt(eps) * sp.identity(n)]], format="csc"))
    V = np.random.default_rng(0).standard_normal((n, block)).astype(scaled.dtype)
    for _ in range(6):
        V = lu.solve(np.concatenate([np.zeros_like(V), V]))[n:]
        V, _ = np.linalg.qr(V)
    _, s, right = np.linalg.svd(adjoint @ V, full_matrices=False)
    limit = (rtol or 10 * n * eps) * abs(scaled).sum(axis=1).max()
    found = (V @ right[s <= limit].conj().T).conj().T * by_row
    return _tidy(torch.as_tensor(found, dtype=values.dtype, device=values.device))
