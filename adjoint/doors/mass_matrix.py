"""``solve_ivp(..., mass_matrix=M)``: equations ``M y' = fun(t, y, *args)``, also with a singular ``M``.

Rosenbrock methods take constant matrices into their steps; for all others these are implicit equations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import HigherIndexDAE, InvalidInput, UnsupportedCombination
from ..methods import METHODS, Method
from ..sensitivity.consistent import Initial
from ..system.system import StateSpec, System
from .arguments import Times, check_method, listed_args
from .dae_arguments import residual_algebra
from .dae_initial import initial_values
from .parts import with_rules_of

__all__ = ["RESIDUAL_METHODS", "as_residual", "consistent_start", "in_step", "with_mass", "with_matrix", "without_last"]

#: the methods for implicit equations, by the names that they have for explicit ones
RESIDUAL_METHODS = {"radau5": "radau", "radau": "radau", "radauIIA3": "radau3", "bdf": "bdf"}


def _implicit_method(method: str | Method, options: dict[str, Any]) -> str:
    """The method for implicit equations that stands for ``method``; raises for options that it does not have."""
    name = method if isinstance(method, str) else check_method(method).name
    if name not in RESIDUAL_METHODS:
        raise UnsupportedCombination(
            f"mass_matrix= is not supported by {name!r}: give method='radau5' (or 'radauIIA3', 'bdf'; "
            "'rodas5p', 'rodas4', 'rodas3p' for a constant matrix)"
        )
    for option, value in options.items():
        if value is not None:
            raise UnsupportedCombination(f"{option}= with mass_matrix= is not supported: leave {option} out, or use solve_dae")
    return RESIDUAL_METHODS[name]


def as_residual(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `solve_dae` for those of `solve_ivp`, which have a mass matrix that the method does not take into its steps."""
    given = dict(arguments)
    mass, fun, y0, args = given.pop("mass_matrix"), given["fun"], given["y0"], given["args"]
    options = {name: given.pop(name) for name in ("jac", "jac_sparsity")}
    given["method"] = _implicit_method(given["method"], options)
    given["fun"], extra = with_mass(fun, mass, y0, given["batched"])
    given["args"] = (*listed_args(args), *extra)
    del given["mode"], given["max_events"]
    quadrature = given["quadrature"]
    if extra:
        given["events"] = without_last(given["events"])
        given["quadrature"] = None if quadrature is None else lambda t, y, *rest: quadrature(t, y, *rest[:-1])
    return given


def in_step(method: str | Method, mass: Any) -> bool:
    """Whether the method takes the matrix into its own steps; raises for one that varies, which it cannot take."""
    chosen = METHODS.get(method) if isinstance(method, str) else method
    if not isinstance(chosen, Method) or not chosen.takes_mass:
        return False
    if callable(mass) and not isinstance(mass, Tensor):
        raise UnsupportedCombination(
            f"{chosen.name!r} takes a constant mass_matrix, a tensor: for one that depends on time or state give method='radau5' or 'bdf'"
        )
    return True


def with_matrix(fun: Any, mass: Tensor, y0: Any, batched: bool) -> Callable[..., Any]:
    """``fun`` as a function that is given the matrix behind its arguments, where it is differentiated like them; checks the matrix."""
    with_mass(fun, mass, y0, batched)
    return lambda t, y, *rest: fun(t, y, *rest[:-1])


def consistent_start(system: System, times: Times, y0: Tensor, user_spec: StateSpec, **options: Any) -> tuple[Tensor, System]:
    """``y0`` (B, n) with its algebraic part solved for, differentiable, and ``M y' - f = 0`` as implicit equations. ``options``: those of
    `initial_values`.

    Raises `HigherIndexDAE` where Rosenbrock methods lose their order.
    """
    spec, right_hand_side = system.spec, system.fun

    def residual(t: Tensor, y: Any, yp: Any, *args: Any) -> Any:
        matrix = system.mass_matrix([*([None] * (system.mass or 0)), args[-1]])  # type: ignore[list-item]
        assert matrix is not None
        product = (matrix @ spec.flatten(yp).unsqueeze(-1)).squeeze(-1)
        return spec.unflatten(product - spec.flatten(right_hand_side(t, y, *args)))

    implicit = replace(system, fun=residual, residual=spec, mass=None, parameter_names=None)
    inputs, still = implicit.inputs, torch.zeros_like(y0.detach())
    algebra = residual_algebra(implicit, inputs, spec, times, y0, still, None, None)
    given = Initial(y0, still)
    options |= {"consistent": "solve", "differential": None, "user_spec": user_spec, "skip": False}
    start, algebra = initial_values(implicit, algebra, times.anchors[0], given, inputs, **options)
    if algebra.structure is not None and algebra.structure.index > 1:
        raise HigherIndexDAE("Rosenbrock methods are for equations of index 0 and 1, and these are of index 2: give method='radau5'")
    return start.y, implicit


def without_last(events: Any) -> Any:
    """Event functions that are given the matrix behind their arguments, and do not want it."""

    def one(event: Any) -> Any:
        if not callable(event):
            return event
        return with_rules_of(event, lambda t, y, *args: event(t, y, *args[:-1]))

    return [one(e) for e in events] if isinstance(events, Sequence) else None if events is None else one(events)


def with_mass(fun: Callable[..., Any], mass: Any, y0: Any, batched: bool) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """``residual(t, y, y', *args, *extra)`` and ``extra``: the matrix where it is a tensor, so that it is differentiated like ``args``."""
    spec = StateSpec.of(y0, batched)
    n = sum(spec.sizes)
    if not callable(mass) and not isinstance(mass, Tensor):
        raise InvalidInput(f"mass_matrix must be a tensor ({n}, {n}) or a function of (t, y, *args), got a {type(mass).__name__}")

    def product(matrix: Any, yp: Any) -> Tensor:
        if not isinstance(matrix, Tensor) or matrix.layout != torch.strided:
            raise InvalidInput("mass_matrix must be, or return, a dense tensor; give large sparse systems to solve_dae as residuals")
        allowed = [(n, n), (spec.rows, n, n)] if batched else [(n, n)]
        if tuple(matrix.shape) not in allowed:
            shapes = " or ".join(map(str, allowed))
            raise InvalidInput(f"mass_matrix has shape {tuple(matrix.shape)}, but the state has {n} entries: {shapes} is expected")
        flat = spec.flatten(yp)
        if matrix.dtype != flat.dtype:
            raise InvalidInput(f"mass_matrix is {matrix.dtype}, but the state is {flat.dtype}: convert one of them")
        return (matrix @ flat.unsqueeze(-1)).squeeze(-1)

    def checked(rate: Any) -> Tensor:
        return spec.flatten(spec.check(rate, "what fun returned"))

    def shaped(flat: Tensor) -> Tensor:
        return flat if batched else flat.reshape(-1)

    if isinstance(mass, Tensor):
        product(mass.detach(), y0)

        def constant(t: Tensor, y: Any, yp: Any, *rest: Any) -> Tensor:
            *args, matrix = rest
            return shaped(product(matrix, yp) - checked(fun(t, y, *args)))

        return _wrapping(constant, fun), (mass,)

    def varying(t: Tensor, y: Any, yp: Any, *args: Any) -> Tensor:
        return shaped(product(mass(t, y, *args), yp) - checked(fun(t, y, *args)))

    return _wrapping(varying, fun), ()


def _wrapping(residual: Callable[..., Any], fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function that says which one it calls, as those of `functools.wraps` do: what is known of it is known by both."""
    residual.__wrapped__ = fun  # type: ignore[attr-defined]
    return residual
