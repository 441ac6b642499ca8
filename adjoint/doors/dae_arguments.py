"""Checks and preparations of `solve_dae`: method, matrices, structure, initial values, failures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import HigherIndexDAE, InvalidInput, SingularJacobian, UnsupportedCombination, counted
from ..integrate import Plan, Record
from ..linalg import DenseLU, LinearSolver
from ..linalg.protocol import check_solver
from ..linalg.sparsity import SparsityPattern
from ..methods import DAE_METHODS, METHODS, Method
from ..sensitivity.consistent import Bounds
from ..sensitivity.problem import StageAlgebra
from ..system.jacobians import DenseJacobian
from ..system.jacobians_sparse import SparseJacobian, choose_jacobian
from ..system.structure import analyse, dense_pencil
from ..system.system import StateSpec, System
from ..system.transforms import one_copy
from ..torch_internals import is_functorch_wrapped_tensor, temporarily_clear_interpreter_stack
from .arguments import Times
from .failures import raise_failure
from .root_arguments import check_bounds

__all__ = ["check_dae_method", "check_flags", "dae_failure", "initial_bounds", "residual_algebra"]

#: unknowns up to which the matrices are dense without a look at their pattern
_SMALL = 64
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
    if not isinstance(method, Method) or not method.residual:
        raise InvalidInput(f"method must be one of {', '.join(sorted(DAE_METHODS))} or a method object for residuals, got {method!r}")
    return method


def check_flags(consistent: Any, max_steps: Any) -> None:
    """Raise `InvalidInput` for values that are none."""
    if consistent not in _MODES:
        raise InvalidInput(f"consistent must be one of {', '.join(map(repr, _MODES))}, got {consistent!r}")
    counted(max_steps, "max_steps")


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
    flat = check_bounds(bounds, user_spec, one_copy(user_spec.flatten(y0)), "y0")
    lower, upper = (
        None if b is None else torch.cat([b, b.new_full((b.shape[0], n - b.shape[-1]), end)], -1)
        for b, end in zip(flat, (-float("inf"), float("inf")), strict=True)
    )
    return lower, upper


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
            values = [one_copy(x) for x in inputs]
            f = system.bind(values)
            t = one_copy(times.anchors[0]).to(spec.real_dtype)
            at = torch.cat([one_copy(y), one_copy(yp)], -1)
            strategy, _ = choose_jacobian(lambda pair: f(t, pair), at, parameters=[x for x in values if x.is_floating_point()])
    return StageAlgebra(strategy, linear_solver if linear_solver is not None else DenseLU())


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
