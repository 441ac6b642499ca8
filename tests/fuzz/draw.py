"""Cases from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from adjoint import nonlinear
from adjoint.methods import DAE_METHODS, IMEX_METHODS, METHODS, SWITCHING_METHODS

from .case import Case, Piece
from .equations import Equations, draw_equations, function
from .reference import Flow, pure_form

__all__ = ["draw"]

ALL: dict[str, Any] = METHODS | IMEX_METHODS | SWITCHING_METHODS | DAE_METHODS
ODEINT_ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
ODEINT_FIXED = [
    "euler", "midpoint", "heun2", "heun3", "rk4", "explicit_adams", "implicit_adams",
    "implicit_euler", "implicit_midpoint", "trapezoid", "radauIIA3", "radauIIA5", "gl4", "gl6", "sdirk2", "trbdf2",
]  # fmt: skip
DOORS = [
    ("solve_ivp", 52), ("solve_ivp split", 6), ("mass matrix", 8), ("solve_dae", 10), ("odeint", 6), ("odeint_adjoint", 5), ("twin", 4),
    ("odeint_event", 4),
]  # fmt: skip
STRATEGIES = [
    ("", 8), ("adjoint.DiscreteAdjoint(keep_bytes=0)", 3), ("adjoint.DiscreteAdjoint(checkpoints=3)", 1), ("adjoint.Backprop()", 2),
    ("adjoint.ForwardSensitivity()", 2), ("adjoint.InterpolatingAdjoint()", 1), ("adjoint.QuadratureAdjoint()", 1),
    ("adjoint.GaussAdjoint()", 1), ("adjoint.BacksolveAdjoint()", 1), ("adjoint.InterpolatingAdjoint(method='tsit5')", 0.5),
    ("adjoint.BacksolveAdjoint(method='dopri5')", 0.5),
]  # fmt: skip
DERIVATIVES = [("backward", 9), ("second", 3), ("jvp", 3), ("dual", 1), ("grad", 2), ("hvp", 1.5), ("none", 1)]
WAYS = ["argument", "closure", "helper", "default", "attribute", "module", "buffer", "tree"]


#: strategies that differentiate the computed steps: they agree but for rounding and iterations
OF_STEPS = [
    "adjoint.DiscreteAdjoint(keep_bytes=0)", "adjoint.DiscreteAdjoint(checkpoints=3)", "adjoint.Backprop()",
    "adjoint.ForwardSensitivity()",
]  # fmt: skip


def weighted(rng: Random, pairs: Sequence[tuple[Any, float]]) -> Any:
    values, weights = zip(*pairs, strict=True)
    return rng.choices(values, weights)[0]


def numbers(rng: Random, *shape: int) -> Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.tensor([round(rng.uniform(-1, 1), 3) for _ in range(count)], dtype=torch.float64).reshape(shape)


def order_of(method: str) -> int:
    own = {"abm": 5, "bdf": 5, "auto": 5, "implicit_euler": 1, "radauIIA5": 5, "explicit_adams": 4, "implicit_adams": 4}
    return own.get(method) or ALL[method].order


def choose_method(rng: Random, door: str, equations: Equations) -> str:
    if door == "solve_dae":
        return rng.choice(sorted(DAE_METHODS))
    if door == "mass matrix":
        return rng.choice(["radau5", "radauIIA3", "bdf", "rodas3p", "rodas4", "rodas5p"])
    if door == "solve_ivp split":
        return rng.choice(sorted(IMEX_METHODS))
    if door in ("odeint", "odeint_adjoint", "twin", "odeint_event"):
        return rng.choice(ODEINT_ADAPTIVE if rng.random() < 0.7 else ODEINT_FIXED)
    return rng.choice(sorted(METHODS | SWITCHING_METHODS))


def draw(seed: int, compiled: float = 0.0, cheap: bool | None = None) -> Case:
    """The case of a seed.

    ``compiled``: share of cases that are compiled where that is possible. ``cheap``: short spans, loose tolerances, few rows, and less of
    what takes long; by default most cases are.
    """
    case, rng = draw_solve(seed, compiled, cheap), Random(f"{seed} beside")
    if case.door == "solve_ivp" and rng.random() < 0.1:
        return root_of(case, rng)
    if native(case) and case.derivative not in ("none", "inner grad") and rng.random() < 0.25:
        others = [x for x in OF_STEPS if x != case.strategy and not doubtful(x, case.door, case.form, case.method, case.event, case.times)]
        return replace(case, other=rng.choice(others))
    return case


def native(case: Case) -> bool:
    """Whether the case has a strategy, and that is one of the computed steps."""
    return case.door in ("solve_ivp", "solve_ivp split", "mass matrix", "solve_dae") and case.strategy in ("", *OF_STEPS)


def root_of(case: Case, rng: Random) -> Case:
    """The root of a step of the implicit Euler method with the case's equations, from a guess beside the initial state.

    Steps are so small that the root is the only one nearby, but for equations that are linear where they are stiff.
    """
    start = case.values["t0"]
    size = round(case.equations.span * rng.uniform(0.05, 0.3), 3)
    derivative = case.derivative if case.derivative == "inner grad" else weighted(rng, DERIVATIVES)
    if case.style in ("reused buffer", "autograd.grad") and derivative != "none":
        derivative = "inner grad" if derivative == "inner grad" else "backward"
    shape = (1, case.rows, case.equations.n)
    return replace(
        case, door="solve_root", method=rng.choice([*sorted(nonlinear.METHODS), "time_integration"]), strategy="", derivative=derivative,
        times="root", span_active=False, event="", quadrature=False, dead="", ragged=False, empty=False, compiled=False, step=None,
        rtol=1e-4 if case.dtype == "float32" else 1e-8, alive=(True,) * case.rows, crosses=(),
        values={"y0": case.values["y0"], "p": case.values["p"], "t0": start, "t1": start + size},
        directions={name: case.directions[name] for name in ("y0", "p")}, weights={"samples": numbers(rng, *shape)},
    )  # fmt: skip


def draw_solve(seed: int, compiled: float = 0.0, cheap: bool | None = None) -> Case:
    """A solve over a span."""
    rng = Random(seed)
    cheap = rng.random() < 0.7 if cheap is None else cheap
    equations, door = draw_equations(rng), weighted(rng, DOORS)
    method = choose_method(rng, door, equations)
    dropin = door in ("odeint", "odeint_adjoint", "twin", "odeint_event")
    fixed = method in ODEINT_FIXED if dropin else not ALL[method].adaptive
    implicit = method in ODEINT_FIXED[7:] if dropin else ALL[method].implicit
    while (
        (cheap and equations.stiffness > 30)
        or equations.stiffness > (300 if fixed or not implicit else 1e9)
        or (fixed and equations.stiffness > 30)
    ):
        equations = draw_equations(rng)
    form = "one" if door == "odeint_event" else weighted(rng, [("one", 5), ("batched", 0 if dropin else 3), ("vmapped", 1.5)])
    rows = 1 if form == "one" else weighted(rng, [(1, 1), (2, 4)] + [(3, 4), (4, 2), (130, 0.2)] * (not cheap))
    n, m = equations.n, len(equations.p)
    derivative = weighted(rng, DERIVATIVES[:1] if cheap and rng.random() < 0.6 else DERIVATIVES)
    if form == "vmapped" and rng.random() < 0.3:
        derivative = "inner grad"

    event = ""
    if door == "odeint_event":
        event = "terminal"
    elif not dropin and rng.random() < 0.15:
        event = rng.choice(["terminal", "terminal", "passed"])
    times = weighted(
        rng, [("ends", 2), ("list", 1.5), ("tensor", 3), ("list of tensors", 0.7), ("by row", 1.5), ("dense", 1), ("steps", 0.7)]
    )
    if dropin:
        times = "tensor"
    if event:
        times = "ends"
    strategy = "" if dropin else weighted(rng, STRATEGIES)
    # most of what is known to be refused is drawn again
    while strategy and doubtful(strategy, door, form, method, event, times) and rng.random() < 0.9:
        strategy = weighted(rng, STRATEGIES)
    if form == "one" and times == "by row":
        times = "tensor"
    if form == "vmapped" and times in ("steps", "dense"):
        times = "by row"
    backwards = rng.random() < 0.15 and equations.stiffness < 10 and door != "odeint_event"
    sign = -1.0 if backwards else 1.0
    t0 = round(rng.uniform(-0.2, 0.3), 3)
    length = equations.span * rng.uniform(0.6, 1.4) * (0.4 if cheap else 1.0)
    ragged = form != "one" and rng.random() < 0.4 and times not in ("tensor", "list", "list of tensors")
    ends = torch.tensor([round(t0 + sign * length * (rng.uniform(0.4, 1) if ragged else 1), 4) for _ in range(rows)], dtype=torch.float64)
    ends = ends if ragged else ends[:1].expand(rows).clone()
    empty = ragged and rows > 1 and rng.random() < 0.25 and not event
    starts = torch.full((rows,), t0, dtype=torch.float64)
    if empty:
        ends[-1] = t0
    count = rng.choice([2, 2, 3, 5])
    fractions = sorted(round(rng.uniform(0.05, 0.95), 3) for _ in range(count))
    if dropin or rng.random() < 0.3:
        fractions[0] = 0.0
    if dropin or rng.random() < 0.4:
        fractions[-1] = 1.0
    ts = starts + (ends - starts) * torch.tensor(fractions, dtype=torch.float64)[:, None]
    ts[-1] = torch.where(torch.tensor(fractions[-1] == 1.0), ends, ts[-1])

    dead = rng.choice(["start", "later"]) if form == "batched" and rows > 1 and rng.random() < 0.15 and not empty else ""
    layout = choose_layout(rng, door, equations)
    dtype = "float32" if rng.random() < 0.07 and layout != "complex" and equations.stiffness < 30 else "float64"
    style = weighted(rng, [("plain", 6), ("in place", 1), ("view", 1), ("reused buffer", 0.5), ("in place on y", 0.3)])
    if equations.energy and rng.random() < 0.6:
        style = rng.choice(["torch.func.grad", "autograd.grad"])
    if cheap and implicit and derivative not in ("none", "inner grad"):
        derivative, strategy = "backward", strategy.replace("adjoint.Backprop()", "")
    # what PyTorch itself refuses inside of its transforms
    if style in ("reused buffer", "autograd.grad") and (derivative not in ("none", "backward") or form == "vmapped"):
        style = "plain"
    pieces = choose_pieces(rng, m, dropin, form)
    order = order_of(method)
    digits = {1: [2, 3], 2: [3, 4], 3: [4, 5]}.get(order, [5, 6] if implicit else [5, 6, 7] if order < 7 else [6, 8, 10])
    rtol = 10.0 ** -(digits[0] if cheap else rng.choice(digits))
    if dtype == "float32":
        rtol = max(rtol, 1e-4)
    step = None
    if fixed:
        steps = {1: 40, 2: 25, 3: 15, 4: 12}.get(order, 8)
        step = round(length / steps * (0.3 if equations.stiffness > 10 else 1), 5)
    details = {"mass matrix": ["regular", "singular", "singular mixed"], "solve_dae": ["", "mixed", "trusted"]}
    detail = rng.choice(details.get(door, [""]))
    if door == "odeint_event":
        detail = rng.choice(["odeint", "odeint_adjoint", "twin"])

    p = torch.tensor(equations.p, dtype=torch.float64).expand(rows, m).clone()
    for piece in pieces:
        if piece.by_row:
            p[:, piece.start : piece.stop] *= 1 + 0.1 * numbers(rng, rows, piece.stop - piece.start)
    y0 = torch.tensor(equations.y0, dtype=torch.float64) * (1 + 0.15 * numbers(rng, rows, n))
    values = {"y0": y0, "p": p, "t0": starts, "t1": ends, "ts": ts}
    if dtype == "float32":
        # numbers that both precisions hold
        values = {k: v.float().double() for k, v in values.items()}
    times_active = times in ("tensor", "list of tensors", "by row", "dense") and rng.random() < 0.4
    span_active = not dropin and rng.random() < 0.25
    directions = {"y0": numbers(rng, rows, n) * (y0.abs() + 0.2)}
    directions["p"] = torch.zeros_like(p)
    for piece in pieces:
        if piece.active:
            shape = (rows if piece.by_row else 1, piece.stop - piece.start)
            directions["p"][:, piece.start : piece.stop] = numbers(rng, *shape) * 0.5
    if derivative == "inner grad":
        # taken in what belongs to a row
        span_active = False
        times_active = times_active and times == "by row"
        for piece in pieces:
            if not piece.by_row:
                directions["p"][:, piece.start : piece.stop] = 0
    if span_active:
        directions["t0"] = numbers(rng, 1).expand(rows) * 0.2 * length
        directions["t1"] = (numbers(rng, rows) if ragged else numbers(rng, 1).expand(rows)) * 0.2 * length
    if times_active:
        shape = (len(fractions), rows if times == "by row" else 1)
        directions["ts"] = numbers(rng, *shape).expand(len(fractions), rows) * 0.1 * length
    if dropin and times_active:
        directions["t0"], directions["t1"] = directions["ts"][0], directions["ts"][-1]
    alive = [True] * rows
    if dead:
        alive[rng.randrange(rows)] = False
    component, crosses = 0, ()
    case = Case(
        seed, door, equations, form, method, strategy, derivative, layout, style, pieces, times, span_active, event, component,
        not dropin and rng.random() < 0.12, dead, ragged, empty, dtype, rtol, rtol * 1e-2, step,
        not dropin and rng.random() < compiled, detail, values, directions, {}, tuple(alive), crosses,
    )  # fmt: skip
    case = with_shared_start(case, Random(f"{seed} start"), dropin)
    changes: dict[str, Any] = {}
    if event:
        changes = choose_event(rng, case)
    shown = n + case.algebraic
    taken = {"ends": 2, "steps": 1}.get(changes.get("times", times), len(fractions))
    changes["weights"] = {
        "samples": numbers(rng, taken, rows, shown),
        "integral": numbers(rng, rows),
        "event_t": numbers(rng, rows),
        "event_y": numbers(rng, rows, shown),
    }
    return with_earlier(replace(case, **changes), Random(f"{seed} earlier"))


def with_shared_start(case: Case, rng: Random, dropin: bool) -> Case:
    """The case, or, of some, one whose function has the tensor "q" that the start is made of."""
    if rng.random() > 0.25 or case.style in ("torch.func.grad", "autograd.grad"):
        return case
    shared = rng.choice(["same", "same", "computed", "computed", "view", "detached"])
    n, m = case.equations.n, len(case.equations.p)
    taken = {x.way for x in case.pieces}
    ways = [w for w in WAYS if w not in taken & {"attribute", "tree", "default"} and w not in ("module", "buffer")]
    ways = [w for w in ways if not (w == "attribute" and taken & {"module", "buffer"}) and not (dropin and w in ("argument", "tree"))]
    q = Piece("q", m, m + n, rng.choice(ways), case.form != "one", shared != "detached")
    text = case.equations.text.replace("def core(", "def without_q(") + function(
        f"q = p[..., {m}:]", f"return without_q(t, y, p[..., :{m}]) + 0.4 * torch.sin(q) * torch.cos(y) - 0.2 * q * y"
    )
    y0, moves = case.values["y0"], case.directions["y0"]
    derivative = case.derivative
    if derivative not in ("none", "inner grad") and case.style != "reused buffer" and rng.random() < 0.4:
        derivative = rng.choice(["second", "second", "hvp"])
    return replace(
        case, shared=shared, pieces=(*case.pieces, q), derivative=derivative,
        equations=replace(case.equations, text=text, p=(*case.equations.p, *case.equations.y0)),
        values=case.values | {"p": torch.cat([case.values["p"], y0], -1)},
        directions=case.directions | {"p": torch.cat([case.directions["p"], moves * (shared != "detached")], -1)},
    )  # fmt: skip


def with_earlier(case: Case, rng: Random) -> Case:
    """The case, or, of some, one that is solved once or twice with other numbers before."""
    if rng.random() > (0.7 if case.compiled else 0.07):
        return case
    ways = {x.way for x in case.pieces}
    kinds = ["same"]
    if case.detail != "trusted":
        # consistent values are those of one start
        kinds += ["changed", "changed"] + ["other"] * (2 if "module" not in ways else 0)
    if case.form != "one" and not case.dead and case.derivative != "inner grad" and not (case.ragged and not case.span_active):
        kinds += ["wider", "wider"]
    earlier = tuple(rng.choice(kinds) for _ in range(rng.choice([1, 2])))
    return replace(case, earlier=earlier, kept="default" not in ways and rng.random() < 0.5)


def doubtful(strategy: str, door: str, form: str, method: str, event: str, times: str) -> bool:
    """Whether the library refuses that, by and large."""
    multistep, implicit = method in ("abm", "bdf"), method in ALL and ALL[method].implicit
    if "checkpoints" in strategy:
        return multistep or bool(event) or times in ("dense", "steps") or door in ("solve_dae", "mass matrix")
    if "Backsolve" in strategy:
        return form != "one" or bool(event) or door in ("solve_dae", "mass matrix") or (implicit and "method" not in strategy)
    if "Adjoint(" in strategy and "Discrete" not in strategy:
        own = "method" in strategy or (method in ALL and ALL[method].adaptive)
        return bool(event) or method == "auto" or not own or door == "mass matrix" or (door == "solve_dae" and "method" in strategy)
    return False


def choose_layout(rng: Random, door: str, equations: Equations) -> str:
    n = equations.n
    if door == "mass matrix":
        return "vector"
    if door == "solve_dae":
        return rng.choice(["vector", "vector", "dict", "tuple"])
    known = [("vector", 8), ("dict", 0 if door.startswith(("odeint", "twin")) else 1), ("tuple", 1)]
    if n % 2 == 0:
        known += [("matrix", 2), ("complex", 6 if equations.holomorphic else 0.4)]
    if n == 1:
        known += [("scalar", 6)]
    return weighted(rng, known)


def choose_pieces(rng: Random, m: int, dropin: bool, form: str) -> tuple[Piece, ...]:
    cuts = sorted(rng.sample(range(1, m), min(m - 1, rng.choice([0, 1, 1, 2]))))
    out, used = [], set()
    for i, (start, stop) in enumerate(zip([0, *cuts], [*cuts, m], strict=True)):
        ways = [w for w in WAYS if not (w in used and w in ("module", "attribute", "buffer", "tree", "default"))]
        if dropin:
            ways = [w for w in ways if w not in ("argument", "tree")]
        if "module" in used or "attribute" in used:
            ways = [w for w in ways if w not in ("module", "attribute")]
        way = rng.choices(ways, [4 if w in ("argument", "closure") else 2 if w == "module" else 1 for w in ways])[0]
        used.add(way)
        by_row = form != "one" and way in ("argument", "tree") and rng.random() < 0.6
        out.append(Piece(f"p{i}", start, stop, way, by_row, way != "buffer" and rng.random() < 0.9))
    return tuple(out)


def choose_event(rng: Random, case: Case) -> dict[str, Any]:
    """A component and a level that it crosses well, at most once a row; no event where none is found."""
    flow = Flow(pure_form(case), case.values["p"])
    y0 = torch.cat([case.start, torch.zeros(case.rows, 1, dtype=torch.float64)], -1)
    fractions = torch.linspace(0, 1, 61, dtype=torch.float64)
    t = case.values["t0"] + (case.values["t1"] - case.values["t0"]) * fractions[:, None]
    y = flow.fractions(case.values["t0"], case.values["t1"], y0, fractions.tolist())
    rates = torch.stack([flow.rate(a, b) for a, b in zip(t, y, strict=True)])
    for _ in range(12):
        i, k = rng.randrange(case.equations.n), rng.randrange(18, 48)
        level = round(float(y[k, 0, i]), 4)
        gap = y[..., i] - level
        changes = (gap[1:] * gap[:-1] < 0) | (gap[1:] == 0)
        crosses = changes.sum(0)
        first = changes.to(torch.uint8).argmax(0)
        slopes = rates[first, torch.arange(case.rows), i].abs()
        typical = rates[..., i].abs().mean()
        # ends that come near the level would be told apart by the tolerance
        near_ends = (gap[-1].abs() < 0.05 * typical * 0.5) | (gap[0].abs() < 0.05 * typical * 0.5)
        if (
            bool((crosses <= 1).all())
            and crosses[0] == 1
            and bool((slopes[crosses == 1] > 0.3 * typical).all())
            and not bool(near_ends.any())
        ):
            level_rows = torch.full((case.rows,), level, dtype=torch.float64)
            near = t[first, torch.arange(case.rows)]
            directions = case.directions
            if case.derivative != "inner grad":
                directions = directions | {"level": numbers(rng, 1).expand(case.rows).clone() * 0.3}
            return {
                "component": i,
                "crosses": tuple(bool(c) for c in crosses),
                "values": case.values | {"level": level_rows, "near": near},
                "directions": directions,
            }
    if case.door == "odeint_event":
        return {"event": "", "door": "odeint", "times": "tensor"}
    return {"event": ""}
