"""From results to a header, a markdown report and a JSON file."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

__all__ = ["COMPILED", "EAGER", "WRONG", "digits", "environment", "markdown", "stem", "write", "write_paragraphs"]

EAGER, COMPILED = "ours discrete", "ours discrete compiled"
PACKAGES = (
    "adjoint", "torch", "torchdiffeq", "torchode", "diffrax", "equinox", "jax", "jaxlib", "casadi", "scikit-sundae", "scipy-dae",
    "torchdae", "numpy", "scipy",
)  # fmt: skip


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        try:
            return str(__import__(package).__version__)
        except Exception:  # packages fail in any way when they are imported
            return None


def _commit() -> str | None:
    try:
        where = Path(__file__).parent
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=where, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return out.stdout.strip()


def environment(device: str, options: dict[str, Any]) -> dict[str, Any]:
    """Hardware, versions, threads and load: what a reader needs to judge the numbers."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "device": device,
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        "commit": _commit(),
        "options": options,
    }


def stem(env: dict[str, Any]) -> str:
    """``<date>-<hardware>``: the name of the result files."""
    name = env["gpu"] or f"{env['cpu']} {env['cores']} cores"
    words = [w for w in re.sub(r"\([RTM]+\)", "", name.lower(), flags=re.IGNORECASE).split() if w not in ("processor", "cpu", "@")]
    return env["date"][:10] + "-" + re.sub(r"[^a-z0-9.]+", "-", " ".join(words)).strip("-")


def digits(x: float) -> str:
    """Three digits, never an exponent for large numbers."""
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def _ms(timing: dict[str, float] | None) -> list[str]:
    if timing is None:
        return ["-", "-", "-"]
    return [digits(1e3 * timing[k]) for k in ("median", "min", "iqr")]


def _ratio(row: dict[str, Any], rows: list[dict[str, Any]], what: str) -> str:
    """This median over those of ours, eager and compiled."""
    cells = []
    for name in (EAGER, COMPILED):
        ours = next((r for r in rows if r["solver"] == name and r.get(what)), None)
        cells.append(f"{row[what]['median'] / ours[what]['median']:.2g}" if ours and row.get(what) else "-")
    return " / ".join(cells)


def _count(count: dict[str, float] | None) -> str:
    if count is None:
        return "-"
    mean, largest = count["mean"], count["max"]
    return f"{largest:.0f}" if mean == largest else f"{mean:.1f} (max {largest:.0f})"


def _bytes(memory: dict[str, Any] | None) -> str:
    if memory is None:
        return "-"
    size = memory["bytes"]
    text = f"{size / 2**20:.3g} MiB" if size >= 2**20 / 10 else f"{size / 2**10:.3g} KiB"
    return text + (" †" if memory["how"] == "XLA plan" else "")


def _error(x: float | None) -> str:
    """Marked where it is no answer at all: its time then means nothing."""
    if x is None:
        return "-"
    return f"{x:.1e}" if x < WRONG else f"**{x:.1e} WRONG**"


WRONG = 0.05
COLUMNS = (
    "solver", "forward ms", "min", "IQR", "x ours", "fwd+grad ms", "min", "IQR", "x ours", "steps", "f calls", "error", "gradient error",
    "peak memory fwd", "fwd+grad", "first call s",
)  # fmt: skip


def _row(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    stats = row.get("stats") or {}
    memory = row.get("memory") or {}
    first = [f"{row[w]['first']:.2g}" for w in ("forward", "gradient") if row.get(w)]
    return [
        row["solver"],
        *_ms(row.get("forward")),
        _ratio(row, rows, "forward"),
        *_ms(row.get("gradient")),
        _ratio(row, rows, "gradient"),
        _count(stats.get("steps")),
        _count(stats.get("n_fun")),
        _error(row.get("error")),
        _error(row.get("gradient_error")),
        _bytes(memory.get("forward")),
        _bytes(memory.get("gradient")),
        " + ".join(first) or "-",
    ]


def _table(columns: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in ([*columns], rule, *lines)]


def _case(case: dict[str, Any]) -> list[str]:
    rows = case["results"]
    good = [r for r in rows if "all" not in r["failures"]]
    lines = [f"## {case['name']}", "", case["description"], ""]
    if case["memory_only"]:
        peaks = [[r["solver"], _bytes((r.get("memory") or {}).get("gradient"))] for r in good]
        lines += _table(("solver", "peak memory, forward + gradient"), peaks)
    else:
        lines += _table(COLUMNS, [_row(r, good) for r in good])
    others = case.get("other_processes")
    if others is not None and others > 0.1:
        lines += ["", f"**Other processes used {others:.0%} of the machine during this case: do not trust its times.**"]
    lines += ["", *(f"- {r['solver']}, {what} failed: {why}" for r in rows for what, why in r["failures"].items())]
    return [*lines, ""]


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    env = results["environment"]
    where = f"{env['gpu']}, host {env['cpu']}" if env["gpu"] else env["cpu"]
    lines = [
        f"# Benchmarks, {env['date'][:10]}",
        "",
        f"- Hardware: {where}, {env['cores']} cores available; load average at the start {env['load']}",
        f"- Threads: {env['threads']} for every peer",
        f"- Software: {env['os']}, Python {env['python']}, " + ", ".join(f"{k} {v}" for k, v in env["versions"].items()),
        f"- Options: {env['options']}; commit {env['commit']}",
        *(f"- {line}" for line in results["skipped"]),
        "",
        "Times are medians of round-robin repeats, with minimum and interquartile range. `x ours`: median over that of",
        f"`{EAGER}` / `{COMPILED}` (above 1: slower than ours). Steps and f calls: of the forward solve, per trajectory where",
        "step sizes are per trajectory. First call: forward + gradient, compilation included. † what XLA plans to allocate.",
        "How each column is measured: benchmarks/README.md.",
        "",
    ]
    for case in results["cases"]:
        lines += _case(case)
    return "\n".join(lines)


def _plain(x: Any) -> Any:
    """Without NaN and infinity, which are not JSON."""
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if isinstance(x, list):
        return [_plain(v) for v in x]
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def write(results: dict[str, Any], folder: Path) -> Path:
    """Write the JSON and the markdown; return their path without suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / stem(results["environment"])
    Path(f"{base}.json").write_text(json.dumps(_plain(results), indent=1, allow_nan=False) + "\n")
    Path(f"{base}.md").write_text(markdown(results))
    return base


def write_paragraphs(folder: Path, name: str, *paragraphs: str) -> None:
    """Write markdown of this day, and say where it is."""
    out = folder / f"{datetime.date.today():%Y-%m-%d}-{name}.md"
    out.write_text("\n\n".join(paragraphs) + "\n")
    print(out)
