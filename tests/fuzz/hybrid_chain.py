"""The reference of `tests.fuzz.hybrid`: smooth solves, one after the other, which begin anew wherever anything happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjoint import Event, Forcing, solve_ivp

from .hybrid_case import ALGEBRAIC, Case, Spec, slope, specs
from .hybrid_solve import FAILS, SHARES

__all__ = ["chained"]

TIGHT: dict[str, Any] = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12}
#: how far solves go away from a zero that they start at before they look for the next one
AWAY = 0.02
Act = tuple[Tensor, str, Any]


class Chain:
    """One trajectory, with its integrals: of the square of the state, of the first variable times the time, of the second one times the
    table."""

    def __init__(self, case: Case, p: dict[str, Tensor], row: int | None) -> None:
        self.case, self.row = case, row
        own = {"y0": 1, "end": 0, "k": 1, "knots": 1, "values": 1, "times": 1, "amounts": 1}
        self.p = {k: v[..., row] if row is not None and k in own and v.dim() > own[k] and k not in ("y0", "k") else v for k, v in p.items()}
        for name in ("y0", "k"):
            self.p[name] = p[name] if row is None or p[name].dim() == 1 else p[name][row]
        self.z = torch.cat([self.p["y0"], torch.zeros(3)])
        self.t, self.rate, self.jump, self.place = self.p["begin"], torch.zeros(()), torch.zeros(()), -1
        self.m: Any = torch.zeros(())
        self.specs = specs(case)
        #: of each event its times, states before and after
        self.found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for spec in self.specs for name in spec.names}
        self.count = 0
        self.over, self.failed = False, False
        self.left: Spec | None = None

    def input(self, place: int) -> Callable[[Tensor], Tensor] | None:
        """The table within one of its pieces, by the textbook's formula; splines are those of the package."""
        if not self.case.table:
            return None
        knots, values = self.p["knots"], self.p["values"]
        if self.case.table == "cubic":
            return Forcing(knots, values, "cubic")
        if self.case.table == "constant" or not 0 <= place < len(knots) - 1:
            return lambda t: values[max(place, 0)] + 0 * t
        gap = knots[place + 1] - knots[place]
        return lambda t: values[place] + (values[place + 1] - values[place]) * (t - knots[place]) / gap

    def slope(self, t: Tensor, y: Tensor, k: Tensor, W: Tensor, rest: Tensor, m: Any, u: Any) -> Tensor:
        d = slope(t, y, k, W, u, m)
        return torch.cat([d[:1], d[1:2] + rest[0] + rest[1], d[2:] + rest[1]])

    def to(self, end: Tensor) -> None:
        """Go on to a time, over the events in between."""
        p, u = self.p, self.input(self.place)

        def fun(t: Tensor, z: Tensor, k: Tensor, W: Tensor, rest: Tensor, m: Tensor) -> Tensor:
            y, now = z[:-3], None if u is None else u(t)
            table = 0 * t if now is None else y[1] * now
            return torch.cat([self.slope(t, y, k, W, rest, m, now), torch.stack([(y**2).sum(), y[0] * t, table])])

        while not self.over and float(end.detach() - self.t.detach()) > 1e-13:
            due = [s for s in self.specs if not s.at and s is not self.left and s.when(float(self.m))]
            # away from a zero that it starts at
            stop = end if self.left is None else torch.minimum(end, self.t + AWAY)
            events = [
                Event(lambda t, z, *args, s=s: s.value(t, z[:-3], p), s.direction, s.resets[0] is not None or s.terminal > 0) for s in due
            ]
            args = (p["k"], p["W"], torch.stack([self.rate + 0.0, self.jump + 0.0]), self.m + 0.0)
            sol = solve_ivp(fun, (self.t, stop), self.z, args, events=events or None, **TIGHT)
            hit = None
            for s, record in zip(due, sol.events, strict=True):
                ends = s.resets[0] is not None or s.terminal
                if ends and len(record.t):
                    hit = s, record.t[0], record.y[0]
                elif not ends:
                    self.found[s.names[0]] += [(t, z[:-3], z[:-3]) for t, z in zip(record.t, record.y, strict=True)]
            if hit is None:
                self.t, self.z, self.left = stop, sol.y[-1], None
                continue
            spec, self.t, self.z = hit
            self.reset(spec)

    def reset(self, spec: Spec) -> None:
        before = self.z[:-3]
        for name, reset in zip(spec.names, spec.resets, strict=True):
            y = self.z[:-3]
            if reset is not None:
                y, self.m = reset(self.t, y, self.m, self.p)
            self.z = torch.cat([y, self.z[-3:]])
            self.found[name].append((self.t, before, y))
        value = float(spec.value(self.t, self.z[:-3], self.p).detach())
        self.left = spec if not spec.at and abs(value) < 1e-9 else None
        self.count += spec.resets[0] is not None
        self.over = 0 < spec.terminal <= len(self.found[spec.names[0]])
        if self.case.event == "most" and self.count >= 2:
            self.over = self.failed = True

    def happen(self, kind: str, what: Any) -> None:
        if kind == "knot":
            self.place += 1
        elif self.over:
            return
        elif kind == "rate":
            self.rate = self.rate + what
        elif kind == "jump":
            self.jump = self.jump + what
        elif kind == "event":
            self.reset(what)
        elif kind == "fail":
            self.over = self.failed = True
        else:
            self.z = torch.cat([self.z[:1], self.z[1:2] + what, self.z[2:]])

    def acts(self) -> list[Act]:
        """What happens when, beside events."""
        p, dose = self.p, self.case.dose
        acts: list[Act] = [(t, "knot", None) for t in p["knots"]] if self.case.table else []
        pairs = list(zip(p["times"], p["amounts"], strict=True)) if dose else []
        if dose in ("infusion", "both"):
            for t, a in pairs:
                acts += [(t, "rate", a / p["duration"]), (t + p["duration"], "rate", -a / p["duration"])]
        shift = {"bolus": 0.0, "both": 0.01, "lag": p.get("lag")}.get(dose)
        acts += [] if shift is None else [(t + shift, "bolus", a) for t, a in pairs]
        acts += [(p[s.at], "event", s) for s in self.specs if s.at]
        acts += [(p["s"], "jump", p["jump"])] if self.case.switch else []
        return acts + ([(torch.tensor(FAILS), "fail", None)] if self.case.dead == "fail" and self.row == 1 else [])

    def run(self, shares: tuple[float, ...]) -> list[Tensor]:
        """The states at parts of the span, NaN behind its end."""
        begin, end = self.p["begin"], self.p["end"]
        end = begin if self.case.dead == "span" and self.row == 1 else end
        out = [self.z[:-3]] * len(shares)
        wanted: list[Act] = [(begin + share * (end - begin), "sample", i) for i, share in enumerate(shares)]
        acts = [a for a in self.acts() if float(a[0].detach()) < float(end.detach())]
        every: list[Act] = [*acts, *wanted]
        for t, kind, what in sorted(every, key=lambda a: (float(a[0].detach()), a[1] != "sample")):
            ended = self.over
            self.to(t)
            if kind == "sample":
                out[what] = self.z[:-3]
                if self.failed or (len(shares) > 2 and (ended or self.over)):
                    out[what] = torch.full_like(out[what], float("nan"))
            else:
                if not self.over:
                    self.t = t
                self.happen(kind, what)
        return out


