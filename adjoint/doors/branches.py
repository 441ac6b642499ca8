"""``continuation``: branches of ``fun(x, lam, *args) = 0`` in one parameter, their folds, and the derivatives of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import LinearSolver, Log
from ..linalg.choice import SolverByKind
from ..linalg.protocol import check_solver
from ..linalg.sparsity import SparsityPattern
from ..nonlinear import BranchProblem, Continuation
from ..sensitivity.implicit import timeless
from ..sensitivity.products import tangent
from ..system.capture import stand_ins
from ..system.jacobians import DenseJacobian
from ..system.jacobians_sparse import SparseJacobian, choose_jacobian
from ..system.origins import readable
from ..system.system import StateSpec
from ..system.transforms import every_copy, naming_faults
from ..torch_internals import DisableFuncTorch
from .arguments import check_callable, listed_args
from .root_solution import RootSolution
from .steady import root_system, solve_root

__all__ = ["BranchSolution", "FoldPoint", "continuation"]

#: unknowns up to which a dense Jacobian is taken without a look at its pattern
_SMALL = 64
_MESSAGES = {
    "end": "the branch was followed to the end of lam_span",
    "max_points": "max_points were computed before the end of lam_span",
    "step_too_small": "the step became too small: kind='natural' ends so at a fold (take 'arclength'); else loosen tol",
    "no_start": "no root was found near x0 at the start of lam_span: find one by solve_root first",
}


@dataclass(frozen=True)
class FoldPoint:
    """A fold: state and parameter, between the points ``after`` and ``after + 1`` of the branch."""

    x: Any
    lam: Tensor
    after: int


@dataclass(frozen=True)
class BranchSolution:
    """A branch of solutions.

    Attributes
    ----------
    x : Tensor or pytree
        ``(K, *x0.shape)`` for every leaf. Not differentiable: see `root` and `fold`.
    lam : (K,)
    tangents : (K, n + 1)
        Unit tangents of the flat state and, last, of ``lam``.
    folds : tuple of FoldPoint
        Where ``d lam / ds`` changes its sign, located to rounding; not differentiable: see `fold`.
    status : str
        "end", "max_points", "step_too_small" or "no_start"; `message` says what that means.
    stats : Log
        Of the linear algebra.
    """

    x: Any
    lam: Tensor
    tangents: Tensor
    folds: tuple[FoldPoint, ...]
    status: str
    stats: Log
    _fun: Callable[..., Any] = field(repr=False)
    _args: tuple[Any, ...] = field(repr=False)
    _spec: StateSpec = field(repr=False)

    @property
    def success(self) -> bool:
        """Whether the branch was followed as far as was asked."""
        return self.status in ("end", "max_points")

    @property
    def message(self) -> str:
        """The status in words."""
        return _MESSAGES[self.status]

    def root(self, k: int, lam: Any = None, **options: Any) -> RootSolution:
        """Point ``k`` as a solution of `solve_root`, differentiable to any order in everything that ``fun`` depends on.

        ``lam``: a tensor that requires grad, for derivatives in the parameter too, near that of the point (default: its value).
        ``options`` are those of `solve_root`. Not at folds, where the Jacobian is singular.
        """
        at = self.lam[k] if lam is None else lam
        return solve_root(lambda x, s, *rest: self._fun(x, s, *rest), tree_map(lambda x: x[k], self.x), (at, *self._args), **options)

    def fold(self, i: int = 0) -> FoldPoint:
        """Fold ``i`` with derivatives of any order in everything that ``fun`` depends on.

        The fold is a regular root of ``F = 0, F_x v = 0, |v|^2 = const`` in ``x``, ``v`` and ``lam`` (Moore & Spence 1980).
        """
        known = self.folds[i]
        spec, flat = self._spec, self._spec.flatten(known.x)[0]
        v = self.tangents[known.after][:-1]
        length = (v @ v).detach()
        n = flat.numel()

        def extended(z: Tensor, *args: Any) -> Tensor:
            x, w, lam = z[:n], z[n : 2 * n], z[2 * n]
            f = lambda at: spec.flatten(self._fun(spec.unflatten(at.unsqueeze(0)), lam, *args))[0]  # noqa: E731
            return torch.cat([f(x), tangent(f, (x,), (w,)), (w @ w - length).reshape(1)])

        found = solve_root(extended, torch.cat([flat, v, known.lam.reshape(1)]).detach(), self._args).x
        return replace(known, x=spec.unflatten(found[:n].unsqueeze(0)), lam=found[2 * n])


def _plain(x: Tensor) -> Tensor:
    """The values of a tensor, for a search that has no derivatives."""
    if not readable(x):
        raise UnsupportedCombination(
            "torch.vmap (also that of jacfwd, hessian and vectorized Jacobians) maps over what continuation depends on, and every copy has "
            "a branch of its own: call continuation outside, and inside solve_root(fun, branch.x[k], (lam, *args)) at its points"
        )
    with DisableFuncTorch():
        return every_copy(x)


@naming_faults
def continuation(
    fun: Callable[..., Any],
    x0: Any,
    lam_span: tuple[float, float],
    args: Any = (),
    *,
    kind: str = "arclength",
    step: float = 0.1,
    min_step: float = 1e-8,
    max_step: float = 1.0,
    max_points: int = 200,
    tol: float = 1e-10,
    direction: int = 1,
    jac_sparsity: Any = None,
    linear_solver: LinearSolver | None = None,
) -> BranchSolution:
    """Follow the branch of ``fun(x, lam, *args) = 0`` through a root near ``x0`` (Keller 1977; Allgower & Georg 1990, chapter 6).

    Parameters
    ----------
    fun : callable
        ``fun(x, lam, *args) -> residual`` with the structure, shapes and dtypes of ``x0``; ``lam`` is 0-d.
    x0 : Tensor or pytree of tensors
        Guess of the root at ``lam_span[0]``; real.
    lam_span : pair of numbers
        The branch is followed until ``lam`` leaves this interval, on either side.
    args : tuple or pytree
        Further arguments of ``fun``. A single tensor is taken as ``(tensor,)``.
    kind : "arclength" or "natural"
        Pseudo-arclength continuation passes folds; "natural" keeps ``lam`` fixed while correcting and ends there. Branches that come
        within 1e-4 of ``step`` of each other count as one that crosses another.
    step, min_step, max_step : float
        In arc length, ``|dx|^2 / n + dlam^2``; adapted to the work of the corrector.
    max_points : int
    tol : float
        Of the corrector's last step, relative to the size of the point.
    direction : 1 or -1
        -1 starts away from ``lam_span[1]``.
    jac_sparsity, linear_solver
        As for `solve_root`.

    Returns
    -------
    BranchSolution
        The points themselves carry no derivatives; ``root(k)`` and ``fold(i)`` do, of every order.

    Raises
    ------
    InvalidInput
    """
    check_callable(fun, "fun")
    args = listed_args(args)
    spec = StateSpec.of(x0, False, "x0")
    try:
        first, last = (float(s) for s in lam_span)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"lam_span must be a pair of numbers, got {lam_span!r}") from error
    check_solver(linear_solver, "SparseLU")
    method = Continuation(kind, step, min_step, max_step, max_points, tol)  # type: ignore[arg-type]
    flat = _plain(spec.taken(x0))
    if not bool(torch.isfinite(flat).all()):
        raise InvalidInput("x0 has non-finite entries")
    start = flat.new_tensor([first])
    system, *_ = root_system(fun, spec.unflatten(flat), (start.reshape(()), *args), spec)
    given = [_plain(x) for x in stand_ins(system.inputs)[1:]]

    def residual(x: Tensor, lam: Tensor) -> Tensor:
        return timeless(system, [lam.reshape(()), *given])(x)

    with torch.no_grad():
        strategy: Any = DenseJacobian()
        if jac_sparsity is not None:
            strategy = SparseJacobian(SparsityPattern.from_any(jac_sparsity, (flat.shape[1], flat.shape[1])))
        elif flat.shape[1] > _SMALL:
            strategy, _ = choose_jacobian(lambda x: residual(x, start), flat, parameters=[x for x in given if x.is_floating_point()])
        problem = BranchProblem(
            residual=residual,
            jacobian=lambda x, lam: strategy(lambda at: residual(at, lam), x),
            lam_derivative=lambda x, lam: tangent(lambda s: residual(x, s), (lam,), (torch.ones_like(lam),)),
            linear_solver=SolverByKind() if linear_solver is None else linear_solver,
        )
        # the corrector alone wants a good guess
        root = solve_root(lambda x: residual(x.unsqueeze(0), start)[0], flat[0], throw=False)
        guess = root.x.unsqueeze(0) if root.success else flat
        branch = method.trace(problem, guess[0], first, last, direction)
    folds = tuple(FoldPoint(spec.unflatten(f.x.unsqueeze(0)), f.lam, f.after) for f in branch.folds)
    states = spec.unflatten(branch.x.unsqueeze(1))
    return BranchSolution(states, branch.lam, branch.tangents, folds, branch.status, problem.log, fun, args, spec)
