"""Differential-algebraic systems, forward and forward + gradient, against CasADi, SUNDIALS, scipy-dae and torchdae.

``python -m benchmarks.dae --help``. ``--problem robertson akzo ...``: one trajectory at several tolerances. ``--count 100 1000``: batches
with parameters spread by 10 %. Gradients are those of the squared norm of the differential variables at the end in all parameters: the
adjoint of an algebraic end value that CasADi gives is wrong, so none is asked for. Errors are against SciPy's Radau at 1e-12 on the
reduced differential equations, kept in `reference_values.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import dae_peers, precision
from .dae_problems import DAE, DaeProblem, reduced
from .measure import Contention
from .precision import Calls, Row
from .report import digits
from .stiff_problems import spread

#: trajectories of a batch that are checked, and of those that a peer takes one by one
CHECKED, ONE_BY_ONE = 2, 20
OURS, COMPILED, IDAS, PEERS = "ours radau", "ours radau compiled", "CasADi idas adjoint", ("CasADi idas adjoint", "CasADi idas forward")


def reference(problem: DaeProblem, count: int) -> dict[str, np.ndarray]:
    """Of the first trajectories."""

    def make() -> dict[str, np.ndarray]:
        found = [reduced(problem, one) for one in spread(problem.p, CHECKED)[: min(count, CHECKED)]]
        return {name: np.array([one[name] for one in found]) for name in found[0]}

    return precision.stored(f"dae/{problem.name}" + ("-batch" if count > 1 else ""), make)


def solvers(problem: DaeProblem, p: np.ndarray, start: dict[str, np.ndarray]) -> dict[str, Callable[[float], Calls]]:
    """What suits the problem and is installed."""
    from adjoint.methods import DAE_METHODS

    most = ONE_BY_ONE if len(p) > 1 else 1
    table: dict[str, Callable[[float], Calls]] = {}

    def add(name: str, make: Callable[..., Calls], **rest: Any) -> None:
        table[name] = lambda tolerance: make(problem, p, tolerance, **rest)

    for method in ("radau", "bdf"):
        if method in DAE_METHODS:
            add(f"ours {method}", dae_peers.ours, method=method)
    if not problem.vector:
        # native code has dense matrices, and writes formulas out: larger systems run without it
        add(COMPILED, dae_peers.ours, method="radau", compile=True)
    if importlib.util.find_spec("casadi"):
        add("CasADi idas adjoint", dae_peers.casadi_idas, most=most, sensitivities="adjoint")
        add("CasADi idas forward", dae_peers.casadi_idas, most=most, sensitivities="forward")
    # these want consistent values, which depend on the parameters here
    if importlib.util.find_spec("sksundae") and (len(p) == 1 or not problem.vector):
        add("SUNDIALS IDA (Python)", dae_peers.sundials_ida, most=most, start=start)
    if importlib.util.find_spec("scipy_dae") and (len(p) == 1 or not problem.vector):
        for method in ("Radau", "BDF"):
            add(f"scipy-dae {method}", dae_peers.scipy_dae, method=method, most=most, start=start)
    if importlib.util.find_spec("torchdae") and len(p) == 1:
        add("torchdae Radau IIA", dae_peers.torchdae_radau, start=start)
    return table


def _of(rows: Sequence[Row], problem: str, count: int, solver: str) -> list[Row]:
    return [r for r in rows if (r.problem, r.count, r.solver) == (problem, count, solver)]


@dataclass(frozen=True)
class Compared:
    """At one error: ours, the peer's, and whether both tolerances were such that this was the error (else: it was less for one)."""

    error: float
    ours: float
    theirs: float
    equal: bool

    def text(self, scale: float, ratio: float) -> str:
        mark = "" if self.equal else " (*)"
        return f"{self.error:.0e}: {digits(self.ours * scale)} / {digits(self.theirs * scale)}, {ratio:.2g}{mark}"


def compare(rows: Sequence[Row], problem: str, count: int, peer: str, value: str, by: str, ours: str = OURS) -> list[Compared]:
    """At the powers of ten up to 1e-3 that both reach."""
    found = []
    own, theirs = (_of(rows, problem, count, name) for name in (ours, peer))
    for error in 10.0 ** np.arange(-3, -13, -1):
        a, b = (precision.at_equal_error(r, error, value, by, loosest=True) for r in (own, theirs))
        strict = [precision.at_equal_error(r, error, value, by) for r in (own, theirs)]
        if a is not None and b is not None:
            found.append(Compared(float(error), a, b, None not in strict))
    return found


