"""``python -m tests.fuzz --cases 1000 --seed 0 --jobs 2``; ``--show SEED`` prints the program of one case."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .judge import Verdict, judge, script
from .log import logged, note


def verdicts(seeds: Iterable[int], jobs: int, compiled: float, cheap: bool | None) -> Iterator[Verdict]:
    work = functools.partial(judge, compiled=compiled, cheap=cheap)
    if jobs == 1:
        yield from map(work, seeds)
        return
    # fresh processes now and then: what compiling and tracing keep does not pile up
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=40) as pool:
        yield from pool.imap_unordered(work, seeds, chunksize=10)


def report(found: list[Verdict], seconds: float) -> str:
    """Counts, then failures, loose results and refusals by kind."""
    count = Counter(v.outcome for v in found)
    used = sum(v.seconds for v in found)
    lines = [f"{len(found)} cases in {seconds:.0f} s ({used:.0f} s CPU): " + ", ".join(f"{n} {name}" for name, n in count.most_common())]
    for outcome in ("failed", "slow", "loose", "refused", "unsharp"):
        kinds: dict[str, list[Verdict]] = defaultdict(list)
        for v in found:
            if v.outcome == outcome:
                kinds[v.kind].append(v)
        for kind, members in sorted(kinds.items(), key=lambda x: -len(x[1])):
            seeds = ", ".join(str(v.seed) for v in sorted(members, key=lambda v: v.seed)[:6])
            lines.append(f"  {outcome} {len(members):4d}  {kind}  [{seeds}]")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Random solves against an independent reference.")
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; cases take one each")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--compiled", type=float, default=0.0, help="share of cases that are compiled, which takes seconds each")
    parser.add_argument(
        "--cheap", action="store_true", default=None, help="the cases of the test suite: short spans, loose tolerances, few rows"
    )
    parser.add_argument("--show", type=int, metavar="SEED", help="print the program of one case, and stop")
    parser.add_argument("--out", type=Path, default=Path("fuzz_failures"), help="where the programs of failures go")
    parser.add_argument("--log", type=Path, help="gets a line of JSON for each case; a run that was interrupted goes on from it")
    options = parser.parse_args()
    if options.show is not None:
        print(script(options.show, options.compiled, options.cheap))
        return 0
    seeds, start = range(options.seed, options.seed + options.cases), time.perf_counter()
    found = [v for seed, v in logged(options.log).items() if seed in seeds]
    known = {v.seed for v in found}
    for v in verdicts([seed for seed in seeds if seed not in known], options.jobs, options.compiled, options.cheap):
        found.append(v)
        note(options.log, v)
        if v.outcome in ("failed", "slow"):
            options.out.mkdir(exist_ok=True)
            (options.out / f"case_{v.seed}.py").write_text(script(v.seed, options.compiled, options.cheap))
            print(f"seed {v.seed}: {v.kind}\n    {v.summary}\n    {v.detail[:600]}\n    {options.out}/case_{v.seed}.py", flush=True)
        if len(found) % 500 == 0:
            print(f"-- {len(found)} cases, {time.perf_counter() - start:.0f} s", flush=True)
    print(report(found, time.perf_counter() - start))
    return int(any(v.outcome == "failed" for v in found))


if __name__ == "__main__":
    sys.exit(main())
