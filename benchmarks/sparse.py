"""``python -m benchmarks.sparse``: implicit solves of many unknowns, each of which depends on a few others, compiled and uncompiled.

A Brusselator on square grids around a torus, an arrow (all depend on one, and that on all), reactions of two species each, and velocities
held equal by forces (implicit equations of index 2, whose matrices have zeros on the diagonal). Compiled and uncompiled solves take turns;
times are those of the process, the least of all. Steps have to be the same, and values and gradients to agree.
"""

from __future__ import annotations

import argparse
import math
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import adjoint

from .report import write_paragraphs

RTOL = 1e-6
Problem = tuple[Callable[..., Tensor], Tensor, float]


def grid(m: int) -> Problem:
    """Diffusion as fast as on sixteen places."""

    def around(w: Tensor) -> Tensor:
        return w.roll(1, -1) + w.roll(-1, -1) + w.roll(1, -2) + w.roll(-1, -2) - 4 * w

    def fun(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        u, v = y.unflatten(-1, (2, m, m)).unbind(-3)
        d = 2 * p[..., None, None] * (m / 16) ** 2
        return torch.stack([1 + u * u * v - 4.4 * u + d * around(u), 3.4 * u - u * u * v + d * around(v)], -3).flatten(-3)

    x = 2 * math.pi * torch.arange(m, dtype=torch.float64) / m
    u, v = 1 + 0.5 * x.sin().unsqueeze(-1) * x.cos(), 3 + 0.2 * x.cos().unsqueeze(-1) * (2 * x).sin()
    return fun, torch.stack([u, v]).flatten(), 5.0


def arrow(n: int) -> Problem:
    def fun(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        hub, rest = y[..., :1], y[..., 1:]
        return torch.cat([-hub + rest.mean(-1, keepdim=True), 50 * p.unsqueeze(-1) * (hub - rest) - rest**3], -1)

    return fun, torch.linspace(0.5, 1.5, n, dtype=torch.float64), 1.0


def network(n: int) -> Problem:
    """Reactions of two species each, to two others, with rates over four decades."""
    draw = random.Random(0)
    kinetics = [(*(draw.randrange(n) for _ in range(4)), 10 ** (4 * draw.random() - 2)) for _ in range(n)]

    def fun(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        x = y.unbind(-1)
        slope = [p - p * v for v in x]
        for a, b, c, d, k in kinetics:
            rate = p * k * x[a] * x[b]
            slope[a], slope[b] = slope[a] - rate, slope[b] - rate
            slope[c], slope[d] = slope[c] + rate, slope[d] + rate
        return torch.stack(slope, -1)

    return fun, torch.linspace(0.3, 0.7, n, dtype=torch.float64), 1.0


def held(m: int) -> Problem:
    far = list(range(m))
    random.Random(2).shuffle(far)

    def residual(t: Tensor, y: Tensor, slope: Tensor, p: Tensor) -> Tensor:
        v, force = y[..., :m], y[..., m:]
        pull = torch.nn.functional.pad(force, (0, 1)) - torch.nn.functional.pad(force, (1, 0))
        drive = (p * torch.cos(t)).unsqueeze(-1) * torch.sin(v[..., far])
        return torch.cat([slope[..., :m] - (v.roll(1, -1) + v.roll(-1, -1) - 2 * v) + pull - drive, v[..., :-1] - v[..., 1:]], -1)

    return residual, torch.cat([torch.full((m,), 0.5, dtype=torch.float64), torch.zeros(m - 1, dtype=torch.float64)]), 1.0


_HEAD = """| problem | unknowns | trajectories | method | steps | compiled, ms | uncompiled, ms | times faster | first call, s | apart |
|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"""
ODES = ("kvaerno5", "rodas5p", "bdf", "radau5")
CASES: list[tuple[str, Callable[[int], Problem], int, tuple[str, ...], int]] = [
    ("grid", grid, 16, ODES, 0),
    ("grid", grid, 32, ODES, 0),
    ("grid", grid, 45, ODES, 0),
    ("grid", grid, 8, ODES, 100),
    ("arrow", arrow, 200, ODES, 0),
    ("reactions", network, 100, ("kvaerno5", "bdf", "radau5"), 0),
    ("held equal", held, 50, ("radau",), 0),
]


def solved(problem: Problem, method: str, rows: int, compiled: bool) -> tuple[Any, Tensor, float, float]:
    """The solution, the derivative in the parameter, and seconds of the process forward and back."""
    fun, y0, end = problem
    p = torch.tensor(0.7, dtype=torch.float64)
    if rows:
        spread = torch.linspace(0.9, 1.1, rows, dtype=torch.float64)
        y0, p = y0 * spread.unsqueeze(-1), p * spread
    y0, p = y0.clone().requires_grad_(), p.requires_grad_()
    options = {"method": method, "rtol": RTOL, "atol": 1e-2 * RTOL, "compile": compiled, "batched": bool(rows)}
    begun = time.process_time()
    door = adjoint.solve_dae if method == "radau" else adjoint.solve_ivp
    solution = door(fun, (0.0, end), y0.detach() if method == "radau" else y0, args=(p,), **options)
    between = time.process_time()
    (bar,) = torch.autograd.grad(solution.y[-1].square().sum(), p)
    return solution, bar, between - begun, time.process_time() - between


def compared(name: str, make: Callable[[int], Problem], size: int, method: str, rows: int, repeats: int) -> str:
    problem = make(size)
    begun = time.perf_counter()
    solved(problem, method, rows, True)
    first = time.perf_counter() - begun
    best: dict[bool, list[float]] = {True: [math.inf] * 2, False: [math.inf] * 2}
    found = {}
    for k in range(repeats):
        for compiled in (True, False) if k < max(2, repeats // 3) else (True,):
            *result, forward, back = solved(problem, method, rows, compiled)
            found[compiled] = result
            best[compiled] = [min(best[compiled][0], forward), min(best[compiled][1], back)]
    (mine, bar), (theirs, wanted) = found[True], found[False]
    steps = torch.as_tensor(mine.stats.n_steps)
    same = torch.equal(steps, torch.as_tensor(theirs.stats.n_steps))
    apart = float((mine.y - theirs.y).detach().abs().max() / theirs.y.detach().abs().max())
    apart = max(apart, float((bar - wanted).abs().max() / wanted.abs().max()))
    (f, b), (g, c) = best[True], best[False]
    return (
        f"| {name} | {problem[1].numel()} | {rows or 1} | {method} | {int(steps.sum())}{'' if same else ' (others)'} | "
        f"{1e3 * f:.3g} / {1e3 * (f + b):.3g} | {1e3 * g:.3g} / {1e3 * (g + c):.3g} | "
        f"{g / f:.1f} / {(g + c) / (f + b):.1f} | {first:.1f} | {apart:.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("error", message="compile=True")
    torch.set_num_threads(1)
    lines = []
    for name, make, size, methods, rows in CASES:
        for method in methods:
            lines.append(compared(name, make, size, method, rows, args.repeats))
            print(lines[-1], flush=True)
    write_paragraphs(
        args.out,
        "sparse",
        "# Many unknowns, each of which depends on a few others",
        f"Compiled and uncompiled in turns, one thread, rtol {RTOL:g}; the least times of the process, forward / with the derivative in a "
        "parameter. First call: with reading, the pattern and the C++ compiler, by the clock. Apart: values and derivatives of the two, "
        "relative. See `benchmarks/sparse.py`.",
        f"adjoint {adjoint.__version__}, torch {torch.__version__}.",
        "\n".join([_HEAD, *lines]),
    )


if __name__ == "__main__":
    main()
