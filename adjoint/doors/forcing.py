"""``Forcing``: an input by a table, whose knots are ends of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node, tree_leaves

from ..errors import InvalidInput
from ..system.capture import readable
from ..system.origins import held_by
from .arguments import as_times
from .rows import wide

__all__ = ["Forcing", "Schedule", "with_knots"]

KINDS = ("constant", "linear", "cubic")


@dataclass(frozen=True, eq=False, init=False)
class Forcing:
    """An input by a table: a function of the time for use in ``fun``, ``forcing(t)``.

    Steps of a solve end at its knots, whether it is in ``args`` or captured by ``fun``, so that none goes over a jump or a kink. Knots and
    values are differentiated, those of jumps too. Beyond the table it has its first and last values.

    Parameters
    ----------
    times : Tensor or sequence of numbers
        Knots ``(K,)``, increasing; of linear tables two may be equal, where it jumps. ``(K, B)``: of each trajectory its own, with NaN
        behind the last one of those that have fewer (as `torch.nn.utils.rnn.pad_sequence` makes them).
    values : Tensor or sequence
        ``(K, ...)``, with knots of each trajectory ``(K, B, ...)``. Of constant tables also one more, which comes first and holds before
        the first knot.
    kind : "constant", "linear" or "cubic"
        "constant" holds a value from its knot on to the next one (see `Schedule`); "cubic" is the natural spline. At ends of the span of a
        solve the side within it counts.

    Raises
    ------
    InvalidInput
    """

    knots: Tensor
    levels: Tensor
    kind: str
    bends: Tensor | None
    #: whether there is any: functions are not searched for tables before
    met: ClassVar[bool] = False

    def __new__(cls, *given: Any, **named: Any) -> Forcing:
        Forcing.met = True
        return object.__new__(cls)

    def __init__(self, times: Any, values: Any, kind: str = "linear") -> None:
        if kind not in KINDS:
            raise InvalidInput(f"kind of a Forcing must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        values = as_times(values, "values of a Forcing")
        times = as_times(times, "times of a Forcing", values.device)
        least = 1 if kind == "constant" else 2
        ahead = kind == "constant" and values.dim() > 0 and times.dim() > 0 and len(values) == len(times) + 1
        fits = values.shape[: times.dim()] == times.shape or (ahead and values.shape[1 : times.dim()] == times.shape[1:])
        if times.dim() not in (1, 2) or len(times) < least - ahead or not fits:
            raise InvalidInput(
                f"times of a Forcing must be (K,) or (K, B), at least {least}, and values (K, ...) or (K, B, ...)"
                f"{', or one more than times' if kind == 'constant' else ''}: got {tuple(times.shape)} and {tuple(values.shape)}"
            )
        values = values if values.is_floating_point() or values.is_complex() else values.to(torch.float64)
        times, values, there = _filled(times.to(values.dtype.to_real()), values, least - ahead)
        gaps = times.detach().diff(dim=0)
        if readable(gaps) and not bool((gaps >= 0 if kind == "linear" else gaps > 0).all()):
            raise InvalidInput("times of a Forcing must increase")
        if times.dim() == 2:
            times, values, there = times.movedim(1, 0), values.movedim(1, 0), None if there is None else there.movedim(1, 0)
        self._set(times.contiguous(), values, kind, None)
        if kind == "cubic":
            self._set(self.knots, self.levels, kind, _bends(self.knots, self.levels, there))

    def _set(self, knots: Tensor, levels: Tensor, kind: str, bends: Tensor | None) -> None:
        for name, value in (("knots", knots), ("levels", levels), ("kind", kind), ("bends", bends)):
            object.__setattr__(self, name, value)

    @property
    def times(self) -> Tensor:
        """The knots ``(K,)`` or ``(K, B)``."""
        return self.knots if self.knots.dim() == 1 else self.knots.movedim(0, 1)

    @property
    def values(self) -> Tensor:
        """The values there."""
        return self.levels if self.knots.dim() == 1 else self.levels.movedim(0, 1)

    def __call__(self, t: Tensor) -> Tensor:
        """The input at ``t``: of 0-d ``t`` ``(...)``, of ``(B,)`` ``(B, ...)``."""
        count = self.levels.shape[self.knots.dim() - 1]
        # a value that holds before the first knot is the first one
        skipped = self.knots.shape[-1] - count + 1
        last = count - (1 if self.kind == "constant" else 2)
        if self.knots.dim() == 1:
            i = (torch.searchsorted(self.knots.detach(), t.detach().contiguous(), right=True) - skipped).clamp(0, last)
        else:
            i = ((t.detach().unsqueeze(-1) >= self.knots.detach()).sum(-1) - skipped).clamp(0, last)

        def at(table: Tensor, k: int) -> Tensor:
            if self.knots.dim() == 1:
                # an index that torch.vmap maps over is no number
                return table.index_select(0, (i + k).reshape(-1)).reshape((*i.shape, *table.shape[1:]))
            return table.gather(1, wide((i + k).unsqueeze(-1), table).expand(-1, 1, *table.shape[2:])).squeeze(1)

        low = at(self.levels, 0)
        if self.kind == "constant":
            return low
        start, end, high = at(self.knots, 0), at(self.knots, 1), at(self.levels, 1)
        length = end - start
        length = torch.where(length == 0, 1.0, length)
        share = ((t - start) / length).clamp(0.0, 1.0)
        s, r = wide(share, low), wide(1 - share, low)
        line = low * r + high * s
        if self.kind == "linear":
            return line
        assert self.bends is not None
        one, other = at(self.bends, 0), at(self.bends, 1)
        return line + wide(length, low) ** 2 / 6 * ((r**3 - r) * one + (s**3 - s) * other)


def Schedule(times: Any, values: Any) -> Forcing:
    """An input that is switched at known times: a constant `Forcing` of ``K`` times and ``K + 1`` values.

    ``values[0]`` holds up to ``times[0]``, ``values[k]`` from ``times[k - 1]`` on. Times and values are differentiated; steps end at the
    times.

    Parameters
    ----------
    times : Tensor or sequence of numbers
        ``(K,)``, increasing; ``(K, B)``: of each trajectory its own.
    values : Tensor or sequence
        ``(K + 1, ...)``, with times of each trajectory ``(K + 1, B, ...)``.

    Raises
    ------
    InvalidInput
    """
    forcing = Forcing(times, values, "constant")
    if len(forcing.values) != len(forcing.times) + 1:
        raise InvalidInput(
            f"a Schedule of {len(forcing.times)} times has {len(forcing.times) + 1} values, the first one up to the first time: got "
            f"{len(forcing.values)}"
        )
    return forcing


def _filled(times: Tensor, values: Tensor, least: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Times and values, first dimension ``K``, with knots later than any span in the place of times that are NaN, where the last value goes
    on; and which times are given, or None: all are. At ``least`` so many have to be."""
    there = ~times.detach().isnan()
    if readable(there):
        if bool(there.all()):
            return times, values, None
        if bool((there.diff(dim=0) & there[1:]).any()) or int(there.sum(0).min()) < least:
            raise InvalidInput(f"times of a Forcing may be NaN behind the last knot only, and at least {least} of them are numbers")
    count = len(times)
    far = torch.finfo(times.dtype).max ** 0.4  # its square is finite
    beyond = torch.linspace(far, 2 * far, count, dtype=times.dtype, device=times.device)
    times = torch.where(there, times, beyond if times.dim() == 1 else beyond.unsqueeze(-1))
    own, first = values[len(values) - count :], values[: len(values) - count]
    last = (there.sum(0) - 1).clamp(min=0)
    shape = (1, *own.shape[1:])
    kept = own.gather(0, wide(last.unsqueeze(0), own).expand(shape)) if times.dim() > 1 else own.index_select(0, last.reshape(1))
    if len(first):
        kept = torch.where(wide(there.any(0, keepdim=True), kept), kept, first)
    return times, torch.cat([first, torch.where(wide(there, own), own, kept)]), there


