"""Work against precision: timing of one call, stored references, comparison at equal error, tables and figures."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .measure import Contention
from .report import digits, environment

__all__ = [
    "COLOURS",
    "Calls",
    "Row",
    "at_equal_error",
    "earlier",
    "fix_threads",
    "gradient_error",
    "measure",
    "merged",
    "options",
    "run",
    "state_error",
    "stored",
    "table",
    "work_precision_figure",
    "write",
]

REFERENCES = Path(__file__).parent / "reference_values.json"
COLOURS = {
    "ours": ["#c8102e", "#e8743b", "#8b0000", "#f2a900", "#d4679b", "#5c1a1b"],
    "SciPy": ["#4c72b0", "#7fa8d8", "#1f3f77"],
    "diffrax": ["#8c6bb1"],
    "CasADi": ["#2e8b57", "#7ccba2"],
    "SUNDIALS": ["#666666"],
    "scipy-dae": ["#4c72b0", "#7fa8d8"],
    "torchdae": ["#b8860b", "#d9c27a"],
}


@dataclass(frozen=True)
class Calls:
    """One solver at one tolerance on one problem.

    ``forward() -> (states, steps)``: final states ``(count, n)`` and the mean number of steps. ``gradient()``: ``(count, m)``, or None.
    ``backward_steps()``: steps of the backward solve of the last gradient, where it has its own. ``share``: the part of the trajectories
    that the calls treat; times are divided by it.
    """

    forward: Callable[[], tuple[np.ndarray, float]]
    gradient: Callable[[], np.ndarray] | None = None
    backward_steps: Callable[[], float] | None = None
    share: float = 1.0


@dataclass
class Row:
    """What was measured: milliseconds are for all trajectories together."""

    problem: str
    count: int
    solver: str
    tolerance: float
    forward_ms: float | None = None
    gradient_ms: float | None = None
    first_s: float | None = None
    steps: float | None = None
    backward_steps: float | None = None
    error: float | None = None
    gradient_error: float | None = None
    scaled: bool = False
    failed: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def fix_threads(count: int) -> None:
    """Of every library, before it is imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if count == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    import torch

    torch.set_num_threads(count)


def options(text: str | None, problems: Sequence[str]) -> argparse.ArgumentParser:
    """What both programs take."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--problem", "--problems", nargs="*", choices=problems, default=list(problems), help="default: all")
    parser.add_argument("--tolerance", type=float, nargs="*", default=[1e-4, 1e-6, 1e-8, 1e-10], help="relative tolerances")
    parser.add_argument("--solver", nargs="*", help="only those whose names contain one of these words")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=5.0, help="seconds for the repeats of one timing; at least one is made")
    parser.add_argument(
        "--limit", type=float, default=30.0, help="a call (not the first) longer than this many seconds ends the solver's row of tolerances"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="of the result files; default: of the program and the problems")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def stored(key: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Reference values from `reference_values.json`, made and added where they are missing. To make them anew, delete the file."""
    known = json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}
    if key not in known:
        start = time.perf_counter()
        known[key] = {name: np.asarray(value).tolist() for name, value in make().items()}
        # a line for each case
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known.items())]
        REFERENCES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"reference of {key}: {time.perf_counter() - start:.0f} s", flush=True)
    return {name: np.array(value) for name, value in known[key].items()}


def state_error(y: np.ndarray, truth: np.ndarray, small: float) -> float:
    """Largest over components and trajectories of the error over ``|truth| + small``."""
    seen = min(len(y), len(truth))
    return float((abs(y[:seen] - truth[:seen]) / (abs(truth[:seen]) + small)).max())


def gradient_error(g: np.ndarray, truth: np.ndarray, p: np.ndarray) -> float:
    """Norm of the error over norm, in the logarithms of the parameters; all trajectories together."""
    seen = min(len(g), len(truth))
    scale = p[:seen]
    return float(np.linalg.norm((g[:seen] - truth[:seen]) * scale) / np.linalg.norm(truth[:seen] * scale))


def measure(call: Callable[[], Any], repeats: int, budget: float) -> tuple[float, float, Any]:
    """First call and median of the others in seconds, and the result. Calls under 5 ms are repeated within a sample."""
    start = time.perf_counter()
    out = call()
    first = time.perf_counter() - start
    start = time.perf_counter()
    out = call()
    second = time.perf_counter() - start
    number = max(1, int(0.005 / max(second, 1e-9)))
    samples = [second] if number == 1 else []
    while len(samples) < repeats and (not samples or number * sum(samples) < budget):
        start = time.perf_counter()
        for _ in range(number):
            out = call()
        samples.append((time.perf_counter() - start) / number)
    return first, statistics.median(samples), out


