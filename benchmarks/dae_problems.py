"""Differential-algebraic systems in the form of `benchmarks.frameworks`, and accurate solutions that no DAE solver made.

Every problem is given twice: fully implicit, ``F(t, y, y') = 0``, and semi-explicit of index 1, ``x' = f(t, x, z), 0 = g(t, x, z)``, which
is what CasADi takes. Truth comes from the second: SciPy's Radau at 1e-12 on ``x' = f(t, x, z(t, x))`` with Newton's iteration for ``z``.
Robertson, Akzo Nobel and the transistor amplifier are those of the test set for initial value problem solvers (Mazzia & Magherini, Bari).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .frameworks import Ops, jax_ops

__all__ = ["DAE", "DaeProblem", "reduced", "residual"]


@dataclass(frozen=True)
class DaeProblem:
    """``semi(ops, t, x, z, p) -> (f, g)`` from ``x0`` at 0 to ``end``; ``z0`` is a guess.

    ``join(ops, x, z) -> y`` and ``differential(ops, y) -> x`` where ``y`` is not just ``(x, z)``. ``implicit(ops, t, y, yp, p) -> F`` where
    it is not ``(x' - f, g)``. ``small``: as for `OdeProblem`. ``algebraic``: places in ``y`` of algebraic variables. ``index``: of the
    implicit form.
    """

    name: str
    text: str
    semi: Callable[..., Any]
    x0: np.ndarray
    z0: np.ndarray
    p: np.ndarray
    end: float
    small: float
    vector: bool = False
    implicit: Callable[..., Any] | None = None
    join: Callable[..., Any] | None = None
    differential: Callable[..., Any] | None = None
    algebraic: tuple[int, ...] = ()
    index: int = 1

    def whole(self, ops: Ops, x: Any, z: Any) -> Any:
        """``y``, in the problem's form."""
        if self.join is not None:
            return self.join(ops, x, z)
        return ops.cat([x, z]) if self.vector else [*x, *z]

    def state(self, ops: Ops, y: Any) -> Any:
        """``x``, in the problem's form."""
        if self.differential is not None:
            return self.differential(ops, y)
        return ops.part(y, 0, self.x0.size) if self.vector else y[: self.x0.size]


def residual(problem: DaeProblem, highest: int = 2) -> Callable[..., Any]:
    """``F(ops, t, y, y', p)``, of index 1 where that of the implicit form is above ``highest``."""
    if problem.implicit is not None and problem.index <= highest:
        return problem.implicit
    k = problem.x0.size

    def implicit(ops: Ops, t: Any, y: Any, yp: Any, p: Any) -> Any:
        if problem.vector:
            n = k + problem.z0.size
            f, g = problem.semi(ops, t, ops.part(y, 0, k), ops.part(y, k, n), p)
            return ops.cat([ops.part(yp, 0, k) - f, g])
        f, g = problem.semi(ops, t, y[:k], y[k:], p)
        return [*(a - b for a, b in zip(yp[:k], f, strict=True)), *g]

    return implicit


def robertson(ops: Ops, t: Any, x: Sequence[Any], z: Sequence[Any], p: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Conservation of mass in place of the third rate."""
    (a, b), (c,) = x, z
    first, second, third = p[0] * a, p[1] * b * c, p[2] * b * b
    return [second - first, first - second - third], [a + b + c - 1]


def akzo(ops: Ops, t: Any, x: Sequence[Any], z: Sequence[Any], p: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Akzo Nobel's reaction with carbon dioxide flowing in."""
    (a, b, c, d, e), (f,) = x, z
    k1, k2, k3, k4, kla = p
    ratio, ks, pressure, henry = 34.4, 115.83, 0.9, 737.0
    root = ops.sqrt(b)
    r1, r2, r3, r4, r5 = k1 * a * a * a * a * root, k2 * c * d, k2 / ratio * a * e, k3 * a * d * d, k4 * f * f * root
    inflow = kla * (pressure / henry - b)
    rates = [-2 * r1 + r2 - r3 - r4, -r1 / 2 - r4 - r5 / 2 + inflow, r1 - r2 + r3, -r2 + r3 - 2 * r4, r2 - r3 + r5]
    return rates, [ks * a * d - f]


_C = [k * 1e-6 for k in range(1, 6)]
_UB, _R0 = 6.0, 1000.0


def _currents(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """Into the eight nodes, without those of the capacitors: ``M y' + currents = 0``."""
    y1, y2, y3, y4, y5, y6, y7, y8 = y
    uf, a, b, r = p
    first, second = b * (ops.exp((y2 - y3) / uf) - 1), b * (ops.exp((y5 - y6) / uf) - 1)
    return [
        (y1 - 0.1 * ops.sin(200 * math.pi * t)) / _R0,
        (2 * y2 - _UB) / r - (a - 1) * first,
        y3 / r - first,
        (y4 - _UB) / r + a * first,
        (2 * y5 - _UB) / r - (a - 1) * second,
        y6 / r - second,
        (y7 - _UB) / r + a * second,
        y8 / r,
    ]


def transistor(ops: Ops, t: Any, y: Sequence[Any], d: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """Two-transistor amplifier: a singular matrix before the derivatives that is not diagonal."""
    i = _currents(ops, t, y, p)
    w1, w3, w5 = _C[0] * (d[0] - d[1]), _C[2] * (d[3] - d[4]), _C[4] * (d[6] - d[7])
    return [i[0] + w1, i[1] - w1, i[2] + _C[1] * d[2], i[3] + w3, i[4] - w3, i[5] + _C[3] * d[5], i[6] + w5, i[7] - w5]


def _transistor_join(ops: Ops, x: Sequence[Any], z: Sequence[Any]) -> list[Any]:
    w1, y3, w3, y6, w5 = x
    y2, y5, y8 = z
    return [w1 + y2, y2, y3, w3 + y5, y5, y6, w5 + y8, y8]


def transistor_semi(ops: Ops, t: Any, x: Sequence[Any], z: Sequence[Any], p: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """In the voltages of the capacitors."""
    i = _currents(ops, t, _transistor_join(ops, x, z), p)
    rates = [-i[0] / _C[0], -i[2] / _C[1], -i[3] / _C[2], -i[5] / _C[3], -i[6] / _C[4]]
    # in volts, not amperes: Newton's tests are absolute
    return rates, [9000.0 * (i[0] + i[1]), 9000.0 * (i[3] + i[4]), 9000.0 * (i[6] + i[7])]


def pendulum(ops: Ops, t: Any, s: Sequence[Any], d: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """In Cartesian coordinates, the constraint on velocities: index 2."""
    x, y, u, v, z = s
    return [d[0] - u, d[1] - v, d[2] + x * z, d[3] + y * z + p[0], x * u + y * v]


def pendulum_semi(ops: Ops, t: Any, s: Sequence[Any], z: Sequence[Any], p: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The constraint on accelerations: index 1."""
    (x, y, u, v), (tension,) = s, z
    return [u, v, -x * tension, -y * tension - p[0]], [u * u + v * v - tension * (x * x + y * y) - y * p[0]]


def diffusion(n: int) -> DaeProblem:
    """``u_t = -q_x - k u^2`` on the unit interval in ``n`` cells, with fluxes ``q = -D (1 + u^2) u_x`` as algebraic variables; ``u = p[2]``
    before the first cell, no flux at the other end."""
    h = 1 / n

    def semi(ops: Ops, t: Any, u: Any, q: Any, p: Sequence[Any]) -> tuple[Any, Any]:
        d, k, edge = p
        first = ops.part(u, 0, 1)
        before = ops.cat([0 * first + edge, ops.part(u, 0, n - 1)])
        after = ops.cat([ops.part(q, 1, n), 0 * first])
        mean = (u + before) / 2
        return (q - after) / h - k * u * u, q + d * (1 + mean * mean) * (u - before) / h

    flux = np.zeros(n)
    flux[0] = 0.1 * 1.25 * n
    return DaeProblem(
        "diffusion",
        f"nonlinear diffusion in {n} cells, fluxes as algebraic variables ({2 * n} states, sparse), index 1, T = 1",
        semi,
        np.zeros(n),
        flux,
        np.array([0.1, 1.0, 1.0]),
        1.0,
        1e-2,
        vector=True,
        algebraic=tuple(range(n, 2 * n)),
    )


def _problems() -> dict[str, DaeProblem]:
    made = [
        DaeProblem(
            "robertson", "Robertson's kinetics, index 1, T = 100", robertson, np.array([1.0, 0.0]), np.zeros(1),
            np.array([0.04, 1e4, 3e7]), 100.0, 1e-4, algebraic=(2,),
        ),
        DaeProblem(
            "akzo", "Akzo Nobel, 6 states, index 1, T = 180", akzo, np.array([0.444, 0.00123, 0.0, 0.007, 0.0]),
            np.array([115.83 * 0.444 * 0.007]), np.array([18.7, 0.58, 0.09, 0.42, 3.3]), 180.0, 1e-3, algebraic=(5,),
        ),
        DaeProblem(
            "transistor", "Transistor amplifier, 8 states, index 1, T = 0.2", transistor_semi, np.array([-3.0, 3.0, 3.0, 3.0, 6.0]),
            np.array([3.0, 3.0, 0.0]), np.array([0.026, 0.99, 1e-6, 9000.0]), 0.2, 1e-1, implicit=transistor, join=_transistor_join,
            differential=lambda ops, y: [y[0] - y[1], y[2], y[3] - y[4], y[5], y[6] - y[7]],
        ),
        DaeProblem(
            "pendulum", "Pendulum, 5 states, index 2 (CasADi, IDA, scipy-dae: index 1), T = 10", pendulum_semi,
            np.array([1.0, 0.0, 0.0, 0.0]), np.zeros(1), np.array([1.0]), 10.0, 1.0, implicit=pendulum, algebraic=(4,), index=2,
        ),
        diffusion(100),
    ]  # fmt: skip
    return {problem.name: problem for problem in made}


DAE = _problems()


def reduced(problem: DaeProblem, p: np.ndarray, rtol: float = 1e-12) -> dict[str, np.ndarray]:
    """Final state "y", gradient "g" of the squared norm of the differential part of it, consistent start "y0" and its slope "yp0"."""
    from scipy.integrate import solve_ivp

    ops = jax_ops()
    import jax
    import jax.numpy as jnp

    n, m, scale = problem.x0.size, p.size, jnp.asarray(p)

    def parts(t: Any, x: Any, z: Any, q: Any) -> tuple[Any, Any]:
        f, g = problem.semi(ops, t, x, z, q)
        return (f, g) if problem.vector else (ops.stack(f), ops.stack(g))

    def newton(t: Any, x: Any, q: Any, z: Any) -> Any:
        return z - jnp.linalg.solve(jax.jacfwd(parts, 2)(t, x, z, q)[1], parts(t, x, z, q)[1])

    def settled(t: Any, x: Any, q: Any, guess: Any) -> Any:
        return jax.lax.fori_loop(0, 12, lambda _, z: newton(t, x, q, z), guess)

    def rate(t: Any, x: Any, q: Any, guess: Any) -> Any:
        # ``guess`` has settled; two attached steps give right second derivatives, for the Jacobian of the variational equations
        z = jax.lax.stop_gradient(guess)
        for _ in range(2):
            z = newton(t, x, q, z)
        return parts(t, x, z, q)[0]

    def both(t: Any, flat: Any, guess: Any) -> Any:
        x, s = flat[:n], flat[n:].reshape(m, n)
        move = lambda v, k: jax.jvp(lambda a, b: rate(t, a, b, guess), (x, scale), (v, k))[1]  # noqa: E731
        return jnp.concatenate([rate(t, x, scale, guess), jax.vmap(move)(s, jnp.diag(scale)).reshape(-1)])

    whole, slope, solve_z = jax.jit(both), jax.jit(jax.jacfwd(both, 1)), jax.jit(settled)
    guess = [jnp.asarray(problem.z0)]

    def nearby(t: float, flat: np.ndarray) -> Any:
        z = solve_z(t, flat[:n], scale, guess[0])
        if bool(jnp.isfinite(z).all()):
            guess[0] = z
        return guess[0]

    def f(t: float, flat: np.ndarray) -> np.ndarray:
        return np.asarray(whole(t, flat, nearby(t, flat)))

    flat = np.concatenate([problem.x0, np.zeros(n * m)])
    z0 = nearby(0.0, flat)
    start = _joined(problem, problem.x0, np.asarray(z0))
    first = f(0.0, flat)[:n]
    slopes = np.asarray(_joined(problem, first, np.zeros(problem.z0.size)))
    out = solve_ivp(
        f,
        (0, problem.end),
        flat,
        method="Radau",
        rtol=rtol,
        atol=rtol * problem.small,
        jac=lambda t, y: np.asarray(slope(t, y, nearby(t, y))),
    )
    assert out.success, out.message
    x, s = out.y[:n, -1], out.y[n:, -1].reshape(m, n) / p[:, None]
    y = _joined(problem, x, np.asarray(nearby(problem.end, out.y[:, -1])))
    return {"y": y, "g": 2 * s @ x, "y0": start, "yp0": slopes}


def _joined(problem: DaeProblem, x: np.ndarray, z: np.ndarray) -> np.ndarray:
    ops = jax_ops()
    y = problem.whole(ops, x, z)
    return np.asarray(y if problem.vector else ops.stack(y))
