"""Stiff systems in the form of `benchmarks.frameworks`, and accurate solutions of them by SciPy.

The small ones are those of the test set for initial value problem solvers (Mazzia & Magherini, Bari), whose printed solutions ours are
checked against (`PRINTED`); the Brusselator is that of Hairer & Wanner, Solving ordinary differential equations II, section IV.10, on a
periodic square, without its source.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp

from .frameworks import Ops, jax_function, laplacian_matrix, numpy_function

__all__ = ["PRINTED", "STIFF", "OdeProblem", "brusselator", "solve_accurately", "spread"]


@dataclass(frozen=True)
class OdeProblem:
    """``y' = rate(ops, t, y, p)`` from ``y0`` at 0 to ``end``.

    ``small``: what counts as small in every component; absolute tolerances are ``small * rtol``, and errors are measured over
    ``|y| + small``. ``vector``: the form of ``rate``. ``sparsity``: of the Jacobian, where that pays.
    """

    name: str
    text: str
    rate: Callable[..., Any]
    y0: np.ndarray
    p: np.ndarray
    end: float
    small: float
    vector: bool = False
    sparsity: Any = None
    #: where the gradient is taken, if not at the end: between the jumps of a relaxation oscillation derivatives are well conditioned
    looked_at: float | None = None

    @property
    def gradient_end(self) -> float:
        """The end of solves for the gradient."""
        return self.end if self.looked_at is None else self.looked_at


def robertson(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """Three species, three reactions."""
    a, b, c = y
    first, second, third = p[0] * a, p[1] * b * c, p[2] * b * b
    return [second - first, first - second - third, third]


def hires(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """High irradiance response of plants: eight species."""
    a, b, c, d, e, f, g, h = y
    k1, k2, k3, k4, k5, k6, k7, k8, source, fast = p
    bound = fast * f * h
    return [
        -k1 * a + k2 * b + k3 * c + source,
        k1 * a - (k2 + k3) * b,
        -(k3 + k1) * c + k2 * d + k4 * e,
        k3 * b + k1 * c - k5 * d,
        -k6 * e + k2 * f + k2 * g,
        -bound + k7 * d + k1 * e - k2 * f + k7 * g,
        bound - k8 * g,
        -bound + k8 * g,
    ]


def orego(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """The Oregonator."""
    a, b, c = y
    s, w, q = p
    return [s * (b + a * (1 - q * a - b)), (c - (1 + a) * b) / s, w * (a - c)]


def vdpol(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """Van der Pol's oscillator with a small parameter of 1e-6.

    On the slow manifold, ``v = b x / (a - x^2)``, the solution does not depend on that: what can be differentiated are the two coefficients
    of the manifold, which are one.
    """
    x, v = y
    return [v, p[0] * ((p[1] - x * x) * v - p[2] * x)]


_POLLU_K = [
    0.35, 26.6, 1.23e4, 8.6e-4, 8.2e-4, 1.5e4, 1.3e-4, 2.4e4, 1.65e4, 9e3, 0.022, 1.2e4, 1.88, 1.63e4, 4.8e6, 3.5e-4, 0.0175, 1e8,
    4.44e11, 1240.0, 2.1, 5.78, 0.0474, 1780.0, 3.12,
]  # fmt: skip


def pollu(ops: Ops, t: Any, y: Sequence[Any], p: Sequence[Any]) -> list[Any]:
    """Air pollution: twenty species, twenty-five reactions."""
    y1, y2, y3, y4, y5, y6, y7, _, y9, y10, y11, _, y13, y14, _, y16, y17, _, y19, y20 = y
    reacting = (
        y1, y2 * y4, y5 * y2, y7, y7, y7 * y6, y9, y9 * y6, y11 * y2, y11 * y1, y13, y10 * y2, y14, y1 * y6, y3, y4, y4, y16, y16,
        y17 * y6, y19, y19, y1 * y4, y19 * y1, y20,
    )  # fmt: skip
    r = [0.0, *(k * x for k, x in zip(p, reacting, strict=True))]
    return [
        -r[1] - r[10] - r[14] - r[23] - r[24] + r[2] + r[3] + r[9] + r[11] + r[12] + r[22] + r[25],
        -r[2] - r[3] - r[9] - r[12] + r[1] + r[21],
        -r[15] + r[1] + r[17] + r[19] + r[22],
        -r[2] - r[16] - r[17] - r[23] + r[15],
        -r[3] + 2 * r[4] + r[6] + r[7] + r[13] + r[20],
        -r[6] - r[8] - r[14] - r[20] + r[3] + 2 * r[18],
        -r[4] - r[5] - r[6] + r[13],
        r[4] + r[5] + r[6] + r[7],
        -r[7] - r[8],
        -r[12] + r[7] + r[9],
        -r[9] - r[10] + r[8] + r[11],
        r[9],
        -r[11] + r[10],
        -r[13] + r[12],
        r[14],
        -r[18] - r[19] + r[16],
        -r[20],
        r[20],
        -r[21] - r[22] - r[24] + r[23] + r[25],
        -r[25] + r[24],
    ]


def brusselator(n: int) -> OdeProblem:
    """On ``n x n`` points of the periodic unit square, ``p = (A, B, diffusivity)``."""

    def rate(ops: Ops, t: Any, y: Any, p: Sequence[Any]) -> Any:
        u, v = ops.part(y, 0, n * n), ops.part(y, n * n, 2 * n * n)
        a, b, d = p
        made = u * u * v
        spread_u, spread_v = ops.laplacian(u, n) * (d * n**2), ops.laplacian(v, n) * (d * n**2)
        return ops.cat([made - (b + 1) * u + a + spread_u, b * u - made + spread_v])

    x = np.arange(n) / n
    x, y = np.meshgrid(x, x, indexing="xy")
    start = np.stack([22 * y * (1 - y) ** 1.5, 27 * x * (1 - x) ** 1.5]).reshape(-1)
    pattern = (sp.kron(np.eye(2), abs(laplacian_matrix(n))) + sp.kron(np.ones((2, 2)), sp.identity(n * n))).tocsc()
    return OdeProblem(
        "brusselator",
        f"2-D Brusselator, {n} x {n} periodic points ({2 * n * n} states, sparse), T = 1",
        rate,
        start,
        np.array([1.0, 3.4, 0.1]),
        1.0,
        1.0,
        vector=True,
        sparsity=pattern,
    )


def _problems() -> dict[str, OdeProblem]:
    y0 = np.zeros(20)
    y0[[1, 3, 6, 7, 8, 16]] = 0.2, 0.04, 0.1, 0.3, 0.01, 0.007
    plants = np.array([1.71, 0.43, 8.32, 0.035, 1.12, 1.745, 0.69, 1.81, 0.0007, 280.0])
    made = [
        OdeProblem("robertson", "Robertson's kinetics, T = 100", robertson, np.array([1.0, 0, 0]), np.array([0.04, 1e4, 3e7]), 100.0, 1e-4),
        OdeProblem("hires", "HIRES, 8 species, T = 321.8122", hires, np.array([1.0, 0, 0, 0, 0, 0, 0, 0.0057]), plants, 321.8122, 1e-3),
        OdeProblem("orego", "Oregonator, T = 360", orego, np.array([1.0, 2, 3]), np.array([77.27, 0.161, 8.375e-6]), 360.0, 1.0),
        OdeProblem(
            "vdpol",
            "Van der Pol, mu = 1e6 (scaled time), T = 2; gradient at 0.5, before the first jump",
            vdpol,
            np.array([2.0, 0.0]),
            np.array([1e6, 1.0, 1.0]),
            2.0,
            1.0,
            looked_at=0.5,
        ),
        OdeProblem("pollu", "Air pollution, 20 species, 25 reactions, T = 60", pollu, y0, np.array(_POLLU_K), 60.0, 1e-4),
        brusselator(32),
    ]
    return {problem.name: problem for problem in made}


STIFF = _problems()

#: the test set's solutions at its own ends (that of Robertson: two independent solvers at 1e-14, at T = 40)
PRINTED: dict[str, np.ndarray] = {
    "hires": np.array([
        0.7371312573325668e-3, 0.1442485726316185e-3, 0.5888729740967575e-4, 0.1175651343283149e-2, 0.2386356198831331e-2,
        0.6238968252742796e-2, 0.2849998395185769e-2, 0.2850001604814231e-2,
    ]),
    "orego": np.array([0.1000814870318523e1, 0.1228178521549917e4, 0.1320554942846706e3]),
    "vdpol": np.array([0.1706167732170483e1, -0.8928097010247975]),
    "pollu": np.array([
        0.5646255480022769e-1, 0.1342484130422339, 0.4139734331099427e-8, 0.5523140207484359e-2, 0.2018977262302196e-6,
        0.1464541863493966e-6, 0.7784249118997964e-1, 0.3245075353396018, 0.7494013383880406e-2, 0.1622293157301561e-7,
        0.1135863833257075e-7, 0.2230505975721359e-2, 0.2087162882798630e-3, 0.1396921016840158e-4, 0.8964884856898295e-2,
        0.4352846369330103e-17, 0.6899219696263405e-2, 0.1007803037365946e-3, 0.1772146513969984e-5, 0.5682943292316392e-4,
    ]),
}  # fmt: skip


def spread(p: np.ndarray, count: int) -> np.ndarray:
    """``(count, m)``: parameters with a spread of 10 %; the first are the standard ones."""
    factors = 1 + 0.1 * np.clip(np.random.default_rng(0).standard_normal((count, p.size)), -3, 3)
    factors[0] = 1.0
    return p * factors


def solve_accurately(
    rate: Callable[..., Any],
    vector: bool,
    y0: np.ndarray,
    p: np.ndarray,
    end: float,
    small: float,
    sparsity: Any = None,
    rtol: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray | None]:
    """``y(end)`` and ``dy(end)/dp`` (n, m) by SciPy's Radau, with derivatives by the variational equations.

    JAX differentiates the right-hand side. For large systems (``sparsity`` given) only the state: differences give the rest.
    """
    from scipy.integrate import solve_ivp

    if sparsity is not None:
        f = numpy_function(rate, vector, p)
        out = solve_ivp(f, (0, end), y0, method="Radau", rtol=rtol, atol=rtol * small, jac_sparsity=sparsity)
        assert out.success, out.message
        return out.y[:, -1], None
    f = jax_function(rate, vector)
    import jax
    import jax.numpy as jnp

    n, m = y0.size, p.size
    scale = jnp.asarray(p)  # derivatives in logarithms, so that absolute tolerances mean something

    def both(t: Any, flat: Any) -> Any:
        y, s = flat[:n], flat[n:].reshape(m, n)
        move = lambda v, k: jax.jvp(lambda a, b: f(t, a, b), (y, scale), (v, k))[1]  # noqa: E731
        return jnp.concatenate([f(t, y, scale), jax.vmap(move)(s, jnp.diag(scale)).reshape(-1)])

    whole, slope = jax.jit(both), jax.jit(jax.jacfwd(both, 1))
    out = solve_ivp(
        lambda t, y: np.asarray(whole(t, y)),
        (0, end),
        np.concatenate([y0, np.zeros(n * m)]),
        method="Radau",
        rtol=rtol,
        atol=rtol * small,
        jac=lambda t, y: np.asarray(slope(t, y)),
    )
    assert out.success, out.message
    return out.y[:n, -1], (out.y[n:, -1].reshape(m, n) / p[:, None]).T
