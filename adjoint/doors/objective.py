"""``SteadyStateObjective``: ``f(s(p), p)`` with ``F(s(p), p) = 0``, and its derivatives to third order from one factorisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..errors import InvalidInput, RootError, SingularJacobian, SolveError, UnsupportedCombination
from ..linalg import Factorization, Log
from ..sensitivity.f1 import Expansion, Functions, Solves
from ..sensitivity.fingerprint import Fingerprint
from ..sensitivity.implicit import FactorStore, RootNode, RootOutputs, known_root
from ..system.capture import needs_derivatives
from ..system.ownership import owning
from ..system.system import StateSpec
from ..system.transforms import functorch_active, naming_faults
from ..system.witness import CHANGED
from . import objective_scipy
from .laplace import Laplace
from .layout import Layout
from .root_arguments import named_root_method
from .steady import prepare, solve_root

__all__ = ["ObjectiveStats", "SteadyStateObjective"]


@dataclass
class ObjectiveStats:
    """Work so far. The linear algebra counts everything: Newton iterations, derivatives, all points."""

    #: points at which the steady state was solved for
    n_states: int = 0
    #: iterations, evaluations of ``F`` and Jacobians of those solves
    n_newton: int = 0
    n_fun: int = 0
    n_jac: int = 0
    #: factorisations at a solution, for derivatives (none where the last ones of Newton's iteration could be kept)
    n_factorizations_at_solution: int = 0
    log: Log = field(default_factory=Log)

    @property
    def n_factorizations(self) -> int:
        """All factorisations."""
        return self.log.n_factorizations + self.log.n_refactorizations

    @property
    def n_solves(self) -> int:
        """All right-hand sides."""
        return self.log.n_solves


def _real(residuals: Tensor) -> Tensor:
    """Complex residuals as twice as many real ones."""
    return torch.stack([residuals.real, residuals.imag], -1) if residuals.is_complex() else residuals


@dataclass
class _Point:
    """Everything known at one ``p``."""

    p: Tensor
    layout: Layout
    x: Tensor
    spec: StateSpec
    expansion: Expansion
    factors: Callable[[], Factorization]
    forget_factors: Callable[[], None]
    #: ``F`` and ``f`` on flat vectors, and totals that are kept, and what they gave beside this point
    functions: Callable[[Tensor, Tensor], Any]
    fingerprint: Fingerprint

    def current(self, p: Tensor, layout: Layout) -> bool:
        """Whether it still is the point ``p`` of the same functions."""
        same = layout == self.layout and p.dtype == self.p.dtype and p.device == self.p.device and torch.equal(p, self.p)
        return same and self.unchanged()

    def unchanged(self) -> bool:
        """Whether the functions are still the same, whatever it is that they read."""
        return self.fingerprint.same(self.functions)

    def predicted(self, p: Tensor) -> Any:
        """A guess of the state at another ``p``: along the derivative where that is known."""
        x = self.x + self.expansion.state_jacobian() @ (p - self.p).to(self.x) if self.expansion.knows_state_jacobian else self.x
        return self.spec.unflatten(x.unsqueeze(0))


class SteadyStateObjective:
    """The objective ``fh(p) = f(s(p), p)`` with ``F(s(p), p) = 0`` (F-1, doi 10.5281/zenodo.2667835; docs/theory.md, section 3).

    At one ``p`` the state, value, gradient, Hessian, products and third derivatives share one steady state and one factorisation. They
    are kept until another ``p`` is asked for, or ``f`` or ``F`` change, whatever it is that they read (tensors changed in place, by
    ``.data`` or for others of the same name, as minibatches are; buffers and modes of modules; numbers): with every question both are
    evaluated once, at a point beside ``p`` and the state; for `value` and `state`, where derivatives are recorded, also there.

    Parameters
    ----------
    f : callable
        ``f(x, p) -> 0-d tensor``; with ``residuals=True`` a tensor ``r`` of any shape, and the objective is ``|r|^2 / 2``.
    F : callable
        ``F(x, p) -> residual``, like ``x``.
    x0 : Tensor or pytree of tensors
        Guess of the steady state at the first ``p``.
    residuals : bool
        Whether ``f`` gives residuals of a least-squares problem (enables `gauss_newton`).
    warm_start : bool
        Start from the steady state of the point before (moved along its derivative where that is known); from ``x0`` if that fails. With
        several steady states the one that is found may depend on the path of ``p``: False always starts from ``x0``.
    **options
        Those of `adjoint.solve_root`: ``method``, ``rtol``, ``jac``, ``jac_sparsity``, ``linear_solver``, ``conserved``, ...

    Notes
    -----
    ``p`` is a real tensor of any shape or a pytree. The gradient has its structure. For one tensor, Hessians have the shape
    ``(*p.shape, *p.shape)``, else ``(m, m)`` in the order of the flattened leaves. Cost at one ``p``, beyond the steady state and one
    factorisation: gradient one transposed solve; Hessian ``m`` more; product with the Hessian one forward and one transposed solve.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        F: Callable[..., Any],
        x0: Any,
        *,
        residuals: bool = False,
        warm_start: bool = True,
        **options: Any,
    ) -> None:
        if not callable(f) or not callable(F):
            raise InvalidInput("f and F must be callables: f(x, p) -> scalar, F(x, p) -> residual")
        known = {name: p.default for name, p in signature(solve_root).parameters.items() if p.default is not p.empty}
        taken = {"args", "batched", "least_squares", "throw"}
        wrong = sorted((set(options) - set(known)) | (set(options) & taken))
        if wrong:
            raise InvalidInput(f"SteadyStateObjective takes no {', '.join(wrong)}; options are those of solve_root without {sorted(taken)}")
        named_root_method(options.get("method", known["method"]))
        self.f, self.F, self.x0 = f, F, x0
        self.residuals, self.warm_start = residuals, warm_start
        self._options = {**{k: v for k, v in known.items() if k != "args"}, **options}
        self.stats = ObjectiveStats()
        self._point: _Point | None = None
        #: see `Functions`
        self._seen: list[bool] = []

    # -- the point -------------------------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget the point, so that the next question solves anew."""
        self._point = None

    def update(self, **changes: Any) -> None:
        """Change ``f``, ``F``, ``x0``, ``residuals``, ``warm_start`` or an option of `solve_root`; forgets the point."""
        for name, value in changes.items():
            if name in ("f", "F", "x0", "residuals", "warm_start"):
                setattr(self, name, value)
            elif name in self._options and name not in ("batched", "least_squares", "throw"):
                if name == "method":
                    named_root_method(value)
                self._options[name] = value
            else:
                raise InvalidInput(f"there is no option {name!r} to change")
        self.clear()

    def _at(self, p: Any) -> _Point:
        if functorch_active():
            raise UnsupportedCombination(
                "inside a torch.func transform or torch.vmap only value(p) and state(p) work: differentiate those, or call this outside"
            )
        layout = Layout.of(p, "p")
        flat = layout.flatten(p, "p").detach()
        if not bool(torch.isfinite(flat).all()):
            raise InvalidInput("p has non-finite entries")
        if self._point is None or not self._point.current(flat, layout):
            self._point = self._solve(flat, layout)
        return self._point

    def _solve(self, flat: Tensor, layout: Layout) -> _Point:
        flat = flat.clone()
        user_p = layout.unflatten(flat)
        before = self._point if self.warm_start else None
        starts: list[tuple[Any, dict[str, Any]]] = [(self.x0, self._options)]
        if before is not None and before.layout == layout and before.p.device == flat.device:
            # a prediction that a few steps of Newton do not mend is not worth the search that "auto" would make from it
            few = {"method": "newton", "max_steps": min(20, self._options["max_steps"])} if self._options["method"] == "auto" else {}
            starts.insert(0, (before.predicted(flat), {**self._options, **few}))
        with torch.no_grad():
            for i, (start, options) in enumerate(starts):
                # an objective is real, so that it has no derivative in complex numbers
                setup = prepare(self.F, start, (user_p,), log=self.stats.log, in_parts=True, **options)
                try:
                    out = RootOutputs(*RootNode.apply(setup.task, setup.x0.detach(), *setup.inputs))
                    break
                except RootError:
                    self.stats.n_states += 1
                    if i + 1 == len(starts):
                        raise
        self.stats.n_states += 1
        self.stats.n_newton += int(out.n_steps)
        self.stats.n_fun += int(out.n_fun)
        self.stats.n_jac += int(out.n_jac)
        spec, task, inputs = setup.spec, setup.task, setup.inputs

        def factors() -> Factorization:
            counted = self.stats.log.n_factorizations + self.stats.log.n_refactorizations
            made = task.factors(out.raw, inputs)
            self.stats.n_factorizations_at_solution += self.stats.n_factorizations - counted
            if bool(made.singular().any()):
                raise SingularJacobian(
                    "the Jacobian is singular at the steady state, so it has no derivatives in p: a fold, or a conserved quantity "
                    "(name it with conserved=)"
                )
            return made

        def solves() -> Solves:
            return Solves(
                lambda b: factors().solve(b.unsqueeze(0)).squeeze(0),
                lambda b: factors().solve(b.unsqueeze(0), transposed=True).squeeze(0),
            )

        def objective(x: Tensor, p: Tensor) -> Tensor:
            value = self.f(spec.unflatten(x.unsqueeze(0)), layout.unflatten(p))
            if self.residuals:
                return _real(value).square().sum() / 2
            if isinstance(value, Tensor) and value.is_complex():
                raise InvalidInput("f must be real: an objective has no derivatives of complex values; return its real part, or abs")
            if not isinstance(value, Tensor) or value.numel() != 1:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise InvalidInput(f"f must return a tensor with one element, got {got}; residuals need residuals=True")
            return value.reshape(())

        # conserved totals and the like are in the task's own conditions: F here is what is zero at the solution
        def residual(x: Tensor, p: Tensor) -> Tensor:
            leaves = tree_leaves(layout.unflatten(p))
            return task.residual([*leaves, *inputs[len(leaves) :]])(x.unsqueeze(0)).squeeze(0)

        kept = [] if self._options["conserved"] is None else tree_leaves((self._options["conserved"], self.x0))

        def functions(x: Tensor, p: Tensor) -> Any:
            at, parameters = spec.unflatten(x.unsqueeze(0)), layout.unflatten(p)
            return self.F(at, parameters), self.f(at, parameters), kept

        x = out.raw.squeeze(0)
        seen = Fingerprint.of(functions, x, flat)
        if not seen.same(functions):
            raise SolveError(f"f or F gives other values with every call: {CHANGED}. Draw random numbers once, and hand them in")
        expansion = Expansion(Functions(objective, residual, self._seen), x, flat, solves)
        return _Point(flat, layout, x, spec, expansion, factors, task.store.clear, functions, seen)

    # -- what users ask for ------------------------------------------------------------------------------------------------------------

    @naming_faults
    def state(self, p: Any) -> Any:
        """The steady state ``s(p)``, like ``x0``; differentiable in ``p`` (and in tensors that ``F`` captured) to any order."""
        point = self._alone(p)
        if point is None:
            return self._differentiable_state(p)
        return point.spec.unflatten(point.x.unsqueeze(0).clone())

    @naming_faults
    def value(self, p: Any) -> Tensor:
        """``f(s(p), p)``, 0-d; differentiable in ``p`` (and in tensors that ``f`` and ``F`` captured) to any order, also inside of
        ``torch.func`` transforms."""
        point = self._alone(p)
        if point is None:
            value = self.f(self._differentiable_state(p), p)
            return _real(value).square().sum() / 2 if self.residuals else value.reshape(())
        return point.expansion.value()

    __call__ = value

    def _alone(self, p: Any) -> _Point | None:
        """The point, where nobody may ask for derivatives through the state, in ``p`` or in what ``f`` and ``F`` captured; else None."""
        if needs_derivatives(tree_leaves(p)) or functorch_active():
            return None
        point = self._at(p)
        recorded = torch.is_grad_enabled() and needs_derivatives(tree_leaves(point.functions(point.x, point.p)[:2]))
        return None if recorded else point

    @owning
    def _differentiable_state(self, p: Any) -> Any:
        options = self._options
        if functorch_active():
            start = self._point.spec.unflatten(self._point.x.unsqueeze(0)) if self._point is not None and self.warm_start else self.x0
            return solve_root(self.F, start, (p,), **options).x
        point = self._at(p)
        setup = prepare(self.F, point.spec.unflatten(point.x.unsqueeze(0)), (p,), log=self.stats.log, in_parts=True, **options)

        task = replace(setup.task, find=known_root, store=_Borrowed(point))
        return setup.spec.unflatten(RootOutputs(*RootNode.apply(task, setup.x0.detach(), *setup.inputs)).x)

    @naming_faults
    def gradient(self, p: Any) -> Any:
        """``dfh/dp``, like ``p``: one transposed solve."""
        point = self._at(p)
        return point.layout.unflatten(point.expansion.gradient().clone())

    @naming_faults
    def hessian(self, p: Any) -> Tensor:
        """``d2fh/dp2``: m solves, and that of the gradient."""
        point = self._at(p)
        return self._square(point, point.expansion.hessian().clone())

    @naming_faults
    def hvp(self, p: Any, v: Any) -> Any:
        """The product of the Hessian with ``v`` (like ``p``): one forward and one transposed solve beyond those of the gradient."""
        point = self._at(p)
        return point.layout.unflatten(point.expansion.hessian_product(point.layout.flatten(v, "v").to(point.p)))

    @naming_faults
    def state_jacobian(self, p: Any) -> Any:
        """``ds/dp``: ``(*x.shape, *p.shape)`` where both are tensors, else flat, ``(n, m)``. m solves."""
        point = self._at(p)
        S = point.expansion.state_jacobian().clone()
        if point.layout.single and point.spec.tree.is_leaf():
            return point.spec.unflatten(S.T.unsqueeze(1)).movedim(0, -1).reshape(point.spec.shapes[0] + point.layout.shapes[0])
        return S

    @naming_faults
    def third(self, p: Any, v: Any) -> Tensor:
        """The derivative of the Hessian along ``v`` (like ``p``), of the Hessian's shape: one transposed and m more forward solves."""
        point = self._at(p)
        return self._square(point, point.expansion.third(point.layout.flatten(v, "v").to(point.p)))

    @naming_faults
    def third_scalar(self, p: Any, v: Any) -> Tensor:
        """The third derivative along ``v`` (like ``p``), 0-d: one forward and one transposed solve."""
        point = self._at(p)
        return point.expansion.third_scalar(point.layout.flatten(v, "v").to(point.p))

    @naming_faults
    def residual_jacobian(self, p: Any) -> Tensor:
        """``dr/dp = r_x S + r_p`` of a least-squares objective, ``(number of residuals, m)``."""
        self._needs_residuals("residual_jacobian")
        return self._observation_jacobian(self._at(p), self.f)[1]

    @naming_faults
    def residual(self, p: Any) -> Tensor:
        """``r(s(p), p)`` of a least-squares objective, flat."""
        self._needs_residuals("residual")
        point = self._at(p)
        with torch.no_grad():
            return _real(self.f(point.spec.unflatten(point.x.unsqueeze(0)), point.layout.unflatten(point.p))).reshape(-1)

    @naming_faults
    def gauss_newton(self, p: Any) -> Tensor:
        """``J* J`` with ``J`` the `residual_jacobian`: the Hessian without its curvature terms, of the Hessian's shape."""
        J = self.residual_jacobian(p)
        return self._square(self._at(p), J.T @ J)

    def laplace(self, p: Any, dispersion: float = 1.0, gauss_newton: bool = False) -> Laplace:
        """The Gaussian with mean ``p`` and covariance ``dispersion * H^-1``, for ``p`` at a minimum of a negative log posterior.

        ``gauss_newton=True`` takes the Gauss-Newton matrix in place of the Hessian. Raises `InvalidInput` unless it is positive definite.
        """
        point = self._at(p)
        m = point.p.numel()
        H = (self.gauss_newton(p) if gauss_newton else self.hessian(p)).reshape(m, m)

        def observed(g: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
            if not point.unchanged():
                raise SolveError(f"f or F are other functions than where this Gaussian was made: {CHANGED}. Make it anew")
            return self._observation_jacobian(point, g)

        return Laplace.of(H, dispersion, observed)

    def minimize(self, p0: Any, method: str = "trust-exact", **options: Any) -> Any:
        """`scipy.optimize.minimize` with exact gradient and Hessian (products for "trust-ncg", "Newton-CG" and the like with many
        parameters). The result is SciPy's, with ``result.p`` like ``p0``."""
        return objective_scipy.minimize(self, p0, method, **options)

    def least_squares(self, p0: Any, **options: Any) -> Any:
        """`scipy.optimize.least_squares` on the residuals with their exact Jacobian. The result is SciPy's, with ``result.p``."""
        self._needs_residuals("least_squares")
        return objective_scipy.least_squares(self, p0, **options)

    def _needs_residuals(self, what: str) -> None:
        if not self.residuals:
            raise UnsupportedCombination(f"{what} needs an objective made with residuals=True, whose f gives the residuals")

    @staticmethod
    def _square(point: _Point, matrix: Tensor) -> Tensor:
        return matrix.reshape(point.layout.shapes[0] + point.layout.shapes[0]) if point.layout.single else matrix

    @staticmethod
    def _observation_jacobian(point: _Point, g: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """``g(s(p), p)``, flat, and its Jacobian in ``p``."""
        expansion = point.expansion

        def flat(x: Tensor, p: Tensor) -> Tensor:
            return _real(g(point.spec.unflatten(x.unsqueeze(0)), point.layout.unflatten(p))).reshape(-1)

        return expansion.observation_jacobian(flat)


class _Borrowed(FactorStore):
    """Hands out the factors of a point: its derivatives by autograd share them."""

    def __init__(self, point: _Point) -> None:
        super().__init__()
        self.point = point

    def get(self, x: Tensor, make: Callable[[], Factorization]) -> Factorization:
        """The factors of the point."""
        return self.point.factors()

    def get_examined(self, x: Tensor, examine: Callable[[Factorization | None], Factorization]) -> Factorization:
        """The same, which have been looked at."""
        return self.point.factors()
