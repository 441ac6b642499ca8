"""Initial values of implicit equations by compiled code: their matrices, and what is not given."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from .calls import CONSISTENT_CALL, filled
from .device import addressed
from .memory import plain
from .program import Engine, Program

__all__ = ["LEAST", "MOST", "NativeStart"]

#: pivots below this part of the largest one, and steps, that are left to whoever tells why
LEAST, MOST = 1e-10, 50


@dataclass(frozen=True)
class NativeStart:
    """A residual ``F(t, y, y')`` with the tensors that it reads."""

    program: Program
    values: tuple[Tensor, ...]

    def pencil(self, t: Tensor, y: Tensor, yp: Tensor) -> tuple[Tensor, Tensor]:
        """``E = F_y'`` and ``G = F_y``, ``(B, n, n)``, at times (B,) and states and slopes (B, n)."""
        rows, n = y.shape
        found = y.new_empty(rows, n, 2 * n)
        self._call(t, y, yp, pencil=found)
        return found[..., n:], found[..., :n]

    def complete(self, t: Tensor, y: Tensor, yp: Tensor, differential: Tensor, rtol: float) -> tuple[Tensor, Tensor] | None:
        """``y`` and ``y'`` with those values of variables that are not ``differential`` (n,), and slopes of those that are, that solve the
        equations: by Newton's method with full steps, to ``rtol``. None where that does not lead there in a straight way, or where
        matrices are all but singular."""
        y_found, yp_found = torch.empty_like(y), torch.empty_like(yp)
        found = torch.empty(len(y), dtype=torch.bool, device="cpu")
        self._call(t, y, yp, differential=differential.contiguous(), rtol=rtol, y_found=y_found, yp_found=yp_found, found=found)
        return (y_found, yp_found) if bool(found.all()) else None

    def _call(self, t: Tensor, y: Tensor, yp: Tensor, rtol: float = 0.0, **out: Tensor) -> None:
        program = self.program
        engine = program.engine(program.lanes(len(y)))
        assert isinstance(engine, Engine) and engine.consistent is not None
        given: dict[str, Tensor] = {name: plain(x) for name, x in (("t", t), ("y", y), ("yp", yp))}
        inputs, _inputs_at = addressed(self.values, y.device)
        call = filled(
            CONSISTENT_CALL,
            **engine.functions,
            inputs=inputs,
            tables=program.table_addresses[0],
            rows=len(y),
            rtol=rtol,
            least=LEAST,
            most=MOST,
            **{name: x.data_ptr() for name, x in (given | out).items()},
        )
        engine.consistent(ctypes.byref(call))
