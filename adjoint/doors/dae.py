"""``solve_dae``: initial value problems of implicit differential-algebraic equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import InvalidInput
from ..integrate import PIDController, Plan, Record
from ..methods import DAE_METHODS, Method
from ..native.entry import NativeSolve, own_algebra
from ..native.graphs import Heard
from ..native.recognise import compile_key
from ..sensitivity import Gradient, Outputs, Problem
from ..sensitivity.consistent import Initial
from ..sensitivity.problem import interpolate_slopes, step_times
from ..system.capture import Captured, elsewhere, find_captured, needs_derivatives, stand_ins, transforming
from ..system.homes import parameter_homes
from ..system.lending import aliased, check_unchanged, copied, remembering
from ..system.precision import full_precision
from ..system.realification import suited_to_jacobians
from ..system.system import StateSpec, System
from .arguments import (
    Times,
    check_callable,
    check_compile,
    check_controller,
    check_precision,
    check_times,
    flat_norm,
    flat_tolerance,
    method_for,
    positive,
)
from .dae_arguments import (
    check_dae_method,
    check_flags,
    check_index,
    check_state,
    dae_failure,
    initial_bounds,
    initial_values,
    residual_algebra,
)
from .event_jumps import jumps_refused
from .event_times import event_records
from .forcing import with_knots
from .parts import NO_EVENTS, Parts, event_list, flat_event, solution_of, strategy_of
from .progress import progress_monitor
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
        ``fun(t, y, yp, mode, *args)``. What a reset returns is made consistent as by ``consistent="solve"``.
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
    chosen = check_dae_method(method)
    check_controller(chosen, controller)
    check_flags(consistent, max_steps)
    check_callable(fun, "fun")
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    user_spec = StateSpec.of(y0, batched)
    check_precision(user_spec, rtol)
    check_state(y0, yp0, user_spec, consistent, quadrature)
    times = check_times(t_span, t_eval, with_knots(step_ts, args, [fun, quadrature], user_spec.device), user_spec)
    chosen = method_for(times, chosen, DAE_METHODS["radau"], False)
    slope = tree_map(lambda x: torch.zeros_like(x.detach()), y0) if yp0 is None else yp0
    residual, state, integrand = fun, y0, None
    if quadrature is not None:
        check_callable(quadrature, "quadrature")
        residual, state, slope, integrand = _with_quadrature(fun, quadrature, user_spec, times, y0, slope, args)
    spec = StateSpec.of(state, batched)
    if spec.holds_complex:
        first = times.anchors[0].detach().to(spec.real_dtype)
        time = first if batched else first.reshape(())
        spec = suited_to_jacobians(spec, lambda y, yp: residual(time, y, yp, *args), state, slope)
        user_spec = user_spec.in_parts() if spec.split else user_spec
    watched = event_list(events)
    own = own_algebra(jac_sparsity=jac_sparsity, linear_solver=linear_solver)
    native = NativeSolve(own, check_compile(compile) and compile == "background")
    given = _Given(residual, fun, quadrature, watched, spec, times, state, slope, args)
    heard = _heard(native, chosen, given) if compile and not watched and quadrature is None else None
    system = _system(given, heard)
    inputs = stand_ins(system.inputs)
    y_flat, slope_flat = spec.taken(state), spec.taken(slope)

    real = spec.real_dtype
    single = real.itemsize < 8
    tolerances: dict[str, Any] = {
        "rtol": flat_tolerance(rtol, "rtol", spec, 1e-4 if single else 1e-6),
        "atol": flat_tolerance(atol, "atol", spec, 1e-6 if single else 1e-9),
    }
    algebra = residual_algebra(system, inputs, spec, times, y_flat, slope_flat, jac_sparsity, linear_solver)
    derivatives = needs_derivatives([times.anchors, y_flat, *inputs, *([] if times.samples is None else [times.samples])])
    plan = Plan(
        method=chosen,
        real=real,
        controller=controller,
        norm=flat_norm(norm, spec),
        first_step=None if first_step is None else positive(first_step, "first_step"),
        max_step=positive(max_step, "max_step"),
        min_step=positive(min_step, "min_step", zero=True),
        max_steps=int(max_steps),
        keep_states=True,
        # slopes are part of the solution, and derivatives are taken at them
        keep_stages=True,
        events=tuple(flat_event(e, system, user_spec, integrand is not None) for e in watched),
        results_of_steps=True,
        monitor=progress_monitor(progress),
        compile=compile_key(fun) if compile else None,
        **tolerances,
    )
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
        tolerances=tolerances,
        bounds=initial_bounds(y0_bounds, user_spec, y0, sum(spec.sizes), consistent),
        native=None if transforming() else native.start(plan, system, batched, inputs, y_flat, times.anchors),
    )
    check_index(chosen, algebra)
    backward = BackwardStats()

    def report(record: Record) -> None:
        plan.monitor.close()
        if throw:
            dae_failure(record, plan, system, inputs)

    ways = {"algebra": algebra, "derivatives": derivatives, "native": native, "idle": times.readable_idle}
    problem = Problem(system, plan, batched, report, backward.add, **ways)
    strategy = strategy_of(gradient)
    out = strategy.solve(problem, times.anchors, times.samples, start.y, inputs)
    parts = Parts(out, problem, times, user_spec, spec, integrand, start.y, watched, args, backward, derivatives, dense_output)
    parts = jumps_refused(parts) if watched else parts
    found = event_records(parts, parts.out) if watched else NO_EVENTS
    return replace(solution_of(parts, found), yp=parts.state(_slopes(parts, parts.out, start.yp, found.slope)))


class _Given(NamedTuple):
    """The user's functions, the residual with the running integral, and what they are called with."""

    residual: Callable[..., Any]
    fun: Callable[..., Any]
    quadrature: Callable[..., Any] | None
    events: Sequence[Callable[..., Tensor]]
    spec: StateSpec
    times: Times
    state: Any
    slope: Any
    args: tuple[Any, ...]


