"""The figure: one panel a case, one line a solver; on a logarithmic axis points are honest and bars are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .report import WRONG, digits

__all__ = ["draw"]

COLOURS = {
    **{"ours": "#c8102e", "torchdiffeq": "#4c72b0", "torchode": "#55a868", "diffrax": "#8c6bb1"},
    **{"heyoka": "#dd8452", "floor": "#7f7f7f"},
}


def draw(results: dict[str, Any], path: Path) -> bool:
    """Draw the results; False where matplotlib is missing or there is nothing to draw."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return False
    cases = [c for c in results["cases"] if any("all" not in r["failures"] for r in c["results"])]
    if not cases:
        return False
    width = min(3, len(cases))
    height = -(-len(cases) // width)
    names = list(dict.fromkeys(r["solver"] for c in cases for r in c["results"]))
    figure, axes = plt.subplots(
        height, width, figsize=(max(7.0, 5.2 * width), (0.42 * len(names) + 1.1) * height), sharey=True, squeeze=False
    )
    for ax, case in zip(axes.flat, cases, strict=False):
        _panel(ax, case, names)
    for ax in list(axes.flat)[len(cases) :]:
        ax.set_visible(False)
    axes[0][0].invert_yaxis()  # the y axis is shared: once is enough
    env = results["environment"]
    where = env["gpu"] or f"{env['cpu']}, {env['threads']} threads"
    title = f"forward (open), forward + gradient (full): ms, median, quartiles\n{where}, {env['date'][:10]}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def _values(measured: dict[str, Any]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile in ms; or three times the MiB."""
    if "bytes" in measured:
        return (measured["bytes"] / 2**20,) * 3
    return 1e3 * measured["q1"], 1e3 * measured["median"], 1e3 * measured["q3"]


def _panel(ax: Any, case: dict[str, Any], names: list[str]) -> None:
    from matplotlib.ticker import NullFormatter

    memory = case["memory_only"]
    for row in case["results"]:
        if "all" in row["failures"]:
            continue
        y, colour = names.index(row["solver"]), COLOURS[row["peer"]]
        points = [("gradient", (row.get("memory") or {}).get("gradient"))] if memory else [(w, row.get(w)) for w in ("forward", "gradient")]
        drawn = [(what, _values(m)) for what, m in points if m]
        ax.plot([value for _, (_, value, _) in drawn], [y] * len(drawn), color=colour, lw=1, alpha=0.4)
        for what, (low, value, high) in drawn:
            face = "white" if what == "forward" else colour
            error = row.get("gradient_error" if what == "gradient" else "error")
            label = digits(value) + ("" if error is None or error < WRONG else " wrong")
            ax.errorbar(value, y, xerr=[[value - low], [high - value]], fmt="o", ms=5, mfc=face, color=colour, lw=1)
            ax.annotate(label, (value, y), (0, -9), textcoords="offset points", ha="center", fontsize=6)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_xscale("log")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.margins(x=0.12, y=0.1)
    ax.set_title(case["name"] + (": peak MiB, forward + gradient" if memory else ""), fontsize=9)
    ax.grid(axis="x", alpha=0.3)
    ax.tick_params(axis="x", labelsize=7)
