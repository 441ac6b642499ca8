"""Reduction of the index of implicit equations: structural analysis, differentiated equations, dummy derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._pytree import tree_map

from .dae import solve_dae
from .errors import HigherIndexDAE, InvalidInput
from .solution import Solution
from .system import StateSpec

__all__ = ["ReducedDAE", "reduce_index"]

_NONE = -(10**6)
#: relative size of a pivot at which a choice of dummy derivatives counts as singular
_PIVOT = 1e-8


@dataclass(frozen=True)
class _Layout:
    """Which quantities the reduced system has: ``places[j][k]`` is that of the k-th derivative of variable j."""

    orders: tuple[int, ...]
    counts: tuple[int, ...]
    dummies: frozenset[tuple[int, int]]

    @property
    def places(self) -> list[list[int]]:
        out, at = [], 0
        for order in self.orders:
            out.append(list(range(at, at + order + 1)))
            at += order + 1
        return out

    @property
    def links(self) -> list[tuple[int, int]]:
        """Pairs of places: the derivative of the first is the second."""
        places = self.places
        return [(places[j][k - 1], places[j][k]) for j, d in enumerate(self.orders) for k in range(1, d + 1) if (j, k) not in self.dummies]


class ReducedDAE:
    """See `reduce_index`.

    Attributes
    ----------
    structural_index : int
        Of the equations as they were given.
    differentiated : tuple of int
        How often each equation is differentiated; the equations themselves stay in the system, so nothing drifts.
    dummies : tuple of str
        The derivatives that are unknowns of their own instead of derivatives.
    size : int
        Unknowns ``z`` of the reduced system.
    """

    def __init__(self, fun: Callable[..., Any], spec: StateSpec, returns: StateSpec, layout: _Layout, index: int) -> None:
        self._fun, self._spec, self._returns, self._layout = fun, spec, returns, layout
        self.structural_index, self.differentiated = index, layout.counts
        names = [spec.component(j) for j in range(len(layout.orders))]
        self.dummies = tuple(names[j] + "'" * k for j, k in sorted(layout.dummies))
        self.size = sum(layout.orders) + len(layout.orders)

    def residual(self, t: Tensor, z: Tensor, zp: Tensor, *args: Any) -> Tensor:
        """The reduced equations, semi-explicit and of index 1, for `solve_dae`: ``z`` and ``zp`` are ``(N,)`` or ``(B, N)``."""
        layout, spec, shape = self._layout, self._spec, z.shape
        z, zp = z.reshape(spec.rows, -1), zp.reshape(spec.rows, -1)
        places, most = layout.places, max(layout.counts)
        # the coefficients of the Taylor polynomials of all variables, as far as they are unknowns: (order, B, n)
        absent = torch.zeros_like(z[:, 0])
        series = [torch.stack([z[:, p[k]] / math.factorial(k) if k < len(p) else absent for p in places], -1) for k in range(most + 2)]

        def along(s: Tensor) -> Tensor:
            """The equations after a time ``s`` (B,) on these polynomials, by Horner's rule."""
            column = s.unsqueeze(-1)
            value, slope = series[-1], series[-1] * (most + 1)
            for k in range(most, 0, -1):
                value = value * column + series[k]
                slope = slope * column + series[k] * k
            value = value * column + series[0]
            time = t + (s if spec.batch is not None else s.reshape(()))
            out = self._fun(time, spec.unflatten(value), spec.unflatten(slope), *args)
            return self._returns.flatten(out)

        derivatives = _derivatives(along, torch.zeros_like(z[:, 0].real), most)
        rows = [derivatives[k][:, i] for i, c in enumerate(layout.counts) for k in range(c + 1)]
        rows += [zp[:, low] - z[:, high] for low, high in layout.links]
        return torch.stack(rows, -1).reshape(shape)

    def initial(self, y0: Any, yp0: Any = None) -> tuple[Tensor, Tensor]:
        """Guesses of ``z`` and its slope from those of the state (and its slope); derivatives that nothing is known of are zero."""
        spec, layout = self._spec, self._layout
        flat = spec.flatten(y0)
        slope = torch.zeros_like(flat) if yp0 is None else spec.flatten(yp0)
        known = [flat, slope]
        columns = [known[k][:, j] if k < 2 else torch.zeros_like(flat[:, 0]) for j, d in enumerate(layout.orders) for k in range(d + 1)]
        z = torch.stack(columns, -1)
        zp = torch.zeros_like(z)
        for low, high in layout.links:
            zp[:, low] = z[:, high].detach()
        return (z, zp) if spec.batch is not None else (z[0], zp[0])

    def original(self, z: Tensor) -> Any:
        """The state of the given equations in ``z`` (..., N) or (..., B, N)."""
        where = torch.tensor([p[0] for p in self._layout.places], device=z.device)
        flat = z.index_select(-1, where)
        return self._spec.unflatten(flat if self._spec.batch is not None else flat.unsqueeze(-2))

    @property
    def differential(self) -> Tensor:
        """Mask ``(N,)`` of the unknowns whose values at the start are free."""
        mask = torch.zeros(self.size, dtype=torch.bool)
        mask[[low for low, _ in self._layout.links]] = True
        return mask

    def solve(self, t_span: Any, y0: Any, yp0: Any = None, args: Any = (), **options: Any) -> Solution:
        """`solve_dae` of the reduced system; ``sol.y``, events and quadrature are in the given variables.

        At the start the values of the variables that stay differential are kept, the others (and all derivatives) are solved for.
        ``options`` are those of `solve_dae`.
        """
        for name in ("consistent", "differential", "jac_sparsity"):
            if name in options:
                raise InvalidInput(f"{name}= is decided here: use solve_dae with residual and initial for a choice of your own")
        if bool(options.get("batched", False)) != (self._spec.batch is not None):
            raise InvalidInput("batched= must be as it was for reduce_index")
        z0, _ = self.initial(y0, yp0)
        for name in ("events", "quadrature"):
            if options.get(name) is not None:
                options[name] = self._seen(options[name])
        mask = self.differential.to(z0.device)
        sol = solve_dae(self.residual, t_span, z0, args=args, consistent="solve", differential=mask, **options)
        inner = sol.interpolant
        return replace(
            sol,
            y=self.original(sol.y),
            yp=None if sol.yp is None else self.original(sol.yp),
            events=tuple(replace(e, y=self.original(e.y)) for e in sol.events),
            interpolant=None if inner is None else lambda t: self.original(inner(t)),
        )

    def _seen(self, functions: Any) -> Any:
        """Functions of ``(t, y, *args)`` as functions of ``(t, z, *args)``."""

        def one(f: Callable[..., Any]) -> Callable[..., Any]:
            def g(t: Tensor, z: Tensor, *args: Any) -> Any:
                return f(t, self.original(z), *args)

            g.__dict__.update(getattr(f, "__dict__", {}))
            return g

        return [one(f) for f in functions] if isinstance(functions, (list, tuple)) else one(functions)


