"""Solvers of stiff systems: each takes a problem, parameters ``(count, m)`` and a tolerance, and gives `Calls`.

The gradient is that of the sum of squares of all final states in all parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .frameworks import casadi_ops, jax_function, numpy_function, torch_function
from .precision import Calls
from .stiff_problems import OdeProblem

__all__ = ["casadi_cvodes", "diffrax_kvaerno5", "ours", "scipy_one_by_one", "sundae_cvode"]


def ours(problem: OdeProblem, p: np.ndarray, rtol: float, method: str, compile: bool = False) -> Calls:
    """`adjoint.solve_ivp`, eager or compiled, with its default gradient; ``batched=True`` for more than one trajectory."""
    import torch

    from adjoint import solve_ivp

    many = len(p) > 1
    pars = torch.tensor(p if many else p[0])
    y0 = torch.tensor(problem.y0)
    y0 = y0.expand(len(p), -1).contiguous() if many else y0
    settings: dict[str, Any] = {"method": method, "rtol": rtol, "atol": rtol * problem.small, "batched": many, "compile": compile}
    f = torch_function(problem.rate, problem.vector)

    def forward() -> tuple[np.ndarray, float]:
        with torch.no_grad():
            sol = solve_ivp(f, (0.0, problem.end), y0, args=(pars,), **settings)
        return np.atleast_2d(sol.y[-1].numpy()), float(torch.as_tensor(sol.stats.n_steps, dtype=torch.float64).mean())

    def gradient() -> np.ndarray:
        q = pars.clone().requires_grad_()
        y = solve_ivp(f, (0.0, problem.gradient_end), y0, args=(q,), **settings).y[-1]
        return np.atleast_2d(torch.autograd.grad(y.square().sum(), q)[0].numpy())

    return Calls(forward, gradient)


def diffrax_kvaerno5(problem: OdeProblem, p: np.ndarray, rtol: float) -> Calls:
    """Jitted and vmapped, with its default adjoint (recursive checkpoints)."""
    f = jax_function(problem.rate, problem.vector)
    import diffrax
    import jax
    import jax.numpy as jnp

    term = diffrax.ODETerm(f)
    control = diffrax.PIDController(rtol=rtol, atol=rtol * problem.small)
    start, pars = jnp.asarray(problem.y0), jnp.asarray(p)

    def one(q: Any, end: float) -> Any:
        sol = diffrax.diffeqsolve(term, diffrax.Kvaerno5(), 0.0, end, None, start, args=q, stepsize_controller=control, max_steps=16384)
        return sol.ys[-1], sol.stats["num_steps"]

    solve = jax.jit(jax.vmap(lambda q: one(q, problem.end)))
    slope = jax.jit(jax.grad(lambda q: (jax.vmap(lambda x: one(x, problem.gradient_end))(q)[0] ** 2).sum()))

    def forward() -> tuple[np.ndarray, float]:
        y, steps = jax.block_until_ready(solve(pars))
        return np.asarray(y), float(steps.mean())

    return Calls(forward, lambda: np.asarray(jax.block_until_ready(slope(pars))))


def scipy_one_by_one(problem: OdeProblem, p: np.ndarray, rtol: float, method: str, most: int) -> Calls:
    """Forward only, a loop over the first ``most`` trajectories. Jacobians by differences, as they are by default, of the known pattern."""
    from scipy.integrate import solve_ivp

    q = p[:most]
    settings: dict[str, Any] = {} if problem.sparsity is None else {"jac_sparsity": problem.sparsity}
    functions = [numpy_function(problem.rate, problem.vector, one) for one in q]

    def forward() -> tuple[np.ndarray, float]:
        out = [
            solve_ivp(f, (0, problem.end), problem.y0, method=method, rtol=rtol, atol=rtol * problem.small, **settings) for f in functions
        ]
        for sol in out:
            if not sol.success:
                raise RuntimeError(sol.message)
        return np.array([s.y[:, -1] for s in out]), float(np.mean([s.t.size - 1 for s in out]))

    return Calls(forward, share=len(q) / len(p))


def sundae_cvode(problem: OdeProblem, p: np.ndarray, rtol: float, most: int) -> Calls:
    """SUNDIALS' CVODE through scikit-sundae, the right-hand side in Python, forward only; the first ``most`` trajectories."""
    from sksundae.cvode import CVODE

    pars = p[:most]

    def solver(one: np.ndarray) -> Any:
        f = numpy_function(problem.rate, problem.vector, one)

        def into(t: float, y: np.ndarray, out: np.ndarray) -> None:
            out[:] = f(t, y)

        return CVODE(into, rtol=rtol, atol=rtol * problem.small, max_num_steps=10**6)

    solvers, span = [solver(one) for one in pars], np.array([0.0, problem.end])

    def forward() -> tuple[np.ndarray, float]:
        out = [s.solve(span, problem.y0) for s in solvers]
        for sol in out:
            if not sol.success:
                raise RuntimeError(sol.message)
        return np.array([s.y[-1] for s in out]), float(np.mean([len(s.t) - 1 for s in out]))

    return Calls(forward, share=len(pars) / len(p))


def casadi_cvodes(problem: OdeProblem, p: np.ndarray, rtol: float, most: int) -> Calls:
    """`casadi.integrator` with CVODES and its adjoint sensitivities, in CasADi's own virtual machine; the first ``most`` trajectories."""
    import casadi as ca

    n, m = problem.y0.size, p.shape[1]
    kind = ca.MX if problem.vector else ca.SX
    y, q, t = kind.sym("y", n), kind.sym("q", m), kind.sym("t")
    ops = casadi_ops()
    parts = (y, [q[i] for i in range(m)]) if problem.vector else ([y[i] for i in range(n)], [q[i] for i in range(m)])
    rate = problem.rate(ops, t, *parts)
    system = {"x": y, "p": q, "t": t, "ode": rate if problem.vector else ops.stack(rate)}
    settings = {"reltol": rtol, "abstol": rtol * problem.small, "max_num_steps": 10**6, "show_eval_warnings": False}
    solver = ca.integrator("solver", "cvodes", system, 0, problem.end, settings)
    looked_at = ca.integrator("looked_at", "cvodes", system, 0, problem.gradient_end, settings)
    symbol = ca.MX.sym("p", m)
    end = looked_at(x0=problem.y0, p=symbol)["xf"]
    slope = ca.Function("slope", [symbol], [ca.gradient(ca.sumsqr(end), symbol)])
    inner = next(f for f in slope.find_functions() if f.name().startswith("asens"))
    pars = p[:most]

    def forward() -> tuple[np.ndarray, float]:
        states, steps = [], []
        for one in pars:
            states.append(np.array(solver(x0=problem.y0, p=one)["xf"]).ravel())
            steps.append(solver.stats()["nsteps"])
        return np.array(states), float(np.mean(steps))

    def backward_steps() -> float:
        final = np.array(looked_at(x0=problem.y0, p=pars[0])["xf"]).ravel()
        inner(x0=problem.y0, p=pars[0], adj_xf=2 * final)
        return float(inner.stats()["nstepsB"])

    return Calls(forward, lambda: np.array([np.array(slope(one)).ravel() for one in pars]), backward_steps, len(pars) / len(p))
