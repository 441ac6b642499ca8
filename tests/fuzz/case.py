"""What one case is: every choice that was drawn, and the numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .equations import Equations

__all__ = ["Case", "Piece", "start_of"]


def start_of(shared: str, y0: Tensor) -> Tensor:
    """What a solve starts from, of the tensor that is drawn."""
    return y0 + 0.2 * torch.sin(y0) if shared == "computed" else y0


@dataclass(frozen=True)
class Piece:
    """Parameters ``start`` to ``stop``, and the way in which they come to the right-hand side."""

    name: str
    start: int
    stop: int
    #: "argument", "tree", "closure", "helper", "default", "attribute", "module", "buffer"
    way: str
    #: one value for each row of the batch
    by_row: bool = False
    #: whether it is differentiated
    active: bool = True


@dataclass(frozen=True)
class Case:
    """One random case. Numbers have a leading dimension for the rows of a batch, also where there is one."""

    seed: int
    door: str
    equations: Equations
    #: "one", "batched" or "vmapped"
    form: str
    method: str
    #: the text of the strategy, or none
    strategy: str
    #: "none", "backward", "second", "jvp", "dual", "grad", "hvp", "inner grad"
    derivative: str
    layout: str
    style: str
    pieces: tuple[Piece, ...]
    #: "ends", "list", "tensor", "list of tensors", "by row", "dense", "steps"; "root" where nothing is integrated
    times: str
    #: whether the span is given in tensors that are differentiated
    span_active: bool
    event: str  # "", "terminal", "passed"
    component: int
    quadrature: bool
    dead: str  # "", "start", "later"
    ragged: bool
    empty: bool
    dtype: str
    rtol: float
    atol: float
    #: constant size of steps, of methods without an error estimate
    step: float | None
    compiled: bool
    #: of the door: an interface, a kind of mass matrix, ...
    detail: str
    #: y0 (R, n), p (R, m), t0 (R,), t1 (R,), ts (T, R), level (R,)
    values: dict[str, Tensor] = field(repr=False)
    directions: dict[str, Tensor] = field(repr=False)
    #: of samples (T, R, shown), of integrals (R,), of event times (R,), of event states (R, shown)
    weights: dict[str, Tensor] = field(repr=False)
    #: which rows count in the loss, and which cross
    alive: tuple[bool, ...] = (True,)
    crosses: tuple[bool, ...] = ()
    #: another strategy whose derivatives of first order must be the same ones
    other: str = ""
    #: how the start is made of a tensor, the piece "q", that the function has too; none where it has not. "detached": by itself
    shared: str = ""
    #: functions that are made once, and see what they capture as globals
    kept: bool = False
    #: solves of the same program before the one that is judged: "same", "changed" (in place), "other" (other tensors), "wider" (more rows)
    earlier: tuple[str, ...] = ()

    @property
    def start(self) -> Tensor:
        return start_of(self.shared, self.values["y0"])

    @property
    def rows(self) -> int:
        return self.values["y0"].shape[0]

    @property
    def algebraic(self) -> bool:
        """Whether an algebraic variable stands beside the equations."""
        return self.door == "solve_dae" or (self.door == "mass matrix" and self.detail != "regular")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def second_order(self) -> bool:
        return self.derivative in ("second", "hvp")

    def summary(self) -> str:
        """One line."""
        parts = [self.door, self.detail, self.method, self.form, self.strategy or "default strategy", self.derivative, self.equations.name]
        parts += [self.layout, self.style, "+".join(x.way for x in self.pieces), f"times: {self.times}", self.dtype, f"rtol {self.rtol:g}"]
        parts += [f"beside {self.other}"] * bool(self.other)
        parts += [f"start {self.shared}"] * bool(self.shared) + [f"after {'+'.join(self.earlier)}"] * bool(self.earlier)
        parts += [f"event {self.event}"] * bool(self.event) + [f"dead {self.dead}"] * bool(self.dead)
        flags = ("span_active", "quadrature", "ragged", "empty", "compiled", "kept")
        parts += [name.replace("_", " ") for name in flags if getattr(self, name)]
        parts += ["backwards"] * bool((self.values["t1"] < self.values["t0"]).any())
        return ", ".join(x for x in parts if x)
