"""A Jacobian ``jac(t, y, *args)`` that the user gives for implicit stages."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..linalg import Matrix, SparseMatrix
from .jacobians import JacobianStrategy
from .jacobians_sparse import agrees
from .ownership import own
from .system import System, VmappedSystem

__all__ = ["GivenStageJacobian", "StageJacobian"]

Flat = Callable[[Tensor, Tensor], Tensor]


class StageJacobian(ABC):
    """A way to Jacobians of stages that does something with time, inputs or size of the state; others are plain functions of ``f, x``."""

    @abstractmethod
    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        """``df/dx`` at ``x`` (B, n)."""

    def at(self, f: Flat, t: Tensor, x: Tensor) -> Matrix:
        """At time ``t`` (B,) and state ``x`` (B, n) of the right-hand side ``f``."""
        return self(lambda y: f(t, y), x)

    def takes_dense(self, x: Tensor) -> bool:
        """Whether the Jacobian at ``x`` will be dense, and by differentiation."""
        return False

    def bound(self, system: System | VmappedSystem, inputs: Sequence[Tensor], forward: bool) -> JacobianStrategy:
        """With the inputs of one solve; ``forward``: for its steps, not for derivatives."""
        return self


class GivenStageJacobian(StageJacobian):
    """The user's Jacobian where time, state and inputs are known: in the steps and in their adjoints for first derivatives.

    At the first call it is held against a product with the true Jacobian. One that disagrees is kept for the iterations, where it costs
    convergence only, with a warning; derivatives never use it. ``exact``: methods whose result depends on the Jacobian raise instead.
    Derivatives of derivatives, and copies under ``torch.vmap``, take ``fallback``.
    """

    def __init__(self, jac: Callable[..., Any], fallback: JacobianStrategy, exact: bool) -> None:
        self.jac, self.fallback, self.exact = jac, fallback, exact
        #: whether it is the Jacobian of ``fun``; None: not looked at yet
        self.right: bool | None = None

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        return self.fallback(f, x)

    def bound(self, system: System | VmappedSystem, inputs: Sequence[Tensor], forward: bool) -> JacobianStrategy:
        """See `StageJacobian.bound`."""
        return _Bound(self, system, inputs, forward) if isinstance(system, System) else self.fallback

    def values(self, system: System, inputs: Sequence[Tensor], t: Tensor, x: Tensor) -> Matrix:
        """At flat states ``(B, n)``."""
        spec, call = system.spec, system.substituted(self.jac, inputs)
        args, state = system.arguments(inputs), spec.unflatten(x)
        time = t if spec.batch is not None else t.reshape(())
        out = own(call, time, state, *args)
        n, lead = x.shape[1], () if spec.batch is None else (spec.batch,)
        if not isinstance(out, Tensor):
            raise InvalidInput(f"jac must return a tensor, got a {type(out).__name__}")
        if out.dtype != x.dtype or out.device != x.device:
            raise InvalidInput(f"jac returned {out.dtype} on {out.device}, but the state is {x.dtype} on {x.device}")
        if out.layout == torch.strided:
            if out.shape[: len(lead)] != lead or out.numel() != x.shape[0] * n * n:
                raise InvalidInput(f"jac must return shape {(*lead, n, n)}, got {tuple(out.shape)}")
            return out.reshape(x.shape[0], n, n)
        if lead or tuple(out.shape) != (n, n):
            raise InvalidInput(f"a sparse jac must be one ({n}, {n}) matrix (not batched), got {tuple(out.shape)}")
        coo = (out if out.layout == torch.sparse_coo else out.to_sparse_coo()).coalesce()
        # with the diagonal, which the matrices of stages have
        every = torch.arange(n, device=x.device)
        indices = torch.cat([coo.indices(), every.expand(2, -1)], 1)
        full = torch.sparse_coo_tensor(indices, torch.cat([coo.values(), x.new_zeros(n)]), (n, n), check_invariants=False).coalesce()
        return SparseMatrix(full.indices(), full.values().unsqueeze(0), (n, n))


class _Bound(StageJacobian):
    def __init__(self, owner: GivenStageJacobian, system: System, inputs: Sequence[Tensor], forward: bool) -> None:
        self.owner, self.system, self.inputs, self.forward = owner, system, inputs, forward

    def __call__(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Matrix:
        return self.owner.fallback(f, x)

    def at(self, f: Flat, t: Tensor, x: Tensor) -> Matrix:
        """See `StageJacobian.at`."""
        owner = self.owner
        with torch.no_grad():
            if owner.right is None:
                self._check(f, t, x)
            if not self.forward and not owner.right:
                return owner.fallback(lambda y: f(t, y), x)
            return owner.values(self.system, self.inputs, t, x)

    def _check(self, f: Flat, t: Tensor, x: Tensor) -> None:
        owner = self.owner
        given: Any = lambda _, y: owner.values(self.system, self.inputs, t, y)  # noqa: E731
        owner.right = agrees(given, lambda y: f(t, y), x)
        if not owner.right:
            what = "jac does not agree with the Jacobian of fun"
            if owner.exact:
                raise InvalidInput(f"{what}, on which the result of this method depends: correct it, leave it out, or take 'kvaerno5'")
            warnings.warn(f"{what}: iterations will be poor (derivatives do not use it then)", stacklevel=2)
