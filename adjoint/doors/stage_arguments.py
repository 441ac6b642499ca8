"""How the matrices of implicit methods are had: from the arguments of the front doors to a `StageAlgebra`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import LinearSolver, Matrix, SparseMatrix
from ..linalg.choice import SolverByKind
from ..linalg.protocol import check_solver
from ..linalg.sparsity import SparsityPattern
from ..methods import Method
from ..sensitivity.problem import Problem, StageAlgebra
from ..system.capture import is_differentiable
from ..system.jacobians import DenseJacobian, JacobianStrategy
from ..system.jacobians_sparse import SparseJacobian, agrees, choose_jacobian
from ..system.realification import given_pattern, refuse_parts
from ..system.stage_jacobian import GivenStageJacobian, StageJacobian
from ..system.system import StateSpec, System
from ..system.transforms import functorch_active
from ..torch_internals import is_functorch_wrapped_tensor

__all__ = ["check_jumps", "stage_algebra", "warn_of_lost_time"]

#: attempted steps from which a solve is looked at for what may have made it long
_LONG = 300

#: unknowns up to which a dense Jacobian is taken without a look at its pattern
_SMALL = 64
#: one sparse matrix in so many is looked at
_SOME = 4


def with_diagonal(pattern: SparsityPattern, mass: Tensor | None = None) -> SparsityPattern:
    """The pattern of ``I - h J``, or ``M - h J`` for ``mass`` (n, n) or (B, n, n)."""
    import scipy.sparse as sp

    whole = pattern.to_scipy() + sp.eye_array(pattern.shape[0], format="csr")
    if mass is not None:
        # under a transform nobody knows which entries are zero in every copy
        known = not is_functorch_wrapped_tensor(mass)
        on = mass.detach().reshape(-1, *mass.shape[-2:]).ne(0).any(0) if known else torch.ones(mass.shape[-2:], dtype=torch.bool)
        rows, columns = on.cpu().nonzero().unbind(-1)
        whole = whole + sp.coo_array((torch.ones(len(rows), device="cpu").numpy(), (rows.numpy(), columns.numpy())), shape=pattern.shape)
    return SparsityPattern.from_scipy(sp.csr_array(whole))


class _Detected(StageJacobian):
    """Dense for few unknowns; else the pattern is found from the function at the first call, or given, and kept.

    A function that branches has other entries elsewhere. Newton's iterations converge all the same, but derivatives would lack what is
    missing. So some of the matrices of steps and of their adjoints are held against differences of the function, and where these are
    not alike against a product with the true Jacobian; the pattern grows by what it lacks.
    """

    def __init__(self, inputs: Sequence[Tensor], mass: Tensor | None = None, given: SparsityPattern | None = None) -> None:
        self.inputs, self.mass, self.given = inputs, mass, given
        self.strategy: JacobianStrategy | None = None if given is None else SparseJacobian(with_diagonal(given, mass))

    def takes_dense(self, x: Tensor) -> bool:
        """See `StageJacobian.takes_dense`."""
        return (x.shape[1] <= _SMALL and self.given is None) or isinstance(self.strategy, DenseJacobian)

    def bound(self, system: Any, inputs: Sequence[Tensor], forward: bool) -> JacobianStrategy:
        """For the steps or for derivatives of one solve."""
        return _Checked(self)

    def checked(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        """The Jacobian, with all of its entries."""
        matrix = self(f, x)
        if not isinstance(matrix, SparseMatrix) or functorch_active() or _likely(matrix, f, x):
            return matrix
        if agrees(lambda f, x: matrix, f, x, spread=0.0):
            return matrix
        if self.given is not None:
            warnings.warn("jac_sparsity lacks entries that the Jacobian of fun has: they are looked for and added", stacklevel=2)
        assert isinstance(self.strategy, SparseJacobian)
        found, _ = choose_jacobian(f, x, parameters=[i for i in self.inputs if i.is_floating_point()])
        if isinstance(found, SparseJacobian):
            both = self.strategy.pattern.to_scipy() + found.pattern.to_scipy()
            found = SparseJacobian(SparsityPattern.from_scipy(both))
        self.strategy = found
        return found(f, x)

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        if self.strategy is None:
            self.strategy = DenseJacobian()
            if x.shape[1] > _SMALL:
                found, _ = choose_jacobian(f, x, parameters=[i for i in self.inputs if i.is_floating_point()])
                self.strategy = SparseJacobian(with_diagonal(found.pattern, self.mass)) if isinstance(found, SparseJacobian) else found
        return self.strategy(f, x)


class _Checked(StageJacobian):
    """The Jacobians of one pass over the steps, some of which are looked at."""

    def __init__(self, owner: _Detected) -> None:
        self.owner, self.calls = owner, 0

    def takes_dense(self, x: Tensor) -> bool:
        """See `StageJacobian.takes_dense`."""
        return self.owner.takes_dense(x)

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        self.calls += 1
        return self.owner.checked(f, x) if self.calls % _SOME == 1 else self.owner(f, x)


def _likely(matrix: SparseMatrix, f: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether a difference of ``f`` along one direction is what ``matrix`` makes of it, as far as differences tell: cheap."""
    with torch.no_grad():
        k = torch.arange(x.shape[1], device=x.device, dtype=x.dtype.to_real()) + 1
        eps = torch.finfo(k.dtype).eps ** (1 / 3)
        v = (1 + x.abs()) * torch.cos(k * k)
        moved = (f(x + eps * v) - f(x)) / eps
        sizes = SparseMatrix(matrix.indices, matrix.values.abs(), matrix.shape).matvec(v.abs())
        return bool(((matrix.matvec(v.to(x.dtype)) - moved).abs() <= 30 * eps * sizes).all())


