"""Right-hand sides in their pure form, as source text: ``core(t, y, p)`` with ``t`` of shape (*lead), ``y`` (*lead, n), ``p`` (*lead, m).

The reference calls this form; cases wrap the same text in whatever users do (closures, modules, in-place code, layouts of the state).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

__all__ = ["Equations", "draw_equations", "function"]


@dataclass(frozen=True)
class Equations:
    """A system with typical initial values and parameters."""

    name: str
    text: str
    y0: tuple[float, ...]
    p: tuple[float, ...]
    #: of order one unless the time scale is another
    span: float = 1.0
    #: whether a second derivative exists and is continuous
    smooth: bool = True
    #: greatest rate times the span: explicit methods take about so many steps
    stiffness: float = 1.0
    #: complex-differentiable when pairs of components are read as complex numbers
    holomorphic: bool = False
    #: an energy whose gradient the right-hand side is made of, as text, and how
    energy: str = ""

    @property
    def n(self) -> int:
        return len(self.y0)


def near(rng: Random, *typical: float, by: float = 0.2) -> tuple[float, ...]:
    return tuple(round(x * (1 + by * rng.uniform(-1, 1)), 4) for x in typical)


def some(rng: Random, count: int, low: float = -1.0, high: float = 1.0) -> tuple[float, ...]:
    return tuple(round(rng.uniform(low, high), 4) for _ in range(count))


def function(*lines: str) -> str:
    return "def core(t, y, p):\n" + "".join(f"    {line}\n" for line in lines)


def linear(rng: Random) -> Equations:
    n = rng.choice([2, 2, 3, 4])
    rates = [-rng.uniform(0.1, 2.0) for _ in range(n)]
    rows = [[round((rates[i] if i == j else rng.uniform(-1, 1) * (2.0 if i < j else -2.0) / n), 4) for j in range(n)] for i in range(n)]
    text = function(
        f"matrix = torch.tensor({rows}, dtype=y.dtype)",
        "wave = torch.sin(p[..., 1:2] * t[..., None])",
        "return p[..., 0:1] * (y @ matrix.mT) + p[..., 2:3] * wave",
    )
    return Equations("linear", text, some(rng, n), near(rng, 1.0, 3.0, 0.5))


def relaxing(rng: Random) -> Equations:
    """Towards a moving target, fast."""
    rate = round(math.exp(rng.uniform(math.log(20), math.log(1000))), 1)
    text = function(
        "x, v = y.unbind(-1)",
        "a, b, c = p.unbind(-1)",
        f"return torch.stack([-{rate} * a * (x - torch.cos(b * t)) + v, -c * v + 0.3 * x], -1)",
    )
    return Equations("relaxing", text, (1.2, 0.5), near(rng, 1.0, 2.0, 0.7), stiffness=rate)


def kinetics(rng: Random) -> Equations:
    fast = round(math.exp(rng.uniform(math.log(5), math.log(800))), 1)
    text = function(
        "a, b, c, d = y.unbind(-1)",
        "k1, k2, k3 = p.unbind(-1)",
        f"r1, r2, r3 = k1 * a, {fast} * k2 * b * c, k3 * {fast / 4} * (c - d)",
        "return torch.stack([-r1 + 0.1 * d, r1 - r2, r1 - r2 - r3, r2 + r3 - 0.1 * d], -1)",
    )
    return Equations("kinetics", text, (1.0, 0.2, 0.1, 0.3), near(rng, 1.0, 0.5, 0.4), stiffness=fast)


def lotka_volterra(rng: Random) -> Equations:
    text = function("x, y = y.unbind(-1)", "a, b, c, d = p.unbind(-1)", "return torch.stack([a * x - b * x * y, d * x * y - c * y], -1)")
    return Equations("Lotka-Volterra", text, near(rng, 1.0, 1.5), near(rng, 1.5, 1.0, 2.0, 1.0), span=1.5)


def van_der_pol(rng: Random) -> Equations:
    mu = rng.choice([1.0, 5.0])
    text = function("x, v = y.unbind(-1)", "m, k = p.unbind(-1)", "return torch.stack([v, m * (1 - x * x) * v - k * x], -1)")
    return Equations("van der Pol", text, near(rng, 2.0, 0.5), near(rng, mu, 1.0), stiffness=4 * mu)


def duffing(rng: Random) -> Equations:
    text = function(
        "x, v = y.unbind(-1)",
        "a, b, w = p.unbind(-1)",
        "return torch.stack([v, -a * v - b * x**3 + torch.cos(w * t)], -1)",
    )
    return Equations("Duffing", text, some(rng, 2), near(rng, 0.3, 1.0, 2.0), span=1.5)


def logistic(rng: Random) -> Equations:
    text = function("r, k = p.unbind(-1)", "x = y[..., 0]", "return (r * x * (1 - x / k) - 0.2 * torch.sin(t) * x)[..., None]")
    return Equations("logistic", text, near(rng, 0.4), near(rng, 1.5, 1.2), span=2.0)


def rotation(rng: Random) -> Equations:
    text = function(
        "a, b = p[..., :1], p[..., 1:]",
        "x, v = y[..., 0::2], y[..., 1::2]",
        "return torch.stack([-a * x - b * v + 0.3, -a * v + b * x], -1).flatten(-2)",
    )
    return Equations("rotation", text, some(rng, rng.choice([2, 4])), near(rng, 0.4, 2.0), holomorphic=True)


def network(rng: Random) -> Equations:
    hidden = rng.choice([3, 5])
    text = function(
        f"u = p[..., : {2 * hidden}].unflatten(-1, ({hidden}, 2))",
        f"b, w = p[..., {2 * hidden} : {3 * hidden}], p[..., {3 * hidden} :].unflatten(-1, (2, {hidden}))",
        "h = torch.tanh((u @ y[..., None])[..., 0] + b + torch.sin(t)[..., None])",
        "return (w @ h[..., None])[..., 0] - 0.5 * y",
    )
    return Equations("network", text, some(rng, 2), some(rng, 5 * hidden))


def branches(rng: Random) -> Equations:
    text = function(
        "x, v = y.unbind(-1)",
        "a, b, c = p.unbind(-1)",
        "valve = torch.where(x > b, 4.0 * (x - b), 0.3 * (x - b))",
        "return torch.stack([v - 0.2 * x, -c * valve - a * v], -1)",
    )
    return Equations("branches", text, near(rng, 1.0, -1.5), near(rng, 0.3, 0.4, 1.2), smooth=False)


def forcing_table(rng: Random) -> Equations:
    text = function(
        "knots = torch.linspace(-0.5, 2.5, 7, dtype=y.dtype)",
        "hats = (1 - (t[..., None] - knots).abs() / 0.5).clamp(min=0)",
        "force = (hats * p[..., :7]).sum(-1)",
        "x, v = y.unbind(-1)",
        "return torch.stack([v, -p[..., 7] * x - 0.4 * v + force], -1)",
    )
    return Equations("forcing table", text, some(rng, 2), (*some(rng, 7), 1.3), smooth=False)


def pendulum(rng: Random) -> Equations:
    text = function(
        "q, v = y.unbind(-1)",
        "m, k, d = p.unbind(-1)",
        "return torch.stack([m * v, -k * torch.sin(q) - 0.5 * q**3 - d * v * m], -1)",
    )
    energy = "(0.5 * p[..., 0] * y[..., 1] ** 2 - p[..., 1] * torch.cos(y[..., 0]) + 0.125 * y[..., 0] ** 4)"
    return Equations("pendulum", text, near(rng, 0.8, 0.3), near(rng, 1.2, 1.5, 0.2), span=1.5, energy=energy)


TERMS = [
    "{p} * torch.sin({x})",
    "{p} * {x} / (1 + {y} ** 2)",
    "{p} * torch.tanh({x} * {y})",
    "{p} * torch.cos({c} * t) * {x}",
    "{p} * torch.exp(-{x} ** 2)",
    "{c} * torch.sin({p} * t + {x})",
    "torch.nn.functional.softplus({p} * {x}) * {c}",
    "torch.atan({p} + {x} * {y})",
    "{c} * torch.sqrt(1 + {p} ** 2 + {x} ** 2)",
]


def expressions(rng: Random) -> Equations:
    """Sums of terms from a small grammar, damped, so that everything stays bounded."""
    n, m = rng.choice([1, 2, 2, 3, 4]), rng.choice([2, 3, 4])
    rows = []
    for i in range(n):
        terms = [
            rng.choice(TERMS).format(
                p=f"p[..., {rng.randrange(m)}]",
                x=f"y[..., {rng.randrange(n)}]",
                y=f"y[..., {rng.randrange(n)}]",
                c=round(rng.uniform(0.3, 2), 2),
            )
            for _ in range(rng.choice([1, 2, 3]))
        ]
        rows.append(" + ".join([*terms, f"{-round(rng.uniform(0.1, 1.5), 2)} * y[..., {i}]"]))
    text = function("return torch.stack(", "    [", *[f"        {row}," for row in rows], "    ],", "    -1,", ")")
    return Equations("expressions", text, some(rng, n), some(rng, m, 0.3, 1.5), span=rng.choice([0.7, 1.0, 2.0]))


FAMILIES = [
    (expressions, 6), (linear, 2), (relaxing, 2), (kinetics, 2), (lotka_volterra, 1), (van_der_pol, 1), (duffing, 1), (logistic, 1),
    (rotation, 1), (network, 2), (branches, 1), (forcing_table, 1), (pendulum, 2),
]  # fmt: skip


def draw_equations(rng: Random) -> Equations:
    """One of all families."""
    makers, weights = zip(*FAMILIES, strict=True)
    return rng.choices(makers, weights)[0](rng)
