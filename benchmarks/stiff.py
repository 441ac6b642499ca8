"""Stiff ensembles: forward and forward + gradient against diffrax and SciPy. ``python -m benchmarks.stiff --help``.

Robertson's kinetics, T = 100, parameters spread by 10 %, gradient of the squared norm of all final states in all parameters. Every
solver runs at the same tolerances; errors are against SciPy's Radau at rtol 1e-12 (values) and central differences of it
(gradients), on the first trajectories.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

END, CHECKED = 100.0, 3
Y0 = np.array([1.0, 0.0, 0.0])


def parameters(count: int) -> np.ndarray:
    """``(count, 3)``; the first are the standard ones."""
    spread = 1 + 0.1 * np.clip(np.random.default_rng(0).standard_normal((count, 3)), -3, 3)
    spread[0] = 1.0
    return np.array([0.04, 1e4, 3e7]) * spread


def rate(stack: Any, y: Any, p: Any) -> Any:
    """Robertson, last axis: components."""
    a, b, c = y[..., 0], y[..., 1], y[..., 2]
    first, second, third = p[..., 0] * a, p[..., 1] * b * c, p[..., 2] * b * b
    return stack([second - first, first - second - third, third], -1)


def reference(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Final states and gradients of the first trajectories."""
    from scipy.integrate import solve_ivp

    def end(p: np.ndarray) -> np.ndarray:
        f = lambda t, y: rate(lambda xs, axis: np.stack(xs, axis), y, p)  # noqa: E731
        return solve_ivp(f, (0, END), Y0, method="Radau", rtol=1e-12, atol=1e-16).y[:, -1]

    states, slopes = [], []
    for p in parameters(count)[:CHECKED]:
        states.append(end(p))
        row = []
        for j in range(3):
            step = np.zeros(3)
            step[j] = 1e-4 * p[j]
            row.append(((end(p + step) ** 2).sum() - (end(p - step) ** 2).sum()) / (2 * step[j]))
        slopes.append(row)
    return np.array(states), np.array(slopes)


def ours(method: str, count: int, rtol: float, atol: float) -> dict[str, Callable[[], Any]]:
    """`adjoint.solve_ivp`, eager, batched."""
    import torch

    from adjoint import solve_ivp

    p = torch.tensor(parameters(count))
    y0 = torch.tensor(Y0).expand(count, 3).contiguous()
    f = lambda t, y, p: rate(torch.stack, y, p)  # noqa: E731

    def forward() -> Any:
        with torch.no_grad():
            sol = solve_ivp(f, (0.0, END), y0, args=(p,), method=method, rtol=rtol, atol=atol, batched=True)
        return sol.y[-1].numpy(), float(sol.stats.n_steps.double().mean())

    def gradient() -> Any:
        q = p.clone().requires_grad_()
        y = solve_ivp(f, (0.0, END), y0, args=(q,), method=method, rtol=rtol, atol=atol, batched=True).y[-1]
        return torch.autograd.grad(y.square().sum(), q)[0].numpy()

    return {"forward": forward, "gradient": gradient}


