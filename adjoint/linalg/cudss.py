"""Sparse LU on CUDA devices by NVIDIA's cuDSS, where the package ``nvmath-python`` is installed."""

from __future__ import annotations

import importlib
import time
import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from .protocol import Factorization, Log, Matrix, SparseMatrix, check_sides
from .sparse_lu import to_sparse

__all__ = ["CuDSS"]

_DEVICES = ("cuda",)
_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


def _direct_solver() -> Any:
    try:
        return importlib.import_module("nvmath.sparse.advanced").DirectSolver
    except ImportError as error:
        raise InvalidInput(
            "linear_solver=CuDSS() needs the package nvmath-python: pip install 'nvmath-python[cu12]' or 'nvmath-python[cu13]', "
            "whichever fits the CUDA of torch"
        ) from error


class _Places:
    """The pattern of a matrix or of its transpose, by rows, as cuDSS takes it."""

    def __init__(self, indices: Tensor, n: int, transposed: bool) -> None:
        rows, columns = indices.flip(0) if transposed else indices
        # entries come sorted by row and then by column
        self.order = torch.argsort(rows * n + columns) if transposed else None
        if self.order is not None:
            rows, columns = rows[self.order], columns[self.order]
        counts = torch.bincount(rows, minlength=n)
        self.n, self.full = n, bool((counts > 0).all())
        kind = torch.int32 if rows.numel() < 2**31 else torch.int64
        self.starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(kind)
        self.columns = columns.to(kind)

    def sorted(self, values: Tensor) -> Tensor:
        return values if self.order is None else values[self.order]


class _Plan:
    """cuDSS's analysis of a pattern, and the factors of one matrix at a time, those of ``owner``.

    The analysis holds for as long as the buffers are the same ones, so values and sides are written into them."""

    def __init__(self, places: _Places) -> None:
        self.places, self.fill = places, 0
        # weak, or memory on the device would wait for the collector of cycles
        self.owner: weakref.ref[Any] | None = None
        self.solver: Any = None

    def take(self, owner: object, values: Tensor) -> None:
        """Factorise."""
        self.owner = None
        ordered = self.places.sorted(values)
        if self.solver is None:
            n, places = self.places.n, self.places
            self.values = ordered.clone()
            self.side = self.values.new_zeros(n)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that torch's sparse tensors are in beta
                self.matrix = torch.sparse_csr_tensor(places.starts, places.columns, self.values, size=(n, n), check_invariants=False)
            self.solver = _direct_solver()(self.matrix, self.side)
            weakref.finalize(self, self.solver.free)
            self.solver.plan()
        else:
            self.values.copy_(ordered)
        self.fill = int(self.solver.factorize().lu_nnz)
        self.owner = weakref.ref(owner)

    def belongs_to(self, row: object) -> bool:
        return self.owner is not None and self.owner() is row

    def solve(self, side: Tensor) -> Tensor:
        self.side.copy_(side)
        return self.solver.solve()


class _Row:
    """One matrix. cuDSS has no solve with the transpose: that has a plan of its own, made when it is first asked for."""

    def __init__(self, values: Tensor, matrix: SparseMatrix, plans: tuple[_Plan, _Plan]) -> None:
        self.values, self.plans = values, plans
        self.singular = not (plans[0].places.full and plans[1].places.full and bool(torch.isfinite(values).all()))
        if self.singular or matrix.shape[0] == 0:
            return
        # pivots that are too small are perturbed in silence; a singular matrix has no solution for a random side
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(matrix.shape[0], generator=generator, dtype=torch.float64).to(values.device, values.dtype)
        x = self._plan(False).solve(probe)
        residual = SparseMatrix(matrix.indices, values, matrix.shape).matvec(x.unsqueeze(0))[0] - probe
        limit = 1e-8 if torch.finfo(values.dtype).bits == 64 else 1e-3
        self.singular = not bool(residual.abs().max() <= limit * probe.abs().max())  # NaN is not less either

    def _plan(self, transposed: bool) -> _Plan:
        plan = self.plans[transposed]
        if not plan.belongs_to(self):
            plan.take(self, self.values)
        return plan

    @property
    def fill(self) -> int:
        return sum(plan.fill for plan in self.plans if plan.belongs_to(self))

    def solve(self, side: Tensor, transposed: bool, conjugated: bool) -> Tensor:
        """For ``side`` of shape ``(n,)`` or ``(n, k)``."""
        if self.singular or side.numel() == 0:
            return torch.full_like(side, float("nan"))
        plan, turn = self._plan(transposed), conjugated and side.is_complex()
        columns = side.reshape(side.shape[0], -1).unbind(1)
        # the solution for the conjugate is that of the conjugated side, conjugated
        each = [plan.solve(c.conj()).conj().resolve_conj() if turn else plan.solve(c) for c in columns]
        # an infinite side need not reach every component
        each = [torch.where(torch.isfinite(c).all(), x, float("nan")) for c, x in zip(columns, each, strict=True)]
        return torch.stack(each, 1).reshape(side.shape)


