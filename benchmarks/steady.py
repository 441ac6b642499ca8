"""Gradient and Hessian of a steady-state objective: F-1 against the other ways. ``python -m benchmarks.steady --help``.

The problem is reaction, advection and diffusion on the unit square, n x n interior points, six parameters. All start from the same known
steady state. Every Hessian is compared with that of F-1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def _threads(count: int) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    flags = f"--xla_cpu_multi_thread_eigen={'true' if count > 1 else 'false'} intra_op_parallelism_threads={count}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


P0 = [math.log(0.05), 0.5, -0.3, math.log(2.0), math.log(0.3), math.log(20.0)]


def problem(n: int, extra: int = 0) -> tuple[Any, Any, Any]:
    """``f``, ``F`` and ``p``; with ``extra`` further parameters that shape the source (for the cost against m)."""
    import torch

    h = 1 / (n + 1)
    axis = torch.arange(1, n + 1, dtype=torch.float64) * h
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    bump = torch.exp(-((x - 0.35).square() + (y - 0.6).square()) / 0.02)
    target = torch.sin(torch.pi * x) * torch.sin(torch.pi * y) / 2
    modes = torch.stack([torch.cos(k * x) * torch.sin((k + 1) * y) for k in range(1, extra + 1)]) if extra else None
    p0 = torch.tensor(P0, dtype=torch.float64)

    def F(u: Any, p: Any) -> Any:
        D, vx, vy, k, K, a = p[0].exp(), p[1], p[2], p[3].exp(), p[4].exp(), p[5].exp()
        u = u.reshape(n, n)
        w = torch.nn.functional.pad(u, (1, 1, 1, 1))
        west, east, south, north = w[1:-1, :-2], w[1:-1, 2:], w[:-2, 1:-1], w[2:, 1:-1]
        lap = (west + east + south + north - 4 * u) / h**2
        drift = vx * (east - west) / (2 * h) + vy * (north - south) / (2 * h)
        source = a * bump
        if modes is not None:
            source = source + torch.einsum("k,kij->ij", 0.01 * p[6:], modes)
        return (D * lap - drift + source - k * u.square() / (K + u)).reshape(-1)

    def f(u: Any, p: Any) -> Any:
        return (u.reshape(n, n) - target).square().mean() / 2 + 0.5e-3 * (p[:6] - p0).square().sum() + 0.5e-3 * p[6:].square().sum()

    p = p0 + 0.05 * torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    return f, F, torch.cat([p, torch.zeros(extra, dtype=torch.float64)])


def median_ms(call: Callable[[], Any], repeats: int, prepare: Callable[[], Any] = lambda: None) -> float:
    """Median of ``repeats`` timed calls, each after an untimed ``prepare``."""
    samples = []
    for _ in range(repeats):
        prepare()
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e3 * statistics.median(samples)


class Methods:
    """Every way to a gradient and a Hessian, from a known steady state."""

    def __init__(self, n: int) -> None:
        import torch

        from adjoint import SteadyStateObjective

        self.n, self.torch = n, torch
        self.f, self.F, self.p = problem(n)
        self.objective = SteadyStateObjective(self.f, self.F, torch.zeros(n * n, dtype=torch.float64))
        self.state = self.objective.state(self.p)

    def forget(self) -> None:
        """Derivatives and factors at the point, not the state."""
        point = self.objective._at(self.p)
        point.expansion._kept.clear()
        point.forget_factors()

    def f1(self) -> Any:
        return self.objective.gradient(self.p), self.objective.hessian(self.p)

    def differences(self) -> Any:
        """Central differences of adjoint gradients: 2 m steady states, warm-started."""
        torch, obj, p = self.torch, self.objective, self.p
        rows = []
        g = obj.gradient(p)
        for j in range(p.numel()):
            step = torch.zeros_like(p)
            step[j] = 1e-4
            rows.append((obj.gradient(p + step) - obj.gradient(p - step)) / 2e-4)
        return g, torch.stack(rows)

    def hyperdual(self) -> Any:
        """One evaluation of ``f`` and ``F`` for every pair of parameters, each with two infinitesimal parts (as F1Method.jl does)."""
        torch, obj, p, x = self.torch, self.objective, self.p, self.state
        S, lam = obj.state_jacobian(p), obj._at(p).expansion.adjoint()
        m = p.numel()
        H = torch.zeros(m, m, dtype=p.dtype)
        eye = torch.eye(m, dtype=p.dtype)

        def both(x: Any, p: Any) -> Any:
            return self.f(x, p) - torch.dot(lam, self.F(x, p))

        for j in range(m):
            for k in range(j, m):
                inner = lambda x, p, k=k: torch.func.jvp(both, (x, p), (S[:, k], eye[k]))[1]  # noqa: E731
                H[j, k] = H[k, j] = torch.func.jvp(inner, (x, p), (S[:, j], eye[j]))[1]
        return obj.gradient(p), H

    def through_the_solver(self) -> Any:
        """`torch.func.hessian` through five dense Newton iterations."""
        torch = self.torch

        def fh(p: Any) -> Any:
            x = torch.zeros(self.n**2, dtype=p.dtype)
            for _ in range(5):
                x = x - torch.linalg.solve(torch.func.jacrev(self.F)(x, p), self.F(x, p))
            return self.f(x, p)

        return torch.func.grad(fh)(self.p), torch.func.hessian(fh)(self.p)

    def nested_torch_func(self) -> Any:
        """`torch.func.hessian` of the objective's value: our implicit node under nested transforms."""
        return self.torch.func.grad(self.objective.value)(self.p), self.torch.func.hessian(self.objective.value)(self.p)

    def jax_implicit(self) -> Callable[[], Any]:
        """`jax.hessian` through optimistix' implicit root (dense), compiled."""
        import jax

        jax.config.update("jax_enable_x64", True)
        import jax.numpy as jnp
        import optimistix as optx

        n, h = self.n, 1 / (self.n + 1)
        axis = jnp.arange(1, n + 1) * h
        y, x = jnp.meshgrid(axis, axis, indexing="ij")
        bump = jnp.exp(-((x - 0.35) ** 2 + (y - 0.6) ** 2) / 0.02)
        target = jnp.sin(jnp.pi * x) * jnp.sin(jnp.pi * y) / 2
        p0 = jnp.array(P0)

        def F(u: Any, p: Any) -> Any:
            D, vx, vy, k, K, a = jnp.exp(p[0]), p[1], p[2], jnp.exp(p[3]), jnp.exp(p[4]), jnp.exp(p[5])
            u = u.reshape(n, n)
            w = jnp.pad(u, 1)
            west, east, south, north = w[1:-1, :-2], w[1:-1, 2:], w[:-2, 1:-1], w[2:, 1:-1]
            lap = (west + east + south + north - 4 * u) / h**2
            drift = vx * (east - west) / (2 * h) + vy * (north - south) / (2 * h)
            return (D * lap - drift + a * bump - k * u**2 / (K + u)).reshape(-1)

        start = jnp.asarray(self.state.numpy())

        def fh(p: Any) -> Any:
            root = optx.root_find(F, optx.Newton(rtol=1e-10, atol=1e-12), start, p).value
            return jnp.mean((root.reshape(n, n) - target) ** 2) / 2 + 0.5e-3 * jnp.sum((p - p0) ** 2)

        both = jax.jit(lambda p: (jax.grad(fh)(p), jax.hessian(fh)(p)))
        p = jnp.asarray(self.p.numpy())
        return lambda: jax.block_until_ready(both(p))

    def bare_scipy(self) -> Callable[[], Any]:
        """What no F-1 can do without: one compressed Jacobian, one SuperLU factorisation, m + 1 solves, and nothing else."""
        import scipy.sparse as sp
        import scipy.sparse.linalg as spla

        from adjoint.linalg.sparsity import detect_pattern
        from adjoint.system.jacobians_sparse import SparseJacobian

        torch, N = self.torch, self.n**2
        jacobian = SparseJacobian(detect_pattern(lambda x: self.F(x, self.p), self.state), differentiable=False)
        columns = np.random.default_rng(0).standard_normal((N, self.p.numel()))
        r = lambda x: self.F(x[0], self.p).unsqueeze(0)  # noqa: E731

        def call() -> Any:
            with torch.no_grad():
                matrix = jacobian(r, self.state.unsqueeze(0))
            csc = sp.csc_matrix((matrix.values[0].numpy(), matrix.indices.numpy()), shape=(N, N))
            lu = spla.splu(csc, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})
            return lu.solve(columns), lu.solve(columns[:, 0], trans="T")

        return call


