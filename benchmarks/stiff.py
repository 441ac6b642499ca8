"""Stiff systems, forward and forward + gradient, against SciPy, diffrax and CasADi. ``python -m benchmarks.stiff --help``.

``--problem robertson hires ...``: one trajectory at several tolerances (work against precision). Results are written after every problem
and joined with those of other problems in the same day's file (``--fresh``: without them), so that problems may be run one by one.
``--count 1 100 10000``: ensembles of Robertson's kinetics with parameters spread by 10 %.

Gradients are those of the squared norm of all final states in all parameters (Van der Pol: of the states at 0.5, before the first jump,
within which derivatives grow by many orders of magnitude). Errors are against SciPy's Radau at 1e-12
(gradients: its solution of the variational equations), kept in `reference_values.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from . import precision, stiff_peers
from .measure import Contention
from .precision import Calls
from .stiff_problems import STIFF, OdeProblem, solve_accurately, spread

#: trajectories of an ensemble that are checked, and of those that a peer takes one by one
CHECKED, ONE_BY_ONE = 3, 20


def reference(problem: OdeProblem, p: np.ndarray, name: str) -> dict[str, np.ndarray]:
    """Final states "y" and gradients "g" for each row of ``p``."""

    def make() -> dict[str, np.ndarray]:
        states, slopes = [], []
        for one in p:
            y, s = solve_accurately(problem.rate, problem.vector, problem.y0, one, problem.end, problem.small, problem.sparsity)
            states.append(y)
            if problem.looked_at is not None:
                y, s = solve_accurately(problem.rate, problem.vector, problem.y0, one, problem.looked_at, problem.small, problem.sparsity)
            slopes.append(2 * y @ s if s is not None else _differences(problem, one))
        return {"y": np.array(states), "g": np.array(slopes)}

    return precision.stored(name, make)


def _differences(problem: OdeProblem, p: np.ndarray) -> np.ndarray:
    """Central differences of order 4 of Radau's solutions."""
    out = []
    for j in range(p.size):
        step = np.zeros(p.size)
        step[j] = 2e-3 * p[j]

        def value(k: int, step: np.ndarray = step) -> float:
            return float(
                (
                    solve_accurately(
                        problem.rate, problem.vector, problem.y0, p + k * step, problem.gradient_end, problem.small, problem.sparsity
                    )[0]
                    ** 2
                ).sum()
            )

        out.append((8 * (value(1) - value(-1)) - (value(2) - value(-2))) / (12 * step[j]))
    return np.array(out)


def solvers(problem: OdeProblem, p: np.ndarray) -> dict[str, Callable[[float], Calls]]:
    """What suits the problem and is installed."""
    from adjoint.methods import METHODS

    single, many = len(p) == 1, len(p) > 1
    table: dict[str, Callable[[float], Calls]] = {}
    for method in ("kvaerno5", "rodas5p", "radau5", "bdf"):
        if method in METHODS:
            table[f"ours {method}"] = partial(_by_tolerance, stiff_peers.ours, problem, p, method=method)
    if many:
        table["ours kvaerno3"] = partial(_by_tolerance, stiff_peers.ours, problem, p, method="kvaerno3")
    if problem.sparsity is None:  # native code has dense Jacobians
        for method in ("rodas5p", "kvaerno5", "radau5", "bdf"):
            table[f"ours {method} compiled"] = partial(_by_tolerance, stiff_peers.ours, problem, p, method=method, compile=True)
    for method in ("BDF", "Radau", "LSODA"):
        if problem.sparsity is None or method != "LSODA":  # LSODA knows dense and banded Jacobians
            table[f"SciPy {method}"] = partial(_by_tolerance, stiff_peers.scipy_one_by_one, problem, p, method=method, most=ONE_BY_ONE)
    if importlib.util.find_spec("diffrax") and problem.sparsity is None:  # diffrax: dense Jacobians
        table["diffrax Kvaerno5"] = partial(_by_tolerance, stiff_peers.diffrax_kvaerno5, problem, p)
    if importlib.util.find_spec("casadi"):
        table["CasADi cvodes"] = partial(_by_tolerance, stiff_peers.casadi_cvodes, problem, p, most=1 if single else ONE_BY_ONE)
    if importlib.util.find_spec("sksundae") and problem.sparsity is None:
        table["scikit-sundae CVODE"] = partial(_by_tolerance, stiff_peers.sundae_cvode, problem, p, most=ONE_BY_ONE)
    return table


def _by_tolerance(make: Callable[..., Calls], problem: OdeProblem, p: np.ndarray, tolerance: float, **rest: Any) -> Calls:
    return make(problem, p, tolerance, **rest)


