"""Cases of `tests.fuzz.hybrid` as users would solve them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import adjoint
from adjoint import Doses, Event, Forcing, SplitFunction, solve_dae, solve_ivp

from .hybrid_case import ALGEBRAIC, FAILS, HIGH, SHARES, Case, slope, specs
from .hybrid_ties import parted

__all__ = ["solved"]

STRATEGIES: dict[str, Any] = {
    "swept": adjoint.DiscreteAdjoint(keep_bytes=0),
    "checkpoints": adjoint.DiscreteAdjoint(checkpoints=4),
    "backprop": adjoint.Backprop(),
    "forward": adjoint.ForwardSensitivity(),
    "interpolating": adjoint.InterpolatingAdjoint(),
    "quadrature": adjoint.QuadratureAdjoint(),
    "backsolve": adjoint.BacksolveAdjoint(),
}

class Named(NamedTuple):
    first: Tensor
    rest: Any


def packed(kind: str, y: Tensor) -> Any:
    """A state ``(..., n)`` as users hold it; the second variable can take doses at the first or second place."""
    if kind == "dict":
        return {"a": y[..., 0], "b": y[..., 1:]}
    if kind == "tuple":
        return y[..., :1], y[..., 1:].unsqueeze(-1)
    if kind == "named":
        return Named(y[..., 0], [y[..., 1], y[..., 2:]])
    return torch.complex(y[..., 1:2], y[..., 0:1]) if kind == "complex" else y


def unpacked(kind: str, s: Any) -> Tensor:
    if kind == "dict":
        return torch.cat([s["a"].unsqueeze(-1), s["b"]], -1)
    if kind == "tuple":
        return torch.cat([s[0], s[1].squeeze(-1)], -1)
    if kind == "named":
        return torch.cat([s[0].unsqueeze(-1), s[1][0].unsqueeze(-1), s[1][1]], -1)
    return torch.cat([s.imag, s.real], -1) if kind == "complex" else s


class Holder(torch.nn.Module):
    """A right-hand side whose parameters are its attributes."""

    def __init__(self, call: Callable[..., Any], given: dict[str, Any]) -> None:
        super().__init__()
        self.call, self.given = call, given

    def forward(self, t: Tensor, y: Any, *mode: Any) -> Any:
        return self.call(self.given, t, y, *mode)


class Program:
    """Solves of a case, of the same functions with any parameters."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.real = torch.float32 if case.single else torch.float64
        self.sign = -1.0 if case.backwards else 1.0
        self.mode = case.event in ("mode", "held")
        self.augmented = case.door in ALGEBRAIC
        self.happening = [self.event(s, name, reset) for s in specs(case) for name, reset in zip(s.names, s.resets, strict=True)]
        self.fun, self.stiff, self.soft = self.written(), self.written(whole=False, stiff=True), self.written(whole=False)

    def take(self, p: dict[str, Tensor]) -> None:
        """Go on with these parameters."""
        case = self.case
        self.p = {k: v.to(self.real) if k in ("k", "W", "level", "c", "y0", "values", "amounts", "jump") else v for k, v in p.items()}
        names = ("k", "W", "level", "c", *(("s", "jump") if case.switch else ()), *(("clock",) if case.event == "clock" else ()))
        given: dict[str, Any] = {name: self.p[name] for name in names}
        given["table"] = self.table()
        # those that are no parameters, too
        given["bad"] = torch.tensor([0.0, 1.0, 0.0][: case.rows], dtype=self.real) if case.dead == "fail" else None
        self.given = {k: v for k, v in given.items() if v is not None}

    def table(self) -> Any:
        if not self.case.table:
            return None
        knots, values = self.p["knots"], self.p["values"]
        if not self.case.backwards:
            return Forcing(knots, values, self.case.table)
        # a value that holds from its knot on does so from the next one
        knots = knots[1:] if self.case.table == "constant" else knots
        return Forcing(-knots.flip(0), values.flip(0), self.case.table)

    def args(self) -> tuple[Any, ...]:
        if self.case.args == "flat":
            return tuple(self.given.values())
        return ({**self.given},) if self.case.args == "dict" else ()

    def read(self, given: tuple[Any, ...]) -> dict[str, Any]:
        if self.case.args == "flat":
            return dict(zip(self.given, given, strict=True))
        return given[0] if self.case.args == "dict" else self.given

    def input(self, q: dict[str, Any], t: Tensor) -> Any:
        return q["table"](t) if self.case.table else None

    def rate(self, q: dict[str, Any], t: Tensor, s: Any, *mode: Any, whole: bool = True, stiff: bool = False) -> Any:
        """The slope, as users write it; its parts of split ones."""
        case, time = self.case, self.sign * t
        y = s[..., :-1] if self.augmented else unpacked(case.pack, s)
        m = mode[0].to(self.real) if mode else 0.0
        d = slope(time, y, q["k"], q["W"], self.input(q, t), m, s[..., -1] if self.augmented else None)
        if case.switch:
            jump = torch.where(time < q["s"].to(time.dtype), 0.0, q["jump"])
            d = torch.cat([d[..., :1], d[..., 1:] + jump.unsqueeze(-1)], -1)
        if case.dead == "fail":
            d = d + torch.where((q["bad"] > 0) & (time > FAILS), float("nan"), 0.0).to(d.dtype).unsqueeze(-1)
        d = self.sign * d
        if not whole:
            part = -self.sign * torch.cat([0 * y[..., :1], q["k"][..., 1:] * y[..., 1:]], -1)
            d = part if stiff else d - part
        if self.augmented:
            return torch.cat([d, (s[..., -1:] - 0.2 * torch.tanh(y[..., 1:2])) * (1 + 0.1 * y[..., :1] ** 2)], -1)
        return packed(case.pack, d)

    def events(self) -> list[Any]:
        case, p = self.case, self.p
        events: list[Any] = []
        place = 0 if case.pack == "complex" else 1
        when = p["times"] if case.dose else torch.zeros(())
        if case.pad:
            when = torch.where(parted(case, p), when, float("nan"))
        if case.dose in ("infusion", "both"):
            events.append(Doses(when, p["amounts"], place, duration=p["duration"], name="drip"))
        if case.dose in ("bolus", "lag", "both"):
            when = when + 0.01 if case.dose == "both" else when
            events.append(Doses(when, p["amounts"], place, lag=p["lag"] if case.dose == "lag" else 0.0))
        return events + self.happening

    def event(self, spec: Any, name: str, reset: Any) -> Event:
        def state(s: Any) -> Tensor:
            return s[..., :-1] if self.augmented else unpacked(self.case.pack, s)

        def value(t: Tensor, s: Any, *rest: Any) -> Tensor:
            return spec.value(self.sign * t, state(s), self.read(rest[int(self.mode) :]))

        def changed(t: Tensor, s: Any, *rest: Any) -> Any:
            m = rest[0] if self.mode else 0.0
            y, m = reset(self.sign * t, state(s), m, self.read(rest[int(self.mode) :]))
            s = torch.cat([y, s[..., -1:]], -1) if self.augmented else packed(self.case.pack, y)
            return (s, m) if self.mode else s

        direction = spec.direction
        return Event(value, direction, spec.terminal, None if reset is None else changed, name)

    def options(self) -> dict[str, Any]:
        case, p = self.case, self.p
        tol = 1e-5 if case.single else 1e-8 if case.method in HIGH else 1e-7
        keys: dict[str, Any] = {"rtol": tol, "atol": tol / 100, "max_steps": 20_000, "method": case.method, "batched": case.own}
        keys |= {"gradient": STRATEGIES.get(case.gradient), "events": self.events() or None}
        keys["dense_output"] = case.output in ("dense", "left")
        if self.mode:
            keys["mode"] = 0 if case.event == "mode" else torch.tensor(0.0, dtype=self.real)
        if case.event == "most":
            keys["max_events"] = 2
        if case.event == "most" or case.dead == "fail":
            keys["throw"] = False
        if case.switch:
            keys["step_ts"] = (self.sign * p["s"]).unsqueeze(0)
        if case.integral:
            keys["quadrature"] = self.integrand
        if case.compiled:
            keys["compile"] = True
        keys |= {"max_step": {"max_step": 0.2}, "max norm": {"norm": "max"}, "first_step": {"first_step": 0.01}}.get(case.options, {})
        return keys

    def integrand(self, t: Tensor, s: Any, *rest: Any) -> Any:
        q = self.read(rest[int(self.mode) :])
        y = s[..., :-1] if self.augmented else unpacked(self.case.pack, s)
        square = (y**2).sum(-1)
        if self.case.integral == "table":
            return y[..., 1] * q["table"](t)
        return {"a": square, "b": (y[..., 0] * self.sign * t).unsqueeze(-1)} if self.case.integral == "tree" else square

    def span(self) -> tuple[Tensor, Tensor]:
        p, end = self.p, self.p["end"]
        if self.case.dead == "span":
            alive = torch.tensor([1.0, 0.0, 1.0][: self.case.rows])
            end = p["begin"] + (end - p["begin"]) * alive
        return self.sign * p["begin"], self.sign * end

    def solve(self) -> Any:
        case, p, keys = self.case, self.p, self.options()
        span = self.span()
        if case.output in ("samples", "list"):
            shares = torch.tensor(SHARES)
            length = span[1] - span[0]
            times = span[0] + (shares.unsqueeze(-1) * length if length.dim() else shares * length)
            times = self.sign * p["marks"] if case.marks else times
            keys["t_eval"] = list(times.unbind()) if case.output == "list" else times
        elif case.output == "steps":
            keys["t_eval"] = "steps"
        elif case.output == "mark":
            keys["t_eval"] = self.marked(span)
        return self.solved(span, keys)

    def marked(self, span: tuple[Tensor, Tensor]) -> Tensor:
        """Three sample times, of which the second one is that of the first event, and moves by itself."""
        found = self.solved(span, self.options()).events["event"].t.detach()
        start, end = (x.expand(self.case.rows) for x in span) if self.case.own else span
        middle = start + 0.5 * (end - start)
        at = torch.where(found[0].isnan(), middle, found[0]) if len(found) else middle
        mark = self.p["mark"]
        return torch.stack([start.expand_as(at), at + self.sign * (mark - mark.detach()), end.expand_as(at)])

    def solved(self, span: tuple[Tensor, ...], keys: dict[str, Any]) -> Any:
        case, p = self.case, self.p
        y0 = packed(case.pack, p["y0"])
        if self.augmented:
            y0 = torch.cat([y0, 0.1 + 0 * y0[..., :1]], -1)
        fun: Any = Holder(self.rate, self.given) if case.args == "module" else self.fun
        if case.door in ("dae", "algebraic"):
            return solve_dae(self.residual(fun), span, y0, None, self.args(), **keys)
        if case.door == "split":
            fun = SplitFunction(self.soft, self.stiff)
        size = sum(x.numel() for x in tree_leaves(y0)) // max(case.rows if case.own else 1, 1)
        if case.door == "mass":
            keys["mass_matrix"] = torch.eye(size, dtype=tree_leaves(y0)[0].dtype)
        elif case.door == "singular":
            keys["mass_matrix"] = torch.diag(torch.tensor([1.0] * case.n + [0.0], dtype=self.real))
        elif case.door == "own mass":
            one = torch.eye(size, dtype=tree_leaves(y0)[0].dtype)
            keys["mass_matrix"] = lambda t, s, *rest: self.mass(s).unsqueeze(-1).unsqueeze(-1) * one
            heavy = lambda t, s, *rest: tree_map(lambda x: x * wide(self.mass(s), x), fun(t, s, *rest))  # noqa: E731
            return solve_ivp(heavy, span, y0, self.args(), **keys)
        return solve_ivp(fun, span, y0, self.args(), **keys)

    def written(self, **part: bool) -> Callable[..., Any]:
        """The right-hand side as a function."""
        count = int(self.mode)
        return lambda t, s, *rest: self.rate(self.read(rest[count:]), t, s, *rest[:count], **part)

    def mass(self, s: Any) -> Tensor:
        return 1.5 + 0.5 * torch.tanh(unpacked(self.case.pack, s)[..., 0])

    def residual(self, fun: Callable[..., Any]) -> Callable[..., Any]:
        """``A (y' - f) = 0`` with a matrix ``A`` that is none of the identity."""

        def call(t: Tensor, s: Any, sp: Any, *rest: Any) -> Any:
            d = fun(t, s, *rest)
            if self.augmented:
                return torch.cat([sp[..., :-1] - d[..., :-1], d[..., -1:]], -1)
            gap = tree_map(torch.sub, sp, d)
            if self.case.pack != "tensor":
                return gap
            return gap + 0.2 * torch.cat([gap[..., 1:], 0 * gap[..., :1]], -1)

        return call

    def shown(self, s: Any) -> Tensor:
        """What is looked at of states."""
        return s if self.augmented else unpacked(self.case.pack, s)


