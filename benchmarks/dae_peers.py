"""Solvers of differential-algebraic systems: each takes a problem, parameters ``(count, m)`` and a tolerance, and gives `Calls`.

The gradient is that of the sum of squares of the differential variables at the end: CasADi's adjoint of algebraic end values is wrong.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from .dae_problems import DaeProblem, residual
from .frameworks import casadi_ops, numpy_function, torch_function, torch_ops
from .precision import Calls

__all__ = ["casadi_idas", "ours", "scipy_dae", "sundials_ida", "torchdae_radau"]


def _start(problem: DaeProblem) -> np.ndarray:
    """A guess of the initial state, with the differential part right."""
    parts = problem.x0, problem.z0
    if problem.vector or problem.join is None:
        return np.concatenate(parts)
    return np.array(problem.join(None, *(x.tolist() for x in parts)))  # type: ignore[arg-type]


def _objective(problem: DaeProblem) -> Any:
    """For tensors with components on the last axis."""
    import torch

    ops = torch_ops()

    def objective(y: Any) -> Any:
        if problem.vector:
            return problem.state(ops, y).square().sum()
        return torch.stack(list(problem.state(ops, y.unbind(-1)))).square().sum()

    return objective


def ours(problem: DaeProblem, p: np.ndarray, rtol: float, method: str, compile: bool = False) -> Calls:
    """`adjoint.solve_dae`, eager or as native code, with its default gradient; ``batched=True`` for more than one trajectory."""
    import torch

    from adjoint import solve_dae

    many = len(p) > 1
    pars, y0 = torch.tensor(p if many else p[0]), torch.tensor(_start(problem))
    y0 = y0.expand(len(p), -1).contiguous() if many else y0
    settings: dict[str, Any] = {"method": method, "rtol": rtol, "atol": rtol * problem.small, "batched": many, "compile": compile}
    f, objective = torch_function(residual(problem), problem.vector), _objective(problem)
    backward = [0.0]

    def forward() -> tuple[np.ndarray, float]:
        with torch.no_grad():
            sol = solve_dae(f, (0.0, problem.end), y0, args=(pars,), **settings)
        return np.atleast_2d(sol.y[-1].numpy()), float(torch.as_tensor(sol.stats.n_steps, dtype=torch.float64).mean())

    def gradient() -> np.ndarray:
        q = pars.clone().requires_grad_()
        sol = solve_dae(f, (0.0, problem.end), y0, args=(q,), **settings)
        (g,) = torch.autograd.grad(objective(sol.y[-1]), q)
        backward[0] = float(torch.as_tensor(sol.stats.n_accepted, dtype=torch.float64).mean())
        return np.atleast_2d(g.numpy())

    return Calls(forward, gradient, lambda: backward[0])


def casadi_idas(problem: DaeProblem, p: np.ndarray, rtol: float, most: int, sensitivities: str) -> Calls:
    """`casadi.integrator` with IDAS on the semi-explicit form, in CasADi's own virtual machine; the first ``most`` trajectories.

    ``sensitivities``: "adjoint" or "forward". Initial algebraic values are solved for by IDAS from our guess.
    """
    import casadi as ca

    n, k, m = problem.x0.size, problem.z0.size, p.shape[1]
    kind = ca.MX if problem.vector else ca.SX
    x, z, q, t = kind.sym("x", n), kind.sym("z", k), kind.sym("q", m), kind.sym("t")
    ops = casadi_ops()
    q_parts = [q[i] for i in range(m)]
    if problem.vector:
        f, g = problem.semi(ops, t, x, z, q_parts)
    else:
        f, g = (ops.stack(v) for v in problem.semi(ops, t, [x[i] for i in range(n)], [z[i] for i in range(k)], q_parts))
    system = {"x": x, "z": z, "p": q, "t": t, "ode": f, "alg": g}
    settings = {"reltol": rtol, "abstol": rtol * problem.small, "max_num_steps": 10**6, "show_eval_warnings": False}
    solver = ca.integrator("solver", "idas", system, 0, problem.end, settings)
    symbol = ca.MX.sym("p", m)
    end = solver(x0=problem.x0, z0=problem.z0, p=symbol)["xf"]
    if sensitivities == "adjoint":
        slope = ca.Function("slope", [symbol], [ca.gradient(ca.sumsqr(end), symbol)])
    else:
        slope = ca.Function("slope", [symbol], [2 * ca.mtimes(ca.jtimes(end, symbol, ca.DM.eye(m)).T, end)])
    inner = next((f for f in slope.find_functions() if f.name().startswith("asens")), None)
    pars = p[:most]

    def forward() -> tuple[np.ndarray, float]:
        states, steps = [], []
        for one in pars:
            out = solver(x0=problem.x0, z0=problem.z0, p=one)
            parts = (np.array(out[name]).ravel() for name in ("xf", "zf"))
            states.append(np.concatenate(list(parts)) if problem.join is None else np.array(problem.join(None, *parts)))
            steps.append(solver.stats()["nsteps"])
        return np.array(states), float(np.mean(steps))

    def backward_steps() -> float:
        assert inner is not None
        final = np.array(solver(x0=problem.x0, z0=problem.z0, p=pars[0])["xf"]).ravel()
        inner(x0=problem.x0, z0=problem.z0, p=pars[0], adj_xf=2 * final)
        return float(inner.stats()["nstepsB"])

    def gradient() -> np.ndarray:
        return np.array([np.array(slope(one)).ravel() for one in pars])

    return Calls(forward, gradient, backward_steps if inner is not None else None, len(pars) / len(p))


def sundials_ida(problem: DaeProblem, p: np.ndarray, rtol: float, most: int, start: dict[str, np.ndarray]) -> Calls:
    """SUNDIALS' IDA through scikit-sundae, the residual in Python, forward only. ``start``: consistent "y0" and "yp0"."""
    from sksundae.ida import IDA

    pars = p[:most]
    settings: dict[str, Any] = {"rtol": rtol, "atol": rtol * problem.small, "max_num_steps": 10**6}
    if problem.algebraic:
        settings["algebraic_idx"] = list(problem.algebraic)

    def solver(one: np.ndarray) -> Any:
        f = numpy_function(residual(problem, 1), problem.vector, one)

        def into(t: float, y: np.ndarray, yp: np.ndarray, out: np.ndarray) -> None:
            out[:] = f(t, y, yp)

        return IDA(into, **settings)

    solvers, span = [solver(one) for one in pars], np.array([0.0, problem.end])

    def forward() -> tuple[np.ndarray, float]:
        out = [s.solve(span, start["y0"], start["yp0"]) for s in solvers]
        for sol in out:
            if not sol.success:
                raise RuntimeError(sol.message)
        return np.array([s.y[-1] for s in out]), float(np.mean([len(s.t) - 1 for s in out]))

    return Calls(forward, share=len(pars) / len(p))


