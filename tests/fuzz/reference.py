"""The truth: SciPy's DOP853 on the pure form of the equations, at five points along a direction at once.

Values are those in the middle; first and second derivatives are differences of fourth order. Every segment between two times of interest
is integrated on its own, so that nothing is interpolated, and moving times are moved exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from .case import Case, start_of

__all__ = ["SPACING", "Pure", "Truth", "Unsharp", "pure_form", "truth"]

#: the five points, in units of `SPACING`
POINTS = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
SPACING = 5e-3
RTOL, ATOL = 3e-12, 1e-13


class Unsharp(Exception):
    """Differences do not tell the derivative to the precision that a judgement needs."""


@dataclass(frozen=True)
class Pure:
    """``rate(t, y, p)`` of the differential variables, and ``shown(t, y, p)`` what the state of the case is."""

    rate: Callable[[Tensor, Tensor, Tensor], Tensor]
    shown: Callable[[Tensor, Tensor, Tensor], Tensor]


def constraint(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    """``sinh z`` of the algebraic variable z that some cases add."""
    return 0.6 * y[..., :1] + 0.4 * torch.sin(2 * t[..., None]) * p[..., :1] + 0.2 * p[..., -1:]


def pure_form(case: Case) -> Pure:
    namespace: dict[str, Any] = {"torch": torch}
    exec(case.equations.text, namespace)
    core = namespace["core"]
    if not case.algebraic:
        return Pure(core, lambda t, y, p: y)
    unit = torch.zeros(case.equations.n, dtype=torch.float64)
    unit[0] = 0.3
    return Pure(
        lambda t, y, p: core(t, y, p) + torch.asinh(constraint(t, y, p)) * unit,
        lambda t, y, p: torch.cat([y, torch.asinh(constraint(t, y, p))], -1),
    )


def integrand(y: Tensor, p: Tensor) -> Tensor:
    return (y**2).sum(-1) * (1 + 0.1 * p[..., 0])


class Flow:
    """Carries states ``(*lead, n)``, with an integral behind them, from times to times ``(*lead,)``."""

    def __init__(self, pure: Pure, p: Tensor) -> None:
        self.pure, self.p = pure, p

    def rate(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.cat([self.pure.rate(t, y[..., :-1], self.p), integrand(y[..., :-1], self.p)[..., None]], -1)

    def __call__(self, start: Tensor, stop: Tensor, y: Tensor) -> Tensor:
        return y if bool((start == stop).all()) else self.fractions(start, stop, y, [1.0])[0]

    def fractions(self, start: Tensor, stop: Tensor, y: Tensor, at: list[float]) -> Tensor:
        """States at fractions of the way; those inside of it are interpolated."""
        length = stop - start

        def scaled(s: float, flat: np.ndarray) -> np.ndarray:
            now = torch.from_numpy(flat).reshape(y.shape)
            return (length[..., None] * self.rate(start + s * length, now)).reshape(-1).numpy()

        sol = solve_ivp(scaled, (0.0, 1.0), y.reshape(-1).numpy(), method="DOP853", rtol=RTOL, atol=ATOL, t_eval=at)
        if not sol.success or not np.isfinite(sol.y).all():
            raise Unsharp(f"the reference did not get to the end: {sol.message}")
        return torch.from_numpy(sol.y.T.copy()).reshape(len(at), *y.shape)


def points(case: Case, spacing: float) -> dict[str, Tensor]:
    """All numbers at the five points: a leading dimension of five."""
    out = {}
    for name, value in case.values.items():
        move = (spacing * POINTS).reshape(-1, *[1] * value.dim())
        out[name] = value + move * case.directions.get(name, torch.zeros_like(value))
    return out


@dataclass(frozen=True)
class Truth:
    """The loss and its first two derivatives along the direction, with the sizes of what was added up."""

    value: float
    first: float
    second: float
    size: float
    first_size: float
    second_size: float


def outputs(case: Case, spacing: float) -> dict[str, Tensor]:
    """What the loss is made of, at the five points: the point leads."""
    x, pure = points(case, spacing), pure_form(case)
    if case.door == "solve_root":
        return {"samples": root(pure, x)[:, None]}
    flow = Flow(pure, x["p"])
    now, y = x["t0"], torch.cat([start_of(case.shared, x["y0"]), torch.zeros_like(x["y0"][..., :1])], -1)
    if case.times in ("ends", "steps"):
        targets = [x["t0"], x["t1"]][case.times == "steps" :]
    else:
        targets = list(x["ts"].unbind(1))
    out: dict[str, Tensor] = {}
    stop = x["t1"]
    if case.event:
        when, state = crossing(case, flow, x, now, y)
        crosses = torch.tensor(case.crosses)
        out |= {"event_t": when, "event_y": pure.shown(when, state[..., :-1], x["p"])}
        if case.event == "terminal":
            stop = torch.where(crosses, when, stop)
            targets = [torch.where(crosses & (target == x["t1"]), when, target) for target in targets]
    samples = []
    for target in targets:
        y, now = flow(now, target, y), target
        samples.append(pure.shown(now, y[..., :-1], x["p"]))
    if samples:
        out["samples"] = torch.stack(samples, 1)
    if case.quadrature:
        out["integral"] = flow(now, stop, y)[..., -1]
    return out


def root(pure: Pure, x: dict[str, Tensor]) -> Tensor:
    """``y = y0 + (t1 - t0) f(t0, y)`` by Newton's iteration, where no other root is met on the way to it and beyond."""
    size, guess = (x["t1"] - x["t0"])[..., None], x["y0"] + 0.02

    def residual(y: Tensor) -> Tensor:
        return y - x["y0"] - size * pure.rate(x["t0"], y, x["p"])

    def newton(y: Tensor) -> Tensor:
        for _ in range(30):
            at = y.detach().requires_grad_()
            value = residual(at)
            rows = [torch.autograd.grad(value[..., i].sum(), at, retain_graph=True, materialize_grads=True)[0] for i in range(y.shape[-1])]
            y = y - torch.linalg.solve_ex(torch.stack(rows, -2), value.detach())[0]
        return y

    y = newton(guess)
    if not float(residual(y).detach().abs().max()) <= 1e-12:
        raise Unsharp("the reference found no root")
    for share in (0.5, 1.3, 2.0):
        other = newton(guess + share * (y - guess))
        found = residual(other).detach().abs().amax(-1) <= 1e-12
        if bool((found & ((other - y).abs() > 1e-6 * (1 + y.abs())).any(-1)).any()):
            raise Unsharp("there are several roots")
    return y