def _bends(knots: Tensor, levels: Tensor, there: Tensor | None) -> Tensor:
    """Second derivatives of the natural spline at its knots, like the levels. ``there``: which knots are given; None: all."""
    along = knots.dim() - 1
    count = knots.shape[-1]
    if count < 3:
        return torch.zeros_like(levels)
    from ..linalg.functions import inverse

    h = knots.diff(dim=-1)
    slopes = levels.diff(dim=along) / wide(h, levels)
    diagonal, beside = (h[..., :-1] + h[..., 1:]) / 3, h[..., 1:-1] / 6
    matrix = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
    right = slopes.diff(dim=along)
    if there is not None:
        # zero at the last knot, and behind it
        inner = there[..., 2:]
        matrix = torch.where(inner.unsqueeze(-1), matrix, torch.eye(count - 2, dtype=matrix.dtype, device=matrix.device))
        right = torch.where(wide(inner, right), right, 0.0)
    # dominated by its diagonal, so that nothing is lost by its inverse, which has derivatives of all orders and modes
    found = (inverse(matrix.to(right.dtype)) @ right.reshape(*right.shape[: along + 1], -1)).reshape(right.shape)
    none = torch.zeros_like(levels.narrow(along, 0, 1))
    return torch.cat([none, found, none], along)


def _flatten(forcing: Forcing) -> tuple[list[Any], tuple[str, bool]]:
    parts = [forcing.knots, forcing.levels] + ([] if forcing.bends is None else [forcing.bends])
    return parts, (forcing.kind, forcing.bends is not None)


def _unflatten(parts: Iterable[Any], context: tuple[str, bool]) -> Forcing:
    knots, levels, *bends = parts
    made = Forcing.__new__(Forcing)
    made._set(knots, levels, context[0], bends[0] if bends else None)
    return made


register_pytree_node(Forcing, _flatten, _unflatten, serialized_type_name="adjoint.Forcing")


def with_knots(step_ts: Any, args: Any, functions: Iterable[Callable[..., Any] | None], device: torch.device) -> Any:
    """``step_ts`` with the knots of the tables that are in ``args`` or that ``functions`` hold."""
    if not Forcing.met:
        return step_ts
    named = tree_leaves(args, is_leaf=lambda x: isinstance(x, Forcing))
    tables = [x for x in (*named, *held_by(functions, Forcing)) if isinstance(x, Forcing)]
    if not tables:
        return step_ts
    distinct = {id(table.knots): table.times for table in tables}
    every = [*([] if step_ts is None else [as_times(step_ts, "step_ts", device)]), *distinct.values()]
    every = [x.to(device=device, dtype=torch.float64) for x in every]
    rows = max((x.shape[1] for x in every if x.dim() == 2), default=0)
    return torch.cat([x.unsqueeze(-1).expand(-1, rows) if rows and x.dim() == 1 else x for x in every])
