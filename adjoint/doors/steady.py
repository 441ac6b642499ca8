"""``solve_root``: solutions of ``fun(x, *args) = 0``, differentiable to any order by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, counted, positive
from ..linalg import LinearSolver, Log
from ..nonlinear import RootRecord
from ..sensitivity.fingerprint import RootWitness
from ..sensitivity.implicit import RootNode, RootOutputs, RootTask
from ..sensitivity.linearity import refuse_altered_root
from ..system.capture import needs_derivatives, stand_ins
from ..system.ownership import full_precision
from ..system.realification import suited_to_jacobians
from ..system.system import StateSpec, System
from ..torch_internals import is_functorch_wrapped_tensor
from .arguments import check_callable, check_finite, check_not_half, flat_tolerance, listed_args
from .failures import raise_root_failure
from .given import Given
from .progress import root_monitor
from .root_arguments import AutomaticJacobian, RootChoice, check_bounds, choose
from .root_examination import Examination
from .root_search import RootSearch
from .root_solution import RootSolution, RootStats
from .root_systems import StationarySystem, check_conserved

__all__ = ["solve_root"]


@full_precision
def solve_root(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    method: Any = "auto",
    rtol: Any = None,
    atol: Any = None,
    ftol: float | None = None,
    x_scale: Any = None,
    f_scale: Any = None,
    batched: bool = False,
    jac: Callable[..., Any] | None = None,
    jac_sparsity: Any = None,
    linear_solver: LinearSolver | None = None,
    bounds: tuple[Any, Any] | None = None,
    conserved: Any = None,
    least_squares: bool = False,
    max_steps: int = 200,
    throw: bool = True,
    progress: bool = False,
) -> RootSolution:
    """Solve ``fun(x, *args) = 0`` for ``x``, with derivatives of every order in everything that ``fun`` depends on.

    Derivatives come from the implicit function theorem at the solution (docs/theory.md, section 3), all from one factorisation of the
    Jacobian that stays with the solution; the iteration that found it is never differentiated. The derivative in the guess ``x0`` is
    zero (unless it fixes the totals of ``conserved``).

    Parameters
    ----------
    fun : callable
        ``fun(x, *args) -> residual``, with the structure, shapes and dtypes of ``x0`` (any, with ``least_squares=True``). For methods that
        follow a flow (pseudo-transient continuation, time integration) it is the tendency ``dx/dt``.
    x0 : Tensor or pytree of tensors
        Guess, of any shape.
    args : tuple or pytree
        Further arguments of ``fun``. A single tensor is taken as ``(tensor,)``.
    method : str or method object
        "auto" (picks by size and structure, and says what in ``sol.note``), a name of ``adjoint.nonlinear.METHODS``, or
        "time_integration" (of ``x' = fun(x)`` until it moves no more, then Newton; the last resort of "auto").
    rtol, atol : number, tensor, or pytree like the state
        The last step of a Newton iteration, for other methods the estimated error, is at most ``atol + rtol |x|``. Default 1e-10 and 1e-12
        for double precision, 1e-5 and 1e-6 for single. Unless ``atol`` is given, unknowns that are smaller than it are found to ``rtol`` of
        their own size as well, as far as rounding lets them. Scaling residual or unknowns changes nothing.
    ftol : float
        The root mean square of ``residual / f_scale`` is at most this: a further demand for methods of Newton type, and for the others
        ("fixed_point", "anderson", "broyden") the only one, in the place of the above. Default: no such demand.
    x_scale, f_scale : number or tensor like the state
        Typical sizes of unknowns (for trust regions) and residuals.
    batched : bool
        The leading dimension of ``x0`` counts independent systems: each converges, or fails, alone.
    jac : callable
        ``jac(x, *args)``: the Jacobian for a tensor state: dense ``(n, n)`` (``(B, n, n)`` batched) or a sparse tensor of that shape.
    jac_sparsity : sparse tensor, SciPy matrix, dense mask or SparsityPattern
        Where the Jacobian may be non-zero. Found from ``fun`` itself if it is not given and the system is large.
    linear_solver : LinearSolver
        ``adjoint.linalg.DenseLU()``, ``SparseLU()``, ``GMRES()``, ... By default by kind and size of the Jacobian.
    bounds : pair
        Lower and upper bounds like the state, None for none. A minimum (``least_squares=True``) that lies at one has no derivatives here.
    conserved : tensor or pair
        ``W`` of shape ``(k, n)`` (rows of weights on the flat state) with ``W fun = 0`` identically: the totals ``W x`` are kept at
        those of ``x0``, or at given totals with ``(W, totals)``. Without it such systems are singular.
    least_squares : bool
        Find a minimum of ``|fun|^2`` instead (Levenberg-Marquardt); derivatives are those of the minimiser.
    max_steps : int
        Iterations at most.
    throw : bool
        Raise a named error on failure. False: look at ``status``; failed systems are NaN.
    progress : bool
        Show a bar with the residual (needs tqdm).

    Returns
    -------
    RootSolution

    Raises
    ------
    InvalidInput, UnsupportedCombination, NewtonDidNotConverge, SingularJacobian, NonFiniteResidual
    """
    return _solve(**locals())


@dataclass(frozen=True)
class RootSetup:
    """A root problem made ready: its task, its inputs, and its layout."""

    task: RootTask
    spec: StateSpec
    x0: Tensor
    inputs: tuple[Tensor, ...]
    choice: RootChoice
    batched: bool


def _solve(**options: Any) -> RootSolution:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        setup = prepare(**options)
        out = RootOutputs(*RootNode.apply(setup.task, setup.x0.detach(), *setup.inputs))
    return solution_of(setup, out)


def prepare(
    fun: Callable[..., Any],
    x0: Any,
    args: Any,
    *,
    method: Any,
    rtol: Any,
    atol: Any,
    ftol: float | None,
    x_scale: Any,
    f_scale: Any,
    batched: bool,
    jac: Any,
    jac_sparsity: Any,
    linear_solver: LinearSolver | None,
    bounds: Any,
    conserved: Any,
    least_squares: bool,
    max_steps: int,
    throw: bool,
    progress: bool,
    log: Log | None = None,
    in_parts: bool = False,
) -> RootSetup:
    """Check the arguments of `solve_root` and choose how to solve. ``log`` counts the linear algebra, a new one by default; ``in_parts``:
    complex states in real and imaginary parts, as functions that are not complex-differentiable want them, whatever ``fun`` is, and
    derivatives in any case."""
    check_callable(fun, "fun")
    counted(max_steps, "max_steps")
    args = listed_args(args)
    spec = StateSpec.of(x0, batched, "x0")
    check_not_half(spec, "x0")
    check_finite(x0, spec, "x0{} has non-finite entries")
    system, spec, returns = root_system(fun, x0, args, spec, least_squares, in_parts)
    plain, conditions, flat0 = system, system, spec.taken(x0)
    if conserved is not None:
        system = conditions = check_conserved(conserved, system, flat0, least_squares)
    if least_squares:
        conditions = StationarySystem(system)
    inputs = stand_ins(conditions.inputs)
    real = spec.real_dtype
    single = real.itemsize < 8
    log = Log() if log is None else log
    lower, upper = check_bounds(bounds, spec, flat0)
    choice = choose(system, spec, method, jac, jac_sparsity, linear_solver, least_squares, conserved is not None, fun)
    settings = dict(
        x_rtol=flat_tolerance(rtol, "rtol", spec, 1e-5 if single else 1e-10),
        x_atol=flat_tolerance(atol, "atol", spec, 1e-6 if single else 1e-12),
        by_own_size=atol is None,
        f_scale=_scale(f_scale, "f_scale", returns or spec),
        x_scale=_scale(x_scale, "x_scale", spec),
        lower=lower,
        upper=upper,
    )
    # steps and errors of x are measured; a tolerance of the residual would depend on its scale
    tol = float("inf") if ftol is None else positive(ftol, "ftol", zero=True)
    find = RootSearch(system, choice, settings, tol, max_steps, least_squares, throw, log, root_monitor() if progress else None)

    def report(record: RootRecord) -> None:
        choice.notes.append(record.note)
        if throw:
            raise_root_failure(record, spec)

    examiner = Examination(choice, throw)
    witness = RootWitness() if needs_derivatives(inputs) else None
    if (witness is not None or in_parts) and isinstance(plain, System):
        refuse_altered_root(plain, flat0, inputs[: len(plain.inputs)])
    rule = choice.jacobian
    rule = rule.of_conditions() if least_squares and isinstance(rule, AutomaticJacobian) else rule
    task = RootTask(system, conditions, find, rule, choice.linear_solver, log, report, examiner=examiner, witness=witness)
    return RootSetup(task, spec, flat0, tuple(inputs), choice, batched)


def root_system(
    fun: Callable[..., Any], x0: Any, args: tuple[Any, ...], spec: StateSpec, least_squares: bool = False, in_parts: bool = False
) -> tuple[Any, StateSpec, StateSpec | None]:
    """The flat system with the tensors that ``fun`` captured, the layout of its state, and that of what ``fun`` returns where it is
    another."""
    batched, call = spec.batch is not None, fun if least_squares else spec.keyed(fun)
    given = Given(call, (fun,), spec, (x0,), args)
    used, result = given.probed()
    returns = StateSpec.of(result, batched, "what fun returned") if least_squares else None
    if returns is None:
        spec.check(result, "what fun returned", "x0")
    if spec.holds_complex:
        # a sum of squares is no complex-differentiable function of anything
        real = in_parts or least_squares
        spec = spec.in_parts() if real else suited_to_jacobians(spec, lambda x: call(x, *args), x0)
        returns = returns if returns is None or not spec.split else returns.in_parts()

    def timed(_: Tensor, x: Any, *rest: Any) -> Any:
        return call(x, *rest)

    return replace(given, spec=spec).system(used, fun=timed, returns=returns), spec, returns


def solution_of(setup: RootSetup, out: RootOutputs) -> RootSolution:
    """What the user sees."""
    counts: list[Any] = [out.n_steps, out.n_fun, out.n_jac]
    status: Any = out.status
    norms: Any = out.residual_norm
    if not setup.batched:
        status, norms, counts = status.squeeze(0), norms.squeeze(0), [c.squeeze(0) for c in counts]
        if not is_functorch_wrapped_tensor(status):
            status, norms, counts = int(status), float(norms), [int(c) for c in counts]
    return RootSolution(
        x=setup.spec.unflatten(out.x),
        residual_norm=norms,
        status=status,
        stats=RootStats(*counts, log=setup.task.log),
        note="; ".join(note for note in setup.choice.notes if note),
    )


def _scale(value: Any, name: str, spec: StateSpec) -> float | Tensor:
    found = flat_tolerance(value, name, spec, 1.0)
    usable = found > 0
    if not bool(usable.all() if isinstance(usable, Tensor) else usable):
        raise InvalidInput(f"{name} has entries of zero, which it is divided by")
    return found
