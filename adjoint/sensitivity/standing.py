"""A word on derivatives of implicit equations whose state rests.

Steps go by the error of the state. Where that rests they are as long as the span, and nobody looks at what a displacement would do in them.
Explicit equations have a displaced solution beside them there (`integrate/companion.py`); one of implicit equations would have to satisfy
the constraints, and there is none yet.
"""

from __future__ import annotations

import torch

from ..integrate import Plan, Record
from ..integrate.companion import STANDING
from ..system.capture import readable
from ..system.remarks import remark

__all__ = ["tell_of_rest"]

#: the part of the span, from its start on, in which a state at rest has not moved
_PART = 0.01


def tell_of_rest(plan: Plan, record: Record) -> None:
    """Warn where a trajectory does not move at the start, though it is solved for derivatives; who bounds steps by ``max_step`` has been
    told."""
    h, states = record.h, record.states
    if not len(h) or len(states) != len(h) + 1 or plan.max_step < float("inf") or not readable(states):
        return
    size = torch.maximum(states[1:].abs(), states[0].abs())
    moved = ((states[1:] - states[0]).abs() > STANDING * (size * plan.rtol + plan.atol)).any(-1)
    # a trajectory that is through has steps of size zero
    still = (~moved).cumprod(0) * h.abs()
    rested, span = still.sum(0), h.abs().sum(0)
    resting = (rested > _PART * span) & (span > 0)
    if not bool(resting.any()):
        return
    row = int(resting.nonzero()[0])
    where = f" of trajectory {row}" if h.shape[1] > 1 else ""
    remark(
        f"the state{where} rests at the start, for {float(rested[row]):.3g} of a span of {float(span[row]):.3g}: steps go by the state "
        "alone there, and derivatives of implicit equations (solve_dae, mass_matrix=) may be those of steps that are too long for them. "
        "Bound max_step= by what a small displacement would need, or write the equations as y' = f(t, y): there solve_ivp looks after it",
        RuntimeWarning,
    )
