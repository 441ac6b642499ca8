"""Checks and preparations of `solve_dae`: method, matrices, structure, initial values, failures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from ..errors import HigherIndexDAE, InconsistentInitialCondition, InvalidInput, SingularJacobian, UnsupportedCombination
from ..integrate import Plan, Record
from ..linalg import DenseLU, LinearSolver
from ..linalg.pencil import split
from ..linalg.protocol import check_solver
from ..linalg.sparsity import SparsityPattern
from ..methods import DAE_METHODS, METHODS, Method, Traits
from ..native.consistent import NativeStart
from ..sensitivity.consistent import Bounds, Initial, all_lost, complete, complete_values, dense_pencil, lost_rows, residual_report
from ..sensitivity.problem import StageAlgebra
from ..system.jacobians import DenseJacobian
from ..system.jacobians_sparse import SparseJacobian, choose_jacobian
from ..system.structure import Structure, analyse, analyse_large
from ..system.system import StateSpec, System
from ..system.transforms import every_copy
from ..torch_internals import is_functorch_wrapped_tensor, temporarily_clear_interpreter_stack
from .arguments import Times
from .failures import raise_failure
from .root_arguments import check_bounds

__all__ = ["check_dae_method", "check_flags", "dae_failure", "initial_bounds", "initial_values", "residual_algebra"]

#: unknowns up to which the matrices are dense without a look at their pattern
_SMALL = 64
#: unknowns above which the structure is looked for by one factorisation before anything else
_LARGE = 128
_MODES = ("auto", "solve", "slopes", "check", "trust")


def check_dae_method(method: str | Method) -> Method:
    """A method for implicit equations by its name, or a method object."""
    if isinstance(method, str):
        if method in METHODS and METHODS[method].takes_mass:
            raise UnsupportedCombination(
                f"{method!r} is not for residuals: give solve_ivp(fun, ..., mass_matrix=M, method={method!r}) the right-hand side of "
                "M y' = fun(t, y) with a constant M, or solve_dae one of " + ", ".join(sorted(DAE_METHODS))
            )
        if method not in DAE_METHODS:
            raise InvalidInput(f"there is no method {method!r} for implicit equations; choose one of {', '.join(sorted(DAE_METHODS))}")
        return DAE_METHODS[method]
    if not isinstance(method, Traits) or not method.residual:
        raise InvalidInput(f"method must be one of {', '.join(sorted(DAE_METHODS))} or a method object for residuals, got {method!r}")
    return method


def check_flags(consistent: Any, max_steps: Any) -> None:
    """Raise `InvalidInput` for values that are none."""
    if consistent not in _MODES:
        raise InvalidInput(f"consistent must be one of {', '.join(map(repr, _MODES))}, got {consistent!r}")
    if not isinstance(max_steps, Integral) or max_steps < 1:
        raise InvalidInput(f"max_steps must be a positive integer, got {max_steps!r}")


def check_state(y0: Any, yp0: Any, spec: StateSpec, consistent: str, quadrature: Any) -> None:
    """Raise for a start that is none, or that ``consistent`` cannot work on."""
    for name, value in (("y0", y0), ("yp0", yp0)):
        for leaf in [] if value is None else tree_leaves(value):
            wrapped = is_functorch_wrapped_tensor(leaf)
            if not wrapped and spec.batch is None and not bool(torch.isfinite(leaf).all()):
                raise InvalidInput(f"{name} has non-finite entries")
    if yp0 is not None:
        spec.check(yp0, "yp0", "y0")
    elif consistent == "slopes":
        raise InvalidInput("consistent='slopes' keeps yp0 and solves for y0: give yp0")
    if quadrature is not None and consistent == "slopes":
        raise UnsupportedCombination(
            "quadrature= with consistent='slopes' is not supported: find y0 by solve_root(lambda y: fun(t0, y, yp0, *args), y0) first"
        )


def check_index(method: Method, algebra: StageAlgebra) -> None:
    """Raise `HigherIndexDAE` for equations that the method is not for."""
    if method.multistep and algebra.structure is not None and algebra.structure.index > 1:
        raise HigherIndexDAE(
            f"{method.name!r} is for equations of index 0 and 1, and these are of index {algebra.structure.index} at the start: give "
            "method='radau', or adjoint.reduce_index makes one of index 1 of them"
        )


def initial_bounds(bounds: Any, user_spec: StateSpec, y0: Any, n: int, consistent: str) -> Bounds:
    """Bounds ``(B, n)`` of the initial state with those of running integrals behind, which have none."""
    if bounds is None:
        return None, None
    if consistent in ("check", "trust"):
        raise InvalidInput(f"y0_bounds= has nothing to bound with consistent={consistent!r}, which solves for nothing: leave it out")
    flat = check_bounds(bounds, user_spec, plain(user_spec.flatten(y0)), "y0")
    lower, upper = (
        None if b is None else torch.cat([b, b.new_full((b.shape[0], n - b.shape[-1]), end)], -1)
        for b, end in zip(flat, (-float("inf"), float("inf")), strict=True)
    )
    return lower, upper


def plain(x: Tensor) -> Tensor:
    """The values of a tensor without the levels of transforms; of a mapped one the first copy's. To be called below all transforms."""
    every = every_copy(x)
    return every[(0,) * (every.dim() - x.dim())]


