"""The problems: data as NumPy arrays, right-hand sides written once for every framework."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

__all__ = ["Case", "Ops", "all_cases", "loss", "select"]


class Ops(Protocol):
    """What a framework must offer to evaluate the right-hand sides below."""

    def columns(self, x: Any) -> Sequence[Any]: ...  # split along the last axis, dropping it
    def stack(self, xs: Sequence[Any]) -> Any: ...  # the inverse
    def linear(self, x: Any, weight: Any, bias: Any) -> Any: ...
    def tanh(self, x: Any) -> Any: ...
    def softplus(self, x: Any) -> Any: ...


Rhs = Callable[..., Any]  # (ops, t, y, *params) -> dy/dt


def mlp_small(ops: Ops, t: Any, y: Any, w1: Any, b1: Any, w2: Any, b2: Any) -> Any:
    """2-50-2 with tanh."""
    return ops.linear(ops.tanh(ops.linear(y, w1, b1)), w2, b2)


def mlp_large(ops: Ops, t: Any, y: Any, w1: Any, b1: Any, w2: Any, b2: Any, w3: Any, b3: Any) -> Any:
    """64-128-128-64 with softplus."""
    hidden = ops.softplus(ops.linear(y, w1, b1))
    return ops.linear(ops.softplus(ops.linear(hidden, w2, b2)), w3, b3)


def lotka_volterra(ops: Ops, t: Any, y: Any, p: Any) -> Any:
    """Prey and predator; p = (a, b, c, d)."""
    prey, predator = ops.columns(y)
    a, b, c, d = ops.columns(p)
    met = prey * predator
    return ops.stack((a * prey - b * met, d * met - c * predator))


def van_der_pol(ops: Ops, t: Any, y: Any, p: Any) -> Any:
    """x'' = mu (1 - x^2) x' - x; p = (mu,)."""
    x, v = ops.columns(y)
    (mu,) = ops.columns(p)
    return ops.stack((v, mu * (1.0 - x * x) * v - x))


@dataclass(frozen=True)
class Case:
    """One problem with its data, tolerances and loss.

    ``ensemble``: the leading dimension of ``y0`` and of ``params[0]`` counts independent trajectories (else it is a batch of one system).
    ``target``: the loss is the mean square distance to it; without one it is ``0.5 |1 - u|^2`` summed over all save points after the start.
    """

    name: str
    workload: str
    rhs: Rhs
    y0: np.ndarray
    params: tuple[np.ndarray, ...]
    t_eval: np.ndarray
    rtol: float
    atol: float
    ensemble: bool
    target: np.ndarray | None = None
    memory_only: bool = False

    @property
    def size(self) -> int:
        """Number of trajectories (or batch rows)."""
        return int(self.y0.shape[0])

    def cast(self, dtype: type[np.floating], rows: np.ndarray | None = None) -> Case:
        """The same case in another precision, for some of the trajectories only if ``rows`` is given (ensembles)."""
        y0, params = self.y0, self.params
        if rows is not None:
            y0, params = y0[rows], tuple(p[rows] for p in params)
        params = tuple(p.astype(dtype) for p in params)
        target = None if self.target is None else self.target.astype(dtype)
        return replace(self, y0=y0.astype(dtype), params=params, t_eval=self.t_eval.astype(dtype), target=target)


def loss(ys: Any, target: Any | None) -> Any:
    """Scalar loss of a solution with time first; the operators are those that every framework shares."""
    if target is not None:
        return ((ys - target) ** 2).mean()
    return 0.5 * ((1.0 - ys[1:]) ** 2).sum()


def _mlp(name: str, rhs: Rhs, sizes: Sequence[int], end: float, memory_only: bool = False) -> Case:
    """A network with dynamics like a trained one's: about 15 steps a unit of time.

    Weights follow the law of `torch.nn.Linear`, times three, and the last layer leans against the first ones, so that states stay bounded.
    """
    rng = np.random.default_rng(1)
    params: list[np.ndarray] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        bound = 3.0 * fan_in**-0.5
        params += [rng.uniform(-bound, bound, (fan_out, fan_in)), rng.uniform(-bound, bound, fan_out)]
    before_last = params[0] if len(sizes) == 3 else params[2] @ params[0]
    params[-2] -= before_last.T * (np.linalg.norm(params[-2]) / np.linalg.norm(before_last))
    y0 = rng.standard_normal((128, sizes[0]))
    t_eval = np.linspace(0.0, end, 20)
    target = rng.standard_normal((len(t_eval), *y0.shape))
    f32 = np.float32
    return Case(
        name, name.removesuffix("-T10"), rhs, y0.astype(f32), tuple(p.astype(f32) for p in params), t_eval.astype(f32),
        rtol=1e-5, atol=1e-6, ensemble=False, target=target.astype(f32), memory_only=memory_only,
    )  # fmt: skip


def _ensemble(kind: str, size: int, saves: int) -> Case:
    rng = np.random.default_rng(2)
    if kind == "lotka":
        rhs, start = lotka_volterra, (1.0, 1.0)
        params = np.array([1.5, 1.0, 3.0, 1.0]) * rng.uniform(0.9, 1.1, (size, 4))
    else:
        rhs, start = van_der_pol, (2.0, 0.0)
        params = rng.uniform(1.0, 3.0, (size, 1))
    t_eval = np.array([0.0, 10.0]) if saves == 1 else np.linspace(0.0, 10.0, saves)
    name = f"{kind}-{size}-" + ("end" if saves == 1 else f"{saves}saves")
    return Case(name, kind, rhs, np.tile(np.array(start), (size, 1)), (params,), t_eval, rtol=1e-6, atol=1e-6, ensemble=True)


def all_cases() -> list[Case]:
    """Every case, in the order of the report."""
    cases = [
        _mlp("mlp-small", mlp_small, (2, 50, 2), 1.0),
        _mlp("mlp-large", mlp_large, (64, 128, 128, 64), 1.0),
        _mlp("mlp-large-T10", mlp_large, (64, 128, 128, 64), 10.0, memory_only=True),
    ]
    for kind in ("lotka", "vdp"):
        cases += [_ensemble(kind, size, saves) for size in (1, 100, 10_000) for saves in (1, 20)]
    return cases


QUICK = ("mlp-small", "lotka-1-end", "lotka-100-end", "vdp-100-20saves")


def select(names: Sequence[str], quick: bool) -> list[Case]:
    """Cases whose name or workload is in ``names``; without names all, or with ``quick`` a few."""
    cases = all_cases()
    known = {c.name for c in cases} | {c.workload for c in cases}
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SystemExit(f"unknown workload {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    if names:
        return [c for c in cases if c.name in names or c.workload in names]
    return [c for c in cases if not quick or c.name in QUICK]
