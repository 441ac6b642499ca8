"""The calls that `benchmarks.against` times: one solve each, forward and with its gradient, uncompiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor

import adjoint

from . import dae_problems, steady, stiff_problems, workloads
from .frameworks import torch_function
from .peers.torch_common import TorchOps

__all__ = ["CASES", "Work"]


@dataclass(frozen=True)
class Work:
    """``solve(*params)`` gives what `value` makes a number of; ``rate``: the code whose calls are counted; ``steps`` of what was solved."""

    rate: CodeType
    forward: Callable[[], Any]
    gradient: Callable[[], Any]
    steps: Callable[[Any], float | None]


def _steps(sol: Any) -> float:
    return float(torch.as_tensor(sol.stats.n_steps, dtype=torch.float64).mean())


def _work(
    rate: Callable[..., Any],
    solve: Callable[..., Any],
    params: Sequence[Tensor],
    value: Callable[[Any], Tensor],
    steps: Callable[[Any], float | None] = _steps,
) -> Work:
    def forward() -> Any:
        with torch.no_grad():
            return solve(*params)

    def gradient() -> Any:
        return torch.autograd.grad(value(solve(*wanted)), wanted)

    wanted = [p.clone().requires_grad_() for p in params]
    return Work(rate.__code__, forward, gradient, steps)


def _peer(name: str, method: str = "dopri5", rows: int | None = None, door: str = "solve_ivp", **more: Any) -> Work:
    """A case of `workloads`; ``rows``: so many of its states, 0 for one without a batch; ``door``: or one of the drop-in's functions."""
    (case,) = (c for c in workloads.all_cases() if c.name == name)
    y0, t_eval, params = torch.tensor(case.y0), torch.tensor(case.t_eval), [torch.tensor(p) for p in case.params]
    target = None if case.target is None else torch.tensor(case.target)
    if rows is not None:
        y0, target = (None if x is None else x[..., :rows, :] if rows else x[..., 0, :] for x in (y0, target))
    fun = lambda t, y, *p: case.rhs(TorchOps, t, y, *p)  # noqa: E731
    given = {"method": method, "rtol": case.rtol, "atol": case.atol, **more}
    if door != "solve_ivp":
        module, odeint = _Module(case.rhs, params), getattr(adjoint, door)
        return _in_module(module, lambda: odeint(module, y0, t_eval, **given), lambda y: workloads.loss(y, target))
    span, batched = (float(t_eval[0]), float(t_eval[-1])), case.ensemble and case.size > 1
    solve = lambda *p: adjoint.solve_ivp(fun, span, y0, args=p, t_eval=t_eval, batched=batched, **given)  # noqa: E731
    return _work(case.rhs, solve, params, lambda sol: workloads.loss(sol.y, target))


class _Module(torch.nn.Module):
    def __init__(self, rhs: Callable[..., Any], params: Sequence[Tensor]) -> None:
        super().__init__()
        self.rhs, self.weights = rhs, torch.nn.ParameterList(params)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.rhs(TorchOps, t, y, *self.weights)


def _in_module(module: _Module, solve: Callable[[], Any], value: Callable[[Any], Tensor]) -> Work:
    wanted = list(module.parameters())

    def forward() -> Any:
        with torch.no_grad():
            return solve()

    return Work(module.rhs.__code__, forward, lambda: torch.autograd.grad(value(solve()), wanted), lambda _: None)


def _stiff(name: str, method: str, count: int = 1, rtol: float = 1e-6) -> Work:
    problem = stiff_problems.STIFF[name]
    p = torch.tensor(stiff_problems.spread(problem.p, count) if count > 1 else problem.p)
    y0 = torch.tensor(problem.y0)
    y0 = y0.expand(count, -1).contiguous() if count > 1 else y0
    given = {"method": method, "rtol": rtol, "atol": rtol * problem.small, "batched": count > 1}
    f = torch_function(problem.rate, problem.vector)
    solve = lambda p: adjoint.solve_ivp(f, (0.0, problem.gradient_end), y0, args=(p,), **given)  # noqa: E731
    return _work(problem.rate, solve, [p], lambda sol: sol.y[-1].square().sum())