def run(
    problem: str,
    count: int,
    solvers: dict[str, Callable[[float], Calls]],
    truth: dict[str, np.ndarray],
    small: float,
    p: np.ndarray,
    chosen: argparse.Namespace,
) -> list[Row]:
    """Every solver at every tolerance; a failure is a row too. ``truth``: "y" (k, n) and "g" (k, m) of the first trajectories."""
    rows = []
    for name, make in solvers.items():
        if chosen.solver and not any(word.lower() in name.lower() for word in chosen.solver):
            continue
        for tolerance in chosen.tolerance:
            row = Row(problem, count, name, tolerance)
            rows.append(row)
            slow = False
            try:
                start = time.perf_counter()
                calls = make(tolerance)
                build = time.perf_counter() - start
                first, median, (y, steps) = measure(calls.forward, chosen.repeats, chosen.budget)
                row.forward_ms, row.first_s, row.steps = 1e3 * median / calls.share, build + first, steps
                row.error, row.scaled = state_error(y, truth["y"], small), calls.share < 1
                slow = median > chosen.limit
                if calls.gradient is not None:
                    first, median, g = measure(calls.gradient, chosen.repeats, chosen.budget)
                    row.gradient_ms, row.first_s = 1e3 * median / calls.share, row.first_s + first
                    row.gradient_error = gradient_error(g, truth["g"], p)
                    if calls.backward_steps is not None:
                        row.backward_steps = calls.backward_steps()
                    slow = slow or median > chosen.limit
            except Exception as error:
                text = (str(error).strip().splitlines() or [""])[-1 if "casadi" in str(error) else 0]
                row.failed = f"{type(error).__name__}: {text}"[:160]
            print(_line(row), flush=True)
            if slow:
                print(f"  {name}: over {chosen.limit:g} s, no further tolerances", flush=True)
                break
    return rows


def _line(row: Row) -> str:
    def number(x: float | None) -> str:
        return "-" if x is None else digits(x)

    def small(x: float | None) -> str:
        return "-" if x is None else f"{x:.1e}"

    head = f"{row.problem:12s} x{row.count:<6d} {row.solver:24s} {row.tolerance:.0e}  "
    if row.failed and row.forward_ms is None:
        return head + "failed: " + row.failed
    tail = f"  gradient failed: {row.failed}" if row.failed else ""
    return (
        head
        + f"{number(row.forward_ms):>9s} ms  {number(row.gradient_ms):>9s} ms  steps {number(row.steps)}/{number(row.backward_steps)}  "
        f"errors {small(row.error)} {small(row.gradient_error)}" + tail
    )


def at_equal_error(rows: Sequence[Row], error: float, value: str, by: str, loosest: bool = False) -> float | None:
    """``value`` of a solver where its error (``by``) is ``error``, between two tolerances by straight lines in logarithms.

    None where it never was as accurate, or never was as inaccurate; ``loosest``: in the latter case the least value of all.
    """
    points = sorted((getattr(r, by), getattr(r, value)) for r in rows if getattr(r, by) and getattr(r, value) is not None)
    if not points or error < points[0][0]:
        return None
    if error > points[-1][0]:
        return min(v for _, v in points) if loosest else None
    x, y = (np.log(np.array(c)) for c in zip(*points, strict=True))
    return float(np.exp(np.interp(np.log(error), x, y)))


def table(rows: Sequence[Row], base: Callable[[Row], bool]) -> list[str]:
    """Markdown. Ratios are over the fastest row with ``base`` at the same problem, count and tolerance."""
    columns = (
        "problem", "trajectories", "solver", "rtol", "forward ms", "x ours", "fwd+grad ms", "x ours", "steps", "backward steps", "error",
        "gradient error", "first call s",
    )  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" + "---|" + "---:|" * (len(columns) - 3)]
    for row in rows:
        same = [r for r in rows if (r.problem, r.count, r.tolerance) == (row.problem, row.count, row.tolerance) and base(r)]

        def ratio(what: str, row: Row = row, same: list[Row] = same) -> str:
            own, theirs = getattr(row, what), [x for r in same if (x := getattr(r, what)) is not None]
            return f"{own / min(theirs):.2g}" if own is not None and theirs else "-"

        def number(x: float | None) -> str:
            return "-" if x is None else digits(x)

        def small(x: float | None) -> str:
            return "-" if x is None else f"{x:.1e}"

        cells = [row.problem, str(row.count), row.solver + (" †" if row.scaled else ""), f"{row.tolerance:.0e}"]
        if row.failed and row.forward_ms is None:
            cells += [f"failed: {row.failed}".replace("|", "/")] + [""] * (len(columns) - 5)
        else:
            cells += [number(row.forward_ms), ratio("forward_ms"), number(row.gradient_ms), ratio("gradient_ms")]
            cells += [number(row.steps), number(row.backward_steps), small(row.error), small(row.gradient_error), number(row.first_s)]
        lines.append("| " + " | ".join(cells) + " |")
    failures = sorted({f"- {r.solver}, {r.problem}, gradient: {r.failed}" for r in rows if r.failed and r.forward_ms is not None})
    return [*lines, "", *failures]