def residual_algebra(
    system: System,
    inputs: Sequence[Tensor],
    spec: StateSpec,
    times: Times,
    y: Tensor,
    yp: Tensor,
    jac_sparsity: Any,
    linear_solver: LinearSolver | None,
) -> StageAlgebra:
    """How ``[dF/dy, dF/dy']`` is had and factorised."""
    n = sum(spec.sizes)
    check_solver(linear_solver)
    strategy: Any = DenseJacobian()
    if jac_sparsity is not None:
        if not isinstance(jac_sparsity, (tuple, list)) or len(jac_sparsity) != 2:
            raise InvalidInput("jac_sparsity must be a pair of patterns, of dF/dy and of dF/dy'")
        import scipy.sparse as sp

        parts = [SparsityPattern.from_any(part, (n, n)).to_scipy() for part in jac_sparsity]
        strategy = SparseJacobian(SparsityPattern.from_scipy(sp.hstack(parts, format="csr")))
    elif n > _SMALL:
        with temporarily_clear_interpreter_stack():
            values = [plain(x) for x in inputs]
            f = system.bind(values)
            t = plain(times.anchors[0]).to(spec.real_dtype)
            at = torch.cat([plain(y), plain(yp)], -1)
            strategy, _ = choose_jacobian(lambda pair: f(t, pair), at, parameters=[x for x in values if x.is_floating_point()])
    return StageAlgebra(strategy, linear_solver if linear_solver is not None else DenseLU())


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
) -> tuple[Initial, StageAlgebra]:
    """Consistent values, and the matrices' `StageAlgebra` with what the structure says. ``native``: the equations as compiled code."""
    spec = system.spec
    n = sum(spec.sizes)
    real = spec.real_dtype
    t = t0.to(real)
    mask = _mask(differential, user_spec, n, given.y.device)
    if all_lost(given):
        # the solve will say so
        return given, algebra
    lost = lost_rows(given)
    whole, given = given, given if lost is None else lost.replaced(given)
    # on plain values and below all transforms: what is found here outlives them
    with torch.no_grad(), temporarily_clear_interpreter_stack():
        values, at = [plain(x) for x in inputs], plain(t)
        y, yp = plain(given.y), plain(given.yp)
        missing = torch.zeros_like(y[:, 0], dtype=torch.bool) if lost is None else plain(lost.lost)
        structure = _structure(system, algebra, values, at, y, yp, mask, native)
        _check_structure(structure, spec, mask)
        algebra = replace(
            algebra,
            index=structure.variable_index if structure.index > 1 else None,
            structure=structure,
            skipped=~structure.differential if skip and not bool(structure.differential.all()) else None,
        )
        if structure.hidden.shape[-1] and consistent == "slopes":
            raise UnsupportedCombination("consistent='slopes' is for equations of index 0 and 1; of index 2 give y0, with 'solve'")
        if structure.hidden.shape[-1] and consistent != "trust":
            _check_constraints(system, structure, values, at, y, yp, tolerances, missing)
    if consistent == "trust":
        return whole, algebra
    rtol = 1e-6 if real.itemsize < 8 else 1e-12
    where = (system, algebra, structure, t, given.y, given.yp, inputs, rtol, bounds)
    found = complete_values(*where) if consistent == "slopes" else complete(*where, native)
    if consistent in ("auto", "check"):
        with torch.no_grad(), temporarily_clear_interpreter_stack():
            _compare(consistent, system, structure, values, at, Initial(y, yp), found, tolerances, missing)
    if consistent == "check":
        return whole, algebra
    return found if lost is None else lost.restored(found, whole), algebra


