"""What `compile=True` would make of a right-hand side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from ..errors import InvalidInput
from ..methods import DAE_METHODS, METHODS, Method
from ..native.build import NoCompiler, compiler
from ..native.emit import is_residual, takes
from ..native.reading import Unreadable
from ..native.recognise import Recognised, compile_key, recognise
from ..system.system import StateSpec, System
from .arguments import check_method

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What was found; its ``str`` says it in some lines.

    Attributes
    ----------
    native : bool
        Whether a solve with ``compile=True`` is one of native code.
    reason : str
        Why not: the operator, the line of the user's code, what is in the way; empty where it is.
    unknowns : int
        Numbers in the state of one trajectory.
    operators : tuple of str
        The ATen operators that were read.
    inputs : tuple of (shape, str)
        The tensors that ``fun`` uses beside time and state (arguments, then what it captures), and whether trajectories "share" them or
        each has its "own" part.
    jacobian : int or None
        Entries of the Jacobian that are not always zero, for implicit methods; of implicit equations those in ``y`` and in ``y'``.
    entries : int
        All entries of it.
    sources : dict of str
        The C++ text of ``fun``, of its derivatives ("vjp", and for implicit methods "jac" and "bend"), by name.
    """

    native: bool
    reason: str
    method: str
    unknowns: int = 0
    operators: tuple[str, ...] = ()
    inputs: tuple[tuple[tuple[int, ...], str], ...] = ()
    jacobian: int | None = None
    sources: dict[str, str] | None = None
    entries: int = 0

    def __str__(self) -> str:
        if not self.native:
            return f"{self.method}: solves with compile=True run uncompiled, because {self.reason}"
        lines = [f"{self.method}: native code for {self.unknowns} unknowns, of the operators {', '.join(self.operators) or 'none'}"]
        for shape, kind in self.inputs:
            lines.append(f"  a tensor {shape}, " + ("shared by all trajectories" if kind == "share" else "a part for each trajectory"))
        if self.jacobian is not None:
            lines.append(f"  {self.jacobian} of {self.entries} entries of the Jacobian are not always zero")
        for name, text in (self.sources or {}).items():
            lines.append(f"  {name}: {text.count(chr(10)) - 1} lines of C++")
        return "\n".join(lines)


def explain(
    fun: Callable[..., Any],
    y0: Any,
    args: Any = (),
    *,
    method: str | Method = "tsit5",
    batched: bool = False,
    t0: float = 0.0,
) -> Explanation:
    """Say what ``solve_ivp(fun, (t0, ..), y0, args, method=method, batched=batched, compile=True)`` would compile, or why it would not;
    with a method that is for implicit equations alone ("radau", "radau3") `solve_dae` of ``fun(t, y, yp, *args)``.

    ``fun`` is read, at ``t0`` and ``y0``; nothing is compiled or solved. The C++ text is in ``Explanation.sources``.

    Raises
    ------
    InvalidInput, UnsupportedCombination : for states and methods that `solve_ivp` does not take
    """
    named = DAE_METHODS.get(method) if isinstance(method, str) and method not in METHODS else None
    chosen = named if named is not None else check_method(method)
    if not callable(fun):
        raise InvalidInput(f"fun must be callable, got a {type(fun).__name__}")
    if not all(map(takes, chosen.members)):
        return Explanation(False, f"method={chosen.name!r} has no native form", chosen.name)
    args = args if isinstance(args, (tuple, list)) else (args,)
    spec = StateSpec.of(y0, batched)
    spec = spec.in_parts() if spec.holds_complex else spec
    leaves, tree = tree_flatten(tuple(args))
    system = System(fun, spec, tree, tuple(leaves), residual=_layout(fun, spec, y0, args, t0) if is_residual(chosen) else None)
    y, t = spec.taken(y0).detach(), torch.full((spec.rows,), t0, dtype=spec.real_dtype, device=spec.device)
    try:
        compiler()
        # of two methods that change over it is the implicit one that needs more
        found = recognise(compile_key(fun), system, chosen.members[-1], t, y, system.inputs, batched)
        functions = found.program.functions
    except (Unreadable, NoCompiler) as error:
        return Explanation(False, str(error), chosen.name)
    nonzero = None if functions.matrices is None else len(functions.matrices.nonzero)
    width = y.shape[1]
    entries = width**2 * (2 if is_residual(chosen) else 1)
    operators = tuple(sorted(found.program.reading.operators))
    return Explanation(True, "", chosen.name, width, operators, _inputs(found), nonzero, dict(functions.texts), entries)


def _layout(fun: Callable[..., Any], spec: StateSpec, y0: Any, args: tuple[Any, ...], t0: float) -> StateSpec:
    """How a residual is flat."""
    t = torch.full((spec.rows,), t0, dtype=spec.real_dtype, device=spec.device)
    with torch.no_grad():
        found = StateSpec.of(fun(t if spec.batch is not None else t[0], y0, y0, *args), spec.batch is not None, "what fun returned")
    return found.in_parts() if spec.split else found


def _inputs(found: Recognised) -> tuple[tuple[tuple[int, ...], str], ...]:
    def kind(x: Tensor, own: int) -> tuple[tuple[int, ...], str]:
        return tuple(x.shape), "own" if own else "share"

    return tuple(kind(x, own) for x, own in zip(found.tensors, found.program.own, strict=True))
