"""What comes back from a solve."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..errors import InvalidInput
from ..integrate import Status
from ..system.ownership import WithTensors
from ..system.transforms import functorch_active
from .arguments import as_times
from .rows import no_number

__all__ = ["BackwardStats", "Ended", "EventLog", "EventRecord", "Solution", "Stats"]

_MESSAGES = {
    Status.SUCCESS: "the solver reached the end of t_span",
    Status.TERMINAL_EVENT: "a terminal event occurred",
    Status.MAX_STEPS: "max_steps was reached before the end of t_span",
    Status.STEP_TOO_SMALL: "the step size became too small",
    Status.NON_FINITE: "fun or the state became non-finite",
    Status.NEWTON_FAILED: "Newton's iteration for the stages did not converge",
    Status.EVENTS_ACCUMULATE: "there were max_events events, or ever more of them within no time",
}


class BackwardStats:
    """Work of the backward sweeps made so far, those of a solve's ``parts`` counted in."""

    def __init__(self, parts: Sequence[BackwardStats] = ()) -> None:
        self._fun, self._steps, self._parts = 0, 0, tuple(parts)

    def add(self, n_fun: int, n_steps: int) -> None:
        """One more sweep."""
        self._fun += n_fun
        self._steps += n_steps

    @property
    def n_fun(self) -> int:
        """Evaluations of ``fun``, each with one vector-Jacobian product."""
        return self._fun + sum(p.n_fun for p in self._parts)

    @property
    def n_steps(self) -> int:
        """Steps taken back."""
        return self._steps + sum(p.n_steps for p in self._parts)

    def __repr__(self) -> str:
        return f"BackwardStats(n_fun={self.n_fun}, n_steps={self.n_steps})"


@dataclass(frozen=True)
class Stats:
    """Work of the forward solve: integers, or one per trajectory in a ``(B,)`` tensor when batched.

    ``n_steps`` counts attempted steps. ``n_fun`` is of the steps: looks at ``fun`` before a solve, and for jumps after it, are not in it.
    What is counted of a trajectory does not depend on those beside it; ``df/dt`` belongs to the Jacobian, of which it is a column.
    The counters of Jacobians, factorisations and solves are zero for explicit methods.
    ``compile_seconds``: spent on making native code (``compile=True``).
    """

    n_steps: int | Tensor
    n_accepted: int | Tensor
    n_rejected: int | Tensor
    n_fun: int | Tensor
    n_jac: int | Tensor = 0
    n_factorizations: int | Tensor = 0
    n_solves: int | Tensor = 0
    n_newton: int | Tensor = 0
    backward: BackwardStats = field(default_factory=BackwardStats)
    compile_seconds: float = 0.0


@dataclass(frozen=True)
class EventRecord:
    """Where one event function was zero: times ``(E,)`` and states ``(E, *state)``, both differentiable.

    When batched ``(E, B)`` and ``(E, *state)``, in the order of time for each trajectory, with NaN behind its last event. Under
    ``torch.vmap`` every copy has ``E`` for the one with most events (``method="auto"``: perhaps more), and NaN behind its last.

    ``y`` are the states before a reset, ``after`` those that it gave, of the same shapes; None for events without one.
    """

    t: Tensor
    y: Any
    after: Any = None


class EventLog(tuple[EventRecord, ...]):
    """The records in the order of ``events=``; ``log["name"]`` is that of the event of this name (of a plain function, its own)."""

    names: tuple[str | None, ...]

    @classmethod
    def of(cls, records: Iterable[EventRecord], names: Iterable[str | None]) -> EventLog:
        """Records with the names of what they are records of."""
        log = cls(records)
        log.names = tuple(names)
        return log

    def __getitem__(self, which: Any) -> Any:
        if not isinstance(which, str):
            return super().__getitem__(which)
        found = [record for record, name in zip(self, self.names, strict=True) if name == which]
        if len(found) != 1:
            known = ", ".join(repr(name) for name in self.names if name)
            many = f"{len(found)} events have" if found else "no event has"
            raise KeyError(f"{many} the name {which!r}: there are {known or 'none'}")
        return found[0]


_NO_EVENTS = EventLog.of((), ())


class Ended(WithTensors):
    """What came of a solve: its status, below zero where it failed, and what is ``said`` of each."""

    status: int | Tensor
    said: ClassVar[dict[Any, str]]

    @property
    def success(self) -> bool | Tensor:
        """Whether the end, or a terminal event, was reached; of a root, whether the iteration converged."""
        return self.status >= 0

    @property
    def message(self) -> str | list[str]:
        """The status in words; a list, one of each trajectory or system, when batched."""
        return self.said[self.status] if isinstance(self.status, int) else [self.said[s] for s in self.status.reshape(-1).tolist()]


