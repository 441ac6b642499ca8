"""``BacksolveAdjoint``: the strategy that keeps nothing but the outputs and solves the state backwards again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput, UnsupportedCombination
from ..integrate import Monitor, integrate, rms_norm
from ..methods import METHODS, Method
from ..system.capture import cut_apart
from ..system.system import System
from ..system.transforms import functorch_active, has_tangent
from .asked import Linearizer
from .backsolve import Backsolve, backsolve
from .node import SolveNode
from .problem import GradientTraits, Outputs, Problem
from .way_back import carried_step, check_way_back, check_way_back_numbers

__all__ = ["BacksolveAdjoint"]


@dataclass(frozen=True)
class BacksolveAdjoint(GradientTraits):
    """State, adjoint and the integral of ``l* f_p`` solved backwards together (Chen, Rubanova, Bettencourt & Duvenaud 2018).

    Memory: the outputs. The reversed state is unstable wherever the solution is stable: on stiff or strongly contracting problems it leaves
    the solution, which raises `BacksolveDiverged` on the way back. Use another strategy unless memory forbids. One trajectory; first
    derivatives by ``backward()``.

    Parameters
    ----------
    method : str or method object
        Of the way back; default that of the solve, or `dopri8` for `abm`. Explicit, adaptive, and of one step.
    rtol, atol : float
        Default those of the solve if they are numbers, else 1e-6 and 1e-9.
    max_steps : int
        Attempts between two losses.
    """

    method: str | Method | None = None
    rtol: float | None = None
    atol: float | None = None
    max_steps: int = 100_000

    def __post_init__(self) -> None:
        check_way_back_numbers(self.rtol, self.atol, self.max_steps)

    @property
    def takes_events(self) -> bool:
        """See `GradientTraits.takes_events`."""
        return False

    def solve(self, problem: Problem, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]) -> Outputs:
        """See `Gradient.solve`."""
        plan = problem.plan
        lean = replace(plan, keep_states=False, keep_stages=False)
        plain = replace(problem, plan=lean)
        if not plan.keep_states:
            return Outputs(*SolveNode.apply(problem, anchors, t_eval, y0, *inputs))
        if anchors.shape[0] > 2:
            raise UnsupportedCombination("step_ts= with BacksolveAdjoint is not supported: use gradient=DiscreteAdjoint()")
        method: Any = self._method(problem, y0.is_complex())
        if functorch_active() or any(x is not None and has_tangent(x) for x in (anchors, t_eval, y0, *inputs)):
            raise UnsupportedCombination(
                "torch.func transforms and forward mode cannot see through BacksolveAdjoint: use gradient=DiscreteAdjoint()"
            )
        problem.witness.wanted = True
        with torch.no_grad():
            out = Outputs(*SolveNode.apply(plain, anchors, t_eval, y0, *inputs))
        back = replace(
            lean,
            method=method,
            rtol=self.rtol if self.rtol is not None else plan.rtol if isinstance(plan.rtol, float) else 1e-6,
            atol=self.atol if self.atol is not None else plan.atol if isinstance(plan.atol, float) else 1e-9,
            norm=rms_norm,
            first_step=None,
            max_step=float("inf"),
            min_step=0.0,
            max_steps=self.max_steps,
            monitor=Monitor(),
        )
        return self._differentiable(problem, back, out, anchors, t_eval, y0, inputs)

    def _method(self, problem: Problem, is_complex: bool) -> Method:
        plan = problem.plan
        multistep = plan.method.multistep
        refused = {
            "batched=True": problem.batched,
            "method='auto'": plan.switch is not None,
            "events=": bool(plan.events),
            "compile=True": plan.compile is not None,
            "solve_dae": problem.system.residual is not None,
            "mass_matrix=": problem.system.mass is not None,
            "dense_output=True or t_eval='steps'": plan.results_of_steps,
        }
        # what `InterpolatingAdjoint` refuses too
        others = plan.switch is not None or plan.events or plan.compile is not None or problem.system.mass is not None or is_complex
        instead = "DiscreteAdjoint()" if others or not plan.method.adaptive else "InterpolatingAdjoint() or DiscreteAdjoint()"
        for name, present in refused.items():
            if present:
                raise UnsupportedCombination(f"{name} with BacksolveAdjoint is not supported: use {instead}")
        method: Any = self.method
        if isinstance(method, str):
            if method not in METHODS:
                raise InvalidInput(f"there is no method {method!r}; choose one of {', '.join(sorted(METHODS))}")
            method = METHODS[method]
        if method is None:
            method = METHODS["dopri8"] if multistep and not plan.method.implicit else plan.method
        if method.implicit or not method.adaptive or method.multistep:
            raise UnsupportedCombination(
                f"{method.name!r} on the way back of BacksolveAdjoint is not supported: give an explicit adaptive one-step method; on "
                f"stiff problems the state cannot be solved backwards at all: use {instead}"
            )
        return method

    def _differentiable(
        self, problem: Problem, plan: Any, out: Outputs, anchors: Tensor, t_eval: Tensor | None, y0: Tensor, inputs: Sequence[Tensor]
    ) -> Outputs:
        times, order, back = anchors[:, 0][[0, -1]], None, None
        states = torch.stack([y0.detach(), out.final])
        if t_eval is not None:
            sign = 1.0 if bool(anchors[-1] >= anchors[0]) else -1.0
            order = (t_eval[:, 0].detach() * sign).argsort()
            back = torch.empty_like(order).index_copy(0, order, torch.arange(len(order), device=order.device))
            times = torch.cat([times[:1], t_eval[:, 0][order], times[1:]])
            states = torch.cat([states[:1], out.samples[order], states[1:]])
        # the step to go on with from a time that the way back has come to; from its start there is none
        steps: dict[float, Tensor | None] = {}

        def backward(dynamics: Callable[..., Any], state: tuple[Tensor, ...], t: Tensor) -> Sequence[Tensor]:
            sizes, shapes = [x.numel() for x in state], [x.shape for x in state]
            kinds = [x.dtype for x in state]

            def flat(s: Tensor, z: Tensor) -> Tensor:
                return torch.cat([x.reshape(-1).to(z.dtype) for x in dynamics(s, pieces(z))]).reshape(1, -1)

            def pieces(z: Tensor) -> list[Tensor]:
                # of a complex state the rest is carried in complex numbers too, whose imaginary parts are zero
                parts = [p.reshape(shape) for p, shape in zip(z.reshape(-1).split(sizes), shapes, strict=True)]
                return [(p if k.is_complex or not p.is_complex() else p.real).to(k) for p, k in zip(parts, kinds, strict=True)]

            start = torch.cat([x.reshape(-1).to(y0.dtype) for x in state]).reshape(1, -1)
            if bool(t[0] == t[1]):
                return state
            going = replace(plan, first_step=steps.pop(float(t[0]), None))
            record = integrate(flat, going, t.reshape(2, 1), None, start, False)
            check_way_back(record, plan, problem)
            steps[float(t[1])] = carried_step(record, plan)
            return pieces(record.final)

        wants = [x.requires_grad for x in inputs]
        smooth = [i for i, want in enumerate(wants) if want]

        def apart() -> tuple[Any, list[Tensor], Any]:
            used = cut_apart(inputs, wants)
            f = problem.system.bind(used)
            watch = Linearizer(f, used, [False] * len(inputs), False)

            def see(slope: Tensor, t: Tensor, y: Tensor) -> None:
                watch.check_next = isinstance(problem.system, System)
                watch.check(slope, t, y)

            return f, [used[i] for i in smooth], see

        f, check, tolerances = problem.system.bind(inputs), problem.witness.check, (plan.rtol, plan.atol)
        config = Backsolve(f, lambda y, t: (None, states), backward, check=check, tolerances=tolerances, apart=apart)
        _, found = backsolve(config, y0, times, [inputs[i] for i in smooth])
        if t_eval is None:
            return out._replace(final=found[1])
        return out._replace(final=found[-1], samples=found[1:-1][back])
