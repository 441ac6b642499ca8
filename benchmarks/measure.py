"""Timing, round robin over all runners, and peak memory."""

from __future__ import annotations

import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .peers import Runner

__all__ = ["Contention", "Measured", "Timing", "reason", "time_runners", "torch_peak_bytes"]

SHORTEST_SAMPLE = 0.02  # seconds: shorter calls are repeated within one sample
WHATS = ("forward", "gradient")


class Contention:
    """Share of the machine that other processes used since this object was made (Linux; elsewhere None).

    Worth a warning: on two busy cores, the spinning barriers of OpenMP were seen to slow a two-thread matrix product 40 times.
    """

    def __init__(self) -> None:
        self.start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        tick = os.sysconf("SC_CLK_TCK")
        own = os.times()
        idle = fields[3] + fields[4]
        return (sum(fields) - idle) / tick, sum(fields) / tick, sum(own[:4])

    def share(self) -> float | None:
        """Between 0 and 1, of all cores together."""
        now = self._read()
        if now is None or self.start is None or now[1] == self.start[1]:
            return None
        busy, total, own = (b - a for a, b in zip(self.start, now, strict=True))
        return max(0.0, (busy - own) / total)


@dataclass
class Timing:
    """Samples of one call, in seconds per call."""

    first: float  # the very first call: compilation, caches
    number: int = 1  # calls within one sample
    samples: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Median, minimum, quartiles, counts."""
        s = sorted(self.samples)
        quartiles = statistics.quantiles(s, n=4, method="inclusive") if len(s) > 1 else [s[0]] * 3
        return {
            "median": statistics.median(s),
            "min": s[0],
            "q1": quartiles[0],
            "q3": quartiles[2],
            "iqr": quartiles[2] - quartiles[0],
            "n": len(s),
            "number": self.number,
            "first": self.first,
        }


def reason(error: Exception) -> str:
    """An exception in one line: the innermost error that its text names, else its first line."""
    named = re.findall(r"^\S*Error: .*$", str(error), flags=re.MULTILINE)
    lines = str(error).strip().splitlines() or [""]
    return (named[-1] if named else f"{type(error).__name__}: {lines[0]}")[:300]


def _once(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _sample(call: Callable[[], Any], number: int) -> float:
    """Seconds per call over ``number`` calls, with the garbage collector out of the way (as `timeit` does)."""
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(number):
            call()
        return (time.perf_counter() - start) / number
    finally:
        gc.enable()


@dataclass
class Measured:
    """What `time_runners` found."""

    timings: dict[str, dict[str, Timing]]  # by runner, then "forward" or "gradient"
    failures: dict[str, dict[str, str]]  # likewise: why
    others: float | None = None  # see `Contention`


def time_runners(runners: Sequence[Runner], repeats: int, budget: float) -> Measured:
    """Time ``forward`` and ``gradient`` of every runner.

    Samples are taken round robin, from another runner first in each round, so that a noisy spell of the machine hits all alike. A call
    that would take more than ``budget`` seconds in all is repeated less often (but three times).
    """
    measured = Measured({}, {})
    timings, failures = measured.timings, measured.failures
    jobs: list[tuple[Runner, str, Timing, int]] = []
    for runner in runners:
        timings[runner.name], failures[runner.name] = {}, {}
        for what in WHATS:
            call = getattr(runner, what)
            try:
                timing = Timing(first=_once(call))
                warm = min(_once(call), _once(call)) if timing.first < budget else timing.first
            except Exception as error:
                failures[runner.name][what] = reason(error)
                continue
            timing.number = max(1, min(1000, int(SHORTEST_SAMPLE / max(warm, 1e-9))))
            timings[runner.name][what] = timing
            jobs.append((runner, what, timing, max(3, min(repeats, int(budget / (warm * timing.number))))))
    gc.collect()
    gc.freeze()  # what lives now need not be looked through between samples
    contention = Contention()
    for turn in range(max(repeats, 3)):
        for i in range(len(jobs)):
            runner, what, timing, wanted = jobs[(i + turn) % len(jobs)]
            if turn < wanted:
                timing.samples.append(_sample(getattr(runner, what), timing.number))
    measured.others = contention.share()
    gc.unfreeze()
    return measured


def torch_peak_bytes(call: Callable[[], Any], device: str) -> tuple[float, str]:
    """Peak of PyTorch's allocations during ``call``, above those alive before it, and the name of the method.

    CUDA: the caching allocator's own counter. CPU: the profiler's record of every allocation and release, summed in the order of time.
    """
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before), "CUDA allocator"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
        del result
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return float(peak), "profiler"
