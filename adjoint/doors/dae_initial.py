"""Initial values of implicit equations: their structure at the start, what is solved for, and trajectories that have none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..errors import HigherIndexDAE, InconsistentInitialCondition, InvalidInput, SingularJacobian, UnsupportedCombination
from ..linalg import SparseMatrix
from ..linalg.pencil import Pencil, split
from ..native.consistent import NativeStart
from ..sensitivity.consistent import Bounds, Initial, all_lost, complete, complete_values, lost_rows, residual_report, rtol_of_search
from ..sensitivity.problem import StageAlgebra
from ..system.structure import Structure, analyse, analyse_large, dense_pencil
from ..system.system import StateSpec, System
from ..system.transforms import copies_of, copy_at, copy_where, one_copy, vmap_active
from ..torch_internals import temporarily_clear_interpreter_stack

__all__ = ["initial_values", "off_given"]

#: unknowns above which the structure is looked for by one factorisation before anything else
_LARGE = 128


@dataclass(frozen=True)
class _Place:
    """Where the equations are looked at: plain values below all transforms, since what is found outlives them. Of the copies of a map it is
    one (see `copy_where`) in which the equations are finite."""

    system: System
    inputs: Sequence[Tensor]
    t: Tensor
    y: Tensor
    yp: Tensor

    def pencil(self) -> tuple[Tensor, Tensor]:
        """``E`` and ``G``, dense."""
        return dense_pencil(self.system, self.inputs, self.t, self.y, self.yp)


def initial_values(
    system: System,
    algebra: StageAlgebra,
    t0: Tensor,
    given: Initial,
    inputs: Sequence[Tensor],
    *,
    consistent: str,
    differential: Any,
    user_spec: StateSpec,
    skip: bool,
    tolerances: dict[str, Any],
    bounds: Bounds = (None, None),
    native: NativeStart | None = None,
    throw: bool = True,
) -> tuple[Initial, StageAlgebra]:
    """Consistent values, and the matrices' `StageAlgebra` with what the structure says. ``native``: the equations as compiled code.

    Without ``throw`` trajectories that have no consistent values are NaN, of which the solve says that they failed.
    """
    n, real = sum(system.spec.sizes), system.spec.real_dtype
    t = t0.to(real)
    mask = _mask(differential, user_spec, n, given.y.device)
    if all_lost(given):
        # the solve will say so
        return given, algebra
    lost = lost_rows(given)
    whole, given = given, given if lost is None else lost.replaced(given)
    place = _place(system, t, given, inputs)
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        structure = _structure(place, algebra, mask, native, throw)
    if structure is None:
        return _without(whole, whole, torch.ones_like(whole.y[:, 0], dtype=torch.bool)), algebra
    algebra = replace(
        algebra,
        index=structure.variable_index if structure.index > 1 else None,
        structure=structure,
        skipped=~structure.differential if skip and not bool(structure.differential.all()) else None,
    )
    if structure.hidden.shape[-1] and consistent == "slopes":
        raise UnsupportedCombination("consistent='slopes' is for equations of index 0 and 1; of index 2 give y0, with 'solve'")
    if consistent == "trust":
        return whole, algebra
    there = torch.ones_like(given.y[:, 0], dtype=torch.bool) if lost is None else ~lost.lost
    refused = torch.zeros_like(there)
    if structure.hidden.shape[-1]:
        refused = there & _off_constraints(place, structure, _residual(system, t, given, inputs), tolerances)
        if throw and (row := _first(refused)) is not None:
            raise _violated(system, structure, _residual(system, t, given, inputs), row)
    rtol = rtol_of_search(real)
    where = (system, algebra, structure, t, given.y, given.yp, inputs, rtol, bounds)
    found = complete_values(*where, throw) if consistent == "slopes" else complete(*where, native, throw)
    if consistent in ("auto", "check"):
        off = off_given(consistent, structure.differential, given, found, tolerances)
        refused = refused | (there & off.any(-1))
        if throw and (row := _first(refused)) is not None:
            raise _inconsistent(system, structure, _residual(system, t, given, inputs), off, row)
    if consistent == "check":
        found = whole
    elif lost is not None:
        found = lost.restored(found, whole)
    if throw:
        return found, algebra
    return _without(whole, found, refused | ~torch.isfinite(found.y.detach()).all(-1)), algebra


def _without(given: Initial, found: Initial, rows: Tensor) -> Initial:
    """Values with NaN in the place of the trajectories ``rows`` (B,). They depend on what was ``given`` alone: whatever the way back says
    of a trajectory that failed reaches its own initial values, and no parameter that others share."""
    column, none = rows.unsqueeze(-1), float("nan")
    return Initial(torch.where(column, given.y + none, found.y), torch.where(column, given.yp + none, found.yp))


def _residual(system: System, t: Tensor, at: Initial, inputs: Sequence[Tensor]) -> Tensor:
    """``F`` (B, n), of all copies."""
    with torch.no_grad():
        return system.bind(inputs)(t, torch.cat([at.y, at.yp], -1)).detach()


def _place(system: System, t: Tensor, at: Initial, inputs: Sequence[Tensor]) -> _Place:
    copy = _copy(system, t, at, inputs) if vmap_active() else {}
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        return _Place(system, [one_copy(x, copy) for x in inputs], *(one_copy(x, copy) for x in (t, at.y, at.yp)))


def _copy(system: System, t: Tensor, at: Initial, inputs: Sequence[Tensor]) -> dict[int, int]:
    """The copy of a map that speaks for all, as one of the rows of a batch does in `analyse`; of many unknowns the first one in which the
    equations are finite."""
    n = at.y.shape[-1]
    if n > _LARGE:
        fine = torch.isfinite(_residual(system, t, at, inputs)).all(-1).any()
        with temporarily_clear_interpreter_stack():
            return copy_where(fine)
    pencil = torch.cat(dense_pencil(system, inputs, t, at.y, at.yp), -1)
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        values, levels = copies_of(pencil)
        copies, rows = values.shape[: len(levels)], values.shape[-3]
        values = values.flatten(0, -3)
        fine = torch.isfinite(values).flatten(1).all(-1).nonzero()[:, 0]
        lead = 0 if not len(fine) else int(fine[analyse(values[fine][..., :n], values[fine][..., n:]).lead])
        return copy_at(lead // rows, copies, levels)


def _first(rows: Tensor) -> tuple[dict[int, int], int] | None:
    """The first of the ``rows`` (B,) that are set, and the copy in which; None where there is none."""
    some = rows.any()
    with temporarily_clear_interpreter_stack():
        copy = copy_where(some)
        found = one_copy(rows, copy).nonzero()
    return (copy, int(found[0, 0])) if len(found) else None


def _row_of(x: Tensor, row: tuple[dict[int, int], int]) -> Tensor:
    with temporarily_clear_interpreter_stack():
        return one_copy(x, row[0])[row[1]]


def _structure(place: _Place, algebra: StageAlgebra, mask: Tensor | None, native: NativeStart | None, throw: bool) -> Structure | None:
    """The structure, checked; None where the equations are finite for no trajectory, and nothing is raised."""
    system, t, y, yp = place.system, place.t, place.y, place.yp
    if y.shape[-1] > _LARGE:
        f = system.bind(place.inputs)
        pencil = _sound(split(algebra.jacobian(lambda pair: f(t, pair), torch.cat([y, yp], -1))), system, throw)
        found = None if pencil is None else analyse_large(pencil, algebra.linear_solver, mask)
        if pencil is None or found is not None:
            return found
    pencil = _sound(Pencil(*(place.pencil() if native is None else native.pencil(t, y, yp))), system, throw)
    if pencil is None:
        return None
    E, G = pencil.E, pencil.G
    assert isinstance(E, Tensor) and isinstance(G, Tensor)
    found = analyse(E, G, mask)
    _check_structure(found, system.spec, mask)
    return found


def _sound(pencil: Pencil, system: System, throw: bool) -> Pencil | None:
    """Matrices with those of another trajectory in the place of ones that are not finite; None where none is finite."""
    parts = [m.values if isinstance(m, SparseMatrix) else m for m in (pencil.E, pencil.G)]
    assert all(isinstance(x, Tensor) for x in parts)
    E, G = (x.flatten(1) for x in parts)  # type: ignore[union-attr]
    fine = torch.isfinite(E).all(-1) & torch.isfinite(G).all(-1)
    if bool(fine.all()):
        return pencil
    if throw:
        many = f" of trajectory {int((~fine).nonzero()[0, 0])}" if system.spec.batch is not None else ""
        raise InconsistentInitialCondition(
            f"the derivatives of the equations{many} are not finite at the start: give a better guess of the algebraic variables in y0, or "
            "check the equations and their parameters"
        )
    if not bool(fine.any()):
        return None
    source = torch.where(fine, torch.arange(len(fine), device=fine.device), fine.to(torch.int64).argmax())

    def of_others(m: Any) -> Any:
        if isinstance(m, SparseMatrix):
            return replace(m, values=m.values.expand(len(fine), -1).index_select(0, source))
        return m.expand(len(fine), -1, -1).index_select(0, source)

    return Pencil(of_others(pencil.E), of_others(pencil.G))


def _mask(differential: Any, spec: StateSpec, n: int, device: torch.device) -> Tensor | None:
    if differential is None:
        return None
    leaves, _ = tree_flatten(spec.matched(differential))
    single = [torch.as_tensor(x, dtype=torch.bool, device=device) for x in leaves]
    mask = torch.cat([x.reshape(-1) for x in single])
    if spec.split and [x.shape for x in single] == [s if spec.batch is None else s[1:] for s in spec.shapes]:
        mask = replace(spec, batch=None, shapes=tuple(x.shape for x in single)).spread(single)[0]
    if mask.numel() != sum(spec.sizes):
        raise InvalidInput(f"differential must have one flag for each of the {sum(spec.sizes)} entries of the state, got {mask.numel()}")
    # running integrals are differential
    return torch.cat([mask, mask.new_ones(n - mask.numel())])


def _names(spec: StateSpec, which: Tensor) -> str:
    names = [spec.component(int(i)) for i in which.nonzero()[:6, 0]]
    return ", ".join(names) + (", ..." if int(which.sum()) > 6 else "")


def _check_structure(structure: Structure, spec: StateSpec, mask: Tensor | None) -> None:
    rows = ", ".join(str(int(i)) for i in structure.suspects.nonzero()[:6, 0])
    blame = f"equation(s) {rows} say nothing about the algebraic variable(s) {_names(spec, structure.undetermined)}"
    if structure.index < 0:
        raise SingularJacobian(
            f"the equations do not determine every variable: dF/dy + c dF/dy' is singular for every c at the start ({blame}). "
            "An equation is missing, or follows from the others"
        )
    hessenberg = structure.index == 2 and structure.hidden.shape[-1] == int(structure.undetermined.sum())
    if structure.index > 2 or (structure.index == 2 and not hessenberg):
        raise HigherIndexDAE(
            f"the index of these equations is {structure.index} at the start: {blame}. adjoint.reduce_index makes one of index 1 of them, "
            "adjoint.mechanics a stabilised one of a mechanical system; or replace those equations by their time derivatives yourself"
        )
    if mask is not None and int(mask.sum()) != structure.rank:
        raise InvalidInput(
            f"differential names {int(mask.sum())} variables, but dF/dy' has rank {structure.rank} at the start: that many combinations of "
            "variables are differential"
        )


def _off_constraints(place: _Place, structure: Structure, residual: Tensor, tolerances: dict[str, Any]) -> Tensor:
    """Trajectories (B,) that violate the constraints on differential variables: nothing can be solved for in them."""
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        _, G = place.pencil()
        rows = (structure.hidden.mH @ (structure.row_scale.unsqueeze(-1) * G)).abs()
    # what a thousand tolerances of the state make of them
    size = 1e3 * (place.y.abs() * tolerances["rtol"] + tolerances["atol"])
    off = (structure.hidden.mH @ (structure.row_scale * residual).unsqueeze(-1)).squeeze(-1).abs()
    return (off > (rows @ size.unsqueeze(-1)).squeeze(-1)).any(-1)


def _violated(system: System, structure: Structure, residual: Tensor, row: tuple[dict[int, int], int]) -> InconsistentInitialCondition:
    kept = torch.where(structure.suspects, _row_of(residual, row), 0.0)
    return InconsistentInitialCondition(
        f"y0{_named(system, row)} violates constraints that hold differential variables only: "
        f"{residual_report(kept, structure.row_scale[row[1]])}. Give differential variables that satisfy them"
    )


def off_given(consistent: str, differential: Tensor, given: Initial, found: Initial, tolerances: dict[str, Any]) -> Tensor:
    """Which values (B, n) that were given are not those that the equations ask for; ``differential`` (n,): which variables are."""
    with torch.no_grad():
        y, yp = found.y.detach(), found.yp.detach()
        allowed = 1e3 * (y.abs() * tolerances["rtol"] + tolerances["atol"])
        if consistent == "auto":
            allowed = torch.maximum(allowed, 1e-3 * y.abs())
        off = (given.y - y).abs() > allowed
        if consistent == "check":
            speed = torch.linalg.vector_norm(yp, dim=-1, keepdim=True)
            off = off | ((given.yp - yp).abs() > 1e-3 * speed + allowed) & differential
            # of what has no consistent values none were given
            off = off | ~torch.isfinite(y)
        return off


def _inconsistent(
    system: System, structure: Structure, residual: Tensor, off: Tensor, row: tuple[dict[int, int], int]
) -> InconsistentInitialCondition:
    return InconsistentInitialCondition(
        f"y0 and yp0{_named(system, row)} do not satisfy the equations: "
        f"{residual_report(_row_of(residual, row), structure.row_scale[row[1]])}; consistent values differ in "
        f"{_names(system.spec, _row_of(off, row))}. Let them be solved for with consistent='solve', or give other ones"
    )


def _named(system: System, row: tuple[dict[int, int], int]) -> str:
    return f" of trajectory {row[1]}" if system.spec.batch is not None else ""
