"""The matrix behind the derivatives of a root, looked at where they are taken: that it is the Jacobian, and that it is regular."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import InvalidInput, RootError, SingularJacobian, UnsupportedCombination
from ..linalg import Factorization, LinearOperator, Matrix
from ..nonlinear.protocol import near_null
from ..sensitivity.implicit import Examiner, RootTask
from ..system.jacobians import DenseJacobian
from ..system.jacobians_sparse import agrees
from .root_arguments import AutomaticJacobian, FixedJacobian, RootChoice, UserJacobian

__all__ = ["Examination"]

#: how much more than the unknowns a Jacobian changes, from which on what rounding makes of the residual is looked at
_BENT = 10.0


class Examination(Examiner):
    """That of root solves. Its right-hand sides are not counted in the log."""

    def __init__(self, choice: RootChoice, throw: bool) -> None:
        self.choice, self.throw = choice, throw

    @torch.no_grad()
    def factors(
        self, task: RootTask, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor], known: Factorization | None
    ) -> Factorization:
        """See `Examiner`, of the true Jacobian.

        A matrix that a product with the Jacobian gives away is not used: in the place of a user's ``jac``, and of a pattern that was found
        elsewhere, stands the one by differentiation; ``jac_sparsity`` that lacks entries raises `InvalidInput`, a minimum at a bound
        `UnsupportedCombination`.
        """
        if self.choice.no_derivatives:
            raise UnsupportedCombination(self.choice.no_derivatives)
        matrix, right = self._matrix(task, r, x, inputs)
        factors = task.linear_solver.factor(matrix, task.log) if known is None or not right else known
        solves = task.log.n_solves
        bad = _singular(r, x, matrix, factors)
        task.log.n_solves = solves
        return _Refused(factors, bad) if bool(bad.any()) else factors

    def _matrix(self, task: RootTask, r: Callable[[Tensor], Tensor], x: Tensor, inputs: Sequence[Tensor]) -> tuple[Matrix, bool]:
        """The true Jacobian, and whether it is the one that the iteration had."""
        rule = task.jacobian
        matrix = rule(r, x, inputs)
        checked = rule.entries_guessed or (x.is_complex() and not isinstance(matrix, LinearOperator))
        if not checked or agrees(lambda f, x: matrix, r, x, spread=0.0):
            return matrix, True
        if x.is_complex() and isinstance(rule, (AutomaticJacobian, FixedJacobian)) and not rule.entries_guessed:
            raise InvalidInput(
                "fun is complex-differentiable near the guess, but not at the solution, so that there is no Jacobian of complex numbers "
                "there: write fun on real and imaginary parts (torch.view_as_real)"
            )
        if isinstance(rule, UserJacobian) and self.choice.true_jacobian is not None:
            self.choice.notes.append("jac is not the Jacobian of fun at the solution: derivatives take the one by differentiation")
            rule = self.choice.true_jacobian
        elif isinstance(rule, AutomaticJacobian):
            rule.forget()
        else:
            raise InvalidInput("jac_sparsity lacks entries that the Jacobian has at the solution: a product with it shows so")
        matrix = rule(r, x, inputs)
        # what branches between here and the points where patterns are looked for has none that can be trusted
        return matrix if agrees(lambda f, x: matrix, r, x, spread=0.0) else DenseJacobian()(r, x), False

    def solved(self, factors: Factorization, b: Tensor, u: Tensor) -> None:
        """See `Examiner`: raises where a row of ``u`` that was asked for was not found."""
        if not self.throw:
            return
        try:
            asked = torch.isfinite(b).all(-1).all(-1) & (b != 0).any(-1).any(-1)
            failed = asked & ~torch.isfinite(u).all(-1).all(-1)
            if not bool(failed.any()):
                return
        except RuntimeError:  # autograd's batched gradients: nobody can look into them, and NaN stays NaN
            return
        row = int(failed.nonzero()[0, 0])
        many = f" in system {row} ({int(failed.sum())} of {failed.numel()} failed)" if failed.numel() > 1 else ""
        if bool(factors.singular().expand(failed.shape)[row]):
            raise SingularJacobian(
                f"the Jacobian is singular at the solution{many}, which has no derivatives there: a fold or a multiple root, a conserved "
                "quantity (name it with conserved=W, where W fun = 0), or an unknown that no equation determines",
                row=row if failed.numel() > 1 else None,
            )
        raise RootError(
            f"the linear systems of the derivatives were not solved{many}: the iterative linear solver did not converge. Give it a "
            "preconditioner, more max_iterations or a looser rtol, or take adjoint.linalg.SparseLU() or DenseLU()",
            row=row if failed.numel() > 1 else None,
        )


def _singular(r: Callable[[Tensor], Tensor], x: Tensor, matrix: Matrix, factors: Factorization) -> Tensor:
    """``(B,)``: where the Jacobian is singular to rounding, or cannot be told from a singular one because ``x`` is not known well enough.

    At a multiple root an iteration ends near the root, where the Jacobian is small but regular. So the residual is looked at along the
    direction ``v`` that the matrix knows least of: a Jacobian that changes by a tenth within the error of ``x`` (ten of Newton's steps
    there, and no less than the root of the rounding unit) is none.
    """
    flag, found = near_null(matrix, factors)
    if found is None or not x.shape[1]:
        return flag
    here = r(x)
    step = factors.solve(here).abs()
    size = x.abs()
    size = size + torch.finfo(size.dtype).eps ** 0.5 * size.amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.where(step.amax(-1, keepdim=True) > 0, step.amax(-1, keepdim=True), 1.0))
    eps = torch.finfo(size.dtype).eps
    error = (step / size).amax(-1)
    far = torch.clamp(100 * error, min=eps**0.25)
    v = found / (found.abs() / size).amax(-1, keepdim=True) * far.unsqueeze(-1)
    bend = factors.solve(r(x + v) - here) - v
    change = (bend.abs() / size).amax(-1) / far
    if bool((change > _BENT * far).any()):
        # where its terms cancel the residual may be zero by rounding: what it is known to shows beside x, where what is linear cancels,
        # and what bends it is no more than rounding
        beside = [size * (eps**0.5 * part) for part in (1.0, 0.73, 0.37, 0.11)]
        noise = torch.stack([((r(x + near) - here) + (r(x - near) - here)).abs() for near in beside]).amax(0)
        error = torch.maximum(error, (factors.solve(noise.to(x.dtype)).abs() / size).amax(-1))
    return flag | (change * torch.clamp(10 * error, min=eps**0.5) > 0.1 * far)


class _Refused(Factorization):
    """Factors some of which are not to be used: their solutions are NaN."""

    def __init__(self, inner: Factorization, bad: Tensor) -> None:
        self.inner, self.bad = inner, bad
        self.rows, self.n, self.dtype, self.device, self.log = inner.rows, inner.n, inner.dtype, inner.device, inner.log

    def singular(self) -> Tensor:
        return self.bad

    def solve(self, b: Tensor, *, transposed: bool = False, conjugated: bool = False) -> Tensor:
        out = self.inner.solve(b, transposed=transposed, conjugated=conjugated)
        return torch.where(self.bad.reshape(-1, *[1] * (out.dim() - 1)), float("nan"), out)
