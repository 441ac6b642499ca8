"""Continuous adjoints: the adjoint equation along the dense output of the solution, solved backwards under its own error control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..integrate import Monitor, Plan, rms_norm
from ..methods import DAE_METHODS, METHODS, Method
from ..system.capture import cut_apart
from .asked import Asked, Linearizer
from .discrete import eager_sweep
from .implicit_adjoint import ImplicitBack
from .node import SolveNode
from .ode_adjoint import OdeBack
from .padding import padding, shelter
from .problem import GradientTraits, Outputs, Problem
from .way_back import Trajectory, check_way_back_numbers, walk

__all__ = ["GaussAdjoint", "InterpolatingAdjoint", "QuadratureAdjoint", "method_back"]


def method_back(method: Method, residual: bool) -> Method:
    """The method by which an adjoint is integrated back if nobody names one; ``residual``: of implicit equations.

    Of implicit ones that whose dense output is as good in layers as elsewhere: with it the integral for the parameters is made.
    """
    if residual:
        return DAE_METHODS["radau"] if method.multistep else method
    if method.additive or (method.implicit and method.adaptive):
        return METHODS["radau5"]
    return METHODS["dopri8"] if method.multistep else method


@dataclass(frozen=True)
class _Continuous(GradientTraits):
    """Settings of the way back.

    method : str or method object; default that of the solve, or `radau5` for implicit and IMEX ones, `dopri8` for `abm`. For stiff problems
        an implicit one: the dense output of `radau5` is as good as its steps, that of `kvaerno5` is not in the layer behind a loss.
    rtol, atol : tolerances of the adjoint; default those of the solve if they are numbers, else 1e-6 and 1e-9. ``atol`` counts in units of
        the adjoint's largest entry where the solve back begins, so that of the solve, which has the units of the state, is a guess: it is
        raised to a hundredth of ``rtol`` and to what rounding leaves (1e-11 in double precision).
    max_steps : attempts between two losses; by implicit methods, with which many losses are followed back side by side, in all for each.
    """

    method: str | Method | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100_000
    _adaptive: ClassVar[bool] = False

    @property
    def takes_events(self) -> bool:
        """See `GradientTraits.takes_events`."""
        return False

    def __post_init__(self) -> None:
        check_way_back_numbers(self.rtol, self.atol, self.max_steps)
        if isinstance(self.method, str) and self.method not in METHODS and self.method not in DAE_METHODS:
            raise InvalidInput(f"there is no method {self.method!r}; choose one of {', '.join(sorted(METHODS))}")

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        plan = problem.plan
        if not plan.keep_states:
            return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))
        name = type(self).__name__
        if plan.switch is not None:
            raise UnsupportedCombination(f"method='auto' with {name} is not supported: use gradient=DiscreteAdjoint(), or name a method")
        if problem.system.mass is not None:
            raise UnsupportedCombination(
                f"mass_matrix= with {plan.method.name!r} and {name} is not supported: use gradient=DiscreteAdjoint(), or method='radau5'"
            )
        if plan.events:
            raise UnsupportedCombination(f"events= with {name} is not supported: use gradient=DiscreteAdjoint()")
        if anchors.shape[0] > 2:
            raise UnsupportedCombination(f"step_ts= with {name} is not supported: use gradient=DiscreteAdjoint()")
        if y0.is_complex():
            raise UnsupportedCombination(f"complex states with {name} are not supported: use gradient=DiscreteAdjoint()")
        back = self._plan(problem)
        mine = replace(problem, plan=replace(plan, keep_stages=True), sweep=partial(_sweep, back, self._adaptive))
        return Outputs(*SolveNode.apply(mine, anchors, t_eval, y0, *inputs))

    def _plan(self, problem: Problem) -> Plan:
        plan = problem.plan
        implicit = problem.system.residual is not None
        method: Any = self.method
        if method is None:
            method = method_back(plan.method, implicit)
        elif isinstance(method, str):
            table = DAE_METHODS if implicit else METHODS
            if method not in table:
                raise InvalidInput(f"{method!r} cannot solve this adjoint; choose one of {', '.join(sorted(table))}")
            method = table[method]
        if method.needs_time_slope:
            raise UnsupportedCombination(
                f"{method.name} asks for derivatives in time, which an interpolated solution does not give well: take 'radau5'"
            )
        if method.multistep:
            raise UnsupportedCombination(
                f"{method.name!r} cannot go back from loss to loss: take 'radau5' or 'kvaerno5' ('radau' for solve_dae), or 'dopri8' where "
                "nothing is stiff"
            )
        if method.additive:
            raise UnsupportedCombination(f"{method.name} is for right-hand sides in two parts, which the adjoint's is not: take 'radau5'")
        if not method.adaptive:
            raise InvalidInput(f"{method.name!r} has no error control: give {type(self).__name__} a method that has, such as 'tsit5'")
        rtol = self.rtol if self.rtol is not None else plan.rtol if isinstance(plan.rtol, float) else 1e-6
        atol = (
            self.atol
            if self.atol is not None
            else max(plan.atol if isinstance(plan.atol, float) else 1e-9, 1e-2 * rtol, 5e4 * torch.finfo(plan.real).eps)
        )
        return replace(
            plan,
            method=method,
            rtol=rtol,
            atol=atol,
            norm=rms_norm,
            first_step=None,
            max_step=float("inf"),
            min_step=0.0,
            max_steps=self.max_steps,
            keep_states=True,
            keep_stages=True,
            monitor=Monitor(),
            compile=None,
        )


@dataclass(frozen=True)
class InterpolatingAdjoint(_Continuous):
    """The continuous adjoint ``l' = -f_y* l`` along the dense output of the solution (Cao, Li, Petzold & Serban 2003).

    The integral of ``l* f_p`` is made by Gauss's formula, on steps of the way back that are cut where those of the solution end: few
    evaluations, however many parameters (Norcliffe & Deisenroth 2023), and layers of the solution within a long step of the adjoint are
    not passed over. By implicit methods samples are followed back side by side (in several goes where they are many, or the state is
    large): the equation is linear, and behind each of them what is fast has to be seen to die away. Its gradient converges to the true one
    with both tolerances, but is not that of the computed solution, as `DiscreteAdjoint`'s is. Implicit equations (`solve_dae`): the
    augmented adjoint system, with ``l`` at every loss by docs/theory.md, section 2. Derivatives of derivatives, ``torch.func`` transforms,
    and losses on ``sol(t)``, ``yp`` and ``t_eval="steps"`` go through the recorded steps, as with `DiscreteAdjoint`.
    """


@dataclass(frozen=True)
class GaussAdjoint(_Continuous):
    """`InterpolatingAdjoint` by the name that its integral has elsewhere."""


@dataclass(frozen=True)
class QuadratureAdjoint(_Continuous):
    """As `InterpolatingAdjoint`, with the integral of ``l* f_p`` by adaptive Gauss-Kronrod quadrature after the adjoint is known, to the
    tolerance of the way back (Kim, Ji, Deng, Ma & Rackauckas 2021)."""

    _adaptive: ClassVar[bool] = True


def _sweep(plan: Plan, adaptive: bool, asked: Asked) -> tuple[Tensor | None, ...]:
    """The way back."""
    problem, grid, anchors, t_eval, inputs, given, wants = asked
    if any(bar is not None and bool((bar != 0).any()) for bar in given[2:]):
        # a loss on sol(t), yp or the steps themselves; also what second derivatives ask of first ones
        return eager_sweep(asked)
    problem.witness.check()
    still = asked._replace(anchors=anchors.detach(), t_eval=None if t_eval is None else t_eval.detach())
    sign = torch.where(still.anchors[-1] >= still.anchors[0], 1.0, -1.0)
    safe = shelter(problem, grid, None, inputs)
    if safe.dead is not None:
        still = _without_failed(still, sign)
    problem, grid, anchors = safe.problem, still.grid, still.anchors
    inputs = cut_apart(safe.inputs, wants[3:])
    f: Callable[..., Tensor] = problem.system.bind(inputs)
    trajectory = Trajectory(problem.plan, grid, sign)
    linearize = Linearizer(f, inputs, wants[3:], False)
    back: Any
    if problem.system.residual is not None:
        back = ImplicitBack(problem, plan, f, trajectory, linearize, anchors[-1])
    else:
        back = OdeBack(problem, plan, f, trajectory, linearize, anchors[-1], adaptive)
    found = walk(back, still)
    if linearize.targets and all(bar is None for bar in linearize.bars):
        # a loss with a gradient of zero, or of the initial state alone, is not followed back: derivatives are zero, but of what is used
        return eager_sweep(asked)
    return safe.marked(found, given)


def _without_failed(asked: Asked, sign: Tensor) -> Asked:
    """Record, times and cotangents with trajectories that failed as if their span had ended at the last sample of which something is asked
    (behind it ``fun`` may be no number), and another one in the place of those that came nowhere. ``sign`` (B,): the direction of time."""
    _, grid, anchors, t_eval, _, (final_bar, samples_bar, *rest), _ = asked
    pad, dead = padding(grid), grid.status < 0
    if pad is None:
        return asked
    reached, known = anchors[0], grid.sample_step >= 0
    wanted = known
    if samples_bar is not None and t_eval is not None and len(t_eval):
        wanted = known & (~dead | (samples_bar != 0).any(-1))
        latest = torch.where(wanted, t_eval * sign, -torch.inf).argmax(0).unsqueeze(0)
        reached = torch.where(wanted.any(0), t_eval.gather(0, latest)[0], reached)
    states, t, h = (x.index_select(1, pad.source) for x in (grid.states, grid.t, grid.h))
    grid = replace(grid, states=states, t=t, h=h, stages=grid.stages.index_select(2, pad.source), status=grid.status.abs())
    anchors = anchors.index_select(1, pad.source)
    anchors = torch.cat([anchors[:-1], torch.where(dead, pad.first(reached), anchors[-1]).unsqueeze(0)])
    final_bar = None if final_bar is None else torch.where(dead.unsqueeze(-1), 0.0, final_bar)
    if samples_bar is not None and t_eval is not None:
        samples_bar = torch.where(known.unsqueeze(-1), samples_bar, 0.0)
        t_eval = torch.where(wanted & ~pad.unborn, t_eval, anchors[-1])
    return asked._replace(grid=grid, anchors=anchors, t_eval=t_eval, bars=(final_bar, samples_bar, *rest))