class _CuDSSFactors(Factorization):
    def __init__(self, matrix: SparseMatrix, log: Log, before: _CuDSSFactors | None) -> None:
        start = time.perf_counter()
        if matrix.device.type not in _DEVICES:
            raise InvalidInput(f"CuDSS() takes matrices on CUDA devices, got one on {matrix.device}: use SparseLU() there")
        if matrix.dtype not in _DTYPES:
            raise UnsupportedCombination(f"CuDSS() takes single and double precision, real and complex, got {matrix.dtype}")
        if matrix.shape[0] != matrix.shape[1]:
            raise InvalidInput(f"only square matrices are factorised, got {matrix.shape}")
        _direct_solver()
        values = (matrix.values if matrix.values.dim() == 2 else matrix.values.unsqueeze(0)).detach().resolve_conj().resolve_neg()
        self.rows, self.n, self.dtype, self.device, self.log = values.shape[0], matrix.shape[0], matrix.dtype, matrix.device, log
        self.indices = matrix.indices
        if before is None:
            places = _Places(matrix.indices, self.n, False), _Places(matrix.indices, self.n, True)
            plans = [(_Plan(places[0]), _Plan(places[1])) for _ in values]
        else:
            plans = [row.plans for row in before.factors]
        # values are copied: the caller may change them in place, and factors may have to be made again
        self.factors = [_Row(v.clone(), matrix, p) for v, p in zip(values, plans, strict=True)]
        log.n_factorizations += self.rows
        log.n_refactorizations += 0 if before is None else self.rows
        log.fill = sum(row.fill for row in self.factors)
        log.factor_seconds += time.perf_counter() - start

    def singular(self) -> Tensor:
        return torch.tensor([row.singular for row in self.factors], dtype=torch.bool, device=self.device)

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        start = time.perf_counter()
        check_sides(self, b)
        self.log.n_solves += b.shape[0] * (b.shape[2] if b.dim() == 3 else 1)
        sides = b.detach().resolve_conj().resolve_neg()
        out = torch.empty_like(sides)
        for k, side in enumerate(sides):
            out[k] = self.factors[0 if self.rows == 1 else k].solve(side, transposed, conjugated)
        self.log.solve_seconds += time.perf_counter() - start
        return out


@dataclass(frozen=True)
class CuDSS:
    """LU of sparse matrices on a CUDA device by NVIDIA's cuDSS, through ``nvmath-python``. Its analysis is kept in `refactor`.

    Experimental: written against the interface of ``nvmath-python`` 1.0 and tested with a stand-in for it; the authors have not yet run
    it on a GPU. Real and complex, single and double precision. Solves with the transpose factorise that too, once, when first asked for.
    Right-hand sides and the matrices of a batch are taken one after the other. cuDSS perturbs pivots that are too small: matrices
    that it then cannot solve with count as singular.
    """

    def factor(self, matrix: Matrix, log: Log | None = None) -> Factorization:
        """See `LinearSolver.factor`. Dense matrices are taken by their entries. Raises `InvalidInput` for matrices on other devices
        and without the package, `UnsupportedCombination` for operators and other dtypes."""
        return _CuDSSFactors(to_sparse(matrix), Log() if log is None else log, None)

    def refactor(self, factorization: Factorization, matrix: Matrix) -> Factorization:
        """See `LinearSolver.refactor`. Old factors stay valid: they are made again should they be asked for."""
        sparse = to_sparse(matrix)
        same = (
            isinstance(factorization, _CuDSSFactors)
            and (factorization.n, factorization.n) == tuple(sparse.shape)
            and factorization.dtype == sparse.dtype
            and factorization.device == sparse.device
            and factorization.indices.shape == sparse.indices.shape
            and torch.equal(factorization.indices, sparse.indices)
            and factorization.rows == (sparse.values.shape[0] if sparse.values.dim() == 2 else 1)
        )
        return _CuDSSFactors(sparse, factorization.log, factorization if same else None)  # type: ignore[arg-type]
