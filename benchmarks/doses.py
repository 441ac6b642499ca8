"""``python -m benchmarks.doses``: patients with schedules of their own, all in one compiled call against one after the other, uncompiled.

Two compartments with absorption; one to ten oral doses, two infusions, a lag time, 25 samples of the concentration. The gradient is that of
the sum of squares of the samples in the rate constants of every patient, the lag times, and the amounts and times of all doses. One by one
some of the patients are solved, spread over all, and their time is that of so many times more; answers are compared.

Once with a dose at the start for everybody, and once with patients who wait for their first dose: at rest, where derivatives ask for
shorter steps than the state (docs/theory.md, section 1).
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import adjoint
from adjoint import Doses

from .measure import Contention
from .report import write_paragraphs

HOURS = 48.0
_HEAD = """| method | | native, all at once, s | least | first call | uncompiled | one by one, ms each | s for all | times faster | apart |
|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"""
TOLERANCES = {"rtol": 1e-6, "atol": 1e-8}


def rates(t: Tensor, y: Tensor, ka: Tensor, k: Tensor, k12: Tensor, k21: Tensor) -> Tensor:
    """Gut, blood, tissue."""
    gut, blood, tissue = y.unbind(-1)
    return torch.stack([-ka * gut, ka * gut - (k + k12) * blood + k21 * tissue, k12 * blood - k21 * tissue], -1)


def population(count: int, waiting: bool) -> dict[str, Tensor]:
    """Tensors with the patients in their last dimension; ragged schedules are padded with NaN. ``waiting``: the first doses are later."""
    made = torch.Generator().manual_seed(0)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=made, dtype=torch.float64)  # noqa: E731
    doses = torch.randint(1, 11, (count,), generator=made)
    times = uniform(0.0, 40.0, 10, count).sort(0).values
    times[0] *= waiting
    return {
        "times": torch.where(torch.arange(10).unsqueeze(-1) < doses, times, math.nan),
        "amounts": uniform(50.0, 150.0, 10, count),
        "starts": uniform(0.0, 40.0, 2, count).sort(0).values,
        "infused": uniform(20.0, 60.0, 2, count),
        "duration": uniform(0.5, 4.0, 2, count),
        "lag": uniform(0.1, 0.6, count) * waiting,
        "constants": torch.stack([uniform(*ends, count) for ends in ((0.5, 1.5), (0.1, 0.3), (0.2, 0.6), (0.1, 0.3))]),
    }


def concentrations(given: dict[str, Tensor], native: bool, method: str) -> Tensor:
    """``(25, B)``, or ``(25,)`` of one patient."""
    batch = given["lag"].shape
    known = given["times"] if batch else given["times"][~given["times"].isnan()]
    amounts = given["amounts"] if batch else given["amounts"][: len(known)]
    events = [
        Doses(known, amounts, 0, lag=given["lag"], name="oral"),
        Doses(given["starts"], given["infused"], 1, duration=given["duration"], name="infusion"),
    ]
    y0 = torch.zeros(*batch, 3, dtype=torch.float64)
    times = torch.linspace(0.0, HOURS, 25, dtype=torch.float64)
    sol = adjoint.solve_ivp(
        rates,
        (0.0, HOURS),
        y0,
        tuple(given["constants"]),
        events=events,
        t_eval=times,
        batched=bool(batch),
        compile=native,
        method=method,
        **TOLERANCES,
    )
    return sol.y[..., 1]


def gradients(given: dict[str, Tensor], native: bool, method: str) -> dict[str, Tensor]:
    """Of the sum of squares, in everything."""
    leaves = {name: x.clone().requires_grad_() for name, x in given.items()}
    loss = (concentrations(leaves, native, method) ** 2).sum()
    found = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(leaves, found, strict=True))


def timed(call: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and least seconds."""
    spent = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        spent.append(time.perf_counter() - begun)
    return statistics.median(spent), min(spent)


def compared(every: dict[str, Tensor], args: argparse.Namespace, method: str, title: str) -> list[str]:
    """The lines of the table."""
    some = torch.linspace(0, args.patients - 1, args.alone).long()
    one = lambda i: {name: x[..., i] for name, x in every.items()}  # noqa: E731
    lines = []
    for what, call in (("solve", concentrations), ("solve and gradient", gradients)):
        begun = time.perf_counter()
        together = call(every, True, method)
        first = time.perf_counter() - begun
        median, least = timed(lambda call=call: call(every, True, method), args.repeats)
        eager, _ = timed(lambda call=call: call(every, False, method), 1)
        call(one(0), False, method)
        begun = time.perf_counter()
        alone = [call(one(int(i)), False, method) for i in some]
        each = (time.perf_counter() - begun) / len(some)
        wrong = 0.0
        for i, x in zip(some.tolist(), alone, strict=True):
            pairs = [(together[..., i], x)] if isinstance(together, Tensor) else [(together[name][..., i], x[name]) for name in x]
            wrong = max(wrong, *(float((a - b).nan_to_num().abs().max() / (1 + b.nan_to_num().abs().max())) for a, b in pairs))
        lines.append(
            f"| {method} | {what}{title} | {median:.3f} | {least:.3f} | {first:.1f} | {eager:.2f} | {1e3 * each:.0f} | "
            f"{each * args.patients:.0f} | {each * args.patients / median:.0f} | {wrong:.0e} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.doses", description=__doc__)
    parser.add_argument("--patients", type=int, default=1000)
    parser.add_argument("--alone", type=int, default=40, help="so many of them one by one")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    lines, contention = [], Contention()
    for method in ("tsit5", "rodas5p"):
        for waiting in (False, True):
            lines += compared(population(args.patients, waiting), args, method, ", waiting" if waiting else "")
    share = contention.share()
    cores = f"{os.cpu_count()} cores" + ("." if share is None else f", of which other processes used {100 * share:.0f} % meanwhile.")
    write_paragraphs(
        args.out,
        "doses",
        "# Patients with schedules of their own",
        f"{args.patients} patients, each with one to ten oral doses, two infusions and a lag time, and 25 samples over {HOURS:g} hours; "
        "rtol 1e-6, one thread. Gradients in all rate constants, lag times, and times and amounts of all doses. One by one: "
        f"{args.alone} of them, uncompiled, without `batched=True`; their time for all is in proportion. Waiting: first doses come later. "
        "See `benchmarks/doses.py`.",
        f"adjoint {adjoint.__version__}, torch {torch.__version__}, {cores}",
        "\n".join([_HEAD, *lines]),
    )


if __name__ == "__main__":
    main()
