"""Checks of the arguments of root solves, and the choice of method, Jacobian and linear solver."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..errors import InvalidInput, UnsupportedCombination
from ..linalg import LinearSolver, Matrix, SparseMatrix
from ..linalg.choice import SolverByKind
from ..linalg.protocol import check_solver, traits_of
from ..nonlinear import FLOW_METHODS, METHODS, RootMethod
from ..nonlinear.protocol import RootTraits
from ..sensitivity.implicit import FixedRule, JacobianRule
from ..system.jacobians import DenseJacobian, jacobian_operator
from ..system.jacobians_sparse import SparseJacobian, choose_jacobian
from ..system.ownership import own
from ..system.realification import given_pattern, refuse_parts
from ..system.system import StateSpec, System
from ..torch_internals import is_functorch_wrapped_tensor
from .arguments import spread_leaves
from .root_systems import ConservedSystem

__all__ = ["RootChoice", "check_bounds", "choose", "named_root_method"]

#: unknowns up to which a dense Jacobian is taken without a look at its pattern
_SMALL = 64


@dataclass
class RootChoice:
    """How a root is found and differentiated. ``notes`` collect what was decided on the way."""

    method: RootMethod
    jacobian: JacobianRule
    linear_solver: LinearSolver
    notes: list[str] = field(default_factory=list)
    #: by differentiation, where ``jacobian`` is the user's own
    true_jacobian: JacobianRule | None = None
    #: why the solution has no derivatives, where something is known that the Jacobian does not show
    no_derivatives: str = ""


_patterns: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


class AutomaticJacobian(JacobianRule):
    """By automatic differentiation: dense for few unknowns, compressed by colouring where the pattern is sparse.

    The pattern is detected when it is first needed, and kept for later solves with the same function and shapes, which check it by a
    product with the Jacobian.
    """

    def __init__(self, fun: Callable[..., Any], key: Any, notes: list[str]) -> None:
        # a bound method is a new object each time: its pattern is kept with what it is bound to
        bound = isinstance(fun, MethodType)
        self.owner: Any = fun.__self__ if bound else fun
        self.notes = notes
        self.key = (key, fun.__func__ if bound else None)
        self.strategy: Any = None

    def of_conditions(self) -> AutomaticJacobian:
        """One for another function that is made of the same one of the user's."""
        return AutomaticJacobian(self.owner, (self.key, "conditions"), [])

    @property
    def entries_guessed(self) -> bool:
        """Whether a pattern, which may lack entries, stands behind the matrix."""
        return isinstance(self.strategy, SparseJacobian)

    def forget(self) -> None:
        """Choose anew at the next point."""
        self.strategy = None
        with suppress(TypeError):  # no weak references to this kind of callable
            _patterns.get(self.owner, {}).pop(self.key, None)

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        if self.strategy is None:
            self.strategy = self._choose(r, x, inputs)
        return self.strategy(r, x)

    def _choose(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Any:
        if x.shape[1] <= _SMALL:
            return DenseJacobian()
        try:
            kept = _patterns.setdefault(self.owner, {})
        except TypeError:  # no weak references to this kind of callable
            kept = {}
        known = kept.get(self.key)
        if known is None or (isinstance(known[0], SparseJacobian) and not known[0].check(r, x)):
            # zeros of the inputs may be others in the next solve: they do not thin the pattern
            kept[self.key] = choose_jacobian(r, x, parameters=inputs)
        strategy, why = kept[self.key]
        self.notes.append(why)
        return strategy


@dataclass(frozen=True)
class FixedJacobian(FixedRule):
    """One strategy for everything: `DenseJacobian`, `SparseJacobian`, or the operator."""

    @property
    def entries_guessed(self) -> bool:
        """See `JacobianRule.entries_guessed`."""
        return isinstance(self.strategy, SparseJacobian)


@dataclass(frozen=True)
class UserJacobian(JacobianRule):
    """The user's ``jac(x, *args)``, dense or sparse."""

    values: Callable[[Tensor, Sequence[Tensor]], tuple[Tensor, Tensor | None]]
    shape: tuple[int, int]

    @property
    def entries_guessed(self) -> bool:
        """See `JacobianRule.entries_guessed`: they are the user's."""
        return True

    def __call__(self, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> Matrix:
        values, indices = self.values(x, inputs)
        return values if indices is None else SparseMatrix(indices, values, self.shape)

    def vmapped(self, size: int, in_dims: tuple[int | None, ...]) -> JacobianRule:
        """Copies, each with its own inputs."""
        dims = [d is not None for d in in_dims]

        def values(x: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
            rows = x.shape[0] // size
            each = [
                self.values(x[k * rows : (k + 1) * rows], [i[k] if d else i for i, d in zip(inputs, dims, strict=True)])
                for k in range(size)
            ]
            return torch.cat([v for v, _ in each]), each[0][1]

        return UserJacobian(values, self.shape)


def named_root_method(method: Any) -> RootMethod:
    """A method object, by its name; raises `InvalidInput`."""
    if isinstance(method, str):
        known = METHODS | FLOW_METHODS
        if method not in known:
            raise InvalidInput(f"there is no root method {method!r}; choose one of {', '.join(sorted(known))}")
        method = known[method]
    if not isinstance(method, RootMethod):
        raise InvalidInput(f"method must be a name or a root method object, got a {type(method).__name__}")
    return method


def choose(
    system: System | ConservedSystem,
    spec: StateSpec,
    method: Any,
    jac: Any,
    jac_sparsity: Any,
    linear_solver: LinearSolver | None,
    least_squares: bool,
    conserved: bool,
    fun: Callable[..., Any],
) -> RootChoice:
    """Put method, Jacobian and linear solver together."""
    finder = named_root_method("levenberg_marquardt" if least_squares and method == "auto" else method)
    if least_squares and not (isinstance(finder, RootTraits) and finder.least_squares):
        raise UnsupportedCombination(f"least_squares=True needs method='levenberg_marquardt', got {method!r}")
    check_solver(linear_solver, "SparseLU")
    notes: list[str] = []
    n = sum(spec.sizes)
    if jac is not None and (least_squares or conserved):
        other = "least_squares=True" if least_squares else "conserved="
        raise UnsupportedCombination(f"jac= with {other} is not supported: leave jac out")
    rule: JacobianRule
    leaves = () if isinstance(system, ConservedSystem) else system.args_leaves
    shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else repr(x) for x in leaves)
    automatic = AutomaticJacobian(fun, (n, spec.dtype, str(spec.device), shapes, conserved, least_squares), notes)
    if jac is not None:
        rule = _user_jacobian(jac, system, spec)  # pyright: ignore[reportArgumentType]
    elif jac_sparsity is not None:
        pattern = given_pattern(jac_sparsity, spec)
        if conserved or least_squares:
            raise UnsupportedCombination("jac_sparsity= with conserved= or least_squares=True is not supported: leave it out")
        rule = FixedJacobian(SparseJacobian(pattern))
    elif traits_of(linear_solver).matrix_free:
        rule = FixedJacobian(jacobian_operator)
    elif traits_of(linear_solver).dense:
        rule = FixedJacobian(DenseJacobian())
    else:
        rule = automatic
    return RootChoice(finder, rule, linear_solver if linear_solver is not None else SolverByKind(), notes, automatic)


def _user_jacobian(jac: Any, system: System, spec: StateSpec) -> UserJacobian:
    refuse_parts("jac=", spec)
    if not callable(jac):
        raise InvalidInput(f"jac must be callable, got a {type(jac).__name__}; a pattern goes to jac_sparsity")
    if not spec.tree.is_leaf():
        raise UnsupportedCombination("jac= needs a state that is one tensor: leave jac out for pytrees")
    n = sum(spec.sizes)
    lead = () if spec.batch is None else (spec.batch,)

    def values(x: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        call = system.substituted(lambda _, x, *rest: jac(x, *rest), inputs)
        args = system.arguments(inputs)
        state = spec.unflatten(x)
        out = own(call, torch.zeros(()), state, *args)
        if not isinstance(out, Tensor):
            raise InvalidInput(f"jac must return a tensor, got a {type(out).__name__}")
        if out.dtype != x.dtype or out.device != x.device:
            raise InvalidInput(f"jac returned {out.dtype} on {out.device}, but the state has {x.dtype} on {x.device}")
        if out.layout == torch.strided:
            if out.shape[: len(lead)] != lead or out.numel() != x.shape[0] * n * n:
                raise InvalidInput(f"jac must return shape {(*lead, n, n)}, got {tuple(out.shape)}")
            return out.reshape(x.shape[0], n, n), None
        if lead or tuple(out.shape) != (n, n):
            raise InvalidInput(f"a sparse jac must be one ({n}, {n}) matrix (not batched), got {tuple(out.shape)}")
        coo = (out if out.layout == torch.sparse_coo else out.to_sparse_coo()).coalesce()
        return coo.values().unsqueeze(0), coo.indices()

    return UserJacobian(values, (n, n))


def check_bounds(bounds: Any, spec: StateSpec, x0: Tensor, what: str = "x0") -> tuple[Tensor | None, Tensor | None]:
    """Lower and upper bounds as ``(B, n)``, or None. ``what`` is the name of the guess ``x0`` in messages."""
    if bounds is None:
        return None, None
    try:
        low, high = bounds
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"bounds must be a pair (lower, upper), got {bounds!r}") from error
    flat: list[Tensor | None] = []
    for name, value in (("lower", low), ("upper", high)):
        if value is None:
            flat.append(None)
            continue
        leaves, tree = tree_flatten(spec.matched(value))
        if tree.is_leaf():
            leaves = leaves * len(spec.shapes)
        elif tree != spec.tree:
            raise InvalidInput(f"the {name} bound must be a number, a tensor, or like the state")
        full = spread_leaves(leaves, spec, f"the {name} bound does not broadcast to the state")
        flat.append(torch.cat([v.reshape(spec.rows, -1) for v in full], 1))
    lower, upper = flat
    if spec.holds_complex:
        raise UnsupportedCombination("bounds= of a complex state are not defined")
    if lower is not None and upper is not None and not bool((lower < upper).all()):
        raise InvalidInput("bounds: every lower bound must be less than the upper one")
    if not is_functorch_wrapped_tensor(x0):
        outside = torch.zeros((), dtype=torch.bool, device=x0.device)
        if lower is not None:
            outside = outside | (x0 < lower).any()
        if upper is not None:
            outside = outside | (x0 > upper).any()
        if bool(outside):
            raise InvalidInput(f"{what} lies outside of the bounds")
    return lower, upper
