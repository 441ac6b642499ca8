"""The deep-equilibrium layer: a module whose output is the fixed point of another module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..doors.root_solution import RootSolution
from ..doors.steady import solve_root
from ..errors import InvalidInput, UnsupportedCombination, counted, positive
from ..system.ownership import full_precision
from ..system.transforms import functorch_active
from ..torch_internals import unwatched
from .deq_backward import ITERATIONS, Guarded, backward_solver

__all__ = ["DEQ"]


class DEQ(torch.nn.Module):
    """``z* = module(z*, x)`` (Bai, Kolter & Koltun 2019, Deep equilibrium models), differentiated by the implicit function theorem.

    Gradients reach ``x``, the parameters of the module and whatever else it uses, in every order; memory does not grow with the number of
    iterations. The derivative in the guess ``z0`` is zero.

    Parameters
    ----------
    module : nn.Module or callable
        ``module(z, x)``, of the shape of ``z``. It must be a function: dropout that draws anew at every call has no fixed point (draw the
        mask once and hand it in with ``x``).
    solver : str or method object
        How the fixed point is found: "anderson", "broyden" or "fixed_point", which need values of the module only, or whatever
        `adjoint.solve_root` takes as ``method`` ("newton", ...) for the residual ``module(z, x) - z``.
    linear_solver : str or LinearSolver
        How the linear systems of the derivatives (and of solvers of Newton type) are solved. "lu" forms every Jacobian; "gmres" and
        "bicgstab" take only products with it, and so do the iterations "anderson", "broyden" and "fixed_point"; an object of
        ``adjoint.linalg`` brings its own settings. "auto" is "lu" up to 128 unknowns per sample, else "gmres".
    tol : float
        The root mean square of ``module(z, x) - z`` of every sample is at most this (``ftol`` of `adjoint.solve_root`). Default: the
        estimated error is at most 1e-10 (single precision: 1e-5) of the fixed point itself, whatever its size (``rtol``, ``atol``).
    backward_tol : float
        Relative residual of the linear systems, for the iterative solvers that are named by a string. Default 1e-10 (single: 1e-5).
    max_steps, backward_max_steps : int
        Iterations at most, of the fixed point and of those linear solvers (products with the Jacobian).
    state_shape : tuple of int
        Shape of ``z`` without the batch dimension; None: that of ``x``, which is then a single tensor.
    batched : bool
        The leading dimension of ``z`` counts independent samples, each with its own convergence. False: all of ``z`` is one system, which
        modules that couple samples need (batch normalisation in training).
    throw : bool
        Raise when a fixed point or a derivative was not found. False: such samples are NaN, and ``layer.solution.status`` tells which.
    **options
        Handed to `adjoint.solve_root`: ``rtol``, ``atol``, ``f_scale``, ``bounds``, ...

    Attributes
    ----------
    solution : RootSolution or None
        The last forward pass, without its graph; ``solution.x`` may serve as ``z0`` of the next.
    """

    def __init__(
        self,
        module: Callable[[Any, Any], Any],
        *,
        solver: Any = "anderson",
        linear_solver: Any = "auto",
        tol: float | None = None,
        backward_tol: float | None = None,
        max_steps: int = 100,
        backward_max_steps: int = 200,
        state_shape: tuple[int, ...] | None = None,
        batched: bool = True,
        throw: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        if not callable(module):
            raise InvalidInput(f"module must be callable, got a {type(module).__name__}")
        fixed = {"fun", "x0", "args", "method", "ftol", "jac", "jac_sparsity", "conserved", "least_squares"} & set(options)
        if fixed:
            raise InvalidInput(f"DEQ takes no {', '.join(sorted(fixed))}: call adjoint.solve_root instead")
        for name, value in (("tol", tol), ("backward_tol", backward_tol)):
            if value is not None:
                positive(value, name)
        for name, value in (("max_steps", max_steps), ("backward_max_steps", backward_max_steps)):
            counted(value, name)
        backward_solver(linear_solver, 1, torch.float64, backward_tol, backward_max_steps)  # a wrong name is told at once
        self.module: Any = module
        self.solver, self.linear_solver = solver, linear_solver
        self.tol, self.backward_tol = tol, backward_tol
        self.max_steps, self.backward_max_steps = max_steps, backward_max_steps
        self.state_shape, self.batched, self.throw, self.options = state_shape, batched, throw, options
        self.solution: RootSolution | None = None
        self._checked: set[bool] = set()

    @full_precision
    def forward(self, x: Any, z0: Any = None) -> Any:
        """The fixed point, like ``z0`` (a tensor or a pytree, ``(B, *state_shape)``; by default zeros).

        Raises the errors of `adjoint.solve_root`, and `UnsupportedCombination` for a module that is no function of each sample alone.
        """
        guess = self._zeros(x) if z0 is None else tree_map(lambda z: z.detach(), z0)
        self._check_function(guess, x)
        leaves = tree_leaves(guess)
        count = sum(z.numel() for z in leaves)
        rows = leaves[0].shape[0] if self.batched and leaves[0].dim() else 1
        inner = backward_solver(self.linear_solver, count // max(rows, 1), leaves[0].dtype, self.backward_tol, self.backward_max_steps)
        guarded = Guarded(inner, self.throw)

        def residual(z: Any, x: Any) -> Any:
            return tree_map(lambda new, old: new - old, self.module(z, x), z)

        solution = solve_root(
            residual,
            guess,
            (x,),
            method=ITERATIONS.get(self.solver, self.solver) if isinstance(self.solver, str) else self.solver,
            ftol=self.tol,
            batched=self.batched,
            linear_solver=guarded,
            max_steps=self.max_steps,
            throw=self.throw,
            **self.options,
        )
        guarded.for_derivatives = True
        self.solution = replace(solution, x=tree_map(lambda z: z.detach(), solution.x))
        return solution.x

    def _zeros(self, x: Any) -> Tensor:
        leaves = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
        if self.state_shape is None:
            if not isinstance(x, Tensor):
                raise InvalidInput("x is not a single tensor, so the shape of the state must be given: state_shape= or z0=")
            return torch.zeros_like(x)
        like = next((leaf for leaf in leaves if leaf.is_floating_point() or leaf.is_complex()), None)
        if like is None or (self.batched and like.dim() == 0):
            raise InvalidInput("x holds no floating tensor with a batch dimension to make the first guess like: give z0=")
        return like.new_zeros(like.shape[:1] + tuple(self.state_shape) if self.batched else tuple(self.state_shape))

    @unwatched()
    def _check_function(self, z: Any, x: Any) -> None:
        """Change the first sample only, and see that the others do not mind; once in each mode, training and evaluation."""
        if self.training in self._checked or functorch_active():
            return
        leaves = tree_leaves(z)
        several = self.batched and all(leaf.dim() and leaf.shape[0] > 1 for leaf in leaves)

        def moved(leaf: Tensor) -> Tensor:
            leaf = leaf.clone()
            leaf[:1] += 1
            return leaf

        z = tree_map(lambda leaf: leaf + 0.5, z)  # dropout of a guess of zeros would not be seen
        # with derivatives, as the module is called later: weights that it makes for all calls are made now
        before = tree_leaves(self.module(z, x))
        after = tree_leaves(self.module(tree_map(moved, z) if several else z, x))
        for old, new in zip(before, after, strict=True):
            old, new = (old[1:], new[1:]) if several else (old, new)
            size = torch.finfo(old.dtype).eps ** 0.5 * (1 + old.detach().abs().amax()) if old.numel() else 0.0
            if bool(((new - old).detach().abs() > size).any()):
                raise UnsupportedCombination(
                    "module is not a function of each sample alone: either two calls differ (dropout: draw the mask once and hand it in "
                    "with x; spectral normalisation: eval()) or its samples depend on each other (batch normalisation: use group or layer "
                    "normalisation, eval(), or batched=False)"
                )
        self._checked.add(self.training)

    def jacobian_norm(self, z: Any, x: Any, samples: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """An unbiased estimate of the squared Frobenius norm of ``d module / d z`` for each sample, ``(B,)`` (``()`` unbatched).

        Hutchinson's estimate with random signs, one vector-Jacobian product for each of ``samples``. It is differentiable in ``z``, ``x``
        and the parameters: its mean, divided by the number of unknowns and given a weight, is the penalty of Bai, Koltun & Kolter 2021
        (Stabilizing equilibrium models by Jacobian regularization), which keeps the fixed point easy to find.
        """
        if samples < 1:
            raise InvalidInput(f"samples must be at least 1, got {samples}")
        _, pull, *_ = torch.func.vjp(lambda at: self.module(at, x), z)
        total: Any = 0.0
        for _ in range(samples):
            signs = tree_map(lambda leaf: torch.empty_like(leaf).bernoulli_(0.5, generator=generator) * 2 - 1, z)
            for product in tree_leaves(pull(signs)[0]):
                square = product.abs().square()
                total = total + (square.flatten(1).sum(1) if self.batched else square.sum())
        return total / samples

    @property
    def stats(self) -> Any:
        """Counts of the last forward pass and of the derivatives taken through it so far, None before it."""
        return None if self.solution is None else self.solution.stats

    def extra_repr(self) -> str:
        """Solvers, tolerances and options."""
        parts = [f"solver={self.solver!r}", f"linear_solver={self.linear_solver!r}", f"max_steps={self.max_steps}"]
        if self.tol is not None:
            parts.append(f"tol={self.tol:g}")
        if self.backward_tol is not None:
            parts.append(f"backward_tol={self.backward_tol:g}")
        if self.state_shape is not None:
            parts.append(f"state_shape={tuple(self.state_shape)}")
        parts += [f"{name}={getattr(self, name)}" for name in ("batched", "throw") if not getattr(self, name)]
        return ", ".join(parts + [f"{k}={v!r}" for k, v in self.options.items()])
