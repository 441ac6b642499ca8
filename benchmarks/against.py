"""``python -m benchmarks.against PATH``: uncompiled solves of this checkout over those of the one at PATH.

Two processes, one for each checkout, hold the same case and are told in turn to run it. Every sample has as many calls as take 20 ms; times
are those of the process, not of the clock, so that others on the machine disturb less; one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_WHATS = ("forward", "gradient")


class Server:
    """A process that imports ``adjoint`` from a checkout, and the cases from here."""

    def __init__(self, checkout: Path) -> None:
        start = f"import sys; sys.path[:0] = [{str(checkout)!r}]; import adjoint; sys.path[0] = {str(ROOT)!r}; "
        command = [sys.executable, "-c", start + "from benchmarks.against import serve; serve()"]
        settings = os.environ | {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        settings.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings, cwd="/")

    def __call__(self, *request: Any) -> Any:
        pipe, answer = self._process.stdin, self._process.stdout
        assert pipe is not None and answer is not None
        print(json.dumps(request), file=pipe, flush=True)
        line = answer.readline()
        if not line:
            raise SystemExit("a process ended early: its error is above")
        return json.loads(line)


def serve() -> None:
    """Answer requests on standard input: ``["begin", case]``, ``[what, calls]``, the empty one ends."""
    import gc
    import time
    import warnings

    import torch

    from .against_cases import CASES

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out, sys.stdout = sys.stdout, sys.stderr
    work: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        if request[0] == "begin":
            torch.manual_seed(0)
            work = CASES[request[1]]()
            answer: Any = _counted(work)
            gc.collect()
            gc.freeze()  # what lives now need not be looked through before every sample
        else:
            what, calls = request
            call = getattr(work, what)
            gc.collect()
            gc.disable()
            start = time.process_time()
            for _ in range(calls):
                call()
            answer = (time.process_time() - start) / calls
            gc.enable()
        print(json.dumps(answer), file=out, flush=True)


def _counted(work: Any) -> dict[str, Any]:
    """Steps of the forward solve, and calls of the user's function of both."""
    found: dict[str, Any] = {}
    for what in _WHATS:
        count = 0

        def seen(frame: Any, event: str, _: Any) -> None:
            nonlocal count
            count += event == "call" and frame.f_code is work.rate

        getattr(work, what)()
        sys.setprofile(seen)
        done = getattr(work, what)()
        sys.setprofile(None)
        found[what] = count
        if what == "forward":
            found["steps"] = work.steps(done)
    return found


def compare(case: str, servers: list[Server], repeats: int, budget: float) -> dict[str, Any]:
    """Counts of both, and for forward and gradient the samples of both, in seconds; at most so many, and within a ``budget`` of seconds at
    least five."""
    row: dict[str, Any] = {"case": case, "counts": [server("begin", case) for server in servers]}
    for what in _WHATS:
        warm = max(server(what, 1) for server in servers)
        calls = max(1, round(0.02 / warm))
        samples: list[list[float]] = [[], []]
        for turn in range(max(5, min(repeats, round(budget / (2 * warm * calls))))):
            for which in (0, 1) if turn % 2 else (1, 0):
                samples[which].append(servers[which](what, calls))
        row[what] = samples
    return row


def line_of(row: dict[str, Any]) -> str:
    """One row of the table: ours first, then theirs."""
    cells = [row["case"]]
    for what in _WHATS:
        ours, theirs = row[what]
        ratio, least = statistics.median(ours) / statistics.median(theirs), min(ours) / min(theirs)
        cells.append(f"{1e3 * min(theirs):.3g} | {1e3 * min(ours):.3g} | {least:.2f} | {ratio:.2f}")
    for name in ("steps", *_WHATS):
        mine, other = (counts[name] for counts in row["counts"])
        cells.append("" if mine is None else f"{other:g}" if mine == other else f"{other:g} → {mine:g}")
    return "| " + " | ".join(cells) + " |"


_COLUMNS = ("then, ms", "now", "ratio", "of medians")
_NAMES = ("case", *_COLUMNS, *(f"gradient {name}" for name in _COLUMNS), "steps", "calls of `fun`", "with gradient")
HEAD = "| " + " | ".join(_NAMES) + " |\n|---|" + "---:|" * (len(_NAMES) - 1)


def main() -> None:
    """Run what was asked for and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.add_argument("path", type=Path, help="another checkout")
    parser.add_argument("--case", nargs="*", default=[""], help="those whose names contain one of these words")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for the repeats of one timing; five are made")
    parser.add_argument("--out", type=Path, help="a file for the table and what it was made on")
    chosen = parser.parse_args()
    from .against_cases import CASES
    from .measure import Contention
    from .report import environment

    contention, servers = Contention(), [Server(ROOT), Server(chosen.path.resolve())]
    lines = [HEAD]
    print(HEAD)
    for case in CASES:
        if any(word in case for word in chosen.case):
            lines.append(line_of(compare(case, servers, chosen.repeats, chosen.budget)))
            print(lines[-1], flush=True)
    if chosen.out is not None:
        env, others = environment("cpu", {}), contention.share()
        commits = [_commit(x) for x in (ROOT, chosen.path)]
        where = f"{env['cpu']}, {env['cores']} cores, one thread, torch {env['versions']['torch']}, {env['date'][:10]}"
        busy = "" if others is None else f"; other processes used {100 * others:.0f} % of the machine meanwhile"
        text = [
            f"# Uncompiled solves of {commits[0]} against {commits[1]}",
            "",
            f"{where}{busy}. Milliseconds of the process, the least of the samples; a ratio above one: slower now. See "
            "`benchmarks/against.py`.",
            "",
        ]
        chosen.out.write_text("\n".join([*text, *lines]) + "\n")


def _commit(checkout: Path) -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=checkout, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
