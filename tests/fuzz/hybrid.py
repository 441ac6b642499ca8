"""``python -m tests.fuzz.hybrid --cases 100 --seed 0``: random solves with resets, doses, tables, integrals against chains of smooth ones.

The reference begins anew at every time at which anything happens, by a tight method of high order; events end it, and their times are
differentiated as ends of spans are. It shares the solves with what it judges, but none of the rounds, jumps and joints.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

import adjoint
from adjoint.errors import AdjointError

from .hybrid_case import Case, draw, limits, parameters
from .hybrid_chain import chained
from .hybrid_solve import solved
from .hybrid_ties import tied, wider
from .judge import Verdict, limited, place
from .log import logged, note

__all__ = ["judge"]

#: differentiated twice with each other where all second derivatives are wanted
SCALARS = ("c", "level", "end", "begin", "s", "clock", "duration", "lag", "mark", "times", "amounts", "marks")


def looked_at(case: Case, p: dict[str, Tensor], chain: bool) -> list[Tensor]:
    """What a case looks at, trajectories first where there are any."""
    if case.door in ("odeint", "odeint_event") and "knots" in p:
        # jump_t, which it ends its steps at, are no inputs
        p = p | {"knots": p["knots"].detach()}
    if chain or not case.mapped:
        out = (chained if chain else solved)(case, p)
    else:
        out = list(torch.vmap(lambda *x: tuple(solved(case, dict(zip(p, x, strict=True)))), in_dims=mapped(case, p))(*p.values()))
    if case.root:
        # where something comes to rest that is driven by the last state
        force = out[0] if out[0].dim() <= 2 else out[0][:, -1]
        batched = case.rows > 0
        found = adjoint.solve_root(lambda x, f: x + 0.3 * torch.tanh(x) - f, torch.zeros_like(force), args=(force,), batched=batched).x
        out = [*out, found]
    return out


def mapped(case: Case, p: dict[str, Tensor]) -> tuple[int | None, ...]:
    """The dimension of each parameter that is that of the trajectories."""
    first = {"y0": not case.shared, "k": case.rate_rows, "end": case.ragged, "begin": case.begins, "level": case.acts, "c": case.acts}
    last = {"knots": case.table_rows, "values": case.table_rows, "times": case.dose_rows, "amounts": case.dose_rows}
    last |= {"marks": case.ragged, "duration": case.spread, "lag": case.spread}
    return tuple(0 if first.get(name) else -1 if last.get(name) else None for name in p)


def objective(case: Case, p: dict[str, Tensor], chain: bool) -> Tensor:
    """A sum with weights of all that is a number, and of what is none."""
    total = sum((0 * (x**2).sum() for x in p.values()), torch.zeros(()))
    for x in looked_at(case, p, chain):
        x = x if case.rows else x.unsqueeze(0)
        x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(-1)
        weights = torch.sin(1.0 + torch.arange(x.shape[1])) * (1 + 0.2 * torch.arange(x.shape[0]).unsqueeze(-1))
        there = torch.isfinite(x.detach())
        total = total + (torch.where(there, x, 0.0) * weights).sum() + 0.01 * (~there).sum()
    return total


def derivatives(case: Case, p: dict[str, Tensor], chain: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The objective, and what the case differentiates: first and second derivatives."""
    g = torch.Generator().manual_seed(1)
    dots = [torch.randn(x.shape, generator=g) for x in p.values()]
    values, kind = tuple(p.values()), case.derivative

    def value(*x: Tensor) -> Tensor:
        return objective(case, dict(zip(p, x, strict=True)), chain)

    def along(x: list[Any]) -> Tensor:
        return sum(((a * b).sum() for a, b in zip(x, dots, strict=True)), torch.zeros(()))

    if kind == "hessian":
        there = [name for name in SCALARS if name in p]
        names = random.Random(case.scalars).sample(there, 2)
        sizes = [p[name].numel() for name in names]

        def some(x: Tensor) -> Tensor:
            parts = {name: part.reshape(p[name].shape) for name, part in zip(names, x.split(sizes), strict=True)}
            return objective(case, p | parts, chain)

        x = torch.cat([p[name].reshape(-1) for name in names])
        if chain:
            return value(*values), [], [torch.autograd.functional.hessian(some, x)]
        return value(*values), [], [torch.func.hessian(some)(x)]
    if not chain and case.inside:
        return inside(case, p, dots)
    if not chain:
        found = transformed(kind, value, values, tuple(dots), lambda x: along(list(x)))
        if found is not None:
            return found
    x = [v.clone().requires_grad_() for v in values]
    twice = kind in ("twice", "hvp", "over forward")
    out = value(*x)
    first = list(torch.autograd.grad(out, x, create_graph=twice, materialize_grads=True))
    second = list(torch.autograd.grad(along(first), x, materialize_grads=True)) if twice else []
    if kind in ("jvp", "dual"):
        first = [along(first)]
    return out, [] if kind in ("hvp", "over forward") else first, second


