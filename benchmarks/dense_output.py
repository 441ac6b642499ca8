"""Errors at the ends of steps and between them, in units of the tolerance.

Every adaptive method on a smooth, a stiff and a differential-algebraic problem with closed forms.

    python -m benchmarks.dense_output [METHOD ...]

prints the table of docs/methods.md, section "Between the steps". One unit is ``rtol |y| + atol`` with the largest ``|y|`` of
every component.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adjoint import SplitFunction, solve_dae, solve_ivp
from adjoint.methods import DAE_METHODS, METHODS

__all__ = ["PROBLEMS", "TOLERANCES", "cases", "measured"]

F64 = torch.float64
TOLERANCES = (1e-4, 1e-6)


@dataclass(frozen=True)
class Problem:
    """``fun`` with its solution ``exact`` at times (T,): (T, n). ``mass``: that of ``M y' = fun``; ``split``: the two parts of ``fun``."""

    fun: Callable[..., Any]
    exact: Callable[[Tensor], Tensor]
    end: float
    mass: Tensor | None = None
    split: tuple[Callable[..., Any], Callable[..., Any]] | None = None


def _smooth(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[0] * torch.cos(t), y[2], -y[1]])


def _stiff(t: Tensor, y: Tensor) -> Tensor:
    """Kaps (1981), with a stiffness of a thousand."""
    return torch.stack([-1002 * y[0] + 1000 * y[1] ** 2, y[0] - y[1] * (1 + y[1])])


def _slow(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([0 * y[0], y[0] - y[1] * (1 + y[1])])


def _fast(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([-1002 * y[0] + 1000 * y[1] ** 2, 0 * y[1]])


def _constrained(t: Tensor, y: Tensor) -> Tensor:
    """``x' = -x``; ``z`` is prescribed, ``w = x z``."""
    return torch.stack([-y[0], y[1] - torch.sin(20 * t), y[2] - y[0] * y[1]])


PROBLEMS = {
    "smooth": Problem(
        _smooth,
        lambda t: torch.stack([torch.exp(torch.sin(t)), torch.sin(t), torch.cos(t)], -1),
        5.0,
        split=(_smooth, lambda t, y: 0 * y),
    ),
    "stiff": Problem(_stiff, lambda t: torch.stack([torch.exp(-2 * t), torch.exp(-t)], -1), 1.0, split=(_slow, _fast)),
    "dae": Problem(
        _constrained,
        lambda t: torch.stack([torch.exp(-t), torch.sin(20 * t), torch.exp(-t) * torch.sin(20 * t)], -1),
        1.0,
        mass=torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=F64)),
    ),
}


def _residual(t: Tensor, y: Tensor, yp: Tensor) -> Tensor:
    mass = PROBLEMS["dae"].mass
    assert mass is not None
    return mass @ yp - _constrained(t, y)


def cases() -> Iterator[tuple[str, str]]:
    """Pairs of method and problem; methods of `solve_dae` are called by its name."""
    for name, method in METHODS.items():
        if method.adaptive:
            yield name, "smooth"
            yield name, "stiff"
            if getattr(method, "takes_mass", False):
                yield name, "dae"
    for name in DAE_METHODS:
        yield f"solve_dae {name}", "dae"


def measured(method: str, problem: str, tolerance: float) -> tuple[float, float, int]:
    """The largest errors at the ends of steps and between them, in units of the tolerance, and the number of steps."""
    given = PROBLEMS[problem]
    start = given.exact(torch.zeros(1, dtype=F64))[0]
    options: dict[str, Any] = {"rtol": tolerance, "atol": tolerance * 1e-2, "t_eval": "steps", "dense_output": True}
    if method.startswith("solve_dae "):
        sol = solve_dae(_residual, (0.0, given.end), start, method=method.removeprefix("solve_dae "), **options)
    else:
        fun = given.fun
        if getattr(METHODS[method], "additive", False):
            assert given.split is not None
            fun = SplitFunction(*given.split)
        mass = {} if given.mass is None else {"mass_matrix": given.mass}
        sol = solve_ivp(fun, (0.0, given.end), start, method=method, **mass, **options)
    fine = torch.linspace(0.0, given.end, 1001, dtype=F64)
    unit = given.exact(fine).abs().amax(0) * tolerance + tolerance * 1e-2
    ends, between = ((y - given.exact(t)).abs() / unit for t, y in ((sol.t, sol.y), (fine, sol(fine))))
    return float(ends.max()), float(between.max()), int(sol.stats.n_accepted)


def main(names: list[str]) -> None:
    """Print the table."""
    columns = [f"{problem} {tolerance:.0e}" for problem in PROBLEMS for tolerance in TOLERANCES]
    print("| method | " + " | ".join(columns) + " |\n|---" + "|---" * len(columns) + "|")
    found = list(cases())
    for method in dict.fromkeys(m for m, _ in found):
        if names and method.split()[-1] not in names:
            continue
        cells = []
        for problem in PROBLEMS:
            for tolerance in TOLERANCES:
                # methods of order one would take a million steps
                given = METHODS.get(method)
                slow = tolerance < 1e-5 and given is not None and not hasattr(given, "max_order") and given.error_order == 1
                if (method, problem) not in found or slow:
                    cells.append("")
                    continue
                ends, between, _ = measured(method, problem, tolerance)
                cells.append(f"{ends:.2g} / {between:.2g}")
        print(f"| `{method}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