def work_precision_figure(rows: Sequence[Row], path: Path, title: str) -> bool:
    """One panel a problem and count, left forward, right forward + gradient: error against milliseconds, both logarithmic."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    cases = list(dict.fromkeys((r.problem, r.count) for r in rows))
    if not cases:
        return False
    figure, axes = plt.subplots(len(cases), 2, figsize=(10.5, 3.1 * len(cases)), squeeze=False)
    names = list(dict.fromkeys(r.solver for r in rows))
    for line, (problem, count) in enumerate(cases):
        for column, (what, by) in enumerate((("forward_ms", "error"), ("gradient_ms", "gradient_error"))):
            ax = axes[line][column]
            for name in names:
                own = [r for r in rows if (r.problem, r.count, r.solver) == (problem, count, name)]
                points = [(getattr(r, by), getattr(r, what)) for r in own if getattr(r, what) is not None and getattr(r, by)]
                if not points:
                    continue
                ax.loglog(*zip(*points, strict=True), "o-", ms=4, lw=1.2, color=_colour(name, names), label=name)
            ax.invert_xaxis()
            ax.set_title(f"{problem} x{count}: {'forward' if column == 0 else 'forward + gradient'}", fontsize=9)
            ax.set_xlabel("error" if column == 0 else "error of the gradient", fontsize=8)
            ax.set_ylabel("ms", fontsize=8)
            ax.tick_params(labelsize=7)
            ax.grid(alpha=0.3)
            if ax.has_data():
                ax.legend(fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _colour(name: str, names: Sequence[str]) -> str:
    peer = name.split()[0]
    shades = COLOURS.get(peer, ["#000000"])
    return shades[[n for n in names if n.split()[0] == peer].index(name) % len(shades)]


def earlier(name: str, chosen: argparse.Namespace) -> list[Row]:
    """The rows of today's results of that name, if there are any."""
    path = Path(f"{_base(name, chosen)}.json")
    return [Row(**row) for row in json.loads(path.read_text())["rows"]] if path.exists() else []


def merged(old: Sequence[Row], new: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """All rows, the new ones in the place of old ones of the same case; by problem in the given order."""
    key = lambda r: (r.problem, r.count, r.solver, r.tolerance)  # noqa: E731
    known = {key(r) for r in new}
    return sorted([*(r for r in old if key(r) not in known), *new], key=lambda r: (order.index(r.problem), r.count))


def _base(name: str, chosen: argparse.Namespace) -> Path:
    return chosen.out / f"{datetime.date.today().isoformat()}-{name}"


def write(rows: Sequence[Row], head: list[str], tail: list[str], name: str, chosen: argparse.Namespace, others: Contention) -> Path:
    """The JSON, the report and the figure; returns their path without suffix."""
    kept = {k: v for k, v in vars(chosen).items() if k != "out"}
    env = environment("cpu", kept)
    share = others.share()
    chosen.out.mkdir(parents=True, exist_ok=True)
    base = _base(name, chosen)
    document = {"environment": env, "other_processes": share, "rows": [asdict(r) for r in rows]}
    Path(f"{base}.json").write_text(json.dumps(document, indent=1) + "\n")
    software = ", ".join(f"{k} {v}" for k, v in env["versions"].items())
    lines = [*head, "", f"{env['cpu']}, {env['cores']} cores, {env['threads']} thread(s), load {env['load']}; {software}; {env['commit']}."]
    if share is not None and share > 0.1:
        lines += ["", f"**Other processes used {share:.0%} of the machine: do not trust the times.**"]
    Path(f"{base}.md").write_text("\n".join([*lines, "", *table(rows, lambda r: r.solver.startswith("ours")), "", *tail]) + "\n")
    work_precision_figure(rows, Path(f"{base}.png"), head[0].lstrip("# "))
    print(f"written: {base}.md, .json, .png", flush=True)
    return base
