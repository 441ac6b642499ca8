"""Rates that the matrices of implicit steps do not hold any more beside faster ones, and with them the derivatives that depend on these.

A step goes by ``I - h a J`` (``M - h a J``, ``E + h a G``), whose entries are sums of all rates that a component has. Where two components
exchange with a rate ``k`` of which their sum knows nothing, what that does by itself, slower than ``eps k``, is lost in the entries of
``J``, before anything is added to them or solved for: the iteration for stages puts it right by evaluating ``fun`` itself, but derivatives
are solutions of systems with the matrix, and products with ``J*`` add up the same rates. Large entries alone say nothing: a component
that is driven to where it belongs has them too, and loses nothing. So a system with the matrix of the longest step is solved twice, once
with what rounding may have made of its entries (the componentwise condition of Skeel 1979, estimated from below by some signs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integrate import Plan, Record
from ..integrate.newton import jacobian_at, mass_product, shifted
from ..linalg import LinearOperator, LinearSolver, Log, Matrix, SparseMatrix
from ..linalg.pencil import Pencil, scaled_factors, split
from ..system.jacobians import wave
from ..system.origins import readable
from ..system.remarks import remark
from ..system.system import System, VmappedSystem
from .undeclared import whole

__all__ = ["tell_of_lost_rates"]

#: the part of derivatives that may be lost without a word: so much, and so many times the relative tolerance
_LOST, _TOLERANCES = 1e-3, 10.0
#: signs of roundings that are tried
_PATTERNS = 8


def tell_of_lost_rates(
    system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor], jacobian: Any, solver: LinearSolver
) -> None:
    """Warn where derivatives of a solve by an implicit method lack what is slow beside what is fast."""
    told = whole()
    if not len(record.h) or not record.last.numel() or not readable(record.h) or (told is not None and (told.lost or not told.rates.due())):
        return
    with torch.no_grad():
        found = _lost(system, plan, record, inputs, jacobian, solver)
    if found is None:
        return
    if told is not None:
        told.lost = True
    part, row, t = found
    where = f"t = {t:.6g}" + (f" in trajectory {row}" if len(record.status) > 1 else "")
    remark(
        f"fun has rates near {where} beside which slower ones are lost to rounding in the Jacobian: derivatives may be off by "
        f"{min(part, 1.0):.1g} of themselves (values are right). Where fast exchange leaves a sum unchanged, make that sum a variable in "
        "the place of one of its parts (docs/methods.md, fast exchange with a slow total)",
        RuntimeWarning,
    )


def _lost(
    system: System | VmappedSystem, plan: Plan, record: Record, inputs: Sequence[Tensor], jacobian: Any, solver: LinearSolver
) -> tuple[float, int, float] | None:
    """The part of its derivatives that a trajectory may have lost, that of the one that lost most; which that is, and the time of its
    longest step. None where it is not much, or nothing is known of the matrices."""
    if len(record.status) == 1 and int(record.status) < 0:
        return None
    lengths = record.h.abs()
    k, span = lengths.argmax(0, keepdim=True), lengths.sum(0)
    size, y = record.h.gather(0, k)[0], record.last
    # within the step: at its ends fun may be that beyond a jump
    t = record.t.gather(0, k)[0] + size / 2
    if len(record.states) == len(record.h) + 1:
        y = record.states.gather(0, (k + 1).unsqueeze(-1).expand(-1, -1, y.shape[-1]))[0]
    if len(record.status) > 1:
        # those of no length and those that failed stand on a state of another one, which is looked at for them
        going = (size != 0) & (record.status >= 0) & torch.isfinite(y).all(-1)
        other = int(going.to(torch.int8).argmax())
        y, size, span = torch.where(going.unsqueeze(-1), y, y[other]), torch.where(going, size, size[other]), torch.where(going, span, 0.0)
    if not bool(span.any()):
        return None
    real, eps = plan.real, torch.finfo(plan.real).eps
    rtol = plan.rtol if isinstance(plan.rtol, float) else float(plan.rtol.min())
    allowed = max(_LOST, _TOLERANCES * rtol)
    matrices = _matrices(system, plan.method.additive, record, inputs, jacobian, t.to(real), y, size.to(real), k)
    if matrices is None:
        return None
    # states that matter as much as their tolerances say
    unit = torch.add(y.abs(), plan.atol / max(rtol, eps)).clamp(min=torch.finfo(real).tiny ** 0.5)
    least, most = unit.aminmax()
    if system.residual is None and _largest(matrices[1]) * float(span.max() * (most / least)) * eps <= allowed:
        return None
    equations = _Equations.of(matrices, system.residual is not None, size.to(real).unsqueeze(-1))
    part = equations.moved(unit, eps, solver) * span / size.abs()
    row = int(part.argmax())
    return (float(part[row]), row, float(t[row])) if float(part[row]) > allowed else None


def _matrices(
    system: System | VmappedSystem,
    additive: bool,
    record: Record,
    inputs: Sequence[Tensor],
    jacobian: Any,
    t: Tensor,
    y: Tensor,
    size: Tensor,
    k: Tensor,
) -> tuple[Matrix | None, Matrix] | None:
    """What stands in front of slopes, None for nothing, and the Jacobian: of implicit equations ``F_y'`` and ``F_y``. None for operators,
    of which the entries are not known."""
    if system.residual is None:
        found = jacobian_at(jacobian, (system.parts[1] if additive else system).bind(inputs), t, y)
        return None if isinstance(found, LinearOperator) else (system.mass_matrix(inputs), found)
    if len(record.states) != len(record.h) + 1:
        return None
    before = record.states.gather(0, k.unsqueeze(-1).expand(-1, -1, y.shape[-1]))[0]
    f = system.bind(inputs)
    found = jacobian(lambda pair: f(t, pair), torch.cat([y, (y - before) / size.unsqueeze(-1)], -1))
    if isinstance(found, LinearOperator):
        return None
    pencil = split(found)
    return pencil.E, pencil.G


@dataclass(frozen=True, eq=False)
class _Equations:
    """The matrices ``A`` of one step, the sizes of what their entries are sums of, and the one in front of slopes."""

    matrix: Matrix
    sizes: Matrix
    mass: Matrix | None

    @classmethod
    def of(cls, matrices: tuple[Matrix | None, Matrix], implicit: bool, h: Tensor) -> _Equations:
        """From the two of `_matrices`; ``implicit``: those of ``F(t, y, y') = 0``."""
        mass, slopes = matrices
        if implicit:
            assert mass is not None
            return cls(Pencil(mass, slopes).at(h), Pencil(_sizes(mass), _sizes(slopes)).at(h.abs()), mass)
        assert mass is None or isinstance(mass, Tensor)
        return cls(shifted(slopes, h, mass), shifted(_sizes(slopes), -h.abs(), None if mass is None else mass.abs()), mass)

    def moved(self, unit: Tensor, eps: float, solver: LinearSolver) -> Tensor:
        """``(B,)``: by what part of itself the cotangent that a step hands on changes with roundings of the entries."""
        factors = scaled_factors(solver, self.matrix, Log())
        side = torch.zeros_like(factors.scale, dtype=self.matrix.dtype) + wave(unit) / unit
        found = factors.solve_adjoint(side)
        off = _transposed(self.sizes, found.abs()).to(side.dtype) * eps
        patterns = [torch.ones_like(unit), *(wave(unit, float(turn)).sign() for turn in range(1, _PATTERNS))]
        change = torch.stack([self._carried(factors.solve_adjoint(off * pattern), unit) for pattern in patterns]).amax(0)
        # a matrix that is singular to rounding has lost all
        return (change / self._carried(found, unit)).nan_to_num(1.0, 1.0, 1.0)

    def _carried(self, x: Tensor, unit: Tensor) -> Tensor:
        """The size of what goes on to the step before."""
        return ((x if self.mass is None else _transposed(self.mass, x)).abs() * unit).amax(-1)


def _sizes(matrix: Matrix) -> Any:
    if isinstance(matrix, SparseMatrix):
        return SparseMatrix(matrix.indices, matrix.values.abs(), matrix.shape)
    assert isinstance(matrix, Tensor)
    return matrix.abs()


def _largest(matrix: Matrix) -> float:
    entries = matrix.values if isinstance(matrix, SparseMatrix) else matrix
    assert isinstance(entries, Tensor)
    return float(entries.abs().max()) if entries.numel() else 0.0


def _transposed(matrix: Matrix, x: Tensor) -> Tensor:
    if isinstance(matrix, SparseMatrix):
        return matrix.matvec(x, transposed=True, conjugated=True)
    assert isinstance(matrix, Tensor)
    return mass_product(matrix.mH, x)