def chained(case: Case, p: dict[str, Tensor]) -> list[Tensor]:
    """What `solved` gives, by chains."""
    if case.door == "odeint_event":
        p = p | {"end": p["end"] + 20}
    chains = [Chain(case, p, row) for row in (range(case.rows) if case.rows else [None])]
    many = case.output in ("samples", "list")
    shares = SHARES if many else (0.4, 1.0) if case.output == "dense" else (1.0,)
    states = [chain.run(shares) for chain in chains]

    def shown(y: Tensor) -> Tensor:
        return torch.cat([y, 0.2 * torch.tanh(y[..., 1:2])], -1) if case.door in ALGEBRAIC else y

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.stack(parts) if case.rows else parts[0]

    def failing(chain: Chain, x: Tensor) -> Tensor:
        return torch.full_like(x, float("nan")) if chain.failed else x

    if case.door == "odeint_event":
        return [chains[0].t, chains[0].z[:-3]]
    out = [joined([shown(torch.stack(s)) for s in states]) if many else joined([shown(s[-1]) for s in states])]
    if case.output == "steps":
        out.append(joined([failing(c, c.t) for c in chains]))
    if case.output == "dense":
        out.append(joined([shown(s[0]) for s in states]))
    if case.output == "slopes":
        out.append(joined([c.slope(c.t, c.z[:-3], c.p["k"], c.p["W"], torch.stack([c.rate, c.jump]), c.m, _now(c)) for c in chains]))
        out[-1] = joined([failing(c, x) for c, x in zip(chains, out[-1] if case.rows else [out[-1]], strict=True)])
    if case.output == "left":
        found = chains[0].found["event"]
        out.append(sum(((1 + 0.3 * i) * shown(y) for i, (_, y, _) in enumerate(found)), 0 * out[0]))
    places = {"": [], "square": [-3], "tree": [-3, -2], "table": [-1]}[case.integral]
    out += [joined([failing(c, c.z[place]) for c in chains]) for place in places]
    if case.output in ("times", "states"):
        for spec in chains[0].specs:
            for name in spec.names:
                each = [[(t, shown(y), shown(a)) for t, y, a in c.found[name]] for c in chains]
                out.append(joined([total([t for t, _, _ in e], torch.zeros(())) for e in each]))
                if case.output == "states":
                    none = shown(torch.zeros(case.n))
                    out.append(joined([total([y for _, y, _ in e], none) for e in each]))
                    if spec.resets[0] is not None:
                        out.append(joined([total([a for _, _, a in e], none) for e in each]))
    return out


def total(parts: list[Tensor], none: Tensor) -> Tensor:
    return sum(((1 + 0.3 * i) * x for i, x in enumerate(parts)), 0 * none)  # type: ignore[return-value]


def _now(chain: Chain) -> Any:
    u = chain.input(chain.place)
    return None if u is None else u(chain.t)