def wide(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(x.shape + (1,) * (like.dim() - x.dim())).to(like.dtype)


def weighted(t: Tensor, values: Tensor | None = None) -> Tensor:
    """Times ``(E, ...)``, or values at them, each with a weight of its own, summed."""
    x = t if values is None else values
    weights = (1 + 0.3 * torch.arange(t.shape[0], dtype=x.dtype)).reshape(-1, *[1] * (x.dim() - 1))
    return (torch.where(x.isnan(), 0.0, x) * weights).sum(0)


def solved(case: Case, p: dict[str, Tensor]) -> list[Tensor]:
    """What a case looks at, with the trajectories first."""
    if case.door in ("layer", "odeint", "odeint_event"):
        return by_doors(case, p)
    program = Program(case)
    if case.again:
        names = ("y0", "k", "c", "W", "amounts", "values", "jump", "level")
        program.take({name: 1.03 * x.detach() if name in names else x.detach() for name, x in p.items()})
        program.solve()
    program.take(p)
    sol = program.solve()
    out = []
    if case.output in ("samples", "list", "mark"):
        y = program.shown(sol.y)
        out.append(y.movedim(0, 1) if case.own else y)
    elif case.output == "steps":
        t, y = sol.t, program.shown(sol.y)
        present = ~t.detach().isnan()
        last = (present.cumsum(0) == present.sum(0)) & present
        out += [torch.where(last.unsqueeze(-1), y, 0.0).sum(0), program.sign * torch.where(last, t, 0.0).sum(0)]
        failed = torch.as_tensor(sol.status) < 0
        out = [torch.where(failed.unsqueeze(-1), float("nan"), out[0]), torch.where(failed, float("nan"), out[1])]
    else:
        out.append(program.shown(tree_map(lambda x: x[-1], sol.y)))
    if case.output == "dense":
        start, end = program.span()
        at = start + 0.4 * (end - start)
        out.append(program.shown(tree_map(lambda x: x[0], sol(at.unsqueeze(0))) if at.dim() else sol(at)))
    if case.output == "slopes":
        out.append(program.sign * program.shown(tree_map(lambda x: x[-1], sol.yp)) if sol.yp is not None else 0 * out[0])
    if case.output == "given":
        record = sol.events["doses"]
        out += [program.sign * weighted(record.t), *(weighted(record.t, program.shown(y)) for y in (record.y, record.after))]
    if case.output == "left":
        t = sol.events["event"].t
        out.append(weighted(t, program.shown(sol(t, side="left"))) if len(t) else 0 * out[0])
    if case.integral:
        out += [program.sign * (x.squeeze(-1) if x.dim() > int(case.own) else x) for x in tree_leaves(sol.quadrature)]
    if case.output in ("times", "states"):
        for name in (name for spec in specs(case) for name in spec.names):
            record = sol.events[name]
            out.append(program.sign * weighted(record.t))
            if case.output == "states":
                out.append(weighted(record.t, program.shown(record.y)))
                if record.after is not None:
                    out.append(weighted(record.t, program.shown(record.after)))
    return out


def by_doors(case: Case, p: dict[str, Tensor]) -> list[Tensor]:
    """By layers and functions that take no ``args``."""
    program = Program(case)
    program.take(p)
    keys = program.options()
    span, shares = program.span(), torch.tensor(SHARES)
    times = span[0] + shares * (span[1] - span[0])
    if case.door == "layer":
        options = {k: keys[k] for k in ("rtol", "atol", "method", "batched", "gradient")}
        layer = adjoint.nn.NeuralODE(Holder(program.rate, program.given), time_dependent=True, **options)
        y = layer(p["y0"], t_eval=times if case.output == "samples" else None, t_span=span)
        return [y.movedim(0, 1) if case.own and case.output == "samples" else y]
    knots = {"jump_t": p["knots"].detach().sort().values} if case.table and not case.table_rows else {}
    given = {"rtol": 1e-8, "atol": 1e-10, "method": case.method, "options": knots}
    if case.door == "odeint":
        y = adjoint.odeint(program.written(), p["y0"], times, **given)
        return [y.movedim(0, 1) if case.own else y] if case.output == "samples" else [y[-1]]
    value = specs(case)[0].value
    t, y = adjoint.odeint_event(program.written(), p["y0"], span[0], event_fn=lambda t, y: value(t, y, program.given), **given)
    return [t, y[-1]]
