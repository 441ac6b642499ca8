"""The figure: one panel a case, a pair of bars a solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

COLOURS = {"ours": "#c8102e", "torchdiffeq": "#4c72b0", "torchode": "#55a868", "diffrax": "#8c6bb1"}


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the results; False where matplotlib is missing or there is nothing to draw."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    cases = [c for c in results["cases"] if any("failure" not in r for r in c["results"])]
    if not cases:
        return False
    width = min(3, len(cases))
    height = -(-len(cases) // width)
    names = list(dict.fromkeys(r["solver"] for c in cases for r in c["results"]))
    figure, axes = plt.subplots(height, width, figsize=(5.2 * width, (0.42 * len(names) + 1.1) * height), sharey=True, squeeze=False)
    for ax, case in zip(axes.flat, cases, strict=False):
        _panel(ax, case, names)
    for ax in list(axes.flat)[len(cases) :]:
        ax.set_visible(False)
    axes[0][0].invert_yaxis()  # the y axis is shared: once is enough
    env = results["environment"]
    where = env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
    title = f"forward (pale) and forward + gradient (full), ms, median with quartile range; {where}, {env['date'][:10]}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _panel(ax: Any, case: dict[str, Any], names: list[str]) -> None:
    memory = case["memory_only"]
    for row in case["results"]:
        if "failure" in row:
            continue
        y, colour = names.index(row["solver"]), COLOURS[row["peer"]]
        if memory:
            bars = [(0.0, (row.get("memory") or {}).get("gradient"), 1.0)]
            bars = [(dy, m["bytes"] / 2**20, 0.0, a) for dy, m, a in bars if m]
        else:
            pairs = [(-0.2, row.get("forward"), 0.4), (0.2, row.get("gradient"), 1.0)]
            bars = [(dy, 1e3 * t["median"], 1e3 * t["iqr"] / 2, a) for dy, t, a in pairs if t]
        for dy, value, spread, alpha in bars:
            ax.barh(y + dy, value, height=0.38, color=colour, alpha=alpha, xerr=spread or None, error_kw={"lw": 0.8})
            ax.annotate(f" {value:.3g}", (value + spread, y + dy), va="center", fontsize=6)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xscale("log")
    ax.margins(x=0.12)
    ax.set_title(case["name"] + (": peak MiB, forward + gradient" if memory else ""), fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(axis="x", labelsize=7)
