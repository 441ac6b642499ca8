"""``solve_ivp(..., mass_matrix=M)``: equations ``M y' = fun(t, y, *args)``, also with a singular ``M``, as implicit equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .errors import InvalidInput, UnsupportedCombination
from .methods import Method
from .system import StateSpec

__all__ = ["implicit_method", "with_mass", "without_last"]

#: the methods for implicit equations, by the names that they have for explicit ones
_METHODS = {"radau5": "radau", "radau": "radau", "radauIIA3": "radau3", "bdf": "bdf"}


def implicit_method(method: str | Method, options: dict[str, Any]) -> str:
    """The method for implicit equations that stands for ``method``; raises for options that it does not have."""
    name = method if isinstance(method, str) else method.name
    if name not in _METHODS:
        raise UnsupportedCombination(f"mass_matrix= is not supported by {name!r}: give method='radau5' (or 'radauIIA3', 'bdf')")
    for option, value in options.items():
        if value is not None:
            raise UnsupportedCombination(f"{option}= with mass_matrix= is not supported: leave {option} out, or use solve_dae")
    return _METHODS[name]


def without_last(events: Any) -> Any:
    """Event functions that are given the matrix behind their arguments, and do not want it."""

    def one(event: Any) -> Any:
        if not callable(event):
            return event
        return wraps(event, updated=("__dict__",))(lambda t, y, *args: event(t, y, *args[:-1]))

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
        spec.check(rate, "what fun returned")
        return spec.flatten(rate)

    def shaped(flat: Tensor) -> Tensor:
        return flat if batched else flat.reshape(-1)

    if isinstance(mass, Tensor):
        product(mass.detach(), y0)

        def constant(t: Tensor, y: Any, yp: Any, *rest: Any) -> Tensor:
            *args, matrix = rest
            return shaped(product(matrix, yp) - checked(fun(t, y, *args)))

        return constant, (mass,)

    def varying(t: Tensor, y: Any, yp: Any, *args: Any) -> Tensor:
        return shaped(product(mass(t, y, *args), yp) - checked(fun(t, y, *args)))

    return varying, ()