def compare(n: int, repeats: int) -> list[dict[str, Any]]:
    """All methods that are feasible at this size."""
    import torch

    methods = Methods(n)
    _, H = methods.f1()
    rows = []

    def run(name: str, call: Callable[[], Any], prepare: Callable[[], Any] = lambda: None, repeats: int = repeats) -> None:
        prepare()
        start = time.perf_counter()
        out = call()
        first = time.perf_counter() - start
        ms = median_ms(call, max(3, min(repeats, int(30 / max(first, 1e-3)))), prepare)
        error = None
        if isinstance(out, tuple) and len(out) == 2 and name != "bare SciPy":
            got = out[1] if isinstance(out[1], torch.Tensor) else torch.tensor(np.asarray(out[1]))
            error = float((got - H).norm() / H.norm())
        rows.append({"n": n, "method": name, "ms": ms, "hessian_difference": error})
        print(f"  n = {n:4d}  {name:28s} {ms:10.2f} ms" + ("" if error is None else f"   Hessian differs by {error:.1e}"), flush=True)

    run("F-1", methods.f1, methods.forget)
    stats = methods.objective.stats
    methods.forget()
    before = (stats.n_factorizations, stats.n_solves)
    methods.f1()
    counts = (stats.n_factorizations - before[0], stats.n_solves - before[1])
    rows[-1].update(factorizations=counts[0], solves=counts[1])
    print(f"             counted: {counts[0]} factorisation(s), {counts[1]} solves")
    run("bare SciPy", methods.bare_scipy())
    rows[-1]["share"] = shares(methods)
    run("hyperdual pairs", methods.hyperdual, methods.forget)
    run("nested torch.func", methods.nested_torch_func)
    if n <= 128:
        run("differences of gradients", methods.differences, methods.objective.clear)
        methods.objective.state(methods.p)
    if n <= 24:
        run("through the solver", methods.through_the_solver)
    if n <= 32:
        try:
            run("jax + optimistix implicit", methods.jax_implicit())
        except ImportError as error:
            print(f"  jax skipped: {error}")
    return rows