def crossing(case: Case, flow: Flow, x: dict[str, Tensor], now: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Times and states of the event, by Newton's iteration from where it was drawn."""
    shown = flow.pure.shown
    when = torch.where(torch.tensor(case.crosses), x["near"], x["t0"])
    state = flow(now, when, y)
    for _ in range(6):
        with torch.no_grad():
            value = shown(when, state[..., :-1], flow.p)[..., case.component] - x["level"]
            slope = flow.rate(when, state)[..., case.component]
        step = torch.where(torch.tensor(case.crosses), -value / slope, 0.0)
        state, when = flow(when, when + step, state), when + step
    return when, state


def truth(case: Case, spacing: float = SPACING) -> Truth:
    """Raises `Unsharp` where differences of two orders disagree."""
    out = outputs(case, spacing)
    total, size, first_size = torch.zeros(5, dtype=torch.float64), 0.0, 0.0
    second_size = 0.0
    alive = torch.tensor(case.alive)
    for name, value in out.items():
        weight = case.weights[name]
        keep = alive & torch.tensor(case.crosses) if name.startswith("event") else alive
        keep = keep.reshape(*[1] * (1 if name == "samples" else 0), -1, *[1] * (value.dim() - (3 if name == "samples" else 2)))
        linear = torch.where(keep, weight * value, 0.0)
        terms = linear + 0.25 * linear * value
        dims = tuple(range(1, terms.dim()))
        total = total + terms.sum(dims)
        slopes = (8 * (terms[3] - terms[1]) - (terms[4] - terms[0])) / (12 * spacing)
        bends = (16 * (terms[1] + terms[3]) - 30 * terms[2] - terms[0] - terms[4]) / (12 * spacing**2)
        size, first_size, second_size = (
            size + float(terms[2].abs().sum()),
            first_size + float(slopes.abs().sum()),
            second_size + float(bends.abs().sum()),
        )
    low2, low, mid, high, high2 = total.tolist()
    first = (8 * (high - low) - (high2 - low2)) / (12 * spacing)
    coarse = (high - low) / (2 * spacing)
    second = (16 * (high + low) - 30 * mid - high2 - low2) / (12 * spacing**2)
    if not np.isfinite([mid, first, second]).all():
        raise Unsharp("not finite")
    if abs(first - coarse) > 0.02 * (first_size + 1e-3 * size):
        raise Unsharp("bends much along the direction")
    return Truth(mid, first, second, size, first_size, second_size)