def inside(case: Case, p: dict[str, Tensor], dots: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Derivatives of each trajectory, taken inside of the map."""
    dims, weights = mapped(case, p), 1 + 0.2 * torch.arange(case.rows)
    alone = replace(case, rows=0, mapped=False)
    kind = "jvp" if case.derivative == "dual" else case.derivative

    def each(weight: Tensor, x: tuple[Tensor, ...], dots: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
        every = tuple(range(len(x)))

        def value(*x: Tensor) -> Tensor:
            return weight * objective(alone, dict(zip(p, x, strict=True)), False)

        def along(x: tuple[Tensor, ...]) -> Tensor:
            return sum(((a * b).sum() for a, b in zip(x, dots, strict=True)), torch.zeros(()))

        found = transformed(kind, value, x, dots, along)
        if found is not None:
            return found[1:]
        first = torch.func.grad(value, argnums=every)
        return list(first(*x)), list(torch.func.grad(lambda *x: along(first(*x)), argnums=every)(*x)) if kind == "twice" else []

    def joined(parts: list[Tensor]) -> list[Tensor]:
        whole = dims if len(parts) == len(dims) else (None,) * len(parts)
        return [x.sum(0) if dim is None else x.movedim(0, dim) for x, dim in zip(parts, whole, strict=True)]

    first, second = torch.vmap(each, in_dims=(0, dims, dims))(weights, tuple(p.values()), tuple(dots))
    return objective(case, p, False), joined(first), joined(second)


def transformed(
    kind: str, value: Callable[..., Tensor], x: tuple[Tensor, ...], dots: tuple[Tensor, ...], along: Callable[..., Tensor]
) -> tuple[Tensor, list[Tensor], list[Tensor]] | None:
    """By transforms of functions and forward mode; None for reverse mode."""
    every = tuple(range(len(x)))
    if kind == "jvp":
        out, dot = torch.func.jvp(value, x, dots)
        return out, [dot], []
    if kind == "dual":
        with forward_ad.dual_level():
            out, dot = forward_ad.unpack_dual(value(*(forward_ad.make_dual(a, b) for a, b in zip(x, dots, strict=True))))
        return out, [torch.zeros(()) if dot is None else dot], []
    if kind == "hvp":
        _, second = torch.func.jvp(torch.func.grad(value, argnums=every), x, dots)
        return value(*x), [], list(second)
    if kind == "over forward":
        second = torch.func.grad(lambda *x: torch.func.jvp(value, x, dots)[1], argnums=every)(*x)
        return value(*x), [], list(second)
    if kind == "jacrev":
        both = torch.func.jacrev(lambda *x: value(*x).expand(2), argnums=every)(*x)
        return value(*x), [b[1] for b in both], []
    if kind == "jacfwd":
        return value(*x), list(torch.func.jacfwd(value, argnums=every)(*x)), []
    return None


@contextmanager
def in_double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


def judge(seed: int, cheap: bool = False, compiled: float | None = None) -> Verdict:
    case, start = wider(draw(seed, cheap), cheap, compiled), time.process_time()

    def verdict(outcome: str, kind: str = "", detail: str = "") -> Verdict:
        return Verdict(seed, outcome, kind, detail, time.process_time() - start, str(case))

    try:
        with in_double(), limited(30.0):
            p = tied(case, parameters(case))
            found, *slopes = derivatives(case, p, chain=False)
    except TimeoutError as error:
        return verdict("slow", str(error))
    except AdjointError as error:
        return verdict("refused", f"{type(error).__name__}: {str(error)[:150]}")
    except Exception as error:
        return verdict("failed", f"raised {type(error).__name__}", place(error))
    try:
        with in_double(), limited(30.0):
            wanted, *truths = derivatives(case, p, chain=True)
    except Exception as error:
        return verdict("broken", "".join(traceback.format_exception(error))[-600:])
    off = [abs(float((found - wanted).detach())) / (1 + abs(float(wanted.detach())))]
    # first derivatives belong to the size of second ones
    size = 1e-3
    for mine, right in zip(slopes, truths, strict=True):
        size = max([size, *(float(x.detach().abs().max()) for x in right)])
        each = [float((a.double() - b).detach().abs().max()) / size for a, b in zip(mine, right, strict=True)]
        off.append(max(each, default=0.0) if all(e == e for e in each) else float("inf"))
    right = all(a < b for a, b in zip(off, limits(case), strict=True))
    return verdict("right" if right else "failed", "" if right else "wrong", "value {:.0e}, first {:.0e}, second {:.0e}".format(*off))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.hybrid", description="Random solves with resets, doses, tables, integrals.")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; cases take one each")
    parser.add_argument("--cheap", action="store_true", help="the cases of the test suite")
    parser.add_argument("--compiled", type=float, help="the share of cases that are compiled, of those that can be")
    parser.add_argument("--log", type=Path, help="gets a line of JSON for each case; a run that was interrupted goes on from it")
    options = parser.parse_args()
    count: dict[str, int] = {}
    known = logged(options.log)
    for seed in range(options.seed, options.seed + options.cases):
        v = known.get(seed)
        if v is None:
            v = judge(seed, options.cheap, options.compiled)
            note(options.log, v)
        count[v.outcome] = count.get(v.outcome, 0) + 1
        if v.outcome != "right":
            print(f"{v.seed} {v.outcome} ({v.seconds:.0f} s): {v.kind} {v.detail} | {v.summary}", flush=True)
    print(f"{time.process_time():.0f} s of CPU time")
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())))
    return int("failed" in count)


if __name__ == "__main__":
    sys.exit(main())
