"""The rooms of the package and what they import: asked by a test, and drawn for the documentation.

    python scripts/rooms.py docs/architecture.svg
"""

from __future__ import annotations

import ast
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: from the street down: a room imports from itself and from those below it
ROOMS = {
    "adjoint": "public names; torchdiffeq's face",
    "nn": "layers: neural ODEs, deep equilibria",
    "dropin": "torchdiffeq's functions",
    "doors": "arguments in, solutions out",
    "sensitivity": "how derivatives of a solve are taken",
    "native": "the user's function as scalar code",
    "integrate": "loops, steps, events, samples",
    "nonlinear": "solvers for roots",
    "methods": "tableaux, one step, its adjoint",
    "system": "the user's function made flat; Jacobians",
    "linalg": "linear solvers, sparsity",
    "errors": "what is raised; what PyTorch keeps private",
}
PACKAGE = Path(__file__).parent.parent / "adjoint"


class Import(NamedTuple):
    """``name`` of module ``target`` is imported by module ``source``; ``typing``: for type checkers only."""

    source: str
    target: str
    name: str
    typing: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room(module: str) -> str:
    """The room that a module lies in."""
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "torchdiffeq":
        return "adjoint"
    return "errors" if parts[1] in ("errors", "_version", "torch_internals") else parts[1]


def imports() -> Iterator[Import]:
    """Every import of one module of the package by another, wherever it stands."""
    known = modules()
    for source, path in known.items():
        inside = source.split(".") if path.name == "__init__.py" else source.split(".")[:-1]
        tree = ast.parse(path.read_text())
        checked = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = inside[: len(inside) - node.level + 1] if node.level else []
            parent = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{parent}.{alias.name}"
                if inner in known or parent in known:
                    yield Import(source, inner if inner in known else parent, alias.name, id(node) in checked)


def circles() -> list[list[str]]:
    """Modules that import each other, by way of others too; what is for type checkers only does not count."""
    below: dict[str, set[str]] = defaultdict(set)
    for found in imports():
        # a name of a package is asked of the package, which has imported its modules
        if not found.typing and found.target != found.source and not found.source.startswith(found.target + "."):
            below[found.source].add(found.target)
    reached = {name: _reached(name, below) for name in list(below)}
    return sorted({tuple(sorted(y for y in reached[x] if x in reached.get(y, ()))) for x in reached if x in reached[x]})  # type: ignore[misc]


def _reached(start: str, below: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(below[start])
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.add(module)
            waiting += below.get(module, ())
    return found


def draw(path: Path) -> None:
    """A picture of the rooms: one below the other, with an arrow for what each imports from those below, as wide as there is of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    arrows = Counter((room(i.source), room(i.target)) for i in imports() if room(i.source) != room(i.target))
    files, lines = Counter(), Counter()
    for name, file in modules().items():
        files[room(name)] += 1
        lines[room(name)] += len(file.read_text().splitlines())
    place = {name: -i for i, name in enumerate(ROOMS)}
    plt.rcParams["svg.hashsalt"] = "rooms"
    figure, ax = plt.subplots(figsize=(9, 8))
    for name, says in ROOMS.items():
        y = place[name]
        ax.add_patch(plt.Rectangle((0, y - 0.36), 4.6, 0.72, facecolor="#e8eef7", edgecolor="#33507a"))
        ax.text(0.12, y + 0.08, name, va="center", fontsize=12, fontweight="bold", color="#1d3557")
        ax.text(0.12, y - 0.2, says, va="center", fontsize=8.5, color="#33507a")
        ax.text(4.5, y + 0.08, f"{files[name]} files, {lines[name]:,} lines", va="center", ha="right", fontsize=8, color="#555555")
    for (above, below), count in sorted(arrows.items()):
        if below == "errors":
            # everybody's, and it would hide the rest
            continue
        start, end = place[above], place[below]
        ax.annotate(
            "", xy=(4.62, end + 0.12), xytext=(4.62, start - 0.12), annotation_clip=False,
            arrowprops={
                "arrowstyle": "->", "connectionstyle": "arc3,rad=-0.65", "lw": 0.5 + 0.35 * count**0.5, "color": "#7a5195", "alpha": 0.75,
            },
        )  # fmt: skip
    ax.set_xlim(-0.1, 6.8)
    ax.set_ylim(min(place.values()) - 0.6, 0.6)
    ax.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    draw(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/architecture.svg"))
