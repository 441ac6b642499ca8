"""``solve_dae``: initial value problems of implicit differential-algebraic equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput
from ..integrate import PIDController
from ..methods import DAE_METHODS, Method
from ..native.entry import NativeSolve, Sought, own_algebra
from ..native.recognise import compile_key
from ..sensitivity import Gradient, Outputs, Problem
from ..sensitivity.consistent import Initial
from ..sensitivity.linearity import refuse_altered
from ..sensitivity.problem import interpolate_slopes, step_times
from ..system.capture import needs_derivatives, stand_ins
from ..system.ownership import full_precision
from ..system.system import StateSpec, System
from ..system.transforms import transforming
from ..torch_internals import leaves_of
from .arguments import (
    Times,
    check_callable,
    check_compile,
    check_controller,
    check_precision,
    check_times,
    listed_args,
    method_for,
)
from .dae_arguments import (
    check_dae_method,
    check_flags,
    check_index,
    check_state,
    dae_failure,
    initial_bounds,
    residual_algebra,
)
from .dae_initial import initial_values
from .dae_start import consistently, from_start
from .forcing import with_knots
from .given import Given, finished, reporting
from .parts import Parts, event_list, seen_at_ends, solution_of, strategy_of
from .prepared import asked_before
from .quadrature import first_rate
from .rounds import in_rounds
from .solution import BackwardStats, Solution

__all__ = ["solve_dae"]


@full_precision
@in_rounds()
def solve_dae(
    fun: Callable[..., Any],
    t_span: Any,
    y0: Any,
    yp0: Any = None,
    args: Any = (),
    *,
    t_eval: Any = None,
    method: str | Method = "radau",
    rtol: Any = None,
    atol: Any = None,
    gradient: Gradient | None = None,
    batched: bool = False,
    events: Callable[..., Tensor] | Sequence[Callable[..., Tensor]] | None = None,
    mode: Any = None,
    max_events: int = 1000,
    dense_output: bool = False,
    quadrature: Callable[..., Any] | None = None,
    controller: PIDController | None = None,
    norm: str | Callable[[Any], Tensor] | None = None,
    first_step: float | None = None,
    max_step: float = float("inf"),
    min_step: float = 0.0,
    max_steps: int = 100_000,
    step_ts: Any = None,
    compile: bool | str = False,
    throw: bool = True,
    progress: bool = False,
    consistent: str = "auto",
    y0_bounds: Any = None,
    differential: Any = None,
    suppress_algebraic: bool = False,
    jac_sparsity: Any = None,
    linear_solver: Any = None,
) -> Solution:
    """Solve ``fun(t, y, y', *args) = 0`` with derivatives in everything that the solution depends on.

    Of index 0 or 1 in any form (also fully implicit, with a singular matrix in front of the derivatives), and of index 2 where the
    constraints of the index-2 variables hold differential variables only (Hessenberg form). What is higher raises `HigherIndexDAE`.

    Parameters
    ----------
    fun : callable
        ``fun(t, y, yp, *args) -> residual``; ``yp`` is shaped like the state ``y``, and the residual has as many entries, in any
        structure. ``t`` is 0-d (``(B,)`` with ``batched=True``). ``args``, parameters of modules and captured tensors are differentiated.
    t_span, t_eval, rtol, atol, gradient, batched, events, mode, max_events, dense_output, controller, norm, first_step, max_step
        And ``min_step``, ``max_steps``, ``step_ts``, ``compile``, ``throw``, ``progress``: as for `solve_ivp`. With ``mode=`` it is
        ``fun(t, y, yp, mode, *args)``. What a reset returns is made consistent as by ``consistent="solve"``. With ``throw=False`` a
        trajectory without consistent values fails at its start.
    y0, yp0 : Tensor or pytree of tensors
        Initial state and slope. See ``consistent`` for what is done with them. ``yp0=None``: unknown. Derivatives in ``y0`` are those in
        its differential part; the algebraic part is a guess on which the solution does not depend.
    method : "radau", "radau3" or a method object
        Radau IIA of order 5 (three stages; the default) or 3 (Hairer & Wanner, Solving ordinary differential equations II, chapter VII).
        Constraints hold at the ends of steps to the tolerance of the iteration.
    consistent : "auto", "solve", "slopes", "check" or "trust"
        "solve": keep what is differentiated in ``y0`` and solve for algebraic variables and slopes. "auto": the same, but raise if both
        ``y0`` and ``yp0`` were given and an algebraic variable would move by much. "slopes": keep ``yp0``, which must be given, and solve
        for all of ``y0`` (``yp0 = 0``: a steady start; index 0 and 1). "check": raise unless they satisfy the equations (to a thousand
        times the tolerance). "trust": take them as they are.
    y0_bounds : pair (lower, upper)
        Numbers, or like the state, or None: what the search for initial values must stay within (algebraic variables; with
        ``consistent="slopes"`` all).
    differential : mask like the state
        Which variables are differential; default: found from ``dF/dy'`` at the start. A mask that contradicts it raises.
    quadrature : callable
        ``g(t, y, *args)``, integrated along the solution under the same error control.
    suppress_algebraic : bool
        Leave algebraic variables out of the error test.
    jac_sparsity : pair of patterns
        Where ``dF/dy`` and ``dF/dy'`` may be non-zero. Found from ``fun`` if it is not given and the state is large.
    linear_solver : LinearSolver
        ``adjoint.linalg.DenseLU()``, ``SparseLU()``, ...

    Returns
    -------
    Solution
        With ``yp``, the slopes at ``t``.

    Raises
    ------
    InvalidInput, UnsupportedCombination, InconsistentInitialCondition, HigherIndexDAE, SingularJacobian, MaxStepsReached,
    StepSizeTooSmall, NonFiniteState, EventsAccumulate
    """
    arguments = locals()
    known = asked_before(arguments) if check_compile(compile) else None
    if known is not None and (done := known.solution(solve_dae)) is not None:
        return done
    chosen, args = check_dae_method(method), listed_args(args)
    check_controller(chosen, controller)
    check_flags(consistent, max_steps)
    check_callable(fun, "fun")
    user_spec = StateSpec.of(y0, batched)
    check_precision(user_spec, rtol)
    check_state(y0, yp0, user_spec, consistent, quadrature)
    step_ts = with_knots(step_ts, args, [fun, quadrature], user_spec.device)
    times = check_times(t_span, t_eval, step_ts, user_spec)
    chosen = method_for(times, chosen, DAE_METHODS["radau"], False)
    slope = tree_map(lambda x: torch.zeros_like(x.detach()), y0) if yp0 is None else user_spec.matched(yp0)
    residual, state, integrand = fun, y0, None
    if quadrature is not None:
        check_callable(quadrature, "quadrature")
        residual, state, slope, integrand = _with_quadrature(fun, quadrature, user_spec, times, y0, slope, args)
    spec = StateSpec.of(state, batched)
    watched = seen_at_ends(event_list(events), times)
    given = Given(residual, (fun,), spec, (state, slope), args, (times.anchors[0], times.anchors[-1]), watched, quadrature)
    given = given.laid_out(chosen, bool(compile), (jac_sparsity, linear_solver))
    spec, user_spec = given.spec, user_spec.in_parts() if given.spec.split else user_spec
    own = [name for name, x in (("jac_sparsity", jac_sparsity), ("linear_solver", linear_solver)) if x is not None]
    native = NativeSolve(own_algebra(own) if own else None, check_compile(compile) and compile == "background")
    system = _system(given, native, chosen, bool(compile) and (spec.split or not spec.holds_complex))
    inputs, y_flat, slope_flat = stand_ins(system.inputs), given.state(), given.state(1)
    algebra = residual_algebra(system, inputs, spec, times, y_flat, slope_flat, jac_sparsity, linear_solver)
    derivatives = needs_derivatives([times.anchors, y_flat, *inputs, *([] if times.samples is None else [times.samples])])
    # slopes are part of the solution, and derivatives are taken at them
    kept = {"keep_states": True, "keep_stages": True, "results_of_steps": True}
    plan = given.plan(system, chosen, user_spec, integrand is not None, arguments, compile_key(fun) if compile else None, **kept)
    searched = native.start(Sought(plan, system, batched, inputs, y_flat, times.anchors)) if compile and not transforming() else None
    start, algebra = initial_values(
        system,
        algebra,
        times.anchors[0],
        Initial(y_flat, slope_flat),
        inputs,
        consistent="solve" if consistent == "auto" and yp0 is None else consistent,
        differential=differential,
        user_spec=user_spec,
        skip=suppress_algebraic,
        tolerances={"rtol": plan.rtol, "atol": plan.atol},
        bounds=initial_bounds(y0_bounds, user_spec, y0, sum(spec.sizes), consistent),
        native=searched,
        throw=throw,
    )
    check_index(chosen, algebra)
    backward = BackwardStats()
    ways = {"algebra": algebra, "derivatives": derivatives, "native": native, "idle": times.readable_idle}
    report = reporting(plan, dae_failure if throw else None, system, inputs)
    problem = Problem(system, plan, batched, report, backward.add, **ways)
    strategy = strategy_of(gradient)
    refuse_altered(problem, strategy, times.anchors[0], start.y, inputs)
    out = strategy.solve(problem, times.anchors, times.samples, start.y, inputs)
    if known is not None and step_ts is None and searched is not None:
        known.remember(problem, [x for x in leaves_of(args) if isinstance(x, Tensor)], integrand)
    first_slopes = start.yp
    if times.samples is not None and algebra.structure is not None:
        out, first_slopes = from_start(out, start, times, spec.real_dtype, consistently(system, algebra, inputs, throw))
    parts = Parts(out, problem, times, user_spec, spec, integrand, start.y, watched, args, backward, derivatives, dense_output)
    parts, found = finished(parts)
    return replace(solution_of(parts, found), yp=parts.shown(_slopes(parts, parts.out, first_slopes, found.slope)))


def _system(given: Given, native: NativeSolve, method: Method, compiled: bool) -> System:
    """The flat system, which has the layout of what the residual returns."""
    spec = given.spec
    used, result = given.looked_into(native, method, compiled)
    layout = StateSpec.of(result, spec.batch is not None, "what fun returned")
    layout = layout.in_parts() if spec.split else layout
    if sum(layout.sizes) != sum(spec.sizes) or layout.batch != spec.batch:
        many = f" for each of {spec.batch} trajectories" if spec.batch is not None else ""
        raise InvalidInput(
            f"fun returned {sum(layout.sizes)} residuals in shapes {[tuple(s) for s in layout.shapes]}, but the state has "
            f"{sum(spec.sizes)} entries{many}: there must be as many equations as unknowns"
        )
    if layout.dtype != spec.dtype or layout.device != spec.device:
        raise InvalidInput(f"fun returned {layout.dtype} on {layout.device}, but the state is {spec.dtype} on {spec.device}")
    return given.system(used, residual=layout)


def _with_quadrature(
    fun: Callable[..., Any], g: Callable[..., Any], spec: StateSpec, times: Times, y0: Any, yp0: Any, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any, Any, StateSpec]:
    """State and slope extended by the running integral, which starts at zero."""
    first, integrand = first_rate(g, spec, times, y0, args)

    def both(t: Tensor, state: tuple[Any, Any], slope: tuple[Any, Any], *rest: Any) -> tuple[Any, Any]:
        value = g(t, state[0], *rest)
        value = integrand.check(value, "what quadrature returned", "its first result")
        return fun(t, state[0], slope[0], *rest), tree_map(lambda a, b: a - b, slope[1], value)

    start = tree_map(lambda x: torch.zeros_like(x.detach()), first)
    return both, (y0, start), (yp0, tree_map(lambda x: x.detach(), first)), integrand


def _slopes(parts: Parts, out: Outputs, yp0: Tensor, stop: Tensor | None) -> Tensor:
    """``y'`` at the times of ``sol.t``: of the dense output, and at the start the consistent one; ``stop``: at events that ended it.

    ``yp0``: ``(B, n)``, with samples ``(T, B, n)``.
    """
    times, plan = parts.times, parts.problem.plan
    grid = step_times(out.t, out.h, out.segment, out.lands, times.anchors, plan.shift)
    n_steps = out.t.shape[0]
    if times.steps or times.samples is None:
        # ends of steps
        weights = plan.method.dense_slopes(torch.ones((), dtype=torch.float64, device=out.t.device)).to(out.stages.dtype)
        ends = torch.cat([yp0.unsqueeze(0), torch.einsum("s,ksbn->kbn", weights, out.stages)]) if n_steps else yp0.unsqueeze(0)
        # a step of no length is none of the equations: no slope follows from it
        empty = (times.anchors[0] == times.anchors[-1]).detach().unsqueeze(-1)
        ends = torch.where(empty, yp0, ends)
        if times.steps:
            beyond = torch.arange(n_steps + 1, device=out.t.device).unsqueeze(-1) > out.n_accepted
            if stop is not None:
                final = (torch.arange(n_steps + 1, device=out.t.device).unsqueeze(-1) == out.n_accepted) & (out.status > 0)
                ends = torch.where(final.unsqueeze(-1), stop, ends)
            return torch.where(beyond.unsqueeze(-1), float("nan"), ends)
        place = out.n_accepted.reshape(1, -1, 1).expand(1, -1, ends.shape[-1])
        last = torch.where((out.status >= 0).unsqueeze(-1), ends.gather(0, place)[0], float("nan"))
        last = last if stop is None else torch.where((out.status > 0).unsqueeze(-1), stop, last)
        return torch.stack([yp0, last])
    if n_steps == 0:
        return yp0
    slopes = interpolate_slopes(plan, out.stages, grid.t, grid.h, times.samples, out.sample_step)
    return torch.where((times.samples == times.anchors[0]).detach().unsqueeze(-1), yp0, slopes)
