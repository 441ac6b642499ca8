"""``python -m tests.fuzz.hybrid --cases 100 --seed 0``: random solves with resets, doses, tables, integrals against chains of smooth ones.

The reference begins anew at every time at which anything happens, by a tight method of high order; events end it, and their times are
differentiated as ends of spans are. It shares the solves with what it judges, but none of the rounds, jumps and joints.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import adjoint
from adjoint import Doses, Event, Forcing, solve_dae, solve_ivp
from adjoint.errors import AdjointError

from .judge import Verdict, limited

__all__ = ["judge"]

TIGHT: dict[str, Any] = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-13}
SHARES = (0.0, 0.21, 0.5, 0.77, 1.0)
#: what values, first and second derivatives may be off by, in parts of what is largest
LIMITS = (3e-6, 1e-4, 1e-4)
#: second derivatives in times at which steps end are of one order less than steps: wider by methods of order two, or that begin with less
LOW = ("trbdf2", "bdf")
METHODS = {
    "ivp": ["tsit5", "dopri5", "dopri8", "verner7", "bosh3", "rodas5p", "kvaerno3", "radau5", "bdf", "auto", "abm", "trbdf2"],
    "mass": ["radau5", "rodas5p", "bdf"],
    "dae": ["radau", "bdf"],
}
#: fewer steps at the tolerance of the cases
CHEAP = ["tsit5", "dopri5", "dopri8", "verner7"]


@dataclass(frozen=True)
class Case:
    """What is solved, and how. ``rows``: 0 for one trajectory; ``mapped``: by `torch.vmap` in place of ``batched=True``."""

    seed: int
    n: int
    rows: int
    mapped: bool
    table: str
    captured: bool
    table_rows: bool
    dose: str
    dose_rows: bool
    event: str
    integral: bool
    ragged: bool
    door: str
    method: str
    compiled: bool
    gradient: str
    derivative: str
    output: str

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v not in ("", False, 0))


def draw(seed: int, cheap: bool = False) -> Case:
    r = random.Random(seed)
    rows = r.choice([0, 0, 0, 3])
    mapped = rows > 0 and r.random() < 0.3
    own = rows > 0 and not mapped
    event = r.choice(["", "reset", "reset", "terminal", "recorded"])
    door = r.choice(["ivp"] * (9 if cheap else 4) + ["mass", "dae"])
    output = r.choice(["end", "end", "samples", "dense", "times"])
    wanting = {"": ("times",), "terminal": ("times", "samples", "dense")}.get(event, ())
    output = "end" if output in wanting else output
    table = r.choice(["", "", "linear", "constant", "cubic"])
    gradient = r.choice(["", "", "", "swept", "checkpoints", "backprop", "forward", "interpolating"])
    return Case(
        seed=seed,
        n=r.choice([2, 2, 3]),
        rows=rows,
        mapped=mapped,
        table=table,
        captured=r.random() < 0.5,
        table_rows=own and r.random() < 0.3,
        dose=r.choice(["", "bolus", "bolus", "infusion", "lag", "both"]),
        dose_rows=own and r.random() < 0.5,
        event=event,
        integral=r.random() < 0.3,
        ragged=rows > 0 and r.random() < 0.5,
        door=door,
        method=r.choice(CHEAP if cheap and door == "ivp" else METHODS[door]),
        compiled=not cheap and r.random() < 0.2,
        gradient="" if table and gradient == "interpolating" else gradient,
        derivative=r.choice(["backward", "backward", "jvp", "twice"]),
        output="end" if mapped and output == "dense" else output,
    )


def parameters(case: Case) -> dict[str, Tensor]:
    """All that is differentiated."""
    g = torch.Generator().manual_seed(case.seed)

    def uniform(a: float, b: float, *shape: int) -> Tensor:
        return a + (b - a) * torch.rand(shape, generator=g)

    rows, n = (case.rows,) if case.rows else (), case.n
    p = {"k": uniform(0.4, 1.2, n), "W": uniform(-0.4, 0.4, n, n), "level": uniform(1.3, 1.6), "c": uniform(0.3, 0.5)}
    p |= {"y0": uniform(0.2, 1.0, *rows, n), "end": uniform(1.7, 2.6, *(rows if case.ragged else ()))}
    if case.table:
        shape = (4, *rows) if case.table_rows else (4,)
        knots = torch.linspace(0.3, 1.9, 4).reshape(4, *[1] * (len(shape) - 1))
        p |= {"knots": knots + uniform(-0.1, 0.1, *shape), "values": uniform(-0.5, 0.8, *shape)}
    if case.dose:
        shape = (2, *rows) if case.dose_rows else (2,)
        times = torch.tensor([0.45, 1.17]).reshape(2, *[1] * (len(shape) - 1))
        p |= {"times": times + uniform(-0.15, 0.15, *shape), "amounts": uniform(0.1, 0.4, *shape)}
        p |= {"lag": uniform(0.02, 0.06), "duration": uniform(0.13, 0.21)}
    return p


def slope(t: Tensor, y: Tensor, k: Tensor, W: Tensor, u: Any) -> Tensor:
    """The first variable grows, so that it crosses levels; the others relax, and it feels them."""
    first = 0.8 + 0.3 * torch.sin(2 * t) + 0.2 * torch.tanh(y[..., 1])
    rest = -k[1:] * y[..., 1:] + 0.3 * torch.tanh(y @ W.T)[..., 1:]
    if u is not None:
        first, rest = first + 0.1 * u, rest + u.unsqueeze(-1)
    return torch.cat([first.unsqueeze(-1), rest], -1)


def after(t: Tensor, y: Tensor, c: Tensor) -> Tensor:
    moved = y[..., 1:2] + 0.3 * torch.cos(t).unsqueeze(-1)
    return torch.cat([c * y[..., :1] + 0.05 * y[..., 1:2], moved, y[..., 2:]], -1)


STRATEGIES: dict[str, Any] = {
    "swept": adjoint.DiscreteAdjoint(keep_bytes=0),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=4),
    "backprop": adjoint.Backprop(),
    "forward": adjoint.ForwardSensitivity(),
    "interpolating": adjoint.InterpolatingAdjoint(),
}


def happenings(case: Case, p: dict[str, Tensor]) -> list[Any]:
    """``events=`` of the case."""
    events: list[Any] = []
    if case.dose in ("infusion", "both"):
        events.append(Doses(p["times"], p["amounts"], 1, duration=p["duration"], name="drip"))
    if case.dose in ("bolus", "lag", "both"):
        times = p["times"] + 0.01 if case.dose == "both" else p["times"]
        events.append(Doses(times, p["amounts"], 1, lag=p["lag"] if case.dose == "lag" else 0.0))
    level = p["level"] + 0.5 if case.event == "terminal" else p["level"]
    keys: dict[str, Any] = {"direction": 1, "name": "event", "terminal": case.event == "terminal"}
    if case.event == "reset":
        keys["reset"] = lambda t, y, *args: after(t, y, p["c"])
    return [*events, Event(lambda t, y, *args: y[..., 0] - level, **keys)] if case.event else events


def solved(case: Case, p: dict[str, Tensor], tol: float = 1e-8) -> list[Tensor]:
    table = Forcing(p["knots"], p["values"], case.table) if case.table else None
    args = (p["k"], p["W"]) if case.captured or table is None else (p["k"], p["W"], table)

    def fun(t: Tensor, y: Tensor, k: Tensor, W: Tensor, given: Any = table) -> Tensor:
        return slope(t, y, k, W, None if given is None else given(t))

    batched = bool(case.rows) and not case.mapped
    keys: dict[str, Any] = {"rtol": tol, "atol": tol / 100, "max_steps": 20_000, "method": case.method, "batched": batched}
    keys |= {"gradient": STRATEGIES.get(case.gradient), "events": happenings(case, p) or None, "dense_output": case.output == "dense"}
    if case.integral:
        keys["quadrature"] = lambda t, y, *args: (y**2).sum(-1)
    if case.compiled:
        keys["compile"] = True
    end = p["end"]
    if case.output == "samples":
        shares = torch.tensor(SHARES)
        keys["t_eval"] = shares.unsqueeze(-1) * end if end.dim() and batched else shares * end
    if case.door == "dae":
        sol = solve_dae(lambda t, y, yp, *args: yp - fun(t, y, *args), (0.0, end), p["y0"], None, args, **keys)
    else:
        mass = {"mass_matrix": torch.eye(case.n)} if case.door == "mass" else {}
        sol = solve_ivp(fun, (0.0, end), p["y0"], args, **mass, **keys)
    out = [sol.y if case.output == "samples" else sol.y[-1]]
    if case.output == "dense":
        at = 0.4 * end
        out.append(sol(at.unsqueeze(0))[0] if at.dim() else sol(at))
    if case.integral:
        out.append(sol.quadrature)
    if case.output == "times":
        # in their order, each with a weight of its own
        t = sol.events["event"].t
        weights = (1 + 0.3 * torch.arange(t.shape[0])).reshape(-1, *[1] * (t.dim() - 1))
        out.append((torch.where(t.isnan(), 0.0, t) * weights).sum(0))
    return out


class Chain:
    """The reference for one trajectory: smooth solves, one after the other, of the state and the integral of its square."""

    def __init__(self, case: Case, p: dict[str, Tensor], row: int | None) -> None:
        self.case, self.p = case, p
        own = {"y0": 1, "end": 0, "knots": 1, "values": 1, "times": 1, "amounts": 1}
        self.q = {k: p[k] if row is None or p[k].dim() == dim else p[k][..., row] for k, dim in own.items() if k in p and k != "y0"}
        self.z = torch.cat([p["y0"] if row is None else p["y0"][row], torch.zeros(1)])
        self.t, self.rate, self.place = torch.zeros(()), torch.zeros(()), -1
        self.found: list[Tensor] = []
        self.over = False

    def input(self, place: int) -> Callable[[Tensor], Tensor] | None:
        """The table within one of its pieces, by the textbook's formula; splines are those of the package."""
        if not self.case.table:
            return None
        knots, values = self.q["knots"], self.q["values"]
        if self.case.table == "cubic":
            return Forcing(knots, values, "cubic")
        if self.case.table == "constant" or not 0 <= place < len(knots) - 1:
            return lambda t: values[max(place, 0)] + 0 * t
        gap = knots[place + 1] - knots[place]
        return lambda t: values[place] + (values[place + 1] - values[place]) * (t - knots[place]) / gap

    def to(self, end: Tensor) -> None:
        """Go on to a time, over the events in between."""
        case, p, u = self.case, self.p, self.input(self.place)

        def fun(t: Tensor, z: Tensor, k: Tensor, W: Tensor, rate: Tensor) -> Tensor:
            d = slope(t, z[:-1], k, W, None if u is None else u(t))
            return torch.cat([d[:1], d[1:2] + rate, d[2:], (z[:-1] ** 2).sum().reshape(1)])

        level = p["level"] + 0.5 if case.event == "terminal" else p["level"]
        ends = case.event != "recorded"
        event = Event(lambda t, z, *args: z[0] - level, direction=1, terminal=ends, name="event") if case.event else None
        while not self.over and float(end.detach() - self.t.detach()) > 1e-13:
            sol = solve_ivp(fun, (self.t, end), self.z, (p["k"], p["W"], self.rate + 0.0), events=event, **TIGHT)
            times = sol.events["event"].t if event is not None else self.z[:0]
            self.found.extend(times)
            if not len(times) or case.event == "recorded":
                self.t, self.z = end, sol.y[-1]
                continue
            self.t, self.z = times[0], sol.events["event"].y[0]
            self.over = case.event == "terminal"
            if not self.over:
                self.z = torch.cat([after(self.t, self.z[:-1], p["c"]), self.z[-1:]])

    def happen(self, kind: str, amount: Any) -> None:
        if kind == "knot":
            self.place += 1
        elif kind == "rate":
            self.rate = self.rate + amount
        elif not self.over:
            self.z = torch.cat([self.z[:1], self.z[1:2] + amount, self.z[2:]])

    def acts(self) -> list[tuple[Tensor, str, Any]]:
        """What happens when, beside events."""
        q, p, dose = self.q, self.p, self.case.dose
        acts: list[tuple[Tensor, str, Any]] = [(t, "knot", None) for t in q["knots"]] if self.case.table else []
        pairs = list(zip(q["times"], q["amounts"], strict=True)) if dose else []
        if dose in ("infusion", "both"):
            for t, a in pairs:
                acts += [(t, "rate", a / p["duration"]), (t + p["duration"], "rate", -a / p["duration"])]
        shift = {"bolus": 0.0, "both": 0.01, "lag": p.get("lag")}.get(dose)
        return acts if shift is None else acts + [(t + shift, "bolus", a) for t, a in pairs]

    def run(self, shares: tuple[float, ...]) -> list[Tensor]:
        """The states at parts of the span."""
        end = self.q["end"]
        out = [self.z[:-1]] * len(shares)
        wanted = [(share * end, "sample", i) for i, share in enumerate(shares)]
        acts = [a for a in self.acts() if float(a[0].detach()) < float(end.detach())]
        every: list[tuple[Tensor, str, Any]] = [*acts, *wanted]
        for t, kind, what in sorted(every, key=lambda a: (float(a[0].detach()), a[1] != "sample")):
            self.to(t)
            if kind == "sample":
                out[what] = self.z[:-1]
            else:
                self.happen(kind, what)
        return out