def shares(methods: Methods) -> dict[str, float]:
    """Where the time of F-1 goes: milliseconds for the Jacobian with its factorisation, the solves, and the derivatives of f and F."""
    stats = methods.objective.stats.log
    methods.forget()
    before = (stats.factor_seconds, stats.solve_seconds)
    start = time.perf_counter()
    methods.f1()
    total = time.perf_counter() - start
    factor, solve = stats.factor_seconds - before[0], stats.solve_seconds - before[1]
    share = {"total": 1e3 * total, "factorisation": 1e3 * factor, "solves": 1e3 * solve, "derivatives": 1e3 * (total - factor - solve)}
    print("             of it " + ", ".join(f"{k} {v:.1f} ms" for k, v in share.items()))
    return share


def many_parameters(n: int, repeats: int) -> list[dict[str, Any]]:
    """One product with the Hessian against the whole Hessian, as m grows."""
    import torch

    from adjoint import SteadyStateObjective

    rows = []
    for extra in (0, 10, 94, 994):
        f, F, p = problem(n, extra)
        obj = SteadyStateObjective(f, F, torch.zeros(n * n, dtype=torch.float64))
        obj.gradient(p)
        v = torch.randn_like(p)

        def forget(obj: Any = obj, p: Any = p) -> None:
            for name in ("S", "H", "L"):
                obj._at(p).expansion._kept.pop(name, None)

        product = median_ms(lambda: obj.hvp(p, v), repeats, forget)  # noqa: B023
        full = median_ms(lambda: obj.hessian(p), max(3, repeats // 3), forget)  # noqa: B023
        rows.append({"n": n, "m": p.numel(), "hvp_ms": product, "hessian_ms": full})
        print(f"  n = {n}  m = {p.numel():5d}   product {product:8.2f} ms   Hessian {full:10.2f} ms", flush=True)
    return rows


def million(side: int) -> dict[str, Any]:
    """A 2-D problem with side^2 unknowns, matrix-free: gradient and one product with the Hessian.

    GMRES on products with the Jacobian, preconditioned by the inverse of its diffusion part (fast sine transforms).
    """
    import resource

    import scipy.fft
    import torch

    from adjoint import SteadyStateObjective
    from adjoint.linalg import GMRES

    f, F, p = problem(side)
    h = 1 / (side + 1)
    wave = (2 - 2 * np.cos(np.pi * np.arange(1, side + 1) * h)) / h**2
    symbol = -float(p[0].exp()) * (wave[:, None] + wave)

    def diffusion_inverse(v: Any, transposed: bool) -> Any:
        grid = v.numpy().reshape(-1, side, side)
        out = scipy.fft.idstn(scipy.fft.dstn(grid, type=1, axes=(1, 2)) / symbol, type=1, axes=(1, 2))
        return torch.from_numpy(out.reshape(v.shape))

    solver = GMRES(rtol=1e-10, preconditioner=diffusion_inverse)
    obj = SteadyStateObjective(f, F, torch.zeros(side * side, dtype=torch.float64), linear_solver=solver, method="newton")
    times = {}
    for name, call in (
        ("state", lambda: obj.state(p)),
        ("gradient", lambda: obj.gradient(p)),
        ("hvp", lambda: obj.hvp(p, torch.ones_like(p))),
    ):
        start = time.perf_counter()
        call()
        times[name] = time.perf_counter() - start
        print(f"  {side * side} unknowns: {name} {times[name]:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"  peak memory of the process {peak:.1f} GiB")
    return {"unknowns": side * side, **times, "peak_gib": peak, "iterations": obj.stats.log.n_iterations}


def main() -> None:
    """Run what was asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, nargs="*", default=[16, 32, 64, 128, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--million", action="store_true", help="also 1000 x 1000 points")
    parser.add_argument("--side", type=int, default=1000, help="points along one side of that case")
    parser.add_argument("--many", action="store_true", help="also the cost against the number of parameters")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    _threads(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": options.threads,
        "torch": torch.__version__,
        "compare": [row for n in options.n for row in compare(n, options.repeats)],
    }
    if options.many:
        results["many_parameters"] = many_parameters(64, options.repeats)
    if options.million:
        results["million"] = million(options.side)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / f"{results['date']}-steady-states"
    stem.with_suffix(".json").write_text(json.dumps(results, indent=1))
    stem.with_suffix(".md").write_text(report(results))
    print(f"written: {stem}.md")


def report(results: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"# Steady states, {results['date']}",
        "",
        f"{results['machine']}, {results['threads']} thread(s), torch {results['torch']}. Gradient and Hessian (six parameters) of "
        "reaction, advection and diffusion on n x n points, from a known steady state; medians, milliseconds. `bare SciPy` is the floor of "
        "any method that factorises once: one compressed Jacobian, one SuperLU factorisation, m + 1 solves.",
        "",
    ]
    names = list(dict.fromkeys(row["method"] for row in results["compare"]))
    sizes = list(dict.fromkeys(row["n"] for row in results["compare"]))
    table = {(row["n"], row["method"]): row for row in results["compare"]}
    lines += ["| n | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for n in sizes:
        base = table[n, "F-1"]["ms"]
        cells = []
        for name in names:
            row = table.get((n, name))
            cells.append("-" if row is None else f"{row['ms']:.1f} ({row['ms'] / base:.2g}x)")
        lines.append(f"| {n} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "In brackets: time over that of F-1.",
        "",
        "| n | Jacobian + factorisation + solves + derivatives of F-1 (ms) |",
        "|---|---|",
    ]
    for n in sizes:
        s = table[n, "bare SciPy"]["share"]
        lines.append(
            f"| {n} | {s['factorisation']:.1f} factorisation, {s['solves']:.1f} solves, {s['derivatives']:.1f} Jacobian and derivatives |"
        )
    differ = [
        (row["n"], row["method"], row["hessian_difference"]) for row in results["compare"] if row.get("hessian_difference") is not None
    ]
    lines += ["", "Relative difference of the Hessian from that of F-1:", "", "| n | method | difference |", "|---|---|---|"]
    lines += [f"| {n} | {name} | {d:.1e} |" for n, name, d in differ if name != "F-1"]
    if "many_parameters" in results:
        lines += [
            "",
            "Cost against the number of parameters m (64 x 64 points):",
            "",
            "| m | Hessian product (ms) | Hessian (ms) |",
            "|---|---|---|",
        ]
        lines += [f"| {r['m']} | {r['hvp_ms']:.1f} | {r['hessian_ms']:.1f} |" for r in results["many_parameters"]]
    if "million" in results:
        r = results["million"]
        lines += [
            "",
            f"{r['unknowns']} unknowns, matrix-free, GMRES preconditioned by the inverse of the diffusion part: state {r['state']:.0f} s, "
            f"gradient {r['gradient']:.0f} s, one Hessian product {r['hvp']:.0f} s, {r['iterations']} iterations in all, "
            f"peak memory of the process {r['peak_gib']:.1f} GiB.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