def scipy_dae(problem: DaeProblem, p: np.ndarray, rtol: float, method: str, most: int, start: dict[str, np.ndarray]) -> Calls:
    """scipy-dae, the residual in Python, forward only."""
    from scipy_dae.integrate import solve_dae

    pars = p[:most]
    functions = [numpy_function(residual(problem, 1), problem.vector, one) for one in pars]

    def forward() -> tuple[np.ndarray, float]:
        out = [
            solve_dae(f, (0, problem.end), start["y0"], start["yp0"], method=method, rtol=rtol, atol=rtol * problem.small)
            for f in functions
        ]
        for sol in out:
            if not sol.success:
                raise RuntimeError(f"stopped at t = {sol.t[-1]:.3g}: {sol.message}")
        return np.array([s.y[:, -1] for s in out]), float(np.mean([s.t.size - 1 for s in out]))

    return Calls(forward, share=len(pars) / len(p))


def torchdae_radau(problem: DaeProblem, p: np.ndarray, rtol: float, start: dict[str, np.ndarray]) -> Calls:
    """torchdae's Radau IIA with its adjoint, one trajectory (its batches share parameters). Its steps are constant: ``25 rtol^(-1/5)``."""
    import torch
    from torchdae import solve_dae_adjoint, solve_radau_iia5

    f, objective = torch_function(residual(problem), problem.vector), _objective(problem)
    logging.getLogger("torchdae.util").setLevel(logging.ERROR)  # guesses of slopes of algebraic variables are not consistent
    steps = round(25 * rtol**-0.2)
    y0, h = torch.tensor(start["y0"])[None], problem.end / steps

    def time(t: Any) -> Any:
        return torch.as_tensor(t, dtype=y0.dtype)

    def forward() -> tuple[np.ndarray, float]:
        q = torch.tensor(p[0])
        with torch.no_grad():
            sol = solve_radau_iia5(lambda t, y, yp: f(time(t), y, yp, q), (0.0, problem.end), y0, h=h)
        return sol.ys[-1].numpy(), float(len(sol.ts) - 1)

    def gradient() -> np.ndarray:
        q = torch.tensor(p[0]).requires_grad_()
        ys = solve_dae_adjoint(lambda t, y, yp: f(time(t), y, yp, q), (0.0, problem.end), y0, h, [q], solve_radau_iia5)
        return torch.autograd.grad(objective(ys[-1]), q)[0].numpy()[None]

    return Calls(forward, gradient, lambda: float(steps))
