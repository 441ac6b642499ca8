"""Cases of `tests.fuzz.hybrid`: what is solved and how, its equations, and what happens along them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ALGEBRAIC", "ENDED", "FAILS", "HIGH", "IMPLICIT", "SHARES", "Case", "Spec", "draw", "limits", "parameters", "slope", "specs"]

METHODS = {
    "ivp": ["tsit5", "dopri5", "dopri8", "verner7", "bosh3", "rodas5p", "kvaerno3", "kvaerno5", "radau5", "bdf", "auto", "abm", "trbdf2"],
    "split": ["kencarp4", "kencarp5", "kencarp3", "tsit5"],
    "mass": ["radau5", "rodas5p", "bdf"],
    "own mass": ["radau5", "radauIIA3", "bdf"],
    "singular": ["radau5", "rodas5p", "rodas4", "bdf"],
    "dae": ["radau", "bdf"],
    "algebraic": ["radau", "bdf"],
    "layer": ["tsit5", "dopri8", "rodas5p"],
    "odeint": ["dopri5", "tsit5", "dopri8"],
    "odeint_event": ["dopri5", "tsit5", "dopri8"],
}
#: fewer steps at the tolerance of the cases
CHEAP = ["tsit5", "dopri5", "dopri8", "verner7"]
#: doors of implicit equations, and those with an algebraic variable behind the state
IMPLICIT = ("mass", "own mass", "singular", "dae", "algebraic")
ALGEBRAIC = ("singular", "algebraic")
#: of the span, where samples are
SHARES = (0.0, 0.21, 0.5, 0.77, 1.0)
#: when the row that fails does
FAILS = 0.9
GRADIENTS = ["", "", "", "swept", "checkpoints", "backprop", "forward", "interpolating", "quadrature", "backsolve"]
DERIVATIVES = ["backward", "backward", "jvp", "twice", "dual", "hvp", "over forward", "jacrev", "jacfwd", "hessian"]
EVENTS = ["", "reset", "reset", "terminal", "recorded", "mode", "held", "counted", "two", "same", "clock", "most"]
#: those that may end the solve
ENDED = ("terminal", "counted", "most")
#: second derivatives in times at which steps end are of one order less than steps: wider by methods of order two, or that begin with less
LOW = ("trbdf2", "bdf", "abm", "radauIIA3", "kencarp3", "bosh3")
#: solved at a tolerance of 1e-8 in place of 1e-7
HIGH = ("tsit5", "dopri5", "dopri8", "verner7")


@dataclass(frozen=True)
class Case:
    """What is solved, and how. ``rows``: 0 for one trajectory; ``mapped``: by `torch.vmap` in place of ``batched=True``."""

    seed: int
    n: int
    rows: int
    mapped: bool
    #: a row of no length, or one that fails
    dead: str
    table: str
    args: str
    table_rows: bool
    dose: str
    dose_rows: bool
    rate_rows: bool
    event: str
    switch: bool
    integral: str
    ragged: bool
    backwards: bool
    door: str
    pack: str
    single: bool
    method: str
    options: str
    compiled: bool
    gradient: str
    derivative: str
    output: str
    root: bool
    #: which times are others exactly, see `hybrid_ties`; those that are only near differ by ``small``
    ties: str = ""
    small: float = 0.0
    #: sample times that are parameters; a schedule with fewer doses; the same functions solved with other numbers before
    marks: bool = False
    pad: bool = False
    again: bool = False
    #: which parameters have all second derivatives taken
    scalars: int = 0
    #: of several trajectories: what resets need and starts of spans, each its own; one start for all in a map; derivatives inside of it
    acts: bool = False
    begins: bool = False
    shared: bool = False
    inside: bool = False
    #: durations and lag times of each dose
    spread: bool = False

    def __str__(self) -> str:
        return " ".join(f"{k}={v}" for k, v in vars(self).items() if v not in ("", False, 0))

    @property
    def own(self) -> bool:
        """Whether each trajectory is one of ``batched=True``."""
        return self.rows > 0 and not self.mapped


def draw(seed: int, cheap: bool = False) -> Case:
    r = random.Random(seed)

    def chance(share: float) -> bool:
        return r.random() < share

    rows = r.choice([0, 0, 0, 0, 2] if cheap else [0, 0, 2, 3])
    mapped = rows > 0 and chance(0.3)
    own = rows > 0 and not mapped
    doors = ["split", "mass", "own mass", "singular", "dae", "algebraic", "layer", "odeint", "odeint_event"]
    door = r.choice(["ivp"] * (20 if cheap else 6) + doors)
    plain = door in ("layer", "odeint", "odeint_event")
    event = "" if door in ("layer", "odeint") else "terminal" if door == "odeint_event" else r.choice(EVENTS)
    pack = "tensor" if plain or door in ALGEBRAIC else r.choice(["tensor"] * 4 + ["dict", "tuple", "named", "complex"])
    dose = "" if plain else r.choice(["", "", "bolus", "bolus", "infusion", "lag", "both"])
    table = r.choice(["", "", "linear", "constant", "cubic"])
    dead = r.choice(["", "", "span", "fail"]) if own and not plain else ""
    output = r.choice(["end", "end", "samples", "list", "dense", "times", "states", "left", "steps", "slopes"])
    if (output in ("times", "states", "left") and not event) or (output == "slopes" and door not in ("dae", "mass", "own mass")):
        output = "end"
    if (event in ENDED and output in ("dense", "left")) or (event == "most" and output in ("times", "states")):
        output = "end"
    if (mapped and output in ("dense", "left", "list")) or (dead and output in ("dense", "left", "times", "states", "samples", "list")):
        output = "end"
    output = "samples" if plain and output in ("list", "samples") else "end" if plain else output
    output = "end" if output == "left" and (rows or event == "recorded") else output
    derivative = r.choice(["backward", "backward", "jvp"] if cheap and chance(0.75) else DERIVATIVES)
    gradient = "" if plain else r.choice(GRADIENTS)
    switch = chance(0.25) and not plain
    if gradient == "backsolve" and derivative not in ("backward", "jacrev"):
        gradient = "swept"
    if gradient in ("interpolating", "quadrature", "backsolve") and (cheap or chance(0.9)):
        # mostly what is not refused
        table, switch, dose = "", False, "" if gradient == "backsolve" else dose
        event = "reset" if event == "recorded" else event
    if gradient == "checkpoints" and (door not in ("ivp", "split", "singular") or event == "recorded"):
        gradient = "swept"
    if gradient == "backsolve" and (rows or door != "ivp" or output in ("dense", "left", "steps")):
        gradient = "backprop"
    if gradient == "checkpoints" and output in ("steps", "dense", "left", "slopes"):
        output = "samples" if not (dead or event in ENDED) else "end"
    return Case(
        seed=seed,
        n=2 if pack == "complex" else r.choice([2, 2, 3]),
        rows=0 if door == "odeint_event" else rows,
        mapped=mapped and door != "odeint_event",
        dead=dead,
        table=table,
        args=r.choice(["flat", "dict", "captured", "module"]) if not plain else "captured",
        table_rows=rows > 0 and door in ("ivp", "split", "layer") and chance(0.3),
        dose=dose,
        dose_rows=rows > 0 and chance(0.5),
        rate_rows=rows > 0 and not plain and chance(0.4),
        event=event,
        switch=switch,
        integral="" if plain else r.choice(["", "", "", "square", "tree", "table" if table else "square"]),
        ragged=rows > 0 and not plain and chance(0.5),
        backwards=not dose and not plain and chance(0.2),
        door=door,
        pack=pack,
        single=not plain and chance(0.1),
        method=r.choice(CHEAP if cheap and door == "ivp" and chance(0.9) else METHODS[door]),
        options=r.choice(["", "", "", "max_step", "max norm", "first_step"]) if door in ("ivp", "split") else "",
        compiled=not cheap and not plain and chance(0.2),
        gradient=gradient,
        derivative=derivative,
        output=output,
        root=chance(0.1) and not dead and event not in ENDED,
    )


def limits(case: Case) -> tuple[float, float, float]:
    """What values, first and second derivatives may be off by, in parts of what is largest."""
    value, first, second = (3e-6, 1e-4, 1e-4) if case.method in HIGH else (2e-5, 5e-4, 2e-3)
    if case.gradient == "backsolve":
        first, second = 1e-3, 1e-2
    if case.method in LOW:
        first, second = 2 * first, second * 10
    return (3e-3, 5e-2, 0.3) if case.single else (value, first, second)


def parameters(case: Case) -> dict[str, Tensor]:
    """All that is differentiated."""
    g = torch.Generator().manual_seed(case.seed)

    def uniform(a: float, b: float, *shape: int) -> Tensor:
        return a + (b - a) * torch.rand(shape, generator=g)

    rows, n = (case.rows,) if case.rows else (), case.n
    p = {"k": uniform(0.4, 1.2, *(rows if case.rate_rows else ()), n), "W": uniform(-0.4, 0.4, n, n)}
    each = rows if case.acts else ()
    p |= {"level": uniform(1.3, 1.6, *each), "c": uniform(0.3, 0.5, *each), "y0": uniform(0.2, 1.0, *(() if case.shared else rows), n)}
    p |= {"end": uniform(1.3, 1.9, *(rows if case.ragged else ())), "begin": uniform(-0.1, 0.1, *(rows if case.begins else ()))}
    if case.table:
        shape = (4, *rows) if case.table_rows else (4,)
        knots = torch.linspace(0.3, 1.9, 4).reshape(4, *[1] * (len(shape) - 1))
        p |= {"knots": knots + uniform(-0.1, 0.1, *shape), "values": uniform(-0.5, 0.8, *shape)}
    if case.dose:
        shape = (2, *rows) if case.dose_rows else (2,)
        times = torch.tensor([0.45, 1.17]).reshape(2, *[1] * (len(shape) - 1))
        p |= {"times": times + uniform(-0.15, 0.15, *shape), "amounts": uniform(0.1, 0.4, *shape)}
        each = (2, *rows) if case.spread else ()
        p |= {"lag": uniform(0.02, 0.06, *each), "duration": uniform(0.13, 0.21, *each)}
    if case.switch:
        p |= {"s": uniform(0.7, 1.3), "jump": uniform(0.2, 0.6)}
    if case.event == "clock":
        p |= {"clock": uniform(0.6, 1.4)}
    return p


def slope(t: Tensor, y: Tensor, k: Tensor, W: Tensor, u: Any, m: Any = 0.0, a: Any = None) -> Tensor:
    """The first variable grows, so that it crosses levels, and falls where the mode ``m`` is one; the others relax, and it feels them.
    ``a``: what it feels, if that is a variable."""
    first = (0.8 + 0.3 * torch.sin(2 * t)) * (1 - 2.2 * m) + (0.2 * torch.tanh(y[..., 1]) if a is None else a)
    rest = -k[..., 1:] * y[..., 1:] + 0.3 * torch.tanh(y @ W.T)[..., 1:]
    if u is not None:
        first, rest = first + 0.1 * u, rest + u.unsqueeze(-1)
    return torch.cat([first.unsqueeze(-1), rest], -1)


State = tuple[Tensor, Any]


@dataclass(frozen=True)
class Spec:
    """Something that happens where ``value(t, y, p)`` is zero. ``resets``: of one or more events with this function, one after the other,
    ``(t, y, m, p) -> (y, m)``; None for one that changes nothing. ``when``: whether it can be in a mode; ``at``: a parameter that is its
    time."""

    names: tuple[str, ...]
    value: Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
    resets: tuple[Callable[[Tensor, Tensor, Any, dict[str, Any]], State] | None, ...]
    direction: int = 1
    terminal: int = 0
    when: Callable[[float], bool] = lambda m: True
    at: str = ""


def back(t: Tensor, y: Tensor, m: Any, p: dict[str, Any]) -> State:
    moved = y[..., 1:2] + 0.3 * torch.cos(t).unsqueeze(-1)
    return torch.cat([p["c"].unsqueeze(-1) * y[..., :1] + 0.05 * y[..., 1:2], moved, y[..., 2:]], -1), m


def kicked(t: Tensor, y: Tensor, m: Any, p: dict[str, Any]) -> State:
    return torch.cat([y[..., :1], y[..., 1:2] * (1 + p["c"].unsqueeze(-1)) + 0.1 * torch.sin(3 * t).unsqueeze(-1), y[..., 2:]], -1), m


def specs(case: Case) -> list[Spec]:
    """What happens in the case beside doses."""

    def level(less: float) -> Callable[[Tensor, Tensor, dict[str, Any]], Tensor]:
        return lambda t, y, p: y[..., 0] - (p["level"] - less)

    reset = Spec(("event",), level(0.0), (back,))
    if case.event == "reset":
        return [reset]
    if case.event == "most":
        return [Spec(("event",), level(0.3), (back,))]
    if case.event in ("terminal", "recorded"):
        return [Spec(("event",), level(-0.5 if case.event == "terminal" else 0.0), (None,), terminal=int(case.event == "terminal"))]
    if case.event in ("mode", "held"):
        # in "held" the mode is a number that is differentiated
        def off(t: Tensor, y: Tensor, m: Any, p: dict[str, Any]) -> State:
            return y, (1 + 0 * m if case.event == "mode" else 1 + 0.2 * torch.tanh(y[..., 1]) + 0 * m)

        def on(t: Tensor, y: Tensor, m: Any, p: dict[str, Any]) -> State:
            return kicked(t, y, 0 * m, p)

        up = Spec(("event",), level(0.1), (off,), when=lambda m: m == 0)
        return [up, Spec(("other",), level(0.5), (on,), direction=-1, when=lambda m: m > 0)]
    if case.event == "counted":
        return [Spec(("event",), level(0.4), (back,), terminal=2)]
    if case.event == "two":
        return [reset, Spec(("other",), level(0.25), (kicked,))]
    if case.event == "same":
        return [Spec(("event", "other"), level(0.1), (back, kicked))]
    if case.event == "clock":
        return [reset, Spec(("other",), lambda t, y, p: t - p["clock"] + 0 * y[..., 0], (kicked,), direction=0, at="clock")]
    return []
