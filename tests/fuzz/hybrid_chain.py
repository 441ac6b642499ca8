"""The reference of `tests.fuzz.hybrid`: smooth solves, one after the other, which begin anew wherever anything happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adjoint import Event, Forcing, solve_ivp

from .hybrid_case import ALGEBRAIC, FAILS, IMPLICIT, SHARES, Case, Spec, slope, specs
from .hybrid_ties import parted

__all__ = ["chained"]

TIGHT: dict[str, Any] = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12}
#: how far solves go away from a zero that they start at before they look for the next one
AWAY = 0.02
#: ways that one step is taken for; times that are one; what comes first of what is at one time: doses, then events, then samples
SHORT, SAME = 1e-5, 1e-13
RANKS = {"begin": 0, "until": 1, "bolus": 2, "event": 3, "sample": 4, "knot": 5, "jump": 5, "fail": 5}
Act = tuple[Tensor, str, Any]


class Chain:
    """One trajectory, with its integrals: of the square of the state, of the first variable times the time, of the second one times the
    table."""

    def __init__(self, case: Case, p: dict[str, Tensor], row: int | None) -> None:
        self.case, self.row = case, row
        own = {"y0": 1, "end": 0, "k": 1, "knots": 1, "values": 1, "times": 1, "amounts": 1, "marks": 1}
        own |= {"begin": 0, "level": 0, "c": 0, "duration": 1, "lag": 1}
        self.p = {k: v[..., row] if row is not None and k in own and v.dim() > own[k] and k not in ("y0", "k") else v for k, v in p.items()}
        for name in ("y0", "k"):
            self.p[name] = p[name] if row is None or p[name].dim() == 1 else p[name][row]
        self.given = parted(case, p)[:, row] if case.pad and row is not None else None
        self.z = torch.cat([self.p["y0"], torch.zeros(3)])
        self.t, self.rate, self.jump, self.place = self.p["begin"], torch.zeros(()), torch.zeros(()), -1
        self.m: Any = torch.zeros(())
        self.specs = specs(case)
        #: of each event its times, states before and after
        self.found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for spec in self.specs for name in spec.names}
        #: of doses; the sample that is to be where an event is, and the state there
        self.doses: list[tuple[Tensor, Tensor, Tensor]] = []
        self.marked: Tensor | None = None
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

    @property
    def fun(self) -> Callable[..., Tensor]:
        """The slope of state and integrals within one piece of the table."""
        u = self.input(self.place)

        def call(t: Tensor, z: Tensor, k: Tensor, W: Tensor, rest: Tensor, m: Any) -> Tensor:
            y, now = z[:-3], None if u is None else u(t)
            table = 0 * t if now is None else y[1] * now
            return torch.cat([self.slope(t, y, k, W, rest, m, now), torch.stack([(y**2).sum(), y[0] * t, table])])

        return call

    @property
    def args(self) -> tuple[Any, ...]:
        return self.p["k"], self.p["W"], torch.stack([self.rate + 0.0, self.jump + 0.0]), self.m + 0.0

    def step(self, t: Tensor, z: Tensor, h: Tensor) -> Tensor:
        """One step of the classical method: of no length it has the derivatives of the solution."""
        fun, rest = self.fun, self.args
        a = fun(t, z, *rest)
        b = fun(t + h / 2, z + h / 2 * a, *rest)
        c = fun(t + h / 2, z + h / 2 * b, *rest)
        return z + h / 6 * (a + 2 * b + 2 * c + fun(t + h, z + h * c, *rest))

    def to(self, end: Tensor) -> None:
        """Go on to a time, over the events in between."""
        p = self.p
        if not self.over and abs(float(end.detach() - self.t.detach())) < SHORT:
            self.t, self.z = end, self.step(self.t, self.z, end - self.t)
        while not self.over and float(end.detach() - self.t.detach()) > SAME:
            due = [s for s in self.specs if not s.at and s is not self.left and s.when(float(self.m))]
            # away from a zero that it starts at
            stop = end if self.left is None else torch.minimum(end, self.t + AWAY)
            events = [
                Event(lambda t, z, *args, s=s: s.value(t, z[:-3], p), s.direction, s.resets[0] is not None or s.terminal > 0) for s in due
            ]
            sol = solve_ivp(self.fun, (self.t, stop), self.z, self.args, events=events or None, **TIGHT)
            hit = None
            for s, record in zip(due, sol.events, strict=True):
                ends = s.resets[0] is not None or s.terminal
                if ends and len(record.t):
                    hit = s, record.t[0], record.y[0]
                elif not ends:
                    self.found[s.names[0]] += [(t, z[:-3], z[:-3]) for t, z in zip(record.t, record.y, strict=True)]
                    for t, z in zip(record.t, record.y, strict=True):
                        self.mark(t, z)
            if hit is None:
                self.t, self.z, self.left = stop, sol.y[-1], None
                continue
            spec, self.t, self.z = hit
            self.reset(spec)
            if spec.names[0] == "event":
                self.mark(self.t, self.z)

    def mark(self, t: Tensor, z: Tensor) -> None:
        """The sample at the time of the first event, which moves by itself."""
        if self.case.output == "mark" and self.marked is None:
            mark = self.p["mark"]
            self.marked = self.step(t, z, mark - mark.detach() + t.detach() - t)[:-3]

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
        elif kind in ("begin", "until"):
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
        given = list(zip(p["times"], p["amounts"], p["duration"].expand(2), p["lag"].expand(2), strict=True)) if dose else []
        given = given if self.given is None else [one for one, on in zip(given, self.given.tolist(), strict=True) if on]
        if dose in ("infusion", "both"):
            for t, a, length, _ in given:
                acts += [(t, "begin", a / length), (t + length, "until", -a / length)]
        if dose in ("bolus", "both", "lag"):
            acts += [(t + {"bolus": 0.0, "both": 0.01, "lag": lag}[dose], "bolus", a) for t, a, _, lag in given]
        acts += [(p[s.at], "event", s) for s in self.specs if s.at]
        acts += [(p["s"], "jump", p["jump"])] if self.case.switch else []
        return acts + ([(torch.tensor(FAILS), "fail", None)] if self.case.dead == "fail" and self.row == 1 else [])

    def ordered(self, end: Tensor, wanted: list[Act]) -> list[list[Act]]:
        """What happens up to the ``end``, and samples, in groups at one time each."""

        def there(act: Act) -> bool:
            ahead = float(end.detach() - act[0].detach())
            # knots at the end are seen from within
            return ahead > SAME or (act[1] in ("begin", "until", "bolus", "event") and ahead >= -SAME)

        groups: list[list[Act]] = []
        last = -float("inf")
        for act in sorted([act for act in self.acts() if there(act)] + wanted, key=lambda a: float(a[0].detach())):
            now = float(act[0].detach())
            if now - last > SAME:
                groups.append([])
            groups[-1].append(act)
            last = now
        return [sorted(group, key=lambda a: RANKS[a[1]]) for group in groups]

    def run(self, shares: tuple[float, ...]) -> list[Tensor]:
        """The states at parts of the span, NaN behind its end."""
        begin, end = self.p["begin"], self.p["end"]
        end = begin if self.case.dead == "span" and self.row == 1 else end
        out = [self.z[:-3]] * len(shares)
        times = [begin + share * (end - begin) for share in shares]
        if self.case.marks:
            times = list(self.p["marks"])
        if self.case.output == "mark":
            times[1] = times[1].detach() + self.p["mark"] - self.p["mark"].detach()
        for group in self.ordered(end, [(t, "sample", i) for i, t in enumerate(times)]):
            for t, kind, what in group:
                ended = self.over
                if abs(float(t.detach() - begin.detach())) > SAME or kind not in ("knot", "jump"):
                    self.to(t)
                if kind == "sample":
                    out[what] = self.z[:-3]
                    if self.failed or (len(shares) > 2 and (ended or self.over)):
                        out[what] = torch.full_like(out[what], float("nan"))
                    continue
                before = self.t, self.z[:-3]
                self.happen(kind, what)
                if kind == "bolus" and self.case.output == "given" and not ended:
                    self.noted(before, group[0][1] == "bolus" and what is group[0][2])
        self.to(end)
        if self.case.output == "mark" and self.marked is not None:
            out[1] = self.marked
        return out

    def noted(self, before: tuple[Tensor, Tensor], first: bool) -> None:
        """A dose in the record: of those at one time the state before the first one and behind the last one; of implicit equations that is
        looked at when the first one is."""
        if first:
            self.doses.append((*before, self.z[:-3]))
            return
        t, y, _ = self.doses[-1]
        z = self.z if self.case.door not in IMPLICIT else self.step(self.t, self.z, t - self.t)
        self.doses[-1] = t, y, z[:-3]


def chained(case: Case, p: dict[str, Tensor]) -> list[Tensor]:
    """What `solved` gives, by chains."""
    if case.door == "odeint_event":
        p = p | {"end": p["end"] + 20}
    chains = [Chain(case, p, row) for row in (range(case.rows) if case.rows else [None])]
    many = case.output in ("samples", "list", "mark")
    shares = (0.0, 0.5, 1.0) if case.output == "mark" else SHARES if many else (0.4, 1.0) if case.output == "dense" else (1.0,)
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
    if case.output == "given":
        none = shown(torch.zeros(case.n))
        each = [[(t, shown(y), shown(a)) for t, y, a in c.doses] for c in chains]
        out.append(joined([total([t for t, _, _ in e], torch.zeros(())) for e in each]))
        out += [joined([total([one[i] for one in e], none) for e in each]) for i in (1, 2)]
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
