"""What rows are differentiated with that failed, beside others that did not: parameters of their own are replaced.

Nothing is asked of a row that failed. But whatever is evaluated for it is summed with the rest, and zero times NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..system.capture import Substitute, constants_of
from ..system.system import System, VmappedSystem
from ..system.transforms import anywhere, functorch_active
from ..torch_internals import is_functorch_wrapped_tensor

if TYPE_CHECKING:
    from .implicit import Conditions

__all__ = ["replacements", "without_constants"]

#: the user's function at some points, ``(B, ...)`` each, for given inputs
Values = Callable[[Sequence[Tensor]], list[Tensor]]
_Rows = tuple[Tensor, Tensor]


def replacements(
    system: Conditions,
    values: Values,
    dead: Tensor,
    donor: Tensor,
    inputs: Sequence[Tensor],
    unseen: int | None = None,
    wholly: Tensor | None = None,
) -> tuple[Sequence[Tensor], list[Tensor | None]]:
    """Inputs without what made the rows ``dead`` (B,) fail, and which of their entries are those of the ``donor`` (0-d) now.

    An entry for each row is had by inputs that ``torch.vmap`` maps over, and, with ``batched=True``, it seems, by all of the length
    of the batch. Whether that is so is not known: none is replaced on which ``values`` depend in a row that did not fail. ``unseen``: the
    place of an input about which they say nothing, a matrix; where it is one of three dimensions each row has its own. ``wholly`` (B,):
    those of the rows of which everything is replaced, however finite it is.
    """

    def tried(given: Sequence[Tensor], replaced: Sequence[Tensor | None], which: Tensor, only_bad: bool) -> Any:
        rows = [_rows_of(system, i, x, which, donor, 3 if i == unseen else 1) for i, x in enumerate(inputs)]
        return _tried(values, ~dead, given, replaced, rows, only_bad)

    given, replaced = tried(inputs, [None] * len(inputs), dead, True)
    if any(anywhere(~torch.isfinite(x)) for x in values(given)):
        return tried(given, replaced, dead, False)
    return (given, replaced) if wholly is None or not anywhere(wholly) else tried(given, replaced, wholly, False)


def _rows_of(system: Conditions, index: int, x: Tensor, dead: Tensor, donor: Tensor, least: int) -> _Rows | None:
    """Which entries of an input are of rows that failed, as flags of its shape, and the input of the ``donor`` for all; ``least``: the
    dimensions of an input that has an entry for each row."""
    if not (x.is_floating_point() or x.is_complex()):
        return None
    sizes, mapped = [], []
    while isinstance(system, VmappedSystem):
        sizes.append(system.size)
        mapped.append(system.in_dims[index] is not None)
        system = system.base
    if system.spec.batch is not None:
        place = sum(mapped)
        sizes.append(system.spec.batch)
        mapped.append(x.dim() >= place + least and x.shape[place] == system.spec.batch)
    lead = [size for size, own in zip(sizes, mapped, strict=True) if own]
    if not lead:
        return None
    flags = dead.reshape(sizes)
    places, rest = [], donor
    for size in reversed(sizes):
        places.insert(0, rest % size)
        rest = rest // size
    at = x.detach()
    for level in reversed(range(len(sizes))):
        if not mapped[level]:
            flags = flags.all(level)
    for place, own in zip(places, mapped, strict=True):
        if own:
            at = at.index_select(0, place.reshape(1)).squeeze(0)
    return flags.reshape(*lead, *[1] * (x.dim() - len(lead))).expand_as(x), at.expand_as(x)


def _tried(
    values: Values,
    live: Tensor,
    inputs: Sequence[Tensor],
    replaced: Sequence[Tensor | None],
    rows: Sequence[_Rows | None],
    only_bad: bool,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """One input after the other with the entries of failed rows replaced, where that changes nothing for the ``live`` ones; with
    ``only_bad`` those that are not finite."""
    given, out = list(inputs), list(replaced)
    for i, (x, found) in enumerate(zip(inputs, rows, strict=True)):
        if found is None:
            continue
        flags, other = found
        bad = ~torch.isfinite(x.detach())
        if only_bad and (not anywhere(bad) or anywhere(bad & ~flags)):
            continue
        mask = flags & bad if only_bad else flags
        new = torch.where(mask, other, x)
        if x.requires_grad and not new.requires_grad and not functorch_active():
            new.requires_grad_(True)
        trial = [*given[:i], new, *given[i + 1 :]]
        if not any(anywhere((a != b) & live.unsqueeze(-1)) for a, b in zip(values(given), values(trial), strict=True)):
            before = out[i]
            given, out[i] = trial, mask if before is None else mask | before
    return given, out


def without_constants(
    system: System | VmappedSystem, values: Callable[[System], list[Tensor]], dead: Tensor, donor: Tensor
) -> System | VmappedSystem:
    """The system with a ``fun`` that is given other constants, where ``values`` are not finite for what the rows ``dead`` (B,) have of
    these: what ``fun`` captured with an entry for each row, and nobody differentiates by. As `replacements`."""
    if not isinstance(system, System) or is_functorch_wrapped_tensor(dead):
        return system
    known = values(system)
    if not any(anywhere(~torch.isfinite(x)) for x in known):
        return system
    live, found, taken = ~dead.unsqueeze(-1), system, []
    for constant in constants_of(lambda: values(system), dead.shape[0], system.inputs):
        flags = dead.reshape(-1, *[1] * (constant.dim() - 1))
        other = torch.where(flags, constant.index_select(0, donor.reshape(1)), constant)
        trial = _with_constants(system, [*taken, (constant, other)])
        if not any(anywhere((a != b) & live) for a, b in zip(known, values(trial), strict=True)):
            taken.append((constant, other))
            found = trial
    return found


def _with_constants(system: System, pairs: Sequence[_Rows]) -> System:
    mode, call = Substitute([x for x, _ in pairs], [x for _, x in pairs]), system.fun
    return replace(system, fun=lambda *a: mode.run(call, *a), parameter_names=None)
