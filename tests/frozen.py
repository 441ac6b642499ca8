"""A record of bits: what solves give, to the last digit, before a change and after it.

    python -m tests.frozen write before.json
    python -m tests.frozen compare before.json

Code that is moved, or written once in the place of twice, must not change a number: end states, times of steps, counters and gradients of
every method, alone and in a ragged batch, with and without events, and values and derivatives of a part of the cases of `test_forms`, are
compared exactly. Two machines, or two versions of PyTorch, need not agree: write and compare on one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adjoint import Backprop, DiscreteAdjoint, GaussAdjoint, SplitFunction, solve_dae, solve_ivp
from adjoint.methods import DAE_METHODS, IMEX_METHODS, METHODS, SWITCHING_METHODS

from .sensitivity import test_forms as forms

FORMS = ("one", "many", "event", "eventful")
STRATEGIES = {
    "backprop": Backprop(),
    "sweep": DiscreteAdjoint(keep_bytes=0),
    "checkpoints": DiscreteAdjoint(checkpoints=3),
    "gauss": GaussAdjoint(),
}
#: methods whose steps are met by every strategy
REPRESENTATIVES = ("tsit5", "rk4", "kvaerno5", "rodas5p", "radau5", "bdf", "abm")
#: what the loops must get right beside ordinary steps: ends of steps that are given, time that runs back, failures, events that count
EDGES = ("stops", "back", "nan", "few", "twice")
LOW_ORDER = ("adaptive_heun", "implicit_euler", "trapezoid", "sdirk2", "trbdf2", "radau3", "bosh3")


def solved(method: str, kind: str, form: str, gradient: Any = None, edge: str = "") -> list[Tensor]:
    """Of a stiff oscillator with a slow part: times, states, counters, events, and gradients in all that it depends on."""
    rows = form in ("many", "eventful")
    p = torch.tensor([0.7, 30.0], dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.3, 0.5], [0.2, -0.4, 0.1], [-1.0, 2.0, 0.3]], dtype=torch.float64)
    y0 = (y0 if rows else y0[0]).clone().requires_grad_()
    end = torch.tensor([1.0, 0.35, 1.7], dtype=torch.float64) if rows else torch.tensor(1.0, dtype=torch.float64)
    end.requires_grad_()

    def slow(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        force = torch.sin(t) + (torch.where(t > 0.3, torch.nan, 0.0) if edge == "nan" else 0.0)
        return torch.stack([p[0] * y[..., 1], -(y[..., 0] ** 3) + force, 0 * y[..., 0]], -1)

    def fast(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return torch.stack([0 * y[..., 0], -0.1 * y[..., 1], p[1] * (torch.cos(y[..., 0]) - y[..., 2])], -1)

    def residual(t: Tensor, y: Tensor, yp: Tensor, p: Tensor) -> Tensor:
        gap = yp - slow(t, y, p) - fast(t, y, p)
        return torch.cat([gap[..., :2], torch.cos(y[..., :1]) - y[..., 2:]], -1)

    def event(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return y[..., 0] - 0.21

    options: dict[str, Any] = {"method": method, "batched": rows, "t_eval": "steps", "gradient": gradient}
    options["rtol"], options["atol"] = (1e-2, 1e-3) if method in LOW_ORDER else (1e-4, 1e-6)
    if form in ("event", "eventful"):
        event.terminal = form == "event"  # type: ignore[attr-defined]
        options["events"] = event
        options["t_eval"] = None
    if kind == "fixed" or (kind == "split" and not IMEX_METHODS[method].adaptive):
        options["first_step"] = 0.02
    if gradient is STRATEGIES["checkpoints"]:
        options["t_eval"] = torch.tensor([0.0, 0.1, 0.21, 0.35])
    if edge:
        options |= {"t_eval": torch.tensor([0.0, 0.07, 0.1, 0.25, 0.33]), "step_ts": torch.tensor([0.1, 0.2, 0.3]), "throw": False}
    if edge == "few":
        options["max_steps"] = 4
    if edge == "twice":

        def turn(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
            return torch.sin(20 * t) - 0.3

        turn.terminal = 2  # type: ignore[attr-defined]
        options["events"] = [event, turn]
        if rows or kind == "dae":
            del options["step_ts"]
    if kind == "dae":
        y0 = torch.cat([y0[..., :2], torch.cos(y0[..., :1])], -1).detach().requires_grad_()
        sol = solve_dae(residual, (0.0, end), y0, args=(p,), **options)
    elif edge == "back":
        options["t_eval"] = None if rows else torch.tensor([1.0, 0.9, 0.5, 0.35])
        options["step_ts"] = torch.tensor([0.2, 0.1] if rows else [0.7, 0.4])
        sol = solve_ivp(lambda t, y, p: -slow(t, y, p), (end, 0.0), y0, (p,), **options)
    else:
        fun = SplitFunction(slow, fast) if kind == "split" else lambda t, y, p: slow(t, y, p) + fast(t, y, p)
        sol = solve_ivp(fun, (0.0, end), y0, (p,), **options)
    shown = torch.nan_to_num(sol.y)
    found = [torch.nan_to_num(x) for record in sol.events or () for x in (record.t, record.y)]
    loss, grads = sum(x.sin().sum() for x in (shown, *found)), ()
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, (y0, p, end), allow_unused=True, materialize_grads=True)
    counts = [torch.as_tensor(getattr(sol.stats, name)) for name in ("n_steps", "n_accepted", "n_rejected", "n_fun", "n_jac", "n_newton")]
    edges = [torch.as_tensor(sol.status)] if edge else []
    return [sol.t, shown, *found, *counts, *grads, *edges]


def plain(method: str, kind: str, form: str, edge: str) -> list[Tensor]:
    """As `solved`, of a solve of which nobody wants derivatives."""
    with torch.no_grad():
        return solved(method, kind, form, None, edge)


def cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    every = [(name, "ode" if m.adaptive else "fixed") for name, m in METHODS.items()]
    for kind, names in (("ode", SWITCHING_METHODS), ("dae", DAE_METHODS), ("split", IMEX_METHODS)):
        every += [(name, kind) for name in names]
    for (method, kind), form in product(every, FORMS):
        yield f"{kind}-{method}-{form}", partial(solved, method, kind, form)
    for method, form, name in product(REPRESENTATIVES, FORMS[:2], STRATEGIES):
        kind = "ode" if METHODS[method].adaptive else "fixed"
        yield f"{kind}-{method}-{form}-{name}", partial(solved, method, kind, form, STRATEGIES[name])
    for method, form, edge in product((*REPRESENTATIVES, "trapezoid", *SWITCHING_METHODS), FORMS[:2], EDGES):
        kind = "fixed" if method in METHODS and not METHODS[method].adaptive else "ode"
        yield f"{kind}-{method}-{form}-{edge}", partial(solved, method, kind, form, edge=edge)
        yield f"{kind}-{method}-{form}-{edge}-plain", partial(plain, method, kind, form, edge)
    for method, form, edge in product(DAE_METHODS, FORMS[:2], ("stops", "few", "twice")):
        yield f"dae-{method}-{form}-{edge}", partial(solved, method, "dae", form, edge=edge)
    for param in forms.cases():
        case = param.values[0]
        if not param.marks and not case.second_order:
            yield "forms-" + "-".join(case), partial(forms.derivatives, case, forms.solved)


def bits(make: Callable[[], Any]) -> list[str]:
    """Digests of tensors, each with its first number to be read; or the error."""
    try:
        found = make()
    except Exception as error:
        return [f"{type(error).__name__}: {str(error)[:120]}"]
    out = []
    for x in found:
        x = x.detach().contiguous()
        digest = hashlib.sha1(x.numpy().tobytes()).hexdigest()[:16]
        first = x.reshape(-1)[0].item() if x.numel() else None
        out.append(f"{digest} {tuple(x.shape)} {first}")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = {name: bits(make) for name, make in cases() if chosen.only in name}
    if chosen.do == "write":
        chosen.file.write_text(json.dumps(found, indent=0))
        print(f"{len(found)} cases written")
        return 0
    before = {name: value for name, value in json.loads(chosen.file.read_text()).items() if chosen.only in name}
    wrong = [name for name in sorted({*before, *found}) if before.get(name) != found.get(name)]
    for name in wrong:
        print(name)
        for a, b in zip(before.get(name, ["none"]), found.get(name, ["none"]), strict=False):
            if a != b:
                print("   ", a, "->", b)
    print(f"{len(found)} cases, {len(wrong)} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