def step_verdict(rows: Sequence[Row]) -> list[str]:
    """Forward steps of ours over those of IDAS at equal error, for every problem that was solved by both."""
    lines, worst = [], []
    for problem in dict.fromkeys(r.problem for r in rows if r.count == 1):
        found = compare(rows, problem, 1, IDAS, "steps", "error")
        worst += [c.ours / c.theirs for c in found]
        text = "; ".join(c.text(1, c.ours / c.theirs) for c in found)
        lines.append(f"- {problem}: error of the state: steps of ours / of IDAS, ratio: {text or 'no error that both reach'}")
    if worst:
        verdict = "met" if max(worst) <= 1.5 else "NOT met"
        lines.append(
            f"- **Steps of a single trajectory at most 1.5 times those of IDAS at equal error: {verdict}, largest ratio {max(worst):.2f}**"
        )
    return lines


def native_verdict(rows: Sequence[Row]) -> list[str]:
    """Time of native code against CasADi at equal error: forward by that of the state, with the gradient by that of the gradient."""
    lines = []
    for problem, count in dict.fromkeys((r.problem, r.count) for r in rows):
        for peer in PEERS:
            for value, by, label in (("forward_ms", "error", "forward"), ("gradient_ms", "gradient_error", "forward + gradient")):
                found = compare(rows, problem, count, peer, value, by, COMPILED)
                text = "; ".join(c.text(1e3 / count, c.theirs / c.ours) for c in found)
                if text:
                    lines.append(f"- {problem} x{count}, {label}, error: us a trajectory of native code / of {peer}, ratio: {text}")
    return lines


def batch_verdict(rows: Sequence[Row], problem: str = "robertson") -> list[str]:
    """Time of one gradient in a batch against CasADi one by one at equal error of the gradient."""
    lines = []
    for count in dict.fromkeys(r.count for r in rows if r.count > 1 and r.problem == problem):
        for peer in PEERS:
            found = compare(rows, problem, count, peer, "gradient_ms", "gradient_error")
            text = "; ".join(c.text(1e3 / count, c.theirs / c.ours) for c in found)
            lines.append(f"- {problem} x{count}: error of the gradient: us a trajectory of ours / of {peer}, ratio: {text or 'none'}")
            equal = [c.theirs / c.ours for c in found if c.equal]
            if equal:
                verdict = "met" if min(equal) >= 10 else "NOT met"
                bold = "**" if (problem, count) == ("robertson", 1000) else ""
                lines.append(
                    f"- {bold}{problem} x{count}: gradients at least 10 times faster than {peer} one by one at equal error: {verdict}, "
                    f"{min(equal):.1f} to {max(equal):.1f} times{bold}"
                )
    if lines:
        lines.append("- (*) one of the two was more accurate than this even at its loosest tolerance; not in the verdict")
    return lines


def main() -> None:
    """Run what was asked for and write the results."""
    parser = precision.options(__doc__, list(DAE))
    parser.add_argument("--count", type=int, nargs="*", default=[1], help="trajectories")
    # the loosest, so that there are errors that fifth order and IDAS both reach
    parser.set_defaults(tolerance=[1e-2, 1e-3, 1e-4, 1e-6, 1e-8, 1e-10])
    chosen = parser.parse_args()
    precision.fix_threads(chosen.threads)
    contention = Contention()
    rows = _run(chosen)
    verdicts = step_verdict(rows) if 1 in chosen.count else []
    for problem in chosen.problem:
        verdicts += batch_verdict(rows, problem)
    verdicts += native_verdict(rows)
    for line in verdicts:
        print(line)
    name = "dae" + ("-batches" if max(chosen.count) > 1 else "")
    name += "" if len(chosen.problem) == len(DAE) else "-" + "-".join(chosen.problem)
    head = [
        "# Differential-algebraic systems",
        "",
        "Medians; `x ours`: over ours at the same tolerance (compare at equal errors: below, and the figure). Absolute tolerances are "
        "rtol times what is small in the problem; errors are over |y| + small, largest component, and in the logarithms of the parameters "
        "(norm) for gradients of the squared norm of the differential variables at the end. SUNDIALS through scikit-sundae and scipy-dae: "
        "forward only, residual in Python. torchdae: constant steps. † measured on the first trajectories, one by one, and scaled. First "
        "call: with building.",
        "",
        *(f"- {problem.name}: {problem.text}" for problem in DAE.values() if any(r.problem == problem.name for r in rows)),
    ]
    precision.write(rows, head, verdicts, chosen.name or name, chosen, contention)


def _run(chosen: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for name in chosen.problem:
        problem = DAE[name]
        for count in chosen.count:
            p = spread(problem.p, count)
            truth = reference(problem, count)
            start = {key: truth[key][0] for key in ("y0", "yp0")}
            rows += precision.run(name, count, solvers(problem, p, start), truth, problem.small, p, chosen)
    return rows


if __name__ == "__main__":
    main()
