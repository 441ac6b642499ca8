"""``solve_ivp``: initial value problems of ordinary differential equations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination, counted
from ..integrate import PIDController
from ..methods import METHODS, Method
from ..native.entry import NativeSolve, own_algebra
from ..native.recognise import compile_key
from ..sensitivity import Gradient, Problem
from ..sensitivity.linearity import refuse_altered
from ..system.capture import moves, needs_derivatives, stand_ins
from ..system.ownership import as_part, full_precision
from ..system.split import SplitFunction
from ..system.system import StateSpec, System
from ..system.transforms import transforming, vmap_active
from ..torch_internals import leaves_of
from .arguments import (
    check_callable,
    check_compile,
    check_controller,
    check_finite,
    check_method,
    check_precision,
    check_times,
    listed_args,
    method_for,
)
from .dae import solve_dae
from .dae_arguments import dae_failure
from .event_times import ended_once, sampled_once
from .failures import raise_failure
from .forcing import with_knots
from .given import Given, finished, reporting
from .mass_matrix import as_residual, consistent_start, in_step, with_matrix, without_last
from .parts import Parts, event_list, seen_at_ends, solution_of, strategy_of
from .prepared import asked_before
from .quadrature import with_integral
from .rounds import in_rounds
from .solution import BackwardStats, Solution
from .stage_arguments import check_jumps, stage_algebra, warn_of_lost_time
from .switching import solve_switching

__all__ = ["solve_ivp"]

_IMPLICIT = ("jac", "jac_sparsity", "linear_solver")


@full_precision
@in_rounds(solve_dae)
def solve_ivp(
    fun: Callable[..., Any],
    t_span: Any,
    y0: Any,
    args: Any = (),
    *,
    t_eval: Any = None,
    method: str | Method = "tsit5",
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
    jac: Callable[..., Any] | None = None,
    jac_sparsity: Any = None,
    linear_solver: Any = None,
    mass_matrix: Any = None,
) -> Solution:
    """Solve ``y' = fun(t, y, *args)``, ``y(t_span[0]) = y0``, with derivatives in everything that the solution depends on.

    Parameters
    ----------
    fun : callable
        ``fun(t, y, *args) -> dy/dt``, with the structure, shapes and dtypes of ``y0``. ``t`` is 0-d (``(B,)`` with ``batched=True``) in
        the real dtype of the state. ``args``, parameters of an ``nn.Module`` and tensors that a plain function captured are all
        differentiated. An `adjoint.SplitFunction` for the implicit-explicit methods of ``adjoint.methods.IMEX_METHODS``; other methods
        integrate its sum.
    t_span : pair of numbers or 0-d tensors
        Start and end; the end may be the smaller one. They may require grad; with ``batched=True`` they may be ``(B,)``.
    y0 : Tensor or pytree of tensors
        Initial state: any shape, float or complex. Leaves of several dtypes are integrated in their common dtype.
    args : tuple or pytree
        Further arguments of ``fun``, ``events`` and ``quadrature``. A single tensor is taken as ``(tensor,)``.
    t_eval : None, "steps", or times
        None: the two ends. "steps": the solver's own steps (NaN-padded when batched or vmapped). Else ``(T,)``, or ``(T, B)`` when
        batched, increasing or decreasing, within ``t_span``; may require grad.
    method : str or method object
        See ``adjoint.methods.METHODS`` and ``IMEX_METHODS``; "auto" changes between "tsit5" and "kvaerno5" as each trajectory becomes stiff
        and ceases to be (other pairs: ``adjoint.methods.AutoSwitch``).
        Methods without an error estimate take constant steps of ``first_step``. "abm" (lower orders: ``adjoint.methods.Adams``) and "bdf"
        choose their order too, from step to step.
    rtol, atol : number, tensor, or pytree like the state
        A step is accepted when the norm of ``error / (atol + rtol max(|y0|, |y1|))`` is at most one. Default 1e-6 and 1e-9 for double
        precision, 1e-4 and 1e-6 for single.
    gradient : strategy object
        Default `DiscreteAdjoint()`; see also `Backprop`.
    batched : bool
        The leading dimension of ``y0`` counts independent trajectories, each with its own steps, end and status.
    events : callable, `Event`, or sequence of them
        ``event(t, y, *args) -> 0-d tensor`` (``(B,)`` when batched), with SciPy's attributes ``terminal`` (bool or count) and
        ``direction``; an `Event` may have a ``reset``, with whose state the solve goes on (docs/hybrid.md).
        Located on the dense output; times and states are differentiable. When batched, records are ``(E, B)``, padded with NaN for
        trajectories with fewer events, and a terminal event ends its own trajectory; so under ``torch.vmap``, for each copy.
        A comparison or count is found where it changes, but its time has no derivative: asking for one raises. See docs/scipy.md.
    mode : number, tensor or pytree of them
        A discrete state at the start, which resets change: ``fun``, events, resets and ``quadrature`` are called with it before ``args``,
        ``fun(t, y, mode, *args)``, as a tensor (``(B,)`` when batched). Floating modes are differentiated.
    max_events : int
        Events with resets of one trajectory before `EventsAccumulate` is raised.
    dense_output : bool
        Give the solution ``sol(t)``. Keeps all stages of all steps.
    quadrature : callable
        ``g(t, y, *args)``: a tensor (or pytree) to be integrated along the solution, under the same error control.
    controller : PIDController
        Default `IController()`, with implicit methods `PIDController(shrink_accepted=True, predictive=True)`. Not for "abm" and "bdf",
        which choose order and step size together.
    norm : "rms", "max" or callable
        Norm of the scaled error; a callable takes a state pytree and gives 0-d (``(B,)`` when batched).
    first_step, max_step, min_step, max_steps
        Sizes are positive in either direction of time. Default first step: Hairer's. ``max_steps`` counts attempts.
    step_ts : times
        Times at which a step must end, where ``fun`` may jump: the stages on either side see ``t`` from within their own step.
    compile : bool or "background"
        Run the solve and its derivatives as native code, where that can be: one-step methods and "bdf" on a CPU; on CUDA devices
        explicit, Rosenbrock and ESDIRK methods and "auto", without events, whose code NVRTC makes. Complex states go in two parts.
        The first solve of a ``fun`` calls a C++ compiler (g++, clang++, or that of ``pip install ziglang``), which takes a second or a few;
        what it makes is kept on disk. "background": it is called beside, and solves run uncompiled until its code is there. All else runs
        as without ``compile=``, after one warning that says why (docs/choosing.md).
    throw : bool
        Raise a named error on failure. False: look at ``status``; failed trajectories are NaN from the failure on, and so are their
        derivatives in forward mode and in their own initial values; parameters that all trajectories share get none from them.
    progress : bool
        Show a progress bar (needs tqdm).
    jac : callable
        For implicit methods: ``jac(t, y, *args)``, the Jacobian in ``y`` of a tensor state, dense ``(n, n)`` (``(B, n, n)`` when batched)
        or sparse; of the implicit part for implicit-explicit methods. Held against ``fun`` at the first call; derivatives of derivatives
        do not use it. Default: automatic differentiation, compressed by colouring where the pattern is sparse.
    jac_sparsity : sparse tensor, SciPy matrix, dense mask or SparsityPattern
        For implicit methods: where the Jacobian may be non-zero. Found from ``fun`` itself if it is not given and the state is large.
    linear_solver : LinearSolver
        For implicit methods: ``adjoint.linalg.DenseLU()``, ``SparseLU()``, ... By default by kind and size of the Jacobian.
    mass_matrix : Tensor or callable
        Solve ``M y' = fun(t, y, *args)``: ``M`` a tensor ``(n, n)`` (when batched also ``(B, n, n)``) on the flattened state, or
        ``M(t, y, *args)``; it may be singular (of index 1 or 2, see `solve_dae`) and is differentiated. With method "radau5",
        "radauIIA3" or "bdf"; a tensor of index 0 or 1 also with "rodas3p", "rodas4" or "rodas5p", and gradients `DiscreteAdjoint`,
        `Backprop` and `ForwardSensitivity`. Algebraic variables in ``y0`` are guesses: they are solved for.

    Returns
    -------
    Solution

    Raises
    ------
    InvalidInput, UnsupportedCombination, MaxStepsReached, StepSizeTooSmall, NonFiniteState, CapturedTensorLost, EventsAccumulate
    """
    arguments = locals()
    known = asked_before(arguments) if check_compile(compile) else None
    if known is not None and (done := known.solution(solve_ivp)) is not None:
        return done
    if (mass := mass_matrix) is not None and not in_step(method, mass):
        return as_part(solve_dae, **as_residual(arguments))
    chosen, args = check_method(method), listed_args(args)
    implicit_options = {k: arguments[k] for k in _IMPLICIT if arguments[k] is not None}
    _check(fun, chosen, implicit_options, arguments)
    user_spec = StateSpec.of(y0, batched)
    check_precision(user_spec, rtol)
    if not batched:
        check_finite(y0, user_spec, "All components of the initial state `y0` must be finite: y0{} has non-finite entries")
    if mass is not None:
        quadrature = with_matrix(quadrature, mass, y0, batched) if callable(quadrature) else quadrature
        fun, args, events = with_matrix(fun, mass, y0, batched), (*args, mass), without_last(events)
    step_ts = with_knots(step_ts, args, [*_pieces(fun), quadrature], user_spec.device)
    times = check_times(t_span, t_eval, step_ts, user_spec)
    if step_ts is not None:
        check_jumps(chosen, step_ts)
    chosen = method_for(times, chosen, METHODS["kvaerno5" if chosen.implicit else "tsit5"], mass is None)
    if chosen.implicit and mass is None and quadrature is None and not sum(user_spec.sizes):
        chosen = METHODS["tsit5"]  # of a state without entries nothing is stiff, and its matrices have no form
    moving = any(moves(x) for x in (times.anchors, times.samples) if x is not None)
    if moving:
        times = replace(times, samples=sampled_once(times.samples, times.anchors[0], chosen), anchors=ended_once(times.anchors, chosen))
    right_hand_side, state, integrand = user_spec.keyed(fun), y0, None
    if quadrature is not None:
        check_callable(quadrature, "quadrature")
        right_hand_side, state, integrand = with_integral(right_hand_side, quadrature, user_spec, times, y0, args)
    spec = StateSpec.of(state, batched)
    watched = seen_at_ends(event_list(events), times)
    given = Given(right_hand_side, _pieces(fun), spec, (state,), args, (times.anchors[0], times.anchors[-1]), watched, quadrature)
    spec = (given := given.laid_out(chosen, bool(compile), (mass, norm, *implicit_options.values()), mass is not None)).spec
    native = NativeSolve(own_algebra(implicit_options) if implicit_options else None, compile == "background")
    system, y_flat = _system(given, native, chosen, bool(compile) and mass is None, mass is not None), given.state()
    inputs = stand_ins(system.inputs)
    derivatives = needs_derivatives([times.anchors, y_flat, *inputs, *([] if times.samples is None else [times.samples])])
    recorded = chosen.implicit or chosen.multistep
    # the slopes of implicit stages are recorded, and what multistep methods went by: derivatives are taken at them
    differentiated = derivatives and recorded and (moving or not chosen.spares_stages)
    # what is made of the steps when they are all taken
    afterwards = times.steps or dense_output or bool(watched)
    kept = {
        "keep_states": derivatives or afterwards,
        "keep_stages": dense_output or differentiated or (bool(watched) and (batched or vmap_active() or recorded)),
        "results_of_steps": afterwards,
    }
    plan = given.plan(system, chosen, user_spec, integrand is not None, arguments, compile_key(fun) if compile else None, **kept)
    backward, failing, implicit_system = BackwardStats(), raise_failure, system
    if mass is not None:
        y_flat, implicit_system = consistent_start(
            system, times, y_flat, user_spec, tolerances={"rtol": plan.rtol, "atol": plan.atol}, throw=throw
        )
        failing = dae_failure
    algebra = stage_algebra(system, inputs, spec, **implicit_options, exact=chosen.needs_time_slope, mass=mass) if chosen.implicit else None
    ways = {"algebra": algebra, "derivatives": derivatives, "native": native, "idle": times.readable_idle}
    problem = Problem(system, plan, batched, reporting(plan, failing if throw else None, implicit_system, inputs), backward.add, **ways)
    strategy = strategy_of(gradient)
    refuse_altered(problem, strategy, times.anchors[0], y_flat, inputs)
    if chosen.switching:
        out, problem = solve_switching(strategy, problem, times.anchors, times.samples, y_flat, inputs, dense_output or bool(watched))
    else:
        out = strategy.solve(problem, times.anchors, times.samples, y_flat, inputs)
    if known is not None and step_ts is None:
        # with knots of tables there is more to a call than numbers
        known.remember(problem, [x for x in leaves_of(args) if isinstance(x, Tensor)], integrand)
    if chosen.needs_time_slope:
        warn_of_lost_time(problem, inputs, (times.anchors[0], out.t_final), (y_flat, out.final), out.n_steps)
    parts = Parts(out, problem, times, user_spec, spec, integrand, y_flat, watched, args, backward, derivatives, dense_output)
    return solution_of(*finished(parts))


def _system(given: Given, native: NativeSolve, method: Method, compiled: bool, has_mass: bool) -> System:
    """The flat system. Where nobody takes derivatives, nobody asks what ``fun`` captured."""
    last = sum(isinstance(x, Tensor) for x in leaves_of(given.args)) - 1 if has_mass else None
    if not (torch.is_grad_enabled() or transforming()):
        return given.system(mass=last)
    used, _ = given.looked_into(native, method, compiled)
    return given.system(used, parameter_names=_parameter_names(given.fun, used.tensors), mass=last)


def _pieces(fun: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
    """The functions of the user that a right-hand side is made of."""
    return (fun.explicit, fun.implicit) if isinstance(fun, SplitFunction) else (fun,)


def _parameter_names(fun: Callable[..., Any], captured: Sequence[Tensor]) -> tuple[str, ...] | None:
    """The names of the captured tensors, if fun is a module and they are all its parameters."""
    if not isinstance(fun, torch.nn.Module):
        return None
    names = {id(p): name for name, p in fun.named_parameters()}
    return tuple(names[id(x)] for x in captured) if all(id(x) in names for x in captured) else None


def _check(fun: Any, method: Method, implicit: Iterable[str], arguments: dict[str, Any]) -> None:
    """Raise for arguments that do not go with the method; ``implicit``: what was given for implicit ones."""
    for name in implicit:
        if not method.implicit:
            raise UnsupportedCombination(f"{name}= is for implicit methods; {method.name!r} solves no linear systems")
    if not method.adaptive and arguments["first_step"] is None:
        raise InvalidInput(
            f"{method.name!r} takes constant steps: give their size as first_step=, or choose an adaptive method such as 'tsit5'"
        )
    counted(arguments["max_steps"], "max_steps")
    check_controller(method, arguments["controller"])
    if not callable(fun):
        given = "SplitFunction(explicit, implicit) instead of a tuple" if isinstance(fun, (tuple, list)) else "a function"
        raise InvalidInput(f"fun must be callable, got a {type(fun).__name__}: give {given}")
    if method.additive and not isinstance(fun, SplitFunction):
        raise InvalidInput(
            f"method={method.name!r} treats one part of the right-hand side explicitly and the other one implicitly: give "
            "fun=adjoint.SplitFunction(explicit, implicit), or choose a method for a fun in one piece, such as 'kvaerno5'"
        )
