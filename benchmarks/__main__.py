"""``python -m benchmarks``: every workload against every installed peer, in one process."""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from .measure import Measured
    from .peers import Runner
    from .references import Reference
    from .workloads import Case


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cases, three repeats")
    parser.add_argument("--workload", action="append", default=[], metavar="NAME", help="a case or a group of cases (repeatable)")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME", help="ours, torchdiffeq, torchode, diffrax, heyoka, floor")
    parser.add_argument("--repeats", type=int, help="samples of each timing (default 15; 3 with --quick)")
    parser.add_argument("--budget", type=float, default=30.0, metavar="SECONDS", help="at most, for each timing")
    parser.add_argument("--threads", type=int, default=2, help="for every peer (default 2)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    args.repeats = args.repeats or (3 if args.quick else 15)
    return args


def _set_up_process(threads: int, device: str) -> None:
    """What must be set before torch and jax are imported."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC", "PJRT_NPROC"):  # the last two: XLA's CPU pool
        os.environ[name] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_ENABLE_X64"] = "1"  # float32 cases keep their dtype: their data say so
    os.environ["ADJOINT_CACHE"] = tempfile.mkdtemp(prefix="adjoint-benchmarks-")  # first calls compile, whatever earlier runs left on disk
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("jax._src.callback").setLevel(logging.CRITICAL)  # failures are reported in one line each


def _build(case: Case, peers: dict[str, ModuleType], device: str) -> tuple[list[Runner], list[dict[str, Any]]]:
    from .measure import reason

    runners: list[Runner] = []
    failed: list[dict[str, Any]] = []
    for name, module in peers.items():
        try:
            runners += module.runners(case, device)
        except Exception as error:
            failed.append({"solver": name, "peer": name, "failures": {"all": reason(error)}})
    return runners, failed


def _memory(runner: Runner, what: str) -> dict[str, Any] | None:
    measured = runner.memory(what)
    return None if measured is None else {"bytes": measured[0], "how": measured[1]}


def _memory_only(runner: Runner) -> dict[str, Any]:
    from .measure import reason

    result: dict[str, Any] = {"solver": runner.name, "peer": runner.peer, "failures": {}}
    try:
        runner.gradient()  # warm
        result["memory"] = {"gradient": _memory(runner, "gradient")}
    except Exception as error:
        result["failures"]["gradient"] = reason(error)
    return result


def _checked(runner: Runner, measured: Measured, exact: Reference) -> dict[str, Any]:
    """Times, and (afterwards, untimed) counts, errors and memory of what worked."""
    from .measure import reason

    failures = measured.failures[runner.name]
    result: dict[str, Any] = {"solver": runner.name, "peer": runner.peer, "failures": failures, "memory": {}}
    for what, timing in measured.timings[runner.name].items():
        try:
            if what == "forward":
                result["error"] = exact.value_error(runner.values())
                result["stats"] = runner.stats().summary()
            else:
                result["gradient_error"] = exact.gradient_error(runner.gradients())
            result["memory"][what] = _memory(runner, what)
            result[what] = timing.summary()
        except Exception as error:
            failures[what] = reason(error)
    return result


def _describe(case: Case) -> str:
    shape = " x ".join(map(str, case.y0.shape))
    what = f"Batch of {case.size}"
    if case.ensemble:
        what = "One trajectory" if case.size == 1 else f"{case.size} independent trajectories"
    goal = "loss 0.5 |1 - u|^2 summed over the save points after the start"
    if case.target is not None:
        goal = "mean square loss over all save points"
    doc = (case.rhs.__doc__ or "").strip()
    times = f"t in [{case.t_eval[0]:g}, {case.t_eval[-1]:g}], {len(case.t_eval)} save points (start included)"
    return f"{doc} {what} (state {shape}, {case.y0.dtype}), {times}, dopri5, rtol {case.rtol:g}, atol {case.atol:g}; {goal}."


def run_case(case: Case, peers: dict[str, ModuleType], args: argparse.Namespace) -> dict[str, Any]:
    """All runners of one case: times, counts, errors, memory."""
    import torch

    from .measure import time_runners
    from .references import reference

    torch.compiler.reset()  # or traces of earlier cases would serve, and then exhaust their limit
    runners, results = _build(case, peers, args.device)
    out: dict[str, Any] = {"name": case.name, "workload": case.workload, "memory_only": case.memory_only}
    out |= {"description": _describe(case), "results": results}
    if case.memory_only:
        results += [_memory_only(r) for r in runners]
        return out
    exact = reference(case)
    out["description"] += f" Reference: {exact.how}."
    measured = time_runners(runners, args.repeats, args.budget)
    out["other_processes"] = measured.others
    results += [_checked(runner, measured, exact) for runner in runners]
    return out


def main() -> None:
    """Run, print as it goes, and write the report after every case."""
    args = _arguments()
    _set_up_process(args.threads, args.device)
    import torch

    torch.set_num_threads(args.threads)
    from .figure import draw
    from .peers import load
    from .report import environment, markdown, write
    from .workloads import select

    cases = select(args.workload, args.quick)
    peers, skipped = load(args.peer)
    for line in skipped:
        print(line)
    options = {k: v for k, v in vars(args).items() if k not in ("out", "threads", "device") and v}
    results: dict[str, Any] = {"environment": environment(args.device, options), "skipped": skipped, "cases": []}
    base = args.out
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] {case.name} ...", flush=True)
        results["cases"].append(run_case(case, peers, args))
        base = write(results, args.out)
    print()
    print(markdown(results))
    drawn = draw(results, Path(f"{base}.png"))
    print(f"written: {base}.md, {base}.json" + (f", {base}.png" if drawn else " (no figure: matplotlib is missing)"))


if __name__ == "__main__":
    main()
