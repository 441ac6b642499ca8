"""``python -m benchmarks.second_order``: gradients, Hessian-vector products and whole Hessians of one solve, beside diffrax.

One trajectory of Lotka-Volterra (dopri5, four parameters) and Robertson's reactions (kvaerno5, three), each in one process that holds
all runners, which take turns; medians of the times of the process, one thread. Both libraries take the product forward over reverse,
``jvp(grad)``, and here reverse over reverse too; diffrax by its `DirectAdjoint`, which alone is differentiated forward, all of it compiled
by ``jax.jit``. Values are compared with each other. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import adjoint

__all__ = ["CASES", "main"]


@dataclass(frozen=True)
class _Case:
    """Equations, of which ``stack`` and ``y`` are those of either library."""

    name: str
    rates: Callable[[Any, Any, Any], Any]
    y0: tuple[float, ...]
    p: tuple[float, ...]
    end: float
    rtol: float
    atol: float
    method: str
    solver: str


def _prey(stack: Any, y: Any, p: Any) -> Any:
    return stack([p[0] * y[0] - p[1] * y[0] * y[1], -p[2] * y[1] + p[3] * y[0] * y[1]])


def _robertson(stack: Any, y: Any, p: Any) -> Any:
    slow, fast, back = p[0] * y[0], 1e7 * p[1] * y[1] * y[1], 1e4 * p[2] * y[1] * y[2]
    return stack([back - slow, slow - back - fast, fast])


CASES = (
    _Case("Lotka-Volterra", _prey, (10.0, 5.0), (1.5, 0.1, 0.8, 0.05), 10.0, 1e-6, 1e-8, "dopri5", "Dopri5"),
    _Case("Robertson", _robertson, (1.0, 0.0, 0.0), (0.04, 3.0, 1.0), 100.0, 1e-6, 1e-10, "kvaerno5", "Kvaerno5"),
)


def _ours(case: _Case, compile: bool) -> dict[str, Callable[[], Any]]:
    y0, p = (torch.tensor(x, dtype=torch.float64) for x in (case.y0, case.p))
    along = torch.linspace(1.0, 2.0, len(p), dtype=p.dtype) * p

    def fun(t: Any, y: Any, p: Any) -> Any:
        return case.rates(torch.stack, y, p)

    def loss(p: Any) -> Any:
        options = {"method": case.method, "rtol": case.rtol, "atol": case.atol, "compile": compile}
        return adjoint.solve_ivp(fun, (0.0, case.end), y0, args=(p,), **options).y[-1].square().sum()

    def recorded() -> Any:
        q = p.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(q), q, create_graph=True)
        return torch.autograd.grad(gradient, q, along)[0]

    gradient = torch.func.grad(loss)

    def first() -> Any:
        q = p.clone().requires_grad_()
        return torch.autograd.grad(loss(q), q)[0]

    return {
        "gradient": first,
        "product, reverse over reverse": recorded,
        "product, forward over reverse": lambda: torch.func.jvp(gradient, (p,), (along,))[1],
        "Hessian": lambda: torch.func.hessian(loss)(p),
    }


def _diffrax(case: _Case) -> dict[str, Callable[[], Any]]:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    y0, p = jnp.asarray(case.y0), jnp.asarray(case.p)
    along = jnp.linspace(1.0, 2.0, len(case.p)) * p

    def loss(kind: Any, p: Any) -> Any:
        term = diffrax.ODETerm(lambda t, y, p: case.rates(jnp.stack, y, p))
        solver = getattr(diffrax, case.solver)()
        control = diffrax.PIDController(rtol=case.rtol, atol=case.atol)
        sol = diffrax.diffeqsolve(term, solver, 0.0, case.end, None, y0, p, stepsize_controller=control, adjoint=kind, max_steps=1024)
        return jnp.sum(sol.ys[-1] ** 2)

    def run(program: Any, *given: Any) -> Callable[[], Any]:
        compiled = jax.jit(program).lower(*given).compile()
        return lambda: np.asarray(jax.block_until_ready(compiled(*given)))

    direct = jax.grad(lambda p: loss(diffrax.DirectAdjoint(), p))
    return {
        "gradient": run(jax.grad(lambda p: loss(diffrax.RecursiveCheckpointAdjoint(), p)), p),
        "product, forward over reverse": run(lambda p, v: jax.jvp(direct, (p,), (v,))[1], p, along),
        "Hessian": run(jax.jacfwd(direct), p),
    }


def _median(call: Callable[[], Any], repeats: int, budget: float) -> float:
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() - began < budget):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def main() -> None:
    """Print a table for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_order", description="Second derivatives beside diffrax.")
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each entry at most")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for case in CASES:
        runners = {"compiled": _ours(case, True), "eager": _ours(case, False), "diffrax": _diffrax(case)}
        first = {name: {what: call() for what, call in calls.items()} for name, calls in runners.items()}
        columns = ["ms", *runners, "compiled over diffrax", "difference"]
        print(f"\n### {case.name}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
        for what in runners["compiled"]:
            found = {name: _median(calls[what], options.repeats, options.budget) for name, calls in runners.items() if what in calls}
            known = np.asarray(first["diffrax"].get(what, first["eager"][what]))
            off = np.abs(np.asarray(first["compiled"][what]) - known).max() / np.abs(known).max()
            ratio = f"{found['compiled'] / found['diffrax']:.2f}" if "diffrax" in found else "-"
            cells = " | ".join(f"{found[name]:.3g}" if name in found else "-" for name in runners)
            print(f"| {what} | {cells} | {ratio} | {off:.0e} |", flush=True)


if __name__ == "__main__":
    main()