def chained(case: Case, p: dict[str, Tensor]) -> list[Tensor]:
    """What `solved` gives, by chains."""
    chains = [Chain(case, p, row) for row in (range(case.rows) if case.rows else [None])]
    shares = SHARES if case.output == "samples" else (0.4, 1.0) if case.output == "dense" else (1.0,)
    states = [chain.run(shares) for chain in chains]

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if case.rows else parts[0]

    if case.output == "samples":
        out = [torch.stack([joined([s[i] for s in states]) for i in range(len(shares))])]
    else:
        out = [joined([s[-1] for s in states])]
    if case.output == "dense":
        out.append(joined([s[0] for s in states]))
    if case.integral:
        out.append(joined([chain.z[-1] for chain in chains]))
    if case.output == "times":
        out.append(joined([sum((t * (1 + 0.3 * i) for i, t in enumerate(c.found)), torch.zeros(())) for c in chains]))
    return out


def objective(case: Case, p: dict[str, Tensor], chain: bool) -> Tensor:
    if chain or not case.mapped:
        out = (chained if chain else solved)(case, p)
    else:
        rows = [name for name in ("y0", "end") if name == "y0" or case.ragged]
        out = list(torch.vmap(lambda *x: tuple(solved(case, p | dict(zip(rows, x, strict=True)))))(*(p[name] for name in rows)))
        out[0] = out[0].movedim(0, 1) if case.output == "samples" else out[0]
    return sum((x * torch.sin(1.0 + torch.arange(x.numel())).reshape(x.shape)).sum() for x in out)  # type: ignore[return-value]