@dataclass(frozen=True)
class Solution(Ended):
    """The solution of an initial value problem.

    Attributes
    ----------
    t : Tensor
        ``(T,)``, or ``(T, B)`` where trajectories have their own times.
    y : Tensor or pytree
        The state at ``t``: ``(T, *y0.shape)`` for every leaf. NaN from a failure or a terminal event on.
    status : int or Tensor
        0 success, 1 terminal event, negative a failure (see `message`); ``(B,)`` when batched.
    stats : Stats
        Work counters; those of backward passes under ``stats.backward``.
    events : EventLog
        A tuple of an `EventRecord` for each entry of ``events=``; ``events["name"]`` by name.
    quadrature : Tensor, pytree or None
        The integral of ``quadrature=`` over the span.
    yp : Tensor, pytree or None
        Of `solve_dae`: the slopes at ``t``, shaped like ``y``. At the start those of algebraic variables, which the equations do not name,
        are the ones given, and zero without ``yp0=``; behind it they are slopes of the solution between the steps.
    """

    t: Tensor
    y: Any
    status: int | Tensor
    stats: Stats
    events: EventLog = _NO_EVENTS
    quadrature: Any = None
    yp: Any = None
    interpolant: Callable[..., Any] | None = None

    said: ClassVar[dict[Any, str]] = _MESSAGES

    def __call__(self, t: float | Tensor, side: str = "right") -> Any:
        """The state at any times within the span, from the dense output; differentiable in ``t`` too.

        ``t`` of shape ``()`` or ``(T,)``, when batched also ``(T, B)``, gives leaves of shape ``(*t.shape[:1], *leaf.shape)``. At the
        time of a reset ``side`` tells which state: "right" that after it, "left" that before.
        """
        if self.interpolant is None:
            raise RuntimeError("this solution has no dense output: solve with dense_output=True")
        if side not in ("left", "right"):
            raise InvalidInput(f'side must be "left" or "right", got {side!r}')
        return self.interpolant(as_times(t, "t"), side)

    def curve(self, points: int = 100, trajectory: int | None = None) -> tuple[Tensor, Any]:
        """Times ``(P,)`` and states ``(P, ...)`` to draw, from the first to the last of ``sol.t``, without derivatives.

        ``points`` from each reset to the next, the states on both sides of it, and NaN between them, so that a drawn line has a gap there:
        ``plt.plot(*sol.curve())``. Of a batch that of one ``trajectory``. Needs ``dense_output=True``.
        """
        if (trajectory is None) != isinstance(self.status, int):
            raise InvalidInput("curve(trajectory=...) names one trajectory of a batch" if trajectory is None else "there is one trajectory")
        if not isinstance(points, int) or points < 2:
            raise InvalidInput(f"points must be a number, two or more, got {points!r}")

        def own(x: Tensor) -> Tensor:
            x = x.detach().double()
            return x if trajectory is None or x.dim() < 2 else x[:, trajectory]

        t = own(self.t)
        t = t[~t.isnan()]
        resets = [own(record.t) for record in self.events if record.after is not None]
        inner = torch.cat([t.new_empty(0), *resets])
        low, high = torch.minimum(t[0], t[-1]), torch.maximum(t[0], t[-1])
        inner = inner[(inner >= low) & (inner <= high)].unique()
        inner = inner if t[-1] >= t[0] else inner.flip(0)
        ends = torch.cat([t[:1], inner, t[-1:]])
        times, states = [], []
        for a, b in pairwise(ends):
            if a == b:
                continue
            grid = torch.linspace(0.0, 1.0, points, dtype=t.dtype, device=t.device)
            at = a + (b - a) * grid
            at[-1] = b
            with torch.no_grad():
                right, left = self(at), self(at, side="left")
            last = torch.arange(points, device=t.device) == points - 1
            parts = (right, left) if trajectory is None else tree_map(lambda x: x[:, trajectory], (right, left))
            if states:
                times.append(a.reshape(1))
                states.append(tree_map(lambda x: torch.full_like(x[:1], no_number(x)), parts[0]))
            times.append(at)
            states.append(tree_map(lambda x, y, e=last: torch.where(e.reshape(-1, *[1] * (x.dim() - 1)), y, x), *parts))
        return torch.cat(times), tree_map(lambda *xs: torch.cat(xs), *states)

    def with_tensors(self, function: Callable[[Any], Any]) -> Solution:
        """The same with ``function`` of everything that may be differentiated: states, times, what gives the dense output."""
        events = (EventRecord(function(e.t), function(e.y), function(e.after)) for e in self.events)
        return replace(
            self,
            t=function(self.t),
            y=function(self.y),
            events=EventLog.of(events, self.events.names),
            quadrature=function(self.quadrature),
            yp=function(self.yp),
            interpolant=function(self.interpolant),
        )

    @property
    def nfev(self) -> int | Tensor:
        """SciPy's name of ``stats.n_fun``."""
        return self.stats.n_fun

    @property
    def t_events(self) -> list[Tensor]:
        """SciPy's name of the event times."""
        return [e.t for e in self.events]

    @property
    def y_events(self) -> list[Any]:
        """SciPy's name of the event states."""
        return [e.y for e in self.events]

    def __repr__(self) -> str:
        def shape(y: Any) -> str:
            if isinstance(y, Tensor):
                return f"{tuple(y.shape)} {str(y.dtype).removeprefix('torch.')}"
            return str(torch.utils._pytree.tree_map(lambda x: tuple(x.shape), y))

        lines = [f"  t: {tuple(self.t.shape)}", f"  y: {shape(self.y)}"]
        if functorch_active():
            return "Solution(\n" + "\n".join(lines) + "\n)"
        if isinstance(self.status, int):
            lines.insert(0, f"  status: {self.status} ({self.message})")
            work = f"{self.stats.n_accepted} accepted, {self.stats.n_rejected} rejected, {self.stats.n_fun} evaluations of fun"
        else:
            failed = int((self.status < 0).sum())
            lines.insert(0, f"  status: {self.status.numel() - failed} trajectories succeeded, {failed} failed")
            steps = torch.as_tensor(self.stats.n_accepted)
            work = f"{int(steps.min())} to {int(steps.max())} accepted a trajectory" if steps.numel() else "none"
        lines.append(f"  steps: {work}")
        if self.events:
            lines.append(f"  events: {', '.join(str(int((~e.t.isnan()).sum())) for e in self.events)}")
        if self.quadrature is not None:
            lines.append(f"  quadrature: {shape(self.quadrature)}")
        if self.interpolant is not None:
            lines.append("  dense output: yes")
        return "Solution(\n" + "\n".join(lines) + "\n)"