def _system(given: _Given, heard: Heard | None) -> System:
    """The flat system, with the tensors that the user's functions captured, and whose layout the residual has; ``heard``: see `_heard`."""
    spec, (leaves, tree) = given.spec, tree_flatten(given.args)
    used = None if heard is None else heard.captured
    if used is None:
        used, result = _probed(given)
        if heard is not None:
            heard.remember(used)
    else:
        assert heard is not None
        result = heard.result
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
    integrands = [] if given.quadrature is None else [given.quadrature]
    homes = tuple(parameter_homes([given.fun, *given.events, *integrands], used.tensors))
    return System(given.residual, spec, tree, tuple(leaves), tuple(used.tensors), homes=homes, residual=layout, **used.flags)


def _heard(native: NativeSolve, method: Method, given: _Given) -> Heard | None:
    """Which graph the residual is, if it is compiled: what it captured is known then after its first solve."""
    spec = given.spec
    if transforming() or spec.holds_complex:
        return None
    leaves, tree = tree_flatten(given.args)
    # its layout is not known yet, and does not matter here
    system = System(given.residual, spec, tree, tuple(leaves), residual=spec)
    return native.hear(system, method, given.times.anchors, spec.taken(given.state))


def _probed(given: _Given) -> tuple[Captured, Any]:
    """What the user's functions captured, and what the residual returned."""
    residual, fun, quadrature, events, spec, times, state, slope, args = given
    t = times.anchors[0].detach().to(spec.real_dtype, copy=True)
    t = t if spec.batch is not None else t.reshape(())
    probe = [copied(state), copied(slope), aliased(args)]
    found: list[Any] = []
    calls: list[Callable[..., Any]] = [remembering(residual, found)]
    calls += [lambda t, y, yp, *rest, e=e: e(t, y if quadrature is None else y[0], *rest) for e in events]
    end = (times.anchors[-1].detach().to(t, copy=True).reshape(t.shape), elsewhere(state), elsewhere(slope), *probe[2])
    used = find_captured(calls, (t, probe[0], probe[1], *probe[2]), [fun, *events], end)
    check_unchanged(probe[:2], "fun")
    return used, found[0]


def _with_quadrature(
    fun: Callable[..., Any], g: Callable[..., Any], spec: StateSpec, times: Times, y0: Any, yp0: Any, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], Any, Any, StateSpec]:
    """State and slope extended by the running integral, which starts at zero."""
    first, integrand = first_rate(g, spec, times, y0, args)

    def both(t: Tensor, state: tuple[Any, Any], slope: tuple[Any, Any], *rest: Any) -> tuple[Any, Any]:
        value = g(t, state[0], *rest)
        integrand.check(value, "what quadrature returned", "its first result")
        return fun(t, state[0], slope[0], *rest), tree_map(lambda a, b: a - b, slope[1], value)

    start = tree_map(lambda x: torch.zeros_like(x.detach()), first)
    return both, (y0, start), (yp0, tree_map(lambda x: x.detach(), first)), integrand


def _slopes(parts: Parts, out: Outputs, yp0: Tensor, stop: Tensor | None) -> Tensor:
    """``y'`` at the times of ``sol.t``: of the dense output, and at the start the consistent one; ``stop``: at events that ended it."""
    times, plan = parts.times, parts.problem.plan
    grid = step_times(out.t, out.h, out.segment, out.lands, times.anchors, plan.shift)
    n_steps = out.t.shape[0]
    if times.steps or times.samples is None:
        # ends of steps
        weights = plan.method.dense_slopes(torch.ones((), dtype=torch.float64, device=out.t.device)).to(out.stages.dtype)
        ends = torch.cat([yp0.unsqueeze(0), torch.einsum("s,ksbn->kbn", weights, out.stages)]) if n_steps else yp0.unsqueeze(0)
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
        return yp0.expand(times.samples.shape[0], *yp0.shape)
    slopes = interpolate_slopes(plan, out.stages, grid.t, grid.h, times.samples, out.sample_step)
    return torch.where((times.samples == times.anchors[0]).detach().unsqueeze(-1), yp0, slopes)