def derivatives(case: Case, p: dict[str, Tensor], chain: bool) -> tuple[Tensor, list[Tensor]]:
    """The objective, and what the case differentiates: each gradient, and second derivatives along one direction."""
    g = torch.Generator().manual_seed(1)
    dots = [torch.randn(x.shape, generator=g) for x in p.values()]

    def value(*x: Tensor) -> Tensor:
        return objective(case, dict(zip(p, x, strict=True)), chain)

    if case.derivative == "jvp" and not chain:
        out, dot = torch.func.jvp(value, tuple(p.values()), tuple(dots))
        return out, [dot]
    x = [v.clone().requires_grad_() for v in p.values()]
    out, twice = value(*x), case.derivative == "twice"
    first = list(torch.autograd.grad(out, x, create_graph=twice, materialize_grads=True))
    along = sum((a * b).sum() for a, b in zip(first, dots, strict=True))
    if case.derivative == "jvp":
        return out, [along]  # type: ignore[list-item]
    return out, first + (list(torch.autograd.grad(along, x, materialize_grads=True)) if twice else [])  # type: ignore[arg-type]


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


def judge(seed: int, cheap: bool = False) -> Verdict:
    case, start = draw(seed, cheap), time.process_time()

    def verdict(outcome: str, kind: str = "", detail: str = "") -> Verdict:
        return Verdict(seed, outcome, kind, detail, time.process_time() - start, str(case))

    try:
        with in_double(), limited(60.0):
            p = parameters(case)
            found, slopes = derivatives(case, p, chain=False)
            wanted, truths = derivatives(case, p, chain=True)
    except TimeoutError as error:
        return verdict("slow", str(error))
    except AdjointError as error:
        return verdict("refused", f"{type(error).__name__}: {str(error)[:90]}")
    except Exception as error:
        return verdict("failed", f"{type(error).__name__}: {str(error)[:200]}")
    size = 1e-3 + max(float(x.detach().abs().max()) for x in truths)
    off = [float((a - b).detach().abs().max()) / size for a, b in zip(slopes, truths, strict=True)]
    value = abs(float(found.detach() - wanted.detach())) / (1 + abs(float(wanted.detach())))
    first, second = max(off[: len(p)]), max(off[len(p) :], default=0.0)
    right = value < LIMITS[0] and first < LIMITS[1] and second < LIMITS[2] * (100 if case.method in LOW else 1)
    return verdict("right" if right else "failed", "" if right else "wrong", f"value {value:.0e}, first {first:.0e}, second {second:.0e}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.hybrid", description="Random solves with resets, doses, tables, integrals.")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="the first seed; cases take one each")
    parser.add_argument("--cheap", action="store_true", help="the cases of the test suite")
    options = parser.parse_args()
    count: dict[str, int] = {}
    for seed in range(options.seed, options.seed + options.cases):
        v = judge(seed, options.cheap)
        count[v.outcome] = count.get(v.outcome, 0) + 1
        if v.outcome != "right":
            print(f"{v.seed} {v.outcome}: {v.kind} {v.detail} | {v.summary}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())))
    return int("failed" in count)


if __name__ == "__main__":
    sys.exit(main())
