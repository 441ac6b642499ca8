"""Runs a case and says what became of it."""

from __future__ import annotations

import linecache
import math
import re
import signal
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from adjoint.errors import AdjointError, BacksolveDiverged, SolveError

from .case import Case
from .draw import draw
from .driver import with_driver
from .reference import SPACING, Truth, Unsharp, truth

__all__ = ["Verdict", "judge", "script"]

#: a case may take so long, in seconds of CPU time
LIMIT = 40.0

#: what a value, a first and a second derivative may be off by, in units of the tolerance times the sizes of what was added up,
#: and what the differences of the reference may be off by
FACTORS = (300.0, 3_000.0, 30_000.0)
FLOORS = (1e-9, 3e-7, 1e-4)
#: of methods without an error estimate, in terms of the order: their step is drawn so that this holds widely
FIXED = {1: 0.1, 2: 2e-2}
#: what is beyond must become smaller by this when the tolerance falls by a hundred, or the step to a quarter
SHRINKS = 3.0


@dataclass(frozen=True)
class Verdict:
    """``outcome``: "right", "loose" (wide of the tolerance, but converges), "refused", "unsharp", "slow" or "failed"."""

    seed: int
    outcome: str
    #: what failures and refusals are sorted by
    kind: str = ""
    detail: str = ""
    seconds: float = 0.0
    summary: str = ""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError(f"not finished within {seconds:g} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(case: Case) -> tuple[float | None, ...]:
    """Value, first and second derivative that the library gives."""
    text, name = with_driver(case), f"<case {case.seed}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    code, found = compile(text, name, "exec"), []
    try:
        # compiled code that is known already is come to by a shorter way
        for _ in range(1 + case.compiled):
            namespace: dict[str, Any] = {"__name__": "case"}
            exec(code, namespace)
            got = (namespace["value"], namespace["first"], namespace["second"])
            found.append(tuple(None if x is None else float(x.detach()) for x in got))
    finally:
        del linecache.cache[name]
    for first, last in zip(found[0], found[-1], strict=True):
        if first is not None and last is not None and math.isfinite(first) and not abs(first - last) <= 1e-9 * abs(first) + 1e-12:
            raise AssertionError(f"solved again it is {last} instead of {first}")
    return found[0]


def errors(got: tuple[float | None, ...], want: Truth) -> list[float]:
    pairs = zip(got, (want.value, want.first, want.second), strict=True)
    return [0.0 if x is None else (math.inf if not math.isfinite(x) else abs(x - y)) for x, y in pairs]


def allowances(case: Case, want: Truth) -> list[float]:
    """Of value, first and second derivative."""
    sizes = (want.size, want.first_size + 0.1 * want.size, want.second_size + want.first_size + 0.1 * want.size)
    if case.step is not None:
        from .draw import order_of

        return [FIXED.get(order_of(case.method), 5e-3) * x for x in sizes]
    noise = 100.0 if case.dtype == "float32" else 1.0
    return [(f * case.rtol + floor * noise) * x for f, floor, x in zip(FACTORS, FLOORS, sizes, strict=True)]


def refined(case: Case) -> Case:
    return replace(case, rtol=max(case.rtol * 1e-2, 1e-11), atol=case.atol * 1e-2, step=None if case.step is None else case.step / 4)


#: what derivatives of the same computed steps may differ by; iterations of implicit methods come beside
SAME = 1e-8

NAMES = ("value", "first derivative", "second derivative")


def difference(case: Case, want: Truth) -> tuple[str, str, str]:
    """Outcome, kind and detail of a case that runs."""
    got = run(case)
    off, allowed = errors(got, want), allowances(case, want)
    # differentiation sees nothing of a kink, where a second derivative has a jump that differences of the truth do see
    judged = 3 if case.equations.smooth else 2
    wrong = [i for i in range(judged) if not off[i] <= allowed[i]]
    if wrong:
        # differences have an error of their own, of the fourth power of their spacing: great where an event is grazed
        want = truth(case, SPACING / 5)
        off, allowed = errors(got, want), allowances(case, want)
        wrong = [i for i in range(judged) if not off[i] <= allowed[i]]
    if not wrong:
        return beside(case, got, want)
    i = wrong[0]
    numbers = f"{NAMES[i]} {got[i]} for {(want.value, want.first, want.second)[i]} (off by {off[i]:.2e}, allowed {allowed[i]:.2e})"
    if math.isfinite(off[i]):
        finer = run(refined(case))
        again = errors(finer, want)[i]
        numbers += f"; at a finer tolerance {finer[i]}"
        if again <= max(off[i] / SHRINKS, FLOORS[i] * 10 * want.size):
            return "loose", f"{NAMES[i]}: {case.method}", numbers
    return "failed", f"wrong {NAMES[i]}" if math.isfinite(off[i]) else f"not finite: {NAMES[i]}", numbers


def beside(case: Case, got: tuple[float | None, ...], want: Truth) -> tuple[str, str, str]:
    """Of a case that is right: whether the other strategy's first derivative, if there is one, is the same."""
    if not case.other or got[1] is None:
        return "right", "", ""
    try:
        other = run(replace(case, strategy=case.other, derivative="backward"))[1]
    except AdjointError:
        return "right", "", ""
    assert other is not None
    size = want.first_size + 0.1 * want.size
    allowed = (1e-3 if case.dtype == "float32" else SAME + 0.1 * case.rtol * (not case.equations.smooth or implicit(case))) * size
    if abs(got[1] - other) <= allowed:
        return "right", "", ""
    return "failed", "strategies differ", f"{got[1]} and {other} with {case.other} (allowed {allowed:.2e})"


def implicit(case: Case) -> bool:
    from .draw import ALL

    return ALL[case.method].implicit


def words(error: BaseException) -> str:
    """A message without its numbers, to sort by."""
    text = re.sub(r"[-+]?\d[\d_.]*(e[-+]?\d+)?", "#", str(error).strip().split("\n")[0])
    return f"{type(error).__name__}: {text[:110]}"


def judge(seed: int, compiled: float = 0.0, cheap: bool | None = None) -> Verdict:
    start = time.process_time()
    case = draw(seed, compiled, cheap)

    def verdict(outcome: str, kind: str = "", detail: str = "") -> Verdict:
        return Verdict(seed, outcome, kind, detail, time.process_time() - start, case.summary())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with limited(LIMIT):
                want = truth(case)
                return verdict(*difference(case, want))
        except Unsharp as error:
            return verdict("unsharp", str(error).split(":")[0])
        except BacksolveDiverged as error:
            # what that strategy does on stiff problems
            return verdict("refused", words(error), str(error))
        except SolveError as error:
            return verdict("failed", f"gave up, {words(error)}", str(error))
        except AdjointError as error:
            return verdict("refused", words(error), str(error))
        except TimeoutError as error:
            return verdict("slow", f"more than {LIMIT:g} s: {case.method}", place(error))
        except Exception as error:
            return verdict("failed", f"raised {words(error)}", place(error))


def place(error: BaseException) -> str:
    """Where it was raised: the last frames of the library."""
    frames = [
        f"{x.filename.rsplit('/adjoint/')[-1]}:{x.lineno} {x.name}"
        for x in traceback.extract_tb(error.__traceback__)
        if "/adjoint/" in x.filename
    ]
    return f"{type(error).__name__}: {str(error)[:300]} at {' < '.join(reversed(frames[-4:]))}"


def script(seed: int, compiled: float = 0.0, cheap: bool | None = None) -> str:
    """The program of a case, with what is right at its end."""
    case = draw(seed, compiled, cheap)
    text = f'"""Case {seed}: {case.summary()}."""\n' + with_driver(case)
    try:
        want: Any = truth(case)
    except Exception as error:
        return text + f'print("value", value, "first", first, "second", second)  # no reference: {error}\n'
    return text + (
        f'print("value            ", float(value), "for", {want.value})\n'
        f'print("first derivative ", first and float(first), "for", {want.first})\n'
        f'print("second derivative", second and float(second), "for", {want.second})\n'
    )


torch.set_num_threads(1)