def _derivatives(f: Callable[[Tensor], Tensor], s: Tensor, most: int) -> tuple[Tensor, ...]:
    """``f`` and its first ``most`` derivatives at ``s``, where every row depends on its own entry."""

    def upto(k: int) -> Callable[[Tensor], tuple[Tensor, ...]]:
        if k == 0:
            return lambda x: (f(x),)

        def values(x: Tensor) -> tuple[Tensor, ...]:
            # along one direction, by two reverse sweeps: forward mode takes many times as long wherever a constant enters
            low, pull, *_ = torch.func.vjp(upto(k - 1), x)
            _, push, *_ = torch.func.vjp(lambda w: pull((*[torch.zeros_like(v) for v in low[:-1]], w)), torch.zeros_like(low[-1]))
            return (*low, push((torch.ones_like(x),))[0])

        return values

    return upto(most)(s)


def reduce_index(fun: Callable[..., Any], y0: Any, yp0: Any = None, args: Any = (), *, t0: Any = 0.0, batched: bool = False) -> ReducedDAE:
    """A system of index 1 with the solutions of ``fun(t, y, yp, *args) = 0``, whose index may be higher.

    Which derivatives appear in which equations is found by evaluating ``fun``; how often each equation must be differentiated by the
    assignment problem of Pryce (2001, BIT 41:364), whose solution is that of Pantelides (1988); the derivatives by nested
    Jacobian-vector products. Of the derivatives that the new equations determine, as many as there are such equations become unknowns of
    their own (dummy derivatives: Mattsson & Soderlind 1993, SIAM J. Sci. Comput. 14:677), by pivoting at the start. The choice is good
    as long as that pivot is: where it ceases to be, `solve_dae` stops with an error; reduce again from there.

    Parameters
    ----------
    fun, args : as for `solve_dae`
    y0, yp0 : Tensor or pytree
        Near a consistent start (``yp0`` matters where the pivots depend on it; default zeros). With ``batched=True`` one choice is made
        for all trajectories, at the first of them.
    t0 : number
        The time of the start.

    Returns
    -------
    ReducedDAE
        ``reduced.solve(t_span, y0, args=args, ...)``, differentiable in everything.

    Raises
    ------
    InvalidInput
    HigherIndexDAE
        Equations that determine no solution structurally (naming them), or numerically at the start.
    """
    if not callable(fun):
        raise InvalidInput(f"fun must be callable, got a {type(fun).__name__}")
    args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
    spec = StateSpec.of(y0, batched)
    if spec.dtype.is_complex:
        raise InvalidInput("reduce_index takes real states: split complex ones into two parts")
    flat = spec.taken(y0).detach()
    slope = torch.zeros_like(flat) if yp0 is None else spec.taken(yp0).detach()
    fixed = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)
    t = torch.full((spec.rows,), float(t0), dtype=spec.real_dtype, device=spec.device)
    first = fun(t if batched else t[0], spec.unflatten(flat), spec.unflatten(slope), *fixed)
    returns = StateSpec.of(first, batched, "what fun returned")
    n = flat.shape[1]
    if sum(returns.sizes) != n:
        raise InvalidInput(f"fun returned {sum(returns.sizes)} residuals for {n} unknowns: there must be as many equations as unknowns")

    def jacobians(y: Tensor, yp: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """``F_y`` and ``F_y'`` of the first trajectory."""

        def f(pair: Tensor) -> Tensor:
            both = torch.cat([pair.unsqueeze(0), torch.cat([y, yp], -1)[1:]]) if spec.rows > 1 else pair.unsqueeze(0)
            value, change = both.split(n, -1)
            return returns.flatten(fun(t if batched else t[0], spec.unflatten(value), spec.unflatten(change), *fixed))[0]

        found = torch.func.jacrev(f)(torch.cat([y[0], yp[0]])).double().cpu().numpy()
        return found[:, :n], found[:, n:]

    sigma = _signature(jacobians, flat, slope)
    counts, orders = _offsets(sigma, [spec.component(j) for j in range(n)])
    G, E = jacobians(flat, slope)
    dummies = _dummies(sigma, counts, orders, G, E)
    index = max(counts) + (1 if any(d == 0 for d in orders) else 0)
    return ReducedDAE(fun, spec, returns, _Layout(tuple(orders), tuple(counts), frozenset(dummies)), index)


def _signature(jacobians: Callable[[Tensor, Tensor], tuple[np.ndarray, np.ndarray]], y: Tensor, yp: Tensor) -> np.ndarray:
    """``sigma_ij``: the highest derivative (0 or 1) of variable j in equation i, a very negative number where there is none."""
    generator = torch.Generator().manual_seed(0)
    held, slopes = np.zeros((y.shape[1],) * 2, dtype=bool), np.zeros((y.shape[1],) * 2, dtype=bool)
    for _ in range(3):
        # entries that happen to be zero at the start are not zero near it
        near = [x + 0.1 * (1 + x.abs()) * torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (y, yp)]
        G, E = jacobians(near[0], near[1])
        held |= G != 0
        slopes |= E != 0
    return np.where(slopes, 1, np.where(held, 0, _NONE))


def _offsets(sigma: np.ndarray, names: list[str]) -> tuple[list[int], list[int]]:
    """How often equations are differentiated (c) and variables appear differentiated (d): the least non-negative integers with
    ``d_j - c_i >= sigma_ij``, and equality on a transversal of largest weight."""
    rows, columns = linear_sum_assignment(sigma, maximize=True)
    bad = [(int(i), int(j)) for i, j in zip(rows, columns, strict=True) if sigma[i, j] < 0]
    if bad:
        equations, variables = ", ".join(str(i) for i, _ in bad), ", ".join(names[j] for _, j in bad)
        raise HigherIndexDAE(
            f"the equations determine no solution: however they are assigned to the variables, equation {equations} is left without one of "
            f"its own, and {variables} without an equation. Look for equations that are missing, or there twice"
        )
    partner = np.empty(len(rows), dtype=int)
    partner[rows] = columns
    c = np.zeros(len(rows), dtype=int)
    while True:
        d = np.where(sigma > _NONE // 2, sigma + c[:, None], _NONE).max(0)
        new = d[partner] - sigma[np.arange(len(c)), partner]
        if (new == c).all():
            return c.tolist(), d.tolist()
        c = new


def _dummies(sigma: np.ndarray, counts: list[int], orders: list[int], G: np.ndarray, E: np.ndarray) -> set[tuple[int, int]]:
    """Pairs (variable, order) of derivatives that become unknowns of their own."""
    c, d = np.array(counts), np.array(orders)
    gap = d[None, :] - c[:, None]
    # the derivative of the differentiated equations in the highest derivatives: the same entries at every level
    J = np.where(gap == 1, E, np.where(gap == 0, G, 0.0))
    size = np.abs(J).max(1, keepdims=True)
    J = J / np.where(size > 0, size, 1.0)
    if np.linalg.matrix_rank(J, tol=_PIVOT) < len(c):
        raise HigherIndexDAE(
            "the equations are structurally sound, but at the start their differentiated form is singular: the start is a singular point "
            "(give another y0, yp0), or terms cancel that the structure cannot see (simplify the equations)"
        )
    out: set[tuple[int, int]] = set()
    columns = np.arange(len(d))
    for level in range(1, int(c.max(initial=0)) + 1):
        rows = np.nonzero(c >= level)[0]
        # derivatives of this order exist only of variables that appear often enough
        columns = columns[d[columns] - level + 1 >= 1]
        found: Any = scipy.linalg.qr(J[np.ix_(rows, columns)], pivoting=True, mode="economic")
        _, R, order = found
        pivots = np.abs(np.diag(R))
        if len(rows) > len(columns) or pivots.min() <= _PIVOT * pivots.max():
            raise HigherIndexDAE("no choice of dummy derivatives is regular at the start: give another y0, yp0")
        columns = columns[np.sort(order[: len(rows)])]
        out |= {(int(j), int(d[j] - level + 1)) for j in columns}
    return out