def _fastest(rows: list[precision.Row]) -> list[str]:
    """For every problem, the times at equal error, fastest first."""
    lines = []
    whats = (("forward_ms", "error", "forward"), ("gradient_ms", "gradient_error", "forward + gradient"))
    cases = dict.fromkeys((r.problem, r.count) for r in rows)
    for (problem, count), (what, by, label), error in itertools.product(cases, whats, (1e-5, 1e-7)):
        times = {}
        for name in dict.fromkeys(r.solver for r in rows):
            own = [r for r in rows if (r.problem, r.count, r.solver) == (problem, count, name)]
            found = precision.at_equal_error(own, error, what, by)
            if found is not None:
                times[name] = found
        if times:
            text = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(times.items(), key=lambda item: item[1]))
            lines.append(f"- {problem} x{count}, {label}, ms where the error is {error:.0e}: {text}")
    return lines


def _verdicts(rows: list[precision.Row]) -> list[str]:
    """Forward and gradient of ensembles: the fastest of ours against a peer at errors of the gradient that both reach."""
    lines = []
    for count in dict.fromkeys(r.count for r in rows if r.count > 1):
        own = [name for name in dict.fromkeys(r.solver for r in rows) if name.startswith("ours")]
        for peer in ("diffrax Kvaerno5", "CasADi cvodes"):
            found = []
            for error in (1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
                at = {
                    name: precision.at_equal_error(
                        [r for r in rows if (r.count, r.solver) == (count, name)], error, "gradient_ms", "gradient_error", loosest=True
                    )
                    for name in (*own, peer)
                }
                theirs, mine = at[peer], {name: ms for name in own if (ms := at[name]) is not None}
                if theirs is not None and mine:
                    best = min(mine, key=mine.__getitem__)
                    found.append(f"{error:.0e}: {theirs / mine[best]:.2g} times ({best}, {mine[best]:.3g} against {theirs:.3g} ms)")
            if found:
                lines.append(f"- x{count}, forward + gradient over {peer} at one error of the gradient: " + "; ".join(found))
    if lines:
        lines.append("- (a solver that was more accurate than the error at its loosest tolerance counts with its time there)")
    return lines


def main() -> None:
    """Run what was asked for and write the results."""
    parser = precision.options(__doc__, list(STIFF))
    parser.add_argument("--count", type=int, nargs="*", help="ensembles of Robertson's kinetics of these sizes, and nothing else")
    parser.add_argument("--fresh", action="store_true", help="forget what the results of today hold")
    parser.add_argument("--ensemble-tolerance", type=float, nargs="*", default=[1e-4, 1e-6, 1e-8])
    chosen = parser.parse_args()
    precision.fix_threads(chosen.threads)
    contention = Contention()
    if chosen.count:
        name, what, parts = "stiff-ensembles", "ensembles of Robertson's kinetics", _ensembles(chosen)
    else:
        name, what, parts = "stiff", "one trajectory", _single(chosen)
    name = chosen.name or name
    rows = [] if chosen.fresh else precision.earlier(name, chosen)
    verdicts: list[str] = []
    for part in parts:
        rows = precision.merged(rows, part, list(STIFF))
        verdicts = _fastest(rows) + _verdicts(rows)
        precision.write(rows, _head(rows, what), verdicts, name, chosen, contention)
    for line in verdicts:
        print(line)


def _head(rows: list[precision.Row], what: str) -> list[str]:
    return [
        f"# Stiff systems, {what}",
        "",
        "Medians; `x ours`: over the fastest of ours at the same tolerance (compare at equal errors: the figure). Absolute tolerances are "
        "rtol times what is small in the problem; errors are over |y| + small, largest component, and in the logarithms of the parameters "
        "(norm) for gradients. † measured on the first trajectories and scaled. First call: with building and compilation.",
        "",
        *(f"- {problem.name}: {problem.text}" for problem in STIFF.values() if any(r.problem == problem.name for r in rows)),
    ]


def _single(chosen: argparse.Namespace) -> Iterator[list[precision.Row]]:
    """The rows of one problem after the other."""
    for name in chosen.problem:
        problem = STIFF[name]
        p = problem.p[None]
        truth = reference(problem, p, f"stiff/{name}")
        yield precision.run(name, 1, solvers(problem, p), truth, problem.small, p, chosen)


def _ensembles(chosen: argparse.Namespace) -> Iterator[list[precision.Row]]:
    """The rows of one size after the other."""
    problem = STIFF["robertson"]
    chosen.tolerance = chosen.ensemble_tolerance
    truth = reference(problem, spread(problem.p, CHECKED), "stiff/robertson-ensemble")
    for count in chosen.count:
        p = spread(problem.p, count)
        yield precision.run("robertson", count, solvers(problem, p), truth, problem.small, p, chosen)


if __name__ == "__main__":
    main()
