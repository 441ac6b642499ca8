"""``Contact``: a gap that stays open, with what happens where it closes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidInput
from ..system.capture import readable
from .holonomic import Rows

__all__ = ["Contact", "Contacts"]


@dataclass(frozen=True)
class Contact:
    """A gap ``gap(t, q) >= 0`` between two parts of a mechanism, or between a part and its surroundings: an entry of ``contacts=`` of
    `mechanics`.

    Where the gap closes, the speed ``s`` at which it opens is turned round, ``s+ = -restitution s-`` (Newton). A contact that would open
    again at no more than ``rest_speed`` stays closed as long as it pushes, and pushes with the force that it takes to keep it closed.

    Parameters
    ----------
    gap : callable
        ``gap(t, q, *args) -> 0-d tensor``, with ``batched=True`` ``(B,)``: the distance, negative for parts that overlap, differentiable in
        ``t`` and ``q``.
    restitution : number, tensor or callable
        Between 0 (the contact does not open again) and 1 (no energy is lost); a tensor may be ``(B,)``. ``restitution(*args)`` gives the
        same. Differentiated.
    rest_speed : float
        In units of the gap in a unit of time, at least 0. With 0 only a contact of restitution 0 comes to rest, and bounces that
        accumulate raise `EventsAccumulate`.
    name : str
        ``sol.events[name]`` is the record of its impacts, ``sol.events[f"{name} released"]`` that of the times at which it ceased to push.
        By default "contact 0", "contact 1", ..., in the order of ``contacts=``.

    Raises
    ------
    InvalidInput
    """

    gap: Callable[..., Tensor]
    restitution: float | Tensor | Callable[..., Any] = 1.0
    rest_speed: float = 0.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.gap):
            raise InvalidInput(f"gap of a contact must be callable, got a {type(self.gap).__name__}")
        if self.name is not None and not isinstance(self.name, str):
            raise InvalidInput(f"name of a contact must be a string, got {self.name!r}")
        speed = self.rest_speed
        if isinstance(speed, bool) or not isinstance(speed, Real) or not 0 <= float(speed) < math.inf:
            raise InvalidInput(f"rest_speed of a contact must be a finite number of at least 0, got {speed!r}")
        if not callable(self.restitution) or isinstance(self.restitution, Tensor):
            _checked(self.restitution, "restitution of a contact")


def _checked(value: Any, what: str) -> Tensor:
    """A restitution as a tensor; raises `InvalidInput` for what is none."""
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise InvalidInput(f"{what} must be a number or a tensor, or a function of args that gives one, got {value!r}")
    e = torch.as_tensor(value)
    if e.is_complex() or e.dim() > 1:
        raise InvalidInput(f"{what} must be a real number, a 0-d tensor or one of shape (B,), got shape {tuple(e.shape)}, {e.dtype}")
    plain = e.detach()
    if readable(plain) and not bool(((plain >= 0) & (plain <= 1)).all()):
        wrong = float(plain.reshape(-1)[int((~((plain >= 0) & (plain <= 1))).reshape(-1).to(torch.int64).argmax())])
        raise InvalidInput(f"{what} must be between 0 and 1, got {wrong:g}: an impact takes energy, and turns the speed round")
    return e


class Contacts:
    """All contacts of a mechanism."""

    def __init__(self, contacts: Any) -> None:
        every = list(contacts) if isinstance(contacts, (tuple, list)) else [contacts]
        for i, contact in enumerate(every):
            if not isinstance(contact, Contact):
                raise InvalidInput(f"contacts[{i}] must be an adjoint.Contact, got a {type(contact).__name__}")
        if not every:
            raise InvalidInput("contacts= is empty: leave it out")
        self.every: Sequence[Contact] = every
        self.names = [contact.name or f"contact {i}" for i, contact in enumerate(every)]
        if len(set(self.names)) < len(every):
            raise InvalidInput(f"contacts have the same name: {', '.join(map(repr, self.names))}")

    def gaps(self, args: tuple[Any, ...]) -> Rows:
        """All gaps ``(..., c)`` at fixed arguments."""

        def rows(t: Tensor, q: Tensor) -> Tensor:
            return torch.stack([self.gap(i, t, q, args) for i in range(len(self.every))], -1)

        return rows

    def gap(self, i: int, t: Tensor, q: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The gap of one."""
        value = self.every[i].gap(t, q, *args)
        if not isinstance(value, Tensor) or value.shape != q.shape[:-1] or value.dtype != q.dtype:
            got = f"shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            many = "one for each trajectory of the batch" if q.dim() == 2 else "0-d"
            raise InvalidInput(
                f"gap of {self.names[i]!r} must return a tensor of shape {tuple(q.shape[:-1])} ({many}), {q.dtype}; got {got}"
            )
        return value

    def restitution(self, like: Tensor, args: tuple[Any, ...]) -> Tensor:
        """``(..., c)``, as ``like``."""
        out = []
        for contact, name in zip(self.every, self.names, strict=True):
            given = contact.restitution
            e = _checked(given(*args) if callable(given) else given, f"restitution of {name!r}")
            if e.dim() and e.shape != like.shape[:-1]:
                raise InvalidInput(f"restitution of {name!r} has shape {tuple(e.shape)}: () or {tuple(like.shape[:-1])} is expected")
            out.append(e.to(like).expand(like.shape[:-1]))
        return torch.stack(out, -1)

    def rest_speed(self, like: Tensor) -> Tensor:
        """``(c,)``"""
        return torch.tensor([float(contact.rest_speed) for contact in self.every], dtype=like.dtype, device=like.device)