def _dae(name: str, method: str, count: int = 1, rtol: float = 1e-6) -> Work:
    problem = dae_problems.DAE[name]
    p = torch.tensor(stiff_problems.spread(problem.p, count) if count > 1 else problem.p)
    y0 = torch.tensor([*problem.x0, *problem.z0])
    y0 = y0.expand(count, -1).contiguous() if count > 1 else y0
    given = {"method": method, "rtol": rtol, "atol": rtol * problem.small, "batched": count > 1}
    f = torch_function(dae_problems.residual(problem), problem.vector)
    solve = lambda p: adjoint.solve_dae(f, (0.0, problem.end), y0, args=(p,), **given)  # noqa: E731
    return _work(problem.semi, solve, [p], lambda sol: sol.y[-1, ..., : problem.x0.size].square().sum())


def _root(n: int) -> Work:
    _, F, p = steady.problem(n)
    x0 = torch.zeros(n * n, dtype=torch.float64)
    return _work(F, lambda p: adjoint.solve_root(F, x0, args=(p,)), [p], lambda sol: sol.x.square().sum(), lambda _: None)


def _second_order(n: int) -> Work:
    """The steady state from nothing, and gradient and Hessian at one that is known."""
    methods = steady.Methods(n)

    def f1() -> Any:
        methods.forget()
        return methods.f1()

    def state() -> Any:
        methods.objective.clear()
        return methods.objective.value(methods.p)

    return Work(methods.F.__code__, state, f1, lambda _: None)


CASES: dict[str, Callable[[], Work]] = {
    "MLP 2-50-2, one state": partial(_peer, "mlp-small", rows=0),
    "MLP 2-50-2, mini-batch of 8": partial(_peer, "mlp-small", rows=8),
    "MLP 2-50-2, mini-batch of 128": partial(_peer, "mlp-small"),
    "MLP 64-128-128-64, mini-batch of 128": partial(_peer, "mlp-large"),
    "the same, odeint": partial(_peer, "mlp-large", door="odeint"),
    "MLP 2-50-2 of 128, odeint": partial(_peer, "mlp-small", door="odeint"),
    "MLP 2-50-2 of 128, odeint_adjoint": partial(_peer, "mlp-small", door="odeint_adjoint"),
    "Lotka-Volterra x1, dopri5": partial(_peer, "lotka-1-end"),
    "Lotka-Volterra x1, tsit5": partial(_peer, "lotka-1-end", "tsit5"),
    "Lotka-Volterra x1, tsit5, 20 samples": partial(_peer, "lotka-1-20saves", "tsit5"),
    "Lotka-Volterra x100, dopri5": partial(_peer, "lotka-100-end"),
    "Lotka-Volterra x100, tsit5": partial(_peer, "lotka-100-end", "tsit5"),
    "Lotka-Volterra x100, tsit5, 20 samples": partial(_peer, "lotka-100-20saves", "tsit5"),
    "Lotka-Volterra x10000, dopri5": partial(_peer, "lotka-10000-end"),
    "Lotka-Volterra x10000, tsit5": partial(_peer, "lotka-10000-end", "tsit5"),
    "Van der Pol, mild, x100, dopri5, 20 samples": partial(_peer, "vdp-100-20saves"),
    "Robertson, kvaerno5": partial(_stiff, "robertson", "kvaerno5"),
    "Robertson, rodas5p": partial(_stiff, "robertson", "rodas5p"),
    "Robertson, radau5": partial(_stiff, "robertson", "radau5"),
    "Robertson, bdf": partial(_stiff, "robertson", "bdf"),
    "Robertson x100, kvaerno5": partial(_stiff, "robertson", "kvaerno5", 100),
    "Robertson x100, rodas5p": partial(_stiff, "robertson", "rodas5p", 100),
    "Robertson x100, bdf": partial(_stiff, "robertson", "bdf", 100),
    "Van der Pol, stiff, radau5": partial(_stiff, "vdpol", "radau5"),
    "HIRES, rodas5p": partial(_stiff, "hires", "rodas5p"),
    "Robertson DAE, radau": partial(_dae, "robertson", "radau"),
    "Robertson DAE x100, radau": partial(_dae, "robertson", "radau", 100),
    "Robertson DAE, bdf": partial(_dae, "robertson", "bdf"),
    "Akzo Nobel DAE, radau": partial(_dae, "akzo", "radau"),
    "solve_root, 256 unknowns": partial(_root, 16),
    "SteadyStateObjective, 1024 unknowns: value; gradient and Hessian": partial(_second_order, 32),
}