def diffrax_kvaerno5(count: int, rtol: float, atol: float) -> dict[str, Callable[[], Any]]:
    """Jitted and vmapped, with its default adjoint (recursive checkpoints)."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import diffrax
    import jax.numpy as jnp

    p = jnp.asarray(parameters(count))
    term = diffrax.ODETerm(lambda t, y, q: rate(lambda xs, axis: jnp.stack(xs, axis), y, q))
    control = diffrax.PIDController(rtol=rtol, atol=atol)

    def one(q: Any) -> Any:
        sol = diffrax.diffeqsolve(
            term, diffrax.Kvaerno5(), 0.0, END, None, jnp.asarray(Y0), args=q, stepsize_controller=control, max_steps=4096
        )
        return sol.ys[-1], sol.stats["num_steps"]

    solve = jax.jit(jax.vmap(one))
    slope = jax.jit(jax.grad(lambda q: (jax.vmap(one)(q)[0] ** 2).sum()))

    def forward() -> Any:
        y, steps = jax.block_until_ready(solve(p))
        return np.asarray(y), float(steps.mean())

    return {"forward": forward, "gradient": lambda: np.asarray(jax.block_until_ready(slope(p)))}


def scipy_one_by_one(method: str, count: int, rtol: float, atol: float) -> dict[str, Callable[[], Any]]:
    """Forward only, a loop over the trajectories."""
    from scipy.integrate import solve_ivp

    p = parameters(count)

    def forward() -> Any:
        out = [
            solve_ivp(lambda t, y, q=q: rate(lambda xs, axis: np.stack(xs, axis), y, q), (0, END), Y0, method=method, rtol=rtol, atol=atol)
            for q in p
        ]
        return np.array([s.y[:, -1] for s in out]), float(np.mean([s.t.size - 1 for s in out]))

    return {"forward": forward}


def measure(call: Callable[[], Any], repeats: int, budget: float) -> tuple[float, float, Any]:
    """First call and median of the others in seconds, and the result."""
    start = time.perf_counter()
    out = call()
    first = time.perf_counter() - start
    samples = []
    while len(samples) < repeats and (not samples or sum(samples) < budget):
        start = time.perf_counter()
        out = call()
        samples.append(time.perf_counter() - start)
    return first, statistics.median(samples), out


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, nargs="*", default=[1, 100, 10_000])
    parser.add_argument("--rtol", type=float, default=1e-6)
    parser.add_argument("--atol", type=float, default=1e-10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for the repeats of one timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(options.threads)
    if options.threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import torch

    torch.set_num_threads(options.threads)
    truth, slopes = reference(max(options.count))
    rows: list[dict[str, Any]] = []
    for count in options.count:
        solvers: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
            f"ours {m}": (lambda m=m: ours(m, count, options.rtol, options.atol))  # noqa: B023
            for m in ("kvaerno5", "rodas5p", "kvaerno3")
        }
        solvers["diffrax Kvaerno5"] = lambda: diffrax_kvaerno5(count, options.rtol, options.atol)  # noqa: B023
        if count <= 100:
            solvers["SciPy Radau"] = lambda: scipy_one_by_one("Radau", count, options.rtol, options.atol)  # noqa: B023
            solvers["SciPy BDF"] = lambda: scipy_one_by_one("BDF", count, options.rtol, options.atol)  # noqa: B023
        for name, make in solvers.items():
            row: dict[str, Any] = {"count": count, "solver": name}
            try:
                calls = make()
                seen = min(count, CHECKED)
                first, median, (y, steps) = measure(calls["forward"], options.repeats, options.budget)
                error = float((abs(y[:seen] - truth[:seen]) / abs(truth[:seen])).max())
                row.update(forward_ms=1e3 * median, first_s=first, steps=steps, error=error)
                if "gradient" in calls:
                    first, median, g = measure(calls["gradient"], options.repeats, options.budget)
                    off = np.linalg.norm((g[:seen] - slopes[:seen]) * parameters(count)[:seen])
                    off /= np.linalg.norm(slopes[:seen] * parameters(count)[:seen])
                    row.update(gradient_ms=1e3 * median, first_gradient_s=first, gradient_error=float(off))
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            print(json.dumps(row), flush=True)
    results = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "torch": torch.__version__,
        "rtol": options.rtol,
        "atol": options.atol,
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{results['date']}-stiff"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1))
    stem.with_suffix(".md").write_text(report(results))
    print(f"written: {stem}.md")


def report(results: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"# Stiff ensembles, {results['date']}",
        "",
        f"Robertson, T = {END:g}, rtol {results['rtol']:g}, atol {results['atol']:g}; {results['machine']}, {results['threads']} "
        f"thread(s), torch {results['torch']}. Medians; errors relative, of the states (largest component) and of the gradient in the "
        "logarithms of the parameters (norm), against SciPy's Radau at 1e-12.",
        "",
        "| trajectories | solver | forward (ms) | forward + gradient (ms) | steps | error | gradient error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        if "failed" in row:
            lines.append(f"| {row['count']} | {row['solver']} | failed: {row['failed']} | | | | |")
            continue
        gradient = f"{row['gradient_ms']:.1f}" if "gradient_ms" in row else "-"
        off = f"{row['gradient_error']:.1e}" if "gradient_error" in row else "-"
        lines.append(
            f"| {row['count']} | {row['solver']} | {row['forward_ms']:.1f} | {gradient} | {row['steps']:.0f} | {row['error']:.1e} | {off} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