def _structure(
    system: System,
    algebra: StageAlgebra,
    values: Sequence[Tensor],
    t: Tensor,
    y: Tensor,
    yp: Tensor,
    mask: Tensor | None,
    native: NativeStart | None,
) -> Structure:
    if y.shape[-1] > _LARGE:
        f = system.bind(values)
        pencil = split(algebra.jacobian(lambda pair: f(t, pair), torch.cat([y, yp], -1)))
        found = analyse_large(pencil, algebra.linear_solver, mask)
        if found is not None:
            return found
    E, G = dense_pencil(system, values, t, y, yp) if native is None else native.pencil(t, y, yp)
    bad = ~(torch.isfinite(E) & torch.isfinite(G)).flatten(1).all(-1)
    if bool(bad.any()):
        many = f" of trajectory {int(bad.nonzero()[0, 0])}" if system.spec.batch is not None else ""
        raise InconsistentInitialCondition(
            f"the derivatives of the equations{many} are not finite at the start: give a better guess of the algebraic variables in y0, or "
            "check the equations and their parameters"
        )
    return analyse(E, G, mask)


def _mask(differential: Any, spec: StateSpec, n: int, device: torch.device) -> Tensor | None:
    if differential is None:
        return None
    leaves, _ = tree_flatten(differential)
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


def _constraint_size(structure: Structure, y: Tensor, G: Tensor, tolerances: dict[str, Any]) -> Tensor:
    """What the hidden constraints may be off by: what a thousand tolerances of the state make of them."""
    size = 1e3 * (y.abs() * tolerances["rtol"] + tolerances["atol"])
    rows = structure.hidden.mH @ (structure.row_scale.unsqueeze(-1) * G)
    return (rows.abs() @ size.unsqueeze(-1)).squeeze(-1)


def _check_constraints(
    system: System,
    structure: Structure,
    values: Sequence[Tensor],
    t: Tensor,
    y: Tensor,
    yp: Tensor,
    tolerances: dict[str, Any],
    missing: Tensor,
) -> None:
    """The constraints on differential variables: nothing can be solved for in them. Of rows that are ``missing`` (B,) nothing is asked."""
    with torch.no_grad():
        residual = system.bind(values)(t, torch.cat([y, yp], -1))
    _, G = dense_pencil(system, values, t, y, yp)
    off = (structure.hidden.mH @ (structure.row_scale * residual).unsqueeze(-1)).squeeze(-1).abs()
    bad = (off > _constraint_size(structure, y, G, tolerances)).any(-1) & ~missing
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        many = f" of trajectory {row}" if system.spec.batch is not None else ""
        kept = torch.where(structure.suspects, residual[row], 0.0)
        raise InconsistentInitialCondition(
            f"y0{many} violates constraints that hold differential variables only: {residual_report(kept, structure.row_scale[row])}. "
            "Give differential variables that satisfy them"
        )


