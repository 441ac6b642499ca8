"""Reduction of the index of implicit equations: structural analysis, differentiated equations, dummy derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import HigherIndexDAE, InvalidInput, UnsupportedCombination
from ..system.ownership import WithTensors, as_part, owning
from ..system.system import StateSpec
from ..system.transforms import functorch_active
from .arguments import check_callable
from .dae import solve_dae
from .parts import with_rules_of
from .round_task import needs_rounds
from .solution import EventLog, Solution

__all__ = ["ReducedDAE", "reduce_index"]

_NONE = -(10**6)
#: relative size of a pivot at which a choice of dummy derivatives counts as singular
_PIVOT = 1e-8
#: part of its first quality below which a choice of dummy derivatives is changed
_WORN = 0.2


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


#: options of `solve_dae` that a search for the times of changes needs
_OF_STEPS = (
    "method", "rtol", "atol", "controller", "norm", "first_step", "max_step", "min_step", "max_steps", "linear_solver",
    "suppress_algebraic",
)  # fmt: skip
_NOT_CHAINED = ("events", "dense_output", "quadrature", "step_ts")


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

    def __init__(
        self, fun: Callable[..., Any], spec: StateSpec, returns: StateSpec, layout: _Layout, index: int, sigma: np.ndarray
    ) -> None:
        self._fun, self._spec, self._returns, self._layout, self._sigma = fun, spec, returns, layout, sigma
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

    @owning
    def solve(self, t_span: Any, y0: Any, yp0: Any = None, args: Any = (), **options: Any) -> Solution:
        """`solve_dae` of the reduced system; ``sol.y``, events and quadrature are in the given variables.

        At the start the values of the variables that stay differential are kept, the others (and all derivatives) are solved for.
        Where the choice of dummy derivatives wears out (a pendulum that swings through the horizontal) the solve goes on from there with
        the best choice at that place; a first solve without derivatives finds these times, if there is a choice at all. It does not go
        on in batches, under transforms, and together with events, dense output, quadrature, ``step_ts`` and ``t_eval="steps"``:
        `UnsupportedCombination` then says at what time the choice would have to change.
        ``options`` are those of `solve_dae`; events with a reset, and doses, raise `UnsupportedCombination`.
        """
        for name in ("consistent", "differential", "jac_sparsity"):
            if name in options:
                raise InvalidInput(f"{name}= is decided here: use solve_dae with residual and initial for a choice of your own")
        if bool(options.get("batched", False)) != (self._spec.batch is not None):
            raise InvalidInput("batched= must be as it was for reduce_index")
        if needs_rounds(options.get("events")):
            raise UnsupportedCombination(
                "events with a reset, and doses, are not supported here: end at the event (terminal=True), or at the time of the dose, and "
                "solve on from the state that follows"
            )
        z0, _ = self.initial(y0, yp0)
        for name in ("events", "quadrature"):
            if options.get(name) is not None:
                options[name] = self._seen(options[name])
        args = tuple(args) if isinstance(args, (tuple, list)) else (args,)
        changes = self._changes(t_span, z0, args, options)
        if changes:
            return self._chained(t_span, z0, args, options, changes)
        sol = self._piece(t_span, z0, args, options)
        inner = sol.interpolant
        return replace(
            sol,
            y=self.original(sol.y),
            yp=None if sol.yp is None else self.original(sol.yp),
            events=EventLog.of((replace(e, y=self.original(e.y)) for e in sol.events), sol.events.names),
            interpolant=None if inner is None else _Original(self, inner),
        )

    def _piece(self, t_span: Any, z0: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Solution:
        mask = self.differential.to(z0.device)
        return as_part(solve_dae, self.residual, t_span, z0, args=args, consistent="solve", differential=mask, **options)

    def _leading(self, t: Tensor, z: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The matrix of `_leading` at ``z`` (N,)."""
        places = self._layout.places
        pair = torch.stack([z[p[k]] if k < len(p) else torch.zeros_like(z[0]) for k in (0, 1) for p in places])
        n, spec = len(places), self._spec

        def f(x: Tensor) -> Tensor:
            return self._returns.flatten(self._fun(t, spec.unflatten(x[None, :n]), spec.unflatten(x[None, n:]), *args))[0]

        both = torch.func.jacrev(f)(pair)
        gap = torch.as_tensor(_gap(self._layout.counts, self._layout.orders), device=z.device)
        J = torch.where(gap == 1, both[:, n:], torch.where(gap == 0, both[:, :n], 0.0))
        size = J.abs().amax(1, keepdim=True)
        return J / torch.where(size > 0, size, 1.0)

    def _quality(self, J: Tensor) -> Tensor:
        """How regular the equations are for the dummy derivatives that were chosen, beside all that could have been: at most one."""
        layout, worst = self._layout, torch.where(torch.isfinite(J).all(), 1.0, math.nan).to(J)
        # of states that no step has been accepted with, decompositions fail
        J = torch.nan_to_num(J, 0.0, 0.0, 0.0)
        columns = list(range(len(layout.orders)))
        for level in range(1, max(layout.counts, default=0) + 1):
            rows = [i for i, c in enumerate(layout.counts) if c >= level]
            columns = [j for j in columns if layout.orders[j] - level + 1 >= 1]
            chosen = [j for j in columns if (j, layout.orders[j] - level + 1) in layout.dummies]
            if len(chosen) < len(columns):
                least = torch.linalg.svdvals(J[rows][:, chosen])[-1]
                worst = torch.minimum(worst, least / torch.linalg.svdvals(J[rows][:, columns])[-1].clamp(min=torch.finfo(J.dtype).tiny))
            columns = chosen
        return worst

    def _changes(self, t_span: Any, z0: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> list[tuple[float, ReducedDAE]]:
        """When the choice of dummy derivatives must change, and to which: constants of the solve, on which its result does not depend."""
        layout = self._layout
        free = bool(layout.dummies) and any(c and (j, 1) not in layout.dummies for j, c in enumerate(layout.orders))
        if not free or self._spec.batch is not None or functorch_active():
            return []
        out: list[tuple[float, ReducedDAE]] = []
        plain = {k: v for k, v in options.items() if k in _OF_STEPS}
        reduced, start, end = self, t_span[0], t_span[1]
        with torch.no_grad():
            z = z0.detach()
            while True:
                watch = _Watch(reduced)
                sol = reduced._piece((start, end), z, args, {**plain, "events": watch})
                if int(sol.status) != 1:
                    return out
                start, z = float(sol.events[0].t[-1]), sol.events[0].y[-1]
                if any(options.get(k) is not None and options.get(k) is not False for k in _NOT_CHAINED) or isinstance(
                    options.get("t_eval"), str
                ):
                    raise UnsupportedCombination(
                        f"the dummy derivatives {', '.join(reduced.dummies)} cease to be a good choice at t = {start:.8g}, and to change "
                        f"it is not supported with {', '.join(k + '=' for k in _NOT_CHAINED)} or t_eval='steps': end t_span there, and "
                        "reduce again from the state reached"
                    )
                J = reduced._leading(z.new_tensor(start), z, args).double().cpu().numpy()
                better = frozenset(_chosen(J, np.array(layout.counts), np.array(layout.orders)))
                reduced = ReducedDAE(
                    self._fun, self._spec, self._returns, replace(layout, dummies=better), self.structural_index, self._sigma
                )
                out.append((start, reduced))

    def _chained(
        self, t_span: Any, z0: Tensor, args: tuple[Any, ...], options: dict[str, Any], changes: list[tuple[float, ReducedDAE]]
    ) -> Solution:
        """The solve in pieces, each with its own dummy derivatives, from the end of the one before."""
        times = options.pop("t_eval", None)
        stops = [t_span[0], *(t for t, _ in changes), t_span[1]]
        sign = 1.0 if float(t_span[1]) >= float(t_span[0]) else -1.0
        wanted = None if times is None else torch.as_tensor(times, dtype=torch.float64, device=z0.device)
        place = None if wanted is None else torch.bucketize(sign * wanted.detach(), wanted.new_tensor([sign * t for t, _ in changes]))
        z, found, pieces = z0, [], []
        for k, reduced in enumerate([self, *(r for _, r in changes)]):
            mine = None
            if wanted is not None and place is not None:
                here = wanted[place == k]
                mine = torch.cat([here, torch.as_tensor(stops[k + 1], dtype=here.dtype, device=here.device).reshape(1)])
            sol = reduced._piece((stops[k], stops[k + 1]), z, args, {**options, "t_eval": mine})
            assert isinstance(sol.y, Tensor) and isinstance(sol.yp, Tensor)
            pieces.append(sol)
            cut = slice(0, len(sol.t) - 1) if wanted is not None else slice(0, 1) if k == 0 else slice(0, 0)
            found.append((sol.t[cut], sol.y[cut], sol.yp[cut]))
            z = sol.y[-1]
            if int(sol.status) != 0:
                break
        last = pieces[-1]
        if wanted is None:
            found.append((last.t[-1:], last.y[-1:], last.yp[-1:]))
        t, y, yp = (torch.cat(parts) for parts in zip(*found, strict=True))
        if wanted is not None and place is not None:
            # what a failed piece left out is not a number
            short = len(wanted) - len(t)
            y, yp = (torch.cat([x, x.new_full((short, *x.shape[1:]), math.nan)]) for x in (y, yp))
            back = torch.argsort(torch.argsort(place, stable=True))
            t, y, yp = wanted, y[back], yp[back]
        counts = {
            name: sum(int(getattr(p.stats, name)) for p in pieces)
            for name in ("n_steps", "n_accepted", "n_rejected", "n_fun", "n_jac", "n_factorizations", "n_solves", "n_newton")
        }
        return replace(last, t=t, y=self.original(y), yp=self.original(yp), stats=replace(last.stats, **counts))

    def _seen(self, functions: Any) -> Any:
        """Functions of ``(t, y, *args)`` as functions of ``(t, z, *args)``."""

        def one(f: Callable[..., Any]) -> Callable[..., Any]:
            def g(t: Tensor, z: Tensor, *args: Any) -> Any:
                return f(t, self.original(z), *args)

            return with_rules_of(f, g)

        return [one(f) for f in functions] if isinstance(functions, (list, tuple)) else one(functions)


@dataclass(frozen=True)
class _Original(WithTensors):
    """The dense output in the given variables."""

    reduced: ReducedDAE
    inner: Callable[..., Any]

    def with_tensors(self, function: Callable[[Any], Any]) -> _Original:
        """The same with ``function`` of the dense output."""
        return _Original(self.reduced, function(self.inner))

    def __call__(self, t: Tensor, side: str) -> Any:
        """The state at ``t``."""
        return self.reduced.original(self.inner(t, side))


class _Watch:
    """Event function: the choice of dummy derivatives is about to wear out."""

    terminal, direction = True, -1

    def __init__(self, reduced: ReducedDAE) -> None:
        self.reduced, self.first = reduced, None

    def __call__(self, t: Tensor, z: Tensor, *args: Any) -> Tensor:
        quality = self.reduced._quality(self.reduced._leading(t, z, args))
        if self.first is None:
            self.first = quality.detach()
        return quality - _WORN * self.first


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
    as long as that pivot is: `ReducedDAE.solve` changes it before it ceases to be.

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
    check_callable(fun, "fun")
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
    return ReducedDAE(fun, spec, returns, _Layout(tuple(orders), tuple(counts), frozenset(dummies)), index, sigma)


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
    from scipy.optimize import linear_sum_assignment

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
    gap = _gap(counts, orders)
    # the derivative of the differentiated equations in the highest derivatives: the same entries at every level
    J = np.where(gap == 1, E, np.where(gap == 0, G, 0.0))
    size = np.abs(J).max(1, keepdims=True)
    J = J / np.where(size > 0, size, 1.0)
    if np.linalg.matrix_rank(J, tol=_PIVOT) < len(c):
        raise HigherIndexDAE(
            "the equations are structurally sound, but at the start their differentiated form is singular: the start is a singular point "
            "(give another y0, yp0), or terms cancel that the structure cannot see (simplify the equations)"
        )
    return _chosen(J, c, d)


def _gap(counts: Sequence[int], orders: Sequence[int]) -> np.ndarray:
    """``d_j - c_i``: which derivative of variable j the equation i is differentiated to hold the highest one of."""
    return np.array(orders)[None, :] - np.array(counts)[:, None]


def _chosen(J: np.ndarray, c: np.ndarray, d: np.ndarray) -> set[tuple[int, int]]:
    """The choice of `_dummies` by pivoting, from the derivative ``J`` of the differentiated equations in the highest derivatives."""
    import scipy.linalg

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