def stage_algebra(
    system: System,
    inputs: Sequence[Tensor],
    spec: StateSpec,
    *,
    jac: Any = None,
    jac_sparsity: Any = None,
    linear_solver: LinearSolver | None = None,
    exact: bool = False,
    mass: Tensor | None = None,
) -> StageAlgebra:
    """Check and put together. ``exact``: the result of the method, not only its iterations, depends on the Jacobian."""
    if mass is not None and jac is not None:
        raise UnsupportedCombination("jac= with mass_matrix= is not supported: leave jac out")
    check_solver(linear_solver)
    strategy: JacobianStrategy = _Detected(inputs, mass, None if jac_sparsity is None else given_pattern(jac_sparsity, spec))
    if jac is not None:
        refuse_parts("jac=", spec)
        if not callable(jac):
            raise InvalidInput(f"jac must be callable, got a {type(jac).__name__}; a pattern goes to jac_sparsity")
        if not spec.tree.is_leaf():
            raise UnsupportedCombination("jac= needs a state that is one tensor, and no quadrature=: leave jac out")
        strategy = GivenStageJacobian(jac, strategy, exact)
    return StageAlgebra(strategy, linear_solver if linear_solver is not None else SolverByKind())


def warn_of_lost_time(
    problem: Problem, inputs: Sequence[Tensor], ends: Sequence[Tensor], states: Sequence[Tensor], n_steps: Tensor
) -> None:
    """Warn if a long solve by a method that goes by ``df/dt`` had none to go by, though ``fun`` changes with the time.

    So it is where ``fun`` reads the time as a number (``t.item()``, a table of NumPy's). ``ends`` (B,) and ``states`` (B, n): two places at
    which to look, start and end of the solve.
    """
    if problem.native.recognised is not None or functorch_active():
        return
    if not n_steps.numel() or int(n_steps.max()) < _LONG:
        return
    f, real = problem.system.bind(inputs), problem.plan.real
    span = (ends[1] - ends[0]).detach()
    for t, y, shift in zip(ends, states, (1e-3 * span, -1e-3 * span), strict=True):
        y = y.detach()
        # not at the very ends, where slopes of oscillations are zero
        at = (t.detach() + 0.5 * shift).to(real).requires_grad_(True)
        with torch.enable_grad():
            value = f(at, y)
        weight = torch.linspace(1.0, 2.0, value.numel(), dtype=value.dtype, device=value.device).reshape(value.shape)
        slope = torch.autograd.grad(value, at, weight, allow_unused=True)[0] if value.requires_grad else None
        if slope is not None and bool((slope != 0).any()):
            continue
        with torch.no_grad():
            same, later = f(at.detach(), y), f((t.detach() + shift).to(real), y)
        if torch.equal(same, value) and not torch.equal(later, value) and bool(torch.isfinite(later).all()):
            warnings.warn(
                f"{problem.plan.method.name!r} goes by the derivative of fun in the time, and that is zero although fun changes with t: "
                "fun seems to read t as a number (t.item(), a NumPy table). The solution is right, but took far more steps than needed. "
                "Compute with the tensor t (torch.searchsorted), or choose a method without it, such as 'kvaerno5' or 'radau5'",
                UserWarning,
                stacklevel=4,
            )
            return


def check_jumps(method: Method, step_ts: Any) -> None:
    """A stage beyond the end of its step sees the far side of a jump: its part in the derivative in the time of that jump is lost."""
    if not any(is_differentiable(x) for x in tree_leaves(step_ts)):
        return
    if any(max(m.nodes) > 1 for m in method.members):
        raise UnsupportedCombination(
            f"method={method.name!r} evaluates fun beyond the ends of its steps, so derivatives in step_ts would be wrong: choose "
            "'kvaerno3' or 'rodas5p' (or methods.AutoSwitch with one of them), or detach step_ts"
        )