def _compare(
    consistent: str,
    system: System,
    structure: Structure,
    values: Sequence[Tensor],
    t: Tensor,
    given: Initial,
    found: Initial,
    tolerances: dict[str, Any],
    missing: Tensor,
) -> None:
    """Raise `InconsistentInitialCondition` where the values that were given are not those that the equations ask for, but for rows that
    are ``missing`` (B,)."""
    y, yp = plain(found.y), plain(found.yp)
    allowed = 1e3 * (y.abs() * tolerances["rtol"] + tolerances["atol"])
    if consistent == "auto":
        allowed = torch.maximum(allowed, 1e-3 * y.abs())
    off = (given.y - y).abs() > allowed
    if consistent == "check":
        speed = torch.linalg.vector_norm(yp, dim=-1, keepdim=True)
        off = off | ((given.yp - yp).abs() > 1e-3 * speed + allowed) & structure.differential
    bad = off.any(-1) & ~missing
    if not bool(bad.any()):
        return
    row = int(bad.nonzero()[0, 0])
    with torch.no_grad():
        residual = system.bind(values)(t, torch.cat([given.y, given.yp], -1))[row]
    many = f" of trajectory {row}" if system.spec.batch is not None else ""
    raise InconsistentInitialCondition(
        f"y0 and yp0{many} do not satisfy the equations: {residual_report(residual, structure.row_scale[row])}; consistent values "
        f"differ in {_names(system.spec, off[row])}. Let them be solved for with consistent='solve', or give other ones"
    )


def dae_failure(record: Record, plan: Plan, system: System, inputs: Sequence[Tensor]) -> None:
    """Raise the named error of the first of the trajectories that failed; where the equations have lost their structure there, that one."""
    row = int((record.status < 0).nonzero()[0, 0])
    spec = system.spec
    n_steps = int(record.n_accepted[row])
    if record.status.shape[0] == spec.rows and n_steps:
        # with a constant mass matrix stages are not kept, and slopes do not count
        slopes = record.stages[n_steps - 1, -1] if len(record.stages) >= n_steps else torch.zeros_like(record.last)
        E, G = dense_pencil(system, inputs, record.t_final.to(spec.real_dtype), record.last, slopes)
        lost = _lost(E[row], G[row])
        if lost is not None:
            condition, variable, equation = lost
            many = f" in trajectory {row}" if spec.batch is not None else ""
            raise SingularJacobian(
                f"the equations stop determining {spec.component(variable)} at t = {float(record.t_final[row]):.8g}{many}: equation "
                f"{equation} loses its hold on it (condition number {condition:.1e}). {_REASON}",
                row=row if spec.batch is not None else None,
                component=variable,
            )
    raise_failure(record, plan, system, inputs)


_REASON = "A constraint has become dependent on the others there, or the index rises; end t_span before, or choose other variables"


def _lost(E: Tensor, G: Tensor) -> tuple[float, int, int] | None:
    """Whether algebraic variables are all but undetermined: condition number, variable and equation."""
    if not bool(torch.isfinite(E).all() & torch.isfinite(G).all()):
        return None
    structure = analyse(E.unsqueeze(0), G.unsqueeze(0))
    rank, n = structure.rank, E.shape[-1]
    if rank == n or structure.index == 2:
        return None
    scaled = G * structure.row_scale[0].unsqueeze(-1)
    left = torch.linalg.svd(E * structure.row_scale[0].unsqueeze(-1)).U if rank else torch.eye(n, dtype=E.dtype, device=E.device)
    constraints, free = left[:, rank:], structure.basis[0][:, rank:]
    u, s, vh = torch.linalg.svd(constraints.mH @ scaled @ free)
    condition = float(s[0] / s[-1]) if float(s[-1]) > 0 else float("inf")
    weakest = float(s[-1] / torch.linalg.matrix_norm(constraints.mH @ scaled, 2).clamp(min=torch.finfo(s.dtype).tiny))
    if weakest > 1e-5:
        return None
    variable = int((free @ vh[-1].conj()).abs().argmax())
    return condition, variable, int((constraints @ u[:, -1]).abs().argmax())
